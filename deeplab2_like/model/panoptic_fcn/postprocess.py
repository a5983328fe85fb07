"""Post-processing of Panoptic FCN: from raw outputs to kernels, masks and the panoptic map (sections 3.2 and 3.4)."""

from collections.abc import Iterable, Mapping

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.boxes import boxes_around_masks, take_rows
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fcn.config import PanopticFCNConfig, PostprocessConfig
from deeplab2_like.model.panoptic_fcn.kernels import (
    StuffKernels,
    ThingKernels,
    find_centers,
    find_regions,
    fuse_kernels,
    pool_regions,
)
from deeplab2_like.model.panoptic_fcn.masks import measure_masks, resolve_thing_overlaps, thing_masks
from deeplab2_like.model.panoptic_fcn.network import KernelHead
from deeplab2_like.model.segments import paint_segments, region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses


def postprocess(
    outputs: Mapping[str, Tensor],
    geometry: Geometry,
    config: PanopticFCNConfig,
    dataset_info: DatasetInfo,
    classes: SemanticClasses,
    kernel_head: KernelHead,
) -> dict[str, Tensor]:
    """Turns raw outputs into panoptic maps.

    Args:
        outputs: Raw outputs, see `PanopticFCN`.
        geometry: Sizes of the images.
        config: Levels and thresholds.
        dataset_info: The meaning of the panoptic map.
        classes: The classes of the regions.
        kernel_head: Embeds the kernels of things and stuff.

    Returns:
        The dictionary of `PanopticSystem.postprocess`: rows 0 to N - 1 are things in the order of their scores, row
        N + c is the stuff of class c.
    """
    things = find_things(outputs, config, kernel_head)
    stuff = find_stuff(outputs, config, kernel_head)
    return paint_kernels(outputs["feature"], things, stuff, geometry, config, dataset_info, classes)


def predict_instances(
    outputs: Mapping[str, Tensor],
    geometry: Geometry,
    config: PanopticFCNConfig,
    dataset_info: DatasetInfo,
    kernel_head: KernelHead,
) -> dict[str, Tensor]:
    """Returns the dictionary of `PanopticSystem.instances`: all things, including those that the map leaves out.

    Args:
        outputs: Raw outputs, see `PanopticFCN`.
        geometry: Sizes of the images.
        config: Levels and thresholds.
        dataset_info: The thing classes.
        kernel_head: Embeds the kernels of things.
    """
    feature = outputs["feature"]
    things, _, _ = rank_things(feature, find_things(outputs, config, kernel_head), config.postprocess)
    masks = thing_masks(
        feature,
        things.weights,
        *_upsampling_matrices(feature, geometry, config),
        threshold=config.postprocess.mask_threshold,
    )
    return {
        "masks": masks,
        "boxes": boxes_around_masks(masks),
        "classes": thing_class_ids(things.classes, dataset_info),
        "scores": things.scores,
    }


def find_things(outputs: Mapping[str, Tensor], config: PanopticFCNConfig, kernel_head: KernelHead) -> ThingKernels:
    """Finds the kernels at the centers on all levels, and fuses those of the same object.

    Args:
        outputs: Raw outputs.
        config: Levels and thresholds.
        kernel_head: Embeds the kernels.

    Returns:
        The fused kernels of all levels, not sorted again; the score of a removed kernel is zero.
    """
    if "thing_weights" in outputs:  # Those of several views, see `views.merge_views`.
        return ThingKernels(outputs["thing_weights"], outputs["thing_scores"], outputs["thing_classes"])
    options = config.postprocess
    centers = [
        find_centers(
            outputs[f"center_{level}"],
            outputs[f"kernel_{level}"],
            # Objects on the coarsest levels are large, and so are their peaks.
            window=3 if stride <= 32 else 5,
            threshold=options.score_threshold,
            count=options.candidates,
        )
        for level, stride in config.level_strides.items()
    ]
    kernels, scores, classes = (ops.concatenate(values, axis=1) for values in zip(*centers, strict=True))
    things, _ = ThingKernels(kernel_head.embed_things(kernels), scores, classes).top(scores.shape[1])
    weights, scores = fuse_kernels(
        *things,
        similarity=options.similarity,
        class_aware=options.class_aware,
        reference_behavior=config.reference_behavior,
    )
    return ThingKernels(weights, scores, things.classes)


def find_stuff(outputs: Mapping[str, Tensor], config: PanopticFCNConfig, kernel_head: KernelHead) -> StuffKernels:
    """Finds the regions of stuff on all levels, and averages their kernels.

    Args:
        outputs: Raw outputs.
        config: Levels and thresholds.
        kernel_head: Embeds the kernels.
    """
    if "stuff_weights" in outputs:  # Those of several views, see `views.merge_views`.
        return StuffKernels(outputs["stuff_weights"], outputs["stuff_present"])
    regions = (
        find_regions(outputs[f"region_{level}"], threshold=config.postprocess.region_threshold)
        for level in config.size_ranges
    )
    return pool_stuff(outputs, regions, config, kernel_head)


def pool_stuff(
    outputs: Mapping[str, Tensor],
    regions: Iterable[tuple[Tensor, Tensor]],
    config: PanopticFCNConfig,
    kernel_head: KernelHead,
) -> StuffKernels:
    """Averages the kernels of given regions, first over each region and then over the levels on which it is present.

    Args:
        outputs: Raw outputs.
        regions: For each level the masks of the regions, float32 [B, h, w, S], and the present ones, bool [B, S].
        config: Levels.
        kernel_head: Embeds the kernels.
    """
    total: Tensor = 0.0
    count: Tensor = 0.0
    for level, (masks, present) in zip(config.size_ranges, regions, strict=True):
        pooled = pool_regions(outputs[f"kernel_{level}"], masks, over_map=config.reference_behavior)
        weight = ops.cast(present, "float32")[..., None]  # [B, S, 1]
        total, count = total + weight * kernel_head.embed_stuff(pooled), count + weight
    return StuffKernels(total / ops.maximum(count, 1.0), count[..., 0] > 0)


def rank_things(
    feature: Tensor, things: ThingKernels, config: PostprocessConfig
) -> tuple[ThingKernels, tuple[Tensor, Tensor], Tensor]:
    """Multiplies each score by the mean probability inside the mask, and keeps the best things.

    Args:
        feature: float32 [B, h, w, E].
        things: Result of `find_things`.
        config: Thresholds.

    Returns:
        The things, the best first; the rows and the columns of cells that their masks touch, bool [B, N, h] and
        bool [B, N, w]; and their rows among the given things, int32 [B, N].
    """
    certainty, rows, columns = measure_masks(feature, things.weights, threshold=config.mask_threshold)
    scores = things.scores * certainty
    scores = ops.where(scores >= config.score_threshold, scores, 0.0)
    things, index = things._replace(scores=scores).top(config.kernels)
    return things, (take_rows(rows, index), take_rows(columns, index)), index


def paint_kernels(
    feature: Tensor,
    things: ThingKernels,
    stuff: StuffKernels,
    geometry: Geometry,
    config: PanopticFCNConfig,
    dataset_info: DatasetInfo,
    classes: SemanticClasses,
) -> dict[str, Tensor]:
    """Multiplies kernels with the feature, and paints the masks of things over those of stuff.

    Args:
        feature: float32 [B, h, w, E].
        things: Kernels of things.
        stuff: Kernels of stuff.
        geometry: Sizes of the images.
        config: Stride and thresholds.
        dataset_info: The meaning of the panoptic map.
        classes: The classes of the regions.

    Returns:
        The dictionary of `postprocess`.
    """
    options = config.postprocess
    things, touched, _ = rank_things(feature, things, options)
    owner = resolve_thing_overlaps(
        (things.scores >= options.map_score_threshold) & (things.scores > 0),
        things.weights,
        *touched,
        feature,
        *_upsampling_matrices(feature, geometry, config),
        threshold=options.mask_threshold,
        overlap_threshold=options.overlap_threshold,
    )
    probability = stuff_probability(feature, stuff)
    table = paint_segments(
        geometry.argmax(probability, stride=config.stride),
        owner,
        thing_class_ids(things.classes, dataset_info),
        class_of_semantic=classes.painted_class,
        dataset_info=dataset_info,
        stuff_area_limit=options.stuff_area_limit,
    )
    stuff_scores = region_scores(probability, table, classes.of_class, geometry, stride=config.stride)
    return segment_outputs(table, things.scores, stuff_scores)


def stuff_probability(feature: Tensor, stuff: StuffKernels) -> Tensor:
    """Multiplies the kernels of stuff with the feature, float32 [B, h, w, E].

    Returns:
        float32 [B, h, w, S], the probability of each region class, zero for those that were not found.
    """
    logits = ops.einsum("bhwe,bse->bhws", feature, stuff.weights)
    return ops.where(stuff.present[:, None, None], ops.sigmoid(logits), 0.0)


def _upsampling_matrices(feature: Tensor, geometry: Geometry, config: PanopticFCNConfig) -> tuple[Tensor, Tensor]:
    cells = tuple(ops.shape(feature)[1:3])
    return geometry.upsampling_matrices((cells[0], cells[1]), stride=config.stride)
