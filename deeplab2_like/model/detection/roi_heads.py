"""The second stage of Mask R-CNN: training samples, box head, mask head, their losses, and the final detections."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from deeplab2_like.model.base import Loss
from deeplab2_like.model.boxes import (
    box_area,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    non_maximum_suppression,
    take_rows,
)
from deeplab2_like.model.detection.matching import crowd_share, match_boxes, sample_balanced, top_k_padded
from deeplab2_like.model.layers import Tensor


def sample_rois(
    proposals: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    *,
    num_classes: int,
    seed: Tensor,
    foreground_iou: float = 0.5,
    max_crowd_share: float = 0.5,
    number: int = 512,
    foreground_number: int = 128,
) -> dict[str, Tensor]:
    """Draws the RoIs that the heads are trained with, from the proposals and the boxes of the ground truth.

    Args:
        proposals: `boxes` [B, P, 4] and `valid` [B, P] of `propose`.
        targets: What `instance_targets` returned, batched.
        num_classes: Number of thing classes, T.
        seed: int32 [2] for the random choice.
        foreground_iou: Overlap from which a box is foreground.
        max_crowd_share: Boxes that are crowd to a larger share than this are never background.
        number: How many are drawn per image, S.
        foreground_number: How many of them may be foreground.

    Returns:
        `boxes`: float32 [B, S, 4]. `valid`: bool [B, S]. `foreground`: bool [B, S], True only among the first
        `foreground_number` rows. `classes`: int32 [B, S], the thing class, T for background. `row`: int32 [B, S], the
        matched instance's row. `matched_boxes`: float32 [B, S, 4], its box.
    """
    boxes = ops.concatenate([proposals["boxes"], targets["boxes"]], axis=1)  # [B, P + M, 4]
    usable = ops.concatenate([proposals["valid"], targets["valid"]], axis=1)
    iou, row, _ = match_boxes(boxes, targets["boxes"], targets["valid"])
    is_foreground = iou >= foreground_iou
    is_crowd = crowd_share(boxes, targets["instance_map"]) > max_crowd_share
    index, foreground, valid = sample_balanced(
        usable & is_foreground,
        usable & ~is_foreground & ~is_crowd,
        number=number,
        max_positive=foreground_number,
        seed=seed,
    )
    row = take_rows(row, index)
    return {
        "boxes": take_rows(boxes, index),
        "valid": valid,
        "foreground": foreground,
        "classes": ops.where(foreground, take_rows(targets["classes"], row), num_classes),
        "row": row,
        "matched_boxes": take_rows(targets["boxes"], row),
    }


class BoxHead(keras.layers.Layer):
    """Class and box of each RoI.

    Args:
        num_classes: Number of thing classes, T.
        channels: Channels of the two hidden layers.

    Input: float [B, R, P, P, C]. Output: class logits float32 [B, R, T + 1], background last, and box deltas float32
    [B, R, T, 4] (dy, dx, dh, dw).
    """

    def __init__(self, *, num_classes: int, channels: int = 1024, name: str | None = None) -> None:
        super().__init__(name=name)
        self.num_classes = num_classes
        options = {"activation": "relu", "kernel_initializer": "he_uniform"}
        self.hidden = [keras.layers.Dense(channels, name=f"dense{k}", **options) for k in (1, 2)]
        self.classes = keras.layers.Dense(
            num_classes + 1, kernel_initializer=keras.initializers.RandomNormal(stddev=0.01), name="classes"
        )
        self.deltas = keras.layers.Dense(
            4 * num_classes, kernel_initializer=keras.initializers.RandomNormal(stddev=0.001), name="deltas"
        )

    def call(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Applies the head."""
        batch, rois = ops.shape(pooled)[:2]
        _, _, rows, columns, channels = pooled.shape
        x = ops.reshape(pooled, (batch, rois, rows * columns * channels))  # [B, R, P * P * C]
        for layer in self.hidden:
            x = layer(x)
        deltas = ops.reshape(self.deltas(x), (batch, rois, self.num_classes, 4))  # [B, R, T, 4]
        return ops.cast(self.classes(x), "float32"), ops.cast(deltas, "float32")


def box_losses(
    class_logits: Tensor, deltas: Tensor, samples: Mapping[str, Tensor], *, weights: Sequence[float]
) -> dict[str, Loss]:
    """Cross entropy of all samples and L1 distance of the foreground, both per sample (section 3.2).

    Args:
        class_logits: float32 [B, S, T + 1].
        deltas: float32 [B, S, T, 4].
        samples: What `sample_rois` returned.
        weights: Factors of the deltas.

    Returns:
        `box_class` and `box`.
    """
    valid = ops.cast(samples["valid"], "float32")
    foreground = ops.cast(samples["foreground"], "float32") * valid
    cross_entropy = ops.sparse_categorical_crossentropy(samples["classes"], class_logits, from_logits=True)
    expected = encode_boxes(samples["matched_boxes"], samples["boxes"], weights)
    predicted = _of_class(deltas, samples["classes"])  # [B, S, 4]
    distance = ops.sum(ops.abs(predicted - expected), axis=-1)
    count = ops.sum(valid)
    return {
        "box_class": Loss(ops.sum(cross_entropy * valid), count),
        "box": Loss(ops.sum(distance * foreground), count),
    }


def _of_class(values: Tensor, classes: Tensor) -> Tensor:
    """The values [B, R, 4] of one class each from [B, R, T, 4]; those of background are arbitrary."""
    batch, rois, number = ops.shape(values)[:3]
    index = ops.arange(rois, dtype="int32") * number + ops.minimum(classes, number - 1)  # [B, R]
    return take_rows(ops.reshape(values, (batch, rois * number, values.shape[-1])), index)


class MaskHead(keras.layers.Layer):
    """A mask of each RoI for every class.

    Args:
        num_classes: Number of thing classes, T.
        channels: Channels of the convolutions.
        convolutions: Number of 3x3 convolutions.

    Input: float [B, R, P, P, C]. Output: logits float32 [B, R, 2 P, 2 P, T].
    """

    def __init__(
        self, *, num_classes: int, channels: int = 256, convolutions: int = 4, name: str | None = None
    ) -> None:
        super().__init__(name=name)
        options = {"activation": "relu", "kernel_initializer": "he_normal"}
        self.convolutions = [
            keras.layers.Conv2D(channels, 3, padding="same", name=f"conv{k + 1}", **options)
            for k in range(convolutions)
        ]
        self.enlarge = keras.layers.Conv2DTranspose(channels, 2, strides=2, name="enlarge", **options)
        self.masks = keras.layers.Conv2D(
            num_classes, 1, kernel_initializer=keras.initializers.RandomNormal(stddev=0.001), name="masks"
        )

    def call(self, pooled: Tensor) -> Tensor:
        """Applies the head."""
        batch, rois = ops.shape(pooled)[:2]
        x = ops.reshape(pooled, (batch * rois, *pooled.shape[2:]))  # [B * R, P, P, C]
        for layer in self.convolutions:
            x = layer(x)
        x = self.masks(self.enlarge(x))
        return ops.cast(ops.reshape(x, (batch, rois, *x.shape[1:])), "float32")  # [B, R, 2 P, 2 P, T]


def masks_of_classes(logits: Tensor, classes: Tensor) -> Tensor:
    """Picks the mask of one class per RoI.

    Args:
        logits: float32 [B, R, Q, Q, T].
        classes: int32 [B, R]; what background gives is arbitrary.

    Returns:
        float32 [B, R, Q, Q].
    """
    chosen = ops.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
    return ops.matmul(logits, chosen[:, :, None, :, None])[..., 0]


def mask_loss(logits: Tensor, targets: Tensor, classes: Tensor, foreground: Tensor) -> Loss:
    """Binary cross entropy of the mask of the true class, a mean over the pixels and foreground RoIs (section 3.2).

    Args:
        logits: float32 [B, R, Q, Q, T].
        targets: bool [B, R, Q, Q] of `mask_targets`.
        classes: int32 [B, R].
        foreground: bool [B, R], the RoIs that count.

    Returns:
        The sum over the RoIs of their mean, and the number of RoIs.
    """
    predicted = masks_of_classes(logits, classes)
    losses = ops.binary_crossentropy(ops.cast(targets, "float32"), predicted, from_logits=True)
    weight = ops.cast(foreground, "float32")
    return Loss(ops.sum(ops.mean(losses, axis=(2, 3)) * weight), ops.sum(weight))


def detect(
    class_logits: Tensor,
    deltas: Tensor,
    proposals: Mapping[str, Tensor],
    image_size: tuple[Any, Any],
    *,
    weights: Sequence[float],
    score_threshold: float = 0.05,
    nms_iou: float = 0.5,
    candidates: int = 1000,
    number: int = 100,
) -> dict[str, Tensor]:
    """Turns the box head's outputs into detections; a proposal may give one of each class.

    The suppression sees the best `candidates` pairs of box and class. As worse boxes never suppress better ones, the
    result is exact unless fewer than `number` of them remain while there are more pairs above the threshold.

    Args:
        class_logits: float32 [B, P, T + 1], background last.
        deltas: float32 [B, P, T, 4].
        proposals: `boxes` [B, P, 4] and `valid` [B, P] of `propose`.
        image_size: Height and width at which boxes are cut, ints or int32 scalars.
        weights: Factors of the deltas.
        score_threshold: Scores must be above this.
        nms_iou: Boxes that overlap a better one of their class more than this go.
        candidates: See above.
        number: Detections per image, N.

    Returns:
        `boxes`: float32 [B, N, 4], the best first. `scores`: float32 [B, N], 0 in unused rows. `classes`: int32 [B, N]
        thing classes. `valid`: bool [B, N]. `proposal`: int32 [B, N], the row each comes from. Unused rows are zero.
    """
    batch, rois, classes = ops.shape(deltas)[:3]
    scores = ops.softmax(class_logits, axis=-1)[..., :-1]  # [B, P, T]
    scores = ops.where((scores > score_threshold) & proposals["valid"][..., None], scores, 0.0)
    scores, pair = top_k_padded(ops.reshape(scores, (batch, rois * classes)), candidates, fill=0.0)
    proposal, thing = pair // classes, pair % classes
    chosen = take_rows(ops.reshape(deltas, (batch, rois * classes, 4)), pair)  # [B, candidates, 4]
    boxes = clip_boxes(decode_boxes(chosen, take_rows(proposals["boxes"], proposal), weights), image_size)
    valid = (scores > 0) & (box_area(boxes) > 0)
    keep = non_maximum_suppression(boxes, valid, iou_threshold=nms_iou, classes=thing)

    scores, order = top_k_padded(ops.where(keep, scores, 0.0), number, fill=0.0)
    kept = scores > 0
    return {
        "boxes": ops.where(kept[..., None], take_rows(boxes, order), 0.0),
        "scores": scores,
        "classes": ops.where(kept, take_rows(thing, order), 0),
        "valid": kept,
        "proposal": ops.where(kept, take_rows(proposal, order), 0),
    }
