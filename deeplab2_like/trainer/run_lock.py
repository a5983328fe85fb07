"""One training at a time in a model folder.

A training holds a lock on a file in the folder. The operating system releases the lock when the process ends for
whatever reason. The lock holds in all containers of a machine, and on all machines that share a file system with locks.
The content of the file names the holder; where the file system has no locks, the content alone decides.
"""

import contextlib
import datetime
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError
from deeplab2_like.files import cannot_write, make_folder
from deeplab2_like.parsing import parse_json

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = "training.lock"


@contextlib.contextmanager
def run_lock(model_dir: str | os.PathLike[str]) -> Iterator[None]:
    """Holds the lock of a model folder while the context is open; makes the folder if it is missing.

    At the end the lock file is removed, as are the folders that were made if nothing else is in them.

    Args:
        model_dir: The model folder.

    Raises:
        UserError: If another training holds it, or the folder cannot be written.
    """
    path = Path(model_dir) / LOCK_FILE
    folders = (path.absolute().parent, *path.absolute().parent.parents)
    made = [folder for folder in folders if not folder.exists()]
    lock = _take(path)
    try:
        yield
    finally:
        # Removed while locked: a process that has opened it in the meantime finds another file, or none, at its path.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(lock)
        with contextlib.suppress(OSError):  # Not empty.
            for folder in made:
                folder.rmdir()


def _take(path: Path) -> int:
    """Takes the lock; returns the descriptor that holds it."""
    while True:
        make_folder(path.parent)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except FileNotFoundError:  # The folder was removed by a training that ended just now.
            continue
        except OSError as error:
            raise cannot_write(path.parent, error) from error
        try:
            _lock_or_refuse(lock, path)
            if _is_at(lock, path):
                os.ftruncate(lock, 0)
                os.pwrite(lock, _describe_process(), 0)
                return lock
        except OSError as error:
            os.close(lock)
            raise cannot_write(path.parent, error) from error
        except UserError:
            os.close(lock)
            raise
        os.close(lock)  # Its holder has removed it after it was opened here.


def _lock_or_refuse(lock: int, path: Path) -> None:
    """Locks an open file; raises `UserError` if another training holds it."""
    try:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
    except (BlockingIOError, PermissionError) as error:
        raise UserError(
            f"Model folder '{path.parent}' is in use by {_in_words(_read(path))}; wait for its end, stop it, or use "
            "another --model-dir."
        ) from error
    except OSError:  # A file system without locks.
        pass
    # Without locks, two trainings that start at the same moment may both find no holder here.
    holder = _read(path)
    if not holder or _has_ended(holder):
        return
    if holder.get("host") != socket.gethostname():
        raise UserError(
            f"Model folder '{path.parent}' was in use by {_in_words(holder)}, which may still run there; use another "
            f"--model-dir, or delete '{path}' if that training has ended."
        )
    raise UserError(
        f"Model folder '{path.parent}' is in use by {_in_words(holder)}; wait for its end, stop it, or use another "
        "--model-dir."
    )


def _is_at(lock: int, path: Path) -> bool:
    """Returns whether a path still leads to a file that is open as `lock`."""
    try:
        return os.path.samestat(os.fstat(lock), os.stat(path))
    except FileNotFoundError:
        return False


def _describe_process() -> bytes:
    process = os.getpid()
    return json.dumps(
        {
            "host": socket.gethostname(),
            "process": process,
            "started": datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds"),
            "process_start": _process_start(process),
        }
    ).encode()


def _read(path: Path) -> dict[str, Any]:
    """Reads the lock file; empty if it has no content yet, as just after its creation."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another training, which has just started"
    process, host, started = (holder.get(key) for key in ("process", "host", "started"))
    return f"the training of process {process} on host '{host}', started {started}"


def _has_ended(holder: dict[str, Any]) -> bool:
    """Returns whether the process in a lock file is known to have ended: it ran on this host, and is gone."""
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int) or process < 1:
        return False
    try:
        os.kill(process, 0)  # Signal 0 only checks that the process exists.
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # It belongs to another user.
        pass
    # Another process may have its id now.
    start = _process_start(process)
    return None not in (start, holder.get("process_start")) and start != holder["process_start"]


def _process_start(process: int) -> int | None:
    """Returns the start of a process in clock ticks since boot; None where the system does not tell."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
