"""Describes records that DeepLab2's scripts made. The records are read unchanged, but need a `dataset_info.json`.

The values are those of DeepLab2's `data/dataset.py`.
"""

from pathlib import Path

import numpy as np
import tensorflow as tf

from deeplab2_like.data import dataset_info, known_datasets, pipeline
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.label_runs import list_segments
from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.shards import count_examples, list_shards, list_splits
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.temporary import remove_leftovers

# Cityscapes has train ids, and 255 for void. COCO has its 133 classes in order, from 1, and 0 for void. Crowd regions
# are void in both, unless DeepLab2 was configured otherwise.
DATA_SETS = {
    "cityscapes": DatasetInfo("cityscapes", known_datasets.CITYSCAPES),
    "coco": DatasetInfo("coco", known_datasets.COCO_PANOPTIC, label_divisor=256, record_offset=1),
}
# DeepLab2 writes it without labels.
_UNLABELED_SPLIT = "test"
# More than one, because the label of one image may also make sense for the wrong data set.
_RECORDS_TO_READ = 20


def describe_deeplab2_records(records: Path, data_set: str) -> dict[str, int]:
    """Writes `dataset_info.json` beside the records, after a check of the first records of each split.

    Args:
        records: The folder of the files `SPLIT-00000-of-N.tfrecord` and on.
        data_set: One of `DATA_SETS`.

    Returns:
        The number of examples of each split that has labels.

    Raises:
        UserError: If the data set is unknown, there are no such records, their labels are of another data set, or the
            folder has another `dataset_info.json`.
    """
    records = Path(records)
    if data_set not in DATA_SETS:
        raise unknown_name("data set of DeepLab2", data_set, DATA_SETS)
    info = DATA_SETS[data_set]
    splits = [split for split in list_splits(records) if split != _UNLABELED_SPLIT]
    if not splits:
        raise UserError(
            f"'{records}' has no files like train-00000-of-00010.tfrecord; give the folder that DeepLab2 wrote."
        )
    if (records / dataset_info.FILE_NAME).is_file() and DatasetInfo.load(records) != info:
        raise UserError(
            f"'{records / dataset_info.FILE_NAME}' differs from the one of DeepLab2's {data_set}; "
            "give --data-set the name of these records, or, if the file is wrong, move it elsewhere."
        )
    counts = {}
    for split in splits:
        files = list_shards(records, split)
        counts[split] = count_examples(files)
        try:
            with report_bad_records(files):
                _check_labels(pipeline.make_eval_dataset(files, dataset_info=info).take(_RECORDS_TO_READ), info)
        except UserError as error:
            others = ", ".join(name for name in DATA_SETS if name != data_set)
            raise UserError(
                f"Split '{split}' in '{records}' cannot be read as DeepLab2's {data_set}; if it is of another data "
                f"set, name that one ({others}). {str(error).removesuffix(' Convert the data set again.')}"
            ) from error
    remove_leftovers(records, of=dataset_info.FILE_NAME)
    info.save(records)
    return counts


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
