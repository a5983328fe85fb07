"""The objects of a COCO instance JSON, such as `instances_val2017.json`, as the ground truth of AP.

Papers report AP on these annotations. They differ from those of a panoptic map: objects may overlap, small ones are not
hidden by others, and boxes and areas are given by the file.
"""

import math
import os
from collections import Counter, defaultdict
from pathlib import Path, PurePosixPath
from typing import Any

from pycocotools import mask as mask_utils

from deeplab2_like.data.convert.coco_instances import read_instance_json, read_shape
from deeplab2_like.data.convert.shapes import class_of_name
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.files import image_id_of_name


class InstanceAnnotations:
    """The annotations of a COCO instance JSON, by image.

    Categories that are no things of the data set are left out.

    Args:
        json_file: The JSON, with `images`, `annotations` and `categories`.
        dataset_info: The classes of the predictions; their ids and names must be those of the JSON.

    Attributes:
        name: The file name of the JSON.
        notes: Sentences for the user on what the JSON and the data set do not share.

    Raises:
        UserError: If the file is not such a JSON, or a category has another id or name than in the data set.
    """

    def __init__(self, json_file: str | os.PathLike[str], dataset_info: DatasetInfo) -> None:
        self._path = Path(json_file)
        self._info = dataset_info
        self.name = self._path.name
        content = read_instance_json(self._path)
        things = self._match_categories(content["categories"])
        self._images: dict[tuple[str, Any], list[dict[str, Any]]] = defaultdict(list)
        image_ids = set()
        for position, image in enumerate(content["images"]):
            for key in self._keys_of_image(image, position):
                self._images[key].append(image)
            image_ids.add(image["id"])
        category_ids = {category["id"] for category in content["categories"]}
        # Image id -> positions and annotations.
        self._annotations: dict[Any, list[tuple[int, dict[str, Any]]]] = defaultdict(list)
        for position, annotation in enumerate(content["annotations"]):
            image_id = annotation.get("image_id")
            if not isinstance(image_id, int | str) or image_id not in image_ids:
                raise UserError(
                    f"'{self._path}': entry {position} of 'annotations' has image_id {image_id!r}, which 'images' does "
                    "not list; add it there."
                )
            category_id = annotation.get("category_id")
            if not isinstance(category_id, int) or category_id not in category_ids:
                raise UserError(
                    f"'{self._path}': entry {position} of 'annotations' has category_id {category_id!r}, which "
                    "'categories' does not list; add it there."
                )
            if category_id in things:
                self._annotations[image_id].append((position, annotation))
        self.notes = self._describe_differences(content, things)

    def of_image(self, name: str, size: tuple[int, int]) -> list[dict[str, Any]]:
        """Returns the objects of an image as COCO annotations without ids, with contiguous class ids.

        Args:
            name: The name of the image: its file name, with or without folder and suffix, or its id in the JSON.
            size: Height and width of the image.

        Raises:
            UserError: If the JSON does not have the image, gives it another size, or an annotation is faulty.
        """
        image = self._find_image(name)
        if (image.get("height"), image.get("width")) != size:
            raise UserError(
                f"'{self._path}' gives image '{name}' the height and width {image.get('height')} and "
                f"{image.get('width')}, but its label has {size[0]} and {size[1]}; use the JSON of these images."
            )
        try:
            return [
                self._read_object(annotation, position, size) for position, annotation in self._annotations[image["id"]]
            ]
        except UserError as error:
            raise UserError(f"'{self._path}', image '{name}': {error}") from error

    def _find_image(self, name: str) -> dict[str, Any]:
        stem = PurePosixPath(name).stem
        for key in (("name", name), ("stem", stem), ("id", image_id_of_name(stem))):
            found = self._images.get(key, [])
            if len(found) > 1:
                raise UserError(
                    f"'{self._path}' has {len(found)} images that may be '{name}', such as '{found[0]['file_name']}' "
                    f"and '{found[1]['file_name']}'; give the JSON the names of the images in the records."
                )
            if found:
                return found[0]
        raise UserError(
            f"'{self._path}' has no image '{name}', neither by file name nor by id; give the JSON of the split that is "
            "evaluated."
        )

    def _keys_of_image(self, image: dict[str, Any], position: int) -> list[tuple[str, Any]]:
        """Returns the keys by which an image is found."""
        image_id, name = image.get("id"), image.get("file_name")
        if not isinstance(image_id, int | str) or not isinstance(name, str):
            raise UserError(f"'{self._path}': entry {position} of 'images' lacks 'id' or 'file_name'; add it.")
        if ("id", image_id) in self._images:
            raise UserError(f"'{self._path}' lists image id {image_id!r} twice; ids must differ: correct the JSON.")
        return [("name", name), ("stem", PurePosixPath(name).stem), ("id", image_id)]

    def _match_categories(self, categories: list[dict[str, Any]]) -> set[int]:
        """Returns the category ids that are things of the data set; checks that ids and names agree."""
        info, things = self._info, set()
        class_id_of_name = class_of_name(info)
        for position, category in enumerate(categories):
            number, name = category.get("id"), category.get("name")
            if not isinstance(number, int) or isinstance(number, bool) or not isinstance(name, str):
                raise UserError(f"'{self._path}': entry {position} of 'categories' lacks 'id' or 'name'; add it.")
            by_id, by_name = info.class_of_category_id.get(number), class_id_of_name.get(name)
            if by_id != by_name:
                known = info.categories[by_id if by_id is not None else class_id_of_name[name]]
                raise UserError(
                    f"'{self._path}' has category {number} '{name}', but data set '{info.name}' has {known.id} "
                    f"'{known.name}'; ids and names must agree: use the JSON of this data set."
                )
            if by_id is not None and info.categories[by_id].is_thing:
                things.add(number)
        if not things:
            raise UserError(f"'{self._path}' has none of the things of data set '{info.name}'; give its own JSON.")
        return things

    def _describe_differences(self, content: dict[str, Any], things: set[int]) -> list[str]:
        info, notes = self._info, []
        counts = Counter(annotation.get("category_id") for annotation in content["annotations"])
        unknown = [category for category in content["categories"] if category["id"] not in things]
        number = sum(counts[category["id"]] for category in unknown)
        if number:
            names = ", ".join(category["name"] for category in unknown)
            notes.append(
                f"AP leaves out {number} annotations of '{self.name}' whose categories are no things of data set "
                f"'{info.name}': {names}."
            )
        missing = [
            info.categories[class_id].name
            for class_id in info.thing_classes
            if info.categories[class_id].id not in things
        ]
        if missing:
            notes.append(f"AP leaves out the things that '{self.name}' does not have: {', '.join(missing)}.")
        return notes

    def _read_object(self, annotation: dict[str, Any], position: int, size: tuple[int, int]) -> dict[str, Any]:
        shape = read_shape(annotation, position, size, self._info)
        area, box = _to_number(annotation.get("area")), annotation.get("bbox")
        box = [_to_number(side) for side in box] if isinstance(box, list) else box
        box = mask_utils.toBbox(shape.runs).tolist() if box is None else box
        area = float(mask_utils.area(shape.runs)) if area is None else area
        is_box = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box)) and min(box[2:]) >= 0
        if not (is_box and _is_number(area) and area >= 0):
            raise UserError(
                f"entry {position} of 'annotations' has bbox {box!r} and area {area!r}; they must be [x, y, width, "
                "height] and a number of pixels: correct the JSON."
            )
        return {
            "category_id": shape.class_id,
            "segmentation": shape.runs,
            "area": area,
            "bbox": box,
            "iscrowd": int(shape.is_crowd),
        }


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _to_number(value: Any) -> Any:
    """Returns a number that some tools write as text; other values as they are."""
    try:
        return float(value) if isinstance(value, str) else value
    except ValueError:
        return value
