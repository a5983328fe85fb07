"""The input pipeline: from TFRecords to training batches and evaluation examples.

Training is exactly resumable: the order of the examples and all that is random about them depend on the seed and the
step alone. Epoch e visits the records in a permutation drawn from (seed, e); the n-th example ever drawn is augmented
with the seed (seed, n). As records are addressed by their place in the files, every epoch is shuffled completely
without a buffer, and resuming at a later step reads nothing of what it skips.
"""

from collections.abc import Callable, Sequence

import tensorflow as tf

from deeplab2_like.configs.schema import ColorJitterConfig
from deeplab2_like.data import augment, tfrecord
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError

Targets = dict[str, tf.Tensor]

# Data sets up to this size are held in memory, as serialized records, unless the user says otherwise.
CACHE_LIMIT_BYTES = 2**30


def make_train_dataset(
    files: Sequence[str],
    *,
    make_targets: Callable[[tf.Tensor], Targets],
    dataset_info: DatasetInfo,
    batch_size: int,
    crop_size: tuple[int, int],
    pad_value: Sequence[int],
    scale_range: tuple[float, float] = (1.0, 1.0),
    flip: bool = True,
    dihedral: bool = False,
    color_jitter: ColorJitterConfig | None = None,
    seed: int = 0,
    start_step: int = 0,
    num_parts: int = 1,
    parts: Sequence[int] = (0,),
    cache: bool | None = None,
    num_parallel_calls: int = tf.data.AUTOTUNE,
) -> tf.data.Dataset:
    """Makes the endless data set of training batches.

    Args:
        files: TFRecord files, as `tfrecord.list_shards` gives them.
        make_targets: A system's targets from one panoptic map, int32 [h, w]; all of static shape.
        dataset_info: What the labels mean.
        batch_size: Examples per batch, over all replicas.
        crop_size: Height and width of the training images.
        pad_value: Colour of padded pixels, red, green and blue; best the mean that the system normalises to zero.
        scale_range: See `augment.augment`, as for the next three.
        flip: Whether to mirror left and right.
        dihedral: Whether to turn and mirror in all eight ways.
        color_jitter: How to change colours.
        seed: Decides order and augmentation.
        start_step: Number of batches to leave out at the beginning, to resume there.
        num_parts: Into how many equal parts each batch is cut, one for each replica.
        parts: Which of them are wanted here, in growing order; they come one after the other.
        cache: Whether to hold all serialized records in memory; None: if they are smaller than `CACHE_LIMIT_BYTES`.
        num_parallel_calls: Examples prepared at once.

    Returns:
        Yields `{"image": uint8 [B, h, w, 3], "image_id": string [B], "targets": make_targets' dict, each [B, ...]}`
        with B = `batch_size / num_parts`.

    Raises:
        UserError: If the files hold no records or are damaged, or a batch cannot be cut. While iterating, a faulty
            record raises a TensorFlow error, which `tfrecord.user_errors` turns into a `UserError`.
    """
    if batch_size % num_parts:
        raise UserError(f"A batch of {batch_size} images cannot be cut into {num_parts} equal parts.")
    index = tfrecord.read_index(files)
    if not len(index):
        raise UserError(f"The TFRecord files hold no examples ({_names(files)}); convert the data set again.")
    if cache is None:
        cache = index.num_bytes <= CACHE_LIMIT_BYTES
    read = _cached_reader(index) if cache else file_reader(index)

    def prepare(number: tf.Tensor, record: tf.Tensor) -> dict[str, tf.Tensor | Targets]:
        example = read_example(read(record), dataset_info)
        example = augment.augment(
            example,
            seed=tf.stack([tf.constant(seed, tf.int64), number]),
            crop_size=crop_size,
            void=dataset_info.void,
            pad_value=pad_value,
            scale_range=scale_range,
            flip=flip,
            dihedral=dihedral,
            color_jitter=color_jitter,
        )
        return {
            "image": example["image"],
            "image_id": example["image_id"],
            "targets": make_targets(example["panoptic"]),
        }

    part_size = batch_size // num_parts
    dataset = _numbered_records(len(index), seed=seed, start=start_step * batch_size)
    if len(parts) < num_parts:
        wanted = tf.constant(list(parts), tf.int64)
        dataset = dataset.filter(lambda number, _: tf.reduce_any(number % batch_size // part_size == wanted))
    dataset = dataset.map(prepare, num_parallel_calls=num_parallel_calls, deterministic=True)
    return dataset.batch(part_size, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def make_eval_dataset(
    files: Sequence[str], *, dataset_info: DatasetInfo, num_parallel_calls: int = tf.data.AUTOTUNE
) -> tf.data.Dataset:
    """Makes the data set of whole, unaltered images for evaluation, each once, in the order of the files.

    Args:
        files: TFRecord files, as `tfrecord.list_shards` gives them.
        dataset_info: What the labels mean.
        num_parallel_calls: Examples read at once.

    Returns:
        Yields `{"image": uint8 [H, W, 3], "panoptic": int32 [H, W], "image_id": string []}`, not batched.
    """

    def prepare(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
        return read_example(serialized, dataset_info)

    dataset = tf.data.TFRecordDataset(list(files))
    dataset = dataset.map(prepare, num_parallel_calls=num_parallel_calls, deterministic=True)
    return dataset.prefetch(tf.data.AUTOTUNE)


def _numbered_records(num_records: int, *, seed: int, start: int) -> tf.data.Dataset:
    """Endless pairs (number of the example, position of its record), int64 [], from number `start` on."""

    def epoch(number: tf.Tensor) -> tf.data.Dataset:
        # Negative, so that no epoch shares its random numbers with the augmentation of an example.
        epoch_seed = tf.stack([tf.constant(seed, tf.int64), -1 - number])
        order = tf.random.experimental.stateless_shuffle(tf.range(num_records, dtype=tf.int64), seed=epoch_seed)
        return tf.data.Dataset.from_tensor_slices(order)

    first_epoch, position = divmod(start, num_records)
    records = tf.data.Dataset.range(first_epoch, tf.int64.max).flat_map(epoch).skip(position)
    return records.enumerate(start=start)


def _cached_reader(index: tfrecord.RecordIndex) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from a record's position, int64 [], to its bytes, string []; holds all records in memory."""
    contents: list[bytes] = []
    for path in index.files:
        with tfrecord.user_errors([path]):
            contents.extend(tf.data.TFRecordDataset(path).as_numpy_iterator())
    with tf.device("CPU:0"):
        records = tf.constant(contents)
    return lambda position: tf.gather(records, position)


def file_reader(index: tfrecord.RecordIndex) -> Callable[[tf.Tensor], tf.Tensor]:
    """Returns a function from a record's position, int64 [], to its bytes, string []; reads that record alone."""
    with tf.device("CPU:0"):
        files = tf.constant(index.files)
        file_numbers = tf.constant(index.file_numbers)
        offsets = tf.constant(index.offsets)

    def read(position: tf.Tensor) -> tf.Tensor:
        # `tf.data.TFRecordDataset` does not offer the offset that its operation takes.
        variant = tf.raw_ops.TFRecordDatasetV2(
            filenames=tf.gather(files, file_numbers[position])[None],
            compression_type="",
            buffer_size=tf.constant(0, tf.int64),
            byte_offsets=offsets[position][None],
        )
        records = tf.data.experimental.from_variant(variant, tf.TensorSpec([], tf.string))
        return records.take(1).get_single_element()

    return read


def read_example(
    serialized: tf.Tensor, dataset_info: DatasetInfo, *, check_classes: bool = True
) -> dict[str, tf.Tensor]:
    """Reads a record as `tfrecord.parse_example` does, and takes `DatasetInfo.record_offset` off its classes.

    With `check_classes` it stops on a panoptic value whose class the data set does not have.
    """
    example = tfrecord.parse_example(serialized)
    panoptic, divisor, offset = example["panoptic"], dataset_info.label_divisor, dataset_info.record_offset
    # Compared with the smallest values of classes: to divide each pixel would take several times as long.
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
        with tf.control_dependencies([tfrecord.require(tf.reduce_all(allowed), message)]):
            panoptic = tf.identity(panoptic)
    if offset:
        panoptic = tf.where(is_void, dataset_info.void, panoptic - offset * divisor)
    return {**example, "panoptic": panoptic}


def _names(files: Sequence[str]) -> str:
    return ", ".join(files[:3]) + (", ..." if len(files) > 3 else "") if files else "no files"
