"""Tells the class of each object of an instance map: one for all, by a class map, or by labels of pixels."""

import csv
import dataclasses
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deeplab2_like.data.convert import common, shapes
from deeplab2_like.data.convert.class_lists import classes_of_values, read_class_list
from deeplab2_like.data.convert.labeled_images import Pair
from deeplab2_like.data.convert.losses import FAULTY, OTHER_CLASS, Losses
from deeplab2_like.data.dataset_info import Category, whole_number
from deeplab2_like.data.images import LABEL_SUFFIXES, read_value_png
from deeplab2_like.errors import UserError
from deeplab2_like.files import read_text

_FORMATS = (
    'it may be a table with the columns image, instance and class, or a JSON: {"IMAGE": {"INSTANCE": "CLASS"}}; '
    "without images it holds for all of them"
)
_DEFAULT_CLASS = "object"
# Names of columns and keys, in lower case.
_COLUMNS = {
    "image": ("image", "image_name", "file", "filename", "file_name"),
    "instance": ("instance", "instance_id", "label", "label_id", "id", "object", "object_id", "cell", "cell_id"),
    "class": ("class", "class_name", "class_id", "category", "type", "classification"),
}


@dataclasses.dataclass(frozen=True)
class Classes:
    """The classes of a data set of instance maps, and which object is of which class.

    Attributes:
        source: Tells the classes of the objects of an image.
        categories: The classes, as for `shapes.make_info`.
        notes: Sentences for the user.
    """

    source: "OneClass | ClassMap | ClassLabels"
    categories: list[dict[str, Any]]
    notes: list[str]


def choose_classes(
    *,
    class_name: str | None,
    class_map: Path | None,
    class_labels: Path | None,
    classes: Path | None,
    labels: Path,
    background: str | None,
    known: Sequence[Category],
    encoding: str | None,
) -> Classes:
    """Chooses the source of the classes; see `instance_maps.convert_instance_maps` for the options.

    Args:
        class_name: Name of the only class, or None.
        class_map: The class of each object, or None.
        class_labels: Folder of label files with the class of each pixel, or None.
        classes: The list of classes, or None.
        labels: Folder of the instance maps.
        background: Name of the class of pixels without an object; None: they are void.
        known: The classes of other splits.
        encoding: See `files.read_text`.

    Raises:
        UserError: If options exclude each other, or a file cannot be read.
    """
    if sum(choice is not None for choice in (class_name, class_map, class_labels)) > 1:
        raise UserError("class, class_map and class_labels exclude each other; give one of them.")
    if class_labels is not None and classes is None:
        raise UserError("class_labels needs the class of each value; give a list with --classes FILE.")
    if classes is not None and class_labels is None and class_map is None:
        raise UserError(
            "classes is the list for class_labels or class_map; give one of them, or one class with --class."
        )
    entries = [] if classes is None else read_class_list(classes, encoding=encoding)
    name_of_value, void_values = classes_of_values(entries)
    categories = [entry for entry in entries if name_of_value.get(entry["id"]) is not None]
    if class_labels is not None:
        common.require_folder(class_labels, "folder of class labels")
        source = ClassLabels(class_labels, labels, name_of_value, frozenset(void_values), str(classes))
        return Classes(source, categories, [])
    if class_map is not None:
        found = read_class_map(class_map, name_of_value if entries else None, encoding=encoding)
        if categories:
            return Classes(found, categories, [])
        names, notes = shapes.choose_names(None, found.names - {background}, known)
        return Classes(found, [{"id": number, "name": name} for number, name in enumerate(names, start=1)], notes)
    name, notes = class_name or _DEFAULT_CLASS, []
    if class_name is None:
        notes.append(
            f"All objects are of the class '{name}'; --class names it, and --class-map or --class-labels tell several "
            "apart."
        )
    return Classes(OneClass(name), [{"id": 1, "name": name}], notes)


# --- The sources. -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class OneClass:
    """All objects are of one class."""

    name: str

    def inputs_of(self, pair: Pair) -> list[Path]:
        """Returns the files that tell the classes."""
        return []

    def choices(self) -> Any:
        """Returns what affects the classes, as a JSON value."""
        return None

    def classify(
        self,
        pair: Pair,
        instances: np.ndarray,
        losses: Losses,
    ) -> tuple[np.ndarray, dict[int, str]]:
        """Returns a map of values, int32 [H, W], and the class name of values, see `ClassMap.classify`."""
        return instances, {value: self.name for value in np.unique(instances).tolist() if value}


@dataclasses.dataclass(frozen=True)
class ClassLabels:
    """A folder of label files with the class of each pixel.

    Attributes:
        folder: The folder.
        labels: Folder of the instance maps, whose names the files may have.
        name_of_value: The class name of each value; None for the background.
        void_values: Values that are void.
        classes_file: The list of classes, for messages.
    """

    folder: Path
    labels: Path
    name_of_value: dict[int, str | None]
    void_values: frozenset[int]
    classes_file: str

    def inputs_of(self, pair: Pair) -> list[Path]:
        """Returns the file with the classes of an image."""
        stem = Path(pair.name).with_suffix("")
        candidates = [self.folder / pair.label.relative_to(self.labels)]
        candidates += [self.folder / stem.with_suffix(suffix) for suffix in LABEL_SUFFIXES]
        return [next((path for path in candidates if path.exists()), candidates[0])]

    def choices(self) -> Any:
        """Returns what affects the classes, as a JSON value."""
        return [sorted(self.name_of_value.items()), sorted(self.void_values)]

    def classify(self, pair: Pair, instances: np.ndarray, losses: Losses) -> tuple[np.ndarray, dict[int, str]]:
        """Returns a map of values and the class name of values, see `ClassMap.classify`.

        Pixels without an object become the negative number of their class: -1 minus its value.
        """
        (path,) = self.inputs_of(pair)
        class_values = read_value_png(path, "class label")
        if class_values.shape != instances.shape:
            raise UserError(
                f"'{path}' is {class_values.shape} but '{pair.label}' {instances.shape} (height, width); make them "
                "again."
            )
        unknown = sorted({*np.unique(class_values).tolist()} - {*self.name_of_value, *self.void_values})
        if unknown:
            raise UserError(f"'{path}' has the value {unknown[0]}, which '{self.classes_file}' does not list; add it.")
        name_of: dict[int, str] = {}
        keys, areas = np.unique(instances.astype(np.int64) << 32 | class_values, return_counts=True)
        found: dict[int, Counter[int]] = {}
        for key, area in zip(keys.tolist(), areas.tolist(), strict=True):
            found.setdefault(key >> 32, Counter())[key & 0xFFFFFFFF] += area
        for value in found.pop(0, {}):
            name = self.name_of_value.get(value)
            name_of |= {} if name is None else {-1 - value: name}
        for instance, counts in found.items():
            named = {name: n for value, n in counts.items() if (name := self.name_of_value.get(value)) is not None}
            if not named:
                with losses.skip_faulty():
                    raise UserError(
                        f"object {instance} of '{pair.label}' has no class in '{path}'; correct one of them."
                    )
                losses.add(FAULTY, "objects without a class", objects=1)
                continue
            name_of[instance] = max(named, key=lambda name: (named[name], name))
            other = counts.total() - named[name_of[instance]]
            if other:
                losses.add(OTHER_CLASS, name_of[instance], pixels=other)
        is_void = np.isin(class_values, list(self.void_values))
        # Values that no meaning names are void: the number after those of the classes.
        void = -2 - max([*self.name_of_value, *self.void_values])
        rest = np.where(is_void, void, np.where(self._is_background(class_values), 0, -1 - class_values))
        return np.where(instances > 0, instances, rest), name_of

    def _is_background(self, class_values: np.ndarray) -> np.ndarray:
        """Returns whether each pixel is background, bool [H, W]."""
        return np.isin(class_values, [value for value, name in self.name_of_value.items() if name is None])


@dataclasses.dataclass(frozen=True)
class ClassMap:
    """The class of each object.

    Attributes:
        path: The file.
        names_of_image: Class names of the objects of each image, by the image's name; the name None is for all images.
    """

    path: Path
    names_of_image: Mapping[str | None, Mapping[int, str]]

    @property
    def names(self) -> set[str]:
        """All class names."""
        return {name for names in self.names_of_image.values() for name in names.values()}

    def inputs_of(self, pair: Pair) -> list[Path]:
        """Returns the files that tell the classes."""
        return [self.path]

    def choices(self) -> Any:
        """Returns what affects the classes besides the file, as a JSON value."""
        return sorted(self.names)

    def classify(self, pair: Pair, instances: np.ndarray, losses: Losses) -> tuple[np.ndarray, dict[int, str]]:
        """Names the classes of the objects of an image.

        Args:
            pair: The image and its instance map.
            instances: int32 [H, W], the instance map.
            losses: Counts objects without a class, where they are left out.

        Returns:
            A map of values, int32 [H, W], and the class name of each positive value that has one; 0 is the background.

        Raises:
            UserError: If an object has no class.
        """
        names = self._names_of(pair)
        name_of = {}
        for instance in np.unique(instances[instances > 0]).tolist():
            if instance in names:
                name_of[instance] = names[instance]
                continue
            with losses.skip_faulty():
                raise UserError(f"object {instance} of '{pair.label}' has no class in '{self.path}'; add it there.")
            losses.add(FAULTY, "objects without a class", objects=1)
        return instances, name_of

    def _names_of(self, pair: Pair) -> Mapping[int, str]:
        """Returns the class names of the objects of an image, which the file may name in several ways."""
        path = Path(pair.name)
        for name in (
            pair.name,
            path.name,
            path.with_suffix("").as_posix(),
            path.stem,
            pair.label.name,
            pair.label.stem,
        ):
            if name in self.names_of_image:
                return self.names_of_image[name]
        return self.names_of_image.get(None, {})


# --- Class maps. -----------------------------------------------------------------------------------------------------


def read_class_map(
    path: Path, name_of_value: Mapping[int, str | None] | None, *, encoding: str | None = None
) -> ClassMap:
    """Reads a class map.

    Args:
        path: A table, separated by commas, semicolons or tabs, with the columns image, instance and class, in this
            order if there is no header, where image may be missing; or a JSON: an object from images to objects from
            instances to classes, such an object alone, or a list of objects with the keys `image`, `instance` and
            `class`. An image is named with or without folder and suffix, or by the file of its instance map.
        name_of_value: The class name of each number, by which classes may be given, too; None: only names are possible.
        encoding: See `files.read_text`.

    Raises:
        UserError: If the file cannot be read or has another format, or an object has two classes.
    """
    text = read_text(path, "the class map", encoding=encoding)
    names_of_image: dict[str | None, dict[int, str]] = {}
    try:
        rows = list(_json_rows(json.loads(text)) if text.lstrip()[:1] in ("{", "[") else _table_rows(text))
        numbered = [(image, whole_number(instance), class_value) for image, instance, class_value in rows]
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(f"The class map '{path}' is not understood ({error}); {_FORMATS}.") from error
    if not numbered:
        raise UserError(f"The class map '{path}' is empty; {_FORMATS}.")
    for image, instance, class_value in numbered:
        name = _class_name(class_value, name_of_value, path)
        names = names_of_image.setdefault(image, {})
        if names.setdefault(instance, name) != name:
            where = "" if image is None else f" of image '{image}'"
            raise UserError(
                f"The class map '{path}' gives object {instance}{where} the classes '{names[instance]}' and '{name}'; "
                "keep one of them."
            )
    return ClassMap(path, names_of_image)


def _json_rows(content: Any) -> Iterator[tuple[str | None, Any, Any]]:
    if isinstance(content, list):
        for entry in content:
            cells = {_column_of(key): value for key, value in entry.items()}
            yield cells.get("image"), cells["instance"], cells["class"]
        return
    for key, value in content.items():
        if isinstance(value, Mapping):
            for instance, class_value in value.items():
                yield key.replace("\\", "/"), instance, class_value
        else:
            yield None, key, value


def _table_rows(text: str) -> Iterator[tuple[str | None, Any, Any]]:
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    delimiter = max("\t;,", key=first.count)
    lines = [[cell.strip() for cell in row] for row in csv.reader(io.StringIO(text), delimiter=delimiter) if any(row)]
    columns = [_column_of(cell) for cell in lines[0]] if lines else []
    if "instance" in columns and "class" in columns:
        lines = lines[1:]
    elif len(columns) in (2, 3):
        columns = ["image", "instance", "class"][-len(columns) :]
    elif columns:
        raise ValueError(f"its first line is {', '.join(lines[0])}")
    for line in lines:
        cells = dict(zip(columns, line, strict=True))
        image = cells.get("image")
        yield None if image is None else image.replace("\\", "/"), cells["instance"], cells["class"]


def _column_of(name: str) -> str:
    """Returns the column that a name means, or the name itself."""
    lower = name.strip().casefold().replace(" ", "_")
    return next((column for column, names in _COLUMNS.items() if lower in names), name)


def _class_name(value: Any, name_of_value: Mapping[int, str | None] | None, path: Path) -> str:
    """Returns the name of a class that is given by its name or by its number in the list of classes."""
    listed = None if name_of_value is None else [name for name in name_of_value.values() if name is not None]
    try:
        number: int | None = whole_number(value)
    except (ValueError, TypeError, OverflowError):
        number = None
    name = value if number is None or name_of_value is None else name_of_value.get(number)
    is_number = number is not None and name_of_value is None
    if isinstance(name, str) and name.strip() and not is_number and (listed is None or name in listed):
        return name
    allowed = "give the class of each number with --classes" if listed is None else f"classes are {', '.join(listed)}"
    raise UserError(f"The class map '{path}' has the class {value!r}, which has no name; {allowed}.")
