"""Shared by all converters: writes a split in order, and stops at faulty examples or skips them."""

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Literal, TypedDict, TypeVar, get_args

import numpy as np

from deeplab2_like import errors
from deeplab2_like.data import dataset_info
from deeplab2_like.data.convert.losses import CROWD, Counts, Losses, sum_counts
from deeplab2_like.data.convert.unfinished import (
    UnfinishedSplit,
    fingerprint,
    interrupted_conversions,
    make_plan,
    require_same_source,
)
from deeplab2_like.data.dataset_info import Category, DatasetInfo, generate_color
from deeplab2_like.data.images import find_bit_depth
from deeplab2_like.data.label_runs import list_segments
from deeplab2_like.data.records import LabelFormat, serialize_example
from deeplab2_like.data.shards import list_splits, require_shard_count
from deeplab2_like.errors import UserError
from deeplab2_like.files import make_folder, require_local
from deeplab2_like.parallel import map_in_order

Item = TypeVar("Item")
Progress = Callable[[int, int], None]
OnError = Literal["stop", "skip-annotation", "skip-image", "skip"]

EXAMPLES_PER_SHARD = 500
# The default is the first of these that is larger than the number of instances of any class in an image.
LABEL_DIVISORS = (1000, 10_000)


class WriteOptions(TypedDict, total=False):
    """Arguments of `write_split` that converters pass on unchanged."""

    shards: int | None
    workers: int
    on_error: OnError
    progress: Progress | None
    replace: bool


def may_skip_annotations(on_error: OnError) -> bool:
    """Returns whether faulty annotations are left out, and their image is kept."""
    return on_error in ("skip", "skip-annotation")


@dataclasses.dataclass(frozen=True)
class Record:
    """One serialized example, with its part in the statistics of its split.

    Attributes:
        serialized: The serialized example; None if the item only has annotations that were left out, and no image.
        objects: Number of objects of each class; crowd regions and stuff do not count. Empty if unknown.
        pixels: Number of pixels of each class and, last, of void. Empty if unknown.
        lost: What the image's labels hold and the record does not.
        skipped_annotations: The fault of each annotation that was left out.
        is_turned: Whether the image was turned by its EXIF orientation.
    """

    serialized: bytes | None
    objects: Sequence[int] = ()
    pixels: Sequence[int] = ()
    lost: Counts = dataclasses.field(default_factory=dict)
    skipped_annotations: Sequence[str] = ()
    is_turned: bool = False


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """The result of converting one split.

    Attributes:
        split: Name of the split.
        examples: Number of examples written.
        skipped: The fault of each skipped example, as in `errors.jsonl`.
        objects: Number of objects of each class; crowd regions and stuff do not count.
        pixels: Number of pixels of each class and, last, of void.
        lost: What the labels hold and the records do not: numbers of objects and pixels by reason and class name.
        skipped_annotations: The fault of each annotation that was left out, as in `errors.jsonl`.
        turned: Number of images that were turned by their EXIF orientation.
        notes: Sentences for the user: the choices that the converter made.
        kept_files: Number of files that an earlier, interrupted run had already written.
        files: Number of files; 0 if unknown.
        is_unchanged: Whether an earlier run had completed the same conversion, so that nothing was done.
    """

    split: str
    examples: int
    skipped: tuple[str, ...] = ()
    objects: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    pixels: tuple[int, ...] = dataclasses.field(default=(), compare=False)
    lost: Counts = dataclasses.field(default_factory=dict, compare=False)
    skipped_annotations: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    turned: int = dataclasses.field(default=0, compare=False)
    notes: tuple[str, ...] = dataclasses.field(default=(), compare=False)
    kept_files: int = dataclasses.field(default=0, compare=False)
    files: int = dataclasses.field(default=0, compare=False)
    is_unchanged: bool = dataclasses.field(default=False, compare=False)


def write_split(  # noqa: PLR0913 - converters pass their options through
    items: Sequence[Item],
    make_record: Callable[[Item], Record],
    *,
    info: DatasetInfo,
    output_dir: Path,
    split: str,
    source: Sequence[Path] = (),
    shards: int | None = None,
    workers: int = 1,
    on_error: OnError = "stop",
    progress: Progress | None = None,
    replace: bool = False,
    inputs_of: Callable[[Item], Sequence[Path]] | None = None,
    options: Mapping[str, Any] | None = None,
) -> ConversionReport:
    """Writes one split and `dataset_info.json`. The files depend neither on `workers` nor on timing.

    Each file has a contiguous range of the items. The split appears in the folder once all files are complete. With
    `inputs_of`, files that an interrupted run has finished are kept if their inputs are unchanged, and so is an
    existing split with the same inputs and options. An existing split from the same source is replaced if options or
    input files have changed; one from another source is replaced only with `replace`.

    Args:
        items: One per example, in the order of the records.
        make_record: Makes the record of an item; raises `UserError` if the item is faulty. Called from several threads,
            because decoding and encoding of images take most of the time and can run in parallel.
        info: The meaning of the labels, as returned by `agree_on_dataset_info`.
        output_dir: The record folder; created if it is missing.
        split: The split's name.
        source: The files or folders that the user gave, which identify the source. Empty: the examples are generated.
        shards: Number of files, at most one per item; None: about one per `EXAMPLES_PER_SHARD` items.
        workers: Number of threads.
        on_error: "stop" at the first fault; or list faults in `errors.jsonl` of the folder and leave out the smallest
            part, an annotation or else the item ("skip"), only annotations ("skip-annotation"), or always the item
            ("skip-image"). Annotations are the business of `make_record`.
        progress: Called after each item with the number of items done and the total.
        replace: Whether to replace a split, or an interrupted conversion of it, that was made from another source.
        inputs_of: Returns the files from which an item's record is made, the image first. Everything else that affects
            the record must be in the item's `repr` or in `options`. None: every run starts from scratch.
        options: Everything else that affects the records, by name; must be JSON values.

    Returns:
        The numbers of written and skipped examples, and statistics.

    Raises:
        UserError: If an argument is wrong, an item is faulty and not to be skipped, all items are faulty, or the
            folder has the split from another source or an interrupted conversion with other options. The content of
            the folder is unchanged then; finished files are kept, hidden, for the next run.
    """
    if on_error not in get_args(OnError):
        raise errors.unknown_name("value of on_error", on_error, get_args(OnError))
    if workers < 1:
        raise UserError(f"workers must be 1 or more, got {workers}.")
    ranges = _split_into_ranges(len(items), shards)
    fingerprints = None
    if inputs_of is not None:
        fingerprints = [
            fingerprint(items[first:end], [inputs_of(item) for item in items[first:end]]) for first, end in ranges
        ]
    plan = make_plan(info, source=source, examples=len(items), shards=len(ranges), options=options or {})
    unfinished = UnfinishedSplit(output_dir, split, plan=plan, fingerprints=fingerprints)
    conversion = _Conversion(items, make_record, inputs_of=inputs_of, on_error=on_error, progress=progress)
    is_new = not output_dir.exists()
    make_folder(output_dir)
    try:
        with unfinished.lock():
            was_completed = unfinished.complete_publication()
            if not replace:
                require_same_source(output_dir, split, source)
            finished = unfinished.finished(on_error=on_error)
            if finished is not None:
                return _make_report(split, finished, kept_files=len(ranges), is_unchanged=not was_completed)
            return conversion.run(unfinished, ranges, info=info, split=split, workers=workers, replace=replace)
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # Finished files are kept, and other processes may have created some.
                output_dir.rmdir()
        raise


class _EmptySplitError(UserError):
    """No example is left, so finished files are of no use to the next run."""


class _Conversion(Generic[Item]):
    """Converts items in order, in several threads, and writes file after file.

    Args:
        items: See `write_split`, as for the rest.
        make_record: Makes the record of an item.
        inputs_of: Returns the files from which an item's record is made, or None.
        on_error: See `write_split`.
        progress: Called after each item.
    """

    def __init__(
        self,
        items: Sequence[Item],
        make_record: Callable[[Item], Record],
        *,
        inputs_of: Callable[[Item], Sequence[Path]] | None,
        on_error: OnError,
        progress: Progress | None,
    ) -> None:
        self._items = items
        self._make_record = make_record
        self._inputs_of = inputs_of
        self._on_error = on_error
        self._may_skip = on_error in ("skip", "skip-image")
        self._progress = progress

    def run(
        self,
        unfinished: UnfinishedSplit,
        ranges: Sequence[tuple[int, int]],
        *,
        info: DatasetInfo,
        split: str,
        workers: int,
        replace: bool,
    ) -> ConversionReport:
        """Writes the files and publishes the split; the arguments are those of `write_split`."""
        try:
            kept = unfinished.begin(on_error=self._on_error, replace=replace)
            states = self._write_files(unfinished, ranges, kept, num_classes=info.num_classes, workers=workers)
            report = _make_report(split, states, kept_files=sum(state is not None for state in kept))
            if not report.examples:
                first = (
                    f"all {len(report.skipped)} are faulty, the first: {report.skipped[0]}" if report.skipped else ""
                )
                raise _EmptySplitError(f"Split '{split}' has no examples to write: {first or 'the data set is empty.'}")
            unfinished.publish(info, states)
        except BaseException as error:
            unfinished.abandon(keep_finished=not isinstance(error, _EmptySplitError))
            raise
        return report

    def _write_files(
        self,
        unfinished: UnfinishedSplit,
        ranges: Sequence[tuple[int, int]],
        kept: Sequence[dict[str, Any] | None],
        *,
        num_classes: int,
        workers: int,
    ) -> list[dict[str, Any]]:
        """Writes the files that an earlier run has not finished.

        Args:
            unfinished: The split.
            ranges: First item and end of each file.
            kept: State of each file that is kept, None for the others.
            num_classes: Number of classes.
            workers: Number of threads.

        Returns:
            The state of each file.
        """
        missing = [number for number, state in enumerate(kept) if state is None]
        items = [item for number in missing for item in self._items[slice(*ranges[number])]]
        self._num_done = len(self._items) - len(items)
        states = list(kept)
        with contextlib.closing(map_in_order(self._attempt, items, workers=workers)) as outcomes:
            for number in missing:
                contents: dict[str, Any] = {
                    "on_error": self._on_error,
                    "skipped": [],
                    "skipped_annotations": [],
                    "objects": [0] * num_classes,
                    "pixels": [0] * (num_classes + 1),
                    "lost": {},
                    "turned": 0,
                }
                # With the items first, `zip` stops without consuming the first outcome of the next file.
                pairs = zip(self._items[slice(*ranges[number])], outcomes, strict=False)
                states[number] = unfinished.write(number, self._count_records(pairs, contents), contents)
        return [state for state in states if state is not None]

    def _attempt(self, item: Item) -> Record | UserError:
        try:
            with errors.enough_memory(f"'{self._file_of(item)}'"):
                return self._make_record(item)
        except UserError as error:
            return error

    def _count_records(
        self, pairs: Iterable[tuple[Item, Record | UserError]], contents: dict[str, Any]
    ) -> Iterator[bytes]:
        """Yields the serialized examples of a file, and adds up its contents."""
        for item, outcome in pairs:
            if isinstance(outcome, Record):
                for counted, counts in (("objects", outcome.objects), ("pixels", outcome.pixels)):
                    for class_id, count in enumerate(counts):
                        contents[counted][class_id] += count
                contents["lost"] = sum_counts(iter((contents["lost"], outcome.lost)))
                contents["skipped_annotations"] += [self._fault(item, fault) for fault in outcome.skipped_annotations]
                contents["turned"] += outcome.is_turned
                if outcome.serialized is not None:
                    yield outcome.serialized
            elif self._may_skip:
                contents["skipped"].append(self._fault(item, str(outcome)))
            else:
                raise outcome
            self._num_done += 1
            if self._progress is not None:
                self._progress(self._num_done, len(self._items))

    def _fault(self, item: Item, reason: str) -> dict[str, str]:
        return {"file": self._file_of(item), "reason": reason}

    def _file_of(self, item: Item) -> str:
        paths = self._inputs_of(item) if self._inputs_of is not None else ()
        return str(paths[0] if paths else item)


def _split_into_ranges(num_items: int, shards: int | None) -> list[tuple[int, int]]:
    """Returns the first item and the end of each file: `shards` files, or about one per `EXAMPLES_PER_SHARD` items."""
    if shards is None:
        shards = max(1, round(num_items / EXAMPLES_PER_SHARD))
    require_shard_count(shards)
    shards = min(shards, max(1, num_items))
    bounds = [number * num_items // shards for number in range(shards + 1)]
    return list(itertools.pairwise(bounds))


def _make_report(
    split: str, states: Sequence[Mapping[str, Any]], *, kept_files: int, is_unchanged: bool = False
) -> ConversionReport:
    """Adds up the statistics of the files."""
    return ConversionReport(
        split,
        examples=sum(state["examples"] for state in states),
        skipped=tuple(fault["reason"] for state in states for fault in state["skipped"]),
        objects=tuple(map(sum, zip(*(state["objects"] for state in states), strict=True))),
        pixels=tuple(map(sum, zip(*(state["pixels"] for state in states), strict=True))),
        lost=sum_counts(state["lost"] for state in states),
        skipped_annotations=tuple(fault["reason"] for state in states for fault in state["skipped_annotations"]),
        turned=sum(state["turned"] for state in states),
        kept_files=kept_files,
        files=len(states),
        is_unchanged=is_unchanged,
    )


def make_labeled_record(
    *,
    image: bytes | np.ndarray,
    panoptic: np.ndarray,
    filename: str,
    info: DatasetInfo,
    losses: Losses | None = None,
    label_format: LabelFormat = "png",
) -> Record:
    """Makes the record of an image and its label, and counts objects and pixels of each class.

    Args:
        image: The content of a whole image file, or the pixels, uint8 [H, W, 3] RGB.
        panoptic: int32 [H, W], panoptic map.
        filename: The image's file name.
        info: The meaning of the label.
        losses: What is lost of the image so far; the pixels of crowd regions are added.
        label_format: How the record holds the label.

    Returns:
        The record, see `records.serialize_example`.

    Raises:
        UserError: If the image cannot be decoded, or image and label have different sizes.
    """
    serialized = serialize_example(
        image=image, panoptic=panoptic, filename=filename, bit_depth=info.bit_depth, label_format=label_format
    )
    table = list_segments(panoptic)
    classes = np.minimum(table.values // info.label_divisor, info.num_classes)
    instances = table.values % info.label_divisor
    is_object = np.isin(classes, info.thing_classes) & (instances > 0)
    pixels = np.zeros(info.num_classes + 1, np.int64)
    np.add.at(pixels, classes, table.areas)
    objects = np.bincount(classes[is_object], minlength=info.num_classes)
    losses = Losses() if losses is None else losses
    is_crowd = np.isin(classes, info.thing_classes) & (instances == 0)
    for class_id, area in zip(classes[is_crowd].tolist(), table.areas[is_crowd].tolist(), strict=True):
        losses.add(CROWD, info.categories[class_id].name, pixels=area)
    return Record(
        serialized,
        tuple(objects.tolist()),
        tuple(pixels.tolist()),
        losses.counts,
        losses.faults,
        is_turned=losses.is_turned,
    )


def fault_of_image(name: str, source: Path, error: UserError) -> UserError:
    """Returns the error of one image, with the names of the image and of its source in front."""
    text = str(error)
    for beginning in (f"Image '{name}' ", f"'{name}' "):
        if text.startswith(beginning):  # The name once is enough.
            text = f"it {text.removeprefix(beginning)}"
    return UserError(f"Image '{name}' of '{source}': {text}")


def agree_on_dataset_info(
    info: DatasetInfo, *, output_dir: Path, split: str, max_instances: int, label_divisor: int | None = None
) -> DatasetInfo:
    """Chooses classes and label divisor of a split, consistent with other splits in the folder.

    The classes are compared by id and name, so a source may list them in another order, or only those that occur. New
    ones are added after those of the folder, whose class ids stay.

    Args:
        info: The `DatasetInfo` of the source; its label divisor is ignored.
        output_dir: The record folder, which may be missing.
        split: The split to write.
        max_instances: Largest number of instances of a class in any image of the split.
        label_divisor: The user's choice; None: that of the folder, or else the smallest of `LABEL_DIVISORS` that fits.

    Returns:
        The `DatasetInfo` to write: if the folder has other splits, their classes and divisor.

    Raises:
        UserError: If the divisor is too small, or other splits in the folder, or interrupted conversions of them, have
            contradicting categories or another divisor.
    """
    existing, other_splits = _existing_info(output_dir, split)
    if existing is not None and existing.record_offset:
        raise UserError(f"'{output_dir}' holds records that DeepLab2 made; choose another output folder.")
    if existing is not None and other_splits:
        info = _with_known_classes(existing, info, output_dir, other_splits)
    interrupted = _interrupted_others(info, output_dir, split)
    if label_divisor is None:
        known = [found.label_divisor for found in (existing, *interrupted.values()) if found is not None]
        fitting = [divisor for divisor in (*known, *LABEL_DIVISORS) if divisor > max_instances]
        if not fitting:
            raise UserError(
                f"An image of split '{split}' has {max_instances} instances of one class, for which label_divisor "
                f"{LABEL_DIVISORS[-1]} is too small; give a label_divisor above {max_instances}."
            )
        label_divisor = fitting[0]
    elif label_divisor <= max_instances:
        raise UserError(
            f"label_divisor {label_divisor} is too small: an image of split '{split}' has {max_instances} instances of "
            f"one class; give {max_instances + 1} or more."
        )
    _require_label_divisor(interrupted, label_divisor, output_dir, split)
    if existing is None or not other_splits:
        return dataclasses.replace(info, label_divisor=label_divisor)
    if existing.label_divisor != label_divisor:
        raise UserError(
            f"'{output_dir}' holds splits ({', '.join(other_splits)}) with label_divisor {existing.label_divisor}, but "
            f"split '{split}' needs {label_divisor}; convert all of them with label_divisor {label_divisor}."
        )
    return dataclasses.replace(info, label_divisor=label_divisor)


def known_categories(output_dir: Path, split: str) -> tuple[Category, ...]:
    """Returns the classes of the other splits in a record folder, which may be missing."""
    existing, other_splits = _existing_info(output_dir, split)
    return existing.categories if existing is not None and other_splits else ()


def describe_classes(known: Sequence[Category], info: DatasetInfo, split: str) -> list[str]:
    """Returns sentences for the user if a source does not list the classes that a record folder knows.

    Args:
        known: The classes that the folder had, see `known_categories`.
        info: The `DatasetInfo` of the source.
        split: The split.
    """
    here, there = ([category.name for category in categories] for categories in (info.categories, known))
    new, absent = ([name for name in one if name not in other] for one, other in ((here, there), (there, here)))
    sentences = []
    if known and new:
        sentences.append(f"Split '{split}' adds classes that the other splits do not have: {', '.join(new)}.")
    if known and absent:
        sentences.append(f"Split '{split}' does not list the classes {', '.join(absent)} of the other splits.")
    return sentences


def _existing_info(output_dir: Path, split: str) -> tuple[DatasetInfo | None, list[str]]:
    """Returns the `DatasetInfo` of a record folder, None if it has none, and the names of its other splits."""
    if not (output_dir / dataset_info.FILE_NAME).is_file():
        return None, []
    return DatasetInfo.load(output_dir), [name for name in list_splits(output_dir) if name != split]


def _with_known_classes(
    existing: DatasetInfo, info: DatasetInfo, output_dir: Path, other_splits: Sequence[str]
) -> DatasetInfo:
    """Returns the classes of a record folder and, after them, new ones of a source; refuses contradictions."""
    new = []
    known_names = {category.name for category in existing.categories}
    for position, category in enumerate(info.categories):
        class_id = existing.class_of_category_id.get(category.id)
        if class_id is None and category.name not in known_names:
            new.append(category)
            continue
        if class_id is None:
            class_id = next(i for i, known in enumerate(existing.categories) if known.name == category.name)
        known = existing.categories[class_id]
        # Colors that were generated by position do not count.
        is_generated = category.color == generate_color(position) or known.color == generate_color(class_id)
        if dataclasses.replace(category, color=known.color) != known or not (
            is_generated or category.color == known.color
        ):
            raise UserError(
                f"'{output_dir}' holds records of '{existing.name}' with other categories "
                f"({_difference(known, category)}) in its other splits ({', '.join(other_splits)}); choose another "
                "output folder."
            )
    categories = (*existing.categories, *new)
    return dataclasses.replace(
        existing, categories=categories, ignore_label=max(existing.ignore_label, len(categories))
    )


def agree_on_bit_depth(
    info: DatasetInfo, images: Iterable[Path], *, output_dir: Path, split: str, bit_depth: int | None
) -> DatasetInfo:
    """Adds to a `DatasetInfo` the number of bits of images with more than 8 bits per channel.

    Args:
        info: Returned by `agree_on_dataset_info`.
        images: The image files of the split.
        output_dir: The record folder, which may be missing.
        split: The split to write.
        bit_depth: The user's choice; None: that of other splits in the folder, or else from the largest value.

    Returns:
        The `DatasetInfo` to write.

    Raises:
        UserError: If it is not in 8..32, or other splits in the folder have another.
    """
    if bit_depth is not None and not 8 <= bit_depth <= 32:
        raise UserError(f"bit_depth must be 8 to 32, got {bit_depth}.")
    known = None
    if (output_dir / dataset_info.FILE_NAME).is_file() and set(list_splits(output_dir)) - {split}:
        known = DatasetInfo.load(output_dir).bit_depth
    if None not in (known, bit_depth) and known != bit_depth:
        raise UserError(
            f"'{output_dir}' holds other splits whose images were scaled from {known} bits to 8; give --bit-depth "
            f"{known}, or convert all splits with the same."
        )
    return dataclasses.replace(info, bit_depth=known or bit_depth or find_bit_depth(images))


def _interrupted_others(info: DatasetInfo, output_dir: Path, split: str) -> dict[str, DatasetInfo]:
    """Returns the classes of interrupted conversions of other splits; raises `UserError` if they differ from `info`."""
    interrupted = interrupted_conversions(output_dir)
    interrupted.pop(split, None)
    for name, other in interrupted.items():
        if other.categories != info.categories:
            raise UserError(
                f"'{output_dir}' holds an interrupted conversion of split '{name}' with other categories "
                f"({_first_difference(other, info)}); finish that conversion first, or choose another output "
                "folder."
            )
    return interrupted


def _require_label_divisor(
    interrupted: Mapping[str, DatasetInfo], label_divisor: int, output_dir: Path, split: str
) -> None:
    """Raises `UserError` unless interrupted conversions of other splits have this label divisor."""
    for name, other in interrupted.items():
        if other.label_divisor != label_divisor:
            raise UserError(
                f"'{output_dir}' holds an interrupted conversion of split '{name}' with label_divisor "
                f"{other.label_divisor}, but split '{split}' needs {label_divisor}; finish that conversion first, "
                f"choose another output folder, or convert both with label_divisor {label_divisor}."
            )


def require_replaceable(output_dir: Path, sources: Mapping[str, Sequence[Path]], *, replace: bool) -> None:
    """Checks all splits of a conversion before the first is written; `write_split` checks each again.

    Args:
        output_dir: The record folder, which may be missing.
        sources: The source of each split, see `write_split`.
        replace: Whether splits from other sources may be replaced.

    Raises:
        UserError: If the folder has one of the splits, or an interrupted conversion of it, from another source.
    """
    for split, source in sources.items():
        if not replace and output_dir.is_dir():
            require_same_source(output_dir, split, source)


def _first_difference(existing: DatasetInfo, info: DatasetInfo) -> str:
    """Describes the first difference between the categories of two data sets."""
    for old, new in zip(existing.categories, info.categories, strict=False):
        if old != new:
            return _difference(old, new)
    return f"{existing.num_classes} categories there, {info.num_classes} here"


def _difference(old: Category, new: Category) -> str:
    """Describes the difference between the categories of two data sets."""
    if (old.id, old.name) != (new.id, new.name):
        return f"id {old.id} '{old.name}' there, id {new.id} '{new.name}' here"
    if old.is_thing != new.is_thing:
        return f"'{old.name}' is a thing in one and stuff in the other"
    return f"'{old.name}' has the color {old.color} there and {new.color} here"


def require_folder(folder: Path, what: str) -> None:
    """Raises `UserError` unless a folder exists and can be read; `what` is its name in the message."""
    require_local(folder)
    if not folder.is_dir():
        raise UserError(f"The {what} '{folder}' does not exist or is not a folder; check the path.")
    if not os.access(folder, os.R_OK | os.X_OK):
        raise UserError(f"The {what} '{folder}' may not be read; change its permissions.")
