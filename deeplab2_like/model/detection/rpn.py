"""The region proposal network (Ren et al., 2015) on a feature pyramid (Lin et al., 2017): from features to proposals.

Details that the papers leave open follow Detectron2: anchors are centered at the top left corner of each feature pixel,
anchors across the border are kept, and the box loss is the plain L1 distance.
"""

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
from deeplab2_like.model.detection.config import RpnConfig
from deeplab2_like.model.detection.matching import crowd_share, match_boxes, sample_balanced, top_k_padded
from deeplab2_like.model.geometry import Size
from deeplab2_like.model.layers import Tensor

_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class RpnHead(keras.layers.Layer):
    """Predicts objectness and box deltas of every anchor, with the same convolutions on every level.

    Args:
        config: Anchors per feature pixel, K, and channels.

    Input: a mapping of level names to float [B, h, w, C]. Output: two mappings of the same keys, objectness logits
    float32 [B, h * w * K], and deltas float32 [B, h * w * K, 4] (dy, dx, dh, dw), both in the order of `make_anchors`.
    """

    def __init__(self, config: RpnConfig, *, name: str | None = None) -> None:
        super().__init__(name=name)
        num_anchors = len(config.anchor_ratios)

        def convolution(filters: int, kernel_size: int, name: str, **options: Any) -> keras.layers.Conv2D:
            # One initializer for all layers would give them the same random numbers.
            initializer = keras.initializers.RandomNormal(stddev=0.01)
            return keras.layers.Conv2D(filters, kernel_size, kernel_initializer=initializer, name=name, **options)

        self.conv = convolution(config.channels, 3, "conv", padding="same", activation="relu")
        self.objectness = convolution(num_anchors, 1, "objectness")
        self.deltas = convolution(4 * num_anchors, 1, "deltas")

    def call(self, pyramid: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Applies the head to every level."""
        objectness, deltas = {}, {}
        for level, features in pyramid.items():
            x = self.conv(features)
            batch = ops.shape(x)[0]
            objectness[level] = ops.cast(ops.reshape(self.objectness(x), (batch, -1)), "float32")  # [B, h * w * K]
            deltas[level] = ops.cast(ops.reshape(self.deltas(x), (batch, -1, 4)), "float32")  # [B, h * w * K, 4]
        return objectness, deltas


def make_anchors(pyramid: Mapping[str, Tensor], strides: Mapping[str, int], config: RpnConfig) -> dict[str, Tensor]:
    """Makes the anchors of every level, the same for all images of a size.

    Args:
        pyramid: float [B, h, w, C] per level; only the sizes matter.
        strides: Image pixels per feature pixel, per level.
        config: Sizes, in the order of the levels of `pyramid`, and ratios of the K anchors of a feature pixel.

    Returns:
        float32 [h * w * K, 4] per level; the anchors of a pixel follow each other.
    """
    anchors = {}
    for (level, features), size in zip(pyramid.items(), config.anchor_sizes, strict=True):
        height, width = ops.shape(features)[1:3]
        shapes = [(size * ratio**0.5, size / ratio**0.5) for ratio in config.anchor_ratios]
        corners = ops.array([[-h / 2, -w / 2, h / 2, w / 2] for h, w in shapes], "float32")  # [K, 4]
        y = ops.cast(ops.arange(height) * strides[level], "float32")
        x = ops.cast(ops.arange(width) * strides[level], "float32")
        y, x = ops.meshgrid(y, x, indexing="ij")
        centers = ops.reshape(ops.stack([y, x, y, x], axis=-1), (-1, 1, 4))  # [h * w, 1, 4]
        anchors[level] = ops.reshape(centers + corners, (-1, 4))  # [h * w * K, 4]
    return anchors


def sample_anchors(
    anchors: Tensor, targets: Mapping[str, Tensor], config: RpnConfig, *, seeds: Tensor
) -> dict[str, Tensor]:
    """Matches anchors with the instances and samples those that enter the losses.

    Args:
        anchors: float32 [A, 4], all levels.
        targets: `boxes` [B, M, 4], `valid` [B, M] and `instance_map` [B, H, W] of `instance_targets`.
        config: Overlaps and number of samples, S.
        seeds: int32 [B, 2] for the random choice in each image.

    Returns:
        `index`: int32 [B, S], the sampled anchors. `valid`: bool [B, S]. `positive`: bool [B, S].
        `deltas`: float32 [B, S, 4], from the anchor to its instance; meant for positives.
    """
    positive, negative, row = label_anchors(anchors, targets, config)
    index, is_positive, valid = sample_balanced(
        positive, negative, number=config.samples, max_positive=config.max_positives, seeds=seeds
    )
    matched = take_rows(targets["boxes"], take_rows(row, index))  # [B, S, 4]
    deltas = encode_boxes(matched, ops.take(anchors, index, axis=0), _WEIGHTS)
    return {"index": index, "valid": valid, "positive": is_positive, "deltas": deltas}


def label_anchors(anchors: Tensor, targets: Mapping[str, Tensor], config: RpnConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Decides which anchors are positive and which are negative.

    An anchor is positive if its best overlap is at least `positive_iou`, or if its overlap with some instance is the
    largest of all anchors. The latter still learns the box of the instance that it overlaps most itself.

    Args:
        anchors: float32 [A, 4], all levels.
        targets: See `sample_anchors`.
        config: Overlaps, and the share of crowd from which an anchor is never negative.

    Returns:
        bool [B, A] positives, bool [B, A] negatives, and int32 [B, A], the row of the instance.
    """
    iou, row, is_best = match_boxes(anchors[None], targets["boxes"], targets["valid"])
    positive = (iou >= config.positive_iou) | is_best
    is_crowd = crowd_share(anchors[None], targets["instance_map"]) > config.crowd_share
    return positive, (iou < config.negative_iou) & ~positive & ~is_crowd, row


def rpn_losses(objectness: Tensor, deltas: Tensor, samples: Mapping[str, Tensor], config: RpnConfig) -> dict[str, Loss]:
    """Computes the binary cross entropy of the sampled anchors and the L1 distance of the positive ones.

    Args:
        objectness: float32 [B, A] logits, all levels.
        deltas: float32 [B, A, 4].
        samples: Result of `sample_anchors`.
        config: The normalizer of both losses.

    Returns:
        `rpn_class` and `rpn_box`.
    """
    logits, predicted = take_rows(objectness, samples["index"]), take_rows(deltas, samples["index"])
    positive = ops.cast(samples["positive"], "float32")
    cross_entropy = ops.binary_crossentropy(positive, logits, from_logits=True)
    distance = ops.sum(ops.abs(predicted - samples["deltas"]), axis=-1)  # [B, S]
    valid = ops.cast(samples["valid"], "float32")
    count = ops.sum(ops.ones_like(valid) if config.normalizer == "fixed" else valid)
    return {
        "rpn_class": Loss(ops.sum(cross_entropy * valid), count),
        "rpn_box": Loss(ops.sum(distance * positive * valid), count),
    }


def propose(
    objectness: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    image_size: Size,
    config: RpnConfig,
    *,
    training: bool = False,
) -> dict[str, Tensor]:
    """Turns the head's outputs into proposals.

    Args:
        objectness: float32 [B, A_level] logits per level.
        deltas: float32 [B, A_level, 4] per level.
        anchors: float32 [A_level, 4] per level.
        image_size: Height and width to which boxes are clipped.
        config: Numbers of candidates and of proposals, P, and the overlap for non-maximum suppression.
        training: Whether to take `train_candidates` or `test_candidates`.

    Returns:
        `boxes`: float32 [B, P, 4], the best first, without gradient. `scores`: float32 [B, P] logits.
        `valid`: bool [B, P]; unused rows are zero and come last.
    """
    never = -1e30
    num_candidates = config.train_candidates if training else config.test_candidates
    scores, boxes = [], []
    for level, level_objectness in objectness.items():
        size = level_objectness.shape[1]
        level_scores, index = top_k_padded(
            ops.stop_gradient(level_objectness),
            num_candidates if size is None else min(num_candidates, size),
            fill=never,
        )
        level_deltas = take_rows(ops.stop_gradient(deltas[level]), index)
        level_boxes = decode_boxes(level_deltas, ops.take(anchors[level], index, axis=0), _WEIGHTS)
        level_boxes = clip_boxes(level_boxes, image_size)
        valid = (level_scores > never) & (box_area(level_boxes) > 0)
        keep = non_maximum_suppression(level_boxes, valid, iou_threshold=config.nms_iou)
        scores.append(ops.where(keep, level_scores, never))
        boxes.append(level_boxes)

    best, index = top_k_padded(ops.concatenate(scores, axis=1), config.proposals, fill=never)
    kept = best > never
    best_boxes = take_rows(ops.concatenate(boxes, axis=1), index)
    return {
        "boxes": ops.where(kept[..., None], best_boxes, 0.0),
        "scores": ops.where(kept, best, 0.0),
        "valid": kept,
    }
