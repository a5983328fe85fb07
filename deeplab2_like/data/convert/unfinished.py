"""Interrupted conversions: how a split appears as a whole, and how a later run continues an interrupted one.

While a split is converted, its files are in the hidden folder `.SPLIT.conversion` of the record folder: `plan.json`
describes the conversion, and each finished file of records is followed by a JSON with its state. Both are renamed into
place, so a file with a state is complete.

Once all files are complete, `publish.json` is written. From then on the new split counts: the files of an earlier
conversion are moved out of the record folder and the new ones into it. These are renames only, so old and new files are
never mixed there, and the moment without a split is short. If the process is killed in between, the next conversion of
the split completes the move, whatever its source. Finally `.SPLIT.conversion.json` is written, by which a later run
knows the source of the split and whether there is anything to do.

Meanwhile the process holds the lock of `.SPLIT.conversion.lock`, so that two conversions of a split do not remove each
other's files.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deeplab2_like import files, temporary
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import ShardWriter, conversion_file, list_present_shards, list_splits, shard_names
from deeplab2_like.errors import UserError
from deeplab2_like.parsing import parse_json

ERRORS_NAME = "errors.jsonl"

# The keys of the state of a finished file.
_STATE_KEYS = (
    "fingerprint",
    "bytes",
    "examples",
    "on_error",
    "skipped",
    "skipped_annotations",
    "objects",
    "pixels",
    "lost",
    "turned",
)

# Incremented whenever equal inputs and options give other files than before, so that old and new files are not mixed.
_FORMAT = 5


def hidden_folder(folder: Path, split: str) -> Path:
    """Returns the hidden folder in which a split is converted."""
    return folder / f".{split}.conversion"


def interrupted_conversions(folder: Path) -> dict[str, DatasetInfo]:
    """Returns the classes of each interrupted conversion with finished files in a record folder, by split."""
    found = {}
    for hidden in sorted(folder.glob(".*.conversion")):
        plan = _read(hidden / "plan.json", "format", "categories", "label_divisor")
        if plan is not None and plan["format"] == _FORMAT and _has_finished(hidden):
            split = hidden.name[1:].removesuffix(".conversion")
            found[split] = DatasetInfo.from_coco_categories(
                plan["categories"], name=str(hidden), label_divisor=plan["label_divisor"]
            )
    return found


def require_same_source(folder: Path, split: str, source: Sequence[Path]) -> None:
    """Checks that an existing split and an interrupted conversion of it were made from a source.

    Args:
        folder: The record folder, which must exist.
        split: The split's name.
        source: The files or folders of the source.

    Raises:
        UserError: If one of them was made from another source or an unknown one.
    """
    hidden = hidden_folder(folder, split)
    found = []
    if (publication := _read(hidden / "publish.json", "plan")) is not None:  # It replaces everything else.
        found.append((f"Split '{split}' in '{folder}' was made", publication["plan"]))
    else:
        if _has_finished(hidden) and (plan := _read(hidden / "plan.json")) is not None:
            found.append((f"An interrupted conversion of split '{split}' in '{folder}' is", plan))
        if list_present_shards(folder, split):
            note = _read(conversion_file(folder, split), "plan")
            found.append((f"Split '{split}' in '{folder}' was made", note["plan"] if note else None))
    for what, plan in found:
        old, new = plan.get("source") if isinstance(plan, dict) else None, _identify_source(source)
        if old != new:
            raise UserError(
                f"{what} {_describe_source(old)}, not {_describe_source(new)}; name another split with --split or "
                "another folder with --output-dir, or replace it with --replace."
            )


def plans_of_source(folder: Path, source: Sequence[Path]) -> dict[str, Mapping[str, Any]]:
    """Returns the plan of each split in a record folder that was made from a source, by split."""
    plans: dict[str, Mapping[str, Any]] = {}
    for split in list_splits(folder) if folder.is_dir() else ():
        note = _read(conversion_file(folder, split), "plan")
        plan = note["plan"] if note else None
        if isinstance(plan, dict) and plan.get("source") == _identify_source(source):
            plans[split] = plan
    return plans


def make_plan(
    info: DatasetInfo, *, source: Sequence[Path], examples: int, shards: int, options: Mapping[str, Any]
) -> dict[str, Any]:
    """Makes the content of `plan.json`: everything that affects the files, except the inputs themselves."""
    plan = {
        "format": _FORMAT,
        "source": _identify_source(source),
        "examples": examples,
        "shards": shards,
        "label_divisor": info.label_divisor,
        "ignore_label": info.ignore_label,
        "categories": info.to_coco_categories(),
        **options,
    }
    return json.loads(json.dumps(plan))  # As it will be read: with lists instead of tuples.


def fingerprint(items: Sequence[Any], inputs: Sequence[Sequence[Path]]) -> str:
    """Computes a hash of the inputs of a file of records, which changes when they change.

    Args:
        items: The items of the file; their `repr` is hashed.
        inputs: The input files of each item; path, size and time of the last change are hashed.

    Returns:
        Hexadecimal digits.
    """
    digest = hashlib.sha256()
    for item, paths in zip(items, inputs, strict=True):
        digest.update(repr(item).encode("utf-8", "surrogatepass"))
        for path in paths:
            try:
                status = os.stat(path)
                state = f"{status.st_size} {status.st_mtime_ns}"
            except (OSError, ValueError):  # ValueError for a name with a null character.
                state = "absent"
            digest.update(f"\n{os.path.abspath(path)} {state}\n".encode("utf-8", "surrogatepass"))
    return digest.hexdigest()


class UnfinishedSplit:
    """A split that is being converted.

    Args:
        folder: The record folder, which must exist before any method is called.
        split: The split's name.
        plan: See `make_plan`.
        fingerprints: The fingerprint of each file; None: the inputs are unknown, so nothing of an earlier run is used.
    """

    def __init__(
        self, folder: Path, split: str, *, plan: Mapping[str, Any], fingerprints: Sequence[str] | None
    ) -> None:
        self.names = shard_names(split, plan["shards"])
        self._folder = folder
        self._split = split
        self._plan = plan
        self._fingerprints = fingerprints
        self._hidden = hidden_folder(folder, split)
        self._record = conversion_file(folder, split)
        self._publication = self._hidden / "publish.json"

    @contextlib.contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps other conversions of the split out while the context is open.

        Raises:
            UserError: If another process is converting the split.
        """
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(temporary.lock_file(self._hidden.with_name(f"{self._hidden.name}.lock")))
            except temporary.LockedError as error:
                raise UserError(
                    f"Split '{self._split}' in '{self._folder}' is being converted by another process; wait until it "
                    "has ended, or choose another --output-dir."
                ) from error
            yield

    def complete_publication(self) -> bool:
        """Completes the move into the record folder if a run was killed in it.

        Returns:
            Whether there was anything to complete.
        """
        publication = _read(self._publication, "plan", "files")
        if publication is None:
            return False
        with self._write_errors():
            if _read(self._record) == publication:
                self._remove()
                return False
            info = DatasetInfo.load(self._hidden)
            others = [name for name in list_splits(self._folder) if name != self._split]
            if others and DatasetInfo.load(self._folder) != info:
                raise UserError(
                    f"'{self._hidden}' holds a finished conversion that was interrupted while it was moved, and that "
                    f"does not match the splits made since ({', '.join(others)}): its classes or its label_divisor "
                    f"{info.label_divisor} differ; convert those into another folder."
                )
            self._move_into_place(publication, info)
        return True

    def finished(self, *, on_error: str) -> list[dict[str, Any]] | None:
        """Returns the state of each file if an earlier run completed the same conversion, otherwise None."""
        found = _read(self._record, "plan", "files")
        if found is None or self._fingerprints is None or found["plan"] != self._plan:
            return None
        states = found["files"]
        if not isinstance(states, list) or not all(_has_keys(state, _STATE_KEYS) for state in states):
            return None
        is_same = len(states) == len(self.names) and all(
            self._is_current(state, number, on_error) and _size(self._folder / name) == state["bytes"]
            for number, (name, state) in enumerate(zip(self.names, states, strict=True))
        )
        if not is_same:
            return None
        with self._write_errors():
            self._remove()  # Left over if a run was killed at the very end.
        return states

    def begin(self, *, on_error: str, replace: bool = False) -> list[dict[str, Any] | None]:
        """Starts the conversion, or continues an interrupted one.

        Args:
            on_error: See `common.write_split`; files from which something was skipped are kept only if they were made
                with the same value.
            replace: Whether to remove an interrupted conversion with another plan.

        Returns:
            The state of each file that is finished, None for the others.

        Raises:
            UserError: If there is an interrupted conversion with another plan, or the folder cannot be written.
        """
        plan = _read(self._hidden / "plan.json")
        is_ours = plan is not None and plan.get("format") == _FORMAT
        is_other = plan != self._plan
        if self._fingerprints is None or not is_ours or not self._has_finished() or (is_other and replace):
            with self._write_errors():
                self._remove()
        elif is_other:
            raise UserError(
                f"'{self._hidden}' holds an interrupted conversion with {self._difference(plan)}; repeat that one to "
                "finish it, or start over with --replace."
            )
        files.write_atomically(self._hidden / "plan.json", json.dumps(self._plan).encode())
        temporary.remove_leftovers(self._hidden)
        states: list[dict[str, Any] | None] = []
        for number, name in enumerate(self.names):
            state = _read(self._hidden / f"{name}.json", *_STATE_KEYS)
            # A file that is not here was moved to the record folder already.
            sizes = (_size(self._hidden / name), _size(self._folder / name))
            size = sizes[1] if sizes[0] is None else sizes[0]
            is_whole = state is not None and size == state["bytes"] and self._is_current(state, number, on_error)
            states.append(state if is_whole else None)
        return states

    def write(self, number: int, records: Iterable[bytes], contents: Mapping[str, Any]) -> dict[str, Any]:
        """Writes a file and its state.

        Args:
            number: The number of the file.
            records: The serialized examples; may be a generator.
            contents: The other keys of the state; may be filled while the records are generated.

        Returns:
            The state.
        """
        path = self._hidden / self.names[number]
        with self._write_errors():
            path.with_name(f"{path.name}.json").unlink(missing_ok=True)
        with ShardWriter(path) as writer:
            for record in records:
                writer.write(record)
        state = {
            "fingerprint": None if self._fingerprints is None else self._fingerprints[number],
            "bytes": _size(path),
            "examples": writer.num_written,
            **contents,
        }
        files.write_atomically(path.with_name(f"{path.name}.json"), json.dumps(state).encode())
        return state

    def publish(self, info: DatasetInfo, states: Sequence[Mapping[str, Any]]) -> None:
        """Moves all files into the record folder; if the process is killed meanwhile, the next run completes it."""
        publication = {"plan": self._plan, "files": list(states)}
        with self._write_errors():
            info.save(self._hidden)
            files.write_atomically(self._publication, json.dumps(publication).encode())
            self._move_into_place(publication, info)

    def _move_into_place(self, publication: Mapping[str, Any], info: DatasetInfo) -> None:
        """Replaces the split in the record folder by the finished one; can be repeated after an interruption."""
        names = shard_names(self._split, publication["plan"]["shards"])
        self._record.unlink(missing_ok=True)
        replaced = self._hidden / "replaced"
        replaced.mkdir(exist_ok=True)
        for name in list_present_shards(self._folder, self._split):
            if name not in names or (self._hidden / name).exists():
                # Renamed first, because deleting a large file takes longer.
                (self._folder / name).replace(replaced / name)
        info.save(self._folder)
        for name in names:
            if (self._hidden / name).exists():
                (self._hidden / name).replace(self._folder / name)
        self._report_errors(
            [fault for state in publication["files"] for fault in state["skipped"]]
            + [
                {"skipped": "annotation", **fault}
                for state in publication["files"]
                for fault in state.get("skipped_annotations", ())
            ]
        )
        files.write_atomically(self._record, json.dumps(publication).encode())
        self._remove()

    def abandon(self, *, keep_finished: bool) -> None:
        """Keeps finished files for the next run; if there are none, removes the hidden folder."""
        if self._publication.exists():
            return  # The record folder may need the files that are still here.
        if not keep_finished or self._fingerprints is None or not self._has_finished():
            shutil.rmtree(self._hidden, ignore_errors=True)

    def _report_errors(self, faults: Sequence[Mapping[str, str]]) -> None:
        """Lists the skipped examples and annotations in `errors.jsonl`, which also has those of other splits."""
        path = self._folder / ERRORS_NAME
        beginning = json.dumps({"split": self._split})[:-1] + ","
        lines = path.read_text(errors="replace").splitlines() if path.exists() else []
        lines = [line for line in lines if not line.startswith(beginning)]
        lines += [json.dumps({"split": self._split, **fault}) for fault in faults]
        if lines:
            files.write_atomically(path, "".join(f"{line}\n" for line in lines).encode())
        else:
            path.unlink(missing_ok=True)

    def _is_current(self, state: Mapping[str, Any], number: int, on_error: str) -> bool:
        if self._fingerprints is None or state["fingerprint"] != self._fingerprints[number]:
            return False
        return state["on_error"] == on_error or not (state["skipped"] or state["skipped_annotations"])

    def _difference(self, plan: Mapping[str, Any]) -> str:
        """Describes the first difference between the plan of an earlier run and this one."""
        for key in (*self._plan, *plan):
            old, new = plan.get(key), self._plan.get(key)
            if old != new:
                return "other categories" if key == "categories" else f"{key} {old} (now {new})"
        return "other options"

    def _has_finished(self) -> bool:
        """Returns whether an earlier run has finished at least one file."""
        return _has_finished(self._hidden)

    def _remove(self) -> None:
        if self._hidden.exists():
            # These two first: without them a later run ignores the rest, if this removal is killed.
            self._publication.unlink(missing_ok=True)
            (self._hidden / "plan.json").unlink(missing_ok=True)
            shutil.rmtree(self._hidden)

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise files.cannot_write(self._folder, error) from error


def _identify_source(source: Sequence[Path]) -> list[str]:
    return [os.path.realpath(path) for path in source]


def _describe_source(source: Any) -> str:
    """Describes the source of a split, after "made"."""
    if not isinstance(source, list):
        return "from an unknown source (by another program, or by an older version)"
    paths = " and ".join(f"'{path}'" for path in source)
    return f"from {paths}" if paths else "by `convert scenes`"


def _has_finished(hidden: Path) -> bool:
    """Returns whether at least one file in a hidden folder is finished."""
    return any(hidden.glob("*.tfrecord.json"))


def _read(path: Path, *keys: str) -> Any:
    """Reads a JSON file of this module, an object with the given keys; None if it is missing or damaged."""
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ValueError):
        return None
    return content if _has_keys(content, keys) else None


def _has_keys(content: Any, keys: Sequence[str]) -> bool:
    return isinstance(content, dict) and content.keys() >= set(keys)


def _size(path: Path) -> int | None:
    """Returns the size of a file in bytes; None if it does not exist."""
    try:
        return path.stat().st_size
    except OSError:
        return None
