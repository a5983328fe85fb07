"""The Panoptic-DeepLab system: network, losses and post-processing behind the contract of `PanopticSystem`."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.base import Loss, PanopticSystem, View
from deeplab2_like.model.geometry import Geometry, Size, resize_for_network
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_deeplab.config import AsppConfig, PanopticDeepLabConfig
from deeplab2_like.model.panoptic_deeplab.losses import compute_losses
from deeplab2_like.model.panoptic_deeplab.network import AtrousSpatialPyramidPooling, Decoder, Head
from deeplab2_like.model.panoptic_deeplab.oracle import perfect_outputs, replace_outputs
from deeplab2_like.model.panoptic_deeplab.postprocess import postprocess
from deeplab2_like.model.panoptic_deeplab.targets import make_targets
from deeplab2_like.model.panoptic_deeplab.views import average_views, resize_outputs
from deeplab2_like.model.resampling import scaled_side


@keras.saving.register_keras_serializable("deeplab2_like")
class PanopticDeepLab(PanopticSystem):
    """Panoptic-DeepLab.

    Raw outputs, all float32 at the stride of the last low-level feature (4, or 2 with `stem`): `semantic_logits`
    [B, h, w, C], or with the void class, the last one, [B, h, w, C + 1]; unless `semantic_only`, `center` [B, h, w, 1]
    and `offset` [B, h, w, 2] (y, x) in network pixels; and `network_size` int32 [2] if the images were resized.

    Args:
        config: The `model` section of a config.
        dataset_info: The meaning of the values of the panoptic map.

    Raises:
        UserError: If the label divisor of the data set has no room for `postprocess.top_k` instances.

    Example:
        >>> config = dl.load_config("panoptic_deeplab/scenes_tiny")
        >>> system = PanopticDeepLab(config.model, dataset_info)
        >>> panoptic = system.infer(images)["panoptic"]  # uint8 [B, H, W, 3] to int32 [B, H, W]
    """

    config_class = PanopticDeepLabConfig
    oracle_parts = ("semantic", "centers", "offsets")

    def __init__(self, config: PanopticDeepLabConfig, dataset_info: DatasetInfo, *, name: str | None = None) -> None:
        super().__init__(config, dataset_info, name=name)
        self.check_instance_limit("model.postprocess.top_k", config.postprocess.top_k)
        self.loss_weights = {"semantic": config.loss.semantic_weight}
        if not config.semantic_only:
            self.loss_weights |= {"center": config.loss.center_weight, "offset": config.loss.offset_weight}
        self.center_is_logit = config.loss.center == "sigmoid_cross_entropy"
        self.aligned_corners = config.resizing == "aligned_corners"

        self.backbone = build_backbone(config.backbone, norm=config.norm)
        self.stride = self.backbone.strides[list(config.decoder.low_level_channels)[-1]]
        decoder = config.decoder
        self.semantic_aspp = self._make_aspp(config.aspp, "semantic_aspp")
        self.semantic_decoder = self._make_decoder(
            decoder.low_level_channels, decoder.semantic_channels, "semantic_decoder"
        )
        self.semantic_head = Head(
            dataset_info.num_classes + config.void_class,
            channels=config.decoder.semantic_head_channels,
            convolution=config.decoder.convolution,
            norm=config.norm,
            name="semantic_head",
        )
        if config.semantic_only:
            return
        self.instance_aspp = (
            self._make_aspp(config.instance_aspp or config.aspp, "instance_aspp") if config.dual_aspp else None
        )
        self.instance_decoder = (
            self._make_decoder(decoder.instance_low_level_channels, decoder.instance_channels, "instance_decoder")
            if config.dual_decoder
            else None
        )
        self.center_head = self._make_instance_head(1, config.decoder.center_head_convolution, "center_head")
        self.offset_head = self._make_instance_head(2, config.decoder.convolution, "offset_head")

    def _make_aspp(self, aspp: AsppConfig, name: str) -> AtrousSpatialPyramidPooling:
        return AtrousSpatialPyramidPooling(
            aspp,
            convolution=self.config.decoder.convolution,
            norm=self.config.norm,
            aligned_corners=self.aligned_corners,
            name=name,
        )

    def _make_decoder(self, low_level_channels: Mapping[str, int], channels: int, name: str) -> Decoder:
        return Decoder(
            low_level_channels,
            convolution=self.config.decoder.convolution,
            channels=channels,
            strides=self.backbone.strides,
            norm=self.config.norm,
            aligned_corners=self.aligned_corners,
            name=name,
        )

    def _make_instance_head(self, num_outputs: int, convolution: Any, name: str) -> Head:
        config = self.config
        return Head(
            num_outputs,
            channels=config.decoder.instance_head_channels,
            convolution=convolution,
            norm=config.norm,
            first_channels=config.decoder.instance_channels,
            name=name,
        )

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """See `targets.make_targets`."""
        config = self.config
        return make_targets(panoptic, config.loss, self.dataset_info, semantic_only=config.semantic_only)

    def call(
        self, images: Tensor, targets: Any = None, training: bool = False, scale: float = 1.0
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.call`."""
        numbers = None if targets is None else targets.get("number")
        images, outputs = resize_for_network(
            images, None if training else self.config.resize, scale=scale, aligned_corners=self.aligned_corners
        )
        min_height, min_width = (
            scaled_side(side, scale, aligned_corners=self.aligned_corners) for side in self.config.min_padded_size
        )
        images = self.prepare_images(images, min_size=(min_height, min_width))
        features = self.backbone(images, training=training)
        context = self.semantic_aspp(features["res5"], numbers=numbers, training=training, scale=scale)
        decoded = self.semantic_decoder(context, features, training=training)
        outputs["semantic_logits"] = self.semantic_head(decoded, training=training)
        if self.config.semantic_only:
            return outputs
        if self.instance_aspp is not None:
            context = self.instance_aspp(features["res5"], numbers=numbers, training=training, scale=scale)
        if self.instance_decoder is not None:
            decoded = self.instance_decoder(context, features, training=training)
        outputs["center"] = self.center_head(decoded, training=training)
        # The head predicts in units of its own pixels, so that its values stay small.
        outputs["offset"] = self.stride * self.offset_head(decoded, training=training)
        return outputs

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """See `losses.compute_losses`."""
        return compute_losses(
            targets, outputs, self.config.loss, stride=self.stride, aligned_corners=self.aligned_corners
        )

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: Size) -> dict[str, Tensor]:
        """See `postprocess.postprocess`."""
        geometry = self.geometry(outputs, image_size)
        return self._postprocess(outputs, geometry, geometry.map_stride(self.stride))

    def semantic_map(self, outputs: Mapping[str, Tensor], image_size: Size) -> Tensor:
        """See `PanopticSystem.semantic_map`; where the void class is best, it has the ignore label."""
        classes = super().semantic_map(outputs, image_size)
        info = self.dataset_info
        return ops.where(classes < info.num_classes, classes, info.ignore_label) if self.config.void_class else classes

    def merge_views(self, views: Sequence[View], image_size: Size) -> dict[str, Tensor]:
        """See `views.average_views`."""
        return average_views(views, image_size, center_is_logit=self.center_is_logit)

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`."""
        height, width = targets["semantic"].shape[1:3]
        return self._postprocess(self._perfect_outputs(targets), Geometry((height, width)), 1)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: Size,
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth`; outputs are upsampled to the size of the targets first."""
        full = resize_outputs(outputs, self.geometry(outputs, image_size), stride=self.stride)
        mixed = replace_outputs(full, self._perfect_outputs(targets), parts)
        return self._postprocess(mixed, Geometry(image_size), 1)

    def _perfect_outputs(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return perfect_outputs(targets, num_classes=self.dataset_info.num_classes, center_is_logit=self.center_is_logit)

    def _postprocess(self, outputs: Mapping[str, Tensor], geometry: Geometry, stride: int) -> dict[str, Tensor]:
        return postprocess(
            outputs,
            geometry,
            self.config.postprocess,
            self.dataset_info,
            stride=stride,
            center_is_logit=self.center_is_logit,
        )
