"""Image files are read as viewers show them."""

import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageOps

from deeplab2_like.data.convert.labelled_images import upright
from deeplab2_like.data.exif import find_orientation, without_orientation
from deeplab2_like.data.image_files import read_image
from deeplab2_like.data.tfrecord import decode_image_bytes
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
    turned = upright(content, file.name)
    np.testing.assert_array_equal(decode_image_bytes(turned, file.name)[0], found)
    assert (turned == content) == (orientation == 1)
    assert find_orientation(turned) == 1
    assert decode_image_bytes(content, file.name)[0].shape == PIXELS.shape


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
