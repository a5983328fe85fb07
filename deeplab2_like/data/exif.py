"""The EXIF orientation of image files, by which viewers turn them. Decoders ignore it."""

import re
from typing import Literal

import numpy as np

_ORIENTATION_TAG = 0x0112
_SHORT_TYPE = 3
_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
_JPEG_BLOCK = re.compile(rb"\xff\xe1(..)Exif\0\0", re.DOTALL)


def is_tiff(content: bytes) -> bool:
    """Returns whether the content of a file is that of a TIFF."""
    return content[:4] in _BYTE_ORDERS


def find_orientation(content: bytes) -> int:
    """Reads the orientation of an image.

    Args:
        content: The content of a JPEG, PNG, WebP or TIFF file; files of other formats have no orientation.

    Returns:
        The EXIF orientation, 1 (as stored) to 8; 1 if there is none or it is damaged.
    """
    block = _exif_block(content)
    position = _find_value(block)
    value = 1 if position is None else int.from_bytes(block[position : position + 2], _BYTE_ORDERS[block[:4]])
    return value if 1 <= value <= 8 else 1


def without_orientation(tiff: bytes) -> bytes:
    """Returns the same TIFF file with orientation 1, because OpenCV rotates a TIFF even if it is told not to."""
    position = _find_value(tiff)
    if position is None:
        return tiff
    return tiff[:position] + (1).to_bytes(2, _BYTE_ORDERS[tiff[:4]]) + tiff[position + 2 :]


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates and mirrors `pixels`, [H, W, C] as stored, to the given EXIF orientation."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _exif_block(content: bytes) -> bytes:
    """Returns the EXIF data of a file, which has the structure of a TIFF file; empty if there is none."""
    block = b""
    if is_tiff(content):
        block = content
    elif content[:3] == b"\xff\xd8\xff":
        if match := _JPEG_BLOCK.search(content):  # The length includes its own two bytes.
            block = content[match.end() : match.start() + 2 + int.from_bytes(match[1], "big")]
    elif content[:4] == b"\x89PNG":
        if (name := content.find(b"eXIf")) > 0:  # The length stands before the name.
            block = content[name + 4 :][: int.from_bytes(content[name - 4 : name], "big")]
    elif content[:4] == b"RIFF" and (name := content.find(b"EXIF")) > 0:  # The length stands after the name.
        block = content[name + 8 :][: int.from_bytes(content[name + 4 : name + 8], "little")]
    return block.removeprefix(b"Exif\0\0")


def _find_value(block: bytes) -> int | None:
    """Returns the position of the orientation's value in the first directory of EXIF data; None without one."""
    order = _BYTE_ORDERS.get(block[:4])
    if order is None:
        return None

    def number(position: int, size: int) -> int:
        return int.from_bytes(block[position : position + size], order)  # Zero beyond the end.

    # A directory is the number of its entries, then 12 bytes for each: tag, type, count, value.
    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(entry, 2) == _ORIENTATION_TAG and number(entry + 2, 2) == _SHORT_TYPE and len(block) >= entry + 10:
            return entry + 8
    return None
