"""Average precision (AP) of instance masks and boxes, computed by pycocotools.

Predictions are either the segments of a panoptic map with their scores, or masks, which may overlap and usually give a
higher AP. The ground truth is that of a COCO instance JSON (`instance_json.py`), or by default that of the panoptic
map: its instances, with the tight boxes of their masks, and its crowd regions (instance 0 of a thing class). Crowd
regions are never false negatives and do not turn predictions on them into false positives.

Only run-length encodings are kept in memory.
"""

import contextlib
import dataclasses
import io
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.label_runs import find_runs
from deeplab2_like.data.panoptic_label import classes_of_values
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.checks import check_maps, require_same_categories

if TYPE_CHECKING:  # Its module imports TensorFlow, which `evaluate_files` does not need.
    from deeplab2_like.evaluation.instance_json import InstanceAnnotations

# pycocotools' form of a run-length encoded mask: {"size": [H, W], "counts": bytes}.
Rle = dict[str, Any]

# The name of the ground truth of AP that is taken from panoptic maps.
PANOPTIC_LABELS = "panoptic labels"


@dataclasses.dataclass(frozen=True)
class AveragePrecision:
    """Average precision as COCO defines it, fractions in [0, 1]; None where there is no ground truth.

    Attributes:
        ap: Mean over IoU thresholds 0.50, 0.55, ..., 0.95.
        ap50: At IoU 0.50.
        ap75: At IoU 0.75.
        ap_small: `ap` of objects under 32 x 32 pixels of area.
        ap_medium: `ap` of objects from 32 x 32 to 96 x 96 pixels.
        ap_large: `ap` of larger objects.
        per_class: Name of the thing class -> `ap`.
    """

    ap: float | None
    ap50: float | None
    ap75: float | None
    ap_small: float | None
    ap_medium: float | None
    ap_large: float | None
    per_class: dict[str, float | None]


@dataclasses.dataclass(frozen=True)
class InstanceAPResult:
    """Average precision of masks and of boxes.

    Attributes:
        mask: That of masks.
        box: That of boxes.
        ground_truth: The source of the true objects: `panoptic labels`, or the name of a JSON.
    """

    mask: AveragePrecision
    box: AveragePrecision
    ground_truth: str


class _Image(NamedTuple):
    """Size, ground truth and predictions of an image; the latter two as COCO annotations without ids."""

    height: int
    width: int
    truth: list[dict[str, Any]]
    predictions: list[dict[str, Any]]


class InstanceAP:
    """Average precision over a data set: collects all images, and `result` evaluates them at once.

    As in COCO, only the 100 predictions with the highest scores of each class in an image count.
    """

    def __init__(self, dataset_info: DatasetInfo, annotations: "InstanceAnnotations | None" = None) -> None:
        """Creates the metric without any images.

        Args:
            dataset_info: The meaning of the maps.
            annotations: The ground truth; by default that of the panoptic maps.
        """
        self.dataset_info = dataset_info
        self.annotations = annotations
        self.reset_state()

    def reset_state(self) -> None:
        """Forgets all images."""
        self._images: dict[int | str, _Image] = {}

    def merge(self, other: "InstanceAP") -> None:
        """Adds the images of another metric, for instance of another process.

        Raises:
            UserError: If the other metric is for other classes or another ground truth, or both have the same image.
        """
        require_same_categories("AP", self.dataset_info, other.dataset_info)
        if self.annotations is not other.annotations:
            raise UserError("Cannot merge AP of two ground truths; evaluate both with the same annotations.")
        for image_id in other._images:
            self._check_new(image_id)
        self._images.update(other._images)

    def update_from_panoptic(
        self,
        image_id: int | str,
        ground_truth: np.ndarray,
        prediction: np.ndarray,
        *,
        segment_id: Sequence[int] | np.ndarray,
        segment_class: Sequence[int] | np.ndarray,
        segment_score: Sequence[float] | np.ndarray,
        file_name: str | None = None,
    ) -> None:
        """Adds an image whose predictions are the thing segments of a panoptic map.

        Args:
            image_id: Id of the image; each may be added once.
            ground_truth: int32 [H, W], panoptic map.
            prediction: int32 [H, W], panoptic map.
            segment_id: int [K], panoptic value of each segment.
            segment_class: int [K], its class id; stuff is left out.
            segment_score: float [K], its score. Rows with score 0 are unused; so are segments without a pixel.
            file_name: Name of the image in `annotations`; by default its id.

        Raises:
            UserError: If the shapes differ, a class is unknown, or the image was added before.
        """
        (ground_truth,), (prediction,) = check_maps(ground_truth, prediction)
        score, class_id = np.asarray(segment_score), np.asarray(segment_class)
        used = (score > 0) & np.isin(class_id, self.dataset_info.thing_classes)
        values = np.asarray(segment_id)[used]
        predictions = [
            _make_prediction(rle, class_id=int(row_class), score=float(row_score))
            for rle, row_class, row_score in zip(
                segments_to_rle(prediction, values), class_id[used], score[used], strict=True
            )
            if mask_utils.area(rle) > 0  # Segments may lose all their pixels to others.
        ]
        self._add(image_id, ground_truth, predictions, file_name)

    def update_from_instances(
        self,
        image_id: int | str,
        ground_truth: np.ndarray,
        *,
        masks: Iterable[np.ndarray],
        scores: Sequence[float] | np.ndarray,
        classes: Sequence[int] | np.ndarray,
        boxes: np.ndarray | None = None,
        file_name: str | None = None,
    ) -> None:
        """Adds an image whose predictions are masks that may overlap.

        Args:
            image_id: Id of the image; each may be added once.
            ground_truth: int32 [H, W], panoptic map.
            masks: bool [N, H, W], or anything that yields N masks [H, W] one by one.
            scores: float [N]. Rows with score 0 are unused.
            classes: int [N], thing class ids.
            boxes: float [N, 4], y_min, x_min, y_max, x_max in pixels; the tight boxes of the masks if not given.
            file_name: Name of the image in `annotations`; by default its id.

        Raises:
            UserError: If a mask's size differs, a class is not a thing, or the image was added before.
        """
        (ground_truth,), _ = check_maps(ground_truth, ground_truth)
        predictions = []
        box_rows: Iterable[Any] = [None] * len(scores) if boxes is None else boxes
        for mask, score, class_id, box in zip(masks, scores, classes, box_rows, strict=True):
            if score <= 0:
                continue
            if mask.shape != ground_truth.shape:
                raise UserError(
                    f"Image '{image_id}' has a mask of shape {mask.shape} but a ground-truth map of shape "
                    f"{ground_truth.shape}; paste masks at the size of the image."
                )
            if int(class_id) not in self.dataset_info.thing_classes:
                raise UserError(
                    f"Image '{image_id}' has an instance of class {class_id}, which is no thing class of data set "
                    f"'{self.dataset_info.name}' (they are {list(self.dataset_info.thing_classes)})."
                )
            rle = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
            predictions.append(_make_prediction(rle, class_id=int(class_id), score=float(score), box=box))
        self._add(image_id, ground_truth, predictions, file_name)

    def result(self) -> InstanceAPResult:
        """Evaluates all images added so far."""
        ground_truth = PANOPTIC_LABELS if self.annotations is None else self.annotations.name
        return InstanceAPResult(self._evaluate("segm"), self._evaluate("bbox"), ground_truth)

    def _add(
        self,
        image_id: int | str,
        ground_truth: np.ndarray,
        predictions: list[dict[str, Any]],
        file_name: str | None,
    ) -> None:
        """Stores the ground truth and the predictions of an image; `ground_truth` is a panoptic map, int32 [H, W]."""
        self._check_new(image_id)
        height, width = ground_truth.shape
        if self.annotations is None:
            truth = self._objects_of_map(ground_truth)
        else:
            truth = self.annotations.of_image(str(image_id) if file_name is None else file_name, (height, width))
        self._images[image_id] = _Image(height, width, truth, predictions)

    def _objects_of_map(self, ground_truth: np.ndarray) -> list[dict[str, Any]]:
        """Returns the instances and crowd regions of a panoptic map, int32 [H, W]."""
        ends, _ = find_runs(ground_truth.reshape(-1))
        values = np.unique(ground_truth.reshape(-1)[ends])
        classes = classes_of_values(values, self.dataset_info, name="ground-truth")
        things = np.isin(classes, self.dataset_info.thing_classes)
        return [
            {
                "category_id": int(class_id),
                "segmentation": rle,
                "area": float(mask_utils.area(rle)),
                "bbox": mask_utils.toBbox(rle).tolist(),
                "iscrowd": int(value % self.dataset_info.label_divisor == 0),
            }
            for rle, class_id, value in zip(
                segments_to_rle(ground_truth, values[things]), classes[things], values[things], strict=True
            )
        ]

    def _check_new(self, image_id: int | str) -> None:
        """Raises `UserError` if the image was added before."""
        if image_id in self._images:
            raise UserError(f"Image '{image_id}' was added twice; every image may be evaluated once.")

    def _evaluate(self, kind: str) -> AveragePrecision:
        """Runs COCOeval for `kind`, "segm" or "bbox"."""
        class_ids = self.dataset_info.thing_classes
        names = [self.dataset_info.categories[class_id].name for class_id in class_ids]
        if not self._images or not class_ids:
            return AveragePrecision(None, None, None, None, None, None, per_class=dict.fromkeys(names))
        truth = [(i, row) for i, image in enumerate(self._images.values()) for row in image.truth]
        predictions = [(i, row) for i, image in enumerate(self._images.values()) for row in image.predictions]
        if kind == "bbox":
            # As in COCO, the area of the box, not of the mask, decides whether a predicted box is small or large.
            predictions = [(i, row | {"area": row["bbox"][2] * row["bbox"][3]}) for i, row in predictions]
        with contextlib.redirect_stdout(io.StringIO()):  # pycocotools prints its progress and a table.
            evaluation = COCOeval(self._make_coco(truth), self._make_coco(predictions), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        # [thresholds, recalls, classes] at the last detection limit and for all sizes; -1 is "no ground truth".
        precision = evaluation.eval["precision"][:, :, :, 0, -1]
        per_class = {name: _mean_defined(precision[:, :, i]) for i, name in enumerate(names)}
        ap, ap50, ap75, small, medium, large = (None if value < 0 else float(value) for value in evaluation.stats[:6])
        return AveragePrecision(ap, ap50, ap75, small, medium, large, per_class)

    def _make_coco(self, rows: list[tuple[int, dict[str, Any]]]) -> COCO:
        """Makes pycocotools' index of annotations; `rows` are pairs of an image's position and an annotation."""
        coco = COCO()
        coco.dataset = {
            "images": [
                {"id": i, "height": image.height, "width": image.width} for i, image in enumerate(self._images.values())
            ],
            "categories": [{"id": class_id} for class_id in self.dataset_info.thing_classes],
            # Ids count from 1, because COCOeval takes id 0 of a matched object for "no match".
            "annotations": [row | {"id": number, "image_id": i} for number, (i, row) in enumerate(rows, start=1)],
        }
        coco.createIndex()
        return coco


def segments_to_rle(panoptic: np.ndarray, values: Sequence[int] | np.ndarray) -> list[Rle]:
    """Encodes segments of a map as COCO run lengths without making masks.

    Args:
        panoptic: int32 [H, W].
        values: The values to encode; one that does not occur gives an empty mask.

    Returns:
        One encoding per value.
    """
    height, width = panoptic.shape
    flat = panoptic.reshape(-1, order="F")  # [W*H]: COCO counts down the columns.
    if flat.size == 0:
        return [{"size": [height, width], "counts": b""} for _ in values]
    ends, lengths = find_runs(flat)
    run_values = flat[ends]
    encoded = []
    for value in values:
        runs = run_values == value
        stop = ends[runs] + 1
        start = stop - lengths[runs]
        bounds = np.stack([start, stop], axis=1).reshape(-1)  # [2 * runs]
        counts = np.diff(bounds, prepend=0, append=flat.size)  # background, segment, background, ...
        if counts[-1] == 0:  # The segment reaches the last pixel, so no background follows.
            counts = counts[:-1]
        encoded.append(mask_utils.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width))
    return encoded


def _make_prediction(rle: Rle, *, class_id: int, score: float, box: np.ndarray | None = None) -> dict[str, Any]:
    """Makes a COCO result; `box` is y_min, x_min, y_max, x_max, by default that of the mask."""
    if box is None:
        coco_box = mask_utils.toBbox(rle).tolist()
    else:
        y_min, x_min, y_max, x_max = (float(side) for side in box)
        coco_box = [x_min, y_min, x_max - x_min, y_max - y_min]
    return {
        "category_id": class_id,
        "segmentation": rle,
        "area": float(mask_utils.area(rle)),
        "bbox": coco_box,
        "score": score,
        "iscrowd": 0,
    }


def _mean_defined(precision: np.ndarray) -> float | None:
    """Returns the mean of the entries that are not -1, None without any."""
    defined = precision[precision > -1]
    return float(defined.mean()) if defined.size else None
