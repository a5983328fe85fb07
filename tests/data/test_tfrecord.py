"""One record and the files of a split."""

import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.data import tfrecord
from deeplab2_like.errors import UserError

# Every byte of the PNG's colours is used: 1 = (1, 0, 0), 256 = (0, 1, 0), 65536 = (0, 0, 1).
PANOPTIC = np.array([[0, 1, 256], [65536, 255_000, 2**24 - 1]], np.int32)
IMAGE = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


def encode(extension, image):
    return bytes(cv2.imencode(extension, image)[1])


def parse(serialized):
    """Parses in a graph, as the pipeline does."""
    dataset = tf.data.Dataset.from_tensors(serialized).map(tfrecord.parse_example)
    with tfrecord.user_errors():
        return dataset.get_single_element()


def features_of(serialized):
    return tf.train.Example.FromString(serialized).features.feature


def deeplab2_record(**changes):
    """A record as DeepLab2 writes it, with some features replaced, or left out where the change is None."""
    values = {
        "image/encoded": encode(".png", IMAGE[:, :, ::-1]),
        "image/filename": b"a.png",
        "image/format": b"png",
        "image/height": 2,
        "image/width": 3,
        "image/channels": 3,
        "image/segmentation/class/encoded": PANOPTIC.astype("<i4").tobytes(),
        "image/segmentation/class/format": b"raw",
    } | changes
    example = tf.train.Example()
    for key, value in values.items():
        if value is None:
            continue
        if isinstance(value, bytes):
            example.features.feature[key].bytes_list.value.append(value)
        else:
            example.features.feature[key].int64_list.value.append(value)
    return example.SerializeToString()


def test_round_trip_is_exact():
    parsed = parse(tfrecord.serialize_example(image=IMAGE, panoptic=PANOPTIC, filename="ä [b].png"))
    np.testing.assert_array_equal(parsed["image"], IMAGE)
    np.testing.assert_array_equal(parsed["panoptic"], PANOPTIC)
    assert parsed["image"].dtype == tf.uint8
    assert parsed["panoptic"].dtype == tf.int32
    assert parsed["image_id"].numpy().decode() == "ä [b].png"


def test_record_has_the_keys_of_deeplab2():
    features = features_of(tfrecord.serialize_example(image=IMAGE, panoptic=PANOPTIC, filename="a.png"))
    assert set(features) == set(features_of(deeplab2_record()))
    assert features["image/height"].int64_list.value[0] == 2
    assert features["image/width"].int64_list.value[0] == 3
    assert features["image/format"].bytes_list.value[0] == b"png"


def test_reads_deeplab2_record():
    parsed = parse(deeplab2_record())
    np.testing.assert_array_equal(parsed["image"], IMAGE)
    np.testing.assert_array_equal(parsed["panoptic"], PANOPTIC)


@pytest.mark.parametrize(("extension", "image_format"), [(".jpg", b"jpeg"), (".png", b"png")])
def test_rgb_file_is_kept_byte_for_byte(extension, image_format):
    content = encode(extension, np.random.default_rng(0).integers(0, 256, (2, 3, 3), np.uint8))
    features = features_of(tfrecord.serialize_example(image=content, panoptic=PANOPTIC, filename="a"))
    assert features["image/encoded"].bytes_list.value[0] == content
    assert features["image/format"].bytes_list.value[0] == image_format


@pytest.mark.parametrize(
    ("extension", "stored", "expected"),
    [
        (".png", np.full((2, 3), 7, np.uint8), [7, 7, 7]),  # grey
        (".jpg", np.full((2, 3), 7, np.uint8), [7, 7, 7]),
        (".png", np.full((2, 3, 4), [1, 2, 3, 99], np.uint8), [3, 2, 1]),  # BGR and alpha, which is dropped
        (".png", np.full((2, 3), 7 * 256 + 200, np.uint16), [7, 7, 7]),  # of 16 bits the upper eight remain
        (".png", np.full((2, 3, 3), 7 * 256 + 200, np.uint16), [7, 7, 7]),
        (".bmp", np.full((2, 3, 3), [1, 2, 3], np.uint8), [3, 2, 1]),
        (".tiff", np.full((2, 3, 3), [1, 2, 3], np.uint8), [3, 2, 1]),
    ],
)
def test_other_files_become_rgb_png(extension, stored, expected):
    serialized = tfrecord.serialize_example(image=encode(extension, stored), panoptic=PANOPTIC, filename="a")
    encoded = features_of(serialized)["image/encoded"].bytes_list.value[0]
    # Bit depth 8, colour type 2: what any reader takes for RGB.
    assert encoded[:4] == b"\x89PNG"
    assert (encoded[24], encoded[25]) == (8, 2)
    np.testing.assert_array_equal(parse(serialized)["image"], np.broadcast_to(np.uint8(expected), (2, 3, 3)))


def test_equal_input_gives_equal_bytes():
    first, second = (tfrecord.serialize_example(image=IMAGE, panoptic=PANOPTIC, filename="a") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("extension", [".jpg", ".png", ".tiff"])
def test_truncated_image_is_refused(extension):
    content = encode(extension, np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    with pytest.raises(UserError, match=r"'a\.x' is not a readable .*image, or cut short"):
        tfrecord.serialize_example(image=content[: len(content) // 2], panoptic=PANOPTIC, filename="a.x")


def test_sizes_must_agree():
    with pytest.raises(UserError, match=r"Image 'a\.x' is 2x3 but its label is 3x2"):
        tfrecord.serialize_example(image=IMAGE, panoptic=PANOPTIC.reshape(3, 2), filename="a.x")


@pytest.mark.parametrize("value", [-1, 2**24])
def test_label_must_fit_a_png(value):
    with pytest.raises(UserError, match=r"label of 'a\.x' has values .*a record holds 0\.\.16777215"):
        tfrecord.serialize_example(image=IMAGE, panoptic=np.full((2, 3), value), filename="a.x")


ENCODED, LABEL, LABEL_FORMAT = "image/encoded", "image/segmentation/class/encoded", "image/segmentation/class/format"
NOISE = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {LABEL_FORMAT: b"tiff"},
            r"Bad record: image 'a\.png' has a label of format 'tiff'; 'raw' and 'png' are read\.",
        ),
        ({LABEL: b"1234"}, r"image 'a\.png' has a raw label of 4 bytes, not 24\."),
        (
            {LABEL_FORMAT: b"png", LABEL: encode(".png", np.zeros((2, 3), np.uint8))},
            r"the label of image 'a\.png' is no PNG of red, green and blue with 8 bits each\.",
        ),
        (
            {LABEL_FORMAT: b"png", LABEL: encode(".png", np.zeros((3, 2, 3), np.uint8))},
            r"image 'a\.png' is \[2 3\] but its label is \[3 2\]",
        ),
        ({LABEL: None}, r"the record of image 'a\.png' has no 'image/segmentation/class/encoded'\."),
        ({ENCODED: None}, r"the record of image 'a\.png' has no 'image/encoded'\."),
        ({ENCODED: 3}, r"Bad record: its feature 'image/encoded' has a wrong type\."),
        ({ENCODED: b"no image"}, r"image 'a\.png' is not a JPEG, PNG, GIF, BMP or WebP file\."),
        ({ENCODED: b"B"}, r"image 'a\.png' is not a JPEG"),
        (
            {ENCODED: encode(".png", NOISE)[:1000]},
            r"^Bad record: an image cannot be decoded \(Invalid PNG data, size 1000\)\.",
        ),
        (
            {ENCODED: encode(".jpg", NOISE)[:300]},
            r"^Bad record: an image cannot be decoded \(.*Invalid JPEG data.*\)\.",
        ),
        ({LABEL_FORMAT: b"png", LABEL: encode(".jpg", NOISE)}, r"the label of image 'a\.png' is not a PNG file\."),
        (
            {LABEL_FORMAT: b"png", LABEL: encode(".png", NOISE)[:1000]},
            r"^Bad record: a label cannot be decoded \(Invalid PNG data, size 1000\)\.",
        ),
    ],
)
def test_faulty_record_is_named(changes, message):
    with pytest.raises(UserError, match=message + r".*Convert the data set again\.$"):
        parse(deeplab2_record(**changes))


@pytest.mark.parametrize("content", [b"no example", b"\xff\x85\x0a\x00", deeplab2_record()[:-5]])
def test_what_is_no_example_is_named(content):
    with pytest.raises(UserError, match=r"^Bad record: it is no tf\.train\.Example\. Convert the data set again\."):
        parse(content)


def test_file_name_must_be_text():
    with pytest.raises(UserError, match=r"The file name 'a\\udcff' is no Unicode text; rename the file"):
        tfrecord.serialize_example(image=IMAGE, panoptic=PANOPTIC, filename="a\udcff")


def test_other_errors_pass_unchanged():
    with pytest.raises(tf.errors.InvalidArgumentError, match="something else"), tfrecord.user_errors():
        raise tf.errors.InvalidArgumentError(None, None, "something else")


def write(folder, split="train", count=5, shards=2):
    for part, name in enumerate(tfrecord.shard_names(split, shards)):
        with tfrecord.FileWriter(folder / name) as writer:
            for number in range(part, count, shards):
                writer.write(b"record %d" % number)


def test_shards_are_named_and_listed(tmp_path):
    write(tmp_path)
    write(tmp_path, split="val-2017", shards=1)
    files = tfrecord.list_shards(tmp_path, "train")
    assert files == [str(tmp_path / f"train-0000{number}-of-00002.tfrecord") for number in (0, 1)]
    assert tfrecord.available_splits(tmp_path) == ["train", "val-2017"]
    # Records 0, 2, 4 and 1, 3.
    records = [record.numpy() for record in tf.data.TFRecordDataset(files)]
    assert records == [b"record 0", b"record 2", b"record 4", b"record 1", b"record 3"]
    assert tfrecord.count_examples(files) == 5
    # Nothing else lies there.
    assert len(list(tmp_path.iterdir())) == 3


def test_index_points_at_the_records(tmp_path):
    write(tmp_path)
    index = tfrecord.read_index(tfrecord.list_shards(tmp_path, "train"))
    # A record takes 16 bytes beside its 8 bytes of contents.
    np.testing.assert_array_equal(index.offsets, [0, 24, 48, 0, 24])
    np.testing.assert_array_equal(index.file_numbers, [0, 0, 0, 1, 1])
    assert index.num_bytes == 40


def test_failed_write_leaves_the_old_file(tmp_path):
    write(tmp_path, shards=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    writer = tfrecord.FileWriter(tmp_path / "train-00000-of-00001.tfrecord")
    writer.__enter__()
    writer.write(b"other")
    writer.__exit__(KeyError, KeyError(), None)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    message = rf"^Cannot write '{tmp_path}/file' \(Not a directory\); choose a folder that can be written\.$"
    with pytest.raises(UserError, match=message), tfrecord.FileWriter(tmp_path / "file" / "a.tfrecord"):
        pass


def test_file_that_tensorflow_cannot_make_is_named(tmp_path, monkeypatch):
    open_writer = tf.io.TFRecordWriter
    monkeypatch.setattr(tf.io, "TFRecordWriter", lambda path: open_writer(os.path.dirname(path)))
    message = rf"^Cannot write '{tmp_path}' \(Is a directory\); choose a folder that can be written\.$"
    with pytest.raises(UserError, match=message), tfrecord.FileWriter(tmp_path / "a.tfrecord"):
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
        tfrecord.FileWriter(tmp_path / "train-00000-of-00001.tfrecord") as writer,
    ):
        writer.write(bytes(size))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("split", ["", ".train", "a/b"])
def test_split_name_must_be_a_file_name(split):
    with pytest.raises(UserError, match=r"Split name '.*' is not allowed"):
        tfrecord.shard_names(split, 1)


@pytest.mark.parametrize("count", [0, 100_000])
def test_number_of_shards_is_checked(count):
    with pytest.raises(UserError, match=rf"shards must be 1\.\.99999, got {count}"):
        tfrecord.shard_names("train", count)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(UserError, match=r"Record folder '.*absent' does not exist"):
        tfrecord.list_shards(tmp_path / "absent", "train")


@pytest.mark.parametrize(("splits", "known"), [((), "none"), (("test", "train"), "test, train")])
def test_missing_split_lists_the_others(tmp_path, splits, known):
    for split in splits:
        write(tmp_path, split=split)
    with pytest.raises(UserError, match=f"has no split 'val'; splits there: {known}\\."):
        tfrecord.list_shards(tmp_path, "val")


def test_missing_shard_is_named(tmp_path):
    write(tmp_path)
    (tmp_path / "train-00001-of-00002.tfrecord").unlink()
    with pytest.raises(UserError, match=r"lacks the file train-00001-of-00002\.tfrecord"):
        tfrecord.list_shards(tmp_path, "train")


def test_mixed_conversions_are_refused(tmp_path):
    write(tmp_path)
    (tmp_path / "train-00000-of-00001.tfrecord").touch()
    with pytest.raises(UserError, match="mixes files of 1 and of 2 parts"):
        tfrecord.list_shards(tmp_path, "train")


# Each record has 12 bytes of header, 8 of contents and 4 after them: cut in the contents of record 1, in its header,
# and in the last byte of record 4.
@pytest.mark.parametrize(("keep", "record"), [(40, 1), (30, 1), (-1, 4)])
def test_truncated_file_is_named(tmp_path, keep, record):
    write(tmp_path, shards=1)
    path = tmp_path / "train-00000-of-00001.tfrecord"
    path.write_bytes(path.read_bytes()[:keep])
    where = rf"record {record} \(counted from 0, at byte {24 * record} of {path.stat().st_size}\)"
    with pytest.raises(UserError, match=rf"train-00000-of-00001\.tfrecord' is cut short in {where}; convert"):
        tfrecord.count_examples([str(path)])


def test_file_of_another_kind_is_named(tmp_path):
    path = tmp_path / "train-00000-of-00001.tfrecord"
    path.write_bytes(encode(".png", IMAGE))
    message = r"00001\.tfrecord' is damaged or not an uncompressed TFRecord file: the header of record 0 "
    with pytest.raises(UserError, match=message):
        tfrecord.count_examples([str(path)])


def test_absent_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"'.*x\.tfrecord' cannot be opened: No such file"):
        tfrecord.count_examples([str(tmp_path / "x.tfrecord")])


# The length of record 2, the checksum of its length, its contents, and the checksum of these.
@pytest.mark.parametrize("byte", [0, 8, 12, 20])
def test_damaged_record_is_named(tmp_path, byte):
    write(tmp_path, shards=1)
    write(tmp_path, shards=1, split="val")
    paths = [str(tmp_path / f"{split}-00000-of-00001.tfrecord") for split in ("train", "val")]
    content = bytearray(Path(paths[1]).read_bytes())
    content[2 * 24 + byte] ^= 1
    Path(paths[1]).write_bytes(content)
    with pytest.raises(UserError, match=r"[Rr]ecord 2 \(counted from 0") as caught, tfrecord.user_errors(paths):
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
        tfrecord.user_errors(),
    ):
        list(tf.data.TFRecordDataset([str(path)]))


def test_checksum_is_that_of_tensorflow(tmp_path):
    contents = np.random.default_rng(0).bytes(1000)
    with tfrecord.FileWriter(tmp_path / "a") as writer:
        writer.write(contents)
    assert tfrecord._has_whole_contents(str(tmp_path / "a"), 0, 1000)
