"""Files that appear whole or not at all, and names of outputs."""

from pathlib import Path

import pytest
import tensorflow as tf

from deeplab2_like import files
from deeplab2_like.errors import UserError


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


def test_outputs_of_an_earlier_run_may_be_replaced_and_other_files_may_not(tmp_path: Path) -> None:
    (tmp_path / "panoptic").mkdir()  # Empty, so there is nothing to lose.
    files.reserve_outputs(tmp_path, ["panoptic", "panoptic.json"])
    for name in ("panoptic/a.png", "panoptic.json", "labels.json"):
        (tmp_path / name).write_text("content")
    files.reserve_outputs(tmp_path, ["panoptic.json", "panoptic", "pictures"])
    (tmp_path / "linked").symlink_to("nowhere")
    for name in ("labels.json", "linked"):
        with pytest.raises(UserError, match=rf"'{tmp_path / name}' is not from an earlier run .* another --output-dir"):
            files.reserve_outputs(tmp_path, ["panoptic", name])
