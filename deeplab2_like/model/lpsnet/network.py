"""What LPSNet adds to a feature pyramid: context of the whole image, and the box head (sections 3.1 and 3.2)."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import keras
from keras import ops

from deeplab2_like.model.config import Norm
from deeplab2_like.model.layers import ConvNorm, Tensor
from deeplab2_like.model.resampling import linear_matrix

# Largest logarithm of a distance in strides: more than any object of a level has.
_MAX_LOG_DISTANCE = 6.0


class PyramidPooling(keras.layers.Layer):
    """Pyramid pooling module (Zhao et al., CVPR 2017; on a feature pyramid, Xiao et al., ECCV 2018).

    The map is averaged in grids of a few bins, each grid goes through a 1x1 convolution with ReLU and is enlarged
    again; all are joined with the map, and two convolutions reduce them, 3x3 and then 1x1.

    Args:
        bins: Bins of each grid along each axis.
        channels: Channels of each grid, and after the 3x3 convolution.
        output_channels: Channels of the result.
        norm: Normalisation after the 3x3 convolution. There is none in the grids: one bin is too few values.

    Input: float [B, h, w, C]. Output: float [B, h, w, output_channels].
    """

    def __init__(
        self, *, bins: Sequence[int], channels: int, output_channels: int, norm: Norm, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.bins = tuple(bins)
        self.grids = [ConvNorm(channels, 1, name=f"grid{number}") for number in self.bins]
        self.join = ConvNorm(channels, 3, norm=norm, name="join")
        self.reduce = ConvNorm(output_channels, 1, activation=None, initializer="lecun_uniform", name="reduce")

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies the module."""
        sizes = ops.shape(inputs)[1:3]
        # In float32, as bfloat16 would round the weights of a mean over many pixels.
        exact = ops.cast(inputs, "float32")
        parts = [inputs]
        for number, grid in zip(self.bins, self.grids, strict=True):
            x = _along_both_axes(exact, *(_averaging_matrix(size, number) for size in sizes))
            x = grid(ops.cast(x, inputs.dtype), training=training)  # [B, bins, bins, channels]
            enlarge = (linear_matrix(number, size, number / ops.cast(size, "float32")) for size in sizes)
            parts.append(_along_both_axes(x, *enlarge))
        return self.reduce(self.join(ops.concatenate(parts, axis=-1), training=training), training=training)


class GlobalAverage(keras.layers.Layer):
    """The mean of the map through a linear layer, as UPSNet adds it (Table 5).

    Input: float [B, h, w, C]. Output: float [B, 1, 1, output_channels].
    """

    def __init__(self, *, output_channels: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.reduce = ConvNorm(output_channels, 1, activation=None, initializer="lecun_uniform", name="reduce")

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Averages."""
        mean = ops.mean(ops.cast(inputs, "float32"), axis=(1, 2), keepdims=True)
        return self.reduce(ops.cast(mean, inputs.dtype), training=training)


def _averaging_matrix(size: Any, bins: int) -> Tensor:
    """Averages a line of pixels in bins, float32 [bins, size]; bins overlap where the size is no multiple of them."""
    bin_index = ops.arange(bins)[:, None]
    first = bin_index * size // bins
    last = ((bin_index + 1) * size + bins - 1) // bins
    pixel = ops.arange(size)[None, :]
    is_inside = ops.cast((pixel >= first) & (pixel < last), "float32")
    return is_inside / ops.sum(is_inside, axis=1, keepdims=True)


def _along_both_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Multiplies the rows and the columns of a map, float [B, h, w, C], by matrices float32 [H, h] and [W, w]."""
    lines = ops.einsum("wx,bhxc->bhwc", ops.cast(columns, x.dtype), x)
    return ops.einsum("hy,bywc->bhwc", ops.cast(rows, x.dtype), lines)


class BoxHead(keras.layers.Layer):
    """Tells each point how far the sides of its object are, and how near it is to the middle, on all levels alike.

    A distance is the exponential of the output times a learnt factor of the level, in strides of the level.

    Args:
        strides: Stride of each level, by its name.
        channels: Channels of the convolutions.
        convolutions: How many there are before the predictor.
        norm: Their normalisation.

    Input: dictionary of levels, float [B, h, w, C]. Output, by level: distances to the left, top, right and bottom in
    pixels, float32 [B, h, w, 4], and logits of border-ness, float32 [B, h, w].
    """

    def __init__(
        self,
        *,
        strides: Mapping[str, int],
        channels: int,
        convolutions: int,
        norm: Norm,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.strides = dict(strides)
        self.convolutions = [ConvNorm(channels, 3, norm=norm, name=f"conv{i + 1}") for i in range(convolutions)]
        # In float32, as distances need more digits than bfloat16 has.
        self.predictor = keras.layers.Conv2D(
            5,
            3,
            padding="same",
            kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
            dtype="float32",
            name="predictor",
        )

    def build(self, input_shape: Any) -> None:
        """Creates the factors of the levels."""
        del input_shape
        # In float32 at any precision, as they are in an exponent.
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


def make_context(
    kind: Literal["pyramid_pooling", "global_average", "none"],
    *,
    bins: Sequence[int],
    channels: int,
    output_channels: int,
    norm: Norm,
) -> keras.layers.Layer | None:
    """What is added to the coarsest feature of the pyramid (Table 5), or None for nothing."""
    if kind == "pyramid_pooling":
        return PyramidPooling(bins=bins, channels=channels, output_channels=output_channels, norm=norm, name="context")
    if kind == "global_average":
        return GlobalAverage(output_channels=output_channels, name="context")
    return None
