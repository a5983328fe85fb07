"""Two workers on this machine, each a process: they train like one device, and go on after one of them is killed."""

import contextlib
import json
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from training_processes import running, variables_of, wait_for_step

from deeplab2_like.checkpoint_files import find_checkpoint, list_checkpoints
from deeplab2_like.errors import UserError
from deeplab2_like.trainer.strategy import is_chief, make_strategy, worker_of


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@contextmanager
def two_workers(options: dict[str, Any]) -> Iterator[list[subprocess.Popen]]:
    cluster = {"worker": [f"127.0.0.1:{free_port()}" for _ in range(2)]}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                running(
                    options,
                    environment={
                        "TF_CONFIG": json.dumps({"cluster": cluster, "task": {"type": "worker", "index": index}})
                    },
                )
            )
            for index in range(2)
        ]


def test_two_workers_train_like_one_device_and_survive(records: Path, tmp_path: Path) -> None:
    config = {"data": {"path": str(records)}, "batch_size": 4, "steps": 12, "optimizer": {"name": "sgd"}}
    straight, folder = tmp_path / "straight", tmp_path / "workers"
    with running({"config": config, "model_dir": str(straight), "synchronized": True}) as process:
        _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]

    options = {
        # The chief alone evaluates, while the other worker waits.
        "config": {**config, "strategy": "multi_worker", "evaluate_every": 7},
        "model_dir": str(folder),
        "synchronized": True,
        "seconds_per_step": 0.05,
    }
    # One is killed: the other one notices, says what to do and ends. Step 4 is saved.
    with two_workers(options) as workers:
        wait_for_step(workers[1], 6)
        workers[1].kill()
        _, errors = workers[0].communicate()
        assert workers[0].returncode == 1
    assert "Another worker has gone, or cannot be reached; start all workers again" in errors
    assert [Path(path).name for path in list_checkpoints(folder)] == ["ckpt-4"]

    # One is asked to stop: both stop after the same step, which is saved.
    with two_workers(options) as workers:
        wait_for_step(workers[1], 5)
        workers[1].send_signal(signal.SIGTERM)
        outputs = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [143, 143], outputs
    said = [next(line for line in output.splitlines() if line.startswith("Stopped by")) for output, _ in outputs]
    assert said[0] == said[1]
    stopped_at = int(said[0].split()[5])
    assert 5 < stopped_at < 12
    assert list_checkpoints(folder)[-1].endswith(f"ckpt-{stopped_at}")

    with two_workers(options) as workers:
        outputs = [worker.communicate() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    # Only the first one, the chief, reports and writes: three runs, three files.
    assert "step 12/12  PQ " in outputs[0][0]
    assert "step 12/12" not in outputs[1][0]
    assert len(list((folder / "train").iterdir())) == 3
    assert find_checkpoint(folder, "best")
    names = {"best", "checkpoints", "config.yaml", "dataset_info.json", "train", "val"}
    assert {path.name for path in folder.iterdir()} == names

    one, two = variables_of(straight), variables_of(folder)
    assert one.keys() == two.keys()
    assert [name for name in one if not np.allclose(one[name], two[name], atol=1e-4)] == []


@pytest.mark.parametrize(("precision", "tolerance"), [("float32", 1e-5), ("mixed_float16", 5e-3)])
def test_two_devices_accumulate_average_and_scale_like_one(
    records: Path, tmp_path: Path, precision: str, tolerance: float
) -> None:
    config = {
        "data": {"path": str(records)},
        "batch_size": 4,
        "accumulate_steps": 2,
        "ema_decay": 0.5,
        "precision": precision,
        "optimizer": {"name": "sgd", "multipliers": {"logits": 0.5}, "clip_norm": 1.0, "weight_decay": 0.01},
    }
    found = {}
    for strategy in ("one_device", "mirrored"):
        folder = tmp_path / strategy
        options = {"config": {**config, "strategy": strategy}, "model_dir": str(folder), "synchronized": True}
        with running({**options, "devices": 2}) as process:
            _, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        found[strategy] = variables_of(folder)
    one, two = found.values()
    assert one.keys() == two.keys()
    assert any(name.startswith("average/") for name in one)
    assert [name for name in one if not np.allclose(one[name], two[name], atol=tolerance)] == []


@pytest.mark.parametrize(
    ("text", "found"),
    [
        (None, "not set"),
        ("nonsense", "'nonsense'"),
        ('{"cluster": {}}', "'{.*}'"),
        ('{"cluster": {"worker": ["a:1"]}, "task": {"type": "ps", "index": 0}}', "'{.*}'"),
    ],
)
def test_several_workers_need_to_be_named(monkeypatch: pytest.MonkeyPatch, text: str | None, found: str) -> None:
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if text is not None:
        monkeypatch.setenv("TF_CONFIG", text)
    with pytest.raises(
        UserError, match=rf"Environment variable TF_CONFIG is {found}; strategy 'multi_worker' needs all work"
    ):
        make_strategy("multi_worker")


def test_a_tpu_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"TPU 'local' cannot be used \(.*\); set trainer.tpu to its name or address"):
        make_strategy("tpu")

    def fail(name: str) -> None:
        raise ValueError("unreachable " * 50)

    # A long reason ends with a whole word: 16 of them have 191 letters.
    monkeypatch.setattr(tf.distribute.cluster_resolver, "TPUClusterResolver", fail)
    with pytest.raises(UserError) as error:
        make_strategy("tpu")
    assert f"cannot be used ({'unreachable ' * 16}...); set" in str(error.value)


@pytest.mark.parametrize("name", ["one_device", "mirrored"])
def test_a_single_process_is_the_chief(name: str) -> None:
    strategy = make_strategy(name)
    assert is_chief(strategy)
    assert worker_of(strategy) == (0, 1)
