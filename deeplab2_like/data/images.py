"""Image files: list, decode, read, encode and write them, photographs and label PNGs alike.

Importing this module does not import TensorFlow; only decoding a photograph does.
"""

import os
import struct
from collections.abc import Iterable
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.dataset_info import MAX_PANOPTIC_VALUE
from deeplab2_like.data.exif import apply_orientation, find_orientation, undo_orientation
from deeplab2_like.data.image_headers import (
    PNG_SIGNATURE,
    bits_per_channel,
    count_frames,
    is_white_zero,
    open_image,
)
from deeplab2_like.errors import UserError, enough_memory
from deeplab2_like.files import list_files, read_file, require_local, write_atomically

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_JPEG_QUALITY = 95
_IMAGE = "image, or cut short; use a whole JPEG, PNG, BMP, GIF, WebP or TIFF file"
_PNG = "PNG, or cut short"
_LABEL = "PNG, BMP, GIF or TIFF file, or cut short"
# What Pillow and OpenCV raise for damaged files; warnings only where the process turns them into errors.
_DECODING_ERRORS = (
    *(OSError, SyntaxError, ValueError, EOFError, LookupError, TypeError, OverflowError, struct.error, cv2.error),
    UserWarning,
)

# Files that may have more than 8 bits per channel, and the numbers of bits that cameras and microscopes use.
_WIDE_SUFFIXES = (".png", ".tif", ".tiff")
_BIT_DEPTHS = (8, 10, 12, 14, 16, 24, 32)

# Formats that may change the values of pixels, so that they are of no use for labels, and their suffixes. A TIFF may be
# compressed by one of them.
_LOSSY_FORMATS = {"JPEG": (".jpeg", ".jpg"), "WEBP": (".webp",)}
LOSSY_SUFFIXES = tuple(suffix for suffixes in _LOSSY_FORMATS.values() for suffix in suffixes)
LABEL_SUFFIXES = tuple(suffix for suffix in IMAGE_SUFFIXES if suffix not in LOSSY_SUFFIXES)
_LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "tiff_sgilog", "tiff_sgilog24", "webp")


def list_images(path: Path, *, recursive: bool = False) -> list[Path]:
    """Lists the images in a folder, sorted by name, or the one image file.

    Hidden files and files with other suffixes than `IMAGE_SUFFIXES` are left out.

    Args:
        path: An image file or a folder.
        recursive: Whether to search subfolders, too.

    Returns:
        The paths, at least one.

    Raises:
        UserError: If there is no image.
    """
    require_local(path)
    if path.is_file():
        return [path]
    if path.exists() and not path.is_dir():
        raise UserError(f"Input '{path}' is a pipe or a device; give an image file or a folder of images.")
    if not path.is_dir():
        raise UserError(f"Input '{path}' does not exist; give an image file or a folder of images.")
    files = list_files(path, IMAGE_SUFFIXES, recursive=recursive)
    if not files:
        raise UserError(
            f"Folder '{path}' has no image {'in it' if recursive else 'directly in it'} "
            f"({', '.join(IMAGE_SUFFIXES)}); give a folder of images."
        )
    return files


# --- Photographs. -----------------------------------------------------------------------------------------------------


def read_image(file: Path, *, bit_depth: int | None = None) -> np.ndarray:
    """Reads an image file in its EXIF orientation.

    Args:
        file: A JPEG, PNG, BMP, GIF, WebP or TIFF file.
        bit_depth: See `decode_image`.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: If the file cannot be read or decoded.
    """
    content = read_file(file, "the image")
    with enough_memory(f"'{file}'"):
        return apply_orientation(decode_image(content, str(file), bit_depth=bit_depth), find_orientation(content))


def decode_image(content: bytes, name: str, *, bit_depth: int | None = None) -> np.ndarray:
    """Decodes the content of an image file; JPEGs and RGB PNGs exactly as training does.

    The EXIF orientation is ignored, as it is when records are read.

    Args:
        content: A whole JPEG, PNG, BMP, GIF, WebP or TIFF file; of an animation the first frame. Gray becomes RGB, and
            an alpha channel is dropped.
        name: The file name for error messages.
        bit_depth: Number of bits that images of more than 8 bits per channel use, of which the upper 8 are kept; None:
            16. Floating-point values must be in 0..1.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: If the content is not a whole image, or has more pixels than the limit or values above `bit_depth`.
    """
    image = open_image(content, f"'{name}'", kind=_IMAGE)
    if is_jpeg(content) or is_rgb_jpeg_or_png(content):  # Records keep these, so training must be able to read them.
        return _decode_with_tensorflow(content, name)
    try:
        pages = count_frames(image) if image.format == "TIFF" else 1
        wide = _read_wide(image, content)
        pixels = np.array(image.convert("RGB")) if wide is None else np.empty(0)
    except _DECODING_ERRORS as error:
        raise UserError(f"'{name}' is not a readable {_IMAGE}.") from error
    if pages > 1:
        raise UserError(f"'{name}' has {pages} pages; save the page to use as an image file of its own.")
    if wide is not None:
        pixels = _to_8_bits(wide, bit_depth or 16, name, invert=is_white_zero(image))
    # Pillow and OpenCV turn a TIFF by its orientation, and only a TIFF.
    return undo_orientation(pixels, find_orientation(content)) if image.format == "TIFF" else pixels


def find_bit_depth(files: Iterable[Path]) -> int | None:
    """Finds the number of bits that images use of more than 8 bits per channel, from their largest value.

    Images of 12 or 14 bits are stored with 16, and no file says so.

    Args:
        files: Image files; unreadable ones, which fail later, do not count.

    Returns:
        The smallest of 8, 10, 12, 14, 16, 24 and 32 that holds the largest value; None if there are no such images.
    """
    largest = -1
    for file in files:
        if file.suffix.lower() not in _WIDE_SUFFIXES or not file.is_file():
            continue
        try:
            with file.open("rb") as stream:
                start = stream.read(25)  # Byte 24 of a PNG is the number of bits; most need no more reading.
            if start.startswith(PNG_SIGNATURE) and start[24:] <= b"\x08":
                continue
            content = read_file(file, "the image")
            wide = _read_wide(open_image(content, str(file), kind=_IMAGE), content)
        except (UserError, MemoryError, *_DECODING_ERRORS):
            continue
        if wide is not None and wide.dtype.kind != "f":
            largest = max(largest, int(wide.max()))
    return None if largest < 0 else next((bits for bits in _BIT_DEPTHS if largest < 2**bits), _BIT_DEPTHS[-1])


def describe_bit_depth(bit_depth: int) -> str:
    """Says how images of more than 8 bits per channel were read, see `find_bit_depth`."""
    return (
        f"Images with more than 8 bits per channel: taken as {bit_depth} bits, so that 0..{2**bit_depth - 1} became "
        "0..255 (--bit-depth sets another number)."
    )


def _decode_with_tensorflow(content: bytes, name: str) -> np.ndarray:
    import tensorflow as tf  # Here, because evaluation of files starts faster without it.

    try:
        return tf.io.decode_image(content, channels=3, expand_animations=False).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise UserError(f"'{name}' is not a readable {_IMAGE}.") from error
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError from error


def _read_wide(image: Image.Image, content: bytes) -> np.ndarray | None:
    """Reads an image of more than 8 bits per channel, [H, W] or [H, W, 3] RGB; None if it has 8 bits or fewer."""
    if bits_per_channel(image, content) <= 8:
        return None
    if image.mode[0] in "IF":  # Gray, which Pillow reads as it is.
        return np.asarray(image)
    decoded = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)  # BGR or BGRA.
    if decoded is None:
        raise ValueError("OpenCV cannot read it")
    return decoded if decoded.ndim == 2 else decoded[..., 2::-1]


def _to_8_bits(values: np.ndarray, bit_depth: int, name: str, *, invert: bool) -> np.ndarray:
    """Scales values of [H, W] or [H, W, 3] to uint8 [H, W, 3]; see `decode_image`."""
    low, high = values.min(), values.max()
    if values.dtype.kind == "f":
        if not (low >= 0 and high <= 1):
            raise UserError(
                f"'{name}' has floating-point values of {low:g} to {high:g}; only 0 to 1 has a clear meaning: save it "
                "with 8 or 16 bits."
            )
        pixels = np.round(values * 255).astype(np.uint8)
    else:
        if low < 0 or high >= 2**bit_depth:
            raise UserError(
                f"'{name}' has values of {low} to {high}, but {bit_depth} bits hold 0 to {2**bit_depth - 1}; give "
                "another --bit-depth, or save the image with 8 bits."
            )
        pixels = (values >> (bit_depth - 8)).astype(np.uint8)
    if invert:
        pixels = 255 - pixels
    return np.ascontiguousarray(np.broadcast_to(pixels[..., None], (*pixels.shape, 3)) if pixels.ndim == 2 else pixels)


def is_jpeg(content: bytes) -> bool:
    """Returns whether the content of a file is that of a JPEG."""
    return content[:3] == b"\xff\xd8\xff"


def is_rgb_jpeg_or_png(content: bytes) -> bool:
    """Returns whether the content of an image file is a JPEG or PNG of three channels with 8 bits each.

    Args:
        content: A whole image file that `decode_image` can decode.
    """
    if is_jpeg(content):
        import tensorflow as tf

        try:
            return int(tf.io.extract_jpeg_shape(content)[-1]) == 3
        except tf.errors.InvalidArgumentError:  # A damaged header that the decoder forgives.
            return False
    # Byte 24 of a PNG is the bit depth, byte 25 the color type, where 2 is RGB.
    return content.startswith(PNG_SIGNATURE) and content[24] == 8 and content[25] == 2


def turn_upright(content: bytes, name: str, *, bit_depth: int | None = None) -> bytes:
    """Applies the EXIF orientation of an image file to its pixels.

    Args:
        content: A whole image file.
        name: The file name for error messages.
        bit_depth: See `decode_image`.

    Returns:
        The same content if the image is upright already, else a PNG file of the turned image.

    Raises:
        UserError: If an image that has to be turned cannot be decoded.
    """
    orientation = find_orientation(content)
    if orientation == 1:
        return content
    return encode_png(apply_orientation(decode_image(content, name, bit_depth=bit_depth), orientation))


def encode_jpeg(image: np.ndarray) -> bytes:
    """Encodes an image, uint8 [H, W, 3] RGB, as a JPEG file."""
    _, encoded = cv2.imencode(".jpg", np.ascontiguousarray(image[..., ::-1]), [cv2.IMWRITE_JPEG_QUALITY, _JPEG_QUALITY])
    return encoded.tobytes()


def encode_png(image: np.ndarray, *, is_label: bool = False) -> bytes:
    """Encodes an image as a PNG file.

    Args:
        image: uint8 [H, W, 3] RGB, or uint8 [H, W] gray.
        is_label: Whether it is a label map. Its large areas of one color need no PNG filter, and decode three times as
            fast without one. Photographs get the filter that decodes fastest.

    Returns:
        The content of the file.

    Raises:
        UserError: If the array is not such an image, or is larger than a PNG file can be.
    """
    is_rgb = image.ndim == 3 and image.shape[2] == 3
    if (is_rgb or image.ndim == 2) and image.size and image.dtype == np.uint8:
        bgr = np.ascontiguousarray(image[..., ::-1] if is_rgb else image)  # OpenCV's order of channels.
        png_filter = cv2.IMWRITE_PNG_FILTER_NONE if is_label else cv2.IMWRITE_PNG_FILTER_UP
        strategy = cv2.IMWRITE_PNG_STRATEGY_DEFAULT if is_label else cv2.IMWRITE_PNG_STRATEGY_RLE
        options = [cv2.IMWRITE_PNG_FILTER, png_filter, cv2.IMWRITE_PNG_STRATEGY, strategy]
        is_encoded, content = cv2.imencode(".png", bgr, options)
        if is_encoded:
            return content.tobytes()
    raise UserError(
        f"An array of shape {image.shape} and type {image.dtype} is not an image; give uint8 [H, W, 3] or [H, W]."
    )


def write_png(path: str | os.PathLike[str], image: np.ndarray) -> None:
    """Writes an image as a PNG file, whole or not at all; creates missing folders.

    Args:
        path: The file.
        image: As for `encode_png`.

    Raises:
        UserError: If the array is not an image, or the file cannot be written.
    """
    write_atomically(path, encode_png(image))


# --- Label PNGs. ------------------------------------------------------------------------------------------------------


def read_id_png(path: Path) -> np.ndarray:
    """Reads a PNG of segment ids in COCO's panoptic format, `id = R + 256 G + 65536 B`.

    Returns:
        int32 [H, W].

    Raises:
        UserError: If the file is missing or damaged, or is not RGB with 8 bits per channel.
    """
    content = read_file(path, "the panoptic PNG")
    if content and not content.startswith(PNG_SIGNATURE):  # Lossless files of another format hold the same colors.
        return panoptic_label.rgb_to_ids(decode_label(content, f"'{path}'", colors=True).astype(np.int32))
    if content:
        open_image(content, f"'{path}'", kind=_PNG)  # Checks the size.
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # OpenCV raises it for an empty file only; otherwise it returns None.
        image = None
    if image is None:
        raise UserError(f"'{path}' is not a readable {_PNG}.")
    channels = 1 if image.ndim == 2 else image.shape[2]
    if channels != 3 or image.dtype != np.uint8:
        depth = "" if image.dtype == np.uint8 else f" of {8 * image.itemsize} bits"
        raise UserError(
            f"'{path}' has {channels} channels{depth}; a panoptic PNG is RGB of 8 bits each, with id = R + 256 G + "
            "65536 B."
        )
    ids = cv2.cvtColor(image, cv2.COLOR_BGR2RGBA).view("<i4")[..., 0]  # [H, W], red in the lowest byte.
    ids &= MAX_PANOPTIC_VALUE  # Removes alpha, which is the highest byte.
    return ids


def read_color_png(path: Path, what: str) -> np.ndarray:
    """Reads a PNG of colors, RGB or with a palette, as the numbers `R + 256 G + 65536 B`.

    Args:
        path: The file.
        what: Name of the file in error messages, such as "class PNG".

    Returns:
        int32 [H, W].

    Raises:
        UserError: If the file is missing or damaged.
    """
    colors = decode_label(read_file(path, f"the {what}"), f"the {what} '{path}'", colors=True)
    return panoptic_label.rgb_to_ids(colors.astype(np.int32))


def read_value_png(path: Path, what: str) -> np.ndarray:
    """Reads a label file of one number per pixel: a gray value of up to 32 bits, or the index in a palette.

    Args:
        path: The file.
        what: Name of the file in error messages, such as "class PNG".

    Returns:
        int32 [H, W].

    Raises:
        UserError: If the file is missing, damaged, or has colors without a palette.
    """
    pixels = decode_label(read_file(path, f"the {what}"), f"the {what} '{path}'")
    if pixels.ndim != 2:
        raise UserError(
            f"the {what} '{path}' has {pixels.shape[2]} channels; it must be gray (8, 16 or 32 bits) or have a "
            "palette, with a number per pixel."
        )
    return pixels.astype(np.int32)


def decode_label(content: bytes, name: str, *, colors: bool = False) -> np.ndarray:
    """Decodes the content of a label file, whose values must be exact.

    Args:
        content: A whole PNG, BMP, GIF or TIFF file.
        name: Begins error messages, such as "the label PNG 'a.png'".
        colors: Whether to return colors; otherwise a palette's indices.

    Returns:
        Colors: uint8 [H, W, 3] RGB. Otherwise the values as they are, [H, W], or [H, W, C] if the file has channels.

    Raises:
        UserError: If the file is damaged, is too large, or does not hold exact integers.
    """
    image = open_image(content, name, kind=_LABEL)
    compression = str(image.info.get("compression"))
    is_lossy_format = image.format in _LOSSY_FORMATS
    if is_lossy_format or compression in _LOSSY_COMPRESSIONS:
        kind = image.format if is_lossy_format else f"TIFF with {compression} compression"
        raise UserError(f"{name} is a {kind}, which may change the values of pixels; export the label again as PNG.")
    try:
        frames = count_frames(image)
        with enough_memory(name):
            pixels = np.array(image.convert("RGB") if colors else image)
    except UserError:
        raise
    except _DECODING_ERRORS as error:
        raise UserError(f"{name} is not a readable {image.format}, or cut short.") from error
    if frames > 1:
        raise UserError(f"{name} has {frames} frames or pages; save the one to use as a PNG.")
    bits = bits_per_channel(image, content)
    if image.mode == "F":
        raise UserError(f"{name} has floating-point values; save it as integers of 8 or 16 bits.")
    if colors and (bits > 8 or image.mode not in ("1", "L", "LA", "P", "PA", "RGB", "RGBA")):
        raise UserError(f"{name} is {image.mode} of {bits} bits, not colors; save it as RGB with 8 bits per channel.")
    # Pillow would scale gray of 2 or 4 bits to 0..255, and invert values if 0 is white.
    if not colors and bits in (2, 4) and image.mode == "L":
        raise UserError(f"{name} is gray of {bits} bits; save it with 8 or 16 bits.")
    if is_white_zero(image):
        raise UserError(f"{name} is a TIFF in which 0 is white, so its values are inverted; save it as PNG.")
    return pixels
