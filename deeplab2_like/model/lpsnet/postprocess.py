"""From points to boxes (section 3.5): the class comes from the semantic head, what follows is that of FCOS."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from keras import ops

from deeplab2_like.model.boxes import box_area, clip_boxes, non_maximum_suppression, take_rows
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import stage


class Detections(NamedTuple):
    """Boxes, best first.

    Attributes:
        boxes: float32 [B, N, 4], in pixels.
        scores: float32 [B, N], zero in unused rows.
        classes: int32 [B, N], positions among the thing classes.
    """

    boxes: Tensor
    scores: Tensor
    classes: Tensor

    def best(self, number: int) -> "Detections":
        """The best of them, in the order of their scores."""
        scores, index = ops.top_k(self.scores, min(number, self.scores.shape[1]))
        return Detections(take_rows(self.boxes, index), scores, take_rows(self.classes, index))


def boxes_of_distances(distances: Tensor, stride: int) -> Tensor:
    """Boxes from the distances of the points of a level to their sides.

    Args:
        distances: float32 [B, h, w, 4], to the left, top, right and bottom, in pixels.
        stride: Of the level.

    Returns:
        float32 [B, h, w, 4], (y_min, x_min, y_max, x_max) in pixels.
    """
    height, width = ops.shape(distances)[1:3]
    y = ((ops.cast(ops.arange(height), "float32") + 0.5) * stride)[:, None]
    x = ((ops.cast(ops.arange(width), "float32") + 0.5) * stride)[None, :]
    left, top, right, bottom = ops.unstack(distances, 4, axis=-1)
    return ops.stack([y - top, x - left, y + bottom, x + right], axis=-1)


def read_at_points(values: Tensor, factor: int, size: tuple[Any, Any]) -> Tensor:
    """Reads a fine map at the points of a level: the mean of the four cells around each.

    Args:
        values: float32 [B, H, W, C].
        factor: Cells per point along an axis, 1 or even.
        size: Height and width of the level; what lies beyond the map counts as zeros.

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
def best_of_level(
    distances: Tensor,
    border_ness_logits: Tensor,
    probability: Tensor,
    *,
    stride: int,
    factor: int,
    class_threshold: float,
    number: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The best boxes of a level, one for each point.

    Args:
        distances: float32 [B, h, w, 4].
        border_ness_logits: float32 [B, h, w].
        probability: float32 [B, H, W, T] of the thing classes, on the map of the semantic head.
        stride: Of the level.
        factor: Cells of that map per point along an axis.
        class_threshold: Points at which no thing class is more probable do not count.
        number: How many are kept.

    Returns:
        Boxes float32 [B, N, 4], scores (probability times border-ness) float32 [B, N], zero in unused rows, and classes
        int32 [B, N].
    """
    batch, height, width = ops.shape(border_ness_logits)
    at_points = read_at_points(probability, factor, (height, width))  # [B, h, w, T]
    of_class = ops.max(at_points, axis=-1)
    score = ops.where(of_class > class_threshold, of_class * ops.sigmoid(border_ness_logits), 0.0)
    # With more zeros, so that there are always enough to choose from.
    flat = ops.pad(ops.reshape(score, (batch, height * width)), [[0, 0], [0, number]])
    score, index = ops.top_k(flat, number)
    index = ops.minimum(index, height * width - 1)
    boxes = ops.reshape(boxes_of_distances(distances, stride), (batch, height * width, 4))
    classes = ops.reshape(ops.cast(ops.argmax(at_points, axis=-1), "int32"), (batch, height * width))
    return take_rows(boxes, index), score, take_rows(classes, index)


def find_boxes(
    distances: Mapping[str, Tensor],
    border_ness_logits: Mapping[str, Tensor],
    probability: Tensor,
    image_size: tuple[Any, Any],
    *,
    strides: Mapping[str, int],
    semantic_stride: int,
    class_threshold: float,
    candidates: int,
    nms_iou: float,
    number: int,
) -> Detections:
    """Boxes at the points of all levels, without duplicates.

    Args:
        distances: float32 [B, h, w, 4] by level, in pixels.
        border_ness_logits: float32 [B, h, w] by level.
        probability: float32 [B, H, W, T] of the thing classes.
        image_size: Height and width of the image without padding; boxes end there.
        strides: Stride of each level.
        semantic_stride: Pixels per probability.
        class_threshold: See `best_of_level`.
        candidates: Most boxes, of all levels, that are compared.
        nms_iou: Overlap above which the worse of two boxes of a class goes.
        number: N, most boxes.
    """
    found = [
        best_of_level(
            distances[level],
            border_ness_logits[level],
            probability,
            stride=stride,
            factor=stride // semantic_stride,
            class_threshold=class_threshold,
            number=candidates,
        )
        for level, stride in strides.items()
    ]
    boxes, scores, classes = (ops.concatenate(values, axis=1) for values in zip(*found, strict=True))
    boxes = clip_boxes(boxes, image_size)
    scores = ops.where(box_area(boxes) > 0, scores, 0.0)
    ranked = Detections(boxes, scores, classes).best(candidates)
    kept = non_maximum_suppression(ranked.boxes, ranked.scores > 0, iou_threshold=nms_iou, classes=ranked.classes)
    return ranked._replace(scores=ops.where(kept, ranked.scores, 0.0)).best(number)


@stage
def masks_of_boxes(semantic: Tensor, boxes: Tensor, classes: Tensor) -> Tensor:
    """The pixels in each box that have its class, made one box after the other.

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

    def mask(of_one: tuple[Tensor, Tensor]) -> Tensor:
        box, class_id = of_one
        y_min, x_min, y_max, x_max = ops.unstack(box[:, None, None], 4, axis=-1)  # each [B, 1, 1]
        is_inside = (y > y_min) & (y < y_max) & (x > x_min) & (x < x_max)
        return is_inside & (semantic == class_id[:, None, None])

    masks = ops.map(mask, (ops.transpose(boxes, (1, 0, 2)), ops.transpose(classes)))  # [N, B, H, W]
    return ops.transpose(masks, (1, 0, 2, 3))
