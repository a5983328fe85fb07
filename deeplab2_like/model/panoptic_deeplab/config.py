"""The `model` section of Panoptic-DeepLab's configs."""

from typing import Any, Literal

import pydantic

from deeplab2_like.configs.schema import StrictModel, was_saved_before
from deeplab2_like.model.config import SystemConfig

Convolution = Literal["separable", "plain", "light"]


class AsppConfig(StrictModel):
    """Atrous spatial pyramid pooling (ASPP)."""

    channels: int = pydantic.Field(256, ge=1, description="Channels of every branch and of the result.")
    rates: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        (6, 12, 18),
        description="Atrous rates in feature pixels. The defaults suit large images at output stride 16; double them "
        "at output stride 8.",
    )
    pooling_window: tuple[pydantic.PositiveInt, pydantic.PositiveInt] | None = pydantic.Field(
        None, description="Window of the image pooling in feature pixels; null averages the whole image."
    )
    pooling_norm: bool = pydantic.Field(
        False, description="Normalize the pooled features, as DeepLab2 does, instead of adding a bias."
    )
    convolution: Literal["separable", "plain"] | None = pydantic.Field(
        None,
        description="Convolutions at the atrous rates: `separable`, or `plain` for 3x3 convolutions, as in DeepLab2; "
        "null for that of `decoder.convolution`.",
    )
    dropout: float = pydantic.Field(0.1, ge=0, lt=1, description="Dropout rate of the result.")


class DecoderConfig(StrictModel):
    """Both decoders and their heads."""

    low_level_channels: dict[str, pydantic.PositiveInt] = pydantic.Field(
        {"res3": 64, "res2": 32},
        description="Channels of each projected low-level feature. Predictions have the stride of the finest "
        "one: add `stem` to predict at 1/2 instead of 1/4 of the image size.",
    )
    instance_low_level_channels: dict[str, pydantic.PositiveInt] = pydantic.Field(
        {"res3": 32, "res2": 16},
        description="The same for the instance decoder; it must have the same features as `low_level_channels`.",
    )
    convolution: Convolution = pydantic.Field(
        "separable",
        description="Convolutions of each decoder step and of the heads: `separable`, one 5x5 depthwise separable "
        "convolution, as in the paper; `plain`, two 3x3; `light`, one 3x3, the fastest on a CPU.",
    )
    center_head_convolution: Convolution = pydantic.Field(
        "separable", description="Convolutions of the center head, with the same choices as `convolution`."
    )
    semantic_channels: int = pydantic.Field(256, ge=1, description="Channels of the semantic decoder.")
    semantic_head_channels: int = pydantic.Field(256, ge=1, description="Channels of the semantic head.")
    instance_channels: int = pydantic.Field(128, ge=1, description="Channels of the instance decoder.")
    instance_head_channels: int = pydantic.Field(32, ge=1, description="Channels of the center and offset heads.")

    @pydantic.model_validator(mode="before")
    @classmethod
    def _complete_old_config(cls, content: Any) -> Any:
        """Reads configs of model folders of earlier versions, whose decoders had equal widths."""
        saved_keys = (
            "low_level_channels",
            "convolution",
            "center_head_convolution",
            "semantic_channels",
            "semantic_head_channels",
            "instance_channels",
            "instance_head_channels",
        )
        if was_saved_before(content, "instance_low_level_channels", saved_keys=saved_keys):
            return {**content, "instance_low_level_channels": content["low_level_channels"]}
        return content

    @pydantic.field_validator("low_level_channels", "instance_low_level_channels")
    @classmethod
    def _known_features(cls, value: dict[str, int]) -> dict[str, int]:
        known = ("res3", "res2", "stem")
        if not value or not value.keys() <= set(known):
            raise ValueError("its keys must be some of res3, res2, stem")
        return {feature: value[feature] for feature in known if feature in value}


class LossConfig(StrictModel):
    """Losses and their targets (section 4)."""

    semantic_weight: float = pydantic.Field(1.0, ge=0, description="Weight of the semantic loss.")
    center_weight: float = pydantic.Field(200.0, ge=0, description="Weight of the center loss.")
    offset_weight: float = pydantic.Field(
        0.01, ge=0, description="Weight of the offset loss; offsets are in image pixels."
    )
    center: Literal["mean_squared_error", "sigmoid_cross_entropy"] = pydantic.Field(
        "mean_squared_error", description="Loss of the center heat map."
    )
    sigma: float = pydantic.Field(
        8.0,
        gt=0,
        description="Standard deviation of the Gaussians at the centers, in pixels; lower it for small objects.",
    )
    top_k_share: float = pydantic.Field(
        0.2, gt=0, le=1, description="Share of the hardest pixels that enter the semantic loss."
    )
    top_k_over: Literal["image", "batch"] = pydantic.Field(
        "image",
        description="Choose the hardest pixels of each `image`, or of the whole `batch` of a device, as Detectron2 "
        "does; with `batch`, training depends on the number of devices.",
    )
    small_instance_area: int = pydantic.Field(
        64 * 64,
        ge=0,
        description="Instances with a smaller area, in pixels, have a larger weight in the semantic loss.",
    )
    small_instance_weight: float = pydantic.Field(
        3.0, gt=0, description="Weight of the pixels of these small instances."
    )
    crowd_as_instance: bool = pydantic.Field(
        False,
        description="Learn a crowd region as one more instance, which keeps its pixels out of the masks of nearby "
        "instances. A segment that covers a crowd does not lower PQ.",
    )


class PostprocessConfig(StrictModel):
    """From heads to the panoptic map (section 3.2)."""

    center_threshold: float = pydantic.Field(
        0.1, ge=0, description="Centers with this value of the heat map or a lower one are dropped."
    )
    nms_kernel: int = pydantic.Field(
        7,
        ge=1,
        description="A center is the maximum of the heat map in a square window with this side, an odd number of "
        "image pixels.",
    )
    top_k: int = pydantic.Field(
        200, ge=1, description="Largest number of instances per image; must be below the label divisor."
    )
    stuff_area_limit: int = pydantic.Field(
        0,
        ge=0,
        description="Stuff segments with fewer pixels become void. The paper uses 2048 for Cityscapes, 4096 for COCO "
        "and Mapillary Vistas.",
    )

    @pydantic.field_validator("nms_kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value


class PanopticDeepLabConfig(SystemConfig):
    """The `model` section of a config."""

    resizing: Literal["half_pixel", "aligned_corners"] = pydantic.Field(
        "half_pixel",
        description="What resizing keeps in place: `half_pixel`, the borders of a map; `aligned_corners`, as in "
        "DeepLab2, the centers of its corner pixels, and images are padded to 32 * k + 1 pixels.",
    )
    min_padded_size: tuple[pydantic.PositiveInt, pydantic.PositiveInt] = pydantic.Field(
        (1, 1),
        description="Height and width to which smaller images are padded. Released weights give the results of their "
        "authors with the size of the training crop, as the image pooling averages the padding, too.",
    )
    void_class: bool = pydantic.Field(
        False,
        description="Predict void as one more class, as DeepLab2 does on COCO; its pixels become void.",
    )
    dual_aspp: bool = pydantic.Field(True, description="Give each branch its own ASPP.")
    dual_decoder: bool = pydantic.Field(
        True, description="Give each branch its own decoder; otherwise the heads share the semantic one."
    )
    semantic_only: bool = pydantic.Field(False, description="Leave out the instance branch: Semantic-DeepLab.")
    aspp: AsppConfig = pydantic.Field(AsppConfig(), description="Atrous spatial pyramid pooling.")
    instance_aspp: AsppConfig | None = pydantic.Field(
        None, description="The ASPP of the instance branch, if it differs; null for the same settings as `aspp`."
    )
    decoder: DecoderConfig = pydantic.Field(DecoderConfig(), description="Decoders and heads.")
    loss: LossConfig = pydantic.Field(LossConfig(), description="Losses and their targets.")
    postprocess: PostprocessConfig = pydantic.Field(PostprocessConfig(), description="From heads to the panoptic map.")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "PanopticDeepLabConfig":
        if self.dual_aspp and not self.dual_decoder:
            raise ValueError("dual_aspp needs dual_decoder, as one decoder has one input; set both to the same value")
        if self.instance_aspp is not None and not self.dual_aspp:
            raise ValueError(
                "instance_aspp needs dual_aspp, as the branches share one ASPP otherwise; set both or neither"
            )
        semantic, instance = self.decoder.low_level_channels, self.decoder.instance_low_level_channels
        if self.dual_decoder and not self.semantic_only and list(semantic) != list(instance):
            raise ValueError(
                f"decoder.instance_low_level_channels has the features {', '.join(instance)}, but "
                f"decoder.low_level_channels has {', '.join(semantic)}; set both keys to the same features"
            )
        return self
