"""What a conversion takes: images per second, bytes per image, and memory, at the sizes of Cityscapes and COCO.

Made-up data sets in the COCO panoptic format (`plain_targets.make_example`; few different images under many names) are
converted with one worker and with one per core, each in a process of its own. Peak memory is read there, for some
images and for three times as many: it must not grow. Label bytes are compared with those of raw int32, as DeepLab2
stores them.

Exit status 1 if labels take more than 1/20 of raw int32, or if memory grows. Measure on an otherwise idle machine.

    python benchmarks/convert.py [--images 24] [--json FILE]
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import cv2
import tensorflow as tf
from plain_targets import make_example
from rich.console import Console
from rich.table import Table

from deeplab2_like.data.convert.coco_panoptic import convert_coco_panoptic
from deeplab2_like.data.images import write_png
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.data.shards import list_shards, read_index
from deeplab2_like.evaluation.coco_format import CocoPanopticWriter
from deeplab2_like.files import write_atomically

# Name -> height, width, instances, and the ending of image files.
CASES = {"Cityscapes": (1024, 2048, 30, ".png"), "COCO": (480, 640, 10, ".jpg")}
DISTINCT = 4
# Raw bytes per label byte, at least.
LABEL_BOUND = 20
# Growth of peak memory with three times as many images that passes as none, in MiB; an image takes up to 20.
MEMORY_LIMIT = 40


def write_source(folder: Path, name: str, images: int) -> None:
    """Writes a data set in the COCO panoptic format."""
    height, width, instances, ending = CASES[name]
    (folder / "images").mkdir(parents=True)
    with CocoPanopticWriter(folder, scenes_info(), name="train", ground_truth=True) as writer:
        for index in range(DISTINCT):
            image, panoptic = make_example(index, (height, width), instances)
            if ending == ".png":
                write_png(folder / "images" / f"{index}{ending}", image)
            else:
                cv2.imwrite(str(folder / "images" / f"{index}{ending}"), image[:, :, ::-1])
            writer.add(index, f"{index}{ending}", panoptic)
    content = json.loads(writer.json_file.read_bytes())
    for index in range(DISTINCT, images):
        original = content["annotations"][index % DISTINCT]
        shutil.copy(writer.png_dir / original["file_name"], writer.png_dir / f"{index}.png")
        shutil.copy(folder / "images" / f"{index % DISTINCT}{ending}", folder / "images" / f"{index}{ending}")
        content["annotations"].append(original | {"image_id": index, "file_name": f"{index}.png"})
        content["images"].append({"id": index, "file_name": f"{index}{ending}"})
    writer.json_file.write_text(json.dumps(content))


def run(source: Path, output_dir: Path, workers: int) -> dict[str, float]:
    """Converts in this process."""
    cv2.setNumThreads(1)
    started = time.perf_counter()
    report = convert_coco_panoptic(
        images=source / "images",
        panoptic=source / "train",
        json_file=source / "train.json",
        output_dir=output_dir,
        workers=workers,
    )
    seconds = time.perf_counter() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {"images": report.examples, "images_per_second": report.examples / seconds, "peak_mib": peak}


def measure(name: str, images: int) -> dict[str, Any]:
    """Measures one case."""
    height, width, *_ = CASES[name]
    runs = []
    with tempfile.TemporaryDirectory() as folder:
        for count in (images, 3 * images):
            source = Path(folder) / str(count)
            write_source(source, name, count)
            for workers in sorted({1, os.cpu_count() or 1}) if count == images else (os.cpu_count() or 1,):
                output_dir = source / f"records_{workers}"
                command = [sys.executable, __file__, "--run", str(source), str(output_dir), str(workers)]
                output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                runs.append({"workers": workers, **json.loads(output)})
        files = list_shards(output_dir, "train")
        label_bytes = [
            len(tf.train.Example.FromString(record.numpy()).features.feature[key].bytes_list.value[0])
            for record in tf.data.TFRecordDataset(files).take(DISTINCT)
            for key in ["image/segmentation/class/encoded"]
        ]
        index = read_index(files)
    label = sum(label_bytes) / len(label_bytes)
    return {
        "case": name,
        "size": [height, width],
        "record_bytes": index.num_bytes / len(index),
        "label_bytes": label,
        "raw_per_label_byte": 4 * height * width / label,
        "runs": runs,
        "growth_mib": runs[-1]["peak_mib"] - runs[-2]["peak_mib"],
    }


def show(rows: list[dict[str, Any]]) -> None:
    table = Table(title="Conversion", title_justify="left")
    for column in ("case", "images", "workers"):
        table.add_column(column, no_wrap=True)
    for column in ("images/s", "MiB", "KiB/image", "label KiB", "raw/label"):
        table.add_column(column, justify="right")
    for row in rows:
        for one in row["runs"]:
            table.add_row(
                row["case"],
                str(one["images"]),
                str(one["workers"]),
                f"{one['images_per_second']:.1f}",
                f"{one['peak_mib']:.0f}",
                f"{row['record_bytes'] / 1024:.0f}",
                f"{row['label_bytes'] / 1024:.1f}",
                f"{row['raw_per_label_byte']:.0f}",
            )
    Console().print(table)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=24, help="images of the smaller data sets")
    parser.add_argument("--json", type=Path, help="also write the table to this file")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.images < DISTINCT:
        parser.error(f"--images must be {DISTINCT} or more, got {arguments.images}")
    if arguments.run:
        source, output_dir, workers = arguments.run
        print(json.dumps(run(Path(source), Path(output_dir), int(workers))))
        return 0
    rows = [measure(name, arguments.images) for name in CASES]
    show(rows)
    passed = all(row["raw_per_label_byte"] >= LABEL_BOUND and row["growth_mib"] <= MEMORY_LIMIT for row in rows)
    print("passed" if passed else "FAILED")
    if arguments.json:
        write_atomically(arguments.json, (json.dumps({"cases": rows, "passed": passed}, indent=1) + "\n").encode())
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
