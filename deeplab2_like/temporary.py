"""Temporary files and folders that get their name only once they are whole, and what killed runs leave of them.

Two kinds of hidden names lie beside a file or folder NAME while it is written:

- `.NAME.<16 hex digits>.partial`: the new content, not in place yet, or an old copy that is being deleted.
- `.NAME.<16 hex digits>.previous`: the copy of a folder that is being replaced, on systems that cannot exchange two
  folders in one step.

Process ids cannot tell whether such a path is still in use: in containers every program is process 1, and several
containers may share a disk. So the writer holds an advisory lock (`flock`) on the path, which the system releases when
the process ends, however it ends. A leftover is a path with such a name whose lock is free. Where the file system has
no locks, nothing is removed but what the call itself made.

Errors are those of the system (`OSError`); `files.cannot_write` turns them into words for the user.
"""

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO, Self

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked.
    fcntl = None  # type: ignore[assignment]

_PARTIAL, _PREVIOUS = "partial", "previous"
_NAME = re.compile(rf"\.(?P<target>.+)\.[0-9a-f]{{16}}\.(?P<kind>{_PARTIAL}|{_PREVIOUS})", re.DOTALL)

# What a hidden name adds to a name must fit into the 255 bytes that most file systems allow; a character has up to 4.
_MAX_NAME_BYTES = 220
_SHORT_NAME_LENGTH = _MAX_NAME_BYTES // 4

# Every try has a new random name, so a second one is rare already.
_MAX_TRIES = 100

# From <fcntl.h> and <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class _InUseError(Exception):
    """Another process holds the lock, or has just removed the path."""


class _Temporary:
    """A locked path beside `target`; see the two kinds below.

    Attributes:
        target: What the user asked for.
        path: Where to write until it is whole.
    """

    def __init__(self, target: str | os.PathLike[str], make: Callable[[Path], int | None]) -> None:
        """Makes and locks the path.

        Args:
            target: What the path gets to be called once it is whole.
            make: Makes a file or folder at a path, and returns an open descriptor of it, None where it has none.

        Raises:
            OSError: If nothing can be made there.
        """
        self.target = Path(target)
        self._descriptor: int | None = None
        for _ in range(_MAX_TRIES):
            self.path = _hidden_name(self.target, _PARTIAL)
            try:
                self._descriptor = make(self.path)
                _lock(self._descriptor, self.path)
                return
            except _InUseError:  # Another process took the new path for a leftover before it was locked.
                self._release()
        raise FileExistsError(errno.EEXIST, "no temporary name is free", str(target))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Removes what is left under the temporary name, and releases the lock."""
        _remove(self.path)
        self._release()

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class TemporaryFile(_Temporary):
    """A file that is written beside its place; use as a context manager, which removes it unless it was published.

    Example:
        with TemporaryFile("a.txt") as temporary:
            temporary.file.write(b"content")
            temporary.publish()

    Write through `file` only: some network file systems refuse a second descriptor of a locked file.

    Attributes:
        file: Open for writing.

    Args:
        target: The file to write, in an existing folder.

    Raises:
        OSError: If no file can be made there.
    """

    file: BinaryIO

    def __init__(self, target: str | os.PathLike[str]) -> None:
        super().__init__(target, self._make)

    def _make(self, path: Path) -> int | None:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        self.file = open(descriptor, "wb")  # noqa: SIM115 - It is closed when the file is published or removed.
        # The copy keeps the lock when the file is closed; Windows, without locks, renames no open file.
        return None if fcntl is None else os.dup(self.file.fileno())

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # Nobody needs the rest that cannot be written.
            self.file.close()
        super()._release()

    def publish(self) -> None:
        """Closes the file and renames it to `target`, over an earlier one.

        Raises:
            OSError: If the rest cannot be written, or the file not renamed.
        """
        self.file.close()  # First, as some file systems only now say that the disk is full.
        os.replace(self.path, self.target)
        self._release()

    def close(self) -> None:
        """See `_Temporary.close`."""
        with contextlib.suppress(OSError):
            self.file.close()  # Windows removes no open file.
        super().close()


class TemporaryFolder(_Temporary):
    """A folder that is filled beside its place; use as a context manager, which removes it unless it was published.

    Example:
        with TemporaryFolder("model") as temporary:
            (temporary.path / "a.txt").write_text("content")
            temporary.publish()

    Args:
        target: The folder to write, in an existing folder.

    Raises:
        OSError: If no folder can be made there.
    """

    def __init__(self, target: str | os.PathLike[str]) -> None:
        super().__init__(target, self._make)

    @staticmethod
    def _make(path: Path) -> int | None:
        path.mkdir()
        try:
            return _open_folder(path)
        except FileNotFoundError as error:
            raise _InUseError from error

    def publish(self, target: Path | None = None) -> None:
        """Renames the folder into a place where there is nothing, or an empty folder.

        Args:
            target: The place, in the same folder as `target`, which is the default.

        Raises:
            OSError: If there is something in that place, or the folder cannot be renamed.
        """
        os.rename(self.path, target or self.target)
        self._release()

    def replace(self) -> None:
        """Puts the folder into the place of `target`; if there is a folder already, that one is deleted.

        At every moment there is the old folder or the new one, where the system can exchange two folders. Elsewhere
        there is neither for a moment; `remove_leftovers` puts the old one back if the process is killed in it.

        Raises:
            OSError: If that is impossible; then `target` is as it was.
        """
        try:
            exchange(self.path, self.target)
        except FileNotFoundError:
            self.publish()
        except OSError:
            self._replace_in_two_steps()
        # The lock was on the new folder; `close` removes the old one, which has the temporary name now.
        self._release()

    def _replace_in_two_steps(self) -> None:
        if not os.path.lexists(self.target):
            self.publish()
            return
        previous = _hidden_name(self.target, _PREVIOUS)
        descriptor = _open_folder(self.target)
        try:
            with contextlib.suppress(_InUseError):
                _lock(descriptor, self.target)
            os.rename(self.target, previous)
            try:
                os.rename(self.path, self.target)
            except OSError:
                os.rename(previous, self.target)
                raise
            _delete_previous(previous, self.target)
        finally:
            if descriptor is not None:
                os.close(descriptor)


def exchange(first: Path, second: Path) -> None:
    """Exchanges two paths of one file system in one step.

    Raises:
        FileNotFoundError: If one of them does not exist.
        OSError: If the system or the file system cannot do that.
    """
    # As `os.rename` does, so that whoever watches what a program does to files sees this, too.
    sys.audit("os.rename", os.fspath(first), os.fspath(second), -1, -1)
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError) as error:  # TypeError on Windows.
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), os.fspath(first)) from error
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(first), None, os.fspath(second))


def remove_leftovers(folder: str | os.PathLike[str], *, of: str | None = None, recursive: bool = False) -> None:
    """Removes what killed runs have left in a folder, and puts back the folders that they were replacing.

    Paths that another process is writing stay. So does everything where the file system has no locks, but for a folder
    whose place is empty, which is put back. Paths that cannot be removed stay without an error.

    Args:
        folder: May be missing.
        of: Only leftovers of the file or folder of this name.
        recursive: Whether to look into folders in the folder, too.
    """
    for path in _hidden_paths(Path(folder), recursive=recursive):
        match = _NAME.fullmatch(path.name)
        if match is None or (of is not None and match["target"] not in (of, _short_name(of))):
            continue
        with contextlib.suppress(OSError, _InUseError):
            _clear(path, path.with_name(match["target"]) if match["kind"] == _PREVIOUS else None)


def _hidden_paths(folder: Path, *, recursive: bool) -> Iterator[Path]:
    """Yields the files and folders in a folder that may be leftovers; links are none."""
    try:
        entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        is_folder = entry.is_dir(follow_symlinks=False)
        if _NAME.fullmatch(entry.name):
            if is_folder or entry.is_file(follow_symlinks=False):
                yield Path(entry.path)
        elif recursive and is_folder:
            yield from _hidden_paths(Path(entry.path), recursive=True)


def _clear(path: Path, place: Path | None) -> None:
    """Removes a leftover, or puts it back into `place` if that is empty.

    Raises:
        _InUseError: If another process is writing it.
        OSError: If that is impossible.
    """
    is_folder = path.is_dir()
    # Some network file systems lock only files that are open for writing.
    descriptor = _open_folder(path) if is_folder else os.open(path, os.O_RDWR)
    try:
        has_locks = _lock(descriptor, path)
        if place is not None and not os.path.lexists(place):
            os.rename(path, place)  # Fails if another process has just filled the place.
        elif has_locks and place is not None:
            _delete_previous(path, place)
        elif has_locks:
            _remove(path)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _delete_previous(path: Path, place: Path) -> None:
    """Deletes a folder that has been replaced; the new name keeps a half-deleted one from being put back."""
    doomed = _hidden_name(place, _PARTIAL)
    os.rename(path, doomed)
    _remove(doomed)


def _remove(path: Path) -> None:
    """Removes a file or folder as far as possible."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _lock(descriptor: int | None, path: Path) -> bool:
    """Locks an open file or folder.

    Returns:
        Whether it is locked; False where there are no locks.

    Raises:
        _InUseError: If another process has locked it, or has just moved or removed it.
    """
    if fcntl is None or descriptor is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise _InUseError from error
    except OSError:  # ENOLCK, ENOTSUP, or EBADF for a folder on NFS.
        return False
    try:
        is_there = os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except FileNotFoundError:
        is_there = False
    if not is_there:
        raise _InUseError
    return True


def _open_folder(path: Path) -> int | None:
    """Opens a folder to lock it; None where there are no locks."""
    return None if fcntl is None else os.open(path, os.O_RDONLY | os.O_DIRECTORY)


def _hidden_name(target: Path, kind: str) -> Path:
    # A folder that is put back needs its whole name.
    name = _short_name(target.name) if kind == _PARTIAL else target.name
    return target.with_name(f".{name}.{secrets.token_hex(8)}.{kind}")


def _short_name(name: str) -> str:
    return name if len(os.fsencode(name)) <= _MAX_NAME_BYTES else name[:_SHORT_NAME_LENGTH]
