"""Shapes that may overlap, as labelling tools write them, made one panoptic map in which every pixel has one owner.

Coordinates are those of COCO and CVAT: the pixel in column x and row y covers x to x + 1 and y to y + 1.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
from pycocotools import mask as coco_mask

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError, unknown_name

# Pixels: of any image that can be labelled with polygons, and of the points that may lie outside of it.
_LARGEST_IMAGE, _LARGEST_COORDINATE = 2**28, 1e6

Overlap = Literal["smaller-on-top", "later-on-top"]
# A mask in the run-length encoding of pycocotools, which is small where masks of all instances would not be.
Runs = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """One object or region.

    Attributes:
        class_id: Contiguous class id, or None for void.
        runs: Which pixels it covers.
        is_crowd: Whether it is a crowd region, which gives way to all other shapes.
    """

    class_id: int | None
    runs: Runs
    is_crowd: bool = False


def draw(shapes: Sequence[Shape], below: np.ndarray, *, overlap: Overlap, info: DatasetInfo) -> np.ndarray:
    """Draws shapes over a panoptic map.

    Instances of a thing class are numbered from 1 in the order of the shapes.

    Args:
        shapes: In the order of the file.
        below: int32 [H, W], what is seen where no shape is.
        overlap: Who owns a pixel of several shapes: the smaller one by its number of pixels (of equal ones the later),
            or the later one. Crowd regions are below all others in either case.
        info: The data set's facts.

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
        area = int(coco_mask.area(shape.runs)) if overlap == "smaller-on-top" else 0
        layers.append(((not is_crowd, -area), value, shape.runs))
    panoptic = below.copy()
    for _, value, runs in sorted(layers, key=lambda layer: layer[0]):  # Stable, so that the order of the file decides.
        panoptic[decode_runs(runs)] = value
    return panoptic


def make_info(
    categories: Sequence[Mapping[str, Any]], *, name: str, stuff: Sequence[str] = (), background: str | None = None
) -> DatasetInfo:
    """Says which classes are stuff, which labelling tools do not know.

    Args:
        categories: As in a COCO JSON; a category without `isthing` is a thing.
        name: The data set's name, for messages.
        stuff: Names of the classes that are stuff.
        background: Name of the class of pixels without a shape: one of the categories, which then is stuff, or another,
            which becomes the last class. None: there is none, these pixels are void.

    Raises:
        UserError: If a name in `stuff` is unknown, or a category is faulty.
    """
    completed = [dict(category) for category in categories]
    names = [str(category.get("name")) for category in completed]
    for stuff_name in stuff:
        if stuff_name not in (*names, background):
            raise unknown_name("class in the list of stuff", stuff_name, names)
    if background is not None and background not in names:
        ids = [category["id"] for category in completed if isinstance(category.get("id"), int)]
        completed.append({"id": max(ids, default=0) + 1, "name": background})
    for category in completed:
        is_stuff = category.get("name") in (*stuff, background)
        category["isthing"] = 0 if is_stuff else category.get("isthing", 1)
    return DatasetInfo.from_coco_categories(completed, name=name)


def class_of_name(info: DatasetInfo) -> dict[str, int]:
    """Maps names to class ids (contiguous)."""
    return {category.name: class_id for class_id, category in enumerate(info.categories)}


def empty_map(size: tuple[int, int], info: DatasetInfo, background: str | None) -> np.ndarray:
    """Returns a panoptic map, int32 [H, W] of `size`, full of the background class, or of void if it is None."""
    if min(size) < 1 or size[0] * size[1] > _LARGEST_IMAGE:
        raise UserError(f"its height and width are given as {size[0]} and {size[1]}, which no image has; correct them.")
    value = info.void if background is None else class_of_name(info)[background] * info.label_divisor
    return np.full(size, value, np.int32)


def polygon_runs(polygons: Any, size: tuple[int, int]) -> Runs:
    """The pixels inside of any of some polygons.

    Args:
        polygons: For each a list x0, y0, x1, y1, ... of three points or more.
        size: Height and width of the image.

    Raises:
        UserError: If they are not such lists.
    """
    for polygon in polygons:
        # Of four numbers pycocotools would make a box.
        if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
            raise UserError("has a polygon that is no list x, y, x, y, ... of three points or more")
        if not all(isinstance(number, int | float) and np.isfinite(number) for number in polygon):
            raise UserError("has a polygon with a coordinate that is no number")
        # pycocotools draws outside of the image, too, and ends the program where that takes too much memory.
        if max(map(abs, polygon)) > _LARGEST_COORDINATE:
            raise UserError("has a polygon with a coordinate far outside of the image")
    height, width = size
    return coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))


def mask_runs(mask: np.ndarray) -> Runs:
    """The pixels of a mask, bool [H, W]."""
    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def merge_runs(parts: Sequence[Runs]) -> Runs:
    """The pixels of any of the parts."""
    return coco_mask.merge(list(parts))


def decode_runs(runs: Runs) -> np.ndarray:
    """Returns the mask, bool [H, W], of run lengths in the text that pycocotools packs them into.

    pycocotools has this, too, but warns with NumPy 2, and makes masks of anything if the lengths do not fit the size.

    Raises:
        ValueError: If the lengths do not fit the size.
    """
    height, width = runs["size"]
    counts: list[int] = []
    count = shift = 0
    # Numbers in groups of five bits, the lowest first; bit 5 says that more groups follow, bit 4 of the last one is the
    # sign. From the fourth number on they are differences to the last number but one.
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
    is_inside = np.arange(len(counts)) % 2 == 1  # Runs outside and inside take turns, down the columns.
    return np.repeat(is_inside, counts).reshape(width, height).T
