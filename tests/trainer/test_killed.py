"""Trainings that are killed: nothing is lost but the time since the last checkpoint, and the end is the same."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from one_convolution import one_convolution_config
from training_processes import running, variables_of, wait_for_step

from deeplab2_like.checkpoint_files import list_checkpoints
from deeplab2_like.trainer.train import train
from deeplab2_like.trainer.trainer import Trainer


def test_killed_again_and_again_it_ends_the_same(registered: None, records: Path, tmp_path: Path) -> None:
    config = {"data": {"path": str(records)}, "steps": 24, "checkpoint_every": 2, "ema_decay": 0.9}
    train(one_convolution_config(**config), tmp_path / "straight")
    killed = tmp_path / "killed"
    options = {"config": config, "model_dir": str(killed), "seconds_per_step": 0.02}

    # Inside a save, before and after the checkpoint has its name.
    for moment, step, newest in (("merge", 6, "ckpt-4"), ("list", 10, "ckpt-10")):
        with running({**options, "die": (moment, step)}) as process:
            _, errors = process.communicate()
        assert process.returncode == -signal.SIGKILL, errors[-3000:]
        assert Path(list_checkpoints(killed)[-1]).name == newest
    # Wherever it happens to be.
    delay = random.Random(time.time_ns()).uniform(0, 0.2)
    print(f"killed {delay:.3f} s after step 13")
    with running(options) as process:
        wait_for_step(process, 13)
        time.sleep(delay)
        process.kill()
    assert 10 <= int(list_checkpoints(killed)[-1].rpartition("-")[2]) < 24

    train(one_convolution_config(**config), killed)
    straight, resumed = variables_of(tmp_path / "straight"), variables_of(killed)
    assert straight.keys() == resumed.keys()
    for part in ("weights", "average", "optimizer", "generators", "step"):
        assert any(part in name for name in straight), part
    assert [name for name in straight if not np.array_equal(straight[name], resumed[name])] == []
    # What the save that was cut short has left is gone.
    assert not list(killed.rglob("*_temp*"))


@pytest.fixture
def noticed_signals() -> Iterator[None]:
    """Signals that are not ignored, as SIGINT is in a process that a shell runs in the background."""

    def fail(number: int, frame: Any) -> None:
        raise AssertionError(f"signal {number} was not noted")

    before = {number: signal.signal(number, fail) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.usefixtures("noticed_signals")
def test_a_signal_saves_and_says_how_to_resume(
    registered: None,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = one_convolution_config(data={"path": str(records)}, steps=12)
    train(config, tmp_path / "straight")
    original = Trainer.train_step
    # Of each signal, the status with which a shell reports what it has ended; `train && evaluate` does not go on.
    for number, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):
        folder = tmp_path / number.name
        handler = signal.getsignal(number)

        def stopped_in_step_5(self: Trainer, iterator: Any, number: signal.Signals = number) -> None:
            if int(self._step) == 4:
                os.kill(os.getpid(), number)
            original(self, iterator)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", stopped_in_step_5)
            with pytest.raises(SystemExit) as stop:
                train(config, folder)
        assert stop.value.code == status
        message = f"Stopped by {number.name} after step 5 of 12, which is saved; run the same command again to resume"
        assert capsys.readouterr().out.splitlines()[-1] == f"{message} from '{folder}'."
        assert [Path(path).name for path in list_checkpoints(folder)] == ["ckpt-4", "ckpt-5"]
        assert signal.getsignal(number) == handler
    train(config, tmp_path / "SIGINT")
    straight, resumed = variables_of(tmp_path / "straight"), variables_of(tmp_path / "SIGINT")
    assert [name for name in straight if not np.array_equal(straight[name], resumed[name])] == []


@pytest.mark.usefixtures("noticed_signals")
def test_it_saves_though_its_terminal_is_gone(
    registered: None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = Trainer.train_step
    reader, writer = os.pipe()

    def closed_in_step_2(self: Trainer, iterator: Any) -> None:
        if int(self._step) == 1:
            os.close(reader)
        if int(self._step) == 4:
            os.kill(os.getpid(), signal.SIGHUP)
        original(self, iterator)

    monkeypatch.setattr(Trainer, "train_step", closed_in_step_2)
    with os.fdopen(writer, "w") as output, monkeypatch.context() as patch:
        patch.setattr("sys.stdout", output)
        # It reports after every step.
        config = one_convolution_config(data={"path": str(records)}, steps=9, log_every=1, checkpoint_every=100)
        with pytest.raises(SystemExit) as stop:
            train(config, tmp_path)
    assert stop.value.code == 129
    assert [Path(path).name for path in list_checkpoints(tmp_path)] == ["ckpt-5"]
