"""Converts a data set in the COCO panoptic format: images, one PNG of segment ids per image, and one JSON.

The JSON says everything about the classes, so any data set in this format converts without further settings.
"""

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from deeplab2_like.data import panoptic_label, tfrecord
from deeplab2_like.data.convert import common
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError

_SPLIT_WORDS = {"train": "train", "training": "train", "val": "val", "validation": "val", "test": "test"}


@dataclasses.dataclass(frozen=True)
class _Example:
    """One image of the JSON.

    Attributes:
        name: The image's file name.
        panoptic_name: The PNG's file name.
        segments: The JSON's `segments_info`, not yet checked.
        fault: What is already known to be wrong with it, or None.
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
    shards: int | None = None,
    workers: int = 1,
    label_divisor: int | None = None,
    on_error: common.OnError = "stop",
    progress: common.Progress | None = None,
) -> common.ConversionReport:
    """Converts one split of a COCO panoptic data set.

    Crowd segments become instance 0 of their class, as stuff does; instances are numbered from 1 per class, in the
    order of `segments_info`; PNG id 0 becomes void. `image_id` of a record is the image's `file_name`.

    Args:
        images: Folder of the images.
        panoptic: Folder of the PNGs.
        json_file: The JSON, with `images`, `annotations` and `categories`.
        output_dir: The record folder; several splits of a data set go to one folder.
        split: The split's name; None: "train", "val" or "test", whichever is in the JSON's file name, else "train".
        shards: Number of files; None: about one per 500 images.
        workers: Images converted at once.
        label_divisor: Factor between class and instance ids; None: the folder's, if it holds records, or else the
            smallest of 1000 and 10000 that fits.
        on_error: "stop" at the first faulty image, or "skip" it and report it.
        progress: Called after each image with the numbers of images done and of all.

    Returns:
        What was written and skipped.

    Raises:
        UserError: If an input is missing or faulty; the output folder is then as it was.
    """
    images, panoptic, json_file, output_dir = Path(images), Path(panoptic), Path(json_file), Path(output_dir)
    common.require_folder(images, "image folder")
    common.require_folder(panoptic, "folder of panoptic PNGs")
    content = _read_json(json_file)
    split = split if split is not None else _guess_split(json_file)
    info = common.agree_on_dataset_info(
        DatasetInfo.from_coco_categories(content["categories"], name=json_file.stem),
        output_dir=output_dir,
        split=split,
        max_instances=_max_instances(content["annotations"]),
        label_divisor=label_divisor,
    )

    def make_record(example: _Example) -> bytes:
        try:
            return _make_record(example, images=images, panoptic=panoptic, info=info)
        except UserError as error:
            raise UserError(f"Image '{example.name}' of '{json_file}': {error}") from error

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
    )


def _read_json(path: Path) -> dict[str, Any]:
    """Reads the JSON and checks that its lists are there, and are lists of objects."""
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise UserError(f"JSON file '{path}' cannot be read ({error.strerror}); check the path.") from error
    except ValueError as error:
        raise UserError(f"'{path}' is not a JSON file ({error}).") from error
    for key in ("images", "annotations", "categories"):
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise UserError(
                f"'{path}' has no list '{key}'; a COCO panoptic JSON has 'images', 'annotations' and 'categories'."
            )
    if not content["annotations"]:
        raise UserError(f"'{path}' has no annotations, so there is nothing to convert; give a JSON with labels.")
    return content


def _guess_split(json_file: Path) -> str:
    """Finds the split's name in a file name such as `panoptic_val2017.json`."""
    words = re.findall("[a-z]+", json_file.stem.lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), "train")


def _max_instances(annotations: list[dict[str, Any]]) -> int:
    """Largest number of segments of one class in any image; counts stuff and crowds too, which is on the safe side."""
    largest = 0
    for annotation in annotations:
        segments = annotation.get("segments_info")
        if isinstance(segments, list):
            classes = Counter(str(segment.get("category_id")) for segment in segments if isinstance(segment, dict))
            largest = max(largest, *classes.values(), 0)
    return largest


def _list_examples(content: Mapping[str, Any]) -> list[_Example]:
    """Joins images and annotations, in the order of the annotations; whatever does not fit becomes a fault."""
    file_names: dict[Hashable, str] = {}
    doubled: set[Hashable] = set()
    examples = []
    for position, image in enumerate(content["images"]):
        image_id, name = image.get("id"), image.get("file_name")
        if not isinstance(image_id, (int, str)) or not isinstance(name, str):
            fault = f"entry {position} of 'images' lacks 'id' or 'file_name'; add it."
            examples.append(_Example(str(name or image_id), fault=fault))
        elif image_id in file_names:
            doubled.add(image_id)
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
            example = _Example(panoptic_name, fault=f"{entry} has image_id {image_id!r}, which 'images' does not list.")
        elif image_id in doubled:
            fault = f"id {image_id!r} is in 'images' more than once; ids must differ."
            example = _Example(file_names[image_id], fault=fault)
        elif image_id in seen:
            fault = f"{entry} is another annotation of image_id {image_id!r}; an image has one."
            example = _Example(file_names[image_id], fault=fault)
        else:
            example = _Example(file_names[image_id], panoptic_name, annotation.get("segments_info"))
        if isinstance(image_id, (int, str)):
            seen.add(image_id)
        examples.append(example)
    for image_id, name in file_names.items():
        if image_id not in seen:
            fault = f"'annotations' has none for image_id {image_id!r}; add it, or remove the image."
            examples.append(_Example(name, fault=fault))
    return examples


def _make_record(example: _Example, *, images: Path, panoptic: Path, info: DatasetInfo) -> bytes:
    """Reads the files of one example and makes its record; every fault is a `UserError`."""
    if example.fault is not None:
        raise UserError(example.fault)
    segment_ids, values = _segment_values(example.segments, info)
    content = _read_file(images / example.name, "image")
    ids = _read_panoptic(panoptic / example.panoptic_name)
    label = _map_ids(ids, segment_ids, values, void=info.void, png=panoptic / example.panoptic_name)
    return tfrecord.serialize_example(image=content, panoptic=label, filename=example.name)


def _segment_values(segments: Any, info: DatasetInfo) -> tuple[np.ndarray, np.ndarray]:
    """Reads `segments_info`.

    Args:
        segments: The list as it is in the JSON.
        info: What the labels mean.

    Returns:
        int64 [S] ids in the PNG, int32 [S] panoptic values.

    Raises:
        UserError: If the list is faulty.
    """
    if not isinstance(segments, list):
        raise UserError("its annotation has no list 'segments_info'; add it, empty if nothing is labelled.")
    ids: list[int] = []
    values: list[int] = []
    instances: Counter[int] = Counter()
    for position, segment in enumerate(segments):
        try:
            segment_id, category_id = int(segment["id"]), int(segment["category_id"])
            is_crowd = bool(segment.get("iscrowd", 0))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"entry {position} of 'segments_info' lacks a whole number 'id' or 'category_id'."
            ) from error
        class_id = info.class_of_category_id.get(category_id)
        if class_id is None:
            raise UserError(f"segment {segment_id} has category_id {category_id}, which 'categories' does not list.")
        if segment_id == 0:
            raise UserError("a segment has id 0, which stands for unlabelled pixels; use another id.")
        instance = 0
        if info.categories[class_id].is_thing and not is_crowd:
            instances[class_id] += 1
            instance = instances[class_id]
        ids.append(segment_id)
        values.append(panoptic_label.encode(class_id, instance, info.label_divisor))
    doubled = [segment_id for segment_id, count in Counter(ids).items() if count > 1]
    if doubled:
        raise UserError(f"'segments_info' lists id {doubled[0]} more than once; ids must differ.")
    return np.array(ids, np.int64), np.array(values, np.int32)


def _read_file(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"the {what} '{path}' cannot be read ({error.strerror}).") from error


def _read_panoptic(path: Path) -> np.ndarray:
    """Reads a PNG of segment ids; int32 [H, W]."""
    content = _read_file(path, "panoptic PNG")
    try:
        rgb = tf.io.decode_png(content, channels=0).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise UserError(f"'{path}' is not a readable PNG, or cut short.") from error
    if rgb.shape[-1] != 3:
        raise UserError(f"'{path}' has {rgb.shape[-1]} channels; a panoptic PNG is RGB, with id = R + 256 G + 65536 B.")
    return panoptic_label.rgb_to_ids(rgb.astype(np.int32))


def _map_ids(ids: np.ndarray, segment_ids: np.ndarray, values: np.ndarray, *, void: int, png: Path) -> np.ndarray:
    """Replaces segment ids by panoptic values.

    Args:
        ids: int32 [H, W], read from `png`; 0 is unlabelled.
        segment_ids: int64 [S], distinct, not 0.
        values: int32 [S].
        void: Value of unlabelled pixels.
        png: For messages.

    Returns:
        int32 [H, W].

    Raises:
        UserError: If an id of the PNG is not in `segment_ids`, or one of these has no pixels.
    """
    table = np.concatenate([[0], segment_ids])
    order = np.argsort(table)
    table = table[order]
    table_values = np.concatenate([[void], values])[order].astype(np.int32)
    # One look-up for all pixels. [H, W], positions in the table
    positions = np.minimum(np.searchsorted(table, ids), len(table) - 1)
    unknown = table[positions] != ids
    if unknown.any():
        raise UserError(
            f"'{png}' has pixels of id {_some(np.unique(ids[unknown]))}, which 'segments_info' does not list."
        )
    present = np.bincount(positions.ravel(), minlength=len(table)) > 0
    absent = table[~present & (table != 0)]
    if absent.size:
        raise UserError(f"'segments_info' lists id {_some(absent)}, of which '{png}' has no pixels.")
    return table_values[positions]


def _some(ids: np.ndarray) -> str:
    """Names the first ids of a list."""
    return ", ".join(str(i) for i in ids[:3]) + (f" and {len(ids) - 3} more" if len(ids) > 3 else "")
