"""The command line: `deeplab2-like COMMAND`. Each command is a thin layer over a function of the library."""

from deeplab2_like.cli.main import main

__all__ = ["main"]
