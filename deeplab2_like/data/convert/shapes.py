"""Draws the shapes of labeling tools, which may overlap, into a panoptic map.

Coordinates are those of COCO and CVAT: the pixel in column x and row y covers x to x + 1 and y to y + 1.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from pycocotools import mask as coco_mask

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.convert.losses import CROWD, EMPTY, HIDDEN, IGNORED, Losses
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.image_headers import require_size
from deeplab2_like.data.label_runs import find_run_values
from deeplab2_like.errors import UserError, unknown_name
from deeplab2_like.printing import counted

# In pixels. The points of polygons are never farther outside of an image.
_LARGEST_COORDINATE = 1e6

# Of the things, so many are listed for the user.
_MAX_LISTED = 10

Overlap = Literal["smaller-on-top", "later-on-top"]
# A mask in the run-length encoding of pycocotools. Dense masks of all instances would need too much memory.
Runs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One object or region.

    Attributes:
        class_id: Contiguous class id, or None for void.
        runs: The pixels it covers.
        is_crowd: Whether it is a crowd region, which is below all other shapes.
    """

    class_id: int | None
    runs: Runs
    is_crowd: bool = False


def draw(
    shapes: Sequence[Shape], below: np.ndarray, *, overlap: Overlap, info: DatasetInfo, losses: Losses
) -> np.ndarray:
    """Draws shapes over a panoptic map and resolves their overlaps.

    Instances of a thing class are numbered from 1 in the order of the shapes.

    Args:
        shapes: In the order of the file.
        below: int32 [H, W], the panoptic map where there is no shape.
        overlap: Which shape is on top: the one with fewer pixels (of equal ones the later), or the later one. Crowd
            regions are below all others in either case.
        info: The meaning of the panoptic map.
        losses: Counts crowd regions, and shapes that have no pixel or are covered by others.

    Returns:
        int32 [H, W], panoptic map.

    Raises:
        UserError: If `overlap` is unknown.
    """
    if overlap not in get_args(Overlap):
        raise unknown_name("overlap rule", overlap, get_args(Overlap))
    instances = [0] * info.num_classes
    layers = []
    for shape in shapes:
        value, is_crowd = info.void, shape.is_crowd
        if shape.class_id is not None:
            instance = 0
            if info.categories[shape.class_id].is_thing and not is_crowd:
                instances[shape.class_id] += 1
                instance = instances[shape.class_id]
            value = panoptic_label.encode(shape.class_id, instance, info.label_divisor)
        area = int(coco_mask.area(shape.runs))
        layers.append(((not is_crowd, -area if overlap == "smaller-on-top" else 0), value, shape.runs))
        name = "" if shape.class_id is None else info.categories[shape.class_id].name
        if shape.class_id is None:
            losses.add(IGNORED, "shapes to be ignored", objects=1, pixels=area)
        elif area == 0:
            losses.add(EMPTY, name, objects=1)
        elif is_crowd and info.categories[shape.class_id].is_thing:
            losses.add(CROWD, name, objects=1)
    panoptic = below.copy()
    for _, value, runs in sorted(layers, key=lambda layer: layer[0]):  # Stable: of equal keys the later is on top.
        panoptic[decode_runs(runs)] = value
    lengths, (values,) = find_run_values(panoptic.reshape(-1))
    visible: Counter[int] = Counter()
    for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
        visible[value] += length
    for _, value, runs in layers:
        if value % info.label_divisor:
            area = int(coco_mask.area(runs))
            name = info.categories[value // info.label_divisor].name
            losses.add(HIDDEN, name, objects=int(area > 0 and not visible[value]), pixels=area - visible[value])
    return panoptic


def make_info(
    categories: Sequence[Mapping[str, Any]],
    *,
    name: str,
    stuff: Sequence[str] = (),
    background: str | None = None,
    known: Sequence[Category] = (),
) -> DatasetInfo:
    """Makes the `DatasetInfo` of a labeling tool's classes, which do not say what is stuff.

    Args:
        categories: As in a COCO JSON; a category without `isthing` is a thing.
        name: The data set's name for error messages.
        stuff: Names of the classes that are stuff.
        background: Name of the class of pixels without a shape: one of the categories, which becomes stuff, or a new
            name, which becomes the last class. None: these pixels are void.
        known: The classes of other splits; a background that is not a category has the same id as there.

    Returns:
        The classes in the order of the categories.

    Raises:
        UserError: If a name in `stuff` is unknown, or a category is faulty.
    """
    completed = [dict(category) for category in categories]
    names = [str(category.get("name")) for category in completed]
    for stuff_name in stuff:
        if stuff_name not in (*names, background):
            raise unknown_name("class in the list of stuff", stuff_name, names)
    if background is not None and background not in names:
        completed.append({"id": free_id(background, completed, known), "name": background})
    for category in completed:
        is_stuff = category.get("name") in (*stuff, background)
        category["isthing"] = 0 if is_stuff else 1 if category.get("isthing") is None else category["isthing"]
    return DatasetInfo.from_coco_categories(completed, name=name)


def choose_names(
    given: Sequence[str] | None, found: Collection[str], known: Sequence[Category]
) -> tuple[list[str], list[str]]:
    """Chooses the class names, in the order of the class ids, of a tool whose files do not list them.

    Args:
        given: The names that the user gave, or None.
        found: The names that occur.
        known: The classes of other splits.

    Returns:
        The given names, or those of other splits if they include all that occur, or else the names that occur, in
        alphabetical order; and a sentence for the user if the names are not given.
    """
    if given is not None:
        return list(given), []
    known_names = [category.name for category in known]
    names = known_names if known and set(found) <= set(known_names) else sorted(found)
    return names, [f"The classes are {', '.join(names)}, in this order; --classes gives others."]


def describe_kinds(info: DatasetInfo, stuff: Sequence[str]) -> list[str]:
    """Returns a sentence for the user if classes are things because nothing says otherwise."""
    things = [info.categories[class_id].name for class_id in info.thing_classes]
    if stuff or not things:
        return []
    listed = ", ".join(things[:_MAX_LISTED]) + (
        f" and {len(things) - _MAX_LISTED} more" if len(things) > _MAX_LISTED else ""
    )
    return [f"Things, because nothing says that they are stuff: {listed}; --stuff NAME ... names stuff."]


def warn_of_background(background: str | None, objects: Mapping[str, int], stuff: Collection[str] = ()) -> list[str]:
    """Returns a warning if objects are lost because their class is the background.

    Args:
        background: Name of the class of pixels without a shape, or None.
        objects: Number of objects of each class in the source, by name.
        stuff: Names of the classes that are stuff, which have no objects anyway.
    """
    number = 0 if background is None or background in stuff else objects.get(background, 0)
    if not number:
        return []
    return [
        f"Warning: {counted(number, 'object')} of the class '{background}' became background, which is stuff; "
        "--background with a name that is not a class keeps them."
    ]


def free_id(name: str, categories: Sequence[Mapping[str, Any]], known: Sequence[Category]) -> int:
    """Returns the id of a class that the categories lack: the same as in other splits, or else a new one."""
    ids = [category["id"] for category in categories if isinstance(category.get("id"), int)]
    for category in known:
        if category.name == name and category.id not in ids:
            return category.id
    return max([*ids, *(category.id for category in known)], default=0) + 1


def class_of_name(info: DatasetInfo) -> dict[str, int]:
    """Returns the contiguous class id of each class name."""
    return {category.name: class_id for class_id, category in enumerate(info.categories)}


def empty_map(size: tuple[int, int], info: DatasetInfo, background: str | None) -> np.ndarray:
    """Returns a panoptic map, int32 [H, W], filled with the background class, or with void if it is None.

    Raises:
        UserError: If the size is not that of an image, or has more pixels than the limit.
    """
    if min(size) < 1:
        raise UserError(
            f"its height and width are given as {size[0]} and {size[1]}, which is impossible; correct them."
        )
    require_size(*size, "its label")
    value = info.void if background is None else class_of_name(info)[background] * info.label_divisor
    return np.full(size, value, np.int32)


def polygon_runs(polygons: Any, size: tuple[int, int]) -> Runs:
    """Returns the pixels inside any of some polygons.

    Args:
        polygons: For each polygon a list x0, y0, x1, y1, ... of three or more points.
        size: Height and width of the image.

    Returns:
        The union of the polygons.

    Raises:
        UserError: If a polygon is not such a list; the message is the predicate of a sentence about the shape.
    """
    height, width = size
    return coco_mask.merge(coco_mask.frPyObjects([read_polygon(polygon) for polygon in polygons], height, width))


def read_polygon(polygon: Any) -> list[float]:
    """Reads a polygon x0, y0, x1, y1, ... of three points or more; numbers may be text.

    Raises:
        UserError: If it is not such a list; the message is the predicate of a sentence about the shape.
    """
    if isinstance(polygon, list) and any(isinstance(part, list) for part in polygon):
        raise UserError("has a polygon of pairs [x, y], but it must be a flat list x, y, x, y, ...; correct the JSON")
    # pycocotools would take four numbers for a box.
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        raise UserError("has a polygon that is not a list x, y, x, y, ... of three points or more; correct the JSON")
    try:
        numbers = [float(number) for number in polygon]
    except (TypeError, ValueError, OverflowError):
        numbers = [math.nan]
    if not all(map(math.isfinite, numbers)):
        raise UserError("has a polygon with a coordinate that is not a number; correct the JSON")
    # pycocotools also draws outside of the image, and aborts the process if it runs out of memory there.
    if max(map(abs, numbers)) > _LARGEST_COORDINATE:
        raise UserError("has a polygon with a coordinate far outside of the image; correct the JSON")
    return numbers


def mask_runs(mask: np.ndarray) -> Runs:
    """Returns the pixels of a mask, bool [H, W]."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def merge_runs(parts: Sequence[Runs]) -> Runs:
    """Returns the union of some masks."""
    return coco_mask.merge(list(parts))


def decode_runs(runs: Runs) -> np.ndarray:
    """Decodes the compressed run lengths of pycocotools.

    `pycocotools.mask.decode` warns with NumPy 2, and returns garbage if the lengths do not fit the size.

    Returns:
        bool [H, W].

    Raises:
        ValueError: If the lengths do not fit the size.
    """
    height, width = runs["size"]
    counts: list[int] = []
    count = shift = 0
    # Numbers are groups of five bits, the lowest first. Bit 5 says that another group follows, bit 4 of the last group
    # is the sign. From the fourth number on they are differences to the last but one.
    for code in runs["counts"]:
        count |= (code - 48 & 31) << shift
        shift += 5
        if code - 48 & 32:
            continue
        if code - 48 & 16:
            count -= 1 << shift
        counts.append(count + (counts[-2] if len(counts) > 2 else 0))
        count = shift = 0
    if sum(counts) != height * width or min(counts, default=0) < 0:
        raise ValueError(f"they cover {sum(counts)} of {height * width} pixels")
    is_inside = np.arange(len(counts)) % 2 == 1  # Runs outside and inside alternate, column by column.
    return np.repeat(is_inside, counts).reshape(width, height).T
