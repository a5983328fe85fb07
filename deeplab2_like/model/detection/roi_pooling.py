"""RoIAlign (He et al. 2017) over a feature pyramid, in static shapes.

All levels are concatenated in one table of feature pixels, so boxes of all levels are pooled in the same way.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from keras import ops

from deeplab2_like.model.boxes import box_area
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import compute_after, stage

# A box of this side belongs to level 4 (Lin et al. 2017, section 4.2).
_CANONICAL_SIDE = 224.0
_CANONICAL_LEVEL = 4
# Feature values per image that adaptive sampling reads at once, 64 MB of float32.
_VALUES_AT_ONCE = 2**24


def roi_align(
    pyramid: Mapping[str, Tensor],
    strides: Mapping[str, int],
    boxes: Tensor,
    *,
    output_size: int,
    sampling_ratio: int = 2,
    max_sampling_ratio: int = 8,
) -> Tensor:
    """Averages features over the bins of each box, on the level for boxes of its size.

    Coordinates are aligned: the center of feature pixel 0 lies at `stride / 2`. A sample more than one feature pixel
    outside of the map is zero; nearer ones repeat the border. The gradient of a fixed number of samples holds
    `2 * sampling_ratio * P * P` feature vectors per box at a time: 100 MB for 512 boxes, 7 bins, 256 channels.

    Args:
        pyramid: float [B, h, w, C] per level, fine to coarse, strides doubling.
        strides: Image pixels per feature pixel, for at least the levels of `pyramid`.
        boxes: float32 [B, R, 4] in image pixels, without gradient. Unused rows may hold anything finite.
        output_size: Bins along each axis, P.
        sampling_ratio: Samples per bin and axis. 0 takes one per feature pixel that the bin spans, rounded up, as
            Detectron2 does by default.
        max_sampling_ratio: Limit of that number if it depends on the box: results are exact for boxes of up to
            `output_size * max_sampling_ratio` feature pixels on their level; for longer ones that many pixels are read
            at equal distances. Along the shorter side the limit is 16 at most.

    Returns:
        float [B, R, P, P, C] in the type of the features.
    """
    boxes = ops.stop_gradient(boxes)
    table, height, width, base, scale = _locate(pyramid, strides, boxes)
    place = (table, height, width, base)
    ends = (boxes[..., :2] * scale[..., None], boxes[..., 2:] * scale[..., None])
    if sampling_ratio:
        return _pool_samples(*place, *ends, bins=output_size, samples=sampling_ratio)
    return _pool_pixels(*place, *ends, bins=output_size, limit=max_sampling_ratio)


@stage
def _pool_samples(
    table: Tensor, height: Tensor, width: Tensor, base: Tensor, start: Tensor, end: Tensor, *, bins: int, samples: int
) -> Tensor:
    """RoIAlign with a fixed number of samples: adds up the 2 x 2 pixels around each of them.

    Args:
        table: float [rows, C], as `_locate` returns it and the next three.
        height: int32 [B, R].
        width: int32 [B, R].
        base: int32 [B, R].
        start: float32 [B, R, 2], (y, x) in feature pixels.
        end: float32 [B, R, 2].
        bins: P.
        samples: G.

    Returns:
        float [B, R, P, P, C].
    """

    def axis(k: int, size: Tensor) -> tuple[Tensor, Tensor]:
        """Coordinates and weights, [B, R, P, 2 G]."""
        first, near, far = axis_samples(start[..., k], end[..., k], size, bins, samples, samples)
        second = ops.minimum(first + 1, size[..., None, None] - 1)
        return ops.concatenate([first, second], axis=-1), ops.concatenate([near, far], axis=-1)

    rows, row_weights = axis(0, height)
    columns, column_weights = axis(1, width)
    rows = base[..., None, None] + rows * width[..., None, None]  # The table row of the first pixel of each row.
    taps = 2 * samples

    # The gradient is written out, as automatic differentiation would keep all features that were read.
    @ops.custom_gradient
    def pool(table: Tensor) -> tuple[Tensor, Any]:
        # Always in float32, as it is a sum of many values.
        pooled = ops.zeros((*ops.shape(rows)[:2], bins, bins, table.shape[-1]), "float32")
        for i in range(taps):
            for j in range(taps):
                index = compute_after(pooled, rows)[..., :, None, i] + columns[..., None, :, j]  # [B, R, P, P]
                weight = row_weights[..., :, None, i] * column_weights[..., None, :, j]
                features = ops.cast(ops.take(table, index, axis=0), "float32")  # [B, R, P, P, C]
                pooled = pooled + features * weight[..., None]

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
            pooled = ops.cast(args[0] if upstream is None else upstream, "float32")
            total = ops.zeros(ops.shape(table), "float32")
            for i in range(taps):
                row = compute_after(total, rows)[..., :, None, None, i]  # [B, R, P, 1, 1]
                index = row + columns[..., None, :, :]  # [B, R, P, P, 2 G]
                weight = row_weights[..., :, None, None, i] * column_weights[..., None, :, :]
                values = pooled[..., None, :] * weight[..., None]  # [B, R, P, P, 2 G, C]
                values = ops.reshape(values, (-1, table.shape[-1]))
                total = total + ops.segment_sum(values, ops.reshape(index, (-1,)), num_segments=ops.shape(table)[0])
            return ops.cast(total, table.dtype)

        return ops.cast(pooled, table.dtype), gradient

    return pool(table)


def _pool_pixels(
    table: Tensor, height: Tensor, width: Tensor, base: Tensor, start: Tensor, end: Tensor, *, bins: int, limit: int
) -> Tensor:
    """RoIAlign with one sample per feature pixel of a box: every pixel is read once.

    Interpolation is separable, so two small matrix products turn the pixels of a box into its bins. Shapes are static,
    so boxes are pooled in groups by the samples that they need, as few boxes need many. A few boxes are pooled at a
    time, as the features they read take far more memory than the result.

    Args:
        table: As for `_pool_samples`, like the others up to `bins`.
        height: int32 [B, R].
        width: int32 [B, R].
        base: int32 [B, R].
        start: float32 [B, R, 2].
        end: float32 [B, R, 2].
        bins: P.
        limit: The largest number of samples per bin and axis.

    Returns:
        float [B, R, P, P, C].
    """
    batch, rois = ops.shape(height)[:2]
    number, channels = batch * rois, table.shape[-1]
    places = [ops.reshape(values, (number,)) for values in (height, width, base)]
    ends = [ops.reshape(values, (number, 2)) for values in (start, end)]
    groups = _sample_limits(limit)
    group = _first_group(ops.ceil((ends[1] - ends[0]) / bins), groups)  # [N]
    # Group after group: what is read beyond the end of a group belongs to later ones.
    order = ops.argsort(group * number + ops.arange(number))
    stops = [ops.sum(ops.cast(group <= index, "int32")) for index in range(len(groups))]

    def for_each_part(add: Callable[..., Tensor], total: Tensor) -> Tensor:
        """Computes `total = add(total, chosen, is_member, ...)` for a few boxes at a time."""
        for index, limits in enumerate(groups):
            first, stop = stops[index - 1] if index else 0, stops[index]
            taps = [bins * samples + 2 for samples in limits]
            # Features that a box reads, and the weights of its samples, which are more if there are few channels.
            values = taps[0] * taps[1] * channels, bins * (limits[0] * taps[0] + limits[1] * taps[1])
            size = max(1, _VALUES_AT_ONCE // max(values))

            def step(i: Tensor, total: Tensor, first: Any = first, stop: Any = stop, size: int = size) -> Tensor:
                position = first + i * size + ops.arange(size)
                chosen = ops.take(order, ops.minimum(position, number - 1), axis=0)
                return add(total, chosen, position < stop, *read(chosen))

            def read(chosen: Tensor, limits: tuple[int, int] = limits) -> tuple[Tensor, Tensor, Tensor]:
                """Returns table rows, int32 [size, T, U], and the weights of rows and columns, [size, P, T] and U."""
                height, width, base, start, end = (ops.take(x, chosen, axis=0)[None] for x in (*places, *ends))
                rows, row_weights = _pixels(start[..., 0], end[..., 0], height, bins=bins, limit=limits[0])
                columns, column_weights = _pixels(start[..., 1], end[..., 1], width, bins=bins, limit=limits[1])
                rows = base[..., None] + rows * width[..., None]  # The table row of the first pixel of each row.
                return rows[0, :, :, None] + columns[0, :, None, :], row_weights[0], column_weights[0]

            total = ops.fori_loop(0, -((first - stop) // size), step, total)
        return total

    # The gradient is written out, as automatic differentiation would keep all features that were read.
    @ops.custom_gradient
    def pool(table: Tensor) -> tuple[Tensor, Any]:
        def add(pooled: Tensor, chosen: Tensor, _: Tensor, index: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
            size, height, width = index.shape
            features = ops.reshape(ops.take(table, index, axis=0), (size, height, width * channels))  # [size, T, U * C]
            features = ops.matmul(ops.cast(rows, features.dtype), features)  # [size, P, U * C]
            features = ops.reshape(features, (size, bins, width, channels))  # [size, P, U, C]
            features = ops.matmul(ops.cast(columns, features.dtype)[:, None], features)  # [size, P, P, C]
            return ops.scatter_update(pooled, chosen[:, None], features)

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
            d_pooled = ops.cast(args[0] if upstream is None else upstream, "float32")  # [N, P, P, C]

            def add(
                total: Tensor, chosen: Tensor, is_member: Tensor, index: Tensor, rows: Tensor, columns: Tensor
            ) -> Tensor:
                size, height, width = index.shape
                values = ops.take(d_pooled, chosen, axis=0) * ops.cast(is_member, "float32")[:, None, None, None]
                values = ops.reshape(values, (size, bins, bins * channels))  # [size, P, P * C]
                values = ops.matmul(ops.transpose(rows, (0, 2, 1)), values)  # [size, T, P * C]
                values = ops.reshape(values, (size, height, bins, channels))  # [size, T, P, C]
                values = ops.matmul(ops.transpose(columns, (0, 2, 1))[:, None], values)  # [size, T, U, C]
                values = ops.reshape(values, (size * height * width, channels))  # [size * T * U, C]
                index = ops.reshape(index, (size * height * width,))
                return total + ops.segment_sum(values, index, num_segments=ops.shape(table)[0])

            total = for_each_part(add, ops.zeros(ops.shape(table), "float32"))
            return ops.cast(total, table.dtype)

        return for_each_part(add, ops.zeros((number, bins, bins, channels), table.dtype)), gradient

    return ops.reshape(pool(table), (batch, rois, bins, bins, channels))


def _sample_limits(limit: int) -> list[tuple[int, int]]:
    """Returns the largest numbers of samples per bin along y and x of each group of boxes.

    The level of a box depends on its area, so of the boxes with many samples most are long along one axis only.
    """
    groups: list[tuple[int, int]] = []
    for rows, columns in ((4, 4), (8, 8), (limit, 4), (4, limit), (16, 16)):
        limits = min(rows, limit), min(columns, limit)
        if not any(limits[0] <= before[0] and limits[1] <= before[1] for before in groups):
            groups.append(limits)
    return groups


def _first_group(samples: Tensor, groups: Sequence[tuple[int, int]]) -> Tensor:
    """Returns the first group that has the samples which a box needs, or else the last one.

    Args:
        samples: float32 [N, 2], samples per bin along y and x.
        groups: Result of `_sample_limits`.

    Returns:
        int32 [N].
    """
    group = ops.full(ops.shape(samples)[:1], len(groups) - 1, "int32")
    for index in reversed(range(len(groups) - 1)):
        is_enough = ops.all(samples <= ops.array(groups[index], "float32"), axis=-1)
        group = ops.where(is_enough, index, group)
    return group


def assign_levels(boxes: Tensor, *, first: int, last: int) -> Tensor:
    """Returns the pyramid level of each box by the root of its area, int32 [...], first..last (stride 2 ** level)."""
    level = ops.floor(_CANONICAL_LEVEL + ops.log2(ops.sqrt(box_area(boxes)) / _CANONICAL_SIDE + 1e-8))
    return ops.cast(ops.clip(level, first, last), "int32")


def _locate(
    pyramid: Mapping[str, Tensor], strides: Mapping[str, int], boxes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Concatenates all features in one table [rows, C], and locates the level of each box in it.

    Returns:
        The table; height and width of each box's level, int32 [B, R]; the table row of the level's first pixel, int32
        [B, R]; feature pixels per image pixel, float32 [B, R].
    """
    channels = next(iter(pyramid.values())).shape[-1]
    batch = ops.shape(boxes)[0]
    table = ops.concatenate([ops.reshape(x, (-1, channels)) for x in pyramid.values()], axis=0)
    sizes = [ops.shape(x)[1:3] for x in pyramid.values()]
    heights = ops.stack([ops.convert_to_tensor(h, "int32") for h, _ in sizes])  # [L]
    widths = ops.stack([ops.convert_to_tensor(w, "int32") for _, w in sizes])
    pixels = heights * widths
    starts = (ops.cumsum(pixels) - pixels) * batch

    first = round(math.log2(strides[next(iter(pyramid))]))
    position = assign_levels(boxes, first=first, last=first + len(pyramid) - 1) - first  # [B, R]

    def of_level(values: Tensor) -> Tensor:
        return ops.take(values, position, axis=0)

    image = ops.arange(batch, dtype="int32")[:, None]
    scale = ops.array([1.0 / strides[level] for level in pyramid], "float32")
    return table, of_level(heights), of_level(widths), of_level(starts) + image * of_level(pixels), of_level(scale)


def axis_samples(
    start: Tensor, end: Tensor, size: Tensor, bins: int, sampling_ratio: int, max_sampling_ratio: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pixels around each sample of RoIAlign along one axis, and their weights.

    Args:
        start: float32 [B, R], where the box starts along the axis, in pixels of the map.
        end: float32 [B, R].
        size: int32 [B, R], pixels of the map along the axis.
        bins: Bins along the axis, P.
        sampling_ratio: See `roi_align`; the result has G = `sampling_ratio` samples per bin.
        max_sampling_ratio: See `roi_align`; G where `sampling_ratio` is 0.

    Returns:
        The pixel at or before each sample, int32 [B, R, P, G], 0..size - 1; the weight of that pixel and the weight of
        the next one, float32 [B, R, P, G]. The weights of a bin add up to 1, or less if samples lie outside of the map.
        The next pixel has weight 0 if it would lie outside.
    """
    samples = sampling_ratio or max_sampling_ratio
    bin_size = (end - start) / bins  # [B, R]
    if sampling_ratio:
        count = ops.full_like(bin_size, float(sampling_ratio))
    else:
        count = ops.clip(ops.ceil(bin_size), 1.0, float(max_sampling_ratio))
    sample = ops.arange(samples, dtype="float32")
    inside_bin = (sample + 0.5) / count[..., None]  # [B, R, G]
    place = ops.arange(bins, dtype="float32")[:, None] + inside_bin[..., None, :]  # [B, R, P, G]
    position = start[..., None, None] - 0.5 + place * bin_size[..., None, None]

    limit = ops.cast(size, "float32")[..., None, None]
    used = (position >= -1.0) & (position <= limit) & (sample < count[..., None])[..., None, :]
    position = ops.clip(position, 0.0, limit - 1)
    before = ops.floor(position)
    share = position - before
    weight = ops.where(used, 1.0, 0.0) / count[..., None, None]
    return ops.cast(before, "int32"), (1 - share) * weight, share * weight


def _pixels(start: Tensor, end: Tensor, size: Tensor, *, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """Returns the pixels of a box along one axis, and the matrix that turns them into bins; see `axis_samples`.

    Returns:
        int32 [B, R, T] coordinates and float32 [B, R, P, T] weights, T = P * limit + 2. Of a
        longer box T pixels are read, at equal distances.
    """
    first, near, far = axis_samples(start, end, size, bins, 0, limit)
    last = size[..., None] - 1  # [B, R, 1]
    number = bins * limit + 2
    pixel = ops.arange(number, dtype="float32")
    total = near + far  # [B, R, P, G]
    inside = total > 0
    position = ops.cast(first, "float32") + far / ops.maximum(total, 1e-6)
    begin = ops.min(ops.where(inside, ops.cast(first, "float32"), 1e9), axis=(2, 3))
    begin = ops.minimum(begin, ops.cast(last[..., 0], "float32"))[..., None]  # [B, R, 1]
    step = ops.maximum(1.0, (end - start)[..., None] / (number - 2))
    place = (position - begin[..., None]) / step[..., None]  # [B, R, P, G], in pixels that are read
    weights = ops.maximum(1.0 - ops.abs(place[..., None] - pixel), 0.0) * total[..., None]  # [B, R, P, G, T]
    coordinates = ops.cast(begin + pixel * step, "int32")  # [B, R, T]
    return ops.minimum(coordinates, last), ops.sum(weights, axis=3)
