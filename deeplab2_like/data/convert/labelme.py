"""Converts a folder of labelme: a JSON per image with the shapes that an annotator drew.

labelme's files have class names but do not say which classes are stuff, so the user names those.
"""

import base64
import binascii
import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.convert.coco_json import number_or_text
from deeplab2_like.data.convert.losses import FAULTY, Losses
from deeplab2_like.data.convert.splits import divide, split_of_folder
from deeplab2_like.data.dataset_info import DatasetInfo, whole_number
from deeplab2_like.data.exif import find_orientation
from deeplab2_like.data.images import IMAGE_SUFFIXES, decode_image, decode_label
from deeplab2_like.errors import UserError
from deeplab2_like.paths import is_inside, require_inside
from deeplab2_like.printing import counted

# labelme's own name for regions to ignore in training.
_IGNORED = "__ignore__"
# The EXIF orientations from this one on swap height and width.
_FIRST_SWAPPING = 5


@dataclasses.dataclass(frozen=True)
class _Example:
    """One image.

    Attributes:
        name: The image's file name, in the folder of its JSON relative to the root.
        json_file: Its JSON; None if the image has none.
        image: The image; None if it is only in the JSON, or is missing.
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
    ignore_subsets: bool = False,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts a folder of labelme and the folders in it, as one split or, if these are `train` and `val`, as several.

    Polygons, rectangles, circles and masks are supported. Shapes of a thing class with the same `group_id` are one
    object. Shapes named `__ignore__` become void.

    The JSONs give the paths of the images, which must be in `root` or its parent folder: it is common to have labels
    and images in two folders side by side, with `"imagePath": "../images/a.jpg"`. If there is no such image, as after a
    move to another machine, the one beside the JSON is taken that has its name or that of the JSON, or else the copy in
    the JSON. A JSON with a path elsewhere is refused otherwise.

    Args:
        root: Folder of the JSONs.
        output_dir: The record folder.
        split: The split's name; None: see `splits.choose_split`. If the folders in `root` are splits, only this one is
            converted, or all if it is None.
        classes: All names, in the order of the class ids. None: those of the record folder, if it has another split
            with all names that occur here, or else the names that occur, in alphabetical order.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of pixels without a shape; None: they are void.
        overlap: Which shape wins where several overlap, see `shapes.draw`.
        ignore_subsets: Whether folders such as `train` and `val` belong to one split all the same.
        encoding: Encoding of JSONs that are not UTF-8, such as "gbk", see `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    root, output_dir = Path(root), Path(output_dir)
    common.require_folder(root, "labelme folder")
    scan = _scan(root, encoding)
    if not any(example.json_file for example in scan.examples):
        raise UserError(f"'{root}' has no JSON of labelme; give the folder in which labelme saves them.")
    division = divide(
        scan.examples,
        lambda example: split_of_folder(example.name),
        split=split,
        ignore_subsets=ignore_subsets,
        where=f"'{root}'",
        paths=[root],
        output_dir=output_dir,
        source=[root],
        val_share=options.get("val_share"),
    )
    known = common.known_categories(output_dir, division.first)
    names, class_notes = shapes.choose_names(classes, scan.names, known)
    if not names:
        raise scan.first_fault or UserError(
            f"No shape in the JSONs of '{root}' has a label; draw some in labelme, or give the classes with --classes."
        )
    info = shapes.make_info(
        [{"id": number, "name": name} for number, name in enumerate(names, start=1)],
        name=root.name,
        stuff=stuff,
        background=background,
        known=known,
    )

    def load(example: _Example, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        if example.json_file is None:
            raise UserError(
                "it has no JSON of the same name beside it; label it in labelme, or move it to another folder."
            )
        content = _read_json(example.json_file, encoding)
        image = _read_image(content, example.json_file, example.image, root)
        size = _size_in_json(content, example.json_file)
        stored = decode_image(image, example.name, bit_depth=info.bit_depth).shape[:2]
        # labelme shows images turned by their EXIF orientation. Other tools that write its JSONs may not.
        if size != stored or stored[0] == stored[1] or find_orientation(image) < _FIRST_SWAPPING:
            image = labeled_images.set_upright(image, example.name, info, losses)
        size = size or decode_image(image, example.name, bit_depth=info.bit_depth).shape[:2]
        below = shapes.empty_map(size, info, background)
        drawn = _read_shapes(content, size, info, losses)
        return image, shapes.draw(drawn, below, overlap=overlap, info=info, losses=losses)

    return labeled_images.write_labeled_images(
        division.splits,
        load,
        inputs_of=lambda example: [path for path in (example.image, example.json_file) if path is not None],
        choices={"background": background, "overlap": overlap, "encoding": encoding},
        source=[root],
        info=info,
        output_dir=output_dir,
        max_instances=scan.max_instances,
        notes=[
            *division.notes,
            *class_notes,
            *shapes.describe_kinds(info, stuff),
            *shapes.warn_of_background(background, scan.objects, stuff),
            *scan.notes,
        ],
        by_subsets=division.by_subsets,
        **options,
    )


@dataclasses.dataclass
class _Scan:
    """What a folder of labelme holds.

    Attributes:
        examples: JSONs, and images without one.
        names: All class names.
        objects: Number of shapes of each class.
        max_instances: The largest number of shapes with the same name in an image.
        first_fault: The fault of the first JSON that cannot be read, or None.
        notes: Sentences for the user.
    """

    examples: list[_Example] = dataclasses.field(default_factory=list)
    names: set[str] = dataclasses.field(default_factory=set)
    objects: Counter[str] = dataclasses.field(default_factory=Counter)
    max_instances: int = 0
    first_fault: UserError | None = None
    notes: list[str] = dataclasses.field(default_factory=list)


def _scan(root: Path, encoding: str | None) -> _Scan:
    """Lists JSONs, and images without one; faults are raised again when the image is converted."""
    scan = _Scan()
    labeled = set()  # Paths of images, and of JSONs without suffix.
    num_elsewhere = 0
    for json_file in files.list_files(root, (".json",), recursive=True):
        name, image = json_file.stem, None
        labeled.add(json_file.with_suffix(""))
        try:
            content = _read_json(json_file, encoding)
            labels = [shape.get("label") for shape in content["shapes"]]
            counts = Counter(label for label in labels if isinstance(label, str))
            counts.pop(_IGNORED, None)
            scan.names |= set(counts)
            scan.objects += counts
            scan.max_instances = max(scan.max_instances, *counts.values(), 0)
            given = _image_path(content)
            name = json_file.stem if given is None else given.name
            image = _find_image(content, json_file, root)
            if image is not None:
                name = image.name
                is_given = given is not None and image == Path(os.path.normpath(json_file.parent / given))
                num_elsewhere += not is_given
            for position, shape in enumerate(content["shapes"]):
                _require_label(shape, position)
        except UserError as error:
            named = str(error) if str(json_file) in str(error) else f"'{json_file}': {error}"
            scan.first_fault = scan.first_fault or UserError(named)
        if image is not None:
            labeled.add(Path(os.path.normpath(image)))
        scan.examples.append(_Example((json_file.relative_to(root).parent / name).as_posix(), json_file, image))
    for image in files.list_files(root, IMAGE_SUFFIXES, recursive=True):
        if not labeled & {Path(os.path.normpath(image)), image.with_suffix("")}:
            scan.examples.append(_Example(image.relative_to(root).as_posix(), None, image))
    if num_elsewhere:
        scan.notes.append(
            f"{counted(num_elsewhere, 'image')} found beside the JSON, because there is none at its 'imagePath'."
        )
    return scan


def _read_json(path: Path, encoding: str | None) -> dict[str, Any]:
    content = files.read_json(path, "the labelme JSON", encoding=encoding)
    found = content.get("shapes") if isinstance(content, dict) else None
    if not isinstance(found, list) or not all(isinstance(shape, dict) for shape in found):
        raise UserError(f"'{path}' has no list 'shapes', so it is not a JSON of labelme; move it to another folder.")
    return content


def _size_in_json(content: dict[str, Any], json_file: Path) -> tuple[int, int] | None:
    """Returns height and width that a JSON gives, or None if it does not."""
    height, width = content.get("imageHeight"), content.get("imageWidth")
    if height is None or width is None:
        return None
    try:
        return whole_number(height), whole_number(width)
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(
            f"'{json_file}' has imageHeight {height!r} and imageWidth {width!r}, which are no whole numbers; save it "
            "again in labelme."
        ) from error


def _image_path(content: dict[str, Any]) -> PurePosixPath | None:
    """Returns the path of the image relative to the JSON, None if there is none; on Windows it has backslashes."""
    path = content.get("imagePath")
    return PurePosixPath(path.replace("\\", "/")) if isinstance(path, str) and path else None


def _find_image(content: dict[str, Any], json_file: Path, root: Path) -> Path | None:
    """Finds the image of a JSON: at its path, or beside it under its name or that of the JSON.

    Returns:
        The image; a path that does not exist if the JSON gives one and holds no copy; None if the copy is to be taken.

    Raises:
        UserError: If there is neither a file nor a copy, and the path is missing or leads too far.
    """
    given, tree = _image_path(content), Path(os.path.realpath(root)).parent
    candidates = [] if given is None else [json_file.parent / given, json_file.parent / given.name]
    candidates += [json_file.with_suffix(suffix) for suffix in IMAGE_SUFFIXES]
    for path in candidates:
        if os.path.exists(path) and is_inside(path, tree):
            return Path(os.path.normpath(path))
    if content.get("imageData"):
        return None
    if given is None:
        raise UserError(
            f"'{json_file}' has no 'imagePath', and no image of its name is beside it; save it again in labelme."
        )
    require_inside(json_file.parent / given, tree, str(given))
    return Path(os.path.normpath(json_file.parent / given))


def _read_image(content: dict[str, Any], json_file: Path, image: Path | None, root: Path) -> bytes:
    """Reads the image file, or if there is none, the copy of it in the JSON."""
    path = image or _find_image(content, json_file, root)
    if path is not None:
        require_inside(path, Path(os.path.realpath(root)).parent, str(content.get("imagePath")))
        return files.read_file(path, "the image")
    try:
        return _decode_base64(content["imageData"], "'imageData'")
    except UserError as error:
        raise UserError(f"its JSON {error}; save it again in labelme.") from error


def _require_label(shape: dict[str, Any], position: int) -> None:
    """Raises `UserError` unless label and group of a shape are of the right kinds."""
    label, group = shape.get("label"), number_or_text(shape.get("group_id"))
    if not isinstance(label, str) or not isinstance(group, int | str | None):
        raise UserError(
            f"shape {position} has label {label!r} and group_id {group!r}; a label is text, a group_id a number or "
            "null: save it again in labelme."
        )


def _read_shapes(
    content: dict[str, Any], size: tuple[int, int], info: DatasetInfo, losses: Losses
) -> list[shapes.Shape]:
    """Reads the shapes; those with the same name and group become one, at the position of the first."""
    class_id_of_name = shapes.class_of_name(info)
    parts: dict[tuple[Any, ...], list[shapes.Runs]] = {}
    for position, shape in enumerate(content["shapes"]):
        num_faults = len(losses.faults)
        with losses.skip_faulty():
            _require_label(shape, position)
            label, group = shape["label"], number_or_text(shape.get("group_id"))
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
        if len(losses.faults) > num_faults:
            losses.add(FAULTY, str(shape.get("label")), objects=1)
    return [shapes.Shape(class_id_of_name.get(key[0]), shapes.merge_runs(runs)) for key, runs in parts.items() if runs]


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
    content = _decode_base64(shape.get("mask"), "'mask'")
    try:
        inside = decode_label(content, "has a 'mask' that").astype(bool)
    except UserError as error:
        raise UserError(str(error).removesuffix(".")) from error
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
