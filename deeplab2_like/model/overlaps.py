"""Resolution of overlaps: each pixel goes to one of the instances whose masks contain it, in static shapes.

A *line* is a row of pixels; a *row* is a row of the table of instances.

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.stages`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from keras import ops

from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import stage

# Columns per block. Windows start and end between blocks, as copying blocks is faster than copying pixels.
BLOCK = 64
# The sizes of windows: the number of lines and the number of blocks of the map are divided by these. Each size is a
# loop to compile. The smallest come first.
WINDOW_DIVISORS = ((8, 8), (4, 4), (2, 2), (1, 4), (1, 1))


class Window(NamedTuple):
    """A part of a map, at its own place in each image.

    It may extend beyond the right border of the map, as the width of the map need not be a multiple of `BLOCK`.

    Attributes:
        top: int32 [B], the first line.
        left: int32 [B], the first column, a multiple of `BLOCK`.
        height: L, number of lines, an int or an int32 scalar.
        width: K, number of columns, a multiple of `BLOCK`, an int or an int32 scalar.
    """

    top: Tensor
    left: Tensor
    height: Any
    width: Any

    @property
    def lines(self) -> Tensor:
        """The lines of the map in the window, int32 [B, L]."""
        return self.top[:, None] + ops.arange(self.height)

    @property
    def columns(self) -> Tensor:
        """The columns of the map in the window, int32 [B, K]; those beyond the border have numbers, too."""
        return self.left[:, None] + ops.arange(self.width)

    def shift(self, boxes: Tensor) -> Tensor:
        """Moves boxes, float32 [B, N, 4], from the map to the window."""
        corner = ops.cast(ops.stack([self.top, self.left, self.top, self.left], axis=-1), "float32")
        return boxes - corner[:, None]

    def read(self, maps: Tensor, image: Tensor) -> Tensor:
        """Reads the window from maps.

        Args:
            maps: [M, H, blocks, BLOCK], of `split_into_blocks`.
            image: int32 [B], the map to read for each image.

        Returns:
            [B, L, K].
        """
        num_maps, height, num_blocks = ops.shape(maps)[:3]
        blocks = ops.reshape(maps, (num_maps * height * num_blocks, BLOCK))
        return self.read_blocks(blocks, self.block_index(image, height, num_blocks))

    def block_index(self, image: Tensor, height: Any, num_blocks: Any) -> Tensor:
        """Returns the blocks of the window, int32 [B * L * blocks], in maps of `height` lines of `num_blocks` blocks.

        Args:
            image: int32 [B], the map of each image.
            height: Lines of the maps.
            num_blocks: Blocks per line of the maps.
        """
        line = image[:, None] * height + self.lines  # [B, L]
        block = self.left[:, None] // BLOCK + ops.arange(self.width // BLOCK)  # [B, blocks]
        return ops.reshape(line[:, :, None] * num_blocks + block[:, None, :], (-1,))

    def read_blocks(self, blocks: Tensor, index: Tensor) -> Tensor:
        """Reads the window, [B, L, K], from the blocks of maps, [M, BLOCK], by `block_index`."""
        return ops.reshape(ops.take(blocks, index, axis=0), (ops.shape(self.top)[0], self.height, self.width))


def split_into_blocks(maps: Tensor) -> Tensor:
    """Pads the columns of maps with zeros and splits them into blocks: [M, H, W] to [M, H, blocks, BLOCK]."""
    num_maps, height, width = ops.shape(maps)
    num_blocks = -(-width // BLOCK)
    maps = ops.pad(maps, [[0, 0], [0, 0], [0, num_blocks * BLOCK - width]])
    return ops.reshape(maps, (num_maps, height, num_blocks, BLOCK))  # [M, H, blocks, BLOCK]


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

    def mask_in_window(n: Tensor, window: Window) -> Tensor:
        box = window.shift(ops.take(boxes, n, axis=1)[:, None])  # [B, 1, 4]
        rows = paste_weights(box[..., 0], box[..., 2], bins=bins, size=window.height)[:, 0]  # [B, L, P]
        columns = paste_weights(box[..., 1], box[..., 3], bins=bins, size=window.width)[:, 0]  # [B, K, P]
        values = ops.matmul(ops.matmul(rows, ops.take(probabilities, n, axis=1)), ops.transpose(columns, (0, 2, 1)))
        return values >= 0.5

    return resolve_overlaps(
        used,
        pixel_bounds(boxes, height, width),
        mask_in_window,
        height=height,
        width=width,
        overlap_threshold=overlap_threshold,
    )


def resolve_overlaps(
    used: Tensor,
    bounds: Tensor,
    mask_in_window: Callable[[Tensor, Window], Tensor],
    *,
    height: Any,
    width: Any,
    overlap_threshold: float,
    cost_in_window: Callable[[Tensor, Window], Tensor] | None = None,
) -> Tensor:
    """Assigns each pixel to one instance, in the order of the rows.

    An instance is dropped if earlier ones hold more than a share of its mask; otherwise it gets the free pixels.

    Args:
        used: bool [B, N], the instances that take part, the first rows of each image.
        bounds: int32 [B, N, 4], the pixels that the mask may touch, see `pixel_bounds`.
        mask_in_window: From n, an int32 scalar, and a window to this window of the masks of row n, bool [B, L, K].
            Values beyond the map do not matter.
        height: H, height of the map, an int or an int32 scalar.
        width: W, its width.
        overlap_threshold: Largest share of a mask that earlier instances may hold.
        cost_in_window: If given, a pixel in several masks belongs to the instance of the lowest cost, the first one
            of equal costs: like `mask_in_window`, but float32.

    Returns:
        int32 [B, H, W]: the instance of each pixel, or N for none.
    """
    batch, num_instances = ops.shape(used)[0], used.shape[1]

    def assign(n: Tensor, window: Window, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        owner, *costs = parts
        is_valid = ops.take(used, n, axis=1)[:, None] & (window.columns < width)  # [B, K]
        mask = mask_in_window(n, window) & is_valid[:, None]  # [B, L, K]
        free = mask & (owner == num_instances)
        area = ops.cast(ops.sum(ops.cast(mask, "int32"), axis=(1, 2)), "float32")  # [B]
        taken = area - ops.cast(ops.sum(ops.cast(free, "int32"), axis=(1, 2)), "float32")  # [B]
        fits = (taken <= overlap_threshold * area)[:, None, None]
        number = ops.cast(n, "int16")
        if cost_in_window is None:
            return (ops.where(free & fits, number, owner),)
        (least,) = costs
        cost_here = cost_in_window(n, window)
        wins = fits & (free | (mask & (cost_here < least)))
        return ops.where(wins, number, owner), ops.where(wins, cost_here, least)

    # int16 halves the memory traffic; the masks of more than 32767 instances would not fit into memory anyway.
    maps = [ops.full((batch, height, width), num_instances, "int16")]
    if cost_in_window is not None:
        maps.append(ops.full((batch, height, width), float("inf"), "float32"))
    owner = update_in_windows(maps, assign, used, bounds)[0]
    return ops.cast(owner, "int32")


def update_in_windows(
    maps: Sequence[Tensor],
    update: Callable[[Tensor, Window, tuple[Tensor, ...]], tuple[Tensor, ...]],
    used: Tensor,
    bounds: Tensor,
) -> tuple[Tensor, ...]:
    """Updates maps for one instance after the other, each in a window that holds the instance.

    Args:
        maps: The maps before the first instance, [B, H, W] each.
        update: From n, an int32 scalar, a window, and this window of the maps, [B, L, K] each, to the window of the
            maps after instance n. It also runs for images in which row n is not used.
        used: bool [B, N], the instances that take part. The time grows with the last one that does in any image.
        bounds: int32 [B, N, 4], the pixels that the instance may change, see `pixel_bounds`.

    Returns:
        The maps after the last instance.
    """
    batch, height, width = ops.shape(maps[0])
    num_blocks = -(-width // BLOCK)
    num_instances = used.shape[1]
    num_steps = ops.max(ops.where(ops.any(used, axis=0), ops.arange(num_instances) + 1, 0))
    first_line, first_column, last_line, last_column = ops.unstack(bounds, 4, axis=-1)  # 4 x [B, N]
    first_block = first_column // BLOCK
    # The smallest of a few sizes that holds the instance in every image.
    lines_needed = ops.max(ops.where(used, last_line - first_line, 0), axis=0)  # [N]
    blocks_needed = ops.max(ops.where(used, -(-last_column // BLOCK) - first_block, 0), axis=0)  # [N]
    sizes = [(-(-height // lines), -(-num_blocks // blocks)) for lines, blocks in WINDOW_DIVISORS]
    holds = ops.stack([(lines_needed <= lines) & (blocks_needed <= blocks) for lines, blocks in sizes])
    size_index = ops.cast(ops.argmax(ops.cast(holds, "int32"), axis=0), "int32")  # [N], the first that does.

    def update_window(lines: Any, blocks: Any, n: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        top = ops.minimum(ops.take(first_line, n, axis=1), height - lines)  # [B]
        left = ops.minimum(ops.take(first_block, n, axis=1), num_blocks - blocks) * BLOCK  # [B]
        window = Window(top, left, lines, blocks * BLOCK)
        index = window.block_index(ops.arange(batch), height, num_blocks)  # [B * L * blocks]
        after = update(n, window, tuple(window.read_blocks(each, index) for each in maps))
        return n + 1, *(
            ops.scatter_update(each, index[:, None], ops.reshape(part, (-1, BLOCK)))  # [B * H * blocks, BLOCK]
            for each, part in zip(maps, after, strict=True)
        )

    def step(n: Tensor, *maps: Tensor) -> tuple[Tensor, ...]:
        # A loop for each size, over the instances of this size that come next: XLA updates the maps of a loop in
        # place, but copies those of a branch.
        for index, size in enumerate(sizes):
            has_size = functools.partial(is_next, index)
            n, *maps = ops.while_loop(has_size, functools.partial(update_window, *size), (n, *maps))
        return n, *maps

    def is_next(index: int, n: Tensor, *_: Tensor) -> Tensor:
        return (n < num_steps) & (ops.take(size_index, ops.minimum(n, num_instances - 1)) == index)

    flat = [ops.reshape(split_into_blocks(each), (-1, BLOCK)) for each in maps]  # [B * H * blocks, BLOCK]
    _, *flat = ops.while_loop(lambda n, *_: n < num_steps, step, (ops.array(0, "int32"), *flat))
    padded = (ops.reshape(each, (batch, height, num_blocks * BLOCK)) for each in flat)  # [B, H, blocks * BLOCK]
    return tuple(each[:, :, :width] for each in padded)


def pixel_bounds(boxes: Tensor, height: Any, width: Any) -> Tensor:
    """Returns the pixels that each box touches.

    Args:
        boxes: float32 [B, N, 4], in pixels of the map.
        height: Height of the map, an int or an int32 scalar.
        width: Its width.

    Returns:
        int32 [B, N, 4]: the first line and column, and the line and column after the last, inside of the map.
    """
    limit = ops.stack([ops.cast(side, "float32") for side in (height, width)])
    # Clipped before the cast, because a side far away would overflow an integer.
    first = ops.clip(ops.floor(boxes[..., :2]), 0.0, limit)
    last = ops.clip(ops.ceil(boxes[..., 2:]), 0.0, limit)
    return ops.cast(ops.concatenate([first, last], axis=-1), "int32")


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
