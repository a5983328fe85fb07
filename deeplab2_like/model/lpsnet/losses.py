"""Losses of LPSNet: cross entropy of pixels, IoU loss of boxes, border-ness (sections 3.2 and 3.5)."""

from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.model.base import Loss
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.semantic import SemanticClasses, semantic_loss


def compute_losses(
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    classes: SemanticClasses,
    *,
    levels: Sequence[str],
    stride: int,
) -> dict[str, Loss]:
    """Compares raw outputs with the targets of `make_targets`.

    Args:
        targets: Batched targets.
        outputs: Raw outputs, see `LPSNet`.
        classes: The classes of the semantic head.
        levels: Names of the levels of the box head.
        stride: Image pixels per semantic logit.

    Returns:
        `semantic`, normalized by the number of labeled pixels; `box`, normalized by the sum of the true border-ness;
        `border_ness`, normalized by the number of positive points.
    """
    positive = ops.cast(_join_levels(targets, "positive", levels), "float32")
    true_border_ness = _join_levels(targets, "border_ness", levels)
    return {
        "semantic": semantic_loss(targets["semantic"], outputs["semantic_logits"], classes=classes, stride=stride),
        "box": box_loss(
            _join_levels(outputs, "distances", levels),
            _join_levels(targets, "distances", levels),
            positive * true_border_ness,
        ),
        "border_ness": border_ness_loss(_join_levels(outputs, "border_ness", levels), true_border_ness, positive),
    }


def _join_levels(values: Mapping[str, Tensor], name: str, levels: Sequence[str]) -> Tensor:
    """Joins the points of all levels, [B, h, w, ...] each, to [B, P, ...]."""
    parts = []
    for level in levels:
        part = values[f"{name}_{level}"]
        batch, height, width = ops.shape(part)[:3]
        parts.append(ops.reshape(part, (batch, height * width, *part.shape[3:])))  # [B, h * w, ...]
    return ops.concatenate(parts, axis=1)


def box_loss(predicted: Tensor, true: Tensor, weight: Tensor) -> Loss:
    """Weighted -log IoU of two boxes around the same point.

    Args:
        predicted: float32 [B, P, 4], distances to the left, top, right and bottom side, in pixels.
        true: float32 [B, P, 4].
        weight: float32 [B, P], zero for points that do not count.
    """

    def area(left: Tensor, top: Tensor, right: Tensor, bottom: Tensor) -> Tensor:
        return (left + right) * (top + bottom)

    predicted_sides, true_sides = ops.unstack(predicted, 4, axis=-1), ops.unstack(true, 4, axis=-1)
    # Both boxes contain the point, so on each side the intersection ends at the smaller distance.
    intersection = area(*(ops.minimum(one, other) for one, other in zip(predicted_sides, true_sides, strict=True)))
    union = area(*predicted_sides) + area(*true_sides) - intersection
    # Points that do not count have empty true boxes; the logarithm of their IoU must be finite, too.
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
    # This form does not overflow for any logit.
    cross_entropy = ops.maximum(logits, 0.0) - logits * true + ops.log1p(ops.exp(-ops.abs(logits)))
    return Loss(ops.sum(cross_entropy * weight), ops.sum(weight))
