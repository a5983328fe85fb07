"""Converts masks in the layout of Pascal VOC, whose PNGs hold numbers of classes and of objects as indices."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images
from deeplab2_like.data.convert.class_lists import classes_of_values, read_class_list
from deeplab2_like.data.convert.voc_layout import Labels, convert_voc_layout
from deeplab2_like.data.images import decode_label, read_value_png
from deeplab2_like.data.known_datasets import VOC_NAMES
from deeplab2_like.errors import UserError

# The border in object PNGs of 8 bits; in wider ones it is an object, and the class PNG tells the border.
_BORDER = 255


def convert_voc_masks(
    *,
    root: Path,
    output_dir: Path,
    split: str | None = None,
    images: Path | None = None,
    classes: Path | None = None,
    stuff: Sequence[str] = (),
    background: str = "background",
    void_background: bool = False,
    ignore_subsets: bool = False,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts Pascal VOC, or a data set in its layout, as the splits of its `ImageSets` or as one split.

    The PNGs have a palette or are gray. In `SegmentationClass` 0 is the background and 255 is void. Pixels of a thing
    class with the same number in `SegmentationObject` are one object; those without one are a crowd region.

    Args:
        root: The folder with `SegmentationClass` and `SegmentationObject`, such as `VOCdevkit/VOC2012`.
        output_dir: The record folder.
        split: The split's name; None: see `splits.choose_split`. If `ImageSets/Segmentation` has several lists, only
            this one is converted, or all if it is None.
        images: Folder of the images; None: `JPEGImages` in `root`.
        classes: The class of each value, see `class_lists.read_class_list`; None: the 20 classes of Pascal VOC.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of the background.
        void_background: Whether the background is void instead.
        ignore_subsets: Whether all images belong to one split, whatever `ImageSets` says.
        encoding: Encoding of the lists, see `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    entries: list[dict[str, Any]] = [{"id": number, "name": name} for number, name in enumerate(VOC_NAMES, start=1)]
    notes = ["The classes are the 20 of Pascal VOC; --classes FILE gives others."]
    if classes is not None:
        entries, notes = read_class_list(Path(classes), encoding=encoding), []
    name_of_value, void_values = classes_of_values(entries)
    categories = [entry for entry in entries if name_of_value.get(entry["id"]) is not None]
    if not categories:
        raise UserError(f"The list of classes '{classes}' has no class besides the background and void; add one.")
    other = f"the class '{background}'; --void-background makes it void"
    notes.append(f"The background is {'void' if void_background else other}.")
    labels = Labels(
        categories=categories,
        stuff=stuff,
        background=None if void_background else background,
        read=read_value_png,
        read_objects=_read_objects,
        name_of_value=name_of_value,
        void_values=frozenset(void_values),
        describe="value {}".format,
        classes_file="the list of classes" if classes is None else f"'{classes}'",
        notes=notes,
    )
    return convert_voc_layout(
        root=Path(root),
        images=None if images is None else Path(images),
        output_dir=Path(output_dir),
        split=split,
        labels=labels,
        encoding=encoding,
        ignore_subsets=ignore_subsets,
        options=options,
    )


def _read_objects(path: Path, what: str) -> np.ndarray:
    """Reads an object PNG, int32 [H, W]; 0 is no object."""
    values = read_value_png(path, what)
    if (values == _BORDER).any():
        pixels = decode_label(files.read_file(path, f"the {what}"), f"the {what} '{path}'")
        if pixels.dtype.itemsize == 1:
            values[values == _BORDER] = 0
    return values
