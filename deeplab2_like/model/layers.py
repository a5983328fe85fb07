"""Convolution blocks that several systems and backbones share."""

from typing import Any

import keras
from keras import ops

from deeplab2_like.errors import UserError
from deeplab2_like.model.config import Norm, Padding

Tensor = Any  # A tensor of whichever backend Keras runs on.


def make_norm(norm: Norm | None, name: str, channels: int | None = None) -> keras.layers.Layer | None:
    """Makes a normalization layer.

    Args:
        norm: Its config.
        name: Its name.
        channels: Channels of its input; None if they are not known yet.

    Returns:
        The layer, or None for no normalization.

    Raises:
        UserError: If the channels cannot be divided into 32 groups.
    """
    if norm is None or norm.kind == "none":
        return None
    if norm.kind == "group":
        if channels is not None and channels % 32:
            raise UserError(
                f"Group normalization divides channels into 32 groups, so {channels} channels do not fit; make them a "
                "multiple of 32, or set `kind` of that norm to batch or none."
            )
        return keras.layers.GroupNormalization(groups=32, epsilon=norm.epsilon, name=name)
    # Only the TensorFlow backend knows replicas; elsewhere `synchronized` raises.
    synchronized = norm.kind == "sync_batch" and keras.backend.backend() == "tensorflow"
    return keras.layers.BatchNormalization(
        momentum=norm.momentum,
        epsilon=norm.epsilon,
        synchronized=synchronized,
        trainable=norm.kind != "frozen_batch",
        name=name,
    )


def apply_norm(norm: keras.layers.Layer, x: Tensor, *, training: bool) -> Tensor:
    """Applies a layer of `make_norm`; only batch normalization has an argument `training`."""
    return norm(x, training=training) if isinstance(norm, keras.layers.BatchNormalization) else norm(x)


def msra_initializer() -> keras.initializers.Initializer:
    """Makes the initializer of kernels that Detectron2 calls MSRA: normal, with variance 2 / fan-out, not truncated.

    Every layer needs its own: an initializer of Keras gives the same values at each call.
    """
    return keras.initializers.VarianceScaling(2.0, mode="fan_out", distribution="untruncated_normal")


class ConvNorm(keras.layers.Layer):
    """Convolution, normalization, activation.

    Symmetric padding adds `dilation * (kernel_size - 1) / 2` zeros on every side, at any stride. Where the stride is 2
    and height and width are even, TensorFlow's "same" adds one less at the top and left: it starts one pixel later.
    Weights need the padding that they were trained with, or their features shift by a pixel.

    Args:
        filters: Output channels; None for a depthwise convolution, which keeps the channels of its input.
        kernel_size: Height and width, odd.
        strides: Stride of both axes.
        dilation: Atrous rate of both axes.
        depthwise: Whether each channel has its own filter.
        groups: Number of channel groups, each with its own filters.
        padding: The padding of a convolution with stride: "symmetric", or "same" as in TensorFlow.
        lost_stride_shift: With "same", pixels by which a convolution that lost a stride of 2 to atrous conversion
            starts later than a symmetric one: the dilation before it. It then reads the same positions as with stride.
        norm: The normalization; None for none, which adds a bias.
        activation: Name of a Keras activation, or None.
        initializer: Name of a Keras initializer of the kernel, or the initializer; not for depthwise convolutions.

    Input shape: float [B, H, W, C]. Output shape: float [B, ceil(H / strides), ceil(W / strides), filters].
    """

    def __init__(  # noqa: PLR0913 - the choices of all networks
        self,
        filters: int | None,
        kernel_size: int,
        *,
        strides: int = 1,
        dilation: int = 1,
        depthwise: bool = False,
        groups: int = 1,
        padding: Padding = "symmetric",
        lost_stride_shift: int = 0,
        norm: Norm | None = None,
        activation: str | None = "relu",
        initializer: str | keras.initializers.Initializer = "he_normal",
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        margin = dilation * (kernel_size - 1) // 2
        self.pad = None
        if padding == "symmetric" and strides > 1 and margin:
            self.pad = keras.layers.ZeroPadding2D(margin, name="pad")
        elif padding == "same" and lost_stride_shift:
            before_and_after = (margin - lost_stride_shift, margin + lost_stride_shift)
            self.pad = keras.layers.ZeroPadding2D((before_and_after, before_and_after), name="pad")
        self.norm = make_norm(norm, "norm", filters)
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
            x = apply_norm(self.norm, x, training=training)
        return self.activation(x) if self.activation is not None else x


class GroupedConv2D(keras.layers.Conv2D):
    """Convolution in groups of channels; on TensorFlow one group after the other.

    Keras compiles a grouped convolution with XLA there. On a CPU this is 25 times slower than the groups one by one,
    its gradient over a thousand times, and TensorFlow Serving runs it only with XLA enabled.
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
    """Depthwise convolution and 1x1 convolution, each with normalization and ReLU.

    Args:
        filters: Output channels.
        kernel_size: Height and width of the depthwise kernel, odd.
        dilation: Atrous rate of the depthwise convolution.
        norm: The normalization of both.

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
