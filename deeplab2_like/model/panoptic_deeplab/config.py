"""The `model` section of Panoptic-DeepLab's configs."""

from typing import Literal

import pydantic

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.model.config import SystemConfig

Convolution = Literal["separable", "plain", "light"]


class AsppConfig(StrictModel):
    """Atrous spatial pyramid pooling (ASPP)."""

    channels: int = pydantic.Field(256, ge=1, description="Channels of every branch and of the result.")
    rates: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        (6, 12, 18), description="Atrous rates in feature pixels; double them at output stride 8."
    )
    pooling_window: tuple[pydantic.PositiveInt, pydantic.PositiveInt] | None = pydantic.Field(
        None, description="Window of the image pooling in feature pixels; null averages the whole image."
    )
    dropout: float = pydantic.Field(0.1, ge=0, lt=1, description="Share of the result that training drops.")


class DecoderConfig(StrictModel):
    """Both decoders and their heads."""

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
    center_head_convolution: Convolution = pydantic.Field(
        "separable", description="In the center head, as `convolution`."
    )
    semantic_channels: int = pydantic.Field(256, ge=1, description="Channels of the semantic decoder.")
    semantic_head_channels: int = pydantic.Field(256, ge=1, description="Channels of the semantic head.")
    instance_channels: int = pydantic.Field(128, ge=1, description="Channels of the instance decoder.")
    instance_head_channels: int = pydantic.Field(32, ge=1, description="Channels of the center and offset heads.")

    @pydantic.field_validator("low_level_channels")
    @classmethod
    def _known_features(cls, value: dict[str, int]) -> dict[str, int]:
        order = [feature for feature in ("res3", "res2", "stem") if feature in value]
        if not value or list(value) != order:
            raise ValueError("its keys must be some of res3, res2, stem, in this order")
        return value


class LossConfig(StrictModel):
    """Losses and their targets (section 4)."""

    semantic_weight: float = pydantic.Field(1.0, ge=0, description="Weight of the semantic loss.")
    center_weight: float = pydantic.Field(200.0, ge=0, description="Weight of the center loss.")
    offset_weight: float = pydantic.Field(0.01, ge=0, description="Weight of the offset loss, of offsets in pixels.")
    center: Literal["mean_squared_error", "sigmoid_cross_entropy"] = pydantic.Field(
        "mean_squared_error", description="Loss of the center heat map."
    )
    sigma: float = pydantic.Field(8.0, gt=0, description="Standard deviation of the centers' Gaussians, in pixels.")
    top_k_share: float = pydantic.Field(0.2, gt=0, le=1, description="Share of pixels in the semantic loss.")
    small_instance_area: int = pydantic.Field(64 * 64, ge=0, description="Smaller instances weigh more, in pixels.")
    small_instance_weight: float = pydantic.Field(3.0, gt=0, description="Weight of their pixels.")
    crowd_as_instance: bool = pydantic.Field(
        False,
        description="Learn a crowd region as one more instance. By default its pixels go to any nearby center, which "
        "spoils the masks of the instances around large crowds; a segment that covers a crowd costs nothing in PQ.",
    )


class PostprocessConfig(StrictModel):
    """From heads to the panoptic map (section 3.2)."""

    center_threshold: float = pydantic.Field(0.1, ge=0, description="Heat that a center must exceed.")
    nms_kernel: int = pydantic.Field(7, ge=1, description="Odd side of the window of a peak, in pixels.")
    top_k: int = pydantic.Field(200, ge=1, description="Largest number of instances per image.")
    stuff_area_limit: int = pydantic.Field(0, ge=0, description="Smaller stuff segments become void, in pixels.")

    @pydantic.field_validator("nms_kernel")
    @classmethod
    def _odd(cls, value: int) -> int:
        if value % 2 == 0:
            raise ValueError("must be odd")
        return value


class PanopticDeepLabConfig(SystemConfig):
    """The `model` section of a config."""

    dual_aspp: bool = pydantic.Field(True, description="Give each branch its own ASPP.")
    dual_decoder: bool = pydantic.Field(
        True, description="Give each branch its own decoder; otherwise the heads share the semantic one."
    )
    semantic_only: bool = pydantic.Field(False, description="Leave out the instance branch: Semantic-DeepLab.")
    aspp: AsppConfig = pydantic.Field(AsppConfig(), description="Atrous spatial pyramid pooling.")
    decoder: DecoderConfig = pydantic.Field(DecoderConfig(), description="Decoders and heads.")
    loss: LossConfig = pydantic.Field(LossConfig(), description="Losses and their targets.")
    postprocess: PostprocessConfig = pydantic.Field(PostprocessConfig(), description="From heads to the panoptic map.")

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "PanopticDeepLabConfig":
        if self.dual_aspp and not self.dual_decoder:
            raise ValueError("dual_aspp needs dual_decoder, as one decoder has one input; set both to the same value")
        return self
