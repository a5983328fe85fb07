"""Post-processing of LPSNet: from points to boxes, and from boxes to the panoptic map (sections 3.4 and 3.5).

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.stages`.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.boxes import box_area, clip_boxes, non_maximum_suppression, take_rows
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.geometry import Geometry, Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.lpsnet.config import LPSNetConfig, PostprocessConfig
from deeplab2_like.model.lpsnet.panoptic_head import PanopticHead
from deeplab2_like.model.resampling import upsample
from deeplab2_like.model.segments import SegmentTable, region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses
from deeplab2_like.model.stages import stage

_upsample = stage(upsample)


class Detections(NamedTuple):
    """Boxes, the best first.

    Attributes:
        boxes: float32 [B, N, 4], in pixels of the network or of the image.
        scores: float32 [B, N], zero in unused rows.
        classes: int32 [B, N], positions among the thing classes.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def top(self, count: int) -> "Detections":
        """Returns the best boxes, the best first."""
        scores, index = ops.top_k(self.scores, min(count, self.scores.shape[1]))
        return Detections(take_rows(self.boxes, index), scores, take_rows(self.classes, index))


class BorderNess(NamedTuple):
    """Border-ness of the pixels of an image, on each of L levels.

    Attributes:
        values: float32 [B, L, H, W].
        size_limits: For each level but the last, the largest distance to a side of the box, in image pixels.
    """

    values: Tensor
    size_limits: Sequence[Any]


def postprocess(
    outputs: Mapping[str, Tensor],
    geometry: Geometry,
    config: LPSNetConfig,
    dataset_info: DatasetInfo,
    classes: SemanticClasses,
) -> dict[str, Tensor]:
    """Turns raw outputs into panoptic maps.

    Args:
        outputs: Raw outputs, see `LPSNet`.
        geometry: Sizes of the images.
        config: Levels and thresholds.
        dataset_info: The meaning of the panoptic map.
        classes: The classes of the semantic head.

    Returns:
        The dictionary of `PanopticSystem.postprocess`: rows 0 to N - 1 are things in the order of their scores, row
        N + c is the stuff of class c.
    """
    semantic = geometry.argmax(outputs["semantic_logits"], stride=config.stride)
    detections = select_detections(outputs, geometry, config, dataset_info)
    border_ness = predict_border_ness(outputs, geometry, config)
    table = paste_detections(semantic, detections, border_ness, config.postprocess, dataset_info)
    scores = score_regions(outputs, table, geometry, config, classes)
    return segment_outputs(table, detections.scores, scores)


def predict_instances(
    outputs: Mapping[str, Tensor], geometry: Geometry, config: LPSNetConfig, dataset_info: DatasetInfo
) -> dict[str, Tensor]:
    """Returns the dictionary of `PanopticSystem.instances`: all boxes, including those that the map leaves out.

    The mask of a box consists of the pixels inside it that have its class.

    Args:
        outputs: Raw outputs, see `LPSNet`.
        geometry: Sizes of the images.
        config: Levels and thresholds.
        dataset_info: The thing classes.
    """
    detections = find_detections(outputs, geometry, config, dataset_info)
    classes = thing_class_ids(detections.classes, dataset_info)
    semantic = geometry.argmax(outputs["semantic_logits"], stride=config.stride)
    return {
        "masks": masks_in_boxes(semantic, detections.boxes, classes),
        "boxes": detections.boxes,
        "classes": classes,
        "scores": detections.scores,
    }


def find_detections(
    outputs: Mapping[str, Tensor], geometry: Geometry, config: LPSNetConfig, dataset_info: DatasetInfo
) -> Detections:
    """Finds the best boxes, in image pixels; arguments as for `predict_instances`."""
    if "boxes" in outputs:  # Those of several views, see `views.merge_views`.
        return Detections(outputs["boxes"], outputs["scores"], outputs["thing_classes"])
    probability = ops.softmax(outputs["semantic_logits"], axis=-1)
    detections = find_boxes(
        {level: outputs[f"distances_{level}"] for level in config.box.levels},
        {level: outputs[f"border_ness_{level}"] for level in config.box.levels},
        ops.take(probability, ops.array(dataset_info.thing_classes, "int32"), axis=-1),
        geometry.network_size or geometry.image_size,
        config.postprocess,
        strides=config.box.level_strides,
        semantic_stride=config.stride,
    )
    return detections._replace(boxes=geometry.boxes_to_image(detections.boxes))


def select_detections(
    outputs: Mapping[str, Tensor], geometry: Geometry, config: LPSNetConfig, dataset_info: DatasetInfo
) -> Detections:
    """Finds the boxes of the panoptic map, those that reach `score_threshold`; arguments as for `predict_instances`."""
    detections = find_detections(outputs, geometry, config, dataset_info)
    is_used = detections.scores >= config.postprocess.score_threshold
    return detections._replace(scores=ops.where(is_used, detections.scores, 0.0))


def predict_border_ness(outputs: Mapping[str, Tensor], geometry: Geometry, config: LPSNetConfig) -> BorderNess | None:
    """Returns the predicted border-ness of all levels; None if the conflicts are decided without it.

    Args:
        outputs: Raw outputs, see `LPSNet`.
        geometry: Sizes of the images.
        config: Levels and thresholds.
    """
    if config.postprocess.conflicts != "closest_border_ness":
        return None
    if "border_ness" not in outputs:
        return upsample_border_ness(outputs, geometry, config)
    # That of several views, see `views.merge_views`.
    size_limits = [limit / outputs["border_ness_scale"] for limit in config.box.size_limits]
    return BorderNess(outputs["border_ness"], size_limits)


def upsample_border_ness(outputs: Mapping[str, Tensor], geometry: Geometry, config: LPSNetConfig) -> BorderNess:
    """Upsamples the predicted border-ness of all levels; arguments as for `predict_border_ness`."""
    levels = []
    for level, stride in config.box.level_strides.items():
        logits = outputs[f"border_ness_{level}"]
        height, width = ops.shape(logits)[1:3]
        matrices = geometry.upsampling_matrices((height, width), stride=stride)
        levels.append(_upsample(ops.sigmoid(logits), *matrices))
    size_limits: Sequence[Any] = config.box.size_limits
    if geometry.network_size is not None:
        size_limits = [limit / geometry.scale[0] for limit in size_limits]
    return BorderNess(ops.stack(levels, axis=1), size_limits)


def paste_detections(
    semantic: Tensor,
    detections: Detections,
    border_ness: BorderNess | None,
    config: PostprocessConfig,
    dataset_info: DatasetInfo,
) -> SegmentTable:
    """Pastes boxes onto the pixels of their class, see `PanopticHead`.

    Args:
        semantic: int32 [B, H, W], class id of each pixel.
        detections: Boxes in image pixels.
        border_ness: Border-ness of the pixels; None if the conflicts are decided without it.
        config: Rule of conflicts and thresholds.
        dataset_info: The meaning of the panoptic map.
    """
    head = PanopticHead(
        dataset_info,
        conflicts=config.conflicts,
        overlap_threshold=config.overlap_threshold,
        stuff_area_limit=config.stuff_area_limit,
        size_limits=() if border_ness is None else border_ness.size_limits,
    )
    return head.paste(
        semantic,
        detections.boxes,
        detections.scores,
        thing_class_ids(detections.classes, dataset_info),
        None if border_ness is None else border_ness.values,
    )


def score_regions(
    outputs: Mapping[str, Tensor],
    table: SegmentTable,
    geometry: Geometry,
    config: LPSNetConfig,
    classes: SemanticClasses,
) -> Tensor:
    """Returns the mean probability of each class over its region, float32 [B, C].

    Args:
        outputs: Raw outputs, see `LPSNet`.
        table: Result of `paste_detections`.
        geometry: Sizes of the images.
        config: Stride of the semantic logits.
        classes: The classes of the semantic head.
    """
    probability = ops.softmax(outputs["semantic_logits"], axis=-1)
    return region_scores(probability, table, classes.of_class, geometry, stride=config.stride)


def boxes_from_distances(distances: Tensor, stride: int) -> Tensor:
    """Makes boxes from the distances of the points of a level to their sides.

    Args:
        distances: float32 [B, h, w, 4], to the left, top, right and bottom side, in pixels.
        stride: Stride of the level.

    Returns:
        float32 [B, h, w, 4], (y_min, x_min, y_max, x_max) in pixels.
    """
    height, width = ops.shape(distances)[1:3]
    y = ((ops.cast(ops.arange(height), "float32") + 0.5) * stride)[:, None]
    x = ((ops.cast(ops.arange(width), "float32") + 0.5) * stride)[None, :]
    left, top, right, bottom = ops.unstack(distances, 4, axis=-1)
    return ops.stack([y - top, x - left, y + bottom, x + right], axis=-1)


def average_at_points(values: Tensor, factor: int, size: Size) -> Tensor:
    """Reads a fine map at the points of a level: the mean of the four cells around each point.

    Args:
        values: float32 [B, H, W, C].
        factor: Cells per point along an axis, 1 or even.
        size: Height and width of the level; the map is padded with zeros.

    Returns:
        float32 [B, h, w, C].
    """
    if factor == 1:
        return values
    rows, columns = ops.shape(values)[1:3]
    height, width = size
    values = ops.pad(values, [[0, 0], [0, height * factor - rows], [0, width * factor - columns], [0, 0]])
    first = factor // 2 - 1
    return sum(values[:, first + y :: factor, first + x :: factor] for y in (0, 1) for x in (0, 1)) / 4


@stage
def find_level_boxes(
    distances: Tensor,
    border_ness_logits: Tensor,
    probability: Tensor,
    *,
    stride: int,
    factor: int,
    class_threshold: float,
    count: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the best boxes of a level, at most one for each point.

    Args:
        distances: float32 [B, h, w, 4].
        border_ness_logits: float32 [B, h, w].
        probability: float32 [B, H, W, T] of the thing classes, at the resolution of the semantic head.
        stride: Stride of the level.
        factor: Cells of the probability per point along an axis.
        class_threshold: Probability that the best thing class at a point must exceed.
        count: Number of boxes, N.

    Returns:
        Boxes float32 [B, N, 4], scores (probability times border-ness) float32 [B, N], zero in unused rows, and classes
        int32 [B, N].
    """
    batch, height, width = ops.shape(border_ness_logits)
    at_points = average_at_points(probability, factor, (height, width))  # [B, h, w, T]
    best = ops.max(at_points, axis=-1)
    score = ops.where(best > class_threshold, best * ops.sigmoid(border_ness_logits), 0.0)
    # Padded, because a small level has fewer than N points.
    flat = ops.pad(ops.reshape(score, (batch, height * width)), [[0, 0], [0, count]])
    score, index = ops.top_k(flat, count)
    index = ops.minimum(index, height * width - 1)
    boxes = ops.reshape(boxes_from_distances(distances, stride), (batch, height * width, 4))
    classes = ops.reshape(ops.cast(ops.argmax(at_points, axis=-1), "int32"), (batch, height * width))
    return take_rows(boxes, index), score, take_rows(classes, index)


def find_boxes(
    distances: Mapping[str, Tensor],
    border_ness_logits: Mapping[str, Tensor],
    probability: Tensor,
    network_size: Size,
    config: PostprocessConfig,
    *,
    strides: Mapping[str, int],
    semantic_stride: int,
) -> Detections:
    """Finds boxes at the points of all levels, and removes duplicates.

    Args:
        distances: float32 [B, h, w, 4] by level, in pixels.
        border_ness_logits: float32 [B, h, w] by level.
        probability: float32 [B, H, W, T] of the thing classes.
        network_size: Height and width of the resized image, without padding; boxes are clipped to it.
        config: Thresholds and numbers of boxes.
        strides: Stride of each level.
        semantic_stride: Pixels per probability.
    """
    by_level = [
        find_level_boxes(
            distances[level],
            border_ness_logits[level],
            probability,
            stride=stride,
            factor=stride // semantic_stride,
            class_threshold=config.class_threshold,
            count=config.candidates,
        )
        for level, stride in strides.items()
    ]
    boxes, scores, classes = (ops.concatenate(values, axis=1) for values in zip(*by_level, strict=True))
    boxes = clip_boxes(boxes, network_size)
    scores = ops.where(box_area(boxes) > 0, scores, 0.0)
    return remove_duplicates(Detections(boxes, scores, classes), config)


def remove_duplicates(detections: Detections, config: PostprocessConfig) -> Detections:
    """Returns the best boxes after non-maximum suppression within each class."""
    ranked = detections.top(config.candidates)
    kept = non_maximum_suppression(
        ranked.boxes, ranked.scores > 0, iou_threshold=config.nms_iou, classes=ranked.classes
    )
    return ranked._replace(scores=ops.where(kept, ranked.scores, 0.0)).top(config.detections)


@stage
def masks_in_boxes(semantic: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    """Returns the pixels inside each box that have its class, computed one box after the other.

    Args:
        semantic: int32 [B, H, W], class ids.
        boxes: float32 [B, N, 4], in pixels of the map.
        classes: int32 [B, N], class ids.

    Returns:
        bool [B, N, H, W].
    """
    height, width = ops.shape(semantic)[1:]
    y = (ops.cast(ops.arange(height), "float32") + 0.5)[:, None]
    x = (ops.cast(ops.arange(width), "float32") + 0.5)[None, :]

    def mask(one: tuple[Tensor, Tensor]) -> Tensor:
        box, class_id = one
        y_min, x_min, y_max, x_max = ops.unstack(box[:, None, None], 4, axis=-1)  # each [B, 1, 1]
        is_inside = (y > y_min) & (y < y_max) & (x > x_min) & (x < x_max)
        return is_inside & (semantic == class_id[:, None, None])

    masks = ops.map(mask, (ops.transpose(boxes, (1, 0, 2)), ops.transpose(classes)))  # [N, B, H, W]
    return ops.transpose(masks, (1, 0, 2, 3))
