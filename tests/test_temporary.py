"""Temporary files and folders: locks tell which are in use, and leftovers of killed runs go away."""

import errno
import fcntl
import os
import re
import secrets
from pathlib import Path
from typing import Any

import pytest
from kills import files_in, hidden_in, killed_at_the_end, kills

from deeplab2_like import files, temporary
from deeplab2_like.temporary import TemporaryFile, TemporaryFolder, remove_leftovers

PARTIAL = re.compile(r"\.a\.[0-9a-f]{16}\.partial")


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system without locks, as some network file systems are."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", refuse)


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    """A system that cannot exchange two folders in one step."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(temporary, "exchange", refuse)


def _make_old(folder: Path) -> Path:
    """Makes a folder with one file, `old`."""
    folder.mkdir()
    (folder / "old").write_text("old")
    return folder


def test_file_appears_when_it_is_published(tmp_path: Path) -> None:
    with TemporaryFile(tmp_path / "a") as file:
        file.file.write(b"x")
        assert PARTIAL.fullmatch(file.path.name)
        assert _names(tmp_path) == [file.path.name]
        file.publish()
    assert files_in(tmp_path) == {"a": b"x"}


def test_file_that_is_not_published_disappears(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with TemporaryFile(tmp_path / "a") as file:
        file.file.write(b"new")
    assert files_in(tmp_path) == {"a": b"old"}


def test_permissions_are_those_of_any_new_file(tmp_path: Path) -> None:
    (tmp_path / "plain").write_bytes(b"")
    files.write_atomically(tmp_path / "a", b"")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_long_names_can_be_written(tmp_path: Path) -> None:
    for name in ("x" * 255, "ä" * 127):  # 255 and 254 bytes, of the 255 that are allowed.
        files.write_atomically(tmp_path / name, b"")
    assert _names(tmp_path) == sorted(["x" * 255, "ä" * 127])


def test_leftovers_of_killed_runs_are_removed(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    others = [".a.partial", ".a.1234.partial", ".a.0123456789abcdef", "a.0123456789abcdef.partial", ".hidden"]
    for name in others:
        (tmp_path / name).write_text("")
    # A link may lead to something that is in use.
    (tmp_path / ".a.0123456789abcdef.partial").symlink_to(tmp_path / ".hidden")
    others.append(".a.0123456789abcdef.partial")

    def write() -> None:
        TemporaryFile(tmp_path / "a")
        TemporaryFile(tmp_path / "sub" / "a")
        (TemporaryFolder(tmp_path / "b").path / "c").write_text("")

    killed_at_the_end(write)
    assert len(_names(tmp_path)) == len(others) + 3
    remove_leftovers(tmp_path, of="b")
    assert len(_names(tmp_path)) == len(others) + 2
    files.make_folder(tmp_path)
    assert _names(tmp_path) == sorted([*others, "sub"])
    assert len(_names(tmp_path / "sub")) == 1
    remove_leftovers(tmp_path, recursive=True)
    assert _names(tmp_path / "sub") == []
    remove_leftovers(tmp_path / "absent")


def test_leftovers_of_a_long_name_are_found_by_it(tmp_path: Path) -> None:
    killed_at_the_end(lambda: TemporaryFile(tmp_path / ("x" * 255)))
    remove_leftovers(tmp_path, of="x" * 255)
    assert _names(tmp_path) == []


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    with TemporaryFile(tmp_path / "a") as file, TemporaryFolder(tmp_path / "b") as folder:
        file.file.write(b"x")
        remove_leftovers(tmp_path)
        (folder.path / "c").write_bytes(b"y")
        file.publish()
        folder.publish()
    assert files_in(tmp_path) == {"a": b"x", "b/c": b"y"}


def test_equal_process_ids_do_not_meet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "getpid", lambda: 1)
    with TemporaryFile(tmp_path / "a") as first, TemporaryFile(tmp_path / "a") as second:
        assert first.path != second.path


@pytest.mark.parametrize("kind", [TemporaryFile, TemporaryFolder])
def test_path_that_is_taken_for_a_leftover_before_it_is_locked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any
) -> None:
    lock = fcntl.flock

    def lock_late(descriptor: int, how: int) -> None:
        monkeypatch.setattr(fcntl, "flock", lock)
        remove_leftovers(tmp_path)  # As another process does, between our making and locking.
        assert _names(tmp_path) == []
        lock(descriptor, how)

    monkeypatch.setattr(fcntl, "flock", lock_late)
    with kind(tmp_path / "a") as made:
        assert _names(tmp_path) == [made.path.name]
        made.publish()
    assert _names(tmp_path) == ["a"]


def test_name_that_exists_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secrets, "token_hex", lambda _: "0" * 16)
    (tmp_path / f".a.{'0' * 16}.partial").write_bytes(b"somebody else's")
    with pytest.raises(FileExistsError):
        TemporaryFile(tmp_path / "a")
    assert files_in(tmp_path) == {f".a.{'0' * 16}.partial": b"somebody else's"}


@pytest.mark.usefixtures("no_locks")
def test_without_locks_only_own_paths_are_removed(tmp_path: Path) -> None:
    killed_at_the_end(lambda: TemporaryFile(tmp_path / "a"))
    left = _names(tmp_path)
    remove_leftovers(tmp_path)
    with TemporaryFile(tmp_path / "a"), TemporaryFolder(tmp_path / "b"):
        remove_leftovers(tmp_path)
        assert len(_names(tmp_path)) == 3
    files.write_atomically(tmp_path / "a", b"x")
    assert _names(tmp_path) == sorted([*left, "a"])


def test_works_where_there_is_no_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    killed_at_the_end(lambda: TemporaryFile(tmp_path / "a"))
    (left,) = _names(tmp_path)
    monkeypatch.setattr(temporary, "fcntl", None)
    files.write_atomically(tmp_path / "a", b"x")
    with TemporaryFolder(_make_old(tmp_path / "b")) as folder:
        (folder.path / "new").write_text("new")
        folder.replace()
    files.make_folder(tmp_path)
    assert files_in(tmp_path) == {left: b"", "a": b"x", "b/new": b"new"}


# --- Replacing a folder. ----------------------------------------------------------------------------------------------


def _replace(folder: Path) -> None:
    with TemporaryFolder(folder) as made:
        (made.path / "new").write_text("new")
        made.replace()


@pytest.mark.parametrize("way", ["exchange", "two steps"])
def test_folder_is_replaced(tmp_path: Path, way: str, request: pytest.FixtureRequest) -> None:
    if way == "two steps":
        request.getfixturevalue("no_exchange")
    _replace(tmp_path / "b")
    assert files_in(tmp_path) == {"b/new": b"new"}
    (tmp_path / "b" / "old").write_text("old")
    _replace(tmp_path / "b")
    assert files_in(tmp_path) == {"b/new": b"new"}
    assert hidden_in(tmp_path) == []


def test_exchange_of_missing_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        temporary.exchange(tmp_path, tmp_path / "absent")


@pytest.mark.usefixtures("no_exchange")
def test_a_folder_that_cannot_be_put_in_place_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _make_old(tmp_path / "b")
    rename = os.rename

    def rename_no_new(source: Path, target: Path) -> None:
        if str(source).endswith(".partial"):
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(source, target)

    monkeypatch.setattr(os, "rename", rename_no_new)
    with pytest.raises(PermissionError):
        _replace(tmp_path / "b")
    assert files_in(tmp_path) == {"b/old": b"old"}
    assert hidden_in(tmp_path) == []


def test_folder_is_published_only_where_there_is_nothing(tmp_path: Path) -> None:
    _make_old(tmp_path / "b")
    with TemporaryFolder(tmp_path / "b") as folder, pytest.raises(OSError, match="not empty"):
        folder.publish()
    assert files_in(tmp_path) == {"b/old": b"old"}


@pytest.mark.usefixtures("no_exchange")
def test_a_stranded_copy_is_put_back(tmp_path: Path) -> None:
    def start() -> None:
        for path in tmp_path.iterdir():
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
        _make_old(tmp_path / "b")

    seen = set()
    for operation in kills(lambda: _replace(tmp_path / "b"), prepare=start):
        seen.add((tmp_path / "b").exists())
        remove_leftovers(tmp_path)
        assert files_in(tmp_path) in ({"b/old": b"old"}, {"b/new": b"new"}), operation
        assert hidden_in(tmp_path) == [], operation
    assert seen == {True, False}  # One of the kills was between the two steps.


@pytest.mark.usefixtures("no_locks")
def test_without_locks_a_stranded_copy_is_put_back_but_none_removed(tmp_path: Path) -> None:
    hidden = f".b.{'0' * 16}.previous"
    _make_old(tmp_path / hidden)
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == ["b"]
    _make_old(tmp_path / hidden)
    remove_leftovers(tmp_path)
    assert _names(tmp_path) == [hidden, "b"]


def test_a_copy_that_another_process_is_replacing_stays(tmp_path: Path) -> None:
    previous = _make_old(tmp_path / f".b.{'0' * 16}.previous")
    descriptor = os.open(previous, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        remove_leftovers(tmp_path)
        assert _names(tmp_path) == [previous.name]
    finally:
        os.close(descriptor)
