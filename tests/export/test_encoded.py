import io

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import ExifTags, Image

from deeplab2_like.data.exif import apply_orientation, find_orientation
from deeplab2_like.export.encoded import decode_equal_sizes, read_headers

_PIXELS = cv2.resize(np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8), (50, 31))


def _encode(file_format: str, orientation: int | None = None, **options) -> bytes:
    image, stream = Image.fromarray(_PIXELS), io.BytesIO()
    if orientation is not None:
        options["exif"] = image.getexif()
        options["exif"][ExifTags.Base.Orientation] = orientation
    image.save(stream, file_format, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def decode():
    """Decodes one file in a graph: `decode(content, bit_depth=None)` gives pixels, whether they are good, and fault."""

    @tf.function(input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    def run(contents):
        return decode_with(contents, None)

    def decode_with(contents, bit_depth):
        headers = read_headers(contents, max_pixels=2000)
        images, is_good = decode_equal_sizes(contents, headers, tf.constant([0], tf.int64), bit_depth)
        return images[0], is_good[0], headers.fault[0]

    def call(content: bytes, bit_depth: int | None = None):
        contents = tf.constant([content])
        pixels, is_good, fault = run(contents) if bit_depth is None else decode_with(contents, bit_depth)
        return pixels.numpy(), bool(is_good), fault.numpy().decode()

    return call


@pytest.mark.parametrize("orientation", range(10))
def test_jpegs_are_turned_by_all_orientations(decode, orientation):
    content = _encode("JPEG", orientation)  # 0 and 9 have no meaning.
    pixels, is_good, _ = decode(content)
    assert is_good
    stored = tf.io.decode_jpeg(content).numpy()
    np.testing.assert_array_equal(pixels, apply_orientation(stored, find_orientation(content)))


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "GIF", "WEBP"])
def test_other_formats_are_read_as_stored(decode, file_format):
    pixels, is_good, fault = decode(_encode(file_format, 6 if file_format == "PNG" else None))
    assert (pixels.shape, is_good, fault) == ((31, 50, 3), True, "")


def test_headers_of_webp_give_the_size(decode):
    for options in ({"lossless": True}, {"exif": b"Exif\0\0"}):  # The two kinds beside the plain one.
        assert decode(_encode("WEBP", **options))[0].shape == (31, 50, 3)


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"", "The file is not a JPEG, PNG, BMP, GIF or WebP image."),
        (b"GIF", "The file is not a JPEG, PNG, BMP, GIF or WebP image."),
        (b"\xff\xd8\xff", "The JPEG file is damaged or cut short; send a whole file."),
        (_encode("JPEG", 6)[:40], "The JPEG file is damaged or cut short; send a whole file."),
        (_encode("PNG")[:20], "The PNG file is damaged or cut short; send a whole file."),
        (cv2.imencode(".bmp", _PIXELS[..., 0])[1].tobytes(), "A BMP with a palette or few bits cannot be read"),
        (
            cv2.imencode(".png", np.zeros((100, 21)))[1].tobytes(),
            "The image has 100 x 21 pixels (height x width)",
        ),
    ],
)
def test_headers_name_the_fault(decode, content, fault):
    pixels, is_good, found = decode(content)
    assert found.startswith(fault)
    assert (pixels.shape, is_good) == ((0, 0, 3), False)


@pytest.mark.parametrize("file_format", ["JPEG", "PNG"])
def test_a_file_cut_in_its_pixels_becomes_black(decode, file_format):
    pixels, is_good, fault = decode(_encode(file_format)[:-60])
    assert (pixels.shape, is_good, fault) == ((31, 50, 3), False, "")
    assert not pixels.any()


def test_a_fixed_size_is_that_of_the_turned_image():
    headers = read_headers(tf.constant([_encode("JPEG"), _encode("JPEG", 6)]), max_pixels=2000, size=(31, 50))
    assert headers.fault.numpy().tolist() == [
        b"",
        b"The image has 50 x 31 pixels (height x width), but this model takes 31 x 50 only.",
    ]


def test_wide_pngs_are_read_as_the_training_images(decode):
    wide = cv2.imencode(".png", np.array([[0, 16, 4095, 65535]], np.uint16))[1].tobytes()
    # The upper 8 of 12 bits, or of 16; a value above 12 bits is as bright as can be.
    assert decode(wide, 12)[0][0, :, 0].tolist() == [0, 1, 255, 255]
    assert decode(wide)[0][0, :, 0].tolist() == [0, 0, 15, 255]
    narrow = cv2.imencode(".png", np.array([[0, 16, 255]], np.uint8))[1].tobytes()
    assert decode(narrow, 12)[0][0, :, 0].tolist() == [0, 16, 255]
