"""The result of an inspection as one HTML file without references to others, to send or to keep."""

import base64
import html
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import cv2

from deeplab2_like.data.faults import KINDS
from deeplab2_like.errors import UserError
from deeplab2_like.files import require_no_folder, write_atomically
from deeplab2_like.inspection import Inspection
from deeplab2_like.printing import counted
from deeplab2_like.temporary import remove_leftovers

# Begins every report, so that no other file is replaced.
_BEGINNING = """<!DOCTYPE html>
<!-- Written by deeplab2-like inspect. -->
"""
_STYLE = """body { font-family: sans-serif; margin: 2em; max-width: 80em; }
table { border-collapse: collapse; }
td, th { padding: 0.2em 0.8em; text-align: right; border-bottom: 1px solid #ccc; }
td:first-child, th:first-child { text-align: left; }
img { max-width: 100%; }"""
_JPEG_QUALITY = 90
_COLUMNS = ("class", "kind", "images", "segments", "crowds", "pixels", "smallest", "mean", "largest")


def require_report_place(path: str | os.PathLike[str]) -> None:
    """Checks, before long work, that a report may be written.

    Raises:
        UserError: If there is a folder or a file that is not a report.
    """
    require_no_folder(path, "HTML file")
    if os.path.lexists(path) and not _is_report(Path(path)):
        raise UserError(
            f"'{path}' exists and is not a report of inspect, so it is not replaced; choose another --report."
        )


def write_report(inspection: Inspection, path: str | os.PathLike[str], *, title: str) -> None:
    """Writes statistics, faults and contact sheets as one HTML file.

    Args:
        inspection: The inspection.
        path: The file.
        title: The title of the page, such as the record folder.

    Raises:
        UserError: If the file cannot be written.
    """
    parts = [
        f'<html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>',
        f"<style>{_STYLE}</style></head><body><h1>{html.escape(title)}</h1>",
        *_describe_faults(inspection),
    ]
    for split, values in inspection.statistics["splits"].items():
        parts.append(f"<h2>{html.escape(split)}</h2>")
        sizes = values["image_sizes"]
        parts.append(
            f"<p>{counted(values['images'], 'image')} of {counted(sizes['different'], 'size')}, "
            f"{values['void_share']:.1%} of the pixels void</p>"
        )
        parts.append(_table(_COLUMNS, (_class_row(name, entry) for name, entry in values["per_class"].items())))
        if split in inspection.sheets:
            parts.append(f'<p><img alt="images and labels" src="{_data_url(inspection.sheets[split])}"></p>')
    parts.append("</body></html>")
    remove_leftovers(Path(path).parent, of=Path(path).name)
    write_atomically(path, (_BEGINNING + "\n".join(parts) + "\n").encode("utf-8", "backslashreplace"))


def _is_report(path: Path) -> bool:
    """Returns whether a file begins as reports do, without reading the rest, which may be large."""
    if not path.is_file():
        return False
    beginning = _BEGINNING.encode()
    try:
        with path.open("rb") as file:
            return file.read(len(beginning)) == beginning
    except OSError:
        return False


def _describe_faults(inspection: Inspection) -> list[str]:
    """Returns the heading and the lists of faults."""
    counts = inspection.statistics["fault_counts"]
    if not counts:
        return ["<p>No faults found.</p>"]
    parts = []
    for kind, count in counts.items():
        listed = [f"<li>{html.escape(f'{f.where}: {f.text}')}</li>" for f in inspection.faults if f.kind == kind]
        parts.append(f"<h3>{'Fault' if KINDS[kind] else 'Note'}: {html.escape(kind)}, {counted(count, 'time')}</h3>")
        parts.append(f"<ul>{''.join(listed)}</ul>")
    return parts


def _class_row(name: str, entry: dict[str, Any]) -> list[str]:
    """Returns the cells of a class."""
    area = entry.get("area")
    return [
        name,
        "thing" if entry["is_thing"] else "stuff",
        str(entry["images"]),
        str(entry["segments"]),
        str(entry.get("crowds", "")),
        f"{entry['pixel_share']:.1%}",
        *((str(area["min"]), f"{area['mean']:.0f}", str(area["max"])) if area else ("", "", "")),
    ]


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a table; all cells are text."""
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _data_url(picture: Any) -> str:
    """Returns a picture, uint8 [H, W, 3] RGB, as the address of an image in HTML."""
    _, encoded = cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return f"data:image/jpeg;base64,{base64.b64encode(encoded.tobytes()).decode()}"
