"""Submissions to the benchmark servers of COCO and Cityscapes, also for images without labels.

Both servers take panoptic segmentations in the COCO panoptic format, with different ids. Cityscapes has two more
benchmarks, whose files are made from the same predictions: class maps and instance masks.
"""

import abc
import dataclasses
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np

from deeplab2_like.data import known_datasets
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import write_png
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.evaluation.coco_format import CocoPanopticWriter
from deeplab2_like.files import cannot_write, image_id_of_name, read_json, write_atomically
from deeplab2_like.temporary import remove_leftovers

# Name -> label id of the classes that Cityscapes evaluates.
CITYSCAPES_LABEL_IDS = {category.name: category.id for category in known_datasets.CITYSCAPES}
CITYSCAPES_UNLABELED = 0

# City, number of the sequence and number of the frame, by which the server finds the prediction of an image.
_CITYSCAPES_NAME = re.compile(r"([^_\s]+_\d{6}_\d{6})([_.].*)?")


class Instances(NamedTuple):
    """The instances of an image; their masks may overlap.

    Attributes:
        masks: bool [N, H, W], or an iterable that yields N masks [H, W] one by one.
        classes: int [N], class ids (contiguous).
        scores: float [N]. Rows with score 0 are unused.
    """

    masks: Iterable[np.ndarray]
    classes: Sequence[int] | np.ndarray
    scores: Sequence[float] | np.ndarray


class Submission(abc.ABC):
    """Writes predictions for a server: the files of an image on `add`, and the JSON, which completes them, on `close`.

    A context manager that closes itself, unless an error ends the block: then it writes no JSON.

    Attributes:
        output_dir: The folder of all files.
        dataset_info: The meaning of the maps, with the category ids of the server.
    """

    # Names of the folders that a benchmark adds to the output folder.
    _more_outputs: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        dataset_info: DatasetInfo,
        *,
        image_ids: Mapping[str, int | str] | None = None,
        stem: str = "panoptic",
    ) -> None:
        """Creates the folder and removes the JSON of an earlier run, as it does not describe the files of this one.

        Args:
            output_dir: The folder; it is created if missing.
            dataset_info: The meaning of the maps.
            image_ids: File name -> id, see `read_image_ids`; by default the ids are derived from the names.
            stem: Name of the panoptic JSON without its suffix, and of the folder of its PNG files.

        Raises:
            UserError: If the data set does not match the benchmark, the folder holds other files under these names, or
                cannot be written.
        """
        self.output_dir = Path(output_dir)
        self.dataset_info = dataset_info
        self._image_ids = image_ids
        self._panoptic = CocoPanopticWriter(output_dir, dataset_info, name=stem)
        self._name_of_image_id: dict[int | str, str] = {}
        self._panoptic.start(more_outputs=self._more_outputs)

    def add(
        self,
        image_name: str,
        panoptic: np.ndarray,
        scores: Mapping[int, float],
        instances: Instances | None = None,
        semantic: np.ndarray | None = None,
    ) -> None:
        """Writes the files of an image.

        Args:
            image_name: The image's file name, with or without folders.
            panoptic: int32 [H, W], panoptic map.
            scores: Panoptic value -> score, for the segments that have one.
            instances: Instances for the benchmarks that take them; by default the thing segments.
            semantic: int32 [H, W], class ids, for the benchmarks of semantic segmentation. Pixels with the ignore label
                take the class of the panoptic map, and by default all do.

        Raises:
            UserError: If the image has no id on the server or the same id as an earlier one, the map or an instance
                does not match the data set, or a file cannot be written.
        """
        image_id = self._image_id(image_name)
        self._check_new(image_id, image_name, self._name_of_image_id)  # Before any file is written.
        self._panoptic.add(image_id, image_name, panoptic, scores, png_name=self._png_name(image_name))
        self._name_of_image_id[image_id] = image_name

    def check_names(self, image_names: Iterable[str]) -> None:
        """Checks the names of all images before the first one is predicted.

        Raises:
            UserError: If the server has no id for one of them, or the same id for two.
        """
        name_of_id: dict[int | str, str] = {}
        for name in image_names:
            image_id = self._image_id(name)
            self._check_new(image_id, name, name_of_id)
            name_of_id[image_id] = name

    def _check_new(self, image_id: int | str, name: str, name_of_id: Mapping[int | str, str]) -> None:
        if image_id in name_of_id:
            raise UserError(
                f"Images '{name_of_id[image_id]}' and '{name}' have the same id, '{image_id}'; a submission holds each "
                "image once."
            )

    def close(self) -> list[Path]:
        """Writes the JSON, whole or not at all.

        Returns:
            The files and folders to submit.
        """
        return [self._panoptic.close(), self._panoptic.png_dir]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()

    @abc.abstractmethod
    def _image_id(self, image_name: str) -> int | str:
        """Returns the server's id of an image; raises `UserError` if it has none."""

    def _png_name(self, image_name: str) -> str | None:
        """Returns the name of the panoptic PNG; None for the image's name with suffix `.png`."""
        return None


class CocoSubmission(Submission):
    """`OUTPUT_DIR/STEM.json` and `OUTPUT_DIR/STEM/*.png`, with the data set's own category ids.

    COCO's server takes a zip file of the two, with STEM `panoptic_test-dev2017_ALGORITHM_results`.

    The id of an image is looked up in `image_ids`. Without `image_ids` it is the name without folder and suffix, as a
    number where possible.
    """

    def _image_id(self, image_name: str) -> int | str:
        path = PurePosixPath(image_name)
        if self._image_ids is None:
            return image_id_of_name(path.stem)
        # Images in DeepLab2's records are named without folder and suffix.
        for name in (image_name, path.name, f"{path.name}.jpg"):
            if name in self._image_ids:
                return self._image_ids[name]
        raise UserError(
            f"Image '{image_name}' is not among the {len(self._image_ids)} images of the JSON of image ids; give the "
            "JSON that lists the images of this split."
        )


class CityscapesFiles:
    """Writes the files of Cityscapes' pixel-level and instance-level benchmarks.

    * `FOLDER/semantic/ID_pred_labelIds.png`: gray, the label id of each pixel, 0 for void;
    * `FOLDER/instances/ID.txt` with a line `masks/ID_000.png LABEL_ID SCORE` for each instance, and the masks, gray,
      255 inside and 0 outside.

    All class ids are Cityscapes' label ids ("road" is 7), looked up by the names of the classes. So it does not matter
    whether the data set was converted with label ids or with train ids ("road" is 0).

    Attributes:
        categories: The classes of the data set, with Cityscapes' label ids.
        semantic_dir: Folder of the class maps.
        instance_dir: Folder of the instances.

    Args:
        folder: The folder.
        dataset_info: The classes.

    Raises:
        UserError: If a class is none of Cityscapes'.
    """

    def __init__(self, folder: Path, dataset_info: DatasetInfo) -> None:
        unknown = [c.name for c in dataset_info.categories if c.name not in CITYSCAPES_LABEL_IDS]
        if unknown:
            raise UserError(
                f"Class '{unknown[0]}' of data set '{dataset_info.name}' is none of those that Cityscapes evaluates, "
                f"which are found by name: {', '.join(CITYSCAPES_LABEL_IDS)}; name the classes so."
            )
        self.categories = tuple(
            dataclasses.replace(c, id=CITYSCAPES_LABEL_IDS[c.name]) for c in dataset_info.categories
        )
        self.semantic_dir, self.instance_dir = folder / "semantic", folder / "instances"
        # The last entry is for void.
        self._label_ids = np.array([category.id for category in self.categories] + [CITYSCAPES_UNLABELED], np.uint8)

    def write(
        self,
        image_id: str,
        panoptic: np.ndarray,
        scores: Mapping[int, float],
        dataset_info: DatasetInfo,
        *,
        instances: Instances | None = None,
        semantic: np.ndarray | None = None,
    ) -> list[Path]:
        """Writes the files of an image; arguments and errors as for `Submission.add`.

        Args:
            image_id: Begins the names of the files; may contain folders.
            panoptic: int32 [H, W], panoptic map.
            scores: Panoptic value -> score.
            dataset_info: The meaning of the map.
            instances: By default the thing segments.
            semantic: int32 [H, W], class ids.

        Returns:
            The files.
        """
        num_classes = len(self.categories)
        classes = panoptic // dataset_info.label_divisor
        if semantic is not None:
            classes = np.where(semantic == dataset_info.ignore_label, classes, semantic)
        class_file = self.semantic_dir / f"{image_id}_pred_labelIds.png"
        write_png(class_file, self._label_ids[np.minimum(classes, num_classes)])

        # Every image needs this file, also without instances. It refers to the masks, so it is removed before the masks
        # of an earlier run are replaced, and written last.
        list_file = self.instance_dir / f"{image_id}.txt"
        try:
            list_file.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(list_file, error) from error
        rows = _thing_segments(panoptic, scores, dataset_info) if instances is None else zip(*instances, strict=True)
        depth = image_id.count("/")  # The masks are named relative to the text file.
        written = [class_file]
        lines: list[str] = []
        for mask, class_id, score in rows:
            if score <= 0 or not mask.any():
                continue
            if mask.shape != panoptic.shape or not 0 <= class_id < num_classes:
                raise UserError(
                    f"Image '{image_id}', a map of shape {panoptic.shape}, has an instance of class {class_id} with "
                    f"a mask of shape {mask.shape}; masks must have the size of the image, and classes are "
                    f"0..{num_classes - 1}."
                )
            mask_file = f"masks/{image_id}_{len(lines):03d}.png"
            written.append(self.instance_dir / mask_file)
            write_png(written[-1], np.where(mask, 255, 0).astype(np.uint8))
            lines.append(f"{'../' * depth}{mask_file} {self._label_ids[class_id]} {score:.9g}\n")
        write_atomically(list_file, "".join(lines).encode())
        return [*written, list_file]


class CityscapesSubmission(Submission):
    """Files for the three benchmarks of Cityscapes.

    The scripts of Cityscapes search a folder and its subfolders for the one file whose name begins with the image's id,
    CITY_000000_000000. So each benchmark has a folder of its own, and each is submitted as a zip file of its own:
    `OUTPUT_DIR/STEM.json` with `OUTPUT_DIR/STEM/ID.png`, and the folders of `CityscapesFiles`.
    """

    _more_outputs = ("semantic", "instances")

    def __init__(
        self,
        output_dir: str | os.PathLike[str],
        dataset_info: DatasetInfo,
        *,
        image_ids: Mapping[str, int | str] | None = None,
        stem: str = "panoptic",
    ) -> None:
        """See `Submission`; `image_ids` must be None, as the ids are part of the images' names."""
        if image_ids is not None:
            raise UserError("Image ids of Cityscapes are part of the file names; leave out the JSON of image ids.")
        self._files = CityscapesFiles(Path(output_dir), dataset_info)
        super().__init__(output_dir, dataclasses.replace(dataset_info, categories=self._files.categories), stem=stem)
        self.semantic_dir, self.instance_dir = self._files.semantic_dir, self._files.instance_dir
        for folder in (self.semantic_dir, self.instance_dir):
            remove_leftovers(folder, recursive=True)

    def add(
        self,
        image_name: str,
        panoptic: np.ndarray,
        scores: Mapping[int, float],
        instances: Instances | None = None,
        semantic: np.ndarray | None = None,
    ) -> None:
        """See `Submission.add`."""
        super().add(image_name, panoptic, scores)
        image_id = self._image_id(image_name)
        self._files.write(image_id, panoptic, scores, self.dataset_info, instances=instances, semantic=semantic)

    def close(self) -> list[Path]:
        """See `Submission.close`."""
        return [*super().close(), self.semantic_dir, self.instance_dir]

    def _image_id(self, image_name: str) -> str:
        match = _CITYSCAPES_NAME.fullmatch(PurePosixPath(image_name).name)
        if match is None:
            raise UserError(
                f"Image '{image_name}' is not named as in Cityscapes, CITY_000000_000000_leftImg8bit.png, by which the "
                "server finds a prediction; keep the names of the images when you convert them."
            )
        return match.group(1)

    def _png_name(self, image_name: str) -> str:
        return f"{self._image_id(image_name)}.png"


SUBMISSIONS: dict[str, type[Submission]] = {"coco": CocoSubmission, "cityscapes": CityscapesSubmission}


def make_submission(
    name: str,
    output_dir: str | os.PathLike[str],
    dataset_info: DatasetInfo,
    *,
    image_ids: Mapping[str, int | str] | None = None,
    stem: str = "panoptic",
) -> Submission:
    """Creates the submission to a benchmark.

    Args:
        name: A key of `SUBMISSIONS`.
        output_dir: The folder; it is created if missing.
        dataset_info: The meaning of the maps.
        image_ids: File name -> id, see `read_image_ids`; only for COCO.
        stem: Name of the panoptic JSON without its suffix, and of the folder of its PNG files.

    Raises:
        UserError: If the name is unknown, the data set does not match the benchmark, or the folder cannot be created.
    """
    if name not in SUBMISSIONS:
        raise unknown_name("submission", name, SUBMISSIONS)
    return SUBMISSIONS[name](output_dir, dataset_info, image_ids=image_ids, stem=stem)


def read_image_ids(json_file: str | os.PathLike[str]) -> dict[str, int | str]:
    """Reads the ids of images from a JSON in any of COCO's formats, such as `image_info_test-dev2017.json`.

    Returns:
        File name -> id, in the order of the JSON.

    Raises:
        UserError: If the file is missing, is not such a JSON, or lists a file name twice.
    """
    try:
        content = read_json(json_file, "The JSON of image ids")
        names_and_ids = [(str(image["file_name"]), image["id"]) for image in content["images"]]
    except (LookupError, TypeError) as error:
        raise UserError(
            f"'{json_file}' does not list images ({error!r}); give a COCO JSON whose 'images' have 'file_name' and "
            "'id', such as image_info_test-dev2017.json."
        ) from error
    for name, image_id in names_and_ids:
        if not isinstance(image_id, int | str):
            raise UserError(f"'{json_file}' gives image '{name}' the id {image_id!r}; ids are numbers or texts.")
    image_ids = dict(names_and_ids)
    if len(image_ids) < len(names_and_ids):
        names = [name for name, _ in names_and_ids]
        duplicate = next(name for position, name in enumerate(names) if name in names[:position])
        raise UserError(f"'{json_file}' lists image '{duplicate}' twice; file names must differ.")
    return image_ids


def _thing_segments(
    panoptic: np.ndarray, scores: Mapping[int, float], dataset_info: DatasetInfo
) -> Iterator[tuple[Any, ...]]:
    """Yields mask, bool [H, W], class id and score of the thing segments with a score."""
    for value, score in scores.items():
        class_id = int(value) // dataset_info.label_divisor
        if class_id in dataset_info.thing_classes:
            yield panoptic == value, class_id, score
