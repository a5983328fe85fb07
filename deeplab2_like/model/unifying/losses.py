"""Losses of the unifying system: detection, semantic classes, and panoptic matching (section 3.5)."""

from collections.abc import Mapping

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.base import Loss
from deeplab2_like.model.boxes import pairwise_iou, take_rows
from deeplab2_like.model.detection.detector import Detector
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.semantic import SemanticClasses, semantic_loss
from deeplab2_like.model.unifying.config import LossConfig, Potential
from deeplab2_like.model.unifying.potential import slot_potentials


def compute_losses(
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    config: LossConfig,
    dataset_info: DatasetInfo,
    *,
    classes: SemanticClasses,
    potential: Potential,
    stride: int,
    detector: Detector,
) -> dict[str, Loss]:
    """Compares the outputs of training with the targets.

    Args:
        targets: Batched result of `make_targets`.
        outputs: Raw outputs of training.
        config: Matching of detections.
        dataset_info: The classes.
        classes: The semantic classes.
        potential: Variant of the dynamic potential.
        stride: Network pixels per semantic logit.
        detector: The detector.

    Returns:
        `semantic`, per labeled pixel; the losses of `Detector.compute_losses`; and, with `config.matching`, `panoptic`,
        per cell of the semantic map that has a slot.
    """
    logits = outputs["semantic_logits"]
    losses = {
        "semantic": semantic_loss(targets["semantic"], logits, classes=classes, stride=stride),
        **detector.compute_losses(targets, outputs),
    }
    if config.matching:
        losses["panoptic"] = panoptic_loss(targets, outputs, config, dataset_info, potential=potential, stride=stride)
    return losses


def panoptic_loss(
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    config: LossConfig,
    dataset_info: DatasetInfo,
    *,
    potential: Potential,
    stride: int,
) -> Loss:
    """Computes the panoptic matching loss, with the arguments of `compute_losses`."""
    outputs = dict(outputs)
    if not config.end_to_end:
        for name in ("semantic_logits", "scores", "masks"):
            if name in outputs:
                outputs[name] = ops.stop_gradient(outputs[name])
    if config.detections == "truth":
        detection = ops.where(targets["valid"], ops.arange(targets["valid"].shape[1]), -1)
    else:
        is_slot, detection = match_detections(
            outputs["boxes"],
            outputs["thing_classes"],
            outputs["scores"] > 0,
            targets,
            iou_threshold=config.matching_iou,
        )
        outputs["scores"] = ops.where(is_slot, outputs["scores"], 0.0)

    height, width = outputs["semantic_logits"].shape[1:3]
    slots = slot_targets(
        targets,
        detection,
        dataset_info=dataset_info,
        num_detections=outputs["scores"].shape[1],
        padded_size=(height * stride, width * stride),
    )
    middle = stride // 2
    slots = slots[:, middle::stride, middle::stride]  # [B, h, w]
    values, update = slot_potentials(outputs, dataset_info, potential=potential, stride=stride)
    return matching_loss(values if update is None else values + update, slots, is_logit=potential == "a")


def match_detections(
    boxes: Tensor, classes: Tensor, used: Tensor, targets: Mapping[str, Tensor], *, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Matches detections with the instances of the label, one to one, by their boxes within a class (equation 5).

    Each detection is matched with the instance that its box overlaps most. Of several detections that are matched with
    the same instance, only the best is a slot.

    Args:
        boxes: float32 [B, D, 4].
        classes: int32 [B, D], positions among the thing classes.
        used: bool [B, D].
        targets: Batched result of `instance_targets`, with M instances.
        iou_threshold: Smallest overlap of a match.

    Returns:
        bool [B, D], whether a detection is a slot, which includes those without a match; and int32 [B, M], the
        detection of each instance, -1 for none. No gradient.
    """
    iou = pairwise_iou(ops.stop_gradient(boxes), targets["boxes"])  # [B, D, M]
    may_match = (
        (classes[:, :, None] == targets["classes"][:, None, :]) & used[:, :, None] & targets["valid"][:, None, :]
    )
    iou = ops.where(may_match, iou, 0.0)
    best = ops.max(iou, axis=2)  # [B, D]
    is_matched = (best >= iou_threshold) & (best > 0)
    instance = ops.cast(ops.argmax(iou, axis=2), "int32")
    num_instances = iou.shape[2]
    # The overlap of each matched detection with its instance, zero elsewhere.
    is_pair = is_matched[..., None] & (instance[..., None] == ops.arange(num_instances))
    matched = ops.where(is_pair, iou, 0.0)  # [B, D, M]
    has_any = ops.max(matched, axis=1) > 0  # [B, M]
    detection = ops.where(has_any, ops.cast(ops.argmax(matched, axis=1), "int32"), -1)
    is_best = take_rows(detection, instance) == ops.arange(iou.shape[1])
    return used & (~is_matched | is_best), detection


def slot_targets(
    targets: Mapping[str, Tensor],
    detection: Tensor,
    *,
    dataset_info: DatasetInfo,
    num_detections: int,
    padded_size: tuple[int, int],
) -> Tensor:
    """Makes the target of the matching loss: the slot of each pixel.

    Args:
        targets: `semantic` and `instance_map` of the targets, int32 [B, H, W] each.
        detection: int32 [B, M], of `match_detections`.
        dataset_info: The meaning of the class ids.
        num_detections: D; stuff class number s has slot D + s.
        padded_size: Height and width of the padded image, static.

    Returns:
        int32 [B, height, width]; -1 for pixels that the loss leaves out: void, crowds, instances without a detection,
        padding.
    """
    num_classes = dataset_info.num_classes
    slot_of_class = [-1] * (num_classes + 1)
    for position, class_id in enumerate(dataset_info.stuff_classes):
        slot_of_class[class_id] = num_detections + position
    semantic, instance_map = targets["semantic"], targets["instance_map"]
    class_ids = ops.where(semantic < num_classes, semantic, num_classes)
    stuff_slot = ops.take(ops.array(slot_of_class, "int32"), class_ids)
    height, width = instance_map.shape[1:]
    row = ops.reshape(ops.maximum(instance_map - 1, 0), (-1, height * width))  # [B, H * W]
    thing_slot = ops.reshape(take_rows(detection, row), (-1, height, width))  # [B, H, W]
    slot = ops.where(instance_map > 0, thing_slot, stuff_slot)
    margins = [[0, 0], [0, padded_size[0] - height], [0, padded_size[1] - width]]
    return ops.pad(slot, margins, constant_values=-1)


def matching_loss(potential: Tensor, slots: Tensor, *, is_logit: bool) -> Loss:
    """Computes the cross entropy over slots, per pixel that has one.

    Args:
        potential: float32 [B, K, h, w], including the affinity update.
        slots: int32 [B, h, w], of `slot_targets`; -1 for pixels that the loss leaves out.
        is_logit: Whether the probability of a slot is the softmax of potentials (variant a); else it is the share of
            their sum, as they are not negative. A share below 1e-6 counts as 1e-6 and has no gradient.

    Returns:
        The sum over pixels that have a slot, and their number.
    """
    is_true = slots[:, None] == ops.arange(ops.shape(potential)[1])[:, None, None]  # [B, K, h, w]
    true = ops.sum(ops.where(is_true, potential, 0.0), axis=1)  # [B, h, w]
    if is_logit:
        cross_entropy = ops.logsumexp(potential, axis=1) - true
    else:
        share = true / ops.maximum(ops.sum(potential, axis=1), 1e-9)
        cross_entropy = -ops.log(ops.maximum(share, 1e-6))
    has_slot = slots >= 0
    return Loss(ops.sum(ops.where(has_slot, cross_entropy, 0.0)), ops.sum(ops.cast(has_slot, "float32")))
