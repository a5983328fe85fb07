"""What single choices of a system are worth: trains it with and without each, and compares.

    deeplab2-like convert scenes --train 800 --val 60 --size 128x256 --output-dir records
    python benchmarks/ablations.py lpsnet --records records --output-dir runs/ablations
    python benchmarks/ablations.py lpsnet --records records --output-dir runs/short --set trainer.steps=500

Each row is a training and an evaluation with the command line, mean over the seeds; rows that differ in their
evaluation only share a training. Run it again to go on where it was interrupted.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from deeplab2_like.files import write_atomically


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: What is shown.
        train: Config overrides of the training.
        evaluate: Further overrides of the evaluation.
    """

    name: str
    train: tuple[str, ...] = ()
    evaluate: tuple[str, ...] = ()


class Ablation(NamedTuple):
    """The rows that a system is compared in, all trained from one config."""

    config: str
    rows: tuple[Row, ...]


ABLATIONS = {
    # Figure 7 and table 5 of the paper.
    "lpsnet": Ablation(
        "lpsnet/scenes_tiny",
        (
            Row("border-ness, points in masks, pyramid pooling"),
            Row("center-ness", ("model.box.measured_to=box",)),
            Row("points in boxes", ("model.box.positives=box",)),
            Row("global average", ("model.context.kind=global_average",)),
            Row("no context", ("model.context.kind=none",)),
            Row("conflicts to the smallest area", (), ("model.postprocess.conflicts=smallest_area",)),
            Row("conflicts to the highest score", (), ("model.postprocess.conflicts=highest_score",)),
        ),
    ),
    # Table 1 of the paper; affinities and the matching loss make models C into models D.
    "unifying": Ablation(
        "unifying/scenes_tiny",
        (
            Row("D2: masks, affinities, argmax"),
            Row("D1: the same, heuristic", (), ("model.postprocess.merge=heuristic",)),
            Row("D2 with duplicates", (), ("model.postprocess.overlap_threshold=1",)),
            Row("D2, potential b", ("model.panoptic.potential=b",)),
            Row("C2: masks, argmax", ("model.panoptic.affinity=false", "model.loss.matching=false")),
            Row(
                "C1: the same, heuristic",
                ("model.panoptic.affinity=false", "model.loss.matching=false"),
                ("model.postprocess.merge=heuristic",),
            ),
            # Without the matching loss, the potential changes the evaluation only.
            Row(
                "C2, potential b",
                ("model.panoptic.affinity=false", "model.loss.matching=false"),
                ("model.panoptic.potential=b",),
            ),
        ),
    ),
}
COLUMNS = {
    "PQ": ("panoptic", "all", "pq"),
    "things": ("panoptic", "things", "pq"),
    "stuff": ("panoptic", "stuff", "pq"),
    "mIoU": ("semantic", "miou"),
    "mask AP": ("instance", "mask_ap"),
    "box AP": ("instance", "box_ap"),
}


def run(*arguments: str) -> None:
    """Runs `deeplab2-like`; a failure ends the benchmark."""
    subprocess.run([sys.executable, "-m", "deeplab2_like", *arguments], check=True, stdout=subprocess.DEVNULL)


def overrides_as_arguments(overrides: tuple[str, ...]) -> list[str]:
    return [argument for override in overrides for argument in ("--set", override)]


def measure(
    ablation: Ablation, number: int, seed: int, *, overrides: list[str], records: Path, output_dir: Path
) -> dict[str, float]:
    """Trains and evaluates one row with one seed, unless that was done before; its columns."""
    row = ablation.rows[number]
    first_trained_so = next(i for i, other in enumerate(ablation.rows) if other.train == row.train)
    model_dir = output_dir / f"training{first_trained_so}_seed{seed}"
    result_dir = output_dir / f"row{number}_seed{seed}"
    if not (result_dir / "metrics.json").exists():
        settings = (f"data.path={records.resolve()}", f"trainer.seed={seed}", *overrides, *row.train)
        run("train", "--config", ablation.config, "--model-dir", str(model_dir), *overrides_as_arguments(settings))
        evaluation = ("evaluate", "--model-dir", str(model_dir), "--output-dir", str(result_dir))
        run(*evaluation, *overrides_as_arguments(row.evaluate))
    metrics: Any = json.loads((result_dir / "metrics.json").read_text())
    values = {}
    for column, path in COLUMNS.items():
        value = metrics
        for key in path:
            value = value[key]
        values[column] = float(value)
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=sorted(ABLATIONS))
    parser.add_argument("--records", type=Path, required=True, help="record folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="where models and results lie")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="of the config of all trainings")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the table to this file")
    options = parser.parse_args()
    ablation = ABLATIONS[options.name]

    results: dict[str, list[dict[str, float]]] = {row.name: [] for row in ablation.rows}
    for seed in options.seeds:
        for number, row in enumerate(ablation.rows):
            found = measure(
                ablation,
                number,
                seed,
                overrides=options.set,
                records=options.records,
                output_dir=options.output_dir,
            )
            results[row.name].append(found)
            print(f"seed {seed}, {row.name}: PQ {found['PQ']:.1f}", flush=True)

    table = Table(title=f"{ablation.config}, mean of {len(options.seeds)} seeds", title_justify="left")
    table.add_column("", min_width=20)
    for column in COLUMNS:
        table.add_column(column, justify="right")
    for name, values in results.items():
        table.add_row(name, *(f"{statistics.mean(value[column] for value in values):.1f}" for column in COLUMNS))
    Console().print(table)
    if options.json is not None:
        write_atomically(options.json, (json.dumps(results, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
