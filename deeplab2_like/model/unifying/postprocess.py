"""Post-processing of the unifying system: the best slot of each pixel at full size (section 3.4), or a merging rule."""

from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.overlaps import Window, pixel_bounds, resolve_mask_overlaps, update_in_windows
from deeplab2_like.model.resampling import best_by_phases, best_by_planes, minimum_around, upsample, upsample_window
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
        pixels_per_cell=stride / geometry.scale,
        height=geometry.image_size[0],
        width=geometry.image_size[1],
        stride=stride,
        stuff_classes=dataset_info.stuff_classes,
        potential=potential,
    )


def argmax_over_slots(
    semantic_logits: Tensor,
    detections: Mapping[str, Tensor],
    update: Tensor | None,
    matrices: tuple[Tensor, Tensor] | None,
    *,
    pixels_per_cell: Any,
    height: Any,
    width: Any,
    stride: int,
    stuff_classes: Sequence[int],
    potential: str,
) -> Tensor:
    """Finds the slot with the largest potential in each pixel of the map (section 3.4).

    Class probabilities and affinity updates are upsampled bilinearly; boxes and masks are pasted at full size. First
    come all stuff classes together, then one detection after the other.

    Args:
        semantic_logits: float32 [B, h, w, C].
        detections: `boxes` float32 [B, D, 4], in pixels of the map; `scores` float32 [B, D], zero for unused
            detections; `classes` int32 [B, D], class ids; and, unless boxes are used alone, `masks` float32
            [B, D, P, P].
        update: float32 [B, D + S, h, w], of `affinity_update`, or None without affinities.
        matrices: float32 [H, h] and [W, w], of `Geometry.upsampling_matrices`; None if the image is not resized.
        pixels_per_cell: Lines and columns of the map per cell of the semantic map, two floats or float32 [2].
        height: H, height of the map, an int or an int32 scalar.
        width: W, its width.
        stride: Network pixels per cell of the semantic map.
        stuff_classes: Class ids of stuff, S of them.
        potential: See `thing_potential`.

    Returns:
        int32 [B, H, W]: a detection below D, or stuff class number s as D + s. Of equal potentials stuff wins, then the
        first detection.
    """
    num_detections = detections["boxes"].shape[1]
    things_update, stuff_update = (
        (None, None) if update is None else (update[:, :num_detections], update[:, num_detections:])
    )
    values, stuff = _class_and_stuff_values(
        semantic_logits, stuff_update, stuff_classes=stuff_classes, potential=potential
    )
    best, slot = _best_stuff(stuff, matrices, height=height, width=width, stride=stride)
    bounds = slot_bounds(
        detections["boxes"],
        things_update,
        stuff,
        # A pixel of a resized map is interpolated from pixels that are interpolated from cells.
        radius=1 if matrices is None else 2,
        pixels_per_cell=pixels_per_cell,
        height=height,
        width=width,
    )
    return _add_things(
        (best, slot + num_detections),
        values,
        detections,
        things_update,
        bounds,
        matrices,
        width=width,
        stride=stride,
        potential=potential,
    )


@stage
def _class_and_stuff_values(
    semantic_logits: Tensor, stuff_update: Tensor | None, *, stuff_classes: Sequence[int], potential: str
) -> tuple[Tensor, Tensor]:
    """Returns `class_values`, float32 [B, C, h, w], and the potential of stuff, float32 [B, h, w, S].

    A stage of its own, because XLA would compute the potential of stuff again in each phase of the upsampling.
    """
    values = class_values(semantic_logits, potential)
    stuff = ops.take(values, ops.array(stuff_classes, "int32"), axis=1)  # [B, S, h, w]
    if stuff_update is not None:
        stuff = stuff + stuff_update
    return values, ops.transpose(stuff, (0, 2, 3, 1))


@stage
def _best_stuff(
    stuff: Tensor, matrices: tuple[Tensor, Tensor] | None, *, height: Any, width: Any, stride: int
) -> tuple[Tensor, Tensor]:
    """Returns the best potential of stuff and its number, float32 and int32 [B, H, W]."""
    if matrices is None:
        return best_by_phases(stuff, height=height, width=width, stride=stride)
    return best_by_planes(stuff, *matrices)


@stage
def _add_things(
    best: tuple[Tensor, Tensor],
    values: Tensor,
    detections: Mapping[str, Tensor],
    update: Tensor | None,
    bounds: Tensor,
    matrices: tuple[Tensor, Tensor] | None,
    *,
    width: Any,
    stride: int,
    potential: str,
) -> Tensor:
    """Compares one detection after the other with the best slot so far, each in a window.

    Args:
        best: The best potential of stuff and its slot, float32 and int32 [B, H, W].
        values: float32 [B, C, h, w], of `class_values`.
        detections: See `argmax_over_slots`.
        update: float32 [B, D, h, w], or None without affinities.
        bounds: int32 [B, D, 4], of `slot_bounds`.
        matrices: See `argmax_over_slots`, as for the following arguments.
        width: W.
        stride: Network pixels per cell of the semantic map.
        potential: See `thing_potential`.

    Returns:
        int32 [B, H, W], the best slot.
    """
    boxes, scores, classes = (detections[name] for name in ("boxes", "scores", "classes"))
    masks = detections.get("masks")

    def upsample_in(window: Window, maps: Tensor, channel: Tensor) -> Tensor:
        if matrices is None:
            size = {"height": window.height, "width": window.width}
            return upsample_window(maps, channel, window.top, window.left, **size, stride=stride)
        # Columns beyond the border repeat the last one.
        columns = ops.take(matrices[1], ops.minimum(window.columns, width - 1), axis=0)  # [B, K, w]
        plane = take_rows(maps, channel[:, None])[:, 0]  # [B, h, w]
        return upsample(plane, ops.take(matrices[0], window.lines, axis=0), columns)

    def compete(n: Tensor, window: Window, parts: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        best, slot = parts
        box, score = (ops.take(each, n, axis=1)[:, None] for each in (boxes, scores))
        mask = None if masks is None else ops.take(masks, n, axis=1)[:, None]
        of_class = upsample_in(window, values, ops.take(classes, n, axis=1))[:, None]  # [B, 1, L, K]
        plane = thing_potential(of_class, window.shift(box), score, mask, potential=potential)[:, 0]
        if update is not None:
            plane = plane + upsample_in(window, update, n + ops.zeros_like(window.top))
        wins = (plane > best) & (score > 0)[..., None]
        return ops.where(wins, plane, best), ops.where(wins, ops.cast(n, "int16"), slot)

    # int16 halves the memory traffic, as in `resolve_overlaps`.
    maps = (best[0], ops.cast(best[1], "int16"))
    return ops.cast(update_in_windows(maps, compete, scores > 0, bounds)[1], "int32")


@stage
def slot_bounds(
    boxes: Tensor,
    update: Tensor | None,
    stuff: Tensor,
    *,
    radius: int,
    pixels_per_cell: Any,
    height: Any,
    width: Any,
) -> Tensor:
    """Returns the bounds of the pixels where a detection may be the best slot: its box, and what its update reaches.

    Outside of its box, a detection has its affinity update alone. A pixel is a weighted mean of the cells next to it.
    So if the update is at most what one stuff class reaches in all these cells, then stuff is at least as good in the
    pixel.

    Args:
        boxes: float32 [B, D, 4], in pixels of the map.
        update: float32 [B, D, h, w], or None without affinities.
        stuff: float32 [B, h, w, S], potentials of stuff.
        radius: Largest distance of two cells, in rows or columns, that one pixel is interpolated from.
        pixels_per_cell: Lines and columns of the map per cell, two floats or float32 [2].
        height: Height of the map.
        width: Its width.

    Returns:
        int32 [B, D, 4], see `pixel_bounds`.
    """
    bounds = pixel_bounds(boxes, height, width)
    least_stuff = ops.max(minimum_around(stuff, radius), axis=-1)  # [B, h, w]
    # With variant `a`, stuff may be below zero, the potential of a detection without affinities outside of its box.
    reaches = (0.0 if update is None else update) > least_stuff[:, None]  # [B, D or 1, h, w]
    sides = []
    for axis, size in enumerate((height, width)):
        is_reached = ops.any(reaches, axis=3 - axis)  # [B, D or 1, h or w]
        cell = ops.cast(ops.arange(ops.shape(is_reached)[-1]), "float32")
        # A cell counts in the pixels from the cell before it to the cell after it. Without any cell, the first pixel
        # is the last one of the map, and the other way round.
        limit = ops.cast(size, "float32")
        first, last = ops.floor((cell - 1) * pixels_per_cell[axis]), ops.ceil((cell + 2) * pixels_per_cell[axis])
        first = ops.min(ops.where(is_reached, ops.clip(first, 0.0, limit), limit), axis=-1)  # [B, D or 1]
        last = ops.max(ops.where(is_reached, ops.clip(last, 0.0, limit), 0.0), axis=-1)
        sides.append((ops.cast(first, "int32"), ops.cast(last, "int32")))
    (top, bottom), (left, right) = sides
    first = ops.minimum(bounds[..., :2], ops.stack([top, left], axis=-1))
    last = ops.maximum(bounds[..., 2:], ops.stack([bottom, right], axis=-1))
    return ops.concatenate([first, last], axis=-1)
