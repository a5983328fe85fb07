"""Files that appear whole or not at all, PNG files, and names of outputs."""

from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like import files
from deeplab2_like.errors import UserError

IMAGE = np.zeros((2, 3, 3), np.uint8)
IMAGE[0, 1] = 255, 128, 0


def test_png_holds_red_green_blue():
    decoded = cv2.imdecode(np.frombuffer(files.encode_png(IMAGE), np.uint8), cv2.IMREAD_UNCHANGED)  # blue, green, red
    np.testing.assert_array_equal(decoded[:, :, ::-1], IMAGE)


def test_grey_png_has_one_channel():
    grey = np.array([[0, 7, 255], [1, 2, 3]], np.uint8).T  # [3, 2], not contiguous
    decoded = cv2.imdecode(np.frombuffer(files.encode_png(grey), np.uint8), cv2.IMREAD_UNCHANGED)
    np.testing.assert_array_equal(decoded, [[0, 1], [7, 2], [255, 3]])


def test_png_file_is_all_that_appears(tmp_path):
    files.write_png(tmp_path / "new" / "a.png", IMAGE)
    assert (tmp_path / "new" / "a.png").read_bytes() == files.encode_png(IMAGE)
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


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["a.jpg", "b.png"], ["a", "b"]),
        (["a.jpg", "a.png", "b.png"], ["a.jpg", "a.png", "b"]),
        # 'a' would be the name of two, and then 'a.jpg' that of the first and the third.
        (["a.jpg", "a.png", "a.jpg.bmp"], ["a.jpg", "a.png", "a.jpg.bmp"]),
        # One file where upper and lower case are the same.
        (["A.jpg", "a.png"], ["A.jpg", "a.png"]),
        (["A.jpg", "a.jpg"], ["A.jpg", "a.jpg"]),
        ([], []),
    ],
)
def test_names_are_distinct(names, expected):
    assert files.distinct_names([Path("folder") / name for name in names]) == expected


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["000000000139", "285"], [139, 285]),
        (["1", "01"], ["1", "01"]),
        (["1", "x"], ["1", "x"]),
        (["1", "\u0662"], ["1", "\u0662"]),  # An Arabic digit two.
        ([], []),
    ],
)
def test_image_ids_are_numbers_where_all_names_are(names, ids):
    assert files.image_ids_of_names(names) == ids


def test_image_id_of_one_name():
    assert [files.image_id_of_name(name) for name in ("000000000139", "a1", "")] == [139, "a1", ""]
