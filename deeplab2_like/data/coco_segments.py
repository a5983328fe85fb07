"""COCO panoptic annotations of one image: a PNG of segment ids, and a list of segments that gives them a meaning.

Conversion and evaluation both read them with this module, which does not import TensorFlow.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.dataset_info import DatasetInfo, whole_number
from deeplab2_like.data.label_runs import find_run_values, list_segments
from deeplab2_like.errors import UserError


@dataclasses.dataclass(frozen=True)
class Segment:
    """A segment: the meaning of one value of a map of segment ids.

    Attributes:
        id: The value in the map; 0 is void and belongs to no segment.
        class_id: Contiguous class id.
        is_crowd: Whether it is a crowd region; ignored in predictions.
        area: Number of pixels according to the annotation, None if it has no area. Only `reference_crowd_rule` of
            `PanopticQuality` uses it; all other code counts the pixels of the map.
    """

    id: int
    class_id: int
    is_crowd: bool = False
    area: float | None = None


# Makes a context for the reading of one segment; it may end quietly at a `UserError`.
OnFault = Callable[[], contextlib.AbstractContextManager[None]]


def parse_segments(
    segments: Any, dataset_info: DatasetInfo, *, fault: OnFault = contextlib.nullcontext
) -> list[Segment]:
    """Reads a `segments_info` list.

    Args:
        segments: The list from the JSON.
        dataset_info: The meaning of the category ids.
        fault: Decides about faulty segments: those at which its context ends quietly are left out.

    Returns:
        The segments, in the order of the list.

    Raises:
        UserError: If it is not a list, a segment lacks a field, an id is 0 or listed twice, or a category is unknown.
    """
    if not isinstance(segments, list):
        raise UserError("its annotation has no list 'segments_info'; add it, empty if nothing is labeled.")
    parsed: dict[int, Segment] = {}
    for position, entry in enumerate(segments):
        with fault():
            segment = _parse_segment(entry, position, dataset_info)
            if segment.id in parsed:
                raise UserError(
                    f"'segments_info' lists id {segment.id} more than once; ids must differ: correct the JSON."
                )
            parsed[segment.id] = segment
    return list(parsed.values())


def _parse_segment(segment: Any, position: int, dataset_info: DatasetInfo) -> Segment:
    try:
        segment_id, category_id = whole_number(segment["id"]), whole_number(segment["category_id"])
        crowd = segment.get("iscrowd", 0)
        is_crowd = bool(whole_number(0 if crowd is None else crowd, 0, 1))
        area = segment.get("area")
        area = None if area is None else float(area)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise UserError(
            f"entry {position} of 'segments_info' lacks a whole number 'id' or 'category_id', or has an 'area' "
            "that is no number, or an 'iscrowd' that is not 0 or 1."
        ) from error
    class_id = dataset_info.class_of_category_id.get(category_id)
    if class_id is None:
        raise UserError(
            f"segment {segment_id} has category_id {category_id}, which 'categories' does not list (those of "
            f"'{dataset_info.name}' count); add it there, or correct the segment."
        )
    if segment_id == 0:
        raise UserError("a segment has id 0, which stands for unlabeled pixels; use another id.")
    return Segment(segment_id, class_id, is_crowd, area)


def keep_matching(ids: np.ndarray, segments: Sequence[Segment]) -> tuple[np.ndarray, list[Segment]]:
    """Makes a map and a list agree: ids that are not in the list become void, segments without pixels are removed.

    Args:
        ids: int32 [H, W], segment ids, 0 for void.
        segments: The list.

    Returns:
        The map, int32 [H, W], and the list.
    """
    listed = [segment.id for segment in segments]
    ids = np.where(np.isin(ids, listed), ids, 0)
    present = set(np.unique(ids).tolist())
    return ids, [segment for segment in segments if segment.id in present]


def ids_to_panoptic(
    ids: np.ndarray, segments: Sequence[Segment], dataset_info: DatasetInfo, *, png: str = "the PNG"
) -> np.ndarray:
    """Turns a map of segment ids into a panoptic map.

    Instances of a thing class are numbered from 1 in the order of the list. Crowds and stuff get instance 0, so several
    segments of one such class become one.

    Args:
        ids: int32 [H, W], segment ids, 0 for void.
        segments: The meaning of the ids, see `parse_segments`.
        dataset_info: The meaning of the classes.
        png: Name of the map in messages.

    Returns:
        int32 [H, W], panoptic map.

    Raises:
        UserError: If map and list do not have the same ids, or there are too many instances.
    """
    value_of_id = {0: dataset_info.void}
    instances = [0] * dataset_info.num_classes
    for segment in segments:
        instance = 0
        if dataset_info.categories[segment.class_id].is_thing and not segment.is_crowd:
            instances[segment.class_id] += 1
            instance = instances[segment.class_id]
        if instance >= dataset_info.label_divisor:
            raise UserError(
                f"it has more than {dataset_info.label_divisor - 1} instances of "
                f"'{dataset_info.categories[segment.class_id].name}'; use a label_divisor above {instance}."
            )
        value_of_id[segment.id] = panoptic_label.encode(segment.class_id, instance, dataset_info.label_divisor)
    if ids.size == 0:  # An empty map has no runs.
        return np.zeros(ids.shape, np.int32)
    lengths, (id_of_run,) = find_run_values(ids.reshape(-1))
    present, index = np.unique(id_of_run, return_inverse=True)
    check_ids(present, segments, png=png)
    values = np.array([value_of_id[i] for i in present.tolist()], np.int32)
    return np.repeat(values[index], lengths).reshape(ids.shape)  # [H, W]


def compare_measures(ids: np.ndarray, segments: Any) -> list[str]:
    """Compares the areas and boxes that a `segments_info` list states with those of the map.

    Args:
        ids: int32 [H, W], segment ids.
        segments: The list from the JSON; values that are missing or not numbers are not compared.

    Returns:
        A sentence for each difference. Areas must be equal. Sides of a box may differ by one pixel, as tools do not
        agree on whether a box includes its last row and column.
    """
    table = list_segments(ids)
    rows = {value: row for row, value in enumerate(table.values.tolist())}
    differences = []
    for segment in segments if isinstance(segments, list) else ():
        # This list has not been checked yet, so any part of it may be anything.
        row = rows.get(segment.get("id")) if isinstance(segment, dict) and _is_number(segment.get("id")) else None
        if row is None:
            continue
        area, box = segment.get("area"), segment.get("bbox")
        if _is_number(area) and area != table.areas[row]:
            differences.append(f"segment {segment['id']} has area {area} in the JSON, {table.areas[row]} in the PNG.")
        y_min, x_min, y_max, x_max = table.boxes[row].tolist()
        tight_box = [x_min, y_min, x_max - x_min, y_max - y_min]
        is_box = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
        if is_box and max(abs(stated - actual) for stated, actual in zip(box, tight_box, strict=True)) > 1:
            differences.append(
                f"segment {segment['id']} has box {box} in the JSON, {tight_box} in the PNG (x, y, width, height)."
            )
    return differences


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_ids(present: np.ndarray, segments: Sequence[Segment], *, png: str) -> None:
    """Checks that a map has pixels of every id of a list and of no other id.

    Args:
        present: Integers [N], the distinct values of the map.
        segments: The list.
        png: Name of the map in messages.

    Raises:
        UserError: If one of them has an id that the other lacks.
    """
    listed = {segment.id for segment in segments}
    in_map = set(present.tolist()) - {0}
    if in_map == listed:
        return
    if in_map - listed:
        raise UserError(
            f"{png} has pixels of id {_format_ids(in_map - listed)}, which 'segments_info' does not list; add it there."
        )
    raise UserError(
        f"'segments_info' lists id {_format_ids(listed - in_map)}, of which {png} has no pixels; correct the JSON."
    )


def _format_ids(ids: set[int]) -> str:
    """Lists the first ids of a set and counts the rest."""
    return ", ".join(str(i) for i in sorted(ids)[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
