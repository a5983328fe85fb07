"""Panoptic feature pyramid networks (Kirillov et al., CVPR 2019): Mask R-CNN and Semantic FPN on one pyramid.

A feature pyramid feeds two branches. One is Mask R-CNN: it proposes boxes, tells their classes, and predicts a mask in
each. The other predicts the class of every pixel, where one class, "other", stands for all things. A fixed rule makes
one map of both: instances in the order of their scores, then stuff where no instance is. Semantic FPN is the second
branch alone (`semantic_only`).

Read in this order: the config below; then, in `deeplab2_like/model`, what other systems share: `fpn.py`,
`semantic_fpn.py`, the parts of Mask R-CNN in `detection`, and `merge.py`.

Where the paper leaves a choice, and where this differs from the implementation in Detectron2:

- Regions without a label, like crowds, teach the detector nothing: a box that is void to more than a share is not a
  negative example. In Detectron2 it is one, and so is a crowd.
- The class and box losses of the region proposals have the weight of the instance losses.
- With `fpn.grouped` (Table 3d) each branch sees its own half of the channels; the pyramid's convolutions see all.
- The score of a stuff segment is the mean probability of its class, read at the resolution of the logits.
- Pixels that the semantic branch gives to a thing class (`semantic.things: all`) are void unless an instance has them;
  the paper discards these predictions, too.
- Images are padded to a multiple of 32 with the mean colour. They are seen at their own size unless
  `postprocess.resize` is set; then they are made smaller without antialiasing, where Detectron2 has it.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import pydantic
from keras import ops

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.base import Loss, PanopticSystem
from deeplab2_like.model.config import BackboneConfig, FpnConfig, Norm, ResizeConfig, backbone_features
from deeplab2_like.model.detection.config import RoiConfig, RpnConfig
from deeplab2_like.model.detection.detector import Detector
from deeplab2_like.model.detection.instances import class_and_instance_targets
from deeplab2_like.model.detection.masks import paste_masks
from deeplab2_like.model.fpn import FeaturePyramid, split_channels
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.merge import best_class
from deeplab2_like.model.overlaps import resolve_mask_overlaps
from deeplab2_like.model.seen_size import boxes_in_map, seen_images
from deeplab2_like.model.segments import merge, region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticBranch, SemanticClasses, semantic_loss


class GroupedFpnConfig(FpnConfig):
    """The feature pyramid."""

    grouped: bool = pydantic.Field(False, description="Give each branch half of the channels (Table 3d).")


class SemanticConfig(StrictModel):
    """The semantic branch (Figure 3)."""

    channels: int = pydantic.Field(128, ge=1)
    aggregation: Literal["sum", "concatenation"] = "sum"
    things: Literal["other", "all"] = pydantic.Field(
        "other", description="`other`, one class for all things (COCO), or `all` thing classes (Cityscapes)."
    )
    norm: Norm = Norm(kind="group", epsilon=1e-5)


class LossConfig(StrictModel):
    """Weights of the losses, and the targets they compare with (section 3.2)."""

    semantic_weight: float = pydantic.Field(0.5, ge=0, description="The paper's lambda_s.")
    instance_weight: float = pydantic.Field(1.0, ge=0, description="The paper's lambda_i.")
    training: Literal["combine", "alternate"] = pydantic.Field(
        "combine", description="`alternate` takes the losses of one branch in each step, in turn (Table 3c)."
    )
    max_instances: int = pydantic.Field(100, ge=1, description="Most instances of a training example; the largest.")


class PostprocessConfig(StrictModel):
    """From the branches to the panoptic map (section 3.2)."""

    score_threshold: float = pydantic.Field(0.5, ge=0, le=1, description="Weaker instances are not in the map.")
    overlap_threshold: float = pydantic.Field(
        0.5, ge=0, le=1, description="An instance of which a larger share is covered by better ones is dropped."
    )
    stuff_area_limit: int = pydantic.Field(4096, ge=0, description="Smaller stuff segments become void, in pixels.")
    resize: ResizeConfig | None = pydantic.Field(
        None, description="Size at which images are seen outside of training; null, their own."
    )


class PanopticFPNConfig(StrictModel):
    """The `model` section of a config."""

    backbone: BackboneConfig = BackboneConfig(output_stride=32, stem="seven_by_seven")
    norm: Norm = Norm()
    image_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    image_std: tuple[pydantic.PositiveFloat, pydantic.PositiveFloat, pydantic.PositiveFloat] = (58.395, 57.12, 57.375)
    semantic_only: bool = pydantic.Field(False, description="Leave out the instance branch: Semantic FPN.")
    fpn: GroupedFpnConfig = GroupedFpnConfig()
    semantic: SemanticConfig = SemanticConfig()
    rpn: RpnConfig = RpnConfig()
    roi: RoiConfig = RoiConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "PanopticFPNConfig":
        if self.fpn.grouped and self.fpn.channels % 2:
            raise ValueError("fpn.grouped needs an even number of fpn.channels")
        number = len(backbone_features(self.fpn.finest_level)) + 1
        if not self.semantic_only and len(self.rpn.anchor_sizes) != number:
            raise ValueError(
                f"rpn.anchor_sizes must be {number} sizes, one for each level from {self.fpn.finest_level} to p6"
            )
        return self


class PanopticFPN(PanopticSystem):
    """Panoptic FPN behind the contract of `PanopticSystem`.

    Raw outputs: `semantic_logits` float32 [B, h, w, S] at the stride of the finest level, with S as `semantic.things`
    says; and, unless `semantic_only`,

    - outside of training, the detections of `Detector`, in pixels of the image that the network saw, and `seen_size`
      int32 [2] if `postprocess.resize` is set;
    - in training, what `Detector` drew and predicted.

    Args:
        dataset_info: What the values of the panoptic map mean.
        backbone: Which backbone; its output stride must be 32.
        norm: The normalisation of the backbone.
        image_mean: Mean of red, green and blue, in 0..255.
        image_std: Standard deviation of red, green and blue.
        semantic_only: Whether to leave out the instance branch.
        fpn: Channels of the pyramid.
        semantic: Channels and classes of the semantic branch.
        rpn: Anchors and proposals.
        roi: Box head and mask head.
        loss: Weights and targets.
        postprocess: Thresholds.

    Raises:
        UserError: If the backbone has another output stride, the data set has no things, or `roi.detections` instances
            cannot be told apart with its label divisor.
    """

    config_class = PanopticFPNConfig
    oracle_parts = ("semantic", "instances")

    def __init__(
        self,
        *,
        dataset_info: DatasetInfo,
        backbone: BackboneConfig,
        norm: Norm,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
        semantic_only: bool,
        fpn: GroupedFpnConfig,
        semantic: SemanticConfig,
        rpn: RpnConfig,
        roi: RoiConfig,
        loss: LossConfig,
        postprocess: PostprocessConfig,
    ) -> None:
        super().__init__(
            dataset_info=dataset_info,
            image_mean=image_mean,
            image_std=image_std,
            size_multiple=32,
            name="panoptic_fpn",
        )
        self.semantic_only = semantic_only
        self.grouped = fpn.grouped
        self.loss_config = loss
        self.postprocess_config = postprocess
        self.classes = SemanticClasses.of(dataset_info, things=semantic.things, paint_things=semantic_only)
        self.loss_weights = {"semantic": loss.semantic_weight}

        self.backbone = build_backbone(backbone, norm=norm)
        features = backbone_features(fpn.finest_level)
        # Both branches see these; the proposals see one more, p6.
        self.levels = tuple(features)
        self.fpn = FeaturePyramid(
            strides=self.backbone.strides,
            features=tuple(features.values()),
            channels=fpn.channels,
            coarser_levels=0 if semantic_only else 1,
            norm=fpn.norm,
            name="fpn",
        )
        self.semantic_branch = SemanticBranch(
            len(self.classes.class_id),
            strides={level: self.fpn.strides[level] for level in self.levels},
            channels=semantic.channels,
            aggregation=semantic.aggregation,
            norm=semantic.norm,
            name="semantic_branch",
        )
        self.stride = self.fpn.strides[fpn.finest_level]
        if semantic_only:
            return
        self._check_things(dataset_info, max(roi.detections, loss.max_instances))
        self.detector = Detector(
            num_classes=len(dataset_info.thing_classes),
            strides=self.fpn.strides,
            roi_levels=self.levels,
            rpn=rpn,
            roi=roi,
            name="detector",
        )
        self.loss_weights |= dict.fromkeys(self.detector.loss_names, loss.instance_weight)

    @staticmethod
    def _check_things(info: DatasetInfo, instances: int) -> None:
        if not info.thing_classes:
            raise UserError(
                f"Data set '{info.name}' has no things, so there is nothing for Mask R-CNN to find; set config key "
                "model.semantic_only to true."
            )
        PanopticSystem.check_room_for_instances(info, "model.roi.detections or model.loss.max_instances", instances)

    # --- targets -----------------------------------------------------------------------------------------------------

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """Lists the instances and the classes of a label.

        Args:
            panoptic: int32 [H, W] panoptic map, static size.

        Returns:
            `semantic`: int32 [H, W], class id, or the ignore label; and, unless `semantic_only`, what
            `instance_targets` returns, where void counts as crowd: both are regions whose instances are not known.
        """
        if self.semantic_only:
            return {"semantic": panoptic // self.dataset_info.label_divisor}
        return class_and_instance_targets(panoptic, self.dataset_info, self.loss_config.max_instances)

    # --- network -----------------------------------------------------------------------------------------------------

    def call(self, images: Tensor, targets: Any = None, training: bool = False) -> dict[str, Tensor]:
        """Runs the network.

        Args:
            images: uint8 or float [B, H, W, 3], 0..255, any size.
            targets: What `make_targets` returned, batched; needed in training, to draw the examples of the detector.
            training: Whether statistics of normalisations are those of the batch, and outputs are those to train with.

        Returns:
            The raw outputs, see the class.
        """
        images, sizes = seen_images(images, None if training else self.postprocess_config.resize)
        image_size = tuple(ops.shape(images)[1:3])
        features = self.backbone(self.prepare_images(images), training=training)
        pyramid = self.fpn(features, training=training)
        for_semantic, for_instances = split_channels(pyramid) if self.grouped else (pyramid, pyramid)
        outputs = {"semantic_logits": self.semantic_branch(for_semantic, training=training), **sizes}
        if self.semantic_only:
            return outputs

        found = self.detector(
            for_instances,
            image_size=image_size,
            targets=targets if training else None,
            detections=0 if training else None,
        )
        return outputs | found

    # --- losses ------------------------------------------------------------------------------------------------------

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Compares the outputs of training with the targets (section 3.2).

        Args:
            targets: What `make_targets` returned, batched.
            outputs: What calling the system with these targets returned, in training.

        Returns:
            `semantic`, per labelled pixel; and, unless `semantic_only`, `rpn_class` and `rpn_box`, per drawn anchor,
            `box_class` and `box`, per drawn RoI, and `mask`, per pixel of the foreground RoIs.
        """
        losses = {
            "semantic": semantic_loss(
                targets["semantic"], outputs["semantic_logits"], classes=self.classes, stride=self.stride
            )
        }
        if self.semantic_only:
            return losses
        instance_losses = self.detector.losses_of(targets, outputs)
        if self.loss_config.training == "alternate":
            is_semantic = ops.cast(outputs["turn"] % 2 == 0, "float32")
            losses = {name: Loss(is_semantic * total, count) for name, (total, count) in losses.items()}
            instance_losses = {
                name: Loss((1 - is_semantic) * total, count) for name, (total, count) in instance_losses.items()
            }
        return losses | instance_losses

    # --- post-processing ---------------------------------------------------------------------------------------------

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess`: rows 0 to N - 1 are instances by score, row N + c is class c."""
        return self._merge(outputs, None, image_size, ())

    def instances(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor] | None:
        """See `PanopticSystem.instances`: all detections, also those that the panoptic map leaves out."""
        if self.semantic_only:
            return None
        boxes = boxes_in_map(outputs["boxes"], outputs.get("seen_size"), image_size)
        return {
            "masks": paste_masks(outputs["masks"], boxes, *image_size),
            "boxes": boxes,
            "classes": self.thing_class_ids(outputs["thing_classes"]),
            "scores": outputs["scores"],
        }

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`."""
        return self._merge({}, targets, tuple(targets["semantic"].shape[1:3]), self.oracle_parts)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: tuple[Any, Any],
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth`."""
        return self._merge(outputs, targets, image_size, parts)

    def _merge(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor] | None,
        image_size: tuple[Any, Any],
        parts_of_truth: Sequence[str],
    ) -> dict[str, Tensor]:
        """Finds each pixel's class and instance, in the outputs or in the targets, and merges them."""
        height, width = image_size
        if "semantic" in parts_of_truth:
            assert targets is not None
            semantic = self.classes.of_class_map(targets["semantic"])
        else:
            semantic = best_class(
                outputs["semantic_logits"], image_size, stride=self.stride, seen_size=outputs.get("seen_size")
            )
        if self.semantic_only:
            batch = ops.shape(semantic)[0]
            owner = ops.zeros((batch, height, width), "int32")
            classes, scores = ops.zeros((batch, 0), "int32"), ops.zeros((batch, 0), "float32")
        elif "instances" in parts_of_truth:
            assert targets is not None
            # Rows count from 1 there; masks of the truth do not overlap.
            instance_map, number = targets["instance_map"], targets["valid"].shape[1]
            owner = ops.where(instance_map > 0, instance_map - 1, number)
            classes, scores = self.thing_class_ids(targets["classes"]), ops.cast(targets["valid"], "float32")
        else:
            scores, classes = outputs["scores"], self.thing_class_ids(outputs["thing_classes"])
            owner = resolve_mask_overlaps(
                (scores >= self.postprocess_config.score_threshold) & (scores > 0),
                boxes_in_map(outputs["boxes"], outputs.get("seen_size"), image_size),
                outputs["masks"],
                height=height,
                width=width,
                overlap_threshold=self.postprocess_config.overlap_threshold,
            )
        num_classes = self.dataset_info.num_classes
        merged = merge(
            semantic,
            owner,
            classes,
            class_of_semantic=(*self.classes.painted_class, -1),
            num_classes=num_classes,
            stuff_area_limit=self.postprocess_config.stuff_area_limit,
            label_divisor=self.dataset_info.label_divisor,
            void=self.dataset_info.void,
        )
        if "semantic" in parts_of_truth:
            of_regions = ops.ones((ops.shape(scores)[0], num_classes), "float32")
        else:
            of_regions = region_scores(
                ops.softmax(outputs["semantic_logits"], axis=-1),
                merged,
                self.classes.of_class,
                stride=self.stride,
                seen_size=outputs.get("seen_size"),
            )
        return segment_outputs(merged, scores, of_regions)
