"""The headers of image files: format, size, limit of the size, and bits per channel, before any pixel is decoded.

The limit is that of `--max-pixels`; from Python it is set with `set_max_pixels`.
"""

import io

from PIL import Image

from deeplab2_like.errors import UserError

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
# The formats that are read, by Pillow's names. Others, also those that Pillow knows, are refused.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# Twice the number from which Pillow warns, where it raises an error: about 13,000 x 13,000.
DEFAULT_MAX_PIXELS = 178_956_970

_BITS_TAG, _PHOTOMETRIC_TAG, _SUBFILE_TAG = 258, 262, 254
_max_pixels = DEFAULT_MAX_PIXELS


def set_max_pixels(number: int) -> None:
    """Sets the largest number of pixels of an image that is decoded, for the whole process, as Pillow does.

    Args:
        number: The limit; at first it is `DEFAULT_MAX_PIXELS`.
    """
    global _max_pixels
    _max_pixels = number
    Image.MAX_IMAGE_PIXELS = max(number, DEFAULT_MAX_PIXELS // 2)


def require_size(height: int, width: int, name: str) -> None:
    """Refuses images that are too large, before memory is allocated for them.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        name: Begins the error message, such as "'a.png'".

    Raises:
        UserError: If the image has more pixels than the limit.
    """
    if height * width > _max_pixels:
        raise UserError(
            f"{name} has {height} x {width} pixels (height x width), more than the limit of {_max_pixels}; cut it into "
            "parts, or raise the limit with --max-pixels."
        )


def open_image(content: bytes, name: str, *, kind: str) -> Image.Image:
    """Reads the header of an image file.

    Args:
        content: The content of the file.
        name: Begins error messages, such as "'a.png'".
        kind: Ends the message of a file that is not readable, such as "PNG, or cut short".

    Returns:
        The image, whose pixels are not decoded yet.

    Raises:
        UserError: If the content is not an image of `FORMATS`, or has too many pixels.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=FORMATS)
    except Image.DecompressionBombError as error:
        raise UserError(
            f"{name} has more pixels than the limit of {_max_pixels} ({error}); cut it into parts, or raise the limit "
            "with --max-pixels."
        ) from error
    except MemoryError:
        raise
    except Exception as error:  # Pillow raises errors of many types for damaged headers.
        raise UserError(f"{name} is not a readable {kind}.") from error
    require_size(image.height, image.width, name)
    return image


def bits_per_channel(image: Image.Image, content: bytes) -> int:
    """Returns the number of bits per channel of an opened image file."""
    if image.format == "PNG":
        return content[24]
    if image.format == "TIFF":
        return max(image.tag_v2.get(_BITS_TAG, (1,)))  # type: ignore[attr-defined]
    return 8


def is_white_zero(image: Image.Image) -> bool:
    """Returns whether an opened image is a TIFF in which 0 is white."""
    return image.format == "TIFF" and image.tag_v2.get(_PHOTOMETRIC_TAG) == 0  # type: ignore[attr-defined]


def count_frames(image: Image.Image) -> int:
    """Returns the number of frames of an animation or pages of a TIFF, without thumbnails and other small copies."""
    frames = getattr(image, "n_frames", 1)
    if image.format != "TIFF" or frames == 1:
        return frames
    size, same = image.size, 1
    for page in range(1, frames):
        image.seek(page)
        same += image.size == size and not image.tag_v2.get(_SUBFILE_TAG, 0) & 5  # type: ignore[attr-defined]
    image.seek(0)
    return same
