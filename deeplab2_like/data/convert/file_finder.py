"""Finds the files that a JSON names, whose paths may be those of another machine."""

import os
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from deeplab2_like.errors import UserError
from deeplab2_like.paths import is_inside, require_inside
from deeplab2_like.printing import counted


class FileFinder:
    r"""Finds the files that a JSON names in the folder that the user gave.

    A path with backslashes, as Windows has them, is taken as one with slashes. If there is no such file, the folders
    at the front of the path are left out one by one: `C:\data\images\a.jpg` is `images/a.jpg` or `a.jpg`.

    Args:
        folder: The folder.

    Attributes:
        num_shortened: Number of files that were found by the end of their path only.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._name_in_json: dict[str, str] = {}
        self.num_shortened = 0

    def find(self, name: str) -> str:
        """Finds a file.

        Args:
            name: The path in the JSON.

        Returns:
            The path relative to the folder; the given one if there is no such file, so that reading it fails.

        Raises:
            UserError: If the name leads outside of the folder, or to the file of another name.
        """
        if os.path.exists(self._folder / name) and not os.path.isabs(name):
            require_inside(self._folder / name, self._folder, name)
            return self._claim(name, name)
        for shortened in shorter_names(name):
            path = self._folder / shortened
            if os.path.exists(path) and is_inside(path, self._folder):
                self.num_shortened += shortened != name.replace("\\", "/")
                return self._claim(shortened, name)
        require_inside(self._folder / name, self._folder, name)
        return name

    def _claim(self, found: str, name: str) -> str:
        other = self._name_in_json.setdefault(found, name)
        if other != name:
            raise UserError(
                f"'{other}' and '{name}' both lead to '{found}' in '{self._folder}'; put the images into the folders "
                "that the JSON names."
            )
        return found

    def notes(self) -> list[str]:
        """Returns a sentence for the user if files were found by the end of their path only."""
        if not self.num_shortened:
            return []
        return [
            f"{counted(self.num_shortened, 'file')} found in '{self._folder}' by the end of the path in the JSON, "
            "because there is none at the whole path."
        ]


def shorter_names(name: str) -> Iterator[str]:
    """Yields a path with slashes and without a drive, then without its first folder, without its first two, ..."""
    path = PurePosixPath(re.sub(r"^[A-Za-z]:", "", name.replace("\\", "/")))
    parts = [part for part in path.parts if part != "/"]
    if ".." in parts:
        parts = parts[len(parts) - parts[::-1].index("..") :]
    for start in range(len(parts)):
        yield "/".join(parts[start:])
