"""How long the post-processing of Panoptic-DeepLab takes, against its plain formulation, and what memory it needs.

The plain formulation (`plain_postprocess.py`) is run eagerly, as it is used in evaluation. The library's own is run
twice: as one graph for images of any size, as in a SavedModel, and with its stages compiled with XLA for the size at
hand (`make_inference_function(system, compiled=True)`). All get the same made-up outputs of a network, batch 1, and
give the same map.

Exit status 1 if a formulation is slower than its limit, or if the maps differ. Measure on an otherwise idle machine.

    python benchmarks/postprocess.py [--size 1025x2049] [--classes 19] [--centers 50] [--runs 5] [--json FILE]
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
import tensorflow as tf
from plain_postprocess import made_up_outputs, plain_postprocess
from rich.console import Console
from rich.table import Table

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.files import write_atomically
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.panoptic_deeplab.config import PostprocessConfig
from deeplab2_like.model.panoptic_deeplab.postprocess import postprocess
from deeplab2_like.model.stages import compiled_stages

STRIDE = 4
PLAIN = "plain"
# Share of the plain formulation's time that each of the library's may take.
LIMITS = {"graph": 1 / 4, "compiled": 1 / 8}
FORMULATIONS = {
    PLAIN: "plain formulation, eager",
    "graph": "library, one graph for any size",
    "compiled": "library, stages compiled with XLA",
}
# Centers for which time and memory are compared.
SCALING = (10, 50, 200)

Outputs = Mapping[str, tf.Tensor]
compile_with_xla = functools.partial(tf.function, jit_compile=True)


def options_for(num_classes: int) -> dict[str, Any]:
    """The settings of Cityscapes; as there, 8 of 19 classes are things, the last ones."""
    return {
        "stride": STRIDE,
        "thing_classes": tuple(range(round(num_classes * 11 / 19), num_classes)),
        "label_divisor": 1000,
        "ignore_label": max(255, num_classes),
        "center_threshold": 0.1,
        "nms_kernel": 7,
        "top_k": 200,
        "stuff_area_limit": 2048,
    }


def run_postprocess(outputs: Outputs, image_size: tuple[Any, Any]) -> dict[str, tf.Tensor]:
    """Runs the library's post-processing with `options_for`."""
    options = options_for(outputs["semantic_logits"].shape[-1])
    things = options.pop("thing_classes")
    categories = [Category(i, str(i), i in things, (0, 0, 0)) for i in range(outputs["semantic_logits"].shape[-1])]
    info = DatasetInfo("made up", tuple(categories), options.pop("label_divisor"), options.pop("ignore_label"))
    stride = options.pop("stride")
    return postprocess(
        outputs, Geometry(image_size), PostprocessConfig(**options), info, stride=stride, center_is_logit=False
    )


def make_outputs(size: tuple[int, int], num_classes: int, num_centers: int) -> Outputs:
    """Made-up outputs of a network for one image."""
    things = options_for(num_classes)["thing_classes"]
    arrays = made_up_outputs(
        size, stride=STRIDE, num_classes=num_classes, thing_classes=things, num_centers=num_centers
    )
    return {name: tf.constant(array) for name, array in arrays.items()}


def make_formulation(name: str, outputs: Outputs, size: tuple[int, int]) -> Callable[[], np.ndarray]:
    """A function without arguments that computes the panoptic map of the outputs, [1, H, W]."""
    if name == PLAIN:
        options = options_for(outputs["semantic_logits"].shape[-1])
        return lambda: plain_postprocess(outputs, size, **options)[0]

    def run(outputs: Outputs, image_size: tuple[Any, Any]) -> dict[str, tf.Tensor]:
        return run_postprocess(outputs, image_size)

    if name == "graph":
        specs = {key: tf.TensorSpec([None, None, None, value.shape[-1]]) for key, value in outputs.items()}
        image_size = tf.constant(size)

        @tf.function(input_signature=[specs, tf.TensorSpec([2], tf.int32)], autograph=False)
        def infer(outputs: Outputs, image_size: tf.Tensor) -> dict[str, tf.Tensor]:
            return run(outputs, (image_size[0], image_size[1]))

        return lambda: infer(outputs, image_size)["panoptic"].numpy()

    @tf.function(autograph=False)
    def infer_compiled(outputs: Outputs) -> dict[str, tf.Tensor]:
        with compiled_stages(compile_with_xla):
            return run(outputs, size)

    return lambda: infer_compiled(outputs)["panoptic"].numpy()


def median_milliseconds(function: Callable[[], Any], runs: int) -> float:
    """The median over some runs, after one that is not counted: it traces and compiles."""
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times)


def measure_stages(outputs: Outputs, size: tuple[int, int], runs: int) -> dict[str, dict[str, float]]:
    """Time of each stage on its own, as a graph and compiled, by its name."""
    calls: dict[str, Callable[[Callable[..., Any]], Any]] = {}

    def record(function: Any) -> Callable[..., Any]:
        """Stands in for a compiler: remembers what each stage is called with."""

        def call(*tensors: Any, **sizes: Any) -> Any:
            calls[function.func.__name__] = lambda compiler: functools.partial(compiler(function), *tensors, **sizes)
            return function(*tensors, **sizes)

        return call

    with compiled_stages(record):
        run_postprocess(outputs, size)

    compilers = {"graph": functools.partial(tf.function, autograph=False), "compiled": compile_with_xla}
    return {
        name: {
            kind: median_milliseconds(functools.partial(_wait_for, bind(compiler)), runs)
            for kind, compiler in compilers.items()
        }
        for name, bind in calls.items()
    }


def _wait_for(function: Callable[[], Any]) -> None:
    for tensor in tf.nest.flatten(function()):
        tensor.numpy()


def resident_mebibytes(key: str) -> float:
    """A line of Linux' status of this process: `VmRSS`, memory in use, or `VmHWM`, the most there was."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"/proc/self/status has no line {key}")


def memory_growth(name: str, size: tuple[int, int], num_classes: int, num_centers: int) -> float:
    """By how many MiB the first run, tracing and compiling included, raises this process's peak memory."""
    outputs = make_outputs(size, num_classes, num_centers)
    function = make_formulation(name, outputs, size)
    before = resident_mebibytes("VmHWM")
    function()
    return resident_mebibytes("VmHWM") - before


def memory_growth_in_new_process(name: str, size: tuple[int, int], num_classes: int, num_centers: int) -> float | None:
    """The same in a process of its own, as a peak never falls; None where the system does not tell."""
    if not Path("/proc/self/status").exists():
        return None
    command = [sys.executable, __file__, "--size", f"{size[0]}x{size[1]}", "--classes", str(num_classes)]
    command += ["--centers", str(num_centers), "--memory-of", name]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        # The plain formulation may not fit at all.
        print(f"{name} with {num_centers} centers did not finish: exit status {result.returncode}", file=sys.stderr)
        return None
    return float(result.stdout.split()[-1])


def measure(size: tuple[int, int], num_classes: int, num_centers: int, runs: int) -> dict[str, Any]:
    """All measurements; see `show` for the tables."""
    outputs = make_outputs(size, num_classes, num_centers)
    functions = {name: make_formulation(name, outputs, size) for name in FORMULATIONS}
    expected = functions[PLAIN]()
    different = {name: float(np.mean(functions[name]() != expected)) for name in LIMITS}
    milliseconds = {name: median_milliseconds(function, runs) for name, function in functions.items()}
    ratio = {name: milliseconds[name] / milliseconds[PLAIN] for name in LIMITS}
    stages = measure_stages(outputs, size, runs)

    scaling = []
    for count in SCALING:
        outputs = make_outputs(size, num_classes, count)
        row: dict[str, Any] = {"centers": count, "milliseconds": {}, "memory_mib": {}}
        for name in FORMULATIONS:
            row["milliseconds"][name] = median_milliseconds(make_formulation(name, outputs, size), runs)
            row["memory_mib"][name] = memory_growth_in_new_process(name, size, num_classes, count)
        scaling.append(row)
    return {
        "size": list(size),
        "classes": num_classes,
        "centers": num_centers,
        "runs": runs,
        "milliseconds": milliseconds,
        "ratio": ratio,
        "limits": LIMITS,
        "share_of_different_pixels": different,
        "stages": stages,
        "scaling": scaling,
        # A pixel that points right between two centers may go to either.
        "passed": all(ratio[name] <= LIMITS[name] and different[name] <= 1e-5 for name in LIMITS),
    }


def show(result: Mapping[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    height, width = result["size"]
    console.print(
        f"Post-processing of {height}x{width}, {result['classes']} classes, {result['centers']} centers, "
        f"stride {STRIDE}, median of {result['runs']} runs",
        soft_wrap=True,
    )
    table = Table("formulation")
    for column in ("ms", "of plain", "limit", "met", "different pixels"):
        table.add_column(column, justify="right")
    for name, title in FORMULATIONS.items():
        cells = [f"{result['milliseconds'][name]:.0f}"]
        if name in LIMITS:
            ratio, limit = result["ratio"][name], LIMITS[name]
            share = result["share_of_different_pixels"][name]
            cells += [f"1/{1 / ratio:.1f}", f"1/{1 / limit:.0f}", "yes" if ratio <= limit else "NO", f"{share:.2g}"]
        table.add_row(title, *cells)
    console.print(table)

    table = Table("stage")
    for name in LIMITS:
        table.add_column(f"{name}, ms", justify="right")
    for stage, times in result["stages"].items():
        table.add_row(stage, *(f"{times[name]:.1f}" for name in LIMITS))
    console.print(table)

    table = Table("centers")
    for unit in ("ms", "MiB"):
        for name in FORMULATIONS:
            table.add_column(f"{name}, {unit}", justify="right")
    for row in result["scaling"]:
        memory = [row["memory_mib"][name] for name in FORMULATIONS]
        times = [f"{row['milliseconds'][name]:.0f}" for name in FORMULATIONS]
        table.add_row(str(row["centers"]), *times, *("-" if value is None else f"{value:.0f}" for value in memory))
    console.print(table)
    console.print("MiB: growth of the process's peak memory in its first run, tracing and compiling included.")
    console.print("passed" if result["passed"] else "FAILED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1025x2049", help="HEIGHTxWIDTH in pixels")
    parser.add_argument("--classes", type=int, default=19, help="number of classes")
    parser.add_argument("--centers", type=int, default=50, help="number of instances")
    parser.add_argument("--runs", type=int, default=5, help="runs of which the median is taken")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    parser.add_argument("--memory-of", choices=FORMULATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    try:
        height, width = (int(part) for part in arguments.size.lower().split("x"))
    except ValueError:
        parser.error(f"--size must be HEIGHTxWIDTH, for example 1025x2049, got '{arguments.size}'")
    for name, least in (("classes", 2), ("centers", 1), ("runs", 1)):
        if getattr(arguments, name) < least:
            parser.error(f"--{name} must be {least} or more, got {getattr(arguments, name)}")

    if arguments.memory_of:
        print(memory_growth(arguments.memory_of, (height, width), arguments.classes, arguments.centers))
        return 0
    result = measure((height, width), arguments.classes, arguments.centers, arguments.runs)
    show(result)
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
