"""The second stage of Mask R-CNN: samples for training, box head, mask head, their losses, and the detections."""

from collections.abc import Mapping
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
from deeplab2_like.model.detection.config import RoiConfig
from deeplab2_like.model.detection.matching import crowd_share, match_boxes, sample_balanced, top_k_padded
from deeplab2_like.model.geometry import Size
from deeplab2_like.model.layers import Tensor, msra_initializer


def sample_rois(
    proposals: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    config: RoiConfig,
    *,
    num_classes: int,
    seeds: Tensor,
) -> dict[str, Tensor]:
    """Samples the RoIs for the losses of the heads from the proposals and the boxes of the ground truth.

    Args:
        proposals: `boxes` [B, P, 4] and `valid` [B, P] of `propose`.
        targets: Batched result of `instance_targets`.
        config: Overlap of the foreground, and number of samples, S.
        num_classes: Number of thing classes, T.
        seeds: int32 [B, 2] for the random choice in each image.

    Returns:
        `boxes`: float32 [B, S, 4]. `valid`: bool [B, S]. `foreground`: bool [B, S], true only among the first
        `foreground_samples` rows. `classes`: int32 [B, S], the thing class, T for background. `row`: int32 [B, S], the
        matched instance's row. `matched_boxes`: float32 [B, S, 4], its box.
    """
    boxes = ops.concatenate([proposals["boxes"], targets["boxes"]], axis=1)  # [B, P + M, 4]
    usable = ops.concatenate([proposals["valid"], targets["valid"]], axis=1)
    iou, row, _ = match_boxes(boxes, targets["boxes"], targets["valid"])
    is_foreground = iou >= config.foreground_iou
    is_crowd = crowd_share(boxes, targets["instance_map"]) > config.crowd_share
    index, foreground, valid = sample_balanced(
        usable & is_foreground,
        usable & ~is_foreground & ~is_crowd,
        number=config.samples,
        max_positive=config.foreground_samples,
        seeds=seeds,
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
    """Predicts class and box of each RoI.

    Args:
        config: Channels of the two hidden layers.
        num_classes: Number of thing classes, T.

    Input: float [B, R, P, P, C]. Output: class logits float32 [B, R, T + 1], background last, and box deltas float32
    [B, R, T, 4] (dy, dx, dh, dw).
    """

    def __init__(self, config: RoiConfig, *, num_classes: int, name: str | None = None) -> None:
        super().__init__(name=name)
        self.num_classes = num_classes
        # Uniform with variance 1 / fan-in, as in Detectron2, which calls it Xavier.
        options = {"activation": "relu", "kernel_initializer": "lecun_uniform"}
        self.hidden = [keras.layers.Dense(config.box_channels, name=f"dense{k}", **options) for k in (1, 2)]
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
    class_logits: Tensor, deltas: Tensor, samples: Mapping[str, Tensor], config: RoiConfig
) -> dict[str, Loss]:
    """Computes the cross entropy of all samples and the L1 distance of the foreground, both per sample.

    Args:
        class_logits: float32 [B, S, T + 1].
        deltas: float32 [B, S, T, 4].
        samples: Result of `sample_rois`.
        config: Factors of the deltas.

    Returns:
        `box_class` and `box`.
    """
    valid = ops.cast(samples["valid"], "float32")
    foreground = ops.cast(samples["foreground"], "float32") * valid
    cross_entropy = ops.sparse_categorical_crossentropy(samples["classes"], class_logits, from_logits=True)
    expected = encode_boxes(samples["matched_boxes"], samples["boxes"], config.box_weights)
    predicted = _select_class(deltas, samples["classes"])  # [B, S, 4]
    distance = ops.sum(ops.abs(predicted - expected), axis=-1)
    count = ops.sum(valid)
    return {
        "box_class": Loss(ops.sum(cross_entropy * valid), count),
        "box": Loss(ops.sum(distance * foreground), count),
    }


def _select_class(values: Tensor, classes: Tensor) -> Tensor:
    """Selects one class per RoI, int32 [B, R]: [B, R, T, 4] to [B, R, 4]; background gives arbitrary values."""
    batch, rois, number = ops.shape(values)[:3]
    index = ops.arange(rois, dtype="int32") * number + ops.minimum(classes, number - 1)  # [B, R]
    return take_rows(ops.reshape(values, (batch, rois * number, values.shape[-1])), index)


class MaskHead(keras.layers.Layer):
    """Predicts a mask of each RoI for every class.

    Args:
        config: Channels and number of the 3x3 convolutions.
        num_classes: Number of thing classes, T.

    Input: float [B, R, P, P, C]. Output: logits float32 [B, R, 2 P, 2 P, T].
    """

    def __init__(self, config: RoiConfig, *, num_classes: int, name: str | None = None) -> None:
        super().__init__(name=name)
        channels = config.mask_channels

        def options() -> dict[str, Any]:
            return {"activation": "relu", "kernel_initializer": msra_initializer()}

        self.convolutions = [
            keras.layers.Conv2D(channels, 3, padding="same", name=f"conv{k + 1}", **options())
            for k in range(config.mask_convolutions)
        ]
        # The name of this layer is part of the variable paths of checkpoints.
        self.upsample = keras.layers.Conv2DTranspose(channels, 2, strides=2, name="enlarge", **options())
        self.masks = keras.layers.Conv2D(
            num_classes, 1, kernel_initializer=keras.initializers.RandomNormal(stddev=0.001), name="masks"
        )

    def call(self, pooled: Tensor) -> Tensor:
        """Applies the head."""
        batch, rois = ops.shape(pooled)[:2]
        x = ops.reshape(pooled, (batch * rois, *pooled.shape[2:]))  # [B * R, P, P, C]
        for layer in self.convolutions:
            x = layer(x)
        x = self.masks(self.upsample(x))
        return ops.cast(ops.reshape(x, (batch, rois, *x.shape[1:])), "float32")  # [B, R, 2 P, 2 P, T]


def select_masks(logits: Tensor, classes: Tensor) -> Tensor:
    """Selects the mask of one class per RoI.

    Args:
        logits: float32 [B, R, Q, Q, T].
        classes: int32 [B, R]; background gives an arbitrary mask.

    Returns:
        float32 [B, R, Q, Q].
    """
    chosen = ops.one_hot(classes, logits.shape[-1], dtype=logits.dtype)
    return ops.matmul(logits, chosen[:, :, None, :, None])[..., 0]


def mask_loss(logits: Tensor, targets: Tensor, classes: Tensor, foreground: Tensor) -> Loss:
    """Computes the binary cross entropy of the true class's mask, averaged over pixels and foreground RoIs.

    Args:
        logits: float32 [B, R, Q, Q, T].
        targets: bool [B, R, Q, Q] of `mask_targets`.
        classes: int32 [B, R].
        foreground: bool [B, R], the RoIs that enter the loss.

    Returns:
        The sum of the RoIs' means over pixels, and the number of RoIs.
    """
    predicted = select_masks(logits, classes)
    losses = ops.binary_crossentropy(ops.cast(targets, "float32"), predicted, from_logits=True)
    weight = ops.cast(foreground, "float32")
    return Loss(ops.sum(ops.mean(losses, axis=(2, 3)) * weight), ops.sum(weight))


def detect(
    class_logits: Tensor,
    deltas: Tensor,
    proposals: Mapping[str, Tensor],
    image_size: Size,
    config: RoiConfig,
    *,
    max_detections: int | None = None,
) -> dict[str, Tensor]:
    """Turns the box head's outputs into detections; a proposal may give one of each class.

    Only the best `candidates` pairs of box and class enter non-maximum suppression. As worse boxes never suppress
    better ones, the result is exact unless fewer than N of them remain while more pairs exceed the threshold.

    Args:
        class_logits: float32 [B, P, T + 1], background last.
        deltas: float32 [B, P, T, 4].
        proposals: `boxes` [B, P, 4] and `valid` [B, P] of `propose`.
        image_size: Height and width to which boxes are clipped.
        config: Thresholds and factors of the deltas.
        max_detections: Detections per image, N; None for `config.detections`.

    Returns:
        `boxes`: float32 [B, N, 4], the best first. `scores`: float32 [B, N], 0 in unused rows. `classes`: int32 [B, N]
        thing classes. `valid`: bool [B, N]. `proposal`: int32 [B, N], the proposal of each. Unused rows are zero.
    """
    batch, rois, classes = ops.shape(deltas)[:3]
    scores = ops.softmax(class_logits, axis=-1)[..., :-1]  # [B, P, T]
    scores = ops.where((scores > config.score_threshold) & proposals["valid"][..., None], scores, 0.0)
    scores, pair = top_k_padded(ops.reshape(scores, (batch, rois * classes)), config.candidates, fill=0.0)
    proposal, thing = pair // classes, pair % classes
    chosen = take_rows(ops.reshape(deltas, (batch, rois * classes, 4)), pair)  # [B, candidates, 4]
    boxes = clip_boxes(decode_boxes(chosen, take_rows(proposals["boxes"], proposal), config.box_weights), image_size)
    valid = (scores > 0) & (box_area(boxes) > 0)
    keep = non_maximum_suppression(boxes, valid, iou_threshold=config.nms_iou, classes=thing)

    number = config.detections if max_detections is None else max_detections
    scores, order = top_k_padded(ops.where(keep, scores, 0.0), number, fill=0.0)
    kept = scores > 0
    return {
        "boxes": ops.where(kept[..., None], take_rows(boxes, order), 0.0),
        "scores": scores,
        "classes": ops.where(kept, take_rows(thing, order), 0),
        "valid": kept,
        "proposal": ops.where(kept, take_rows(proposal, order), 0),
    }
