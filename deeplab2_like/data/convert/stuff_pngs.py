"""PNGs of stuff classes that lie below the objects of a COCO instance JSON."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deeplab2_like.data import known_datasets
from deeplab2_like.data.convert import labeled_images, shapes
from deeplab2_like.data.convert.class_lists import classes_of_values, read_class_list
from deeplab2_like.data.convert.losses import NO_CLASS, Losses
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.images import read_value_png
from deeplab2_like.errors import UserError

# Stands for the classes of COCO-Stuff in place of a file.
_COCO_STUFF = "coco-stuff"


@dataclasses.dataclass(frozen=True)
class StuffClasses:
    """The classes of the values in stuff PNGs.

    Attributes:
        categories: The categories of the JSON and, after them, the classes that it lacks.
        name_of_value: The class name of each value.
        void_values: Values that are void.
        may_have_things: Whether values may be of things, which then are void.
        notes: Sentences for the user.
    """

    categories: list[dict[str, Any]]
    name_of_value: Mapping[int, str]
    void_values: frozenset[int] = frozenset()
    may_have_things: bool = False
    notes: tuple[str, ...] = ()

    def require_stuff(self, info: DatasetInfo, classes: Path, json_file: Path) -> None:
        """Raises `UserError` if a class is a thing although none may be.

        Args:
            info: The classes.
            classes: The class list, for the message.
            json_file: The JSON, for the message.
        """
        for name in () if self.may_have_things else self.name_of_value.values():
            if info.categories[shapes.class_of_name(info)[name]].is_thing:
                raise UserError(
                    f"Class '{name}' of '{classes}' is a thing in '{json_file}'; a stuff PNG cannot tell its objects "
                    "apart, so name the class in the list of stuff, too, or remove it from the file."
                )


def read_stuff_classes(
    path: Path, categories: list[dict[str, Any]], known: Sequence[Category], *, encoding: str | None
) -> StuffClasses:
    """Reads the classes of stuff PNGs; those of other splits keep their ids.

    Args:
        path: A class list, see `read_class_list`, or `coco-stuff`.
        categories: The categories of the JSON.
        known: The classes of other splits.
        encoding: See `files.read_text`.

    Raises:
        UserError: If the class list cannot be read.
    """
    if str(path) == _COCO_STUFF and not path.exists():
        all_categories, name_of_value = _with_stuff_classes(categories, _coco_stuff_classes(categories), known)
        return StuffClasses(all_categories, name_of_value, frozenset((255,)), may_have_things=True)
    entries = read_class_list(path, encoding=encoding)
    names = {category.get("name") for category in categories}
    void_values = classes_of_values(entries)[1]
    void = [entry for entry in entries if entry["id"] in void_values and entry["name"] not in names]
    notes = tuple(
        f"The value {entry['id']} of stuff PNGs is void because of its name '{entry['name']}'." for entry in void
    )
    class_list = [entry for entry in entries if entry not in void]
    return StuffClasses(
        *_with_stuff_classes(categories, class_list, known), frozenset(entry["id"] for entry in void), notes=notes
    )


def draw_stuff(
    png: Path,
    stuff: StuffClasses,
    below: np.ndarray,
    info: DatasetInfo,
    losses: Losses,
) -> np.ndarray:
    """Draws a stuff PNG over a panoptic map; its pixels of things are void, as most of them are below objects.

    Args:
        png: The PNG.
        stuff: The classes of its values.
        below: int32 [H, W], panoptic map.
        info: The meaning of the map.
        losses: Counts pixels of values without a class.

    Returns:
        int32 [H, W], panoptic map.

    Raises:
        UserError: If the PNG cannot be read or has another size.
    """
    values = read_value_png(png, "stuff PNG")
    if values.shape != below.shape:
        raise UserError(
            f"the stuff PNG '{png}' is {values.shape} but its image {below.shape} (height, width); make it again."
        )
    class_id_of_name = shapes.class_of_name(info)
    class_id_of_value = {value: class_id_of_name[name] for value, name in stuff.name_of_value.items()}

    def meaning(value: int) -> tuple[int, bool] | labeled_images.Void | None:
        if value in class_id_of_value:
            category = info.categories[class_id_of_value[value]]
            if category.is_thing:
                return None
            return class_id_of_value[value], False
        if value in stuff.void_values:
            return None
        return labeled_images.Void(NO_CLASS, f"value {value} of the stuff PNGs")

    drawn = labeled_images.values_to_panoptic(values, meaning, info, losses)
    return np.where(drawn == info.void, below, drawn)


def _coco_stuff_classes(categories: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the class list of the maps of COCO-Stuff; the things are those of the JSON."""
    stuff = [{"id": number - 1, "name": name, "category_id": number} for number, name in known_datasets.COCO_STUFF]
    things = [{"id": category["id"] - 1, "name": category["name"]} for category in categories if "name" in category]
    return [*(thing for thing in things if thing["id"] < stuff[0]["id"]), *stuff]


def _with_stuff_classes(
    categories: list[dict[str, Any]], class_list: list[dict[str, Any]], known: Sequence[Category]
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Adds the classes of the stuff PNGs to those of the JSON; those of other splits keep their ids.

    Returns:
        All categories, and the class name of each value in the PNGs.
    """
    categories = list(categories)
    ids = {category.get("id") for category in categories}
    names = {category.get("name") for category in categories}
    name_of_value = {}
    for entry in class_list:
        name_of_value[entry["id"]] = entry["name"]
        if entry["name"] not in names:
            # As in COCO, the value is the category id, unless another category has it.
            is_known = any(category.name == entry["name"] for category in known)
            wanted = entry.get("category_id", entry["id"])
            is_free = wanted not in ids and not is_known
            number = wanted if is_free else shapes.free_id(entry["name"], categories, known)
            ids.add(number)
            categories.append({**entry, "id": number, "isthing": 0})
    return categories, name_of_value
