"""iIoU, the instance-level IoU of Cityscapes' pixel-level benchmark: small objects count as much as large ones.

In the IoU of a class, objects near the camera decide, because they have most of the pixels. iIoU weights the pixels of
each true object with the average size of its class divided by the size of the object:

    iIoU = iTP / (iTP + FP + iFN)

where iTP and iFN are the weighted true positives and false negatives. False positives have no object, so they are not
weighted. As in Cityscapes' evaluation,

- pixels of a group of objects, which have no object number, are neither iTP nor iFN of their class, and no FP of it;
- pixels that are void in the ground truth are ignored, and pixels that are void only in the prediction are iFN;
- in the iIoU of a category (human or vehicle), each class of the category is right.
"""

import dataclasses

import numpy as np

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.known_datasets import CITYSCAPES
from deeplab2_like.data.panoptic_label import classes_of_values
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.checks import check_maps, require_same_categories
from deeplab2_like.evaluation.overlaps import count_overlaps

# https://github.com/mcordts/cityscapesScripts, evaluation/evalPixelLevelSemanticLabeling.py: the average number of
# pixels of an object of each class.
AVERAGE_SIZES = {
    "person": 3462.4756337644,
    "rider": 3930.4788056518,
    "car": 12794.0202738185,
    "truck": 27855.1264367816,
    "bus": 35732.1511111111,
    "train": 67583.7075812274,
    "motorcycle": 6298.7200839748,
    "bicycle": 4672.3249222261,
}
# The same repository, helpers/labels.py: the categories whose classes all have instances.
CATEGORIES = {
    "human": ("person", "rider"),
    "vehicle": ("car", "truck", "bus", "train", "motorcycle", "bicycle"),
}


def has_cityscapes_classes(dataset_info: DatasetInfo) -> bool:
    """Whether the classes of a data set are the 19 of Cityscapes, in any order, so that `InstanceIoU` is defined."""
    return {(category.name, category.is_thing) for category in dataset_info.categories} == {
        (category.name, category.is_thing) for category in CITYSCAPES
    }


@dataclasses.dataclass(frozen=True)
class InstanceIoUResult:
    """iIoU of a data set, fractions in [0, 1]; None where neither the ground truth nor the prediction has pixels.

    Attributes:
        iiou: Mean over the classes with instances.
        category_iiou: Mean over the categories human and vehicle.
        per_class: Class name -> iIoU.
        per_category: Category name -> iIoU.
    """

    iiou: float | None
    category_iiou: float | None
    per_class: dict[str, float | None]
    per_category: dict[str, float | None]


class InstanceIoU:
    """Streaming sums of iIoU.

    Attributes:
        counts: Name of a class or category -> float64 [3]: iTP, iFN and FP.
    """

    def __init__(self, dataset_info: DatasetInfo) -> None:
        """Creates the metric without any images.

        Args:
            dataset_info: The meaning of the maps.

        Raises:
            UserError: If the classes are not those of Cityscapes.
        """
        if not has_cityscapes_classes(dataset_info):
            raise UserError(
                f"iIoU needs the average size of the objects of each class, which is known for Cityscapes only; data "
                f"set '{dataset_info.name}' has other classes."
            )
        self.dataset_info = dataset_info
        names = [category.name for category in dataset_info.categories]
        # Name -> the class ids that are right.
        self._groups = {name: [names.index(name)] for name in AVERAGE_SIZES} | {
            category: [names.index(name) for name in members] for category, members in CATEGORIES.items()
        }
        self._average_size = np.array([AVERAGE_SIZES.get(name, 0.0) for name in names])
        self.reset_state()

    def reset_state(self) -> None:
        """Forgets all images."""
        self.counts = {name: np.zeros(3) for name in self._groups}

    def merge(self, other: "InstanceIoU") -> None:
        """Adds the counts of another metric, for instance of another process.

        Raises:
            UserError: If the other metric is for other classes.
        """
        require_same_categories("iIoU", self.dataset_info, other.dataset_info)
        for name, counts in other.counts.items():
            self.counts[name] += counts

    def update_state(self, ground_truth: np.ndarray, prediction: np.ndarray) -> None:
        """Counts one image or a batch of images.

        Args:
            ground_truth: int32 [H, W] or [B, H, W], panoptic maps.
            prediction: Integers, same shape, class maps (contiguous class ids, `ignore_label` for void).

        Raises:
            UserError: If the shapes differ or a map holds an unknown class.
        """
        for truth_map, predicted_map in zip(*check_maps(ground_truth, prediction), strict=True):
            self._add(truth_map, predicted_map)

    def _add(self, truth_map: np.ndarray, predicted_map: np.ndarray) -> None:
        """Counts a panoptic map and a class map, [H, W] each."""
        info = self.dataset_info
        pairs = count_overlaps(truth_map, predicted_map)
        truth = classes_of_values(pairs.first_values, info, name="ground-truth")
        predicted = classes_of_values(pairs.second_values, info, name="predicted", divisor=1)[pairs.second_index]
        sizes = np.bincount(pairs.first_index, pairs.pixels, minlength=truth.size)
        is_object = (truth >= 0) & (pairs.first_values % info.label_divisor > 0)
        weights = np.where(is_object, self._average_size[truth] / np.maximum(sizes, 1), 0.0)
        # From here on, one element per pair.
        weighted = weights[pairs.first_index] * pairs.pixels
        truth = truth[pairs.first_index]
        for name, classes in self._groups.items():
            is_truth, is_predicted = np.isin(truth, classes), np.isin(predicted, classes)
            self.counts[name] += (
                weighted[is_truth & is_predicted].sum(),
                weighted[is_truth & ~is_predicted].sum(),
                pairs.pixels[~is_truth & is_predicted & (truth >= 0)].sum(),
            )

    def result(self) -> InstanceIoUResult:
        """Returns the iIoU of all pixels counted so far."""

        def iiou(name: str) -> float | None:
            counts = self.counts[name]
            return float(counts[0] / counts.sum()) if counts.any() else None

        def mean(values: dict[str, float | None]) -> float | None:
            defined = [value for value in values.values() if value is not None]
            return sum(defined) / len(defined) if defined else None

        per_class = {name: iiou(name) for name in AVERAGE_SIZES}
        per_category = {name: iiou(name) for name in CATEGORIES}
        return InstanceIoUResult(mean(per_class), mean(per_category), per_class, per_category)
