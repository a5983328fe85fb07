"""Image files: list, decode, read, encode and write them, photographs and label PNGs alike.

Importing this module does not import TensorFlow; only decoding a photograph does.
"""

import io
import os
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.dataset_info import MAX_PANOPTIC_VALUE
from deeplab2_like.data.exif import apply_orientation, find_orientation, is_tiff, without_orientation
from deeplab2_like.errors import UserError
from deeplab2_like.files import list_files, read_file, require_local, write_atomically

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_JPEG_QUALITY = 95


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


def read_image(file: Path) -> np.ndarray:
    """Reads an image file in its EXIF orientation.

    Args:
        file: A JPEG, PNG, BMP, GIF, WebP or TIFF file.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: If the file cannot be read or decoded.
    """
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"Image '{file}' cannot be read ({error.strerror}); check the file.") from error
    return apply_orientation(decode_image(content, str(file)), find_orientation(content))


def decode_image(content: bytes, name: str) -> np.ndarray:
    """Decodes the content of an image file exactly as training does.

    The EXIF orientation is ignored, as it is when records are read.

    Args:
        content: A whole JPEG, PNG, BMP, GIF (first frame), WebP or TIFF file. Gray becomes RGB, an alpha channel is
            dropped, and 16-bit channels keep their upper eight bits.
        name: The file name for error messages.

    Returns:
        uint8 [H, W, 3], RGB.

    Raises:
        UserError: If the content is not a whole image.
    """
    import tensorflow as tf  # Here, because evaluation of files starts faster without it.

    if is_tiff(content):  # TensorFlow cannot read TIFF.
        decoded = cv2.imdecode(np.frombuffer(without_orientation(content), np.uint8), cv2.IMREAD_COLOR)
        if decoded is None:
            raise UserError(f"'{name}' is not a readable TIFF image, or cut short; save it again.")
        return np.ascontiguousarray(decoded[:, :, ::-1])
    try:
        return tf.io.decode_image(content, channels=3, expand_animations=False).numpy()
    except tf.errors.InvalidArgumentError as error:
        raise UserError(
            f"'{name}' is not a readable image, or cut short; use a whole JPEG, PNG, BMP, GIF, WebP or TIFF file."
        ) from error


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
    return content[:8] == b"\x89PNG\r\n\x1a\n" and content[24] == 8 and content[25] == 2


def turn_upright(content: bytes, name: str) -> bytes:
    """Applies the EXIF orientation of an image file to its pixels.

    Args:
        content: A whole image file.
        name: The file name for error messages.

    Returns:
        The same content if the image is upright already, else a PNG file of the turned image.

    Raises:
        UserError: If an image that has to be turned cannot be decoded.
    """
    orientation = find_orientation(content)
    return content if orientation == 1 else encode_png(apply_orientation(decode_image(content, name), orientation))


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
    try:
        image = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    except cv2.error:  # OpenCV raises it for an empty file only; otherwise it returns None.
        image = None
    if image is None:
        raise UserError(f"'{path}' is not a readable PNG, or cut short.")
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
    return panoptic_label.rgb_to_ids(_read_png(path, what, "RGB").astype(np.int32))


def read_value_png(path: Path, what: str) -> np.ndarray:
    """Reads a PNG of one number per pixel: a gray value of 8 or 16 bits, or the index in a palette.

    Args:
        path: The file.
        what: Name of the file in error messages, such as "class PNG".

    Returns:
        int32 [H, W].

    Raises:
        UserError: If the file is missing, damaged, or has colors without a palette.
    """
    pixels = _read_png(path, what)
    if pixels.ndim != 2:
        raise UserError(
            f"the {what} '{path}' has {pixels.shape[2]} channels; it must be gray (8 or 16 bits) or have a palette, "
            "with a number per pixel."
        )
    return pixels.astype(np.int32)


def _read_png(path: Path, what: str, mode: str | None = None) -> np.ndarray:
    """Reads a PNG, [H, W] or [H, W, C], with Pillow, which keeps palette indices unless `mode` asks for colors."""
    content = read_file(path, f"the {what}")
    # Bytes 24 and 25 of a PNG are bit depth and color type. Pillow would scale gray of 2 or 4 bits to 0..255.
    if mode is None and content[1:4] == b"PNG" and content[24:26] in (b"\2\0", b"\4\0"):
        raise UserError(f"the {what} '{path}' is gray of {content[24]} bits; save it with 8 or 16 bits.")
    try:
        with Image.open(io.BytesIO(content)) as image:
            return np.asarray(image if mode is None else image.convert(mode))
    except Image.DecompressionBombError as error:
        raise UserError(f"the {what} '{path}' is too large ({error}); cut image and label into parts.") from error
    except (OSError, SyntaxError, ValueError) as error:  # Pillow's errors for damaged files.
        raise UserError(f"the {what} '{path}' is not a readable PNG, or cut short.") from error
