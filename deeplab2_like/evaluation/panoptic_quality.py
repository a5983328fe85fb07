"""Panoptic quality (PQ) as the COCO panoptic challenge defines it (Kirillov et al., "Panoptic Segmentation", sec. 4).

Every distinct value of a panoptic map is one segment. A predicted segment and a ground-truth segment of the same class
match if their intersection over union is above 0.5; prediction pixels on void ground truth are left out of the union.
Then, per class, `PQ = sum of matched IoU / (TP + FP / 2 + FN / 2) = SQ * RQ`.

The rules for the special cases:

* **Void** ground truth is nobody's segment. Void in a prediction is no segment either.
* **Crowd** in the ground truth is instance 0 of a thing class. It never matches and is never a false negative.
* A prediction without a match is a false positive, unless more than half of it lies on void and crowd of its class.
* **In a prediction, instance 0 of a thing class is a segment like any other**: predictions have no crowds.
* Stuff segments carry instance 0; other instance ids of a stuff class are separate segments.
* Averages run over the classes with TP + FP + FN > 0, so a class that is only hallucinated counts with PQ 0.

Label maps are piecewise constant, so the pairs of ground truth and prediction are counted in runs, not pixels: a run is
a stretch of the row-major map in which both values stay the same. Only the runs are sorted.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deeplab2_like.data.dataset_info import MAX_PANOPTIC_VALUE, DatasetInfo
from deeplab2_like.errors import UserError

_MAX_RUN = 2**16 - 1


@dataclasses.dataclass(frozen=True)
class ClassQuality:
    """Quality of one class, all fractions in [0, 1]; zeros for a class that neither map ever showed.

    Attributes:
        pq: Panoptic quality.
        sq: Segmentation quality: mean IoU of the matched pairs.
        rq: Recognition quality: F1 score of the segments.
        true_positives: Number of matched pairs.
        false_positives: Number of predicted segments without a match.
        false_negatives: Number of ground-truth segments without a match.
    """

    pq: float
    sq: float
    rq: float
    true_positives: int
    false_positives: int
    false_negatives: int


@dataclasses.dataclass(frozen=True)
class MeanQuality:
    """Mean quality over a group of classes, all fractions in [0, 1].

    Attributes:
        pq: Mean panoptic quality.
        sq: Mean segmentation quality.
        rq: Mean recognition quality.
        num_classes: Number of classes averaged over, those with TP + FP + FN > 0. With 0 the means are 0.
    """

    pq: float
    sq: float
    rq: float
    num_classes: int


@dataclasses.dataclass(frozen=True)
class PanopticQualityResult:
    """Panoptic quality of a data set.

    Attributes:
        all: Mean over all classes.
        things: Mean over the thing classes.
        stuff: Mean over the stuff classes.
        per_class: Class name -> quality, in the order of the classes.
    """

    all: MeanQuality
    things: MeanQuality
    stuff: MeanQuality
    per_class: dict[str, ClassQuality]


@dataclasses.dataclass(frozen=True)
class Segment:
    """What one value of an id map means, for maps that are not panoptic maps (see `update_from_segments`).

    Attributes:
        id: The value in the map.
        class_id: Contiguous class id.
        is_crowd: Whether it is a crowd region; ignored in predictions.
    """

    id: int
    class_id: int
    is_crowd: bool = False


class Overlaps(NamedTuple):
    """The pairs of values that two maps take at the same pixels.

    Attributes:
        first_values: int64 [N], the distinct values of the first map, ascending.
        second_values: int64 [M], the distinct values of the second map, ascending.
        first_index: int64 [P], per pair the position in `first_values`.
        second_index: int64 [P], per pair the position in `second_values`.
        pixels: int64 [P], number of pixels of each pair.
    """

    first_values: np.ndarray
    second_values: np.ndarray
    first_index: np.ndarray
    second_index: np.ndarray
    pixels: np.ndarray


def find_runs(*maps: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cuts flat maps into runs, the longest stretches in which every one of them keeps its value.

    Runs may pass over the end of a row: only neighbours in memory matter.

    Args:
        *maps: One or more arrays [H*W] of the same size, not empty.

    Returns:
        The last position and the length of each run, both int64 [R].
    """
    changes = maps[0][1:] != maps[0][:-1]
    for labels in maps[1:]:
        changes |= labels[1:] != labels[:-1]
    ends = np.append(np.flatnonzero(changes), maps[0].size - 1)
    return ends, np.diff(ends, prepend=-1)


def count_overlaps(first: np.ndarray, second: np.ndarray) -> Overlaps:
    """Counts the pixels of each pair of values, in time that grows with the boundaries rather than with the areas.

    Args:
        first: Integers of any shape, values 0..2**24 - 1, which is what a panoptic PNG can hold.
        second: Integers of the same shape and range.

    Returns:
        The pairs that occur, each once.

    Raises:
        UserError: If a value is out of range.
    """
    first, second = first.reshape(-1), second.reshape(-1)  # [H*W]
    if first.size == 0:
        empty = np.zeros(0, np.int64)
        return Overlaps(empty, empty, empty, empty, empty)
    ends, lengths = find_runs(first, second)
    if lengths.max() > _MAX_RUN:
        lengths, ends = _split_long_runs(lengths, ends)
    first_runs, second_runs = _checked(first[ends]), _checked(second[ends])
    # Value, value and length in 24 + 24 + 16 bits: one sort brings equal pairs together and takes the lengths along.
    runs = np.sort(first_runs << np.uint64(40) | second_runs << np.uint64(16) | lengths.astype(np.uint64))
    keys = runs >> np.uint64(16)
    starts = np.append(0, np.flatnonzero(keys[1:] != keys[:-1]) + 1)  # [P]
    pixels = np.add.reduceat((runs & np.uint64(_MAX_RUN)).astype(np.int64), starts)
    pairs = keys[starts].astype(np.int64)
    first_values, first_index = np.unique(pairs >> 24, return_inverse=True)
    second_values, second_index = np.unique(pairs & MAX_PANOPTIC_VALUE, return_inverse=True)
    return Overlaps(first_values, second_values, first_index, second_index, pixels)


def _split_long_runs(lengths: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Splits runs (lengths and last positions, int64 [R]) so that none is longer than 16 bits hold."""
    pieces = -(-lengths // _MAX_RUN)
    last = np.cumsum(pieces) - 1
    split = np.full(last[-1] + 1, _MAX_RUN)
    split[last] = lengths - (pieces - 1) * _MAX_RUN
    return split, np.repeat(ends, pieces)


def _checked(values: np.ndarray) -> np.ndarray:
    """Returns the values of the runs, [R], as uint64 after checking that they fit 24 bits."""
    if values.min() < 0 or values.max() > MAX_PANOPTIC_VALUE:
        wrong = int(values.min() if values.min() < 0 else values.max())
        raise UserError(
            f"A label map holds value {wrong}; values must be 0..{MAX_PANOPTIC_VALUE} (24 bits): check how it was read."
        )
    return values.astype(np.uint64)


def check_maps(ground_truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Checks a pair of label maps and gives both a batch axis.

    Args:
        ground_truth: Integers [H, W] or [B, H, W].
        prediction: Integers of the same shape.

    Returns:
        Both maps as [B, H, W].

    Raises:
        UserError: If the shapes differ, have another rank, or the values are not integers.
    """
    ground_truth, prediction = np.asarray(ground_truth), np.asarray(prediction)
    for name, labels in (("ground-truth", ground_truth), ("predicted", prediction)):
        if not np.issubdtype(labels.dtype, np.integer):
            raise UserError(f"The {name} map has type {labels.dtype}; label maps hold integers, convert it to int32.")
    if ground_truth.shape != prediction.shape:
        raise UserError(
            f"The ground-truth map has shape {ground_truth.shape} but the predicted map {prediction.shape}; resize the "
            "prediction to the size of the ground truth."
        )
    if ground_truth.ndim not in (2, 3):
        raise UserError(f"Label maps must be [H, W] or [B, H, W], got shape {ground_truth.shape}.")
    if ground_truth.ndim == 2:
        ground_truth, prediction = ground_truth[None], prediction[None]  # [1, H, W]
    return ground_truth, prediction


def classes_of_values(
    values: np.ndarray, dataset_info: DatasetInfo, *, name: str, divisor: int | None = None
) -> np.ndarray:
    """Returns the class of each value of a label map, -1 for void.

    Args:
        values: int64 [N], distinct values `class * divisor + instance`, not negative.
        dataset_info: The meaning of the classes.
        name: What the map is, for the message ("ground-truth", "predicted").
        divisor: The data set's label_divisor if not given; 1 for class maps.

    Returns:
        int64 [N], contiguous class ids or -1.

    Raises:
        UserError: If the class of a value is neither one of the data set's nor void.
    """
    divisor = divisor or dataset_info.label_divisor
    classes = values // divisor
    void = classes == dataset_info.ignore_label
    unknown = (classes >= dataset_info.num_classes) & ~void
    if unknown.any():
        value = int(values[unknown][0])
        raise UserError(
            f"The {name} map holds value {value}, which is class {value // divisor}; data set '{dataset_info.name}' "
            f"has classes 0..{dataset_info.num_classes - 1} and {dataset_info.ignore_label} for void (values are class "
            f"* {divisor} + instance): check that the map belongs to this data set."
        )
    return np.where(void, -1, classes)


def require_same_categories(metric: str, first: DatasetInfo, second: DatasetInfo) -> None:
    """Raises `UserError` unless two metrics, named by what they measure, are for the same classes."""
    if first.categories != second.categories:
        raise UserError(
            f"Cannot merge the {metric} of data sets '{first.name}' and '{second.name}': their categories differ; "
            "evaluate both with the same ones."
        )


class PanopticQuality:
    """Streaming panoptic quality.

    Ground-truth areas are counted from the map. A panoptic map has at most one crowd segment per class (instance 0);
    several of one class arise only with `update_from_segments`.
    """

    def __init__(self, dataset_info: DatasetInfo, *, reference_crowd_rule: bool = False) -> None:
        """Starts at zero.

        Args:
            dataset_info: The meaning of the maps.
            reference_crowd_rule: With several crowd segments of a class in one image, excuse false positives by the
                last listed one only, as panopticapi does, instead of by all. Matters only for `update_from_segments`.
        """
        self.dataset_info = dataset_info
        self.reference_crowd_rule = reference_crowd_rule
        self._is_thing = np.array([category.is_thing for category in dataset_info.categories])
        self.reset_state()

    def reset_state(self) -> None:
        """Forgets all images."""
        num_classes = self.dataset_info.num_classes
        self.iou_sum = np.zeros(num_classes, np.float64)
        self.true_positives = np.zeros(num_classes, np.int64)
        self.false_positives = np.zeros(num_classes, np.int64)
        self.false_negatives = np.zeros(num_classes, np.int64)

    def merge(self, other: "PanopticQuality") -> None:
        """Adds what another metric has counted, for instance in another process.

        Raises:
            UserError: If the other metric is for other classes.
        """
        require_same_categories("panoptic quality", self.dataset_info, other.dataset_info)
        self.iou_sum += other.iou_sum
        self.true_positives += other.true_positives
        self.false_positives += other.false_positives
        self.false_negatives += other.false_negatives

    def update_state(self, ground_truth: np.ndarray, prediction: np.ndarray) -> None:
        """Counts one image or a batch of images.

        Args:
            ground_truth: int32 [H, W] or [B, H, W], panoptic maps.
            prediction: int32, same shape, panoptic maps.

        Raises:
            UserError: If the shapes differ or a map holds an unknown class.
        """
        for truth_map, predicted_map in zip(*check_maps(ground_truth, prediction), strict=True):
            overlaps = count_overlaps(truth_map, predicted_map)
            truth_classes = classes_of_values(overlaps.first_values, self.dataset_info, name="ground-truth")
            predicted_classes = classes_of_values(overlaps.second_values, self.dataset_info, name="predicted")
            no_instance = overlaps.first_values % self.dataset_info.label_divisor == 0
            crowd = no_instance & (truth_classes >= 0) & self._is_thing[truth_classes]
            self._count(overlaps, truth_classes, predicted_classes, crowd=crowd, excusing=crowd)

    def update_from_segments(
        self,
        ground_truth: np.ndarray,
        ground_truth_segments: Sequence[Segment],
        prediction: np.ndarray,
        predicted_segments: Sequence[Segment],
    ) -> None:
        """Counts one image given as maps of segment ids, as in COCO panoptic files; id 0 is void.

        Args:
            ground_truth: Integers [H, W], segment ids.
            ground_truth_segments: The meaning of its ids, in file order (which `reference_crowd_rule` depends on).
            prediction: Integers [H, W], segment ids.
            predicted_segments: The meaning of its ids.

        Raises:
            UserError: If the shapes differ, or an id occurs only in the map or only in the list.
        """
        (truth_map,), (predicted_map,) = check_maps(ground_truth, prediction)
        overlaps = count_overlaps(truth_map, predicted_map)
        truth_classes = self._classes_of_ids(overlaps.first_values, ground_truth_segments, name="ground-truth")
        predicted_classes = self._classes_of_ids(overlaps.second_values, predicted_segments, name="predicted")
        crowd_ids = [segment.id for segment in ground_truth_segments if segment.is_crowd]
        crowd = np.isin(overlaps.first_values, crowd_ids)
        excusing = crowd
        if self.reference_crowd_rule:
            last = {segment.class_id: segment.id for segment in ground_truth_segments if segment.is_crowd}
            excusing = np.isin(overlaps.first_values, list(last.values()))
        self._count(overlaps, truth_classes, predicted_classes, crowd=crowd, excusing=excusing)

    def result(self) -> PanopticQualityResult:
        """Returns the quality of all images counted so far."""
        true_positives = self.true_positives
        segments = true_positives + 0.5 * self.false_positives + 0.5 * self.false_negatives
        sq = self.iou_sum / np.maximum(true_positives, 1)
        rq = true_positives / np.maximum(segments, 0.5)  # Any segment at all makes at least one half.
        pq = self.iou_sum / np.maximum(segments, 0.5)
        things = self._is_thing

        def mean(selected: np.ndarray) -> MeanQuality:
            selected = selected & (segments > 0)
            count = int(selected.sum())
            if count == 0:
                return MeanQuality(0.0, 0.0, 0.0, 0)
            return MeanQuality(
                float(pq[selected].mean()), float(sq[selected].mean()), float(rq[selected].mean()), count
            )

        return PanopticQualityResult(
            all=mean(np.ones_like(things)),
            things=mean(things),
            stuff=mean(~things),
            per_class={
                category.name: ClassQuality(
                    pq=float(pq[i]),
                    sq=float(sq[i]),
                    rq=float(rq[i]),
                    true_positives=int(true_positives[i]),
                    false_positives=int(self.false_positives[i]),
                    false_negatives=int(self.false_negatives[i]),
                )
                for i, category in enumerate(self.dataset_info.categories)
            },
        )

    def _classes_of_ids(self, values: np.ndarray, segments: Sequence[Segment], *, name: str) -> np.ndarray:
        """Returns the class, int64 [N], of each id, -1 for id 0; map and list must name the same ids."""
        class_of_id = {segment.id: segment.class_id for segment in segments}
        present = {int(value) for value in values} - {0}
        unlisted, absent = present - class_of_id.keys(), class_of_id.keys() - present
        if unlisted:
            raise UserError(
                f"The {name} map holds segment id {min(unlisted)}, which its list of segments does not name."
            )
        if absent:
            raise UserError(f"The {name} list of segments names id {min(absent)}, which its map does not hold.")
        for segment in segments:
            if not 0 <= segment.class_id < self.dataset_info.num_classes:
                raise UserError(
                    f"The {name} segment {segment.id} has class {segment.class_id}; data set "
                    f"'{self.dataset_info.name}' has classes 0..{self.dataset_info.num_classes - 1}."
                )
        return np.array([class_of_id.get(int(value), -1) for value in values], np.int64)

    def _count(
        self,
        overlaps: Overlaps,
        truth_classes: np.ndarray,
        predicted_classes: np.ndarray,
        *,
        crowd: np.ndarray,
        excusing: np.ndarray,
    ) -> None:
        """Matches the segments of one image and adds them up.

        Args:
            overlaps: Pairs of N ground-truth and M predicted segments.
            truth_classes: int64 [N], -1 for void.
            predicted_classes: int64 [M], -1 for void.
            crowd: bool [N], crowd segments of the ground truth.
            excusing: bool [N], the crowd segments that excuse a false positive of their class.
        """
        truth, predicted, pixels = overlaps.first_index, overlaps.second_index, overlaps.pixels
        num_truth, num_predicted = truth_classes.size, predicted_classes.size
        same_class = truth_classes[truth] == predicted_classes[predicted]
        on_void = truth_classes[truth] < 0

        # bincount adds in float64, which is exact for any number of pixels below 2**53.
        truth_area = np.bincount(truth, pixels, num_truth)
        predicted_area = np.bincount(predicted, pixels, num_predicted)
        void_area = np.bincount(predicted, pixels * on_void, num_predicted)
        crowd_area = np.bincount(predicted, pixels * (excusing[truth] & same_class), num_predicted)

        union = truth_area[truth] + predicted_area[predicted] - pixels - void_area[predicted]
        # An IoU above 0.5 makes the match unique on both sides, as segments of one map do not overlap.
        match = same_class & ~on_void & ~crowd[truth] & (2 * pixels > union)
        missed = (truth_classes >= 0) & ~crowd
        missed[truth[match]] = False
        spurious = (predicted_classes >= 0) & (2 * (void_area + crowd_area) <= predicted_area)
        spurious[predicted[match]] = False

        num_classes = self.dataset_info.num_classes
        matched_classes = truth_classes[truth[match]]
        self.iou_sum += np.bincount(matched_classes, pixels[match] / union[match], num_classes)
        self.true_positives += np.bincount(matched_classes, minlength=num_classes)
        self.false_negatives += np.bincount(truth_classes[missed], minlength=num_classes)
        self.false_positives += np.bincount(predicted_classes[spurious], minlength=num_classes)
