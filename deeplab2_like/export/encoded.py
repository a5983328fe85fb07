"""Image files in a graph: size and EXIF orientation from their headers, and decoding in which a bad file fails alone.

Everything is made of stock operations. `tf.io.decode_image` raises an error for a damaged file, which would fail the
whole request; inside a `tf.data` pipeline that ignores errors it makes the file's row empty instead.
"""

from typing import NamedTuple

import tensorflow as tf

FORMATS = ("JPEG", "PNG", "BMP", "GIF", "WebP")

# Segments of a JPEG that are searched for its size and orientation. Photographs have up to some hundred.
_MAX_JPEG_SEGMENTS = 1000
# Entries of an EXIF directory that are searched for the orientation. Cameras write some dozen.
_MAX_EXIF_ENTRIES = 128

_ORIENTATION_TAG, _SHORT, _LONG = 0x0112, 3, 4
# Markers of a JPEG: frame headers hold its size; markers without a length are skipped; image data end the search.
_FRAME_HEADERS = (*range(0xC0, 0xC4), *range(0xC5, 0xC8), *range(0xC9, 0xCC), *range(0xCD, 0xD0))
_WITHOUT_LENGTH = (0x01, *range(0xD0, 0xD8))
_FILL, _START_OF_SCAN, _END_OF_IMAGE, _APP1 = 0xFF, 0xDA, 0xD9, 0xE1


class Headers(NamedTuple):
    """What the headers of image files say.

    Attributes:
        size: int64 [B, 2], height and width as seen, after the EXIF orientation is applied; zeros for a faulty file.
        orientation: int64 [B], EXIF orientation of a JPEG, 1 to 8; 1 for other files.
        format: string [B], one of `FORMATS`; empty for other files.
        fault: string [B], one sentence that says why a file cannot be used; empty if nothing speaks against it.
    """

    size: tf.Tensor
    orientation: tf.Tensor
    format: tf.Tensor
    fault: tf.Tensor


def read_headers(contents: tf.Tensor, *, max_pixels: int, size: tuple[int, int] | None = None) -> Headers:
    """Reads the headers of image files, before memory is allocated for any pixel.

    Args:
        contents: string [B], whole files; any bytes are allowed.
        max_pixels: Largest number of pixels of an image that is decoded.
        size: Height and width that all images must have; None: any.

    Returns:
        The headers. It raises nothing: what is wrong with a file is in `fault`.
    """
    start = _bytes_at(contents, 0, 32)
    is_jpeg = _starts_with(contents, b"\xff\xd8\xff")
    is_webp = _starts_with(contents, b"RIFF") & tf.equal(tf.strings.substr(_padded(contents), 8, 4), b"WEBP")
    jpeg_size, orientation = _walk_jpeg(contents, is_jpeg)
    known = [
        ("JPEG", is_jpeg, jpeg_size),
        ("PNG", _starts_with(contents, b"\x89PNG\r\n\x1a\n"), _pair(_big(start[:, 20:24]), _big(start[:, 16:20]))),
        ("BMP", _starts_with(contents, b"BM"), _bmp_size(start)),
        ("GIF", _starts_with(contents, b"GIF8"), _pair(_little(start[:, 8:10]), _little(start[:, 6:8]))),
        ("WebP", is_webp, _webp_size(start)),
    ]
    names, found = tf.fill(tf.shape(contents), ""), tf.zeros_like(jpeg_size)
    for name, is_format, format_size in known:
        names = tf.where(is_format, name, names)
        found = tf.where(is_format[:, None], format_size, found)
    height, width = found[:, 0], found[:, 1]
    # Before a size is multiplied, so that a product of 64 bits cannot overflow.
    is_damaged = (found[:, 0] <= 0) | (found[:, 1] <= 0) | (tf.reduce_max(found, axis=1) >= 2**31)
    pixels = tf.where(~is_damaged, height * width, 0)
    is_turned = orientation >= 5
    found = tf.where(is_turned[:, None], found[:, ::-1], found)
    size_text = tf.strings.join([tf.strings.as_string(found[:, 0]), " x ", tf.strings.as_string(found[:, 1])])
    bits = _little(start[:, 28:30])
    faults = [
        (tf.equal(names, ""), f"The file is not a {', '.join(FORMATS[:-1])} or {FORMATS[-1]} image."),
        (is_damaged, damaged(names)),
        (
            tf.equal(names, "BMP") & (bits != 24) & (bits != 32),
            "A BMP with a palette or few bits cannot be read; send the image as PNG.",
        ),
        (
            pixels > max_pixels,
            tf.strings.join(
                [
                    "The image has ",
                    size_text,
                    f" pixels (height x width), more than the limit of {max_pixels}; send it smaller or in parts.",
                ]
            ),
        ),
    ]
    if size is not None:
        height, width = size
        wrong_size = tf.strings.join(
            ["The image has ", size_text, f" pixels (height x width), but this model takes {height} x {width} only."]
        )
        faults.append((tf.reduce_any(found != tf.constant(size, tf.int64), axis=1), wrong_size))
    fault = tf.fill(tf.shape(contents), "")
    for is_wrong, sentence in reversed(faults):  # The first of several faults is told.
        fault = tf.where(is_wrong, sentence, fault)
    is_good = tf.equal(fault, "")
    return Headers(tf.where(is_good[:, None], found, 0), orientation, names, fault)


def damaged(names: tf.Tensor) -> tf.Tensor:
    """Returns the fault of files, string [B], whose formats are `names`, string [B], and that cannot be decoded."""
    return tf.strings.join(["The ", names, " file is damaged or cut short; send a whole file."])


def decode_equal_sizes(
    contents: tf.Tensor, headers: Headers, rows: tf.Tensor, bit_depth: int | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes some of several files at the same time, and turns them by their EXIF orientations.

    Args:
        contents: string [B], whole files.
        headers: Their headers.
        rows: int64 [N], the numbers of the files to decode, at least one; they are of one size.
        bit_depth: See `DatasetInfo`.

    Returns:
        uint8 [N, H, W, 3] and bool [N], whether each file could be decoded; if not, its image is black.
    """
    images = tf.data.Dataset.from_tensor_slices(rows).map(
        lambda row: _decode_upright(contents, headers, row, bit_depth), num_parallel_calls=tf.data.AUTOTUNE
    )
    return images.batch(tf.size(rows, tf.int64)).get_single_element()


def _decode_upright(
    contents: tf.Tensor, headers: Headers, row: tf.Tensor, bit_depth: int | None
) -> tuple[tf.Tensor, tf.Tensor]:
    """Decodes one file, see `decode_equal_sizes`; returns uint8 [H, W, 3] and bool []."""
    size = headers.size[row]

    def decode(content: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        image = _turn(_decode(content, bit_depth), headers.orientation[row])
        has_size = tf.debugging.assert_equal(tf.shape(image, tf.int64)[:2], size)
        with tf.control_dependencies([has_size]):
            return tf.ensure_shape(tf.identity(image), [None, None, 3]), tf.constant(True)

    is_good = tf.equal(headers.fault[row], "")
    decoded = tf.data.Dataset.from_tensors(contents[row]).filter(lambda _: is_good).map(decode).ignore_errors()
    black = tf.data.Dataset.from_tensors((tf.zeros(tf.concat([size, [3]], 0), tf.uint8), False))
    return decoded.concatenate(black).take(1).get_single_element()


def _decode(content: tf.Tensor, bit_depth: int | None) -> tf.Tensor:
    """Decodes an image file, string [], to uint8 [H, W, 3]; PNGs of 16 bits as those of the training images.

    Raises an error in the graph if the file is damaged.
    """

    def decode() -> tf.Tensor:
        return tf.io.decode_image(content, channels=3, expand_animations=False)

    if bit_depth is None:
        return decode()
    shift = bit_depth - 8

    def decode_wide() -> tf.Tensor:
        values = tf.cast(tf.io.decode_png(content, channels=3, dtype=tf.uint16), tf.int32)
        return tf.saturate_cast(tf.bitwise.right_shift(values, shift), tf.uint8)

    # Byte 24 of a PNG is the number of bits; a file that ends before it is faulty anyway.
    header = _padded(content)
    is_wide = tf.equal(tf.strings.substr(header, 0, 4), b"\x89PNG") & tf.equal(
        tf.strings.substr(header, 24, 1), b"\x10"
    )
    return tf.cond(is_wide, decode_wide, decode)


def _turn(image: tf.Tensor, orientation: tf.Tensor) -> tf.Tensor:
    """Rotates and mirrors an image, uint8 [H, W, 3] as stored, to its EXIF orientation, int64 []."""
    steps = (
        ((5, 6, 7, 8), lambda pixels: tf.transpose(pixels, [1, 0, 2])),
        ((2, 3, 6, 7), lambda pixels: tf.reverse(pixels, [1])),
        ((3, 4, 7, 8), lambda pixels: tf.reverse(pixels, [0])),
    )
    for orientations, change in steps:
        image = tf.cond(
            _is_any_of(orientation, orientations),
            lambda pixels=image, change=change: change(pixels),
            lambda pixels=image: pixels,
        )
    return image


# --- Headers. ---------------------------------------------------------------------------------------------------------


def _walk_jpeg(contents: tf.Tensor, is_jpeg: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
    """Searches JPEGs for their size and orientation, all files at the same time.

    Args:
        contents: string [B].
        is_jpeg: bool [B]; other files are left alone.

    Returns:
        int64 [B, 2], height and width as stored, zeros if not found; int64 [B], the EXIF orientation.
    """
    lengths = tf.cast(tf.strings.length(contents), tf.int64)
    zeros = tf.zeros_like(lengths)

    def step(
        position: tf.Tensor, searching: tf.Tensor, size: tf.Tensor, exif: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor, tf.Tensor]:
        found = _bytes_at(contents, position, 10)
        is_marker = found[:, 0] == 0xFF
        marker = tf.where(is_marker, found[:, 1], 0)
        is_frame = searching & _is_any_of(marker, _FRAME_HEADERS)
        size = tf.where(is_frame[:, None], _pair(_big(found[:, 5:7]), _big(found[:, 7:9])), size)
        is_exif = searching & (marker == _APP1) & tf.reduce_all(found[:, 4:8] == list(b"Exif"), axis=1)
        exif = tf.where(is_exif & (exif == 0), position + 10, exif)
        searching &= ~(is_frame | (marker == _START_OF_SCAN) | (marker == _END_OF_IMAGE)) & (position < lengths)
        # Like the decoder, skips stray bytes before a marker and fill bytes in it, one by one.
        is_stray = ~is_marker | (marker == _FILL) | (marker == 0)
        length = tf.where(_is_any_of(marker, _WITHOUT_LENGTH), zeros, tf.maximum(_big(found[:, 2:4]), 2))
        return position + tf.where(is_stray, zeros + 1, 2 + length), searching, size, exif

    _, _, size, exif = tf.while_loop(
        lambda position, searching, size, exif: tf.reduce_any(searching),
        step,
        (zeros + 2, is_jpeg, tf.stack([zeros, zeros], axis=1), zeros),
        maximum_iterations=_MAX_JPEG_SEGMENTS,
    )
    return size, tf.where(exif > 0, _exif_orientation(contents, exif), 1)


def _exif_orientation(contents: tf.Tensor, position: tf.Tensor) -> tf.Tensor:
    """Reads the orientation from EXIF data at the given positions, int64 [B]; int64 [B], 1 where there is none."""
    header = _bytes_at(contents, position, 8)
    is_little = tf.reduce_all(header[:, :2] == list(b"II"), axis=1)
    is_big = tf.reduce_all(header[:, :2] == list(b"MM"), axis=1)

    def number(values: tf.Tensor) -> tf.Tensor:
        return tf.where(tf.reshape(is_little, [-1] + [1] * (len(values.shape) - 2)), _little(values), _big(values))

    directory = position + tf.minimum(number(header[:, 4:8]), 2**16)  # A segment of a JPEG is no longer than that.
    count = number(_bytes_at(contents, directory, 2))
    entries = tf.reshape(
        _bytes_at(contents, directory + 2, 12 * _MAX_EXIF_ENTRIES), [-1, _MAX_EXIF_ENTRIES, 12]
    )  # [B, N, 12]: tag of 2 bytes, type of 2, number of values of 4, value of 4.
    value_type = number(entries[:, :, 2:4])
    value = tf.where(value_type == _SHORT, number(entries[:, :, 8:10]), number(entries[:, :, 8:12]))
    is_orientation = (
        (number(entries[:, :, 0:2]) == _ORIENTATION_TAG)
        & ((value_type == _SHORT) | (value_type == _LONG))
        & (tf.range(_MAX_EXIF_ENTRIES, dtype=tf.int64) < count[:, None])
    )
    orientation = tf.reduce_max(tf.where(is_orientation, value, 0), axis=1)
    return tf.where((is_little | is_big) & (orientation >= 1) & (orientation <= 8), orientation, 1)


def _bmp_size(start: tf.Tensor) -> tf.Tensor:
    """Returns the size of BMPs from their first bytes, int64 [B, 32]; int64 [B, 2]."""
    height = _little(start[:, 22:26])
    # A negative height says that the rows go from top to bottom.
    return _pair(tf.where(height >= 2**31, 2**32 - height, height), _little(start[:, 18:22]))


def _webp_size(start: tf.Tensor) -> tf.Tensor:
    """Returns the size of WebPs, of three kinds, from their first bytes, int64 [B, 32]; int64 [B, 2]."""
    extended = _pair(1 + _little(start[:, 27:30]), 1 + _little(start[:, 24:27]))
    lossy = _pair(_little(start[:, 28:30]) % 2**14, _little(start[:, 26:28]) % 2**14)
    bits = _little(start[:, 21:25])  # 14 bits of width - 1, and 14 of height - 1.
    lossless = _pair(1 + bits // 2**14 % 2**14, 1 + bits % 2**14)
    kind = start[:, 15:16]  # The last letter of "VP8X", "VP8 " or "VP8L".
    return tf.where(kind == ord("X"), extended, tf.where(kind == ord("L"), lossless, lossy))


def _bytes_at(contents: tf.Tensor, position: tf.Tensor | int, count: int) -> tf.Tensor:
    """Reads `count` bytes of files, string [B], at positions, int64 [B] or one; int64 [B, count], 0 after the end."""
    lengths = tf.cast(tf.strings.length(contents), tf.int64)
    position = tf.clip_by_value(tf.zeros_like(lengths) + position, 0, lengths)
    part = tf.strings.substr(contents, position, tf.fill(tf.shape(lengths), tf.constant(count, tf.int64)))
    values = tf.io.decode_raw(part, tf.uint8, fixed_length=count)
    return tf.cast(tf.ensure_shape(values, [None, count]), tf.int64)


def _big(values: tf.Tensor) -> tf.Tensor:
    """Joins bytes, int64 [..., N], to numbers, int64 [...]; the first byte is the highest."""
    return tf.add_n([values[..., i] * 256 ** (values.shape[-1] - 1 - i) for i in range(values.shape[-1])])


def _little(values: tf.Tensor) -> tf.Tensor:
    """Joins bytes, int64 [..., N], to numbers, int64 [...]; the first byte is the lowest."""
    return tf.add_n([values[..., i] * 256**i for i in range(values.shape[-1])])


def _pair(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
    return tf.stack([height, width], axis=1)


def _padded(contents: tf.Tensor) -> tf.Tensor:
    """Adds bytes to the first ones of files, so that reading a header does not go beyond the end of a short file."""
    return tf.strings.join([tf.strings.substr(contents, 0, 32), "\0" * 32])


def _starts_with(contents: tf.Tensor, prefix: bytes) -> tf.Tensor:
    return tf.equal(tf.strings.substr(contents, 0, len(prefix)), prefix)


def _is_any_of(values: tf.Tensor, allowed: tuple[int, ...]) -> tf.Tensor:
    """Returns whether values, int64 of any shape, are among `allowed`; bool of their shape."""
    return tf.reduce_any(values[..., None] == tf.constant(allowed, tf.int64), axis=-1)
