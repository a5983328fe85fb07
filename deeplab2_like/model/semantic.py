"""Semantic heads on a feature pyramid: those of Semantic FPN (Panoptic FPN, Figure 3) and of UPSNet, and their loss."""

import itertools
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import keras
from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.base import Loss
from deeplab2_like.model.config import Norm
from deeplab2_like.model.deformable import DeformableConvNorm
from deeplab2_like.model.layers import ConvNorm, Tensor, msra_initializer
from deeplab2_like.model.resampling import upsample_bilinear


class SemanticClasses(NamedTuple):
    """The correspondence between class ids and the semantic classes, which a semantic head predicts.

    Attributes:
        of_class: Semantic class of each class id.
        class_id: Class id of each semantic class; -1 for "other".
        is_painted: For each semantic class, whether its pixels without an instance become segments.
    """

    of_class: tuple[int, ...]
    class_id: tuple[int, ...]
    is_painted: tuple[bool, ...]

    @classmethod
    def of(cls, info: DatasetInfo, *, things: Literal["other", "all"], paint_things: bool) -> "SemanticClasses":
        """Makes the semantic classes of a data set.

        Args:
            info: The classes of the data set.
            things: `other`: semantic class 0 stands for all things, and stuff classes follow; `all`: the semantic
                classes are those of the data set.
            paint_things: Whether regions of thing classes become segments; otherwise they are void, like "other".
        """
        if things == "all":
            ids = range(info.num_classes)
            return cls(tuple(ids), tuple(ids), tuple(paint_things or not info.categories[i].is_thing for i in ids))
        stuff = info.stuff_classes
        of_class = tuple(stuff.index(i) + 1 if i in stuff else 0 for i in range(info.num_classes))
        return cls(of_class, (-1, *stuff), (False, *(True for _ in stuff)))

    @property
    def painted_class(self) -> tuple[int, ...]:
        """Class id of each semantic class, -1 for those that are not painted."""
        return tuple(i if painted else -1 for i, painted in zip(self.class_id, self.is_painted, strict=True))

    @property
    def predicted(self) -> tuple[int, ...]:
        """Class ids that are semantic classes of their own, ascending."""
        return tuple(sorted(i for i in self.class_id if i >= 0))

    def to_class_ids(self, semantic: Tensor, ignore_label: int) -> Tensor:
        """Turns semantic classes into class ids, int32 [B, H, W] each; "other" and void become the ignore label."""
        class_ids = [*(i if i >= 0 else ignore_label for i in self.class_id), ignore_label]
        return ops.take(ops.array(class_ids, "int32"), semantic)

    def of_class_map(self, class_map: Tensor) -> Tensor:
        """Returns the semantic class of each pixel, int32 [B, H, W]; void gets the number of semantic classes.

        Args:
            class_map: int32 [B, H, W], class ids; anything beyond the class ids is void.
        """
        num_classes = len(self.of_class)
        of_class = ops.array((*self.of_class, len(self.class_id)), "int32")
        return ops.take(of_class, ops.where(class_map < num_classes, class_map, num_classes))


class SemanticBranch(keras.layers.Layer):
    """The semantic branch of Semantic FPN: upsamples all levels to the finest one, adds them, and predicts the classes.

    A stage is a 3x3 convolution, normalization, ReLU and twofold bilinear upsampling. A level with 2**n times the
    stride of the finest level passes n stages; the finest level passes one stage without upsampling.

    Args:
        num_classes: Output channels; None leaves out the last convolution, which predicts the classes.
        strides: Stride of each level, by its name, fine to coarse; each twice that of the previous one.
        channels: Channels of the convolutions.
        aggregation: Whether levels are added or concatenated (Table 1d).
        norm: The normalization of the stages.

    Input: dictionary of levels, float [B, h, w, C]; levels that are not in `strides` are ignored. Output: logits,
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
        self.num_stages = {level: max(1, (stride // finest).bit_length() - 1) for level, stride in strides.items()}
        # One flat list, as Keras' saving does not find layers in nested containers.
        self.convolutions = [
            ConvNorm(channels, 3, norm=norm, initializer=msra_initializer(), name=f"{level}_conv{index + 1}")
            for level, number in self.num_stages.items()
            for index in range(number)
        ]
        self.finest = next(level for level, stride in strides.items() if stride == finest)
        # In float32, as small differences between classes matter here.
        self.predictor = (
            None
            if num_classes is None
            else keras.layers.Conv2D(
                num_classes, 1, kernel_initializer=msra_initializer(), dtype="float32", name="predictor"
            )
        )

    @property
    def stages(self) -> dict[str, list[ConvNorm]]:
        """The convolutions of each level, by its name."""
        convolutions = iter(self.convolutions)
        return {level: list(itertools.islice(convolutions, number)) for level, number in self.num_stages.items()}

    def call(self, pyramid: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Applies the branch; see the class."""
        coarse: list[Tensor] = []
        fine: list[Tensor] = []
        for level, stages in self.stages.items():
            x = pyramid[level]
            for index, stage in enumerate(stages):
                x = stage(x if index == 0 else upsample_bilinear(x, 2), training=training)
            (fine if level == self.finest else coarse).append(x)
        # The coarse levels are now at twice the stride of the finest one; their sum is upsampled at once.
        if self.aggregation == "sum":
            coarse = [sum(coarse)] if coarse else []
        levels = [*fine, *(upsample_bilinear(x, 2) for x in coarse)]
        x = sum(levels) if self.aggregation == "sum" else ops.concatenate(levels, axis=-1)
        return x if self.predictor is None else self.predictor(ops.cast(x, "float32"))


def semantic_loss(class_map: Tensor, logits: Tensor, *, classes: SemanticClasses, stride: int) -> Loss:
    """Computes the cross entropy of every labeled pixel, at the resolution of the label.

    Args:
        class_map: int32 [B, H, W] class ids; anything beyond the class ids is void.
        logits: float32 [B, h, w, S] at `stride`.
        classes: The semantic classes.
        stride: Image pixels per logit.

    Returns:
        The sum over labeled pixels, and their number.
    """
    height, width = class_map.shape[1:3]
    logits = upsample_bilinear(ops.cast(logits, "float32"), stride)[:, :height, :width]
    is_labeled = class_map < len(classes.of_class)
    labels = ops.take(ops.array(classes.of_class, "int32"), ops.where(is_labeled, class_map, 0))
    weight = ops.cast(is_labeled, "float32")
    cross_entropy = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True)
    return Loss(ops.sum(cross_entropy * weight), ops.sum(weight))


class SemanticSubnet(keras.layers.Layer):
    """The semantic head of UPSNet: the same convolutions on each level, upsampled to the finest one and concatenated.

    Args:
        num_classes: Output channels; None leaves out the last convolution, which predicts the classes.
        strides: Stride of each level, by its name, fine to coarse; each twice that of the previous one.
        input_channels: Channels of the levels, and of all convolutions but the last two.
        channels: Channels of the last two convolutions.
        convolutions: Number of convolutions; UPSNet has two for Cityscapes and three for COCO.
        deformable: Whether they are deformable (without modulation).
        norm: Their normalization; None for none, as in UPSNet.
        make_initializer: Makes the initializer of the kernel of each convolution.

    Input: dictionary of levels, float [B, h, w, input_channels]; levels that are not in `strides` are ignored. Output:
    logits, float32 [B, h, w, num_classes] at the stride of the finest level; or the concatenated feature, float
    [B, h, w, levels * channels].
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
        make_initializer: Callable[[], keras.initializers.Initializer] = keras.initializers.HeNormal,
        name: str | None = None,
    ) -> None:
        super().__init__(name=name)
        finest = min(strides.values())
        self.factors = {level: stride // finest for level, stride in strides.items()}

        def convolution(index: int) -> ConvNorm | DeformableConvNorm:
            width = channels if index >= convolutions - 2 else input_channels
            options: dict[str, Any] = {"norm": norm, "initializer": make_initializer(), "name": f"conv{index + 1}"}
            if deformable:
                return DeformableConvNorm(width, 3, modulated=False, **options)
            return ConvNorm(width, 3, **options)

        self.convolutions = [convolution(index) for index in range(convolutions)]
        # In float32, as small differences between classes matter here.
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
        """Does nothing: layers build themselves when called, and Keras would trace all convolutions first."""

    def call(self, pyramid: Mapping[str, Tensor], training: bool = False) -> Tensor:
        """Applies the head; see the class."""
        levels = []
        for level, factor in self.factors.items():
            x = pyramid[level]
            for convolution in self.convolutions:
                x = convolution(x, training=training)
            levels.append(upsample_bilinear(x, factor))
        x = ops.concatenate(levels, axis=-1)
        return x if self.predictor is None else self.predictor(ops.cast(x, "float32"))
