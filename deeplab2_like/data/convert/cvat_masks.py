"""Converts CVAT's export "Segmentation mask": colored PNGs of classes and of objects, in the layout of Pascal VOC."""

import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.convert.losses import Losses
from deeplab2_like.data.convert.splits import choose_split, split_by_subsets, split_of_name
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
    images = root / "JPEGImages" if images is None else Path(images)
    classes, objects = root / "SegmentationClass", root / "SegmentationObject"
    common.require_folder(objects, "folder of object PNGs")
    color_and_name = _read_labelmap(root / "labelmap.txt", encoding)
    categories: list[dict[str, Any]] = [
        {"id": number, "name": name, "color": color}
        for number, (color, name) in enumerate(color_and_name, start=1)
        if name.lower() != _BACKGROUND
    ]
    pairs = labeled_images.pair_images(images, classes)
    stems_of_subset = {} if ignore_subsets else _read_subsets(root / "ImageSets" / "Segmentation", encoding)
    subset_of_stem = {stem: subset for subset, stems in stems_of_subset.items() for stem in stems}

    def subset_of(pair: labeled_images.Pair) -> str | None:
        stem = PurePosixPath(pair.name).with_suffix("")
        return subset_of_stem.get(stem.as_posix(), subset_of_stem.get(stem.name))

    subsets = split_by_subsets(
        pairs,
        subset_of,
        split=split,
        ignore_subsets=ignore_subsets,
        where=f"'{root / 'ImageSets'}'",
        are_lists=True,
    )
    by_subsets = subsets is not None
    if subsets is None:
        split, notes = choose_split(
            split,
            root,
            output_dir=Path(output_dir),
            source=[root, images],
            val_share=options.get("val_share"),
        )
        subsets = {split: pairs}, notes
    known = common.known_categories(Path(output_dir), next(iter(subsets[0])))
    info = shapes.make_info(categories, name=root.name, stuff=stuff, background=background, known=known)
    if background is None:
        subsets[1].append("Pixels without a shape are void; --background NAME makes them a class.")

    def object_png_of(pair: labeled_images.Pair) -> Path:
        return objects / pair.label.relative_to(classes)

    def load(pair: labeled_images.Pair, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        class_of_name = shapes.class_of_name(info)
        no_shape = None if background is None else class_of_name[background]
        # Pixels without a shape are black, or have the color that the label map gives to the background.
        class_of_color = {0: no_shape}
        for color, name in color_and_name:
            class_of_color[_color_id(color)] = no_shape if name.lower() == _BACKGROUND else class_of_name[name]
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
        return image, labeled_images.values_to_panoptic(both, meaning, info, losses)

    return labeled_images.write_labeled_images(
        subsets[0],
        load,
        inputs_of=lambda pair: [pair.image, pair.label, object_png_of(pair)],
        choices={"background": background, "labelmap": color_and_name},
        source=[root, images],
        info=info,
        output_dir=Path(output_dir),
        notes=[*subsets[1], *shapes.describe_kinds(info, stuff)],
        by_subsets=by_subsets,
        **options,
    )


def _read_subsets(folder: Path, encoding: str | None) -> dict[str, set[str]]:
    """Reads the images of each list in `ImageSets/Segmentation`, without suffix, by the split that its name tells.

    `default`, the list of a task without subsets, and `trainval`, a union, are no subsets.
    """
    subsets: dict[str, set[str]] = {}
    for path in files.list_files(folder, (".txt",)) if folder.is_dir() else ():
        if path.stem.casefold() not in ("default", "trainval"):
            lines = files.read_text(path, "the list of images", encoding=encoding).splitlines()
            stems = {line.strip().replace("\\", "/") for line in lines if line.strip()}
            subsets.setdefault(split_of_name(path.stem) or path.stem, set()).update(stems)
    for name, stems in subsets.items():
        for other, other_stems in subsets.items():
            if name < other and stems & other_stems:
                raise UserError(
                    f"'{folder}' lists '{min(stems & other_stems)}' in two subsets, {name} and {other}; remove it from "
                    "one, or take all images as one split with --ignore-subsets."
                )
    return subsets


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
