"""Deformable convolution (Dai et al., ICCV 2017), also modulated (Zhu et al., "Deformable ConvNets v2", CVPR 2019)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from deeplab2_like.model.config import Norm
from deeplab2_like.model.layers import Tensor, make_norm
from deeplab2_like.model.stages import compute_after


class DeformableConvNorm(keras.layers.Layer):
    """Convolution whose taps move: a second convolution tells each tap at each position where to look, and how much.

    The second convolution (`offset`) has three outputs for each tap: first the offsets (dy, dx) of tap after tap, row
    by row, in pixels of the input; then for each tap the logit of a factor in 0..1, its modulation. With the default
    initialiser the layer starts as a plain convolution, halved; without modulation, which leaves out the third output,
    as a plain one. The map is read bilinearly, with zeros around it. Positions and modulations are float32 at any
    precision.

    Args:
        filters: Output channels.
        kernel_size: Height and width, odd.
        strides: Stride of both axes.
        dilation: Atrous rate of both axes; 1 if there is a stride.
        modulated: Whether each tap has a factor, too.
        norm: The normalisation; None for none, which adds a bias.
        activation: Name of a Keras activation, or None.
        initializer: Initialiser of the kernel.
        offset_initializer: Initialiser of the kernel of the second convolution.

    Input shape: float [B, H, W, C]. Output shape: float [B, ceil(H / strides), ceil(W / strides), filters].
    """

    def __init__(
        self,
        filters: int,
        kernel_size: int,
        *,
        strides: int = 1,
        dilation: int = 1,
        modulated: bool = True,
        norm: Norm | None = None,
        activation: str | None = "relu",
        initializer: str | keras.initializers.Initializer = "he_normal",
        offset_initializer: str | keras.initializers.Initializer = "zeros",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.filters = filters
        self.kernel_size = kernel_size
        self.strides = strides
        self.dilation = dilation
        self.initializer = keras.initializers.get(initializer)
        self.margin = dilation * (kernel_size - 1) // 2
        self.pad = keras.layers.ZeroPadding2D(self.margin, name="pad", dtype="float32")
        self.offset = keras.layers.Conv2D(
            (3 if modulated else 2) * kernel_size**2,
            kernel_size,
            strides=strides,
            dilation_rate=dilation,
            kernel_initializer=offset_initializer,
            dtype="float32",
            name="offset",
        )
        self.norm = make_norm(norm, "norm", filters)
        self.activation = keras.activations.get(activation) if activation else None

    def build(self, input_shape: tuple[int | None, ...]) -> None:
        """Creates the kernel, and the bias if there is no normalisation."""
        self.kernel = self.add_weight(
            shape=(self.kernel_size, self.kernel_size, input_shape[-1], self.filters),
            initializer=self.initializer,
            name="kernel",
        )
        self.bias = None
        if self.norm is None:
            self.bias = self.add_weight(shape=(self.filters,), initializer="zeros", name="bias")

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies the block."""
        x = deformable_convolution(
            inputs, self.offset(self.pad(inputs)), self.kernel, strides=self.strides, dilation=self.dilation
        )
        if self.bias is not None:
            x = x + ops.cast(self.bias, x.dtype)
        if self.norm is not None:
            has_statistics = isinstance(self.norm, keras.layers.BatchNormalization)
            x = self.norm(x, training=training) if has_statistics else self.norm(x)
        return self.activation(x) if self.activation is not None else x


def deformable_convolution(inputs: Tensor, offset: Tensor, kernel: Tensor, *, strides: int, dilation: int) -> Tensor:
    """Adds up the taps of a kernel, each read where its offset points to.

    One tap is read after the other, and the gradient reads all of them again: nothing of a tap is kept.

    Args:
        inputs: float [B, H, W, C].
        offset: float32 [B, h, w, 3 * K * K]: (dy, dx) of each tap, then the modulation logit of each; or, without
            modulation, [B, h, w, 2 * K * K].
        kernel: float [K, K, C, filters].
        strides: Stride of both axes.
        dilation: Atrous rate of both axes.

    Returns:
        float [B, h, w, filters], of the type of the inputs.
    """
    size, channels, filters = kernel.shape[0], kernel.shape[2], kernel.shape[3]
    margin = dilation * (size - 1) // 2
    batch, height, width = ops.shape(offset)[:3]
    row = ops.cast(ops.arange(height) * strides - margin, "float32")[None, :, None]
    column = ops.cast(ops.arange(width) * strides - margin, "float32")[None, None, :]
    taps = size * size
    is_modulated = offset.shape[-1] == 3 * taps
    # Where each tap is read and what it is multiplied by.
    y, x, factor = [], [], []
    for tap in range(taps):
        y.append(offset[..., 2 * tap] + row + float(tap // size * dilation))  # [B, h, w]
        x.append(offset[..., 2 * tap + 1] + column + float(tap % size * dilation))
        factor.append(ops.sigmoid(offset[..., 2 * taps + tap]) if is_modulated else ops.ones_like(y[-1]))
    points = [ops.reshape(ops.stack(values), (taps, batch, height * width)) for values in (y, x, factor)]
    kernels = ops.reshape(ops.cast(kernel, inputs.dtype), (taps, channels, filters))
    total = _add_up_taps(inputs, kernels, *points)
    return ops.reshape(total, (batch, height, width, filters))  # [B, h, w, filters]


@ops.custom_gradient
def _add_up_taps(
    inputs: Tensor, kernels: Tensor, y: Tensor, x: Tensor, factor: Tensor
) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """Adds up T taps.

    Args:
        inputs: float [B, H, W, C].
        kernels: float [T, C, F].
        y: For each tap the argument of `read_bilinear`, float32 [T, B, P], like the next two.
        x: The same.
        factor: The same.

    Returns:
        The sum, float [B, P, F], and the function of its gradient.
    """
    taps, channels, filters = kernels.shape
    number = ops.shape(y)[1:]  # B, P

    def add(tap: Tensor, total: Tensor) -> Tensor:
        read = read_bilinear(inputs, compute_after(total, y[tap]), x[tap], factor[tap])
        return total + ops.matmul(read, kernels[tap])

    total = ops.fori_loop(0, taps, add, ops.zeros((*number, filters), inputs.dtype))

    def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        change = args[0] if upstream is None else upstream  # [B, P, F]
        batch, height, width = ops.shape(inputs)[:3]
        flat = ops.reshape(inputs, (batch * height * width, channels))

        def add(tap: Tensor, sums: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            to_flat, to_kernels, *to_points = sums
            of_read = ops.matmul(change, ops.transpose(compute_after(to_flat, kernels[tap])))  # [B, P, C]
            read = ops.zeros_like(of_read)
            # TensorFlow turns sums of several terms into one operation, which fails in loops: hence these lists, and
            # the waiting for `read`.
            to_y, to_x, to_factor = [], [], []
            for corner in range(4):
                neighbour = _neighbour(compute_after(to_flat, y[tap]), x[tap], (batch, height, width), corner)
                values = ops.take(flat, compute_after(read, neighbour.index), axis=0)  # [B, P, C]
                share = (neighbour.along_y * neighbour.along_x * factor[tap])[..., None]  # [B, P, 1]
                read = read + values * ops.cast(share, values.dtype)
                agreement = ops.sum(ops.cast(values * of_read, "float32"), axis=-1)  # [B, P]
                to_y.append(agreement * neighbour.change_along_y * neighbour.along_x)
                to_x.append(agreement * neighbour.along_y * neighbour.change_along_x)
                to_factor.append(agreement * neighbour.along_y * neighbour.along_x)
                to_flat = to_flat + ops.segment_sum(
                    ops.reshape(ops.cast(of_read, "float32") * share, (-1, channels)),
                    ops.reshape(neighbour.index, (-1,)),
                    num_segments=batch * height * width,
                )
            by_channel = ops.transpose(ops.reshape(read, (-1, channels)))  # [C, B * P]
            to_kernel = ops.matmul(by_channel, ops.reshape(change, (-1, filters)))  # [C, F]
            to_y, to_x, to_factor = (ops.sum(ops.stack(terms), axis=0) for terms in (to_y, to_x, to_factor))
            # Each tap fills a row of its own.
            is_row = (ops.arange(taps) == tap)[:, None, None]
            of_tap = (to_kernel, to_y * factor[tap], to_x * factor[tap], to_factor)
            rows = (to_kernels, *to_points)
            return to_flat, *(ops.where(is_row, new, old) for new, old in zip(of_tap, rows, strict=True))

        nothing = [ops.zeros_like(values) for values in (kernels, y, x, factor)]
        to_flat, *to_others = ops.fori_loop(0, taps, add, (ops.zeros_like(flat, "float32"), *nothing))
        return ops.reshape(ops.cast(to_flat, inputs.dtype), ops.shape(inputs)), *to_others

    return total, gradient


def read_bilinear(values: Tensor, y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Reads a map between its pixels, with zeros around it.

    Args:
        values: float [B, H, W, C].
        y: float32 [B, P], row of each point; whole numbers are the centres of pixels.
        x: float32 [B, P], its column.
        factor: float32 [B, P], what the value is multiplied by.

    Returns:
        float [B, P, C], of the type of the map.
    """
    batch, height, width = ops.shape(values)[:3]
    flat = ops.reshape(values, (batch * height * width, values.shape[-1]))
    result = ops.zeros((*ops.shape(y), values.shape[-1]), values.dtype)
    for corner in range(4):
        # Waiting keeps this from becoming one operation, which fails in the loop over the taps; see `_add_up_taps`.
        neighbour = _neighbour(compute_after(result, y), x, (batch, height, width), corner)
        share = ops.cast(neighbour.along_y * neighbour.along_x * factor, values.dtype)[..., None]  # [B, P, 1]
        result = result + ops.take(flat, neighbour.index, axis=0) * share
    return result


class _Neighbour(NamedTuple):
    """One of the four pixels around each point, [B, P] each.

    Attributes:
        index: int32, its place among the pixels of all images; any, if it is outside.
        along_y: float32, its weight along y, zero if it is outside.
        along_x: The same along x.
        change_along_y: float32, how the weight changes with y.
        change_along_x: The same along x.
    """

    index: Tensor
    along_y: Tensor
    along_x: Tensor
    change_along_y: Tensor
    change_along_x: Tensor


def _neighbour(y: Tensor, x: Tensor, sizes: tuple[Any, Any, Any], corner: int) -> _Neighbour:
    """One neighbour, 0 to 3, row by row, of points float32 [B, P] in a map of which `sizes` are B, H and W."""
    batch, height, width = sizes
    row, along_y, change_along_y = _side(y, height, corner // 2)
    column, along_x, change_along_x = _side(x, width, corner % 2)
    first = ops.arange(batch)[:, None] * (height * width)  # [B, 1]
    return _Neighbour(first + row * width + column, along_y, along_x, change_along_y, change_along_x)


def _side(position: Tensor, size: Any, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """The pixel before (0) or after (1) a position on one axis, its weight, and how that changes; [B, P] each."""
    # Beyond one pixel outside nothing is read; the limit keeps huge offsets from overflowing an integer.
    position = ops.clip(position, -2.0, ops.cast(size, "float32") + 1.0)
    before = ops.floor(position)
    part = position - before
    pixel = ops.cast(before, "int32") + step
    is_inside = ops.cast((pixel >= 0) & (pixel < size), "float32")
    weight = part if step else 1.0 - part
    return ops.clip(pixel, 0, size - 1), is_inside * weight, is_inside * (2 * step - 1)
