"""Argument types and options that several commands share."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deeplab2_like.files import folder_beside, require_local


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


def whole_number(text: str) -> int:
    """Parses a whole number of 0 or more."""
    if not (text.isascii() and text.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number of 0 or more")
    return int(text)


def positive_float(text: str) -> float:
    """Parses a finite number above 0."""
    number = _number(text)
    if not (math.isfinite(number) and number > 0):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number above 0")
    return number


def share(text: str) -> float:
    """Parses a number above 0 and below 1."""
    number = _number(text)
    if not 0 < number < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a share above 0 and below 1")
    return number


def _number(text: str) -> float:
    """Parses a number; NaN if the text is none."""
    try:
        return float(text)
    except ValueError:
        return math.nan


def bit_depth(text: str) -> int:
    """Parses a number of bits per channel, 8 to 32."""
    if not (text.isascii() and text.isdigit() and 8 <= int(text) <= 32):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of bits, 8 to 32")
    return int(text)


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


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """Adds `--bit-depth` and `--max-pixels`, for commands that read photographs."""
    parser.add_argument(
        "--bit-depth",
        type=bit_depth,
        metavar="BITS",
        help="number of bits that images with more than 8 bits per channel use (default: enough for the largest value)",
    )
    add_max_pixels(parser)


def add_max_pixels(parser: argparse.ArgumentParser) -> None:
    """Adds `--max-pixels`, for all commands that read image files."""
    parser.add_argument(
        "--max-pixels",
        type=positive_int,
        metavar="NUMBER",
        help="largest number of pixels of an image that is decoded (default: 178956970)",
    )


def add_warmup_size(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Adds `--warmup-size`, a list of image sizes."""
    parser.add_argument(
        "--warmup-size", type=image_size, nargs="+", action="extend", default=[], metavar="HxW", help=help_text
    )


def find_folders(options: argparse.Namespace, json_file: Path, *names: str) -> None:
    """Replaces folders that do not exist by those of the same name beside a JSON, and says so."""
    for name in names:
        given = getattr(options, name)
        found = given if given is None else folder_beside(given, json_file)
        if found != given:
            print(f"'{given}' does not exist; using '{found}', beside the JSON.")
            setattr(options, name, found)


def set_limits(options: argparse.Namespace) -> None:
    """Applies `--max-pixels`."""
    if getattr(options, "max_pixels", None) is not None:
        from deeplab2_like.data.image_headers import set_max_pixels

        set_max_pixels(options.max_pixels)


def add_workers(parser: argparse.ArgumentParser, help_text: str) -> None:
    """Adds `--workers`, by default one per CPU core."""
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help=help_text)
