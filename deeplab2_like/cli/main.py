"""The parser of all commands, and the translation of errors into messages and exit codes."""

import argparse
import contextlib
import errno
import io
import logging
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Sequence
from typing import TextIO, cast

import deeplab2_like
from deeplab2_like.cli import (
    configs,
    convert,
    demo,
    describe,
    evaluate,
    evaluate_files,
    export,
    import_weights,
    inspect,
    predict,
    serve,
    train,
)
from deeplab2_like.cli.arguments import require_local_paths, set_limits
from deeplab2_like.errors import UserError, shorten
from deeplab2_like.lenient_output import LenientOutput, PrintableOutput

INTERNAL_ERROR = 1
USER_ERROR = 2
# Characters of a name in a message.
_MAX_NAME = 200

# In the order of `--help`. Each module has `add_parser(commands)` and `run(options)`.
COMMANDS = (
    demo,
    convert,
    inspect,
    import_weights,
    train,
    evaluate,
    evaluate_files,
    export,
    predict,
    serve,
    describe,
    configs,
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command.

    Args:
        arguments: The words after the program name; by default those of the command line.

    Returns:
        Exit code: 0 for success, also of `--help` and `--version`; 2 for wrong usage or input; 1 for an internal error;
        after a signal 128 + its number: 130 for Ctrl-C, and for a training that has saved and stopped also 129 (SIGHUP)
        and 143 (SIGTERM).
    """
    _quiet_libraries()
    # Names of classes and files may have letters that the terminal cannot show.
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")
    with contextlib.redirect_stderr(PrintableOutput(sys.stderr)):
        return _run(arguments)


def _run(arguments: Sequence[str] | None) -> int:
    """Runs a command and turns errors into exit codes, see `main`."""
    try:
        options = make_parser().parse_args(arguments)
        require_local_paths(options)
        set_limits(options)
        # A reader that ends early, as in `deeplab2-like convert ... | head`, must not end the command.
        with (
            LenientOutput(sys.stdout, BrokenPipeError) as output,
            contextlib.redirect_stdout(PrintableOutput(cast(TextIO, output))),
        ):
            options.run(options)
    except UserError as error:
        _print_error(str(error))
        return USER_ERROR
    except PermissionError as error:
        _print_error(f"no permission for '{error.filename}'; change its access rights.")
        return USER_ERROR
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return _report_internal_error()
        name = shorten(str(error.filename), _MAX_NAME)
        _print_error(f"the name '{name}' is too long for a file; give a shorter one.")
        return USER_ERROR
    except SystemExit as stop:  # argparse has printed the help, the version, or a usage error.
        return stop.code if isinstance(stop.code, int) else INTERNAL_ERROR
    except KeyboardInterrupt:
        print("deeplab2-like: stopped.", file=sys.stderr)
        return 128 + signal.SIGINT
    except Exception:
        return _report_internal_error()
    return 0


def _report_internal_error() -> int:
    """Prints the error that is being handled, and returns the exit code."""
    traceback.print_exc()
    print("deeplab2-like: this is an error in the program, not in your input; please report it.", file=sys.stderr)
    return INTERNAL_ERROR


def make_parser() -> argparse.ArgumentParser:
    """Makes the parser of all commands; the parsed options have the command's function as `run`."""
    parser = argparse.ArgumentParser(
        prog="deeplab2-like", description="Panoptic segmentation, from labels to a server."
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {deeplab2_like.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    return parser


def _print_error(text: str) -> None:
    print(f"deeplab2-like: {text}", file=sys.stderr)


def _quiet_libraries() -> None:
    """Silences messages of TensorFlow, OpenCV and Pillow, unless the user has set their levels."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
    os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")  # Damaged videos end in an error of their own.
    logging.getLogger("tensorflow").setLevel(logging.ERROR)
    # About damaged files, which end in an error of their own, and about images that are large but within the limit.
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")
    warnings.filterwarnings("ignore", category=RuntimeWarning, module=r"PIL\.")
