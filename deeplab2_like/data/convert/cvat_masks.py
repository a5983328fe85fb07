"""Converts CVAT's export "Segmentation mask": colored PNGs of classes and of objects, in the layout of Pascal VOC."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images
from deeplab2_like.data.convert.voc_layout import Labels, convert_voc_layout
from deeplab2_like.data.images import read_color_png
from deeplab2_like.errors import UserError

# CVAT adds a class of this name for pixels without a shape.
_BACKGROUND = "background"


def convert_cvat_masks(
    *,
    root: Path,
    output_dir: Path,
    split: str | None = None,
    images: Path | None = None,
    stuff: Sequence[str] = (),
    background: str | None = None,
    ignore_subsets: bool = False,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one export, as the splits of its `ImageSets` or as one split.

    Pixels of a thing class with the same color in `SegmentationObject` are one object; black ones are a crowd region.
    CVAT has already resolved overlaps, by the order of the shapes in its editor.

    Args:
        root: The unpacked export, with `labelmap.txt`, `SegmentationClass` and `SegmentationObject`.
        output_dir: The record folder.
        split: The split's name; None: see `splits.choose_split`. If `ImageSets/Segmentation` has several lists, only
            this one is converted, or all if it is None.
        images: Folder of the images; None: `JPEGImages` in the export, which exists if images were exported.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of pixels without a shape, such as `background`; None: they are void.
        ignore_subsets: Whether all images belong to one split, whatever `ImageSets` says.
        encoding: Encoding of `labelmap.txt` and `ImageSets`, see `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    root = Path(root)
    common.require_folder(root / "SegmentationObject", "folder of object PNGs")
    color_and_name = _read_labelmap(root / "labelmap.txt", encoding)
    name_of_color = {_color_id(color): None if name.lower() == _BACKGROUND else name for color, name in color_and_name}
    labels = Labels(
        categories=[
            {"id": number, "name": name, "color": color}
            for number, (color, name) in enumerate(color_and_name, start=1)
            if name.lower() != _BACKGROUND
        ],
        stuff=stuff,
        background=background,
        read=read_color_png,
        read_objects=read_color_png,
        # Pixels without a shape are black, or have the color that the label map gives to the background.
        name_of_value={0: None, **name_of_color},
        void_values=frozenset(),
        describe=_describe_color,
        classes_file="labelmap.txt",
        notes=[] if background else ["Pixels without a shape are void; --background NAME makes them a class."],
    )
    return convert_voc_layout(
        root=root,
        images=None if images is None else Path(images),
        output_dir=Path(output_dir),
        split=split,
        labels=labels,
        encoding=encoding,
        ignore_subsets=ignore_subsets,
        options=options,
    )


def _read_labelmap(path: Path, encoding: str | None) -> list[tuple[tuple[int, int, int], str]]:
    """Reads color and name of each class from lines `name:red,green,blue:parts:actions`."""
    text = files.read_text(path, "the label map", encoding=encoding)
    found = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"(.+?):\s*(\d{1,3}),\s*(\d{1,3}),\s*(\d{1,3})\s*(:.*)?", line.strip())
        if match is None:
            raise UserError(f"'{path}' has the line '{line}'; a line is `name:red,green,blue::`, as CVAT writes it.")
        found.append(((int(match[2]), int(match[3]), int(match[4])), match[1]))
    repeated = [color for position, (color, _) in enumerate(found) if color in [c for c, _ in found[:position]]]
    if repeated:
        raise UserError(f"'{path}' has two classes of the color {repeated[0]}; change one in CVAT and export again.")
    return found


def _color_id(color: tuple[int, int, int]) -> int:
    """Returns the value of a color in a map of `read_color_png`."""
    red, green, blue = color
    return red + 256 * green + 65536 * blue


def _describe_color(value: int) -> str:
    return f"color {value & 255},{value >> 8 & 255},{value >> 16}"
