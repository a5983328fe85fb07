"""The EXIF orientation of image files, by which viewers turn them, as Pillow reads and applies it."""

import io

import numpy as np
from PIL import ExifTags, Image, ImageOps

from deeplab2_like.data.image_headers import FORMATS, PNG_SIGNATURE

# What a PNG with an orientation contains. Pillow would decode any other to the end in search of it.
_PNG_KEYS = (b"eXIf", b"Raw profile type ", b"XML:com.adobe.xmp")


def find_orientation(content: bytes) -> int:
    """Reads the orientation of an image.

    Args:
        content: The content of an image file.

    Returns:
        The EXIF orientation, 1 (as stored) to 8; 1 if there is none or it is damaged.
    """
    if content.startswith(PNG_SIGNATURE) and not any(key in content for key in _PNG_KEYS):
        return 1
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            value = image.getexif().get(ExifTags.Base.Orientation)
    except Exception:  # Pillow raises errors of many types for damaged data, which viewers ignore.
        return 1
    return int(value) if value is not None and value in range(1, 9) else 1


def apply_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Rotates and mirrors `pixels`, uint8 [H, W, 3] as stored, to the given EXIF orientation."""
    if orientation == 1:
        return pixels
    image = Image.fromarray(pixels)
    image.getexif()[ExifTags.Base.Orientation] = orientation
    return np.array(ImageOps.exif_transpose(image))


def undo_orientation(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Does the inverse of `apply_orientation`."""
    return apply_orientation(pixels, {6: 8, 8: 6}.get(orientation, orientation))
