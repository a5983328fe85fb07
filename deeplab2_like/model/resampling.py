"""Padding, resizing and pooling of maps.

Resizing has half-pixel centers: a pixel is a square, and the borders of the squares at the edges of both maps coincide.
With `aligned_corners`, a pixel is a point, and the first and the last points of both maps coincide: a map of `w` values
is upsampled by `factor` to `(w - 1) * factor + 1`.

Sizes may be unknown while a graph is traced. Each function marked `stage` may be compiled on its own, see
`deeplab2_like.model.stages`.
"""

from collections.abc import Callable
from typing import Any

from keras import ops

from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import stage


def scaled_side(side: int, scale: float, *, aligned_corners: bool = False) -> int:
    """Scales a side, at least to 1 pixel; with `aligned_corners`, the distance between its first and last pixel."""
    return int((side - 1) * scale + 1) if aligned_corners else max(1, round(side * scale))


def pad_to_multiple(images: Tensor, multiple: int, *, remainder: int = 0, min_size: tuple[int, int] = (1, 1)) -> Tensor:
    """Pads with zeros at the bottom and at the right.

    Args:
        images: float [B, H, W, C].
        multiple: Divisor of the new height and width.
        remainder: Remainder of this division: the new sides are `multiple * k + remainder`.
        min_size: Smallest height and width before that.

    Returns:
        float [B, H', W', C].
    """
    height, width = ops.shape(images)[1:3]
    margins = []
    for side, min_side in zip((height, width), min_size, strict=True):
        enough = max(side, min_side) if isinstance(side, int) else ops.maximum(side, min_side)
        margins.append([0, enough - side + (remainder - enough) % multiple])
    return ops.pad(images, [[0, 0], *margins, [0, 0]])


def resized_positions(size: Any, scale: Any, *, aligned_corners: bool = False) -> Tensor:
    """Returns where the pixels of a resized axis lie in the original one.

    Args:
        size: N, pixels of the resized axis, an int or an int32 scalar.
        scale: Original pixels per resized pixel, a float or a float32 scalar.
        aligned_corners: Whether the first pixels of both axes coincide, instead of their borders.

    Returns:
        float32 [N], where 0 is the center of the first original pixel.
    """
    pixels = ops.cast(ops.arange(size), "float32")
    return pixels * scale if aligned_corners else (pixels + 0.5) * scale - 0.5


def resizing_scale(old: Any, new: Any, *, aligned_corners: bool = False) -> Tensor:
    """Returns the `scale` of `resized_positions` that resizes an axis from `old` to `new` pixels, float32."""
    old, new = (ops.cast(side, "float32") for side in (old, new))
    return (old - 1) / ops.maximum(new - 1, 1.0) if aligned_corners else old / new


def phase_weights(factor: int, *, aligned_corners: bool = False) -> list[tuple[int, float]]:
    """Returns the interpolation weights of bilinear upsampling by a whole factor.

    Fine pixel `factor * i + phase` lies at the coarse coordinate `i + (phase + 0.5) / factor - 0.5`; with aligned
    corners, at `i + phase / factor`.

    Args:
        factor: Fine pixels per coarse pixel.
        aligned_corners: See the module.

    Returns:
        For each phase: the offset (-1 or 0) of the first of the two coarse neighbors, and the second one's weight.
    """
    weights = []
    for phase in range(factor):
        position = phase / factor if aligned_corners else (phase + 0.5) / factor - 0.5
        first = -1 if position < 0 else 0
        weights.append((first, position - first))
    return weights


def upsample_bilinear(x: Tensor, factor: int, *, aligned_corners: bool = False) -> Tensor:
    """Upsamples bilinearly by a whole factor, with a repeated border.

    Args:
        x: float [B, h, w, C].
        factor: Fine pixels per coarse pixel, at least 1.
        aligned_corners: See the module.

    Returns:
        float [B, h * factor, w * factor, C]; with aligned corners, [B, (h - 1) * factor + 1, (w - 1) * factor + 1, C].
    """
    if factor == 1:
        return x

    # A custom gradient, as automatic differentiation makes a map of zeros for each slice and adds them all up.
    @ops.custom_gradient
    def interpolate(x: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        channels = x.shape[-1]
        batch, height, width = ops.shape(x)[:3]
        rows = ops.stack(interpolated_rows(x, factor, aligned_corners=aligned_corners), axis=2)  # [B, h, factor, w, C]
        rows = ops.reshape(rows, (batch, height * factor, width, channels))  # [B, h * factor, w, C]
        both = ops.stack(
            interpolated_columns(rows, factor, aligned_corners=aligned_corners), axis=3
        )  # [B, h * factor, w, factor, C]
        both = ops.reshape(both, (batch, height * factor, width * factor, channels))  # [B, h * factor, w * factor, C]

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
            columns = args[0] if upstream is None else upstream
            columns = ops.reshape(columns, (batch, height * factor, width, factor, channels))
            rows = _gather_phases(
                ops.unstack(columns, factor, axis=3), aligned_corners, axis=2
            )  # [B, h * factor, w, C]
            rows = ops.reshape(rows, (batch, height, factor, width, channels))  # [B, h, factor, w, C]
            return _gather_phases(ops.unstack(rows, factor, axis=2), aligned_corners, axis=1)  # [B, h, w, C]

        return both, gradient

    upsampled = interpolate(x)
    # The last phases lie beyond the last value.
    return upsampled[:, : 1 - factor, : 1 - factor] if aligned_corners else upsampled


def _gather_phases(phases: list[Tensor], aligned_corners: bool, *, axis: int) -> Tensor:
    """Transposes the interpolation along an axis: adds up the shares of `factor` fine maps for each coarse pixel."""
    own, to_next = 0.0, 0.0
    to_previous = ops.zeros_like(phases[0]) if aligned_corners else 0.0
    for phase, (first, weight) in zip(phases, phase_weights(len(phases), aligned_corners=aligned_corners), strict=True):
        if first < 0:
            to_previous, own = to_previous + (1 - weight) * phase, own + weight * phase
        else:
            own, to_next = own + (1 - weight) * phase, to_next + weight * phase
    cut = [slice(None)] * axis

    def slices(tensor: Tensor, start: int | None, stop: int | None) -> Tensor:
        return tensor[(*cut, slice(start, stop))]

    # Shares beyond the border belong to the border pixel, which was repeated there.
    from_next = ops.concatenate([slices(to_previous, 1, None), slices(to_next, -1, None)], axis=axis)
    from_previous = ops.concatenate([slices(to_previous, None, 1), slices(to_next, None, -1)], axis=axis)
    return own + from_next + from_previous


def interpolated_rows(x: Tensor, factor: int, *, aligned_corners: bool = False) -> list[Tensor]:
    """Interpolates between the rows of x for each phase of `phase_weights`: `factor` maps of [B, h, w, C]."""
    above, below = _neighbors(x, 1)
    weights = phase_weights(factor, aligned_corners=aligned_corners)
    return [_blend(above, x, w) if first < 0 else _blend(x, below, w) for first, w in weights]


def interpolated_columns(x: Tensor, factor: int, *, aligned_corners: bool = False) -> list[Tensor]:
    """Interpolates between the columns of x for each phase of `phase_weights`: `factor` maps of [B, h, w, C]."""
    left, right = _neighbors(x, 2)
    weights = phase_weights(factor, aligned_corners=aligned_corners)
    return [_blend(left, x, w) if first < 0 else _blend(x, right, w) for first, w in weights]


def _neighbors(x: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Returns the maps of the previous and of the next value along an axis, with a repeated border."""
    cut = [slice(None)] * axis
    first, last = x[(*cut, slice(None, 1))], x[(*cut, slice(-1, None))]
    previous = ops.concatenate([first, x[(*cut, slice(None, -1))]], axis=axis)
    return previous, ops.concatenate([x[(*cut, slice(1, None))], last], axis=axis)


def minimum_around(x: Tensor, radius: int) -> Tensor:
    """Returns the smallest value within `radius` rows and columns: float [B, h, w, C] to the same shape."""
    for axis in (1, 2) * radius:
        previous, following = _neighbors(x, axis)
        x = ops.minimum(x, ops.minimum(previous, following))
    return x


def _blend(first: Tensor, second: Tensor, weight: float) -> Tensor:
    return first + weight * (second - first) if weight else first


def linear_matrix(old: Any, new: Any, scale: Any, *, aligned_corners: bool = False) -> Tensor:
    """Returns the matrix that resizes one axis linearly, with a repeated border.

    Args:
        old: Length of the axis, an int or an int32 scalar.
        new: Length after resizing, an int or an int32 scalar.
        scale: Old values per new value, a float or a float32 scalar.
        aligned_corners: See the module.

    Returns:
        float32 [new, old].
    """
    position = resized_positions(new, scale, aligned_corners=aligned_corners)
    position = ops.clip(position, 0.0, ops.cast(old - 1, "float32"))
    distance = ops.abs(position[:, None] - ops.cast(ops.arange(old), "float32")[None, :])
    return ops.maximum(1.0 - distance, 0.0)


def resize_bilinear(x: Tensor, height: Any, width: Any, *, aligned_corners: bool = False) -> Tensor:
    """Resizes bilinearly to any size, without antialiasing.

    Unlike `ops.image.resize`, it accepts sizes that are known only when the graph runs.

    Args:
        x: float [B, h, w, C].
        height: New height, an int or an int32 scalar.
        width: New width, an int or an int32 scalar.
        aligned_corners: See the module.

    Returns:
        float [B, height, width, C].
    """
    for axis, size in ((1, height), (2, width)):
        scale = resizing_scale(ops.shape(x)[axis], size, aligned_corners=aligned_corners)
        x = interpolate_axis(x, resized_positions(size, scale, aligned_corners=aligned_corners), axis=axis)
    return x


def interpolate_axis(x: Tensor, position: Tensor, *, axis: int) -> Tensor:
    """Interpolates linearly along an axis; beyond the border, the border is repeated.

    Args:
        x: float [B, h, w, C].
        position: float32 [N], coordinates of pixel centers: 0 is the center of the first pixel.
        axis: 1 or 2.

    Returns:
        float [B, N, w, C] or [B, h, N, C].
    """
    old = ops.shape(x)[axis]
    position = ops.clip(position, 0.0, ops.cast(old - 1, "float32"))
    first = ops.cast(ops.floor(position), "int32")
    second = ops.minimum(first + 1, old - 1)
    weight = ops.cast(position - ops.floor(position), x.dtype)
    weight = ops.reshape(weight, (1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1))
    return ops.take(x, first, axis=axis) * (1 - weight) + ops.take(x, second, axis=axis) * weight


def upsample_to_image(
    x: Tensor,
    image_size: tuple[Any, Any],
    *,
    stride: int,
    network_size: tuple[Any, Any] | None = None,
    aligned_corners: bool = False,
) -> Tensor:
    """Upsamples a map of the network by its stride, crops it to the network size, and resizes it to the image size.

    Args:
        x: float [B, h, w, C].
        image_size: Height H and width W of the image, without padding.
        stride: Network pixels per value.
        network_size: Size to which the image was resized for the network, without padding; None if it was not.
        aligned_corners: See the module.

    Returns:
        float [B, H, W, C].
    """
    if network_size is None:
        return upsample_bilinear(x, stride, aligned_corners=aligned_corners)[:, : image_size[0], : image_size[1]]
    # Axis by axis, as the map at the network size may be several times as large as the image.
    for axis, network_side, image_side in zip((1, 2), network_size, image_size, strict=True):
        x = interpolate_axis(x, resized_positions(network_side, 1 / stride, aligned_corners=aligned_corners), axis=axis)
        scale = resizing_scale(network_side, image_side, aligned_corners=aligned_corners)
        x = interpolate_axis(x, resized_positions(image_side, scale, aligned_corners=aligned_corners), axis=axis)
    return x


def average_pool_within(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Averages every full window with stride 1; a window larger than the map is cropped to it.

    Unlike `ops.average_pool`, it accepts maps whose size is known only when the graph runs.

    Args:
        x: float [B, h, w, C].
        window: Height and width of the window.

    Returns:
        float32 [B, h - window height + 1, w - window width + 1, C].
    """
    x = ops.cast(x, "float32")
    for axis, size in enumerate(window, start=1):
        size = min(size, x.shape[axis]) if x.shape[axis] is not None else ops.minimum(size, ops.shape(x)[axis])
        margins = [[0, 0]] * 4
        margins[axis] = [1, 0]
        total = ops.pad(ops.cumsum(x, axis=axis), margins)
        windows = total[:, size:] - total[:, :-size] if axis == 1 else total[:, :, size:] - total[:, :, :-size]
        x = windows / ops.cast(size, "float32")
    return x


def upsampling_matrix(
    cells: Any, network_side: Any, image_side: Any, *, stride: int, aligned_corners: bool = False
) -> Tensor:
    """Returns the matrix that upsamples one axis of a feature map to the image.

    It upsamples by the stride, crops to the network size, and resizes to the image size, each bilinearly.

    Args:
        cells: Cells of the feature map along the axis, c, an int or an int32 scalar.
        network_side: Network pixels along the axis, without padding; None if the image is not resized.
        image_side: Image pixels along the axis, S.
        stride: Network pixels per cell.
        aligned_corners: See the module.

    Returns:
        float32 [S, c].
    """
    if network_side is None:
        return linear_matrix(cells, image_side, 1 / stride, aligned_corners=aligned_corners)
    scale = resizing_scale(network_side, image_side, aligned_corners=aligned_corners)
    return ops.matmul(
        linear_matrix(network_side, image_side, scale, aligned_corners=aligned_corners),
        linear_matrix(cells, network_side, 1 / stride, aligned_corners=aligned_corners),
    )


def upsample(values: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Upsamples a map by matrices.

    Args:
        values: float32 [B, h, w].
        rows: `upsampling_matrix` of the rows, float32 [H, h], or [B, H, h] if it differs between the images.
        columns: `upsampling_matrix` of the columns, float32 [W, w], or [B, W, w].

    Returns:
        float32 [B, H, W].
    """
    return ops.matmul(ops.matmul(rows, values), ops.swapaxes(columns, -1, -2))


def upsample_window(
    values: Tensor, channel: Tensor, top: Tensor, left: Tensor, *, height: Any, width: Any, stride: int
) -> Tensor:
    """Upsamples one channel of a map bilinearly by a whole factor, only a window of it; the border is repeated.

    Args:
        values: float32 [B, C, h, w].
        channel: int32 [B].
        top: int32 [B], the first line of the window in the upsampled map.
        left: int32 [B], its first column, a multiple of the stride.
        height: L, lines of the window.
        width: K, columns of the window, a multiple of the stride.
        stride: Upsampled pixels per value.

    Returns:
        float32 [B, L, K].
    """
    batch, num_channels, rows, columns = ops.shape(values)
    # The cells that the window is interpolated from.
    first_row = (2 * top + 1 - stride) // (2 * stride)  # [B], of the cell center at or before the first line.
    row = first_row[:, None] + ops.arange((height - 1) // stride + 3)  # [B, r]
    column = left[:, None] // stride - 1 + ops.arange(width // stride + 2)  # [B, K / s + 2]
    row = ops.clip(row, 0, rows - 1) + ((ops.arange(batch) * num_channels + channel) * rows)[:, None]
    index = row[:, :, None] * columns + ops.clip(column, 0, columns - 1)[:, None]  # [B, r, K / s + 2]
    cells = ops.take(ops.reshape(values, (-1,)), index)

    position = (ops.cast(top[:, None] + ops.arange(height), "float32") + 0.5) / stride - 0.5  # [B, L]
    first = ops.floor(position)
    weight = (position - first)[..., None]
    first = ops.cast(first, "int32") - first_row[:, None]
    above, below = take_rows(cells, first), take_rows(cells, first + 1)  # [B, L, K / s + 2]
    phases = interpolated_columns(above + weight * (below - above), stride)  # s x [B, L, K / s + 2]
    phases = ops.stack([phase[:, :, 1:-1] for phase in phases], axis=3)  # [B, L, K / s, s]
    return ops.reshape(phases, (batch, height, width))  # [B, L, K]


def running_argmax(
    plane: Callable[[Tensor], Tensor], first: Any, last: Any, best: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor]:
    """Finds the best plane of each pixel, computing one plane after the other, as all together would not fit in memory.

    Args:
        plane: Function from the index of a plane, an int32 scalar, to its values, float32 [B, H, W].
        first: The first index.
        last: The index after the last one.
        best: The best values so far, float32 [B, H, W], and their indices, int32 [B, H, W].

    Returns:
        The best values and their indices; of equal values the earliest.
    """

    def compare(index: Tensor, best: Tensor, best_index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        values = plane(index)
        return index + 1, ops.maximum(best, values), ops.where(values > best, index, best_index)

    start = (ops.cast(first, "int32"), *best)
    _, value, best_index = ops.while_loop(lambda index, *_: index < last, compare, start)
    return value, best_index


def upsampled_argmax(
    values: Tensor,
    image_size: tuple[Any, Any],
    *,
    stride: int,
    network_size: tuple[Any, Any] | None = None,
    aligned_corners: bool = False,
) -> Tensor:
    """Finds the best class of every pixel of bilinearly upsampled values, without holding them at full resolution.

    Args:
        values: float32 [B, h, w, C], logits or probabilities.
        image_size: Height H and width W of the image, without padding.
        stride: Network pixels per value.
        network_size: Size to which the image was resized for the network, without padding; None if it was not.
        aligned_corners: See the module.

    Returns:
        int32 [B, H, W].
    """
    height, width = image_size
    if network_size is None:
        return _argmax_by_phases(values, height=height, width=width, stride=stride, aligned_corners=aligned_corners)
    return _argmax_by_planes(
        values,
        network_height=network_size[0],
        network_width=network_size[1],
        height=height,
        width=width,
        stride=stride,
        aligned_corners=aligned_corners,
    )


@stage
def _argmax_by_phases(logits: Tensor, *, height: Any, width: Any, stride: int, aligned_corners: bool) -> Tensor:
    """`upsampled_argmax` by a whole factor."""
    return best_by_phases(logits, height=height, width=width, stride=stride, aligned_corners=aligned_corners)[1]


def best_by_phases(
    values: Tensor, *, height: Any, width: Any, stride: int, aligned_corners: bool = False
) -> tuple[Tensor, Tensor]:
    """Finds the best channel of every pixel of a map that is upsampled bilinearly by a whole factor.

    Each phase of the upsampling is a map of the coarse size.

    Args:
        values: float32 [B, h, w, C].
        height: H, lines of the upsampled map to keep.
        width: W, its columns.
        stride: Upsampled pixels per value.
        aligned_corners: See the module.

    Returns:
        The value of the best channel, float32 [B, H, W], and its number, int32 [B, H, W], the first one of equal
        values.
    """
    batch, coarse_height, coarse_width = ops.shape(values)[:3]
    num_channels = values.shape[-1]

    def best_of(phase: Tensor) -> tuple[Tensor, Tensor]:
        # An argmax as two plain reductions: XLA runs them four times as fast on a CPU.
        best = ops.max(phase, axis=-1, keepdims=True)
        channel = ops.min(ops.where(phase == best, ops.arange(num_channels), num_channels - 1), axis=-1)
        return best[..., 0], channel

    def join(phases: list[list[Tensor]]) -> Tensor:
        lines = []
        for row in phases:
            line = ops.stack(row, axis=3)  # [B, h, w, s]
            lines.append(ops.reshape(line, (batch, coarse_height, coarse_width * stride)))  # [B, h, w * s]
        joined = ops.stack(lines, axis=2)  # [B, h, s, w * s]
        joined = ops.reshape(joined, (batch, coarse_height * stride, coarse_width * stride))  # [B, h * s, w * s]
        return joined[:, :height, :width]

    best = [
        [best_of(phase) for phase in interpolated_columns(row, stride, aligned_corners=aligned_corners)]
        for row in interpolated_rows(values, stride, aligned_corners=aligned_corners)
    ]
    value, channel = (join([[pair[part] for pair in row] for row in best]) for part in (0, 1))
    return value, channel


@stage
def _argmax_by_planes(
    logits: Tensor,
    *,
    network_height: Any,
    network_width: Any,
    height: Any,
    width: Any,
    stride: int,
    aligned_corners: bool,
) -> Tensor:
    """`upsampled_argmax` to any size."""
    coarse_height, coarse_width = ops.shape(logits)[1:3]
    options: dict[str, Any] = {"stride": stride, "aligned_corners": aligned_corners}
    rows = upsampling_matrix(coarse_height, network_height, height, **options)  # [H, h]
    columns = upsampling_matrix(coarse_width, network_width, width, **options)  # [W, w]
    return best_by_planes(logits, rows, columns)[1]


def best_by_planes(values: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the best channel of every pixel of a map that is upsampled to any size, one channel after the other.

    Args:
        values: float32 [B, h, w, C].
        rows: float32 [H, h], of `upsampling_matrix`.
        columns: float32 [W, w].

    Returns:
        See `best_by_phases`.
    """
    planes = ops.transpose(values, (3, 0, 1, 2))  # [C, B, h, w]
    size = tuple(ops.shape(part)[0] for part in (values, rows, columns))
    lowest = ops.full(size, -1e30, "float32"), ops.zeros(size, "int32")
    return running_argmax(
        lambda index: upsample(ops.take(planes, index, axis=0), rows, columns), 0, values.shape[-1], lowest
    )
