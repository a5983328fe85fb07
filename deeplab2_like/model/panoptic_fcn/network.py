"""The network of Panoptic FCN after the feature pyramid: position head, kernel head, encoder (sections 3.1 and 3.3)."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from deeplab2_like.model.config import Norm
from deeplab2_like.model.deformable import DeformableConvNorm
from deeplab2_like.model.layers import ConvNorm, Tensor
from deeplab2_like.model.panoptic_fcn.config import EncoderConfig, HeadConfig
from deeplab2_like.model.resampling import upsample_bilinear
from deeplab2_like.model.semantic import SemanticBranch

# Logit of the probability that every position has before training: 0.1, as in CenterNet.
_PRIOR_LOGIT = -2.19


class PositionHead(keras.layers.Layer):
    """Predicts the centers of things and the regions of stuff, with the same weights on each level.

    Args:
        config: Channels, convolutions and normalization.
        num_things: Number of thing classes, T.
        num_regions: Number of stuff classes and "other", S.

    Input: dictionary of levels, float [B, h, w, C].
    Output: logits of the centers, float32 [B, h, w, T], and logits of the regions, float32 [B, h, w, S], by level.
    """

    def __init__(self, config: HeadConfig, *, num_things: int, num_regions: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.convolutions = _convolutions(
            config.convolutions, config.channels, norm=config.norm, deformable=config.deformable
        )
        # In float32, because small differences matter here.
        self.centers = _predictor(num_things, "centers", bias=_PRIOR_LOGIT, dtype="float32")
        self.regions = _predictor(num_regions, "regions", bias=_PRIOR_LOGIT, dtype="float32")

    def build(self, input_shape: Any) -> None:
        """Does nothing: the layers build themselves when called; Keras would trace every deformable convolution."""

    def call(
        self, pyramid: Mapping[str, Tensor], training: bool = False
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Applies the head to each level."""
        centers, regions = {}, {}
        for level, x in pyramid.items():
            for convolution in self.convolutions:
                x = convolution(x, training=training)
            x = ops.cast(x, "float32")
            centers[level], regions[level] = self.centers(x), self.regions(x)
        return centers, regions


class KernelHead(keras.layers.Layer):
    """Predicts a kernel for each position of each level, and embeds kernels as weights of a 1x1 convolution.

    Args:
        config: Channels, which are also the length K of a kernel, convolutions and normalization.
        feature_channels: Channels of the encoded feature, E, which is the length of an embedded kernel.

    Attributes:
        embed_things: Layer from kernels of things, float32 [..., K], to weights, float32 [..., E].
        embed_stuff: The same for kernels of stuff.

    Input: dictionary of levels, float [B, h, w, C]. Output: kernels by level, float32 [B, h, w, K].
    """

    def __init__(self, config: HeadConfig, *, feature_channels: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.channels = config.channels
        self.coordinates = config.kernel_coordinates
        self.convolutions = _convolutions(config.convolutions, config.channels, norm=config.norm)
        self.kernels = _predictor(config.channels, "kernels")
        self.embed_things = _embedding(feature_channels, "embed_things")
        self.embed_stuff = _embedding(feature_channels, "embed_stuff")

    def build(self, input_shape: Any) -> None:
        """Creates the variables of the two embeddings, which `call` does not use."""
        del input_shape
        for layer in (self.embed_things, self.embed_stuff):
            layer.build((None, None, self.channels))

    def call(self, pyramid: Mapping[str, Tensor], training: bool = False) -> dict[str, Tensor]:
        """Applies the head to each level."""
        kernels = {}
        for level, x in pyramid.items():
            if self.coordinates:
                x = append_coordinates(x)
            for convolution in self.convolutions:
                x = convolution(x, training=training)
            kernels[level] = ops.cast(self.kernels(x), "float32")
        return kernels


class FeatureEncoder(keras.layers.Layer):
    """Makes the feature of high resolution that kernels are multiplied with.

    Its convolutions have a bias, no normalization, and a ReLU, also after the last one.

    Args:
        config: Input, channels and convolutions.
        strides: Stride of each level of the pyramid that is used, by its name, fine to coarse; they double.

    Input: dictionary of levels, float [B, h, w, C]. Output: float32 [B, h, w, E] at the stride of the finest level.
    """

    def __init__(self, config: EncoderConfig, *, strides: Mapping[str, int], name: str | None = None) -> None:
        super().__init__(name=name)
        self.feature = config.feature
        self.coordinates = config.coordinates
        self.finest = min(strides, key=lambda level: strides[level])
        self.factors = {level: stride // strides[self.finest] for level, stride in strides.items()}
        self.semantic_fpn = None
        if config.feature == "semantic_fpn":
            self.semantic_fpn = SemanticBranch(
                None,
                strides=strides,
                channels=config.semantic_channels,
                aggregation="sum",
                norm=config.norm,
                name="semantic_fpn",
            )
        self.convolutions = _convolutions(config.convolutions, config.channels, norm=None, deformable=config.deformable)

    def call(self, pyramid: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Encodes the pyramid."""
        if self.semantic_fpn is not None:
            x = self.semantic_fpn(pyramid, training=training)
        elif self.feature == "sum":
            x = sum(upsample_bilinear(pyramid[level], factor) for level, factor in self.factors.items())
        else:
            x = pyramid[self.finest]
        if self.coordinates:
            x = append_coordinates(x)
        for convolution in self.convolutions:
            x = convolution(x, training=training)
        return ops.cast(x, "float32")


def append_coordinates(x: Tensor) -> Tensor:
    """Appends the row and the column of each position as channels, from -1 for the first to 1 for the last.

    Args:
        x: float [B, h, w, C].

    Returns:
        float [B, h, w, C + 2].
    """
    batch, height, width = ops.shape(x)[:3]

    def coordinates(size: Any) -> Tensor:
        return 2 * ops.cast(ops.arange(size), "float32") / ops.cast(ops.maximum(size - 1, 1), "float32") - 1

    row = ops.broadcast_to(coordinates(height)[None, :, None, None], (batch, height, width, 1))
    column = ops.broadcast_to(coordinates(width)[None, None, :, None], (batch, height, width, 1))
    return ops.concatenate([x, ops.cast(row, x.dtype), ops.cast(column, x.dtype)], axis=-1)


def _convolutions(
    count: int, channels: int, *, norm: Norm | None, deformable: bool = False
) -> list[ConvNorm | DeformableConvNorm]:
    layer = DeformableConvNorm if deformable else ConvNorm
    return [layer(channels, 3, norm=norm, name=f"conv{index + 1}") for index in range(count)]


def _predictor(channels: int, name: str, *, bias: float = 0.0, dtype: str | None = None) -> keras.layers.Conv2D:
    return keras.layers.Conv2D(
        channels,
        3,
        padding="same",
        kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
        bias_initializer=keras.initializers.Constant(bias),
        dtype=dtype,
        name=name,
    )


def _embedding(channels: int, name: str) -> keras.layers.Dense:
    initializer = keras.initializers.RandomNormal(stddev=0.01)
    return keras.layers.Dense(channels, kernel_initializer=initializer, dtype="float32", name=name)
