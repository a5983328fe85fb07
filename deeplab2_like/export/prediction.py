"""`PanopticPrediction`: the prediction for one image, and its conversion to the formats of other tools.

Needs neither TensorFlow nor Keras.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from pycocotools import mask as coco_mask

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.label_runs import find_runs
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.evaluation.coco_format import CocoPanopticWriter, segments_info
from deeplab2_like.visualize import draw_overlay


@dataclasses.dataclass(frozen=True)
class Segment:
    """One segment of a prediction.

    Attributes:
        id: Its id in COCO panoptic PNG and JSON files, which is its value in the panoptic map + 1.
        category_id: The data set's id of its class.
        category_name: The name of its class.
        is_thing: Whether it is a countable object.
        score: Confidence of the model, 0 or more.
        area: Number of pixels.
        bbox: Tight box y_min, x_min, y_max, x_max in pixels; the maxima are exclusive (height is y_max - y_min). COCO
            files have COCO's x, y, width, height instead.
    """

    id: int
    category_id: int
    category_name: str
    is_thing: bool
    score: float
    area: int
    bbox: tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class PanopticPrediction:
    """The prediction for one image.

    Attributes:
        panoptic: int32 [H, W], panoptic map, see `DatasetInfo`.
        segments: The segments of the map in ascending order of their ids, without void.
        dataset_info: The meaning of the map.
    """

    panoptic: np.ndarray
    segments: tuple[Segment, ...]
    dataset_info: DatasetInfo

    @property
    def scores(self) -> dict[int, float]:
        """The score of each segment by its value in the panoptic map, as `CocoPanopticWriter.add` expects."""
        return {segment.id - 1: segment.score for segment in self.segments}

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Draws the prediction over its image, uint8 [H, W, 3]; returns uint8 [H, W, 3]."""
        return draw_overlay(image, self.panoptic, self.dataset_info)

    def mask(self, segment: Segment | int) -> np.ndarray:
        """Returns the mask of a segment.

        Args:
            segment: One of `segments`, or its id.

        Returns:
            bool [H, W].

        Raises:
            UserError: If the prediction has no such segment.
        """
        segment_id = segment.id if isinstance(segment, Segment) else segment
        if all(known.id != segment_id for known in self.segments):
            raise UserError(
                f"The prediction has no segment with id {segment_id}; take one of its {len(self.segments)} `segments`."
            )
        return self.panoptic == segment_id - 1

    def to_semantic(self) -> np.ndarray:
        """Returns the class of each pixel.

        Returns:
            int32 [H, W], class ids, which are positions in `dataset_info.categories`; void is
            `dataset_info.ignore_label`.
        """
        return self.panoptic // np.int32(self.dataset_info.label_divisor)

    def to_coco(self) -> list[dict[str, Any]]:
        """Returns the `segments_info` of a COCO panoptic annotation.

        Returns:
            One mapping per segment: `id`, `category_id`, `iscrowd` (0), `area`, `bbox` [x, y, width, height], `score`.
        """
        described = []
        for segment in self.segments:
            y_min, x_min, y_max, x_max = segment.bbox
            described.append(
                {
                    "id": segment.id,
                    "category_id": segment.category_id,
                    "iscrowd": 0,
                    "area": segment.area,
                    "bbox": [x_min, y_min, x_max - x_min, y_max - y_min],
                    "score": segment.score,
                }
            )
        return described

    def to_rle(self) -> list[dict[str, Any]]:
        """Returns the segments with their masks in COCO's compressed run-length encoding.

        Returns:
            The mappings of `to_coco`, each with `segmentation`: `{"size": [H, W], "counts": text}`, as in COCO's files
            of instance results. `pycocotools.mask.decode` gives the mask, uint8 [H, W].
        """
        height, width = self.panoptic.shape
        columns = self.panoptic.T.reshape(-1)  # [W*H], as COCO counts down the columns.
        ends, lengths = find_runs(columns)
        order = np.argsort(columns[ends], kind="stable")
        values, first = np.unique(columns[ends][order], return_index=True)
        runs_of = dict(zip(values.tolist(), np.split(order, first[1:]), strict=True))
        rows = []
        for described in self.to_coco():
            runs = runs_of[described["id"] - 1]
            stops = ends[runs] + 1
            # Alternately the lengths of gaps and of runs, and the rest of the image.
            gaps = np.diff(stops - lengths[runs], prepend=0)
            gaps[1:] -= lengths[runs][:-1]
            counts = np.empty(2 * runs.size + 1, np.int64)
            counts[:-1:2], counts[1::2], counts[-1] = gaps, lengths[runs], columns.size - stops[-1]
            encoded = coco_mask.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
            encoding = {"size": [height, width], "counts": encoded["counts"].decode()}
            rows.append(described | {"segmentation": encoding})
        return rows

    def to_supervision(self) -> Any:
        """Returns the segments as `supervision.Detections`, to annotate, track or count them.

        Returns:
            Detections with `xyxy` float32 [N, 4] (x_min, y_min, x_max, y_max in pixels; maxima are exclusive), `mask`
            bool [N, H, W], `class_id` int [N] (positions in `dataset_info.categories`), `confidence` float32 [N], and
            `data["class_name"]`. Stuff segments are included.

        Raises:
            UserError: If the package supervision is not installed.
        """
        try:
            import supervision
        except ImportError as error:
            raise UserError(
                "Package 'supervision' is not installed; install it with `pip install 'deeplab2-like[supervision]'`."
            ) from error
        if not self.segments:
            return supervision.Detections.empty()
        boxes = np.array([segment.bbox for segment in self.segments], np.float32)  # [N, 4]
        class_of = self.dataset_info.class_of_category_id
        return supervision.Detections(
            xyxy=boxes[:, [1, 0, 3, 2]],
            mask=np.stack([self.panoptic == segment.id - 1 for segment in self.segments]),
            confidence=np.array([segment.score for segment in self.segments], np.float32),
            class_id=np.array([class_of[segment.category_id] for segment in self.segments]),
            data={"class_name": np.array([segment.category_name for segment in self.segments])},
        )

    def select(self, *, min_score: float = 0.0, classes: Sequence[str] = ()) -> "PanopticPrediction":
        """Turns segments that are uncertain or of no interest into void.

        Args:
            min_score: Smallest score of the segments that stay.
            classes: Names of the classes that stay; none means all.

        Returns:
            A prediction with the segments that stay, under their ids; this one if all do.

        Raises:
            UserError: If the data set has no class of a given name.
        """
        require_classes(classes, self.dataset_info)
        chosen = set(classes)
        kept = tuple(
            segment
            for segment in self.segments
            if segment.score >= min_score and (not chosen or segment.category_name in chosen)
        )
        if len(kept) == len(self.segments):
            return self
        dropped = np.array(sorted({s.id for s in self.segments} - {s.id for s in kept})) - 1
        panoptic = np.where(np.isin(self.panoptic, dropped), np.int32(self.dataset_info.void), self.panoptic)
        return PanopticPrediction(panoptic, kept, self.dataset_info)

    def save_coco(self, output_dir: str | os.PathLike[str], file_name: str, image_id: int | str | None = None) -> Path:
        """Writes `OUTPUT_DIR/panoptic.json` for this image alone, and its PNG into `OUTPUT_DIR/panoptic/`.

        For several images in one JSON use `predict_files` or `CocoPanopticWriter`.

        Args:
            output_dir: The folder; created if missing.
            file_name: The image's file name; that of the PNG has the suffix `.png` instead.
            image_id: The data set's id of the image; by default the file name without suffix.

        Returns:
            The path of the JSON.

        Raises:
            UserError: If the name leads out of the folder, or a file cannot be written.
        """
        image_id = Path(file_name).stem if image_id is None else image_id
        with CocoPanopticWriter(output_dir, self.dataset_info) as writer:
            writer.add(image_id, file_name, self.panoptic, scores=self.scores)
        return writer.json_file


class ImagePredictor(Protocol):
    """What predicts images: `Predictor`, `ModelFolderPredictor`, `TiledPredictor`, or an object of your own.

    Attributes:
        dataset_info: The meaning of the predicted maps.
        identity: Text that differs between models with different weights, by which `predict_files` knows its results.
    """

    dataset_info: DatasetInfo
    identity: str

    def __call__(self, image: np.ndarray) -> PanopticPrediction:
        """Predicts one image, uint8 [H, W, 3] RGB."""


def make_prediction(panoptic: np.ndarray, scores: Mapping[int, float], dataset_info: DatasetInfo) -> PanopticPrediction:
    """Makes a prediction from a map and scores.

    Args:
        panoptic: int32 [H, W], panoptic map.
        scores: Panoptic value -> score; segments without one get 0.
        dataset_info: The meaning of the map.

    Raises:
        UserError: If the map holds an unknown class.
    """
    segments = []
    for described in segments_info(panoptic, dataset_info, scores=scores):
        x, y, width, height = described["bbox"]
        category = dataset_info.categories[dataset_info.class_of_category_id[described["category_id"]]]
        segments.append(
            Segment(
                id=described["id"],
                category_id=category.id,
                category_name=category.name,
                is_thing=category.is_thing,
                # Scores that round to zero are left out of the entry.
                score=described.get("score", 0.0),
                area=described["area"],
                bbox=(y, x, y + height, x + width),
            )
        )
    return PanopticPrediction(panoptic, tuple(segments), dataset_info)


def require_classes(classes: Sequence[str], dataset_info: DatasetInfo) -> None:
    """Raises `UserError`, which lists the known ones, unless all names are those of classes."""
    known = [category.name for category in dataset_info.categories]
    for name in classes:
        if name not in known:
            raise unknown_name("class", name, known)
