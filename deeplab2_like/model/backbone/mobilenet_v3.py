"""MobileNetV3 (Howard et al., "Searching for MobileNetV3", 2019) with atrous convolution."""

from typing import NamedTuple

import keras
from keras import ops

from deeplab2_like.model.backbone.resnet import BlockSequence, atrous_stages, dilation_before
from deeplab2_like.model.config import AtrousConversion, Norm
from deeplab2_like.model.layers import ConvNorm, Tensor


class Bottleneck(NamedTuple):
    """One row of Tables 1 and 2 of the paper, without its stride.

    Attributes:
        kernel_size: Height and width of the depthwise kernel.
        expansion: Channels of the depthwise convolution.
        filters: Output channels.
        squeeze: Whether the block has squeeze-and-excite.
        activation: "relu" or "hard_swish".
    """

    kernel_size: int
    expansion: int
    filters: int
    squeeze: bool
    activation: str


class FinalConvolution(NamedTuple):
    """The 1x1 convolution after the last bottleneck."""

    filters: int


Stages = dict[str, tuple[Bottleneck | FinalConvolution, ...]]

# Tables 1 and 2, by the stride of the output: 2 ("stem"), 4, 8, 16 and 32. The first row of a stage has the stride.
LARGE: Stages = {
    "stem": (Bottleneck(3, 16, 16, False, "relu"),),
    "res2": (Bottleneck(3, 64, 24, False, "relu"), Bottleneck(3, 72, 24, False, "relu")),
    "res3": (
        Bottleneck(5, 72, 40, True, "relu"),
        Bottleneck(5, 120, 40, True, "relu"),
        Bottleneck(5, 120, 40, True, "relu"),
    ),
    "res4": (
        Bottleneck(3, 240, 80, False, "hard_swish"),
        Bottleneck(3, 200, 80, False, "hard_swish"),
        Bottleneck(3, 184, 80, False, "hard_swish"),
        Bottleneck(3, 184, 80, False, "hard_swish"),
        Bottleneck(3, 480, 112, True, "hard_swish"),
        Bottleneck(3, 672, 112, True, "hard_swish"),
    ),
    "res5": (
        Bottleneck(5, 672, 160, True, "hard_swish"),
        Bottleneck(5, 960, 160, True, "hard_swish"),
        Bottleneck(5, 960, 160, True, "hard_swish"),
        FinalConvolution(960),
    ),
}
SMALL: Stages = {
    "stem": (),
    "res2": (Bottleneck(3, 16, 16, True, "relu"),),
    "res3": (Bottleneck(3, 72, 24, False, "relu"), Bottleneck(3, 88, 24, False, "relu")),
    "res4": (
        Bottleneck(5, 96, 40, True, "hard_swish"),
        Bottleneck(5, 240, 40, True, "hard_swish"),
        Bottleneck(5, 240, 40, True, "hard_swish"),
        Bottleneck(5, 120, 48, True, "hard_swish"),
        Bottleneck(5, 144, 48, True, "hard_swish"),
    ),
    "res5": (
        Bottleneck(5, 288, 96, True, "hard_swish"),
        Bottleneck(5, 576, 96, True, "hard_swish"),
        Bottleneck(5, 576, 96, True, "hard_swish"),
        FinalConvolution(576),
    ),
}


def halve_last_stage(stages: Stages) -> Stages:
    """Halves the channels of the last stage, for dense prediction.

    See section 6.4 of the paper and Table 9 of Panoptic-DeepLab. The expansion of the first block stays, because it
    depends on the channels of the previous stage.
    """
    first, *others = stages["res5"]
    halved: list[Bottleneck | FinalConvolution] = [first._replace(filters=first.filters // 2)]
    for row in others:
        if isinstance(row, FinalConvolution):
            halved.append(FinalConvolution(row.filters // 2))
        else:
            halved.append(row._replace(expansion=row.expansion // 2, filters=row.filters // 2))
    return {**stages, "res5": tuple(halved)}


class SqueezeExcite(keras.layers.Layer):
    """Squeeze-and-excite: scales each channel by a factor computed from the means of all channels (section 5.3).

    The number of inner channels is a quarter of `channels`, rounded to a multiple of 8, but not down by more than 10 %.

    Input and output shape: float [B, H, W, channels].
    """

    def __init__(self, channels: int, *, name: str | None = None) -> None:
        super().__init__(name=name)
        inner = max(8, (channels // 4 + 4) // 8 * 8)
        if inner < 0.9 * channels / 4:
            inner += 8
        self.mean = keras.layers.GlobalAveragePooling2D(keepdims=True, name="mean")
        self.reduce = ConvNorm(inner, 1, name="reduce")
        self.expand = ConvNorm(channels, 1, activation="hard_sigmoid", name="expand")

    def call(self, inputs: Tensor) -> Tensor:
        """Scales the channels."""
        return inputs * self.expand(self.reduce(self.mean(inputs)))


class InvertedResidual(keras.layers.Layer):
    """1x1 expansion, depthwise convolution, squeeze-and-excite, linear 1x1 projection.

    If input and output have the same shape, the block may have an identity shortcut.

    Args:
        row: Kernel size, channels and activation.
        inputs: Input channels.
        strides: Stride of the depthwise convolution.
        dilation: Dilation of the depthwise convolution.
        shortcut: Whether the block has an identity shortcut if input and output have the same shape.
        norm: The normalization after each convolution.

    Input shape: float [B, H, W, inputs]. Output shape: float [B, ceil(H / strides), ceil(W / strides), row.filters].
    """

    def __init__(
        self,
        row: Bottleneck,
        *,
        inputs: int,
        strides: int,
        dilation: int,
        shortcut: bool,
        norm: Norm,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.expand = (
            ConvNorm(row.expansion, 1, norm=norm, activation=row.activation, name="expand")
            if row.expansion != inputs
            else None
        )
        self.depthwise = ConvNorm(
            None,
            row.kernel_size,
            strides=strides,
            dilation=dilation,
            depthwise=True,
            norm=norm,
            activation=row.activation,
            name="depthwise",
        )
        self.squeeze_excite = SqueezeExcite(row.expansion, name="squeeze_excite") if row.squeeze else None
        self.project = ConvNorm(row.filters, 1, norm=norm, activation=None, name="project")
        self.has_shortcut = shortcut and strides == 1 and inputs == row.filters

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies the block."""
        x = inputs if self.expand is None else self.expand(inputs, training=training)
        x = self.depthwise(x, training=training)
        if self.squeeze_excite is not None:
            x = self.squeeze_excite(x)
        x = self.project(x, training=training)
        return ops.add(x, inputs) if self.has_shortcut else x


class MobileNetV3(keras.layers.Layer):
    """MobileNetV3; see `build_backbone` for the contract.

    Args:
        stages: The blocks: `LARGE`, `SMALL`, or one of them after `halve_last_stage`.
        output_stride: Stride of res5; stages that would exceed it use atrous convolution instead of stride.
        atrous_conversion: Dilation of the convolutions that lost their stride, see `dilation_before`. With `exact`,
            their blocks have no shortcut, as with stride.
        norm: The normalization after each convolution.

    Attributes:
        strides: Stride of each feature map, by its name.
        channels: Channels of each feature map, by its name.
    """

    def __init__(
        self,
        *,
        stages: Stages,
        output_stride: int = 32,
        atrous_conversion: AtrousConversion = "exact",
        norm: Norm,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.strides: dict[str, int] = {}
        self.channels: dict[str, int] = {}
        atrous = atrous_stages(output_stride)
        channels = 16
        blocks: list[keras.layers.Layer] = [
            ConvNorm(channels, 3, strides=2, norm=norm, activation="hard_swish", name="conv1")
        ]
        self.stages = []
        for stage, rows in stages.items():
            # The first block of res2 has stride 2; in ResNet, the stem has this stride.
            stride, dilation = (1, 1) if stage == "stem" else atrous[stage][:2]
            stride = 2 if stage == "res2" else stride
            for index, row in enumerate(rows):
                block: keras.layers.Layer
                begins = index == 0 and stage != "stem"  # This block has, or lost, the stride of its stage.
                if isinstance(row, FinalConvolution):
                    block = ConvNorm(row.filters, 1, norm=norm, activation="hard_swish", name="conv")
                else:
                    block = InvertedResidual(
                        row,
                        inputs=channels,
                        strides=stride if index == 0 else 1,
                        dilation=dilation_before(dilation, atrous_conversion) if begins else dilation,
                        shortcut=not begins or atrous_conversion == "detectron2",
                        norm=norm,
                        name=f"block{index + 1}",
                    )
                channels = row.filters
                blocks.append(block)
            self.stages.append(BlockSequence(blocks, name=stage))
            blocks = []
            self.strides[stage] = 2 if stage == "stem" else atrous[stage][2]
            self.channels[stage] = channels

    def call(self, images: Tensor, training: bool = False) -> dict[str, Tensor]:
        """Extracts features.

        Args:
            images: float [B, H, W, 3], normalized, H and W multiples of 32.
            training: Whether normalization uses the statistics of the batch and updates its moving averages.

        Returns:
            float [B, H / stride, W / stride, C] for `stem` and each of res2 to res5.
        """
        features = {}
        x = images
        for stage in self.stages:
            x = stage(x, training=training)
            features[stage.name] = x
        return features
