"""Records: written and parsed, and errors that name the record."""

import cv2
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.records import parse_example, serialize_example
from deeplab2_like.errors import UserError

# Every byte of the PNG's colors is used: 1 = (1, 0, 0), 256 = (0, 1, 0), 65536 = (0, 0, 1).
PANOPTIC = np.array([[0, 1, 256], [65536, 255_000, 2**24 - 1]], np.int32)
IMAGE = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


def encode(extension, image):
    return bytes(cv2.imencode(extension, image)[1])


def parse(serialized):
    """Parses in a graph, as the pipeline does."""
    dataset = tf.data.Dataset.from_tensors(serialized).map(parse_example)
    with report_bad_records():
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
    parsed = parse(serialize_example(image=IMAGE, panoptic=PANOPTIC, filename="ä [b].png"))
    np.testing.assert_array_equal(parsed["image"], IMAGE)
    np.testing.assert_array_equal(parsed["panoptic"], PANOPTIC)
    assert parsed["image"].dtype == tf.uint8
    assert parsed["panoptic"].dtype == tf.int32
    assert parsed["image_id"].numpy().decode() == "ä [b].png"


def test_record_has_the_keys_of_deeplab2():
    features = features_of(serialize_example(image=IMAGE, panoptic=PANOPTIC, filename="a.png"))
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
    features = features_of(serialize_example(image=content, panoptic=PANOPTIC, filename="a"))
    assert features["image/encoded"].bytes_list.value[0] == content
    assert features["image/format"].bytes_list.value[0] == image_format


@pytest.mark.parametrize(
    ("extension", "stored", "expected"),
    [
        (".png", np.full((2, 3), 7, np.uint8), [7, 7, 7]),  # gray
        (".jpg", np.full((2, 3), 7, np.uint8), [7, 7, 7]),
        (".png", np.full((2, 3, 4), [1, 2, 3, 99], np.uint8), [3, 2, 1]),  # BGR and alpha, which is dropped
        (".png", np.full((2, 3), 7 * 256 + 200, np.uint16), [7, 7, 7]),  # of 16 bits the upper eight remain
        (".png", np.full((2, 3, 3), 7 * 256 + 200, np.uint16), [7, 7, 7]),
        (".bmp", np.full((2, 3, 3), [1, 2, 3], np.uint8), [3, 2, 1]),
        (".tiff", np.full((2, 3, 3), [1, 2, 3], np.uint8), [3, 2, 1]),
    ],
)
def test_other_files_become_rgb_png(extension, stored, expected):
    serialized = serialize_example(image=encode(extension, stored), panoptic=PANOPTIC, filename="a")
    encoded = features_of(serialized)["image/encoded"].bytes_list.value[0]
    # Bit depth 8, color type 2: what any reader takes for RGB.
    assert encoded[:4] == b"\x89PNG"
    assert (encoded[24], encoded[25]) == (8, 2)
    np.testing.assert_array_equal(parse(serialized)["image"], np.broadcast_to(np.uint8(expected), (2, 3, 3)))


def test_equal_input_gives_equal_bytes():
    first, second = (serialize_example(image=IMAGE, panoptic=PANOPTIC, filename="a") for _ in range(2))
    assert first == second


@pytest.mark.parametrize("extension", [".jpg", ".png", ".tiff"])
def test_truncated_image_is_refused(extension):
    content = encode(extension, np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    with pytest.raises(UserError, match=r"'a\.x' is not a readable .*image, or cut short"):
        serialize_example(image=content[: len(content) // 2], panoptic=PANOPTIC, filename="a.x")


def test_sizes_must_agree():
    with pytest.raises(UserError, match=r"Image 'a\.x' is 2x3 but its label is 3x2"):
        serialize_example(image=IMAGE, panoptic=PANOPTIC.reshape(3, 2), filename="a.x")


@pytest.mark.parametrize("value", [-1, 2**24])
def test_label_must_fit_a_png(value):
    with pytest.raises(UserError, match=r"label of 'a\.x' has values .*a record holds 0\.\.16777215"):
        serialize_example(image=IMAGE, panoptic=np.full((2, 3), value), filename="a.x")


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
            r"the label of image 'a\.png' is not an RGB PNG with 8 bits per channel\.",
        ),
        (
            {LABEL_FORMAT: b"png", LABEL: encode(".png", np.zeros((3, 2, 3), np.uint8))},
            r"image 'a\.png' is \[2 3\] but its label is \[3 2\]",
        ),
        ({LABEL: None}, r"the record of image 'a\.png' has no 'image/segmentation/class/encoded'\."),
        ({ENCODED: None}, r"the record of image 'a\.png' has no 'image/encoded'\."),
        ({ENCODED: 3}, r"Bad record: its feature 'image/encoded' has the wrong type\."),
        ({ENCODED: b"no image"}, r"image 'a\.png' is not a JPEG, PNG, GIF, BMP or WebP file\."),
        ({ENCODED: b"B"}, r"image 'a\.png' is not a JPEG"),
        (
            {ENCODED: encode(".bmp", NOISE[..., 0])},  # OpenCV writes gray with a palette.
            r"image 'a\.png' is a BMP with a palette or few bits, which is misread; make its record as PNG\.",
        ),
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
    with pytest.raises(UserError, match=r"^Bad record: it is not a tf\.train\.Example\. Convert the data set again\."):
        parse(content)


def test_file_name_must_be_text():
    with pytest.raises(UserError, match=r"The file name 'a\\udcff' is not Unicode text; rename the file"):
        serialize_example(image=IMAGE, panoptic=PANOPTIC, filename="a\udcff")


def test_other_errors_pass_unchanged():
    with pytest.raises(tf.errors.InvalidArgumentError, match="something else"), report_bad_records():
        raise tf.errors.InvalidArgumentError(None, None, "something else")
