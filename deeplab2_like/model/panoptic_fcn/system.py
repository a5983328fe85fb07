"""The Panoptic FCN system: network, losses and post-processing behind the contract of `PanopticSystem`."""

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
from deeplab2_like.model.panoptic_fcn.config import PanopticFCNConfig
from deeplab2_like.model.panoptic_fcn.losses import compute_losses
from deeplab2_like.model.panoptic_fcn.network import FeatureEncoder, KernelHead, PositionHead
from deeplab2_like.model.panoptic_fcn.oracle import paint_true_masks, postprocess_with_truth, semantic_map_with_truth
from deeplab2_like.model.panoptic_fcn.postprocess import (
    find_stuff,
    postprocess,
    predict_instances,
    stuff_probability,
)
from deeplab2_like.model.panoptic_fcn.targets import make_targets
from deeplab2_like.model.panoptic_fcn.views import merge_views
from deeplab2_like.model.semantic import SemanticClasses


@keras.saving.register_keras_serializable("deeplab2_like")
class PanopticFCN(PanopticSystem):
    """Panoptic FCN.

    Raw outputs, all float32: for each level of the heads `center_<level>` [B, h, w, T], logits of the centers of T
    thing classes, `region_<level>` [B, h, w, S], logits of the regions of stuff and "other", and `kernel_<level>`
    [B, h, w, K]; `feature` [B, h, w, E] at the stride of the finest level of the pyramid; and `network_size` int32 [2]
    if the images were resized.

    Args:
        config: The `model` section of a config.
        dataset_info: The meaning of the values of the panoptic map.

    Raises:
        UserError: If the backbone has another output stride than 32, the data set has no things or no stuff, or its
            label divisor has no room for `postprocess.kernels` or `loss.max_instances` instances.

    Example:
        >>> config = dl.load_config("panoptic_fcn/scenes_tiny")
        >>> system = PanopticFCN(config.model, dataset_info)
        >>> panoptic = system.infer(images)["panoptic"]  # uint8 [B, H, W, 3] to int32 [B, H, W]
    """

    config_class = PanopticFCNConfig
    oracle_parts = ("positions", "classes", "masks")

    def __init__(self, config: PanopticFCNConfig, dataset_info: DatasetInfo, *, name: str | None = None) -> None:
        super().__init__(config, dataset_info, name=name)
        _check_things(dataset_info)
        self.check_instance_limit("model.postprocess.kernels", config.postprocess.kernels)
        self.check_instance_limit("model.loss.max_instances", config.loss.max_instances)
        _check_stuff(dataset_info)
        self.classes = SemanticClasses.of(dataset_info, things="other", paint_things=False)
        self.stride = config.stride
        self.loss_weights = {
            "center": config.loss.position_weight,
            "region": config.loss.position_weight,
            "thing_mask": config.loss.segmentation_weight,
            "stuff_mask": config.loss.segmentation_weight,
        }

        self.backbone = build_backbone(config.backbone, norm=config.norm)
        features = backbone_features(config.fpn.finest_level)
        coarsest = int(list(config.size_ranges)[-1].removeprefix("p"))
        self.fpn = FeaturePyramid(
            strides=self.backbone.strides,
            features=tuple(features.values()),
            channels=config.fpn.channels,
            coarser_levels=max(coarsest - 5, 0),
            coarser="convolve",
            norm=config.fpn.norm,
            name="fpn",
        )
        self.position_head = PositionHead(
            config.head,
            num_things=len(dataset_info.thing_classes),
            num_regions=len(self.classes.class_id),
            name="position_head",
        )
        self.kernel_head = KernelHead(config.head, feature_channels=config.encoder.channels, name="kernel_head")
        self.encoder = FeatureEncoder(
            config.encoder, strides={level: self.fpn.strides[level] for level in features}, name="encoder"
        )

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """See `targets.make_targets`."""
        return make_targets(panoptic, self.config, self.dataset_info, size_multiple=self.size_multiple)

    def call(
        self, images: Tensor, targets: Any = None, training: bool = False, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.call`."""
        del targets
        images, outputs = resize_for_network(images, None if training else self.config.resize, scale=scale)
        pyramid = self.fpn(self.backbone(self.prepare_images(images), training=training), training=training)
        levels = {level: pyramid[level] for level in self.config.size_ranges}
        centers, regions = self.position_head(levels, training=training)
        kernels = self.kernel_head(levels, training=training)
        return {
            **{f"center_{level}": values for level, values in centers.items()},
            **{f"region_{level}": values for level, values in regions.items()},
            **{f"kernel_{level}": values for level, values in kernels.items()},
            "feature": self.encoder(pyramid, training=training),
            **outputs,
        }

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """See `losses.compute_losses`."""
        return compute_losses(
            targets, outputs, self.config, self.classes, self.kernel_head, size_multiple=self.size_multiple
        )

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """See `postprocess.postprocess`."""
        geometry = Geometry.of(outputs, image_size)
        return postprocess(outputs, geometry, self.config, self.dataset_info, self.classes, self.kernel_head)

    def instances(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """See `postprocess.predict_instances`."""
        geometry = Geometry.of(outputs, image_size)
        return predict_instances(outputs, geometry, self.config, self.dataset_info, self.kernel_head)

    @property
    def semantic_classes(self) -> tuple[int, ...]:
        """See `PanopticSystem.semantic_classes`: those of stuff, as things have kernels of their own."""
        return self.classes.predicted

    def semantic_map(self, outputs: Mapping[str, Tensor], image_size: Size) -> Tensor:
        """See `PanopticSystem.semantic_map`: the best mask of stuff or "other", without those of things."""
        stuff = find_stuff(outputs, self.config, self.kernel_head)
        probability = stuff_probability(outputs["feature"], stuff)
        semantic = Geometry.of(outputs, image_size).argmax(probability, stride=self.config.stride)
        return self.classes.to_class_ids(semantic, self.dataset_info.ignore_label)

    def merge_views(self, views: Sequence[View], image_size: Size) -> dict[str, Tensor]:
        """See `views.merge_views`."""
        return merge_views(views, image_size, self.config.postprocess)

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`."""
        return paint_true_masks(targets, targets["classes"], None, self.config, self.dataset_info, self.classes)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: Size,
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth` and `oracle.postprocess_with_truth`.

        Raises:
            UserError: If there are parts, but not `positions`.
        """
        if not parts:
            return self.postprocess(outputs, image_size)
        if "positions" not in parts:
            raise UserError(
                f"Oracle part '{parts[0]}' of panoptic_fcn belongs to true positions; "
                f"ask for --oracle positions {' '.join(parts)}."
            )
        geometry = Geometry.of(outputs, image_size)
        return postprocess_with_truth(
            outputs, targets, geometry, parts, self.config, self.dataset_info, self.classes, self.kernel_head
        )

    def semantic_map_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: Size,
        parts: Sequence[str],
    ) -> Tensor:
        """See `PanopticSystem.semantic_map_with_truth`: the map of the true regions."""
        if not parts:
            return self.semantic_map(outputs, image_size)
        geometry = Geometry.of(outputs, image_size)
        semantic = semantic_map_with_truth(
            outputs, targets, geometry, parts, self.config, self.classes, self.kernel_head
        )
        return self.classes.to_class_ids(semantic, self.dataset_info.ignore_label)


def _check_things(info: DatasetInfo) -> None:
    """Raises `UserError` if the data set has no things."""
    if not info.thing_classes:
        raise UserError(
            f"Data set '{info.name}' has no things, so there are no centers for Panoptic FCN to find; train Semantic "
            "FPN, with a config such as panoptic_fpn/semantic_fpn_coco_resnet50."
        )


def _check_stuff(info: DatasetInfo) -> None:
    """Raises `UserError` if the data set has no stuff."""
    if not info.stuff_classes:
        raise UserError(
            f"Data set '{info.name}' has no stuff, so Panoptic FCN has no class for the background; make the "
            "background a class, for example with `convert coco-instances --background NAME`."
        )
