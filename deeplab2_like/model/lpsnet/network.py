"""The network of LPSNet beyond the feature pyramid: global context and box head (sections 3.1 and 3.2)."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from deeplab2_like.model.layers import ConvNorm, Tensor
from deeplab2_like.model.lpsnet.config import BoxConfig, ContextConfig
from deeplab2_like.model.resampling import linear_matrix

# Largest logarithm of a distance in strides; no object of a level is that large.
_MAX_LOG_DISTANCE = 6.0


def make_initializer() -> keras.initializers.Initializer:
    """Makes the initializer of the layers that follow the pyramid: section 4 names that of RetinaNet.

    A new one for each layer, because an initializer of Keras gives the same values each time.
    """
    return keras.initializers.RandomNormal(stddev=0.01)


def make_context(config: ContextConfig, *, output_channels: int) -> keras.layers.Layer | None:
    """Makes the layer whose output is added to the coarsest feature of the pyramid (Table 5).

    Args:
        config: Its kind and size.
        output_channels: Channels of the pyramid.

    Returns:
        The layer, or None for no context.
    """
    if config.kind == "pyramid_pooling":
        return PyramidPooling(config, output_channels=output_channels, name="context")
    if config.kind == "global_average":
        return GlobalAverage(output_channels=output_channels, name="context")
    return None


class PyramidPooling(keras.layers.Layer):
    """Pyramid pooling module (Zhao et al., CVPR 2017; on a feature pyramid, Xiao et al., ECCV 2018).

    The map is averaged in grids of a few bins; each grid passes a 1x1 convolution with ReLU and is upsampled again. All
    are concatenated with the map, and a 3x3 and a 1x1 convolution reduce them.

    Args:
        config: Bins, channels and normalization. The grids have no normalization, because a bin is too few values.
        output_channels: Channels of the result.

    Input: float [B, h, w, C]. Output: float [B, h, w, output_channels].
    """

    def __init__(self, config: ContextConfig, *, output_channels: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.bins = config.bins
        self.grids = [
            ConvNorm(config.channels, 1, initializer=make_initializer(), name=f"grid{bins}") for bins in config.bins
        ]
        self.join = ConvNorm(config.channels, 3, norm=config.norm, initializer=make_initializer(), name="join")
        self.reduce = ConvNorm(output_channels, 1, activation=None, initializer=make_initializer(), name="reduce")

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies all grids, concatenates and reduces them."""
        sizes = ops.shape(inputs)[1:3]
        # In float32, because bfloat16 would round the weights of a mean over many pixels.
        exact = ops.cast(inputs, "float32")
        parts = [inputs]
        for bins, grid in zip(self.bins, self.grids, strict=True):
            x = _multiply_axes(exact, *(_averaging_matrix(size, bins) for size in sizes))
            x = grid(ops.cast(x, inputs.dtype), training=training)  # [B, bins, bins, channels]
            upsampling = (linear_matrix(bins, size, bins / ops.cast(size, "float32")) for size in sizes)
            parts.append(_multiply_axes(x, *upsampling))
        return self.reduce(self.join(ops.concatenate(parts, axis=-1), training=training), training=training)


class GlobalAverage(keras.layers.Layer):
    """The global average of UPSNet: the mean of the map through a linear layer (Table 5).

    Args:
        output_channels: Channels of the result.

    Input: float [B, h, w, C]. Output: float [B, 1, 1, output_channels].
    """

    def __init__(self, *, output_channels: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.reduce = ConvNorm(output_channels, 1, activation=None, initializer=make_initializer(), name="reduce")

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Averages and projects."""
        mean = ops.mean(ops.cast(inputs, "float32"), axis=(1, 2), keepdims=True)
        return self.reduce(ops.cast(mean, inputs.dtype), training=training)


def _averaging_matrix(size: Any, bins: int) -> Tensor:
    """Returns the matrix that averages an axis in bins, float32 [bins, size]; bins overlap unless they divide it."""
    bin_index = ops.arange(bins)[:, None]
    first = bin_index * size // bins
    last = ((bin_index + 1) * size + bins - 1) // bins
    pixel = ops.arange(size)[None, :]
    is_inside = ops.cast((pixel >= first) & (pixel < last), "float32")
    return is_inside / ops.sum(is_inside, axis=1, keepdims=True)


def _multiply_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiplies the rows and the columns of a map, float [B, h, w, C], by matrices float32 [H, h] and [W, w]."""
    lines = ops.einsum("wx,bhxc->bhwc", ops.cast(columns, x.dtype), x)
    return ops.einsum("hy,bywc->bhwc", ops.cast(rows, x.dtype), lines)


class BoxHead(keras.layers.Layer):
    """Predicts the sides of the object's box and the border-ness at each point, with the same weights on each level.

    A distance is the exponential of the output times a learned factor of the level, in strides of the level.

    Args:
        config: Levels, channels, convolutions and normalization.

    Input: dictionary of levels, float [B, h, w, C].
    Output: distances to the left, top, right and bottom side in network pixels, float32 [B, h, w, 4], and logits of
    border-ness, float32 [B, h, w], by level.
    """

    def __init__(self, config: BoxConfig, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.strides = config.level_strides
        self.convolutions = [
            ConvNorm(config.channels, 3, norm=config.norm, initializer=make_initializer(), name=f"conv{index + 1}")
            for index in range(config.convolutions)
        ]
        # In float32, because bfloat16 has too few digits for distances.
        self.predictor = keras.layers.Conv2D(
            5, 3, padding="same", kernel_initializer=make_initializer(), dtype="float32", name="predictor"
        )

    def build(self, input_shape: Any) -> None:
        """Creates the factors of the levels."""
        del input_shape
        # In float32 at any precision, because they are in an exponent.
        self.factors = self.add_weight(
            shape=(len(self.strides),), initializer="ones", dtype="float32", autocast=False, name="factors"
        )

    def call(
        self, pyramid: Mapping[str, Tensor], training: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Applies the head to each level."""
        distances, border_ness = {}, {}
        factors = ops.unstack(self.factors, len(self.strides))
        for factor, (level, stride) in zip(factors, self.strides.items(), strict=True):
            x = pyramid[level]
            for convolution in self.convolutions:
                x = convolution(x, training=training)
            x = self.predictor(ops.cast(x, "float32"))
            distances[level] = stride * ops.exp(ops.minimum(factor * x[..., :4], _MAX_LOG_DISTANCE))
            border_ness[level] = x[..., 4]
        return distances, border_ness
