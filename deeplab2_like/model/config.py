"""Config sections that several systems share. Nothing here imports Keras, so that configs are checked quickly."""

from collections.abc import Sequence
from typing import Any, Literal

import pydantic

from deeplab2_like.configs.schema import ResizeConfig, StrictModel, was_saved_before
from deeplab2_like.model.pretrained import IMAGENET, IMAGENET_SETTINGS, describe_settings, wrong_settings

AtrousConversion = Literal["exact", "detectron2"]
Padding = Literal["symmetric", "same"]


class Norm(StrictModel):
    """The normalization after a convolution."""

    kind: Literal["batch", "sync_batch", "frozen_batch", "group", "none"] = pydantic.Field(
        "sync_batch",
        description="`batch`; `sync_batch`, statistics over all replicas (`batch` where the backend has no replicas); "
        "`frozen_batch`, stored statistics, nothing trained; `group`, 32 groups, so channels must be "
        "multiples of 32; `none`.",
    )
    momentum: float = pydantic.Field(
        0.99,
        ge=0,
        lt=1,
        description="Share of the moving average that a training step keeps; lower it for short trainings.",
    )
    epsilon: float = pydantic.Field(1e-3, gt=0, description="Constant added to the variance.")


class BackboneConfig(StrictModel):
    """The network that extracts features."""

    name: str = pydantic.Field(
        "resnet50",
        description="Name of the backbone: `resnet50`, `resnet101`, `resnet152`, `resnext101_32x8d`, "
        "`resnext101_64x4d`, `resnext152_32x8d`, `mobilenet_v3_large`, `mobilenet_v3_small`, `efficientnet_lite0`, "
        "`efficientnet_lite1`, `efficientnet_lite2` or `resnet_tiny`.",
    )
    output_stride: Literal[8, 16, 32] = pydantic.Field(
        16,
        description="Stride of the last features. Below 32, the last stages use atrous convolution instead of stride; "
        "a feature pyramid needs 32.",
    )
    multi_grid: tuple[pydantic.PositiveInt, pydantic.PositiveInt, pydantic.PositiveInt] = pydantic.Field(
        (1, 1, 1), description="ResNet only: factors of the dilation in the blocks of the last stage."
    )
    stem: Literal["three_convolutions", "seven_by_seven"] = pydantic.Field(
        "three_convolutions",
        description="ResNet-50 to ResNet-152 and ResNeXt only: the convolutions before the first max pooling; "
        "`seven_by_seven` is the stem of the original ResNet.",
    )
    stride_in_1x1: bool = pydantic.Field(
        False,
        description="ResNet-50 to ResNet-152 and ResNeXt only: apply the stride of a block in its first 1x1 "
        "convolution, not in its 3x3, as many released weights need it.",
    )
    deformable_stages: tuple[Literal["res3", "res4", "res5"], ...] = pydantic.Field(
        (),
        description="ResNet-50 to ResNet-152 only: stages with deformable 3x3 convolutions, such as [res3, res4, "
        "res5].",
    )
    atrous_conversion: AtrousConversion = pydantic.Field(
        "exact",
        description="Atrous rate of a convolution that lost its stride: `exact`, the rate before it, as in DeepLab2, "
        "so that the same weights give the same features at any output stride; `detectron2`, the rate after it, for "
        "weights of Detectron2.",
    )
    max_pool: bool = pydantic.Field(
        True,
        description="ResNet-50 to ResNet-152 and ResNeXt only: max pooling after the stem; `false` gives res2 a stride "
        "instead, as in DeepLab2.",
    )
    halve_last_stage: bool = pydantic.Field(
        True,
        description="MobileNetV3 only: halve the channels of the last stage, as Panoptic-DeepLab does; the weights of "
        "ImageNet and of DeepLab2 need `false`.",
    )
    squeeze_gate: Literal["hard_sigmoid", "sigmoid"] = pydantic.Field(
        "hard_sigmoid",
        description="MobileNetV3 only: activation of the factors of squeeze-and-excite; DeepLab2 has `sigmoid`.",
    )
    depthwise_features: bool = pydantic.Field(
        False,
        description="MobileNetV3 only: take the features of a stage from its last depthwise convolution, as DeepLab2 "
        "does, and not from the end of its last block.",
    )
    padding: Padding = pydantic.Field(
        "symmetric",
        description="Zeros around the input of convolutions with stride: `symmetric`, as many on every side; `same`, "
        "fewer at the top and left than at the bottom and right, as TensorFlow does, for weights that were trained so.",
    )
    weights: str | None = pydantic.Field(
        None,
        description="Weights that a new training starts from: `imagenet`, the path of a file, or null for random ones. "
        "`imagenet` sets the keys that belong to these weights, such as `model.image_mean`, where they are left out.",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _complete_old_config(cls, content: Any) -> Any:
        """Reads configs of model folders of earlier versions, which had one way of conversion."""
        saved_keys = ("name", "output_stride", "multi_grid", "stem", "stride_in_1x1", "deformable_stages")
        if was_saved_before(content, "atrous_conversion", saved_keys=saved_keys):
            return {**content, "atrous_conversion": "detectron2"}
        return content


class FpnConfig(StrictModel):
    """The feature pyramid."""

    channels: int = pydantic.Field(256, ge=2, description="Channels of every level.")
    finest_level: Literal["p1", "p2"] = pydantic.Field(
        "p2",
        description="`p2` has stride 4, as in the paper. `p1` has stride 2 and four times as many positions, for "
        "objects of a few pixels.",
    )
    norm: Norm | None = pydantic.Field(
        None, description="Normalization after each convolution, such as {kind: group}; null for none, as in the paper."
    )


def backbone_features(finest_level: str) -> dict[str, str]:
    """Returns the name of the backbone feature of each pyramid level, from the finest level to p5."""
    features = {"p1": "stem", "p2": "res2", "p3": "res3", "p4": "res4", "p5": "res5"}
    return {level: feature for level, feature in features.items() if level >= finest_level}


def are_consecutive_levels(names: Sequence[str]) -> bool:
    """Returns whether these are names of consecutive pyramid levels, fine to coarse."""
    known = ["p1", "p2", "p3", "p4", "p5", "p6", "p7"]
    first = known.index(names[0]) if names and names[0] in known else 0
    return bool(names) and list(names) == known[first : first + len(names)]


def level_stride(level: str) -> int:
    """Returns the stride of a pyramid level by its name: 8 for `p3`."""
    return int(2 ** int(level.removeprefix("p")))


class SystemConfig(StrictModel):
    """The part of a `model` section that all systems share."""

    backbone: BackboneConfig = pydantic.Field(BackboneConfig(), description="The network that extracts features.")
    norm: Norm = pydantic.Field(Norm(), description="Normalization of the backbone.")
    image_mean: tuple[float, float, float] = pydantic.Field(
        (123.675, 116.28, 103.53), description="Mean of red, green and blue, in 0..255; ImageNet's by default."
    )
    image_std: tuple[pydantic.PositiveFloat, pydantic.PositiveFloat, pydantic.PositiveFloat] = pydantic.Field(
        (58.395, 57.12, 57.375), description="Standard deviation of red, green and blue; ImageNet's by default."
    )
    resize: ResizeConfig | None = pydantic.Field(
        None,
        description="Network size outside of training, such as {shorter_side: 800, longer_side: {max: 1333}}; null "
        "keeps the size of the image. The panoptic map always has the size of the image.",
    )

    @pydantic.model_validator(mode="before")
    @classmethod
    def _move_old_keys(cls, content: Any) -> Any:
        """Reads configs of earlier versions: `postprocess.resize`, and `short_side` and `long_side` in `resize`."""
        if not isinstance(content, dict):
            return content
        postprocess = content.get("postprocess")
        if isinstance(postprocess, dict) and "resize" in postprocess and "resize" not in content:
            others = {key: value for key, value in postprocess.items() if key != "resize"}
            content = {**content, "postprocess": others, "resize": postprocess["resize"]}
        resize, old_keys = content.get("resize"), {"short_side", "long_side"}
        # A saved config has both old keys, to which an override may add a new one; a new config refuses old keys.
        if isinstance(resize, dict) and resize and (resize.keys() <= old_keys or resize.keys() >= old_keys):
            shorter, limit = resize.get("short_side", 800), resize.get("long_side", 1333)
            new = {key: value for key, value in resize.items() if key not in old_keys}
            content = {**content, "resize": {"shorter_side": shorter, "longer_side": {"max": limit}, **new}}
        return content

    @pydantic.model_validator(mode="before")
    @classmethod
    def _add_settings_of_weights(cls, content: Any) -> Any:
        """Sets the keys that belong to ImageNet weights where they are left out."""
        if not isinstance(content, dict):
            return content
        # Sections may be instances, where a config is made in Python.
        completed = dict(content)
        for key in ("backbone", "norm"):
            section = content.get(key, cls.model_fields[key].default)
            if isinstance(section, StrictModel):
                section = section.model_dump(exclude_unset=True)
            if not isinstance(section, dict):
                return content
            completed[key] = dict(section)
        name = completed["backbone"].get("name", BackboneConfig().name)
        if completed["backbone"].get("weights") != IMAGENET or not isinstance(name, str):
            return content
        for key, value in IMAGENET_SETTINGS.get(name, {}).items():
            place, _, last = key.rpartition(".")
            (completed[place] if place else completed).setdefault(last, value)
        return completed

    @pydantic.model_validator(mode="after")
    def _settings_fit_weights(self) -> "SystemConfig":
        if self.backbone.weights is None:
            return self
        if self.norm.kind in ("group", "none"):
            raise ValueError(
                f"`backbone.weights` need batch normalization; set `norm.kind` to sync_batch or frozen_batch instead "
                f"of {self.norm.kind}"
            )
        if self.backbone.weights == IMAGENET:
            settings = IMAGENET_SETTINGS.get(self.backbone.name)
            if settings is None:
                raise ValueError(
                    f"there are no ImageNet weights for backbone {self.backbone.name}, but for "
                    f"{', '.join(IMAGENET_SETTINGS)}; set `backbone.weights` to a file or null"
                )
            if wrong := wrong_settings(self, settings):
                raise ValueError(
                    f"`backbone.weights: imagenet` of {self.backbone.name} needs {describe_settings(wrong)}; set these "
                    "keys, or leave them out"
                )
        return self

    @pydantic.field_validator("resize")
    @classmethod
    def _fixed_size(cls, value: ResizeConfig | None) -> ResizeConfig | None:
        if value is not None and not isinstance(value.shorter_side, int | None):
            raise ValueError(
                "`shorter_side` must be one size, as the network size is fixed; a range and choices are for "
                "`data.resize`"
            )
        return value


class PyramidSystemConfig(SystemConfig):
    """The part of a `model` section that systems with a feature pyramid share."""

    backbone: BackboneConfig = pydantic.Field(
        BackboneConfig(output_stride=32, stem="seven_by_seven"),
        description="The network that extracts features; its output stride must be 32.",
    )
    fpn: FpnConfig = pydantic.Field(FpnConfig(), description="The feature pyramid.")
