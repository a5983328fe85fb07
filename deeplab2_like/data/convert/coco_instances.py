"""Converts a COCO instance JSON: objects as polygons or run lengths, which may overlap. CVAT and others export it.

Stuff may come from the same JSON, from a PNG of class values per image, or be a single background class.
"""

import dataclasses
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from pycocotools import mask as coco_mask

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.convert.class_lists import read_class_list
from deeplab2_like.data.dataset_info import DatasetInfo, whole_number
from deeplab2_like.data.images import read_value_png
from deeplab2_like.errors import UserError
from deeplab2_like.paths import path_inside


@dataclasses.dataclass
class _Example:
    """One image of the JSON.

    Attributes:
        name: The image's file name.
        size: Height and width.
        annotations: The annotations of the image, in the order of the JSON, not yet checked.
        positions: The position of each annotation in the list of the JSON.
        fault: A fault that was found in the JSON, or None.
    """

    name: str
    size: tuple[int, int] = (0, 0)
    annotations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    # Not in the `repr`, so that files of records do not change with annotations of other images.
    positions: list[int] = dataclasses.field(default_factory=list, repr=False)
    fault: str | None = None


def convert_coco_instances(
    *,
    images: Path,
    json_file: Path,
    output_dir: Path,
    split: str | None = None,
    overlap: shapes.Overlap = "smaller-on-top",
    stuff: Sequence[str] = (),
    background: str | None = None,
    crowds_are_objects: bool = False,
    stuff_pngs: Path | None = None,
    stuff_classes: Path | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one split.

    Where annotations overlap, `shapes.draw` decides. Pixels without an annotation get their class from the stuff PNG,
    or else the background class, or else are void. Annotations with `iscrowd` become crowd regions.

    Args:
        images: Folder of the images.
        json_file: The JSON, with `images`, `annotations` and `categories`.
        output_dir: The record folder.
        split: The split's name; None: taken from the name of the JSON or of its folder, see `common.guess_split`.
        overlap: Which annotation wins where several overlap, see `shapes.draw`.
        stuff: Names of categories that are stuff. All others are things, unless the JSON has `"isthing": 0`.
        background: Name of the class of pixels without annotation and stuff; None: they are void.
        crowds_are_objects: Whether to ignore `iscrowd`, which some tools set on everything that they write as run
            lengths.
        stuff_pngs: Folder of a PNG per image, named as the image, with the classes of the pixels that no annotation
            covers; values without a class are void.
        stuff_classes: The class list of the stuff PNGs, see `read_class_list`. Classes with the name of a category in
            the JSON are the same class, which must be stuff.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A tuple with one report, like the converters of several splits.

    Raises:
        UserError: If an input is missing or faulty; the output folder is unchanged then.
    """
    images, json_file = Path(images), Path(json_file)
    common.require_folder(images, "image folder")
    if (stuff_pngs is None) != (stuff_classes is None):
        raise UserError("stuff_pngs and stuff_classes belong together: give both, or neither.")
    content = read_instance_json(json_file)
    if not content["annotations"] and background is None and stuff_pngs is None:
        raise UserError(
            f"'{json_file}' has no annotations, so everything would be void; give the JSON with the labels. Images "
            "without labels need no conversion."
        )
    categories = content["categories"]
    class_names_of_values: dict[int, str] = {}
    if stuff_pngs is not None and stuff_classes is not None:
        common.require_folder(Path(stuff_pngs), "folder of stuff PNGs")
        categories, class_names_of_values = _with_stuff_classes(categories, Path(stuff_classes))
    info = shapes.make_info(categories, name=json_file.stem, stuff=stuff, background=background)
    for name in class_names_of_values.values():
        if info.categories[shapes.class_of_name(info)[name]].is_thing:
            raise UserError(
                f"Class '{name}' of '{stuff_classes}' is a thing in '{json_file}'; a stuff PNG cannot tell its objects "
                "apart, so name the class in the list of stuff, too, or remove it from the file."
            )

    def inputs_of(example: _Example) -> list[Path]:
        image = images / example.name
        return [image] if stuff_pngs is None else [image, Path(stuff_pngs) / _stuff_name(example)]

    def load(example: _Example, info: DatasetInfo) -> tuple[bytes, np.ndarray]:
        if example.fault is not None:
            raise UserError(example.fault)
        image = files.read_file(path_inside(images, example.name), "the image")
        below = shapes.empty_map(example.size, info, background)
        if stuff_pngs is not None:
            png = path_inside(Path(stuff_pngs), _stuff_name(example))
            below = _draw_stuff(png, class_names_of_values, below, info)
        found = [
            read_shape(annotation, position, example.size, info)
            for annotation, position in zip(example.annotations, example.positions, strict=True)
        ]
        if crowds_are_objects:
            found = [dataclasses.replace(shape, is_crowd=False) for shape in found]
        return image, shapes.draw(found, below, overlap=overlap, info=info)

    examples = _list_examples(content)
    counts = [Counter(str(a.get("category_id")) for a in example.annotations) for example in examples]
    report = labeled_images.write_labeled_images(
        examples,
        load,
        inputs_of=inputs_of,
        choices={
            "overlap": overlap,
            "background": background,
            "crowds_are_objects": crowds_are_objects,
            "stuff_values": class_names_of_values,
        },
        source=[json_file, images] if stuff_pngs is None else [json_file, images, Path(stuff_pngs)],
        info=info,
        output_dir=Path(output_dir),
        split=split if split is not None else common.guess_split(json_file),
        max_instances=max((count for counter in counts for count in counter.values()), default=0),
        **options,
    )
    return (report,)


def read_instance_json(path: Path) -> dict[str, Any]:
    """Reads a COCO instance JSON and checks that its lists exist and consist of objects.

    Raises:
        UserError: If it cannot be read, or a list is missing.
    """
    content = files.read_json(path, "the COCO JSON")
    for key in ("images", "annotations", "categories"):
        value = content.get(key) if isinstance(content, dict) else None
        if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
            raise UserError(
                f"'{path}' has no list '{key}'; a COCO instance JSON has 'images', 'annotations' and 'categories'."
            )
    return content


def _with_stuff_classes(
    categories: list[dict[str, Any]], class_list: Path
) -> tuple[list[dict[str, Any]], dict[int, str]]:
    """Adds the classes of the stuff PNGs to those of the JSON.

    Returns:
        All categories, and the class name of each value in the PNGs.
    """
    categories = list(categories)
    ids = {category.get("id") for category in categories}
    names = {category.get("name") for category in categories}
    name_of_value = {}
    for entry in read_class_list(class_list):
        name_of_value[entry["id"]] = entry["name"]
        if entry["name"] not in names:
            # As in COCO, the value is the category id, unless another category has it.
            number = entry["id"] if entry["id"] not in ids else max(i for i in ids if isinstance(i, int)) + 1
            ids.add(number)
            categories.append({**entry, "id": number, "isthing": 0})
    return categories, name_of_value


def _list_examples(content: dict[str, Any]) -> list[_Example]:
    """Joins images and annotations, in the order of the images; inconsistencies become faults of the examples."""
    examples: list[_Example] = []
    of_image_id: dict[Any, _Example] = {}
    for position, image in enumerate(content["images"]):
        image_id, name, height, width = (image.get(key) for key in ("id", "file_name", "height", "width"))
        is_whole = isinstance(image_id, int | str) and isinstance(name, str)
        if not is_whole or not isinstance(height, int) or not isinstance(width, int):
            fault = f"entry {position} of 'images' lacks 'id', 'file_name', 'height' or 'width'; add it."
            examples.append(_Example(str(name or image_id), fault=fault))
        elif image_id in of_image_id:
            fault = f"id {image_id!r} is in 'images' more than once; ids must differ: correct the JSON."
            of_image_id[image_id].fault = fault
        else:
            of_image_id[image_id] = _Example(name, (height, width))
            examples.append(of_image_id[image_id])
    for position, annotation in enumerate(content["annotations"]):
        image_id = annotation.get("image_id")
        if isinstance(image_id, int | str) and image_id in of_image_id:
            of_image_id[image_id].annotations.append(annotation)
            of_image_id[image_id].positions.append(position)
        else:
            fault = (
                f"entry {position} of 'annotations' has image_id {image_id!r}, which 'images' does not list; add it "
                "there."
            )
            examples.append(_Example(str(image_id), fault=fault))
    return examples


def read_shape(annotation: dict[str, Any], position: int, size: tuple[int, int], info: DatasetInfo) -> shapes.Shape:
    """Reads one annotation.

    Args:
        annotation: The annotation, not yet checked.
        position: Its position in the list of the JSON, for messages.
        size: Height and width of its image.
        info: The classes, with the category ids of the JSON.

    Raises:
        UserError: If it is faulty; the message does not name the image.
    """
    annotation_id = annotation.get("id")
    name = f"entry {position} of 'annotations'" if annotation_id is None else f"its annotation of id {annotation_id!r}"
    category_id, segmentation = annotation.get("category_id"), annotation.get("segmentation")
    class_id = info.class_of_category_id.get(category_id) if isinstance(category_id, int) else None
    if class_id is None:
        raise UserError(f"{name} has category_id {category_id!r}, which 'categories' does not list; add it there.")
    if isinstance(segmentation, dict):
        runs = _read_runs(segmentation, size, name)
    elif isinstance(segmentation, list) and segmentation:
        try:
            runs = shapes.polygon_runs(segmentation, size)
        except UserError as error:
            raise UserError(f"{name} {error}.") from error
    else:
        raise UserError(f"{name} has no 'segmentation'; a box does not say which pixels are meant: draw its outline.")
    crowd = annotation.get("iscrowd")
    try:
        is_crowd = crowd is not None and bool(whole_number(crowd, 0, 1))
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} has iscrowd {crowd!r}; it must be 0 or 1: correct the JSON.") from error
    return shapes.Shape(class_id, runs, is_crowd=is_crowd)


def _read_runs(segmentation: dict[str, Any], size: tuple[int, int], name: str) -> shapes.Runs:
    """Reads run lengths, a list of numbers or the text of pycocotools' compressed format."""
    height, width = size
    counts: Any = segmentation.get("counts")
    if segmentation.get("size") != [height, width]:
        raise UserError(
            f"{name} has run lengths of size {segmentation.get('size')}, but its image is {[height, width]} (height, "
            "width); correct the JSON."
        )
    try:
        if isinstance(counts, list):
            runs = coco_mask.frPyObjects(segmentation, height, width)
        else:
            runs = {"size": [height, width], "counts": str.encode(counts)}
        shapes.decode_runs(runs)  # Raises an error if they are damaged.
        return runs
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} has run lengths that cannot be read ({error}); correct the JSON.") from error


def _stuff_name(example: _Example) -> str:
    """Returns the file name of an image's stuff PNG."""
    return f"{os.path.splitext(example.name)[0]}.png"


def _draw_stuff(png: Path, name_of_value: dict[int, str], below: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Draws a stuff PNG over a panoptic map, int32 [H, W]."""
    values = read_value_png(png, "stuff PNG")
    if values.shape != below.shape:
        raise UserError(
            f"the stuff PNG '{png}' is {values.shape} but its image {below.shape} (height, width); make it again."
        )
    class_id_of_name = shapes.class_of_name(info)
    class_id_of_value = {value: class_id_of_name[name] for value, name in name_of_value.items()}

    def meaning(value: int) -> tuple[int, bool] | None:
        return (class_id_of_value[value], False) if value in class_id_of_value else None

    stuff = labeled_images.values_to_panoptic(values, meaning, info)
    return np.where(stuff == info.void, below, stuff)
