"""How fast panoptic quality is computed, against the usual way, and what time and memory a set of files takes.

First part, for two sizes: one pair of maps, made from the built-in scenes. A prediction is the ground truth with
displaced boundaries and with segments merged, split and given other classes. The usual way counts the pairs of segments
with `numpy.unique` over all pixels of `ground_truth * 2**24 + prediction`, which the first column times alone; the
second adds the rest of the usual way, areas and dictionaries. The library (`PanopticQuality.update_state`) does all
that PQ takes. Median over the runs, then mean over the scenes. Both must count the same.

`numpy.unique` makes large arrays, so its time depends on what the C library's allocator does with freed memory: as it
comes, in a process that has only read the maps, it returns the memory each time; after work with larger arrays it keeps
the memory, which halves the time. Both are measured, the latter by settings of the GNU C library, which others ignore.

Second part: files in the COCO panoptic format through `evaluate_files`, with one worker and with one per core. Resident
memory is read when some of the images are done and at the end; the JSON grows with the number of images, the rest must
not.

Exit status 1 if results differ, or if memory grows. Measure on an otherwise idle machine.

    python benchmarks/panoptic_quality.py [--scenes 8] [--runs 20] [--images 2000] [--json FILE]
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.label_runs import find_runs
from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.evaluation.coco_format import CocoPanopticWriter
from deeplab2_like.evaluation.evaluate_files import evaluate_files
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.files import write_atomically

SIZES = ((480, 640), (1024, 2048))
FIRST_VALIDATION_INDEX = 1_000_000
# What becomes of freed memory -> environment variables.
ALLOCATORS: dict[str, dict[str, str]] = {
    "returned": {},
    "kept": {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)},
}
# The set of files: its size in pixels, how many different pairs it has, and after how many images memory is read first.
SET_SIZE = (480, 640)
DISTINCT_PAIRS = 20
FIRST_READING = 200
# Growth of memory from the first reading to the last that passes as none, in MiB; one image takes about 4.
MEMORY_LIMIT = 16


def displaced(labels: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """Moves the boundaries of a map, int32 [H, W], by a few pixels, here one way and there another."""
    height, width = labels.shape

    def offsets() -> np.ndarray:
        coarse = random.standard_normal((16, 16 * width // height)).astype(np.float32)
        smooth = cv2.resize(coarse, (width, height), interpolation=cv2.INTER_CUBIC)
        return smooth / smooth.std() * height / 240

    rows, columns = np.indices(labels.shape)
    y = np.rint(rows + offsets()).astype(int).clip(0, height - 1)
    x = np.rint(columns + offsets()).astype(int).clip(0, width - 1)
    return labels[y, x]


def made_up_prediction(ground_truth: np.ndarray, info: DatasetInfo, random: np.random.Generator) -> np.ndarray:
    """Makes a prediction, int32 [H, W], with the faults of a network: see the module."""
    divisor = info.label_divisor
    prediction = displaced(ground_truth, random)
    # A network labels everything, and knows no crowds.
    prediction[prediction == info.void] = info.stuff_classes[0] * divisor
    crowd = np.isin(prediction // divisor, info.thing_classes) & (prediction % divisor == 0)
    prediction[crowd] += divisor - 1
    instances = [value for value in np.unique(prediction).tolist() if value % divisor]
    for number, value in enumerate(instances):
        mask = prediction == value
        fault = random.random()
        if fault < 0.1:  # Another class.
            prediction[mask] = random.choice(info.thing_classes) * divisor + 500 + number
        elif fault < 0.2:  # Split.
            columns = np.nonzero(mask)[1]
            mask[:, : int(np.median(columns))] = False
            prediction[mask] = value // divisor * divisor + 700 + number
        elif fault < 0.3 and number:  # SegmentTable.
            prediction[mask] = instances[number - 1]
    return prediction


def make_pair(index: int, size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Returns ground truth and prediction, int32 [H, W] each."""
    _, ground_truth = render_scene(FIRST_VALIDATION_INDEX + index, height=size[0], width=size[1])
    return ground_truth, made_up_prediction(ground_truth, scenes_info(), np.random.default_rng(index))


def unique_pairs(ground_truth: np.ndarray, prediction: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The one call that dominates the usual way."""
    pairs = ground_truth.astype(np.uint64) * 2**24 + prediction.astype(np.uint64)
    return np.unique(pairs, return_counts=True)


def usual_quality(ground_truth: np.ndarray, prediction: np.ndarray, info: DatasetInfo) -> dict[int, list[float]]:  # noqa: C901 - the usual way, in one function
    """The usual way: pairs and areas by `numpy.unique`, then dictionaries; class -> [sum of IoU, TP, FP, FN]."""
    totals: dict[int, list[float]] = {class_id: [0.0, 0, 0, 0] for class_id in range(info.num_classes)}
    void_class = info.ignore_label

    def class_of(value: int) -> int:
        return value // info.label_divisor

    def is_crowd(value: int) -> bool:
        return value % info.label_divisor == 0 and class_of(value) in info.thing_classes

    areas = [
        dict(zip(*(part.tolist() for part in np.unique(labels, return_counts=True)), strict=True))
        for labels in (ground_truth, prediction)
    ]
    pixels_of = {
        (pair >> 24, pair & 2**24 - 1): pixels
        for pair, pixels in zip(*(part.tolist() for part in unique_pairs(ground_truth, prediction)), strict=True)
    }
    matched: tuple[set[int], set[int]] = (set(), set())
    excused = dict.fromkeys(areas[1], 0)
    void = dict.fromkeys(areas[1], 0)
    for (truth, found), pixels in pixels_of.items():
        if class_of(truth) == void_class:
            void[found] += pixels
        if class_of(truth) == void_class or (is_crowd(truth) and class_of(truth) == class_of(found)):
            excused[found] += pixels
    for (truth, found), pixels in pixels_of.items():
        if class_of(truth) != class_of(found) or class_of(truth) == void_class or is_crowd(truth):
            continue
        iou = pixels / (areas[0][truth] + areas[1][found] - pixels - void[found])
        if iou > 0.5:
            totals[class_of(truth)][0] += iou
            totals[class_of(truth)][1] += 1
            matched[0].add(truth)
            matched[1].add(found)
    for found, area in areas[1].items():
        if found not in matched[1] and class_of(found) != void_class and excused[found] / area <= 0.5:
            totals[class_of(found)][2] += 1
    for truth in areas[0]:
        if truth not in matched[0] and class_of(truth) != void_class and not is_crowd(truth):
            totals[class_of(truth)][3] += 1
    return totals


def median_milliseconds(function: Callable[[], object], runs: int) -> float:
    """The median of several runs, after one that does not count."""
    function()
    seconds = []
    for _ in range(runs):
        started = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)


def time_pair(ground_truth: np.ndarray, prediction: np.ndarray, runs: int) -> dict[str, Any]:
    """Times all ways on a pair of maps, int32 [H, W], and compares what they count."""
    info = scenes_info()
    metric = PanopticQuality(info)
    metric.update_state(ground_truth, prediction)
    counted = zip(metric.iou_sum, metric.true_positives, metric.false_positives, metric.false_negatives, strict=True)
    usual = usual_quality(ground_truth, prediction, info)
    return {
        "segments": [len(np.unique(labels)) for labels in (ground_truth, prediction)],
        "runs": len(find_runs(ground_truth.reshape(-1), prediction.reshape(-1))[0]),
        "pq": metric.result().all.pq,
        "equal": [list(row) for row in counted] == list(usual.values()),
        "milliseconds": {
            "unique": median_milliseconds(lambda: unique_pairs(ground_truth, prediction), runs),
            "usual": median_milliseconds(lambda: usual_quality(ground_truth, prediction, info), runs),
            "library": median_milliseconds(lambda: metric.update_state(ground_truth, prediction), runs),
        },
    }


def time_pairs(file: Path, runs: int) -> list[dict[str, Any]]:
    """Times all ways on the pairs of maps in a file."""
    return [time_pair(ground_truth, prediction, runs) for ground_truth, prediction in np.load(file)]


def in_new_process(*arguments: object, environment: Mapping[str, str] | None = None) -> Any:
    """Runs this script with hidden arguments and more environment variables, and reads what it prints."""
    command = [sys.executable, __file__, *(str(argument) for argument in arguments)]
    variables = {**os.environ, **(environment or {})}
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=variables).stdout)


def measure_maps(size: tuple[int, int], scenes: int, runs: int) -> list[dict[str, Any]]:
    """Times all ways on pairs of maps, in a new process for each way of the allocator."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "maps.npy"
        np.save(file, np.array([make_pair(index, size) for index in range(scenes)]))
        return [
            {"size": list(size), "memory": memory}
            | averaged(in_new_process("--time", file, runs, environment=variables))
            for memory, variables in ALLOCATORS.items()
        ]


def averaged(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Averages over the scenes what `time_pair` returned for each."""
    mean = {name: statistics.mean(row["milliseconds"][name] for row in rows) for name in rows[0]["milliseconds"]}
    return {
        "milliseconds": mean,
        "ratio": {name: mean[name] / mean["library"] for name in ("unique", "usual")},
        "equal": all(row["equal"] for row in rows),
        "scenes": list(rows),
    }


def write_files(folder: Path, images: int) -> None:
    """Writes ground truth and prediction of a set: few different pairs of PNG files under many names."""
    info = scenes_info()
    pairs = [make_pair(index, SET_SIZE) for index in range(min(DISTINCT_PAIRS, images))]
    for part, name in enumerate(("ground_truth", "prediction")):
        with CocoPanopticWriter(folder, info, name=name, ground_truth=part == 0) as writer:
            for index, pair in enumerate(pairs):
                writer.add(index, f"{index}.jpg", pair[part])
        content = json.loads(writer.json_file.read_bytes())
        for index in range(len(pairs), images):
            original = content["annotations"][index % len(pairs)]
            content["annotations"].append(original | {"image_id": index, "file_name": f"{index}.png"})
            shutil.copy(writer.png_dir / original["file_name"], writer.png_dir / f"{index}.png")
        writer.json_file.write_text(json.dumps(content))


def resident_mebibytes() -> float | None:
    """Memory that this process holds; None where the system does not tell. The library starts no other processes."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def run_set(folder: Path, workers: int, first_reading: int) -> dict[str, Any]:
    """Evaluates the files of a folder once, in this process."""
    memory: dict[int, float | None] = {}

    def progress(done: int, total: int) -> None:
        if done in (first_reading, total):
            memory[done] = resident_mebibytes()

    started = time.perf_counter()
    metrics = evaluate_files(
        ground_truth=folder / "ground_truth.json",
        ground_truth_dir=folder / "ground_truth",
        prediction=folder / "prediction.json",
        prediction_dir=folder / "prediction",
        workers=workers,
        progress=progress,
    )
    return {
        "workers": workers,
        "seconds": time.perf_counter() - started,
        "memory_mib": {str(done): value for done, value in memory.items()},
        "metrics": metrics,
    }


def measure_set(images: int) -> dict[str, Any]:
    """Evaluates a set of files with one worker and with one per core, each in a new process."""
    first_reading = min(FIRST_READING, images)
    with tempfile.TemporaryDirectory() as folder:
        write_files(Path(folder), images)
        runs = []
        for workers in sorted({1, os.cpu_count() or 1}):
            runs.append(in_new_process("--evaluate", folder, workers, first_reading))
    metrics = [run.pop("metrics") for run in runs]
    for run in runs:
        first, last = (run["memory_mib"][str(done)] for done in (first_reading, images))
        run["growth_mib"] = None if first is None else last - first
    return {
        "images": images,
        "size": list(SET_SIZE),
        "runs": runs,
        "speedup": runs[0]["seconds"] / runs[-1]["seconds"],
        "equal": all(other == metrics[0] for other in metrics),
        "flat": all((run["growth_mib"] or 0) <= MEMORY_LIMIT for run in runs),
    }


def show(result: Mapping[str, Any]) -> None:
    """Prints the tables."""
    console = Console()
    table = Table(title="One image: milliseconds, and times of the library's", title_justify="left")
    for column in ("size", "freed memory"):
        table.add_column(column, no_wrap=True)
    for column in ("unique", "usual PQ", "library", "unique x", "usual x", "equal"):
        table.add_column(column, justify="right")
    for row in result["maps"]:
        times, ratio = row["milliseconds"], row["ratio"]
        table.add_row(
            "{}x{}".format(*row["size"]),
            row["memory"],
            *(f"{times[name]:.2f}" for name in ("unique", "usual", "library")),
            *(f"{ratio[name]:.1f}" for name in ("unique", "usual")),
            "yes" if row["equal"] else "NO",
        )
    console.print(table)

    files = result["files"]
    done = list(files["runs"][0]["memory_mib"])
    title = "{} image pairs of {}x{} in files".format(files["images"], *files["size"])
    table = Table("workers", title=title, title_justify="left")
    for column in ("seconds", "images/s", *(f"MiB after {count}" for count in done)):
        table.add_column(column, justify="right")
    for run in files["runs"]:
        memory = ["-" if run["memory_mib"][count] is None else f"{run['memory_mib'][count]:.0f}" for count in done]
        table.add_row(str(run["workers"]), f"{run['seconds']:.1f}", f"{files['images'] / run['seconds']:.0f}", *memory)
    console.print(table)
    console.print(f"Speed-up {files['speedup']:.2f}; the same numbers: {'yes' if files['equal'] else 'NO'}")
    console.print("passed" if result["passed"] else "FAILED")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=int, default=8, help="pairs of maps of each size")
    parser.add_argument("--runs", type=int, default=20, help="runs of which the median is taken")
    parser.add_argument("--images", type=int, default=2000, help="image pairs in files")
    parser.add_argument("--json", type=Path, help="also write the tables to this file")
    parser.add_argument("--time", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--evaluate", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    for name in ("scenes", "runs", "images"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name} must be 1 or more, got {getattr(arguments, name)}")
    if arguments.time:
        file, runs = arguments.time
        print(json.dumps(time_pairs(Path(file), int(runs))))
        return 0
    if arguments.evaluate:
        folder, workers, first_reading = arguments.evaluate
        print(json.dumps(run_set(Path(folder), int(workers), int(first_reading))))
        return 0

    result: dict[str, Any] = {
        "maps": [row for size in SIZES for row in measure_maps(size, arguments.scenes, arguments.runs)],
        "files": measure_set(arguments.images),
    }
    result["passed"] = (
        all(row["equal"] for row in result["maps"]) and result["files"]["equal"] and result["files"]["flat"]
    )
    show(result)
    if arguments.json:
        write_atomically(arguments.json, (json.dumps(result, indent=1) + "\n").encode())
    return 0 if result["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
