"""`DatasetInfo`: the meaning of a data set's labels. No other module defines a part of it.

It is read from the `categories` of a COCO panoptic JSON, and saved as `dataset_info.json` in the record folder, the
model folder and the exported SavedModel. This module does not import TensorFlow, so that every other one may import it.
"""

import dataclasses
import functools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError
from deeplab2_like.files import read_file, write_atomically
from deeplab2_like.parsing import parse_json

FILE_NAME = "dataset_info.json"

# A panoptic value must fit the 24 bits of an RGB PNG, which is how our own records store it.
MAX_PANOPTIC_VALUE = 2**24 - 1


@dataclasses.dataclass(frozen=True)
class Category:
    """One class of a data set.

    Attributes:
        id: The data set's own id of the class (COCO's `category_id`), used only when files are read or written.
        name: The class name.
        is_thing: True for countable objects, False for stuff.
        color: Red, green and blue, each 0..255, for pictures.
    """

    id: int
    name: str
    is_thing: bool
    color: tuple[int, int, int]


@dataclasses.dataclass(frozen=True)
class DatasetInfo:
    """The meaning of the values of a panoptic map.

    A panoptic map holds `class_id * label_divisor + instance_id`. `class_id` is the position of a class in
    `categories`, so it is contiguous from 0; instances count from 1; instance 0 is stuff or, for a thing class, a crowd
    region; `void` marks pixels without a label.

    Attributes:
        name: The data set's name, for messages only.
        categories: The classes; their order gives the class ids.
        label_divisor: Factor between class and instance ids.
        ignore_label: Class id of void pixels; not smaller than the number of classes.
        record_offset: Number that the records of the data set add to the class ids; smaller class ids are void there.
            It is 1 for DeepLab2's records of COCO, where 0 is void and the classes count from 1. `pipeline` subtracts
            it when it reads a record, so all other code sees maps as described above.
        bit_depth: Number of bits that the images use where they have more than 8 bits per channel, of which the upper 8
            were kept, see `images.decode_image`; None: there are no such images.
    """

    name: str = dataclasses.field(compare=False)
    categories: tuple[Category, ...]
    label_divisor: int = 1000
    ignore_label: int = 255
    record_offset: int = 0
    bit_depth: int | None = dataclasses.field(default=None, compare=False)

    def __post_init__(self) -> None:
        if not self.categories:
            raise UserError(f"Data set '{self.name}' has no categories; at least one is needed.")
        ids = [category.id for category in self.categories]
        doubled = sorted({i for i in ids if ids.count(i) > 1})
        if doubled:
            raise UserError(f"Data set '{self.name}' lists category id {doubled[0]} twice; ids must differ.")
        names = [category.name for category in self.categories]
        for name in names:
            if any(0xD800 <= ord(letter) <= 0xDFFF for letter in name):  # OpenCV crashes when it draws lone surrogates.
                raise UserError(f"Category name {name!r} of '{self.name}' is no Unicode text; use another name.")
        doubled_names = sorted({name for name in names if names.count(name) > 1})
        if doubled_names:
            raise UserError(
                f"Data set '{self.name}' has two categories named '{doubled_names[0]}'; results are listed by name, so "
                "names must differ."
            )
        if self.ignore_label < len(self.categories):
            raise UserError(
                f"ignore_label {self.ignore_label} is also a class id, as there are {len(self.categories)} classes; "
                f"use {len(self.categories)} or more."
            )
        if self.label_divisor < 2:
            raise UserError(f"label_divisor must be at least 2, got {self.label_divisor}.")
        if self.record_offset < 0:
            raise UserError(f"record_offset must be 0 or more, got {self.record_offset}.")
        if (self.ignore_label + 1) * self.label_divisor - 1 > MAX_PANOPTIC_VALUE:
            raise UserError(
                f"ignore_label {self.ignore_label} with label_divisor {self.label_divisor} gives panoptic values above "
                f"{MAX_PANOPTIC_VALUE}, which an RGB PNG cannot hold; use a smaller label_divisor."
            )

    @property
    def num_classes(self) -> int:
        """Number of classes, things and stuff together."""
        return len(self.categories)

    @property
    def thing_classes(self) -> tuple[int, ...]:
        """Class ids (contiguous) of the things."""
        return tuple(i for i, category in enumerate(self.categories) if category.is_thing)

    @property
    def stuff_classes(self) -> tuple[int, ...]:
        """Class ids (contiguous) of the stuff."""
        return tuple(i for i, category in enumerate(self.categories) if not category.is_thing)

    @property
    def void(self) -> int:
        """The panoptic value of pixels without a label."""
        return self.ignore_label * self.label_divisor

    @functools.cached_property
    def class_of_category_id(self) -> Mapping[int, int]:
        """Maps the data set's own category ids to class ids."""
        return {category.id: i for i, category in enumerate(self.categories)}

    @classmethod
    def from_coco_categories(
        cls, categories: Sequence[Mapping[str, Any]], *, name: str, label_divisor: int = 1000
    ) -> "DatasetInfo":
        """Reads the `categories` list of a COCO panoptic JSON; nothing else is needed from the user.

        Args:
            categories: Mappings with `id`, `name`, `isthing`, and optionally `color` (generated if absent):
                red, green and blue, or as in "#4682b4".
            name: The data set's name, used in messages.
            label_divisor: Must be larger than the number of instances of a class in any image.

        Returns:
            The data set's info, with the classes in the order of the list.

        Raises:
            UserError: If a category lacks a field or has a wrong one, an id appears twice, or the ids do not fit.
        """
        parsed = []
        for position, category in enumerate(categories):
            if not isinstance(category, Mapping):
                raise UserError(f"Category {position} of '{name}' is {category!r}; it must be keys and values.")
            missing = [key for key in ("id", "name", "isthing") if key not in category]
            if missing:
                raise UserError(
                    f"Category {position} of '{name}' lacks '{missing[0]}'; a COCO panoptic category has 'id', 'name' "
                    "and 'isthing' (1 for countable objects, 0 for stuff)."
                )
            try:
                if not isinstance(category["name"], str) or not category["name"].strip():
                    raise TypeError(f"name {category['name']!r}")
                color = category.get("color") or generate_color(position)
                if isinstance(color, str):  # Such as "#4682b4".
                    color = bytes.fromhex(color.removeprefix("#"))
                red, green, blue = color
                parsed.append(
                    Category(
                        id=whole_number(category["id"]),
                        name=category["name"],
                        is_thing=bool(whole_number(category["isthing"], 0, 1)),
                        color=(whole_number(red, 0, 255), whole_number(green, 0, 255), whole_number(blue, 0, 255)),
                    )
                )
            except (ValueError, TypeError, OverflowError) as error:
                raise UserError(
                    f"Category {position} of '{name}' has a value of the wrong kind ({error}); 'id' is a number, "
                    "'name' text, 'isthing' 0 or 1, 'color' red, green and blue in 0..255."
                ) from error
        # 255 is the usual void class; a data set with more classes takes the first id that is free.
        return cls(name, tuple(parsed), label_divisor, ignore_label=max(255, len(parsed)))

    def to_coco_categories(self) -> list[dict[str, Any]]:
        """Returns the `categories` list of a COCO panoptic JSON, with the data set's own ids."""
        return [
            {"id": c.id, "name": c.name, "isthing": int(c.is_thing), "color": list(c.color)} for c in self.categories
        ]

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `dataset_info.json` into `folder` (whole or not at all), which is created if missing.

        Raises:
            UserError: If the file cannot be written.
        """
        write_atomically(Path(folder) / FILE_NAME, (json.dumps(self.to_dict(), indent=1) + "\n").encode())

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of `dataset_info.json`."""
        return {
            "name": self.name,
            "label_divisor": self.label_divisor,
            "ignore_label": self.ignore_label,
            **({"record_offset": self.record_offset} if self.record_offset else {}),
            **({} if self.bit_depth is None else {"bit_depth": self.bit_depth}),
            "categories": self.to_coco_categories(),
        }

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "DatasetInfo":
        """Reads the result of `to_dict`.

        Raises:
            UserError, ValueError, LookupError, TypeError or OverflowError: If it is damaged.
        """
        info = cls.from_coco_categories(
            content["categories"], name=str(content["name"]), label_divisor=whole_number(content["label_divisor"])
        )
        return dataclasses.replace(
            info,
            ignore_label=whole_number(content["ignore_label"]),
            record_offset=whole_number(content.get("record_offset", 0)),
            bit_depth=whole_number(content["bit_depth"], 8, 32) if "bit_depth" in content else None,
        )

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> "DatasetInfo":
        """Reads `dataset_info.json` from a TFRecord folder, a model folder or an exported model.

        Raises:
            UserError: If the folder or the file is missing, or the file is damaged.
        """
        path = Path(folder) / FILE_NAME
        if not path.parent.is_dir():
            raise UserError(f"Folder '{folder}' does not exist; give a folder that `deeplab2-like convert` wrote.")
        if not path.is_file():
            raise UserError(
                f"'{folder}' has no {FILE_NAME}; give a folder that `deeplab2-like` convert, train or export wrote."
            )
        try:
            return cls.from_dict(parse_json(read_file(path, "file")))
        except UserError:
            raise
        except (ValueError, LookupError, TypeError, OverflowError) as error:
            raise UserError(f"'{path}' is damaged ({error!r}); convert the data set again.") from error


def whole_number(value: Any, low: int | None = None, high: int | None = None) -> int:
    """Reads a whole number from a JSON value: 7, 7.0, "7" or "7.0", and for 0 and 1 also false and true.

    Args:
        value: The value.
        low: Smallest number allowed; None: that of 64 bits.
        high: Largest number allowed; None: that of 64 bits.

    Raises:
        TypeError, ValueError or OverflowError: If it is not a whole number, or not in `low`..`high`.
    """
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            value = float(value)
    number = int(value)
    if isinstance(value, float) and number != value:
        raise ValueError(f"{value} is no whole number")
    low, high = -(2**63) if low is None else low, 2**63 - 1 if high is None else high
    if not low <= number <= high:
        raise ValueError(f"{number} is not in {low}..{high}")
    return number


def generate_color(position: int) -> tuple[int, int, int]:
    """Returns a color for a class; steps of the golden ratio around the hue circle keep neighboring classes apart."""
    import colorsys

    red, green, blue = colorsys.hsv_to_rgb((position * 0.618034) % 1.0, 0.65, 0.9)
    return int(red * 255), int(green * 255), int(blue * 255)
