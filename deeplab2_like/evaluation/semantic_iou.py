"""Mean and frequency-weighted intersection over union of the classes, the metrics of semantic segmentation."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.evaluation.checks import check_maps, require_same_categories
from deeplab2_like.evaluation.overlaps import ClassifiedOverlaps, count_panoptic_overlaps


@dataclasses.dataclass(frozen=True)
class SemanticIoUResult:
    """Semantic segmentation quality of a data set, fractions in [0, 1].

    Attributes:
        miou: Mean IoU over the classes of `per_class`; 0 without any.
        fwiou: Mean IoU weighted by the share of these classes in the ground-truth pixels; 0 if there are none.
        per_class: Class name -> IoU, in the order of the classes: those that can be predicted and that occur in the
            ground truth or the prediction.
        not_predicted: Names of the classes that cannot be predicted, which both means leave out.
    """

    miou: float
    fwiou: float
    per_class: dict[str, float]
    not_predicted: tuple[str, ...] = ()


class SemanticIoU:
    """Streaming confusion matrix.

    Pixels that are void in the ground truth are ignored. Pixels that are void only in the prediction enter the union of
    their true class and of no other. Crowd regions count like any other pixels of their class.

    Attributes:
        confusion: int64 [C, C + 1], pixels by true class and predicted class; the last column is predicted void.
    """

    def __init__(self, dataset_info: DatasetInfo, *, classes: Sequence[int] | None = None) -> None:
        """Creates the metric without any images.

        Args:
            dataset_info: The meaning of the maps.
            classes: Class ids that can be predicted; None for all. Pixels of other classes count only as wrong
                predictions of these.
        """
        self.dataset_info = dataset_info
        can_predict = range(dataset_info.num_classes) if classes is None else classes
        self._can_predict = np.isin(np.arange(dataset_info.num_classes), list(can_predict))
        self.reset_state()

    def reset_state(self) -> None:
        """Forgets all images."""
        num_classes = self.dataset_info.num_classes
        self.confusion = np.zeros((num_classes, num_classes + 1), np.int64)

    def merge(self, other: "SemanticIoU") -> None:
        """Adds the counts of another metric, for instance of another process.

        Raises:
            UserError: If the other metric is for other classes.
        """
        require_same_categories("IoU", self.dataset_info, other.dataset_info)
        self.confusion += other.confusion

    def update_state(self, ground_truth: np.ndarray, prediction: np.ndarray) -> None:
        """Counts one image or a batch of images from panoptic maps.

        Args:
            ground_truth: int32 [H, W] or [B, H, W], panoptic maps.
            prediction: int32, same shape, panoptic maps.

        Raises:
            UserError: If the shapes differ or a map holds an unknown class.
        """
        self._update(ground_truth, prediction, divisor=self.dataset_info.label_divisor)

    def update_from_class_maps(self, ground_truth: np.ndarray, prediction: np.ndarray) -> None:
        """Counts one image or a batch of images from class maps (contiguous class ids, `ignore_label` for void).

        Args:
            ground_truth: Integers [H, W] or [B, H, W].
            prediction: Integers, same shape.

        Raises:
            UserError: If the shapes differ or a map holds an unknown class.
        """
        self._update(ground_truth, prediction, divisor=1)

    def add(self, overlaps: ClassifiedOverlaps) -> None:
        """Counts one image, given the overlaps of its maps."""
        # Void is -1, so a predicted void indexes the last column; a true void is left out.
        rows = overlaps.truth_classes[overlaps.pairs.first_index]
        columns = overlaps.predicted_classes[overlaps.pairs.second_index]
        labeled = rows >= 0
        np.add.at(self.confusion, (rows[labeled], columns[labeled]), overlaps.pairs.pixels[labeled])

    def result(self) -> SemanticIoUResult:
        """Returns the IoU of all pixels counted so far."""
        intersection = np.diagonal(self.confusion)
        truth = self.confusion.sum(axis=1)
        union = truth + self.confusion.sum(axis=0)[:-1] - intersection
        iou = intersection / np.maximum(union, 1)
        counted = self._can_predict & (union > 0)
        names = [category.name for category in self.dataset_info.categories]
        return SemanticIoUResult(
            miou=float(iou[counted].mean()) if counted.any() else 0.0,
            fwiou=float((truth * iou)[counted].sum() / max(int(truth[counted].sum()), 1)),
            per_class={name: float(value) for name, value, used in zip(names, iou, counted, strict=True) if used},
            not_predicted=tuple(name for name, can in zip(names, self._can_predict, strict=True) if not can),
        )

    def _update(self, ground_truth: np.ndarray, prediction: np.ndarray, *, divisor: int) -> None:
        """Adds the pixels of maps whose values are `class * divisor + instance`."""
        for truth_map, predicted_map in zip(*check_maps(ground_truth, prediction), strict=True):
            self.add(count_panoptic_overlaps(truth_map, predicted_map, self.dataset_info, divisor=divisor))
