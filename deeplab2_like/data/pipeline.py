"""The input pipeline: from TFRecords to training batches and evaluation examples.

Training is exactly resumable: the order of the examples and their augmentation depend on the seed and the step alone.
Epoch e visits the records in a permutation drawn from (seed, e); the n-th example of the training is augmented with the
seed (seed, n). Records are read by their offsets in the files, so every epoch is shuffled completely without a buffer,
and resuming at a later step reads none of the skipped records.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

from deeplab2_like.configs.schema import DataConfig
from deeplab2_like.data import augment
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.record_errors import report_bad_records, require
from deeplab2_like.data.records import parse_example
from deeplab2_like.data.shards import RecordIndex, read_index
from deeplab2_like.errors import UserError

Targets = dict[str, tf.Tensor]

# Serialized records of a data set up to this size are held in memory unless the caller decides otherwise.
CACHE_LIMIT_BYTES = 2**30


def make_train_dataset(  # noqa: PLR0913 - batches, their parts and the source of randomness
    files: Sequence[str],
    config: DataConfig,
    *,
    make_targets: Callable[[tf.Tensor], Targets],
    dataset_info: DatasetInfo,
    batch_size: int,
    pad_value: Sequence[int],
    seed: int = 0,
    start_step: int = 0,
    num_parts: int = 1,
    parts: Sequence[int] = (0,),
    cache: bool | None = None,
    num_parallel_calls: int = tf.data.AUTOTUNE,
) -> tf.data.Dataset:
    """Makes the endless data set of training batches.

    Args:
        files: TFRecord files, as `shards.list_shards` gives them.
        config: Section `data` of a config, see `augment.augment` for the keys that are used.
        make_targets: Makes a system's targets from one panoptic map, int32 [h, w]; all of static shape.
        dataset_info: The meaning of the labels.
        batch_size: Examples per batch, over all replicas.
        pad_value: Color of padded pixels, red, green and blue; usually the mean color, which is normalized to zero.
        seed: Decides order and augmentation.
        start_step: Number of batches to skip at the beginning, to resume there.
        num_parts: Number of equal parts of each batch, one for each replica.
        parts: The parts to yield, in ascending order, one after the other.
        cache: Whether to hold all serialized records in memory; None holds up to `CACHE_LIMIT_BYTES`.
        num_parallel_calls: Number of examples prepared at once.

    Returns:
        Yields `{"image": uint8 [B, h, w, 3], "image_id": string [B], "number": int64 [B], "targets": make_targets'
        dict, each [B, ...]}` with B = `batch_size / num_parts`. `number` counts the examples of the training from 0.

    Raises:
        UserError: If the files hold no records or are damaged, or `num_parts` does not divide `batch_size`. While
            iterating, a faulty record raises a TensorFlow error, which `record_errors.report_bad_records` turns into a
            `UserError`.
    """
    if batch_size % num_parts:
        raise UserError(f"A batch of {batch_size} images cannot be divided into {num_parts} equal parts.")
    index = read_index(files)
    if not len(index):
        raise UserError(f"The TFRecord files hold no examples ({_list_names(files)}); convert the data set again.")
    if cache is None:
        cache = index.num_bytes <= CACHE_LIMIT_BYTES
    read = _cached_reader(index) if cache else file_reader(index)

    def prepare(number: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor | Targets]:
        example = read_example(read(record), dataset_info)
        example = augment.augment(
            example,
            config,
            seed=tf.stack([tf.constant(seed, tf.int64), number]),
            void=dataset_info.void,
            pad_value=pad_value,
        )
        return {
            "image": example["image"],
            "image_id": example["image_id"],
            "number": number,
            "targets": make_targets(example["panoptic"]),
        }

    part_size = batch_size // num_parts
    # The examples of other parts are skipped before they are read, so each worker reads and augments its own only.
    dataset = _numbered_records(len(index), seed=seed, start=start_step * batch_size)
    if len(parts) < num_parts:
        own_parts = tf.constant(list(parts), tf.int64)
        dataset = dataset.filter(lambda number, _: tf.reduce_any(number % batch_size // part_size == own_parts))
    dataset = dataset.map(prepare, num_parallel_calls=num_parallel_calls, deterministic=True)
    return dataset.batch(part_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def make_eval_dataset(
    files: Sequence[str], *, dataset_info: DatasetInfo, num_parallel_calls: int = tf.data.AUTOTUNE
) -> tf.data.Dataset:
    """Makes the data set of whole, unaltered images for evaluation, each once, in the order of the files.

    Args:
        files: TFRecord files, as `shards.list_shards` gives them.
        dataset_info: The meaning of the labels.
        num_parallel_calls: Number of examples read at once.

    Returns:
        Yields `{"image": uint8 [H, W, 3], "panoptic": int32 [H, W], "image_id": string []}`, not batched.
    """

    def prepare(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        return read_example(serialized, dataset_info)

    dataset = tf.data.TFRecordDataset(list(files))
    dataset = dataset.map(prepare, num_parallel_calls=num_parallel_calls, deterministic=True)
    return dataset.prefetch(tf.data.AUTOTUNE)


def _numbered_records(num_records: int, *, seed: int, start: int) -> tf.data.Dataset:
    """Makes an endless data set of pairs: the example's number, from `start` on, and its record's index, int64 []."""

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        # Negative, so that no epoch shares its random numbers with the augmentation of an example.
        epoch_seed = tf.stack([tf.constant(seed, tf.int64), -1 - number])
        order = tf.random.experimental.stateless_shuffle(tf.range(num_records, dtype=tf.int64), seed=epoch_seed)
        return tf.data.Dataset.from_tensor_slices(order)

    first_epoch, position = divmod(start, num_records)
    records = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch).skip(position)
    return records.enumerate(start=start)


def _cached_reader(index: RecordIndex) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from a record's index, int64 [], to its bytes, string []; holds all records in memory."""
    contents: list[bytes] = []
    for path in index.files:
        with report_bad_records([path]):
            contents.extend(tf.data.TFRecordDataset(path).as_numpy_iterator())
    with tf.device("CPU:0"):  # GPUs cannot hold strings.
        records = tf.constant(contents)
    return lambda record: tf.gather(records, record)


def file_reader(index: RecordIndex) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from a record's index, int64 [], to its bytes, string []; reads that record alone."""
    with tf.device("CPU:0"):
        files = tf.constant(index.files)
        file_numbers = tf.constant(index.file_numbers)
        offsets = tf.constant(index.offsets)

    def read(record: tf.Tensor) -> tf.Tensor:
        # The raw operation, because `tf.data.TFRecordDataset` has no argument for the offset.
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=tf.gather(files, file_numbers[record])[None],
            compression_type="",
            buffer_size=tf.constant(0, tf.int64),
            byte_offsets=offsets[record][None],
        )
        records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        return records.take(1).get_single_element()

    return read


def read_example(
    serialized: tf.Tensor, dataset_info: DatasetInfo, *, check_classes: bool = True
) -> dict[str, tf.Tensor]:
    """Parses a record, and subtracts `DatasetInfo.record_offset` from its classes.

    Args:
        serialized: string [], a serialized `tf.train.Example`.
        dataset_info: The meaning of the labels.
        check_classes: Whether a panoptic value of an unknown class raises a TensorFlow error.

    Returns:
        The keys of `records.parse_example`.
    """
    example = parse_example(serialized)
    panoptic, divisor, offset = example["panoptic"], dataset_info.label_divisor, dataset_info.record_offset
    # Compares values with the limits of the classes, as dividing each pixel would take several times as long.
    first_void = (0 if offset else dataset_info.ignore_label) * divisor
    is_void = (panoptic >= first_void) & (panoptic < first_void + max(offset, 1) * divisor)
    allowed = (panoptic >= offset * divisor) & (panoptic < (offset + dataset_info.num_classes) * divisor) | is_void

    def message() -> list[str | tf.Tensor]:
        value = tf.boolean_mask(panoptic, ~allowed)[0]
        void = f"less than {offset}" if offset else f"{dataset_info.ignore_label}"
        return [
            "the label of image '",
            example["image_id"],
            "' has the value ",
            value,
            ", which is class ",
            value // divisor,
            f" with label_divisor {divisor}; classes are {offset}..{offset + dataset_info.num_classes - 1}"
            f" and {void} for void.",
        ]

    if check_classes:
        with tf.control_dependencies([require(tf.reduce_all(allowed), message)]):
            panoptic = tf.identity(panoptic)
    if offset:
        panoptic = tf.where(is_void, dataset_info.void, panoptic - offset * divisor)
    return {**example, "panoptic": panoptic}


def _list_names(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (", ..." if len(files) > 3 else "") if files else "no files"
