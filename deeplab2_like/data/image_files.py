"""Image files that a user points at."""

import io
import struct
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from deeplab2_like.data.tfrecord import decode_image_bytes
from deeplab2_like.errors import UserError
from deeplab2_like.files import encode_png

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

_ORIENTATION = 0x0112  # The EXIF tag.
# What Pillow raises on damaged files; nobody needs to know where an unreadable image is up.
_PILLOW_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    LookupError,
    ArithmeticError,
    struct.error,
    Image.DecompressionBombError,
)


def list_images(path: Path, *, recursive: bool = False) -> list[Path]:
    """Lists the images of a folder, by name, or the one file.

    Hidden files and those without one of `IMAGE_SUFFIXES` are left out.

    Args:
        path: An image file or a folder.
        recursive: Whether to look into folders of the folder, too.

    Raises:
        UserError: If there is none.
    """
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise UserError(f"Input '{path}' does not exist; give an image file or a folder of images.")
    files = list_files(path, IMAGE_SUFFIXES, recursive=recursive)
    if not files:
        raise UserError(
            f"Folder '{path}' has no image {'in it' if recursive else 'directly in it'} "
            f"({', '.join(IMAGE_SUFFIXES)}); give a folder of images."
        )
    return files


def list_files(folder: Path, suffixes: Sequence[str], *, recursive: bool = False) -> list[Path]:
    """Lists the files of a folder that end in one of `suffixes` (lower case) and are not hidden, by name."""
    files = [
        file
        for file in (folder.rglob("*") if recursive else folder.iterdir())
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    return sorted(files, key=lambda file: (str(file).lower(), str(file)))


def read_image(file: Path) -> np.ndarray:
    """Reads an image file as viewers show it, uint8 [H, W, 3]; raises `UserError` if that is impossible."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"Image '{file}' cannot be read ({error.strerror}); check the file.") from error
    return _turn(decode_image_bytes(content, str(file))[0], find_orientation(content)[0])


def find_orientation(content: bytes) -> tuple[int, tuple[int, int]]:
    """Reads how viewers turn an image, and its size as stored.

    Args:
        content: An image file's bytes.

    Returns:
        The EXIF orientation, 1 (as stored) to 8, and height and width; 1 and (0, 0) if the file is unreadable.
    """
    try:
        with Image.open(io.BytesIO(content)) as image:
            orientation = image.getexif().get(_ORIENTATION, 1)
            return orientation if orientation in range(1, 9) else 1, (image.height, image.width)
    except _PILLOW_ERRORS:
        return 1, (0, 0)


def upright(content: bytes, name: str) -> bytes:
    """Turns an image as viewers show it, if its EXIF orientation says so.

    Args:
        content: An image file's bytes.
        name: The file's name, for messages.

    Returns:
        The same bytes, or those of a PNG.

    Raises:
        UserError: If an image to be turned cannot be read.
    """
    orientation, _ = find_orientation(content)
    return content if orientation == 1 else encode_png(_turn(decode_image_bytes(content, name)[0], orientation))


def _turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turns and mirrors `pixels` [H, W, 3] from how they are stored to how an EXIF orientation shows them."""
    if orientation >= 5:
        pixels = pixels.transpose(1, 0, 2)
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels)
