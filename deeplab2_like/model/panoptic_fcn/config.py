"""The `model` section of Panoptic FCN's configs."""

from typing import Any, Literal

import pydantic

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.model.config import (
    Norm,
    PyramidSystemConfig,
    are_consecutive_levels,
    level_stride,
)


class HeadConfig(StrictModel):
    """The position head and the kernel head (section 3.1)."""

    channels: int = pydantic.Field(
        256,
        ge=1,
        description="Channels of both heads, and length of a kernel; a multiple of 32 with group normalization.",
    )
    convolutions: int = pydantic.Field(3, ge=1, description="Convolutions before the predictors (Table 1).")
    deformable: bool = pydantic.Field(True, description="Use deformable convolutions in the position head (Table 1).")
    kernel_coordinates: bool = pydantic.Field(
        True, description="Append coordinates to the input of the kernel head (Table 2)."
    )
    norm: Norm = pydantic.Field(
        Norm(kind="group", epsilon=1e-5), description="Normalization of the convolutions of both heads."
    )


class EncoderConfig(StrictModel):
    """The feature encoder (section 3.3)."""

    feature: Literal["finest", "sum", "semantic_fpn"] = pydantic.Field(
        "semantic_fpn",
        description="Input of the encoder: `finest`, the finest level alone; `sum` of the levels; or `semantic_fpn` "
        "(Table 5).",
    )
    semantic_channels: int = pydantic.Field(
        256, ge=1, description="Channels of Semantic FPN; a multiple of 32 with group normalization."
    )
    channels: int = pydantic.Field(64, ge=1, description="Channels of the encoded feature (Table 4).")
    convolutions: int = pydantic.Field(3, ge=1, description="Number of convolutions that make the encoded feature.")
    coordinates: bool = pydantic.Field(True, description="Append coordinates to the input of the encoder (Table 2).")
    deformable: bool = pydantic.Field(False, description="Use deformable convolutions in the encoder (Table 8).")
    norm: Norm = pydantic.Field(Norm(kind="group", epsilon=1e-5), description="Normalization in Semantic FPN.")


class LossConfig(StrictModel):
    """Losses and their targets (section 3.4, appendix A.1)."""

    position_weight: float = pydantic.Field(1.0, ge=0, description="Weight of both position losses, lambda_pos.")
    segmentation_weight: float = pydantic.Field(3.0, ge=0, description="Weight of both mask losses, lambda_seg.")
    focal_alpha: float = pydantic.Field(0.25, ge=0, le=1, description="Weight of positives in the focal loss.")
    focal_gamma: float = pydantic.Field(2.0, ge=1, description="Exponent of the focal loss.")
    weighted: bool = pydantic.Field(
        True, description="Use the weighted dice loss; otherwise the plain one, on the kernel at the center (Table 6)."
    )
    kernels: int = pydantic.Field(
        7, ge=1, description="Kernels per object in the weighted dice loss; fewer are faster (Table 6)."
    )
    center: Literal["mass", "box"] = pydantic.Field(
        "mass", description="Center of an object: its center of `mass` or the center of its `box` (Table 14)."
    )
    min_overlap: float = pydantic.Field(
        0.7,
        gt=0,
        lt=1,
        description="Sets the radius of the Gaussians: a box whose corners move by the radius keeps at least this IoU.",
    )
    max_instances: int = pydantic.Field(
        100,
        ge=1,
        description="Largest number of instances per training example, below the label divisor; the largest ones are "
        "used, and the others count as crowd.",
    )


class PostprocessConfig(StrictModel):
    """From raw outputs to the panoptic map (sections 3.2 and 3.4, appendix A.2)."""

    candidates: int = pydantic.Field(50, ge=1, description="Largest number of centers on each level.")
    score_threshold: float = pydantic.Field(0.05, ge=0, le=1, description="Things with a lower score are dropped.")
    region_threshold: float = pydantic.Field(
        0.05,
        ge=0,
        le=1,
        description="On each level, regions of stuff with this mean probability or a lower one are dropped.",
    )
    similarity: float = pydantic.Field(
        0.9, ge=-1, le=1, description="Kernels with at least this cosine similarity are fused (Table 3)."
    )
    class_aware: bool = pydantic.Field(True, description="Fuse only kernels of the same class (Table 3).")
    kernels: int = pydantic.Field(
        100, ge=1, description="Largest number of things per image; must be below the label divisor."
    )
    mask_threshold: float = pydantic.Field(
        0.4, gt=0, lt=1, description="A pixel is inside a mask if its probability exceeds this value."
    )
    map_score_threshold: float = pydantic.Field(
        0.2, ge=0, le=1, description="Things with a lower score are left out of the panoptic map; AP counts them."
    )
    overlap_threshold: float = pydantic.Field(
        0.5, ge=0, le=1, description="A thing is dropped if better ones cover more than this share of its mask."
    )
    stuff_area_limit: int = pydantic.Field(
        4096, ge=0, description="Stuff segments with fewer pixels become void; 4096 suits images of the size of COCO's."
    )


class PanopticFCNConfig(PyramidSystemConfig):
    """The `model` section of a config."""

    size_ranges: dict[str, tuple[float, float]] = pydantic.Field(
        {"p3": (1, 64), "p4": (32, 128), "p5": (64, 256), "p6": (128, 512), "p7": (256, 2048)},
        description="Levels of the two heads, fine to coarse, with the smallest and largest object size of each "
        "level: the square root of the box area, in pixels (section 4.1). Set these to the sizes of your "
        "objects.",
    )
    head: HeadConfig = pydantic.Field(HeadConfig(), description="Position head and kernel head.")
    encoder: EncoderConfig = pydantic.Field(EncoderConfig(), description="Feature encoder.")
    loss: LossConfig = pydantic.Field(LossConfig(), description="Losses and their targets.")
    postprocess: PostprocessConfig = pydantic.Field(
        PostprocessConfig(), description="From raw outputs to the panoptic map."
    )
    reference_behavior: bool = pydantic.Field(
        False,
        description="Behave as the released code, for its weights; `panoptic_fcn/__init__.py` lists the differences.",
    )

    @property
    def level_strides(self) -> dict[str, int]:
        """Network pixels per position of each level of the heads, fine to coarse."""
        return {level: level_stride(level) for level in self.size_ranges}

    @property
    def stride(self) -> int:
        """Network pixels per cell of the encoded feature."""
        return level_stride(self.fpn.finest_level)

    @pydantic.model_validator(mode="before")
    @classmethod
    def _rename_old_keys(cls, content: Any) -> Any:
        """Reads configs of earlier versions, in which `reference_behavior` had the British spelling."""
        if isinstance(content, dict) and "reference_behaviour" in content:
            renamed = {"reference_behavior": content["reference_behaviour"], **content}
            return {key: value for key, value in renamed.items() if key != "reference_behaviour"}
        return content

    @pydantic.field_validator("size_ranges")
    @classmethod
    def _levels_in_order(cls, value: dict[str, tuple[float, float]]) -> dict[str, tuple[float, float]]:
        if not are_consecutive_levels(list(value)):
            raise ValueError("its keys must be levels one after the other, fine to coarse, such as p3, p4, p5")
        previous_high = float("inf")
        for level, (low, high) in value.items():
            if not 0 <= low < high:
                raise ValueError(f"the range of {level} must be a smaller and a larger number of pixels")
            if low > previous_high:
                raise ValueError(
                    f"the range of {level} must begin at {previous_high:g} or below, where the one before ends"
                )
            previous_high = high
        return value

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "PanopticFCNConfig":
        if next(iter(self.size_ranges)) < self.fpn.finest_level:
            raise ValueError(f"size_ranges begins with {next(iter(self.size_ranges))}, finer than fpn.finest_level")
        return self
