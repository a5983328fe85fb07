"""Converts CVAT's export "Segmentation mask": colored PNGs of classes and of objects, in the layout of Pascal VOC."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.dataset_info import DatasetInfo
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
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one export as one split.

    Pixels of a thing class with the same color in `SegmentationObject` are one object; black ones are a crowd region.
    CVAT has already resolved overlaps, by the order of the shapes in its editor.

    Args:
        root: The unpacked export, with `labelmap.txt`, `SegmentationClass` and `SegmentationObject`.
        output_dir: The record folder.
        split: The split's name; None: taken from the name of `root` or of its folder, see `common.guess_split`.
        images: Folder of the images; None: `JPEGImages` in the export, which exists if images were exported.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of pixels without a shape, such as `background`; None: they are void.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A tuple with one report, like the converters of several splits.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    root = Path(root)
    split = split if split is not None else common.guess_split(root)
    images = root / "JPEGImages" if images is None else Path(images)
    classes, objects = root / "SegmentationClass", root / "SegmentationObject"
    common.require_folder(objects, "folder of object PNGs")
    color_and_name = _read_labelmap(root / "labelmap.txt")
    categories: list[dict[str, Any]] = [
        {"id": number, "name": name, "color": color}
        for number, (color, name) in enumerate(color_and_name, start=1)
        if name.lower() != _BACKGROUND
    ]
    info = shapes.make_info(categories, name=root.name, stuff=stuff, background=background)
    class_of_name = shapes.class_of_name(info)
    no_shape = None if background is None else class_of_name[background]
    # Pixels without a shape are black, or have the color that the label map gives to the background.
    class_of_color = {0: no_shape}
    for color, name in color_and_name:
        class_of_color[_color_id(color)] = no_shape if name.lower() == _BACKGROUND else class_of_name[name]

    def object_png_of(pair: labeled_images.Pair) -> Path:
        return objects / pair.label.relative_to(classes)

    def load(pair: labeled_images.Pair, info: DatasetInfo) -> tuple[bytes, np.ndarray]:
        image = files.read_file(pair.image, "the image")
        class_colors = read_color_png(pair.label, "class PNG")
        object_png = object_png_of(pair)
        object_colors = read_color_png(object_png, "object PNG")
        if class_colors.shape != object_colors.shape:
            raise UserError(
                f"'{pair.label}' is {class_colors.shape} but '{object_png}' {object_colors.shape} (height, width); "
                "export both again."
            )

        def meaning(value: int) -> tuple[int, bool] | None:
            color, object_color = value >> 24, value & 0xFFFFFF
            if color not in class_of_color:
                red, green, blue = color & 255, color >> 8 & 255, color >> 16
                raise UserError(
                    f"'{pair.label}' has the color {red},{green},{blue}, which labelmap.txt does not list; export "
                    "both again."
                )
            class_id = class_of_color[color]
            return None if class_id is None else (class_id, info.categories[class_id].is_thing and object_color > 0)

        both = class_colors.astype(np.int64) << 24 | object_colors
        return image, labeled_images.values_to_panoptic(both, meaning, info)

    report = labeled_images.write_labeled_images(
        labeled_images.pair_images(images, classes),
        load,
        inputs_of=lambda pair: [pair.image, pair.label, object_png_of(pair)],
        choices={"background": background, "labelmap": color_and_name},
        source=[root, images],
        info=info,
        output_dir=Path(output_dir),
        split=split,
        **options,
    )
    return (report,)


def _read_labelmap(path: Path) -> list[tuple[tuple[int, int, int], str]]:
    """Reads color and name of each class from lines `name:red,green,blue:parts:actions`."""
    text = files.read_file(path, "the label map").decode(errors="replace")
    found = []
    for line in text.splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"(.+?):\s*(\d+),\s*(\d+),\s*(\d+)\s*(:.*)?", line.strip())
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
