"""Converts a COCO instance JSON: objects as polygons or run lengths, which may overlap. CVAT and others export it.

Stuff may come from the same JSON, from a PNG of class values per image, or be a single background class.
"""

import contextlib
import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np
from pycocotools import mask as coco_mask

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images, shapes
from deeplab2_like.data.convert.coco_json import number_or_text, read_coco_json
from deeplab2_like.data.convert.coco_splits import CocoSource, find_splits
from deeplab2_like.data.convert.file_finder import FileFinder
from deeplab2_like.data.convert.losses import FAULTY, Losses
from deeplab2_like.data.convert.splits import choose_split, require_one_split
from deeplab2_like.data.convert.stuff_pngs import StuffClasses, draw_stuff, read_stuff_classes
from deeplab2_like.data.dataset_info import DatasetInfo, whole_number
from deeplab2_like.data.images import decode_image, turn_upright
from deeplab2_like.errors import UserError
from deeplab2_like.paths import path_inside


@dataclasses.dataclass
class _Example:
    """One image of the JSON.

    Attributes:
        name: The image's file name, relative to the folder of the images.
        size: Height and width; None if the JSON does not give them.
        annotations: The annotations of the image, in the order of the JSON, not yet checked.
        positions: The position of each annotation in the list of the JSON.
        fault: A fault that was found in the JSON, or None.
        orphan: The category id of an annotation without an image, which this is; None for images.
    """

    name: str
    size: tuple[int, int] | None = None
    annotations: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    # Not in the `repr`, so that files of records do not change with annotations of other images.
    positions: list[int] = dataclasses.field(default_factory=list, repr=False)
    fault: str | None = None
    orphan: str | None = None


def convert_coco_instances(  # noqa: PLR0913 - its arguments are the options of the command
    *,
    json_file: Path,
    output_dir: Path,
    images: Path | None = None,
    split: str | None = None,
    overlap: shapes.Overlap = "smaller-on-top",
    stuff: Sequence[str] = (),
    background: str | None = None,
    crowds_are_objects: bool = False,
    keep_groups: bool = False,
    stuff_pngs: Path | None = None,
    stuff_classes: Path | None = None,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts one split, or the splits of an export of Roboflow or CVAT, or of COCO itself.

    Where annotations overlap, `shapes.draw` decides. Pixels without an annotation get their class from the stuff PNG,
    or else the background class, or else are void. Annotations with `iscrowd` become crowd regions.

    Args:
        json_file: The JSON, with `images`, `annotations` and `categories`. Or a folder with a folder per split, such as
            `train` and `valid`, each with its images and `_annotations.coco.json`, as Roboflow exports them; or with a
            JSON per split, such as `instances_Train.json`, as CVAT exports them, there or in `annotations`.
        output_dir: The record folder.
        images: Folder of the images; None: that of the JSON.
        split: The split's name; None: see `splits.choose_split`. For a folder of splits: the only one to convert.
        overlap: Which annotation wins where several overlap, see `shapes.draw`.
        stuff: Names of categories that are stuff. All others are things, unless the JSON has `"isthing": 0`.
        background: Name of the class of pixels without annotation and stuff; None: they are void.
        crowds_are_objects: Whether to ignore `iscrowd`, which some tools set on everything that they write as run
            lengths.
        keep_groups: Whether to keep categories that have no annotation and only group others as their supercategory.
        stuff_pngs: Folder of a PNG per image, named as the image, with the classes of the pixels that no annotation
            covers; values without a class are void.
        stuff_classes: The class list of the stuff PNGs, see `read_class_list`. Classes with the name of a category in
            the JSON are the same class, which must be stuff. Or `coco-stuff` for the maps of COCO-Stuff, whose values
            are category ids minus one, of things and stuff alike, and 255 for void.
        encoding: See `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; splits that were converted before stay.
    """
    if (stuff_pngs is None) != (stuff_classes is None):
        raise UserError("stuff_pngs and stuff_classes belong together: give both, or neither.")
    json_file, output_dir = Path(json_file), Path(output_dir)
    sources = [CocoSource(json_file, json_file.parent if images is None else Path(images), split)]
    notes: list[str] = []
    if json_file.is_dir():
        sources, notes = find_splits(json_file, None if images is None else Path(images), split)
        require_one_split([str(source.split) for source in sources], options.get("val_share"))
        common.require_replaceable(
            output_dir,
            {str(source.split): _paths_of(source, stuff_pngs) for source in sources},
            replace=options.get("replace", False),
        )
    choices = _Choices(
        overlap,
        stuff,
        background,
        crowds_are_objects,
        keep_groups,
        None if stuff_pngs is None else Path(stuff_pngs),
        None if stuff_classes is None else Path(stuff_classes),
        encoding,
    )
    reports: list[common.ConversionReport] = []
    for source in sources:
        reports += _Conversion(source, output_dir, choices, val_share=options.get("val_share")).run(options)
    if len(sources) > 1:
        listed = ", ".join(str(source.split) for source in sources)
        notes.insert(0, f"'{json_file}' has the splits {listed}; --split converts one of them.")
    reports[0] = dataclasses.replace(reports[0], notes=(*notes, *reports[0].notes))
    return tuple(reports)


def _paths_of(source: CocoSource, stuff_pngs: Path | None) -> list[Path]:
    """Returns the files and folders that identify the source of a split."""
    return [source.json_file, source.images, *([] if stuff_pngs is None else [Path(stuff_pngs)])]


@dataclasses.dataclass(frozen=True)
class _Choices:
    """Arguments of `convert_coco_instances` that hold for all splits."""

    overlap: shapes.Overlap
    stuff: Sequence[str]
    background: str | None
    crowds_are_objects: bool
    keep_groups: bool
    stuff_pngs: Path | None
    stuff_classes: Path | None
    encoding: str | None


class _Conversion:
    """The conversion of one JSON.

    Args:
        source: The JSON and its images.
        output_dir: The record folder.
        choices: What the user chose.
        val_share: See `labeled_images.LabelOptions`.
    """

    def __init__(self, source: CocoSource, output_dir: Path, choices: _Choices, *, val_share: float | None) -> None:
        common.require_folder(source.images, "image folder")
        self._source = source
        self._output_dir = output_dir
        self._choices = choices
        stuff_pngs, background = choices.stuff_pngs, choices.background
        self._content = content = read_instance_json(source.json_file, encoding=choices.encoding)
        if not content["annotations"] and background is None and stuff_pngs is None:
            raise UserError(
                f"'{source.json_file}' has no annotations, so everything would be void; give the JSON with the "
                "labels. Images without labels need no conversion."
            )
        self._notes: list[str] = []
        categories = content["categories"]
        if not choices.keep_groups:
            categories, dropped = _drop_groups(categories, content["annotations"], keep={*choices.stuff, background})
            if dropped:
                self._notes.append(
                    f"The categories {', '.join(dropped)} only group others and have no annotations: they are no "
                    "classes; --keep-groups keeps them."
                )
        self._stuff: StuffClasses | None = None
        self._split, split_notes = choose_split(
            source.split,
            source.json_file,
            output_dir=output_dir,
            source=_paths_of(source, stuff_pngs),
            val_share=val_share,
        )
        self._notes += split_notes
        known = common.known_categories(output_dir, self._split)
        if stuff_pngs is not None and choices.stuff_classes is not None:
            common.require_folder(stuff_pngs, "folder of stuff PNGs")
            self._stuff = read_stuff_classes(choices.stuff_classes, categories, known, encoding=choices.encoding)
            categories = self._stuff.categories
            self._notes += self._stuff.notes
        self._info = shapes.make_info(
            categories, name=source.json_file.stem, stuff=choices.stuff, background=background, known=known
        )
        self._notes += shapes.describe_kinds(self._info, choices.stuff)
        if self._stuff is not None and choices.stuff_classes is not None:
            self._stuff.require_stuff(self._info, choices.stuff_classes, source.json_file)

    def run(self, options: labeled_images.LabelOptions) -> tuple[common.ConversionReport, ...]:
        """Writes the split."""
        finder = FileFinder(self._source.images)
        examples = _list_examples(self._content, finder)
        counts = [Counter(str(a.get("category_id")) for a in example.annotations) for example in examples]
        return labeled_images.write_labeled_images(
            {self._split: examples},
            self._load,
            inputs_of=self._inputs_of,
            choices={
                "overlap": self._choices.overlap,
                "background": self._choices.background,
                "crowds_are_objects": self._choices.crowds_are_objects,
                "stuff_values": {} if self._stuff is None else dict(self._stuff.name_of_value),
            },
            source=_paths_of(self._source, self._choices.stuff_pngs),
            info=self._info,
            output_dir=self._output_dir,
            max_instances=max((count for counter in counts for count in counter.values()), default=0),
            notes=[*self._notes, *self._warn_of_background(sum(counts, Counter())), *finder.notes()],
            **options,
        )

    def _warn_of_background(self, counts: Mapping[str, int]) -> list[str]:
        """Returns a warning if annotations, of which there are so many of each category id, become background."""
        objects = {
            str(category.get("name")): counts.get(str(category.get("id")), 0)
            for category in self._content["categories"]
            if category.get("isthing") is None or category["isthing"]
        }
        return shapes.warn_of_background(self._choices.background, objects, self._choices.stuff)

    def _inputs_of(self, example: _Example) -> list[Path]:
        if example.orphan is not None:
            return [self._source.json_file]
        image = self._source.images / example.name
        return [image] if self._choices.stuff_pngs is None else [image, self._choices.stuff_pngs / _stuff_name(example)]

    def _load(self, example: _Example, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        if example.fault is not None and example.orphan is not None:
            class_id = {str(known): found for known, found in info.class_of_category_id.items()}.get(example.orphan)
            name = f"category {example.orphan}" if class_id is None else info.categories[class_id].name
            raise labeled_images.OrphanError(example.fault, name)
        if example.fault is not None:
            raise UserError(example.fault)
        image = files.read_file(path_inside(self._source.images, example.name), "the image")
        size = _size_of_image(image, example.name) if example.size is None else example.size
        below = shapes.empty_map(size, info, self._choices.background)
        if self._choices.stuff_pngs is not None and self._stuff is not None:
            png = path_inside(self._choices.stuff_pngs, _stuff_name(example))
            below = draw_stuff(png, self._stuff, below, info, losses)
        found = [
            shape
            for annotation, position in zip(example.annotations, example.positions, strict=True)
            if (shape := _read_or_skip(annotation, position, size, info, losses)) is not None
        ]
        if self._choices.crowds_are_objects:
            found = [dataclasses.replace(shape, is_crowd=False) for shape in found]
        return image, shapes.draw(found, below, overlap=self._choices.overlap, info=info, losses=losses)


def read_instance_json(path: Path, *, encoding: str | None = None) -> dict[str, Any]:
    """Reads a COCO instance JSON, see `coco_json.read_coco_json`.

    Raises:
        UserError: If it cannot be read, or a list is missing.
    """
    return read_coco_json(path, "instance", encoding=encoding)


def _drop_groups(
    categories: list[dict[str, Any]], annotations: list[dict[str, Any]], *, keep: set[str | None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Drops the categories without annotations whose name is the supercategory of another category.

    Returns:
        The other categories, and the names of those that were dropped.
    """
    used = {repr(annotation.get("category_id")) for annotation in annotations}

    def is_group(category: dict[str, Any]) -> bool:
        name = category.get("name")
        groups_others = any(
            other is not category and other.get("supercategory") == name and other.get("name") != name
            for other in categories
        )
        return groups_others and name not in keep and repr(category.get("id")) not in used

    groups = [category for category in categories if isinstance(category.get("name"), str) and is_group(category)]
    return [category for category in categories if category not in groups], [group["name"] for group in groups]


def _size_of_image(image: bytes, name: str) -> tuple[int, int]:
    """Returns height and width of an image whose JSON does not give them."""
    stored, shown = decode_image(image, name).shape[:2], decode_image(turn_upright(image, name), name).shape[:2]
    if stored != shown:
        raise UserError(
            "its JSON gives no height and width, and viewers show it turned by its EXIF orientation, so how its label "
            "was drawn is unknown; add 'height' and 'width' to the JSON."
        )
    return stored


def _read_or_skip(
    annotation: dict[str, Any], position: int, size: tuple[int, int], info: DatasetInfo, losses: Losses
) -> shapes.Shape | None:
    """Reads one annotation; where faulty ones are left out, reads at least its good polygons."""
    with losses.skip_faulty():
        return read_shape(annotation, position, size, info)
    segmentation = annotation.get("segmentation")
    good = [polygon for polygon in segmentation if _is_polygon(polygon)] if isinstance(segmentation, list) else []
    if good:
        with contextlib.suppress(UserError):
            return read_shape({**annotation, "segmentation": good}, position, size, info)
    category = annotation.get("category_id")
    class_id = info.class_of_category_id.get(category) if isinstance(category, int) else None
    losses.add(FAULTY, f"category {category}" if class_id is None else info.categories[class_id].name, objects=1)
    return None


def _is_polygon(polygon: Any) -> bool:
    try:
        shapes.read_polygon(polygon)
    except UserError:
        return False
    return True


def _list_examples(content: dict[str, Any], finder: FileFinder) -> list[_Example]:
    """Joins images and annotations, in the order of the images; inconsistencies become faults of the examples."""
    examples: list[_Example] = []
    of_image_id: dict[Any, _Example] = {}
    for position, image in enumerate(content["images"]):
        image_id, name, height, width = (image.get(key) for key in ("id", "file_name", "height", "width"))
        if not isinstance(image_id, int | str) or not isinstance(name, str):
            fault = f"entry {position} of 'images' lacks 'id' or 'file_name'; add it."
            examples.append(_Example(str(name or image_id), fault=fault))
        elif image_id in of_image_id:
            fault = f"id {image_id!r} is in 'images' more than once; ids must differ: correct the JSON."
            of_image_id[image_id].fault = fault
        else:
            example = of_image_id[image_id] = _Example(name)
            examples.append(example)
            try:
                example.name = finder.find(name)
                example.size = _read_size(height, width)
            except UserError as error:
                example.fault = str(error)
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
            examples.append(_Example(str(image_id), fault=fault, orphan=str(annotation.get("category_id"))))
    return examples


def _read_size(height: Any, width: Any) -> tuple[int, int] | None:
    """Reads height and width of an image from the JSON, None if they are missing."""
    if height is None or width is None:
        return None
    if not isinstance(height, int) or not isinstance(width, int):
        raise UserError(
            f"its height and width are given as {height!r} and {width!r}, which is impossible; correct them."
        )
    return height, width


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
        is_flat = not any(isinstance(part, list) for part in segmentation)  # One polygon without a list around it.
        try:
            runs = shapes.polygon_runs([segmentation] if is_flat else segmentation, size)
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
    given_size = segmentation.get("size")
    if not isinstance(given_size, list) or [number_or_text(side) for side in given_size] != [height, width]:
        raise UserError(
            f"{name} has run lengths of size {given_size}, but its image is {[height, width]} (height, width); correct "
            "the JSON."
        )
    try:
        if isinstance(counts, list):
            whole = {"size": [height, width], "counts": [whole_number(count) for count in counts]}
            runs = coco_mask.frPyObjects(whole, height, width)
        else:
            runs = {"size": [height, width], "counts": str.encode(counts)}
        shapes.decode_runs(runs)  # Raises an error if they are damaged.
        return runs
    except (ValueError, TypeError, OverflowError) as error:
        raise UserError(f"{name} has run lengths that cannot be read ({error}); correct the JSON.") from error


def _stuff_name(example: _Example) -> str:
    """Returns the file name of an image's stuff PNG."""
    return f"{os.path.splitext(example.name)[0]}.png"
