"""Semantic FPN (Panoptic FPN, section 3.1, Figure 3): its classes, its layers, its loss."""

from collections.abc import Mapping
from typing import Literal, NamedTuple

import keras
from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.base import Loss
from deeplab2_like.model.config import Norm
from deeplab2_like.model.deformable import DeformableConvNorm
from deeplab2_like.model.layers import ConvNorm, Tensor
from deeplab2_like.model.resampling import upsample_bilinear


class SemanticClasses(NamedTuple):
    """How the classes of a data set and the classes that the branch tells apart correspond.

    Attributes:
        of_class: Class of the branch for each class id.
        class_id: Class id for each class of the branch; -1 for "other".
        is_painted: For each class of the branch, whether its pixels become segments where no instance is.
    """

    of_class: tuple[int, ...]
    class_id: tuple[int, ...]
    is_painted: tuple[bool, ...]

    @classmethod
    def of(cls, info: DatasetInfo, *, things: Literal["other", "all"], paint_things: bool) -> "SemanticClasses":
        """Lists the classes.

        Args:
            info: The data set's facts.
            things: `other`: class 0 is for all things, then come the classes of stuff; `all`: the classes are those of
                the data set.
            paint_things: Whether regions of thing classes become segments; else they are void, as "other" is.
        """
        if things == "all":
            ids = range(info.num_classes)
            return cls(tuple(ids), tuple(ids), tuple(paint_things or not info.categories[i].is_thing for i in ids))
        stuff = info.stuff_classes
        of_class = tuple(stuff.index(i) + 1 if i in stuff else 0 for i in range(info.num_classes))
        return cls(of_class, (-1, *stuff), (False, *(True for _ in stuff)))

    @property
    def painted_class(self) -> tuple[int, ...]:
        """Class id for each class of the branch, -1 for those that are not painted."""
        return tuple(i if painted else -1 for i, painted in zip(self.class_id, self.is_painted, strict=True))

    def of_class_map(self, class_map: Tensor) -> Tensor:
        """Class of the branch for each pixel of an int32 map of class ids; void has a number after the last class."""
        num_classes = len(self.of_class)
        of_class = ops.array((*self.of_class, len(self.class_id)), "int32")
        return ops.take(of_class, ops.where(class_map < num_classes, class_map, num_classes))


class SemanticBranch(keras.layers.Layer):
    """Brings all levels of a pyramid to the finest one's scale, adds them up, and tells classes apart.

    Each stage is a 3x3 convolution, normalisation, ReLU and twofold bilinear enlargement; a level takes as many as it
    needs, the finest one a stage without enlargement.

    Args:
        num_classes: Output channels, C; None leaves out the last convolution, which tells classes apart.
        strides: Stride of each level, by its name, fine to coarse; each twice that of the one before.
        channels: Channels of the convolutions.
        aggregation: Whether levels are added up or joined as channels (Table 1d).
        norm: The normalisation of the stages.

    Input: dictionary of levels, float [B, h, w, C]; levels that are not in `strides` are left alone. Output: logits,
    float32 [B, h, w, num_classes] at the stride of the finest level; or the feature, float [B, h, w, channels].
    """

    def __init__(
        self,
        num_classes: int | None,
        *,
        strides: Mapping[str, int],
        channels: int,
        aggregation: Literal["sum", "concatenation"],
        norm: Norm,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        self.aggregation = aggregation
        finest = min(strides.values())
        self.stages = {
            level: [
                ConvNorm(channels, 3, norm=norm, name=f"{level}_conv{index + 1}")
                for index in range(max(1, (stride // finest).bit_length() - 1))
            ]
            for level, stride in strides.items()
        }
        self.finest = next(level for level, stride in strides.items() if stride == finest)
        # In float32, as the differences between classes matter here.
        self.predictor = (
            None if num_classes is None else keras.layers.Conv2D(num_classes, 1, dtype="float32", name="predictor")
        )

    def call(self, pyramid: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Applies the branch; see the class."""
        coarse: list[Tensor] = []
        fine: list[Tensor] = []
        for level, stages in self.stages.items():
            x = pyramid[level]
            for index, stage in enumerate(stages):
                x = stage(x if index == 0 else upsample_bilinear(x, 2), training=training)
            (fine if level == self.finest else coarse).append(x)
        # All but the finest are now at twice its stride. A sum can be enlarged in place of what is summed.
        if self.aggregation == "sum":
            coarse = [sum(coarse)] if coarse else []
        levels = [*fine, *(upsample_bilinear(x, 2) for x in coarse)]
        x = sum(levels) if self.aggregation == "sum" else ops.concatenate(levels, axis=-1)
        return x if self.predictor is None else self.predictor(ops.cast(x, "float32"))


def semantic_loss(class_map: Tensor, logits: Tensor, *, classes: SemanticClasses, stride: int) -> Loss:
    """Cross entropy of every pixel, at the resolution of the label, divided by the number of labelled pixels.

    Args:
        class_map: int32 [B, H, W] class ids; anything beyond the class ids is void.
        logits: float32 [B, h, w, C] at `stride`.
        classes: The classes of the branch.
        stride: Image pixels per logit.
    """
    height, width = class_map.shape[1:3]
    logits = upsample_bilinear(ops.cast(logits, "float32"), stride)[:, :height, :width]
    is_labelled = class_map < len(classes.of_class)
    labels = ops.take(ops.array(classes.of_class, "int32"), ops.where(is_labelled, class_map, 0))
    weight = ops.cast(is_labelled, "float32")
    cross_entropy = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return Loss(ops.sum(cross_entropy * weight), ops.sum(weight))


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
