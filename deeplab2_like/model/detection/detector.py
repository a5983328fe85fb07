"""Faster R-CNN (Ren et al., 2015) and Mask R-CNN (He et al., 2017) on a feature pyramid, as one layer."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from deeplab2_like.model.base import Loss
from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.detection.config import RoiConfig, RpnConfig
from deeplab2_like.model.detection.masks import mask_targets
from deeplab2_like.model.detection.roi_heads import (
    BoxHead,
    MaskHead,
    box_losses,
    detect,
    mask_loss,
    masks_of_classes,
    sample_rois,
)
from deeplab2_like.model.detection.roi_pooling import roi_align
from deeplab2_like.model.detection.rpn import RpnHead, make_anchors, propose, rpn_losses, sample_anchors
from deeplab2_like.model.layers import Tensor


class Detector(keras.layers.Layer):
    """Finds objects: proposes boxes, tells their classes, and predicts a mask in each.

    Args:
        num_classes: Number of thing classes, T.
        strides: Stride of each level that proposals are made on, by its name, fine to coarse.
        roi_levels: The levels that the heads read, by their names.
        rpn: Anchors and proposals.
        roi: Box head and mask head.
        with_masks: Whether there is a mask head: Mask R-CNN, or else Faster R-CNN.
    """

    def __init__(
        self,
        *,
        num_classes: int,
        strides: Mapping[str, int],
        roi_levels: tuple[str, ...],
        rpn: RpnConfig,
        roi: RoiConfig,
        with_masks: bool = True,
        name: str | None = None,
    ) -> None:
        # bfloat16 could not tell neighbouring pixels apart, so the boxes of the targets are not cast.
        super().__init__(name=name, autocast=False)
        self.num_classes = num_classes
        self.strides = dict(strides)
        self.roi_levels = roi_levels
        self.rpn_config = rpn
        self.roi_config = roi
        self.rpn_head = RpnHead(num_anchors=len(rpn.anchor_ratios), channels=rpn.channels, name="rpn_head")
        self.box_head = BoxHead(num_classes=num_classes, channels=roi.box_channels, name="box_head")
        self.mask_head = (
            MaskHead(
                num_classes=num_classes,
                channels=roi.mask_channels,
                convolutions=roi.mask_convolutions,
                name="mask_head",
            )
            if with_masks
            else None
        )
        self.seed_generator = keras.random.SeedGenerator(name="sampling")

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses, in the order of `losses_of`."""
        names = ("rpn_class", "rpn_box", "box_class", "box")
        return names if self.mask_head is None else (*names, "mask")

    def build(self, input_shape: Any) -> None:
        """Leaves it to the layers, when they are called: which of them are, depends on what is asked for."""

    def call(
        self,
        pyramid: Mapping[str, Tensor],
        *,
        image_size: tuple[Any, Any],
        targets: Mapping[str, Tensor] | None = None,
        detections: int | None = None,
    ) -> dict[str, Tensor]:
        """Applies the detector.

        Args:
            pyramid: Levels, float [B, h, w, C].
            image_size: Height and width of the image without padding, ints or int32 scalars; boxes end there.
            targets: What `instance_targets` returned, batched: to train; None outside of training.
            detections: How many detections to return, 0 for none; None for as many as `roi` says.

        Returns:
            The detections, best first: `boxes` float32 [B, N, 4] in pixels, `scores` float32 [B, N], zero in unused
            rows, `thing_classes` int32 [B, N], and, with masks, `masks` float32 [B, N, P, P], probabilities of the
            pixels in the box. To train, `rpn_*`, `roi_*` and `turn`: what was drawn and what was predicted for it, see
            `_outputs_to_train`.
        """
        training = targets is not None
        levels = {level: pyramid[level] for level in self.strides}
        objectness, deltas = self.rpn_head(levels)
        anchors = make_anchors(
            levels,
            self.strides,
            sizes=self.rpn_config.anchor_sizes,
            ratios=self.rpn_config.anchor_ratios,
        )
        proposals = propose(
            objectness,
            deltas,
            anchors,
            image_size,
            candidates=self.rpn_config.train_candidates if training else self.rpn_config.test_candidates,
            nms_iou=self.rpn_config.nms_iou,
            number=self.rpn_config.proposals,
        )
        outputs: dict[str, Tensor] = {}
        if targets is not None:
            rpn = {
                "objectness": ops.concatenate(list(objectness.values()), axis=1),
                "deltas": ops.concatenate(list(deltas.values()), axis=1),
                "anchors": ops.concatenate(list(anchors.values()), axis=0),
            }
            outputs |= self._outputs_to_train(pyramid, rpn, proposals, targets)
        number = self.roi_config.detections if detections is None else detections
        if not number:
            return outputs
        return outputs | self._detections(pyramid, proposals, image_size, number, training=training)

    def _outputs_to_train(
        self,
        pyramid: Mapping[str, Tensor],
        rpn: Mapping[str, Tensor],
        proposals: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Draws anchors and RoIs, and predicts for them.

        Returns:
            `rpn_objectness` and `rpn_deltas`, of all anchors; `rpn_sample_*` of `sample_anchors`; `roi_sample_*` of
            `sample_rois`; `roi_class_logits` and `roi_deltas` of these; with masks, `roi_mask_logits` of the first of
            them, where the foreground is; `turn`, int32 scalar, which counts the steps.
        """
        roi = self.roi_config
        seed = self.seed_generator.next()
        anchor_samples = sample_anchors(
            rpn["anchors"],
            targets,
            seed=seed,
            positive_iou=self.rpn_config.positive_iou,
            negative_iou=self.rpn_config.negative_iou,
            max_crowd_share=self.rpn_config.crowd_share,
            number=self.rpn_config.samples,
            positive_share=self.rpn_config.positive_share,
        )
        roi_samples = sample_rois(
            proposals,
            targets,
            num_classes=self.num_classes,
            # Any other numbers than those of the anchors.
            seed=seed + ops.cast(7919, seed.dtype),
            foreground_iou=roi.foreground_iou,
            max_crowd_share=roi.crowd_share,
            number=roi.samples,
            foreground_number=roi.foreground_samples,
        )
        class_logits, deltas = self.box_head(self.pool(pyramid, roi_samples["boxes"], roi.box_resolution))
        outputs = {
            "rpn_objectness": rpn["objectness"],
            "rpn_deltas": rpn["deltas"],
            **{f"rpn_sample_{name}": value for name, value in anchor_samples.items()},
            **{f"roi_sample_{name}": value for name, value in roi_samples.items()},
            "roi_class_logits": class_logits,
            "roi_deltas": deltas,
            # The second number of a seed grows by one in every step.
            "turn": ops.cast(seed[1], "int32"),
        }
        if self.mask_head is not None:
            boxes = roi_samples["boxes"][:, : roi.foreground_samples]
            outputs["roi_mask_logits"] = self.mask_head(self.pool(pyramid, boxes, roi.mask_resolution))
        return outputs

    def _detections(
        self,
        pyramid: Mapping[str, Tensor],
        proposals: Mapping[str, Tensor],
        image_size: tuple[Any, Any],
        number: int,
        *,
        training: bool,
    ) -> dict[str, Tensor]:
        """Boxes, scores, classes and masks of the best instances, so many of them."""
        roi = self.roi_config
        fixed = {level: ops.stop_gradient(feature) for level, feature in pyramid.items()}
        class_logits, deltas = self.box_head(self.pool(fixed, proposals["boxes"], roi.box_resolution))
        found = detect(
            class_logits,
            deltas,
            proposals,
            image_size,
            weights=roi.box_weights,
            score_threshold=roi.score_threshold,
            nms_iou=roi.nms_iou,
            candidates=roi.candidates,
            number=number,
        )
        if training:
            # Scores have a gradient. As few proposals become detections, theirs are computed again, and all that the
            # other proposals needed is forgotten.
            boxes = take_rows(proposals["boxes"], found["proposal"])
            class_logits, _ = self.box_head(self.pool(pyramid, boxes, roi.box_resolution))
            chosen = ops.one_hot(found["classes"], self.num_classes + 1, dtype="float32")
            scores = ops.sum(ops.softmax(class_logits, axis=-1) * chosen, axis=-1)
            found["scores"] = ops.where(found["valid"], scores, 0.0)
        detections = {"boxes": found["boxes"], "scores": found["scores"], "thing_classes": found["classes"]}
        if self.mask_head is not None:
            detections["masks"] = self.masks(pyramid, found["boxes"], found["classes"])
        return detections

    def masks(self, pyramid: Mapping[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Masks in boxes float32 [B, N, 4] of thing classes int32 [B, N]: probabilities, float32 [B, N, P, P]."""
        assert self.mask_head is not None
        logits = self.mask_head(self.pool(pyramid, boxes, self.roi_config.mask_resolution))
        return ops.sigmoid(masks_of_classes(logits, classes))

    def pool(self, pyramid: Mapping[str, Tensor], boxes: Tensor, resolution: int) -> Tensor:
        """Features of boxes float32 [B, R, 4]: float [B, R, resolution, resolution, C]."""
        return roi_align(
            {level: pyramid[level] for level in self.roi_levels},
            self.strides,
            boxes,
            output_size=resolution,
            sampling_ratio=self.roi_config.sampling_ratio,
            max_sampling_ratio=self.roi_config.max_sampling_ratio,
        )

    def losses_of(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Compares the outputs of training with the targets (Panoptic FPN, section 3.2).

        Args:
            targets: What `instance_targets` returned, batched.
            outputs: What calling the detector with these targets returned.

        Returns:
            `rpn_class` and `rpn_box`, per drawn anchor; `box_class` and `box`, per drawn RoI; and, with masks, `mask`,
            per pixel of the foreground RoIs.
        """
        roi_samples = _with_prefix(outputs, "roi_sample_")
        losses = {
            **rpn_losses(
                outputs["rpn_objectness"],
                outputs["rpn_deltas"],
                _with_prefix(outputs, "rpn_sample_"),
                normalizer=self.rpn_config.normalizer,
            ),
            **box_losses(
                outputs["roi_class_logits"],
                outputs["roi_deltas"],
                roi_samples,
                weights=self.roi_config.box_weights,
            ),
        }
        if self.mask_head is None:
            return losses
        number = self.roi_config.foreground_samples
        boxes, row, classes = (roi_samples[name][:, :number] for name in ("boxes", "row", "classes"))
        foreground = (roi_samples["foreground"] & roi_samples["valid"])[:, :number]
        masks = mask_targets(
            targets["instance_map"],
            boxes,
            row,
            output_size=outputs["roi_mask_logits"].shape[2],
            sampling_ratio=self.roi_config.sampling_ratio,
            max_sampling_ratio=self.roi_config.max_sampling_ratio,
        )
        return losses | {"mask": mask_loss(outputs["roi_mask_logits"], masks, classes, foreground)}


def _with_prefix(outputs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in outputs.items() if name.startswith(prefix)}
