"""Operations on boxes: area, IoU, encoding for regression, non-maximum suppression.

A box is float32 [y_min, x_min, y_max, x_max] in pixels, exclusive at its end: a box around one pixel has side 1. Unused
rows of a table may hold any finite values.
"""

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import stage

# Largest logarithm of a predicted scale: from an anchor of 16 pixels to a side of 1000 pixels.
_MAX_LOG_SCALE = math.log(1000.0 / 16.0)
# Keeps logarithms and quotients of unused rows finite.
_SMALLEST_SIDE = 1e-6


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Takes rows from each table of a batch.

    Args:
        table: [B, N, ...].
        index: int32 [B, S], in 0..N - 1.

    Returns:
        [B, S, ...].
    """
    batch, rows = ops.shape(table)[:2]
    rest = tuple(ops.shape(table)[2:])
    flat = ops.reshape(table, (batch * rows, *rest))  # [B * N, ...]
    return ops.take(flat, index + ops.arange(batch, dtype="int32")[:, None] * rows, axis=0)


def box_area(boxes: Tensor) -> Tensor:
    """Returns the areas of boxes, float32 [..., 4] to [...]; zero for boxes whose end is before their start."""
    y_min, x_min, y_max, x_max = ops.unstack(boxes, 4, axis=-1)
    return ops.maximum(y_max - y_min, 0.0) * ops.maximum(x_max - x_min, 0.0)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Computes the intersection over union (IoU) of every pair.

    Args:
        first: float32 [..., N, 4].
        second: float32 [..., M, 4].

    Returns:
        float32 [..., N, M]; 0 where both boxes are empty.
    """
    first, second = first[..., :, None, :], second[..., None, :, :]
    height = ops.minimum(first[..., 2], second[..., 2]) - ops.maximum(first[..., 0], second[..., 0])
    width = ops.minimum(first[..., 3], second[..., 3]) - ops.maximum(first[..., 1], second[..., 1])
    intersection = ops.maximum(height, 0.0) * ops.maximum(width, 0.0)
    union = box_area(first) + box_area(second) - intersection
    return ops.where(intersection > 0, intersection / ops.maximum(union, _SMALLEST_SIDE**2), 0.0)


def encode_boxes(boxes: Tensor, reference: Tensor, weights: Sequence[float]) -> Tensor:
    """Encodes boxes relative to reference boxes (anchors or RoIs), as regression targets.

    Args:
        boxes: float32 [..., 4].
        reference: float32 [..., 4].
        weights: Factors of dy, dx, dh and dw.

    Returns:
        float32 [..., 4], (dy, dx, dh, dw): shift of the center in sides of the reference, and logarithm of the ratio of
        the sides. Detectron2 orders them (dx, dy, dw, dh).
    """
    center, size = _center_and_size(boxes)
    reference_center, reference_size = _center_and_size(reference)
    size, reference_size = ops.maximum(size, _SMALLEST_SIDE), ops.maximum(reference_size, _SMALLEST_SIDE)
    shift = (center - reference_center) / reference_size
    deltas = ops.concatenate([shift, ops.log(size / reference_size)], axis=-1)
    return deltas * ops.array(weights, "float32")


def decode_boxes(deltas: Tensor, reference: Tensor, weights: Sequence[float]) -> Tensor:
    """Decodes boxes, the inverse of `encode_boxes`.

    Args:
        deltas: float32 [..., 4], (dy, dx, dh, dw).
        reference: float32 [..., 4].
        weights: Factors with which the deltas were encoded.

    Returns:
        float32 [..., 4]. dh and dw are limited to log(1000 / 16), so that no box becomes infinite.
    """
    deltas = ops.cast(deltas, "float32") / ops.array(weights, "float32")
    reference_center, reference_size = _center_and_size(reference)
    center = reference_center + deltas[..., :2] * reference_size
    half = 0.5 * reference_size * ops.exp(ops.minimum(deltas[..., 2:], _MAX_LOG_SCALE))
    return ops.concatenate([center - half, center + half], axis=-1)


def _center_and_size(boxes: Tensor) -> tuple[Tensor, Tensor]:
    size = boxes[..., 2:] - boxes[..., :2]
    return boxes[..., :2] + 0.5 * size, size


def clip_boxes(boxes: Tensor, image_size: tuple[Any, Any]) -> Tensor:
    """Clips boxes, float32 [..., 4], to an image of the given height and width."""
    height, width = (ops.cast(side, "float32") for side in image_size)
    limit = ops.stack([height, width, height, width])
    return ops.minimum(ops.maximum(boxes, 0.0), limit)


@stage
def non_maximum_suppression(
    boxes: Tensor, valid: Tensor, *, iou_threshold: float, classes: Tensor | None = None
) -> Tensor:
    """Greedy non-maximum suppression: removes a box if a better one that is kept overlaps it too much.

    Args:
        boxes: float32 [B, N, 4], the best first.
        valid: bool [B, N], the rows that take part.
        iou_threshold: Largest IoU with a better box that is kept.
        classes: int [B, N]; if given, only boxes of the same class suppress each other.

    Returns:
        bool [B, N], the rows that are kept, without a gradient.
    """
    return suppress(overlapping_pairs(ops.stop_gradient(boxes), iou_threshold=iou_threshold, classes=classes), valid)


def overlapping_pairs(boxes: Tensor, *, iou_threshold: float, classes: Tensor | None = None) -> Tensor:
    """Finds the boxes that a better one overlaps too much; arguments as for `non_maximum_suppression`.

    Returns:
        bool [B, better, worse], true only where the first row is before the second one.
    """
    rank = ops.arange(ops.shape(boxes)[1])
    overlaps = (pairwise_iou(boxes, boxes) > iou_threshold) & (rank[:, None] < rank[None, :])
    return overlaps if classes is None else overlaps & (classes[:, :, None] == classes[:, None, :])


def suppress(suppresses: Tensor, valid: Tensor) -> Tensor:
    """Keeps, greedily, the rows that no better row that is kept suppresses.

    The greedy result is the only fixed point of "a row is kept if no better row that is kept suppresses it". Iterating
    from "all are kept" reaches it in as many steps as the longest chain of suppressions has rows, usually a few.

    Args:
        suppresses: bool [B, better, worse], true only where the first row is before the second one.
        valid: bool [B, N], the rows that take part.

    Returns:
        bool [B, N], the rows that are kept.
    """

    def step(keep: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        del changed
        after = valid & ~ops.any(suppresses & keep[:, :, None], axis=1)
        return after, ops.any(after != keep)

    keep, _ = ops.while_loop(
        lambda keep, changed: changed, step, (valid, ops.any(valid)), maximum_iterations=valid.shape[1]
    )
    return keep


def find_leaders(joins: Tensor) -> Tensor:
    """Returns the row that each row joins: the best one that it may join, or itself if there is none.

    Args:
        joins: bool [B, better, worse], for `suppress` the pairs whose better row is kept.

    Returns:
        int32 [B, N].
    """
    first = ops.cast(ops.argmax(ops.cast(joins, "int32"), axis=1), "int32")
    return ops.where(ops.any(joins, axis=1), first, ops.arange(ops.shape(joins)[1], dtype="int32"))


def group_members(leader: Tensor, used: Tensor) -> Tensor:
    """Returns the rows that join each row.

    Args:
        leader: int32 [B, N], result of `find_leaders`.
        used: bool [B, N], the rows that take part.

    Returns:
        float32 [B, leader, member] of zeros and ones.
    """
    rank = ops.arange(ops.shape(leader)[1], dtype="int32")
    return ops.cast((leader[:, None, :] == rank[:, None]) & used[:, None, :], "float32")


def boxes_around_masks(masks: Tensor) -> Tensor:
    """Returns the tight boxes around masks, bool [B, N, H, W] to float32 [B, N, 4]; zeros for empty masks."""
    sides = []
    for axis in (3, 2):
        is_touched = ops.cast(ops.any(masks, axis=axis), "int32")  # [B, N, H] or [B, N, W]
        size = ops.shape(is_touched)[-1]
        first = ops.argmax(is_touched, axis=-1)
        last = size - ops.argmax(ops.flip(is_touched, axis=-1), axis=-1)
        is_empty = ops.sum(is_touched, axis=-1) == 0
        sides.append([ops.where(is_empty, 0, ops.cast(side, "int32")) for side in (first, last)])
    (top, bottom), (left, right) = sides
    return ops.cast(ops.stack([top, left, bottom, right], axis=-1), "float32")
