"""`deeplab2-like export`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deeplab2_like.cli.arguments import (
    add_checkpoint,
    add_command,
    add_overrides,
    add_warmup_size,
    image_size,
    positive_int,
)
from deeplab2_like.export.options import DEFAULT_MAX_PIXELS, ExportOptions

if TYPE_CHECKING:
    from deeplab2_like.export.parity import Parity


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "export", run, "Export a trained model as a SavedModel.")
    add_checkpoint(parser)
    parser.add_argument(
        "--output-dir",
        type=Path,
        required=True,
        metavar="DIR",
        help="folder of versions, which gets the next number (DIR/1, DIR/2, ...), or a version such as DIR/3",
    )
    parser.add_argument(
        "--replace",
        action="store_true",
        help="replace the version that --output-dir names, or without a number the newest one",
    )
    add_overrides(parser)
    parser.add_argument("--size", type=image_size, metavar="HxW", help="only size of images (default: any size)")
    parser.add_argument(
        "--max-pixels",
        type=positive_int,
        default=DEFAULT_MAX_PIXELS,
        metavar="NUMBER",
        help="largest number of pixels of an image file in a request (default: %(default)s)",
    )
    parser.add_argument(
        "--bfloat16", action="store_true", help="compute the network with 16 bits, for CPUs and GPUs that support it"
    )
    parser.add_argument(
        "--ema",
        action=argparse.BooleanOptionalAction,
        help="export the moving averages of the weights (default: if the training kept them)",
    )
    parser.add_argument("--flip", action="store_true", help="average the image and its mirror image; twice the time")
    parser.add_argument(
        "--xla", action="store_true", help="add the signature 'compiled', for predict --compile and servers with XLA"
    )
    parser.add_argument(
        "--parity-images",
        type=Path,
        metavar="FILE_OR_DIR",
        help="images on which the export must agree with the checkpoint (default: generated images)",
    )
    add_warmup_size(parser, "write warm-up requests of TensorFlow Serving for images of these sizes")


def run(options: argparse.Namespace) -> None:
    """Exports a model folder."""
    from deeplab2_like.export.saved_model import export_model_folder

    exported = export_model_folder(
        options.model_dir,
        options.output_dir,
        checkpoint=options.checkpoint,
        overrides=options.set,
        replace=options.replace,
        options=ExportOptions(
            size=options.size,
            max_pixels=options.max_pixels,
            flip=options.flip,
            xla=options.xla,
            warmup_sizes=tuple(options.warmup_size),
        ),
        averaged=options.ema,
        bfloat16=options.bfloat16,
        parity_images=options.parity_images,
        report=_print_parity,
    )
    print(f"SavedModel is in {exported}")


def _print_parity(figures: Sequence["Parity"]) -> None:
    """Prints how well the signatures agree with the checkpoint."""
    from deeplab2_like.printing import counted

    print(f"Agreement with the checkpoint on {counted(figures[0].images, 'image')}, in the worst of them:")
    for figure in figures:
        print(f"  {figure}")
