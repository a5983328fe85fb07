"""`deeplab2-like train`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_config, positive_int


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "train", run, "Train, or resume the training of a model folder.")
    add_config(parser)
    parser.add_argument("--model-dir", type=Path, required=True, help="folder for checkpoints and logs")
    parser.add_argument(
        "--init-from",
        type=Path,
        metavar="MODEL_DIR_OR_FILE",
        help="start from the weights of another training (model folder or checkpoint), as far as they fit, or from a "
        "file with pretrained weights of the backbone",
    )
    parser.add_argument(
        "--profile", type=positive_int, default=0, metavar="STEPS", help="record steps for TensorBoard's profiler"
    )


def run(options: argparse.Namespace) -> None:
    """Trains a model."""
    from deeplab2_like.configs import load_config

    # A wrong config is reported before TensorFlow is imported, which takes seconds.
    config = load_config(options.config, options.set)

    from deeplab2_like.trainer.train import train

    train(config, options.model_dir, init_from=options.init_from, profile=options.profile)
    print(f"Model folder: {options.model_dir}")
