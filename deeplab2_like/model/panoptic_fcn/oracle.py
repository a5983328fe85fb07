"""Upper bounds of Panoptic FCN: positions, classes and masks that are replaced by the ground truth (Table 9)."""

import functools
from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fcn.config import PanopticFCNConfig
from deeplab2_like.model.panoptic_fcn.kernels import StuffKernels, ThingKernels
from deeplab2_like.model.panoptic_fcn.network import KernelHead
from deeplab2_like.model.panoptic_fcn.postprocess import paint_kernels, pool_stuff, stuff_probability
from deeplab2_like.model.panoptic_fcn.targets import is_in_size_range
from deeplab2_like.model.segments import look_up, paint_segments, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses


def postprocess_with_truth(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    geometry: Geometry,
    parts: Sequence[str],
    config: PanopticFCNConfig,
    dataset_info: DatasetInfo,
    classes: SemanticClasses,
    kernel_head: KernelHead,
) -> dict[str, Tensor]:
    """Post-processes raw outputs with true positions, and possibly true classes and masks.

    Args:
        outputs: Raw outputs, see `PanopticFCN`.
        targets: Batched targets of the whole images.
        geometry: Sizes of the images.
        parts: `positions`: the kernels are those at the true centers and of the true regions; their classes are
            predicted there. `classes`: these classes are true, too. `masks`: the true masks replace those of the
            kernels. `positions` is always replaced.
        config: Levels and thresholds.
        dataset_info: The meaning of the panoptic map.
        classes: The classes of the regions.
        kernel_head: Embeds the kernels.

    Returns:
        The dictionary of `postprocess`.
    """
    things = true_things(outputs, targets, geometry, config, kernel_head)
    if "classes" in parts:
        things = things._replace(classes=targets["classes"])
    regions = true_regions(outputs, targets, geometry, config, classes)
    region_classes = classify_regions(outputs, regions, parts)
    if "masks" in parts:
        return paint_true_masks(targets, things.classes, region_classes, config, dataset_info, classes)
    stuff = true_stuff(outputs, regions, region_classes, config, kernel_head)
    return paint_kernels(outputs["feature"], things, stuff, geometry, config, dataset_info, classes)


def semantic_map_with_truth(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    geometry: Geometry,
    parts: Sequence[str],
    config: PanopticFCNConfig,
    classes: SemanticClasses,
    kernel_head: KernelHead,
) -> Tensor:
    """Returns the region class of each pixel, with the arguments of `postprocess_with_truth`.

    Returns:
        int32 [B, H, W]; the number of region classes for void, which only true masks have.
    """
    regions = true_regions(outputs, targets, geometry, config, classes)
    region_classes = classify_regions(outputs, regions, parts)
    if "masks" in parts:
        return true_region_map(targets, region_classes, classes)
    stuff = true_stuff(outputs, regions, region_classes, config, kernel_head)
    return geometry.argmax(stuff_probability(outputs["feature"], stuff), stride=config.stride)


def true_things(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    geometry: Geometry,
    config: PanopticFCNConfig,
    kernel_head: KernelHead,
) -> ThingKernels:
    """Reads the kernels and the predicted class at the center of each true object, averaged over its levels.

    Args:
        outputs: Raw outputs.
        targets: Batched targets.
        geometry: Sizes of the images.
        config: Levels and their size ranges.
        kernel_head: Embeds the kernels.

    Returns:
        Kernels of M objects, with score 1.
    """
    boxes, valid = geometry.boxes_to_network(targets["boxes"]), targets["valid"]
    is_on_level = [is_in_size_range(boxes, *limits) & valid for limits in config.size_ranges.values()]
    # An object that is smaller or larger than all ranges is read on all levels.
    is_on_any = functools.reduce(ops.logical_or, is_on_level)
    weights, classes, count = 0.0, 0.0, 0.0
    for (level, stride), is_on in zip(config.level_strides.items(), is_on_level, strict=True):
        kernels, logits = outputs[f"kernel_{level}"], outputs[f"center_{level}"]
        batch, height, width = ops.shape(kernels)[:3]
        position = ops.cast(targets["centers"] * geometry.scale / stride, "int32")  # [B, M, 2]
        y, x = ops.minimum(position[..., 0], height - 1), ops.minimum(position[..., 1], width - 1)
        index = y * width + x  # [B, M]
        kernels = take_rows(ops.reshape(kernels, (batch, height * width, kernels.shape[-1])), index)
        logits = take_rows(ops.reshape(logits, (batch, height * width, logits.shape[-1])), index)
        weight = ops.cast(is_on | (valid & ~is_on_any), "float32")[..., None]  # [B, M, 1]
        weights = weights + weight * kernel_head.embed_things(kernels)
        classes = classes + weight * ops.sigmoid(logits)
        count = count + weight
    return ThingKernels(
        weights / ops.maximum(count, 1.0),
        ops.cast(valid, "float32"),
        ops.cast(ops.argmax(classes, axis=-1), "int32"),
    )


def true_regions(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    geometry: Geometry,
    config: PanopticFCNConfig,
    classes: SemanticClasses,
) -> dict[str, Tensor]:
    """Returns the true region of each class by level, float32 [B, h, w, S] of zeros and ones.

    Args:
        outputs: Raw outputs.
        targets: Batched targets.
        geometry: Sizes of the images.
        config: Levels.
        classes: The classes of the regions.
    """
    semantic = classes.of_class_map(targets["semantic"])
    regions = {}
    for level, stride in config.level_strides.items():
        height, width = ops.shape(outputs[f"region_{level}"])[1:3]
        labels = geometry.labels_at_cells(semantic, (height, width), stride=stride)
        regions[level] = ops.one_hot(labels, len(classes.class_id), dtype="float32")
    return regions


def predict_region_classes(outputs: Mapping[str, Tensor], regions: Mapping[str, Tensor]) -> Tensor:
    """Returns the class that the network predicts for each true region, int32 [B, S].

    Args:
        outputs: Raw outputs.
        regions: Result of `true_regions`.
    """
    total = 0.0
    for level, masks in regions.items():
        total = total + ops.einsum("bhwt,bhwp->btp", masks, ops.sigmoid(outputs[f"region_{level}"]))
    return ops.cast(ops.argmax(total, axis=-1), "int32")


def classify_regions(outputs: Mapping[str, Tensor], regions: Mapping[str, Tensor], parts: Sequence[str]) -> Tensor:
    """Returns the class of each true region, int32 [B, S], which is the predicted one unless `parts` has `classes`."""
    predicted = predict_region_classes(outputs, regions)
    if "classes" in parts:
        return ops.zeros_like(predicted) + ops.arange(predicted.shape[1])
    return predicted


def true_stuff(
    outputs: Mapping[str, Tensor],
    regions: Mapping[str, Tensor],
    region_classes: Tensor,
    config: PanopticFCNConfig,
    kernel_head: KernelHead,
) -> StuffKernels:
    """Averages the kernels of the true regions.

    Args:
        outputs: Raw outputs.
        regions: Result of `true_regions`.
        region_classes: Result of `classify_regions`.
        config: Levels.
        kernel_head: Embeds the kernels.
    """
    pairs = [(masks, ops.any(masks > 0, axis=(1, 2))) for masks in regions.values()]
    return join_regions(pool_stuff(outputs, pairs, config, kernel_head), region_classes)


def true_region_map(targets: Mapping[str, Tensor], region_classes: Tensor | None, classes: SemanticClasses) -> Tensor:
    """Returns the map of true regions with given classes, int32 [B, H, W]; void is the number of region classes.

    Args:
        targets: Batched targets.
        region_classes: int32 [B, S], class of each true region; None keeps the true classes.
        classes: The classes of the regions.
    """
    semantic = classes.of_class_map(targets["semantic"])
    if region_classes is None:
        return semantic
    void = ops.full_like(region_classes[:, :1], len(classes.class_id))
    return look_up(ops.concatenate([region_classes, void], axis=1), semantic)


def join_regions(stuff: StuffKernels, region_classes: Tensor) -> StuffKernels:
    """Averages the kernels of the regions that are predicted to have the same class.

    Args:
        stuff: Kernels of the true regions.
        region_classes: int32 [B, S], predicted class of each of them.

    Returns:
        Kernels by predicted class.
    """
    num_regions = region_classes.shape[1]
    joins = ops.one_hot(region_classes, num_regions, dtype="float32")  # [B, true, predicted]
    joins = joins * ops.cast(stuff.present, "float32")[..., None]
    count = ops.sum(joins, axis=1)  # [B, predicted]
    weights = ops.einsum("btp,bte->bpe", joins, stuff.weights) / ops.maximum(count, 1.0)[..., None]
    return StuffKernels(weights, count > 0)


def paint_true_masks(
    targets: Mapping[str, Tensor],
    thing_classes: Tensor,
    region_classes: Tensor | None,
    config: PanopticFCNConfig,
    dataset_info: DatasetInfo,
    classes: SemanticClasses,
) -> dict[str, Tensor]:
    """Paints the true masks with given classes.

    Args:
        targets: Batched targets.
        thing_classes: int32 [B, M], positions among the thing classes.
        region_classes: int32 [B, S], class of each true region; None keeps the true classes.
        config: Area limit of stuff.
        dataset_info: The meaning of the panoptic map.
        classes: The classes of the regions.

    Returns:
        The dictionary of `postprocess`, all scores 1.
    """
    # The instance map counts rows from 1; true masks do not overlap.
    instance_map, num_things = targets["instance_map"], targets["valid"].shape[1]
    owner = ops.where(instance_map > 0, instance_map - 1, num_things)
    table = paint_segments(
        true_region_map(targets, region_classes, classes),
        owner,
        thing_class_ids(thing_classes, dataset_info),
        class_of_semantic=(*classes.painted_class, -1),
        dataset_info=dataset_info,
        stuff_area_limit=config.postprocess.stuff_area_limit,
    )
    scores = ops.cast(targets["valid"], "float32")
    return segment_outputs(table, scores, ops.ones_like(table.kept[:, num_things:], "float32"))
