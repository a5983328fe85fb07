"""Converts instance maps: an image per image with the number of the object at each pixel, and 0 for the background.

Cellpose, StarDist, napari and QuPath write them, as PNG or TIFF of 8, 16 or 32 bits.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.convert.instance_classes import choose_classes
from deeplab2_like.data.convert.losses import NO_OBJECT, Losses
from deeplab2_like.data.convert.splits import divide, split_of_folder
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import IMAGE_SUFFIXES, LABEL_SUFFIXES, LOSSY_SUFFIXES, read_value_png
from deeplab2_like.errors import UserError
from deeplab2_like.parallel import map_in_order
from deeplab2_like.printing import counted

# Endings of names, without suffix, that tools give to label files and to images. Of equally frequent ones the first is
# taken.
_LABEL_ENDINGS = ("", "_cp_masks", "_masks", "_mask", "_labels", "_label", "-labels", "_instances", "_inst")
_IMAGE_ENDINGS = ("", "_img", "_image")
# Endings of other files that Cellpose writes beside the images.
_OTHER_ENDINGS = ("_flows", "_cp_flows", "_cp_output", "_outlines", "_cp_outlines")


def convert_instance_maps(  # noqa: PLR0913 - its arguments are the options of the command
    *,
    images: Path,
    output_dir: Path,
    labels: Path | None = None,
    split: str | None = None,
    class_name: str | None = None,
    class_map: Path | None = None,
    class_labels: Path | None = None,
    classes: Path | None = None,
    stuff: Sequence[str] = (),
    background: str = "background",
    void_background: bool = False,
    label_ending: str | None = None,
    image_ending: str | None = None,
    ignore_subsets: bool = False,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one split, or the splits whose images are in folders such as `train` and `val`.

    All objects are of one class, unless a class map or class labels are given.

    Args:
        images: Folder of the images, which may have subfolders.
        output_dir: The record folder.
        labels: Folder of the instance maps, in the same subfolders; None: that of the images.
        split: The split's name; None: see `splits.choose_split`. If the images are in folders of several splits, only
            this one is converted, or all if it is None.
        class_name: Name of the only class; None: "object".
        class_map: The class of each object, see `instance_classes.read_class_map`.
        class_labels: Folder of label files, named as the instance maps or as the images, with the class of each pixel.
            An object gets the class of most of its pixels; pixels without an object may be of a stuff class.
        classes: The class of each value in `class_labels`, or of each number in `class_map`, see
            `class_lists.read_class_list`.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of pixels without an object.
        void_background: Whether these pixels are void instead.
        label_ending: Ending of the name of an instance map, in place of the image's suffix, such as `_masks.tif`; None:
            the one that fits most images.
        image_ending: Ending of an image's name before its suffix that its instance map lacks, such as `_img`; None: the
            one that fits most images.
        ignore_subsets: Whether images in folders such as `train` and `val` belong to one split all the same.
        encoding: Encoding of the class map and list, see `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    images, output_dir = Path(images), Path(output_dir)
    labels = images if labels is None else Path(labels)
    pairs, notes = _find_pairs(images, labels, label_ending=label_ending, image_ending=image_ending)
    division = divide(
        pairs,
        lambda pair: split_of_folder(pair.name),
        split=split,
        ignore_subsets=ignore_subsets,
        where=f"'{images}'",
        paths=list(dict.fromkeys([images, labels])),
        output_dir=output_dir,
        source=[images, labels],
        val_share=options.get("val_share"),
    )
    known = common.known_categories(output_dir, division.first)
    shown_background = None if void_background else background
    chosen = choose_classes(
        class_name=class_name,
        class_map=None if class_map is None else Path(class_map),
        class_labels=None if class_labels is None else Path(class_labels),
        classes=None if classes is None else Path(classes),
        labels=labels,
        pairs=pairs,
        background=shown_background,
        known=known,
        encoding=encoding,
    )
    source = chosen.source
    other = f"the class '{background}'; --void-background makes it void"
    notes += [*chosen.notes, f"The background, 0, is {'void' if void_background else other}."]
    info = shapes.make_info(chosen.categories, name=images.name, stuff=stuff, background=shown_background, known=known)
    max_instances = _count_instances(pairs, workers=options.get("workers", 1))
    if max_instances == 1:
        notes.append(
            "Warning: no image has more than one object; a mask of 0 and 255 does not tell objects apart, an instance "
            "map numbers them."
        )

    def load(pair: labeled_images.Pair, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        image = files.read_file(pair.image, "the image")
        instances = read_value_png(pair.label, "instance map")
        if instances.min() < 0:
            raise UserError(f"'{pair.label}' has the value {instances.min()}; objects count from 1: correct the file.")
        values, name_of = source.classify(pair, instances, losses)
        class_of_name = shapes.class_of_name(info)

        def meaning(value: int) -> tuple[int, bool] | labeled_images.Void | None:
            name = name_of.get(value, shown_background if value == 0 else None)
            if name is None:
                return None
            is_thing = info.categories[class_of_name[name]].is_thing
            if value < 0 and is_thing:
                return labeled_images.Void(NO_OBJECT, name)
            return class_of_name[name], is_thing

        return image, labeled_images.values_to_panoptic(values, meaning, info, losses)

    return labeled_images.write_labeled_images(
        division.splits,
        load,
        inputs_of=lambda pair: [pair.image, pair.label, *source.inputs_of(pair)],
        choices={"background": shown_background, "classes": source.choices()},
        source=[images, labels],
        info=info,
        output_dir=output_dir,
        max_instances=max_instances,
        notes=[*division.notes, *notes],
        by_subsets=division.by_subsets,
        **options,
    )


# --- Pairs of images and instance maps. -------------------------------------------------------------------------------


def _find_pairs(
    images: Path, labels: Path, *, label_ending: str | None, image_ending: str | None
) -> tuple[list[labeled_images.Pair], list[str]]:
    """Pairs images with instance maps; returns also a sentence for the user if the endings of names are a guess."""
    common.require_folder(images, "image folder")
    common.require_folder(labels, "folder of instance maps")
    notes = []
    if label_ending is None:
        # Labels of lossy formats are refused below, by their names.
        found = _find_endings(images, labels, image_ending, LABEL_SUFFIXES) or _find_endings(
            images, labels, image_ending, LOSSY_SUFFIXES
        )
        if found is None:
            raise UserError(
                f"No file in '{labels}' has the name of an image in '{images}' with an ending such as _masks.tif; give "
                "--label-ending."
            )
        image_ending, label_ending = found
        notes.append(
            f"The instance map of an image has its name{f' without {image_ending}' if image_ending else ''} and ends "
            f"in {label_ending}; --label-ending and --image-ending say otherwise."
        )
    pairs = labeled_images.pair_images(images, labels, ending=label_ending, image_ending=image_ending or "")
    others = [
        pair.name
        for pair in pairs
        if not pair.label.exists() and Path(pair.name).stem.endswith((*_LABEL_ENDINGS[1:], *_OTHER_ENDINGS))
    ]
    if others:
        notes.append(
            f"Left out {counted(len(others), 'file')} that the name tells to be no image, such as {others[0]}."
        )
    return [pair for pair in pairs if pair.name not in others], notes


def _find_endings(
    images: Path, labels: Path, image_ending: str | None, suffixes: tuple[str, ...]
) -> tuple[str, str] | None:
    """Finds the endings of the names of images and instance maps that make most pairs, None if there is none."""
    in_one_folder = images.resolve() == labels.resolve()
    stems = {
        path.relative_to(images).with_suffix("").as_posix()
        for path in files.list_files(images, IMAGE_SUFFIXES, recursive=True)
    }
    label_files = [path.relative_to(labels).as_posix() for path in files.list_files(labels, suffixes, recursive=True)]
    best, most = None, 0
    for taken in _IMAGE_ENDINGS if image_ending is None else (image_ending,):
        bases = {stem.removesuffix(taken) for stem in stems if stem.endswith(taken)}
        counts: Counter[str] = Counter()
        for name in label_files:
            stem, suffix = name[: name.rindex(".")], name[name.rindex(".") :]
            for added in _LABEL_ENDINGS:
                if stem.endswith(added) and stem.removesuffix(added) in bases and not (in_one_folder and not added):
                    counts[f"{added}{suffix}"] += 1
        for ending, count in counts.items():
            if count > most:
                best, most = (taken, ending), count
    return best


def _count_instances(pairs: Sequence[labeled_images.Pair], *, workers: int) -> int:
    """Returns the largest number of objects in an instance map; those that cannot be read fail later."""

    def count(pair: labeled_images.Pair) -> int:
        try:
            values = read_value_png(pair.label, "instance map")
        except UserError:
            return 0
        return int(np.count_nonzero(np.unique(values)))

    return max(map_in_order(count, pairs, workers=workers), default=0)
