"""`deeplab2-like predict`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import (
    add_command,
    add_compile,
    add_image_options,
    positive_float,
    positive_int,
    whole_number,
)

# The keys of `prediction_files.FORMATS`, which is imported only when the command runs.
FORMAT_NAMES = ("coco", "labels-tiff", "geojson", "cityscapes")


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "predict", run, "Run a model on images and videos; write pictures and files for other tools."
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="an export (of a folder of versions the newest), or a model folder",
    )
    parser.add_argument(
        "--input",
        type=Path,
        required=True,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="images, videos, folders (searched with their subfolders) and patterns such as 'photos/**/*.jpg'",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for the results")
    parser.add_argument(
        "--format",
        nargs="+",
        action="extend",
        choices=FORMAT_NAMES,
        help="files to write beside the pictures (default: coco)",
    )
    parser.add_argument(
        "--min-score", type=positive_float, default=0.0, metavar="SCORE", help="leave out segments with a smaller score"
    )
    parser.add_argument(
        "--classes", nargs="+", action="extend", default=[], metavar="NAME", help="leave out all other classes"
    )
    parser.add_argument(
        "--tile",
        type=positive_int,
        metavar="PIXELS",
        help="predict larger images in tiles of this height and width, and join objects across their seams",
    )
    parser.add_argument(
        "--overlap",
        type=whole_number,
        metavar="PIXELS",
        help="number of pixels that neighboring tiles share, more than the size of an object (default: 128)",
    )
    parser.add_argument(
        "--checkpoint", metavar="last|best|STEP", help="which checkpoint of a model folder (default: last)"
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace the results of another model or of other options"
    )
    parser.add_argument("--open", action="store_true", help="show the first picture")
    parser.add_argument(
        "--on-error", choices=("stop", "skip"), default="stop", help="what to do with a faulty image or video"
    )
    add_compile(parser)
    add_image_options(parser)


def run(options: argparse.Namespace) -> None:
    """Predicts images and videos."""
    from deeplab2_like.errors import UserError
    from deeplab2_like.export.tiles import DEFAULT_OVERLAP

    if options.overlap is not None and options.tile is None:
        raise UserError("--overlap is for tiles; give their size with --tile, or leave out --overlap.")

    from deeplab2_like.data.images import describe_bit_depth
    from deeplab2_like.export.predict_files import predict_files
    from deeplab2_like.printing import counted, printable
    from deeplab2_like.progress import progress_bar
    from deeplab2_like.viewer import show_file

    with progress_bar("predict") as progress:
        summary = predict_files(
            options.model,
            options.input,
            options.output_dir,
            formats=options.format,
            min_score=options.min_score,
            classes=options.classes,
            tile=options.tile,
            overlap=DEFAULT_OVERLAP if options.overlap is None else options.overlap,
            checkpoint=options.checkpoint,
            compiled=options.compile,
            on_error=options.on_error,
            bit_depth=options.bit_depth,
            replace=options.replace,
            progress=progress,
        )
    parts = [f"{counted(summary.images, 'image')} predicted", f"{len(summary.skipped)} skipped"]
    if summary.videos:
        parts.insert(1, counted(summary.videos, "video"))
    if summary.done_before:
        parts.append(f"{summary.done_before} done by an earlier run")
    print(f"{', '.join(parts)}.")
    for fault in summary.skipped:
        print(f"  skipped: {printable(fault)}")
    for note in summary.notes:
        print(f"  {printable(note)}")
    if summary.bit_depth is not None:
        print(describe_bit_depth(summary.bit_depth))
    print(f"Results are in {', '.join(str(path) for path in summary.outputs)}")
    if options.open and not show_file(summary.first_picture):
        print(f"There is no display; the first picture is {summary.first_picture}")
