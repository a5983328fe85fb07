"""The layers that the unifying system adds to pyramid, detector and semantic head (sections 3.1 and 3.4.2)."""

from collections.abc import Mapping
from typing import Any

import keras
from keras import ops

from deeplab2_like.model.geometry import Size
from deeplab2_like.model.layers import ConvNorm, Tensor
from deeplab2_like.model.semantic import SemanticSubnet
from deeplab2_like.model.unifying.config import SemanticConfig


class SqueezeExcitation(keras.layers.Layer):
    """Weighs channels by a small network on their means (Hu et al., CVPR 2018).

    Args:
        channels: Channels, C; the hidden layer has a sixteenth of them.

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


def build_subnet(
    config: SemanticConfig, num_classes: int | None, *, strides: Mapping[str, int], input_channels: int, name: str
) -> SemanticSubnet:
    """Builds the semantic head, or the extractor of the affinity head.

    Args:
        config: Channels and convolutions.
        num_classes: Output channels; None for the extractor.
        strides: Stride of each level, by its name, fine to coarse.
        input_channels: Channels of the levels.
        name: Name of the layer.
    """
    return SemanticSubnet(
        num_classes,
        strides=strides,
        input_channels=input_channels,
        channels=config.channels,
        convolutions=config.convolutions,
        deformable=config.deformable,
        norm=config.norm,
        name=name,
    )


class AffinityHead(keras.layers.Layer):
    """Features whose products are the affinities of pixels (section 3.4.2, Figure 5).

    The extractor is built like the semantic submodule and gives the feature Q of C channels. Two 1x1 convolutions with
    activations turn it into the two factors of the affinities (equation 4). The paper does not name the activations.
    The key, phi_1, has a softmax over all pixels (Shen et al., "Efficient attention", 2018), so that its product with
    the potentials is a mean over the image, whatever its size and padding. The query, phi_0, has a softplus divided by
    C, so that no affinity is negative, and the update is a mean over channels.

    Args:
        config: Channels and convolutions of the extractor.
        strides: Stride of each level, by its name, fine to coarse.
        input_channels: Channels of the levels.

    Input: dictionary of levels, float [B, h, w, input_channels], and the height and width of the image without
    padding, ints or int32 scalars. Output: query and key, float32 [B, h, w, C] at the stride of the finest level.
    """

    def __init__(
        self, config: SemanticConfig, *, strides: Mapping[str, int], input_channels: int, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        self.stride = min(strides.values())
        self.extractor = build_subnet(config, None, strides=strides, input_channels=input_channels, name="extractor")
        self.join = ConvNorm(config.channels, 1, name="join")
        # In float32, as they are exponentiated.
        options: dict[str, Any] = {"kernel_initializer": "lecun_normal", "dtype": "float32"}
        # softplus(-3) is about 0.05: affinities change potentials little at first.
        bias = keras.initializers.Constant(-3.0)
        # The names of these layers are part of the variable paths of checkpoints.
        self.query = keras.layers.Conv2D(config.channels, 1, bias_initializer=bias, name="hand_out", **options)
        self.key = keras.layers.Conv2D(config.channels, 1, use_bias=False, name="gather", **options)

    def build(self, input_shape: Any) -> None:
        """Does nothing: layers build themselves when called."""

    def call(self, pyramid: Mapping[str, Tensor], *, image_size: Size, training: bool = False) -> tuple[Tensor, Tensor]:
        """Applies the head."""
        feature = ops.cast(self.join(self.extractor(pyramid, training=training), training=training), "float32")
        batch, height, width = ops.shape(feature)[:3]
        channels = feature.shape[-1]
        in_rows, in_columns = (
            (ops.arange(cells) * self.stride < size) for cells, size in zip((height, width), image_size, strict=True)
        )
        is_inside = in_rows[:, None, None] & in_columns[None, :, None]  # [h, w, 1]
        key = ops.where(is_inside, self.key(feature), -1e9)
        key = ops.reshape(key, (batch, height * width, channels))  # [B, h * w, C]
        key = ops.reshape(ops.softmax(key, axis=1), (batch, height, width, channels))  # [B, h, w, C]
        return ops.softplus(self.query(feature)) / channels, key
