"""Panoptic-DeepLab: a simple, strong, and fast baseline for bottom-up panoptic segmentation (Cheng et al., CVPR 2020).

A backbone with atrous convolution feeds two branches, each with its own ASPP and decoder. One predicts the class of
every pixel. The other predicts, without classes, a heat map of the instances' centres of mass and, for every pixel, the
offset to its centre. Pixels of things go to the centre nearest to where their offset points; the majority of the
pixels' classes gives the class of the instance.

Read in this order: the config below, `targets.py`, `network.py`, `losses.py`, `postprocess.py`.

Where the paper leaves a choice, and where this differs from the implementation in Detectron2:

- Image pooling in the ASPP averages the whole image. Detectron2 averages a window as large as its training crop; set
  `aspp.pooling_window` for its released weights.
- Crowd regions give neither a Gaussian nor offsets; Detectron2 gives them both and leaves out their own pixels only.
  With `loss.crowd_as_instance` they are instances.
- Semantic weights for small instances leave crowd regions out.
- The `top_k` best centres are kept, all of them; Detectron2 keeps those strictly better than the last of them.
- The class probability of an instance's score is read at the resolution of the logits, and its objectness is the heat
  of the centre itself; Detectron2 reads the heat at the centre of the predicted mask.
- The share of hardest pixels is rounded to a number of pixels; Detectron2 cuts it off.
- Images are padded to a multiple of 32 with the mean colour, and half-pixel centres are used for all enlargements;
  DeepLab2 wants sizes of `stride * k + 1` and aligns corners.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
from keras import ops

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import BackboneConfig, build_backbone
from deeplab2_like.model.layers import Norm, Tensor, resize_bilinear, upsample_bilinear
from deeplab2_like.model.panoptic_deeplab.losses import compute_losses
from deeplab2_like.model.panoptic_deeplab.network import (
    AtrousSpatialPyramidPooling,
    Convolution,
    Decoder,
    Head,
)
from deeplab2_like.model.panoptic_deeplab.postprocess import postprocess
from deeplab2_like.model.panoptic_deeplab.targets import make_targets
from deeplab2_like.model.system import Loss, PanopticSystem, View


class AsppConfig(StrictModel):
    """Atrous spatial pyramid pooling."""

    channels: int = pydantic.Field(256, ge=1)
    rates: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        (6, 12, 18), description="Atrous rates in feature pixels; double them at output stride 8."
    )
    pooling_window: tuple[pydantic.PositiveInt, pydantic.PositiveInt] | None = pydantic.Field(
        None, description="Window of the image pooling in feature pixels; null averages the whole image."
    )
    dropout: float = pydantic.Field(0.1, ge=0, lt=1)


class DecoderConfig(StrictModel):
    """Both decoders and the heads on them."""

    low_level_channels: dict[str, pydantic.PositiveInt] = pydantic.Field(
        {"res3": 64, "res2": 32},
        description="Channels to which each low-level feature is projected, coarse to fine; the last one's stride is "
        "that of the predictions. Add `stem` for predictions at 1/2 instead of 1/4.",
    )
    convolution: Convolution = pydantic.Field(
        "separable",
        description="At each step and in the heads: `separable`, one 5x5 depthwise separable convolution (the paper); "
        "`plain`, two 3x3; `light`, one 3x3.",
    )
    center_head_convolution: Convolution = "separable"
    semantic_channels: int = pydantic.Field(256, ge=1)
    semantic_head_channels: int = pydantic.Field(256, ge=1)
    instance_channels: int = pydantic.Field(128, ge=1)
    instance_head_channels: int = pydantic.Field(32, ge=1)

    @pydantic.field_validator("low_level_channels")
    @classmethod
    def _known_features(cls, value: dict[str, int]) -> dict[str, int]:
        order = [feature for feature in ("res3", "res2", "stem") if feature in value]
        if not value or list(value) != order:
            raise ValueError("its keys must be some of res3, res2, stem, in this order")
        return value


class LossConfig(StrictModel):
    """Losses and the targets they compare with (section 4)."""

    semantic_weight: float = pydantic.Field(1.0, ge=0)
    center_weight: float = pydantic.Field(200.0, ge=0)
    offset_weight: float = pydantic.Field(0.01, ge=0)
    center: Literal["mean_squared_error", "sigmoid_cross_entropy"] = "mean_squared_error"
    sigma: float = pydantic.Field(8.0, gt=0, description="Standard deviation of the centres' Gaussians, in pixels.")
    top_k_share: float = pydantic.Field(0.2, gt=0, le=1, description="Share of pixels in the semantic loss.")
    small_instance_area: int = pydantic.Field(64 * 64, ge=0, description="Smaller instances weigh more, in pixels.")
    small_instance_weight: float = pydantic.Field(3.0, gt=0)
    crowd_as_instance: bool = pydantic.Field(
        False,
        description="Learn a crowd region as one more instance. Left out, its pixels go to any centre nearby, which "
        "spoils the masks of the instances around large crowds; a segment that covers a crowd costs nothing in PQ.",
    )


class PostprocessConfig(StrictModel):
    """From heads to the panoptic map (section 3.2)."""

    center_threshold: float = pydantic.Field(0.1, ge=0)
    nms_kernel: int = pydantic.Field(7, ge=1, description="Odd side of the window of a peak, in pixels.")
    top_k: int = pydantic.Field(200, ge=1, description="Most instances per image.")
    stuff_area_limit: int = pydantic.Field(0, ge=0, description="Smaller stuff segments become void, in pixels.")

    @pydantic.field_validator("nms_kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value


class PanopticDeepLabConfig(StrictModel):
    """The `model` section of a config."""

    backbone: BackboneConfig = BackboneConfig()
    norm: Norm = Norm()
    image_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    image_std: tuple[pydantic.PositiveFloat, pydantic.PositiveFloat, pydantic.PositiveFloat] = (58.395, 57.12, 57.375)
    dual_aspp: bool = True
    dual_decoder: bool = True
    semantic_only: bool = pydantic.Field(False, description="Leave out the instance branch: Semantic-DeepLab.")
    aspp: AsppConfig = AsppConfig()
    decoder: DecoderConfig = DecoderConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "PanopticDeepLabConfig":
        if self.dual_aspp and not self.dual_decoder:
            raise ValueError("dual_aspp needs dual_decoder, as one decoder has one input; set both to the same value")
        return self


class PanopticDeepLab(PanopticSystem):
    """Panoptic-DeepLab behind the contract of `PanopticSystem`.

    Raw outputs, all float32 at the stride of the last low-level feature (4, or 2 with `stem`): `semantic_logits`
    [B, h, w, C] and, unless `semantic_only`, `center` [B, h, w, 1] and `offset` [B, h, w, 2] (y, x) in image pixels.

    Args:
        dataset_info: What the values of the panoptic map mean.
        backbone: Which backbone, and its output stride.
        norm: The normalisation of all convolutions.
        image_mean: Mean of red, green and blue, in 0..255.
        image_std: Standard deviation of red, green and blue.
        dual_aspp: Whether each branch has its own ASPP.
        dual_decoder: Whether each branch has its own decoder; else the heads share the semantic branch's.
        semantic_only: Whether to leave out the instance branch.
        aspp: Channels, rates, pooling.
        decoder: Channels and kinds of convolutions.
        loss: Weights, targets, kinds of losses.
        postprocess: Thresholds.

    Raises:
        UserError: If `postprocess.top_k` instances cannot be told apart with the data set's label divisor.
    """

    config_class = PanopticDeepLabConfig
    oracle_parts = ("semantic", "centers", "offsets")

    def __init__(
        self,
        *,
        dataset_info: DatasetInfo,
        backbone: BackboneConfig,
        norm: Norm,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
        dual_aspp: bool,
        dual_decoder: bool,
        semantic_only: bool,
        aspp: AsppConfig,
        decoder: DecoderConfig,
        loss: LossConfig,
        postprocess: PostprocessConfig,
    ) -> None:
        super().__init__(
            dataset_info=dataset_info,
            image_mean=image_mean,
            image_std=image_std,
            size_multiple=32,
            name="panoptic_deeplab",
        )
        if postprocess.top_k >= dataset_info.label_divisor:
            raise UserError(
                f"model.postprocess.top_k is {postprocess.top_k}, but label_divisor {dataset_info.label_divisor} of "
                f"data set '{dataset_info.name}' has room for {dataset_info.label_divisor - 1} instances; lower top_k."
            )
        self.semantic_only = semantic_only
        self.loss_config = loss
        self.postprocess_config = postprocess
        self.loss_weights = {"semantic": loss.semantic_weight}
        if not semantic_only:
            self.loss_weights |= {"center": loss.center_weight, "offset": loss.offset_weight}

        self.backbone = build_backbone(backbone, norm=norm)
        strides = self.backbone.strides
        self.stride = strides[list(decoder.low_level_channels)[-1]]

        def build_aspp(name: str) -> AtrousSpatialPyramidPooling:
            return AtrousSpatialPyramidPooling(
                channels=aspp.channels,
                rates=aspp.rates,
                convolution=decoder.convolution,
                pooling_window=aspp.pooling_window,
                dropout=aspp.dropout,
                norm=norm,
                name=name,
            )

        def build_decoder(channels: int, name: str) -> Decoder:
            return Decoder(
                channels=channels,
                low_level_channels=decoder.low_level_channels,
                strides=strides,
                convolution=decoder.convolution,
                norm=norm,
                name=name,
            )

        self.semantic_aspp = build_aspp("semantic_aspp")
        self.semantic_decoder = build_decoder(decoder.semantic_channels, "semantic_decoder")
        self.semantic_head = Head(
            dataset_info.num_classes,
            channels=decoder.semantic_head_channels,
            convolution=decoder.convolution,
            norm=norm,
            name="semantic_head",
        )
        if semantic_only:
            return
        self.instance_aspp = build_aspp("instance_aspp") if dual_aspp else None
        self.instance_decoder = build_decoder(decoder.instance_channels, "instance_decoder") if dual_decoder else None
        self.center_head = Head(
            1,
            channels=decoder.instance_head_channels,
            convolution=decoder.center_head_convolution,
            norm=norm,
            first_channels=decoder.instance_channels,
            name="center_head",
        )
        self.offset_head = Head(
            2,
            channels=decoder.instance_head_channels,
            convolution=decoder.convolution,
            norm=norm,
            first_channels=decoder.instance_channels,
            name="offset_head",
        )

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """See `targets.make_targets`."""
        return make_targets(
            panoptic,
            dataset_info=self.dataset_info,
            sigma=self.loss_config.sigma,
            small_instance_area=self.loss_config.small_instance_area,
            small_instance_weight=self.loss_config.small_instance_weight,
            semantic_only=self.semantic_only,
            crowd_as_instance=self.loss_config.crowd_as_instance,
        )

    def call(self, images: Tensor, targets: Any = None, training: bool = False) -> dict[str, Tensor]:
        """Runs the network; `targets` is not needed by this system.

        Args:
            images: uint8 or float [B, H, W, 3], 0..255, any size.
            targets: Ignored.
            training: Whether statistics of normalisations are those of the batch, and dropout drops.

        Returns:
            The raw outputs, see the class.
        """
        del targets
        features = self.backbone(self.prepare_images(images), training=training)
        context = self.semantic_aspp(features["res5"], training=training)
        decoded = self.semantic_decoder(context, features, training=training)
        outputs = {"semantic_logits": self.semantic_head(decoded, training=training)}
        if self.semantic_only:
            return outputs
        if self.instance_aspp is not None:
            context = self.instance_aspp(features["res5"], training=training)
        if self.instance_decoder is not None:
            decoded = self.instance_decoder(context, features, training=training)
        outputs["center"] = self.center_head(decoded, training=training)
        # The head predicts in units of its own pixels, so that its values stay small.
        outputs["offset"] = self.stride * self.offset_head(decoded, training=training)
        return outputs

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """See `losses.compute_losses`."""
        return compute_losses(
            targets,
            outputs,
            stride=self.stride,
            top_k_share=self.loss_config.top_k_share,
            center_loss=self.loss_config.center,
        )

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """See `postprocess.postprocess`."""
        return self._postprocess(outputs, image_size, self.stride)

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`."""
        return self._postprocess(self._perfect_outputs(targets), ops.shape(targets["semantic"])[1:3], 1)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: tuple[Any, Any],
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth`; outputs are enlarged to the size of the targets first."""
        height, width = image_size
        perfect = self._perfect_outputs(targets)
        replaced = {"semantic_logits": "semantic", "center": "centers", "offset": "offsets"}
        enlarged = {name: upsample_bilinear(value, self.stride) for name, value in outputs.items()}
        mixed = {
            name: perfect[name] if replaced[name] in parts else value[:, :height, :width]
            for name, value in enlarged.items()
        }
        return self._postprocess(mixed, image_size, 1)

    def _perfect_outputs(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Raw outputs at full resolution that say what the targets say."""
        outputs = {"semantic_logits": 20.0 * ops.one_hot(targets["semantic"], self.dataset_info.num_classes)}
        if not self.semantic_only:
            center = targets["center"][..., None]
            if self.loss_config.center == "sigmoid_cross_entropy":
                center = _logit(center)
            outputs |= {"center": center, "offset": targets["offset"]}
        return outputs

    def merge_views(self, views: Sequence[View], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """Averages class probabilities, heat and offsets (section 4.3); see `PanopticSystem.merge_views`."""
        is_logit = self.loss_config.center == "sigmoid_cross_entropy"
        height, width = image_size

        def aligned(view: View, name: str) -> Tensor:
            values = view.outputs[name]
            values = values[:, :, ::-1] if view.mirrored else values
            values = resize_bilinear(values, height // self.stride, width // self.stride)
            if name == "semantic_logits":
                return ops.softmax(values, axis=-1)
            if name == "center":
                return ops.sigmoid(values) if is_logit else values
            # Offsets are in pixels of the view, and a mirror image points the other way.
            shrink = [
                ops.cast(side, "float32") / ops.cast(seen, "float32")
                for side, seen in zip(image_size, view.image_size, strict=True)
            ]
            return values * ops.stack([shrink[0], -shrink[1] if view.mirrored else shrink[1]])

        mean = {name: sum(aligned(view, name) for view in views) / len(views) for name in views[0].outputs}
        merged = {"semantic_logits": ops.log(ops.maximum(mean.pop("semantic_logits"), 1e-30)), **mean}
        if is_logit and "center" in merged:
            merged["center"] = _logit(merged["center"])
        return merged

    def _postprocess(
        self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any], stride: int
    ) -> dict[str, Tensor]:
        return postprocess(
            outputs,
            image_size,
            stride=stride,
            thing_classes=self.dataset_info.thing_classes,
            label_divisor=self.dataset_info.label_divisor,
            ignore_label=self.dataset_info.ignore_label,
            center_is_logit=self.loss_config.center == "sigmoid_cross_entropy",
            center_threshold=self.postprocess_config.center_threshold,
            nms_kernel=self.postprocess_config.nms_kernel,
            top_k=self.postprocess_config.top_k,
            stuff_area_limit=self.postprocess_config.stuff_area_limit,
        )


def _logit(probability: Tensor) -> Tensor:
    """The inverse of the sigmoid, finite for 0 and 1."""
    return ops.log(ops.maximum(probability, 1e-6) / ops.maximum(1 - probability, 1e-6))
