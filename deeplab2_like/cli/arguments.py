"""Argument types and options that several commands share."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deeplab2_like.files import require_local


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], summary: str
) -> argparse.ArgumentParser:
    """Adds a command.

    Args:
        commands: What `add_subparsers` of a parser returned.
        name: The name of the command.
        run: Runs the command with the parsed options.
        summary: One sentence for the help.

    Returns:
        The parser of the command.
    """
    parser: argparse.ArgumentParser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(run=run)
    return parser


def require_local_paths(options: argparse.Namespace) -> None:
    """Raises `UserError` if a path among the options is an address such as `gs://bucket/run`."""
    for value in vars(options).values():
        for path in value if isinstance(value, list) else [value]:
            if isinstance(path, Path):
                require_local(path)


# --- Types. -----------------------------------------------------------------------------------------------------------


def positive_int(text: str) -> int:
    """Parses a whole number of 1 or more."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 1 or more")
    return int(text)


def positive_float(text: str) -> float:
    """Parses a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number above 0")
    return number


def image_size(text: str) -> tuple[int, int]:
    """Parses height and width, such as `512x1024`."""
    height, separator, width = text.lower().partition("x")
    if not (separator and height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"'{text}' is not a size; give height and width as in 512x1024")
    return int(height), int(width)


# --- Options. ---------------------------------------------------------------------------------------------------------


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds `--config` and `--set`."""
    parser.add_argument("--config", required=True, metavar="NAME_OR_FILE", help="a built-in config or a YAML file")
    add_overrides(parser)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    """Adds `--set`."""
    parser.add_argument(
        "--set",
        nargs="+",
        action="extend",
        default=[],
        metavar="KEY.PATH=VALUE",
        help="change keys of the config; may be given several times",
    )


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Adds `--model-dir` and `--checkpoint`."""
    parser.add_argument("--model-dir", type=Path, required=True, help="folder that training wrote")
    parser.add_argument(
        "--checkpoint", default="last", metavar="last|best|STEP", help="which checkpoint (default: %(default)s)"
    )


def add_compile(parser: argparse.ArgumentParser) -> None:
    """Adds `--compile`."""
    parser.add_argument("--compile", action="store_true", help="compile the post-processing with XLA")


def add_on_error(parser: argparse.ArgumentParser, item: str) -> None:
    """Adds `--on-error`; `item` is the word for a faulty input, such as image."""
    parser.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=f"what to do with a faulty {item}")


def add_workers(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Adds `--workers`, by default one per CPU core."""
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=help_text)
