"""Counts the overlaps between two label maps: the number of pixels that each pair of segments has in common.

Panoptic quality and semantic IoU are computed from these counts alone. The counts are made from runs
(`data/label_runs.py`) rather than pixels, so that only runs have to be sorted.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deeplab2_like.data.coco_segments import Segment, check_ids
from deeplab2_like.data.dataset_info import MAX_PANOPTIC_VALUE, DatasetInfo
from deeplab2_like.data.label_runs import find_run_values
from deeplab2_like.data.panoptic_label import classes_of_values
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.checks import check_maps

_MAX_RUN = 2**16 - 1


class Overlaps(NamedTuple):
    """The pairs of values that two maps have at the same pixels.

    Attributes:
        first_values: int64 [N], the distinct values of the first map, ascending.
        second_values: int64 [M], the distinct values of the second map, ascending.
        first_index: int64 [P], position of each pair's first value in `first_values`.
        second_index: int64 [P], position of each pair's second value in `second_values`.
        pixels: int64 [P], number of pixels of each pair.
    """

    first_values: np.ndarray
    second_values: np.ndarray
    first_index: np.ndarray
    second_index: np.ndarray
    pixels: np.ndarray


class ClassifiedOverlaps(NamedTuple):
    """The pairs of ground-truth and predicted values of an image, and the classes of the values.

    Attributes:
        pairs: Pairs of N ground-truth and M predicted values.
        truth_classes: int64 [N], class ids, -1 for void.
        predicted_classes: int64 [M], class ids, -1 for void.
    """

    pairs: Overlaps
    truth_classes: np.ndarray
    predicted_classes: np.ndarray


def count_panoptic_overlaps(
    ground_truth: np.ndarray, prediction: np.ndarray, dataset_info: DatasetInfo, *, divisor: int | None = None
) -> ClassifiedOverlaps:
    """Counts the overlaps of two maps whose values are `class * divisor + instance`.

    Args:
        ground_truth: Integers [H, W].
        prediction: Integers [H, W].
        dataset_info: The meaning of the classes.
        divisor: The data set's label_divisor if not given; 1 for class maps.

    Raises:
        UserError: If a map holds an unknown class.
    """
    pairs = count_overlaps(ground_truth, prediction)
    return ClassifiedOverlaps(
        pairs,
        classes_of_values(pairs.first_values, dataset_info, name="ground-truth", divisor=divisor),
        classes_of_values(pairs.second_values, dataset_info, name="predicted", divisor=divisor),
    )


def count_segment_overlaps(
    ground_truth: np.ndarray,
    ground_truth_segments: Sequence[Segment],
    prediction: np.ndarray,
    predicted_segments: Sequence[Segment],
    dataset_info: DatasetInfo,
) -> ClassifiedOverlaps:
    """Counts the overlaps of two maps of segment ids, as in COCO panoptic files; id 0 is void.

    Args:
        ground_truth: Integers [H, W], segment ids.
        ground_truth_segments: The meaning of its ids.
        prediction: Integers [H, W], segment ids.
        predicted_segments: The meaning of its ids.
        dataset_info: The meaning of the classes.

    Raises:
        UserError: If the shapes differ, a class is unknown, or an id occurs only in the map or only in the list.
    """
    (truth_map,), (predicted_map,) = check_maps(ground_truth, prediction)
    pairs = count_overlaps(truth_map, predicted_map)
    return ClassifiedOverlaps(
        pairs,
        _classes_of_ids(pairs.first_values, ground_truth_segments, dataset_info, name="ground-truth"),
        _classes_of_ids(pairs.second_values, predicted_segments, dataset_info, name="predicted"),
    )


def count_overlaps(first: np.ndarray, second: np.ndarray) -> Overlaps:
    """Counts the pixels of each pair of values, in time that grows with the boundaries rather than with the areas.

    Args:
        first: Integers of any shape, values 0..2**24 - 1, the range of a panoptic PNG.
        second: Integers of the same shape and range.

    Returns:
        The pairs that occur, each once, ordered by the first value and then by the second.

    Raises:
        UserError: If a value is out of range.
    """
    first, second = first.reshape(-1), second.reshape(-1)  # [H*W]
    if first.size == 0:  # An empty map has no runs.
        empty = np.zeros(0, np.int64)
        return Overlaps(empty, empty, empty, empty, empty)
    lengths, (first_runs, second_runs) = find_run_values(first, second)
    if lengths.max() > _MAX_RUN:  # A region that fills many whole rows, such as the sky.
        lengths, pieces = _split_long_runs(lengths)
        first_runs, second_runs = np.repeat(first_runs, pieces), np.repeat(second_runs, pieces)
    # Value, value and length in 24 + 24 + 16 bits of one integer: a single sort groups equal pairs with their lengths.
    runs = _check_range(first_runs)
    runs <<= 24
    runs |= _check_range(second_runs)
    runs <<= 16
    runs |= lengths.view(np.uint64)
    runs.sort()
    keys = runs >> 16
    is_start = np.ones(keys.size, bool)
    np.not_equal(keys[1:], keys[:-1], out=is_start[1:])
    (starts,) = is_start.nonzero()  # [P]
    runs &= _MAX_RUN
    pixels = np.add.reduceat(runs.view(np.int64), starts)
    pairs = keys[starts].view(np.int64)
    first_values, first_index = _unique_with_inverse(pairs >> 24)
    second_values, second_index = _unique_with_inverse(pairs & MAX_PANOPTIC_VALUE)
    return Overlaps(first_values, second_values, first_index, second_index, pixels)


def _unique_with_inverse(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Does the same as `np.unique` with `return_inverse`, at half its cost for some dozens of values."""
    ordered = np.sort(values)
    is_new = np.ones(ordered.size, bool)
    np.not_equal(ordered[1:], ordered[:-1], out=is_new[1:])
    distinct = ordered[is_new]
    return distinct, distinct.searchsorted(values)


def _split_long_runs(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits runs of these lengths, int64 [R], so that each length fits 16 bits.

    Returns:
        The lengths of all pieces, int64, and the number of pieces of each run, int64 [R].
    """
    pieces = -(-lengths // _MAX_RUN)
    last = np.cumsum(pieces) - 1
    split = np.full(last[-1] + 1, _MAX_RUN)
    split[last] = lengths - (pieces - 1) * _MAX_RUN
    return split, pieces


def _check_range(values: np.ndarray) -> np.ndarray:
    """Returns the values of the runs, [R], as uint64 after checking that they fit 24 bits."""
    unsigned = values.astype(np.uint64)  # Negative values become very large.
    if unsigned.max() > MAX_PANOPTIC_VALUE:
        value = int(values.min() if values.min() < 0 else values.max())
        raise UserError(
            f"A label map holds value {value}; values must be 0..{MAX_PANOPTIC_VALUE} (24 bits): check how it was read."
        )
    return unsigned


def _classes_of_ids(
    values: np.ndarray, segments: Sequence[Segment], dataset_info: DatasetInfo, *, name: str
) -> np.ndarray:
    """Returns the class of each id, int64 [N], -1 for id 0; checks that map and list have the same ids."""
    check_ids(values, segments, png=f"the {name} map")
    class_of_id = {0: -1}
    for segment in segments:
        if not 0 <= segment.class_id < dataset_info.num_classes:
            raise UserError(
                f"The {name} segment {segment.id} has class {segment.class_id}; data set '{dataset_info.name}' has "
                f"classes 0..{dataset_info.num_classes - 1}."
            )
        class_of_id[segment.id] = segment.class_id
    return np.array([class_of_id[value] for value in values.tolist()], np.int64)
