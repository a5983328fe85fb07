"""Inspection of a record folder: pictures, statistics of classes and instances, and faults of the labels."""

import dataclasses
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import tensorflow as tf
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from deeplab2_like.data import pipeline
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.faults import KINDS, Fault
from deeplab2_like.data.images import write_png
from deeplab2_like.data.label_runs import list_segments
from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.shards import RecordIndex, list_shards, list_splits, read_index
from deeplab2_like.errors import UserError
from deeplab2_like.files import reserve_outputs, write_atomically
from deeplab2_like.parallel import map_in_order
from deeplab2_like.printing import counted, name_text, print_line, print_whole_table
from deeplab2_like.visualize import ascii_name, caption, contact_sheet, draw_legend, draw_overlay, stretch_contrast

# Largest number of faults that are listed per kind and split; all are counted.
MAX_LISTED_FAULTS = 100
# Limits between areas of small, medium and large instances, as in COCO, in pixels.
_SMALL_AREA, _LARGE_AREA = 32**2, 96**2
# Pictures of the contact sheet fit into a square of this side, in pixels; small ones are upsampled towards it.
_PICTURE_SIZE = 448
_MAX_COMMON_SIZES = 5
# Pixels between an image and its overlay.
_GAP = 2
# The names of segments are left out of a picture with at most so many classes, or more objects.
_MAX_LEGEND_CLASSES, _MAX_NAMED = 8, 30


@dataclasses.dataclass
class Inspection:
    """The result of an inspection.

    Attributes:
        statistics: The content of `statistics.json`, see docs/inspect.md.
        sheets: Split -> contact sheet, uint8 [H, W, 3].
        faults: The listed faults.
    """

    statistics: dict[str, Any]
    sheets: dict[str, np.ndarray]
    faults: list[Fault]

    @property
    def num_errors(self) -> int:
        """Number of faults that must be fixed, listed or not."""
        return sum(count for kind, count in self.statistics["fault_counts"].items() if KINDS[kind])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Writes `contact_sheet_SPLIT.png` and then `statistics.json`; raises `UserError` if it cannot."""
        sheets = {f"contact_sheet_{split}.png": sheet for split, sheet in self.sheets.items()}
        reserve_outputs(folder, [*sheets, "statistics.json"])
        for name, sheet in sheets.items():
            write_png(Path(folder) / name, sheet)
        write_atomically(Path(folder) / "statistics.json", (json.dumps(self.statistics, indent=1) + "\n").encode())


@dataclasses.dataclass
class _Image:
    """The measurements of one record.

    Attributes:
        name: The image's file name.
        size: Height and width.
        digest: Hash of the pixels.
        classes: int64 [N], the class of each segment; segments whose class is out of range are left out.
        instances: int64 [N], instance numbers.
        areas: int64 [N], areas in pixels.
        num_void: Number of pixels without a label.
        faults: Kind and text of each fault.
        picture: uint8 [H, W, 3], for the contact sheet; None if the record is not on it.
    """

    name: str
    size: tuple[int, int]
    digest: bytes
    classes: np.ndarray
    instances: np.ndarray
    areas: np.ndarray
    num_void: int
    faults: list[tuple[str, str]]
    picture: np.ndarray | None


class _FaultList:
    """Counts all faults and lists the first of each kind and split."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.listed: list[Fault] = []
        self._num_listed: Counter[tuple[str, str]] = Counter()

    def add(self, fault: Fault, split: str = "") -> None:
        self.counts[fault.kind] += 1
        self._num_listed[fault.kind, split] += 1
        if self._num_listed[fault.kind, split] <= MAX_LISTED_FAULTS:
            self.listed.append(fault)


class _DuplicateFinder:
    """Finds images with the same pixels, within a split and across splits."""

    def __init__(self) -> None:
        # Digest of the pixels -> split, record and file name of the first image that has them: the only part of an
        # inspection that grows with the data set, by some 250 bytes per image.
        self._first_images: dict[bytes, tuple[str, int, str]] = {}

    def check(self, image: _Image, split: str, number: int) -> tuple[str, str] | None:
        """Returns kind and text of the fault if an earlier image has the same pixels, else None."""
        first_split, first_number, first_name = self._first_images.setdefault(image.digest, (split, number, image.name))
        if first_split != split:
            return "image in several splits", f"the same pixels are image '{first_name}' of split '{first_split}'."
        if first_number != number:
            return "image twice in a split", f"the same pixels are image '{first_name}' of the same split."
        return None


class _SplitStatistics:
    """Sums over the images of a split, in memory that does not grow with the number of images."""

    def __init__(self, info: DatasetInfo) -> None:
        self._info = info
        self._sizes: Counter[tuple[int, int]] = Counter()
        self._void = 0
        counts = ("images", "segments", "crowds", "pixels", "area_sum", "small", "medium", "large")
        self._counts = {name: np.zeros(info.num_classes, np.int64) for name in counts}
        self._smallest = np.full(info.num_classes, np.iinfo(np.int64).max)
        self._largest = np.zeros(info.num_classes, np.int64)

    def add(self, image: _Image) -> None:
        self._sizes[image.size] += 1
        self._void += image.num_void
        is_thing = np.isin(image.classes, self._info.thing_classes)
        is_instance = is_thing & (image.instances > 0)

        def count(name: str, where: np.ndarray, amounts: np.ndarray | int = 1) -> None:
            np.add.at(self._counts[name], image.classes[where], amounts)

        everywhere = np.ones(image.classes.shape, bool)
        self._counts["images"][np.unique(image.classes)] += 1
        count("pixels", everywhere, image.areas)
        count("segments", is_instance | ~is_thing)
        count("crowds", is_thing & (image.instances == 0))
        count("area_sum", is_instance, image.areas[is_instance])
        count("small", is_instance & (image.areas < _SMALL_AREA))
        count("medium", is_instance & (image.areas >= _SMALL_AREA) & (image.areas < _LARGE_AREA))
        count("large", is_instance & (image.areas >= _LARGE_AREA))
        np.minimum.at(self._smallest, image.classes[is_instance], image.areas[is_instance])
        np.maximum.at(self._largest, image.classes[is_instance], image.areas[is_instance])

    def to_dict(self) -> dict[str, Any]:
        """Returns the split's part of `statistics.json`; shares are of all pixels of the split."""
        pixels = sum(height * width * count for (height, width), count in self._sizes.items())
        per_class = {}
        for class_id, category in enumerate(self._info.categories):
            counts = {name: int(values[class_id]) for name, values in self._counts.items()}
            entry: dict[str, Any] = {
                "is_thing": category.is_thing,
                "images": counts["images"],
                "segments": counts["segments"],
                "pixel_share": counts["pixels"] / max(pixels, 1),
            }
            if category.is_thing:
                entry["crowds"] = counts["crowds"]
            if category.is_thing and counts["segments"]:
                entry["area"] = {
                    "min": int(self._smallest[class_id]),
                    "mean": counts["area_sum"] / counts["segments"],
                    "max": int(self._largest[class_id]),
                    **{name: counts[name] for name in ("small", "medium", "large")},
                }
            per_class[category.name] = entry
        ordered = sorted(self._sizes, key=lambda size: (size[0] * size[1], size))
        return {
            "images": self._sizes.total(),
            "void_share": self._void / max(pixels, 1),
            "image_sizes": {
                "different": len(self._sizes),
                "smallest": list(ordered[0]) if ordered else None,
                "largest": list(ordered[-1]) if ordered else None,
                "most_common": [[*size, count] for size, count in self._sizes.most_common(_MAX_COMMON_SIZES)],
            },
            "per_class": per_class,
        }


def inspect_records(
    folder: str | os.PathLike[str],
    *,
    splits: Sequence[str] | None = None,
    pictures: int = 16,
    workers: int = 1,
    more_faults: Sequence[Fault] = (),
    progress: Callable[[int, int], None] | None = None,
) -> Inspection:
    """Inspects all records of a folder; only a few are in memory at a time.

    Args:
        folder: A record folder.
        splits: The splits to inspect; None: all.
        pictures: Largest number of pictures on a contact sheet; they are spread evenly over the split.
        workers: Number of threads.
        more_faults: Faults from another source, to be listed as well.
        progress: Called after each record with the number of records done and the total.

    Returns:
        Statistics, contact sheets and faults.

    Raises:
        UserError: If the folder, its `dataset_info.json` or a split is missing, or a file is cut short.
    """
    if workers < 1:
        raise UserError(f"workers must be 1 or more, got {workers}.")
    info = DatasetInfo.load(folder)
    splits = list_splits(folder) if splits is None else splits
    if not splits:
        raise UserError(f"'{folder}' holds no records; give a folder that `deeplab2-like convert` wrote.")
    indices = {split: read_index(list_shards(folder, split)) for split in splits}
    total, done = sum(len(index) for index in indices.values()), 0
    faults, duplicates = _FaultList(), _DuplicateFinder()
    for fault in (*more_faults, *_find_color_faults(info)):
        faults.add(fault)
    statistics, sheets = {}, {}
    for split, index in indices.items():
        split_statistics = _SplitStatistics(info)
        with_picture = set(np.linspace(0, len(index) - 1, min(pictures, len(index))).astype(int).tolist())
        panels: list[np.ndarray] = []
        drawn_classes: set[int] = set()
        inspect_record = _make_record_inspector(index, info, with_picture)
        for number, image in enumerate(map_in_order(inspect_record, range(len(index)), workers=workers)):
            place = f"{split}, {_describe_place(index, number)}"
            if isinstance(image, UserError):
                faults.add(Fault("damaged record", place, str(image)), split)
            else:
                split_statistics.add(image)
                duplicate = duplicates.check(image, split, number)
                for kind, text in [*image.faults, *([duplicate] if duplicate else [])]:
                    faults.add(Fault(kind, f"image '{image.name}' ({place})", text), split)
                if image.picture is not None:
                    panels.append(image.picture)
                    drawn_classes.update(image.classes.tolist())
            done += 1
            if progress is not None:
                progress(done, total)
        statistics[split] = split_statistics.to_dict()
        if panels:
            sheets[split] = _make_sheet(panels, [info.categories[class_id] for class_id in sorted(drawn_classes)])
    listed = sorted(faults.listed, key=lambda fault: list(KINDS).index(fault.kind))
    content = {
        "label_divisor": info.label_divisor,
        "splits": statistics,
        "fault_counts": {kind: faults.counts[kind] for kind in KINDS if faults.counts[kind]},
        "faults": [{**dataclasses.asdict(fault), "is_error": fault.is_error} for fault in listed],
    }
    return Inspection(content, sheets, listed)


def print_inspection(inspection: Inspection, *, console: Console | None = None, max_faults: int = 20) -> None:
    """Prints a table per split (areas of instances in pixels; S, M and L as in COCO), and the first faults.

    Args:
        inspection: The inspection.
        console: Where to print; standard output by default.
        max_faults: About the largest number of faults that are printed, shared among their kinds.
    """
    console = console or Console()
    for split, values in inspection.statistics["splits"].items():
        sizes = values["image_sizes"]
        title = f"{split}: {counted(values['images'], 'image')}, {counted(sizes['different'], 'size')}"
        if sizes["most_common"]:
            height, width, count = sizes["most_common"][0]
            title += f" (most often {height}x{width}: {count})"
        title += f", void {values['void_share']:.1%}"
        table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
        table.add_column("class", no_wrap=True)
        for column in ("images", "segm.", "crowds", "pixels", "min", "mean", "max", "S", "M", "L"):
            table.add_column(column, justify="right", no_wrap=True)
        for name, entry in values["per_class"].items():
            if not entry["images"]:
                continue
            area = entry.get("area")
            table.add_row(
                name_text(name, console),
                str(entry["images"]),
                str(entry["segments"]),
                str(entry.get("crowds", "")),
                f"{entry['pixel_share']:.1%}",
                *((str(area["min"]), f"{area['mean']:.0f}", str(area["max"])) if area else ()),
                *((str(area[name]) for name in ("small", "medium", "large")) if area else ()),
            )
        print_line(title, console)
        print_whole_table(table, console)
        absent = [name for name, entry in values["per_class"].items() if not entry["images"]]
        if absent:
            print_line(f"Without pixels: {', '.join(absent)}", console)
    counts = inspection.statistics["fault_counts"]
    if not counts:
        console.print("No faults found.")
        return
    for kind, count in counts.items():
        print_line(f"{'fault' if KINDS[kind] else 'note'}: {kind}, {counted(count, 'time')}", console)
        of_kind = [fault for fault in inspection.faults if fault.kind == kind]
        for fault in of_kind[: max(1, max_faults // len(counts))]:
            print_line(f"  {fault.where}: {fault.text}", console)


def _make_record_inspector(
    index: RecordIndex, info: DatasetInfo, with_picture: set[int]
) -> Callable[[int], _Image | UserError]:
    """Returns a function that measures the record of a number, or returns the error if the record is damaged.

    Args:
        index: The records of a split.
        info: The meaning of the labels.
        with_picture: Numbers of the records to draw.
    """
    read = pipeline.file_reader(index)
    load = tf.function(
        lambda position: pipeline.read_example(read(position), info, check_classes=False),
        input_signature=[tf.TensorSpec([], tf.int64)],
    )

    def inspect_record(number: int) -> _Image | UserError:
        try:
            with report_bad_records([index.files[index.file_numbers[number]]]):
                example = load(tf.constant(number, tf.int64))
        except UserError as error:
            return error
        name = example["image_id"].numpy().decode(errors="replace")
        picture = number in with_picture
        return _measure(name, example["image"].numpy(), example["panoptic"].numpy(), info, with_picture=picture)

    return inspect_record


def _measure(name: str, image: np.ndarray, panoptic: np.ndarray, info: DatasetInfo, *, with_picture: bool) -> _Image:
    """Measures one image, uint8 [H, W, 3], and its panoptic map, int32 [H, W]."""
    table = list_segments(panoptic)
    classes, instances = table.values // info.label_divisor, table.values % info.label_divisor
    is_void = classes == info.ignore_label
    is_known = (classes >= 0) & (classes < info.num_classes)
    num_void = int(table.areas[is_void].sum())
    faults = _find_label_faults(table.values, info)
    if num_void == panoptic.size:
        faults.append(("image without labels", "all of it is void."))
    picture = None
    if with_picture:
        unknown = np.isin(panoptic, table.values[~is_known & ~is_void])
        picture = _make_picture(name, image, np.where(unknown, info.void, panoptic).astype(np.int32), info)
    digest = hashlib.blake2b(np.ascontiguousarray(image).data, digest_size=16)
    digest.update(repr(image.shape).encode())  # The same bytes in another shape are another image.
    return _Image(
        name,
        (image.shape[0], image.shape[1]),
        digest.digest(),
        classes[is_known],
        instances[is_known],
        table.areas[is_known],
        num_void,
        faults,
        picture,
    )


def _find_label_faults(values: np.ndarray, info: DatasetInfo) -> list[tuple[str, str]]:
    """Returns kind and text of the faults of a label map with these distinct values, int64 [N], ascending."""
    classes, instances = values // info.label_divisor, values % info.label_divisor
    is_void = classes == info.ignore_label
    is_known = (classes >= 0) & (classes < info.num_classes)
    faults = []
    for value, class_id in zip(values[~is_known & ~is_void], classes[~is_known & ~is_void], strict=True):
        text = (
            f"value {value} is class {class_id} with label_divisor {info.label_divisor}; classes are "
            f"0..{info.num_classes - 1} and {info.ignore_label} for void."
        )
        faults.append(("id out of range", text))
    is_stuff_instance = np.isin(classes, info.stuff_classes) & (instances > 0)
    for value, class_id in zip(values[is_stuff_instance], classes[is_stuff_instance], strict=True):
        text = (
            f"value {value} is instance {value % info.label_divisor} of '{info.categories[class_id].name}', which is "
            "stuff; stuff has instance 0."
        )
        faults.append(("id out of range", text))
    for class_id in np.intersect1d(classes, info.thing_classes).tolist():
        present = instances[(classes == class_id) & (instances > 0)]  # Ascending.
        num_absent = int(present[-1]) - present.size if present.size else 0
        if num_absent:
            first = int(np.flatnonzero(present != np.arange(1, present.size + 1))[0]) + 1
            text = (
                f"'{info.categories[class_id].name}' has instances up to {present[-1]}, but {num_absent} of them have "
                f"no pixels, the first is {first}."
            )
            faults.append(("instance without pixels", text))
    return faults


def _make_picture(name: str, image: np.ndarray, panoptic: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Draws an image, uint8 [H, W, 3], beside its overlay with a map, int32 [H, W], at the size of the contact sheet.

    Segments have their names only where the legend alone would be hard to read: many classes, but not many objects.
    """
    values = np.unique(panoptic)
    num_classes = int(np.unique(values // info.label_divisor).size)
    num_objects = int(np.count_nonzero(values % info.label_divisor))
    height, width = panoptic.shape
    scale = _PICTURE_SIZE / max(height, width)
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    if scale >= 2:  # A whole factor, so that all pixels have the same size.
        scale, interpolation = int(scale), cv2.INTER_NEAREST
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    image = cv2.resize(image, size, interpolation=interpolation)
    panoptic = cv2.resize(panoptic, size, interpolation=cv2.INTER_NEAREST)
    # OpenCV draws ASCII letters only.
    shown = stretch_contrast(image)
    note = "" if shown is image else " (brightened)"
    overlay = draw_overlay(
        shown, panoptic, info, labels=num_classes > _MAX_LEGEND_CLASSES and num_objects <= _MAX_NAMED
    )
    gap = np.zeros((image.shape[0], _GAP, 3), np.uint8)
    return caption(np.concatenate([shown, gap, overlay], axis=1), ascii_name(name) + note)


def _make_sheet(pictures: Sequence[np.ndarray], categories: Sequence[Category]) -> np.ndarray:
    """Arranges pictures of two panels each about as wide as high, above a legend of the classes on them."""
    sheet = contact_sheet(pictures, columns=math.ceil(math.sqrt(len(pictures) / 2)))
    return np.concatenate([sheet, draw_legend(categories, sheet.shape[1])]) if categories else sheet


def _describe_place(index: RecordIndex, number: int) -> str:
    """Returns the file of a record and its number in the file, as text."""
    file_number = index.file_numbers[number]
    first = int(np.searchsorted(index.file_numbers, file_number))
    return f"record {number - first} of {Path(index.files[file_number]).name}"


def _find_color_faults(info: DatasetInfo) -> list[Fault]:
    """Finds classes with the same color, which pictures cannot tell apart."""
    names_of: dict[tuple[int, int, int], list[str]] = {}
    for category in info.categories:
        names_of.setdefault(category.color, []).append(category.name)
    return [
        Fault("two classes of one color", "dataset_info.json", f"{', '.join(names)} all have color {list(color)}.")
        for color, names in names_of.items()
        if len(names) > 1
    ]


def raise_if_faulty(inspection: Inspection, folder: str | os.PathLike[str], hint: str) -> None:
    """Raises `UserError` if there are faults that must be fixed.

    Args:
        inspection: The inspection.
        folder: The record folder, for the message.
        hint: End of the message, which says what to do.
    """
    if inspection.num_errors:
        first = next(fault for fault in inspection.faults if fault.is_error)
        raise UserError(
            f"'{folder}' has {inspection.num_errors} faults, the first: {first.kind}, {first.where}: {first.text} "
            f"{hint}"
        )
