"""Converts labels without instances: a PNG per image with the class of each pixel. All classes become stuff."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images
from deeplab2_like.data.convert.class_lists import VOID_NAMES, read_class_list
from deeplab2_like.data.convert.losses import IGNORED, Losses
from deeplab2_like.data.convert.splits import divide, split_of_folder
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import read_value_png
from deeplab2_like.errors import UserError

# The usual value of void.
_VOID = 255


def convert_semantic_pngs(
    *,
    images: Path,
    labels: Path,
    classes: Path,
    output_dir: Path,
    split: str | None = None,
    ignore: Sequence[int] | None = None,
    label_ending: str = ".png",
    ignore_subsets: bool = False,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one split.

    Args:
        images: Folder of the images, which may have subfolders.
        labels: Folder of the PNGs, in the same subfolders: gray of 8 or 16 bits, or with a palette.
        classes: The class of each value, see `class_lists.read_class_list`.
        output_dir: The record folder.
        split: The split's name; None: see `splits.choose_split`. If the images are in folders of several splits, only
            this one is converted, or all if it is None.
        ignore: Values that become void, also if the class list has them. None: 255, unless the list has it.
        label_ending: Ending of a PNG's name, in place of the image's suffix, such as `_mask.png`.
        ignore_subsets: Whether images in folders such as `train` and `valid` belong to one split all the same.
        encoding: Encoding of the class list, see `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    images, labels, classes = Path(images), Path(labels), Path(classes)
    entries = read_class_list(classes, encoding=encoding)
    ignored, notes = _choose_ignored(entries, ignore)
    categories = [{**entry, "isthing": 0} for entry in entries if entry["id"] not in ignored]
    info = DatasetInfo.from_coco_categories(categories, name=classes.stem)
    name_of_value = {entry["id"]: entry["name"] for entry in entries}

    def load(pair: labeled_images.Pair, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        def meaning(value: int) -> tuple[int, bool] | labeled_images.Void:
            if value in ignored:
                name = name_of_value.get(value)
                return labeled_images.Void(IGNORED, f"value {value}" if name is None else f"value {value}, {name}")
            if value not in info.class_of_category_id:
                raise UserError(
                    f"'{pair.label}' has the value {value}, which '{classes}' does not list; add it there, or to the "
                    "values to ignore."
                )
            return info.class_of_category_id[value], False

        image = files.read_file(pair.image, "the image")
        values = read_value_png(pair.label, "label PNG")
        return image, labeled_images.values_to_panoptic(values, meaning, info, losses)

    pairs = labeled_images.pair_images(images, labels, ending=label_ending)
    division = divide(
        pairs,
        lambda pair: split_of_folder(pair.name),
        split=split,
        ignore_subsets=ignore_subsets,
        where=f"'{images}'",
        paths=[images, labels],
        output_dir=Path(output_dir),
        source=[images, labels],
        val_share=options.get("val_share"),
    )
    return labeled_images.write_labeled_images(
        division.splits,
        load,
        inputs_of=lambda pair: [pair.image, pair.label],
        choices={"ignore": sorted(ignored)},
        source=[images, labels],
        info=info,
        output_dir=Path(output_dir),
        notes=[*notes, *division.notes],
        by_subsets=division.by_subsets,
        **options,
    )


def _choose_ignored(entries: Sequence[Mapping[str, Any]], ignore: Sequence[int] | None) -> tuple[set[int], list[str]]:
    """Returns the values that become void, and sentences for the user on values that are also in the class list."""
    listed = {entry["id"]: entry["name"] for entry in entries}
    if ignore is not None:
        names = [f"{value} '{listed[value]}'" for value in ignore if value in listed]
        return set(ignore), [f"No classes because of --ignore: {', '.join(names)}."] if names else []
    if _VOID not in listed:
        return {_VOID}, []
    name = listed[_VOID]
    if name.strip().casefold() in VOID_NAMES:
        return {_VOID}, [f"The value {_VOID} is void because of its name '{name}'; --ignore without a value keeps it."]
    return set(), [
        f"The value {_VOID} is the class '{name}' of the list, so it is not void; --ignore {_VOID} makes it so."
    ]
