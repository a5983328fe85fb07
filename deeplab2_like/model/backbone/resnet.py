"""ResNet (He et al., "Deep residual learning for image recognition", 2016) with atrous convolution.

With `groups` it is ResNeXt (Xie et al., "Aggregated residual transformations for deep neural networks", 2017).

As in DeepLab, stages after the output stride is reached keep the resolution and multiply the dilation of their 3x3
convolutions instead; `multi_grid` multiplies the dilations inside the last stage (Chen et al., 2017).
"""

import enum
import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import keras

from deeplab2_like.model.config import AtrousConversion, Norm, Padding
from deeplab2_like.model.deformable import DeformableConvNorm
from deeplab2_like.model.layers import ConvNorm, Tensor

STAGES = ("res2", "res3", "res4", "res5")


class Stem(NamedTuple):
    """The layers before the stages, which reduce the image to stride 4, or to stride 2 if the first stage has a stride.

    Attributes:
        convolutions: (filters, kernel size, stride) of each.
        max_pool: Whether a 3x3 max pooling with stride 2 follows.
    """

    convolutions: tuple[tuple[int, int, int], ...]
    max_pool: bool

    @property
    def strides(self) -> list[int]:
        """Stride of the output of each convolution."""
        return list(itertools.accumulate((stride for _, _, stride in self.convolutions), operator.mul))

    @property
    def output_stride(self) -> int:
        """Stride of the features that the stages start from."""
        return self.strides[-1] * (2 if self.max_pool else 1)


SEVEN_BY_SEVEN = Stem(((64, 7, 2),), max_pool=True)
THREE_CONVOLUTIONS = Stem(((64, 3, 2), (64, 3, 1), (128, 3, 1)), max_pool=True)
TINY_STEM = Stem(((24, 3, 2), (32, 3, 2)), max_pool=False)


class BlockKind(enum.Enum):
    """Kind of residual block; the value is its output channels divided by its width."""

    BASIC = 1
    BOTTLENECK = 4


def atrous_stages(output_stride: int) -> dict[str, tuple[int, int, int]]:
    """Splits the strides of the stages into stride and dilation.

    Args:
        output_stride: Stride of the last stage: 4, 8, 16 or 32.

    Returns:
        For each stage: the stride of its first block, the dilation after this stride, and the stride of its features.
    """
    stages = {}
    for stage, stride in zip(STAGES, (4, 8, 16, 32), strict=True):
        feature_stride = min(stride, output_stride)
        block_stride = 2 if 4 < stride <= output_stride else 1
        stages[stage] = (block_stride, stride // feature_stride, feature_stride)
    return stages


def dilation_before(dilation: int, conversion: AtrousConversion) -> int:
    """Returns the dilation of the convolution that has, or lost, the stride of a stage.

    Args:
        dilation: Dilation after this convolution, see `atrous_stages`.
        conversion: `exact`: where the stride became a factor of 2 of the dilation, this convolution still has the
            dilation before it. Its input is as dense as that of the strided one, whose outputs it then computes at
            every second position. `detectron2`: it has the dilation of the stage.
    """
    return max(1, dilation // 2) if conversion == "exact" else dilation


def stem_feature(stem: Stem) -> int:
    """Returns the position of the last convolution with output stride 2."""
    return max(index for index, stride in enumerate(stem.strides) if stride == 2)


def lost_stride_shift(dilation: int, conversion: AtrousConversion) -> int:
    """Returns the argument `lost_stride_shift` of `ConvNorm` for the convolution that has, or lost, a stage's stride.

    Args:
        dilation: Dilation after this convolution, see `atrous_stages`.
        conversion: See `dilation_before`; `detectron2` has no shift.
    """
    return dilation // 2 if conversion == "exact" else 0


class StemLayer(keras.layers.Layer):
    """Runs a `Stem`.

    Input shape: float [B, H, W, 3]. Output: the last features at stride 2, float [B, H / 2, W / 2, C], and those that
    the stages start from, float [B, H / s, W / s, C] with the stride s of the stem's output.
    """

    def __init__(self, stem: Stem, *, padding: Padding = "symmetric", norm: Norm, name: str | None = None) -> None:
        super().__init__(name=name)
        self.convolutions = [
            ConvNorm(filters, kernel_size, strides=stride, padding=padding, norm=norm, name=f"conv{index}")
            for index, (filters, kernel_size, stride) in enumerate(stem.convolutions, start=1)
        ]
        # Padding with zeros is safe: after ReLU no feature is negative, so a zero never exceeds one.
        self.pad = keras.layers.ZeroPadding2D(1, name="pad") if stem.max_pool and padding == "symmetric" else None
        self.feature = stem_feature(stem)
        self.max_pool = (
            keras.layers.MaxPooling2D(3, strides=2, padding="same" if padding == "same" else "valid", name="max_pool")
            if stem.max_pool
            else None
        )

    def call(self, images: Tensor, training: bool = False) -> tuple[Tensor, Tensor]:
        """Applies the stem."""
        features = [images]
        for convolution in self.convolutions:
            features.append(convolution(features[-1], training=training))
        last = features[-1]
        if self.max_pool is not None:
            last = self.max_pool(last if self.pad is None else self.pad(last))
        return features[self.feature + 1], last


class ResidualBlock(keras.layers.Layer):
    """A residual block: convolutions and a shortcut around them, added before the last ReLU.

    Args:
        block: `BASIC`: two 3x3 convolutions; `BOTTLENECK`: 1x1, 3x3 and 1x1 to four times the width.
        width: Channels inside the block.
        strides: Stride of the block.
        dilation: Dilation of its 3x3 convolutions.
        dilation_before: Dilation of the convolution with the stride, if it is a 3x3; by default `dilation`.
        lost_stride_shift: See `ConvNorm`; for the convolution with the stride, if it is a 3x3.
        stride_in_1x1: Whether a bottleneck has its stride in the first 1x1 convolution instead of in the 3x3.
        project: Whether the shortcut is a 1x1 convolution instead of the identity.
        norm: The normalization after each convolution.
        groups: Groups of the 3x3 convolution of a bottleneck.
        deformable: Whether the 3x3 convolution of a bottleneck is deformable; not with groups.
        padding: See `ConvNorm`; a deformable convolution is always symmetric.
        channels: Output channels; by default `width * block.value`.

    Input shape: float [B, H, W, C]. Output shape: float [B, ceil(H / strides), ceil(W / strides), channels].
    """

    def __init__(  # noqa: PLR0913 - the choices that make the family of networks
        self,
        block: BlockKind,
        width: int,
        *,
        strides: int,
        dilation: int,
        dilation_before: int | None = None,
        lost_stride_shift: int = 0,
        stride_in_1x1: bool,
        project: bool,
        norm: Norm,
        groups: int = 1,
        deformable: bool = False,
        padding: Padding = "symmetric",
        channels: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        channels = channels or width * block.value
        dilation_before = dilation_before or dilation
        self.shortcut = (
            ConvNorm(channels, 1, strides=strides, norm=norm, activation=None, name="shortcut") if project else None
        )
        if block is BlockKind.BASIC:
            self.convolutions = [
                ConvNorm(
                    width,
                    3,
                    strides=strides,
                    dilation=dilation_before,
                    padding=padding,
                    lost_stride_shift=lost_stride_shift,
                    norm=norm,
                    name="conv1",
                ),
                ConvNorm(channels, 3, dilation=dilation, norm=norm, activation=None, name="conv2"),
            ]
        else:
            first, second = (strides, 1) if stride_in_1x1 else (1, strides)
            middle: dict[str, Any] = {
                "strides": second,
                "dilation": dilation if stride_in_1x1 else dilation_before,
                "norm": norm,
                "name": "conv2",
            }
            padded: dict[str, Any] = {
                "padding": padding,
                "lost_stride_shift": 0 if stride_in_1x1 else lost_stride_shift,
            }
            self.convolutions = [
                ConvNorm(width, 1, strides=first, norm=norm, name="conv1"),
                DeformableConvNorm(width, 3, **middle)
                if deformable
                else ConvNorm(width, 3, groups=groups, **padded, **middle),
                ConvNorm(channels, 1, norm=norm, activation=None, name="conv3"),
            ]

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies the block."""
        x = inputs
        for convolution in self.convolutions:
            x = convolution(x, training=training)
        shortcut = inputs if self.shortcut is None else self.shortcut(inputs, training=training)
        return keras.ops.relu(x + shortcut)


class BlockSequence(keras.layers.Layer):
    """A stage: its blocks in sequence. It gives their variables the name of the stage.

    Input shape: float [B, H, W, C]. Output shape: as the last block.
    """

    def __init__(self, blocks: Sequence[keras.layers.Layer], *, name: str | None = None) -> None:
        super().__init__(name=name)
        self.blocks = list(blocks)

    def call(self, inputs: Tensor, training: bool = False) -> Tensor:
        """Applies the blocks."""
        x = inputs
        for block in self.blocks:
            x = block(x, training=training)
        return x


class ResNet(keras.layers.Layer):
    """Residual network; see `build_backbone` for the contract.

    Args:
        stem: The layers before the stages.
        block: Kind of the residual blocks.
        widths: Channels inside the blocks of each of the four stages.
        depths: Blocks in each of the four stages.
        output_stride: Stride of res5; stages that would exceed it use atrous convolution instead of stride.
        multi_grid: Factors of the dilation of the blocks of res5; they repeat if res5 has more blocks.
        atrous_conversion: Dilation of the convolutions that lost their stride, see `dilation_before`.
        stride_in_1x1: Whether bottlenecks have their stride in the first 1x1 convolution instead of in the 3x3.
        norm: The normalization after each convolution.
        deformable_stages: Stages whose 3x3 convolutions are deformable; not with groups.
        padding: Padding of convolutions and pooling with stride, see `ConvNorm`.
        groups: Groups of the 3x3 convolutions of bottlenecks: the "cardinality" of ResNeXt.
        group_width: Channels of each group in the first stage, in place of `widths`; each stage doubles it. The output
            channels of a stage still follow `widths`. ResNeXt-101 32x8d has 32 groups of width 8.

    Attributes:
        strides: Stride of each feature map, by its name.
        channels: Channels of each feature map, by its name.
    """

    def __init__(  # noqa: PLR0913 - the choices that make the family of networks
        self,
        *,
        stem: Stem,
        block: BlockKind,
        widths: Sequence[int],
        depths: Sequence[int],
        output_stride: int = 32,
        multi_grid: Sequence[int] = (1, 1, 1),
        atrous_conversion: AtrousConversion = "exact",
        stride_in_1x1: bool = False,
        deformable_stages: Sequence[str] = (),
        padding: Padding = "symmetric",
        norm: Norm,
        groups: int = 1,
        group_width: int | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.strides: dict[str, int] = {"stem": 2}
        self.channels: dict[str, int] = {"stem": stem.convolutions[stem_feature(stem)][0]}
        self.stem = StemLayer(stem, padding=padding, norm=norm, name="stem")
        self.stages = []
        for (stage, (stride, dilation, feature_stride)), width, depth in zip(
            atrous_stages(output_stride).items(), widths, depths, strict=True
        ):
            if stage == STAGES[0]:
                stride = feature_stride // stem.output_stride
            grid = [multi_grid[index % len(multi_grid)] if stage == STAGES[-1] else 1 for index in range(depth)]
            blocks = [
                ResidualBlock(
                    block,
                    width if group_width is None else groups * group_width * width // widths[0],
                    strides=stride if index == 0 else 1,
                    dilation=dilation * grid[index],
                    dilation_before=(dilation if index else dilation_before(dilation, atrous_conversion)) * grid[index],
                    lost_stride_shift=0 if index else lost_stride_shift(dilation, atrous_conversion),
                    stride_in_1x1=stride_in_1x1,
                    project=index == 0,
                    norm=norm,
                    groups=groups,
                    deformable=stage in deformable_stages,
                    padding=padding,
                    channels=width * block.value,
                    name=f"block{index + 1}",
                )
                for index in range(depth)
            ]
            self.stages.append(BlockSequence(blocks, name=stage))
            self.strides[stage] = feature_stride
            self.channels[stage] = width * block.value

    def call(self, images: Tensor, training: bool = False) -> dict[str, Tensor]:
        """Extracts features.

        Args:
            images: float [B, H, W, 3], normalized, H and W multiples of 32.
            training: Whether normalization uses the statistics of the batch and updates its moving averages.

        Returns:
            float [B, H / stride, W / stride, C] for `stem` and each of res2 to res5.
        """
        features = {}
        features["stem"], x = self.stem(images, training=training)
        for stage in self.stages:
            x = stage(x, training=training)
            features[stage.name] = x
        return features
