"""Converts a folder of labelme: a JSON per image with the shapes that an annotator drew.

labelme's files have class names but do not say which classes are stuff, so the user names those.
"""

import base64
import binascii
import dataclasses
import io
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

import numpy as np
from PIL import Image

from deeplab2_like import files
from deeplab2_like.data import dataset_info
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import IMAGE_SUFFIXES, turn_upright
from deeplab2_like.data.shards import list_splits
from deeplab2_like.errors import UserError
from deeplab2_like.paths import is_inside, require_inside

# labelme's own name for regions to ignore in training.
_IGNORED = "__ignore__"


@dataclasses.dataclass(frozen=True)
class _Example:
    """One image.

    Attributes:
        name: The image's file name, in the folder of its JSON relative to the root.
        json_file: Its JSON; None if the image has none.
        image: The image; None if the JSON does not give its path.
    """

    name: str
    json_file: Path | None
    image: Path | None


def convert_labelme(
    *,
    root: Path,
    output_dir: Path,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    stuff: Sequence[str] = (),
    background: str | None = None,
    overlap: shapes.Overlap = "smaller-on-top",
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts a folder of labelme and the folders in it as one split.

    Polygons, rectangles, circles and masks are supported. Shapes of a thing class with the same `group_id` are one
    object. Shapes named `__ignore__` become void.

    The JSONs give the paths of the images, which must be in `root` or its parent folder: it is common to have labels
    and images in two folders side by side, with `"imagePath": "../images/a.jpg"`. A JSON with a path elsewhere is
    refused, unless it contains the image.

    Args:
        root: Folder of the JSONs.
        output_dir: The record folder.
        split: The split's name; None: taken from the name of `root` or of its folder, see `common.guess_split`.
        classes: All names, in the order of the class ids. None: those of the record folder, if it has another split
            with all names that occur here, or else the names that occur, in alphabetical order.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of pixels without a shape; None: they are void.
        overlap: Which shape wins where several overlap, see `shapes.draw`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A tuple with one report, like the converters of several splits.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    root, output_dir = Path(root), Path(output_dir)
    common.require_folder(root, "labelme folder")
    split = split if split is not None else common.guess_split(root)
    examples, names, max_instances = _scan(root)
    if not any(example.json_file for example in examples):
        raise UserError(f"'{root}' has no JSON of labelme; give the folder in which labelme saves them.")
    if classes is None:
        classes = _known_names(output_dir, split, names) or sorted(names)
    info = shapes.make_info(
        [{"id": number, "name": name} for number, name in enumerate(classes, start=1)],
        name=root.name,
        stuff=stuff,
        background=background,
    )

    def load(example: _Example, info: DatasetInfo) -> tuple[bytes, np.ndarray]:
        if example.json_file is None:
            raise UserError(
                "it has no JSON of the same name beside it; label it in labelme, or move it to another folder."
            )
        content = _read_json(example.json_file)
        # labelme shows images turned by their EXIF orientation.
        image = turn_upright(_read_image(content, example.json_file, root), example.name)
        height, width = content.get("imageHeight"), content.get("imageWidth")
        if not isinstance(height, int) or not isinstance(width, int) or min(height, width) < 1:
            raise UserError(f"'{example.json_file}' lacks 'imageHeight' or 'imageWidth'; save it again in labelme.")
        size = (height, width)
        below = shapes.empty_map(size, info, background)
        return image, shapes.draw(_read_shapes(content, size, info), below, overlap=overlap, info=info)

    report = labeled_images.write_labeled_images(
        examples,
        load,
        inputs_of=lambda example: [path for path in (example.image, example.json_file) if path is not None],
        choices={"background": background, "overlap": overlap},
        source=[root],
        info=info,
        output_dir=output_dir,
        split=split,
        max_instances=max_instances,
        **options,
    )
    return (report,)


def _scan(root: Path) -> tuple[list[_Example], set[str], int]:
    """Lists JSONs, and images without one.

    Returns:
        The examples, all class names, and the largest number of shapes with the same name in an image.
    """
    examples, names, max_instances = [], set(), 0
    labeled = set()  # Paths of images, and of JSONs without suffix.
    for json_file in files.list_files(root, (".json",), recursive=True):
        name, image = json_file.stem, None
        labeled.add(json_file.with_suffix(""))
        try:
            content = _read_json(json_file)
            labels = [shape.get("label") for shape in content["shapes"]]
            counts = Counter(label for label in labels if isinstance(label, str))
            counts.pop(_IGNORED, None)
            names |= set(counts)
            max_instances = max(max_instances, *counts.values(), 0)
            image = Path(os.path.normpath(json_file.parent / _image_path(content)))
            labeled.add(image)
            name = image.name
        except UserError:  # Raised again when the image is converted.
            pass
        examples.append(_Example((json_file.relative_to(root).parent / name).as_posix(), json_file, image))
    for image in files.list_files(root, IMAGE_SUFFIXES, recursive=True):
        if not labeled & {Path(os.path.normpath(image)), image.with_suffix("")}:
            examples.append(_Example(image.relative_to(root).as_posix(), None, image))
    return examples, names, max_instances


def _known_names(output_dir: Path, split: str, names: set[str]) -> list[str]:
    """Returns the class names of other splits in a record folder, if they include some names; otherwise nothing."""
    if not (output_dir / dataset_info.FILE_NAME).is_file() or not set(list_splits(output_dir)) - {split}:
        return []
    known = [category.name for category in DatasetInfo.load(output_dir).categories]
    return known if names <= set(known) else []


def _read_json(path: Path) -> dict[str, Any]:
    content = files.read_json(path, "the labelme JSON")
    found = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(shape, dict) for shape in found):
        raise UserError(f"'{path}' has no list 'shapes', so it is not a JSON of labelme; move it to another folder.")
    return content


def _image_path(content: dict[str, Any]) -> PurePosixPath:
    """Returns the path of the image relative to the JSON; on Windows labelme writes backslashes."""
    path = content.get("imagePath")
    if not isinstance(path, str) or not path:
        raise UserError("its JSON has no 'imagePath'; save it again in labelme.")
    return PurePosixPath(path.replace("\\", "/"))


def _read_image(content: dict[str, Any], json_file: Path, root: Path) -> bytes:
    """Reads the image file, or if there is none, the copy of it in the JSON."""
    name = _image_path(content)
    path, tree = json_file.parent / name, Path(os.path.realpath(root)).parent
    if content.get("imageData") and not (path.is_file() and is_inside(path, tree)):
        try:
            return _decode_base64(content["imageData"], "'imageData'")
        except UserError as error:
            raise UserError(f"its JSON {error}; save it again in labelme.") from error
    require_inside(path, tree, str(name))
    return files.read_file(path, "the image")


def _read_shapes(content: dict[str, Any], size: tuple[int, int], info: DatasetInfo) -> list[shapes.Shape]:
    """Reads the shapes; those with the same name and group become one, at the position of the first."""
    class_id_of_name = shapes.class_of_name(info)
    parts: dict[tuple[Any, ...], list[shapes.Runs]] = {}
    for position, shape in enumerate(content["shapes"]):
        label, group = shape.get("label"), shape.get("group_id")
        if not isinstance(label, str) or not isinstance(group, int | str | None):
            raise UserError(
                f"shape {position} has label {label!r} and group_id {group!r}; a label is text, a group_id a number or "
                "null: save it again in labelme."
            )
        if label != _IGNORED and label not in class_id_of_name:
            raise UserError(
                f"shape {position} has the label {label!r}, which is not a class; classes are "
                f"{', '.join(class_id_of_name)}: correct the label, or give all classes with --classes."
            )
        key = (label, "single", position) if group is None else (label, "group", group)
        try:
            parts.setdefault(key, []).append(_runs_of_shape(shape, size))
        except UserError as error:
            raise UserError(f"shape {position}, '{label}', {error}.") from error
    return [shapes.Shape(class_id_of_name.get(key[0]), shapes.merge_runs(runs)) for key, runs in parts.items()]


def _runs_of_shape(shape: dict[str, Any], size: tuple[int, int]) -> shapes.Runs:
    """Returns the pixels of one shape; raises `UserError` with the predicate of a sentence about the shape."""
    kind = shape.get("shape_type") or "polygon"  # Old files have no type.
    points = np.array(_points(shape))  # [N, 2], x and y.
    if kind == "polygon" or (kind == "rectangle" and len(points) == 4):
        return shapes.polygon_runs([points.reshape(-1).tolist()], size)
    if kind not in ("rectangle", "circle", "mask"):
        raise UserError(f"is a {kind}, which has no inside; use polygon, rectangle, circle or mask, or remove it")
    if len(points) != 2:
        raise UserError(f"is a {kind} of {len(points)} points, not of 2; draw it again")
    if kind == "rectangle":
        (left, top), (right, bottom) = points.tolist()
        return shapes.polygon_runs([[left, top, right, top, right, bottom, left, bottom]], size)
    if kind == "circle":  # Its center, and a point on its border.
        (center_x, center_y), radius = points[0], np.hypot(*(points[1] - points[0]))
        rows, columns = np.ogrid[: size[0], : size[1]]
        return shapes.mask_runs(np.hypot(rows + 0.5 - center_y, columns + 0.5 - center_x) <= radius)
    # A mask is an image of the pixels from the first point to the second, both inclusive.
    left, top, right, bottom = points.astype(int).reshape(-1)
    try:
        with Image.open(io.BytesIO(_decode_base64(shape.get("mask"), "'mask'"))) as picture:
            inside = np.asarray(picture).astype(bool)
    except OSError as error:
        raise UserError("has a 'mask' that is not a readable PNG; draw it again") from error
    mask = np.zeros(size, bool)
    if left < 0 or top < 0 or mask[top : bottom + 1, left : right + 1].shape != inside.shape:
        raise UserError("has a 'mask' that does not fit its points, or that extends beyond the image; draw it again")
    mask[top : bottom + 1, left : right + 1] = inside
    return shapes.mask_runs(mask)


def _points(shape: dict[str, Any]) -> list[list[float]]:
    try:
        points = [[float(x), float(y)] for x, y in shape["points"]]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError("has no list 'points' of pairs x, y; draw it again") from error
    if not np.isfinite(points).all():
        raise UserError("has a point with a coordinate that is not a number; draw it again")
    return points


def _decode_base64(text: Any, what: str) -> bytes:
    try:
        return base64.b64decode(text, validate=False)
    except (binascii.Error, TypeError, ValueError) as error:
        raise UserError(f"has {what} that cannot be decoded") from error
