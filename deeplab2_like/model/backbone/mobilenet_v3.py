"""MobileNetV3 (Howard et al., "Searching for MobileNetV3", 2019) with atrous convolution."""

from typing import Any, NamedTuple

import keras
from keras import ops

from deeplab2_like.model.backbone.resnet import BlockSequence, atrous_stages, dilation_before, lost_stride_shift
from deeplab2_like.model.config import AtrousConversion, Norm, Padding
from deeplab2_like.model.layers import ConvNorm, Tensor


class Bottleneck(NamedTuple):
    """One row of Tables 1 and 2 of the paper, without its stride.

    Attributes:
        kernel_size: Height and width of the depthwise kernel.
        expansion: Channels of the depthwise convolution.
        filters: Output channels.
        squeeze: Whether the block has squeeze-and-excite.
        activation: "relu", "relu6" or "hard_swish".
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


def list_blocks(stages: Stages) -> list[tuple[str, Bottleneck | FinalConvolution]]:
    """Lists the blocks of all stages in order, each with its path in the backbone.

    Args:
        stages: The blocks of each stage.

    Returns:
        Path and row of each block: `res3/block1` for the first bottleneck of a stage, `res5` for the final convolution.
    """
    return [
        (f"{stage}/block{number}" if isinstance(row, Bottleneck) else stage, row)
        for stage, rows in stages.items()
        for number, row in enumerate(rows, start=1)
    ]


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

    Args:
        channels: Channels of the input.
        gate: Name of the activation of the factors.

    Input and output shape: float [B, H, W, channels].
    """

    def __init__(self, channels: int, *, gate: str = "hard_sigmoid", name: str | None = None) -> None:
        super().__init__(name=name)
        inner = max(8, (channels // 4 + 4) // 8 * 8)
        if inner < 0.9 * channels / 4:
            inner += 8
        self.mean = keras.layers.GlobalAveragePooling2D(keepdims=True, name="mean")
        self.reduce = ConvNorm(inner, 1, name="reduce")
        self.expand = ConvNorm(channels, 1, activation=gate, name="expand")

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
        padding: Padding of the depthwise convolution, see `ConvNorm`.
        lost_stride_shift: Of the depthwise convolution, see `ConvNorm`.
        norm: The normalization after each convolution.
        squeeze_gate: Name of the activation of the factors of squeeze-and-excite.
        with_depthwise: Whether to return the output of the depthwise convolution, too.

    Input shape: float [B, H, W, inputs]. Output shape: float [B, ceil(H / strides), ceil(W / strides), row.filters],
    and with `with_depthwise` also float [B, ceil(H / strides), ceil(W / strides), row.expansion].
    """

    def __init__(  # noqa: PLR0913 - the choices that make the family of networks
        self,
        row: Bottleneck,
        *,
        inputs: int,
        strides: int,
        dilation: int,
        shortcut: bool,
        padding: Padding = "symmetric",
        lost_stride_shift: int = 0,
        norm: Norm,
        squeeze_gate: str = "hard_sigmoid",
        with_depthwise: bool = False,
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
            padding=padding,
            lost_stride_shift=lost_stride_shift,
            norm=norm,
            activation=row.activation,
            name="depthwise",
        )
        self.squeeze_excite = (
            SqueezeExcite(row.expansion, gate=squeeze_gate, name="squeeze_excite") if row.squeeze else None
        )
        self.with_depthwise = with_depthwise
        self.project = ConvNorm(row.filters, 1, norm=norm, activation=None, name="project")
        self.has_shortcut = shortcut and strides == 1 and inputs == row.filters

    def call(self, inputs: Tensor, training: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Applies the block."""
        x = inputs if self.expand is None else self.expand(inputs, training=training)
        depthwise = x = self.depthwise(x, training=training)
        if self.squeeze_excite is not None:
            x = self.squeeze_excite(x)
        x = self.project(x, training=training)
        if self.has_shortcut:
            x = ops.add(x, inputs)
        return (x, depthwise) if self.with_depthwise else x


class InvertedResidualNetwork(keras.layers.Layer):
    """A convolution and stages of inverted residuals; see `build_backbone` for the contract.

    Args:
        stages: The blocks of each stage.
        first_filters: Output channels of the first convolution.
        activation: Activation of the first convolution and of a final one.
        output_stride: Stride of res5; stages that would exceed it use atrous convolution instead of stride.
        atrous_conversion: Dilation of the convolutions that lost their stride, see `dilation_before`. With `exact`,
            their blocks have no shortcut, as with stride.
        squeeze_gate: Name of the activation of the factors of squeeze-and-excite.
        depthwise_features: Whether the features of a stage are the outputs of its last depthwise convolution, if a
            block ends the stage.
        padding: Padding of convolutions with stride, see `ConvNorm`.
        norm: The normalization after each convolution.

    Attributes:
        strides: Stride of each feature map, by its name.
        channels: Channels of each feature map, by its name.
    """

    def __init__(
        self,
        *,
        stages: Stages,
        first_filters: int,
        activation: str,
        output_stride: int = 32,
        atrous_conversion: AtrousConversion = "exact",
        squeeze_gate: str = "hard_sigmoid",
        depthwise_features: bool = False,
        padding: Padding = "symmetric",
        norm: Norm,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.strides: dict[str, int] = {}
        self.channels: dict[str, int] = {}
        atrous = atrous_stages(output_stride)
        channels = first_filters
        blocks: list[keras.layers.Layer] = [
            ConvNorm(channels, 3, strides=2, padding=padding, norm=norm, activation=activation, name="conv1")
        ]
        self.stages = []
        for stage, rows in stages.items():
            # The first block of res2 has stride 2; in ResNet, the stem has this stride.
            self.channels[stage] = channels
            stride, dilation = (1, 1) if stage == "stem" else atrous[stage][:2]
            stride = 2 if stage == "res2" else stride
            for index, row in enumerate(rows):
                block: keras.layers.Layer
                begins = index == 0 and stage != "stem"  # This block has, or lost, the stride of its stage.
                if isinstance(row, FinalConvolution):
                    block = ConvNorm(row.filters, 1, norm=norm, activation=activation, name="conv")
                    self.channels[stage] = row.filters
                else:
                    ends = index == len(rows) - 1
                    block = InvertedResidual(
                        row,
                        inputs=channels,
                        strides=stride if index == 0 else 1,
                        dilation=dilation_before(dilation, atrous_conversion) if begins else dilation,
                        shortcut=not begins or atrous_conversion == "detectron2",
                        padding=padding,
                        lost_stride_shift=lost_stride_shift(dilation, atrous_conversion) if begins else 0,
                        norm=norm,
                        squeeze_gate=squeeze_gate,
                        with_depthwise=depthwise_features and ends,
                        name=f"block{index + 1}",
                    )
                    self.channels[stage] = row.expansion if depthwise_features and ends else row.filters
                channels = row.filters
                blocks.append(block)
            self.stages.append(BlockSequence(blocks, name=stage))
            blocks = []
            self.strides[stage] = 2 if stage == "stem" else atrous[stage][2]

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
            x, features[stage.name] = x if isinstance(x, tuple) else (x, x)
        return features


class MobileNetV3(InvertedResidualNetwork):
    """MobileNetV3; see `build_backbone` for the contract.

    Args:
        stages: The blocks: `LARGE`, `SMALL`, or one of them after `halve_last_stage`.
        options: As for `InvertedResidualNetwork`.
    """

    def __init__(self, *, stages: Stages, **options: Any) -> None:
        super().__init__(stages=stages, first_filters=16, activation="hard_swish", **options)
