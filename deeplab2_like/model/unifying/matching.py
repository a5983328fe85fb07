"""The panoptic matching loss: which slot each pixel shall go to, and the cross entropy over slots (section 3.5)."""

from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.base import Loss
from deeplab2_like.model.boxes import pairwise_iou, take_rows
from deeplab2_like.model.layers import Tensor


def match_detections(
    boxes: Tensor, classes: Tensor, used: Tensor, targets: Mapping[str, Tensor], *, iou_threshold: float
) -> tuple[Tensor, Tensor]:
    """Matches detections with the instances of the label, one to one, by their boxes within a class (equation 5).

    Each detection is matched with the instance that its box overlaps most; of several that are matched with the same
    one the best is left, and the others are no slots at all.

    Args:
        boxes: float32 [B, D, 4].
        classes: int32 [B, D], positions among the thing classes.
        used: bool [B, D].
        targets: What `instance_targets` returned, batched, of M instances.
        iou_threshold: Least overlap of a match.

    Returns:
        Which detections stay, bool [B, D]: also those that match nothing. The detection of each instance, int32 [B, M],
        -1 where there is none. No gradient.
    """
    iou = pairwise_iou(ops.stop_gradient(boxes), targets["boxes"])  # [B, D, M]
    may_match = (
        (classes[:, :, None] == targets["classes"][:, None, :]) & used[:, :, None] & targets["valid"][:, None, :]
    )
    iou = ops.where(may_match, iou, 0.0)
    best = ops.max(iou, axis=2)  # [B, D]
    is_matched = (best >= iou_threshold) & (best > 0)
    instance = ops.cast(ops.argmax(iou, axis=2), "int32")
    number = iou.shape[2]
    # The overlap of each matched detection with its instance, zero elsewhere.
    matched = ops.where(is_matched[..., None] & (instance[..., None] == ops.arange(number)), iou, 0.0)  # [B, D, M]
    has_any = ops.max(matched, axis=1) > 0  # [B, M]
    detection = ops.where(has_any, ops.cast(ops.argmax(matched, axis=1), "int32"), -1)
    is_best = take_rows(detection, instance) == ops.arange(iou.shape[1])
    return used & (~is_matched | is_best), detection


def slot_targets(
    targets: Mapping[str, Tensor],
    detection: Tensor,
    *,
    dataset_info: DatasetInfo,
    detections: int,
    padded: Sequence[int],
) -> Tensor:
    """The slot that each pixel shall go to.

    Args:
        targets: `semantic` and `instance_map` of the targets, int32 [B, H, W] each.
        detection: int32 [B, M], of `match_detections`.
        dataset_info: What the class ids mean.
        detections: D; the slot of stuff class s comes at D + s.
        padded: Height and width of the padded image, static.

    Returns:
        int32 [B, height, width]; -1 where there is nothing to learn: void, crowds, instances without a detection,
        padding.
    """
    num_classes = dataset_info.num_classes
    of_class = [-1] * (num_classes + 1)
    for position, class_id in enumerate(dataset_info.stuff_classes):
        of_class[class_id] = detections + position
    semantic, instance_map = targets["semantic"], targets["instance_map"]
    slot = ops.take(ops.array(of_class, "int32"), ops.where(semantic < num_classes, semantic, num_classes))
    height, width = instance_map.shape[1:]
    row = ops.reshape(ops.maximum(instance_map - 1, 0), (-1, height * width))
    of_instance = ops.reshape(take_rows(detection, row), (-1, height, width))  # [B, H, W]
    slot = ops.where(instance_map > 0, of_instance, slot)
    margins = [[0, 0], [0, padded[0] - height], [0, padded[1] - width]]
    return ops.pad(slot, margins, constant_values=-1)


def matching_loss(potential: Tensor, slots: Tensor, *, is_logit: bool) -> Loss:
    """Cross entropy over slots, per pixel that has one.

    Args:
        potential: float32 [B, K, h, w], of `dynamic_potential`, and what affinities add.
        slots: int32 [B, h, w], of `slot_targets`; -1 for pixels that do not count.
        is_logit: Whether the probability of a slot is the softmax of potentials (variant a); else it is the share of
            their sum, as they are not negative, and a share below 1e-6 counts as 1e-6 and teaches nothing.
    """
    is_true = slots[:, None] == ops.arange(ops.shape(potential)[1])[:, None, None]  # [B, K, h, w]
    true = ops.sum(ops.where(is_true, potential, 0.0), axis=1)  # [B, h, w]
    if is_logit:
        cross_entropy = ops.logsumexp(potential, axis=1) - true
    else:
        share = true / ops.maximum(ops.sum(potential, axis=1), 1e-9)
        cross_entropy = -ops.log(ops.maximum(share, 1e-6))
    is_counted = slots >= 0
    return Loss(ops.sum(ops.where(is_counted, cross_entropy, 0.0)), ops.sum(ops.cast(is_counted, "float32")))
