"""The input pipeline: order, resuming, faults."""

import itertools

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.configs.schema import ColorJitterConfig, DataConfig
from deeplab2_like.data import pipeline
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.records import serialize_example
from deeplab2_like.data.shards import ShardWriter, list_shards, read_index, shard_names
from deeplab2_like.errors import UserError

INFO = DatasetInfo.from_coco_categories(
    [{"id": 1, "name": "thing", "isthing": 1}, {"id": 2, "name": "stuff", "isthing": 0}], name="made up"
)
COUNT = 7
PAD = (9, 8, 7)


def write(folder, panoptics, split="train", shards=2):
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (*panoptic.shape, 3), np.uint8) for panoptic in panoptics]
    for part, name in enumerate(shard_names(split, shards)):
        with ShardWriter(folder / name) as writer:
            for number in range(part, len(panoptics), shards):
                record = {"image": images[number], "panoptic": panoptics[number], "filename": str(number)}
                writer.write(serialize_example(**record))
    return list_shards(folder, split)


@pytest.fixture
def files(tmp_path):
    # Sizes differ; the value tells the example.
    return write(tmp_path, [np.full((8 + number, 12), number + 1, np.int32) for number in range(COUNT)])


def make_targets(panoptic):
    return {"label": panoptic, "pixels": tf.reduce_sum(tf.cast(panoptic != INFO.void, tf.int32))}


def train(files, *, crop_size=(10, 11), scale_range=(0.5, 2.0), **changes):
    jitter = ColorJitterConfig(brightness=0.2, contrast=0.2, saturation=0.2, hue=0.1)
    config = DataConfig(crop_size=crop_size, scale_range=scale_range, color_jitter=jitter)
    arguments = {"make_targets": make_targets, "dataset_info": INFO, "batch_size": 3, "pad_value": PAD, "seed": 5}
    return pipeline.make_train_dataset(files, config, **(arguments | changes))


def take(dataset, count):
    with report_bad_records():
        return list(itertools.islice(dataset.as_numpy_iterator(), count))


def assert_same(first, second):
    tf.nest.map_structure(np.testing.assert_array_equal, first, second)


def ids(batches):
    return [int(i) for batch in batches for i in batch["image_id"]]


def test_batches_have_static_shapes(files):
    dataset = train(files)
    assert dataset.element_spec == {
        "image": tf.TensorSpec([3, 10, 11, 3], tf.uint8),
        "image_id": tf.TensorSpec([3], tf.string),
        "number": tf.TensorSpec([3], tf.int64),
        "targets": {"label": tf.TensorSpec([3, 10, 11], tf.int32), "pixels": tf.TensorSpec([3], tf.int32)},
    }
    (batch,) = take(dataset, 1)
    for image_id, label, pixels in zip(batch["image_id"], *batch["targets"].values(), strict=True):
        labeled = label[label != INFO.void]
        assert (labeled == int(image_id) + 1).all()
        assert pixels == labeled.size > 0


def test_padding_has_the_given_color(files):
    # Every image is 12 wide and at most 14 high, so that at most 14 * 12 of 20 * 20 pixels are not padding.
    (batch,) = take(train(files, crop_size=(20, 20), scale_range=(1.0, 1.0)), 1)
    for image, label in zip(batch["image"], batch["targets"]["label"], strict=True):
        assert (image[label == INFO.void] == PAD).all()
        assert (label == INFO.void).sum() >= 20 * 20 - 14 * 12


@pytest.mark.parametrize("cache", [True, False])
def test_every_epoch_holds_each_example_once(files, cache):
    # 7 batches of 3 are 3 epochs of 7; batches reach across the border of epochs.
    order = ids(take(train(files, cache=cache), 7))
    epochs = [order[start : start + COUNT] for start in range(0, 3 * COUNT, COUNT)]
    assert [sorted(epoch) for epoch in epochs] == [list(range(COUNT))] * 3
    assert len({tuple(epoch) for epoch in epochs}) == 3


# 2 lies in the first epoch; 7 batches of 3 end where an epoch does; 1000 is far beyond.
@pytest.mark.parametrize("start_step", [2, 7, 9])
def test_resumes_exactly(files, start_step):
    resumed = take(train(files, start_step=start_step), 12 - start_step)
    assert_same(take(train(files), 12)[start_step:], resumed)
    # Examples are numbered through all batches of three.
    assert [number for batch in resumed for number in batch["number"]] == list(range(3 * start_step, 36))


@pytest.mark.parametrize("start_step", [0, 4])
def test_parts_make_up_the_batches(files, start_step):
    whole = take(train(files, batch_size=6, start_step=start_step), 5)
    # Two workers of two replicas, and of one.
    for num_parts, shares in ((4, None), (6, [[0, 1, 2], [3, 4, 5]]), (3, [[0], [1, 2]]), (1, [[0]])):
        if shares is None:
            with pytest.raises(UserError, match="A batch of 6 images cannot be divided into 4 equal parts"):
                train(files, batch_size=6, num_parts=num_parts, parts=[0])
            continue
        parts = {}
        for share in shares:
            batches = take(
                train(files, batch_size=6, start_step=start_step, num_parts=num_parts, parts=share), 5 * len(share)
            )
            for position, batch in enumerate(batches):
                parts[position // len(share), share[position % len(share)]] = batch
        for number, expected in enumerate(whole):
            joined = [parts[number, part] for part in range(num_parts)]
            assert_same(tf.nest.map_structure(lambda *values: np.concatenate(values), *joined), expected)


def test_neither_cache_nor_parallelism_changes_anything(files):
    expected = take(train(files, cache=True, num_parallel_calls=1), 6)
    for arguments in ({"cache": False, "num_parallel_calls": 4}, {"cache": True, "num_parallel_calls": 4}, {}):
        assert_same(take(train(files, **arguments), 6), expected)


def test_an_example_differs_from_epoch_to_epoch(files):
    batches = take(train(files, batch_size=1), 2 * COUNT)
    first, second = [batch["image"] for batch in batches if batch["image_id"][0] == b"4"]
    assert (first != second).any()


def test_seed_changes_the_order(files):
    assert ids(take(train(files), 4)) != ids(take(train(files, seed=6), 4))


def test_batch_may_exceed_the_data_set(files):
    (batch,) = take(train(files, batch_size=2 * COUNT), 1)
    assert sorted(ids([batch])) == sorted([*range(COUNT)] * 2)


def test_distributed_batches_are_the_same(files):
    dataset = train(files)
    strategy = tf.distribute.OneDeviceStrategy("CPU:0")
    distributed = iter(strategy.experimental_distribute_dataset(dataset))
    expected = take(dataset, 3)
    assert_same([tf.nest.map_structure(lambda x: x.numpy(), next(distributed)) for _ in range(3)], expected)


def test_evaluation_keeps_whole_images_in_order(files):
    examples = take(pipeline.make_eval_dataset(files, dataset_info=INFO), 100)
    # Two files: records 0, 2, 4, 6 and 1, 3, 5.
    assert [int(example["image_id"]) for example in examples] == [0, 2, 4, 6, 1, 3, 5]
    for example in examples:
        number = int(example["image_id"])
        np.testing.assert_array_equal(example["panoptic"], np.full((8 + number, 12), number + 1))
        assert example["image"].shape == (8 + number, 12, 3)


def test_all_known_classes_pass(tmp_path):
    # Crowd, first thing, last thing, stuff, void.
    files = write(tmp_path, [np.array([[0, 1, 999, 1000, 255_000]], np.int32)])
    assert len(take(pipeline.make_eval_dataset(files, dataset_info=INFO), 2)) == 1


@pytest.mark.parametrize(("value", "class_id"), [(2000, 2), (254_999, 254), (256_000, 256)])
def test_unknown_class_is_named(tmp_path, value, class_id):
    good, bad = np.full((4, 4), 1, np.int32), np.full((4, 4), 1, np.int32)
    bad[2, 3] = value
    files = write(tmp_path, [good, bad], shards=1)
    message = (
        f"Bad record: the label of image '1' has the value {value}, which is class {class_id} with label_divisor 1000; "
        r"classes are 0\.\.1 and 255 for void\."
    )
    with pytest.raises(UserError, match=message):
        take(pipeline.make_eval_dataset(files, dataset_info=INFO), 2)
    with pytest.raises(UserError, match=message):
        take(train(files), 2)


def test_empty_files_are_refused(tmp_path):
    path = tmp_path / "train-00000-of-00001.tfrecord"
    path.touch()
    with pytest.raises(UserError, match=r"hold no examples \(.*train-00000-of-00001\.tfrecord\)"):
        train([str(path)])
    with pytest.raises(UserError, match=r"hold no examples \(no files\)"):
        train([])


def test_truncated_file_is_refused(files):
    with open(files[1], "r+b") as file:
        file.truncate(200)
    with pytest.raises(UserError, match=r"train-00001-of-00002\.tfrecord' is cut short"):
        train(files)


@pytest.mark.parametrize("cache", [True, False])
def test_damaged_record_is_a_user_error(files, cache):
    index = read_index(files)
    assert index.file_numbers.tolist() == [0, 0, 0, 0, 1, 1, 1]
    with open(files[1], "r+b") as file:
        file.seek(index.offsets[5] + 40)
        file.write(b"????")
    message = (
        r"^Record 1 \(counted from 0\) of '.*train-00001-of-00002\.tfrecord' is damaged; convert the data set again"
    )
    with pytest.raises(UserError, match=message), report_bad_records(files):
        list(itertools.islice(train(files, cache=cache).as_numpy_iterator(), 5))
