"""Panoptic quality (PQ) of the COCO panoptic challenge (Kirillov et al., "Panoptic Segmentation", section 4).

Every distinct value of a panoptic map is one segment. A predicted segment and a ground-truth segment of the same class
match if their intersection over union is above 0.5; prediction pixels on void ground truth are left out of the union.
Then, per class, `PQ = sum of matched IoU / (TP + FP / 2 + FN / 2) = SQ * RQ`.

The rules for the special cases:

* **Void** is no segment, neither in the ground truth nor in a prediction.
* **Crowd** in the ground truth is instance 0 of a thing class. It never matches and is never a false negative.
* A prediction without a match is a false positive, unless more than half of it lies on void and crowd of its class.
* **In a prediction, instance 0 of a thing class is a segment like any other**: predictions have no crowds.
* Stuff segments carry instance 0; other instance ids of a stuff class are separate segments.
* Averages run over the classes with TP + FP + FN > 0, so a class that is only predicted counts with PQ 0.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deeplab2_like.data.coco_segments import Segment
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.evaluation.checks import check_maps, require_same_categories
from deeplab2_like.evaluation.overlaps import ClassifiedOverlaps, count_panoptic_overlaps, count_segment_overlaps


@dataclasses.dataclass(frozen=True)
class ClassQuality:
    """Quality of one class, all fractions in [0, 1]; zeros for a class that occurs nowhere.

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
        num_classes: Number of classes in the means, those with TP + FP + FN > 0. Without any the means are 0.
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


class Matches(NamedTuple):
    """The true positives, false positives and false negatives of one image.

    Attributes:
        matched_classes: int64 [T], class ids of the matched pairs, in the order of the ground truth's values.
        matched_iou: float64 [T], IoU of the matched pairs.
        false_negative_classes: int64 [N], class ids of the ground-truth segments without a match.
        false_positive_classes: int64 [P], class ids of the predicted segments without a match.
    """

    matched_classes: np.ndarray
    matched_iou: np.ndarray
    false_negative_classes: np.ndarray
    false_positive_classes: np.ndarray


class PanopticQuality:
    """Streaming panoptic quality.

    A panoptic map has at most one crowd segment per class (instance 0); only lists of segments (`update_from_segments`)
    can have several of one class.

    An image is first matched (`match_panoptic`, `match_segments`), which changes no state and may happen in any thread,
    and then added (`add`). Images added in the same order give the same result to the last bit.
    """

    def __init__(self, dataset_info: DatasetInfo, *, reference_crowd_rule: bool = False) -> None:
        """Creates the metric without any images.

        Args:
            dataset_info: The meaning of the maps.
            reference_crowd_rule: Whether to count as panopticapi does: with several crowd segments of a class in one
                image, only the last listed one, instead of all, excuses false positives; and the areas of ground-truth
                segments are those of their list, where it has them, not those of the map. Matters only for lists of
                segments.
        """
        self.dataset_info = dataset_info
        self.reference_crowd_rule = reference_crowd_rule
        self._is_thing = np.array([category.is_thing for category in dataset_info.categories])
        self._is_thing_or_void = np.append(self._is_thing, False)  # Void, class -1, indexes the last entry.
        self.reset_state()

    def reset_state(self) -> None:
        """Forgets all images."""
        num_classes = self.dataset_info.num_classes
        self.iou_sum = np.zeros(num_classes, np.float64)
        self.true_positives = np.zeros(num_classes, np.int64)
        self.false_positives = np.zeros(num_classes, np.int64)
        self.false_negatives = np.zeros(num_classes, np.int64)

    def merge(self, other: "PanopticQuality") -> None:
        """Adds the counts of another metric, for instance of another process.

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
            self.add(self.match_panoptic(count_panoptic_overlaps(truth_map, predicted_map, self.dataset_info)))

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
            UserError: If the shapes differ, a class is unknown, or an id occurs only in the map or only in the list.
        """
        overlaps = count_segment_overlaps(
            ground_truth, ground_truth_segments, prediction, predicted_segments, self.dataset_info
        )
        self.add(self.match_segments(overlaps, ground_truth_segments))

    def match_panoptic(self, overlaps: ClassifiedOverlaps) -> Matches:
        """Matches the segments of one image; changes no state.

        Args:
            overlaps: The result of `count_panoptic_overlaps`.
        """
        crowd = overlaps.pairs.first_values % self.dataset_info.label_divisor == 0
        crowd &= self._is_thing_or_void[overlaps.truth_classes]
        return _match(overlaps, crowd=crowd, excusing=crowd)

    def match_segments(self, overlaps: ClassifiedOverlaps, ground_truth_segments: Sequence[Segment]) -> Matches:
        """Matches the segments of one image; changes no state.

        Args:
            overlaps: The result of `count_segment_overlaps`.
            ground_truth_segments: The list of segments that `count_segment_overlaps` was given.
        """
        values = overlaps.pairs.first_values
        crowds = {segment.id: segment for segment in ground_truth_segments if segment.is_crowd}
        crowd = np.isin(values, list(crowds))
        if not self.reference_crowd_rule:
            return _match(overlaps, crowd=crowd, excusing=crowd)
        last = {segment.class_id: segment.id for segment in crowds.values()}
        stated = {segment.id: segment.area for segment in ground_truth_segments if segment.area is not None}
        counted = np.bincount(overlaps.pairs.first_index, overlaps.pairs.pixels, values.size)
        truth_area = np.array([stated.get(value, area) for value, area in zip(values.tolist(), counted, strict=True)])
        return _match(overlaps, crowd=crowd, excusing=np.isin(values, list(last.values())), truth_area=truth_area)

    def add(self, matches: Matches) -> None:
        """Counts one image."""
        num_classes = self.dataset_info.num_classes
        # Not by `bincount`, which would sum the IoUs of an image first: another order of additions, another last bit.
        np.add.at(self.iou_sum, matches.matched_classes, matches.matched_iou)
        self.true_positives += np.bincount(matches.matched_classes, minlength=num_classes)
        self.false_negatives += np.bincount(matches.false_negative_classes, minlength=num_classes)
        self.false_positives += np.bincount(matches.false_positive_classes, minlength=num_classes)

    def result(self) -> PanopticQualityResult:
        """Returns the quality of all images counted so far."""
        true_positives = self.true_positives
        segments = true_positives + 0.5 * self.false_positives + 0.5 * self.false_negatives
        sq = self.iou_sum / np.maximum(true_positives, 1)
        rq = true_positives / np.maximum(segments, 0.5)  # One segment counts at least one half.
        pq = self.iou_sum / np.maximum(segments, 0.5)
        things = self._is_thing

        def mean(selected: np.ndarray) -> MeanQuality:
            selected = selected & (segments > 0)
            num_classes = int(selected.sum())
            if num_classes == 0:
                return MeanQuality(0.0, 0.0, 0.0, 0)
            # `cumsum` adds one by one as panopticapi does; `mean` adds in another order, which may change the last bit.
            pq_mean, sq_mean, rq_mean = (float(values[selected].cumsum()[-1]) / num_classes for values in (pq, sq, rq))
            return MeanQuality(pq_mean, sq_mean, rq_mean, num_classes)

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


def _match(
    overlaps: ClassifiedOverlaps, *, crowd: np.ndarray, excusing: np.ndarray, truth_area: np.ndarray | None = None
) -> Matches:
    """Matches the segments of one image.

    Args:
        overlaps: The overlaps of N ground-truth and M predicted segments.
        crowd: bool [N], crowd segments of the ground truth.
        excusing: bool [N], the crowd segments that excuse false positives of their class.
        truth_area: float64 [N], the areas of the ground-truth segments; by default they are counted.
    """
    truth, predicted, pixels = overlaps.pairs.first_index, overlaps.pairs.second_index, overlaps.pairs.pixels
    truth_classes, predicted_classes = overlaps.truth_classes, overlaps.predicted_classes
    num_truth, num_predicted = truth_classes.size, predicted_classes.size
    classes_of_truth = truth_classes[truth]
    same_class = classes_of_truth == predicted_classes[predicted]
    matchable = (truth_classes >= 0) & ~crowd

    # bincount adds in float64, which is exact for any number of pixels below 2**53.
    if truth_area is None:
        truth_area = np.bincount(truth, pixels, num_truth)
    predicted_area = np.bincount(predicted, pixels, num_predicted)
    void_area = np.bincount(predicted, pixels * (classes_of_truth < 0), num_predicted)
    excused_area = void_area + np.bincount(predicted, pixels * (excusing[truth] & same_class), num_predicted)

    (candidates,) = (same_class & matchable[truth]).nonzero()  # [K], few of all pairs.
    truth, predicted, pixels = truth[candidates], predicted[candidates], pixels[candidates]
    union = truth_area[truth] + (predicted_area - void_area)[predicted] - pixels
    # An IoU above 0.5 makes the match unique on both sides, as segments of one map do not overlap.
    is_match = 2 * pixels > union
    truth, predicted = truth[is_match], predicted[is_match]
    false_negative = matchable
    false_negative[truth] = False
    false_positive = (predicted_classes >= 0) & (2 * excused_area <= predicted_area)
    false_positive[predicted] = False
    return Matches(
        matched_classes=truth_classes[truth],
        matched_iou=pixels[is_match] / union[is_match],
        false_negative_classes=truth_classes[false_negative],
        false_positive_classes=predicted_classes[false_positive],
    )
