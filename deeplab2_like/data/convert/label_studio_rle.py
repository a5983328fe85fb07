"""Decodes the brush masks of Label Studio, a stream of bits with runs of the bytes of an RGBA image."""

from collections.abc import Sequence

import numpy as np

_HEADER_BITS = 32 + 5 + 4 * 4


def decode_brush(rle: Sequence[int], size: tuple[int, int]) -> np.ndarray:
    """Decodes a mask.

    The stream begins with the number of values (32 bits), the bits per value minus one (5), and four widths minus one
    (4 each). Then follow runs: whether all values are equal (1), which of the widths holds the length (2), the length
    minus one, and the value or the values. Values are those of red, green, blue and opacity of each pixel, row by row.

    Args:
        rle: The bytes of the stream.
        size: Height and width of the image.

    Returns:
        bool [H, W], the pixels that are not fully transparent.

    Raises:
        ValueError: If the stream is cut short or of an image of another size.
    """
    height, width = size
    content = np.asarray(rle)
    if content.ndim != 1 or content.dtype.kind not in "iu" or content.size * 8 < _HEADER_BITS:
        raise ValueError("they are no list of bytes")
    if content.min() < 0 or content.max() > 255:
        raise ValueError("they have a number that is no byte")
    stream = _Bits(content.astype(np.uint8))
    number, bits = stream.read(32), stream.read(5) + 1
    widths = [stream.read(4) + 1 for _ in range(4)]
    if number != 4 * height * width:
        raise ValueError(f"they have {number // 4} pixels, but the image {height * width}")
    values = np.zeros(number, np.uint32)
    position = 0
    while position < number:
        is_equal = stream.read(1)
        length = stream.read(widths[stream.read(2)]) + 1
        if position + length > number:
            raise ValueError("they have more pixels than the image")
        values[position : position + length] = stream.read(bits) if is_equal else stream.read_many(length, bits)
        position += length
    return values.reshape(height, width, 4)[..., 3] > 0


class _Bits:
    """Reads unsigned numbers from a stream of bits, the highest bit first.

    Args:
        content: uint8 [N], the bytes.
    """

    def __init__(self, content: np.ndarray) -> None:
        self._bits = np.unpackbits(content)
        self._bytes = content.tobytes()
        self._position = 0

    def _advance(self, bits: int) -> int:
        start = self._position
        self._position += bits
        if self._position > self._bits.size:
            raise ValueError("they are cut short")
        return start

    def read(self, bits: int) -> int:
        """Returns a number of up to 32 bits."""
        start = self._advance(bits)
        first, last = start // 8, -(-(start + bits) // 8)
        window = int.from_bytes(self._bytes[first:last])
        return window >> (8 * last - start - bits) & ((1 << bits) - 1)

    def read_many(self, number: int, bits: int) -> np.ndarray:
        """Returns numbers of equally many bits, int64 [number]."""
        start = self._advance(number * bits)
        found = self._bits[start : start + number * bits].reshape(number, bits)
        return found @ (1 << np.arange(bits - 1, -1, -1, dtype=np.int64))
