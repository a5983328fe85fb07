"""Writing files so that they appear whole or not at all."""

import os
from pathlib import Path

import cv2
import numpy as np

from deeplab2_like.errors import UserError


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` beside `path` under a hidden name, then renames it; makes missing folders.

    Raises:
        UserError: If the folder or the file cannot be written.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            beside.write_bytes(content)
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise UserError(f"Cannot write '{path}' ({error.strerror}); choose a folder that can be written.") from error


def write_png(path: str | os.PathLike[str], rgb: np.ndarray) -> None:
    """Writes an image, uint8 [H, W, 3] in the order red, green, blue, as a PNG file, whole or not at all."""
    written, content = cv2.imencode(".png", np.ascontiguousarray(rgb[..., ::-1]))
    if not written:
        raise UserError(f"Cannot encode '{path}': an array of shape {rgb.shape} is not an image.")
    write_atomically(path, content.tobytes())
