"""Checks paths that come from a file, such as a JSON: they must stay in the folder that the user gave."""

import os
from pathlib import Path

from deeplab2_like.errors import UserError


def path_inside(folder: str | os.PathLike[str], name: str) -> Path:
    """Joins a folder that the user gave and a file name from a JSON.

    The JSON may come from anywhere, so it must not choose which files of the machine are read. The folder itself may be
    a link.

    Args:
        folder: The folder.
        name: The name, which may contain folders. An impossible name, for example with a null character, passes;
            reading the file then fails.

    Returns:
        The path, which may not exist.

    Raises:
        UserError: If the name leads out of the folder, by an absolute path, `..` or a link.
    """
    path = Path(folder) / name
    require_inside(path, folder, name)
    return path


def require_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str], name: str) -> None:
    """Raises `UserError` unless a path stays in a folder, with links followed; `name` is the path as in the JSON."""
    if not is_inside(path, folder):
        raise UserError(
            f"The file name '{name}' leads outside of '{folder}'; give the folder that holds all of the files, or copy "
            "them into it."
        )


def is_inside(path: str | os.PathLike[str], folder: str | os.PathLike[str]) -> bool:
    """Returns whether a path stays in a folder, with links followed; True for impossible paths, which lead nowhere."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):
        return True
