"""Shared by converters of Pascal VOC's layout: PNGs of classes and of objects, and a list of images per split."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.convert.losses import Losses
from deeplab2_like.data.convert.splits import Division, divide, split_of_name
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import IMAGE_SUFFIXES
from deeplab2_like.errors import UserError
from deeplab2_like.printing import counted


@dataclasses.dataclass(frozen=True)
class Labels:
    """What the PNGs of classes and objects mean.

    Attributes:
        categories: The classes, as for `shapes.make_info`.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of pixels without a shape; None: they are void.
        read: Reads a class PNG, int32 [H, W]; the second argument is its name in error messages.
        read_objects: The same of an object PNG, whose values may have all 32 bits; 0 is no object.
        name_of_value: The class name of each value in the class PNGs; None for pixels without a shape.
        void_values: Values in the class PNGs that are void.
        describe: Describes a value of the class PNGs for the message that it is unknown.
        classes_file: The file that lists the values, for that message.
        notes: Sentences for the user.
    """

    categories: Sequence[Mapping[str, Any]]
    stuff: Sequence[str]
    background: str | None
    read: Callable[[Path, str], np.ndarray]
    read_objects: Callable[[Path, str], np.ndarray]
    name_of_value: Mapping[int, str | None]
    void_values: frozenset[int]
    describe: Callable[[int], str]
    classes_file: str
    notes: Sequence[str] = ()


def convert_voc_layout(
    *,
    root: Path,
    images: Path | None,
    output_dir: Path,
    split: str | None,
    labels: Labels,
    encoding: str | None,
    ignore_subsets: bool,
    options: labeled_images.LabelOptions,
) -> tuple[common.ConversionReport, ...]:
    """Converts a folder with `SegmentationClass` and `SegmentationObject`.

    Pixels of a thing class with the same value in `SegmentationObject` are one object; those without an object are a
    crowd region. `ImageSets/Segmentation` tells the splits. Images that it does not list and that have no class PNG are
    left out, as are lists of images of which none has one.

    Args:
        root: The folder.
        images: Folder of the images; None: `JPEGImages` in `root`.
        output_dir: The record folder.
        split: The split's name or None, see `splits.divide`.
        labels: What the PNGs mean.
        encoding: Encoding of the lists, see `files.read_text`.
        ignore_subsets: Whether all images belong to one split, whatever `ImageSets` says.
        options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    images = root / "JPEGImages" if images is None else images
    classes, objects = root / "SegmentationClass", root / "SegmentationObject"
    common.require_folder(objects, "folder of object PNGs")
    division = _divide(
        root,
        images,
        labeled_images.pair_images(images, classes),
        split=split,
        output_dir=output_dir,
        ignore_subsets=ignore_subsets,
        encoding=encoding,
        val_share=options.get("val_share"),
    )
    known = common.known_categories(output_dir, division.first)
    info = shapes.make_info(
        labels.categories, name=root.name, stuff=labels.stuff, background=labels.background, known=known
    )

    def object_png_of(pair: labeled_images.Pair) -> Path:
        return objects / pair.label.relative_to(classes)

    def load(pair: labeled_images.Pair, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        class_of_name = shapes.class_of_name(info)
        class_of_value: dict[int, int | None] = dict.fromkeys(labels.void_values)
        for class_value, name in labels.name_of_value.items():
            shown = labels.background if name is None else name
            class_of_value[class_value] = None if shown is None else class_of_name[shown]
        image = files.read_file(pair.image, "the image")
        class_values = labels.read(pair.label, "class PNG")
        object_png = object_png_of(pair)
        object_values = labels.read_objects(object_png, "object PNG")
        if class_values.shape != object_values.shape:
            raise UserError(
                f"'{pair.label}' is {class_values.shape} but '{object_png}' {object_values.shape} (height, width); "
                "export both again."
            )

        def meaning(value: int) -> tuple[int, bool] | None:
            class_value, object_value = value >> 32, value & 0xFFFFFFFF
            if class_value not in class_of_value:
                raise UserError(
                    f"'{pair.label}' has the {labels.describe(class_value)}, which {labels.classes_file} does not "
                    "list; add it there, or export both again."
                )
            class_id = class_of_value[class_value]
            if class_id is None:
                return None
            return class_id, info.categories[class_id].is_thing and object_value != 0

        both = class_values.astype(np.int64) << 32 | object_values.astype(np.int64) & 0xFFFFFFFF
        return image, labeled_images.values_to_panoptic(
            both, meaning, info, losses, describe=lambda value: labels.describe(value >> 32)
        )

    return labeled_images.write_labeled_images(
        division.splits,
        load,
        inputs_of=lambda pair: [pair.image, pair.label, object_png_of(pair)],
        choices={"background": labels.background, "values": sorted(labels.name_of_value.items())},
        source=[root, images],
        info=info,
        output_dir=output_dir,
        notes=[*division.notes, *labels.notes, *shapes.describe_kinds(info, labels.stuff)],
        by_subsets=division.by_subsets,
        **options,
    )


def _divide(
    root: Path,
    images: Path,
    pairs: Sequence[labeled_images.Pair],
    *,
    encoding: str | None,
    **arguments: Any,
) -> Division[labeled_images.Pair]:
    """Divides the images by the lists in `ImageSets/Segmentation`, if there are any."""
    stems = {PurePosixPath(pair.name).with_suffix("").as_posix() for pair in pairs}
    lists, unmatched = _read_lists(root / "ImageSets" / "Segmentation", stems, encoding)
    subset_of_stem = {stem: subset for subset, stems in lists.items() for stem in stems}

    def subset_of(pair: labeled_images.Pair) -> str | None:
        stem = PurePosixPath(pair.name).with_suffix("")
        return subset_of_stem.get(stem.as_posix(), subset_of_stem.get(stem.name))

    labeled = {subset_of(pair) for pair in pairs if pair.label.exists()}
    unlabeled_lists = sorted(set(lists) - labeled)
    notes = [
        f"Left out the list {subset} of '{root / 'ImageSets'}', because "
        f"{'its images have no class PNG' if lists[subset] - set(unmatched) else 'its names match no file'}."
        for subset in unlabeled_lists
        if arguments["split"] in (None, subset)
    ]
    if unmatched:
        notes.append(
            f"Warning: {counted(len(unmatched), 'name')} in '{root / 'ImageSets'}' without an image or class PNG, such "
            f"as '{unmatched[0]}'."
        )
    kept = [
        pair for pair in pairs if pair.label.exists() or not lists or subset_of(pair) not in (None, *unlabeled_lists)
    ]
    num_unlisted = sum(not pair.label.exists() and subset_of(pair) is None for pair in pairs) if lists else 0
    if num_unlisted:
        notes.append(f"Left out {counted(num_unlisted, 'image')} without class PNG that 'ImageSets' does not list.")
    if not kept:
        raise UserError(f"'{root}' has no image with a PNG in 'SegmentationClass'; check the names of the files.")
    division = divide(
        kept,
        subset_of,
        where=f"'{root / 'ImageSets'}'",
        paths=[root],
        source=[root, images],
        are_lists=True,
        **arguments,
    )
    return dataclasses.replace(division, notes=[*division.notes, *notes])


def _read_lists(folder: Path, known: Set[str], encoding: str | None) -> tuple[dict[str, set[str]], list[str]]:
    """Reads the images of each list in `ImageSets/Segmentation`, without suffix, by the split that its name tells.

    Also returns the names that match no file; `known` has the files, with folders and without suffix.

    `default`, the list of a CVAT task without subsets, and `trainval`, a union, are no subsets.

    Raises:
        UserError: If a list cannot be read, or two subsets have an image in common.
    """
    subsets: dict[str, set[str]] = {}
    known_names = {PurePosixPath(stem).name for stem in known}
    unmatched = set()
    for path in files.list_files(folder, (".txt",)) if folder.is_dir() else ():
        if path.stem.casefold() not in ("default", "trainval"):
            lines = files.read_text(path, "the list of images", encoding=encoding).splitlines()
            names = {line.strip().replace("\\", "/") for line in lines if line.strip()}
            stem_of_name = {name: _find_stem(name, known, known_names) for name in names}
            unmatched |= {name for name, stem in stem_of_name.items() if stem is None}
            stems = {stem or name for name, stem in stem_of_name.items()}
            subsets.setdefault(split_of_name(path.stem) or path.stem, set()).update(stems)
    for name, stems in subsets.items():
        for other, other_stems in subsets.items():
            if name < other and stems & other_stems:
                raise UserError(
                    f"'{folder}' lists '{min(stems & other_stems)}' in two subsets, {name} and {other}; remove it from "
                    "one, or take all images as one split with --ignore-subsets."
                )
    return subsets, sorted(unmatched)


def _find_stem(listed: str, known: Set[str], known_names: Set[str]) -> str | None:
    """Finds the file of a name in a list, which may have a suffix and leading folders such as `JPEGImages`."""
    path = PurePosixPath(listed)
    names = [path, path.with_suffix("")] if path.suffix.lower() in IMAGE_SUFFIXES else [path]
    for name in names:
        for start in range(len(name.parts)):
            if (stem := PurePosixPath(*name.parts[start:]).as_posix()) in known:
                return stem
        if len(name.parts) == 1 and name.name in known_names:
            return name.name
    return None
