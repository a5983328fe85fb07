"""Checks that a file name from a JSON stays in the folder that the user gave."""

import os
from pathlib import Path

from deeplab2_like.errors import UserError


def path_inside(folder: str | os.PathLike[str], name: str) -> Path:
    """Joins a folder from the user and a file name from a JSON.

    A JSON may come from anywhere, so it must not choose which files of the machine are read. The folder itself may be a
    link.

    Args:
        folder: The folder.
        name: The name, maybe with folders. A name that no file can have, such as one with a null character, passes;
            reading it fails later.

    Returns:
        The path, which may not exist.

    Raises:
        UserError: If the name leads out of the folder: as an absolute path, by `..`, or through a link.
    """
    path = Path(folder) / name
    require_inside(path, folder, name)
    return path


def require_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str], name: str) -> None:
    """Raises `UserError` unless a path, which a JSON calls `name`, stays in a folder; links are followed."""
    if not is_inside(path, folder):
        raise UserError(
            f"The file name '{name}' leads outside of '{folder}'; give the folder that holds all of the files, or copy "
            "them into it."
        )


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Whether a path stays in a folder after following links; true for a path that cannot exist."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):
        return True
