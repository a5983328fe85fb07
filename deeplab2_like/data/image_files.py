"""Lists and reads the image files that a user names."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from deeplab2_like.data.exif import find_orientation, turn
from deeplab2_like.data.tfrecord import decode_image_bytes
from deeplab2_like.errors import UserError
from deeplab2_like.files import require_local

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")


def list_images(path: Path, *, recursive: bool = False) -> list[Path]:
    """Lists the images of a folder, sorted by name, or the one file.

    Hidden files and files without one of `IMAGE_SUFFIXES` are left out.

    Args:
        path: An image file or a folder.
        recursive: Whether to search subfolders, too.

    Raises:
        UserError: If there is no image.
    """
    require_local(path)
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
    """Lists the files of a folder that end in one of `suffixes` (lower case) and are not hidden, sorted by name."""
    files = [
        file
        for file in (folder.rglob("*") if recursive else folder.iterdir())
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    return sorted(files, key=lambda file: (str(file).lower(), str(file)))


def read_image(file: Path) -> np.ndarray:
    """Reads an image file in its EXIF orientation, uint8 [H, W, 3]; raises `UserError` if it cannot be read."""
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UserError(f"Image '{file}' cannot be read ({error.strerror}); check the file.") from error
    return turn(decode_image_bytes(content, str(file))[0], find_orientation(content))
