"""Writing files so that they appear whole or not at all."""

import os
from pathlib import Path

import cv2
import numpy as np

from deeplab2_like.errors import UserError


def beside(path: str | os.PathLike[str]) -> Path:
    """The hidden name in the same folder under which a file or folder is written until it is whole."""
    path = Path(path)
    return path.with_name(f".{path.name}.{os.getpid()}")


def cannot_write(path: str | os.PathLike[str], error: Exception) -> UserError:
    """Builds the error for a file or folder that cannot be written.

    Args:
        path: What the user called it.
        error: What Python or TensorFlow raised; TensorFlow's messages are `PATH; REASON`.
    """
    reason = getattr(error, "strerror", None) or str(getattr(error, "message", error)).rpartition("; ")[-1]
    return UserError(f"Cannot write '{path}' ({reason}); choose a folder that can be written.")


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Makes a folder and its parents if they are missing.

    Raises:
        UserError: If that is impossible.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file in its place" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"Output folder '{folder}' cannot be made ({reason}); choose another.") from error


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` beside `path` under a hidden name, then renames it; makes missing folders.

    Raises:
        UserError: If the folder or the file cannot be written.
    """
    path = Path(path)
    hidden = beside(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            hidden.write_bytes(content)
            hidden.replace(path)
        finally:
            hidden.unlink(missing_ok=True)
    except OSError as error:
        raise cannot_write(path, error) from error


def encode_png(rgb: np.ndarray) -> bytes:
    """Encodes an image, uint8 [H, W, 3] in the order red, green, blue, as a PNG file's bytes.

    Raises:
        UserError: If the array is not such an image, or larger than a PNG file can be.
    """
    if rgb.ndim == 3 and rgb.shape[2] == 3 and rgb.size and rgb.dtype == np.uint8:
        encoded, content = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))
        if encoded:
            return content.tobytes()
    raise UserError(f"An array of shape {rgb.shape} and type {rgb.dtype} is not an image; give uint8 [H, W, 3].")


def write_png(path: str | os.PathLike[str], rgb: np.ndarray) -> None:
    """Writes an image, uint8 [H, W, 3] in the order red, green, blue, as a PNG file, whole or not at all.

    Makes missing folders.

    Raises:
        UserError: If the array is not such an image, or the file cannot be written.
    """
    write_atomically(path, encode_png(rgb))
