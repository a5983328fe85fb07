"""Image files: orientation, decoding, PNGs, label PNGs."""

import os
import struct
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageOps

from deeplab2_like.data.exif import find_orientation, without_orientation
from deeplab2_like.data.images import (
    decode_image,
    encode_png,
    list_images,
    read_id_png,
    read_image,
    turn_upright,
    write_png,
)
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.errors import UserError

# Smooth, as for JPEG: bright towards one corner.
PIXELS = (np.add.outer(np.arange(16) * 9, np.arange(24) * 4)[..., None] + np.zeros(3)).astype(np.uint8)


def save(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif, quality=100, lossless=True)
    return path


@pytest.mark.parametrize("ending", [".png", ".jpg", ".webp", ".tif"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_pillows(tmp_path: Path, orientation: int, ending: str) -> None:
    file = save(tmp_path / f"a{ending}", orientation)
    with Image.open(file) as image:
        # Pillow has turned a TIFF by itself.
        expected = np.asarray(image if ending == ".tif" else ImageOps.exif_transpose(image))
    found = read_image(file)
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, atol=5)  # Decoders of JPEG differ a little.
    content = file.read_bytes()
    assert find_orientation(content) == orientation
    turned = turn_upright(content, file.name)
    np.testing.assert_array_equal(decode_image(turned, file.name), found)
    assert (turned == content) == (orientation == 1)
    assert find_orientation(turned) == 1
    assert decode_image(content, file.name).shape == PIXELS.shape


def test_byte_orders() -> None:
    # A header, a directory of two entries, of which the second is the orientation.
    for beginning, order in ((b"II*\0", "<"), (b"MM\0*", ">")):
        entries = struct.pack(f"{order}HHIHH", 0x0100, 3, 1, 7, 0) + struct.pack(f"{order}HHIHH", 0x0112, 3, 1, 6, 0)
        block = beginning + struct.pack(f"{order}IH", 8, 2) + entries
        assert find_orientation(block) == 6
        assert find_orientation(without_orientation(block)) == 1
        for length in range(len(block) - 2):
            assert find_orientation(block[:length]) == 1
            assert without_orientation(block[:length]) == block[:length]


@pytest.mark.parametrize("content", [b"", b"nothing", b"\xff\xd8\xff\xe1\0\x10Exif\0\0II*\0", b"II*\0\xff\xff\xff\xff"])
def test_nonsense_is_no_orientation(content: bytes) -> None:
    assert find_orientation(content) == 1


def test_unknown_orientations_do_not_count(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", 9)
    np.testing.assert_array_equal(read_image(file), PIXELS)


def test_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.jpg' is not a readable image, or cut short"):
        read_image(tmp_path / "a.jpg")


IMAGE = np.zeros((2, 3, 3), np.uint8)
IMAGE[0, 1] = 255, 128, 0


def test_png_holds_red_green_blue() -> None:
    decoded = cv2.imdecode(np.frombuffer(encode_png(IMAGE), np.uint8), cv2.IMREAD_UNCHANGED)  # blue, green, red
    np.testing.assert_array_equal(decoded[:, :, ::-1], IMAGE)


def test_gray_png_has_one_channel():
    gray = np.array([[0, 7, 255], [1, 2, 3]], np.uint8).T  # [3, 2], not contiguous
    decoded = cv2.imdecode(np.frombuffer(encode_png(gray), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded, [[0, 1], [7, 2], [255, 3]])


def test_png_file_is_all_that_appears(tmp_path):
    write_png(tmp_path / "new" / "a.png", IMAGE)
    assert (tmp_path / "new" / "a.png").read_bytes() == encode_png(IMAGE)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (IMAGE[0, 0], r"shape \(3,\) and type uint8"),
        (IMAGE[:, :, 0].astype(np.int32), r"shape \(2, 3\) and type int32"),
        (IMAGE[:, :, :2], r"shape \(2, 3, 2\) and type uint8"),
        (IMAGE[:0], r"shape \(0, 3, 3\) and type uint8"),
        (IMAGE.astype(np.float32), r"shape \(2, 3, 3\) and type float32"),
    ],
)
def test_other_arrays_are_no_image(tmp_path, image, what):
    with pytest.raises(UserError, match=rf"An array of {what} is not an image; give uint8 \[H, W, 3\] or \[H, W\]\."):
        write_png(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write '.*file/a\.png' \(.+\); choose a folder that can be written\."):
        write_png(tmp_path / "file" / "a.png", IMAGE)


def test_ids_in_all_bytes(tmp_path):
    ids = np.array([[0, 1, 255, 256], [65535, 65536, 70_000, 2**24 - 1]])
    cv2.imwrite(str(tmp_path / "a.png"), ids_to_rgb(ids)[..., ::-1])
    read = read_id_png(tmp_path / "a.png")
    assert read.dtype == np.int32
    np.testing.assert_array_equal(read, ids)


def test_faulty_files(tmp_path, capfd):
    def write(image):
        cv2.imwrite(str(tmp_path / "a.png"), image)

    with pytest.raises(UserError, match=r"the panoptic PNG '.*a\.png' cannot be read \(No such file"):
        read_id_png(tmp_path / "a.png")
    for image, found in (
        (np.zeros((2, 2), np.uint8), "1 channels;"),
        (np.zeros((2, 2, 4), np.uint8), "4 channels;"),
        (np.zeros((2, 2, 3), np.uint16), "3 channels of 16 bits;"),
    ):
        write(image)
        with pytest.raises(UserError, match=rf"a\.png' has {found} a panoptic PNG is RGB of 8 bits each"):
            read_id_png(tmp_path / "a.png")
    write(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8))
    whole = (tmp_path / "a.png").read_bytes()
    for length in (0, 60, len(whole) // 2, len(whole) - 20):
        (tmp_path / "a.png").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"a\.png' is not a readable PNG, or cut short"):
            read_id_png(tmp_path / "a.png")
    capfd.readouterr()  # libpng says something about each.


def test_a_pipe_is_no_input(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe' is a pipe or a device; give an image file or a folder of images"):
        list_images(tmp_path / "pipe")
