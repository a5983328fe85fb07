"""The region proposal network (Ren et al. 2015) on a feature pyramid (Lin et al. 2017): from features to proposals.

Details that the papers leave open are those of Detectron2: anchors are centred at the top left corner of each feature
pixel, anchors across the border are kept, and the box loss is the plain L1 distance.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

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

_WEIGHTS = (1.0, 1.0, 1.0, 1.0)


class RpnHead(keras.layers.Layer):
    """Objectness and box deltas of every anchor, by the same convolutions on every level.

    Args:
        num_anchors: Anchors per feature pixel, K.
        channels: Channels between the convolutions.

    Input: a mapping of level names to float [B, h, w, C]. Output: two mappings of the same keys, objectness logits
    float32 [B, h * w * K], and deltas float32 [B, h * w * K, 4] (dy, dx, dh, dw), both in the order of `make_anchors`.
    """

    def __init__(self, *, num_anchors: int, channels: int = 256, name: str | None = None) -> None:
        super().__init__(name=name)
        options = {"kernel_initializer": keras.initializers.RandomNormal(stddev=0.01)}
        self.conv = keras.layers.Conv2D(channels, 3, padding="same", activation="relu", name="conv", **options)
        self.objectness = keras.layers.Conv2D(num_anchors, 1, name="objectness", **options)
        self.deltas = keras.layers.Conv2D(4 * num_anchors, 1, name="deltas", **options)

    def call(self, pyramid: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Applies the head to every level."""
        objectness, deltas = {}, {}
        for level, features in pyramid.items():
            x = self.conv(features)
            batch = ops.shape(x)[0]
            objectness[level] = ops.cast(ops.reshape(self.objectness(x), (batch, -1)), "float32")  # [B, h * w * K]
            deltas[level] = ops.cast(ops.reshape(self.deltas(x), (batch, -1, 4)), "float32")  # [B, h * w * K, 4]
        return objectness, deltas


def make_anchors(
    pyramid: Mapping[str, Tensor], strides: Mapping[str, int], *, sizes: Sequence[float], ratios: Sequence[float]
) -> dict[str, Tensor]:
    """The anchors of every level, for any image of that size.

    Args:
        pyramid: float [B, h, w, C] per level, of which only the sizes matter.
        strides: Image pixels per feature pixel, per level.
        sizes: Square root of the area of a level's anchors, in the order of the levels of `pyramid`.
        ratios: Height over width of the K anchors of a feature pixel.

    Returns:
        float32 [h * w * K, 4] per level; the anchors of a pixel follow each other.
    """
    anchors = {}
    for (level, features), size in zip(pyramid.items(), sizes, strict=True):
        height, width = ops.shape(features)[1:3]
        shapes = [(size * ratio**0.5, size / ratio**0.5) for ratio in ratios]
        corners = ops.array([[-h / 2, -w / 2, h / 2, w / 2] for h, w in shapes], "float32")  # [K, 4]
        y = ops.cast(ops.arange(height) * strides[level], "float32")
        x = ops.cast(ops.arange(width) * strides[level], "float32")
        y, x = ops.meshgrid(y, x, indexing="ij")
        centers = ops.reshape(ops.stack([y, x, y, x], axis=-1), (-1, 1, 4))  # [h * w, 1, 4]
        anchors[level] = ops.reshape(centers + corners, (-1, 4))  # [h * w * K, 4]
    return anchors


def sample_anchors(
    anchors: Tensor,
    targets: Mapping[str, Tensor],
    *,
    seed: Tensor,
    positive_iou: float = 0.7,
    negative_iou: float = 0.3,
    max_crowd_share: float = 0.5,
    number: int = 256,
    positive_share: float = 0.5,
) -> dict[str, Tensor]:
    """Matches anchors with the instances and draws those that enter the losses.

    Positive is an anchor whose best overlap is at least `positive_iou`, and one that no other anchor surpasses for some
    instance; the latter still learns the box of the instance that it overlaps most itself.

    Args:
        anchors: float32 [A, 4], all levels.
        targets: `boxes` [B, M, 4], `valid` [B, M] and `instance_map` [B, H, W] of `instance_targets`.
        seed: int32 [2] for the random choice.
        positive_iou: See above.
        negative_iou: Anchors of less overlap are negative; those between teach nothing.
        max_crowd_share: Anchors that are crowd to a larger share than this are never negative.
        number: How many anchors are drawn per image, S.
        positive_share: Largest share of positives.

    Returns:
        `index`: int32 [B, S], which anchors. `valid`: bool [B, S]. `positive`: bool [B, S].
        `deltas`: float32 [B, S, 4], from the anchor to its instance; meant for positives.
    """
    positive, negative, row = label_anchors(
        anchors, targets, positive_iou=positive_iou, negative_iou=negative_iou, max_crowd_share=max_crowd_share
    )
    index, is_positive, valid = sample_balanced(
        positive, negative, number=number, max_positive=int(number * positive_share), seed=seed
    )
    matched = take_rows(targets["boxes"], take_rows(row, index))  # [B, S, 4]
    deltas = encode_boxes(matched, ops.take(anchors, index, axis=0), _WEIGHTS)
    return {"index": index, "valid": valid, "positive": is_positive, "deltas": deltas}


def label_anchors(
    anchors: Tensor,
    targets: Mapping[str, Tensor],
    *,
    positive_iou: float,
    negative_iou: float,
    max_crowd_share: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The first half of `sample_anchors`: bool [B, A] positives and negatives, int32 [B, A] row of the instance."""
    iou, row, is_best = match_boxes(anchors[None], targets["boxes"], targets["valid"])
    positive = (iou >= positive_iou) | is_best
    is_crowd = crowd_share(anchors[None], targets["instance_map"]) > max_crowd_share
    return positive, (iou < negative_iou) & ~positive & ~is_crowd, row


def rpn_losses(
    objectness: Tensor,
    deltas: Tensor,
    samples: Mapping[str, Tensor],
    *,
    normalizer: Literal["fixed", "sampled"] = "fixed",
) -> dict[str, Loss]:
    """Binary cross entropy of the drawn anchors and L1 distance of the positive ones.

    Args:
        objectness: float32 [B, A] logits, all levels.
        deltas: float32 [B, A, 4].
        samples: What `sample_anchors` returned.
        normalizer: `fixed` divides both by the number of anchors to be drawn, `sampled` by those that were.

    Returns:
        `rpn_class` and `rpn_box`.
    """
    logits, predicted = take_rows(objectness, samples["index"]), take_rows(deltas, samples["index"])
    positive = ops.cast(samples["positive"], "float32")
    cross_entropy = ops.binary_crossentropy(positive, logits, from_logits=True)
    distance = ops.sum(ops.abs(predicted - samples["deltas"]), axis=-1)  # [B, S]
    valid = ops.cast(samples["valid"], "float32")
    count = ops.sum(ops.ones_like(valid) if normalizer == "fixed" else valid)
    return {
        "rpn_class": Loss(ops.sum(cross_entropy * valid), count),
        "rpn_box": Loss(ops.sum(distance * positive * valid), count),
    }


def propose(
    objectness: Mapping[str, Tensor],
    deltas: Mapping[str, Tensor],
    anchors: Mapping[str, Tensor],
    image_size: tuple[Any, Any],
    *,
    candidates: int,
    nms_iou: float = 0.7,
    number: int = 1000,
) -> dict[str, Tensor]:
    """Turns the head's outputs into proposals.

    Args:
        objectness: float32 [B, A_level] logits per level.
        deltas: float32 [B, A_level, 4] per level.
        anchors: float32 [A_level, 4] per level.
        image_size: Height and width at which boxes are cut, ints or int32 scalars.
        candidates: Best boxes of each level that enter the suppression.
        nms_iou: Boxes of a level that overlap a better one more than this go.
        number: How many proposals all levels give together, P.

    Returns:
        `boxes`: float32 [B, P, 4], the best first, without gradient. `scores`: float32 [B, P] logits.
        `valid`: bool [B, P]; unused rows are zero and come last.
    """
    never = -1e30
    scores, boxes = [], []
    for level, level_objectness in objectness.items():
        size = level_objectness.shape[1]
        level_scores, index = top_k_padded(
            ops.stop_gradient(level_objectness), candidates if size is None else min(candidates, size), fill=never
        )
        level_deltas = take_rows(ops.stop_gradient(deltas[level]), index)
        level_boxes = decode_boxes(level_deltas, ops.take(anchors[level], index, axis=0), _WEIGHTS)
        level_boxes = clip_boxes(level_boxes, image_size)
        valid = (level_scores > never) & (box_area(level_boxes) > 0)
        keep = non_maximum_suppression(level_boxes, valid, iou_threshold=nms_iou)
        scores.append(ops.where(keep, level_scores, never))
        boxes.append(level_boxes)

    best, index = top_k_padded(ops.concatenate(scores, axis=1), number, fill=never)
    kept = best > never
    found = take_rows(ops.concatenate(boxes, axis=1), index)
    return {
        "boxes": ops.where(kept[..., None], found, 0.0),
        "scores": ops.where(kept, best, 0.0),
        "valid": kept,
    }
