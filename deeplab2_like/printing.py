"""Printing for terminals and pipes: names that may hold any letter, and tables that stay whole.

Messages of errors pass through here, too, so `rich` is imported only where a table is made.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

# More characters than a row of a table ever has.
_MAX_TABLE_WIDTH = 100_000


def printable(text: str, encoding: str = "utf-8") -> str:
    r"""Escapes control characters, such as those that color or clear a terminal, and letters an encoding lacks.

    Args:
        text: The text, such as the name of a class or file; its line breaks are kept.
        encoding: The encoding of the output.

    Returns:
        The text with escapes such as `\x1b` in their place.
    """
    plain = "".join(letter if letter.isprintable() or letter == "\n" else ascii(letter)[1:-1] for letter in text)
    return plain.encode(encoding, "backslashreplace").decode(encoding)


def counted(number: int, noun: str) -> str:
    """Returns a number with its noun, such as "1 image" or "2 images"."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def name_text(name: str, console: Console) -> Text:
    """Returns a name as a cell of a table, verbatim."""
    from rich.text import Text

    return Text(printable(name, console.encoding).replace("\n", "\\n"))


def print_line(line: str, console: Console) -> None:
    """Prints a text verbatim, without wrapping lines."""
    console.print(printable(line, console.encoding), soft_wrap=True, markup=False, highlight=False, emoji=False)


def print_whole_table(table: Table, console: Console) -> None:
    """Prints a table without breaking or cutting a cell, if need be beyond the width of the console."""

    def measure() -> int:
        return console.measure(table, options=console.options.update(max_width=_MAX_TABLE_WIDTH)).maximum

    for column in table.columns:
        column.no_wrap = True
    if measure() > console.width:
        table.padding = 0
    table.width = measure()
    console.print(table, crop=False, no_wrap=True, highlight=False)
