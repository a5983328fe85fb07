"""Describes records that DeepLab2's scripts made. The records are read unchanged, but need a `dataset_info.json`.

The values are those of DeepLab2's `data/dataset.py`.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from deeplab2_like import files
from deeplab2_like.data import dataset_info, known_datasets, pipeline
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.label_runs import list_segments
from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.shards import count_examples, list_shards, list_splits
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.temporary import remove_leftovers

# Cityscapes has train ids, and 255 for void. COCO has its 133 classes in order, from 1, and 0 for void, and so has
# ADE20K its 150. Crowd regions are void in all of them, unless DeepLab2 was configured otherwise.
DATA_SETS = {
    "cityscapes": DatasetInfo("cityscapes", known_datasets.CITYSCAPES),
    "coco": DatasetInfo("coco", known_datasets.COCO_PANOPTIC, label_divisor=256, record_offset=1),
    "ade20k": dataclasses.replace(known_datasets.ade20k_info(), record_offset=1),
}
# DeepLab2 writes it without labels.
_UNLABELED_SPLIT = "test"
# More than one, because the label of one image may also make sense for the wrong data set.
_RECORDS_TO_READ = 20


def describe_deeplab2_records(
    records: Path,
    data_set: str | None = None,
    *,
    json_file: Path | None = None,
    label_divisor: int | None = None,
    ignore_label: int | None = None,
    encoding: str | None = None,
) -> dict[str, int]:
    """Writes `dataset_info.json` beside the records, after a check of the first records of each split.

    Args:
        records: The folder of the files `SPLIT-00000-of-N.tfrecord` and on.
        data_set: One of `DATA_SETS`; None: `json_file` is given.
        json_file: A COCO panoptic JSON, or another with such `categories`, whose ids are the class ids in the records,
            without gaps.
        label_divisor: DeepLab2's `panoptic_label_divisor` of these records; None: 1000.
        ignore_label: DeepLab2's `ignore_label` of these records; None: 0 if no class has this id, else 255.
        encoding: Encoding of the JSON, see `files.read_text`.

    Returns:
        The number of examples of each split that has labels.

    Raises:
        UserError: If the data set is unknown, there are no such records, their labels are of another data set, or the
            folder has another `dataset_info.json`.
    """
    records = Path(records)
    if (data_set is None) == (json_file is None):
        raise UserError("Give the name of the data set, or a JSON with your own categories, but not both.")
    if json_file is not None:
        content = files.read_json(json_file, "the JSON of categories", encoding=encoding)
        info = _read_own(content, Path(json_file), label_divisor=label_divisor, ignore_label=ignore_label)
    elif data_set not in DATA_SETS:
        raise unknown_name("data set of DeepLab2", str(data_set), DATA_SETS)
    elif label_divisor is not None or ignore_label is not None:
        raise UserError(f"label_divisor and ignore_label of DeepLab2's {data_set} are known; leave them out.")
    else:
        info = DATA_SETS[data_set]
    splits = [split for split in list_splits(records) if split != _UNLABELED_SPLIT]
    if not splits:
        raise UserError(
            f"'{records}' has no files like train-00000-of-00010.tfrecord; give the folder that DeepLab2 wrote."
        )
    if (records / dataset_info.FILE_NAME).is_file() and DatasetInfo.load(records) != info:
        raise UserError(
            f"'{records / dataset_info.FILE_NAME}' differs from the one of {_described(data_set, json_file)}; "
            "give --data-set the name of these records, or, if the file is wrong, move it elsewhere."
        )
    counts = {}
    for split in splits:
        shards = list_shards(records, split)
        counts[split] = count_examples(shards)
        try:
            with report_bad_records(shards):
                _check_labels(pipeline.make_eval_dataset(shards, dataset_info=info).take(_RECORDS_TO_READ), info)
        except UserError as error:
            others = ", ".join(name for name in DATA_SETS if name != data_set)
            raise UserError(
                f"Split '{split}' in '{records}' cannot be read as {_described(data_set, json_file)}; if it is of "
                f"another data set, name that one ({others}). {str(error).removesuffix(' Convert the data set again.')}"
            ) from error
    remove_leftovers(records, of=dataset_info.FILE_NAME)
    info.save(records)
    return counts


def _described(data_set: str | None, json_file: Path | None) -> str:
    return f"DeepLab2's {data_set}" if json_file is None else f"the data set of '{json_file}'"


def _read_own(content: Any, path: Path, *, label_divisor: int | None, ignore_label: int | None) -> DatasetInfo:
    """Reads the classes of one's own records from the content of a JSON, see `describe_deeplab2_records`."""
    categories = content.get("categories") if isinstance(content, dict) else content
    if not isinstance(categories, list) or not categories:
        raise UserError(f"'{path}' has no list 'categories'; give a COCO panoptic JSON, or write such a list.")
    info = DatasetInfo.from_coco_categories(categories, name=path.stem)
    ordered = sorted(info.categories, key=lambda category: category.id)
    first = ordered[0].id
    if first < 0 or [category.id for category in ordered] != list(range(first, first + len(ordered))):
        raise UserError(
            f"The ids in '{path}' have gaps ({', '.join(str(category.id) for category in ordered[:5])}, ...), but the "
            "class ids in DeepLab2's records have none; number the categories as the records do."
        )
    if ignore_label is None:
        ignore_label = 0 if first > 0 else max(255, len(ordered))
    if first <= ignore_label < first + len(ordered):
        raise UserError(f"ignore_label {ignore_label} is the id of a class in '{path}'; give DeepLab2's ignore_label.")
    if ignore_label > first > 0:
        raise UserError(
            f"ignore_label {ignore_label} is not read with class ids from {first}; list a category of id 0 to "
            f"{first - 1}, too, so that ids count from 0."
        )
    return DatasetInfo(
        path.stem,
        tuple(ordered),
        label_divisor=1000 if label_divisor is None else label_divisor,
        # Not in these records if their void is below the classes.
        ignore_label=max(255, len(ordered)) if first else ignore_label,
        record_offset=first,
    )


def _check_labels(dataset: tf.data.Dataset, info: DatasetInfo) -> None:
    """Raises `UserError` if labels make no sense, which is likely if they are of another data set."""
    is_empty = True
    for example in dataset.as_numpy_iterator():
        values = list_segments(example["panoptic"]).values
        values = values[values != info.void]
        is_empty &= not values.size
        wrong = values[np.isin(values // info.label_divisor, info.stuff_classes) & (values % info.label_divisor > 0)]
        if wrong.size:
            class_id, instance = divmod(int(wrong[0]), info.label_divisor)
            raise UserError(
                f"In the label of image '{example['image_id'].decode(errors='replace')}' class {class_id}, "
                f"'{info.categories[class_id].name}', which is stuff, has an instance {instance}."
            )
    if is_empty:
        raise UserError("All labels that were checked are void.")
