"""One training at a time in a model folder.

A training holds a lock on a file in the folder. The system frees it when the process ends, however it ends, and knows
it in all containers of a machine, and on all machines that share a file system with locks. What the file holds says
who has the lock; where the file system has no locks, it alone decides.
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
        # Removed while it is held: whoever has opened it in between finds another file, or none, under its name.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(lock)
        with contextlib.suppress(OSError):  # Something is in it.
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
    """Locks an open file; raises `UserError` if somebody else holds it."""
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
    # Two that start within the same instant may both get here before either has written.
    holder = _read(path)
    if not holder or _has_ended(holder):
        return
    if holder.get("host") != socket.gethostname():
        raise UserError(
            f"Model folder '{path.parent}' was in use by {_in_words(holder)}, and whether it still runs cannot be told "
            f"from here; use another --model-dir, or, once you know that it has ended, delete '{path}'."
        )
    raise UserError(
        f"Model folder '{path.parent}' is in use by {_in_words(holder)}; wait for its end, stop it, or use another "
        "--model-dir."
    )


def _is_at(lock: int, path: Path) -> bool:
    """Whether an open file still is the one of a path."""
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
    """What the lock file says; empty if it says nothing, as it does for an instant at the start."""
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _in_words(holder: dict[str, Any]) -> str:
    if not holder:
        return "another training, which has just started"
    process, host, started = (holder.get(key) for key in ("process", "host", "started"))
    return f"the training of process {process} on host '{host}', started {started}"


def _has_ended(holder: dict[str, Any]) -> bool:
    """Whether the process that a lock file describes is known to have ended: it was of this host, and is gone."""
    process = holder.get("process")
    if holder.get("host") != socket.gethostname() or not isinstance(process, int) or process < 1:
        return False
    try:
        os.kill(process, 0)  # Signal 0 only looks.
    except (ProcessLookupError, OverflowError):
        return True
    except PermissionError:  # Somebody else's.
        pass
    # The number may have gone to another process.
    start = _process_start(process)
    return None not in (start, holder.get("process_start")) and start != holder["process_start"]


def _process_start(process: int) -> int | None:
    """When a process has started, in clock ticks since the machine has; None where the system does not tell."""
    try:
        text = Path(f"/proc/{process}/stat").read_text()
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return None
