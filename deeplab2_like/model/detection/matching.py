"""Matching of boxes with the ground truth, crowds, and seeded random sampling, in static shapes."""

from keras import ops

from deeplab2_like.model.boxes import pairwise_iou, take_rows
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.random_numbers import random_uniform

# Pairs of boxes compared at once: a table of all anchors and instances would take hundreds of megabytes.
_PAIRS_AT_ONCE = 2**20
# Anchors in symmetric positions around an instance have equal overlaps up to rounding.
_TIE = 1e-6


def match_boxes(boxes: Tensor, truth: Tensor, truth_valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the instance with the largest overlap for each box.

    Args:
        boxes: float32 [B or 1, N, 4], anchors or proposals.
        truth: float32 [B, M, 4], boxes of the instances.
        truth_valid: bool [B, M].

    Returns:
        `iou`: float32 [B, N], intersection over union with the best instance, 0 if there is none.
        `row`: int32 [B, N], the row of that instance, the first of equals.
        `is_best`: bool [B, N], whether this box overlaps some instance, and no box overlaps that instance more.
    """
    batch, num_truth = ops.shape(truth)[0], truth.shape[1]
    num_boxes = ops.shape(boxes)[1]
    # Unused rows become empty boxes, which overlap nothing.
    truth = ops.where(truth_valid[..., None], truth, -1.0)
    at_once = min(num_truth, max(1, _PAIRS_AT_ONCE // (boxes.shape[1] or _PAIRS_AT_ONCE // 8)))
    num_steps = -(-num_truth // at_once)
    truth = ops.pad(truth, [[0, 0], [0, num_steps * at_once - num_truth], [0, 0]], constant_values=-1.0)
    used = ops.max(ops.where(truth_valid, ops.arange(1, num_truth + 1), 0))

    def step(start: Tensor, iou: Tensor, row: Tensor, is_best: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        part = ops.slice(truth, (0, start, 0), (batch, at_once, 4))
        pairs = pairwise_iou(part, boxes)  # [B, at_once, N]
        part_iou = ops.max(pairs, axis=1)
        part_row = ops.cast(ops.argmax(pairs, axis=1), "int32") + start
        best = ops.max(pairs, axis=2, keepdims=True)  # [B, at_once, 1]
        ties = ops.any((pairs > best - _TIE) & (best > 0), axis=1)
        return start + at_once, ops.maximum(iou, part_iou), ops.where(part_iou > iou, part_row, row), is_best | ties

    start = (
        ops.zeros((), "int32"),
        ops.zeros((batch, num_boxes), "float32"),
        ops.zeros((batch, num_boxes), "int32"),
        ops.zeros((batch, num_boxes), "bool"),
    )
    _, iou, row, is_best = ops.while_loop(lambda begin, *_: begin < used, step, start, maximum_iterations=num_steps)
    return iou, row, is_best


def crowd_share(boxes: Tensor, instance_map: Tensor) -> Tensor:
    """Returns the share of each box that is crowd, counted in pixels with a summed-area table.

    A crowd region of a panoptic map may be scattered over the image, so its bounding box would say little.

    Args:
        boxes: float32 [B or 1, N, 4].
        instance_map: int32 [B, H, W] of `instance_targets`, -1 on crowd.

    Returns:
        float32 [B, N], 0..1, of the part of the box inside the map, rounded to whole pixels; 0 for boxes outside.
    """
    batch, height, width = ops.shape(instance_map)
    is_crowd = ops.cast(instance_map < 0, "int32")
    sums = ops.cumsum(ops.cumsum(is_crowd, axis=1), axis=2)
    sums = ops.pad(sums, [[0, 0], [1, 0], [1, 0]])  # [B, H + 1, W + 1], of all pixels before
    sums = ops.reshape(sums, (batch, (height + 1) * (width + 1)))

    corners = ops.cast(ops.round(boxes), "int32")
    y_min, y_max = (ops.clip(corners[..., k], 0, height) for k in (0, 2))
    x_min, x_max = (ops.clip(corners[..., k], 0, width) for k in (1, 3))
    area = (y_max - y_min) * (x_max - x_min)

    def before(y: Tensor, x: Tensor) -> Tensor:
        index = y * (width + 1) + x
        return take_rows(sums, ops.broadcast_to(index, (batch, ops.shape(index)[1])))

    count = before(y_max, x_max) - before(y_min, x_max) - before(y_max, x_min) + before(y_min, x_min)
    return ops.cast(count, "float32") / ops.cast(ops.maximum(area, 1), "float32")


def sample_balanced(
    positive: Tensor, negative: Tensor, *, number: int, max_positive: int, seeds: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Samples positives and negatives at random.

    Positives take at most `max_positive` places; negatives fill the rest.

    Args:
        positive: bool [B, N].
        negative: bool [B, N], disjoint from `positive`.
        number: Samples per image, S.
        max_positive: Largest number of positives among them.
        seeds: int32 [B, 2], one for each image.

    Returns:
        `index`: int32 [B, S]; positives come first, so they are within the first `max_positive`.
        `is_positive`: bool [B, S].
        `valid`: bool [B, S], false where there are too few boxes.
    """
    order = random_uniform(seeds, (ops.shape(positive)[1],))  # [B, N]
    positive_key, positive_index = top_k_padded(ops.where(positive, order + 2.0, -1.0), max_positive, fill=-1.0)
    negative_key, negative_index = top_k_padded(ops.where(negative, order, -1.0), number, fill=-1.0)
    key, place = ops.top_k(ops.concatenate([positive_key, negative_key], axis=1), number)
    index = take_rows(ops.concatenate([positive_index, negative_index], axis=1), place)
    return index, key >= 2.0, key >= 0.0


def top_k_padded(scores: Tensor, k: int, *, fill: float) -> tuple[Tensor, Tensor]:
    """Returns the k largest scores of each row, also if N is below k or unknown.

    Args:
        scores: [B, N].
        k: Number of scores.
        fill: Score of the places beyond N.

    Returns:
        Scores [B, k], descending, and int32 [B, k] indices, 0 beyond N.
    """
    if scores.shape[1] is None or scores.shape[1] < k:
        size = ops.shape(scores)[1]
        scores = ops.pad(scores, [[0, 0], [0, k if scores.shape[1] is None else k - size]], constant_values=fill)
        values, index = ops.top_k(scores, k)
        return values, ops.where(index < size, index, 0)
    values, index = ops.top_k(scores, k)
    return values, ops.cast(index, "int32")
