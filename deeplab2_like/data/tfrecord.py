"""TFRecords: one schema, written and read side by side, and the shard files that hold them.

The keys are DeepLab2's, so that records made by DeepLab2 (label as `raw` int32 bytes) are read unchanged. Our own
records hold the label as an RGB PNG, `id = R + 256 G + 65536 B`, which is smaller and opens in any viewer.

A split lies in files `SPLIT-00000-of-00004.tfrecord`. `read_index` finds every record by its header alone, which lets
the training pipeline shuffle a data set of any size completely and resume at any step without reading what it skips.
"""

import contextlib
import dataclasses
import functools
import json
import os
import re
import struct
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np
import tensorflow as tf

from deeplab2_like import files
from deeplab2_like.data import exif, panoptic_label
from deeplab2_like.data.dataset_info import MAX_PANOPTIC_VALUE
from deeplab2_like.errors import UserError
from deeplab2_like.temporary import TemporaryFolder

_ENCODED = "image/encoded"
_FILENAME = "image/filename"
_FORMAT = "image/format"
_HEIGHT = "image/height"
_WIDTH = "image/width"
_CHANNELS = "image/channels"
_LABEL = "image/segmentation/class/encoded"
_LABEL_FORMAT = "image/segmentation/class/format"

# Every complaint raised inside a TensorFlow graph starts so; `user_errors` finds it by this.
_BAD_RECORD = "Bad record: "
# How a faulty record shows in what TensorFlow says: our own complaints, which name the image, and its operations'.
_FAULTS = (
    (re.compile(re.escape(_BAD_RECORD) + r"(.*?)\]\s*(?:\n|$)", re.DOTALL), "{}"),
    (re.compile(r"([^:\n]+)\n\s*\[\[[^\n]*DecodeImage\b"), "an image cannot be decoded ({})."),
    (re.compile(r"([^:\n]+)\n\s*\[\[[^\n]*DecodePng\b"), "a label cannot be decoded ({})."),
    (re.compile(r"Key: (\S+)\. +Data types don't match"), "its feature '{}' has a wrong type."),
    (re.compile(r"Key: (\S+)\. "), "its feature '{}' has a wrong number of values."),
    (re.compile(r"(Could not parse) example input"), "it is no tf.train.Example."),
    (re.compile(r"([^:\n]+)\n\s*\[\[[^\n]*ParseSingleExample\b"), "its features cannot be read ({})."),
)

# The first bytes of the image files that TensorFlow reads: JPEG, PNG, GIF, BMP, WebP.
_PNG_BEGINNING = b"\x89PNG"
_IMAGE_BEGINNINGS = (b"\xff\xd8\xff", _PNG_BEGINNING, b"GIF8", b"BM", b"RIFF")

# What Python and TensorFlow raise when a file cannot be written.
_WRITE_ERRORS = (OSError, tf.errors.OpError)

_SHARD_NAME = re.compile(r"^(?P<split>[^.].*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.tfrecord$")
# A record is: length (uint64), its checksum (uint32), the bytes, their checksum (uint32).
_HEADER = struct.Struct("<QI")
_FOOTER = struct.Struct("<I")


# ---------------------------------------------------------------------------------------------------------------------
# One record.
# ---------------------------------------------------------------------------------------------------------------------


def decode_image_bytes(content: bytes, name: str) -> tuple[np.ndarray, bool]:
    """Decodes an image file's bytes the way training will read them.

    Any orientation (EXIF) is ignored, as it is when records are read.

    Args:
        content: A whole JPEG, PNG, BMP, GIF (first frame), WebP or TIFF file. Grey becomes RGB, an alpha channel is
            dropped, of 16 bits per channel the upper eight are kept.
        name: The file's name, for messages.

    Returns:
        The image, uint8 [H, W, 3], and whether the bytes are an 8-bit RGB JPEG or PNG, which records hold as it is.

    Raises:
        UserError: If the bytes are not a whole image.
    """
    if exif.is_tiff(content):  # TensorFlow does not read it.
        decoded = cv2.imdecode(np.frombuffer(exif.without_orientation(content), np.uint8), cv2.IMREAD_COLOR)
        if decoded is None:
            raise UserError(f"'{name}' is not a readable TIFF image, or cut short; save it again.")
        return np.ascontiguousarray(decoded[:, :, ::-1]), False
    try:
        image = tf.io.decode_image(content, channels=3, expand_animations=False).numpy()
        return image, _is_plain_rgb(content)
    except tf.errors.InvalidArgumentError as error:
        raise UserError(
            f"'{name}' is not a readable image, or cut short; use a whole JPEG, PNG, BMP, GIF, WebP or TIFF file."
        ) from error


def _is_plain_rgb(content: bytes) -> bool:
    """Whether `content`, a decodable image file, is a JPEG or PNG of three channels with 8 bits each."""
    if content[:3] == b"\xff\xd8\xff":
        return int(tf.io.extract_jpeg_shape(content)[-1]) == 3
    # The PNG header: bit depth at byte 24, colour type at byte 25, where 2 is RGB.
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[24] == 8 and content[25] == 2


def serialize_example(*, image: bytes | np.ndarray, panoptic: np.ndarray, filename: str) -> bytes:
    """Makes one record; `parse_example` is its inverse.

    Args:
        image: A whole image file's bytes, kept as they are if they are an 8-bit RGB JPEG or PNG and else encoded anew
            as RGB PNG; or the pixels, uint8 [H, W, 3] RGB.
        panoptic: int [H, W], panoptic map with values 0..2**24 - 1.
        filename: The image's file name; `parse_example` returns it as `image_id`.

    Returns:
        The serialized `tf.train.Example`; equal input gives equal bytes.

    Raises:
        UserError: If the image cannot be read, or image and label do not fit each other or the format.
    """
    if isinstance(image, bytes):
        pixels, keep = decode_image_bytes(image, filename)
        encoded = image if keep else files.encode_png(pixels)
    else:
        pixels, encoded = image, files.encode_png(image)
    height, width = pixels.shape[:2]
    if panoptic.shape != (height, width):
        raise UserError(
            f"Image '{filename}' is {_size(pixels)} but its label is {_size(panoptic)} (height x width); "
            "they must be of equal size."
        )
    if panoptic.min() < 0 or panoptic.max() > MAX_PANOPTIC_VALUE:
        raise UserError(
            f"The label of '{filename}' has values {panoptic.min()}..{panoptic.max()}; "
            f"a record holds 0..{MAX_PANOPTIC_VALUE}."
        )
    try:
        encoded_name = filename.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The file name {filename!r} is no Unicode text; rename the file.") from error
    is_jpeg = encoded[:2] == b"\xff\xd8"
    features = {
        _ENCODED: encoded,
        _FILENAME: encoded_name,
        _FORMAT: b"jpeg" if is_jpeg else b"png",
        _HEIGHT: height,
        _WIDTH: width,
        _CHANNELS: 3,
        _LABEL: files.encode_png(panoptic_label.ids_to_rgb(panoptic), is_label=True),
        _LABEL_FORMAT: b"png",
    }
    example = tf.train.Example()
    for key, value in features.items():
        if isinstance(value, bytes):
            example.features.feature[key].bytes_list.value.append(value)
        else:
            example.features.feature[key].int64_list.value.append(value)
    return example.SerializeToString(deterministic=True)


def parse_example(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    """Reads one record made by `serialize_example` or by DeepLab2; runs in a TensorFlow graph.

    Args:
        serialized: string [], a serialized `tf.train.Example`.

    Returns:
        `image` uint8 [H, W, 3] RGB, `panoptic` int32 [H, W], `image_id` string [] (the file name).

    Raises:
        tf.errors.InvalidArgumentError: If the record is faulty; `user_errors` turns it into a `UserError`.
    """
    features = tf.io.parse_single_example(
        serialized,
        {
            # Empty if missing, so that the complaint can name the image.
            _ENCODED: tf.io.FixedLenFeature([], tf.string, ""),
            _FILENAME: tf.io.FixedLenFeature([], tf.string, ""),
            _LABEL: tf.io.FixedLenFeature([], tf.string, ""),
            _LABEL_FORMAT: tf.io.FixedLenFeature([], tf.string, "raw"),
        },
    )
    name = features[_FILENAME]
    label_format = features[_LABEL_FORMAT]
    _require_feature(features, _ENCODED, name)
    _require_feature(features, _LABEL, name)
    known_image = require(
        _begins(features[_ENCODED], *_IMAGE_BEGINNINGS),
        lambda: ["image '", name, "' is not a JPEG, PNG, GIF, BMP or WebP file."],
    )
    with tf.control_dependencies([known_image]):
        # Animated files would be of rank 4.
        image = tf.io.decode_image(features[_ENCODED], channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    is_raw = tf.equal(label_format, "raw")
    known_format = require(
        is_raw | tf.equal(label_format, "png"),
        lambda: ["image '", name, "' has a label of format '", label_format, "'; 'raw' and 'png' are read."],
    )
    with tf.control_dependencies([known_format]):
        panoptic = tf.cond(
            is_raw,
            lambda: _decode_raw_label(features[_LABEL], tf.shape(image), name),
            lambda: _decode_png_label(features[_LABEL], name),
        )
    panoptic.set_shape([None, None])
    image_size, label_size = tf.shape(image)[:2], tf.shape(panoptic)
    equal_size = require(
        tf.reduce_all(image_size == label_size),
        lambda: ["image '", name, "' is ", image_size, " but its label is ", label_size, " (height, width)."],
    )
    with tf.control_dependencies([equal_size]):
        panoptic = tf.identity(panoptic)
    return {"image": image, "panoptic": panoptic, "image_id": name}


def _require_feature(features: dict[str, tf.Tensor], key: str, name: tf.Tensor) -> None:
    """Stops unless the record of the image called `name` holds something under `key`."""
    require(tf.not_equal(features[key], ""), lambda: ["the record of image '", name, f"' has no '{key}'."])


def _decode_raw_label(content: tf.Tensor, image_shape: tf.Tensor, name: tf.Tensor) -> tf.Tensor:
    """DeepLab2's label: H*W little-endian int32; returns int32 [H, W]."""
    expected = 4 * image_shape[0] * image_shape[1]
    right_length = require(
        tf.equal(tf.strings.length(content), expected),
        lambda: ["image '", name, "' has a raw label of ", tf.strings.length(content), " bytes, not ", expected, "."],
    )
    with tf.control_dependencies([right_length]):
        return tf.reshape(tf.io.decode_raw(content, tf.int32, little_endian=True), image_shape[:2])  # [H, W]


def _decode_png_label(content: tf.Tensor, name: tf.Tensor) -> tf.Tensor:
    """Our label: an RGB PNG; returns int32 [H, W]."""
    is_png = require(_begins(content, _PNG_BEGINNING), lambda: ["the label of image '", name, "' is not a PNG file."])
    # Bytes 24 and 25 of a PNG are its bit depth and its colour type; a file that ends before them is faulty anyway.
    header = tf.strings.join([tf.strings.substr(content, 0, 26), "\0" * 26])
    with tf.control_dependencies([is_png]):
        is_rgb = require(
            tf.equal(tf.strings.substr(header, 24, 2), b"\x08\x02"),
            lambda: ["the label of image '", name, "' is no PNG of red, green and blue with 8 bits each."],
        )
    with tf.control_dependencies([is_rgb]):
        rgba = tf.io.decode_png(content, channels=4)
    # Four bytes are one little-endian integer, R + 256 G + 65536 B + 2**24 A; this takes one pass over the pixels.
    return tf.bitwise.bitwise_and(tf.bitcast(rgba, tf.int32), 2**24 - 1)


def _begins(content: tf.Tensor, *beginnings: bytes) -> tf.Tensor:
    """Whether `content`, string [], begins with any of `beginnings`; bool []."""
    return tf.reduce_any([tf.equal(tf.strings.substr(content, 0, len(start)), start) for start in beginnings])


def require(condition: tf.Tensor, message: Callable[[], Sequence[str | tf.Tensor]]) -> tf.Tensor:
    """Stops with a readable message unless `condition` holds; runs in a TensorFlow graph.

    Args:
        condition: bool [].
        message: Returns the parts of one sentence, strings and tensors; their values are read only on failure.

    Returns:
        bool [], to be made a control dependency of operations that would fail as well, and less readably.

    Raises:
        tf.errors.InvalidArgumentError: With the sentence; `user_errors` turns it into a `UserError`.
    """

    def fail() -> tf.Tensor:
        parts = []
        for part in message():
            is_text = isinstance(part, str) or part.dtype == tf.string
            parts.append(part if is_text else tf.strings.format("{}", part))
        sentence = tf.strings.join([_BAD_RECORD, *parts])
        with tf.control_dependencies([tf.debugging.Assert(tf.constant(False), [sentence], summarize=1)]):
            return tf.constant(True)

    return tf.cond(condition, lambda: tf.constant(True), fail)


@contextlib.contextmanager
def user_errors(files: Sequence[str] = ()) -> Iterator[None]:
    """Turns what TensorFlow raises on a faulty record, while a data set is iterated, into one clear `UserError`.

    Other errors pass unchanged.

    Args:
        files: The TFRecord files that are read. TensorFlow names neither file nor record; they are found in these.
    """
    try:
        yield
    except tf.errors.DataLossError as error:
        found = re.search(r"(?:corrupted|truncated) record at (\d+)", error.message)
        if found:
            _name_damage(files, int(found[1]), error)
        where = f" ({found[0]})" if found else ""
        raise UserError(f"A TFRecord file is damaged{where}; convert the data set again.") from error
    except (tf.errors.InvalidArgumentError, UnicodeDecodeError) as error:
        # TensorFlow quotes the record in the message, and Python then stumbles over bytes that are no text.
        message = error.object.decode(errors="replace") if isinstance(error, UnicodeDecodeError) else error.message
        for pattern, sentence in _FAULTS:
            if found := pattern.search(message):
                fault = sentence.format(found[1].strip().replace("\\'", "'"))
                raise UserError(f"{_BAD_RECORD}{fault} Convert the data set again.") from error
        raise


def _name_damage(files: Sequence[str], position: int, error: Exception) -> None:
    """Raises a `UserError` that names the damaged record, if one of `files` has it at byte `position`."""
    for path in files:
        for number, (offset, length) in enumerate(_scan_records(path)):
            # TensorFlow tells where the header begins, or the contents, whichever is wrong.
            if position in (offset, offset + _HEADER.size) and not _has_whole_contents(path, offset, length):
                raise UserError(
                    f"Record {number} (counted from 0) of '{path}' is damaged; convert the data set again."
                ) from error


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"


# ---------------------------------------------------------------------------------------------------------------------
# The files of a split.
# ---------------------------------------------------------------------------------------------------------------------


def available_splits(folder: str | os.PathLike[str]) -> list[str]:
    """Names of the splits in `folder`, sorted; empty if there are none.

    Raises:
        UserError: If the folder does not exist.
    """
    return sorted({match["split"] for match in _shard_matches(folder)})


def list_shards(folder: str | os.PathLike[str], split: str) -> list[str]:
    """Lists the files of a split in their order.

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
        known = ", ".join(available_splits(folder)) or "none"
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
    """Matches of `_SHARD_NAME` in the folder, sorted by file name."""
    files.require_local(folder)
    if not Path(folder).is_dir():
        raise UserError(f"Record folder '{folder}' does not exist; give a folder that `deeplab2-like convert` wrote.")
    matches = (_SHARD_NAME.match(name) for name in sorted(os.listdir(folder)))
    return [match for match in matches if match]


def present_shards(folder: str | os.PathLike[str], split: str) -> list[str]:
    """Names of the files of a split that are there, sorted, whether or not all are."""
    return [match[0] for match in _shard_matches(folder) if match["split"] == split]


def shard_names(split: str, count: int) -> list[str]:
    """Names of the files of a split of `count` files.

    Raises:
        UserError: If `split` has other characters than letters, digits, `_`, `-` and `.`, or `count` is not 1..99999.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", split):
        raise UserError(f"Split name '{split}' is not allowed; use letters, digits, '_', '-' and '.'.")
    if not 1 <= count <= 99999:
        raise UserError(f"shards must be 1..99999, got {count}.")
    return [f"{split}-{number:05d}-of-{count:05d}.tfrecord" for number in range(count)]


@dataclasses.dataclass(frozen=True)
class RecordIndex:
    """Where each record of some files lies, in the order of the files.

    Attributes:
        files: The files' paths.
        file_numbers: int64 [N], for each record the position of its file in `files`.
        offsets: int64 [N], where the record begins in its file, bytes.
        num_bytes: Size of all records together, bytes.
    """

    files: tuple[str, ...]
    file_numbers: np.ndarray
    offsets: np.ndarray
    num_bytes: int

    def __len__(self) -> int:
        return len(self.offsets)


def read_index(files: Sequence[str]) -> RecordIndex:
    """Finds all records from their headers, without reading their contents.

    Args:
        files: Paths of uncompressed TFRecord files.

    Raises:
        UserError: If a file is missing, cut short, not a TFRecord file, or a header is damaged.
    """
    file_numbers: list[int] = []
    offsets: list[int] = []
    num_bytes = 0
    all_expected = _converted_examples(files)
    for file_number, path in enumerate(files):
        before = len(offsets)
        for offset, length in _scan_records(path):
            file_numbers.append(file_number)
            offsets.append(offset)
            num_bytes += length
        found, expected = len(offsets) - before, all_expected[file_number]
        if expected not in (None, found):
            raise UserError(
                f"'{path}' holds {found} of the {expected} records that the conversion has written: it was cut short; "
                "copy it again, or convert the data set again."
            )
    return RecordIndex(tuple(files), np.array(file_numbers, np.int64), np.array(offsets, np.int64), num_bytes)


def count_examples(files: Sequence[str]) -> int:
    """Number of records in `files`, from their headers alone; raises as `read_index` does."""
    return len(read_index(files))


def _converted_examples(files: Sequence[str]) -> list[int | None]:
    """Number of records that a conversion has written into each file, if that is known beside it.

    A file that is cut between two records looks like a whole one.
    """

    @functools.cache
    def read(note: str) -> Any:
        try:
            with open(note, "rb") as file:
                return json.load(file)
        except (OSError, ValueError):
            return None

    def expected(path: str) -> int | None:
        matched = _SHARD_NAME.match(os.path.basename(path))
        if matched is None:
            return None
        note = read(os.path.join(os.path.dirname(path), f".{matched['split']}.conversion.json"))
        try:
            states = note["files"]
            return int(states[int(matched["number"])]["examples"]) if len(states) == int(matched["count"]) else None
        except (ValueError, LookupError, TypeError):
            return None

    return [expected(path) for path in files]


def _scan_records(path: str) -> Iterator[tuple[int, int]]:
    """Yields each record's offset and the length of its contents, bytes; checks the headers."""
    try:
        # Unbuffered: a buffer would read the contents that are skipped.
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


def _has_whole_contents(path: str, offset: int, length: int) -> bool:
    """Whether the contents of the record at byte `offset` have the checksum that follows them."""
    with open(path, "rb") as file:
        file.seek(offset + _HEADER.size)
        contents, footer = file.read(length), file.read(_FOOTER.size)
    return footer == _FOOTER.pack(_checksum(contents))


@functools.cache
def _checksum_table() -> list[int]:
    """CRC-32C of each byte: polynomial 0x1EDC6F41, lowest bit first."""
    table = []
    for value in range(256):
        for _ in range(8):
            value = value >> 1 ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


def _checksum(content: bytes) -> int:
    """The checksum of TFRecord files: CRC-32C, turned by 15 bits and added to a constant. For few or short contents."""
    table, crc = _checksum_table(), 0xFFFFFFFF
    for byte in content:
        crc = table[(crc ^ byte) & 255] ^ crc >> 8
    crc ^= 0xFFFFFFFF
    return (crc >> 15 | crc << 17) + 0xA282EAD8 & 0xFFFFFFFF


class FileWriter:
    """Writes one TFRecord file, which gets its name only once it is whole.

    Use as a context manager: on leaving it without an exception the file is renamed into place; on an exception
    nothing remains.

    Args:
        path: The file's name, in an existing folder.

    Raises:
        UserError: On entering, writing and leaving, if the file cannot be written.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        # Once entered. A folder, as TensorFlow opens the file itself, which some network file systems refuse if that
        # file is locked.
        self._temporary: TemporaryFolder
        self._writer: Any = None  # A tf.io.TFRecordWriter.
        self.num_written = 0

    def __enter__(self) -> "FileWriter":
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
            with contextlib.suppress(*_WRITE_ERRORS):  # Nobody needs the rest that cannot be written.
                self._writer.close()
            self._temporary.close()

    @contextlib.contextmanager
    def _write_errors(self) -> Iterator[None]:
        try:
            yield
        except _WRITE_ERRORS as error:
            raise files.cannot_write(self._path.parent, error) from error
