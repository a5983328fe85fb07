"""The summary that `convert` prints at the end."""

import os
from collections.abc import Collection, Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deeplab2_like.data.convert.common import ConversionReport
from deeplab2_like.data.convert.losses import CROWD
from deeplab2_like.data.convert.unfinished import ERRORS_NAME
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import describe_bit_depth
from deeplab2_like.printing import counted, print_line, printable

# Of the annotations that were left out, and of the classes of each kind of loss, so many are listed.
_MAX_FAULTS, _MAX_NAMES = 20, 12


def print_summary(
    reports: Sequence[ConversionReport],
    output_dir: str | os.PathLike[str],
    *,
    options: Collection[str] = (),
    console: Console | None = None,
) -> None:
    """Prints the result of each split: choices, what was left out, a table of the classes, what was lost, warnings.

    Args:
        reports: A report per split.
        output_dir: The record folder.
        options: The names of the options that the source has, such as `background`; warnings advise no others.
        console: The console to print to; None: standard output.
    """
    console = console or Console()
    for report in reports:
        _print_counts(console, report)
    _print_line(console, f"Records are in {output_dir}")
    for note in dict.fromkeys(note for report in reports for note in report.notes):
        _print_line(console, note)
    info = DatasetInfo.load(output_dir)
    if info.bit_depth is not None:
        _print_line(console, describe_bit_depth(info.bit_depth))
    for report in reports:
        _print_classes(console, report, info)
        _print_losses(console, report)
        for warning in find_warnings(report, info, options):
            _print_line(console, f"Warning: {warning}")
    missing_stuff = _find_missing_stuff(reports, info, options)
    if missing_stuff is not None:
        _print_line(console, f"Warning: {missing_stuff}")


def _print_counts(console: Console, report: ConversionReport) -> None:
    """Prints how many images a split has, and what was left out."""
    note = ""
    if report.is_unchanged:
        note = " It already exists with the same files and options: nothing was done."
    elif report.kept_files:
        note = f" {report.kept_files} of {report.files} files were kept from an interrupted run."
    counts = f"{counted(report.examples, 'image')}, {len(report.skipped)} skipped."
    if report.skipped_annotations:
        counts += f" {counted(len(report.skipped_annotations), 'faulty annotation')} left out, whole or in part."
    _print_line(console, f"Split '{report.split}': {counts}{note}")
    if report.turned:
        turned = counted(report.turned, "image")
        _print_line(console, f"  turned by the EXIF orientation, as the labels were drawn: {turned}.")
    for fault in report.skipped:
        _print_line(console, f"  skipped: {fault}")
    for fault in report.skipped_annotations[:_MAX_FAULTS]:
        _print_line(console, f"  left out: {fault}")
    if len(report.skipped_annotations) > _MAX_FAULTS:
        _print_line(console, f"  and {len(report.skipped_annotations) - _MAX_FAULTS} more, see {ERRORS_NAME}.")


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
    _print_line(console, f"\n{report.split}: {_percent(report.pixels[-1], total)} of the pixels are void")
    if table.row_count:
        console.print(table, highlight=False)
    if absent:
        _print_line(console, f"Without pixels: {'; '.join(absent)}")


def _print_losses(console: Console, report: ConversionReport) -> None:
    """Prints what the labels hold and the records do not."""
    total = sum(report.pixels)
    for reason, names in report.lost.items():
        parts = []
        for name, (objects, pixels) in sorted(names.items(), key=lambda part: part[1], reverse=True):
            measures = [counted(objects, "object")] if objects else []
            measures += [f"{_percent(pixels, total)} of the pixels"] if pixels else []
            parts += [", ".join([name, *measures])] if measures else []
        if parts:
            more = f"; and {len(parts) - _MAX_NAMES} more" if len(parts) > _MAX_NAMES else ""
            _print_line(console, f"Lost ({reason}): {'; '.join(parts[:_MAX_NAMES])}{more}")


def find_warnings(report: ConversionReport, info: DatasetInfo, options: Collection[str] = ()) -> list[str]:
    """Finds splits and classes that end with nothing although there are labels.

    Args:
        report: The report of a split with statistics.
        info: The classes.
        options: See `print_summary`.

    Returns:
        Sentences for the user.
    """
    if not report.pixels:
        return []
    warnings = []
    lost: dict[str, int] = {}
    for names in report.lost.values():
        for name, (objects, pixels) in names.items():
            lost[name] = lost.get(name, 0) + objects + pixels
    crowds = report.lost.get(CROWD, {})
    things = [(info.categories[class_id], report.objects[class_id]) for class_id in info.thing_classes]
    only_crowds = [category.name for category, objects in things if not objects and category.name in crowds]
    if only_crowds:
        advice = "; --crowds-are-objects makes them objects" if "crowds_are_objects" in options else ""
        warnings.append(
            f"all objects of {', '.join(only_crowds)} are crowd regions, from which a model learns no object{advice}."
        )
    if things and not sum(report.objects):
        warnings.append(f"split '{report.split}' has no object.")
    nothing = [
        category.name
        for category, pixels in zip(info.categories, report.pixels, strict=False)
        if not pixels and lost.get(category.name)
    ]
    if nothing:
        warnings.append(f"nothing is left of {', '.join(nothing)}, see above.")
    num_absent = sum(not pixels for pixels in report.pixels[:-1])
    if num_absent:
        warnings.append(
            f"{num_absent} of {info.num_classes} classes have no pixels in split '{report.split}', see above."
        )
    if not any(report.pixels[:-1]):
        warnings.append(f"all pixels of split '{report.split}' are void.")
    return warnings


def _find_missing_stuff(reports: Sequence[ConversionReport], info: DatasetInfo, options: Collection[str]) -> str | None:
    """Returns one warning for all splits if nothing is stuff and some pixels are void, or else None."""
    total = sum(sum(report.pixels) for report in reports)
    void = sum(report.pixels[-1] for report in reports if report.pixels)
    if info.stuff_classes or not 0 < void < total:
        return None
    # Sources with --background have --stuff as well.
    has_options = "background" in options
    advice = "; name a class for them with --background, or classes that are stuff with --stuff" if has_options else ""
    return (
        f"no class is stuff, so {_percent(void, total)} of the pixels are void, and a model does not learn where "
        f"nothing is{advice}."
    )


def _percent(part: int, total: int) -> str:
    """Formats a share of pixels; a small share is not rounded to 0."""
    share = part / max(total, 1)
    return "<0.1%" if 0 < share < 0.0005 else f"{share:.1%}"


def _print_line(console: Console, line: str) -> None:
    """Prints a text verbatim, without wrapping lines."""
    print_line(line, console)


def _printable(text: str, console: Console) -> str:
    """Escapes control characters, and letters that the terminal's encoding lacks."""
    return printable(text, console.encoding)
