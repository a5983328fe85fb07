"""Files that appear whole or not at all, and names of outputs."""

import os
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


TEXT = '{"name": "\u6c7d\u8f66"}'  # Two Chinese letters, which are no ASCII.


@pytest.mark.parametrize(
    "content",
    [
        TEXT.encode("utf-8"),
        TEXT.encode("utf-8-sig"),
        TEXT.encode("utf-16"),
        TEXT.encode("utf-16-be"),
        TEXT.encode("utf-32"),
    ],
)
def test_unicode_is_read_without_a_word(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.json").write_bytes(content)
    for encoding in (None, "gbk"):
        assert files.read_json(tmp_path / "a.json", encoding=encoding) == {"name": "\u6c7d\u8f66"}


def test_other_encodings_have_to_be_named(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(TEXT.encode("gbk"))
    with pytest.raises(UserError, match=r"a\.json' is not text in UTF-8 \(byte 10 of 16\);.*such as --encoding gbk"):
        files.read_json(path)
    assert files.read_json(path, encoding="gbk") == {"name": "\u6c7d\u8f66"}
    with pytest.raises(UserError, match=r"a\.json' is text neither in UTF-8 nor in ascii"):
        files.read_json(path, encoding="ascii")
    for encoding in ("klingon", "base64"):
        with pytest.raises(UserError, match=f"Unknown encoding '{encoding}'; give a name that Python knows, such as"):
            files.read_json(path, encoding=encoding)
    # Its escape sequences are ASCII, so the bytes do not tell it.
    path.write_bytes('"\u8eca"'.encode("iso2022_jp"))
    assert files.read_json(path, encoding="iso2022_jp") == "\u8eca"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, r"a\.json' is not a JSON file \(nested too deeply\); check the path, or make it again"),
        ('{"a":' * 100_000, r"a\.json' is not a JSON file \(nested too deeply\)"),
        ("1" * 5000, r"a\.json' is not a JSON file \(Exceeds the limit"),
        ("", r"a\.json' is not a JSON file \(Expecting value"),
    ],
)
def test_impossible_json_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=message):
        files.read_json(tmp_path / "a.json")


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    folder, elsewhere = tmp_path / "folder", tmp_path / "elsewhere"
    for path in (folder / "a.png", folder / "sub" / "b.PNG", folder / ".hidden" / "c.png", elsewhere / "d.png"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (folder / ".e.png").touch()
    (folder / "linked").symlink_to(elsewhere)
    (folder / "sub" / "above").symlink_to(folder)  # Would go on forever.
    (elsewhere / "back").symlink_to(folder)  # As well, by a way through two links.
    found = [str(path.relative_to(folder)) for path in files.list_files(folder, (".png",), recursive=True)]
    assert found == ["a.png", "linked/d.png", "sub/b.PNG"]
    assert files.list_files(folder, (".png",)) == [folder / "a.png"]


def test_files_that_cannot_be_read_are_listed(tmp_path: Path) -> None:
    (tmp_path / "gone.png").symlink_to(tmp_path / "missing")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    for recursive in (False, True):
        found = files.list_files(tmp_path, (".png",), recursive=recursive)
        assert [path.name for path in found] == ["gone.png", "pipe.png"]
    with pytest.raises(UserError, match=r"the image '.*gone\.png' cannot be read \(No such file"):
        files.read_file(found[0], "the image")
    with pytest.raises(UserError, match=r"the image '.*pipe\.png' is a pipe or a device"):
        files.read_file(found[1], "the image")


def test_folder_beside_a_file(tmp_path: Path) -> None:
    json_file = tmp_path / "data" / "train.json"
    (tmp_path / "data" / "images" / "sub").mkdir(parents=True)
    beside = tmp_path / "data" / "images"
    assert files.folder_beside(Path("images"), json_file) == beside
    assert files.folder_beside(Path("images/sub"), json_file) == beside / "sub"
    assert files.folder_beside(Path("/elsewhere/images"), json_file) == beside
    assert files.folder_beside(tmp_path, json_file) == tmp_path  # It exists.
    assert files.folder_beside(Path("nowhere"), json_file) == Path("nowhere")
