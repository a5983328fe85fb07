"""The Panoptic FPN system: network, losses and post-processing behind the contract of `PanopticSystem`."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.base import Loss, PanopticSystem, View
from deeplab2_like.model.detection.detector import Detector
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.detection.masks import paste_masks
from deeplab2_like.model.detection.views import merge_detections
from deeplab2_like.model.geometry import Geometry, Size, resize_for_network
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fpn.config import PanopticFPNConfig
from deeplab2_like.model.panoptic_fpn.losses import compute_losses
from deeplab2_like.model.panoptic_fpn.network import (
    build_detector,
    build_pyramid,
    build_semantic_branch,
    split_channels,
)
from deeplab2_like.model.panoptic_fpn.oracle import instances_of_targets
from deeplab2_like.model.panoptic_fpn.postprocess import postprocess
from deeplab2_like.model.panoptic_fpn.targets import make_targets
from deeplab2_like.model.semantic import SemanticClasses
from deeplab2_like.model.views import average_semantic


@keras.saving.register_keras_serializable("deeplab2_like")
class PanopticFPN(PanopticSystem):
    """Panoptic FPN.

    Raw outputs: `semantic_logits` float32 [B, h, w, S] at the stride of the finest level, with one channel per semantic
    class (see `semantic.things`); and, unless `semantic_only`,

    - outside of training, the detections of `Detector`, in network pixels, and `network_size` int32 [2] if the images
      were resized;
    - in training, the samples of `Detector` and its predictions for them.

    Args:
        config: The `model` section of a config.
        dataset_info: The meaning of the values of the panoptic map.

    Raises:
        UserError: If the output stride of the backbone is not 32, the data set has no things, or its label divisor has
            no room for `roi.detections` or `loss.max_instances` instances.

    Example:
        >>> config = dl.load_config("panoptic_fpn/scenes_tiny")
        >>> system = PanopticFPN(config.model, dataset_info)
        >>> panoptic = system.infer(images)["panoptic"]  # uint8 [B, H, W, 3] to int32 [B, H, W]
    """

    config_class = PanopticFPNConfig
    oracle_parts = ("semantic", "instances")

    def __init__(self, config: PanopticFPNConfig, dataset_info: DatasetInfo, *, name: str | None = None) -> None:
        super().__init__(config, dataset_info, name=name)
        if not config.semantic_only:
            self._check_things()
        self.classes = SemanticClasses.of(
            dataset_info, things=config.semantic.things, paint_things=config.semantic_only
        )
        self.loss_weights = {"semantic": config.loss.semantic_weight}

        self.backbone = build_backbone(config.backbone, norm=config.norm)
        self.fpn = build_pyramid(config, self.backbone.strides)
        self.stride = self.fpn.strides[config.fpn.finest_level]
        self.semantic_branch = build_semantic_branch(config, self.fpn.strides, num_classes=len(self.classes.class_id))
        self.detector: Detector | None = None
        if not config.semantic_only:
            self.detector = build_detector(config, self.fpn.strides, num_classes=len(dataset_info.thing_classes))
            self.loss_weights |= dict.fromkeys(self.detector.loss_names, config.loss.instance_weight)

    def _check_things(self) -> None:
        """Checks that the data set has things, and room for the instances."""
        if not self.dataset_info.thing_classes:
            raise UserError(
                f"Data set '{self.dataset_info.name}' has no things, so there is nothing for Mask R-CNN to find; set "
                "config key model.semantic_only to true."
            )
        self.check_instance_limit("model.roi.detections", self.config.roi.detections)
        self.check_instance_limit("model.loss.max_instances", self.config.loss.max_instances)

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """See `targets.make_targets`."""
        config = self.config
        return make_targets(panoptic, config.loss, self.dataset_info, semantic_only=config.semantic_only)

    def call(
        self, images: Tensor, targets: Any = None, training: bool = False, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.call`. `targets` are needed in training, to sample anchors and RoIs."""
        images, outputs = resize_for_network(images, None if training else self.config.resize, scale=scale)
        image_size = tuple(ops.shape(images)[1:3])
        features = self.backbone(self.prepare_images(images), training=training)
        pyramid = self.fpn(features, training=training)
        semantic, instance = split_channels(pyramid) if self.config.fpn.grouped else (pyramid, pyramid)
        outputs["semantic_logits"] = self.semantic_branch(semantic, training=training)
        if self.detector is None:
            return outputs
        if training:
            return outputs | self.detector(instance, image_size=image_size, targets=targets, max_detections=0)
        return outputs | self.detector(instance, image_size=image_size)

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """See `losses.compute_losses`."""
        return compute_losses(
            targets, outputs, self.config.loss, classes=self.classes, stride=self.stride, detector=self.detector
        )

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """See `postprocess.postprocess`."""
        return self._postprocess(outputs, image_size)

    def instances(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor] | None:
        """See `PanopticSystem.instances`: all detections, including those below the threshold of the panoptic map."""
        if self.detector is None:
            return None
        boxes = Geometry.of(outputs, image_size).boxes_to_image(outputs["boxes"])
        return {
            "masks": paste_masks(outputs["masks"], boxes, *image_size),
            "boxes": boxes,
            "classes": thing_class_ids(outputs["thing_classes"], self.dataset_info),
            "scores": outputs["scores"],
        }

    @property
    def semantic_classes(self) -> tuple[int, ...]:
        """See `PanopticSystem.semantic_classes`: with `semantic.things: other`, those of stuff."""
        return self.classes.predicted

    def semantic_map(self, outputs: Mapping[str, Tensor], image_size: Size) -> Tensor:
        """See `PanopticSystem.semantic_map`."""
        semantic = super().semantic_map(outputs, image_size)
        return self.classes.to_class_ids(semantic, self.dataset_info.ignore_label)

    def merge_views(self, views: Sequence[View], image_size: Size) -> dict[str, Tensor]:
        """See `PanopticSystem.merge_views`, `average_semantic` and `merge_detections`."""
        merged = average_semantic(views, image_size)
        return merged if self.detector is None else merged | merge_detections(views, image_size, self.config.roi)

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`."""
        height, width = targets["semantic"].shape[1:3]
        return self.postprocess_with_truth({}, targets, (height, width), self.oracle_parts)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: Size,
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth`."""
        truth: dict[str, Any] = {}
        if "semantic" in parts:
            truth["true_semantic"] = self.classes.of_class_map(targets["semantic"])
        if "instances" in parts:
            truth["true_instances"] = instances_of_targets(targets, self.dataset_info)
        return self._postprocess(outputs, image_size, **truth)

    def _postprocess(self, outputs: Mapping[str, Tensor], image_size: Size, **truth: Any) -> dict[str, Tensor]:
        return postprocess(
            outputs,
            Geometry.of(outputs, image_size),
            self.config.postprocess,
            self.dataset_info,
            classes=self.classes,
            stride=self.stride,
            **truth,
        )
