"""Resolution of overlaps: each pixel goes to one of the instances whose masks contain it, in static shapes.

A *line* is a row of pixels; a *row* is a row of the table of instances.

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.stages`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

from keras import ops

from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import stage

# The image height divided by these gives the heights of the windows of lines, see `update_in_windows`.
_WINDOW_DIVISORS = (16, 8, 4, 2, 1)


@stage
def resolve_mask_overlaps(
    used: Tensor, boxes: Tensor, probabilities: Tensor, *, height: Any, width: Any, overlap_threshold: float
) -> Tensor:
    """Resolves overlaps of masks that are pasted from boxes, see `resolve_overlaps`.

    Only one mask of image size exists at a time.

    Args:
        used: bool [B, N], the instances that take part, the first rows of each image.
        boxes: float32 [B, N, 4], in pixels of the map.
        probabilities: float32 [B, N, P, P], of the pixels in the box; a pixel of the map belongs to the mask from 0.5.
        height: H, height of the map, an int or an int32 scalar.
        width: W, its width.
        overlap_threshold: Largest share of a mask that earlier instances may hold.

    Returns:
        int32 [B, H, W]: the instance of each pixel, or N for none.
    """
    bins = probabilities.shape[-1]

    def mask_in_window(n: Tensor, top: Tensor, lines: Any) -> Tensor:
        box = ops.take(boxes, n, axis=1)[:, None]  # [B, 1, 4]
        shift = ops.cast(top, "float32")[:, None]
        rows = paste_weights(box[..., 0] - shift, box[..., 2] - shift, bins=bins, size=lines)[:, 0]  # [B, h, P]
        columns = paste_weights(box[..., 1], box[..., 3], bins=bins, size=width)[:, 0]  # [B, W, P]
        values = ops.matmul(ops.matmul(rows, ops.take(probabilities, n, axis=1)), ops.transpose(columns, (0, 2, 1)))
        return values >= 0.5

    return resolve_overlaps(
        used,
        *line_ranges(boxes, height),
        mask_in_window,
        height=height,
        width=width,
        overlap_threshold=overlap_threshold,
    )


def resolve_overlaps(
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
    """Assigns each pixel to one instance, in the order of the rows.

    An instance is dropped if earlier ones hold more than a share of its mask; otherwise it gets the free pixels.

    Args:
        used: bool [B, N], the instances that take part, the first rows of each image.
        first_line: int32 [B, N], first line of pixels that the mask may touch.
        last_line: int32 [B, N], the line after the last one.
        mask_in_window: From n, an int32 scalar, the first line of a window in each image, int32 [B], and its number of
            lines, L, to the window of the masks of row n, bool [B, L, W].
        height: H, height of the map, an int or an int32 scalar.
        width: W, its width.
        overlap_threshold: Largest share of a mask that earlier instances may hold.
        cost_in_window: If given, a pixel in several masks belongs to the instance of the lowest cost, the first one
            of equal costs: like `mask_in_window`, but float32.

    Returns:
        int32 [B, H, W]: the instance of each pixel, or N for none.
    """
    batch, num_instances = ops.shape(used)[0], used.shape[1]

    def assign(n: Tensor, top: Tensor, lines: Any, window: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        owner, *costs = window
        mask = mask_in_window(n, top, lines) & ops.take(used, n, axis=1)[:, None, None]  # [B, L, W]
        free = mask & (owner == num_instances)
        area = ops.cast(ops.sum(ops.cast(mask, "int32"), axis=(1, 2)), "float32")  # [B]
        taken = area - ops.cast(ops.sum(ops.cast(free, "int32"), axis=(1, 2)), "float32")  # [B]
        fits = (taken <= overlap_threshold * area)[:, None, None]
        number = ops.cast(n, "int16")
        if cost_in_window is None:
            return (ops.where(free & fits, number, owner),)
        (least,) = costs
        cost_here = cost_in_window(n, top, lines)
        wins = fits & (free | (mask & (cost_here < least)))
        return ops.where(wins, number, owner), ops.where(wins, cost_here, least)

    # int16 halves the memory traffic; the masks of more than 32767 instances would not fit into memory anyway.
    maps = [ops.full((batch, height, width), num_instances, "int16")]
    if cost_in_window is not None:
        maps.append(ops.full((batch, height, width), float("inf"), "float32"))
    owner = update_in_windows(maps, assign, used, first_line, last_line, height=height, width=width)[0]
    return ops.cast(owner, "int32")


def update_in_windows(
    maps: Sequence[Tensor],
    update: Callable[[Tensor, Tensor, Any, tuple[Tensor, ...]], tuple[Tensor, ...]],
    used: Tensor,
    first_line: Tensor,
    last_line: Tensor,
    *,
    height: Any,
    width: Any,
) -> tuple[Tensor, ...]:
    """Updates maps for one instance after the other, each in a window of whole lines that holds the instance.

    Args:
        maps: The maps before the first instance, [B, H, W] each.
        update: From n, an int32 scalar, the first line of a window in each image, int32 [B], its number of lines, L,
            and the windows of the maps, [B, L, W] each, to the windows after instance n. It also runs for images in
            which row n is not used.
        used: bool [B, N], the instances that take part. The time grows with the last one that does in any image.
        first_line: int32 [B, N], first line of pixels that the instance may change.
        last_line: int32 [B, N], the line after the last one.
        height: H, height of the maps, an int or an int32 scalar.
        width: W, their width.

    Returns:
        The maps after the last instance.
    """
    batch, num_instances = ops.shape(used)[0], used.shape[1]
    num_steps = ops.max(ops.where(ops.any(used, axis=0), ops.arange(num_instances) + 1, 0))
    # The smallest of a few heights that holds the instance in every image.
    lines_needed = ops.max(ops.where(used, last_line - first_line, 0), axis=0)  # [N]
    window_heights = [-(-height // divisor) for divisor in _WINDOW_DIVISORS]
    window_index = sum(ops.cast(lines_needed > lines, "int32") for lines in window_heights[:-1])  # [N]

    def update_window(lines: Any, n: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        top = ops.minimum(ops.take(first_line, n, axis=1), height - lines)  # [B]
        index = (ops.arange(batch) * height + top)[:, None] + ops.arange(lines)[None, :]  # [B, L]
        index = ops.reshape(index, (-1,))  # [B * L]
        before = tuple(ops.reshape(ops.take(each, index, axis=0), (batch, lines, width)) for each in maps)  # [B, L, W]
        after = update(n, top, lines, before)
        return tuple(
            ops.scatter_update(each, index[:, None], ops.reshape(window, (batch * lines, width)))  # [B * H, W]
            for each, window in zip(maps, after, strict=True)
        )

    windows = [functools.partial(update_window, lines) for lines in window_heights]

    def step(n: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        return n + 1, *ops.switch(ops.take(window_index, n), windows, n, *maps)

    flat = [ops.reshape(each, (batch * height, width)) for each in maps]  # [B * H, W]
    _, *flat = ops.while_loop(lambda n, *_: n < num_steps, step, (ops.array(0, "int32"), *flat))
    return tuple(ops.reshape(each, (batch, height, width)) for each in flat)  # [B, H, W]


def line_ranges(boxes: Tensor, height: Any) -> tuple[Tensor, Tensor]:
    """Returns the first line that each box touches and the line after the last: int32 [B, N] each, in 0..height."""
    limit = ops.cast(height, "float32")
    # Clipped before the cast, because a side far away would overflow an integer.
    first, last = (ops.clip(side, 0.0, limit) for side in (ops.floor(boxes[..., 0]), ops.ceil(boxes[..., 2])))
    return ops.cast(first, "int32"), ops.cast(last, "int32")


def paste_weights(start: Tensor, end: Tensor, *, bins: int, size: Any) -> Tensor:
    """Returns the matrix that interpolates a mask along one axis, from its bins to the pixels of the image.

    Args:
        start: float32 [B, N], where the boxes start along the axis, in image pixels.
        end: float32 [B, N], where they end.
        bins: Values of a mask along the axis, P.
        size: Pixels of the image along the axis, S.

    Returns:
        float32 [B, N, S, P]. The center of each pixel reads the two nearest bins, with zeros beyond the outer ones.
    """
    pixel = ops.cast(ops.arange(size), "float32") + 0.5
    length = ops.maximum(end - start, 1e-6)[..., None]
    position = (pixel - start[..., None]) / length * bins - 0.5  # [B, N, S]
    return ops.maximum(1.0 - ops.abs(position[..., None] - ops.arange(bins, dtype="float32")), 0.0)
