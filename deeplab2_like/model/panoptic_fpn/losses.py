"""Losses of Panoptic FPN (section 3.2): those of Mask R-CNN, and the cross entropy of every pixel."""

from collections.abc import Mapping

from keras import ops

from deeplab2_like.model.base import Loss
from deeplab2_like.model.detection.detector import Detector
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fpn.config import LossConfig
from deeplab2_like.model.semantic import SemanticClasses, semantic_loss


def compute_losses(
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    config: LossConfig,
    *,
    classes: SemanticClasses,
    stride: int,
    detector: Detector | None,
) -> dict[str, Loss]:
    """Compares the outputs of training with the targets.

    Args:
        targets: Batched result of `make_targets`.
        outputs: Raw outputs of training.
        config: Whether the branches take turns.
        classes: The semantic classes.
        stride: Network pixels per semantic logit.
        detector: The instance branch; None for Semantic FPN.

    Returns:
        `semantic`, per labeled pixel; and, with a detector, `rpn_class` and `rpn_box`, per sampled anchor, `box_class`
        and `box`, per sampled RoI, and `mask`, averaged over the pixels of each foreground RoI.
    """
    logits = outputs["semantic_logits"]
    losses = {"semantic": semantic_loss(targets["semantic"], logits, classes=classes, stride=stride)}
    if detector is None:
        return losses
    instance_losses = detector.compute_losses(targets, outputs)
    if config.training == "alternate":
        is_semantic_step = ops.cast(outputs["step"] % 2 == 0, "float32")
        losses = _scale(losses, is_semantic_step)
        instance_losses = _scale(instance_losses, 1 - is_semantic_step)
    return losses | instance_losses


def _scale(losses: Mapping[str, Loss], factor: Tensor) -> dict[str, Loss]:
    """Multiplies losses by a float32 scalar."""
    return {name: Loss(factor * loss.total, loss.normalizer) for name, loss in losses.items()}
