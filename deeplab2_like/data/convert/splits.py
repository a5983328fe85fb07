"""Decides which images are in which split: by the user's word, by the export, by names, or by a share."""

import dataclasses
import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from deeplab2_like.data.convert.unfinished import interrupted_conversions, require_same_source
from deeplab2_like.data.shards import list_splits
from deeplab2_like.errors import UserError
from deeplab2_like.printing import counted

_SPLIT_OF_WORD = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "minival": "val",
    "dev": "val",
    "test": "test",
    "testing": "test",
}
# The split of a source whose names say nothing, unless it is taken.
_DEFAULT = "train"
_SHARED_SPLIT = "val"


class Named(Protocol):
    """An item to convert; `name` is the file name of its image, which becomes the `image_id` of its record."""

    @property
    def name(self) -> str:
        """The file name of the image, which may contain folders."""


NamedItem = TypeVar("NamedItem", bound=Named)


def split_of_name(name: str) -> str | None:
    """Returns the split that a name tells: of its whole words, separated by anything but letters, the first known."""
    words = re.findall(r"[^\W\d_]+", name.casefold())
    return next((_SPLIT_OF_WORD[word] for word in words if word in _SPLIT_OF_WORD), None)


def choose_split(
    split: str | None, *paths: Path, output_dir: Path, source: Sequence[Path], val_share: float | None = None
) -> tuple[str, list[str]]:
    """Chooses the name of the split of a source that is a single split.

    Without a name from the user it is guessed from the names of the files or folders, or else from those of their
    parent folders. `panoptic_val2017.json` is val, `trainer.json` is unknown. An unknown one is "train", unless the
    record folder has another split, or a "train" from another source.

    Args:
        split: The name that the user gave, or None.
        paths: The files or folders of the split.
        output_dir: The record folder, which may be missing.
        source: The source of the split, see `common.write_split`.
        val_share: See `share_out`.

    Returns:
        The name, and a sentence for the user if it is a guess.

    Raises:
        UserError: If the names are of different splits, or the split is unknown and "train" is not free.
    """
    if split is not None:
        return split, []
    listed = " and ".join(f"'{path}'" for path in paths)
    absolute = [Path(os.path.abspath(path)) for path in paths]
    for names in ([path.name for path in absolute], [path.parent.name for path in absolute]):
        told = [(name, known) for name in names if (known := split_of_name(name))]
        found = sorted({known for _, known in told})
        if len(found) > 1:
            raise UserError(
                f"The names of {listed} are of different splits ({', '.join(found)}); name the split with --split."
            )
        if found:
            return found[0], [f"The split is '{found[0]}' because of the name '{told[0][0]}'; --split names another."]
    if not _is_default_free(output_dir, source, val_share):
        raise UserError(
            f"The split of {listed} is unknown, because neither the name nor that of the folder above has one of the "
            f"words {', '.join(_SPLIT_OF_WORD)}, and '{output_dir}' has a split; name it with --split."
        )
    return _DEFAULT, [f"The split is '{_DEFAULT}' because the names tell none; --split names another."]


def _is_default_free(output_dir: Path, source: Sequence[Path], val_share: float | None) -> bool:
    """Returns whether a record folder has no split from another source and no split of another name."""
    if not output_dir.is_dir():
        return True
    others = {*list_splits(output_dir), *interrupted_conversions(output_dir)} - {_DEFAULT}
    if val_share is not None:
        others -= {_SHARED_SPLIT}
    if others:
        return False
    try:
        require_same_source(output_dir, _DEFAULT, source)
    except UserError:
        return False
    return True


def split_by_subsets(
    items: Sequence[NamedItem],
    subset_of: Callable[[NamedItem], str | None],
    *,
    split: str | None,
    ignore_subsets: bool,
    where: str,
    are_lists: bool = False,
) -> tuple[dict[str, list[NamedItem]], list[str]] | None:
    """Divides the items of an export that says which image is in which split.

    Args:
        items: The items.
        subset_of: Returns the split of an item, or None if the export does not tell it.
        split: The name that the user gave: only this split is converted. None: all of them.
        ignore_subsets: Whether all items belong to one split, whatever the export says.
        where: Where the export tells the splits, for messages.
        are_lists: Whether the export lists the images of each split. Otherwise folders tell it, and a single folder
            beside other images is none of a split.

    Returns:
        The items of each split and sentences for the user; None if the export tells no splits.

    Raises:
        UserError: If the export does not have the split that the user gave.
    """
    if ignore_subsets:
        return None
    subsets: dict[str, list[NamedItem]] = {}
    rest = 0
    for item in items:
        subset = subset_of(item)
        if subset is None:
            rest += 1
        else:
            subsets.setdefault(subset, []).append(item)
    if not subsets or (len(subsets) == 1 and rest and not are_lists):
        return None
    if len(subsets) == 1 and not rest:
        ((subset, members),) = subsets.items()
        notes = [f"The split is '{subset}' because {where} tells it; --split names another."]
        return {split or subset: members}, [] if split else notes
    listed = ", ".join(f"{name}: {len(subsets[name])}" for name in sorted(subsets))
    advice = "--ignore-subsets puts all images into one split"
    if split is not None and split not in subsets:
        raise UserError(f"{where} has subsets ({listed} images) but no '{split}'; name one of them, or {advice}.")
    chosen = sorted(subsets) if split is None else [split]
    notes = [f"{where} divides the images into subsets ({listed}), of which {', '.join(chosen)} used; {advice}."]
    if rest:
        notes.append(f"Warning: left out {counted(rest, 'image')} in no subset of {where}; {advice}.")
    return {name: subsets[name] for name in chosen}, notes


@dataclasses.dataclass(frozen=True)
class Division(Generic[NamedItem]):
    """The splits of a source.

    Attributes:
        splits: The items of each split.
        notes: Sentences for the user on what was guessed.
        by_subsets: Whether the source tells which item is in which split.
    """

    splits: dict[str, list[NamedItem]]
    notes: list[str]
    by_subsets: bool

    @property
    def first(self) -> str:
        """The name of the first split."""
        return next(iter(self.splits))


def divide(
    items: Sequence[NamedItem],
    subset_of: Callable[[NamedItem], str | None],
    *,
    split: str | None,
    ignore_subsets: bool,
    where: str,
    paths: Sequence[Path],
    output_dir: Path,
    source: Sequence[Path],
    val_share: float | None = None,
    are_lists: bool = False,
) -> Division[NamedItem]:
    """Divides items by the subsets that the source tells, or puts all into one split, whose name may be guessed.

    Args:
        items: The items.
        subset_of: See `split_by_subsets`, as for the next three.
        split: The name that the user gave, or None.
        ignore_subsets: Whether all items belong to one split.
        where: Where the source tells the splits, for messages.
        paths: The files or folders whose names tell the name of a single split.
        output_dir: The record folder, which may be missing.
        source: The source of the splits, see `common.write_split`.
        val_share: See `share_out`.
        are_lists: See `split_by_subsets`.

    Raises:
        UserError: If the source does not have the split that the user gave, or the name of a single split is unknown.
    """
    subsets = split_by_subsets(
        items, subset_of, split=split, ignore_subsets=ignore_subsets, where=where, are_lists=are_lists
    )
    if subsets is not None:
        return Division(*subsets, by_subsets=True)
    name, notes = choose_split(split, *paths, output_dir=output_dir, source=source, val_share=val_share)
    return Division({name: list(items)}, notes, by_subsets=False)


def split_of_folder(name: str) -> str | None:
    """Returns the split that the first folder in the relative path of an image tells, or None."""
    folder, separator, _ = name.partition("/")
    return split_of_name(folder) if separator else None


def share_out(splits: Mapping[str, Sequence[NamedItem]], val_share: float | None) -> dict[str, Sequence[NamedItem]]:
    """Moves a share of the items of the only split to a validation split.

    The name of the image decides alone, so an image stays where it is when others are added.

    Args:
        splits: The items of each split.
        val_share: The share, above 0 and below 1, of which at least one image remains in either; None: none.

    Returns:
        The items of each split.

    Raises:
        UserError: If the share is no share, or there are several splits or a validation split already.
    """
    if val_share is None:
        return dict(splits)
    require_one_split(list(splits), val_share)
    ((split, items),) = splits.items()
    if len(items) < 2:
        raise UserError(f"--val-share needs two images or more, but the split has {len(items)}; leave it out.")

    def place(item: NamedItem) -> float:
        digest = hashlib.sha256(item.name.encode("utf-8", "surrogatepass")).digest()
        return int.from_bytes(digest[:8]) / 2**64

    places = [place(item) for item in items]
    number = min(max(sum(position < val_share for position in places), 1), len(items) - 1)
    limit = sorted(places)[number]
    return {
        split: [item for item, position in zip(items, places, strict=True) if position >= limit],
        _SHARED_SPLIT: [item for item, position in zip(items, places, strict=True) if position < limit],
    }


def require_one_split(splits: Sequence[str], val_share: float | None) -> None:
    """Raises `UserError` unless a validation share can be taken out of the splits, or none is wanted."""
    if val_share is None:
        return
    if not 0 < val_share < 1:
        raise UserError(f"--val-share is a share above 0 and below 1, such as 0.1, but it is {val_share}.")
    if len(splits) > 1:
        raise UserError(
            f"--val-share needs a single split, but the images already are in splits {', '.join(splits)}; leave out "
            "--val-share."
        )
    if _SHARED_SPLIT in splits:
        raise UserError(
            f"--val-share makes split '{_SHARED_SPLIT}', but the images already are split '{_SHARED_SPLIT}'; leave out "
            "--val-share, or name another split with --split."
        )
