"""Box arithmetic in `keras.ops`: areas, overlaps, the encoding of box regression, suppression of duplicates.

A box is [y_min, x_min, y_max, x_max] in image pixels, exclusive at its end: a box around one pixel has side 1. All is
float32. Rows that only fill up a table may hold anything finite.
"""

import math
from collections.abc import Sequence
from typing import Any

from keras import ops

from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import stage

# Largest log scale of a predicted side: from an anchor of 16 pixels to a side of 1000.
_MAX_LOG_SCALE = math.log(1000.0 / 16.0)
# Keeps the logarithms and quotients of empty rows finite.
_SMALLEST_SIDE = 1e-6


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Looks up rows of a batch of tables.

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
    """Areas of boxes float32 [..., 4], as [...]; zero where an end is before its start."""
    y_min, x_min, y_max, x_max = ops.unstack(boxes, 4, axis=-1)
    return ops.maximum(y_max - y_min, 0.0) * ops.maximum(x_max - x_min, 0.0)


def pairwise_iou(first: Tensor, second: Tensor) -> Tensor:
    """Intersection over union of every pair.

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
    """Writes boxes relative to reference boxes (anchors or RoIs), as regression targets.

    Args:
        boxes: float32 [..., 4].
        reference: float32 [..., 4].
        weights: Factors of the four numbers, in their order.

    Returns:
        float32 [..., 4], (dy, dx, dh, dw): shift of the centre in sides of the reference, and log ratio of the sides.
        Detectron2 orders them (dx, dy, dw, dh).
    """
    center, size = _center_and_size(boxes)
    reference_center, reference_size = _center_and_size(reference)
    size, reference_size = ops.maximum(size, _SMALLEST_SIDE), ops.maximum(reference_size, _SMALLEST_SIDE)
    shift = (center - reference_center) / reference_size
    deltas = ops.concatenate([shift, ops.log(size / reference_size)], axis=-1)
    return deltas * ops.array(weights, "float32")


def decode_boxes(deltas: Tensor, reference: Tensor, weights: Sequence[float]) -> Tensor:
    """The inverse of `encode_boxes`.

    Args:
        deltas: float32 [..., 4], (dy, dx, dh, dw).
        reference: float32 [..., 4].
        weights: Factors with which the deltas were encoded.

    Returns:
        float32 [..., 4]. The log ratios are cut at log(1000 / 16) first, so that no box becomes infinite.
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
    """Cuts boxes float32 [..., 4] at the borders of an image of the given height and width."""
    height, width = (ops.cast(side, "float32") for side in image_size)
    limit = ops.stack([height, width, height, width])
    return ops.minimum(ops.maximum(boxes, 0.0), limit)


@stage
def non_maximum_suppression(
    boxes: Tensor, valid: Tensor, *, iou_threshold: float, classes: Tensor | None = None
) -> Tensor:
    """Greedy non-maximum suppression: a box goes if a better one that stays overlaps it too much.

    Args:
        boxes: float32 [B, N, 4], the best first.
        valid: bool [B, N], the rows that take part.
        iou_threshold: A box goes if the overlap is above this.
        classes: int [B, N]; if given, only boxes of the same class suppress each other.

    Returns:
        bool [B, N], the rows that stay. No gradient.
    """
    boxes = ops.stop_gradient(boxes)
    rank = ops.arange(ops.shape(boxes)[1])
    overlaps = (pairwise_iou(boxes, boxes) > iou_threshold) & (rank[:, None] < rank[None, :])  # [B, better, worse]
    if classes is not None:
        overlaps = overlaps & (classes[:, :, None] == classes[:, None, :])
    return keep_best(overlaps, valid)


def keep_best(excludes: Tensor, valid: Tensor) -> Tensor:
    """Keeps, greedily, what no better one that is kept excludes.

    The greedy result is the only fixed point of "a row stays if no better row that stays excludes it", and is reached
    from "all stay" in as many steps as the longest chain of exclusions is long, usually a few.

    Args:
        excludes: bool [B, better, worse], true only where the first row is before the second one.
        valid: bool [B, N], the rows that take part.

    Returns:
        bool [B, N], the rows that stay.
    """

    def exclude(keep: Tensor, changed: Tensor) -> tuple[Tensor, Tensor]:
        del changed
        after = valid & ~ops.any(excludes & keep[:, :, None], axis=1)
        return after, ops.any(after != keep)

    keep, _ = ops.while_loop(
        lambda keep, changed: changed, exclude, (valid, ops.any(valid)), maximum_iterations=valid.shape[1]
    )
    return keep
