"""Image files are read as viewers show them."""

from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image, ImageOps

from deeplab2_like.data.image_files import find_orientation, read_image, upright
from deeplab2_like.errors import UserError

PIXELS = np.arange(18, dtype=np.uint8).reshape(2, 3, 3)


def save(path: Path, orientation: int) -> Path:
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(PIXELS).save(path, exif=exif)
    return path


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_pillows(tmp_path: Path, orientation: int) -> None:
    file = save(tmp_path / "a.png", orientation)
    with Image.open(file) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    np.testing.assert_array_equal(read_image(file), expected)
    turned = upright(file.read_bytes(), "a.png")
    np.testing.assert_array_equal(tf.io.decode_png(turned), expected)
    assert (turned == file.read_bytes()) == (orientation == 1)
    assert find_orientation(file.read_bytes()) == (orientation, (2, 3))
    assert find_orientation(turned)[0] == 1


def test_nonsense_is_no_orientation(tmp_path: Path) -> None:
    file = save(tmp_path / "a.png", 9)
    np.testing.assert_array_equal(read_image(file), PIXELS)
    assert find_orientation(b"nothing") == (1, (0, 0))


def test_empty_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").touch()
    with pytest.raises(UserError, match=r"a\.jpg' is not a readable image, or cut short"):
        read_image(tmp_path / "a.jpg")
