"""Times training steps of all systems with ResNet-50 on synthetic scenes, beside what their networks compute.

    python benchmarks/train_step.py --json train_step.json
    python benchmarks/train_step.py --systems panoptic_deeplab --sizes 256 --batches 2 --steps 3

Each row is measured in a process of its own: seconds per step (the median), peak memory, and multiply-adds of the
network's forward pass. A step is the trainer's own: forward, losses, gradients, optimizer. The batch lies in memory, so
the share of time waiting for data is that of the loop itself; it must stay under 5 %, and the step must be traced once.
"""

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from rich.console import Console
from rich.table import Table

from deeplab2_like.configs import Config, list_configs, load_config
from deeplab2_like.configs.schema import OptimizerConfig, TrainerConfig
from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.files import write_atomically
from deeplab2_like.model import SYSTEMS, PanopticSystem, build_system
from deeplab2_like.model.base import dtype_policy
from deeplab2_like.model.describe import describe
from deeplab2_like.trainer.optimizer import make_optimizer
from deeplab2_like.trainer.strategy import make_strategy
from deeplab2_like.trainer.trainer import Trainer

# The largest share of its time that a step may wait for data.
MOST_WAITING = 0.05


def find_config(system: str) -> Config:
    """One of the system's configs, with ResNet-50: one of those for it, if possible for COCO, or else the first."""
    names = [name for name in list_configs() if name.startswith(f"{system}/")]
    if not names:
        raise SystemExit(f"System '{system}' comes with no config.")
    name = min(names, key=lambda name: (not name.endswith("resnet50"), "coco" not in name, name))
    # Training does not resize images, so the network is measured without `resize`.
    return load_config(name, ["model.backbone.name=resnet50", "model.resize=null"])


def make_dataset(system: PanopticSystem, side: int, batch_size: int) -> tf.data.Dataset:
    """One batch of scenes, for ever."""
    scenes = [render_scene(number, height=side, width=side) for number in range(batch_size)]
    targets = [system.make_targets(tf.constant(label)) for _, label in scenes]
    batch = {
        "image": tf.constant(np.stack([image for image, _ in scenes])),
        "targets": {name: tf.stack([target[name] for target in targets]) for name in targets[0]},
    }
    return tf.data.Dataset.from_tensors(batch).repeat().prefetch(2)


def peak_mebibytes() -> float | None:
    """Peak memory of the GPU, or else of this process, in MiB; None where the system does not tell."""
    if tf.config.list_physical_devices("GPU"):
        return float(tf.config.experimental.get_memory_info("GPU:0")["peak"]) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), None)


def measure(name: str, side: int, batch_size: int, *, steps: int, precision: str) -> dict[str, Any]:
    """Measures one row in this process."""
    before = peak_mebibytes()
    config = find_config(name)
    strategy = make_strategy("one_device")
    with strategy.scope(), dtype_policy(precision):
        system = build_system(config, scenes_info())
        optimizer = make_optimizer(OptimizerConfig(), learning_rate=1e-4, variables=system.trainable_variables)
    seconds: list[float] = []
    trainer = Trainer(
        strategy.experimental_distribute_dataset(make_dataset(system, side, batch_size)),
        TrainerConfig(steps=steps, batch_size=batch_size, learning_rate=1e-4),
        system=system,
        optimizer=optimizer,
        strategy=strategy,
    )
    waiting: list[float] = []
    trainer.train(tf.constant(2))  # The first step compiles.
    for _ in range(steps):
        started = time.perf_counter()
        report = trainer.train(tf.constant(1))
        seconds.append(time.perf_counter() - started)
        waiting.append(report["waiting_for_data"])
    peak = peak_mebibytes()
    return {
        "system": name,
        "side": side,
        "batch_size": batch_size,
        "precision": precision,
        "multiply_adds_per_image": describe(system, side, side).multiply_adds,
        "seconds_per_step": statistics.median(seconds),
        "waiting_for_data": statistics.mean(waiting),
        "peak_mib": peak,
        "peak_growth_mib": None if peak is None or before is None else peak - before,
        "traces": trainer.traces,
    }


def measure_in_new_process(name: str, side: int, batch_size: int, *, steps: int, precision: str) -> dict[str, Any]:
    """The same in a process of its own, as a peak never falls; with the key `error` if that fails."""
    row = json.dumps({"name": name, "side": side, "batch_size": batch_size, "steps": steps, "precision": precision})
    result = subprocess.run([sys.executable, __file__, "--row", row], capture_output=True, text=True)
    if result.returncode:
        lines = result.stderr.strip().splitlines() or [f"exit status {result.returncode}"]
        return {"system": name, "side": side, "batch_size": batch_size, "precision": precision, "error": lines[-1]}
    return dict(json.loads(result.stdout.splitlines()[-1]))


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Prints the table."""
    table = Table(title="Training steps with ResNet-50", title_justify="left")
    table.add_column("system", no_wrap=True)
    for column in ("size", "batch", "G multiply-adds", "s/step", "G multiply-adds/s", "peak MiB", "waiting"):
        table.add_column(column, justify="right")
    for row in rows:
        cells = [row["system"], f"{row['side']}x{row['side']}", str(row["batch_size"])]
        if "error" in row:
            table.add_row(*cells, row["error"])
            continue
        work = row["multiply_adds_per_image"] * row["batch_size"] / 1e9
        memory = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
        speed = work / row["seconds_per_step"]
        cells += [f"{work:.1f}", f"{row['seconds_per_step']:.3f}", f"{speed:.1f}", memory]
        table.add_row(*cells, f"{row['waiting_for_data']:.1%}")
    # Not narrower where there is no terminal.
    console = Console(width=max(Console().width, 120))
    console.print(table)
    console.print(
        "Multiply-adds are those of the forward pass for the whole batch; a step takes about three times them."
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--systems", nargs="+", choices=sorted(SYSTEMS), default=sorted(SYSTEMS))
    parser.add_argument("--sizes", nargs="+", type=int, default=[256, 512], help="height and width in pixels")
    parser.add_argument("--batches", nargs="+", type=int, default=[2, 8], help="images per step")
    parser.add_argument("--steps", type=int, default=5, help="steps of which the median is taken")
    parser.add_argument("--precision", choices=("float32", "mixed_bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--row", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.row:
        print(json.dumps(measure(**json.loads(arguments.row))))
        return 0
    if min(*arguments.sizes, *arguments.batches, arguments.steps) < 1:
        parser.error("--sizes, --batches and --steps must be 1 or more")

    rows = []
    for name, side, batch_size in itertools.product(arguments.systems, arguments.sizes, arguments.batches):
        rows.append(
            measure_in_new_process(name, side, batch_size, steps=arguments.steps, precision=arguments.precision)
        )
        # A row can take minutes.
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    show(rows)
    passed = all("error" not in row and row["waiting_for_data"] < MOST_WAITING and row["traces"] == 1 for row in rows)
    print("passed" if passed else "FAILED")
    if arguments.json:
        write_atomically(arguments.json, (json.dumps({"rows": rows, "passed": passed}, indent=1) + "\n").encode())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
