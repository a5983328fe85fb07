"""Converts a data set in the COCO panoptic format: images, one PNG of segment ids per image, and one JSON.

The JSON says everything about the classes, so any data set in this format converts without further settings.
"""

import contextlib
import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.coco_segments import compare_measures, ids_to_panoptic, keep_matching, parse_segments
from deeplab2_like.data.convert import common, labeled_images
from deeplab2_like.data.convert.coco_json import read_coco_json
from deeplab2_like.data.convert.file_finder import FileFinder
from deeplab2_like.data.convert.losses import CROWD, FAULTY, Losses
from deeplab2_like.data.convert.splits import choose_split
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.faults import Fault
from deeplab2_like.data.images import read_id_png
from deeplab2_like.errors import UserError
from deeplab2_like.parallel import map_in_order
from deeplab2_like.paths import path_inside


@dataclasses.dataclass(frozen=True)
class _Example:
    """One image of the JSON.

    Attributes:
        name: The image's file name, relative to the folder of the images.
        panoptic_name: The PNG's file name, relative to the folder of the PNGs.
        segments: The JSON's `segments_info`, not yet checked.
        fault: A fault that was found in the JSON, or None.
    """

    name: str
    panoptic_name: str = ""
    segments: Any = None
    fault: str | None = None


def convert_coco_panoptic(
    *,
    images: Path,
    panoptic: Path,
    json_file: Path,
    output_dir: Path,
    split: str | None = None,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one split of a COCO panoptic data set.

    Crowd segments become instance 0 of their class, like stuff. Instances are numbered from 1 per class, in the order
    of `segments_info`. PNG id 0 becomes void. The `image_id` of a record is the image's `file_name`.

    Args:
        images: Folder of the images.
        panoptic: Folder of the PNGs.
        json_file: The JSON, with `images`, `annotations` and `categories`.
        output_dir: The record folder; several splits of a data set go to one folder.
        split: The split's name; None: see `splits.choose_split`.
        encoding: See `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A tuple with one report, or with two if images are shared out.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    images, panoptic, json_file, output_dir = Path(images), Path(panoptic), Path(json_file), Path(output_dir)
    common.require_folder(images, "image folder")
    common.require_folder(panoptic, "folder of panoptic PNGs")
    content = _read_json(json_file, encoding)
    source = [json_file, images, panoptic]
    split, notes = choose_split(
        split, json_file, output_dir=output_dir, source=source, val_share=options.get("val_share")
    )
    image_finder, png_finder = FileFinder(images), FileFinder(panoptic)
    examples = _find_files(_list_examples(content), image_finder, png_finder)

    def load(example: _Example, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        if example.fault is not None:
            raise UserError(example.fault)
        image = files.read_file(path_inside(images, example.name), "the image")
        png = path_inside(panoptic, example.panoptic_name)
        segments = parse_segments(example.segments, info, fault=losses.skip_faulty)
        ids = read_id_png(png)
        for segment in segments:
            if segment.is_crowd and info.categories[segment.class_id].is_thing:
                losses.add(CROWD, info.categories[segment.class_id].name, objects=1)
        with losses.skip_faulty():
            return image, ids_to_panoptic(ids, segments, info, png=f"'{png}'")
        matching, segments = keep_matching(ids, segments)
        losses.add(FAULTY, "ids that are not listed", pixels=int((matching != ids).sum()))
        return image, ids_to_panoptic(matching, segments, info, png=f"'{png}'")

    return labeled_images.write_labeled_images(
        {split: examples},
        load,
        inputs_of=lambda example: [images / example.name, panoptic / example.panoptic_name],
        source=source,
        info=DatasetInfo.from_coco_categories(content["categories"], name=json_file.stem),
        output_dir=output_dir,
        max_instances=_max_instances(content["annotations"]),
        notes=[*notes, *image_finder.notes(), *png_finder.notes()],
        **options,
    )


def _find_files(examples: list[_Example], images: FileFinder, panoptic: FileFinder) -> list[_Example]:
    """Replaces the paths of the JSON by those in the two folders; a path that leads out of them becomes a fault."""
    found = []
    for example in examples:
        name, panoptic_name, fault = example.name, example.panoptic_name, example.fault
        try:
            name = images.find(name)
            panoptic_name = panoptic.find(panoptic_name) if panoptic_name else ""
        except UserError as error:
            fault = fault or str(error)
        found.append(_Example(name, panoptic_name, example.segments, fault))
    return found


def check_segments(
    *,
    panoptic: Path,
    json_file: Path,
    encoding: str | None = None,
    workers: int = 1,
    progress: common.Progress | None = None,
) -> list[Fault]:
    """Compares the areas and boxes in the JSON with the PNGs; ignores PNGs that cannot be read.

    Args:
        panoptic: Folder of the PNGs.
        json_file: The JSON.
        encoding: See `files.read_text`.
        workers: Number of PNGs read at once.
        progress: Called after each PNG with the number of PNGs done and the total.

    Returns:
        A fault for each difference.
    """
    listed = [example for example in _list_examples(_read_json(Path(json_file), encoding)) if example.fault is None]
    finder = FileFinder(Path(panoptic))
    examples = []
    for example in listed:
        with contextlib.suppress(UserError):
            examples.append(dataclasses.replace(example, panoptic_name=finder.find(example.panoptic_name)))

    def check(example: _Example) -> list[Fault]:
        try:
            ids = read_id_png(path_inside(Path(panoptic), example.panoptic_name))
        except UserError:
            return []
        kind, where = "segment differs from JSON", f"'{example.panoptic_name}' of '{json_file}'"
        return [Fault(kind, where, text) for text in compare_measures(ids, example.segments)]

    faults: list[Fault] = []
    for done, found in enumerate(map_in_order(check, examples, workers=workers), start=1):
        faults += found
        if progress is not None:
            progress(done, len(examples))
    return faults


def require_same_categories(json_files: Sequence[Path], *, encoding: str | None = None) -> None:
    """Raises `UserError` unless the JSONs of several splits list the same categories, in any order."""
    found = [
        DatasetInfo.from_coco_categories(_read_json(path, encoding)["categories"], name=path.stem).categories
        for path in json_files
    ]
    for path, categories in zip(json_files, found, strict=True):
        by_id = {category.id: (category.name, category.is_thing) for category in categories}
        if by_id != {category.id: (category.name, category.is_thing) for category in found[0]}:
            raise UserError(
                f"'{path}' has other categories than '{json_files[0]}', so the two cannot be in one record folder; "
                "make both JSONs again from the same list of categories."
            )


def _read_json(path: Path, encoding: str | None) -> dict[str, Any]:
    """Reads the JSON and checks that it has annotations."""
    content = read_coco_json(path, "panoptic", encoding=encoding)
    if not content["annotations"]:
        raise UserError(f"'{path}' has no annotations, so there is nothing to convert; give a JSON with labels.")
    return content


def _max_instances(annotations: list[dict[str, Any]]) -> int:
    """Returns the largest number of segments of a class in any image; an upper bound, as it counts stuff and crowds."""
    largest = 0
    for annotation in annotations:
        segments = annotation.get("segments_info")
        if isinstance(segments, list):
            classes = Counter(str(segment.get("category_id")) for segment in segments if isinstance(segment, dict))
            largest = max(largest, *classes.values(), 0)
    return largest


def _list_examples(content: Mapping[str, Any]) -> list[_Example]:
    """Joins images and annotations, in the order of the annotations; inconsistencies become faults of the examples."""
    file_names: dict[Hashable, str] = {}
    repeated: set[Hashable] = set()
    examples = []
    for position, image in enumerate(content["images"]):
        image_id, name = image.get("id"), image.get("file_name")
        if not isinstance(image_id, (int, str)) or not isinstance(name, str):
            fault = f"entry {position} of 'images' lacks 'id' or 'file_name'; add it."
            examples.append(_Example(str(name or image_id), fault=fault))
        elif image_id in file_names:
            repeated.add(image_id)
        else:
            file_names[image_id] = name

    seen: set[Hashable] = set()
    for position, annotation in enumerate(content["annotations"]):
        image_id, panoptic_name = annotation.get("image_id"), annotation.get("file_name")
        entry = f"entry {position} of 'annotations'"
        if not isinstance(image_id, (int, str)) or not isinstance(panoptic_name, str):
            example = _Example(
                str(panoptic_name or image_id), fault=f"{entry} lacks 'image_id' or 'file_name' (of the PNG); add it."
            )
        elif image_id not in file_names:
            fault = f"{entry} has image_id {image_id!r}, which 'images' does not list; add it there."
            example = _Example(panoptic_name, fault=fault)
        elif image_id in repeated:
            fault = f"id {image_id!r} is in 'images' more than once; ids must differ: correct the JSON."
            example = _Example(file_names[image_id], fault=fault)
        elif image_id in seen:
            fault = (
                f"{entry} is a second annotation of image_id {image_id!r}; an image must have one: remove the other."
            )
            example = _Example(file_names[image_id], fault=fault)
        else:
            example = _Example(file_names[image_id], panoptic_name, annotation.get("segments_info"))
        if isinstance(image_id, (int, str)):
            seen.add(image_id)
        examples.append(example)
    for image_id, name in file_names.items():
        if image_id not in seen:
            fault = f"'annotations' has no entry for image_id {image_id!r}; add it, or remove the image from 'images'."
            examples.append(_Example(name, fault=fault))
    return examples
