"""What all converters share: writing one split, in order, with faulty examples refused or counted."""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, TypedDict, TypeVar

from deeplab2_like import errors
from deeplab2_like.data import dataset_info, tfrecord
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.files import make_folder
from deeplab2_like.parallel import map_in_order

Item = TypeVar("Item")
Progress = Callable[[int, int], None]
OnError = Literal["stop", "skip"]

EXAMPLES_PER_SHARD = 500
# Tried in this order if the user does not say: the smallest that holds all instances of a class.
LABEL_DIVISORS = (1000, 10_000)


class WriteOptions(TypedDict, total=False):
    """Arguments of `write_split` that converters hand on as they are."""

    shards: int | None
    workers: int
    on_error: OnError
    progress: Progress | None


@dataclasses.dataclass(frozen=True)
class ConversionReport:
    """What became of one split.

    Attributes:
        split: Its name.
        examples: Number of examples written.
        skipped: For each example left out, what was wrong with it.
    """

    split: str
    examples: int
    skipped: tuple[str, ...] = ()


def write_split(
    items: Sequence[Item],
    make_record: Callable[[Item], bytes],
    *,
    info: DatasetInfo,
    output_dir: Path,
    split: str,
    shards: int | None = None,
    workers: int = 1,
    on_error: OnError = "stop",
    progress: Progress | None = None,
) -> ConversionReport:
    """Writes one split and then `dataset_info.json`; the files depend neither on `workers` nor on timing.

    Args:
        items: One per example, in the order of the records.
        make_record: Makes an item's serialized example; raises `UserError` if the item is faulty. Called from several
            threads: decoding and encoding of images, which take nearly all of the time, run side by side in them.
        info: What the labels mean, as `agree_on_dataset_info` returns it.
        output_dir: The record folder; made if it is missing.
        split: The split's name.
        shards: Number of files, at most one per item; None: about one per `EXAMPLES_PER_SHARD` items.
        workers: Number of threads.
        on_error: "stop" at the first faulty item, or "skip" it and report it.
        progress: Called after each item with the numbers of items done and of all.

    Returns:
        What was written and skipped.

    Raises:
        UserError: If an argument is wrong, an item is faulty and `on_error` is "stop", or no example is left. Then the
            folder is as it was.
    """
    if on_error not in ("stop", "skip"):
        raise errors.unknown_name("value of on_error", on_error, ("stop", "skip"))
    if workers < 1:
        raise UserError(f"workers must be 1 or more, got {workers}.")
    if shards is None:
        shards = max(1, round(len(items) / EXAMPLES_PER_SHARD))
    is_new = not output_dir.exists()
    make_folder(output_dir)

    def attempt(item: Item) -> bytes | UserError:
        try:
            return make_record(item)
        except UserError as error:
            return error

    skipped: list[str] = []
    try:
        with tfrecord.ShardedWriter(output_dir, split, min(shards, max(1, len(items)))) as writer:
            for done, outcome in enumerate(map_in_order(attempt, items, workers=workers), start=1):
                if isinstance(outcome, bytes):
                    writer.write(outcome)
                elif on_error == "stop":
                    raise outcome
                else:
                    skipped.append(str(outcome))
                if progress is not None:
                    progress(done, len(items))
            if not writer.num_written:
                first = f"all {len(skipped)} are faulty, the first: {skipped[0]}" if skipped else ""
                reason = first or "the data set is empty."
                raise UserError(f"Split '{split}' has no examples to write: {reason}")
    except BaseException:
        if is_new:
            with contextlib.suppress(OSError):  # Whatever somebody else has put there stays.
                output_dir.rmdir()
        raise
    info.save(output_dir)
    return ConversionReport(split, writer.num_written, tuple(skipped))


def agree_on_dataset_info(
    info: DatasetInfo, *, output_dir: Path, split: str, max_instances: int, label_divisor: int | None = None
) -> DatasetInfo:
    """Settles the label divisor of a split, with regard to other splits that the folder already holds.

    Args:
        info: The data set's facts; its label divisor does not count.
        output_dir: The record folder; need not exist.
        split: The split to be written.
        max_instances: Largest number of instances of a class in any image of the split.
        label_divisor: The user's choice, or None for the folder's, or else the smallest of `LABEL_DIVISORS` that fits.

    Returns:
        The facts to write, the same as in the folder if it has other splits.

    Raises:
        UserError: If the divisor is too small, or the folder's splits have other categories or another divisor.
    """
    existing = None
    other_splits: list[str] = []
    if (output_dir / dataset_info.FILE_NAME).is_file():
        existing = DatasetInfo.load(output_dir)
        other_splits = [name for name in tfrecord.available_splits(output_dir) if name != split]
        if existing.record_offset:
            raise UserError(f"'{output_dir}' holds records that DeepLab2 has made; choose another output folder.")
        if existing.categories != info.categories:
            raise UserError(
                f"'{output_dir}' holds records of '{existing.name}' with other categories "
                f"({_first_difference(existing, info)}); choose another output folder."
            )
    if label_divisor is None:
        known = [existing.label_divisor] if existing is not None else []
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
    if existing is None:
        return dataclasses.replace(info, label_divisor=label_divisor)
    if other_splits and existing.label_divisor != label_divisor:
        raise UserError(
            f"'{output_dir}' holds splits ({', '.join(other_splits)}) of label_divisor {existing.label_divisor}, but "
            f"split '{split}' takes {label_divisor}; convert all of them with label_divisor {label_divisor}."
        )
    return dataclasses.replace(existing, label_divisor=label_divisor)


def _first_difference(existing: DatasetInfo, info: DatasetInfo) -> str:
    """Says in words where the categories of two data sets part."""
    for old, new in zip(existing.categories, info.categories, strict=False):
        if old != new:
            return f"id {old.id} '{old.name}' there, id {new.id} '{new.name}' here"
    return f"{existing.num_classes} categories there, {info.num_classes} here"


def require_folder(folder: Path, what: str) -> None:
    """Raises `UserError` unless `folder`, described by `what`, exists."""
    if not folder.is_dir():
        raise UserError(f"The {what} '{folder}' does not exist or is no folder; check the path.")
