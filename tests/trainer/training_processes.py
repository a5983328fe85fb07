"""Trainings in processes of their own, and what they leave: for tests that kill them. See `train_process.py`."""

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from deeplab2_like.checkpoint_files import list_checkpoints

# No process of these tests lives longer, whatever happens, in seconds.
LIMIT = 120


def variables_of(model_dir: Path) -> dict[str, np.ndarray]:
    """Everything in the newest checkpoint."""
    stored = tf.train.load_checkpoint(list_checkpoints(model_dir)[-1])
    names = set(stored.get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH", "save_counter"}
    return {name: stored.get_tensor(name) for name in sorted(names) if "save_counter" not in name}


@contextmanager
def running(options: dict[str, Any], *, environment: dict[str, str] | None = None) -> Iterator[subprocess.Popen]:
    """Starts `train_process.py`, and makes sure that it ends."""
    folder = Path(__file__).parent
    path = os.pathsep.join([str(folder.parent), str(folder.parents[1]), os.environ.get("PYTHONPATH", "")])
    process = subprocess.Popen(
        [sys.executable, str(folder / "train_process.py"), json.dumps(options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, **(environment or {})},
    )
    timer = threading.Timer(LIMIT, process.kill)
    timer.start()
    try:
        yield process
    finally:
        timer.cancel()
        process.kill()
        process.communicate()


def wait_for_step(process: subprocess.Popen, step: int) -> None:
    for line in process.stdout:
        if line.startswith("step ") and line.split()[1].isdigit() and int(line.split()[1]) >= step:
            return
    raise AssertionError(process.stderr.read()[-3000:])
