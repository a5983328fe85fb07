"""Post-processing of the unifying system: the best slot of each pixel at full size (section 3.4), or a merging rule."""

from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.overlaps import resolve_mask_overlaps
from deeplab2_like.model.resampling import running_argmax, upsample
from deeplab2_like.model.segments import SegmentTable, paint_segments, region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses
from deeplab2_like.model.stages import stage
from deeplab2_like.model.unifying.config import PostprocessConfig, Potential
from deeplab2_like.model.unifying.potential import class_values, slot_potentials, thing_potential

# Less than any potential: the value of pixels without a slot so far, and of unused detections.
_NEVER = -1e9


def postprocess(
    outputs: Mapping[str, Tensor],
    geometry: Geometry,
    config: PostprocessConfig,
    dataset_info: DatasetInfo,
    *,
    classes: SemanticClasses,
    potential: Potential,
    stride: int,
) -> dict[str, Tensor]:
    """Turns raw outputs into panoptic maps.

    Args:
        outputs: Raw outputs, see `Unifying`.
        geometry: Sizes of the images.
        config: Thresholds.
        dataset_info: The meaning of the panoptic map.
        classes: The semantic classes.
        potential: Variant of the dynamic potential.
        stride: Network pixels per semantic logit.

    Returns:
        The dictionary of `PanopticSystem.postprocess`: rows 0 to D - 1 are detections by score, row D + c is class c.
        The score of a stuff segment is the mean probability of its class.
    """
    table = find_segments(outputs, geometry, config, dataset_info, classes=classes, potential=potential, stride=stride)
    probability = ops.softmax(outputs["semantic_logits"], axis=-1)
    scores = region_scores(probability, table, classes.of_class, geometry, stride=stride)
    return segment_outputs(table, outputs["scores"], scores)


def find_segments(
    outputs: Mapping[str, Tensor],
    geometry: Geometry,
    config: PostprocessConfig,
    dataset_info: DatasetInfo,
    *,
    classes: SemanticClasses,
    potential: Potential,
    stride: int,
) -> SegmentTable:
    """Finds the segments of the panoptic map, with the arguments of `postprocess`."""
    scores = outputs["scores"]
    is_strong = scores >= config.score_threshold
    if config.merge == "argmax":
        strong = {**outputs, "scores": ops.where(is_strong, scores, 0.0)}
        slot = find_best_slots(strong, geometry, dataset_info, potential=potential, stride=stride)
        return paint_slots(slot, outputs["thing_classes"], config, dataset_info)
    owner = resolve_mask_overlaps(
        is_strong & (scores > 0),
        geometry.boxes_to_image(outputs["boxes"]),
        outputs["masks"],
        height=geometry.image_size[0],
        width=geometry.image_size[1],
        overlap_threshold=config.overlap_threshold,
    )
    return paint_segments(
        geometry.argmax(outputs["semantic_logits"], stride=stride),
        owner,
        thing_class_ids(outputs["thing_classes"], dataset_info),
        class_of_semantic=classes.painted_class,
        dataset_info=dataset_info,
        stuff_area_limit=config.stuff_area_limit,
    )


def paint_slots(
    slot: Tensor, thing_classes: Tensor, config: PostprocessConfig, dataset_info: DatasetInfo
) -> SegmentTable:
    """Paints the map of slots.

    Args:
        slot: int32 [B, H, W]: a detection below D, stuff class number s at D + s, or D + S for void.
        thing_classes: int32 [B, D], positions among the thing classes.
        config: Smallest area of stuff.
        dataset_info: The meaning of the panoptic map.
    """
    num_detections = thing_classes.shape[1]
    return paint_segments(
        ops.maximum(slot - num_detections, 0),
        ops.minimum(slot, num_detections),
        thing_class_ids(thing_classes, dataset_info),
        class_of_semantic=(*dataset_info.stuff_classes, -1),
        dataset_info=dataset_info,
        stuff_area_limit=config.stuff_area_limit,
    )


def find_best_slots(
    outputs: Mapping[str, Tensor],
    geometry: Geometry,
    dataset_info: DatasetInfo,
    *,
    potential: Potential,
    stride: int,
) -> Tensor:
    """Finds the slot with the largest potential in each pixel, with the arguments of `postprocess`.

    Returns:
        int32 [B, H, W].
    """
    logits = outputs["semantic_logits"]
    _, update = slot_potentials(outputs, dataset_info, potential=potential, stride=stride)
    return argmax_over_slots(
        logits,
        geometry.boxes_to_image(outputs["boxes"]),
        outputs["scores"],
        thing_class_ids(outputs["thing_classes"], dataset_info),
        outputs.get("masks"),
        update,
        *geometry.upsampling_matrices(tuple(ops.shape(logits)[1:3]), stride=stride),
        stuff_classes=dataset_info.stuff_classes,
        potential=potential,
    )


@stage
def argmax_over_slots(
    semantic_logits: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    masks: Tensor | None,
    update: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    stuff_classes: Sequence[int],
    potential: str,
) -> Tensor:
    """Finds the slot with the largest potential in each pixel of the map, one slot after the other (section 3.4).

    Class probabilities and affinity updates are upsampled bilinearly; boxes and masks are pasted at full size.

    Args:
        semantic_logits: float32 [B, h, w, C].
        boxes: float32 [B, D, 4], in pixels of the map.
        scores: float32 [B, D], the best detections first; zero for unused ones.
        classes: int32 [B, D], class ids.
        masks: float32 [B, D, P, P], or None for boxes alone.
        update: float32 [B, D + S, h, w], of `affinity_update`, or None without affinities.
        rows: float32 [H, h], of `Geometry.upsampling_matrices`.
        columns: float32 [W, w].
        stuff_classes: Class ids of stuff, S of them.
        potential: See `thing_potential`.

    Returns:
        int32 [B, H, W].
    """
    values = class_values(semantic_logits, potential)  # [B, C, h, w]
    num_detections = boxes.shape[1]
    size = tuple(ops.shape(part)[0] for part in (values, rows, columns))
    stuff = ops.array(stuff_classes, "int32")

    def add_update(plane: Tensor, slot: Tensor) -> Tensor:
        return plane if update is None else plane + upsample(ops.take(update, slot, axis=1), rows, columns)

    def thing_plane(slot: Tensor) -> Tensor:
        box, score, class_id = (ops.take(each, slot, axis=1)[:, None] for each in (boxes, scores, classes))
        mask = None if masks is None else ops.take(masks, slot, axis=1)[:, None]
        of_class = ops.take_along_axis(values, class_id[:, :, None, None], axis=1)[:, 0]  # [B, h, w]
        of_class = upsample(of_class, rows, columns)[:, None]  # [B, 1, H, W]
        plane = thing_potential(of_class, box, score, mask, potential=potential)[:, 0]
        return ops.where(score[..., None] > 0, add_update(plane, slot), _NEVER)

    def stuff_plane(slot: Tensor) -> Tensor:
        of_class = ops.take(values, ops.take(stuff, slot - num_detections), axis=1)  # [B, h, w]
        return add_update(upsample(of_class, rows, columns), slot)

    # The loop ends before the unused detections, which come last.
    num_used = ops.max(ops.where(scores > 0, ops.arange(num_detections) + 1, 0))
    start = ops.full(size, _NEVER, "float32"), ops.full(size, num_detections, "int32")
    best = running_argmax(thing_plane, 0, num_used, start)
    return running_argmax(stuff_plane, num_detections, num_detections + len(stuff_classes), best)[1]
