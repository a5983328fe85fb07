"""The `model` section of the unifying system's configs."""

from typing import Literal

import pydantic

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.model.config import Norm, PyramidSystemConfig
from deeplab2_like.model.detection.config import RoiConfig, RpnConfig, check_anchor_sizes

Potential = Literal["a", "b", "c"]


class SemanticConfig(StrictModel):
    """The semantic submodule, and the extractor of the affinity head (sections 3.2 and 3.4.2)."""

    channels: int = pydantic.Field(
        128,
        ge=1,
        description="Channels of the last two convolutions and of the affinities, the paper's C; a multiple of 32 "
        "with group normalization.",
    )
    convolutions: int = pydantic.Field(2, ge=1, description="Number of 3x3 convolutions.")
    deformable: bool = pydantic.Field(True, description="Use deformable convolutions.")
    norm: Norm | None = pydantic.Field(
        Norm(kind="group", epsilon=1e-5), description="Normalization after each convolution; null for none."
    )


class PanopticConfig(StrictModel):
    """The panoptic submodule (section 3.4)."""

    masks: bool = pydantic.Field(
        True, description="Use Mask R-CNN as the detector; otherwise Faster R-CNN, which predicts boxes only."
    )
    potential: Potential = pydantic.Field(
        "c",
        description="Variant of the dynamic potential (Figure 4): `a`, logits without the score; `b`, class times "
        "mask; `c`, class plus mask.",
    )
    affinity: bool = pydantic.Field(True, description="Use the dense instance affinity head.")


class LossConfig(StrictModel):
    """Losses (sections 3.5 and 4)."""

    detection_weight: float = pydantic.Field(1.0, ge=0, description="Weight of the losses of the detector.")
    semantic_weight: float = pydantic.Field(1.0, ge=0, description="Weight of the semantic loss.")
    panoptic_weight: float = pydantic.Field(1.0, ge=0, description="Weight of the panoptic matching loss.")
    matching: bool = pydantic.Field(True, description="Use the panoptic matching loss; `panoptic.affinity` needs it.")
    end_to_end: bool = pydantic.Field(
        True,
        description="The matching loss trains the detector and the semantic submodule, too; otherwise only the "
        "affinities.",
    )
    detections: Literal["predicted", "truth"] = pydantic.Field(
        "predicted",
        description="Candidates in training: the `predicted` detections, or the boxes of the ground `truth`.",
    )
    max_detections: int = pydantic.Field(
        100, ge=1, description="Largest number of predicted candidates in training; the best ones are used."
    )
    matching_iou: float = pydantic.Field(0.5, gt=0, le=1, description="Smallest IoU of matched boxes.")
    max_instances: int = pydantic.Field(
        100,
        ge=1,
        description="Largest number of instances per training example, below the label divisor; the largest ones are "
        "used, and the others count as crowd.",
    )


class PostprocessConfig(StrictModel):
    """From candidates to the panoptic map."""

    merge: Literal["argmax", "heuristic"] = pydantic.Field(
        "argmax",
        description="`argmax` gives each pixel to its best candidate; `heuristic` is the merging rule of Panoptic "
        "FPN, which works with the same weights and needs `panoptic.masks`.",
    )
    score_threshold: float = pydantic.Field(
        0.5, ge=0, le=1, description="Detections with a lower score are left out of the panoptic map; AP counts them."
    )
    overlap_threshold: float = pydantic.Field(
        0.5,
        ge=0,
        le=1,
        description="With `panoptic.masks`, a detection is left out of the panoptic map if better ones cover more than "
        "this share of its mask; with `argmax`, 1 keeps all.",
    )
    stuff_area_limit: int = pydantic.Field(0, ge=0, description="Stuff segments with fewer pixels become void.")


class UnifyingConfig(PyramidSystemConfig):
    """The `model` section of a config."""

    squeeze_excitation: bool = pydantic.Field(
        True, description="Use squeeze-and-excitation on the coarsest feature of the backbone (section 3.1)."
    )
    semantic: SemanticConfig = pydantic.Field(SemanticConfig(), description="The semantic submodule.")
    rpn: RpnConfig = pydantic.Field(RpnConfig(), description="The region proposal network.")
    roi: RoiConfig = pydantic.Field(RoiConfig(), description="The heads on regions of interest.")
    panoptic: PanopticConfig = pydantic.Field(PanopticConfig(), description="The panoptic submodule.")
    loss: LossConfig = pydantic.Field(LossConfig(), description="Losses.")
    postprocess: PostprocessConfig = pydantic.Field(
        PostprocessConfig(), description="From candidates to the panoptic map."
    )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "UnifyingConfig":
        check_anchor_sizes(self.rpn, self.fpn.finest_level)
        if self.panoptic.affinity and not self.loss.matching:
            raise ValueError("panoptic.affinity needs loss.matching, as nothing else trains it")
        if self.loss.matching and not (self.loss.end_to_end or self.panoptic.affinity):
            raise ValueError(
                "loss.end_to_end can be off only with panoptic.affinity, or the matching loss trains nothing"
            )
        if self.postprocess.merge == "heuristic" and not self.panoptic.masks:
            raise ValueError("postprocess.merge can be heuristic only with panoptic.masks")
        return self
