"""LPSNet (Hong et al., CVPR 2021): one-stage, without proposals, anchors or a mask head.

A feature pyramid with context of the whole image feeds two heads. One tells the class of every pixel. The other tells
points on objects how far the sides of their object's box are, and how near to the middle of the object they are, its
border-ness; the class of such a box is that of the pixel it comes from. A head without parameters pastes the boxes,
best first, onto the pixels of their class.

Read in this order: the config below, `targets.py`, `network.py`, `losses.py`, `detection.py`, `panoptic_head.py`; then,
in `deeplab2_like/model`, what other systems share: `fpn.py`, `semantic_subnet.py`, `deformable.py`, `merge.py`.

There is no public code. Where the paper is silent, this follows FCOS and UPSNet, and chooses:

- The root in equation 1 is that of the whole product, as in FCOS.
- The borders that border-ness is measured to in training are the outermost pixels of the mask in the row and in the
  column of the point. At inference only boxes are known: the border-ness of a pixel to a box is that to its sides.
- The border-ness that was predicted for a pixel, which conflicts between boxes are decided by, is read on the level
  that the pixel would belong to if it were of the box, enlarged bilinearly.
- A point is inside the mask if the pixel that begins there is.
- Distances are the exponential of the output times a factor of the level, in strides; -log IoU is weighted with the
  true border-ness, as in FCOS with its centre-ness.
- A box has one class, the most probable thing class at its point (the mean of the four cells around it); its score is
  that probability times its border-ness.
- Regions without a label, like crowds, have no points that stand for them, and teach the box head nothing.
- Pyramid pooling has no normalisation in its grids, as one bin has too few values, and group normalisation after them.
- Pixels of things that no box has are void.
- Images are padded to a multiple of 32 with the mean colour. They are seen at their own size unless
  `postprocess.resize` is set; then they are made smaller without antialiasing.
"""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import pydantic
from keras import ops

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.base import Loss, PanopticSystem
from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.config import (
    BackboneConfig,
    FpnConfig,
    Norm,
    ResizeConfig,
    are_consecutive_levels,
    backbone_features,
)
from deeplab2_like.model.fpn import FeaturePyramid
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.lpsnet.detection import Detections, find_boxes, masks_of_boxes
from deeplab2_like.model.lpsnet.losses import border_ness_loss, box_loss
from deeplab2_like.model.lpsnet.network import BoxHead, make_context
from deeplab2_like.model.lpsnet.panoptic_head import Conflicts, PanopticHead
from deeplab2_like.model.lpsnet.targets import border_ness, distances_to_boxes, make_targets, mask_borders
from deeplab2_like.model.merge import best_class, enlarge, upsampling_matrices
from deeplab2_like.model.seen_size import boxes_in_map, seen_images
from deeplab2_like.model.segments import region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses, SemanticSubnet, semantic_loss
from deeplab2_like.model.stages import stage

_SIZE_MULTIPLE = 32

_enlarge_in_stage = stage(enlarge)


class ContextConfig(StrictModel):
    """What the coarsest level of the pyramid knows of the whole image (section 3.1)."""

    kind: Literal["pyramid_pooling", "global_average", "none"] = pydantic.Field(
        "pyramid_pooling", description="Pyramid pooling, UPSNet's global average, or nothing (Table 5)."
    )
    bins: tuple[pydantic.PositiveInt, ...] = pydantic.Field(
        (1, 2, 3, 6), min_length=1, description="Of the pyramid's grids."
    )
    channels: int = pydantic.Field(512, ge=1, description="Of each grid.")
    norm: Norm = Norm(kind="group", epsilon=1e-5)


class BoxConfig(StrictModel):
    """The box head, its levels and its targets (section 3.2)."""

    levels: tuple[str, ...] = ("p3", "p4", "p5", "p6", "p7")
    size_limits: tuple[Annotated[float, pydantic.Field(gt=0, allow_inf_nan=False)], ...] = pydantic.Field(
        (64, 128, 256, 512),
        description="Between one level and the next: largest distance from a point to a side of its box, in pixels.",
    )
    channels: int = pydantic.Field(256, ge=1)
    convolutions: int = pydantic.Field(4, ge=1)
    norm: Norm = Norm(kind="group", epsilon=1e-5)
    positives: Literal["mask", "box"] = pydantic.Field(
        "mask", description="What a point must be inside of to stand for an object: its mask or, as in FCOS, its box."
    )
    measured_to: Literal["mask", "box"] = pydantic.Field(
        "mask", description="The borders of the mask (border-ness) or the sides of the box (FCOS's centre-ness)."
    )

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "BoxConfig":
        if not are_consecutive_levels(self.levels):
            raise ValueError("levels must be one after the other, fine to coarse, such as p3, p4, p5")
        if len(self.size_limits) != len(self.levels) - 1:
            raise ValueError(f"size_limits must be {len(self.levels) - 1} numbers, one between each two of levels")
        if list(self.size_limits) != sorted(set(self.size_limits)):
            raise ValueError("size_limits must grow from one to the next")
        return self


class SemanticConfig(StrictModel):
    """The semantic head (section 3.3)."""

    channels: int = pydantic.Field(128, ge=1)
    convolutions: int = pydantic.Field(2, ge=1)
    deformable: bool = True
    norm: Norm | None = pydantic.Field(None, description="Normalisation after each convolution; null, as in UPSNet.")


class LossConfig(StrictModel):
    """Weights of the losses (sections 3.5 and 4)."""

    box_weight: float = pydantic.Field(1.0, ge=0)
    border_ness_weight: float = pydantic.Field(1.0, ge=0)
    semantic_weight: float = pydantic.Field(1.0, ge=0)
    max_instances: int = pydantic.Field(100, ge=1, description="Most instances of a training example; the largest.")


class PostprocessConfig(StrictModel):
    """From the heads to the panoptic map (sections 3.4 and 3.5)."""

    class_threshold: float = pydantic.Field(
        0.05, ge=0, le=1, description="Points at which no thing class is more probable have no box."
    )
    candidates: int = pydantic.Field(2000, ge=1, description="Most boxes that are compared with one another.")
    nms_iou: float = pydantic.Field(0.6, ge=0, le=1, description="Overlap above which the worse box of a class goes.")
    detections: int = pydantic.Field(100, ge=1, description="Most boxes per image.")
    score_threshold: float = pydantic.Field(0.3, ge=0, le=1, description="Weaker boxes are not in the map.")
    conflicts: Conflicts = pydantic.Field(
        "closest_border_ness", description="Who gets a pixel that several boxes of its class claim (Table 5)."
    )
    overlap_threshold: float = pydantic.Field(
        0.3, ge=0, le=1, description="A box of whose mask a larger share is covered by better ones is dropped."
    )
    stuff_area_limit: int = pydantic.Field(4096, ge=0, description="Smaller stuff segments become void, in pixels.")
    resize: ResizeConfig | None = pydantic.Field(
        None, description="Size at which images are seen outside of training; null, their own."
    )


class LPSNetConfig(StrictModel):
    """The `model` section of a config."""

    backbone: BackboneConfig = BackboneConfig(output_stride=32, stem="seven_by_seven")
    norm: Norm = Norm()
    image_mean: tuple[float, float, float] = (123.675, 116.28, 103.53)
    image_std: tuple[pydantic.PositiveFloat, pydantic.PositiveFloat, pydantic.PositiveFloat] = (58.395, 57.12, 57.375)
    fpn: FpnConfig = FpnConfig()
    context: ContextConfig = ContextConfig()
    box: BoxConfig = BoxConfig()
    semantic: SemanticConfig = SemanticConfig()
    loss: LossConfig = LossConfig()
    postprocess: PostprocessConfig = PostprocessConfig()

    @pydantic.model_validator(mode="after")
    def _consistent(self) -> "LPSNetConfig":
        if self.box.levels[0] < self.fpn.finest_level:
            raise ValueError(f"box.levels begins with {self.box.levels[0]}, finer than fpn.finest_level")
        return self


class LPSNet(PanopticSystem):
    """LPSNet behind the contract of `PanopticSystem`.

    Raw outputs, all float32: `semantic_logits` [B, h, w, C] at the stride of the pyramid's finest level; for each level
    of the box head `distances_<level>` [B, h, w, 4], to the left, top, right and bottom side in pixels of the image
    that the network saw, and `border_ness_<level>` [B, h, w], logits; and `seen_size` int32 [2] if `postprocess.resize`
    is set and this is no training.

    Args:
        dataset_info: What the values of the panoptic map mean.
        backbone: Which backbone; its output stride must be 32.
        norm: The normalisation of the backbone.
        image_mean: Mean of red, green and blue, in 0..255.
        image_std: Standard deviation of red, green and blue.
        fpn: Channels of the pyramid.
        context: What its coarsest level knows of the whole image.
        box: Box head.
        semantic: Semantic head.
        loss: Weights.
        postprocess: Thresholds.

    Raises:
        UserError: If the backbone has another output stride, the data set has no things, or `postprocess.detections` or
            `loss.max_instances` things cannot be told apart with its label divisor.
    """

    config_class = LPSNetConfig
    oracle_parts = ("semantic", "boxes")

    def __init__(
        self,
        *,
        dataset_info: DatasetInfo,
        backbone: BackboneConfig,
        norm: Norm,
        image_mean: tuple[float, float, float],
        image_std: tuple[float, float, float],
        fpn: FpnConfig,
        context: ContextConfig,
        box: BoxConfig,
        semantic: SemanticConfig,
        loss: LossConfig,
        postprocess: PostprocessConfig,
    ) -> None:
        super().__init__(
            dataset_info=dataset_info,
            image_mean=image_mean,
            image_std=image_std,
            size_multiple=_SIZE_MULTIPLE,
            name="lpsnet",
        )
        self._check(
            dataset_info,
            {"postprocess.detections": postprocess.detections, "loss.max_instances": loss.max_instances},
        )
        self.box_config = box
        self.loss_config = loss
        self.postprocess_config = postprocess
        self.classes = SemanticClasses.of(dataset_info, things="all", paint_things=False)
        self.loss_weights = {
            "semantic": loss.semantic_weight,
            "box": loss.box_weight,
            "border_ness": loss.border_ness_weight,
        }

        self.backbone = build_backbone(backbone, norm=norm)
        features = backbone_features(fpn.finest_level)
        self.fpn = FeaturePyramid(
            strides=self.backbone.strides,
            features=tuple(features.values()),
            channels=fpn.channels,
            coarser_levels=max(int(box.levels[-1].removeprefix("p")) - 5, 0),
            coarser="convolve",
            norm=fpn.norm,
            name="fpn",
        )
        self.context = make_context(
            context.kind,
            bins=context.bins,
            channels=context.channels,
            output_channels=fpn.channels,
            norm=context.norm,
        )
        self.stride = self.fpn.strides[fpn.finest_level]
        self.level_strides = {level: self.fpn.strides[level] for level in box.levels}
        self.box_head = BoxHead(
            strides=self.level_strides,
            channels=box.channels,
            convolutions=box.convolutions,
            norm=box.norm,
            name="box_head",
        )
        self.semantic_head = SemanticSubnet(
            dataset_info.num_classes,
            strides={level: self.fpn.strides[level] for level in features},
            input_channels=fpn.channels,
            channels=semantic.channels,
            convolutions=semantic.convolutions,
            deformable=semantic.deformable,
            norm=semantic.norm,
            name="semantic_head",
        )

    @staticmethod
    def _check(info: DatasetInfo, numbers_of_things: Mapping[str, int]) -> None:
        if not info.thing_classes:
            raise UserError(
                f"Data set '{info.name}' has no things, so there are no boxes for LPSNet to find; train Semantic FPN, "
                "with a config such as panoptic_fpn/semantic_fpn_coco_resnet50."
            )
        for key, number in numbers_of_things.items():
            PanopticSystem.check_room_for_instances(info, f"model.{key}", number)

    # --- targets -----------------------------------------------------------------------------------------------------

    def make_targets(self, panoptic: Tensor) -> dict[str, Tensor]:
        """See `deeplab2_like.model.lpsnet.targets.make_targets`."""
        return make_targets(
            panoptic,
            dataset_info=self.dataset_info,
            level_strides=self.level_strides,
            size_limits=self.box_config.size_limits,
            size_multiple=self.size_multiple,
            max_instances=self.loss_config.max_instances,
            positives=self.box_config.positives,
            measured_to=self.box_config.measured_to,
        )

    # --- network -----------------------------------------------------------------------------------------------------

    def call(self, images: Tensor, targets: Any = None, training: bool = False) -> dict[str, Tensor]:
        """Runs the network.

        Args:
            images: uint8 or float [B, H, W, 3], 0..255, any size.
            targets: Not used.
            training: Whether statistics of normalisations are those of the batch.

        Returns:
            The raw outputs, see the class.
        """
        del targets
        images, sizes = seen_images(images, None if training else self.postprocess_config.resize)
        features = self.backbone(self.prepare_images(images), training=training)
        context = self.context(features["res5"], training=training) if self.context is not None else None
        pyramid = self.fpn(features, context=context, training=training)
        distances, logits = self.box_head({level: pyramid[level] for level in self.level_strides}, training=training)
        return {
            "semantic_logits": self.semantic_head(pyramid, training=training),
            **{f"distances_{level}": values for level, values in distances.items()},
            **{f"border_ness_{level}": values for level, values in logits.items()},
            **sizes,
        }

    # --- losses ------------------------------------------------------------------------------------------------------

    def compute_losses(self, targets: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> dict[str, Loss]:
        """Compares raw outputs with targets (section 3.5).

        Args:
            targets: What `make_targets` returned, batched.
            outputs: What calling the system returned.

        Returns:
            `semantic`, per labelled pixel; `box`, weighted with border-ness; `border_ness`, per point that stands for
            an object.
        """
        positive, true_distances, true_border_ness = (
            self._of_all_points(targets, name) for name in ("positive", "distances", "border_ness")
        )
        weight = ops.cast(positive, "float32")
        return {
            "semantic": semantic_loss(
                targets["semantic"], outputs["semantic_logits"], classes=self.classes, stride=self.stride
            ),
            "box": box_loss(self._of_all_points(outputs, "distances"), true_distances, weight * true_border_ness),
            "border_ness": border_ness_loss(self._of_all_points(outputs, "border_ness"), true_border_ness, weight),
        }

    def _of_all_points(self, values: Mapping[str, Tensor], name: str) -> Tensor:
        """Joins what is there for each level, [B, h, w, ...], to [B, P, ...]."""
        parts = []
        for level in self.level_strides:
            part = values[f"{name}_{level}"]
            batch, height, width = ops.shape(part)[:3]
            parts.append(ops.reshape(part, (batch, height * width, *part.shape[3:])))  # [B, h * w, ...]
        return ops.concatenate(parts, axis=1)

    # --- post-processing ---------------------------------------------------------------------------------------------

    def postprocess(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess`: rows 0 to N - 1 are things by score, row N + c is class c."""
        return self._merge(outputs, None, image_size, ())

    def instances(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> dict[str, Tensor]:
        """See `PanopticSystem.instances`: the pixels in each box that have its class, also of boxes not in the map."""
        found = self._detections(outputs, image_size)
        classes = self.thing_class_ids(found.classes)
        semantic = best_class(
            outputs["semantic_logits"], image_size, stride=self.stride, seen_size=outputs.get("seen_size")
        )
        return {
            "masks": masks_of_boxes(semantic, found.boxes, classes),
            "boxes": found.boxes,
            "classes": classes,
            "scores": found.scores,
        }

    def postprocess_targets(self, targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_targets`.

        The map is the label again unless boxes of objects of one class overlap: then a pixel of both boxes may go to
        the wrong one, and a box may be dropped.
        """
        return self._merge({}, targets, tuple(targets["semantic"].shape[1:3]), self.oracle_parts)

    def postprocess_with_truth(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        image_size: tuple[Any, Any],
        parts: Sequence[str],
    ) -> dict[str, Tensor]:
        """See `PanopticSystem.postprocess_with_truth` (Table 6).

        `semantic`: the class of each pixel; those of the boxes stay as predicted. `boxes`: boxes, their classes, and
        the border-ness of each pixel, measured as in training.
        """
        return self._merge(outputs, targets, image_size, parts)

    def _merge(
        self,
        outputs: Mapping[str, Tensor],
        targets: Mapping[str, Tensor] | None,
        image_size: tuple[Any, Any],
        parts_of_truth: Sequence[str],
    ) -> dict[str, Tensor]:
        """Finds boxes and the class of each pixel, in the outputs or in the targets, and makes one map of them."""
        config, num_classes = self.postprocess_config, self.dataset_info.num_classes
        size_limits: Sequence[Any] = self.box_config.size_limits
        if "semantic" in parts_of_truth:
            assert targets is not None
            semantic = self.classes.of_class_map(targets["semantic"])
        else:
            semantic = best_class(
                outputs["semantic_logits"], image_size, stride=self.stride, seen_size=outputs.get("seen_size")
            )
        if "boxes" in parts_of_truth:
            assert targets is not None
            found = Detections(targets["boxes"], ops.cast(targets["valid"], "float32"), targets["classes"])
            of_pixels, size_limits = self._true_border_ness(targets)[:, None], ()
        else:
            found = self._detections(outputs, image_size)
            used = found.scores >= config.score_threshold
            found = found._replace(scores=ops.where(used, found.scores, 0.0))
            of_pixels = None
            if config.conflicts == "closest_border_ness":
                of_pixels, size_limits = self._border_ness_of_pixels(outputs, image_size)
        head = PanopticHead(
            self.dataset_info,
            conflicts=config.conflicts,
            overlap_threshold=config.overlap_threshold,
            stuff_area_limit=config.stuff_area_limit,
            size_limits=size_limits,
        )
        merged = head.paste(semantic, found.boxes, found.scores, self.thing_class_ids(found.classes), of_pixels)
        if "semantic" in parts_of_truth:
            of_regions = ops.ones((ops.shape(found.scores)[0], num_classes), "float32")
        else:
            of_regions = region_scores(
                ops.softmax(outputs["semantic_logits"], axis=-1),
                merged,
                self.classes.of_class,
                stride=self.stride,
                seen_size=outputs.get("seen_size"),
            )
        return segment_outputs(merged, found.scores, of_regions)

    def _detections(self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]) -> Detections:
        """The best boxes, in pixels of the map."""
        config = self.postprocess_config
        probability = ops.softmax(outputs["semantic_logits"], axis=-1)
        seen_size = outputs.get("seen_size")
        found = find_boxes(
            {level: outputs[f"distances_{level}"] for level in self.level_strides},
            {level: outputs[f"border_ness_{level}"] for level in self.level_strides},
            ops.take(probability, ops.array(self.dataset_info.thing_classes, "int32"), axis=-1),
            image_size if seen_size is None else (seen_size[0], seen_size[1]),
            strides=self.level_strides,
            semantic_stride=self.stride,
            class_threshold=config.class_threshold,
            candidates=config.candidates,
            nms_iou=config.nms_iou,
            number=config.detections,
        )
        return found._replace(boxes=boxes_in_map(found.boxes, seen_size, image_size))

    def _border_ness_of_pixels(
        self, outputs: Mapping[str, Tensor], image_size: tuple[Any, Any]
    ) -> tuple[Tensor, list[Any]]:
        """What each level says of each pixel of the map, and the limits between levels there; see `PanopticHead`."""
        seen_size = outputs.get("seen_size")
        levels = []
        for level, stride in self.level_strides.items():
            logits = outputs[f"border_ness_{level}"]
            matrices = upsampling_matrices(tuple(ops.shape(logits)[1:3]), seen_size, image_size, stride=stride)
            levels.append(_enlarge_in_stage(ops.sigmoid(logits), *matrices))
        scale: Any = 1.0
        if seen_size is not None:
            scale = ops.cast(image_size[0], "float32") / ops.cast(seen_size[0], "float32")
        return ops.stack(levels, axis=1), [limit * scale for limit in self.box_config.size_limits]

    def _true_border_ness(self, targets: Mapping[str, Tensor]) -> Tensor:
        """Border-ness of each pixel of an object, measured as in training, float32 [B, H, W]; 0 where there is none."""
        instance_map = targets["instance_map"]
        batch, height, width = ops.shape(instance_map)
        y = (ops.cast(ops.arange(height), "float32") + 0.5)[:, None]
        x = (ops.cast(ops.arange(width), "float32") + 0.5)[None, :]
        row = ops.maximum(instance_map - 1, 0)
        if self.box_config.measured_to == "mask":
            distances = mask_borders(instance_map, targets["valid"].shape[1]).distances(row, y, x)
        else:
            boxes = take_rows(targets["boxes"], ops.reshape(row, (batch, height * width)))
            distances = distances_to_boxes(ops.reshape(boxes, (batch, height, width, 4)), y, x)
        return ops.where(instance_map > 0, border_ness(distances), 0.0)
