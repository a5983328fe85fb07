"""The EXIF orientation of image files: how viewers turn them. The decoders that are used here ignore it."""

import re
from typing import Literal

import numpy as np

_ORIENTATION = 0x0112  # The tag,
_SHORT = 3  # and the type of its value.
_BYTE_ORDERS: dict[bytes, Literal["little", "big"]] = {b"II*\0": "little", b"MM\0*": "big"}
_JPEG_BLOCK = re.compile(rb"\xff\xe1(..)Exif\0\0", re.DOTALL)


def is_tiff(content: bytes) -> bool:
    """Whether a file begins as a TIFF does."""
    return content[:4] in _BYTE_ORDERS


def find_orientation(content: bytes) -> int:
    """Reads how viewers turn an image.

    Args:
        content: The bytes of a JPEG, PNG, WebP or TIFF file, or of any other.

    Returns:
        The EXIF orientation, 1 (as stored) to 8; 1 also if there is none, or if it is damaged.
    """
    block = _exif_block(content)
    place = _find_value(block)
    value = 1 if place is None else int.from_bytes(block[place : place + 2], _BYTE_ORDERS[block[:4]])
    return value if 1 <= value <= 8 else 1


def without_orientation(tiff: bytes) -> bytes:
    """The same TIFF file with the orientation 1: OpenCV turns a TIFF even if it is told not to."""
    place = _find_value(tiff)
    if place is None:
        return tiff
    return tiff[:place] + (1).to_bytes(2, _BYTE_ORDERS[tiff[:4]]) + tiff[place + 2 :]


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors `pixels` [H, W, C] from how they are stored to how an orientation shows them."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)


def _exif_block(content: bytes) -> bytes:
    """The EXIF data in a file, which is built as a TIFF file; empty if there is none."""
    block = b""
    if is_tiff(content):
        block = content
    elif content[:3] == b"\xff\xd8\xff":
        if found := _JPEG_BLOCK.search(content):  # The length counts from itself on.
            block = content[found.end() : found.start() + 2 + int.from_bytes(found[1], "big")]
    elif content[:4] == b"\x89PNG":
        if (name := content.find(b"eXIf")) > 0:  # The length comes before the name.
            block = content[name + 4 :][: int.from_bytes(content[name - 4 : name], "big")]
    elif content[:4] == b"RIFF" and (name := content.find(b"EXIF")) > 0:  # Here it comes after it.
        block = content[name + 8 :][: int.from_bytes(content[name + 4 : name + 8], "little")]
    return block.removeprefix(b"Exif\0\0")


def _find_value(block: bytes) -> int | None:
    """Where the value of the orientation is in the first directory of EXIF data; None if it is not there."""
    order = _BYTE_ORDERS.get(block[:4])
    if order is None:
        return None

    def number(place: int, size: int) -> int:
        return int.from_bytes(block[place : place + size], order)  # Zero beyond the end.

    # A directory is the number of its entries, then for each 12 bytes: tag, type, count, value.
    directory = number(4, 4)
    for entry in range(directory + 2, directory + 2 + 12 * number(directory, 2), 12):
        if number(entry, 2) == _ORIENTATION and number(entry + 2, 2) == _SHORT and len(block) >= entry + 10:
            return entry + 8
    return None
