"""One training at a time in a model folder: who is refused, who goes on, and what is left."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deeplab2_like.errors import UserError
from deeplab2_like.trainer import run_lock as run_lock_module
from deeplab2_like.trainer.run_lock import LOCK_FILE, run_lock

# Takes the lock of the folder in its first argument, says so, and waits until its input ends.
HOLDER = """
import sys
from deeplab2_like.trainer.run_lock import run_lock
with run_lock(sys.argv[1]):
    print("locked", flush=True)
    sys.stdin.read()
"""


def start_holder(folder: Path) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == b"locked\n"
    return process


def write_holder(folder: Path, **changes: object) -> None:
    """Leaves a lock file as if this process had been killed with the lock."""
    content = json.loads(run_lock_module._describe_process())
    folder.mkdir(parents=True, exist_ok=True)
    (folder / LOCK_FILE).write_text(json.dumps({**content, **changes}))


@pytest.fixture
def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file system that does not know locks."""

    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)


def test_a_second_training_is_refused_while_the_first_runs(tmp_path: Path) -> None:
    with start_holder(tmp_path / "model") as process:
        holder = rf"the training of process {process.pid} on host '{re.escape(socket.gethostname())}'"
        message = (
            rf"Model folder '{re.escape(str(tmp_path))}/model' is in use by {holder}, started "
            r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\S+; wait for its end, stop it, or use another --model-dir\."
        )
        for _ in range(2):  # Being refused changes nothing.
            with pytest.raises(UserError, match=message), run_lock(tmp_path / "model"):
                pass
        process.kill()
        process.wait()
        # What was killed leaves its file, but no lock.
        assert (tmp_path / "model" / LOCK_FILE).exists()
        with run_lock(tmp_path / "model"):
            assert json.loads((tmp_path / "model" / LOCK_FILE).read_text())["process"] == os.getpid()
    assert list((tmp_path / "model").iterdir()) == []


def test_it_counts_within_a_process_and_is_free_at_the_end(tmp_path: Path) -> None:
    with run_lock(tmp_path):
        with pytest.raises(UserError, match=f"is in use by the training of process {os.getpid()} "), run_lock(tmp_path):
            pass
        assert (tmp_path / LOCK_FILE).exists()
    with pytest.raises(KeyboardInterrupt), run_lock(tmp_path):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_folders_made_for_nothing_are_removed(tmp_path: Path) -> None:
    with run_lock(tmp_path / "runs" / "first"):
        pass
    assert list(tmp_path.iterdir()) == []
    with run_lock(tmp_path / "runs" / "first"):
        (tmp_path / "runs" / "first" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "runs" / "first").iterdir()] == ["config.yaml"]


def test_a_lock_that_is_removed_before_it_is_taken_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Between opening and locking, another training ends, which removes the file, and a third one takes the lock.
    original = run_lock_module._lock_or_refuse
    third = []

    def late(lock: int, path: Path) -> None:
        if not third:
            path.unlink()
            third.append(start_holder(tmp_path))
        original(lock, path)

    monkeypatch.setattr(run_lock_module, "_lock_or_refuse", late)
    try:
        with pytest.raises(UserError, match="is in use by the training of process"), run_lock(tmp_path):
            pass
    finally:
        for process in third:
            process.communicate(b"")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_locks_the_process_decides(tmp_path: Path) -> None:
    # This very process lives.
    write_holder(tmp_path)
    with pytest.raises(UserError, match=f"is in use by the training of process {os.getpid()} on"), run_lock(tmp_path):
        pass
    # Its number had another owner before it.
    write_holder(tmp_path, process_start=1)
    with run_lock(tmp_path), pytest.raises(UserError, match="is in use by"), run_lock(tmp_path):
        pass
    # No process has the number; and a file that a kill has left empty.
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        ended.wait()
    write_holder(tmp_path, process=ended.pid)
    with run_lock(tmp_path):
        pass
    (tmp_path / LOCK_FILE).touch()
    with run_lock(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("no_locks")
def test_without_locks_another_host_is_not_overruled(tmp_path: Path) -> None:
    write_holder(tmp_path, host="elsewhere", process=7, started="2026-01-02 03:04:05+00:00")
    before = (tmp_path / LOCK_FILE).read_bytes()
    message = (
        r"was in use by the training of process 7 on host 'elsewhere', started 2026-01-02 03:04:05\+00:00, which may "
        r"still run there; use another --model-dir, or delete "
        rf"'{re.escape(str(tmp_path / LOCK_FILE))}' if that training has ended\."
    )
    with pytest.raises(UserError, match=message), run_lock(tmp_path):
        pass
    assert (tmp_path / LOCK_FILE).read_bytes() == before


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"), run_lock(tmp_path / "file"):
        pass
    (tmp_path / "model" / LOCK_FILE).mkdir(parents=True)
    with pytest.raises(UserError, match=r"Cannot write '.*model' \(Is a directory\)"), run_lock(tmp_path / "model"):
        pass
