"""`deeplab2-like demo`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_overrides


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "demo", run, "Make a small data set, train, evaluate, export and predict, in some minutes."
    )
    parser.add_argument("--system", default="panoptic_deeplab", help="system to train (default: %(default)s)")
    parser.add_argument("--output-dir", type=Path, default=Path("demo"), help="folder for everything (default: demo)")
    add_overrides(parser)


def run(options: argparse.Namespace) -> None:
    """Runs the demo."""
    from deeplab2_like.configs import load_config
    from deeplab2_like.configs.systems import check_system

    # Wrong options are reported before TensorFlow is imported, which takes seconds.
    check_system(options.system)
    load_config(f"{options.system}/scenes_tiny", options.set)

    from deeplab2_like.demo import run_demo

    run_demo(system=options.system, output_dir=options.output_dir, overrides=options.set)
