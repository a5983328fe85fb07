"""The LPSNet system: network, losses and post-processing behind the contract of `PanopticSystem`."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.base import Loss, PanopticSystem, View
from deeplab2_like.model.config import backbone_features
from deeplab2_like.model.fpn import FeaturePyramid
from deeplab2_like.model.geometry import Geometry, Size, resize_for_network
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.lpsnet.config import LPSNetConfig
from deeplab2_like.model.lpsnet.losses import compute_losses
from deeplab2_like.model.lpsnet.network import BoxHead, make_context, make_initializer
from deeplab2_like.model.lpsnet.oracle import postprocess_with_truth
from deeplab2_like.model.lpsnet.postprocess import postprocess, predict_instances
from deeplab2_like.model.lpsnet.targets import make_targets
from deeplab2_like.model.lpsnet.views import merge_views
from deeplab2_like.model.semantic import SemanticClasses, SemanticSubnet


@keras.saving.register_keras_serializable("deeplab2_like")
class LPSNet(PanopticSystem):
    """LPSNet.

    Raw outputs, all float32: `semantic_logits` [B, h, w, C] at the stride of the finest level of the pyramid; for each
    level of the box head `distances_<level>` [B, h, w, 4], to the left, top, right and bottom side in network pixels,
    and `border_ness_<level>` [B, h, w], logits; and `network_size` int32 [2] if the images were resized.

    Args:
        config: The `model` section of a config.
        dataset_info: The meaning of the values of the panoptic map.

    Raises:
        UserError: If the backbone has another output stride than 32, the data set has no things, or its label divisor
            has no room for `postprocess.detections` or `loss.max_instances` instances.

    Example:
        >>> config = dl.load_config("lpsnet/scenes_tiny")
        >>> system = LPSNet(config.model, dataset_info)
        >>> panoptic = system.infer(images)["panoptic"]  # uint8 [B, H, W, 3] to int32 [B, H, W]
    """

    config_class = LPSNetConfig
    oracle_parts = ("semantic", "boxes")
    # Their sum is the FLOPS of Table 1: it leaves out pyramid pooling, box head and the deformable convolutions.
    parts_in_paper = ("backbone", "fpn", "semantic_head/predictor")

    def __init__(self, config: LPSNetConfig, dataset_info: DatasetInfo, *, name: str | None = None) -> None:
        super().__init__(config, dataset_info, name=name)
        if not dataset_info.thing_classes:
            raise UserError(
                f"Data set '{dataset_info.name}' has no things, so there are no boxes for LPSNet to find; train "
                "Semantic FPN, with a config such as panoptic_fpn/semantic_fpn_coco_resnet50."
            )
        self.check_instance_limit("model.postprocess.detections", config.postprocess.detections)
        self.check_instance_limit("model.loss.max_instances", config.loss.max_instances)
        self.classes = SemanticClasses.of(dataset_info, things="all", paint_things=False)
        self.stride = config.stride
        self.loss_weights = {
            "semantic": config.loss.semantic_weight,
            "box": config.loss.box_weight,
            "border_ness": config.loss.border_ness_weight,
        }

        self.backbone = build_backbone(config.backbone, norm=config.norm)
        features = backbone_features(config.fpn.finest_level)
        self.fpn = FeaturePyramid(
            strides=self.backbone.strides,
            features=tuple(features.values()),
            channels=config.fpn.channels,
            coarser_levels=max(int(config.box.levels[-1].removeprefix("p")) - 5, 0),
            coarser="convolve",
            norm=config.fpn.norm,
            name="fpn",
        )
        self.context = make_context(config.context, output_channels=config.fpn.channels)
        self.box_head = BoxHead(config.box, name="box_head")
        self.semantic_head = SemanticSubnet(
            dataset_info.num_classes,
            strides={level: self.fpn.strides[level] for level in features},
            input_channels=config.fpn.channels,
            channels=config.semantic.channels,
            convolutions=config.semantic.convolutions,
            deformable=config.semantic.deformable,
            norm=config.semantic.norm,
            make_initializer=make_initializer,
            name="semantic_head",
        )

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """See `targets.make_targets`."""
        return make_targets(
            panoptic,
            self.config.box,
            self.dataset_info,
            max_instances=self.config.loss.max_instances,
            size_multiple=self.size_multiple,
        )

    def call(
        self, images: Tensor, targets: Any = None, training: bool = False, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.call`."""
        del targets
        images, outputs = resize_for_network(images, None if training else self.config.resize, scale=scale)
        features = self.backbone(self.prepare_images(images), training=training)
        context = self.context(features["res5"], training=training) if self.context is not None else None
        pyramid = self.fpn(features, context=context, training=training)
        levels = {level: pyramid[level] for level in self.config.box.levels}
        distances, border_ness = self.box_head(levels, training=training)
        return {
            "semantic_logits": self.semantic_head(pyramid, training=training),
            **{f"distances_{level}": values for level, values in distances.items()},
            **{f"border_ness_{level}": values for level, values in border_ness.items()},
            **outputs,
        }

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """See `losses.compute_losses`."""
        return compute_losses(targets, outputs, self.classes, levels=self.config.box.levels, stride=self.config.stride)

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """See `postprocess.postprocess`."""
        geometry = Geometry.of(outputs, image_size)
        return postprocess(outputs, geometry, self.config, self.dataset_info, self.classes)

    def instances(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """See `postprocess.predict_instances`."""
        return predict_instances(outputs, Geometry.of(outputs, image_size), self.config, self.dataset_info)

    def merge_views(self, views: Sequence[View], image_size: Size) -> dict[str, Tensor]:
        """See `views.merge_views`."""
        return merge_views(views, image_size, self.config, self.dataset_info)

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`.

        The map is the label again unless boxes of objects of one class overlap: then a pixel inside both may go to the
        wrong one, and a box may be dropped.
        """
        height, width = targets["semantic"].shape[1:3]
        return self.postprocess_with_truth({}, targets, (height, width), self.oracle_parts)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: Size,
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `oracle.postprocess_with_truth`."""
        geometry = Geometry.of(outputs, image_size)
        return postprocess_with_truth(outputs, targets, geometry, parts, self.config, self.dataset_info, self.classes)
