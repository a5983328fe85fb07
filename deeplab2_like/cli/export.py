"""`deeplab2-like export`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_checkpoint, add_command, add_overrides


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


def run(options: argparse.Namespace) -> None:
    """Exports a model folder."""
    from deeplab2_like.export.saved_model import export_model_folder

    exported = export_model_folder(
        options.model_dir,
        options.output_dir,
        checkpoint=options.checkpoint,
        overrides=options.set,
        replace=options.replace,
    )
    print(f"SavedModel is in {exported}")
