"""Converts an export of Label Studio: a JSON with the tasks and the regions that annotators drew."""

import dataclasses
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Literal, Unpack, get_args
from urllib.parse import parse_qs, unquote, urlsplit

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.convert.file_finder import FileFinder
from deeplab2_like.data.convert.label_studio_rle import decode_brush
from deeplab2_like.data.convert.losses import Losses
from deeplab2_like.data.convert.splits import choose_split
from deeplab2_like.data.dataset_info import DatasetInfo, whole_number
from deeplab2_like.data.images import IMAGE_SUFFIXES, decode_image
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.paths import path_inside
from deeplab2_like.printing import counted

Annotation = Literal["last", "first"]
# What Label Studio puts in front of the name of an uploaded file.
_UPLOAD_PREFIX = re.compile(r"[0-9a-f]{8}-(?=.)")
# Results that are no regions, such as the choices for a whole image.
_NO_REGION = ("choices", "taxonomy", "textarea", "rating", "number", "datetime", "pairwise", "ranker", "relation")
_KINDS = "polygon, brush, rectangle or ellipse"


@dataclasses.dataclass
class _Example:
    """One task.

    Attributes:
        name: The image's file name, relative to the folder of the images.
        results: The results of the annotation that is used.
        fault: A fault of the task, or None.
    """

    name: str
    results: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    fault: str | None = None


def convert_label_studio(
    *,
    json_file: Path,
    images: Path,
    output_dir: Path,
    split: str | None = None,
    classes: Sequence[str] | None = None,
    stuff: Sequence[str] = (),
    background: str | None = None,
    overlap: shapes.Overlap = "smaller-on-top",
    annotation: Annotation = "last",
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one export as one split.

    Polygons, brush masks, rectangles and ellipses are supported, rotated ones, too. A task without an annotation is a
    fault; one whose annotation has no region is an image without objects.

    Args:
        json_file: The export of type JSON (not JSON_MIN).
        images: Folder of the images. They are found by the end of the address in the task, with or without the eight
            letters that Label Studio puts in front of the names of uploaded files.
        output_dir: The record folder.
        split: The split's name; None: see `splits.choose_split`.
        classes: All names, in the order of the class ids. None: those of the record folder, if it has another split
            with all names that occur here, or else the names that occur, in alphabetical order.
        stuff: Names of the classes that are stuff; all others are things.
        background: Name of the class of pixels without a region; None: they are void.
        overlap: Which region wins where several overlap, see `shapes.draw`.
        annotation: Which annotation of a task with several is used, unless one is marked as ground truth.
        encoding: See `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report, or two if images are shared out.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    json_file, images, output_dir = Path(json_file), Path(images), Path(output_dir)
    if annotation not in get_args(Annotation):
        raise unknown_name("choice of annotation", annotation, get_args(Annotation))
    common.require_folder(images, "image folder")
    tasks = _read_tasks(json_file, encoding)
    finder = FileFinder(images)
    examples = [_make_example(task, images, finder, annotation) for task in tasks]
    split, notes = choose_split(
        split, json_file, output_dir=output_dir, source=[json_file, images], val_share=options.get("val_share")
    )
    num_several = sum(len(_annotations(task)) > 1 for task in tasks)
    if num_several:
        notes.append(
            f"{counted(num_several, 'task')} with several annotations: the {annotation} is used, or the ground truth; "
            "--annotation chooses."
        )
    counts = [Counter(label for result in example.results for label in _labels(result)) for example in examples]
    known = common.known_categories(output_dir, split)
    names, class_notes = shapes.choose_names(classes, {name for counter in counts for name in counter}, known)
    if not names:
        raise UserError(f"No region in '{json_file}' has a label; draw some in Label Studio, and export again as JSON.")
    categories = [{"id": number, "name": name} for number, name in enumerate(names, start=1)]
    info = shapes.make_info(categories, name=json_file.stem, stuff=stuff, background=background, known=known)

    def load(example: _Example, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        if example.fault is not None:
            raise UserError(example.fault)
        image = files.read_file(path_inside(images, example.name), "the image")
        size = _size_of_label(example.results)
        if size is None:  # Browsers show images upright.
            image = labeled_images.set_upright(image, example.name, info, losses)
            size = decode_image(image, example.name, bit_depth=info.bit_depth).shape[:2]
        below = shapes.empty_map(size, info, background)
        drawn = list(_read_regions(example.results, size, info, losses))
        return image, shapes.draw(drawn, below, overlap=overlap, info=info, losses=losses)

    return labeled_images.write_labeled_images(
        {split: examples},
        load,
        inputs_of=lambda example: [images / example.name],
        choices={"background": background, "overlap": overlap},
        source=[json_file, images],
        info=info,
        output_dir=output_dir,
        max_instances=max((number for counter in counts for number in counter.values()), default=0),
        notes=[
            *notes,
            *class_notes,
            *shapes.describe_kinds(info, stuff),
            *shapes.warn_of_background(background, sum(counts, Counter()), stuff),
        ],
        **options,
    )


# --- Tasks. -----------------------------------------------------------------------------------------------------------


def _read_tasks(path: Path, encoding: str | None) -> list[dict[str, Any]]:
    content = files.read_json(path, "the JSON of Label Studio", encoding=encoding)
    tasks = [content] if isinstance(content, dict) else content
    if not isinstance(tasks, list) or not tasks or not all(isinstance(task, dict) for task in tasks):
        raise UserError(f"'{path}' is no list of tasks; export from Label Studio as JSON.")
    if not any(isinstance(task.get("data"), dict) for task in tasks):
        raise UserError(
            f"'{path}' has no task with 'data' and 'annotations', as in an export of type JSON-MIN or COCO; export "
            "from Label Studio as JSON."
        )
    return tasks


def _annotations(task: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the annotations of a task that were not cancelled, in the order of the JSON."""
    found = task.get("annotations", task.get("completions"))  # The latter in old versions.
    listed = [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
    return [entry for entry in listed if not entry.get("was_cancelled")]


def _make_example(task: Mapping[str, Any], images: Path, finder: FileFinder, annotation: Annotation) -> _Example:
    """Reads a task; faults are raised when the image is converted."""
    address = _find_address(task)
    if address is None:
        return _Example(
            f"task {task.get('id')}", fault="its task has no address of an image in 'data'; export it again."
        )
    example = _Example(PurePosixPath(address).name)
    try:
        example.name = _find_image(address, images, finder)
        found = _annotations(task)
        if not found:
            raise UserError("it has no annotation; label it, or leave it out of the export.")
        marked = [entry for entry in found if entry.get("ground_truth")]
        chosen = (marked or found)[-1 if annotation == "last" else 0]
        results = chosen.get("result")
        if not isinstance(results, list) or not all(isinstance(result, dict) for result in results):
            raise UserError("its annotation has no list 'result'; export it again.")
        example.results = _join(results)
    except UserError as error:
        example.fault = str(error)
    return example


def _find_address(task: Mapping[str, Any]) -> str | None:
    """Returns the path in the address of a task's image: the text in `data` that is or looks like one."""
    data = task.get("data")
    texts = {key: value for key, value in data.items() if isinstance(value, str)} if isinstance(data, dict) else {}
    paths = {key: _path_of_address(value) for key, value in texts.items()}
    for key in ("image", "img", "image_url"):
        if paths.get(key):
            return paths[key]
    return next((path for path in paths.values() if path.lower().endswith(IMAGE_SUFFIXES)), None)


def _path_of_address(address: str) -> str:
    """Returns the path of an address such as `/data/local-files/?d=a/b.jpg`, `s3://bucket/a/b.jpg` or `a/b.jpg`."""
    try:
        parts = urlsplit(address)
    except ValueError:
        return address
    local = parse_qs(parts.query).get("d")
    if local:
        return local[0].replace("\\", "/").lstrip("/")
    # A drive such as `C:` is no scheme, and `#` and `?` may be part of a file name.
    path = unquote(parts.path) if "://" in address else unquote(address)
    return path.replace("\\", "/").lstrip("/")


def _find_image(path: str, images: Path, finder: FileFinder) -> str:
    """Returns the image's path in the folder; a missing one if there is none, so that reading it fails."""
    folder, name = PurePosixPath(path).parent, PurePosixPath(path).name
    found = finder.find(path)
    if not (images / found).exists():
        plain = finder.find((folder / _UPLOAD_PREFIX.sub("", name, count=1)).as_posix())
        return plain if (images / plain).exists() else name
    return found


# --- Regions. ---------------------------------------------------------------------------------------------------------


def _join(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the regions; a shape and its labels may be two results with the same id."""
    regions: dict[Any, dict[str, Any]] = {}
    for position, result in enumerate(results):
        kind = result.get("type")
        if kind in _NO_REGION or not isinstance(result.get("value"), dict):
            continue
        key = result.get("id", position)
        known = regions.get(repr(key))
        if known is None:
            regions[repr(key)] = result
        else:
            regions[repr(key)] = {**known, **result, "value": {**known["value"], **result["value"]}}
    return list(regions.values())


def _labels(result: Mapping[str, Any]) -> list[str]:
    """Returns the labels of a region, which are a list such as `polygonlabels`; equal ones count once."""
    found: list[str] = []
    for key, value in result["value"].items():
        if key.endswith("labels") and isinstance(value, list):
            found += [label for label in value if isinstance(label, str) and label not in found]
    return found


def _size_of_label(results: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Returns height and width of the image as it was labeled, None if no region gives them."""
    for result in results:
        height, width = result.get("original_height"), result.get("original_width")
        if height is None or width is None:
            continue
        try:
            return whole_number(height), whole_number(width)
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(
                f"a region has original_height {height!r} and original_width {width!r}, which are no whole numbers; "
                "export it again."
            ) from error
    return None


def _read_regions(
    results: Sequence[Mapping[str, Any]], size: tuple[int, int], info: DatasetInfo, losses: Losses
) -> Iterator[shapes.Shape]:
    class_of_name = shapes.class_of_name(info)
    for position, result in enumerate(results):
        labels = _labels(result)
        try:
            if len(labels) != 1:
                raise UserError(f"has {len(labels)} labels, but a region has one; give it one class")
            if labels[0] not in class_of_name:
                raise UserError(
                    f"has the label '{labels[0]}', which is not a class; classes are {', '.join(class_of_name)}: give "
                    "all with --classes"
                )
            yield shapes.Shape(class_of_name[labels[0]], _runs_of_region(result, size))
        except UserError as error:
            fault = UserError(f"region {result.get('id', position)} {error}.")
            losses.leave_out(fault, labels[0] if labels else "regions without a label")


def _runs_of_region(result: Mapping[str, Any], size: tuple[int, int]) -> shapes.Runs:
    """Returns the pixels of a region; raises `UserError` with the predicate of a sentence about it."""
    value = result["value"]
    if result.get("image_rotation"):
        raise UserError(f"was drawn on the image rotated by {result['image_rotation']} degrees; undo the rotation")
    if "rle" in value:
        try:
            return shapes.mask_runs(decode_brush(value["rle"], size))
        except (ValueError, TypeError, OverflowError) as error:
            raise UserError(f"has run lengths that cannot be read ({error}); export it again") from error
    if "points" in value:
        try:
            points = np.array([[float(x), float(y)] for x, y in value["points"]]).reshape(-1, 2)
        except (ValueError, TypeError, LookupError) as error:
            raise UserError("has no list 'points' of pairs x, y; draw it again") from error
        return _polygon(points, size)
    if "radiusX" in value:
        x, y, radius_x, radius_y, turn = _numbers(value, ("x", "y", "radiusX", "radiusY"))
        return shapes.mask_runs(_ellipse(x, y, radius_x, radius_y, turn, size))
    if "width" in value:
        x, y, box_width, box_height, turn = _numbers(value, ("x", "y", "width", "height"))
        corners = np.array([[0, 0], [box_width, 0], [box_width, box_height], [0, box_height]])
        return _polygon(_rotate(corners, turn, size) + np.array([x, y]), size)
    raise UserError(f"is a {result.get('type')}, which has no inside; use {_KINDS}")


def _numbers(value: Mapping[str, Any], names: Sequence[str]) -> list[float]:
    """Returns some numbers of a region, and its rotation in radians."""
    try:
        numbers = [float(value[name]) for name in names] + [np.deg2rad(float(value.get("rotation") or 0))]
    except (LookupError, TypeError, ValueError) as error:
        raise UserError(f"lacks a number among {', '.join(names)}; draw it again") from error
    if not np.isfinite(numbers).all():
        raise UserError(f"has no number in {', '.join(names)}; draw it again")
    return numbers


def _rotate(offsets: np.ndarray, turn: float, size: tuple[int, int]) -> np.ndarray:
    """Rotates offsets, [N, 2] as x and y in percent of the image, clockwise in pixels; returns them in percent."""
    pixels = offsets * (size[1], size[0])
    rotation = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    return pixels @ rotation / (size[1], size[0])


def _polygon(points: np.ndarray, size: tuple[int, int]) -> shapes.Runs:
    """Returns the pixels inside a polygon of points, [N, 2] as x and y in percent of the image."""
    height, width = size
    if len(points) < 3:
        raise UserError(f"has {len(points)} points, but a polygon has three or more; draw it again")
    return shapes.polygon_runs([(points * (width / 100, height / 100)).reshape(-1).tolist()], size)


def _ellipse(x: float, y: float, radius_x: float, radius_y: float, turn: float, size: tuple[int, int]) -> np.ndarray:
    """Returns the pixels, bool [H, W], whose centers are in an ellipse around x and y, all in percent of the image."""
    height, width = size
    if radius_x <= 0 or radius_y <= 0:
        return np.zeros(size, bool)
    rows, columns = np.ogrid[:height, :width]
    across, down = columns + 0.5 - x * width / 100, rows + 0.5 - y * height / 100
    along = across * np.cos(turn) + down * np.sin(turn)
    aside = down * np.cos(turn) - across * np.sin(turn)
    return (along / (radius_x * width / 100)) ** 2 + (aside / (radius_y * height / 100)) ** 2 <= 1
