"""Losses of LPSNet's box head (section 3.2)."""

from keras import ops

from deeplab2_like.model.base import Loss
from deeplab2_like.model.layers import Tensor


def box_loss(predicted: Tensor, true: Tensor, weight: Tensor) -> Loss:
    """-log of the intersection over union of two boxes around the same point, weighted.

    Args:
        predicted: float32 [B, P, 4], distances to the left, top, right and bottom side, in pixels.
        true: float32 [B, P, 4].
        weight: float32 [B, P], zero for points that do not count.
    """

    def area(left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
        return (left + right) * (top + bottom)

    predicted_sides, true_sides = ops.unstack(predicted, 4, axis=-1), ops.unstack(true, 4, axis=-1)
    # Both boxes hold the point, so they overlap from the smaller distance to the smaller one.
    intersection = area(*(ops.minimum(one, other) for one, other in zip(predicted_sides, true_sides, strict=True)))
    union = area(*predicted_sides) + area(*true_sides) - intersection
    # Points that do not count have true boxes of no size, whose logarithm must be finite, too.
    is_counted = weight > 0
    iou = ops.where(is_counted, intersection, 1.0) / ops.where(is_counted, union, 1.0)
    return Loss(-ops.sum(ops.log(ops.maximum(iou, 1e-6)) * weight), ops.sum(weight))


def border_ness_loss(logits: Tensor, true: Tensor, weight: Tensor) -> Loss:
    """Binary cross entropy of border-ness.

    Args:
        logits: float32 [B, P].
        true: float32 [B, P], in 0..1.
        weight: float32 [B, P], 1 for points that count, 0 for others.
    """
    # In this form no logit overflows.
    cross_entropy = ops.maximum(logits, 0.0) - logits * true + ops.log1p(ops.exp(-ops.abs(logits)))
    return Loss(ops.sum(cross_entropy * weight), ops.sum(weight))
