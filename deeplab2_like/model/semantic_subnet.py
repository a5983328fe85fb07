"""The semantic head of UPSNet (Xiong et al., CVPR 2019): one subnet for all levels, joined at its end."""

from collections.abc import Mapping

import keras
from keras import ops

from deeplab2_like.model.deformable import DeformableConvNorm
from deeplab2_like.model.layers import ConvNorm, Norm, Tensor, upsample_bilinear


class SemanticSubnet(keras.layers.Layer):
    """Applies the same convolutions to each level, enlarges all to the finest one, joins them, and tells classes apart.

    Args:
        num_classes: Output channels, C; None leaves out the last convolution, which tells classes apart.
        strides: Stride of each level, by its name, fine to coarse; each twice that of the one before.
        input_channels: Channels of the levels; the convolutions keep them until the last but one.
        channels: Channels of the last two convolutions.
        convolutions: How many there are; UPSNet has two for Cityscapes and three for COCO.
        deformable: Whether they are deformable (without modulation).
        norm: Their normalisation; None for none, as in UPSNet.

    Input: dictionary of levels, float [B, h, w, input_channels]; levels that are not in `strides` are left alone.
    Output: logits, float32 [B, h, w, num_classes] at the stride of the finest level; or the joined feature, float [B,
    h, w, levels * channels].
    """

    def __init__(
        self,
        num_classes: int | None,
        *,
        strides: Mapping[str, int],
        input_channels: int,
        channels: int,
        convolutions: int,
        deformable: bool,
        norm: Norm | None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        finest = min(strides.values())
        self.factors = {level: stride // finest for level, stride in strides.items()}

        def convolution(index: int) -> ConvNorm | DeformableConvNorm:
            width = channels if index >= convolutions - 2 else input_channels
            if deformable:
                return DeformableConvNorm(width, 3, modulated=False, norm=norm, name=f"conv{index + 1}")
            return ConvNorm(width, 3, norm=norm, name=f"conv{index + 1}")

        self.convolutions = [convolution(index) for index in range(convolutions)]
        # In float32, as the differences between classes matter here.
        self.predictor = (
            None
            if num_classes is None
            else keras.layers.Conv2D(
                num_classes,
                1,
                kernel_initializer=keras.initializers.RandomNormal(stddev=0.01),
                dtype="float32",
                name="predictor",
            )
        )

    def build(self, input_shape: object) -> None:
        """Leaves it to the layers, when they are called: Keras would trace all deformable convolutions first."""

    def call(self, pyramid: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Applies the subnet; see the class."""
        levels = []
        for level, factor in self.factors.items():
            x = pyramid[level]
            for convolution in self.convolutions:
                x = convolution(x, training=training)
            levels.append(upsample_bilinear(x, factor))
        x = ops.concatenate(levels, axis=-1)
        return x if self.predictor is None else self.predictor(ops.cast(x, "float32"))
