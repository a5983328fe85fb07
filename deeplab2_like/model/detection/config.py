"""Config sections of two-stage detection."""

from typing import Literal

import pydantic

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.model.config import backbone_features


class RpnConfig(StrictModel):
    """The region proposal network (RPN)."""

    anchor_sizes: tuple[pydantic.PositiveFloat, ...] = pydantic.Field(
        (32.0, 64.0, 128.0, 256.0, 512.0),
        description="Square root of the anchor area in pixels, one value for each level from the finest to p6. Set "
        "these to the sizes of your objects.",
    )
    anchor_ratios: tuple[pydantic.PositiveFloat, ...] = pydantic.Field(
        (0.5, 1.0, 2.0), description="Height over width of the anchors."
    )
    channels: int = pydantic.Field(256, ge=1, description="Channels of the head's 3x3 convolution.")
    positive_iou: float = pydantic.Field(
        0.7, ge=0, le=1, description="Anchors with at least this overlap are positive."
    )
    negative_iou: float = pydantic.Field(0.3, ge=0, le=1, description="Anchors with less overlap are negative.")
    crowd_share: float = pydantic.Field(
        0.5, ge=0, le=1, description="An anchor with a larger share of crowd or void is never negative."
    )
    samples: int = pydantic.Field(256, ge=1, description="Anchors per image that enter the losses.")
    positive_share: float = pydantic.Field(0.5, gt=0, le=1, description="Largest share of positives among `samples`.")
    normalizer: Literal["fixed", "sampled"] = pydantic.Field(
        "fixed",
        description="`fixed` divides the losses by `samples` per image, as Detectron2 does; `sampled` divides them by "
        "the number of anchors that were actually sampled.",
    )
    train_candidates: int = pydantic.Field(
        2000, ge=1, description="Best boxes of each level that enter non-maximum suppression in training."
    )
    test_candidates: int = pydantic.Field(
        1000, ge=1, description="Best boxes of each level that enter non-maximum suppression outside of training."
    )
    nms_iou: float = pydantic.Field(
        0.7, ge=0, le=1, description="A box that overlaps a better one of its level by more than this is dropped."
    )
    proposals: int = pydantic.Field(
        1000, ge=1, description="Largest number of boxes per image after non-maximum suppression, over all levels."
    )

    @property
    def max_positives(self) -> int:
        """Largest number of positives among the samples."""
        return int(self.samples * self.positive_share)


class RoiConfig(StrictModel):
    """The heads on regions of interest (RoIs)."""

    samples: int = pydantic.Field(512, ge=1, description="RoIs per image that enter the losses.")
    foreground_share: float = pydantic.Field(
        0.25, gt=0, le=1, description="Largest share of foreground among `samples`."
    )
    foreground_iou: float = pydantic.Field(
        0.5, ge=0, le=1, description="RoIs with at least this overlap are foreground."
    )
    crowd_share: float = pydantic.Field(
        0.5, ge=0, le=1, description="An RoI with a larger share of crowd or void is never background."
    )
    box_resolution: int = pydantic.Field(7, ge=1, description="Bins of RoIAlign per axis for the box head.")
    mask_resolution: int = pydantic.Field(
        14, ge=1, description="Bins of RoIAlign per axis for the mask head; masks have twice as many pixels."
    )
    sampling_ratio: int = pydantic.Field(
        2, ge=0, description="Samples of RoIAlign per bin and axis; 0 takes one per feature pixel, as Detectron2 does."
    )
    max_sampling_ratio: int = pydantic.Field(
        8,
        ge=1,
        description="With `sampling_ratio` 0: largest number of samples per bin and axis. 48 is exact for images of up "
        "to 1344 pixels. Along the shorter side of a box it is 16 at most, for mask targets 8.",
    )
    box_channels: int = pydantic.Field(1024, ge=1, description="Channels of the box head's hidden layers.")
    mask_channels: int = pydantic.Field(256, ge=1, description="Channels of the mask head's convolutions.")
    mask_convolutions: int = pydantic.Field(4, ge=0, description="Number of 3x3 convolutions in the mask head.")
    box_weights: tuple[float, float, float, float] = pydantic.Field(
        (10.0, 10.0, 5.0, 5.0), description="Factors of the box deltas dy, dx, dh, dw."
    )
    score_threshold: float = pydantic.Field(
        0.05, ge=0, le=1, description="Detections with this score or a lower one are dropped."
    )
    nms_iou: float = pydantic.Field(
        0.5, ge=0, le=1, description="A detection that overlaps a better one of its class by more than this is dropped."
    )
    candidates: int = pydantic.Field(
        1000, ge=1, description="Best pairs of box and class that enter non-maximum suppression."
    )
    detections: int = pydantic.Field(
        100, ge=1, description="Largest number of detections per image; must be below the label divisor."
    )

    @pydantic.model_validator(mode="after")
    def _has_foreground(self) -> "RoiConfig":
        if self.foreground_samples < 1:
            raise ValueError("roi.samples * roi.foreground_share must be 1 or more, or nothing trains boxes and masks")
        return self

    @property
    def foreground_samples(self) -> int:
        """Largest number of foreground RoIs among the samples; they come first."""
        return int(self.samples * self.foreground_share)


def check_anchor_sizes(rpn: RpnConfig, finest_level: str) -> None:
    """Checks that there is one anchor size for each pyramid level from the finest one to p6.

    Args:
        rpn: The anchors.
        finest_level: Name of the finest level.

    Raises:
        ValueError: If there is not.
    """
    num_levels = len(backbone_features(finest_level)) + 1
    if len(rpn.anchor_sizes) != num_levels:
        raise ValueError(f"rpn.anchor_sizes must be {num_levels} sizes, one for each level from {finest_level} to p6")
