"""Building blocks that several systems and backbones share.

Everything is `keras.ops` and Keras layers; sizes may be unknown while a graph is traced.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import keras
import pydantic
from keras import ops

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.errors import UserError

Tensor = Any  # A tensor of whichever backend Keras runs on.
_Function = TypeVar("_Function", bound=Callable[..., Any])


class Norm(StrictModel):
    """Which normalisation follows a convolution.

    Attributes:
        kind: `batch`; `sync_batch` (statistics over all replicas; plain `batch` where the backend has no replicas);
            `frozen_batch` (stored statistics, nothing trained); `group` (32 groups; all channels must be multiples of
            32); `none`.
        momentum: Share of the old running mean that a training step keeps.
        epsilon: Added to the variance.
    """

    kind: Literal["batch", "sync_batch", "frozen_batch", "group", "none"] = "sync_batch"
    momentum: float = pydantic.Field(0.99, ge=0, lt=1)
    epsilon: float = pydantic.Field(1e-3, gt=0)

    def layer(self, name: str, channels: int | None = None) -> keras.layers.Layer | None:
        """Builds the layer for so many channels (None if they are not known yet), or returns None for `none`.

        Raises:
            UserError: If the channels cannot be divided into 32 groups.
        """
        if self.kind == "none":
            return None
        if self.kind == "group":
            if channels is not None and channels % 32:
                raise UserError(
                    f"Group normalisation divides channels into 32 groups, so {channels} channels do not fit; make "
                    "them a multiple of 32, or set `kind` of that norm to batch or none."
                )
            return keras.layers.GroupNormalization(groups=32, epsilon=self.epsilon, name=name)
        # Only the TensorFlow backend knows replicas; elsewhere `synchronized` raises.
        synchronized = self.kind == "sync_batch" and keras.backend.backend() == "tensorflow"
        return keras.layers.BatchNormalization(
            momentum=self.momentum,
            epsilon=self.epsilon,
            synchronized=synchronized,
            trainable=self.kind != "frozen_batch",
            name=name,
        )


class ConvNorm(keras.layers.Layer):
    """Convolution, normalisation, activation.

    Padding is symmetric, `dilation * (kernel_size - 1) / 2` zeros on every side, at any stride. TensorFlow's own
    "same" pads a strided convolution at the far side only, which would shift features of imported weights by a pixel.

    Args:
        filters: Output channels; for a depthwise convolution None, as it keeps the channels of its input.
        kernel_size: Height and width, odd.
        strides: Stride of both axes.
        dilation: Atrous rate of both axes.
        depthwise: Whether every channel has a filter of its own.
        groups: Groups of channels that have filters of their own.
        norm: The normalisation; None for none, which adds a bias.
        activation: Name of a Keras activation, or None.
        initializer: Name of a Keras initialiser of the kernel, or the initialiser; not for depthwise convolutions.

    Input shape: float [B, H, W, C]. Output shape: float [B, ceil(H / strides), ceil(W / strides), filters].
    """

    def __init__(
        self,
        filters: int | None,
        kernel_size: int,
        *,
        strides: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
        groups: int = 1,
        norm: Norm | None = None,
        activation: str | None = "relu",
        initializer: str | keras.initializers.Initializer = "he_normal",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        margin = dilation * (kernel_size - 1) // 2
        self.pad = keras.layers.ZeroPadding2D(margin, name="pad") if strides > 1 and margin else None
        self.norm = norm.layer("norm", filters) if norm is not None else None
        options: dict[str, Any] = {
            "kernel_size": kernel_size,
            "strides": strides,
            "dilation_rate": dilation,
            "padding": "same" if self.pad is None else "valid",
            "use_bias": self.norm is None,
            "name": "conv",
        }
        self.conv: keras.layers.Layer
        if depthwise:
            # Keras counts all channels as fan-in of a depthwise kernel; each output sees one.
            depthwise_initializer = keras.initializers.RandomNormal(stddev=(2.0 / kernel_size**2) ** 0.5)
            self.conv = keras.layers.DepthwiseConv2D(**options, depthwise_initializer=depthwise_initializer)
        else:
            layer = GroupedConv2D if groups > 1 else keras.layers.Conv2D
            self.conv = layer(filters, **options, groups=groups, kernel_initializer=initializer)
        self.activation = keras.activations.get(activation) if activation else None

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies the block."""
        x = self.pad(inputs) if self.pad is not None else inputs
        x = self.conv(x)
        if self.norm is not None:
            x = self.norm(x, training=training) if _has_statistics(self.norm) else self.norm(x)
        return self.activation(x) if self.activation is not None else x


class GroupedConv2D(keras.layers.Conv2D):
    """Convolution in groups of channels, one group after the other on TensorFlow.

    There, Keras compiles a grouped convolution with XLA on its own, as TensorFlow cannot fuse it with what follows. On
    a CPU that takes 25 times as long as the groups one by one, its gradient more than a thousand times, and TensorFlow
    Serving does not run it without being told to.
    """

    def convolution_op(self, inputs: Tensor, kernel: Tensor) -> Tensor:
        """Convolves; see `keras.layers.Conv2D`."""
        if keras.backend.backend() != "tensorflow":
            return super().convolution_op(inputs, kernel)
        parts = zip(ops.split(inputs, self.groups, axis=-1), ops.split(kernel, self.groups, axis=-1), strict=True)
        convolved = [
            ops.conv(
                part,
                part_kernel,
                strides=list(self.strides),
                padding=self.padding,
                dilation_rate=self.dilation_rate,
                data_format=self.data_format,
            )
            for part, part_kernel in parts
        ]
        return ops.concatenate(convolved, axis=-1)


class SeparableConvNorm(keras.layers.Layer):
    """Depthwise convolution and 1x1 convolution, each with normalisation and ReLU.

    Args:
        filters: Output channels.
        kernel_size: Height and width of the depthwise kernel, odd.
        dilation: Atrous rate of the depthwise convolution.
        norm: The normalisation of both.

    Input shape: float [B, H, W, C]. Output shape: float [B, H, W, filters].
    """

    def __init__(
        self, filters: int, kernel_size: int, *, dilation: int = 1, norm: Norm, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.depthwise = ConvNorm(None, kernel_size, dilation=dilation, depthwise=True, norm=norm, name="depthwise")
        self.pointwise = ConvNorm(filters, 1, norm=norm, name="pointwise")

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies both convolutions."""
        return self.pointwise(self.depthwise(inputs, training=training), training=training)


def _has_statistics(norm: keras.layers.Layer) -> bool:
    return isinstance(norm, keras.layers.BatchNormalization)


def pad_to_multiple(images: Tensor, multiple: int) -> Tensor:
    """Pads with zeros at the bottom and at the right.

    Args:
        images: float [B, H, W, C].
        multiple: What height and width shall be a multiple of.

    Returns:
        float [B, H', W', C].
    """
    height, width = ops.shape(images)[1:3]
    return ops.pad(images, [[0, 0], [0, -height % multiple], [0, -width % multiple], [0, 0]])


def phase_weights(factor: int) -> list[tuple[int, float]]:
    """Where the fine pixels of bilinear upsampling lie between the coarse ones, with half-pixel centres.

    Fine pixel `factor * i + phase` lies at the coarse coordinate `i + (phase + 0.5) / factor - 0.5`.

    Args:
        factor: Fine pixels per coarse pixel.

    Returns:
        For each phase: the offset (-1 or 0) of the first of the two coarse neighbours, and the second one's weight.
    """
    weights = []
    for phase in range(factor):
        position = (phase + 0.5) / factor - 0.5
        first = -1 if position < 0 else 0
        weights.append((first, position - first))
    return weights


def upsample_bilinear(x: Tensor, factor: int) -> Tensor:
    """Enlarges by a whole factor, bilinearly, with half-pixel centres and the border repeated.

    Args:
        x: float [B, h, w, C].
        factor: How much larger, at least 1.

    Returns:
        float [B, h * factor, w * factor, C].
    """
    if factor == 1:
        return x

    # The gradient is written out: left to the backends, it makes a map of zeros for each slice and adds them all up.
    @ops.custom_gradient
    def enlarge(x: Tensor) -> tuple[Tensor, Callable[..., Tensor]]:
        channels = x.shape[-1]
        batch, height, width = ops.shape(x)[:3]
        rows = ops.stack(interpolated_rows(x, factor), axis=2)  # [B, h, factor, w, C]
        rows = ops.reshape(rows, (batch, height * factor, width, channels))  # [B, h * factor, w, C]
        both = ops.stack(interpolated_columns(rows, factor), axis=3)  # [B, h * factor, w, factor, C]
        both = ops.reshape(both, (batch, height * factor, width * factor, channels))  # [B, h * factor, w * factor, C]

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
            columns = args[0] if upstream is None else upstream
            columns = ops.reshape(columns, (batch, height * factor, width, factor, channels))
            rows = _gather_phases(ops.unstack(columns, factor, axis=3), axis=2)  # [B, h * factor, w, C]
            rows = ops.reshape(rows, (batch, height, factor, width, channels))  # [B, h, factor, w, C]
            return _gather_phases(ops.unstack(rows, factor, axis=2), axis=1)  # [B, h, w, C]

        return both, gradient

    return enlarge(x)


def _gather_phases(phases: list[Tensor], axis: int) -> Tensor:
    """The transpose of interpolation along an axis: gives each coarse pixel its share of the `factor` fine maps."""
    own, to_previous, to_next = 0.0, 0.0, 0.0
    for phase, (first, weight) in zip(phases, phase_weights(len(phases)), strict=True):
        if first < 0:
            to_previous, own = to_previous + (1 - weight) * phase, own + weight * phase
        else:
            own, to_next = own + (1 - weight) * phase, to_next + weight * phase
    cut = [slice(None)] * axis

    def slices(tensor: Tensor, start: int | None, stop: int | None) -> Tensor:
        return tensor[(*cut, slice(start, stop))]

    # What would fall over a border goes to the pixel at the border, which was repeated there.
    from_next = ops.concatenate([slices(to_previous, 1, None), slices(to_next, -1, None)], axis=axis)
    from_previous = ops.concatenate([slices(to_previous, None, 1), slices(to_next, None, -1)], axis=axis)
    return own + from_next + from_previous


def interpolated_rows(x: Tensor, factor: int) -> list[Tensor]:
    """The rows of each phase (see `phase_weights`) between the rows of x, `factor` maps of [B, h, w, C]."""
    above = ops.concatenate([x[:, :1], x[:, :-1]], axis=1)
    below = ops.concatenate([x[:, 1:], x[:, -1:]], axis=1)
    return [_blend(above, x, w) if first < 0 else _blend(x, below, w) for first, w in phase_weights(factor)]


def interpolated_columns(x: Tensor, factor: int) -> list[Tensor]:
    """The columns of each phase (see `phase_weights`) between the columns of x, `factor` maps of [B, h, w, C]."""
    left = ops.concatenate([x[:, :, :1], x[:, :, :-1]], axis=2)
    right = ops.concatenate([x[:, :, 1:], x[:, :, -1:]], axis=2)
    return [_blend(left, x, w) if first < 0 else _blend(x, right, w) for first, w in phase_weights(factor)]


def _blend(first: Tensor, second: Tensor, weight: float) -> Tensor:
    return first + weight * (second - first) if weight else first


def linear_matrix(old: Any, new: Any, scale: Any) -> Tensor:
    """The matrix that resizes a line linearly, with half-pixel centres and the border repeated.

    Args:
        old: Values of the line, an int or an int32 scalar.
        new: Values that it gets.
        scale: Old values per new one, a float or a float32 scalar.

    Returns:
        float32 [new, old].
    """
    position = (ops.cast(ops.arange(new), "float32") + 0.5) * scale - 0.5
    position = ops.clip(position, 0.0, ops.cast(old - 1, "float32"))
    distance = ops.abs(position[:, None] - ops.cast(ops.arange(old), "float32")[None, :])
    return ops.maximum(1.0 - distance, 0.0)


def resize_bilinear(x: Tensor, height: Any, width: Any) -> Tensor:
    """Resizes to any size, bilinearly, with half-pixel centres and no antialiasing.

    Unlike `ops.image.resize` it takes sizes that are known only when the graph runs.

    Args:
        x: float [B, h, w, C].
        height: New height, an int or an int32 scalar.
        width: New width, an int or an int32 scalar.

    Returns:
        float [B, height, width, C].
    """
    for axis, size in ((1, height), (2, width)):
        old = ops.shape(x)[axis]
        scale = ops.cast(old, "float32") / ops.cast(size, "float32")
        position = (ops.cast(ops.arange(size), "float32") + 0.5) * scale - 0.5
        position = ops.clip(position, 0.0, ops.cast(old - 1, "float32"))
        first = ops.cast(ops.floor(position), "int32")
        second = ops.minimum(first + 1, old - 1)
        weight = ops.cast(position - ops.floor(position), x.dtype)
        weight = ops.reshape(weight, (1, -1, 1, 1) if axis == 1 else (1, 1, -1, 1))
        x = ops.take(x, first, axis=axis) * (1 - weight) + ops.take(x, second, axis=axis) * weight
    return x


def average_pool_within(x: Tensor, window: tuple[int, int]) -> Tensor:
    """Averages every full window, stride 1; a window larger than the map is cut to the map.

    Unlike `ops.average_pool` it takes maps whose size is known only when the graph runs.

    Args:
        x: float [B, h, w, C].
        window: Height and width of the window.

    Returns:
        float32 [B, h - window height + 1, w - window width + 1, C].
    """
    x = ops.cast(x, "float32")
    for axis, size in enumerate(window, start=1):
        size = min(size, x.shape[axis]) if x.shape[axis] is not None else ops.minimum(size, ops.shape(x)[axis])
        start = [[0, 0]] * 4
        start[axis] = [1, 0]
        total = ops.pad(ops.cumsum(x, axis=axis), start)
        windows = total[:, size:] - total[:, :-size] if axis == 1 else total[:, :, size:] - total[:, :, :-size]
        x = windows / ops.cast(size, "float32")
    return x


def once_there_is(earlier: Tensor, values: Tensor) -> Tensor:
    """Returns `values`, but lets whatever uses them wait until `earlier` is computed.

    What is added is zero, which no compiler knows. Parts of a sum that do not depend on each other may else be computed
    at the same time, and memory would hold them all.
    """
    first = ops.sum(ops.reshape(earlier, (-1,))[:1])  # There may be none.
    first = ops.where(ops.isnan(first), 0, first)  # What is not a number must not become an index.
    return values + ops.cast(ops.minimum(ops.abs(first), 0), values.dtype)


_stage_compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


def stage(function: _Function) -> _Function:
    """Marks a function of tensors as one stage of inference, which `compiled_stages` may compile on its own.

    XLA recomputes an upsampled map in each of its consumers when a whole post-processing is one program; compiled in
    stages, every map is made once. Outside of `compiled_stages` the function runs as it is.
    """
    compiled: dict[Any, Callable[..., Any]] = {}

    @functools.wraps(function)
    def wrapper(*tensors: Tensor, **options: Any) -> Any:
        if _stage_compiler is None:
            return function(*tensors, **options)
        # Options that are plain values become part of the program; sizes may be tensors and are passed to it.
        static = {key: value for key, value in options.items() if isinstance(value, bool | int | float | str)}
        dynamic = {key: value for key, value in options.items() if key not in static}
        key = (_stage_compiler, tuple(sorted(static.items())))
        if key not in compiled:
            compiled[key] = _stage_compiler(functools.partial(function, **static))
        return compiled[key](*tensors, **dynamic)

    return wrapper  # type: ignore[return-value]


@contextlib.contextmanager
def compiled_stages(compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Compiles every `stage` that is called inside the context.

    Args:
        compiler: Turns a function of tensors into a compiled one, such as `jax.jit` or
            `functools.partial(tf.function, jit_compile=True)`. Pass the same object again to reuse what was compiled.
    """
    global _stage_compiler
    before, _stage_compiler = _stage_compiler, compiler
    try:
        yield
    finally:
        _stage_compiler = before
