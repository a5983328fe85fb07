"""Tells the class of each object of an instance map: one for all, by a class map, or by labels of pixels."""

import csv
import dataclasses
import io
import itertools
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from deeplab2_like.data.convert import common, shapes
from deeplab2_like.data.convert.class_lists import classes_of_values, read_class_list
from deeplab2_like.data.convert.file_finder import shorter_names
from deeplab2_like.data.convert.labeled_images import Pair
from deeplab2_like.data.convert.losses import OTHER_CLASS, Losses
from deeplab2_like.data.dataset_info import Category, whole_number
from deeplab2_like.data.images import LABEL_SUFFIXES, read_value_png
from deeplab2_like.errors import UserError
from deeplab2_like.files import read_text
from deeplab2_like.parsing import parse_json
from deeplab2_like.printing import counted

# Of the names of columns of instances, those that cannot mean anything else.
_SURE_INSTANCE = ("instance", "instance_id", "object", "object_id", "cell", "cell_id")
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
    pairs: Sequence[Pair],
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
        pairs: The images and their instance maps.
        background: Name of the class of pixels without an object; None: they are void.
        known: The classes of other splits.
        encoding: See `files.read_text`.

    Raises:
        UserError: If options exclude each other, or a file cannot be read.
    """
    if sum(choice is not None for choice in (class_name, class_map, class_labels)) > 1:
        raise UserError("Of class, class_map and class_labels only one is possible; leave out the others.")
    if class_labels is not None and classes is None:
        raise UserError("The class labels need the class of each value; give a list with --classes FILE.")
    if classes is not None and class_labels is None and class_map is None:
        raise UserError(
            "The list of classes is for class_labels or class_map; give one of them, or one class with --class."
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
        found, map_notes = found.match(pairs)
        objects = Counter(name for names in found.names_of_image.values() for name in names.values())
        map_notes += shapes.warn_of_background(background, objects)
        if categories:
            return Classes(found, categories, map_notes)
        names, notes = shapes.choose_names(None, found.names - {background}, known)
        categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
        return Classes(found, categories, [*notes, *map_notes])
    name, notes = class_name or _DEFAULT_CLASS, []
    if name == background:
        raise UserError(
            f"The objects and the background are both of the class '{name}', so there would be no objects; name "
            "another one with --class or --background, or make the background void with --void-background."
        )
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
                fault = f"object {instance} of '{pair.label}' has no class in '{path}'; correct one of them."
                losses.leave_out(UserError(fault), "objects without a class")
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
        names_of_image: Class names of the objects of each image, by the image's name in the file with slashes; the name
            None is for all images.
        names_of_pair: Class names of the objects of each image, by `Pair.name`, see `match`.
    """

    path: Path
    names_of_image: Mapping[str | None, Mapping[int, str]]
    names_of_pair: Mapping[str, Mapping[int, str]] = dataclasses.field(default_factory=dict)

    @property
    def names(self) -> set[str]:
        """All class names."""
        return {name for names in self.names_of_image.values() for name in names.values()}

    def match(self, pairs: Sequence[Pair]) -> tuple["ClassMap", list[str]]:
        """Finds the image of each name in the file.

        A name is that of an image or of its instance map, with or without folder and suffix. If there is no such file,
        the folders at the front of the name are left out one by one. Of several names whose folders differ from the
        image's, those count that differ least.

        Args:
            pairs: The images and their instance maps.

        Returns:
            The class map with `names_of_pair`, and a warning if names fit no image.

        Raises:
            UserError: If two names of the same image give an object different classes.
        """
        with_folder, without = _find_names(pairs)
        found: dict[str, list[tuple[int, str]]] = {}  # By image the names that fit, and how many folders fit.
        for name in self.names_of_image:
            if name is None:
                continue
            for shorter in shorter_names(name):
                matches = with_folder.get(shorter) or without.get(shorter, [])
                for pair in matches:
                    found.setdefault(pair.name, []).append((_count_common_folders(name, pair), name))
                if matches:
                    break
        names_of_pair: dict[str, dict[int, str]] = {}
        used: set[str | None] = {None}
        for image, entries in found.items():
            most = max(number for number, _ in entries)
            chosen = [name for number, name in entries if number in (most, len(PurePosixPath(name).parent.parts))]
            used |= set(chosen)
            names_of_pair[image] = self._merge(chosen)
        unused = [str(name) for name in self.names_of_image if name not in used]
        notes = []
        if unused:
            notes.append(
                f"Warning: {counted(len(unused), 'name')} in the class map '{self.path}' {_fit(len(unused))} no image, "
                f"such as '{unused[0]}'."
            )
        return dataclasses.replace(self, names_of_pair=names_of_pair), notes

    def _merge(self, images: Sequence[str]) -> dict[int, str]:
        """Returns the class names that several names of an image give to its objects."""
        merged: dict[int, tuple[str, str]] = {}
        for image in images:
            for instance, name in self.names_of_image[image].items():
                other, other_name = merged.setdefault(instance, (image, name))
                if other_name != name:
                    raise UserError(
                        f"The class map '{self.path}' gives object {instance} the class '{other_name}' as of '{other}' "
                        f"and '{name}' as of '{image}', which are the same image; keep one of them."
                    )
        return {instance: name for instance, (_, name) in merged.items()}

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
        names = self.names_of_pair.get(pair.name, self.names_of_image.get(None, {}))
        name_of = {}
        for instance in np.unique(instances[instances > 0]).tolist():
            if instance in names:
                name_of[instance] = names[instance]
                continue
            fault = f"object {instance} of '{pair.label}' has no class in '{self.path}'; add it there."
            losses.leave_out(UserError(fault), "objects without a class")
        return instances, name_of


def _find_names(pairs: Sequence[Pair]) -> tuple[dict[str, list[Pair]], dict[str, list[Pair]]]:
    """Returns the images by their names with folder, and by all names without, of their instance maps, too."""
    with_folder: dict[str, list[Pair]] = {}
    without: dict[str, list[Pair]] = {}
    for pair in pairs:
        path = PurePosixPath(pair.name)
        for name in {pair.name, path.with_suffix("").as_posix()}:
            with_folder.setdefault(name, []).append(pair)
        for name in {path.name, path.stem, pair.label.name, pair.label.stem}:
            without.setdefault(name, []).append(pair)
    return with_folder, without


def _count_common_folders(name: str, pair: Pair) -> int:
    """Returns the number of folders at the end of a name that the path of the image or its instance map has, too."""

    def count(path: Path) -> int:
        folders = zip(reversed(PurePosixPath(name).parent.parts), reversed(path.absolute().parent.parts), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda both: both[0] == both[1], folders))

    return max(count(pair.image), count(pair.label))


def _fit(number: int) -> str:
    return "fits" if number == 1 else "fit"


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
        entries = list(_json_entries(parse_json(text)) if text.lstrip()[:1] in ("{", "[") else _table_entries(text))
    except (ValueError, csv.Error) as error:
        raise UserError(f"The class map '{path}' is not understood ({error}); {_FORMATS}.") from error
    if not entries:
        raise UserError(f"The class map '{path}' is empty; {_FORMATS}.")
    for entry in entries:
        instance, image = _read_instance(entry, path), _read_image_name(entry, path)
        name = _class_name(entry, name_of_value, path)
        names = names_of_image.setdefault(image, {})
        if names.setdefault(instance, name) != name:
            where = "" if image is None else f" of image '{image}'"
            raise UserError(
                f"The class map '{path}' gives object {instance}{where} the classes '{names[instance]}' and '{name}'; "
                "keep one of them."
            )
    return ClassMap(path, names_of_image)


@dataclasses.dataclass(frozen=True)
class _Entry:
    """The class of one object as the file gives it, not yet checked.

    Attributes:
        place: Where in the file it is, such as "row 2".
        image: The image's name; None: all images.
        instance: The number of the object.
        class_value: The name or number of the class.
    """

    place: str
    image: Any
    instance: Any
    class_value: Any


def _json_entries(content: Any) -> Iterator[_Entry]:
    """Yields the entries of a JSON; raises `ValueError` if it has another form."""
    if isinstance(content, list):
        for position, entry in enumerate(content):
            if not isinstance(entry, dict):
                raise ValueError(f"entry {position} is {entry!r}, which is no object with 'instance' and 'class'")
            cells = {_column_of(key, entry): value for key, value in entry.items()}
            missing = [key for key in ("instance", "class") if key not in cells]
            if missing:
                raise ValueError(f"entry {position} has no key '{missing[0]}'")
            yield _Entry(f"entry {position}", cells.get("image"), cells["instance"], cells["class"])
        return
    for key, value in content.items():
        if isinstance(value, Mapping):
            for instance, class_value in value.items():
                yield _Entry(f"'{key}'", key, instance, class_value)
        else:
            yield _Entry(f"key '{key}'", None, key, value)


def _table_entries(text: str) -> Iterator[_Entry]:
    """Yields the rows of a table; raises `ValueError` or `csv.Error` if it has another form."""
    first = text.lstrip().splitlines()[0] if text.strip() else ""
    delimiter = max("\t;,", key=first.count)
    reader = csv.reader(io.StringIO(text, newline=None), delimiter=delimiter)  # Line ends may be CR alone.
    rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if any(row)]
    header = rows[0][1] if rows else []
    columns = [_column_of(cell, header) for cell in header]
    if "instance" in columns and "class" in columns:
        rows = rows[1:]
    elif len(columns) in (2, 3):
        columns = ["image", "instance", "class"][-len(columns) :]
    elif columns:
        raise ValueError(f"its first line is {', '.join(header)}")
    for number, row in rows:
        if len(row) != len(columns):
            raise ValueError(f"row {number} has {counted(len(row), 'cell')}, but row {rows[0][0]} has {len(columns)}")
        cells = dict(zip(columns, row, strict=True))
        yield _Entry(f"row {number}", cells.get("image"), cells["instance"], cells["class"])


def _read_instance(entry: _Entry, path: Path) -> int:
    """Returns the number of the object."""
    try:
        return whole_number(entry.instance)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"The class map '{path}' has {entry.instance!r} as the number of an object in {entry.place}, which is no "
            "whole number; correct it, or if it is a header, name the columns image, instance and class."
        ) from error


def _read_image_name(entry: _Entry, path: Path) -> str | None:
    """Returns the image's name with slashes, None if the entry holds for all images."""
    if entry.image is None:
        return None
    if not isinstance(entry.image, str) or not entry.image.strip():
        raise UserError(
            f"The class map '{path}' has the image {entry.image!r} in {entry.place}, which is no file name; correct it."
        )
    return entry.image.replace("\\", "/")


def _column_of(name: str, header: Iterable[str]) -> str:
    """Returns the column that a name means, or the name itself.

    A label is the number of an object, unless another column has the numbers and none the classes.
    """
    lower = _plain(name)
    others = {_plain(other) for other in header} - {"label"}
    if lower == "label" and others & {*_SURE_INSTANCE} and not others & {*_COLUMNS["class"]}:
        return "class"
    return next((column for column, names in _COLUMNS.items() if lower in names), name)


def _plain(name: str) -> str:
    return name.strip().casefold().replace(" ", "_")


def _class_name(entry: _Entry, name_of_value: Mapping[int, str | None] | None, path: Path) -> str:
    """Returns the name of a class that is given by its name or by its number in the list of classes."""
    value = entry.class_value
    if value is None or (isinstance(value, str) and not value.strip()):
        raise UserError(f"The class map '{path}' has no class for object {entry.instance} in {entry.place}; add it.")
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
