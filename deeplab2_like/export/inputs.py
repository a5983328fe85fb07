"""The images and videos to predict: lists files, folders and patterns, and names their results."""

import dataclasses
import glob
import os
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from deeplab2_like.data.images import IMAGE_SUFFIXES, list_images
from deeplab2_like.errors import UserError
from deeplab2_like.export.video import VIDEO_SUFFIXES
from deeplab2_like.files import distinct_names, require_local

# Suffixes that results add to a name.
_RESULT_SUFFIXES = (".avi", ".csv", ".geojson", ".mp4", ".png", ".tif")


@dataclasses.dataclass(frozen=True)
class Input:
    """An image or a video.

    Attributes:
        path: The file.
        name: Name of its results, with `/` between folders and without suffix.
        file_name: Its path relative to the folder of all inputs.
    """

    path: Path
    name: str
    file_name: str

    @property
    def is_video(self) -> bool:
        """Whether the file is a video, by its suffix."""
        return self.path.suffix.lower() in VIDEO_SUFFIXES


def list_inputs(inputs: Sequence[str | os.PathLike[str]], *, results: Sequence[Path] = ()) -> list[Input]:
    """Lists images and videos.

    The name of a result is the path of its file relative to the folder of all inputs, without suffix: to the folder
    that is given, or to the deepest one that holds everything that is given. Files whose names differ only in their
    suffixes keep them.

    Args:
        inputs: Image files, videos, folders and patterns such as `photos/**/*.jpg`. Folders are searched for images,
            not for videos, with their subfolders.
        results: Folders of results, whose files are left out if they are inside of a folder to search.

    Returns:
        The files, at least one, each once.

    Raises:
        UserError: If there is no image or video, or a result would need the name of a folder.
    """
    if not inputs:
        raise UserError("There is no input; give image files, folders or patterns.")
    files: dict[str, Path] = {}  # Absolute path -> path as given.
    bases = []
    for given in inputs:
        found, base = _list_input(Path(given), results)
        files.update((os.path.abspath(file), file) for file in found)
        bases.append(os.path.abspath(base))
    root = Path(os.path.commonpath(bases))
    paths = [Path(path) for path in files]
    names = distinct_names(paths, root=root)
    _require_no_folders(names)
    return [
        Input(given, name, path.relative_to(root).as_posix())
        for given, path, name in zip(files.values(), paths, names, strict=True)
    ]


def _list_input(path: Path, results: Sequence[Path]) -> tuple[list[Path], Path]:
    """Lists the files of one input; returns them and the folder to which their names are relative."""
    require_local(path)
    if path.is_dir():
        return _list_folder(path, results), path
    if os.path.lexists(path) or not glob.has_magic(str(path)):
        return list_images(path), path.parent
    found = []
    for match in sorted(map(Path, glob.glob(str(path), recursive=True)), key=lambda match: (str(match).lower(), match)):
        if match.suffix.lower() in IMAGE_SUFFIXES + VIDEO_SUFFIXES and not match.is_dir():
            found.append(match)
    if not found:
        raise UserError(
            f"Pattern '{path}' matches no image or video ({', '.join(IMAGE_SUFFIXES + VIDEO_SUFFIXES)}); check it."
        )
    fixed = list(path.parts)
    while any(map(glob.has_magic, fixed)):
        fixed.pop()
    return found, Path(*fixed)


def _list_folder(folder: Path, results: Sequence[Path]) -> list[Path]:
    """Lists the images in a folder and its subfolders, without the results in it."""
    inside = folder.resolve()
    hidden = [path.resolve() for path in results if path.resolve() != inside and path.resolve().is_relative_to(inside)]
    files = list_images(folder, recursive=True)
    if not hidden:
        return files
    kept = [file for file in files if not any(file.parent.resolve().is_relative_to(path) for path in hidden)]
    if not kept:
        raise UserError(f"Folder '{folder}' has no images but those of earlier results; give a folder of images.")
    return kept


def _require_no_folders(names: Sequence[str]) -> None:
    """Raises `UserError` if the result of one image would need the name of a folder with those of others."""
    folders = {parent.as_posix() for name in names for parent in PurePosixPath(name).parents}
    if len(folders) < 2:  # All are in one folder.
        return
    for name in names:
        for suffix in _RESULT_SUFFIXES:
            if f"{name}{suffix}" in folders:
                raise UserError(
                    f"A result of '{name}' would be the file '{name}{suffix}', but the inputs also have a folder of "
                    "this name; rename one of them."
                )
