"""Converts a data set of Ultralytics for segmentation: a YAML, images, and a text of polygons per image."""

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

import numpy as np
import yaml

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.convert.losses import Losses
from deeplab2_like.data.convert.splits import require_one_split
from deeplab2_like.data.dataset_info import DatasetInfo, whole_number
from deeplab2_like.data.images import IMAGE_SUFFIXES, decode_image
from deeplab2_like.errors import UserError
from deeplab2_like.printing import counted

_SPLITS = ("train", "val", "test")
# Coordinates are shares of the image's size; rounding leads a little outside.
_TOLERANCE = 0.01
# Labeling tools write the class names beside the texts of polygons.
_CLASS_LIST = "classes.txt"


@dataclasses.dataclass(frozen=True)
class _Example:
    """One image.

    Attributes:
        name: Its path relative to the folder of its split.
        image: The image.
        label: Its text, which is missing if there is no object.
    """

    name: str
    image: Path
    label: Path


def convert_yolo_seg(
    *,
    data: Path,
    output_dir: Path,
    split: str | None = None,
    stuff: Sequence[str] = (),
    background: str | None = None,
    overlap: shapes.Overlap = "smaller-on-top",
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts the splits that the YAML names.

    A line of a text is a class and a polygon `x y x y ...` in shares of the image's width and height. The text of
    `images/train/a.jpg` is `labels/train/a.txt`; an image without a text has no objects. Lines of five numbers are
    boxes, which are faulty.

    Args:
        data: The YAML, with `names` and `train`, `val`, `test`: each a folder, a text that lists images, or a list of
            these. They are relative to `path`, or else to the folder of the YAML.
        output_dir: The record folder.
        split: The only split to convert; None: all of them.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of pixels without a polygon; None: they are void.
        overlap: Which polygon wins where several overlap, see `shapes.draw`.
        encoding: See `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    data, output_dir = Path(data), Path(output_dir)
    content = _read_yaml(data, encoding)
    names = _read_names(content, data)
    splits, notes = _find_splits(content, data, split=split, encoding=encoding)
    require_one_split(list(splits), options.get("val_share"))
    unlabeled = sum(not example.label.exists() for examples in splits.values() for example in examples)
    if unlabeled:
        notes.append(f"{counted(unlabeled, 'image')} without a text of polygons: taken as without objects.")
    if not any(example.label.exists() for examples in splits.values() for example in examples):
        example = next(iter(splits.values()))[0]
        raise UserError(
            f"No image of '{data}' has a text of polygons; that of '{example.image}' would be '{example.label}'."
        )
    known = common.known_categories(output_dir, next(iter(splits)))
    categories = [{"id": number, "name": name} for number, name in sorted(names.items())]
    info = shapes.make_info(categories, name=data.stem, stuff=stuff, background=background, known=known)

    def load(example: _Example, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        # Ultralytics turns images by their EXIF orientation, as viewers and most labeling tools do.
        image = files.read_file(example.image, "the image")
        image = labeled_images.set_upright(image, example.name, info, losses)
        size = decode_image(image, example.name, bit_depth=info.bit_depth).shape[:2]
        drawn = list(_read_polygons(example.label, size, names, info, losses, encoding))
        below = shapes.empty_map(size, info, background)
        return image, shapes.draw(drawn, below, overlap=overlap, info=info, losses=losses)

    return labeled_images.write_labeled_images(
        splits,
        load,
        inputs_of=lambda example: [example.image, *([example.label] if example.label.exists() else [])],
        choices={"background": background, "overlap": overlap, "names": sorted(names.items())},
        source=[data],
        info=info,
        output_dir=output_dir,
        max_instances=_max_instances(splits, encoding),
        notes=[*notes, *shapes.describe_kinds(info, stuff)],
        by_subsets=True,
        **options,
    )


# --- The YAML. --------------------------------------------------------------------------------------------------------


def _read_yaml(path: Path, encoding: str | None) -> dict[str, Any]:
    text = files.read_text(path, "the YAML of the data set", encoding=encoding)
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"'{path}' is not a YAML file ({reason}); correct it.") from error
    if not isinstance(content, dict):
        raise UserError(f"'{path}' has no keys and values; a YAML of Ultralytics has 'names', 'train' and 'val'.")
    return content


def _read_names(content: Mapping[str, Any], path: Path) -> dict[int, str]:
    """Reads the class names, a list or a mapping from numbers."""
    given = content.get("names")
    if given and not isinstance(given, list | dict):
        raise UserError(f"'{path}' has 'names: {given}'; it must be a list of class names, or map numbers to names.")
    entries = list(enumerate(given)) if isinstance(given, list) else list(given.items()) if given else []
    try:
        names = {whole_number(number): str(name) for number, name in entries}
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"'{path}' has 'names' with a number that is none ({error}); correct it.") from error
    if not names:
        raise UserError(f"'{path}' has no 'names'; list the class names there, in the order of their numbers.")
    return names


def _find_splits(
    content: Mapping[str, Any], path: Path, *, split: str | None, encoding: str | None
) -> tuple[dict[str, list[_Example]], list[str]]:
    """Lists the images of each split, and sentences for the user."""
    named = {name: content[name] for name in _SPLITS if content.get(name)}
    listed = ", ".join(named) or "none"
    if split is not None and split not in named:
        raise UserError(f"'{path}' has no split '{split}' (found: {listed}); name one of them with --split.")
    splits: dict[str, list[_Example]] = {}
    notes: list[str] = []
    reasons: list[str] = []
    for name, given in named.items():
        if split not in (None, name):
            continue
        parts = given if isinstance(given, list) else [given]
        found = [_find_path(str(part), content, path) for part in parts]
        missing = [str(part) for part, source in zip(parts, found, strict=True) if source is None]
        if missing and split is None:
            reasons.append(f"'{missing[0]}' does not exist")
            notes.append(f"Warning: left out split '{name}', because {reasons[-1]}.")
            continue
        examples: list[_Example] = []
        for part, source in zip(parts, found, strict=True):
            if source is None:
                raise UserError(f"The images of split '{name}' in '{path}', '{part}', do not exist; correct the path.")
            examples += _list_examples(source, encoding, prefix=f"{source.name}/" if len(parts) > 1 else "")
        if examples:
            splits[name] = examples
        else:
            reasons.append(f"'{given}' has no images")
            notes.append(f"Warning: left out split '{name}', because {reasons[-1]}.")
    if not splits:
        raise UserError(
            f"'{path}' has no split with images (named: {'; '.join([listed, *reasons])}); correct 'path', 'train' and "
            "'val' there."
        )
    if len(named) > 1:
        notes.append(f"'{path}' has the splits {listed}; --split converts one of them.")
    images = {name: {example.image.resolve() for example in examples} for name, examples in splits.items()}
    for one, other in itertools.combinations(splits, 2):
        if shared := images[one] & images[other]:
            notes.append(
                f"Warning: splits '{one}' and '{other}' share {counted(len(shared), 'image')}, such as "
                f"'{min(shared).name}'."
            )
    return splits, notes


def _find_path(part: str, content: Mapping[str, Any], path: Path) -> Path | None:
    """Finds a folder or list of the YAML, also after a move, or with `..` in front as Roboflow writes it."""
    relative = PurePosixPath(part.replace("\\", "/"))
    root = str(content.get("path") or "").replace("\\", "/")
    plain = PurePosixPath(*(word for word in relative.parts if word not in ("..", ".", "/")))
    candidates = [path.parent / root / relative, path.parent / relative, path.parent / plain]
    candidates += [path.parent / PurePosixPath(root).name / plain]
    candidates += [path.parent.joinpath(*plain.parts[start:]) for start in range(1, len(plain.parts))]
    return next((candidate for candidate in candidates if candidate.exists()), None)


def _list_examples(source: Path, encoding: str | None, *, prefix: str) -> list[_Example]:
    """Lists the images of a folder, whose names get a prefix, or of a text with the path of an image per line."""
    if source.is_dir():
        images = files.list_files(source, IMAGE_SUFFIXES, recursive=True)
        pairs = [*((image, _label_of(image)) for image in images), *_texts_without_image(source, images)]
        return [_Example(f"{prefix}{image.relative_to(source).as_posix()}", image, text) for image, text in pairs]
    examples = []
    for line in files.read_text(source, "the list of images", encoding=encoding).splitlines():
        name = line.strip().replace("\\", "/").removeprefix("./")
        if name:
            image = source.parent / name
            examples.append(_Example(name.lstrip("/"), image, _label_of(image)))
    return examples


def _texts_without_image(source: Path, images: Sequence[Path]) -> list[tuple[Path, Path]]:
    """Returns texts of polygons whose image is missing, after its path without suffix; reading it fails later."""
    labels = _label_of(source / "image").parent
    if not images or labels == source or not labels.is_dir():
        return []
    known = {_label_of(image) for image in images}
    return [
        (source / text.relative_to(labels).with_suffix(""), text)
        for text in files.list_files(labels, (".txt",), recursive=True)
        if text not in known and text.name != _CLASS_LIST
    ]


def _label_of(image: Path) -> Path:
    """Returns the text of an image: `labels` takes the place of the last folder `images` in its path."""
    parts = list(image.parts)
    for position in range(len(parts) - 2, -1, -1):
        if parts[position] == "images":
            parts[position] = "labels"
            break
    return Path(*parts).with_suffix(".txt")


# --- The texts. -------------------------------------------------------------------------------------------------------


def _read_polygons(
    path: Path,
    size: tuple[int, int],
    names: Mapping[int, str],
    info: DatasetInfo,
    losses: Losses,
    encoding: str | None,
) -> Iterator[shapes.Shape]:
    """Yields the polygons of an image of some height and width; none if there is no text."""
    if not path.exists():
        return
    class_of_name = shapes.class_of_name(info)
    lines = files.read_text(path, "the text of polygons", encoding=encoding).splitlines()
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        name = "unknown class"
        try:
            class_number, shares = _parse_line(line)
            if class_number not in names:
                raise UserError(f"has class {class_number}, but 'names' has {', '.join(map(str, sorted(names)))}")
            name = names[class_number]
            yield shapes.Shape(class_of_name[name], shapes.polygon_runs([_to_polygon(shares, size)], size))
        except UserError as error:
            losses.leave_out(UserError(f"line {number} of '{path}' {error}."), name)


def _parse_line(line: str) -> tuple[int, np.ndarray]:
    """Returns class and coordinates, float64 [N]; raises `UserError` with the predicate of a sentence."""
    try:
        first, *rest = line.split()
        return whole_number(first), np.array([float(word) for word in rest])
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError("is not a class and numbers; correct it") from error


def _to_polygon(shares: np.ndarray, size: tuple[int, int]) -> list[float]:
    """Returns a polygon, x, y, ... in pixels, from shares of the image's width and height, float64 [N].

    Raises:
        UserError: With the predicate of a sentence, if it is no polygon.
    """
    height, width = size
    if shares.size == 4:
        raise UserError(
            "is a box, which does not say which pixels are meant; export polygons (Segment), or leave boxes out with "
            "--on-error skip-annotation"
        )
    if shares.size % 2 or shares.size < 6:
        raise UserError(
            f"has {shares.size} coordinates, but a polygon is x, y, ... of three points or more; correct it"
        )
    if not np.isfinite(shares).all() or shares.min() < -_TOLERANCE or shares.max() > 1 + _TOLERANCE:
        raise UserError("has a coordinate outside of 0 to 1, the shares of the image's width and height; correct it")
    points = shares.reshape(-1, 2) * (width, height)
    return points.reshape(-1).tolist()


def _max_instances(splits: Mapping[str, Sequence[_Example]], encoding: str | None) -> int:
    """Returns the largest number of lines of a text."""
    largest = 0
    for examples in splits.values():
        for example in examples:
            try:
                text = files.read_text(example.label, "the text of polygons", encoding=encoding)
            except UserError:  # There is none, or it fails later.
                continue
            largest = max(largest, len(text.splitlines()))
    return largest
