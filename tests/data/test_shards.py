"""Shards: their names, their index, their writer, and damaged files."""

import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.shards import (
    ShardWriter,
    _has_whole_content,
    count_examples,
    list_shards,
    list_splits,
    read_index,
    shard_names,
)
from deeplab2_like.errors import UserError


def write(folder, split="train", count=5, shards=2):
    for part, name in enumerate(shard_names(split, shards)):
        with ShardWriter(folder / name) as writer:
            for number in range(part, count, shards):
                writer.write(b"record %d" % number)


def test_shards_are_named_and_listed(tmp_path):
    write(tmp_path)
    write(tmp_path, split="val-2017", shards=1)
    files = list_shards(tmp_path, "train")
    assert files == [str(tmp_path / f"train-0000{number}-of-00002.tfrecord") for number in (0, 1)]
    assert list_splits(tmp_path) == ["train", "val-2017"]
    # Records 0, 2, 4 and 1, 3.
    records = [record.numpy() for record in tf.data.TFRecordDataset(files)]
    assert records == [b"record 0", b"record 2", b"record 4", b"record 1", b"record 3"]
    assert count_examples(files) == 5
    # Nothing else lies there.
    assert len(list(tmp_path.iterdir())) == 3


def test_index_points_at_the_records(tmp_path):
    write(tmp_path)
    index = read_index(list_shards(tmp_path, "train"))
    # A record takes 16 bytes beside its 8 bytes of contents.
    np.testing.assert_array_equal(index.offsets, [0, 24, 48, 0, 24])
    np.testing.assert_array_equal(index.file_numbers, [0, 0, 0, 1, 1])
    assert index.num_bytes == 40


def test_failed_write_leaves_the_old_file(tmp_path):
    write(tmp_path, shards=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = ShardWriter(tmp_path / "train-00000-of-00001.tfrecord")
    writer.__enter__()
    writer.write(b"other")
    writer.__exit__(KeyError, KeyError(), None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = rf"^Cannot write '{tmp_path}/file' \(Not a directory\); choose a folder that can be written\.$"
    with pytest.raises(UserError, match=message), ShardWriter(tmp_path / "file" / "a.tfrecord"):
        pass


def test_file_that_tensorflow_cannot_make_is_named(tmp_path, monkeypatch):
    open_writer = tf.io.TFRecordWriter
    monkeypatch.setattr(tf.io, "TFRecordWriter", lambda path: open_writer(os.path.dirname(path)))
    message = rf"^Cannot write '{tmp_path}' \(Is a directory\); choose a folder that can be written\.$"
    with pytest.raises(UserError, match=message), ShardWriter(tmp_path / "a.tfrecord"):
        pass
    assert list(tmp_path.iterdir()) == []


def test_file_that_cannot_be_put_in_its_place_is_named(tmp_path):
    (tmp_path / "train-00000-of-00001.tfrecord").mkdir()
    with pytest.raises(UserError, match=rf"^Cannot write '{tmp_path}' \(Is a directory\)"):
        write(tmp_path, shards=1)
    assert [path.name for path in tmp_path.iterdir()] == ["train-00000-of-00001.tfrecord"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
@pytest.mark.parametrize("size", [10, 10_000_000])  # Buffered until the end, and written at once.
def test_full_disk_is_a_user_error(tmp_path, monkeypatch, size):
    open_writer = tf.io.TFRecordWriter
    monkeypatch.setattr(tf.io, "TFRecordWriter", lambda path: open_writer("/dev/full"))
    with (
        pytest.raises(UserError, match=rf"^Cannot write '{tmp_path}' \(No space left on device\)"),
        ShardWriter(tmp_path / "train-00000-of-00001.tfrecord") as writer,
    ):
        writer.write(bytes(size))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["", ".train", "a/b"])
def test_split_name_must_be_a_file_name(split):
    with pytest.raises(UserError, match=r"Split name '.*' is not allowed"):
        shard_names(split, 1)


def test_split_name_must_fit_into_a_file_name():
    assert len(shard_names("a" * 100, 1)) == 1
    with pytest.raises(UserError, match=r"up to 100 characters, but 'a{20}\.\.\.' has 101; use a shorter one\.$"):
        shard_names("a" * 101, 1)


@pytest.mark.parametrize("count", [0, 100_000])
def test_number_of_shards_is_checked(count):
    with pytest.raises(UserError, match=rf"The number of shards must be 1\.\.99999, got {count}"):
        shard_names("train", count)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Record folder '.*absent' does not exist"):
        list_shards(tmp_path / "absent", "train")


@pytest.mark.parametrize(("splits", "known"), [((), "none"), (("test", "train"), "test, train")])
def test_missing_split_lists_the_others(tmp_path, splits, known):
    for split in splits:
        write(tmp_path, split=split)
    with pytest.raises(UserError, match=f"has no split 'val'; splits there: {known}\\."):
        list_shards(tmp_path, "val")


def test_missing_shard_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "train-00001-of-00002.tfrecord").unlink()
    with pytest.raises(UserError, match=r"lacks the file train-00001-of-00002\.tfrecord"):
        list_shards(tmp_path, "train")


def test_mixed_conversions_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "train-00000-of-00001.tfrecord").touch()
    with pytest.raises(UserError, match="mixes files of 1 and of 2 parts"):
        list_shards(tmp_path, "train")


# Each record has 12 bytes of header, 8 of contents and 4 after them: cut in the contents of record 1, in its header,
# and in the last byte of record 4.
@pytest.mark.parametrize(("keep", "record"), [(40, 1), (30, 1), (-1, 4)])
def test_truncated_file_is_named(tmp_path, keep, record):
    write(tmp_path, shards=1)
    path = tmp_path / "train-00000-of-00001.tfrecord"
    path.write_bytes(path.read_bytes()[:keep])
    where = rf"record {record} \(counted from 0, at byte {24 * record} of {path.stat().st_size}\)"
    with pytest.raises(UserError, match=rf"train-00000-of-00001\.tfrecord' is cut short in {where}; convert"):
        count_examples([str(path)])


def test_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "train-00000-of-00001.tfrecord"
    path.write_bytes(bytes(cv2.imencode(".png", np.zeros((2, 3, 3), np.uint8))[1]))
    message = r"00001\.tfrecord' is damaged or not an uncompressed TFRecord file: the header of record 0 "
    with pytest.raises(UserError, match=message):
        count_examples([str(path)])


def test_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'.*x\.tfrecord' cannot be opened: No such file"):
        count_examples([str(tmp_path / "x.tfrecord")])


# The length of record 2, the checksum of its length, its contents, and the checksum of these.
@pytest.mark.parametrize("byte", [0, 8, 12, 20])
def test_damaged_record_is_named(tmp_path, byte):
    write(tmp_path, shards=1)
    write(tmp_path, shards=1, split="val")
    paths = [str(tmp_path / f"{split}-00000-of-00001.tfrecord") for split in ("train", "val")]
    content = bytearray(Path(paths[1]).read_bytes())
    content[2 * 24 + byte] ^= 1
    Path(paths[1]).write_bytes(content)
    with pytest.raises(UserError, match=r"[Rr]ecord 2 \(counted from 0") as caught, report_bad_records(paths):
        list(tf.data.TFRecordDataset(paths))
    assert "val-00000-of-00001.tfrecord'" in str(caught.value)


def test_damage_in_unknown_files_is_a_user_error(tmp_path):
    write(tmp_path, shards=1, count=1)
    path = tmp_path / "train-00000-of-00001.tfrecord"
    content = bytearray(path.read_bytes())
    content[struct.calcsize("<QI")] ^= 1  # The first byte after the header; its checksum no longer holds.
    path.write_bytes(content)
    with (
        pytest.raises(UserError, match=r"A TFRecord file is damaged \(corrupted record at 12\)"),
        report_bad_records(),
    ):
        list(tf.data.TFRecordDataset([str(path)]))


def test_checksum_is_that_of_tensorflow(tmp_path):
    contents = np.random.default_rng(0).bytes(1000)
    with ShardWriter(tmp_path / "a") as writer:
        writer.write(contents)
    assert _has_whole_content(str(tmp_path / "a"), 0, 1000)
