"""Config sections of two-stage detection."""

from typing import Literal

import pydantic

from deeplab2_like.configs.schema import StrictModel


class RpnConfig(StrictModel):
    """The region proposal network."""

    anchor_sizes: tuple[pydantic.PositiveFloat, ...] = pydantic.Field(
        (32.0, 64.0, 128.0, 256.0, 512.0), description="Square root of the anchors' area, one per level, in pixels."
    )
    anchor_ratios: tuple[pydantic.PositiveFloat, ...] = pydantic.Field(
        (0.5, 1.0, 2.0), description="Height over width of the anchors."
    )
    channels: int = pydantic.Field(256, ge=1)
    positive_iou: float = pydantic.Field(
        0.7, ge=0, le=1, description="Anchors with at least this overlap are positive."
    )
    negative_iou: float = pydantic.Field(0.3, ge=0, le=1, description="Anchors with less overlap are negative.")
    crowd_share: float = pydantic.Field(
        0.5, ge=0, le=1, description="Unmatched anchors that are crowd to more than this share teach nothing."
    )
    samples: int = pydantic.Field(256, ge=1, description="Anchors per image that enter the losses.")
    positive_share: float = pydantic.Field(0.5, gt=0, le=1, description="Largest share of positives among them.")
    normalizer: Literal["fixed", "sampled"] = pydantic.Field(
        "fixed", description="What the losses are divided by: `samples` per image (Detectron2), or those really drawn."
    )
    train_candidates: int = pydantic.Field(2000, ge=1, description="Best boxes of each level before suppression.")
    test_candidates: int = pydantic.Field(1000, ge=1)
    nms_iou: float = pydantic.Field(0.7, ge=0, le=1)
    proposals: int = pydantic.Field(1000, ge=1, description="Best boxes of all levels after suppression.")


class RoiConfig(StrictModel):
    """The heads on regions of interest (RoIs)."""

    samples: int = pydantic.Field(512, ge=1, description="RoIs per image that enter the losses.")
    foreground_share: float = pydantic.Field(0.25, gt=0, le=1, description="Largest share of foreground among them.")
    foreground_iou: float = pydantic.Field(0.5, ge=0, le=1)
    crowd_share: float = pydantic.Field(
        0.5, ge=0, le=1, description="Background RoIs that are crowd to more than this share teach nothing."
    )
    box_resolution: int = pydantic.Field(7, ge=1, description="Bins of RoIAlign for the box head.")
    mask_resolution: int = pydantic.Field(14, ge=1, description="Bins of RoIAlign for the mask head; masks have twice.")
    sampling_ratio: int = pydantic.Field(
        2, ge=0, description="Samples of RoIAlign per bin and axis; 0 for one per feature pixel (Detectron2)."
    )
    max_sampling_ratio: int = pydantic.Field(8, ge=1, description="Limit of that number with `sampling_ratio` 0.")
    box_channels: int = pydantic.Field(1024, ge=1)
    mask_channels: int = pydantic.Field(256, ge=1)
    mask_convolutions: int = pydantic.Field(4, ge=0)
    box_weights: tuple[float, float, float, float] = pydantic.Field(
        (10.0, 10.0, 5.0, 5.0), description="Factors of the box deltas dy, dx, dh, dw."
    )
    score_threshold: float = pydantic.Field(0.05, ge=0, le=1, description="Least score of a detection.")
    nms_iou: float = pydantic.Field(0.5, ge=0, le=1)
    candidates: int = pydantic.Field(
        1000, ge=1, description="Best pairs of box and class that enter the suppression; see `detect`."
    )
    detections: int = pydantic.Field(100, ge=1, description="Most detections per image.")

    @pydantic.model_validator(mode="after")
    def _has_foreground(self) -> "RoiConfig":
        if self.foreground_samples < 1:
            raise ValueError("roi.samples * roi.foreground_share must be 1 or more, or nothing trains boxes and masks")
        return self

    @property
    def foreground_samples(self) -> int:
        """Slots of the samples that may hold foreground; they come first."""
        return int(self.samples * self.foreground_share)
