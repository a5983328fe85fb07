"""Converts ADE20K's challenge data, ADEChallengeData2016: 150 classes of which 100 are things.

`ade20k_panoptic_SPLIT.json`, which the usual preparation makes, is used if it exists. Otherwise `annotations` has the
class of each pixel, and `annotations_instance` has the objects: red is the class in the instance challenge, green the
number of the object.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data import known_datasets
from deeplab2_like.data.convert import common, labeled_images
from deeplab2_like.data.convert.coco_panoptic import convert_coco_panoptic, require_same_categories
from deeplab2_like.data.convert.losses import NO_OBJECT, Losses
from deeplab2_like.data.convert.splits import require_one_split
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import read_color_png, read_value_png
from deeplab2_like.errors import UserError, unknown_name

# Added to an object's class + 256 * number, to distinguish it from a class of `annotations`.
_OBJECT = 2**16
_FOLDERS = {"train": "training", "val": "validation"}


def convert_ade20k(
    *,
    root: Path,
    output_dir: Path,
    splits: Sequence[str] | None = None,
    prepared: bool | None = None,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts splits of ADE20K.

    Without the panoptic JSON, objects of `annotations_instance` take precedence over the classes of `annotations`,
    because the two do not agree everywhere, and pixels of a thing class without an object are void. Both are as in the
    usual preparation.

    Args:
        root: The folder with `images` and the labels.
        output_dir: The record folder.
        splits: `train` and `val`, or one of them; None: both.
        prepared: Whether to use the panoptic JSONs; None: if they exist.
        encoding: Encoding of the panoptic JSONs, see `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; splits that were converted before stay.
    """
    root, output_dir = Path(root), Path(output_dir)
    splits = splits or tuple(_FOLDERS)
    for split in splits:
        if split not in _FOLDERS:
            raise unknown_name("split of ADE20K", split, _FOLDERS)
    found = [split for split in splits if (root / f"ade20k_panoptic_{split}.json").is_file()]
    if prepared is None and 0 < len(found) < len(splits):
        raise UserError(
            f"'{root}' has ade20k_panoptic_{found[0]}.json but not such a JSON for every split, and the two kinds "
            "of labels cannot be mixed; add the others, or move this one away, so that all come from 'annotations'."
        )
    use_prepared = bool(found) if prepared is None else prepared
    notes = []
    if prepared is None:
        made = f"ade20k_panoptic_{splits[0]}.json" if use_prepared else "'annotations' and 'annotations_instance'"
        notes.append(f"The labels are those of {made}; --{'no-' if use_prepared else ''}prepared chooses the others.")
    sources = {split: _source(root, split, is_prepared=use_prepared) for split in splits}
    require_one_split(splits, options.get("val_share"))
    common.require_replaceable(output_dir, sources, replace=options.get("replace", False))
    if use_prepared:
        require_same_categories([json_file for json_file, *_ in sources.values()], encoding=encoding)
    reports: list[common.ConversionReport] = []
    for split, source in sources.items():
        if use_prepared:
            json_file, images, panoptic = source
            reports += convert_coco_panoptic(
                images=images,
                panoptic=panoptic,
                json_file=json_file,
                output_dir=output_dir,
                split=split,
                encoding=encoding,
                **options,
            )
        else:
            reports += _convert_annotations(*source, output_dir=output_dir, split=split, options=options)
    return (dataclasses.replace(reports[0], notes=(*notes, *reports[0].notes)), *reports[1:])


def _source(root: Path, split: str, *, is_prepared: bool) -> tuple[Path, Path, Path]:
    """Returns the files and folders of a split: JSON, images and panoptic PNGs, or images, annotations and objects."""
    folder = _FOLDERS[split]
    if is_prepared:
        panoptic = root / f"ade20k_panoptic_{split}"
        return panoptic.with_suffix(".json"), root / "images" / folder, panoptic
    return root / "images" / folder, root / "annotations" / folder, root / "annotations_instance" / folder


def _convert_annotations(
    images: Path,
    annotations: Path,
    instances: Path,
    *,
    output_dir: Path,
    split: str,
    options: labeled_images.LabelOptions,
) -> tuple[common.ConversionReport, ...]:
    """Converts a split from `annotations` and `annotations_instance`."""
    ade20k = known_datasets.ade20k_info()
    things = ade20k.thing_classes
    common.require_folder(instances, "folder of instance PNGs")

    def load(pair: labeled_images.Pair, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        instance_png = instances / pair.label.name
        class_of_id = info.class_of_category_id

        def meaning(value: int) -> tuple[int, bool] | labeled_images.Void | None:
            if value >= _OBJECT:
                instance_class = value & 255
                if instance_class > len(things):
                    raise UserError(
                        f"'{instance_png}' has class {instance_class} (red); it must be 0 to {len(things)}: correct "
                        "the PNG."
                    )
                return class_of_id[known_datasets.ADE20K_THINGS[instance_class - 1] - 1], True
            if value > ade20k.num_classes:
                raise UserError(
                    f"'{pair.label}' has class {value}; it must be 0 to {ade20k.num_classes}: correct the PNG."
                )
            if value - 1 in things:
                return labeled_images.Void(NO_OBJECT, known_datasets.ADE20K_NAMES[value - 1])
            return None if value == 0 else (class_of_id[value - 1], False)

        image = files.read_file(pair.image, "the image")
        classes = read_value_png(pair.label, "class PNG")
        objects = read_color_png(instance_png, "instance PNG") & 0xFFFF  # Without blue.
        if classes.shape != objects.shape:
            raise UserError(
                f"'{pair.label}' is {classes.shape} but '{instance_png}' {objects.shape} (height, width); make "
                "them again."
            )
        is_object = ((objects & 255) > 0) & (objects >> 8 > 0)
        return image, labeled_images.values_to_panoptic(
            np.where(is_object, _OBJECT + objects, classes), meaning, info, losses
        )

    return labeled_images.write_labeled_images(
        {split: labeled_images.pair_images(images, annotations)},
        load,
        inputs_of=lambda pair: [pair.image, pair.label, instances / pair.label.name],
        source=[images, annotations, instances],
        info=ade20k,
        output_dir=output_dir,
        **options,
    )
