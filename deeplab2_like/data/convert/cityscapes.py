"""Converts Cityscapes as downloaded: `leftImg8bit/SPLIT/CITY/` and `gtFine/SPLIT/CITY/`, or `gtCoarse/`.

Panoptic labels are made from `..._instanceIds.png`, whose values are a label id, or for a single object label id * 1000
+ its number. If `cityscapes_panoptic_SPLIT` exists, which the official tools make, it is used instead; the labels are
the same.
"""

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data import known_datasets
from deeplab2_like.data.coco_segments import Segment, ids_to_panoptic, keep_matching, parse_segments
from deeplab2_like.data.convert import common, labeled_images
from deeplab2_like.data.convert.file_finder import FileFinder
from deeplab2_like.data.convert.losses import NO_CLASS, Losses
from deeplab2_like.data.convert.splits import require_one_split
from deeplab2_like.data.dataset_info import DatasetInfo, whole_number
from deeplab2_like.data.images import read_id_png, read_value_png
from deeplab2_like.errors import UserError
from deeplab2_like.paths import require_inside

_IMAGE_ENDING = "_leftImg8bit.png"
# Label ids are 0 to 33; those that are not a class of the benchmark are void. The license plate's, -1, is in no PNG.
_LAST_LABEL_ID = 33
_INSTANCE_FACTOR = 1000


@dataclasses.dataclass(frozen=True)
class _Example:
    """One image.

    Attributes:
        name: The image's file name.
        image: The image.
        label: The PNG of instance ids, or the panoptic PNG.
        json_info: For a panoptic PNG, the `DatasetInfo` with the category ids of its JSON.
        segments: For a panoptic PNG, its `segments_info`, not yet checked.
        fault: A fault that was found in the JSON, or None.
    """

    name: str
    image: Path
    label: Path
    json_info: DatasetInfo | None = None
    segments: Any = None
    fault: str | None = None


def convert_cityscapes(
    *,
    root: Path,
    output_dir: Path,
    splits: Sequence[str] | None = None,
    coarse: bool = False,
    prepared: bool | None = None,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts splits of Cityscapes, with its 19 classes of which 8 are things.

    Pixels of a thing class without an object number are a group of objects and become a crowd region. Label ids without
    a class become void.

    Args:
        root: The folder with `leftImg8bit` and `gtFine` or `gtCoarse`.
        output_dir: The record folder.
        splits: Names of the splits; None: train and val, or train_extra if `coarse`.
        coarse: Whether to use the labels of `gtCoarse`. The splits of the records are then named `SPLIT_coarse`.
        prepared: Whether to use `cityscapes_panoptic_SPLIT`; None: if it exists.
        encoding: Encoding of the panoptic JSONs, see `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; splits that were converted before stay.
    """
    labels = Path(root) / ("gtCoarse" if coarse else "gtFine")
    info = DatasetInfo("cityscapes", known_datasets.CITYSCAPES)
    splits = splits or (("train_extra",) if coarse else ("train", "val"))
    names = {split: f"{split}_coarse" if coarse else split for split in splits}
    sources = {split: [Path(root) / "leftImg8bit" / split, labels] for split in splits}
    common.require_replaceable(
        Path(output_dir),
        {names[split]: source for split, source in sources.items()},
        replace=options.get("replace", False),
    )
    require_one_split(list(names.values()), options.get("val_share"))
    reports: list[common.ConversionReport] = []
    for split, source in sources.items():
        images = source[0]
        common.require_folder(images, "image folder")
        panoptic = labels / f"cityscapes_panoptic_{split}"
        notes = []
        exists = panoptic.is_dir() and panoptic.with_suffix(".json").is_file()
        if exists and prepared is None:
            notes.append(f"The labels of '{split}' are those of '{panoptic}'; --no-prepared uses the instance ids.")
        if exists if prepared is None else prepared:
            examples = _list_panoptic(images, panoptic, info, encoding)
        else:
            common.require_folder(labels / split, "label folder")
            examples = _list_instance_ids(images, labels / split)
        if not examples:
            raise UserError(
                f"'{images}' has no image CITY/*{_IMAGE_ENDING}, and '{labels / split}' no label; unpack the downloads "
                f"so that the images are in 'leftImg8bit/{split}/CITY'."
            )
        reports += labeled_images.write_labeled_images(
            {names[split]: examples},
            _load,
            inputs_of=lambda example: [example.image, example.label],
            source=source,
            info=info,
            output_dir=Path(output_dir),
            notes=notes,
            **options,
        )
    return tuple(reports)


def _list_instance_ids(images: Path, labels: Path) -> list[_Example]:
    """Lists the examples with an image or a PNG of instance ids, by city and name; a missing file fails later."""
    label_ending = f"_{labels.parent.name}_instanceIds.png"
    stems = {
        path.relative_to(folder).as_posix().removesuffix(ending)
        for folder, ending in ((images, _IMAGE_ENDING), (labels, label_ending))
        for path in folder.glob(f"*/*{ending}")
    }
    return [
        _Example(
            f"{Path(stem).name}{_IMAGE_ENDING}", images / f"{stem}{_IMAGE_ENDING}", labels / f"{stem}{label_ending}"
        )
        for stem in sorted(stems)
    ]


def _list_panoptic(images: Path, panoptic: Path, info: DatasetInfo, encoding: str | None) -> list[_Example]:
    """Lists the examples with an image or an annotation in the official tools' JSON; a missing file fails later.

    The JSON has label ids or train ids, so classes are found by their names.
    """
    json_file = panoptic.with_suffix(".json")
    content = files.read_json(json_file, "the panoptic JSON", encoding=encoding)
    try:
        id_of_name = {category["name"]: whole_number(category["id"]) for category in content["categories"]}
        categories = tuple(dataclasses.replace(c, id=id_of_name[c.name]) for c in info.categories)
        annotations = {str(annotation["image_id"]): annotation for annotation in content["annotations"]}
    except (LookupError, TypeError, ValueError, OverflowError) as error:
        raise UserError(
            f"'{json_file}' is not in the format of Cityscapes' own tools ({error!r}); make it again with "
            "csCreatePanopticImgs, or move it elsewhere, so that the PNGs of instance ids are used."
        ) from error
    json_info = dataclasses.replace(info, categories=categories)
    image_ids = {path.name.removesuffix(_IMAGE_ENDING) for path in images.glob(f"*/*{_IMAGE_ENDING}")}
    examples, finder = [], FileFinder(panoptic)
    for image_id in sorted(image_ids | set(annotations)):
        name = f"{image_id}{_IMAGE_ENDING}"
        annotation = annotations.get(image_id, {})
        png_name = str(annotation.get("file_name", f"{image_id}_{panoptic.parent.name}_panoptic.png"))
        with contextlib.suppress(UserError):  # Raised again below.
            png_name = finder.find(png_name)
        image, png, fault = images / name.partition("_")[0] / name, panoptic / png_name, None
        try:
            require_inside(png, panoptic, png_name)
            if image_id not in image_ids:
                require_inside(image, images, name)
        except UserError as error:
            fault = str(error)
        examples.append(_Example(name, image, png, json_info, annotation.get("segments_info"), fault))
    return examples


def _load(example: _Example, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
    """Reads the content of the image file, and the panoptic map, int32 [H, W]."""
    if example.fault is not None:
        raise UserError(example.fault)
    image = files.read_file(example.image, "the image")
    if example.json_info is not None:
        segments = _segments_of(example, example.json_info, info, losses)
        ids = read_id_png(example.label)
        with losses.skip_faulty():
            return image, ids_to_panoptic(ids, segments, info, png=f"'{example.label}'")
        ids, segments = keep_matching(ids, segments)
        return image, ids_to_panoptic(ids, segments, info, png=f"'{example.label}'")

    def meaning(value: int) -> tuple[int, bool] | labeled_images.Void:
        label_id, is_instance = (value // _INSTANCE_FACTOR, True) if value >= _INSTANCE_FACTOR else (value, False)
        if label_id > _LAST_LABEL_ID:
            raise UserError(
                f"'{example.label}' has the value {value}; it must be a label id, 0 to {_LAST_LABEL_ID}, or such an id "
                f"* {_INSTANCE_FACTOR} + the number of an object."
            )
        class_id = info.class_of_category_id.get(label_id)
        if class_id is None:
            return labeled_images.Void(NO_CLASS, f"label id {label_id}")
        return class_id, is_instance and info.categories[class_id].is_thing

    values = read_value_png(example.label, "PNG of instance ids")
    return image, labeled_images.values_to_panoptic(values, meaning, info, losses)


def _segments_of(example: _Example, json_info: DatasetInfo, info: DatasetInfo, losses: Losses) -> list[Segment]:
    """Reads the segments of a panoptic PNG, with the class ids of the record folder."""
    class_of_name = {category.name: class_id for class_id, category in enumerate(info.categories)}
    return [
        dataclasses.replace(segment, class_id=class_of_name[json_info.categories[segment.class_id].name])
        for segment in parse_segments(example.segments, json_info, fault=losses.skip_faulty)
    ]
