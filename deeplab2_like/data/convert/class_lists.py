"""Reads class lists: small files that give the class of each value in a label PNG."""

import json
import re
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError
from deeplab2_like.files import read_file

_FORMATS = (
    "it may be a text with a line `NAME` per class, numbered from 0, or with lines `ID NAME`; or a JSON: a list of "
    'names, an object {"ID": "NAME"}, or a list of objects with "id", "name" and optionally "color"'
)


def read_class_list(path: Path) -> list[dict[str, Any]]:
    """Reads a class list.

    Args:
        path: A text with a name per line, numbered from 0, or with an id and a name per line; or a JSON: a list of
            names, an object from ids to names, or a list of objects with `id`, `name` and optionally `color`, such as
            the `categories` of a COCO JSON. Empty lines and lines that start with `#` are ignored in texts.

    Returns:
        `{"id": ..., "name": ...}` for each class, optionally with `"color"`, in the order of the file.

    Raises:
        UserError: If the file cannot be read or has another format.
    """
    try:
        text = read_file(path, "the list of classes").decode()
        if text.lstrip()[:1] in ("{", "["):
            content = json.loads(text)
            if isinstance(content, dict):
                return [{"id": int(number), "name": _text(name)} for number, name in content.items()]
            if all(isinstance(entry, dict) for entry in content):
                return [
                    {"id": int(entry["id"]), "name": _text(entry["name"]), "color": entry.get("color")}
                    for entry in content
                ]
            return [{"id": number, "name": _text(name)} for number, name in enumerate(content)]
    except (ValueError, LookupError, TypeError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"The list of classes '{path}' is not understood ({error!r}); {_FORMATS}.") from error
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    numbered = [re.fullmatch(r"(\d+)[\s,:;]+(.+)", line) for line in lines]
    if all(numbered):
        return [{"id": int(match[1]), "name": match[2]} for match in numbered if match]
    return [{"id": number, "name": line} for number, line in enumerate(lines)]


def _text(name: Any) -> str:
    if not isinstance(name, str):
        raise TypeError(f"{name!r} is not a name")
    return name
