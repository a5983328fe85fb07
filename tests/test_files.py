"""Files that appear whole or not at all, and PNG files."""

import os

import cv2
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like import files
from deeplab2_like.errors import UserError

IMAGE = np.zeros((2, 3, 3), np.uint8)
IMAGE[0, 1] = 255, 128, 0


def test_hidden_name_lies_in_the_same_folder(tmp_path):
    assert files.beside(tmp_path / "a.png") == tmp_path / f".a.png.{os.getpid()}"


def test_png_holds_red_green_blue():
    decoded = cv2.imdecode(np.frombuffer(files.encode_png(IMAGE), np.uint8), cv2.IMREAD_UNCHANGED)  # blue, green, red
    np.testing.assert_array_equal(decoded[:, :, ::-1], IMAGE)


def test_png_file_is_all_that_appears(tmp_path):
    files.write_png(tmp_path / "new" / "a.png", IMAGE)
    assert (tmp_path / "new" / "a.png").read_bytes() == files.encode_png(IMAGE)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


@pytest.mark.parametrize(
    ("image", "what"),
    [
        (IMAGE[:, :, 0], r"shape \(2, 3\) and type uint8"),
        (IMAGE[:, :, :2], r"shape \(2, 3, 2\) and type uint8"),
        (IMAGE[:0], r"shape \(0, 3, 3\) and type uint8"),
        (IMAGE.astype(np.float32), r"shape \(2, 3, 3\) and type float32"),
    ],
)
def test_other_arrays_are_no_image(tmp_path, image, what):
    with pytest.raises(UserError, match=rf"An array of {what} is not an image; give uint8 \[H, W, 3\]\."):
        files.write_png(tmp_path / "a.png", image)
    assert not list(tmp_path.iterdir())


def test_file_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write '.*file/a\.png' \(.+\); choose a folder that can be written\."):
        files.write_png(tmp_path / "file" / "a.png", IMAGE)


@pytest.mark.parametrize(
    "error",
    [
        PermissionError(13, "Permission denied"),
        tf.errors.PermissionDeniedError(None, None, "/folder/.a.7; Permission denied"),
        OSError("Permission denied"),
    ],
)
def test_reason_is_the_bare_reason(error):
    assert str(files.cannot_write("a", error)).startswith("Cannot write 'a' (Permission denied); ")
