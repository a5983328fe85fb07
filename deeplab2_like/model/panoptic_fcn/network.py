"""What Panoptic FCN has on a feature pyramid: position head, kernel head, feature encoder (sections 3.1 and 3.3)."""

from collections.abc import Mapping
from typing import Any, Literal

import keras
from keras import ops

from deeplab2_like.model.config import Norm
from deeplab2_like.model.deformable import DeformableConvNorm
from deeplab2_like.model.layers import ConvNorm, Tensor
from deeplab2_like.model.resampling import upsample_bilinear
from deeplab2_like.model.semantic import SemanticBranch

# Logit of the probability that each position has before training: 0.1, as in CenterNet.
_PRIOR_LOGIT = -2.19


def with_coordinates(x: Tensor) -> Tensor:
    """Appends where each position lies: its row, then its column, from -1 at the first to 1 at the last.

    Args:
        x: float [B, h, w, C].

    Returns:
        float [B, h, w, C + 2].
    """
    batch, height, width = ops.shape(x)[:3]

    def line(size: Any) -> Tensor:
        return 2 * ops.cast(ops.arange(size), "float32") / ops.cast(ops.maximum(size - 1, 1), "float32") - 1

    row = ops.broadcast_to(line(height)[None, :, None, None], (batch, height, width, 1))
    column = ops.broadcast_to(line(width)[None, None, :, None], (batch, height, width, 1))
    return ops.concatenate([x, ops.cast(row, x.dtype), ops.cast(column, x.dtype)], axis=-1)


def _stack(
    number: int, channels: int, *, norm: Norm | None, deformable: bool = False
) -> list[ConvNorm | DeformableConvNorm]:
    layer = DeformableConvNorm if deformable else ConvNorm
    return [layer(channels, 3, norm=norm, name=f"conv{index + 1}") for index in range(number)]


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


class PositionHead(keras.layers.Layer):
    """Tells where objects have their centres and where the regions of stuff are, on each level with the same weights.

    Args:
        num_things: Thing classes, T.
        num_regions: Stuff classes and "other", S.
        channels: Channels of the convolutions.
        convolutions: How many there are before the two predictors.
        deformable: Whether they are deformable (Table 1).
        norm: Their normalisation.

    Input: dictionary of levels, float [B, h, w, C]. Output: logits of centres, float32 [B, h, w, T], and logits of
    regions, float32 [B, h, w, S], by level.
    """

    def __init__(
        self,
        *,
        num_things: int,
        num_regions: int,
        channels: int,
        convolutions: int,
        deformable: bool,
        norm: Norm,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.convolutions = _stack(convolutions, channels, norm=norm, deformable=deformable)
        # In float32, as small differences decide here.
        self.centers = _predictor(num_things, "centers", bias=_PRIOR_LOGIT, dtype="float32")
        self.regions = _predictor(num_regions, "regions", bias=_PRIOR_LOGIT, dtype="float32")

    def build(self, input_shape: Any) -> None:
        """Leaves it to the layers, when they are called: Keras would trace all deformable convolutions first."""

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
    """Gives each position of each level a kernel, and turns kernels of things or stuff into weights of a convolution.

    Args:
        channels: Channels of the convolutions, and numbers of a kernel, K.
        convolutions: How many there are before the linear one.
        coordinates: Whether positions are appended to the levels (Table 2).
        weights: Numbers of the weights that a kernel becomes, those of a pixel of the encoded feature, E.
        norm: Normalisation of the convolutions.

    Input: dictionary of levels, float [B, h, w, C]. Output: kernels by level, float32 [B, h, w, K].
    """

    def __init__(
        self,
        *,
        channels: int,
        convolutions: int,
        coordinates: bool,
        weights: int,
        norm: Norm,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.coordinates = coordinates
        self.convolutions = _stack(convolutions, channels, norm=norm)
        self.kernels = _predictor(channels, "kernels")

        def embedding(name: str) -> keras.layers.Dense:
            initializer = keras.initializers.RandomNormal(stddev=0.01)
            return keras.layers.Dense(weights, kernel_initializer=initializer, dtype="float32", name=name)

        # Called with the kernels that were picked: float32 [B, R, K] -> [B, R, E].
        self.embed_things = embedding("embed_things")
        self.embed_stuff = embedding("embed_stuff")
        self.channels = channels

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
                x = with_coordinates(x)
            for convolution in self.convolutions:
                x = convolution(x, training=training)
            kernels[level] = ops.cast(self.kernels(x), "float32")
        return kernels


class FeatureEncoder(keras.layers.Layer):
    """Makes the feature of high resolution that kernels are multiplied with.

    The convolutions have a bias, no normalisation, and a ReLU also after the last: the feature is not negative.

    Args:
        strides: Stride of each level that is used, by its name, fine to coarse; each twice that of the one before.
        feature: What it is made from (Table 5): the `finest` level, the `sum` of all levels, or that of `semantic_fpn`.
        semantic_channels: Channels of Semantic FPN.
        channels: Channels of the feature, E (Table 4).
        convolutions: Number of convolutions.
        coordinates: Whether positions are appended first (Table 2).
        deformable: Whether the convolutions are deformable (Table 8).
        norm: Normalisation in Semantic FPN.

    Input: dictionary of levels, float [B, h, w, C]. Output: float32 [B, h, w, E] at the stride of the finest level.
    """

    def __init__(
        self,
        *,
        strides: Mapping[str, int],
        feature: Literal["finest", "sum", "semantic_fpn"],
        semantic_channels: int,
        channels: int,
        convolutions: int,
        coordinates: bool,
        deformable: bool,
        norm: Norm,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.feature = feature
        self.coordinates = coordinates
        finest = min(strides.values())
        self.factors = {level: stride // finest for level, stride in strides.items()}
        self.semantic_fpn = (
            SemanticBranch(
                None,
                strides=strides,
                channels=semantic_channels,
                aggregation="sum",
                norm=norm,
                name="semantic_fpn",
            )
            if feature == "semantic_fpn"
            else None
        )
        self.convolutions = _stack(convolutions, channels, norm=None, deformable=deformable)

    def call(self, pyramid: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Encodes; see the class."""
        if self.semantic_fpn is not None:
            x = self.semantic_fpn(pyramid, training=training)
        elif self.feature == "sum":
            x = sum(upsample_bilinear(pyramid[level], factor) for level, factor in self.factors.items())
        else:
            x = pyramid[next(level for level, factor in self.factors.items() if factor == 1)]
        if self.coordinates:
            x = with_coordinates(x)
        for convolution in self.convolutions:
            x = convolution(x, training=training)
        return ops.cast(x, "float32")
