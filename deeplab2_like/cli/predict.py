"""`deeplab2-like predict`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_compile, add_image_options


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "predict", run, "Run an exported model on images; write pictures and COCO panoptic files."
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="EXPORTED_DIR",
        help="a version, or a folder of versions, of which the newest is used",
    )
    parser.add_argument("--input", type=Path, required=True, metavar="FILE_OR_DIR", help="an image, or a folder")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the results")
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help="what to do with a faulty image")
    add_compile(parser)
    add_image_options(parser)


def run(options: argparse.Namespace) -> None:
    """Predicts images with an exported model."""
    from deeplab2_like.data.images import describe_bit_depth
    from deeplab2_like.export.predictor import predict_files
    from deeplab2_like.printing import printable
    from deeplab2_like.progress import progress_bar

    with progress_bar("predict") as progress:
        summary = predict_files(
            options.model,
            options.input,
            options.output_dir,
            compiled=options.compile,
            on_error=options.on_error,
            bit_depth=options.bit_depth,
            progress=progress,
        )
    print(f"{summary.images} images predicted, {len(summary.skipped)} skipped.")
    for fault in summary.skipped:
        print(f"  skipped: {printable(fault)}")
    if summary.bit_depth is not None:
        print(describe_bit_depth(summary.bit_depth))
    print(f"Pictures and COCO panoptic files are in {options.output_dir}")
