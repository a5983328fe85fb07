"""The files that `predict` writes for an image, by format.

To add a format, write a class like those below and add it to `FORMATS`.
"""

import abc
import csv
import io
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

import cv2
import numpy as np

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import write_png
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.evaluation.coco_format import panoptic_to_ids
from deeplab2_like.evaluation.submission import CityscapesFiles
from deeplab2_like.export.journal import Journal
from deeplab2_like.export.outlines import find_outlines
from deeplab2_like.export.prediction import PanopticPrediction, Segment
from deeplab2_like.files import cannot_write, image_ids_of_names, write_atomically
from deeplab2_like.temporary import TemporaryFile

# The value of TIFF's tag Compression that every reader knows without more packages.
_DEFLATE = 8


class PredictionFormat(abc.ABC):
    """Writes the files of one format.

    Attributes:
        outputs: Names of the files and folders in the output folder.
        output_dir: The output folder.
        dataset_info: The classes of the predictions.

    Args:
        output_dir: The output folder.
        dataset_info: The classes of the predictions.

    Raises:
        UserError: If the format cannot hold these classes.
    """

    outputs: ClassVar[tuple[str, ...]]

    def __init__(self, output_dir: Path, dataset_info: DatasetInfo) -> None:
        self.output_dir = output_dir
        self.dataset_info = dataset_info

    @abc.abstractmethod
    def write(self, name: str, prediction: PanopticPrediction) -> list[str]:
        """Writes the files of an image, each whole or not at all.

        Args:
            name: The image's name, with `/` between folders and without suffix.
            prediction: Its prediction.

        Returns:
            The files, relative to the output folder.

        Raises:
            UserError: If a file cannot be written.
        """

    def finish(self, journal: Journal, names: Sequence[str]) -> None:  # noqa: B027 - most formats have nothing to do
        """Writes what describes all images, which `names` lists, after the last one."""


class CocoFormat(PredictionFormat):
    """COCO panoptic format: `panoptic.json` and `panoptic/NAME.png`."""

    outputs = ("panoptic.json", "panoptic")

    def write(self, name: str, prediction: PanopticPrediction) -> list[str]:
        """See `PredictionFormat.write`."""
        ids = panoptic_to_ids(prediction.panoptic, prediction.dataset_info)
        write_png(self.output_dir / "panoptic" / f"{name}.png", ids_to_rgb(ids))
        return [f"panoptic/{name}.png"]

    def finish(self, journal: Journal, names: Sequence[str]) -> None:
        """Writes the JSON piece by piece, so that memory does not grow with the number of images."""
        image_ids = image_ids_of_names(names)

        def images() -> Iterator[dict[str, Any]]:
            for image_id, entry in zip(image_ids, journal.read(names), strict=True):
                size = {"height": entry.height, "width": entry.width}
                yield {"id": image_id, "file_name": entry.file_name, **size}

        def annotations() -> Iterator[dict[str, Any]]:
            for image_id, entry in zip(image_ids, journal.read(names), strict=True):
                yield {"image_id": image_id, "file_name": f"{entry.name}.png", "segments_info": entry.segments}

        file = self.output_dir / "panoptic.json"
        try:
            with TemporaryFile(file) as temporary:
                for start, items in (('{"images": [', images()), ('], "annotations": [', annotations())):
                    temporary.file.write(start.encode())
                    for position, item in enumerate(items):
                        temporary.file.write((", " * (position > 0) + json.dumps(item)).encode())
                categories = json.dumps(self.dataset_info.to_coco_categories())
                temporary.file.write(f'], "categories": {categories}}}\n'.encode())
                temporary.publish()
        except OSError as error:
            raise cannot_write(file, error) from error


class LabelsTiffFormat(PredictionFormat):
    """Instance maps: `labels/NAME.tif`, and `labels/NAME.csv` with the class of each label.

    The TIFF, uint16 or, with more than 65,535 objects, uint32 [H, W], holds 0 for stuff and void, and 1, 2, ... for the
    objects of all thing classes. napari and Cellpose read it.
    """

    outputs = ("labels",)

    def write(self, name: str, prediction: PanopticPrediction) -> list[str]:
        """See `PredictionFormat.write`."""
        things = [segment for segment in prediction.segments if segment.is_thing]
        dtype = np.uint16 if len(things) < 2**16 else np.uint32
        # Ascending, as `segments` is; the first one stands for all other pixels.
        ids = np.array([-1, *(segment.id - 1 for segment in things)], np.int64)
        position = np.searchsorted(ids, prediction.panoptic)  # [H, W]
        position[position == ids.size] = 0
        labels = np.where(ids[position] == prediction.panoptic, position, 0).astype(dtype)
        _, content = cv2.imencode(".tif", labels, [cv2.IMWRITE_TIFF_COMPRESSION, _DEFLATE])
        table = io.StringIO(newline="")
        writer = csv.writer(table, lineterminator="\n")
        writer.writerow(["label", "class", "score", "area", "y_min", "x_min", "y_max", "x_max"])
        for label, segment in enumerate(things, start=1):
            writer.writerow([label, segment.category_name, f"{segment.score:.6g}", segment.area, *segment.bbox])
        write_atomically(self.output_dir / "labels" / f"{name}.tif", content.tobytes())
        write_atomically(self.output_dir / "labels" / f"{name}.csv", table.getvalue().encode())
        return [f"labels/{name}.tif", f"labels/{name}.csv"]


class GeoJsonFormat(PredictionFormat):
    """Polygons for QuPath: `geojson/NAME.geojson`, one feature per segment.

    Coordinates are x, y in pixels of the image, along the edges of pixels. A segment of several parts is a
    MultiPolygon. QuPath shows things as detections and stuff as annotations.
    """

    outputs = ("geojson",)

    def write(self, name: str, prediction: PanopticPrediction) -> list[str]:
        """See `PredictionFormat.write`."""
        color_of = {category.name: list(category.color) for category in self.dataset_info.categories}
        features = [json.dumps(_feature(prediction, segment, color_of)) for segment in prediction.segments]
        content = '{"type": "FeatureCollection", "features": [\n' + ",\n".join(features) + "\n]}\n"
        write_atomically(self.output_dir / "geojson" / f"{name}.geojson", content.encode())
        return [f"geojson/{name}.geojson"]


class CityscapesFormat(PredictionFormat):
    """Files for Cityscapes' scripts: `cityscapes/semantic/` and `cityscapes/instances/`, see `CityscapesFiles`.

    The names are those of the images without the ending `_leftImg8bit`.
    """

    outputs = ("cityscapes",)

    def __init__(self, output_dir: Path, dataset_info: DatasetInfo) -> None:
        super().__init__(output_dir, dataset_info)
        self._files = CityscapesFiles(output_dir / "cityscapes", dataset_info)

    def write(self, name: str, prediction: PanopticPrediction) -> list[str]:
        """See `PredictionFormat.write`."""
        name = name.removesuffix("_leftImg8bit")
        written = self._files.write(name, prediction.panoptic, prediction.scores, prediction.dataset_info)
        return [path.relative_to(self.output_dir).as_posix() for path in written]


FORMATS: dict[str, type[PredictionFormat]] = {
    "coco": CocoFormat,
    "labels-tiff": LabelsTiffFormat,
    "geojson": GeoJsonFormat,
    "cityscapes": CityscapesFormat,
}


def make_formats(names: Sequence[str], output_dir: str | os.PathLike[str], info: DatasetInfo) -> list[PredictionFormat]:
    """Makes the writers of formats.

    Args:
        names: Keys of `FORMATS`.
        output_dir: The output folder.
        info: The classes of the predictions.

    Raises:
        UserError: If a name is unknown, or a format cannot hold these classes.
    """
    check_formats(names)
    return [FORMATS[name](Path(output_dir), info) for name in dict.fromkeys(names)]


def check_formats(names: Sequence[str]) -> None:
    """Raises `UserError`, which lists the known ones, unless there are names and all are keys of `FORMATS`."""
    if not names:
        raise UserError(f"No format is given; give some of {', '.join(FORMATS)}.")
    for name in names:
        if name not in FORMATS:
            raise unknown_name("format", name, FORMATS)


def _feature(prediction: PanopticPrediction, segment: Segment, color_of: dict[str, list[int]]) -> dict[str, Any]:
    """Describes a segment as a GeoJSON feature as QuPath reads it."""
    y_min, x_min, y_max, x_max = segment.bbox
    mask = prediction.panoptic[y_min:y_max, x_min:x_max] == segment.id - 1
    polygons = [[[[x + x_min, y + y_min] for x, y in ring] for ring in polygon] for polygon in find_outlines(mask)]
    is_single = len(polygons) == 1
    classification = {"name": segment.category_name, "color": color_of[segment.category_name]}
    return {
        "type": "Feature",
        "geometry": {
            "type": "Polygon" if is_single else "MultiPolygon",
            "coordinates": polygons[0] if is_single else polygons,
        },
        "properties": {
            "objectType": "detection" if segment.is_thing else "annotation",
            "classification": classification,
            "measurements": {"Score": segment.score},
        },
    }
