"""The journal of a prediction run: which images are done, so that a repeated command continues.

It is a hidden file in the output folder. Its first line describes the run: the model and the options. Each further line
is an `Entry`, written once the files of an image are in place. A line that a killed run has cut off is ignored.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from deeplab2_like.errors import UserError
from deeplab2_like.files import cannot_write, write_atomically
from deeplab2_like.paths import is_inside
from deeplab2_like.temporary import TemporaryFile

JOURNAL_FILE = ".deeplab2-like-predictions.jsonl"


@dataclasses.dataclass(frozen=True)
class Entry:
    """A finished image or video.

    Attributes:
        name: Its name, with `/` between folders and without suffix.
        source: Its absolute path.
        stamp: Size in bytes and time of the last change of this file, in nanoseconds.
        file_name: Its path relative to the folder of all inputs.
        height: Height in pixels.
        width: Width in pixels.
        files: The files written for it, relative to the output folder.
        segments: The segments as in COCO panoptic files; none for a video.
    """

    name: str
    source: str
    stamp: tuple[int, int]
    file_name: str
    height: int
    width: int
    files: tuple[str, ...]
    segments: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    @classmethod
    def parse(cls, line: bytes) -> "Entry":
        """Reads a line; raises `ValueError` or `TypeError` if it is damaged."""
        content = json.loads(line)
        size, changed = content.pop("stamp")
        return cls(stamp=(int(size), int(changed)), files=tuple(content.pop("files")), **content)

    def to_line(self) -> bytes:
        """Returns the line that `parse` reads."""
        return json.dumps(dataclasses.asdict(self)).encode() + b"\n"


def stamp_of(file: Path) -> tuple[int, int]:
    """Returns size and time of the last change of a file; zeros if it cannot be read, which fails later."""
    try:
        status = file.stat()
    except (OSError, ValueError):
        return 0, 0
    return status.st_size, status.st_mtime_ns


class Journal:
    """The journal of an output folder. A context manager that closes the file.

    Memory holds a position per image.

    Args:
        output_dir: The output folder; it may be missing until `start`.
        run: The model and the options, by name; values that JSON holds.
        replace: Whether to begin anew where the folder has the results of another run.

    Raises:
        UserError: If the folder has the results of another model or of other options, and `replace` is False.
    """

    def __init__(self, output_dir: Path, run: Mapping[str, Any], *, replace: bool = False) -> None:
        self._folder = output_dir
        self._path = output_dir / JOURNAL_FILE
        self._run = json.loads(json.dumps(run))  # As it is read again.
        self._positions: dict[str, tuple[int, int]] = {}  # Name -> position and length of its line.
        self._earlier: list[str] = []  # Files of another run, which are deleted at the end unless they are replaced.
        self._file: BinaryIO | None = None
        self._is_new = True
        if not self._path.is_file():
            return
        header = self._read()
        if header.get("run") == self._run:
            self._is_new = False
            self._earlier = list(header.get("earlier", []))
        elif replace:
            files = (file for name in self._positions for file in self._read_entry(name).files)
            self._earlier = sorted({*header.get("earlier", []), *files})
            self._positions = {}
        else:
            raise UserError(
                f"'{output_dir}' has predictions of {_difference(header.get('run'), self._run)}; choose another "
                "--output-dir, or predict all again with --replace (in Python with replace=True)."
            )

    @property
    def has_earlier(self) -> bool:
        """Whether the folder may have results of another run."""
        return bool(self._earlier)

    def start(self) -> None:
        """Opens the journal for writing, in an existing folder; raises `UserError` if it cannot be written."""
        if self._is_new:
            write_atomically(self._path, self._header())
        try:
            self._file = self._path.open("r+b")
            end = max((start + length for start, length in self._positions.values()), default=len(self._header()))
            self._file.truncate(end)  # Removes what a killed run has cut off.
            self._file.seek(end)
        except OSError as error:
            raise cannot_write(self._path, error) from error

    def find(self, name: str, source: Path) -> Entry | None:
        """Returns the entry of an image if it is done: from this file, unchanged, with all its results in place."""
        if name not in self._positions:
            return None
        entry = self._read_entry(name)
        is_same = entry.source == os.path.abspath(source) and entry.stamp == stamp_of(source)
        return entry if is_same and all((self._folder / file).is_file() for file in entry.files) else None

    def add(self, entry: Entry) -> None:
        """Adds a finished image; raises `UserError` if the journal cannot be written."""
        assert self._file is not None, "not started"
        line = entry.to_line()
        try:
            position = self._file.tell()
            self._file.write(line)
            self._file.flush()
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._positions[entry.name] = (position, len(line))

    def read(self, names: Sequence[str]) -> Iterator[Entry]:
        """Yields the entries of images that are done."""
        for name in names:
            yield self._read_entry(name)

    def finish(self, names: Sequence[str]) -> None:
        """Deletes what is left of another run, and writes the journal again, without lines of no use.

        Args:
            names: The images, in order.

        Raises:
            UserError: If the journal cannot be written.
        """
        names = [*names, *sorted(self._positions.keys() - set(names))]
        kept = {file for entry in self.read(names) for file in entry.files}
        for file in self._earlier:
            # The journal may come from anywhere, so it must not choose other files.
            if file not in kept and is_inside(self._folder / file, self._folder):
                with contextlib.suppress(OSError):
                    (self._folder / file).unlink()
        self._earlier = []
        positions = {}
        try:
            with TemporaryFile(self._path) as temporary:
                temporary.file.write(self._header())
                for name in names:
                    line = self._read_line(name)
                    positions[name] = (temporary.file.tell(), len(line))
                    temporary.file.write(line)
                temporary.publish()
        except OSError as error:
            raise cannot_write(self._path, error) from error
        self._positions = positions

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()

    def _header(self) -> bytes:
        earlier = {"earlier": self._earlier} if self._earlier else {}
        return json.dumps({"run": self._run, **earlier}).encode() + b"\n"

    def _read(self) -> dict[str, Any]:
        """Reads the positions of the entries; returns the first line, empty if it is damaged."""
        with self._path.open("rb") as file:
            try:
                header = json.loads(file.readline())
            except ValueError:
                return {}
            position = file.tell()
            for line in file:
                try:
                    entry = Entry.parse(line)
                except (ValueError, TypeError, LookupError):
                    break
                if not line.endswith(b"\n"):
                    break
                self._positions[entry.name] = (position, len(line))
                position += len(line)
        return header if isinstance(header, dict) else {}

    def _read_entry(self, name: str) -> Entry:
        return Entry.parse(self._read_line(name))

    def _read_line(self, name: str) -> bytes:
        position, length = self._positions[name]
        with self._path.open("rb") as file:
            file.seek(position)
            return file.read(length)


def _difference(before: Any, now: Mapping[str, Any]) -> str:
    """Names what differs between two runs, for the error message."""
    if not isinstance(before, dict):
        return "an unknown run, as its journal is damaged"
    if before.get("model") != now["model"]:
        return "another model"
    name = next(key for key in {**now, **before} if before.get(key) != now.get(key))
    return f"other options ({name}: {_text(before.get(name))} before, {_text(now.get(name))} now)"


def _text(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)
