"""`deeplab2-like evaluate-files`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_max_pixels, add_workers, find_folders


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "evaluate-files", run, "Compute PQ and mIoU of COCO panoptic files, without a model."
    )
    for name, content in (("ground-truth", "labels"), ("prediction", "predictions")):
        parser.add_argument(
            f"--{name}", type=Path, required=True, metavar="JSON", help=f"panoptic JSON of the {content}"
        )
        parser.add_argument(f"--{name}-dir", type=Path, required=True, metavar="DIR", help="folder of its PNGs")
    parser.add_argument("--output-dir", type=Path, help="folder for metrics.json (default: none is written)")
    parser.add_argument(
        "--reference-crowd-rule", action="store_true", help="treat crowds and areas exactly as panopticapi does"
    )
    add_workers(parser, "number of images compared at once")
    add_max_pixels(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluates COCO panoptic files."""
    from deeplab2_like.evaluation import report
    from deeplab2_like.evaluation.evaluate_files import evaluate_files
    from deeplab2_like.progress import progress_bar

    find_folders(options, options.ground_truth, "ground_truth_dir")
    find_folders(options, options.prediction, "prediction_dir")
    with progress_bar("evaluate") as progress:
        metrics = evaluate_files(
            ground_truth=options.ground_truth,
            ground_truth_dir=options.ground_truth_dir,
            prediction=options.prediction,
            prediction_dir=options.prediction_dir,
            output_dir=options.output_dir,
            reference_crowd_rule=options.reference_crowd_rule,
            workers=options.workers,
            progress=progress,
        )
    report.print_table(metrics, title=f"{options.prediction} against {options.ground_truth}")
    if options.output_dir is not None:
        print(f"Metrics are in {options.output_dir / 'metrics.json'}")
