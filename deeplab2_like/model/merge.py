"""From parts to one panoptic map: instances painted over semantic classes, in static shapes.

A map is made of *rows*, int32 [B, H, W]: for each pixel the row of a table of segments, instances first, then one row
per class, then one for pixels without a segment. The table says what is painted, see `PanopticSystem.postprocess`.

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.layers.compiled_stages`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras import ops

from deeplab2_like.model.detection import paste_weights
from deeplab2_like.model.layers import (
    Tensor,
    interpolated_columns,
    interpolated_rows,
    linear_matrix,
    stage,
)


@stage
def semantic_argmax(logits: Tensor, *, height: Any, width: Any, stride: int) -> Tensor:
    """The best class of every pixel of the bilinearly enlarged logits, without enlarging them.

    Args:
        logits: float32 [B, h, w, C]; probabilities will do, too.
        height: Image height without padding.
        width: Image width without padding.
        stride: Image pixels per logit.

    Returns:
        int32 [B, H, W].
    """
    batch, coarse_height, coarse_width = ops.shape(logits)[:3]
    num_classes = logits.shape[-1]

    def first_best(phase: Tensor) -> Tensor:
        # What argmax gives, as two plain reductions: XLA runs them four times as fast on a CPU.
        is_best = phase == ops.max(phase, axis=-1, keepdims=True)
        return ops.min(ops.where(is_best, ops.arange(num_classes), num_classes - 1), axis=-1)

    lines = []
    for phase_rows in interpolated_rows(logits, stride):
        best = [first_best(phase) for phase in interpolated_columns(phase_rows, stride)]  # s x [B, h, w]
        line = ops.stack(best, axis=3)  # [B, h, w, s]
        lines.append(ops.reshape(line, (batch, coarse_height, coarse_width * stride)))  # [B, h, w * s]
    classes = ops.stack(lines, axis=2)  # [B, h, s, w * s]
    classes = ops.reshape(classes, (batch, coarse_height * stride, coarse_width * stride))  # [B, h * s, w * s]
    return classes[:, :height, :width]


# Shares of the image's height that a window of lines may have, see `claim_pixels`.
_WINDOW_SHARES = (16, 8, 4, 2, 1)


class Merged(NamedTuple):
    """A panoptic map and its table of segments, of N instances and C classes.

    Attributes:
        panoptic: int32 [B, H, W].
        segment_id: int32 [B, N + C]: the value of each segment in the map, zero where there is none. Row n is an
            instance, row N + c the region of class c.
        segment_class: int32 [B, N + C], zero where there is none.
        kept: bool [B, N + C], the rows that are segments.
        rows: int32 [B, H, W], the row of each pixel; N + C for those that no row has.
        area: int32 [B, N + C + 1], pixels of each row, also of those that are not kept.
    """

    panoptic: Tensor
    segment_id: Tensor
    segment_class: Tensor
    kept: Tensor
    rows: Tensor
    area: Tensor


def merge(
    semantic: Tensor,
    owner: Tensor,
    classes: Tensor,
    *,
    class_of_semantic: Sequence[int],
    num_classes: int,
    stuff_area_limit: int,
    label_divisor: int,
    void: int,
) -> Merged:
    """Paints instances over semantic classes (Panoptic FPN, section 3.2).

    What no instance has goes to its semantic class; small regions, and pixels of semantic classes that are no segments,
    become void.

    Args:
        semantic: int32 [B, H, W], best semantic class of each pixel.
        owner: int32 [B, H, W], the instance of each pixel, or N where there is none, see `claim_pixels`.
        classes: int32 [B, N], class ids of the instances.
        class_of_semantic: Class id of each semantic class, or -1 for those that are not painted.
        num_classes: C, number of class ids.
        stuff_area_limit: Regions of semantic classes of fewer pixels become void.
        label_divisor: Factor between class and instance ids.
        void: Panoptic value of void.
    """
    batch, num_instances = ops.shape(classes)[0], classes.shape[1]
    row_of_semantic = [num_instances + (c if c >= 0 else num_classes) for c in class_of_semantic]
    rows = find_rows(semantic, owner, ops.array(row_of_semantic, "int32"), num_instances=num_instances)
    area = count_pixels(rows, num_rows=num_instances + num_classes + 1)

    present = area[:, :num_instances] > 0
    instance_value = classes * label_divisor + number_within_class(classes, present)
    class_ids = ops.arange(num_classes)[None, :] + ops.zeros((batch, 1), "int32")  # [B, C]
    class_area = area[:, num_instances:-1]
    kept = ops.concatenate([present, (class_area >= stuff_area_limit) & (class_area > 0)], axis=1)  # [B, N + C]
    value = ops.concatenate([instance_value, class_ids * label_divisor], axis=1)
    table = ops.concatenate([ops.where(kept, value, void), ops.full((batch, 1), void, "int32")], axis=1)
    return Merged(
        panoptic=look_up(table, rows),
        segment_id=ops.where(kept, value, 0),
        segment_class=ops.where(kept, ops.concatenate([classes, class_ids], axis=1), 0),
        kept=kept,
        rows=rows,
        area=area,
    )


def best_class(values: Tensor, image_size: tuple[Any, Any], *, stride: int, seen_size: Tensor | None = None) -> Tensor:
    """The best class of every pixel of the map, at whichever size the network saw the image.

    Args:
        values: float32 [B, h, w, C], logits or probabilities.
        image_size: Height and width of the map, ints or int32 scalars.
        stride: Pixels of the image that the network saw per value.
        seen_size: int32 [2], size of that image without padding, if it is not that of the map.

    Returns:
        int32 [B, H, W].
    """
    height, width = image_size
    if seen_size is None:
        return semantic_argmax(values, height=height, width=width, stride=stride)
    return resized_argmax(
        values, seen_height=seen_size[0], seen_width=seen_size[1], height=height, width=width, stride=stride
    )


def region_scores(
    probability: Tensor, merged: Merged, of_class: Sequence[int], *, stride: int, seen_size: Tensor | None = None
) -> Tensor:
    """Mean probability of each class over its region.

    Args:
        probability: float32 [B, h, w, S], of the classes that the network tells apart.
        merged: What `merge` returned.
        of_class: Position among these classes for each class id.
        stride: Pixels of the image that the network saw per probability.
        seen_size: int32 [2], size of that image without padding, if it is not that of the map.

    Returns:
        float32 [B, C], for each class id.
    """
    num_instances = merged.area.shape[1] - len(of_class) - 1
    row_class = ops.array([0] * num_instances + [*of_class, 0], "int32")
    sizes = {} if seen_size is None else {"seen_height": seen_size[0], "seen_width": seen_size[1]}
    mean = mean_probability(
        probability,
        merged.rows,
        ops.broadcast_to(row_class[None], ops.shape(merged.area)),
        merged.area,
        stride=stride,
        **sizes,
    )
    return mean[:, num_instances:-1]


def described_segments(merged: Merged, scores: Tensor, scores_of_regions: Tensor) -> dict[str, Tensor]:
    """The dictionary of `PanopticSystem.postprocess`.

    Args:
        merged: What `merge` returned, of N instances and C classes.
        scores: float32 [B, N], of the instances.
        scores_of_regions: float32 [B, C], of the regions of the classes.
    """
    return {
        "panoptic": merged.panoptic,
        "segment_id": merged.segment_id,
        "segment_class": merged.segment_class,
        "segment_score": ops.where(merged.kept, ops.concatenate([scores, scores_of_regions], axis=1), 0.0),
    }


@stage
def find_rows(semantic: Tensor, owner: Tensor, row_of_semantic: Tensor, *, num_instances: int) -> Tensor:
    """The row of each pixel, int32 [B, H, W]: that of its instance, or else of its semantic class; see `merge`."""
    return ops.where(owner < num_instances, owner, ops.take(row_of_semantic, semantic))


@stage
def claim_pixels(
    used: Tensor, boxes: Tensor, probabilities: Tensor, *, height: Any, width: Any, overlap_threshold: float
) -> Tensor:
    """Gives pixels to instances in the order of their rows; the only mask of image size is the one at work.

    An instance of which more than a share is claimed already is dropped; else it gets the rest of its mask.

    Args:
        used: bool [B, N], true for the first rows of each image, those that take part.
        boxes: float32 [B, N, 4], in pixels of the map.
        probabilities: float32 [B, N, P, P], of the pixels in the box; a pixel of the map belongs to the mask from 0.5.
        height: H, height of the map, an int or an int32 scalar.
        width: W, its width.
        overlap_threshold: The share.

    Returns:
        int32 [B, H, W]: the instance, or N for pixels that none has.
    """
    bins = probabilities.shape[-1]

    def mask_in_window(n: Tensor, top: Tensor, lines: Any) -> Tensor:
        box = ops.take(boxes, n, axis=1)[:, None]  # [B, 1, 4]
        shift = ops.cast(top, "float32")[:, None]
        rows = paste_weights(box[..., 0] - shift, box[..., 2] - shift, bins=bins, size=lines)[:, 0]  # [B, h, P]
        columns = paste_weights(box[..., 1], box[..., 3], bins=bins, size=width)[:, 0]  # [B, W, P]
        values = ops.matmul(ops.matmul(rows, ops.take(probabilities, n, axis=1)), ops.transpose(columns, (0, 2, 1)))
        return values >= 0.5

    return claim_in_order(
        used,
        *lines_of_boxes(boxes, height),
        mask_in_window,
        height=height,
        width=width,
        overlap_threshold=overlap_threshold,
    )


def lines_of_boxes(boxes: Tensor, height: Any) -> tuple[Tensor, Tensor]:
    """First line of pixels that each box touches, and the line after the last one: int32 [B, N] each, in 0..height."""
    limit = ops.cast(height, "float32")
    # Cut first: a side far away would overflow an integer.
    first, last = (ops.clip(side, 0.0, limit) for side in (ops.floor(boxes[..., 0]), ops.ceil(boxes[..., 2])))
    return ops.cast(first, "int32"), ops.cast(last, "int32")


def claim_in_order(
    used: Tensor,
    first_line: Tensor,
    last_line: Tensor,
    mask_in_window: Callable[[Tensor, Tensor, Any], Tensor],
    *,
    height: Any,
    width: Any,
    overlap_threshold: float,
    cost_in_window: Callable[[Tensor, Tensor, Any], Tensor] | None = None,
) -> Tensor:
    """Gives pixels to instances in the order of their rows, see `claim_pixels`, whatever their masks are made of.

    Args:
        used: bool [B, N], true for the first rows of each image, those that take part.
        first_line: int32 [B, N], first line of pixels that the mask may touch.
        last_line: int32 [B, N], the line after the last one.
        mask_in_window: From n, an int32 scalar, the first line of a window in each image, int32 [B], and its number of
            lines, L, to the window of the masks of row n, bool [B, L, W].
        height: H, height of the map, an int or an int32 scalar.
        width: W, its width.
        overlap_threshold: The share.
        cost_in_window: If given, a pixel in several masks that are not dropped goes to the one of the lowest cost, the
            first of them if they are equal, and not simply to the first: like `mask_in_window`, but float32.

    Returns:
        int32 [B, H, W]: the instance, or N for pixels that none has.
    """
    batch, num_instances = ops.shape(used)[0], used.shape[1]
    last = ops.sum(ops.cast(ops.any(used, axis=0), "int32"))
    # Work is done on whole lines of pixels, in windows of one of a few heights: the smallest that holds the masks.
    lines_needed = ops.max(ops.where(used, last_line - first_line, 0), axis=0)  # [N]
    window_heights = [-(-height // share) for share in _WINDOW_SHARES]
    window_index = sum(ops.cast(lines_needed > lines, "int32") for lines in window_heights[:-1])  # [N]

    def claim_in_window(lines: Any, n: Tensor, owner: Tensor, *cost: Tensor) -> tuple[Tensor, ...]:
        top = ops.minimum(ops.take(first_line, n, axis=1), height - lines)  # [B]
        index = (ops.arange(batch) * height + top)[:, None] + ops.arange(lines)[None, :]  # [B, L]
        index = ops.reshape(index, (-1,))  # [B * L]

        def window(of_map: Tensor) -> Tensor:
            return ops.reshape(ops.take(of_map, index, axis=0), (batch, lines, width))  # [B, L, W]

        def updated(of_map: Tensor, changed: Tensor, value: Tensor, before: Tensor) -> Tensor:
            after = ops.reshape(ops.where(changed, value, before), (batch * lines, width))
            return ops.scatter_update(of_map, index[:, None], after)  # [B * H, W]

        before = window(owner)
        mask = mask_in_window(n, top, lines) & ops.take(used, n, axis=1)[:, None, None]  # [B, L, W]

        free = mask & (before == num_instances)
        area = ops.cast(ops.sum(ops.cast(mask, "int32"), axis=(1, 2)), "float32")  # [B]
        claimed = area - ops.cast(ops.sum(ops.cast(free, "int32"), axis=(1, 2)), "float32")  # [B]
        fits = (claimed <= overlap_threshold * area)[:, None, None]
        number = ops.cast(n, "int16")
        if cost_in_window is None:
            return (updated(owner, free & fits, number, before),)
        cost_here, least = cost_in_window(n, top, lines), window(cost[0])
        wins = fits & (free | (mask & (cost_here < least)))
        return updated(owner, wins, number, before), updated(cost[0], wins, cost_here, least)

    windows = [functools.partial(claim_in_window, lines) for lines in window_heights]

    def claim(n: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        return n + 1, *ops.switch(ops.take(window_index, n), windows, n, *maps)

    # Half the memory to move; more than 32767 instances would be too many for the masks anyway.
    maps = [ops.full((batch * height, width), num_instances, "int16")]
    if cost_in_window is not None:
        maps.append(ops.full((batch * height, width), float("inf"), "float32"))
    owner = ops.while_loop(lambda n, *_: n < last, claim, (ops.array(0, "int32"), *maps))[1]
    return ops.reshape(ops.cast(owner, "int32"), (batch, height, width))  # [B, H, W]


def enlarging_matrix(coarse: Any, seen: Any, size: Any, *, stride: int) -> Tensor:
    """The matrix that enlarges along one axis: bilinearly by the stride, cut to what was seen, then to the map's size.

    Args:
        coarse: Cells along the axis, c, an int or an int32 scalar.
        seen: Pixels that the network saw along it, without padding; None if the map has the same size.
        size: Pixels of the map along it, S.
        stride: Pixels that the network saw per cell.

    Returns:
        float32 [S, c].
    """
    if seen is None:
        return linear_matrix(coarse, size, 1 / stride)
    resize = linear_matrix(seen, size, ops.cast(seen, "float32") / ops.cast(size, "float32"))
    return ops.matmul(resize, linear_matrix(coarse, seen, 1 / stride))


def enlarging_matrices(
    cells: tuple[Any, Any], seen_size: Tensor | None, image_size: tuple[Any, Any], *, stride: int
) -> tuple[Tensor, Tensor]:
    """`enlarging_matrix` of the rows and of the columns: float32 [H, h] and [W, w].

    Args:
        cells: h and w.
        seen_size: int32 [2], size of the image that the network saw; None if it is that of the map.
        image_size: H and W.
        stride: Pixels that the network saw per cell.
    """
    rows, columns = (
        enlarging_matrix(cells[axis], None if seen_size is None else seen_size[axis], image_size[axis], stride=stride)
        for axis in (0, 1)
    )
    return rows, columns


def enlarge(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Enlarges a map, float32 [B, h, w], with the matrices of `enlarging_matrices`, to float32 [B, H, W]."""
    return ops.matmul(ops.matmul(rows, values), ops.transpose(columns))


def best_of_planes(
    plane: Callable[[Tensor], Tensor], first: Any, last: Any, best: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """The best slot of each pixel, where the slots are made one after the other, as all would not fit at full size.

    Args:
        plane: From the number of a slot, an int32 scalar, to its potential, float32 [B, H, W].
        first: The first slot.
        last: The one after the last.
        best: What is best without them: potential float32 [B, H, W] and slot int32 [B, H, W].

    Returns:
        The same with them; of equals, the one before.
    """

    def better(index: Tensor, best: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = plane(index)
        return index + 1, ops.maximum(best, here), ops.where(here > best, index, slot)

    start = (ops.cast(first, "int32"), *best)
    _, value, slot = ops.while_loop(lambda index, *_: index < last, better, start)
    return value, slot


@stage
def resized_argmax(
    logits: Tensor, *, seen_height: Any, seen_width: Any, height: Any, width: Any, stride: int
) -> Tensor:
    """The best class of every pixel, where the network saw the image at another size.

    Args:
        logits: float32 [B, h, w, C]; probabilities will do, too.
        seen_height: Height of the image that the network saw, without padding.
        seen_width: Its width.
        height: Height of the map.
        width: Its width.
        stride: Pixels of the image that the network saw per logit.

    Returns:
        int32 [B, H, W].
    """
    batch, coarse_height, coarse_width = ops.shape(logits)[:3]
    num_classes = logits.shape[-1]
    planes = ops.transpose(logits, (3, 0, 1, 2))  # [C, B, h, w]
    rows = enlarging_matrix(coarse_height, seen_height, height, stride=stride)  # [H, h]
    columns = enlarging_matrix(coarse_width, seen_width, width, stride=stride)  # [W, w]
    size = (batch, height, width)
    nothing = ops.full(size, -1e30, "float32"), ops.zeros(size, "int32")
    return best_of_planes(
        lambda index: enlarge(ops.take(planes, index, axis=0), rows, columns), 0, num_classes, nothing
    )[1]


@stage
def count_pixels(rows: Tensor, *, num_rows: int) -> Tensor:
    """Number of pixels of each row: int32 [B, H, W] to int32 [B, num_rows]."""
    batch = ops.shape(rows)[0]
    row = ops.reshape(ops.arange(batch)[:, None, None] * num_rows + rows, (-1,))  # [B * H * W]
    counts = ops.segment_sum(ops.ones_like(row), row, num_segments=batch * num_rows)
    return ops.reshape(counts, (batch, num_rows))  # [B, R]


def number_within_class(classes: Tensor, present: Tensor) -> Tensor:
    """Numbers instances from 1 within their class, in the order of their rows.

    Args:
        classes: int32 [B, N] class ids.
        present: bool [B, N], false for rows that do not count.

    Returns:
        int32 [B, N].
    """
    earlier = ops.tril(ops.ones((classes.shape[1], classes.shape[1]), "int32"))  # [N, N] pairs of later and earlier
    same_class = classes[:, :, None] == classes[:, None, :]
    return ops.sum(ops.where(same_class & present[:, None, :], earlier, 0), axis=-1)


@stage
def mean_probability(
    probability: Tensor,
    rows: Tensor,
    row_class: Tensor,
    area: Tensor,
    *,
    stride: int,
    seen_height: Any | None = None,
    seen_width: Any | None = None,
) -> Tensor:
    """Mean probability of each segment's class over its pixels, read at the resolution of the probabilities.

    Args:
        probability: float32 [B, h, w, C].
        rows: int32 [B, H, W] row of the segment table of each pixel.
        row_class: int32 [B, R] class of each row.
        area: int32 [B, R] pixels of each row.
        stride: Image pixels per probability.
        seen_height: Height of the image that the network saw, without padding, if it is not that of the map.
        seen_width: Its width.

    Returns:
        float32 [B, R].
    """
    batch, height, width = ops.shape(rows)
    rows_seen = height if seen_height is None else seen_height
    columns_seen = width if seen_width is None else seen_width
    coarse_height, coarse_width = ops.shape(probability)[1:3]
    num_classes, num_rows = probability.shape[-1], area.shape[1]
    probability = ops.reshape(probability, (-1,))  # [B * h * w * C]
    image = ops.arange(batch)[:, None, None]
    # Where the centre of each pixel lies in the image that the network saw.
    y = ((2 * ops.arange(height) + 1) * rows_seen // (2 * height) // stride)[None, :, None]
    x = ((2 * ops.arange(width) + 1) * columns_seen // (2 * width) // stride)[None, None, :]
    segment = image * num_rows + rows  # [B, H, W]
    pixel_class = ops.take(ops.reshape(row_class, (-1,)), segment)  # [B, H, W]
    position = ((image * coarse_height + y) * coarse_width + x) * num_classes + pixel_class
    total = ops.segment_sum(
        ops.reshape(ops.take(probability, position), (-1,)), ops.reshape(segment, (-1,)), num_segments=batch * num_rows
    )
    return ops.reshape(total, (batch, num_rows)) / ops.cast(ops.maximum(area, 1), "float32")  # [B, R]


@stage
def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Paints every pixel, int32 [B, H, W] rows, with the value of its row in the table, int32 [B, R]."""
    batch, num_rows = ops.shape(rows)[0], table.shape[1]
    image = ops.arange(batch)[:, None, None]
    return ops.take(ops.reshape(table, (-1,)), image * num_rows + rows)
