"""Unifying training and inference for panoptic segmentation (Li et al., CVPR 2020): the best slot of each pixel.

A feature pyramid feeds a detector, with or without masks, and a semantic head. What both say is put together, for every
pixel, as the potential of each detection and of each stuff class. Affinities of pixels, learnt from the panoptic map
alone, hand potentials on between pixels of the same object, so that parts outside of a box that is too small are found,
too. In training the detections are matched with the label, and the loss is on the result: the argmax at inference needs
no rule.

Read in this order: the config below, `network.py`, `panoptic.py`, `matching.py`; then, in `deeplab2_like/model`, what
other systems share: `fpn.py`, `semantic_subnet.py`, the detector in `detection`, `merge.py`.

There is no public code. Where the paper is silent, this follows UPSNet and Panoptic FPN, and chooses:

- Potentials and affinities are not negative in variants b and c, so a slot's probability is its share of their sum; in
  variant a, of logits, it is their softmax. A softmax of the former would be flat: they are between 0 and 1.
- The activations of the two factors of the affinities, see `AffinityHead`.
- The default is variant b. Stuff has no mask: in variant c its slots hold its probability alone.
- Boxes have no gradient through the panoptic submodule; scores, masks and semantic probabilities have.
- The label is compared at the resolution of the semantic map, at the pixel in the middle of each cell. Instances beyond
  `loss.max_instances`, crowds and void are not compared.
- In training every detection above `roi.score_threshold` is a slot, so that the loss teaches weak ones to lose. In the
  map they are slots above `postprocess.score_threshold`, a choice of UPSNet, whose threshold is 0.6.
- The map is made at full size, as in UPSNet: there boxes and masks are pasted, and probabilities of classes and what
  affinities add are enlarged bilinearly. Affinities gather at the resolution of the semantic map.
- Each detection is matched with the instance that it overlaps most, where equation 5 asks for the best of all
  assignments; of several that are matched with the same one the others are no slots. With `loss.detections: truth`
  each instance is its own slot.
- Without masks, those of `instances` are the segments of the panoptic map.
- Images are padded to a multiple of 32 with the mean colour. They are seen at their own size unless
  `postprocess.resize` is set; then they are made smaller without antialiasing.
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
from deeplab2_like.model.detection.masks import mask_targets, paste_masks
from deeplab2_like.model.fpn import FeaturePyramid
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.merge import best_class, upsampling_matrices
from deeplab2_like.model.overlaps import resolve_mask_overlaps
from deeplab2_like.model.resampling import running_argmax
from deeplab2_like.model.seen_size import boxes_in_map, read_at_cells, seen_images, seen_scale
from deeplab2_like.model.segments import SegmentTable, merge, region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses, SemanticSubnet, semantic_loss
from deeplab2_like.model.unifying.matching import match_detections, matching_loss, slot_targets
from deeplab2_like.model.unifying.network import AffinityHead, SqueezeExcitation
from deeplab2_like.model.unifying.panoptic import (
    Potential,
    affinity_update,
    best_slot,
    dynamic_potential,
)

_SIZE_MULTIPLE = 32


class SemanticConfig(StrictModel):
    """The semantic submodule, and the extractor of the affinity head (sections 3.2 and 3.4.2)."""

    channels: int = pydantic.Field(128, ge=1, description="Also of the affinities, the paper's C.")
    convolutions: int = pydantic.Field(2, ge=1)
    deformable: bool = True
    norm: Norm | None = pydantic.Field(Norm(kind="group", epsilon=1e-5), description="After each convolution.")


class PanopticConfig(StrictModel):
    """The panoptic submodule (section 3.4)."""

    masks: bool = pydantic.Field(True, description="Mask R-CNN as the detector; else Faster R-CNN, boxes alone.")
    potential: Potential = pydantic.Field("b", description="Variant of the dynamic potential (Figure 4).")
    affinity: bool = pydantic.Field(True, description="The dense instance affinity head.")


class LossConfig(StrictModel):
    """Losses (sections 3.5 and 4)."""

    detection_weight: float = pydantic.Field(1.0, ge=0)
    semantic_weight: float = pydantic.Field(1.0, ge=0)
    panoptic_weight: float = pydantic.Field(1.0, ge=0, description="Of the panoptic matching loss.")
    matching: bool = pydantic.Field(True, description="The panoptic matching loss; without it, leave out affinities.")
    end_to_end: bool = pydantic.Field(
        True, description="Let it train detector and semantic submodule, too; else the affinities alone."
    )
    detections: Literal["predicted", "truth"] = pydantic.Field(
        "predicted", description="The slots in training: predicted detections, or the boxes of the label."
    )
    max_detections: int = pydantic.Field(100, ge=1, description="Most predicted slots of training; the best ones.")
    matching_iou: float = pydantic.Field(0.5, gt=0, le=1, description="Least overlap of boxes that match.")
    max_instances: int = pydantic.Field(100, ge=1, description="Most instances of a training example; the largest.")


class PostprocessConfig(StrictModel):
    """From slots to the panoptic map."""

    merge: Literal["argmax", "heuristic"] = pydantic.Field(
        "argmax", description="The best slot of each pixel, or the rule of Panoptic FPN."
    )
    score_threshold: float = pydantic.Field(0.5, ge=0, le=1, description="Weaker detections are not in the map.")
    overlap_threshold: float = pydantic.Field(
        0.5,
        ge=0,
        le=1,
        description="For heuristic: an instance of which a larger share is covered by better ones is dropped.",
    )
    stuff_area_limit: int = pydantic.Field(0, ge=0, description="Smaller stuff segments become void, in pixels.")
    resize: ResizeConfig | None = pydantic.Field(
        None, description="Size at which images are seen outside of training; null, their own."
    )


class UnifyingConfig(StrictModel):
    """The `model` section of a config."""

    backbone: BackboneConfig = BackboneConfig(output_stride=32, stem="seven_by_seven")
    norm: Norm = Norm()
    image_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    image_std: tuple[pydantic.PositiveFloat, pydantic.PositiveFloat, pydantic.PositiveFloat] = (58.395, 57.12, 57.375)
    fpn: FpnConfig = FpnConfig()
    squeeze_excitation: bool = pydantic.Field(
        True, description="On the coarsest feature of the backbone (section 3.1)."
    )
    semantic: SemanticConfig = SemanticConfig()
    rpn: RpnConfig = RpnConfig()
    roi: RoiConfig = RoiConfig()
    panoptic: PanopticConfig = PanopticConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "UnifyingConfig":
        number = len(backbone_features(self.fpn.finest_level)) + 1
        if len(self.rpn.anchor_sizes) != number:
            raise ValueError(
                f"rpn.anchor_sizes must be {number} sizes, one for each level from {self.fpn.finest_level} to p6"
            )
        if self.panoptic.affinity and not self.loss.matching:
            raise ValueError("panoptic.affinity needs loss.matching, as nothing else trains it")
        if self.loss.matching and not (self.loss.end_to_end or self.panoptic.affinity):
            raise ValueError(
                "loss.end_to_end can be off only with panoptic.affinity, or the matching loss trains nothing"
            )
        if self.postprocess.merge == "heuristic" and not self.panoptic.masks:
            raise ValueError("postprocess.merge can be heuristic only with panoptic.masks")
        return self


class Unifying(PanopticSystem):
    """The unifying system behind the contract of `PanopticSystem`.

    Raw outputs: `semantic_logits` float32 [B, h, w, C] at the stride of the pyramid's finest level; with affinities
    `hand_out` and `gather`, float32 [B, h, w, A], see `AffinityHead`; the detections of `Detector`, in pixels of the
    image that the network saw; outside of training, `seen_size` int32 [2] if `postprocess.resize` is set; in training,
    what `Detector` drew and predicted.

    Args:
        dataset_info: What the values of the panoptic map mean.
        backbone: Which backbone; its output stride must be 32.
        norm: The normalisation of the backbone.
        image_mean: Mean of red, green and blue, in 0..255.
        image_std: Standard deviation of red, green and blue.
        fpn: Channels of the pyramid.
        squeeze_excitation: Whether the coarsest feature is weighed by its means.
        semantic: Semantic submodule, and extractor of the affinity head.
        rpn: Anchors and proposals.
        roi: Box head and mask head.
        panoptic: Panoptic submodule.
        loss: Weights and choices of training.
        postprocess: From slots to the map.

    Raises:
        UserError: If the backbone has another output stride, the data set has no things or no stuff, or
            `roi.detections` or `loss.max_instances` instances cannot be told apart with its label divisor.
    """

    config_class = UnifyingConfig
    oracle_parts = ("semantic", "detections")

    def __init__(
        self,
        *,
        dataset_info: DatasetInfo,
        backbone: BackboneConfig,
        norm: Norm,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
        fpn: FpnConfig,
        squeeze_excitation: bool,
        semantic: SemanticConfig,
        rpn: RpnConfig,
        roi: RoiConfig,
        panoptic: PanopticConfig,
        loss: LossConfig,
        postprocess: PostprocessConfig,
    ) -> None:
        super().__init__(
            dataset_info=dataset_info,
            image_mean=image_mean,
            image_std=image_std,
            size_multiple=_SIZE_MULTIPLE,
            name="unifying",
        )
        self._check(dataset_info, max(roi.detections, loss.max_instances))
        self.panoptic_config = panoptic
        self.loss_config = loss
        self.postprocess_config = postprocess
        self.classes = SemanticClasses.of(dataset_info, things="all", paint_things=False)

        self.backbone = build_backbone(backbone, norm=norm)
        features = backbone_features(fpn.finest_level)
        self.excitation: SqueezeExcitation | None = None
        if squeeze_excitation:
            self.excitation = SqueezeExcitation(self.backbone.channels["res5"], name="excitation")
        self.fpn = FeaturePyramid(
            strides=self.backbone.strides,
            features=tuple(features.values()),
            channels=fpn.channels,
            coarser_levels=1,
            norm=fpn.norm,
            name="fpn",
        )
        self.stride = self.fpn.strides[fpn.finest_level]
        subnet: dict[str, Any] = {
            "strides": {level: self.fpn.strides[level] for level in features},
            "input_channels": fpn.channels,
            "channels": semantic.channels,
            "convolutions": semantic.convolutions,
            "deformable": semantic.deformable,
            "norm": semantic.norm,
        }
        self.semantic_head = SemanticSubnet(dataset_info.num_classes, **subnet, name="semantic_head")
        self.affinity_head = AffinityHead(**subnet, name="affinity_head") if panoptic.affinity else None
        self.detector = Detector(
            num_classes=len(dataset_info.thing_classes),
            strides=self.fpn.strides,
            roi_levels=tuple(features),
            rpn=rpn,
            roi=roi,
            with_masks=panoptic.masks,
            name="detector",
        )
        self.loss_weights = {
            "semantic": loss.semantic_weight,
            **dict.fromkeys(self.detector.loss_names, loss.detection_weight),
            **({"panoptic": loss.panoptic_weight} if loss.matching else {}),
        }

    @staticmethod
    def _check(info: DatasetInfo, instances: int) -> None:
        if not info.thing_classes:
            raise UserError(
                f"Data set '{info.name}' has no things, so there is nothing for the detector to find; train Semantic "
                "FPN, with a config such as panoptic_fpn/semantic_fpn_coco_resnet50."
            )
        if not info.stuff_classes:
            raise UserError(
                f"Data set '{info.name}' has no stuff, so pixels without an object have no slot; make the background a "
                "class, with `convert coco-instances --background NAME` for example."
            )
        PanopticSystem.check_room_for_instances(info, "model.roi.detections or model.loss.max_instances", instances)

    # --- targets -----------------------------------------------------------------------------------------------------

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """Lists the instances and the classes of a label.

        Args:
            panoptic: int32 [H, W] panoptic map, static size.

        Returns:
            `semantic`: int32 [H, W], class id, or the ignore label; and what `instance_targets` returns, where void
            counts as crowd: both are regions whose instances are not known.
        """
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
        features = dict(self.backbone(self.prepare_images(images), training=training))
        if self.excitation is not None:
            features["res5"] = self.excitation(features["res5"])
        pyramid = self.fpn(features, training=training)
        outputs = {"semantic_logits": self.semantic_head(pyramid, training=training), **sizes}
        if self.affinity_head is not None:
            levels = pyramid
            if training and not self.loss_config.end_to_end:
                levels = {name: ops.stop_gradient(level) for name, level in pyramid.items()}
            outputs["hand_out"], outputs["gather"] = self.affinity_head(
                levels, image_size=image_size, training=training
            )
        from_truth = training and self.loss_config.detections == "truth"
        detections = self.loss_config.max_detections
        if from_truth or not self.loss_config.matching:
            detections = 0
        outputs |= self.detector(
            pyramid,
            image_size=image_size,
            targets=targets if training else None,
            detections=detections if training else None,
        )
        if from_truth and self.loss_config.matching:
            outputs |= {
                "boxes": targets["boxes"],
                "scores": ops.cast(targets["valid"], "float32"),
                "thing_classes": targets["classes"],
            }
            if self.panoptic_config.masks:
                outputs["masks"] = self.detector.masks(pyramid, targets["boxes"], targets["classes"])
        return outputs

    # --- losses ------------------------------------------------------------------------------------------------------

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Compares the outputs of training with the targets.

        Args:
            targets: What `make_targets` returned, batched.
            outputs: What calling the system with these targets returned, in training.

        Returns:
            `semantic`, per labelled pixel; those of `Detector.losses_of`; and, if `loss.matching`, `panoptic`, per
            pixel that has a slot.
        """
        losses = {
            "semantic": semantic_loss(
                targets["semantic"], outputs["semantic_logits"], classes=self.classes, stride=self.stride
            ),
            **self.detector.losses_of(targets, outputs),
        }
        if not self.loss_config.matching:
            return losses
        outputs = dict(outputs)
        if not self.loss_config.end_to_end:
            for name in ("semantic_logits", "scores", "masks"):
                if name in outputs:
                    outputs[name] = ops.stop_gradient(outputs[name])
        if self.loss_config.detections == "truth":
            detection = ops.where(targets["valid"], ops.arange(targets["valid"].shape[1]), -1)
        else:
            stays, detection = match_detections(
                outputs["boxes"],
                outputs["thing_classes"],
                outputs["scores"] > 0,
                targets,
                iou_threshold=self.loss_config.matching_iou,
            )
            outputs["scores"] = ops.where(stays, outputs["scores"], 0.0)
        height, width = outputs["semantic_logits"].shape[1:3]
        slots = slot_targets(
            targets,
            detection,
            dataset_info=self.dataset_info,
            detections=outputs["scores"].shape[1],
            padded=(height * self.stride, width * self.stride),
        )
        middle = self.stride // 2
        slots = slots[:, middle :: self.stride, middle :: self.stride]
        potential = self._potential(outputs)
        handed = self._handed(outputs, potential)
        if handed is not None:
            potential = potential + handed
        is_logit = self.panoptic_config.potential == "a"
        return losses | {"panoptic": matching_loss(potential, slots, is_logit=is_logit)}

    # --- post-processing ---------------------------------------------------------------------------------------------

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess`: rows 0 to D - 1 are detections by score, row D + c is class c."""
        merged, of_regions = self._merge(outputs, image_size)
        return segment_outputs(merged, outputs["scores"], of_regions)

    def instances(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """See `PanopticSystem.instances`: all detections; without masks, with their segments in the panoptic map."""
        boxes = boxes_in_map(outputs["boxes"], outputs.get("seen_size"), image_size)
        if self.panoptic_config.masks:
            masks = paste_masks(outputs["masks"], boxes, *image_size)
        else:
            merged, _ = self._merge(outputs, image_size)
            masks = merged.rows[:, None] == ops.arange(boxes.shape[1])[:, None, None]
        return {
            "masks": masks,
            "boxes": boxes,
            "classes": self.thing_class_ids(outputs["thing_classes"]),
            "scores": outputs["scores"],
        }

    def semantic_map(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> Tensor:
        """See `PanopticSystem.semantic_map`: that of the semantic submodule, as in the paper's tables."""
        logits, seen_size = outputs["semantic_logits"], outputs.get("seen_size")
        return best_class(logits, image_size, stride=self.stride, seen_size=seen_size)

    def _potential(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Potential of each slot in each cell, without affinities, float32 [B, D + S, h, w]."""
        return dynamic_potential(
            outputs["semantic_logits"],
            outputs["boxes"],
            outputs["scores"],
            self.thing_class_ids(outputs["thing_classes"]),
            outputs.get("masks"),
            stuff_classes=self.dataset_info.stuff_classes,
            stride=self.stride,
            potential=self.panoptic_config.potential,
        )

    def _handed(self, outputs: Mapping[str, Tensor], potential: Tensor) -> Tensor | None:
        """What affinities add to the potential, float32 [B, D + S, h, w]; None without them."""
        if self.affinity_head is None:
            return None
        return affinity_update(potential, outputs["hand_out"], outputs["gather"])

    def _best_slot(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> Tensor:
        """The best slot of each pixel, int32 [B, H, W]."""
        logits, seen_size = outputs["semantic_logits"], outputs.get("seen_size")
        return best_slot(
            logits,
            boxes_in_map(outputs["boxes"], seen_size, image_size),
            outputs["scores"],
            self.thing_class_ids(outputs["thing_classes"]),
            outputs.get("masks"),
            self._handed(outputs, self._potential(outputs)),
            *upsampling_matrices(tuple(ops.shape(logits)[1:3]), seen_size, image_size, stride=self.stride),
            stuff_classes=self.dataset_info.stuff_classes,
            potential=self.panoptic_config.potential,
        )

    def _merge(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> tuple[SegmentTable, Tensor]:
        """The panoptic map, and the scores of the regions of the classes, float32 [B, C]."""
        config, seen_size = self.postprocess_config, outputs.get("seen_size")
        is_strong = outputs["scores"] >= config.score_threshold
        class_of_semantic: Sequence[int]
        if config.merge == "heuristic":
            semantic = self.semantic_map(outputs, image_size)
            class_of_semantic = self.classes.painted_class
            owner = resolve_mask_overlaps(
                is_strong & (outputs["scores"] > 0),
                boxes_in_map(outputs["boxes"], seen_size, image_size),
                outputs["masks"],
                height=image_size[0],
                width=image_size[1],
                overlap_threshold=config.overlap_threshold,
            )
        else:
            slot = self._best_slot({**outputs, "scores": ops.where(is_strong, outputs["scores"], 0.0)}, image_size)
            number = outputs["scores"].shape[1]
            class_of_semantic = self.dataset_info.stuff_classes
            semantic, owner = ops.maximum(slot - number, 0), ops.minimum(slot, number)
        merged = self._paint(semantic, owner, outputs["thing_classes"], class_of_semantic)
        of_regions = region_scores(
            ops.softmax(outputs["semantic_logits"], axis=-1),
            merged,
            self.classes.of_class,
            stride=self.stride,
            seen_size=seen_size,
        )
        return merged, of_regions

    def _paint(
        self, semantic: Tensor, owner: Tensor, thing_classes: Tensor, class_of_semantic: Sequence[int]
    ) -> SegmentTable:
        """Makes the map, see `deeplab2_like.model.merge.merge`."""
        return merge(
            semantic,
            owner,
            self.thing_class_ids(thing_classes),
            class_of_semantic=class_of_semantic,
            num_classes=self.dataset_info.num_classes,
            stuff_area_limit=self.postprocess_config.stuff_area_limit,
            label_divisor=self.dataset_info.label_divisor,
            void=self.dataset_info.void,
        )

    # --- upper bounds ------------------------------------------------------------------------------------------------

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`: the argmax over slots at full size, without affinities.

        Without masks, a pixel that is in the boxes of several objects of its class goes to the largest object.
        """
        class_map, instance_map = targets["semantic"], targets["instance_map"]
        number, stuff_classes = targets["valid"].shape[1], self.dataset_info.stuff_classes
        classes = self.thing_class_ids(targets["classes"])
        y, x = (ops.cast(ops.arange(side), "float32") + 0.5 for side in class_map.shape[1:])
        stuff = ops.array(stuff_classes, "int32")

        def plane(slot: Tensor) -> Tensor:
            row = ops.minimum(slot, number - 1)
            box = ops.take(targets["boxes"], row, axis=1)[..., None]  # [B, 4, 1]
            in_rows, in_columns = (y > box[:, 0]) & (y < box[:, 2]), (x > box[:, 1]) & (x < box[:, 3])
            is_thing = in_rows[:, :, None] & in_columns[:, None, :]
            is_thing = is_thing & (class_map == ops.take(classes, row, axis=1)[:, None, None])
            if self.panoptic_config.masks:
                is_thing = is_thing & (instance_map == row + 1)
            is_stuff = class_map == ops.take(stuff, ops.maximum(slot - number, 0))
            return ops.cast(ops.where(slot < number, is_thing, is_stuff), "float32")

        slots, size = number + len(stuff_classes), tuple(ops.shape(class_map))
        _, slot = running_argmax(plane, 0, slots, (ops.zeros(size, "float32"), ops.full(size, slots, "int32")))
        semantic, owner = ops.maximum(slot - number, 0), ops.minimum(slot, number)
        # What has no slot is void.
        merged = self._paint(semantic, owner, targets["classes"], (*stuff_classes, -1))
        scores = ops.cast(targets["valid"], "float32")
        return segment_outputs(merged, scores, ops.ones_like(merged.kept[:, number:], "float32"))

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: tuple[Any, Any],
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth`.

        `semantic`: the class of each cell of the semantic map. `detections`: boxes, scores, classes, and masks in the
        resolution of the mask head. Both together are `postprocess_targets`, at full size.
        """
        if set(parts) == set(self.oracle_parts):
            return self.postprocess_targets(targets)
        outputs = dict(outputs)
        seen_size = outputs.get("seen_size")
        if "semantic" in parts:
            class_map = self.classes.of_class_map(targets["semantic"])
            cells = tuple(ops.shape(outputs["semantic_logits"])[1:3])
            class_map = read_at_cells(class_map, cells, seen_size, image_size, stride=self.stride)
            # A probability of almost 1; void has none of its own.
            outputs["semantic_logits"] = 20.0 * ops.one_hot(class_map, self.dataset_info.num_classes, dtype="float32")
        if "detections" in parts:
            boxes, valid, scale = targets["boxes"], targets["valid"], seen_scale(seen_size, image_size)
            outputs |= {
                "boxes": boxes * ops.concatenate([scale, scale]),
                "scores": ops.cast(valid, "float32"),
                "thing_classes": targets["classes"],
            }
            if self.panoptic_config.masks:
                row = ops.cumsum(ops.ones_like(targets["classes"]), axis=1) - 1
                bins = outputs["masks"].shape[-1]
                masks = mask_targets(targets["instance_map"], boxes, row, output_size=bins)
                outputs["masks"] = ops.cast(masks, "float32")
        return self.postprocess(outputs, image_size)
