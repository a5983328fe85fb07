"""The summary that `convert` prints at the end."""

import os
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deeplab2_like.data.convert.common import ConversionReport
from deeplab2_like.data.dataset_info import DatasetInfo


def print_summary(
    reports: Sequence[ConversionReport], output_dir: str | os.PathLike[str], *, console: Console | None = None
) -> None:
    """Prints the result of each split, the faults of skipped examples, and a table of the classes of each split.

    Args:
        reports: A report per split.
        output_dir: The record folder.
        console: The console to print to; None: standard output.
    """
    console = console or Console()
    for report in reports:
        note = ""
        if report.is_unchanged:
            note = " It already exists with the same files and options: nothing was done."
        elif report.kept_files:
            note = f" {report.kept_files} of {report.files} files were kept from an interrupted run."
        counts = f"{report.examples} examples, {len(report.skipped)} skipped."
        _print_line(console, f"Split '{report.split}': {counts}{note}")
        for fault in report.skipped:
            _print_line(console, f"  skipped: {fault}")
    _print_line(console, f"Records are in {output_dir}")
    info = DatasetInfo.load(output_dir)
    for report in reports:
        _print_classes(console, report, info)


def _print_classes(console: Console, report: ConversionReport, info: DatasetInfo) -> None:
    """Prints the objects and pixels of each class of a split, and lists classes without pixels."""
    total = sum(report.pixels)
    table = Table(box=SIMPLE_HEAD)
    table.add_column("class", overflow="fold")
    for column in ("kind", "objects", "pixels"):
        table.add_column(column, justify="left" if column == "kind" else "right", no_wrap=True)
    absent = []
    for category, objects, pixels in zip(info.categories, report.objects, report.pixels[:-1], strict=True):
        kind, name = "thing" if category.is_thing else "stuff", _printable(category.name, console)
        if pixels:
            table.add_row(Text(name), kind, str(objects) if category.is_thing else "", _percent(pixels, total))
        else:
            absent.append(f"{name} ({kind})")
    skipped = f", {len(report.skipped)} skipped" if report.skipped else ""
    void = _percent(report.pixels[-1], total)
    _print_line(console, f"\n{report.split}: {report.examples} images{skipped}, {void} of the pixels void")
    if table.row_count:
        console.print(table, highlight=False)
    if absent:
        _print_line(console, f"Without pixels: {'; '.join(absent)}")


def _percent(part: int, total: int) -> str:
    """Formats a share of pixels; a small share is not rounded to 0."""
    share = part / max(total, 1)
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _print_line(console: Console, line: str) -> None:
    """Prints a text verbatim, without wrapping lines."""
    text = "\n".join(_printable(part, console) for part in line.split("\n"))
    console.print(text, soft_wrap=True, markup=False, highlight=False, emoji=False)


def _printable(text: str, console: Console) -> str:
    """Escapes control characters, and letters that the terminal's encoding lacks."""
    plain = "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)
    return plain.encode(console.encoding, "backslashreplace").decode(console.encoding)
