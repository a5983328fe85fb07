"""What the unifying system adds to pyramid, detector and semantic subnet (sections 3.1 and 3.4.2)."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from deeplab2_like.model.config import Norm
from deeplab2_like.model.layers import ConvNorm, Tensor
from deeplab2_like.model.semantic import SemanticSubnet


class SqueezeExcitation(keras.layers.Layer):
    """Weighs channels by a small network on their means (Hu et al., CVPR 2018).

    Args:
        channels: Channels, C; the inner layer has a sixteenth of them.

    Input and output: float [B, h, w, C].
    """

    def __init__(self, channels: int, *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.reduce = ConvNorm(max(channels // 16, 1), 1, name="reduce")
        self.expand = ConvNorm(channels, 1, activation="sigmoid", name="expand")

    def call(self, inputs: Tensor) -> Tensor:
        """Weighs the channels."""
        mean = ops.mean(ops.cast(inputs, "float32"), axis=(1, 2), keepdims=True)
        return inputs * self.expand(self.reduce(ops.cast(mean, inputs.dtype)))


class AffinityHead(keras.layers.Layer):
    """Features whose products are the affinities of pixels (section 3.4.2, Figure 5).

    The extractor is built like the semantic submodule and gives the feature Q of C channels. Two 1x1 convolutions with
    activations make of it the two factors of the affinities (equation 4). The paper does not name the activations: the
    factor that gathers, phi_1, has a softmax over all pixels (Shen et al., "Efficient attention", 2018), so that what
    is gathered is a mean over the image whatever its size and padding; the factor that hands out, phi_0, has a softplus
    divided by C, so that no affinity is negative, and what is handed out is a mean over channels.

    Args:
        strides: Stride of each level, by its name, fine to coarse.
        input_channels: Channels of the levels.
        channels: C.
        convolutions: Convolutions of the extractor.
        deformable: Whether they are deformable.
        norm: Their normalisation.

    Input: dictionary of levels, float [B, h, w, input_channels], and the height and width of the image without
    padding, ints or int32 scalars. Output: phi_0 and phi_1, float32 [B, h, w, C] at the stride of the finest level.
    """

    def __init__(
        self,
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
        self.stride = min(strides.values())
        self.extractor = SemanticSubnet(
            None,
            strides=strides,
            input_channels=input_channels,
            channels=channels,
            convolutions=convolutions,
            deformable=deformable,
            norm=norm,
            name="extractor",
        )
        self.join = ConvNorm(channels, 1, name="join")
        # In float32, as they are exponentiated.
        options: dict[str, Any] = {"kernel_initializer": "lecun_normal", "dtype": "float32"}
        # softplus(-3) is about 0.05: so small a share of what was gathered is added at first.
        bias = keras.initializers.Constant(-3.0)
        self.hand_out = keras.layers.Conv2D(channels, 1, bias_initializer=bias, name="hand_out", **options)
        self.gather = keras.layers.Conv2D(channels, 1, use_bias=False, name="gather", **options)

    def build(self, input_shape: Any) -> None:
        """Leaves it to the layers, when they are called."""

    def call(
        self, pyramid: Mapping[str, Tensor], *, image_size: tuple[Any, Any], training: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Applies the head."""
        feature = ops.cast(self.join(self.extractor(pyramid, training=training), training=training), "float32")
        batch, height, width = ops.shape(feature)[:3]
        channels = feature.shape[-1]
        in_rows, in_columns = (
            (ops.arange(cells) * self.stride < size) for cells, size in zip((height, width), image_size, strict=True)
        )
        is_inside = in_rows[:, None, None] & in_columns[None, :, None]  # [h, w, 1]
        gather = ops.where(is_inside, self.gather(feature), -1e9)
        gather = ops.reshape(gather, (batch, height * width, channels))  # [B, h * w, C]
        gather = ops.reshape(ops.softmax(gather, axis=1), (batch, height, width, channels))  # [B, h, w, C]
        return ops.softplus(self.hand_out(feature)) / channels, gather
