"""Converts a data set in the COCO panoptic format: images, one PNG of segment ids per image, and one JSON.

The JSON says everything about the classes, so any data set in this format converts without further settings.
"""

import dataclasses
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deeplab2_like import files
from deeplab2_like.data.coco_segments import compare_measures, ids_to_panoptic, parse_segments
from deeplab2_like.data.convert import common, labeled_images
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
        name: The image's file name.
        panoptic_name: The PNG's file name.
        segments: The JSON's `segments_info`, not yet checked.
        fault: A fault that was found in the JSON, or None.
    """

    name: str
    panoptic_name: str = ""
    segments: Any = None
    fault: str | None = None


def convert_coco_panoptic(  # noqa: PLR0913 - its arguments are the options of the command
    *,
    images: Path,
    panoptic: Path,
    json_file: Path,
    output_dir: Path,
    split: str | None = None,
    shards: int | None = None,
    workers: int = 1,
    label_divisor: int | None = None,
    max_side: int | None = None,
    on_error: common.OnError = "stop",
    progress: common.Progress | None = None,
    replace: bool = False,
) -> common.ConversionReport:
    """Converts one split of a COCO panoptic data set.

    Crowd segments become instance 0 of their class, like stuff. Instances are numbered from 1 per class, in the order
    of `segments_info`. PNG id 0 becomes void. The `image_id` of a record is the image's `file_name`.

    Args:
        images: Folder of the images.
        panoptic: Folder of the PNGs.
        json_file: The JSON, with `images`, `annotations` and `categories`.
        output_dir: The record folder; several splits of a data set go to one folder.
        split: The split's name; None: taken from the name of the JSON or of its folder, see `common.guess_split`.
        shards: Number of files; None: about one per 500 images.
        workers: Number of images converted at once.
        label_divisor: Factor between class and instance ids; None: that of the records already in the folder, or else
            the smaller of 1000 and 10000 that fits.
        max_side: Downscale images whose longer side has more pixels to this size; None: keep all sizes.
        on_error: "stop" at the first faulty image, or "skip" faulty images and report them.
        progress: Called after each image with the number of images done and the total.
        replace: Whether to replace a split that was made from other files.

    Returns:
        The numbers of written and skipped images, and statistics.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    images, panoptic, json_file, output_dir = Path(images), Path(panoptic), Path(json_file), Path(output_dir)
    common.require_folder(images, "image folder")
    common.require_folder(panoptic, "folder of panoptic PNGs")
    content = _read_json(json_file)
    split = split if split is not None else common.guess_split(json_file)
    info = common.agree_on_dataset_info(
        DatasetInfo.from_coco_categories(content["categories"], name=json_file.stem),
        output_dir=output_dir,
        split=split,
        max_instances=_max_instances(content["annotations"]),
        label_divisor=label_divisor,
    )

    def make_record(example: _Example) -> common.Record:
        try:
            return _make_record(example, images=images, panoptic=panoptic, info=info, max_side=max_side)
        except UserError as error:
            raise common.fault_of_image(example.name, json_file, error) from error

    return common.write_split(
        _list_examples(content),
        make_record,
        info=info,
        output_dir=output_dir,
        split=split,
        shards=shards,
        workers=workers,
        on_error=on_error,
        progress=progress,
        replace=replace,
        source=[json_file, images, panoptic],
        inputs_of=lambda example: [images / example.name, panoptic / example.panoptic_name],
        options={"max_side": max_side},
    )


def check_segments(
    *, panoptic: Path, json_file: Path, workers: int = 1, progress: common.Progress | None = None
) -> list[Fault]:
    """Compares the areas and boxes in the JSON with the PNGs; ignores PNGs that cannot be read.

    Args:
        panoptic: Folder of the PNGs.
        json_file: The JSON.
        workers: Number of PNGs read at once.
        progress: Called after each PNG with the number of PNGs done and the total.

    Returns:
        A fault for each difference.
    """
    examples = [example for example in _list_examples(_read_json(Path(json_file))) if example.fault is None]

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


def require_same_categories(json_files: Sequence[Path]) -> None:
    """Raises `UserError` unless the JSONs of several splits list the same categories."""
    found = [
        DatasetInfo.from_coco_categories(_read_json(path)["categories"], name=path.stem).categories
        for path in json_files
    ]
    for path, categories in zip(json_files, found, strict=True):
        if categories != found[0]:
            raise UserError(
                f"'{path}' has other categories than '{json_files[0]}', so the two cannot be in one record folder; "
                "make both JSONs again from the same list of categories."
            )


def _read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON and checks that its lists exist and consist of objects."""
    content = files.read_json(path)
    for key in ("images", "annotations", "categories"):
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise UserError(
                f"'{path}' has no list '{key}'; a COCO panoptic JSON has 'images', 'annotations' and 'categories'."
            )
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


def _make_record(
    example: _Example, *, images: Path, panoptic: Path, info: DatasetInfo, max_side: int | None
) -> common.Record:
    """Reads the files of one example and makes its record; raises `UserError` if it is faulty."""
    if example.fault is not None:
        raise UserError(example.fault)
    segments = parse_segments(example.segments, info)
    content = files.read_file(path_inside(images, example.name), "the image")
    png = path_inside(panoptic, example.panoptic_name)
    label = ids_to_panoptic(read_id_png(png), segments, info, png=f"'{png}'")
    content = labeled_images.match_label_orientation(content, label.shape, name=example.name)
    if max_side is not None:
        content, label = labeled_images.downscale(content, label, max_side, name=example.name)
    return common.make_labeled_record(image=content, panoptic=label, filename=example.name, info=info)
