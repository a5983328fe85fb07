"""Names of files that come out of other files: what they lead to must lie where the user has pointed."""

import os
from pathlib import Path

from deeplab2_like.errors import UserError


def path_inside(folder: str | os.PathLike[str], name: str) -> Path:
    """Joins a folder that the user gives and the name of a file that a JSON gives.

    A JSON may come from anywhere, so it does not decide which files of the machine are read. The folder itself may be a
    link.

    Args:
        folder: The folder.
        name: The name, maybe with folders; one that no file can have, say with a null character, is left for reading to
            complain about.

    Returns:
        The path, which may not exist.

    Raises:
        UserError: If the name is absolute, has `..`, or goes through a link, and so leads out of the folder.
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
    """Whether a path stays in a folder, links followed; true of what can be no path, which leads nowhere."""
    try:
        return Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))
    except (OSError, ValueError):
        return True
