"""How fast training examples are made, against the usual way with one pass over the label map per instance.

First the targets of Panoptic-DeepLab alone, for one example: median over the runs, of both ways in turn. Then the whole
training pipeline (read, decode, scale, crop, flip, targets, batch), with the library's targets and with the usual ones
as a NumPy function: examples per second over some batches, each way in a process of its own, with its peak memory;
median over the rounds, of both ways in turn.
Both ways must make the same targets. Examples are built-in scenes to which ellipses are added until there are enough
instances (`plain_targets.make_example`); images are PNG at the size of Cityscapes and JPEG at that of COCO, as there.

Exit status 1 if targets differ or a ratio is below its bound. Measure on an otherwise idle machine.

    python benchmarks/input_pipeline.py [--runs 10] [--rounds 3] [--batches 20] [--json FILE]
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from plain_targets import make_example, plain_targets
from rich.console import Console
from rich.table import Table

from deeplab2_like.configs.schema import DataConfig
from deeplab2_like.data import pipeline
from deeplab2_like.data.images import encode_png
from deeplab2_like.data.records import serialize_example
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.data.shards import ShardWriter, list_shards
from deeplab2_like.files import write_atomically
from deeplab2_like.model.panoptic_deeplab.config import LossConfig
from deeplab2_like.model.panoptic_deeplab.targets import make_targets

# Name -> height, width, instances, and the ending of image files.
CASES = {"Cityscapes": (1024, 2048, 30, ".png"), "COCO": (480, 640, 30, ".jpg")}
OPTIONS = {"sigma": 8.0, "small_instance_area": 4096, "small_instance_weight": 3.0}
BATCH_SIZE = 2
DISTINCT = 4
# Smallest ratios of the usual way's time to the library's: targets alone, whole pipeline.
TARGETS_BOUND, PIPELINE_BOUND = 5.0, 3.0


def library_targets(panoptic: tf.Tensor) -> dict[str, tf.Tensor]:
    return make_targets(panoptic, LossConfig(**OPTIONS), scenes_info())


def usual_targets(panoptic: tf.Tensor) -> dict[str, tf.Tensor]:
    """`plain_targets` as a part of a `tf.data` pipeline."""
    names = ("semantic", "semantic_weight", "center", "center_weight", "offset", "offset_weight")

    def make(labels: np.ndarray) -> list[np.ndarray]:
        found = plain_targets(labels, scenes_info(), **OPTIONS)
        return [found[name] for name in names]

    values = tf.numpy_function(make, [panoptic], [tf.int32] + 5 * [tf.float32])
    height, width = panoptic.shape
    shapes = [(height, width, 2) if name == "offset" else (height, width) for name in names]
    return {name: tf.ensure_shape(value, shape) for name, value, shape in zip(names, values, shapes, strict=True)}


WAYS = {"library": library_targets, "usual": usual_targets}


def time_targets(size: tuple[int, int], instances: int, runs: int) -> dict[str, Any]:
    """Times both ways on one example, in turn."""
    _, panoptic = make_example(0, size, instances)
    compiled = tf.function(library_targets, input_signature=[tf.TensorSpec(size, tf.int32)])
    ways: dict[str, Callable[[], Mapping[str, Any]]] = {
        "library": lambda: compiled(panoptic),
        "usual": lambda: plain_targets(panoptic, scenes_info(), **OPTIONS),
    }
    found = {name: way() for name, way in ways.items()}
    equal = all(np.allclose(found["library"][name], found["usual"][name], atol=1e-3) for name in found["usual"])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(runs):
        for name, way in ways.items():
            started = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - started)
    medians = {name: 1000 * statistics.median(values) for name, values in seconds.items()}
    number = int(np.count_nonzero(np.unique(panoptic) % scenes_info().label_divisor))
    return {
        "instances": number,
        "milliseconds": medians,
        "equal": equal,
        "ratio": medians["usual"] / medians["library"],
    }


def run_pipeline(folder: Path, way: str, size: tuple[int, int], batches: int) -> dict[str, float]:
    """Takes batches in this process; the first, which traces and compiles, does not count."""
    dataset = pipeline.make_train_dataset(
        list_shards(folder, "train"),
        DataConfig(crop_size=size, scale_range=(0.5, 2.0)),
        make_targets=WAYS[way],
        dataset_info=scenes_info(),
        batch_size=BATCH_SIZE,
        pad_value=(127, 127, 127),
    )
    iterator = iter(dataset)
    for _ in range(2):
        next(iterator)
    started = time.perf_counter()
    for _ in range(batches):
        next(iterator)
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"examples_per_second": batches * BATCH_SIZE / seconds, "peak_mib": peak}


def in_new_process(*arguments: object) -> Any:
    command = [sys.executable, __file__, "--run", *(str(argument) for argument in arguments)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def measure(name: str, *, runs: int, rounds: int, batches: int) -> dict[str, Any]:
    """Measures one case."""
    height, width, instances, ending = CASES[name]
    with tempfile.TemporaryDirectory() as folder:
        with ShardWriter(Path(folder) / "train-00000-of-00001.tfrecord") as writer:
            for index in range(DISTINCT):
                pixels, panoptic = make_example(index, (height, width), instances)
                image = encode_png(pixels) if ending == ".png" else tf.io.encode_jpeg(pixels).numpy()
                writer.write(serialize_example(image=image, panoptic=panoptic, filename=f"{index}{ending}"))
        found: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way in WAYS:
                found[way].append(in_new_process(folder, way, height, width, batches))
    ways = {way: {key: statistics.median(row[key] for row in rows) for key in rows[0]} for way, rows in found.items()}
    rates = {way: values["examples_per_second"] for way, values in ways.items()}
    return {
        "case": name,
        "size": [height, width],
        "targets": time_targets((height, width), instances, runs),
        "pipeline": {**ways, "ratio": rates["library"] / rates["usual"]},
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Targets: milliseconds. Pipeline: examples/s, peak memory in MiB", title_justify="left")
    table.add_column("case", no_wrap=True)
    for part in ("targets", "pipeline"):
        for column in ("library", "usual", "x"):
            table.add_column(f"{part} {column}", justify="right")
    table.add_column("equal", justify="right")
    for row in rows:
        targets, whole = row["targets"], row["pipeline"]
        table.add_row(
            row["case"],
            *(f"{targets['milliseconds'][way]:.1f}" for way in WAYS),
            f"{targets['ratio']:.1f}",
            *(f"{whole[way]['examples_per_second']:.1f} ({whole[way]['peak_mib']:.0f})" for way in WAYS),
            f"{whole['ratio']:.1f}",
            "yes" if targets["equal"] else "NO",
        )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="runs of the targets, of which the median is taken")
    parser.add_argument("--rounds", type=int, default=3, help="runs of the pipeline, of which the median is taken")
    parser.add_argument("--batches", type=int, default=20, help="batches of each of these")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--run", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("runs", "rounds", "batches"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(arguments, name)}")
    if arguments.run:
        folder, way, *numbers = arguments.run
        height, width, batches = map(int, numbers)
        print(json.dumps(run_pipeline(Path(folder), way, (height, width), batches)))
        return 0
    rows = [measure(name, runs=arguments.runs, rounds=arguments.rounds, batches=arguments.batches) for name in CASES]
    show(rows)
    passed = all(
        row["targets"]["equal"]
        and row["targets"]["ratio"] >= TARGETS_BOUND
        and row["pipeline"]["ratio"] >= PIPELINE_BOUND
        for row in rows
    )
    print("passed" if passed else "FAILED")
    if arguments.json:
        write_atomically(arguments.json, (json.dumps({"cases": rows, "passed": passed}, indent=1) + "\n").encode())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
