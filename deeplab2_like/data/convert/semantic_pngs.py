"""Converts labels without instances: a PNG per image with the class of each pixel. All classes become stuff."""

from collections.abc import Sequence
from pathlib import Path
from typing import Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images
from deeplab2_like.data.convert.class_lists import read_class_list
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import read_value_png
from deeplab2_like.errors import UserError


def convert_semantic_pngs(
    *,
    images: Path,
    labels: Path,
    classes: Path,
    output_dir: Path,
    split: str | None = None,
    ignore: Sequence[int] = (255,),
    label_ending: str = ".png",
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one split.

    Args:
        images: Folder of the images, which may have subfolders.
        labels: Folder of the PNGs, in the same subfolders: gray of 8 or 16 bits, or with a palette.
        classes: The class of each value, see `class_lists.read_class_list`.
        output_dir: The record folder.
        split: The split's name; None: taken from the names of the two folders, or of their parent folders, see
            `common.guess_split`.
        ignore: Values that become void.
        label_ending: Ending of a PNG's name, in place of the image's suffix, such as `_mask.png`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A tuple with one report, like the converters of several splits.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    images, labels, classes = Path(images), Path(labels), Path(classes)
    split = split if split is not None else common.guess_split(images, labels)
    categories = [{**entry, "isthing": 0} for entry in read_class_list(classes) if entry["id"] not in ignore]
    info = DatasetInfo.from_coco_categories(categories, name=classes.stem)

    def load(pair: labeled_images.Pair, info: DatasetInfo) -> tuple[bytes, np.ndarray]:
        def meaning(value: int) -> tuple[int, bool] | None:
            if value in ignore:
                return None
            if value not in info.class_of_category_id:
                raise UserError(
                    f"'{pair.label}' has the value {value}, which '{classes}' does not list; add it there, or to the "
                    "values to ignore."
                )
            return info.class_of_category_id[value], False

        image = files.read_file(pair.image, "the image")
        values = read_value_png(pair.label, "label PNG")
        return image, labeled_images.values_to_panoptic(values, meaning, info)

    report = labeled_images.write_labeled_images(
        labeled_images.pair_images(images, labels, ending=label_ending),
        load,
        inputs_of=lambda pair: [pair.image, pair.label],
        choices={"ignore": list(ignore)},
        source=[images, labels],
        info=info,
        output_dir=Path(output_dir),
        split=split,
        **options,
    )
    return (report,)
