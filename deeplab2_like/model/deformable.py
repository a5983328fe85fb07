"""Deformable convolution (Dai et al., ICCV 2017), also modulated (Zhu et al., "Deformable ConvNets v2", CVPR 2019)."""

from collections.abc import Callable

import keras
from keras import ops

from deeplab2_like.model.layers import Norm, Tensor


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
        self.norm = norm.layer("norm", filters) if norm is not None else None
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

    One tap is done after the other, and no more of it is kept for the gradient than what the tap has read.

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
    kernel = ops.cast(kernel, inputs.dtype)
    is_modulated = offset.shape[-1] == 3 * size * size
    total: Tensor = 0.0
    for tap in range(size * size):
        y = offset[..., 2 * tap] + row + float(tap // size * dilation)  # [B, h, w]
        x = offset[..., 2 * tap + 1] + column + float(tap % size * dilation)
        modulation = ops.sigmoid(offset[..., 2 * size * size + tap]) if is_modulated else ops.ones_like(y)
        flat = [ops.reshape(values, (batch, height * width)) for values in (y, x, modulation)]  # each [B, h * w]
        read = read_bilinear(inputs, *flat)  # [B, h * w, C]
        total = total + ops.matmul(read, ops.reshape(kernel[tap // size, tap % size], (channels, filters)))
    return ops.reshape(total, (batch, height, width, filters))  # [B, h, w, filters]


def read_bilinear(values: Tensor, y: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Reads a map between its pixels, with zeros around it.

    Differentiable in all arguments; the gradient reads the map again instead of keeping the neighbours of each point.

    Args:
        values: float [B, H, W, C].
        y: float32 [B, P], row of each point; whole numbers are the centres of pixels.
        x: float32 [B, P], its column.
        factor: float32 [B, P], what the value is multiplied by.

    Returns:
        float [B, P, C], of the type of the map.
    """

    @ops.custom_gradient
    def read(values: Tensor, y: Tensor, x: Tensor, factor: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, ...]]]:
        batch, height, width = ops.shape(values)[:3]
        channels = values.shape[-1]
        points = ops.shape(y)[1]
        flat = ops.reshape(values, (batch * height * width, channels))
        # Beyond one pixel outside nothing is read; the limit keeps huge offsets from overflowing an integer.
        y = ops.clip(y, -2.0, ops.cast(height, "float32") + 1.0)
        x = ops.clip(x, -2.0, ops.cast(width, "float32") + 1.0)
        top, left = ops.floor(y), ops.floor(x)
        y_weight, x_weight = y - top, x - left  # Of the lower and of the right neighbours.
        first_row, first_column = ops.cast(top, "int32"), ops.cast(left, "int32")

        # For each neighbour: its index, whether it is inside, its weights along both axes, and their signs.
        neighbours = []
        for down in (0, 1):
            for right in (0, 1):
                r, c = first_row + down, first_column + right
                inside = (r >= 0) & (r < height) & (c >= 0) & (c < width)
                index = ops.clip(r, 0, height - 1) * width + ops.clip(c, 0, width - 1)
                index = index + ops.arange(batch)[:, None] * (height * width)  # [B, P]
                along_y = y_weight if down else 1.0 - y_weight
                along_x = x_weight if right else 1.0 - x_weight
                neighbours.append((index, ops.cast(inside, "float32"), along_y, along_x, 2 * down - 1, 2 * right - 1))

        def weighted(share: Tensor) -> Tensor:
            return ops.cast(share, values.dtype)[..., None]  # [B, P, 1]

        result: Tensor = 0.0
        for index, inside, along_y, along_x, _, _ in neighbours:
            result = result + ops.take(flat, index, axis=0) * weighted(inside * along_y * along_x * factor)

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
            change = args[0] if upstream is None else upstream  # [B, P, C]
            to_values: Tensor = 0.0
            to_y, to_x, to_factor = ops.zeros_like(y), ops.zeros_like(x), ops.zeros_like(factor)
            for index, inside, along_y, along_x, y_sign, x_sign in neighbours:
                product = ops.cast(ops.take(flat, index, axis=0) * change, "float32")
                agreement = inside * ops.sum(product, axis=-1)  # [B, P]
                to_y = to_y + y_sign * agreement * along_x
                to_x = to_x + x_sign * agreement * along_y
                to_factor = to_factor + agreement * along_y * along_x
                share = ops.cast(change, "float32") * (inside * along_y * along_x * factor)[..., None]
                to_values = to_values + ops.segment_sum(
                    ops.reshape(share, (batch * points, channels)),
                    ops.reshape(index, (-1,)),
                    num_segments=batch * height * width,
                )
            to_values = ops.reshape(ops.cast(to_values, values.dtype), (batch, height, width, channels))
            return to_values, to_y * factor, to_x * factor, to_factor

        return result, gradient

    return read(values, y, x, factor)
