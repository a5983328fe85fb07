"""Runs of label maps.

Label maps are piecewise constant. A run is a maximal stretch of the row-major map with one value; a run of several maps
is a maximal stretch in which each of them keeps its value. Code that only counts, measures or renames segments can work
on runs, of which there are far fewer than pixels.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

# Pixels per block: 1 MiB of two int32 maps, which fits the second-level cache of today's processors.
_BLOCK = 2**17


def find_runs(*maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts flat maps into runs, the maximal stretches in which each of them keeps its value.

    A run may continue in the next row, as only neighbors in memory are compared.

    Args:
        *maps: One or more arrays [H*W] of the same size, not empty.

    Returns:
        The last position and the length of each run, both int64 [R].
    """
    ends, _ = _find_ends(maps)
    return ends, _lengths_of(ends)


def find_run_values(*maps: np.ndarray) -> tuple[np.ndarray, list[np.ndarray]]:
    """Cuts flat maps into runs as `find_runs` does.

    Args:
        *maps: One or more arrays [H*W] of the same size, not empty.

    Returns:
        The length of each run, int64 [R], and for each map the values of the runs, [R] of the map's type.
    """
    ends, values = _find_ends(maps)
    return _lengths_of(ends), values


class SegmentTable(NamedTuple):
    """The segments of a label map.

    Attributes:
        values: int64 [N], the distinct values, ascending.
        areas: int64 [N], numbers of pixels.
        boxes: int64 [N, 4], tight boxes y_min, x_min, y_max, x_max; the maxima are exclusive (height is
            y_max - y_min).
    """

    values: np.ndarray
    areas: np.ndarray
    boxes: np.ndarray


def list_segments(labels: np.ndarray) -> SegmentTable:
    """Lists the distinct values of a map with areas and boxes; void, if any, is listed like the others.

    Args:
        labels: Integers [H, W].
    """
    height, width = labels.shape
    flat = labels.reshape(-1)  # [H*W]
    if flat.size == 0:
        return SegmentTable(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 4), np.int64))
    ends, lengths = find_runs(flat)
    starts = ends - lengths + 1
    values, index = np.unique(flat[ends], return_inverse=True)
    top, bottom = starts // width, ends // width
    # A run that continues in the next row touches both sides of the map.
    wraps = top != bottom
    left, right = np.where(wraps, 0, starts % width), np.where(wraps, width - 1, ends % width)
    boxes = np.empty((values.size, 4), np.int64)
    boxes[:, :2] = max(height, width)
    boxes[:, 2:] = 0
    for column, sides, smaller_or_larger in (
        (0, top, np.minimum),
        (1, left, np.minimum),
        (2, bottom + 1, np.maximum),
        (3, right + 1, np.maximum),
    ):
        smaller_or_larger.at(boxes[:, column], index, sides)
    return SegmentTable(values.astype(np.int64), np.bincount(index, lengths).astype(np.int64), boxes)


def _find_ends(maps: Sequence[np.ndarray]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Finds the last position of each run, int64 [R], and the value of each map there, [R] of its type.

    This reads every pixel, so it takes most of the time of an evaluation, and memory bandwidth limits it. It works in
    blocks, so that the data is still in the cache when it is read again.
    """
    size = maps[0].size
    block = min(_BLOCK, -(-size // 4) * 4)  # A multiple of 4, for the view as groups below.
    is_end, differs = np.zeros(block, bool), np.empty(block, bool)
    groups = is_end.view(np.uint32)  # [block / 4]
    parts = []
    for start in range(0, size, block):
        stop = min(start + block, size - 1)  # The last pixel has no next pixel.
        inner = slice(0, stop - start)
        np.not_equal(maps[0][start + 1 : stop + 1], maps[0][start:stop], out=is_end[inner])
        for labels in maps[1:]:
            np.not_equal(labels[start + 1 : stop + 1], labels[start:stop], out=differs[inner])
            is_end[inner] |= differs[inner]
        if start + block >= size:
            is_end[stop - start] = True
            is_end[stop - start + 1 :] = False
        # Ends are rare: finding the groups of four pixels that have one, and then searching only these, takes half the
        # time of `flatnonzero(is_end)`.
        (occupied,) = groups.astype(bool).nonzero()  # [G]
        (position,) = groups[occupied].view(bool).nonzero()  # [r], in 0..4 G - 1
        occupied *= 4
        occupied += start
        ends = occupied[position >> 2]
        ends += position & 3
        parts.append((ends, *(labels.take(ends) for labels in maps)))
    if len(parts) == 1:
        ends, *values = parts[0]
    else:
        ends, *values = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    return ends, values


def _lengths_of(ends: np.ndarray) -> np.ndarray:
    """Returns the lengths, int64 [R], of runs with these last positions, int64 [R]; the first begins at 0."""
    lengths = ends.copy()
    lengths[0] += 1
    lengths[1:] -= ends[:-1]
    return lengths
