"""Reads class lists: small files that give the class of each value in a label PNG."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deeplab2_like.data.dataset_info import whole_number
from deeplab2_like.errors import UserError
from deeplab2_like.files import read_text
from deeplab2_like.parsing import parse_json

# The names with which class lists say that a value is void or background, in lower case, and the usual values.
VOID_NAMES = frozenset(("void", "ignore", "ignored", "unlabeled", "unlabelled", "unknown"))
_BACKGROUND_NAMES = frozenset(("background", "_background_", "__background__"))
_BACKGROUND, _VOID = 0, 255

_FORMATS = (
    "it may be a text with a line `NAME` per class, numbered from 0, or with lines `ID NAME`; or a JSON: a list of "
    'names, an object {"ID": "NAME"}, or a list of objects with "id", "name" and optionally "color"'
)


def read_class_list(path: Path, *, encoding: str | None = None) -> list[dict[str, Any]]:
    """Reads a class list.

    Args:
        path: A text with a name per line, numbered from 0, or with an id and a name per line, of which the first may be
            the header of a table; or a JSON: a list of names, an object from ids to names or from names to ids, or a
            list of objects with `id`, `name` and optionally `color`, such as the `categories` of a COCO JSON, which may
            be the whole JSON, too. Empty lines and lines that start with `#` are ignored in texts.
        encoding: See `files.read_text`.

    Returns:
        `{"id": ..., "name": ...}` for each class, optionally with `"color"`, in the order of the file. A class that is
        repeated with the same id is there once.

    Raises:
        UserError: If the file cannot be read or has another format, or an id or a name has two meanings.
    """
    text = read_text(path, "the list of classes", encoding=encoding)
    if text.lstrip()[:1] in ("{", "["):
        try:
            entries = _parse_json(parse_json(text))
        except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise UserError(f"The list of classes '{path}' is not understood ({error!r}); {_FORMATS}.") from error
    else:
        entries = _parse_lines(text)
    return _without_repetitions(entries, path)


def classes_of_values(entries: Sequence[Mapping[str, Any]]) -> tuple[dict[int, str | None], set[int]]:
    """Tells classes, background and void apart in a class list, by name; 0 and 255 have a usual meaning.

    Args:
        entries: The class list, see `read_class_list`.

    Returns:
        The class name of each value, None for the background, which is 0 unless the list gives that a class; and the
        values that are void, such as 255 unless it is in the list.
    """
    void_values = {entry["id"] for entry in entries if entry["name"].strip().casefold() in VOID_NAMES}
    if _VOID not in (entry["id"] for entry in entries):
        void_values.add(_VOID)
    name_of_value: dict[int, str | None] = {} if _BACKGROUND in void_values else {_BACKGROUND: None}
    for entry in entries:
        if entry["id"] not in void_values:
            is_background = entry["name"].strip().casefold() in _BACKGROUND_NAMES
            name_of_value[entry["id"]] = None if is_background else entry["name"]
    return name_of_value, void_values


def _parse_json(content: Any) -> list[dict[str, Any]]:
    if isinstance(content, dict) and isinstance(content.get("categories"), list):
        content = content["categories"]
    if isinstance(content, dict):
        if all(isinstance(number, int) for number in content.values()) and not all(map(str.isdigit, content)):
            content = {number: name for name, number in content.items()}
        return [{"id": whole_number(number), "name": _text(name)} for number, name in content.items()]
    if all(isinstance(entry, dict) for entry in content):
        return [
            {"id": whole_number(entry["id"]), "name": _text(entry["name"]), "color": entry.get("color")}
            for entry in content
        ]
    return [{"id": number, "name": _text(name)} for number, name in enumerate(content)]


def _parse_lines(text: str) -> list[dict[str, Any]]:
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    numbered = [re.fullmatch(r"(\d{1,18})(?:\.0)?[\s,:;]+(.+)", line) for line in lines]
    # The header of a table, as Roboflow writes it: `Pixel Value, Class`.
    if len(lines) > 1 and numbered[0] is None and all(numbered[1:]) and re.search("[,;\t]", lines[0]):
        numbered = numbered[1:]
    if all(numbered):
        return [{"id": int(match[1]), "name": match[2].strip(" \"'")} for match in numbered if match]
    return [{"id": number, "name": line} for number, line in enumerate(lines)]


def _without_repetitions(entries: Sequence[dict[str, Any]], path: Path) -> list[dict[str, Any]]:
    """Drops repeated classes; raises `UserError` if an id or a name has two meanings."""
    kept: list[dict[str, Any]] = []
    for entry in entries:
        for key, other in (("id", "name"), ("name", "id")):
            for known in kept:
                if known[key] == entry[key] and known[other] != entry[other]:
                    raise UserError(
                        f"The list of classes '{path}' gives {key} '{entry[key]}' the {other}s '{known[other]}' and "
                        f"'{entry[other]}'; keep one of them."
                    )
        if not any(known["id"] == entry["id"] for known in kept):
            kept.append(entry)
    return kept


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is not a name")
    return name
