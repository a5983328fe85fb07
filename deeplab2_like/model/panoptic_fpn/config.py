"""The `model` section of Panoptic FPN's configs."""

from typing import Literal

import pydantic

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.model.config import FpnConfig, Norm, PyramidSystemConfig
from deeplab2_like.model.detection.config import RoiConfig, RpnConfig, check_anchor_sizes


class GroupedFpnConfig(FpnConfig):
    """The feature pyramid."""

    grouped: bool = pydantic.Field(False, description="Give each branch its own half of the channels (Table 3d).")


class SemanticConfig(StrictModel):
    """The semantic branch (Figure 3)."""

    channels: int = pydantic.Field(
        128, ge=1, description="Channels of the convolutions; a multiple of 32 with group normalization."
    )
    aggregation: Literal["sum", "concatenation"] = pydantic.Field(
        "sum", description="How the levels are combined (Table 1d)."
    )
    things: Literal["other", "all"] = pydantic.Field(
        "other",
        description="`other` predicts one class for all things, as for COCO; `all` predicts every thing class, which "
        "helps on Cityscapes. The panoptic map does not show these predictions.",
    )
    norm: Norm = pydantic.Field(Norm(kind="group", epsilon=1e-5), description="Normalization after each convolution.")


class LossConfig(StrictModel):
    """Losses and their targets (section 3.2)."""

    semantic_weight: float = pydantic.Field(0.5, ge=0, description="Weight of the semantic loss, the paper's lambda_s.")
    instance_weight: float = pydantic.Field(
        1.0, ge=0, description="Weight of the losses of the detector, the paper's lambda_i."
    )
    training: Literal["combine", "alternate"] = pydantic.Field(
        "combine",
        description="`combine` adds the losses of both branches; `alternate` uses those of one branch in each step, "
        "in turn (Table 3c).",
    )
    max_instances: int = pydantic.Field(
        100,
        ge=1,
        description="Largest number of instances per training example, below the label divisor; the largest ones are "
        "used, and the others count as crowd.",
    )


class PostprocessConfig(StrictModel):
    """From the branches to the panoptic map (section 3.2)."""

    score_threshold: float = pydantic.Field(
        0.5, ge=0, le=1, description="Instances with a lower score are left out of the panoptic map; AP counts them."
    )
    overlap_threshold: float = pydantic.Field(
        0.5, ge=0, le=1, description="An instance is dropped if better ones cover more than this share of it."
    )
    stuff_area_limit: int = pydantic.Field(
        4096, ge=0, description="Stuff segments with fewer pixels become void; 4096 suits images of the size of COCO's."
    )


class PanopticFPNConfig(PyramidSystemConfig):
    """The `model` section of a config."""

    semantic_only: bool = pydantic.Field(False, description="Leave out the instance branch: Semantic FPN.")
    fpn: GroupedFpnConfig = pydantic.Field(GroupedFpnConfig(), description="The feature pyramid.")
    semantic: SemanticConfig = pydantic.Field(SemanticConfig(), description="The semantic branch.")
    rpn: RpnConfig = pydantic.Field(RpnConfig(), description="The region proposal network.")
    roi: RoiConfig = pydantic.Field(RoiConfig(), description="The heads on regions of interest.")
    loss: LossConfig = pydantic.Field(LossConfig(), description="Losses and their targets.")
    postprocess: PostprocessConfig = pydantic.Field(
        PostprocessConfig(), description="From the branches to the panoptic map."
    )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "PanopticFPNConfig":
        if self.fpn.grouped and self.fpn.channels % 2:
            raise ValueError("fpn.grouped needs an even number of fpn.channels")
        if not self.semantic_only:
            check_anchor_sizes(self.rpn, self.fpn.finest_level)
        return self
