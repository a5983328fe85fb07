"""The network of Panoptic-DeepLab (section 3.1, Figure 2): backbone, ASPP, decoders, heads."""

import itertools
from collections.abc import Mapping

import keras
from keras import ops

from deeplab2_like.model.config import Norm
from deeplab2_like.model.layers import ConvNorm, SeparableConvNorm, Tensor
from deeplab2_like.model.panoptic_deeplab.config import AsppConfig, Convolution
from deeplab2_like.model.random_numbers import ImageDropout
from deeplab2_like.model.resampling import average_pool_within, resize_bilinear, scaled_side, upsample_bilinear


class AtrousSpatialPyramidPooling(keras.layers.Layer):
    """Atrous spatial pyramid pooling: convolutions at several atrous rates, and an average of the image.

    Args:
        config: Channels, rates and pooling.
        convolution: Kind of the convolutions, if the config does not say it; the 3x3 ones are depthwise separable for
            `separable`.
        norm: The normalization.
        aligned_corners: How the pooled features are resized, see `resampling`.

    Input shape: float [B, h, w, C]. Output shape: float [B, h, w, config.channels].
    """

    def __init__(
        self,
        config: AsppConfig,
        *,
        convolution: Convolution,
        norm: Norm,
        aligned_corners: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        channels = config.channels
        convolution = config.convolution or convolution
        self.aligned_corners = aligned_corners
        self.branches: list[keras.layers.Layer] = [ConvNorm(channels, 1, norm=norm, name="branch0")]
        for position, rate in enumerate(config.rates, start=1):
            branch = f"branch{position}"
            if convolution == "separable":
                self.branches.append(SeparableConvNorm(channels, 3, dilation=rate, norm=norm, name=branch))
            else:
                self.branches.append(ConvNorm(channels, 3, dilation=rate, norm=norm, name=branch))
        self.pooling_window = config.pooling_window
        # A bias instead of a normalization: a batch has only one average per image, too few for statistics.
        self.pooling_branch = ConvNorm(channels, 1, norm=norm if config.pooling_norm else None, name="pooling_branch")
        self.project = ConvNorm(channels, 1, norm=norm, name="project")
        self.dropout = ImageDropout(config.dropout, name="dropout")

    def call(self, inputs: Tensor, numbers: Tensor | None = None, training: bool = False, scale: float = 1.0) -> Tensor:
        """Applies all branches, concatenates and projects them.

        Args:
            inputs: float [B, h, w, C].
            numbers: As for `ImageDropout`.
            training: See `PanopticSystem.call`.
            scale: Factor of the pooling window.
        """
        height, width = ops.shape(inputs)[1:3]
        if self.pooling_window is None:
            pooled = ops.mean(inputs, axis=(1, 2), keepdims=True)
            pooled = self.pooling_branch(pooled, training=training)  # [B, 1, 1, channels]
            pooled = ops.broadcast_to(pooled, (ops.shape(inputs)[0], height, width, pooled.shape[-1]))
        else:
            window_height, window_width = (
                scaled_side(side, scale, aligned_corners=self.aligned_corners) for side in self.pooling_window
            )
            pooled = average_pool_within(inputs, (window_height, window_width))
            pooled = self.pooling_branch(pooled, training=training)
            pooled = resize_bilinear(pooled, height, width, aligned_corners=self.aligned_corners)
            pooled = ops.cast(pooled, inputs.dtype)
        branches = [branch(inputs, training=training) for branch in self.branches]
        x = self.project(ops.concatenate([*branches, pooled], axis=-1), training=training)
        return self.dropout(x, numbers=numbers, training=training)


class Fuse(keras.layers.Layer):
    """The convolution after a concatenation and before a predictor (section 3.1).

    Args:
        channels: Output channels.
        convolution: Kind of the convolution.
        norm: The normalization.
        first_channels: Output channels of the first of two `plain` convolutions; by default `channels`.

    Input shape: float [B, h, w, C]. Output shape: float [B, h, w, channels].
    """

    def __init__(
        self,
        channels: int,
        *,
        convolution: Convolution,
        norm: Norm,
        first_channels: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.convolutions: list[keras.layers.Layer]
        if convolution == "separable":
            self.convolutions = [SeparableConvNorm(channels, 5, norm=norm, name="separable")]
        else:
            widths = [channels] if convolution == "light" else [first_channels or channels, channels]
            self.convolutions = [
                ConvNorm(width, 3, norm=norm, name=f"conv{index}") for index, width in enumerate(widths, start=1)
            ]

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies the convolutions."""
        for convolution in self.convolutions:
            inputs = convolution(inputs, training=training)
        return inputs


class Decoder(keras.layers.Layer):
    """Upsamples ASPP features step by step, with a low-level feature and a convolution at each step.

    Args:
        low_level_channels: Channels of each projected low-level feature by its name, coarse to fine.
        convolution: Kind of the convolution of each step.
        channels: Output channels of every step.
        strides: Image pixels per feature pixel, by the feature's name; decoding starts at `res5`.
        norm: The normalization.
        aligned_corners: How features are upsampled, see `resampling`.

    Input: ASPP features, float [B, h, w, C], and the backbone's features.
    Output shape: float [B, H / s, W / s, channels] with the stride s of the last low-level feature.
    """

    def __init__(
        self,
        low_level_channels: Mapping[str, int],
        *,
        convolution: Convolution,
        channels: int,
        strides: Mapping[str, int],
        norm: Norm,
        aligned_corners: bool = False,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.aligned_corners = aligned_corners
        self.levels = list(low_level_channels)
        path = ["res5", *self.levels]
        self.factors = [strides[coarse] // strides[fine] for coarse, fine in itertools.pairwise(path)]
        self.project = [ConvNorm(width, 1, norm=norm, name=f"project_{k}") for k, width in low_level_channels.items()]
        self.fuse = [Fuse(channels, convolution=convolution, norm=norm, name=f"fuse_{k}") for k in self.levels]

    def call(self, inputs: Tensor, features: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Decodes."""
        x = inputs
        for level, factor, project, fuse in zip(self.levels, self.factors, self.project, self.fuse, strict=True):
            low_level = project(features[level], training=training)
            x = upsample_bilinear(x, factor, aligned_corners=self.aligned_corners)
            x = fuse(ops.concatenate([low_level, x], axis=-1), training=training)
        return x


class Head(keras.layers.Layer):
    """A prediction head: a convolution, then a linear 1x1 convolution in float32.

    Args:
        outputs: Number of predicted channels.
        channels: Channels of the convolution.
        convolution: Kind of the convolution.
        norm: Its normalization.
        first_channels: Output channels of the first of two `plain` convolutions; by default `channels`.

    Input shape: float [B, h, w, C]. Output shape: float32 [B, h, w, outputs].
    """

    def __init__(
        self,
        outputs: int,
        *,
        channels: int,
        convolution: Convolution,
        norm: Norm,
        first_channels: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.fuse = Fuse(channels, convolution=convolution, norm=norm, first_channels=first_channels, name="fuse")
        # Small initial weights: all heads start near zero, so that no loss dwarfs the others.
        initializer = keras.initializers.RandomNormal(stddev=0.001)
        self.predictor = keras.layers.Conv2D(
            outputs, 1, kernel_initializer=initializer, dtype="float32", name="predictor"
        )

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Predicts."""
        return self.predictor(self.fuse(inputs, training=training))
