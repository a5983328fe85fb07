"""Kills a function before each of its file operations, one process per operation: what does it leave behind?

The function runs in forked children, which share what the test has prepared in memory, so a kill takes milliseconds.
Children must not run TensorFlow's operations, whose threads do not survive a fork: give the function fakes for them.
"""

import contextlib
import itertools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from deeplab2_like.export.journal import JOURNAL_FILE
from deeplab2_like.files import OUTPUTS_FILE

# `os.replace` counts as `os.rename`, and `Path.unlink` as `os.remove`.
_OPERATIONS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.symlink", "os.truncate", "shutil.move")
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
# Ends a child that hangs.
_MAX_SECONDS = 120


def kills(run: Callable[[], Any], *, prepare: Callable[[], Any]) -> Iterator[str]:
    """Kills `run` before its first file operation, before its second one, and so on until it ends by itself.

    Args:
        run: What is killed; it must do the same file operations every time.
        prepare: Called before each run, to bring the files into their first state.

    Yields:
        After each kill the operation that did not happen any more, in words.
    """
    for number in itertools.count(1):
        prepare()
        operation = _killed_operation(run, number)
        if operation is None:
            assert number > 1, "the function has no file operation"
            return
        yield f"killed before operation {number}, {operation}"


def killed_at_the_end(run: Callable[[], Any]) -> None:
    """Runs a function in a child that is killed when the function has returned."""
    child = _fork()
    if child == 0:
        try:
            run()
            os.kill(os.getpid(), signal.SIGKILL)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(1)
    assert os.WIFSIGNALED(os.waitpid(child, 0)[1]), "failed; its traceback is on stderr"


def files_in(folder: Path) -> dict[str, bytes]:
    """The content of all files in a folder and its folders, hidden ones included, by their relative paths."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()
    }


def hidden_in(folder: Path) -> list[str]:
    """The hidden files and folders in a folder and its folders, which is what a killed run leaves."""
    paths = (path for path in folder.rglob(".*") if path.name not in (OUTPUTS_FILE, JOURNAL_FILE))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def _killed_operation(run: Callable[[], Any], number: int) -> str | None:
    """Runs a function in a child that is killed before its operation `number`; None if it has fewer."""
    reader, writer = os.pipe()
    child = _fork()
    if child == 0:
        status = 1
        try:
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(_MAX_SECONDS)
            _die_before(number, writer)
            # What the function prints is of no interest, and would appear once per operation.
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                _counter.is_on = True
                run()
                _counter.is_on = False
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    os.close(writer)
    with open(reader) as pipe:
        operation = pipe.read()
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        assert os.WTERMSIG(status) == signal.SIGKILL, f"ended by signal {os.WTERMSIG(status)} in run {number}"
        return operation
    assert status == 0, f"failed in run {number}; its traceback is on stderr"
    return None


def _fork() -> int:
    with warnings.catch_warnings():
        # Newer Pythons warn of every fork beside threads.
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()


class _Counter:
    is_on = False
    count = 0


_counter = _Counter()


def _die_before(number: int, writer: int) -> None:
    """Lets this process kill itself before an operation, which it names in a pipe."""

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if not _counter.is_on:
            return
        if event == "open":
            path, _, flags = arguments
            if isinstance(path, int) or not flags & _WRITING:
                return
        elif event not in _OPERATIONS:
            return
        _counter.count += 1
        if _counter.count == number:
            os.write(writer, f"{event} {arguments}".encode())
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)
