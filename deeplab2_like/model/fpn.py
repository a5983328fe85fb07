"""Feature pyramid network (Lin et al., "Feature pyramid networks for object detection", CVPR 2017)."""

from collections.abc import Mapping
from typing import Literal

import keras
from keras import ops

from deeplab2_like.errors import UserError
from deeplab2_like.model.config import Norm
from deeplab2_like.model.layers import ConvNorm, Tensor


class FeaturePyramid(keras.layers.Layer):
    """A feature pyramid: features of several scales, all with the same number of channels.

    From the coarsest level to the finest, a 1x1 convolution of the backbone feature (`lateralN`) is added to the sum of
    the next coarser level, upsampled twofold by repeating pixels; a 3x3 convolution of the sum (`outputN`) is the
    level. Level N, named `pN`, has stride 2**N. There is no activation.

    Levels coarser than the backbone features are made one from the other, starting from the coarsest level:

    - `subsample`: every second pixel (Mask R-CNN);
    - `convolve`: a 3x3 convolution with stride 2, with a ReLU between two of them (RetinaNet, FCOS).

    Args:
        strides: Stride of each backbone feature, by its name; those of `features` must double.
        features: Names of the backbone features, fine to coarse.
        channels: Channels of all levels.
        coarser_levels: Number of levels beyond the coarsest feature.
        coarser: How these levels are made.
        norm: The normalization after each convolution; None for none, as in the paper.

    Attributes:
        strides: Stride of each level, by its name, fine to coarse.
        channels: Channels of all levels.

    Raises:
        UserError: If the strides do not double.

    Input: dictionary of features, float [B, h, w, C], and optionally `context`, float [B, h, w, channels] or
    [B, 1, 1, channels], which is added to the coarsest feature after its 1x1 convolution.
    Output: dictionary of levels, float [B, ceil(H / stride), ceil(W / stride), channels].
    """

    def __init__(
        self,
        *,
        strides: Mapping[str, int],
        features: tuple[str, ...] = ("res2", "res3", "res4", "res5"),
        channels: int = 256,
        coarser_levels: int = 1,
        coarser: Literal["subsample", "convolve"] = "subsample",
        norm: Norm | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.channels = channels
        self.features = features
        finest = strides[features[0]]
        for index, feature in enumerate(features):
            if strides[feature] != finest * 2**index:
                raise UserError(
                    f"A feature pyramid needs features whose strides double, but '{feature}' has stride "
                    f"{strides[feature]} instead of {finest * 2**index}; set config key 'model.backbone.output_stride' "
                    "to 32."
                )
        first = finest.bit_length() - 1
        self.levels = tuple(range(first, first + len(features)))
        self.strides = {f"p{level}": 2**level for level in range(first, self.levels[-1] + coarser_levels + 1)}

        def convolution(kernel_size: int, name: str, strides: int = 1) -> ConvNorm:
            return ConvNorm(
                channels,
                kernel_size,
                strides=strides,
                norm=norm,
                activation=None,
                initializer="lecun_uniform",
                name=name,
            )

        self.laterals = [convolution(1, f"lateral{level}") for level in self.levels]
        self.outputs = [convolution(3, f"output{level}") for level in self.levels]
        self.coarser_levels = coarser_levels
        self.coarser = (
            [convolution(3, f"coarser{self.levels[-1] + 1 + index}", strides=2) for index in range(coarser_levels)]
            if coarser == "convolve"
            else None
        )

    def call(
        self, features: Mapping[str, Tensor], context: Tensor | None = None, training: bool = False
    ) -> dict[str, Tensor]:
        """Makes the pyramid."""
        pyramid: dict[str, Tensor] = {}
        above = None
        for level, feature, lateral, output in reversed(
            list(zip(self.levels, self.features, self.laterals, self.outputs, strict=True))
        ):
            x = lateral(features[feature], training=training)
            if above is None and context is not None:
                x = x + context
            above = x if above is None else x + repeat_pixels(above)
            pyramid[f"p{level}"] = output(above, training=training)
        pyramid = dict(reversed(pyramid.items()))

        x = pyramid[f"p{self.levels[-1]}"]
        for index in range(self.coarser_levels):
            if self.coarser is None:
                x = x[:, ::2, ::2]
            else:
                x = self.coarser[index](x if index == 0 else ops.relu(x), training=training)
            pyramid[f"p{self.levels[-1] + 1 + index}"] = x
        return pyramid


def repeat_pixels(x: Tensor) -> Tensor:
    """Upsamples twofold by repeating each pixel: float [B, h, w, C] to float [B, 2h, 2w, C]."""
    batch, height, width = ops.shape(x)[:3]
    channels = x.shape[-1]
    both = ops.broadcast_to(x[:, :, None, :, None, :], (batch, height, 2, width, 2, channels))
    return ops.reshape(both, (batch, 2 * height, 2 * width, channels))  # [B, 2h, 2w, C]
