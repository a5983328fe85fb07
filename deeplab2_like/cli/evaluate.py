"""`deeplab2-like evaluate`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import (
    add_checkpoint,
    add_command,
    add_compile,
    add_image_options,
    add_overrides,
    positive_float,
)
from deeplab2_like.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "evaluate", run, "Compute PQ, AP and mIoU of a trained model.")
    add_checkpoint(parser)
    parser.add_argument("--split", help="split of the records (default: the config's data.val_split)")
    parser.add_argument("--output-dir", type=Path, help="folder for the results (default: MODEL_DIR/SPLIT)")
    parser.add_argument(
        "--follow", action="store_true", help="evaluate each new checkpoint while training runs, and keep the best"
    )
    parser.add_argument(
        "--timeout",
        type=positive_float,
        metavar="MINUTES",
        help="end --follow if no new checkpoint appears for this long",
    )
    parser.add_argument("--save-predictions", action="store_true", help="write a picture per image")
    parser.add_argument("--submission", metavar="BENCHMARK", help="write files to submit: coco or cityscapes")
    parser.add_argument("--image-json", type=Path, metavar="FILE", help="COCO JSON with the image ids to submit")
    parser.add_argument(
        "--instances-json",
        type=Path,
        metavar="FILE",
        help="COCO instance JSON with the ground truth of AP (default: the panoptic labels)",
    )
    parser.add_argument(
        "--images", type=Path, metavar="FILE_OR_DIR", help="images without labels, in place of records: no metrics"
    )
    parser.add_argument("--flip", action="store_true", help="merge with the predictions of mirrored images")
    parser.add_argument(
        "--scales",
        type=positive_float,
        nargs="+",
        default=[1.0],
        metavar="FACTOR",
        help="merge over these factors of the network size",
    )
    parser.add_argument(
        "--ensemble", type=Path, nargs="+", default=[], metavar="MODEL_DIR", help="merge with these models"
    )
    parser.add_argument(
        "--oracle", nargs="+", default=[], metavar="PART", help="replace parts of the prediction by the ground truth"
    )
    add_compile(parser)
    add_image_options(parser)
    add_overrides(parser)


def run(options: argparse.Namespace) -> None:
    """Evaluates a model folder."""
    if options.follow and (options.images or options.checkpoint != "last"):
        raise UserError("--follow evaluates every new checkpoint on labels; leave out --images and --checkpoint.")
    if options.timeout is not None and not options.follow:
        raise UserError("--timeout ends --follow; add --follow, or leave out --timeout.")
    if options.images and options.instances_json:
        raise UserError("--images gives no metrics, so no AP; leave out one of --images and --instances-json.")
    if options.bit_depth is not None and not options.images:
        raise UserError("--bit-depth is for the files of --images; records have 8 bits: leave it out.")
    if options.images and options.split:
        raise UserError("--images takes the place of a split of the records; leave out one of --images and --split.")

    from deeplab2_like.evaluation.submission import read_image_ids

    # A wrong file is reported before TensorFlow is imported, which takes seconds.
    image_ids = read_image_ids(options.image_json) if options.image_json else None

    from deeplab2_like.data.convert.coco_instances import read_instance_json
    from deeplab2_like.evaluation.model_folder import ModelFolderEvaluation, wait_for_model_folder

    timeout_seconds = None if options.timeout is None else 60 * options.timeout
    if options.follow:
        if options.instances_json:
            read_instance_json(options.instances_json)  # A wrong file is reported before the training has started.
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
        image_ids=image_ids,
        instances_json=options.instances_json,
        overrides=options.set,
    )
    if options.images:
        num_images = evaluation.predict(options.images, options.checkpoint, bit_depth=options.bit_depth)
        print(f"{num_images} images predicted.")
    elif options.follow:
        evaluation.follow(timeout_seconds=timeout_seconds)
    else:
        evaluation.run(options.checkpoint)
    if options.save_predictions:
        print(f"Pictures are in {evaluation.output_dir / 'predictions'}")
    if options.submission:
        print(f"Files to submit are in {evaluation.output_dir / 'submission'}")
