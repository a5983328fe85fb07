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
    sample_rois,
    select_masks,
)
from deeplab2_like.model.detection.roi_pooling import roi_align
from deeplab2_like.model.detection.rpn import RpnHead, make_anchors, propose, rpn_losses, sample_anchors
from deeplab2_like.model.geometry import Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.random_numbers import image_seeds

# Largest number of samples per bin and axis of the mask targets, whose memory grows with its square.
_MAX_MASK_SAMPLES = 8


class Detector(keras.layers.Layer):
    """Detects objects: proposes boxes, and predicts the class and the mask of each.

    Args:
        rpn: Anchors and proposals.
        roi: Box head and mask head.
        num_classes: Number of thing classes, T.
        strides: Stride of each pyramid level with proposals, by its name, fine to coarse.
        roi_levels: Names of the levels that the heads read.
        with_masks: Whether there is a mask head (Mask R-CNN) or not (Faster R-CNN).
    """

    def __init__(
        self,
        rpn: RpnConfig,
        roi: RoiConfig,
        *,
        num_classes: int,
        strides: Mapping[str, int],
        roi_levels: tuple[str, ...],
        with_masks: bool = True,
        name: str | None = None,
    ) -> None:
        # bfloat16 could not tell neighboring pixels apart, so the boxes of the targets are not cast.
        super().__init__(name=name, autocast=False)
        self.num_classes = num_classes
        self.strides = dict(strides)
        self.roi_levels = roi_levels
        self.rpn = rpn
        self.roi = roi
        self.rpn_head = RpnHead(rpn, name="rpn_head")
        self.box_head = BoxHead(roi, num_classes=num_classes, name="box_head")
        self.mask_head = MaskHead(roi, num_classes=num_classes, name="mask_head") if with_masks else None
        self.seed_generator = keras.random.SeedGenerator(name="sampling")

    @property
    def loss_names(self) -> tuple[str, ...]:
        """Names of the losses, in the order of `compute_losses`."""
        names = ("rpn_class", "rpn_box", "box_class", "box")
        return names if self.mask_head is None else (*names, "mask")

    def build(self, input_shape: Any) -> None:
        """Does nothing: layers build themselves when called, and not every call needs all of them."""

    def call(
        self,
        pyramid: Mapping[str, Tensor],
        *,
        image_size: Size,
        targets: Mapping[str, Tensor] | None = None,
        max_detections: int | None = None,
    ) -> dict[str, Tensor]:
        """Applies the detector.

        Args:
            pyramid: Levels, float [B, h, w, C].
            image_size: Height and width of the image without padding, to which boxes are clipped.
            targets: Batched result of `instance_targets`, with or without `number`, see `PanopticSystem.call`; None
                outside of training.
            max_detections: Detections per image, N, 0 for none; None for `roi.detections`.

        Returns:
            The detections, best first: `boxes` float32 [B, N, 4] in pixels, `scores` float32 [B, N], zero in unused
            rows, `thing_classes` int32 [B, N], and, with masks, `masks` float32 [B, N, P, P], probabilities of the
            pixels in the box. In training also `rpn_*`, `roi_*` and `step`, see `_training_outputs`.
        """
        levels = {level: pyramid[level] for level in self.strides}
        objectness, deltas = self.rpn_head(levels)
        anchors = make_anchors(levels, self.strides, self.rpn)
        proposals = propose(objectness, deltas, anchors, image_size, self.rpn, training=targets is not None)
        outputs: dict[str, Tensor] = {}
        if targets is not None:
            rpn = {
                "objectness": ops.concatenate(list(objectness.values()), axis=1),
                "deltas": ops.concatenate(list(deltas.values()), axis=1),
                "anchors": ops.concatenate(list(anchors.values()), axis=0),
            }
            outputs |= self._training_outputs(pyramid, rpn, proposals, targets)
        if max_detections == 0:
            return outputs
        detections = self._detect(pyramid, proposals, image_size, max_detections, training=targets is not None)
        return outputs | detections

    def _training_outputs(
        self,
        pyramid: Mapping[str, Tensor],
        rpn: Mapping[str, Tensor],
        proposals: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
    ) -> dict[str, Tensor]:
        """Samples anchors and RoIs, and predicts for them.

        Returns:
            `rpn_objectness` and `rpn_deltas` of all anchors; `rpn_sample_*` of `sample_anchors`; `roi_sample_*` of
            `sample_rois`; `roi_class_logits` and `roi_deltas` of the sampled RoIs; with masks, `roi_mask_logits` of the
            first of them, which hold the foreground; `step`, int32 scalar, which counts the steps.
        """
        seed = self.seed_generator.next()
        seeds = image_seeds(seed, ops.shape(targets["boxes"])[0], targets.get("number"))
        anchor_samples = sample_anchors(rpn["anchors"], targets, self.rpn, seeds=seeds)
        # The sums are arbitrary seeds other than those of the anchors.
        roi_samples = sample_rois(proposals, targets, self.roi, num_classes=self.num_classes, seeds=seeds + 7919)
        class_logits, deltas = self.box_head(self.pool(pyramid, roi_samples["boxes"], self.roi.box_resolution))
        outputs = {
            "rpn_objectness": rpn["objectness"],
            "rpn_deltas": rpn["deltas"],
            **{f"rpn_sample_{name}": value for name, value in anchor_samples.items()},
            **{f"roi_sample_{name}": value for name, value in roi_samples.items()},
            "roi_class_logits": class_logits,
            "roi_deltas": deltas,
            # The second number of a seed grows by one in every step.
            "step": ops.cast(seed[1], "int32"),
        }
        if self.mask_head is not None:
            boxes = roi_samples["boxes"][:, : self.roi.foreground_samples]
            outputs["roi_mask_logits"] = self.mask_head(self.pool(pyramid, boxes, self.roi.mask_resolution))
        return outputs

    def _detect(
        self,
        pyramid: Mapping[str, Tensor],
        proposals: Mapping[str, Tensor],
        image_size: Size,
        max_detections: int | None,
        *,
        training: bool,
    ) -> dict[str, Tensor]:
        """Returns boxes, scores, classes and masks of the best detections."""
        resolution = self.roi.box_resolution
        constant = {level: ops.stop_gradient(feature) for level, feature in pyramid.items()}
        class_logits, deltas = self.box_head(self.pool(constant, proposals["boxes"], resolution))
        best = detect(class_logits, deltas, proposals, image_size, self.roi, max_detections=max_detections)
        if training:
            # Scores have a gradient. Few proposals become detections, so computing their scores again takes less memory
            # than keeping the features of all proposals.
            boxes = take_rows(proposals["boxes"], best["proposal"])
            class_logits, _ = self.box_head(self.pool(pyramid, boxes, resolution))
            is_class = ops.one_hot(best["classes"], self.num_classes + 1, dtype="float32")
            scores = ops.sum(ops.softmax(class_logits, axis=-1) * is_class, axis=-1)
            best["scores"] = ops.where(best["valid"], scores, 0.0)
        detections = {"boxes": best["boxes"], "scores": best["scores"], "thing_classes": best["classes"]}
        if self.mask_head is not None:
            detections["masks"] = self.predict_masks(pyramid, best["boxes"], best["classes"])
        return detections

    def predict_masks(self, pyramid: Mapping[str, Tensor], boxes: Tensor, classes: Tensor) -> Tensor:
        """Predicts one mask per box.

        Args:
            pyramid: Levels, float [B, h, w, C].
            boxes: float32 [B, N, 4], in pixels.
            classes: int32 [B, N], thing classes.

        Returns:
            float32 [B, N, P, P], probabilities.
        """
        assert self.mask_head is not None
        logits = self.mask_head(self.pool(pyramid, boxes, self.roi.mask_resolution))
        return ops.sigmoid(select_masks(logits, classes))

    def pool(self, pyramid: Mapping[str, Tensor], boxes: Tensor, resolution: int) -> Tensor:
        """Pools features of boxes, float32 [B, R, 4], to float [B, R, resolution, resolution, C]."""
        return roi_align(
            {level: pyramid[level] for level in self.roi_levels},
            self.strides,
            boxes,
            output_size=resolution,
            sampling_ratio=self.roi.sampling_ratio,
            max_sampling_ratio=self.roi.max_sampling_ratio,
        )

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Compares the outputs of training with the targets.

        Args:
            targets: Batched result of `instance_targets`.
            outputs: Result of calling the detector with these targets.

        Returns:
            `rpn_class` and `rpn_box`, per sampled anchor; `box_class` and `box`, per sampled RoI; and, with masks,
            `mask`, averaged over the pixels of each foreground RoI.
        """
        roi = self.roi
        anchor_samples, roi_samples = _with_prefix(outputs, "rpn_sample_"), _with_prefix(outputs, "roi_sample_")
        losses = {
            **rpn_losses(outputs["rpn_objectness"], outputs["rpn_deltas"], anchor_samples, self.rpn),
            **box_losses(outputs["roi_class_logits"], outputs["roi_deltas"], roi_samples, roi),
        }
        if self.mask_head is None:
            return losses
        number = roi.foreground_samples
        boxes, row, classes = (roi_samples[name][:, :number] for name in ("boxes", "row", "classes"))
        foreground = (roi_samples["foreground"] & roi_samples["valid"])[:, :number]
        masks = mask_targets(
            targets["instance_map"],
            boxes,
            row,
            output_size=outputs["roi_mask_logits"].shape[2],
            sampling_ratio=roi.sampling_ratio,
            max_sampling_ratio=min(roi.max_sampling_ratio, _MAX_MASK_SAMPLES),
        )
        return losses | {"mask": mask_loss(outputs["roi_mask_logits"], masks, classes, foreground)}


def _with_prefix(outputs: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Returns the outputs whose names start with a prefix, by the rest of their names."""
    return {name.removeprefix(prefix): value for name, value in outputs.items() if name.startswith(prefix)}
