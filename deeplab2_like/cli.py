"""The command line: `deeplab2-like COMMAND`. Each command is a thin layer over a function of the library."""

import argparse
import json
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError
from deeplab2_like.progress import progress_bar

WRONG_USE = 2
INTERNAL_FAILURE = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words after the program's name; by default those of the command line.

    Returns:
        Exit status: 0 for success, also of `--help`, 2 for wrong use or input, 1 for an internal failure.
    """
    # TensorFlow's own messages would drown what the commands say; whoever looks for a fault sets the level to 0.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    try:
        options = _make_parser().parse_args(arguments)
        options.run(options)
    except UserError as error:
        print(f"deeplab2-like: {error}", file=sys.stderr)
        return WRONG_USE
    except SystemExit as stop:  # argparse has printed its help, or what it does not understand.
        return stop.code if isinstance(stop.code, int) else INTERNAL_FAILURE
    except KeyboardInterrupt:
        print("deeplab2-like: stopped.", file=sys.stderr)
        return INTERNAL_FAILURE
    except Exception:
        traceback.print_exc()
        print("deeplab2-like: this is a fault of the program, not of yours; please report it.", file=sys.stderr)
        return INTERNAL_FAILURE
    return 0


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="deeplab2-like", description="Panoptic segmentation, from labels to a server."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run: Callable[[argparse.Namespace], None], help_text: str, parent: Any = commands) -> Any:
        command = parent.add_parser(name, help=help_text, description=help_text)
        command.set_defaults(run=run)
        return command

    demo = add("demo", _demo, "Make a small data set, train, evaluate, export and predict, in some minutes.")
    demo.add_argument("--system", default="panoptic_deeplab", help="system to train (default: %(default)s)")
    demo.add_argument("--output-dir", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    _add_set(demo)

    convert = commands.add_parser("convert", help="Convert a data set to TFRecords.", description="Convert a data set.")
    sources = convert.add_subparsers(required=True, metavar="SOURCE")
    coco = add("coco-panoptic", _convert_coco_panoptic, "A data set in COCO panoptic format.", sources)
    coco.add_argument("--images", type=Path, required=True, help="folder of the images")
    coco.add_argument("--panoptic", type=Path, required=True, help="folder of the panoptic PNGs")
    coco.add_argument("--json", type=Path, required=True, help="the panoptic JSON")
    coco.add_argument("--split", help="name of the split (default: train, val or test, by the JSON's name)")
    coco.add_argument("--label-divisor", type=int, help="above the largest number of instances of a class in an image")
    coco.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do with a bad example")
    scenes = add("scenes", _convert_scenes, "The built-in procedural street scenes.", sources)
    scenes.add_argument("--train", type=int, required=True, help="number of training scenes")
    scenes.add_argument("--val", type=int, required=True, help="number of validation scenes")
    scenes.add_argument("--size", type=_size, required=True, metavar="HxW", help="height and width in pixels")
    scenes.add_argument("--seed", type=int, default=0, help="other seeds show other scenes")
    for source in (coco, scenes):
        source.add_argument("--output-dir", type=Path, required=True, help="record folder to write")
        source.add_argument("--shards", type=int, help="number of files (default: one per 500 examples)")
        source.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="examples converted at once")

    train = add("train", _train, "Train, or resume the training of a model folder.")
    train.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="a built-in config or a YAML file")
    train.add_argument("--model-dir", type=Path, required=True, help="folder for checkpoints and logs")
    _add_set(train)

    evaluate = add("evaluate", _evaluate, "Compute PQ, AP and mIoU of a trained model.")
    evaluate.add_argument("--model-dir", type=Path, required=True, help="folder that training wrote")
    evaluate.add_argument("--split", help="split of the records (default: the config's data.val_split)")
    evaluate.add_argument("--output-dir", type=Path, help="folder for metrics.json (default: MODEL_DIR/SPLIT)")
    evaluate.add_argument("--compile", action="store_true", help="compile the post-processing with XLA")
    _add_set(evaluate)

    export = add("export", _export, "Export a trained model as a SavedModel.")
    export.add_argument("--model-dir", type=Path, required=True, help="folder that training wrote")
    export.add_argument("--output-dir", type=Path, required=True, help="folder of the SavedModel")
    _add_set(export)

    predict = add("predict", _predict, "Run an exported model on images; write pictures and COCO panoptic files.")
    predict.add_argument("--model", type=Path, required=True, metavar="EXPORTED_DIR", help="folder that export wrote")
    predict.add_argument("--input", type=Path, required=True, metavar="FILE_OR_DIR", help="an image, or a folder")
    predict.add_argument("--output-dir", type=Path, required=True, help="folder for the results")
    predict.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do with a bad image")
    predict.add_argument("--compile", action="store_true", help="compile the post-processing with XLA")

    describe = add("describe", _describe, "Show parameters, multiply-adds and shapes of a system.")
    describe.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="a built-in config or a YAML file")
    describe.add_argument("--size", type=_size, metavar="HxW", help="image size (default: the training crop)")
    describe.add_argument(
        "--classes",
        type=_positive,
        help="number of made-up classes, instead of those of data.path (default without data.path: 19)",
    )
    describe.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON, too")
    _add_set(describe)
    return parser


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="change a key of the config; may be given several times",
    )


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


def _size(text: str) -> tuple[int, int]:
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; give height and width as in 512x1024")
    return int(height), int(width)


def _demo(options: argparse.Namespace) -> None:
    from deeplab2_like.demo import run_demo

    run_demo(system=options.system, output_dir=options.output_dir, overrides=options.set)


def _convert_coco_panoptic(options: argparse.Namespace) -> None:
    from deeplab2_like.data.convert.coco_panoptic import convert_coco_panoptic

    with progress_bar("convert") as progress:
        report = convert_coco_panoptic(
            images=options.images,
            panoptic=options.panoptic,
            json_file=options.json,
            output_dir=options.output_dir,
            split=options.split,
            shards=options.shards,
            workers=options.workers,
            label_divisor=options.label_divisor,
            on_error=options.on_error,
            progress=progress,
        )
    _print_reports([report], options.output_dir)


def _convert_scenes(options: argparse.Namespace) -> None:
    from deeplab2_like.data.convert.scenes import convert_scenes

    with progress_bar("convert") as progress:
        reports = convert_scenes(
            train=options.train,
            val=options.val,
            size=options.size,
            output_dir=options.output_dir,
            seed=options.seed,
            shards=options.shards,
            workers=options.workers,
            progress=progress,
        )
    _print_reports(reports, options.output_dir)


def _print_reports(reports: Sequence[Any], output_dir: Path) -> None:
    for report in reports:
        print(f"Split '{report.split}': {report.examples} examples, {len(report.skipped)} skipped.")
        for fault in report.skipped:
            print(f"  skipped: {fault}")
    print(f"Records are in {output_dir}")


def _train(options: argparse.Namespace) -> None:
    from deeplab2_like.configs import load_config
    from deeplab2_like.trainer.train import train

    train(load_config(options.config, options.set), options.model_dir)
    print(f"Model folder: {options.model_dir}")


def _evaluate(options: argparse.Namespace) -> None:
    from deeplab2_like.evaluation.evaluate import evaluate_model_folder

    evaluate_model_folder(
        options.model_dir,
        split=options.split,
        output_dir=options.output_dir,
        compiled=options.compile,
        overrides=options.set,
    )


def _export(options: argparse.Namespace) -> None:
    from deeplab2_like.export.saved_model import export_model_folder

    export_model_folder(options.model_dir, options.output_dir, overrides=options.set)
    print(f"SavedModel is in {options.output_dir}")


def _predict(options: argparse.Namespace) -> None:
    from deeplab2_like.export.predictor import predict_files

    with progress_bar("predict") as progress:
        summary = predict_files(
            options.model,
            options.input,
            options.output_dir,
            compiled=options.compile,
            on_error=options.on_error,
            progress=progress,
        )
    print(f"{summary.images} images predicted, {len(summary.skipped)} skipped.")
    for fault in summary.skipped:
        print(f"  skipped: {fault}")
    print(f"Pictures and COCO panoptic files are in {options.output_dir}")


def _describe(options: argparse.Namespace) -> None:
    from deeplab2_like.configs import load_config
    from deeplab2_like.data.dataset_info import DatasetInfo
    from deeplab2_like.files import write_atomically
    from deeplab2_like.model import build_system
    from deeplab2_like.model.describe import describe, print_description

    config = load_config(options.config, options.set)
    info = None
    if config.data.path is None or options.classes:
        categories = [{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(options.classes or 19)]
        info = DatasetInfo.from_coco_categories(categories, name="described")
    height, width = options.size or config.data.crop_size
    description = describe(build_system(config, info), height, width)
    print_description(description)
    if options.json is not None:
        write_atomically(options.json, (json.dumps(description.to_dict(), indent=1) + "\n").encode())
