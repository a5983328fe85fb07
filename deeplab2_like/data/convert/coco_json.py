"""Reads the JSONs of COCO, which many tools write, each a little differently."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from deeplab2_like import files
from deeplab2_like.data.dataset_info import whole_number
from deeplab2_like.errors import UserError

_LISTS = ("images", "annotations", "categories")
# By list: the keys of ids and sizes, which some tools write as text or as 7.0.
_NUMBERS = {
    "images": ("id", "height", "width"),
    "annotations": ("id", "image_id", "category_id"),
    "categories": ("id",),
}


def read_coco_json(path: Path, kind: str, *, encoding: str | None = None) -> dict[str, Any]:
    """Reads a JSON with the lists `images`, `annotations` and `categories`.

    Ids and sizes that are written as text or as 7.0 become whole numbers, and repeated categories are dropped.

    Args:
        path: The JSON.
        kind: Kind of the JSON for messages, such as "instance".
        encoding: See `files.read_text`.

    Raises:
        UserError: If it cannot be read, or a list is missing or does not consist of objects.
    """
    content = files.read_json(path, f"the COCO {kind} JSON", encoding=encoding)
    for key in _LISTS:
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise UserError(
                f"'{path}' has no list '{key}'; a COCO {kind} JSON has 'images', 'annotations' and 'categories'."
            )
        for entry in value:
            for name in _NUMBERS[key]:
                if name in entry and type(entry[name]) is not int:
                    entry[name] = number_or_text(entry[name])
    for category in content["categories"]:
        number = category.get("id", 0)
        if not isinstance(number, int) or abs(number) >= 2**63:
            raise UserError(f"'{path}' has the category id {number!r}; an id is a whole number of 64 bits: correct it.")
    content["categories"] = _drop_repeated(content["categories"])
    return content


def number_or_text(value: Any) -> Any:
    """Returns an id or a size of a JSON in one form: 7, 7.0, "7" and "7.0" all become 7.

    Other values are returned as they are, also text such as "007", which may be another id than "7".
    """
    if isinstance(value, bool):
        return value
    try:
        number = whole_number(value)
    except (ValueError, TypeError, OverflowError):
        return value
    is_plain = not isinstance(value, str) or value in (str(number), f"{number}.0")
    return number if is_plain else value


def _drop_repeated(categories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Drops categories whose id and name are in the list before, as in JSONs that were joined."""
    seen = set()
    kept = []
    for category in categories:
        key = repr((category.get("id"), category.get("name"), category.get("isthing")))
        if key not in seen:
            kept.append(category)
        seen.add(key)
    return kept
