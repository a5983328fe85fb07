"""Temporary files and folders, which are renamed into place once complete, and the removal of leftover ones.

While a file or folder NAME is written, there may be two kinds of hidden paths beside it:

- `.NAME.<16 hex digits>.partial`: the new content before it is in place, or an old copy that is being deleted.
- `.NAME.<16 hex digits>.previous`: the old copy of a folder that is being replaced, on systems that cannot exchange
  two folders in one step.

Process ids cannot tell whether such a path is still in use: in a container every program may be process 1, and several
containers may share a disk. So the writer holds an advisory lock (`flock`) on the path, which the system releases when
the process ends for whatever reason. A leftover is a path with such a name whose lock is free. Where the file system
has no locks, leftovers are not removed.

Functions raise the system's errors (`OSError`); `files.cannot_write` turns them into a `UserError`.
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
except ImportError:  # Windows, which has no such locks.
    fcntl = None  # type: ignore[assignment]

_PARTIAL, _PREVIOUS = "partial", "previous"
_NAME = re.compile(rf"\.(?P<target>.+)\.[0-9a-f]{{16}}\.(?P<kind>{_PARTIAL}|{_PREVIOUS})", re.DOTALL)

# Most file systems allow names of 255 bytes, which must also hold the hidden name's additions. A character has up to 4
# bytes.
_MAX_NAME_BYTES = 220
_SHORT_NAME_LENGTH = _MAX_NAME_BYTES // 4

# Every try has a new random name, so even a second one is rare.
_MAX_TRIES = 100

# From <fcntl.h> and <linux/fs.h>.
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class _InUseError(Exception):
    """Another process holds the lock, or has just removed the path."""


class LockedError(_InUseError):
    """Another process holds the lock."""


class _Temporary:
    """A locked path beside `target`: the base of `TemporaryFile` and `TemporaryFolder`.

    Attributes:
        target: The final path.
        path: The temporary path, to which the content is written.
    """

    def __init__(self, target: str | os.PathLike[str], make: Callable[[Path], int | None]) -> None:
        """Creates and locks the path.

        Args:
            target: The final path.
            make: Creates a file or folder at a path and returns an open descriptor of it, or None without locks.

        Raises:
            OSError: If nothing can be created there.
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
        """Removes the temporary path if it still exists, and releases the lock."""
        _remove(self.path)
        self._release()

    def _release(self) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is not None:
            os.close(descriptor)


class TemporaryFile(_Temporary):
    """A temporary file; a context manager, which removes the file unless it was published.

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
        OSError: If the file cannot be created.
    """

    file: BinaryIO

    def __init__(self, target: str | os.PathLike[str]) -> None:
        super().__init__(target, self._make)

    def _make(self, path: Path) -> int | None:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR | getattr(os, "O_BINARY", 0), 0o666)
        self.file = open(descriptor, "wb")  # noqa: SIM115 - It is closed when the file is published or removed.
        # The copy keeps the lock when the file is closed. Windows has no locks and cannot rename open files.
        return None if fcntl is None else os.dup(self.file.fileno())

    def _release(self) -> None:
        with contextlib.suppress(OSError):  # The file is dropped, so a failed write does not matter.
            self.file.close()
        super()._release()

    def publish(self) -> None:
        """Closes the file and renames it to `target`, replacing an earlier one.

        Raises:
            OSError: If buffered content cannot be written, or the file cannot be renamed.
        """
        self.file.close()  # First, because some file systems report a full disk only now.
        os.replace(self.path, self.target)
        self._release()

    def close(self) -> None:
        """See `_Temporary.close`."""
        with contextlib.suppress(OSError):
            self.file.close()  # Windows cannot remove open files.
        super().close()


class TemporaryFolder(_Temporary):
    """A temporary folder; a context manager, which removes the folder unless it was published.

    Example:
        with TemporaryFolder("model") as temporary:
            (temporary.path / "a.txt").write_text("content")
            temporary.publish()

    Args:
        target: The folder to write, in an existing folder.

    Raises:
        OSError: If the folder cannot be created.
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
        """Renames the folder to a path where there is nothing or an empty folder.

        Args:
            target: The path, in the same parent folder as the final path, which is the default.

        Raises:
            OSError: If there is something at that path, or the folder cannot be renamed.
        """
        os.rename(self.path, target or self.target)
        self._release()

    def replace(self) -> None:
        """Replaces `target` by the folder, and deletes the old one if there is one.

        Where the system can exchange two folders, there is always the old or the new one. Elsewhere there is neither
        for a moment; if the process is killed then, `remove_leftovers` restores the old one.

        Raises:
            OSError: If the folder cannot be replaced; `target` is unchanged then.
        """
        try:
            exchange(self.path, self.target)
        except FileNotFoundError:
            self.publish()
        except OSError:
            self._replace_in_two_steps()
        # The lock was on the new folder. `close` removes the old one, which has the temporary name now.
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


@contextlib.contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Holds the lock of a file while the context is open; the file is created, and removed at the end.

    A killed process leaves the file, which the next one takes over. Where the file system has no locks or the file
    cannot be created, nothing is locked.

    Args:
        path: The file.

    Raises:
        LockedError: If another process holds the lock.
    """
    descriptor = _open_and_lock(path)
    try:
        yield
    finally:
        if descriptor is not None:
            _remove(path)  # While it is locked: a process that has opened it meanwhile finds that it is gone.
            os.close(descriptor)


@contextlib.contextmanager
def wait_for_folder(path: Path) -> Iterator[None]:
    """Holds the lock of a folder while the context is open; waits until no other process holds it.

    Where there are no locks, or none of folders, it does not wait.
    """
    descriptor = _open_folder(path)
    try:
        if fcntl is not None and descriptor is not None:
            with contextlib.suppress(OSError):
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _open_and_lock(path: Path) -> int | None:
    """Opens a file and locks it; returns None where that is impossible."""
    for _ in range(_MAX_TRIES if fcntl is not None else 0):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError:
            return None
        try:
            _lock(descriptor, path)
            return descriptor
        except LockedError:
            os.close(descriptor)
            raise
        except _InUseError:  # Its holder has removed it after it was opened here.
            os.close(descriptor)
    return None


def exchange(first: Path, second: Path) -> None:
    """Exchanges two paths of one file system in one step.

    Raises:
        FileNotFoundError: If one of them does not exist.
        OSError: If the system or the file system does not support it.
    """
    # Like `os.rename`, so that audit hooks see this operation, too.
    sys.audit("os.rename", os.fspath(first), os.fspath(second), -1, -1)
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError) as error:  # TypeError on Windows.
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS), os.fspath(first)) from error
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), os.fspath(first), None, os.fspath(second))


def remove_leftovers(folder: str | os.PathLike[str], *, of: str | None = None, recursive: bool = False) -> None:
    """Removes leftovers of killed runs in a folder, and restores folders that a killed run was replacing.

    Paths that another process is writing stay. Where the file system has no locks, nothing is removed, but a folder
    that is missing from its place is restored. Paths that cannot be removed stay without an error.

    Args:
        folder: The folder, which may be missing.
        of: Remove only leftovers of the file or folder with this name.
        recursive: Whether to search subfolders, too.
    """
    for path in _hidden_paths(Path(folder), recursive=recursive):
        match = _NAME.fullmatch(path.name)
        if match is None or (of is not None and match["target"] not in (of, _short_name(of))):
            continue
        with contextlib.suppress(OSError, _InUseError):
            _clear(path, path.with_name(match["target"]) if match["kind"] == _PREVIOUS else None)


def _hidden_paths(folder: Path, *, recursive: bool) -> Iterator[Path]:
    """Yields the files and folders in a folder that may be leftovers; links never are."""
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
    """Removes a leftover, or restores it to `place` if there is nothing.

    Raises:
        _InUseError: If another process is writing it.
        OSError: If it cannot be removed or restored.
    """
    is_folder = path.is_dir()
    # Some network file systems lock only files that are open for writing.
    descriptor = _open_folder(path) if is_folder else os.open(path, os.O_RDWR)
    try:
        has_locks = _lock(descriptor, path)
        if place is not None and not os.path.lexists(place):
            os.rename(path, place)  # Fails if another process has just created something there.
        elif has_locks and place is not None:
            _delete_previous(path, place)
        elif has_locks:
            _remove(path)
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _delete_previous(path: Path, place: Path) -> None:
    """Deletes a replaced folder, under a new name first, so that a half-deleted folder is never restored."""
    to_delete = _hidden_name(place, _PARTIAL)
    os.rename(path, to_delete)
    _remove(to_delete)


def _remove(path: Path) -> None:
    """Removes a file or folder; ignores errors."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _lock(descriptor: int | None, path: Path) -> bool:
    """Locks an open file or folder.

    Returns:
        Whether it is locked; False where the file system has no locks.

    Raises:
        LockedError: If another process has locked it.
        _InUseError: If another process has just moved or removed it.
    """
    if fcntl is None or descriptor is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise LockedError from error
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
    # A folder that may be restored needs its whole name.
    name = _short_name(target.name) if kind == _PARTIAL else target.name
    return target.with_name(f".{name}.{secrets.token_hex(8)}.{kind}")


def _short_name(name: str) -> str:
    return name if len(os.fsencode(name)) <= _MAX_NAME_BYTES else name[:_SHORT_NAME_LENGTH]
