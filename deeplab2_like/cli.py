"""The command line: `deeplab2-like COMMAND`. Each command is a thin layer over a function of the library."""

import argparse
import functools
import importlib
import io
import json
import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError
from deeplab2_like.files import require_local
from deeplab2_like.progress import progress_bar

WRONG_USE = 2
INTERNAL_FAILURE = 1
_CHECK_HELP = "look for faults of the labels, as inspect does"


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words after the program's name; by default those of the command line.

    Returns:
        Exit status: 0 for success, also of `--help`, 2 for wrong use or input, 1 for an internal failure; after a
        signal 128 + its number: 130 for Ctrl-C, and for a training that has saved and stopped also 129 (SIGHUP) and
        143 (SIGTERM).
    """
    # TensorFlow's own messages would drown what the commands say; whoever looks for a fault sets the level to 0.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # Names of classes and files may have letters that the terminal lacks.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        options = _make_parser().parse_args(arguments)
        _require_local_paths(options)
        options.run(options)
    except UserError as error:
        print(f"deeplab2-like: {error}", file=sys.stderr)
        return WRONG_USE
    except PermissionError as error:
        print(f"deeplab2-like: no permission for '{error.filename}'; change who may use it.", file=sys.stderr)
        return WRONG_USE
    except SystemExit as stop:  # argparse has printed its help, or what it does not understand.
        return stop.code if isinstance(stop.code, int) else INTERNAL_FAILURE
    except KeyboardInterrupt:
        print("deeplab2-like: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
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

    def add(name: str, run: Callable[[argparse.Namespace], Any], help_text: str, parent: Any = commands) -> Any:
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
    _add_split(coco, "the JSON")
    _add_label_options(coco)
    scenes = add("scenes", _convert_scenes, "The built-in procedural street scenes.", sources)
    scenes.add_argument("--train", type=int, required=True, help="number of training scenes")
    scenes.add_argument("--val", type=int, required=True, help="number of validation scenes")
    scenes.add_argument("--size", type=_size, required=True, metavar="HxW", help="height and width in pixels")
    scenes.add_argument("--seed", type=int, default=0, help="other seeds show other scenes")
    for source in (coco, scenes):
        _add_writing(source, source.get_default("run"))
    _add_sources(sources)

    inspect = add("inspect", _inspect, "Show what a record folder holds: pictures, statistics, faults of the labels.")
    inspect.add_argument("records", type=Path, metavar="RECORD_DIR", help="folder that convert wrote")
    inspect.add_argument("--output-dir", type=Path, required=True, help="folder for pictures and statistics.json")
    inspect.add_argument("--splits", nargs="+", metavar="SPLIT", help="splits to look at (default: all)")
    inspect.add_argument("--pictures", type=_positive, default=16, help="pictures per split (default: %(default)s)")
    inspect.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="records looked at at once")

    train = add("train", _train, "Train, or resume the training of a model folder.")
    train.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="a built-in config or a YAML file")
    train.add_argument("--model-dir", type=Path, required=True, help="folder for checkpoints and logs")
    train.add_argument(
        "--init-from",
        type=Path,
        metavar="MODEL_DIR_OR_CHECKPOINT",
        help="start from the weights of another training, as far as they fit",
    )
    train.add_argument(
        "--profile", type=_positive, default=0, metavar="STEPS", help="record steps for TensorBoard's profiler"
    )
    _add_set(train)

    evaluate = add("evaluate", _evaluate, "Compute PQ, AP and mIoU of a trained model.")
    evaluate.add_argument("--model-dir", type=Path, required=True, help="folder that training wrote")
    evaluate.add_argument("--split", help="split of the records (default: the config's data.val_split)")
    evaluate.add_argument("--output-dir", type=Path, help="folder for the results (default: MODEL_DIR/SPLIT)")
    evaluate.add_argument(
        "--checkpoint", default="last", metavar="last|best|STEP", help="which checkpoint (default: %(default)s)"
    )
    evaluate.add_argument(
        "--follow", action="store_true", help="evaluate each new checkpoint while training runs, and keep the best"
    )
    evaluate.add_argument(
        "--timeout", type=float, metavar="MINUTES", help="end --follow if nothing new appears in the folder for so long"
    )
    evaluate.add_argument("--save-predictions", action="store_true", help="write a picture per image")
    evaluate.add_argument("--submission", metavar="BENCHMARK", help="write files to submit: coco or cityscapes")
    evaluate.add_argument("--image-json", type=Path, metavar="FILE", help="COCO JSON with the image ids to submit")
    evaluate.add_argument(
        "--images", type=Path, metavar="FILE_OR_DIR", help="images without labels, in place of records: no metrics"
    )
    evaluate.add_argument("--flip", action="store_true", help="average with the mirror images")
    evaluate.add_argument(
        "--scales", type=float, nargs="+", default=[1.0], metavar="FACTOR", help="average over image sizes"
    )
    evaluate.add_argument(
        "--ensemble", type=Path, nargs="+", default=[], metavar="MODEL_DIR", help="average with these models"
    )
    evaluate.add_argument(
        "--oracle", nargs="+", default=[], metavar="PART", help="replace parts of the prediction by the truth"
    )
    evaluate.add_argument("--compile", action="store_true", help="compile the post-processing with XLA")
    _add_set(evaluate)

    files = add("evaluate-files", _evaluate_files, "Compute PQ and mIoU of COCO panoptic files; needs no model.")
    for name, what in (("ground-truth", "labels"), ("prediction", "predictions")):
        files.add_argument(f"--{name}", type=Path, required=True, metavar="JSON", help=f"panoptic JSON of the {what}")
        files.add_argument(f"--{name}-dir", type=Path, required=True, metavar="DIR", help="folder of its PNGs")
    files.add_argument("--output-dir", type=Path, help="folder for metrics.json (default: none is written)")
    files.add_argument(
        "--reference-crowd-rule", action="store_true", help="treat crowds and areas exactly as panopticapi does"
    )
    files.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="images compared at once")

    export = add("export", _export, "Export a trained model as a SavedModel.")
    export.add_argument("--model-dir", type=Path, required=True, help="folder that training wrote")
    export.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of versions, which gets the next number (DIR/1, DIR/2, ...), or a version such as DIR/3",
    )
    export.add_argument(
        "--replace",
        action="store_true",
        help="replace the version that --output-dir names, or without a number the newest one",
    )
    export.add_argument(
        "--checkpoint", default="last", metavar="last|best|STEP", help="which checkpoint (default: %(default)s)"
    )
    _add_set(export)

    predict = add("predict", _predict, "Run an exported model on images; write pictures and COCO panoptic files.")
    predict.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="EXPORTED_DIR",
        help="a version, or a folder of versions, of which the newest is taken",
    )
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


def _add_writing(source: argparse.ArgumentParser, run: Callable[[argparse.Namespace], Sequence[Any] | None]) -> None:
    """Adds what every `convert SOURCE` that writes records has; `run` as in `_convert`."""
    source.set_defaults(run=functools.partial(_convert, run))
    source.add_argument("--output-dir", type=Path, required=True, help="record folder to write")
    source.add_argument("--shards", type=int, help="number of files (default: one per 500 examples)")
    source.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="examples converted at once")
    source.add_argument("--check", action="store_true", help=_CHECK_HELP)
    source.add_argument(
        "--replace", action="store_true", help="replace a split of the same name that was made from other files"
    )


def _add_split(source: argparse.ArgumentParser, named: str) -> None:
    source.add_argument(
        "--split",
        help=f"name of the split (default: train, val or test, by the name of {named} or of the folder above)",
    )


def _add_label_options(source: argparse.ArgumentParser) -> None:
    source.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do with a bad example")
    source.add_argument(
        "--label-divisor", type=int, help="above the largest number of instances of a class in an image"
    )
    source.add_argument(
        "--max-side", type=_positive, metavar="PIXELS", help="shrink images whose longer side is longer"
    )


def _add_sources(sources: Any) -> None:
    """Adds the commands `convert SOURCE` that run `convert_SOURCE` of `data/convert/SOURCE.py`.

    Their options are the arguments of that function.
    """

    def add(name: str, help_text: str) -> argparse.ArgumentParser:
        source: argparse.ArgumentParser = sources.add_parser(name, help=help_text, description=help_text)
        _add_writing(source, functools.partial(_convert_source, name.replace("-", "_")))
        _add_label_options(source)
        return source

    def add_root(source: argparse.ArgumentParser, splits: str) -> None:
        source.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the download")
        source.add_argument("--splits", nargs="+", metavar="SPLIT", help=f"splits to convert (default: {splits})")

    cityscapes = add("cityscapes", "Cityscapes as it is downloaded; no prepared panoptic PNGs are needed.")
    add_root(cityscapes, "train val; with --coarse train_extra")
    cityscapes.add_argument("--coarse", action="store_true", help="take the coarse labels, gtCoarse")

    def add_classes(source: argparse.ArgumentParser) -> None:
        source.add_argument("--stuff", nargs="+", default=[], metavar="NAME", help="classes that are stuff, not things")
        source.add_argument("--background", metavar="NAME", help="class of what has no label (default: it is void)")

    def add_shapes(source: argparse.ArgumentParser) -> None:
        add_classes(source)
        source.add_argument(
            "--overlap",
            choices=("smaller-on-top", "later-on-top"),
            default="smaller-on-top",
            help="which of several shapes owns a pixel (default: %(default)s)",
        )

    instances = add("coco-instances", "A COCO instance JSON: polygons and run lengths, as CVAT and others export it.")
    instances.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    instances.add_argument("--json", type=Path, required=True, dest="json_file", metavar="FILE", help="the JSON")
    _add_split(instances, "the JSON")
    add_shapes(instances)
    instances.add_argument(
        "--crowds-are-objects",
        action="store_true",
        help="iscrowd does not count, as some tools set it on whatever they write as run lengths",
    )
    instances.add_argument(
        "--stuff-pngs", type=Path, metavar="DIR", help="a PNG per image with the class of each pixel, below the objects"
    )
    instances.add_argument(
        "--stuff-classes", type=Path, metavar="FILE", help="which value of the stuff PNGs is which class"
    )

    mapillary = add("mapillary", "Mapillary Vistas 1.2 or 2.0 as it is downloaded.")
    add_root(mapillary, "train val")
    mapillary.add_argument("--version", choices=("1.2", "2.0"), help="which labels (default: the newest there)")

    ade20k = add("ade20k", "ADE20K's challenge data, with or without the panoptic JSONs.")
    add_root(ade20k, "train val")

    semantic = add("semantic-pngs", "Labels without instances: a PNG per image with the class of each pixel.")
    semantic.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder of the images")
    semantic.add_argument("--labels", type=Path, required=True, metavar="DIR", help="folder of the label PNGs")
    semantic.add_argument("--classes", type=Path, required=True, metavar="FILE", help="which value is which class")
    _add_split(semantic, "the folders")
    semantic.add_argument(
        "--ignore", type=int, nargs="*", default=[255], metavar="VALUE", help="values that are void (default: 255)"
    )
    semantic.add_argument(
        "--label-ending",
        default=".png",
        metavar="TEXT",
        help="what a PNG's name has in place of the image's ending (default: %(default)s)",
    )

    cvat = add("cvat-masks", 'CVAT\'s export "Segmentation mask".')
    cvat.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the unpacked export")
    _add_split(cvat, "the folder")
    cvat.add_argument("--images", type=Path, metavar="DIR", help="folder of the images (default: JPEGImages)")
    add_classes(cvat)

    labelme = add("labelme", "A folder of labelme, with a JSON per image.")
    labelme.add_argument("--root", type=Path, required=True, metavar="DIR", help="folder of the JSONs")
    _add_split(labelme, "the folder")
    labelme.add_argument(
        "--classes", nargs="+", metavar="NAME", help="all classes, in their order (default: those that occur)"
    )
    add_shapes(labelme)

    help_text = "Records that DeepLab2 has made: writes dataset_info.json beside them, and nothing else."
    deeplab2 = sources.add_parser("deeplab2-records", help=help_text, description=help_text)
    deeplab2.set_defaults(run=_describe_deeplab2_records)
    deeplab2.add_argument("--records", type=Path, required=True, metavar="DIR", help="folder of the records")
    deeplab2.add_argument("--data-set", required=True, metavar="NAME", help="what they hold: cityscapes or coco")
    deeplab2.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="examples checked at once")
    deeplab2.add_argument("--check", action="store_true", help=_CHECK_HELP)


def _describe_deeplab2_records(options: argparse.Namespace) -> None:
    from deeplab2_like.data.convert.deeplab2_records import describe_deeplab2_records

    counts = describe_deeplab2_records(options.records, options.data_set)
    for split, count in counts.items():
        print(f"Split '{split}': {count} examples.")
    print(f"Records in {options.records} can be trained on.")
    if options.check:
        advice = "Mend the labels, and make the records again with DeepLab2."
        _check(options.records, splits=list(counts), workers=options.workers, advice=advice)


def _convert_source(name: str, options: argparse.Namespace) -> None:
    from deeplab2_like.data.convert.summary import print_summary

    module = importlib.import_module(f"deeplab2_like.data.convert.{name}")
    arguments = {key: value for key, value in vars(options).items() if key not in ("run", "check")}
    with progress_bar("convert") as progress:
        reports = getattr(module, f"convert_{name}")(**arguments, progress=progress)
    print_summary(reports, options.output_dir)


def _add_set(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="change keys of the config; may be given several times",
    )


def _require_local_paths(options: argparse.Namespace) -> None:
    """Raises `UserError` if a path among the options is an address such as gs://bucket/run."""
    for value in vars(options).values():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                require_local(path)


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


def _convert(run: Callable[[argparse.Namespace], Sequence[Any] | None], options: argparse.Namespace) -> None:
    """Runs a converter, which may return faults that it has found in its source, and checks its records if asked to."""
    faults = run(options) or ()
    if options.check:
        _check(options.output_dir, more_faults=faults, workers=options.workers)


def _check(
    records: Path,
    *,
    workers: int,
    splits: Sequence[str] | None = None,
    more_faults: Sequence[Any] = (),
    advice: str = "The records are written; mend the labels and convert again.",
) -> None:
    from deeplab2_like.inspection import inspect_records, print_inspection, raise_if_faulty

    with progress_bar("check") as progress:
        inspection = inspect_records(
            records, splits=splits, pictures=0, workers=workers, more_faults=more_faults, progress=progress
        )
    print_inspection(inspection)
    raise_if_faulty(inspection, records, advice)


def _inspect(options: argparse.Namespace) -> None:
    from deeplab2_like.inspection import inspect_records, print_inspection, raise_if_faulty

    with progress_bar("inspect") as progress:
        inspection = inspect_records(
            options.records,
            splits=options.splits,
            pictures=options.pictures,
            workers=options.workers,
            progress=progress,
        )
    inspection.save(options.output_dir)
    print_inspection(inspection)
    print(f"Pictures and statistics.json are in {options.output_dir}")
    hint = f"'{options.output_dir / 'statistics.json'}' lists them; mend the labels and convert again."
    raise_if_faulty(inspection, options.records, hint)


def _convert_coco_panoptic(options: argparse.Namespace) -> Sequence[Any] | None:
    from deeplab2_like.data.convert.coco_panoptic import check_segments, convert_coco_panoptic
    from deeplab2_like.data.convert.summary import print_summary

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
            max_side=options.max_side,
            on_error=options.on_error,
            progress=progress,
            replace=options.replace,
        )
    print_summary([report], options.output_dir)
    if not options.check:
        return None
    with progress_bar("check PNGs") as progress:
        return check_segments(
            panoptic=options.panoptic, json_file=options.json, workers=options.workers, progress=progress
        )


def _convert_scenes(options: argparse.Namespace) -> None:
    from deeplab2_like.data.convert.scenes import convert_scenes
    from deeplab2_like.data.convert.summary import print_summary

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
            replace=options.replace,
        )
    print_summary(reports, options.output_dir)


def _train(options: argparse.Namespace) -> None:
    from deeplab2_like.configs import load_config
    from deeplab2_like.trainer.train import train

    config = load_config(options.config, options.set)
    train(config, options.model_dir, init_from=options.init_from, profile=options.profile)
    print(f"Model folder: {options.model_dir}")


def _evaluate(options: argparse.Namespace) -> None:
    from deeplab2_like.evaluation.model_folder import ModelFolderEvaluation, wait_for_model_folder
    from deeplab2_like.evaluation.submission import read_image_ids

    if options.follow and (options.images or options.checkpoint != "last"):
        raise UserError("--follow evaluates every new checkpoint on labels; leave out --images and --checkpoint.")
    if options.images and options.split:
        raise UserError("--images takes the place of a split of the records; leave out one of --images and --split.")
    timeout_seconds = None if options.timeout is None else 60 * options.timeout
    if options.follow:
        wait_for_model_folder(options.model_dir, timeout_seconds=timeout_seconds)
    evaluation = ModelFolderEvaluation(
        options.model_dir,
        split=options.split,
        output_dir=options.output_dir or (options.model_dir / "images" if options.images else None),
        compiled=options.compile,
        flip=options.flip,
        scales=options.scales,
        ensemble=options.ensemble,
        oracle=options.oracle,
        save_predictions=options.save_predictions,
        submission=options.submission,
        image_ids=read_image_ids(options.image_json) if options.image_json else None,
        overrides=options.set,
    )
    if options.images:
        count = evaluation.predict(options.images, options.checkpoint)
        print(f"{count} images predicted.")
    elif options.follow:
        evaluation.follow(timeout_seconds=timeout_seconds)
    else:
        evaluation.run(options.checkpoint)
    for what, wanted, folder in (
        ("Pictures", options.save_predictions, "predictions"),
        ("Files to submit", options.submission, "submission"),
    ):
        if wanted:
            print(f"{what} are in {evaluation.output_dir / folder}")


def _evaluate_files(options: argparse.Namespace) -> None:
    from deeplab2_like.evaluation import report
    from deeplab2_like.evaluation.evaluate_files import evaluate_files

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


def _export(options: argparse.Namespace) -> None:
    from deeplab2_like.export.saved_model import export_model_folder

    exported = export_model_folder(
        options.model_dir,
        options.output_dir,
        checkpoint=options.checkpoint,
        overrides=options.set,
        replace=options.replace,
    )
    print(f"SavedModel is in {exported}")


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
    from deeplab2_like.temporary import remove_leftovers

    config = load_config(options.config, options.set)
    info = None
    if config.data.path is None or options.classes:
        categories = [{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(options.classes or 19)]
        info = DatasetInfo.from_coco_categories(categories, name="described")
    height, width = options.size or config.data.crop_size
    description = describe(build_system(config, info), height, width)
    print_description(description)
    if options.json is not None:
        remove_leftovers(options.json.parent, of=options.json.name)
        write_atomically(options.json, (json.dumps(description.to_dict(), indent=1) + "\n").encode())
