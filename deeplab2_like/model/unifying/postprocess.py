"""Post-processing of the unifying system: the best slot of each pixel at full size (section 3.4), or a merging rule."""

from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.overlaps import line_ranges, resolve_mask_overlaps, update_in_windows
from deeplab2_like.model.resampling import best_by_phases, best_by_planes, minimum_around, upsample_lines
from deeplab2_like.model.segments import SegmentTable, count_pixels, paint_segments, region_scores, segment_outputs
from deeplab2_like.model.semantic import SemanticClasses
from deeplab2_like.model.stages import stage
from deeplab2_like.model.unifying.config import PostprocessConfig, Potential
from deeplab2_like.model.unifying.potential import class_values, slot_potentials, thing_potential


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
    if config.merge == "argmax":
        slot = find_best_slots(outputs, geometry, config, dataset_info, potential=potential, stride=stride)
        return paint_slots(slot, outputs["thing_classes"], config, dataset_info)
    return paint_segments(
        geometry.argmax(outputs["semantic_logits"], stride=stride),
        _resolve_overlaps(outputs, geometry, config),
        thing_class_ids(outputs["thing_classes"], dataset_info),
        class_of_semantic=classes.painted_class,
        dataset_info=dataset_info,
        stuff_area_limit=config.stuff_area_limit,
    )


def _is_strong(scores: Tensor, config: PostprocessConfig) -> Tensor:
    """Returns the detections of the map by their score, bool [B, D]."""
    return (scores >= config.score_threshold) & (scores > 0)


def _resolve_overlaps(outputs: Mapping[str, Tensor], geometry: Geometry, config: PostprocessConfig) -> Tensor:
    """Returns the detection that holds each pixel by the rule of Panoptic FPN, see `resolve_mask_overlaps`."""
    return resolve_mask_overlaps(
        _is_strong(outputs["scores"], config),
        geometry.boxes_to_image(outputs["boxes"]),
        outputs["masks"],
        height=geometry.image_size[0],
        width=geometry.image_size[1],
        overlap_threshold=config.overlap_threshold,
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
    config: PostprocessConfig,
    dataset_info: DatasetInfo,
    *,
    potential: Potential,
    stride: int,
) -> Tensor:
    """Finds the slot with the largest potential in each pixel, with the arguments of `postprocess`.

    Detections with a low score, and duplicates of better ones, are no slots.

    Returns:
        int32 [B, H, W], see `argmax_over_slots`.
    """
    logits, scores = outputs["semantic_logits"], outputs["scores"]
    is_slot = _is_strong(scores, config)
    if "masks" in outputs and config.overlap_threshold < 1:
        # A duplicate holds no pixel of its own.
        num_detections = scores.shape[1]
        owner = _resolve_overlaps(outputs, geometry, config)
        is_slot = count_pixels(owner, num_rows=num_detections + 1)[:, :num_detections] > 0
    outputs = {**outputs, "scores": ops.where(is_slot, scores, 0.0)}
    _, update = slot_potentials(outputs, dataset_info, potential=potential, stride=stride)
    detections = {
        "boxes": geometry.boxes_to_image(outputs["boxes"]),
        "scores": outputs["scores"],
        "classes": thing_class_ids(outputs["thing_classes"], dataset_info),
    }
    if "masks" in outputs:
        detections["masks"] = outputs["masks"]
    matrices = None
    if geometry.network_size is not None:
        matrices = geometry.upsampling_matrices(tuple(ops.shape(logits)[1:3]), stride=stride)
    return argmax_over_slots(
        logits,
        detections,
        update,
        matrices,
        lines_per_cell=stride / geometry.scale[0],
        height=geometry.image_size[0],
        width=geometry.image_size[1],
        stride=stride,
        stuff_classes=dataset_info.stuff_classes,
        potential=potential,
    )


@stage
def argmax_over_slots(
    semantic_logits: Tensor,
    detections: Mapping[str, Tensor],
    update: Tensor | None,
    matrices: tuple[Tensor, Tensor] | None,
    *,
    lines_per_cell: Any,
    height: Any,
    width: Any,
    stride: int,
    stuff_classes: Sequence[int],
    potential: str,
) -> Tensor:
    """Finds the slot with the largest potential in each pixel of the map (section 3.4).

    Class probabilities and affinity updates are upsampled bilinearly; boxes and masks are pasted at full size. First
    come all stuff classes together, then one detection after the other, each in a window of lines, see `line_windows`.

    Args:
        semantic_logits: float32 [B, h, w, C].
        detections: `boxes` float32 [B, D, 4], in pixels of the map; `scores` float32 [B, D], zero for unused
            detections; `classes` int32 [B, D], class ids; and, unless boxes are used alone, `masks` float32
            [B, D, P, P].
        update: float32 [B, D + S, h, w], of `affinity_update`, or None without affinities.
        matrices: float32 [H, h] and [W, w], of `Geometry.upsampling_matrices`; None if the image is not resized.
        lines_per_cell: Lines of the map per cell of the semantic map, a float or a float32 scalar.
        height: H, height of the map, an int or an int32 scalar.
        width: W, its width.
        stride: Network pixels per cell of the semantic map.
        stuff_classes: Class ids of stuff, S of them.
        potential: See `thing_potential`.

    Returns:
        int32 [B, H, W]: a detection below D, or stuff class number s as D + s. Of equal potentials stuff wins, then the
        first detection.
    """
    values = class_values(semantic_logits, potential)  # [B, C, h, w]
    boxes, scores, classes = (detections[name] for name in ("boxes", "scores", "classes"))
    masks = detections.get("masks")
    num_detections = boxes.shape[1]
    stuff = ops.take(values, ops.array(stuff_classes, "int32"), axis=1)  # [B, S, h, w]
    if update is not None:
        stuff = stuff + update[:, num_detections:]
    stuff = ops.transpose(stuff, (0, 2, 3, 1))  # [B, h, w, S]
    if matrices is None:
        best, stuff_slot = best_by_phases(stuff, height=height, width=width, stride=stride)
    else:
        best, stuff_slot = best_by_planes(stuff, *matrices)

    def upsample_window(maps: Tensor, channel: Tensor, lines: Tensor) -> Tensor:
        if matrices is None:
            return upsample_lines(maps, channel, lines, width=width, stride=stride)
        rows, columns = matrices
        plane = take_rows(maps, channel[:, None])[:, 0]  # [B, h, w]
        return ops.matmul(ops.matmul(ops.take(rows, lines, axis=0), plane), ops.transpose(columns))

    def compete(n: Tensor, top: Tensor, lines: Any, window: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        best, slot = window
        line = top[:, None] + ops.arange(lines)  # [B, L]
        box, score = (ops.take(each, n, axis=1)[:, None] for each in (boxes, scores))
        shift = ops.cast(top, "float32")[:, None, None] * ops.array([1.0, 0.0, 1.0, 0.0])
        mask = None if masks is None else ops.take(masks, n, axis=1)[:, None]
        of_class = upsample_window(values, ops.take(classes, n, axis=1), line)[:, None]  # [B, 1, L, W]
        plane = thing_potential(of_class, box - shift, score, mask, potential=potential)[:, 0]
        if update is not None:
            plane = plane + upsample_window(update, n + ops.zeros_like(top), line)
        wins = (plane > best) & (score > 0)[..., None]
        return ops.where(wins, plane, best), ops.where(wins, ops.cast(n, "int16"), slot)

    least_stuff = ops.max(minimum_around(stuff, 1 if matrices is None else 2), axis=-1)  # [B, h, w]
    things_update = None if update is None else update[:, :num_detections]
    windows = line_windows(boxes, things_update, least_stuff, lines_per_cell=lines_per_cell, height=height)
    # int16 halves the memory traffic, as in `resolve_overlaps`.
    maps = (best, ops.cast(stuff_slot + num_detections, "int16"))
    slot = update_in_windows(maps, compete, scores > 0, *windows, height=height, width=width)[1]
    return ops.cast(slot, "int32")


def line_windows(
    boxes: Tensor, update: Tensor | None, least_stuff: Tensor, *, lines_per_cell: Any, height: Any
) -> tuple[Tensor, Tensor]:
    """Returns the lines in which a detection may be the best slot: those of its box, and those its update reaches.

    Outside of its box, a detection has its affinity update alone. A pixel is a weighted mean of the cells next to it.
    So if the update is at most `least_stuff` in these cells, then stuff is at least as good in the pixel.

    Args:
        boxes: float32 [B, D, 4], in pixels of the map.
        update: float32 [B, D, h, w], or None without affinities.
        least_stuff: float32 [B, h, w], a potential that one stuff class reaches in all cells around each cell.
        lines_per_cell: Lines of the map per cell, a float or a float32 scalar.
        height: Height of the map.

    Returns:
        The first line and the line after the last one, int32 [B, D] each, in 0..height.
    """
    first_line, last_line = line_ranges(boxes, height)
    reaches = ops.any((0.0 if update is None else update) > least_stuff[:, None], axis=-1)  # [B, D or 1, h]
    is_reached = ops.any(reaches, axis=-1)
    num_cells = ops.shape(reaches)[-1]
    reaches = ops.cast(reaches, "int32")
    first_cell = ops.cast(ops.argmax(reaches, axis=-1), "float32")
    last_cell = ops.cast(num_cells - 1 - ops.cast(ops.argmax(ops.flip(reaches, axis=-1), axis=-1), "int32"), "float32")
    # A cell counts in the lines from the cell before it to the cell after it.
    limit = ops.cast(height, "float32")
    first = ops.clip(ops.floor((first_cell - 1) * lines_per_cell), 0.0, limit)
    last = ops.clip(ops.ceil((last_cell + 2) * lines_per_cell), 0.0, limit)
    first, last = (ops.cast(side, "int32") for side in (first, last))
    return (
        ops.where(is_reached, ops.minimum(first_line, first), first_line),
        ops.where(is_reached, ops.maximum(last_line, last), last_line),
    )
