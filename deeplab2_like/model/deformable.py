"""Deformable convolution (Dai et al., ICCV 2017), with modulation (Deformable ConvNets v2, Zhu et al., CVPR 2019)."""

from collections.abc import Callable
from typing import Any, NamedTuple

import keras
from keras import ops

from deeplab2_like.model.config import Norm
from deeplab2_like.model.layers import Tensor, apply_norm, make_norm
from deeplab2_like.model.stages import compute_after


class DeformableConvNorm(keras.layers.Layer):
    """Deformable convolution, normalization, activation.

    A second convolution (`offset`) predicts, at each position, the offset at which each tap of the kernel reads the
    input, and a factor of the value that it reads. Its outputs are first the offsets (dy, dx) of tap after tap, row by
    row, in pixels of the input; then, with modulation, the logit of the factor of each tap. By default all of them
    start at zero, so that the layer starts as a plain convolution, multiplied by one half if modulated. The input is
    read bilinearly, with zeros around it. Positions and factors are float32 at any precision.

    Args:
        filters: Output channels.
        kernel_size: Height and width, odd.
        strides: Stride of both axes.
        dilation: Atrous rate of both axes; 1 if there is a stride.
        modulated: Whether each tap has a factor.
        norm: The normalization; None for none, which adds a bias.
        activation: Name of a Keras activation, or None.
        initializer: Initializer of the kernel.
        offset_initializer: Initializer of the kernel of the second convolution.

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
        """Creates the kernel, and the bias if there is no normalization."""
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
            x = apply_norm(self.norm, x, training=training)
        return self.activation(x) if self.activation is not None else x


def deformable_convolution(inputs: Tensor, offset: Tensor, kernel: Tensor, *, strides: int, dilation: int) -> Tensor:
    """Convolves with a kernel whose taps read at offset positions.

    The taps are read one after the other, and the gradient reads them again, so that no tap is kept in memory.

    Args:
        inputs: float [B, H, W, C].
        offset: float32 [B, h, w, 3 * K * K]: (dy, dx) of each tap, then the logit of the factor of each tap; without
            modulation [B, h, w, 2 * K * K].
        kernel: float [K, K, C, filters].
        strides: Stride of both axes.
        dilation: Atrous rate of both axes.

    Returns:
        float [B, h, w, filters], with the dtype of the inputs.
    """
    size, channels, filters = kernel.shape[0], kernel.shape[2], kernel.shape[3]
    margin = dilation * (size - 1) // 2
    batch, height, width = ops.shape(offset)[:3]
    row = ops.cast(ops.arange(height) * strides - margin, "float32")[None, :, None]
    column = ops.cast(ops.arange(width) * strides - margin, "float32")[None, None, :]
    taps = size * size
    is_modulated = offset.shape[-1] == 3 * taps
    # Position and factor of each tap.
    y, x, factor = [], [], []
    for tap in range(taps):
        y.append(offset[..., 2 * tap] + row + float(tap // size * dilation))  # [B, h, w]
        x.append(offset[..., 2 * tap + 1] + column + float(tap % size * dilation))
        factor.append(ops.sigmoid(offset[..., 2 * taps + tap]) if is_modulated else ops.ones_like(y[-1]))
    points = [ops.reshape(ops.stack(values), (taps, batch, height * width)) for values in (y, x, factor)]
    kernels = ops.reshape(ops.cast(kernel, inputs.dtype), (taps, channels, filters))
    total = _sum_taps(inputs, kernels, *points)
    return ops.reshape(total, (batch, height, width, filters))  # [B, h, w, filters]


@ops.custom_gradient
def _sum_taps(
    inputs: Tensor, kernels: Tensor, y: Tensor, x: Tensor, factor: Tensor
) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
    """Reads the input at T taps, multiplies each by its kernel, and adds them.

    Args:
        inputs: float [B, H, W, C].
        kernels: float [T, C, F].
        y: float32 [T, B, P], rows of the points of each tap, see `read_bilinear`.
        x: float32 [T, B, P], their columns.
        factor: float32 [T, B, P], their factors.

    Returns:
        The sum, float [B, P, F], and the function that computes its gradient.
    """
    taps, channels, filters = kernels.shape
    batch_and_points = ops.shape(y)[1:]

    def add(tap: Tensor, total: Tensor) -> Tensor:
        read = read_bilinear(inputs, compute_after(total, y[tap]), x[tap], factor[tap])
        return total + ops.matmul(read, kernels[tap])

    total = ops.fori_loop(0, taps, add, ops.zeros((*batch_and_points, filters), inputs.dtype))

    def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
        d_total = args[0] if upstream is None else upstream  # [B, P, F]
        batch, height, width = ops.shape(inputs)[:3]
        flat = ops.reshape(inputs, (batch * height * width, channels))

        def add(tap: Tensor, gradients: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            d_flat, d_kernels, *d_points = gradients
            d_read = ops.matmul(d_total, ops.transpose(compute_after(d_flat, kernels[tap])))  # [B, P, C]
            read = ops.zeros_like(d_read)
            # TensorFlow merges sums of several terms into one operation, which fails in loops: hence the lists, and
            # `compute_after(read, ...)`.
            d_y, d_x, d_factor = [], [], []
            for corner in range(4):
                neighbor = _neighbor(compute_after(d_flat, y[tap]), x[tap], (batch, height, width), corner)
                values = ops.take(flat, compute_after(read, neighbor.index), axis=0)  # [B, P, C]
                weight = (neighbor.weight_y * neighbor.weight_x * factor[tap])[..., None]  # [B, P, 1]
                read = read + values * ops.cast(weight, values.dtype)
                product = ops.sum(ops.cast(values * d_read, "float32"), axis=-1)  # [B, P]
                d_y.append(product * neighbor.slope_y * neighbor.weight_x)
                d_x.append(product * neighbor.weight_y * neighbor.slope_x)
                d_factor.append(product * neighbor.weight_y * neighbor.weight_x)
                d_flat = d_flat + ops.segment_sum(
                    ops.reshape(ops.cast(d_read, "float32") * weight, (-1, channels)),
                    ops.reshape(neighbor.index, (-1,)),
                    num_segments=batch * height * width,
                )
            by_channel = ops.transpose(ops.reshape(read, (-1, channels)))  # [C, B * P]
            d_kernel = ops.matmul(by_channel, ops.reshape(d_total, (-1, filters)))  # [C, F]
            d_y, d_x, d_factor = (ops.sum(ops.stack(terms), axis=0) for terms in (d_y, d_x, d_factor))
            # Each tap writes its own row of the gradients.
            is_row = (ops.arange(taps) == tap)[:, None, None]
            d_tap = (d_kernel, d_y * factor[tap], d_x * factor[tap], d_factor)
            rows = (d_kernels, *d_points)
            return d_flat, *(ops.where(is_row, new, old) for new, old in zip(d_tap, rows, strict=True))

        start = [ops.zeros_like(values) for values in (kernels, y, x, factor)]
        d_flat, *others = ops.fori_loop(0, taps, add, (ops.zeros_like(flat, "float32"), *start))
        return ops.reshape(ops.cast(d_flat, inputs.dtype), ops.shape(inputs)), *others

    return total, gradient


def read_bilinear(values: Tensor, y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Reads a map between its pixels, with zeros around it.

    Args:
        values: float [B, H, W, C].
        y: float32 [B, P], row of each point; whole numbers are the centers of pixels.
        x: float32 [B, P], its column.
        factor: float32 [B, P], factor of the value.

    Returns:
        float [B, P, C], with the dtype of the map.
    """
    batch, height, width = ops.shape(values)[:3]
    flat = ops.reshape(values, (batch * height * width, values.shape[-1]))
    result = ops.zeros((*ops.shape(y), values.shape[-1]), values.dtype)
    for corner in range(4):
        # Without `compute_after`, TensorFlow would merge the sum into one operation, which fails in `_sum_taps`.
        neighbor = _neighbor(compute_after(result, y), x, (batch, height, width), corner)
        weight = ops.cast(neighbor.weight_y * neighbor.weight_x * factor, values.dtype)[..., None]  # [B, P, 1]
        result = result + ops.take(flat, neighbor.index, axis=0) * weight
    return result


class _Neighbor(NamedTuple):
    """One of the four pixels around each point, [B, P] each.

    Attributes:
        index: int32, its index among the pixels of all images; any pixel if it is outside.
        weight_y: float32, its weight along y, zero if it is outside.
        weight_x: float32, its weight along x.
        slope_y: float32, derivative of the weight with respect to y.
        slope_x: float32, derivative of the weight with respect to x.
    """

    index: Tensor
    weight_y: Tensor
    weight_x: Tensor
    slope_y: Tensor
    slope_x: Tensor


def _neighbor(y: Tensor, x: Tensor, sizes: tuple[Any, Any, Any], corner: int) -> _Neighbor:
    """Returns one neighbor of points in a map.

    Args:
        y: float32 [B, P], rows of the points.
        x: float32 [B, P], their columns.
        sizes: B, H and W of the map.
        corner: Which neighbor, 0 to 3, row by row.
    """
    batch, height, width = sizes
    row, weight_y, slope_y = _axis_neighbor(y, height, corner // 2)
    column, weight_x, slope_x = _axis_neighbor(x, width, corner % 2)
    first = ops.arange(batch)[:, None] * (height * width)  # [B, 1]
    return _Neighbor(first + row * width + column, weight_y, weight_x, slope_y, slope_x)


def _axis_neighbor(position: Tensor, size: Any, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the pixel before (0) or after (1) a position on an axis, its weight and its slope, [B, P] each."""
    # All weights are zero beyond one pixel outside; the limits keep large offsets from overflowing an integer.
    position = ops.clip(position, -2.0, ops.cast(size, "float32") + 1.0)
    before = ops.floor(position)
    fraction = position - before
    pixel = ops.cast(before, "int32") + step
    is_inside = ops.cast((pixel >= 0) & (pixel < size), "float32")
    weight = fraction if step else 1.0 - fraction
    return ops.clip(pixel, 0, size - 1), is_inside * weight, is_inside * (2 * step - 1)
