"""The COCO panoptic file format: one PNG of segment ids per image and one JSON for all.

A PNG holds `id = R + 256 G + 65536 B`, 0 for void. The ids that this module writes are **the panoptic value + 1**: they
are unique, never 0 (class 0 without an instance has panoptic value 0), and give the panoptic value back. They fit 24
bits because void, which is written as 0, is the largest class. Category ids in the JSON are the data set's own.
"""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any

import numpy as np

from deeplab2_like.data.coco_segments import Segment, ids_to_panoptic, parse_segments
from deeplab2_like.data.convert.coco_json import number_or_text
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import read_id_png, write_png
from deeplab2_like.data.label_runs import list_segments
from deeplab2_like.data.panoptic_label import classes_of_values, ids_to_rgb
from deeplab2_like.errors import UserError
from deeplab2_like.files import read_json, require_local, reserve_outputs, write_atomically
from deeplab2_like.paths import path_inside
from deeplab2_like.temporary import remove_leftovers


def segments_info(
    panoptic: np.ndarray,
    dataset_info: DatasetInfo,
    *,
    scores: Mapping[int, float] | None = None,
    ground_truth: bool = False,
) -> list[dict[str, Any]]:
    """Describes a panoptic map as the `segments_info` of a COCO panoptic annotation.

    Args:
        panoptic: int32 [H, W], panoptic map.
        dataset_info: The meaning of the map.
        scores: Panoptic value -> score, for the segments that have one.
        ground_truth: Whether instance 0 of a thing class is a crowd; predictions have none.

    Returns:
        One mapping per segment: `id`, `category_id`, `iscrowd`, `area`, `bbox` [x, y, width, height] and, if given,
        `score`.

    Raises:
        UserError: If the map holds an unknown class.
    """
    table = list_segments(panoptic)
    classes = classes_of_values(table.values, dataset_info, name="panoptic")
    segments = []
    for value, class_id, area, box in zip(
        table.values.tolist(), classes.tolist(), table.areas.tolist(), table.boxes.tolist(), strict=True
    ):
        if class_id < 0:
            continue
        category = dataset_info.categories[class_id]
        crowd = ground_truth and category.is_thing and value % dataset_info.label_divisor == 0
        y_min, x_min, y_max, x_max = box
        segment: dict[str, Any] = {
            "id": value + 1,
            "category_id": category.id,
            "iscrowd": int(crowd),
            "area": area,
            "bbox": [x_min, y_min, x_max - x_min, y_max - y_min],
        }
        if scores and value in scores:
            segment["score"] = float(scores[value])
        segments.append(segment)
    return segments


def panoptic_to_ids(panoptic: np.ndarray, dataset_info: DatasetInfo) -> np.ndarray:
    """Converts a panoptic map, int32 [H, W], to the ids of its PNG, int32 [H, W]: value + 1, and 0 for void."""
    return np.where(panoptic >= dataset_info.void, 0, panoptic + 1).astype(np.int32)


class CocoPanopticWriter:
    """Writes panoptic maps one by one: `OUTPUT_DIR/NAME/*.png` on `add`, `OUTPUT_DIR/NAME.json` on `close`.

    A context manager that closes itself, unless an error ends the block: then it writes no JSON.
    """

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        dataset_info: DatasetInfo,
        *,
        name: str = "panoptic",
        ground_truth: bool = False,
    ) -> None:
        """Creates a writer.

        Args:
            output_dir: The folder; it is created if missing.
            dataset_info: The meaning of the maps.
            name: Name of the JSON file and of the PNG folder.
            ground_truth: Whether to write instance 0 of a thing class as a crowd region.
        """
        self.json_file = Path(output_dir) / f"{name}.json"
        self.png_dir = Path(output_dir) / name
        self.dataset_info = dataset_info
        self.ground_truth = ground_truth
        self._images: list[dict[str, Any]] = []
        self._annotations: list[dict[str, Any]] = []
        self._image_of_png: dict[str, int | str] = {}

    def start(self, *, more_outputs: Sequence[str] = ()) -> None:
        """Makes the output folder, and removes the JSON of an earlier run and leftovers of killed runs.

        The JSON of an earlier run would describe other PNG files should this run end early.

        Args:
            more_outputs: Names of other files and folders that this run writes in the output folder.

        Raises:
            UserError: If files there are not from an earlier run, see `files.reserve_outputs`, or the folder cannot be
                written.
        """
        reserve_outputs(self.json_file.parent, [self.json_file.name, self.png_dir.name, *more_outputs])
        remove_leftovers(self.png_dir, recursive=True)
        self.json_file.unlink(missing_ok=True)

    def add(
        self,
        image_id: int | str,
        file_name: str,
        panoptic: np.ndarray,
        scores: Mapping[int, float] | None = None,
        png_name: str | None = None,
    ) -> None:
        """Writes the PNG of an image.

        Args:
            image_id: The data set's id of the image (COCO's are ints; a submission must have exactly these).
            file_name: The image's file name, with or without folders; the PNG has the same name with suffix `.png`.
            panoptic: int32 [H, W], panoptic map.
            scores: Panoptic value -> score, for the segments that have one.
            png_name: Another name for the PNG, for images whose names differ in their suffixes only.

        Raises:
            UserError: If the name leaves the folder or was used before, the map has an unknown class, or the file
                cannot be written.
        """
        image_id = image_id.item() if isinstance(image_id, np.generic) else image_id  # JSON takes no NumPy numbers.
        png_name = png_name or str(PurePosixPath(file_name).with_suffix(".png"))
        if PurePosixPath(png_name).is_absolute() or ".." in PurePosixPath(png_name).parts:
            raise UserError(
                f"Image file name '{file_name}' leaves the output folder; give a relative name without '..'."
            )
        if png_name in self._image_of_png:
            raise UserError(
                f"Images '{self._image_of_png[png_name]}' and '{image_id}' would both be written to '{png_name}'; file "
                "names must differ in more than their endings."
            )
        panoptic = np.asarray(panoptic)
        segments = segments_info(panoptic, self.dataset_info, scores=scores, ground_truth=self.ground_truth)
        write_png(self.png_dir / png_name, ids_to_rgb(panoptic_to_ids(panoptic, self.dataset_info)))
        # After the PNG, so that the JSON lists no image whose PNG could not be written.
        height, width = panoptic.shape
        self._image_of_png[png_name] = image_id
        self._images.append({"id": image_id, "file_name": file_name, "height": height, "width": width})
        self._annotations.append({"image_id": image_id, "file_name": png_name, "segments_info": segments})

    def close(self) -> Path:
        """Writes the JSON, whole or not at all, and returns its path."""
        content = {
            "images": self._images,
            "annotations": self._annotations,
            "categories": self.dataset_info.to_coco_categories(),
        }
        write_atomically(self.json_file, (json.dumps(content) + "\n").encode())
        return self.json_file

    def __enter__(self) -> "CocoPanopticWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()


class CocoPanopticReader:
    """Reads panoptic maps from COCO panoptic files, image by image.

    Attributes:
        dataset_info: The meaning of the maps; by default from the JSON's categories.
        annotations: Image id -> annotation, in the order of the JSON.
    """

    def __init__(
        self,
        json_file: str | os.PathLike[str],
        png_dir: str | os.PathLike[str],
        *,
        dataset_info: DatasetInfo | None = None,
        label_divisor: int = 1000,
    ) -> None:
        """Reads the JSON.

        Args:
            json_file: COCO panoptic JSON.
            png_dir: Folder with the PNG files that it names.
            dataset_info: The meaning of the maps. The JSON then needs no categories, but those that it has must agree.
            label_divisor: Label divisor if the categories come from the JSON; above the number of instances of a class
                in any image.

        Raises:
            UserError: If a file or folder is missing or damaged, or an image is annotated twice.
        """
        for path in (json_file, png_dir):
            require_local(path)
        self.json_file, self.png_dir = Path(json_file), Path(png_dir)
        if not self.json_file.is_file():
            raise UserError(f"COCO panoptic JSON '{json_file}' does not exist.")
        if not self.png_dir.is_dir():
            raise UserError(f"Folder '{png_dir}' with the PNG files of '{json_file}' does not exist.")
        content = read_json(self.json_file)
        required = ("annotations",) if dataset_info else ("annotations", "categories")
        missing = [key for key in required if not isinstance(content, dict) or not isinstance(content.get(key), list)]
        if missing:
            raise UserError(f"'{json_file}' has no '{missing[0]}'; give a COCO panoptic JSON.")
        self.dataset_info = dataset_info or DatasetInfo.from_coco_categories(
            content["categories"], name=self.json_file.stem, label_divisor=label_divisor
        )
        if dataset_info is not None:
            self._check_categories(content.get("categories"))
        self.annotations: dict[int | str, Mapping[str, Any]] = {}
        for position, annotation in enumerate(content["annotations"]):
            if isinstance(annotation, dict) and "image_id" in annotation:
                annotation["image_id"] = number_or_text(annotation["image_id"])
            for key, kind in (("image_id", (int, str)), ("file_name", str), ("segments_info", list)):
                if not isinstance(annotation, dict) or not isinstance(annotation.get(key), kind):
                    raise UserError(
                        f"'{json_file}': entry {position} of 'annotations' lacks '{key}'; give a COCO panoptic JSON."
                    )
            if annotation["image_id"] in self.annotations:
                raise UserError(f"'{json_file}' annotates image {annotation['image_id']} twice.")
            self.annotations[annotation["image_id"]] = annotation

    def _check_categories(self, categories: Any) -> None:
        """Raises `UserError` if a category of the JSON has another name or kind than in the data set."""
        info = self.dataset_info
        kinds = {True: "thing", False: "stuff"}
        for category in categories if isinstance(categories, list) else ():
            category_id = category.get("id") if isinstance(category, dict) else None
            if not isinstance(category_id, (int, float)) or category_id not in info.class_of_category_id:
                continue
            known = info.categories[info.class_of_category_id[int(category_id)]]
            name, is_thing = category.get("name", known.name), bool(category.get("isthing", known.is_thing))
            if (name, is_thing) != (known.name, known.is_thing):
                raise UserError(
                    f"'{self.json_file}' says that category {known.id} is '{name}' ({kinds[is_thing]}), but for data "
                    f"set '{info.name}' it is '{known.name}' ({kinds[known.is_thing]}); give predictions with the ids "
                    "of the labels."
                )

    def __len__(self) -> int:
        return len(self.annotations)

    def __iter__(self) -> Iterator[tuple[int | str, np.ndarray]]:
        """Yields image ids and panoptic maps, int32 [H, W]."""
        for image_id in self.annotations:
            yield image_id, self.read(image_id)

    def read(self, image_id: int | str) -> np.ndarray:
        """Reads an image's panoptic map, int32 [H, W]; see `ids_to_panoptic`, which merges crowds."""
        ids, segments = self.read_segments(image_id)
        with self._errors_with_name(image_id):
            return ids_to_panoptic(ids, segments, self.dataset_info, png=f"'{self._png_file(image_id)}'")

    def read_segments(self, image_id: int | str) -> tuple[np.ndarray, list[Segment]]:
        """Reads an image's segment ids, int32 [H, W], and their meaning, for `PanopticQuality.update_from_segments`.

        Unlike `read` this keeps several crowd or stuff segments of one class apart, as panopticapi does. Several
        threads may call it.

        Raises:
            UserError: If the image has no annotation, its PNG is missing or damaged, or its segments are wrong.
        """
        if image_id not in self.annotations:
            raise UserError(f"'{self.json_file}' has no annotation of image '{image_id}'.")
        with self._errors_with_name(image_id):
            segments = parse_segments(self.annotations[image_id]["segments_info"], self.dataset_info)
            return read_id_png(self._png_file(image_id)), segments

    def _png_file(self, image_id: int | str) -> Path:
        return path_inside(self.png_dir, self.annotations[image_id]["file_name"])

    @contextlib.contextmanager
    def _errors_with_name(self, image_id: int | str) -> Iterator[None]:
        """Adds the image's name to the message of errors."""
        try:
            yield
        except UserError as error:
            raise UserError(f"Image '{image_id}' of '{self.json_file}': {error}") from error
