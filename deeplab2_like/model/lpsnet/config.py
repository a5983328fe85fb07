"""The `model` section of LPSNet's configs."""

from typing import Annotated, Literal

import pydantic

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.model.config import (
    Norm,
    PyramidSystemConfig,
    are_consecutive_levels,
    level_stride,
)

Conflicts = Literal["closest_border_ness", "smallest_area", "highest_score"]


class ContextConfig(StrictModel):
    """Global context, added to the coarsest feature of the pyramid (section 3.1)."""

    kind: Literal["pyramid_pooling", "global_average", "none"] = pydantic.Field(
        "pyramid_pooling", description="`pyramid_pooling`; `global_average`, as in UPSNet; or `none` (Table 5)."
    )
    bins: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        (1, 2, 3, 6), min_length=1, description="Pyramid pooling: bins of each grid along each axis."
    )
    channels: int = pydantic.Field(512, ge=1, description="Pyramid pooling: channels of each grid.")
    norm: Norm = pydantic.Field(
        Norm(kind="group", epsilon=1e-5), description="Pyramid pooling: normalization after the grids are joined."
    )


class BoxConfig(StrictModel):
    """The box head, its levels and its targets (section 3.2)."""

    levels: tuple[str, ...] = pydantic.Field(
        ("p3", "p4", "p5", "p6", "p7"), description="Pyramid levels on which points predict boxes, fine to coarse."
    )
    size_limits: tuple[Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)], ...] = pydantic.Field(
        (64, 128, 256, 512),
        description="For each level but the last, the largest distance from a point to a side of its box, in pixels. "
        "Set these to the sizes of your objects.",
    )
    channels: int = pydantic.Field(
        256, ge=1, description="Channels of the convolutions; a multiple of 32 with group normalization."
    )
    convolutions: int = pydantic.Field(4, ge=1, description="Convolutions before the predictor.")
    norm: Norm = pydantic.Field(Norm(kind="group", epsilon=1e-5), description="Normalization of the convolutions.")
    positives: Literal["mask", "box"] = pydantic.Field(
        "mask",
        description="Points that predict an object: with `mask`, those inside its mask; with `box`, those inside its "
        "box, where the smallest box wins, as in FCOS.",
    )
    measured_to: Literal["mask", "box"] = pydantic.Field(
        "mask",
        description="Border-ness is measured to the borders of the `mask` or, like the center-ness of FCOS, of the "
        "`box`.",
    )

    @property
    def level_strides(self) -> dict[str, int]:
        """Network pixels per point of each level, fine to coarse."""
        return {level: level_stride(level) for level in self.levels}

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "BoxConfig":
        if not are_consecutive_levels(self.levels):
            raise ValueError("levels must be one after the other, fine to coarse, such as p3, p4, p5")
        if len(self.size_limits) != len(self.levels) - 1:
            raise ValueError(f"size_limits must be {len(self.levels) - 1} numbers, one between each two of levels")
        if list(self.size_limits) != sorted(set(self.size_limits)):
            raise ValueError("size_limits must grow from one to the next")
        return self


class SemanticConfig(StrictModel):
    """The semantic head (section 3.3)."""

    channels: int = pydantic.Field(128, ge=1, description="Channels of the last two convolutions.")
    convolutions: int = pydantic.Field(2, ge=1, description="Convolutions per level.")
    deformable: bool = pydantic.Field(True, description="Use deformable convolutions.")
    norm: Norm | None = pydantic.Field(
        None, description="Normalization after each convolution; null for none, as in UPSNet."
    )


class LossConfig(StrictModel):
    """Losses (sections 3.5 and 4)."""

    box_weight: float = pydantic.Field(1.0, ge=0, description="Weight of the box loss.")
    border_ness_weight: float = pydantic.Field(1.0, ge=0, description="Weight of the border-ness loss.")
    semantic_weight: float = pydantic.Field(1.0, ge=0, description="Weight of the semantic loss.")
    max_instances: int = pydantic.Field(
        100,
        ge=1,
        description="Largest number of instances per training example, below the label divisor; the largest ones are "
        "used, and the others do not train the box head.",
    )


class PostprocessConfig(StrictModel):
    """From raw outputs to the panoptic map (sections 3.4 and 3.5)."""

    class_threshold: float = pydantic.Field(
        0.05,
        ge=0,
        le=1,
        description="A point predicts a box only if the probability of its best thing class exceeds this value.",
    )
    candidates: int = pydantic.Field(
        2000, ge=1, description="Largest number of boxes that enter non-maximum suppression."
    )
    nms_iou: float = pydantic.Field(
        0.6, ge=0, le=1, description="A box that overlaps a better one of its class by more than this IoU is dropped."
    )
    detections: int = pydantic.Field(
        100, ge=1, description="Largest number of boxes per image; must be below the label divisor."
    )
    score_threshold: float = pydantic.Field(
        0.3, ge=0, le=1, description="Boxes with a lower score are left out of the panoptic map; AP counts them."
    )
    conflicts: Conflicts = pydantic.Field(
        "closest_border_ness",
        description="Which box gets a pixel inside several boxes of its class: the one whose border-ness at the pixel "
        "is closest to the predicted one, the smallest one, or the one with the highest score (Table 5).",
    )
    overlap_threshold: float = pydantic.Field(
        0.3, ge=0, le=1, description="A box is dropped if better ones cover more than this share of its mask."
    )
    stuff_area_limit: int = pydantic.Field(
        4096, ge=0, description="Stuff segments with fewer pixels become void; 4096 suits images of the size of COCO's."
    )


class LPSNetConfig(PyramidSystemConfig):
    """The `model` section of a config."""

    context: ContextConfig = pydantic.Field(ContextConfig(), description="Global context.")
    box: BoxConfig = pydantic.Field(BoxConfig(), description="The box head, its levels and its targets.")
    semantic: SemanticConfig = pydantic.Field(SemanticConfig(), description="The semantic head.")
    loss: LossConfig = pydantic.Field(LossConfig(), description="Losses.")
    postprocess: PostprocessConfig = pydantic.Field(
        PostprocessConfig(), description="From raw outputs to the panoptic map."
    )

    @property
    def stride(self) -> int:
        """Network pixels per semantic logit."""
        return level_stride(self.fpn.finest_level)

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "LPSNetConfig":
        if self.box.levels[0] < self.fpn.finest_level:
            raise ValueError(f"box.levels begins with {self.box.levels[0]}, finer than fpn.finest_level")
        return self
