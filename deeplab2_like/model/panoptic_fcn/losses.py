"""Losses of Panoptic FCN: focal loss of positions, weighted dice loss of masks (sections 3.1 and 3.4).

Label maps are read at four samples per cell of the encoded feature; a mask is one label of such samples.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from keras import ops

from deeplab2_like.model.base import Loss
from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fcn.config import PanopticFCNConfig
from deeplab2_like.model.panoptic_fcn.dice import dice_loss
from deeplab2_like.model.panoptic_fcn.kernels import pool_regions
from deeplab2_like.model.panoptic_fcn.network import KernelHead
from deeplab2_like.model.panoptic_fcn.targets import (
    is_in_size_range,
    label_share,
    region_targets,
    sample_cells,
    weighted_labels,
)
from deeplab2_like.model.semantic import SemanticClasses

# Label of pixels in the instance map that belong to no listed instance and to no stuff.
_UNKNOWN_INSTANCE = -1
# A label that no pixel has.
_NO_LABEL = -2


class Labels(NamedTuple):
    """One label map at the cells of the encoded feature and at the positions of the levels.

    Attributes:
        samples: int32 [B, h, w, 4], of each cell of the feature, see `sample_cells`.
        by_level: Result of `weighted_labels` for each level.
        unknown: The label of unknown pixels.
    """

    samples: Tensor
    by_level: dict[str, list[tuple[Tensor, Tensor]]]
    unknown: int


def compute_losses(
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    config: PanopticFCNConfig,
    classes: SemanticClasses,
    kernel_head: KernelHead,
    *,
    size_multiple: int,
) -> dict[str, Loss]:
    """Compares raw outputs with the targets of `make_targets`.

    Args:
        targets: Batched targets.
        outputs: Raw outputs, see `PanopticFCN`.
        config: Levels and losses.
        classes: The classes of the regions.
        kernel_head: Embeds the kernels of things and stuff.
        size_multiple: The network sees images padded to a multiple of this many pixels.

    Returns:
        `center` and `thing_mask`, normalized by the number of pairs of object and level; `region`, by the number of
        images, after each level was divided by its number of positions; `stuff_mask`, by the number of pairs of class
        and level.
    """
    sizes = {level: tuple(outputs[f"kernel_{level}"].shape[1:3]) for level in config.size_ranges}

    def resample(label_map: Tensor, unknown: int) -> Labels:
        height, width = label_map.shape[1:3]
        margins = [[0, 0], [0, -height % size_multiple], [0, -width % size_multiple]]
        samples = sample_cells(ops.pad(label_map, margins, constant_values=unknown), config.stride)
        return Labels(samples, {level: weighted_labels(samples, size) for level, size in sizes.items()}, unknown)

    num_regions = len(classes.class_id)
    instances = resample(targets["instance_map"], _UNKNOWN_INSTANCE)
    semantic = resample(classes.of_class_map(targets["semantic"]), num_regions)
    regions = {level: region_targets(pairs, num_regions) for level, pairs in semantic.by_level.items()}
    is_on_level = {
        level: is_in_size_range(targets["boxes"], *limits) & targets["valid"]
        for level, limits in config.size_ranges.items()
    }
    return {
        "center": center_loss(targets, outputs, instances, is_on_level, config),
        "region": region_loss(outputs, semantic, regions, config),
        "thing_mask": thing_mask_loss(targets, outputs, instances, is_on_level, config, kernel_head),
        "stuff_mask": stuff_mask_loss(outputs, semantic, regions, config, kernel_head),
    }


def center_loss(
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    instances: Labels,
    is_on_level: Mapping[str, Tensor],
    config: PanopticFCNConfig,
) -> Loss:
    """Focal loss of the heat maps of all levels, per pair of object and level.

    Args:
        targets: Batched targets.
        outputs: Raw outputs.
        instances: The instance map.
        is_on_level: bool [B, M] by level, the objects that belong to the level.
        config: Focal loss.
    """
    total, count = 0.0, 0.0
    for level, pairs in instances.by_level.items():
        heat = targets[f"heat_{level}"]
        # The center of an object counts even if most of its surroundings are unknown.
        has_center = ops.cast(ops.any(heat >= 1.0, axis=-1), "float32")
        total = total + focal_loss(
            outputs[f"center_{level}"],
            heat,
            ops.maximum(_known(label_share(pairs, instances.unknown), config), has_center),
            alpha=config.loss.focal_alpha,
            gamma=config.loss.focal_gamma,
        )
        count = count + ops.sum(ops.cast(is_on_level[level], "float32"))
    return Loss(total, count)


def region_loss(
    outputs: Mapping[str, Tensor], semantic: Labels, regions: Mapping[str, Tensor], config: PanopticFCNConfig
) -> Loss:
    """Focal loss of the regions of stuff: the sum over levels of each level's mean over its positions, per image.

    Args:
        outputs: Raw outputs.
        semantic: The map of region classes.
        regions: Result of `region_targets` by level.
        config: Focal loss.
    """
    total = 0.0
    for level, expected in regions.items():
        height, width = expected.shape[1:3]
        level_total = focal_loss(
            outputs[f"region_{level}"],
            expected,
            _known(label_share(semantic.by_level[level], semantic.unknown), config),
            alpha=config.loss.focal_alpha,
            gamma=config.loss.focal_gamma,
        )
        total = total + level_total / (height * width)
    return Loss(total, ops.cast(ops.shape(semantic.samples)[0], "float32"))


def thing_mask_loss(
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    instances: Labels,
    is_on_level: Mapping[str, Tensor],
    config: PanopticFCNConfig,
    kernel_head: KernelHead,
) -> Loss:
    """Weighted dice loss of the masks of things, per pair of object and level.

    Args:
        targets: Batched targets.
        outputs: Raw outputs.
        instances: The instance map.
        is_on_level: bool [B, M] by level, the objects that belong to the level.
        config: Kernels per object, and largest number of instances.
        kernel_head: Embeds the kernels.
    """
    count = config.loss.kernels if config.loss.weighted else 1
    pairs: dict[str, list[Tensor]] = {"kernels": [], "weight": [], "label": []}
    for level, stride in config.level_strides.items():
        height, width = outputs[f"kernel_{level}"].shape[1:3]
        kernels, weight = select_kernels(
            outputs[f"kernel_{level}"],
            outputs[f"center_{level}"],
            instances=instances.by_level[level],
            classes=targets["classes"],
            positions=ops.minimum(
                ops.cast(targets["centers"] / stride, "int32"), ops.array([height - 1, width - 1], "int32")
            ),
            count=config.loss.kernels,
            weighted=config.loss.weighted,
        )
        missing = count - weight.shape[-1]  # A level of few positions has fewer kernels.
        pairs["kernels"].append(ops.pad(kernels, [[0, 0], [0, 0], [0, missing], [0, 0]]))
        pairs["weight"].append(ops.pad(weight, [[0, 0], [0, 0], [0, missing]]))
        pairs["label"].append(ops.cumsum(ops.ones_like(targets["classes"]), axis=1))  # Row + 1.

    used = ops.concatenate([is_on_level[level] for level in config.size_ranges], axis=1)  # [B, L * M]
    rows = {name: ops.concatenate(values, axis=1) for name, values in pairs.items()}  # [B, L * M, ...]
    rows, used = take_used_rows(rows, used, 2 * config.loss.max_instances)  # [B, P, ...]
    dice = dice_loss(
        outputs["feature"],
        kernel_head.embed_things(rows["kernels"]),  # [B, P, k, E]
        ops.where(used, rows["label"], _NO_LABEL),
        instances.samples,
        _known_cells(instances, config),
        used,
    )
    used = ops.cast(used, "float32")
    return Loss(ops.sum(ops.sum(dice * rows["weight"], axis=-1) * used), ops.sum(used))


def stuff_mask_loss(
    outputs: Mapping[str, Tensor],
    semantic: Labels,
    regions: Mapping[str, Tensor],
    config: PanopticFCNConfig,
    kernel_head: KernelHead,
) -> Loss:
    """Dice loss of the masks of stuff, per pair of class and level.

    Args:
        outputs: Raw outputs.
        semantic: The map of region classes.
        regions: Result of `region_targets` by level.
        config: Treatment of unknown cells and of region sizes.
        kernel_head: Embeds the kernels.
    """
    weights, used = [], []
    for level, expected in regions.items():
        masks = ops.cast(expected > 0, "float32")
        pooled = pool_regions(outputs[f"kernel_{level}"], masks, over_map=config.reference_behavior)
        weights.append(kernel_head.embed_stuff(pooled))  # [B, S, E]
        used.append(ops.any(masks > 0, axis=(1, 2)))
    is_used = ops.concatenate(used, axis=1)  # [B, L * S]
    num_regions = next(iter(regions.values())).shape[-1]
    labels = ops.zeros_like(is_used, "int32") + ops.tile(ops.arange(num_regions), [len(regions)])
    rows = {"weights": ops.concatenate(weights, axis=1), "labels": labels}
    rows, is_used = take_used_rows(rows, is_used, labels.shape[1])
    dice = dice_loss(
        outputs["feature"],
        rows["weights"][:, :, None],  # [B, L * S, 1, E]
        rows["labels"],
        semantic.samples,
        _known_cells(semantic, config),
        is_used,
    )
    is_used = ops.cast(is_used, "float32")
    return Loss(ops.sum(dice[..., 0] * is_used), ops.sum(is_used))


def _known(unknown_share: Tensor, config: PanopticFCNConfig) -> Tensor:
    """Returns 1 where less than half is unknown, otherwise 0, float32; 1 everywhere with `reference_behavior`."""
    if config.reference_behavior:
        return ops.ones_like(unknown_share)
    return ops.cast(unknown_share < 0.5, "float32")


def _known_cells(labels: Labels, config: PanopticFCNConfig) -> Tensor:
    """Returns `_known` for the cells of the feature, float32 [B, h, w]."""
    return _known(ops.mean(ops.cast(labels.samples == labels.unknown, "float32"), axis=-1), config)


def focal_loss(logits: Tensor, targets: Tensor, weight: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss with soft targets: cross entropy, reduced for predictions that are close to the target.

    Args:
        logits: float32 [B, h, w, C].
        targets: float32 [B, h, w, C], in 0..1.
        weight: float32 [B, h, w], of each position.
        alpha: Weight of positives; negatives have 1 - alpha, soft targets a weight in between.
        gamma: Exponent of the distance.

    Returns:
        float32 scalar, the sum over all positions and classes.
    """
    probability = ops.sigmoid(logits)
    cross_entropy = ops.binary_crossentropy(targets, logits, from_logits=True)
    # Rounding must not make it negative, because gamma can be fractional.
    distance = ops.maximum(1 - (probability * targets + (1 - probability) * (1 - targets)), 0.0)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return ops.sum(balance * distance**gamma * cross_entropy * weight[..., None])


def select_kernels(
    kernels: Tensor,
    center_logits: Tensor,
    *,
    instances: Sequence[tuple[Tensor, Tensor]],
    classes: Tensor,
    positions: Tensor,
    count: int,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    """Selects the kernels from which each object is predicted on one level.

    Args:
        kernels: float32 [B, h, w, K].
        center_logits: float32 [B, h, w, T].
        instances: Result of `weighted_labels` for the instance map and this level.
        classes: int32 [B, M], of the objects, as positions among the thing classes.
        positions: int32 [B, M, 2], (y, x) of their centers on this level.
        count: Kernels per object, k.
        weighted: Whether to take the k positions inside the object with the best scores for its class, weighted by
            these scores (equation 7); otherwise k = 1, the kernel at the center.

    Returns:
        The kernels, float32 [B, M, k, K], and their weights, float32 [B, M, k], with sum 1; k is at most h * w.
    """
    batch, height, width, channels = ops.shape(kernels)
    num_objects = classes.shape[1]
    at_center = positions[..., 0] * width + positions[..., 1]  # [B, M]
    flat_kernels = ops.reshape(kernels, (batch, height * width, channels))
    if not weighted:
        selected = take_rows(flat_kernels, at_center)[:, :, None]  # [B, M, 1, K]
        return selected, ops.ones((batch, num_objects, 1), "float32")

    share: Tensor = 0.0
    for labels, weight in instances:
        is_object = ops.reshape(labels, (batch, 1, height * width)) == ops.arange(1, num_objects + 1)[:, None]
        share = share + ops.cast(is_object, "float32") * ops.reshape(weight, (height * width,))  # [B, M, h * w]
    is_inside = share > 0.1
    # An object that fills no position uses its center.
    is_center = ops.arange(height * width) == at_center[..., None]
    is_inside = ops.where(ops.any(is_inside, axis=-1, keepdims=True), is_inside, is_center)

    by_class = ops.transpose(ops.reshape(center_logits, (batch, height * width, -1)), (0, 2, 1))  # [B, T, h * w]
    score = ops.where(is_inside, ops.sigmoid(take_rows(by_class, classes)), 0.0)  # [B, M, h * w]
    count = min(count, height * width)
    score, best = ops.top_k(score, count)  # [B, M, k]
    selected = take_rows(flat_kernels, ops.reshape(best, (batch, num_objects * count)))
    selected = ops.reshape(selected, (batch, num_objects, count, channels))  # [B, M, k, K]
    return selected, score / ops.maximum(ops.sum(score, axis=-1, keepdims=True), 1e-12)


def take_used_rows(rows: Mapping[str, Tensor], used: Tensor, count: int) -> tuple[dict[str, Tensor], Tensor]:
    """Takes the first used rows of a table, so that unused ones cost little.

    Args:
        rows: [B, N, ...] each.
        used: bool [B, N].
        count: Rows to take; at most N are taken.

    Returns:
        [B, count, ...] each, unused rows last, and the rows that are used, bool [B, count].
    """
    is_used, index = ops.top_k(ops.cast(used, "float32"), min(count, used.shape[1]))  # Stable: equal values in order.
    return {name: take_rows(values, index) for name, values in rows.items()}, is_used > 0
