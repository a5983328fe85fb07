"""Shards: the TFRecord files that hold a split of a data set.

A split consists of the files `SPLIT-00000-of-00004.tfrecord` and on. `read_index` finds every record by its header
alone, so the training pipeline can shuffle a data set of any size completely, and resume at any step without reading
the skipped records.
"""

import contextlib
import dataclasses
import functools
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import tensorflow as tf

from deeplab2_like import files
from deeplab2_like.errors import UserError
from deeplab2_like.parsing import parse_json
from deeplab2_like.temporary import TemporaryFolder

# Errors that Python and TensorFlow raise when a file cannot be written.
_WRITE_ERRORS = (OSError, tf.errors.OpError)

_SHARD_NAME = re.compile(r"^(?P<split>[^.].*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.tfrecord$")
# Most file systems allow names of 255 bytes, which must also hold the numbers and the additions of hidden names.
_MAX_SPLIT_LENGTH = 100
_MAX_SHARDS = 99999
# A record is: length (uint64), its checksum (uint32), the content, its checksum (uint32).
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


def list_splits(folder: str | os.PathLike[str]) -> list[str]:
    """Lists the names of the splits in a folder, sorted; empty if there are none.

    Raises:
        UserError: If the folder does not exist.
    """
    return sorted({match["split"] for match in _shard_matches(folder)})


def list_shards(folder: str | os.PathLike[str], split: str) -> list[str]:
    """Lists the paths of the files of a split in order.

    Args:
        folder: A folder of TFRecords.
        split: The split's name ("train", "val", ...).

    Returns:
        Paths of `SPLIT-00000-of-N.tfrecord` and on.

    Raises:
        UserError: If the folder or the split is missing, or one of the split's files is.
    """
    matches = [match for match in _shard_matches(folder) if match["split"] == split]
    if not matches:
        known = ", ".join(list_splits(folder)) or "none"
        raise UserError(
            f"'{folder}' has no split '{split}'; splits there: {known}. "
            f"A split is files {split}-00000-of-00001.tfrecord and on, as `deeplab2-like convert` writes them."
        )
    counts = sorted({int(match["count"]) for match in matches})
    if len(counts) > 1:
        raise UserError(
            f"Split '{split}' in '{folder}' mixes files of {counts[0]} and of {counts[1]} parts; move those of one "
            "conversion to another folder, or convert the data set again into a new one."
        )
    names = shard_names(split, counts[0])
    present = {match[0] for match in matches}
    missing = [name for name in names if name not in present]
    if missing:
        raise UserError(f"Split '{split}' in '{folder}' lacks the file {missing[0]}; convert the data set again.")
    return [str(Path(folder) / name) for name in names]


def _shard_matches(folder: str | os.PathLike[str]) -> list[re.Match[str]]:
    """Returns the matches of `_SHARD_NAME` in a folder, sorted by file name."""
    files.require_local(folder)
    if not Path(folder).is_dir():
        raise UserError(f"Record folder '{folder}' does not exist; give a folder that `deeplab2-like convert` wrote.")
    matches = (_SHARD_NAME.match(name) for name in sorted(os.listdir(folder)))
    return [match for match in matches if match]


def list_present_shards(folder: str | os.PathLike[str], split: str) -> list[str]:
    """Lists the names of the files of a split that exist, sorted, even if some are missing."""
    return [match[0] for match in _shard_matches(folder) if match["split"] == split]


def shard_names(split: str, count: int) -> list[str]:
    """Makes the names of the files of a split.

    Args:
        split: The name of the split.
        count: The number of files.

    Raises:
        UserError: If the name has characters other than letters, digits, `_`, `-`, `.`, or more than 100 of them, or
            `count` is not 1..99999.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", split):
        raise UserError(f"Split name '{split}' is not allowed; use letters, digits, '_', '-' and '.'.")
    if len(split) > _MAX_SPLIT_LENGTH:
        raise UserError(
            f"A split name may have up to {_MAX_SPLIT_LENGTH} characters, but '{split[:20]}...' has {len(split)}; use "
            "a shorter one."
        )
    require_shard_count(count)
    return [f"{split}-{number:05d}-of-{count:05d}.tfrecord" for number in range(count)]


def require_shard_count(count: int) -> None:
    """Raises `UserError` unless a split may have this number of files."""
    if not 1 <= count <= _MAX_SHARDS:
        raise UserError(f"The number of shards must be 1..{_MAX_SHARDS}, got {count}.")


def conversion_file(folder: str | os.PathLike[str], split: str) -> Path:
    """Returns the JSON in which a conversion describes the files of a split that it has written."""
    return Path(folder) / f".{split}.conversion.json"


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """The position of every record in some files, in the order of the files.

    Attributes:
        files: The files' paths.
        file_numbers: int64 [N], for each record the index of its file in `files`.
        offsets: int64 [N], the byte of its file at which the record begins.
        num_bytes: Size of the content of all records together.
    """

    files: tuple[str, ...]
    file_numbers: np.ndarray
    offsets: np.ndarray
    num_bytes: int

    def __len__(self) -> int:
        return len(self.offsets)


def read_index(files: Sequence[str]) -> RecordIndex:
    """Finds all records by their headers, without reading their content.

    Args:
        files: Paths of uncompressed TFRecord files.

    Raises:
        UserError: If a file is missing, cut short, not a TFRecord file, or a header is damaged.
    """
    file_numbers: list[int] = []
    offsets: list[int] = []
    num_bytes = 0
    expected_counts = _expected_counts(files)
    for file_number, path in enumerate(files):
        before = len(offsets)
        for offset, length in _scan_records(path):
            file_numbers.append(file_number)
            offsets.append(offset)
            num_bytes += length
        found, expected = len(offsets) - before, expected_counts[file_number]
        if expected not in (None, found):
            raise UserError(
                f"'{path}' holds {found} of the {expected} records that the conversion wrote: it was cut short; "
                "copy it again, or convert the data set again."
            )
    return RecordIndex(tuple(files), np.array(file_numbers, np.int64), np.array(offsets, np.int64), num_bytes)


def count_examples(files: Sequence[str]) -> int:
    """Counts the records in some files by their headers; raises as `read_index` does."""
    return len(read_index(files))


def _expected_counts(files: Sequence[str]) -> list[int | None]:
    """Returns the number of records that the conversion wrote into each file; None if it is unknown.

    Without this number, a file that was cut off between two records would look whole.
    """

    @functools.cache
    def read(conversion: Path) -> Any:
        try:
            return parse_json(conversion.read_bytes())
        except (OSError, ValueError):
            return None

    def expected(path: str) -> int | None:
        matched = _SHARD_NAME.match(os.path.basename(path))
        if matched is None:
            return None
        conversion = read(conversion_file(os.path.dirname(path), matched["split"]))
        try:
            states = conversion["files"]
            return int(states[int(matched["number"])]["examples"]) if len(states) == int(matched["count"]) else None
        except (ValueError, LookupError, TypeError, OverflowError):
            return None

    return [expected(path) for path in files]


def _scan_records(path: str) -> Iterator[tuple[int, int]]:
    """Yields the offset of each record and the length of its content, in bytes; checks the headers."""
    try:
        files.require_no_pipe(path, "TFRecord file")
        # Unbuffered, because a buffer would read the content that is skipped.
        file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed below; only opening may fail here)
    except OSError as error:
        raise UserError(f"TFRecord file '{path}' cannot be opened: {error.strerror}.") from error
    with file:
        size = os.fstat(file.fileno()).st_size
        offset = number = 0
        while offset < size:
            file.seek(offset)
            header = file.read(_HEADER.size)
            place = f"record {number} (counted from 0, at byte {offset} of {size})"
            if len(header) == _HEADER.size and _HEADER.unpack(header)[1] != _checksum(header[:8]):
                raise UserError(
                    f"'{path}' is damaged or not an uncompressed TFRecord file: the header of {place} is wrong; "
                    "convert the data set again."
                )
            length = _HEADER.unpack(header)[0] if len(header) == _HEADER.size else size
            end = offset + _HEADER.size + length + _FOOTER.size
            if end > size:
                raise UserError(f"'{path}' is cut short in {place}; convert the data set again.")
            yield offset, length
            offset = end
            number += 1


def find_damaged_record(files: Sequence[str], position: int) -> tuple[str, int] | None:
    """Finds the damaged record that TensorFlow has reported.

    Args:
        files: Paths of the TFRecord files that were read, one of which has the damage.
        position: The byte that TensorFlow's message gives: where the header begins, or where the content does.

    Returns:
        Path of the file and number of the record, counted from 0; None if no file has a damaged record there.

    Raises:
        UserError: If a header is damaged; the message names the record.
    """
    for path in files:
        for number, (offset, length) in enumerate(_scan_records(path)):
            if position in (offset, offset + _HEADER.size) and not _has_whole_content(path, offset, length):
                return path, number
    return None


def _has_whole_content(path: str, offset: int, length: int) -> bool:
    """Returns whether the content of the record at byte `offset` has the checksum that follows it."""
    with open(path, "rb") as file:
        file.seek(offset + _HEADER.size)
        content, footer = file.read(length), file.read(_FOOTER.size)
    return footer == _FOOTER.pack(_checksum(content))


@functools.cache
def _checksum_table() -> list[int]:
    """Returns the CRC-32C of each byte: polynomial 0x1EDC6F41, lowest bit first."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def _checksum(content: bytes) -> int:
    """Computes the masked CRC-32C of TFRecord files; slow, so only for short content."""
    table, crc = _checksum_table(), 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF


class ShardWriter:
    """Writes one TFRecord file, which appears whole or not at all.

    A context manager: without an exception the file is renamed into place at the end; after an exception nothing
    remains.

    Args:
        path: The file, in an existing folder.

    Raises:
        UserError: On entering, writing and leaving, if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        # Set on entering. A temporary folder rather than a file: TensorFlow opens the file itself, which some network
        # file systems refuse for a locked file.
        self._temporary: TemporaryFolder
        self._writer: Any = None  # A tf.io.TFRecordWriter.
        self.num_written = 0

    def __enter__(self) -> "ShardWriter":
        with self._write_errors():
            self._temporary = TemporaryFolder(self._path)
            self._file = self._temporary.path / self._path.name
            try:
                self._writer = tf.io.TFRecordWriter(str(self._file))
            except BaseException:
                self._temporary.close()
                raise
        return self

    def write(self, serialized: bytes) -> None:
        """Appends one serialized example; raises `UserError` if it cannot be written."""
        with self._write_errors():
            self._writer.write(serialized)
        self.num_written += 1

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                with self._write_errors():
                    self._writer.close()
                    self._file.replace(self._path)
        finally:
            with contextlib.suppress(*_WRITE_ERRORS):  # After an exception the file is dropped anyway.
                self._writer.close()
            self._temporary.close()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except _WRITE_ERRORS as error:
            raise files.cannot_write(self._path.parent, error) from error
