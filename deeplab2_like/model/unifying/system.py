"""The unifying system: network, losses and post-processing behind the contract of `PanopticSystem`."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.base import Loss, PanopticSystem, View
from deeplab2_like.model.config import backbone_features
from deeplab2_like.model.detection.detector import Detector
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.detection.masks import paste_masks
from deeplab2_like.model.fpn import FeaturePyramid
from deeplab2_like.model.geometry import Geometry, Size, resize_for_network
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.semantic import SemanticClasses
from deeplab2_like.model.unifying.config import UnifyingConfig
from deeplab2_like.model.unifying.losses import compute_losses
from deeplab2_like.model.unifying.network import AffinityHead, SqueezeExcitation, build_subnet
from deeplab2_like.model.unifying.oracle import detections_of_targets, postprocess_targets, replace_outputs
from deeplab2_like.model.unifying.postprocess import find_segments, postprocess
from deeplab2_like.model.unifying.targets import make_targets
from deeplab2_like.model.unifying.views import merge_views


@keras.saving.register_keras_serializable("deeplab2_like")
class Unifying(PanopticSystem):
    """The unifying system.

    Raw outputs: `semantic_logits` float32 [B, h, w, C] at the stride of the pyramid's finest level; with affinities
    `query` and `key`, float32 [B, h, w, A], see `AffinityHead`; the detections of `Detector`, in network pixels;
    outside of training, `network_size` int32 [2] if the images were resized; in training, the samples of `Detector` and
    its predictions for them.

    Args:
        config: The `model` section of a config.
        dataset_info: The meaning of the values of the panoptic map.

    Raises:
        UserError: If the output stride of the backbone is not 32, the data set has no things or no stuff, or its label
            divisor has no room for `roi.detections` or `loss.max_instances` instances.

    Example:
        >>> config = dl.load_config("unifying/scenes_tiny")
        >>> system = Unifying(config.model, dataset_info)
        >>> panoptic = system.infer(images)["panoptic"]  # uint8 [B, H, W, 3] to int32 [B, H, W]
    """

    config_class = UnifyingConfig
    oracle_parts = ("semantic", "detections")

    def __init__(self, config: UnifyingConfig, dataset_info: DatasetInfo, *, name: str | None = None) -> None:
        super().__init__(config, dataset_info, name=name)
        self._check_classes()
        self.classes = SemanticClasses.of(dataset_info, things="all", paint_things=False)

        self.backbone = build_backbone(config.backbone, norm=config.norm)
        features = backbone_features(config.fpn.finest_level)
        self.excitation: SqueezeExcitation | None = None
        if config.squeeze_excitation:
            self.excitation = SqueezeExcitation(self.backbone.channels["res5"], name="excitation")
        self.fpn = FeaturePyramid(
            strides=self.backbone.strides,
            features=tuple(features.values()),
            channels=config.fpn.channels,
            coarser_levels=1,
            norm=config.fpn.norm,
            name="fpn",
        )
        self.stride = self.fpn.strides[config.fpn.finest_level]
        inputs: dict[str, Any] = {
            "strides": {level: self.fpn.strides[level] for level in features},
            "input_channels": config.fpn.channels,
        }
        self.semantic_head = build_subnet(config.semantic, dataset_info.num_classes, name="semantic_head", **inputs)
        self.affinity_head: AffinityHead | None = None
        if config.panoptic.affinity:
            self.affinity_head = AffinityHead(config.semantic, name="affinity_head", **inputs)
        self.detector = Detector(
            config.rpn,
            config.roi,
            num_classes=len(dataset_info.thing_classes),
            strides=self.fpn.strides,
            roi_levels=tuple(features),
            with_masks=config.panoptic.masks,
            name="detector",
        )
        self.loss_weights = {
            "semantic": config.loss.semantic_weight,
            **dict.fromkeys(self.detector.loss_names, config.loss.detection_weight),
            **({"panoptic": config.loss.panoptic_weight} if config.loss.matching else {}),
        }

    def _check_classes(self) -> None:
        """Checks that the data set has things, stuff, and room for the instances."""
        info = self.dataset_info
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
        self.check_instance_limit("model.roi.detections", self.config.roi.detections)
        self.check_instance_limit("model.loss.max_instances", self.config.loss.max_instances)

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """See `targets.make_targets`."""
        return make_targets(panoptic, self.config.loss, self.dataset_info)

    def call(
        self, images: Tensor, targets: Any = None, training: bool = False, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.call`. `targets` are needed in training, to sample anchors and RoIs."""
        images, outputs = resize_for_network(images, None if training else self.config.resize, scale=scale)
        image_size = tuple(ops.shape(images)[1:3])
        features = dict(self.backbone(self.prepare_images(images), training=training))
        if self.excitation is not None:
            features["res5"] = self.excitation(features["res5"])
        pyramid = self.fpn(features, training=training)
        outputs["semantic_logits"] = self.semantic_head(pyramid, training=training)
        if self.affinity_head is not None:
            levels = pyramid
            if training and not self.config.loss.end_to_end:
                levels = {name: ops.stop_gradient(level) for name, level in pyramid.items()}
            query, key = self.affinity_head(levels, image_size=image_size, training=training)
            outputs |= {"query": query, "key": key}
        if not training:
            return outputs | self.detector(pyramid, image_size=image_size)
        return outputs | self._detect_in_training(pyramid, image_size, targets)

    def _detect_in_training(
        self, pyramid: Mapping[str, Tensor], image_size: Size, targets: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """Returns the detector's outputs of training, and the detections for the matching loss, if it is used."""
        config = self.config.loss
        predicted = config.matching and config.detections == "predicted"
        max_detections = config.max_detections if predicted else 0
        outputs = self.detector(pyramid, image_size=image_size, targets=targets, max_detections=max_detections)
        if config.matching and config.detections == "truth":
            outputs |= detections_of_targets(targets)
            if self.config.panoptic.masks:
                outputs["masks"] = self.detector.predict_masks(pyramid, targets["boxes"], targets["classes"])
        return outputs

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """See `losses.compute_losses`."""
        return compute_losses(
            targets, outputs, self.config.loss, self.dataset_info, detector=self.detector, **self._options()
        )

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """See `postprocess.postprocess`."""
        geometry = Geometry.of(outputs, image_size)
        return postprocess(outputs, geometry, self.config.postprocess, self.dataset_info, **self._options())

    def instances(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """See `PanopticSystem.instances`: all detections; without a mask head, masks are panoptic segments."""
        geometry = Geometry.of(outputs, image_size)
        boxes = geometry.boxes_to_image(outputs["boxes"])
        if self.config.panoptic.masks:
            masks = paste_masks(outputs["masks"], boxes, *image_size)
        else:
            table = find_segments(outputs, geometry, self.config.postprocess, self.dataset_info, **self._options())
            masks = table.rows[:, None] == ops.arange(boxes.shape[1])[:, None, None]
        return {
            "masks": masks,
            "boxes": boxes,
            "classes": thing_class_ids(outputs["thing_classes"], self.dataset_info),
            "scores": outputs["scores"],
        }

    def merge_views(self, views: Sequence[View], image_size: Size) -> dict[str, Tensor]:
        """See `views.merge_views`."""
        return merge_views(views, image_size, self.config.roi)

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `oracle.postprocess_targets`."""
        with_masks = self.config.panoptic.masks
        return postprocess_targets(targets, self.config.postprocess, self.dataset_info, with_masks=with_masks)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: Size,
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth`.

        One part replaces raw outputs at their own resolution; both together are `postprocess_targets`, at full size.
        """
        if set(parts) == set(self.oracle_parts):
            return self.postprocess_targets(targets)
        geometry = Geometry.of(outputs, image_size)
        outputs = replace_outputs(outputs, targets, parts, geometry, classes=self.classes, stride=self.stride)
        return self.postprocess(outputs, image_size)

    def _options(self) -> dict[str, Any]:
        """Keyword arguments that losses and post-processing share."""
        return {"classes": self.classes, "potential": self.config.panoptic.potential, "stride": self.stride}
