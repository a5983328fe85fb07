"""Prediction of large images in overlapping tiles, whose segments are joined across the seams.

Each tile is predicted by itself. In the overlap of two tiles, each pixel is taken from the tile whose border is farther
away, and thing segments of one class are joined if they cover the same pixels of the overlap. So an object that is
smaller than the overlap is whole in one of the tiles, and comes out as one segment.
"""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from deeplab2_like.data.dataset_info import MAX_PANOPTIC_VALUE, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.export.prediction import ImagePredictor, PanopticPrediction, make_prediction

DEFAULT_OVERLAP = 128

# Two segments are one if they share more than this part of the pixels of the overlap that either of them covers; or, if
# a tile's border cuts one of them, more than this part of its own pixels there.
_MIN_SHARED = 0.5

_ROWS_PER_BLOCK = 256


class TiledPredictor:
    """Predicts images of any size in overlapping tiles of one size.

    Memory holds the image, its map and one tile.

    Attributes:
        dataset_info: The meaning of the predicted maps. If an image has more objects of a class than its label divisor
            allows, the prediction of this image has a larger one.
        identity: That of the predictor.

    Args:
        predictor: Predicts a tile.
        tile: Height and width of a tile in pixels; smaller images are predicted as they are.
        overlap: Smallest number of pixels that neighboring tiles share.

    Raises:
        UserError: If the overlap is more than half of a tile.
    """

    def __init__(self, predictor: ImagePredictor, *, tile: int, overlap: int = DEFAULT_OVERLAP) -> None:
        check_tile(tile, overlap)
        self._predictor = predictor
        self._tile, self._overlap = tile, overlap
        self.dataset_info = predictor.dataset_info
        self.identity = predictor.identity

    def __call__(self, image: np.ndarray) -> PanopticPrediction:
        """Predicts one image.

        Args:
            image: uint8 [H, W, 3], RGB.

        Returns:
            The prediction, with the image's size. The instances of a class are numbered from 1, in the order in which
            their first pixels appear row by row. The score of a joined segment is the mean of those of its parts,
            weighted by their areas.

        Raises:
            UserError: If the predictor refuses a tile, or the image has more objects of a class than ids.
        """
        height, width = image.shape[:2]
        if height <= self._tile and width <= self._tile:
            return self._predictor(image)
        canvas = _Canvas(height, width, self.dataset_info)
        row_spans = list(split_axis(height, self._tile, self._overlap))
        column_spans = list(split_axis(width, self._tile, self._overlap))
        for rows, columns in itertools.product(row_spans, column_spans):
            # A copy, because a view of a large image is not contiguous.
            tile = np.ascontiguousarray(image[rows.start : rows.stop, columns.start : columns.stop])
            canvas.add(self._predictor(tile), rows, columns)
        return canvas.finish()


class Span(NamedTuple):
    """The position of a tile along one axis, in pixels.

    Attributes:
        start: Its first pixel.
        stop: The pixel behind its last one.
        seam: Its first pixel that is taken from this tile and not from the one before.
        overlap_stop: The pixel behind the last one that the tile before has, too; `start` for the first tile.
        is_last: Whether no tile follows.
    """

    start: int
    stop: int
    seam: int
    overlap_stop: int
    is_last: bool


def check_tile(tile: int, overlap: int) -> None:
    """Raises `UserError` if the overlap is more than half of a tile."""
    if not 0 <= 2 * overlap <= tile:
        raise UserError(
            f"An overlap of {overlap} pixels does not fit tiles of {tile}; give an --overlap of 0 to {tile // 2}, or a "
            "larger --tile."
        )


def split_axis(length: int, tile: int, overlap: int) -> Iterator[Span]:
    """Yields the tiles along an axis of `length` pixels, evenly spaced, so that neighbors share at least `overlap`."""
    if length <= tile:
        yield Span(0, length, 0, 0, is_last=True)
        return
    count = -(-(length - overlap) // (tile - overlap))
    previous_stop = 0
    for number in range(count):
        start = number * (length - tile) // (count - 1)
        overlap_stop = previous_stop if number else start
        yield Span(start, start + tile, (start + overlap_stop) // 2, overlap_stop, is_last=number == count - 1)
        previous_stop = start + tile


class _Canvas:
    """The map of a whole image, in which tiles are laid row by row.

    Pixels hold a number for each segment of each tile, 0 for void; `_SegmentTable` knows which numbers are one segment.
    """

    def __init__(self, height: int, width: int, dataset_info: DatasetInfo) -> None:
        self._numbers = np.zeros((height, width), np.int32)
        self._segments = _SegmentTable(dataset_info)

    def add(self, prediction: PanopticPrediction, rows: Span, columns: Span) -> None:
        """Adds a tile, whose neighbors to the left and above have been added."""
        numbers = self._segments.add(prediction, _values_at_cuts(prediction.panoptic, rows, columns))  # [h, w]
        area = self._numbers[rows.start : rows.stop, columns.start : columns.stop]  # A view, [h, w].
        top, left = rows.overlap_stop - rows.start, columns.overlap_stop - columns.start
        # The pixels of earlier tiles are an L: a strip above, and one at the left below it.
        earlier = np.concatenate([area[:top].reshape(-1), area[top:, :left].reshape(-1)])
        later = np.concatenate([numbers[:top].reshape(-1), numbers[top:, :left].reshape(-1)])
        if earlier.size:
            self._segments.join(earlier, later)
        y, x = rows.seam - rows.start, columns.seam - columns.start
        area[y:, x:] = numbers[y:, x:]

    def finish(self) -> PanopticPrediction:
        """Makes the prediction of the whole image; the canvas cannot be used any more."""
        roots = self._segments.roots()  # [N]
        order: dict[int, None] = {}  # The segments in the order of their first pixels.
        for start in range(0, self._numbers.shape[0], _ROWS_PER_BLOCK):
            block = roots[self._numbers[start : start + _ROWS_PER_BLOCK]].reshape(-1)
            found, first = np.unique(block, return_index=True)
            order.update(dict.fromkeys(found[np.argsort(first)].tolist()))
        values, scores, info = self._segments.number(list(order))
        table = values[roots].astype(np.int32)
        for start in range(0, self._numbers.shape[0], _ROWS_PER_BLOCK):
            block = self._numbers[start : start + _ROWS_PER_BLOCK]
            block[...] = table[block]
        return make_prediction(self._numbers, scores, info)


class _SegmentTable:
    """The segments of all tiles, and which of them are one (a union-find forest).

    Segment 0 is void. All stuff of a class is one segment.
    """

    def __init__(self, dataset_info: DatasetInfo) -> None:
        self._info = dataset_info
        self._parents = [0]
        self._classes = [dataset_info.ignore_label]
        # Of roots: whether a tile shows the whole segment, its area summed over tiles, and its score times this area.
        self._is_whole = [True]
        self._areas = [0.0]
        self._weights = [0.0]
        self._stuff: dict[int, int] = {}  # Class -> segment.

    def add(self, prediction: PanopticPrediction, cut_values: np.ndarray) -> np.ndarray:
        """Adds the segments of a tile.

        Args:
            prediction: The tile's.
            cut_values: int32 [M], values of the map along the borders at which the image goes on.

        Returns:
            int32 [h, w], the number of each pixel's segment.
        """
        divisor = self._info.label_divisor
        values, index = np.unique(prediction.panoptic, return_inverse=True)
        is_cut = np.isin(values, cut_values)
        area_of = {segment.id - 1: segment.area for segment in prediction.segments}
        scores = prediction.scores
        numbers = np.zeros(values.size, np.int32)
        for row, value in enumerate(values.tolist()):
            class_id, instance = divmod(value, divisor)
            if value not in area_of:  # Void.
                continue
            if instance == 0 and class_id in self._stuff:
                number = self._stuff[class_id]
            else:
                number = len(self._parents)
                self._parents.append(number)
                self._classes.append(class_id)
                self._is_whole.append(False)
                self._areas.append(0.0)
                self._weights.append(0.0)
            if instance == 0:
                self._stuff[class_id] = number
            self._is_whole[number] |= not bool(is_cut[row])
            self._areas[number] += area_of[value]
            self._weights[number] += area_of[value] * scores[value]
            numbers[row] = number
        return numbers[index].reshape(prediction.panoptic.shape)

    def join(self, earlier: np.ndarray, later: np.ndarray) -> None:
        """Joins segments of a tile with those of earlier ones by their pixels in the overlap.

        Args:
            earlier: int32 [M], the numbers on the canvas.
            later: int32 [M], the tile's numbers of the same pixels.
        """
        # Segments that are joined already count as one.
        known, index = np.unique(earlier, return_inverse=True)
        roots = np.array([self._find(number) for number in known.tolist()])[index]  # [M]
        pairs, shared = np.unique(roots.astype(np.int64) << 32 | later, return_counts=True)
        areas_before = dict(zip(*(array.tolist() for array in np.unique(roots, return_counts=True)), strict=True))
        areas_after = dict(zip(*(array.tolist() for array in np.unique(later, return_counts=True)), strict=True))
        matches = []
        for pair, common in zip(pairs.tolist(), shared.tolist(), strict=True):
            before, after = pair >> 32, pair & 0xFFFFFFFF
            if not self._may_join(before, after):
                continue
            area_before, area_after = areas_before[before], areas_after[after]
            is_match = common > _MIN_SHARED * (area_before + area_after - common)
            is_match |= not self._is_whole[before] and common > _MIN_SHARED * area_before
            is_match |= not self._is_whole[after] and common > _MIN_SHARED * area_after
            if is_match:
                matches.append((before, after))
        for before, after in matches:  # Afterwards, because joining changes the roots.
            self._union(before, after)

    def roots(self) -> np.ndarray:
        """Returns int32 [N], the number that stands for each segment and those joined with it."""
        return np.array([self._find(number) for number in range(len(self._parents))], np.int32)

    def number(self, order: list[int]) -> tuple[np.ndarray, dict[int, float], DatasetInfo]:
        """Gives panoptic values to the segments on the canvas.

        Args:
            order: Their roots, in the order in which instances are numbered.

        Returns:
            The values of all segments, int64 [N]; the scores by value; and the dataset info that fits the values.
        """
        stuff = set(self._stuff.values())
        instances: dict[int, int] = {}  # Root -> instance, of the things.
        counts: dict[int, int] = {}  # Class -> number of instances.
        for root in order:
            if root and root not in stuff:
                class_id = self._classes[root]
                instances[root] = counts[class_id] = counts.get(class_id, 0) + 1
        info = fit_label_divisor(self._info, counts)
        values = np.full(len(self._parents), info.void, np.int64)
        scores = {}
        for root in order:
            if root:
                values[root] = self._classes[root] * info.label_divisor + instances.get(root, 0)
                scores[int(values[root])] = self._weights[root] / max(self._areas[root], 1.0)
        return values, scores, info

    def _may_join(self, before: int, after: int) -> bool:
        """Returns whether two segments are different things of one class."""
        class_id = self._classes[before]
        if not before or not after or before == after or class_id != self._classes[after]:
            return False
        return self._stuff.get(class_id) not in (before, after)

    def _find(self, number: int) -> int:
        root = number
        while self._parents[root] != root:
            root = self._parents[root]
        while self._parents[number] != root:  # Shortens the way for the next time.
            self._parents[number], number = root, self._parents[number]
        return root

    def _union(self, first: int, second: int) -> None:
        kept, joined = sorted((self._find(first), self._find(second)))
        if kept == joined:
            return
        self._parents[joined] = kept
        self._is_whole[kept] |= self._is_whole[joined]
        self._areas[kept] += self._areas[joined]
        self._weights[kept] += self._weights[joined]


def _values_at_cuts(panoptic: np.ndarray, rows: Span, columns: Span) -> np.ndarray:
    """Returns the values, int32 [M], along the borders of a tile at which the image goes on."""
    borders = []
    if rows.start:
        borders.append(panoptic[0])
    if not rows.is_last:
        borders.append(panoptic[-1])
    if columns.start:
        borders.append(panoptic[:, 0])
    if not columns.is_last:
        borders.append(panoptic[:, -1])
    return np.concatenate(borders)


def fit_label_divisor(info: DatasetInfo, counts: dict[int, int]) -> DatasetInfo:
    """Returns a dataset info whose label divisor is above the number of instances of each class.

    Raises:
        UserError: If there is none whose values fit.
    """
    class_id, needed = max(counts.items(), key=lambda item: item[1], default=(0, 0))
    if needed < info.label_divisor:
        return info
    for ignore_label in (info.ignore_label, info.num_classes):
        divisor = (MAX_PANOPTIC_VALUE + 1) // (ignore_label + 1)
        if needed < divisor:
            return dataclasses.replace(info, ignore_label=ignore_label, label_divisor=divisor)
    raise UserError(
        f"The image has {needed} objects of class '{info.categories[class_id].name}', but panoptic ids of 24 bits "
        f"allow {divisor - 1}; cut the image into parts."
    )
