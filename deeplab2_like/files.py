"""Writing files so that they appear whole or not at all, and the names that outputs take from their images."""

import contextlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError
from deeplab2_like.temporary import TemporaryFile, remove_leftovers


def cannot_write(path: str | os.PathLike[str], error: Exception) -> UserError:
    """Builds the error for a file or folder that cannot be written.

    Args:
        path: What the user called it.
        error: What Python or TensorFlow raised; TensorFlow's messages are `PATH; REASON`.
    """
    reason = getattr(error, "strerror", None) or str(getattr(error, "message", error)).rpartition("; ")[-1]
    return UserError(f"Cannot write '{path}' ({reason}); choose a folder that can be written.")


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Makes a folder and its parents if they are missing, and removes what killed runs have left directly in it.

    For the start of a run: it lists the folder, so it is not for every file that is written.

    Raises:
        UserError: If that is impossible.
    """
    require_local(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file in its place" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"Output folder '{folder}' cannot be made ({reason}); choose another.") from error
    remove_leftovers(folder)


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes `content` beside `path` under a temporary name, then renames it; makes missing folders.

    Raises:
        UserError: If the folder or the file cannot be written.
    """
    require_local(path)
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(path) as temporary:
            temporary.file.write(content)
            temporary.publish()
    except OSError as error:
        raise cannot_write(path, error) from error


def read_file(path: str | os.PathLike[str], what: str) -> bytes:
    """Reads a whole file; a pipe or a device, which may never end, is not opened.

    Args:
        path: The file; a name that no file can have, say with a null character, counts as missing.
        what: What it is called in the message, such as "the image".

    Raises:
        UserError: If it cannot be read.
    """
    require_local(path)
    try:
        mode = os.stat(path).st_mode
        if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # A folder fails by itself.
            raise UserError(f"{what} '{path}' is a pipe or a device; give a regular file.")
        return Path(path).read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{what} '{path}' cannot be read ({reason}); check the path.") from error


def read_json(path: str | os.PathLike[str], what: str = "JSON file") -> Any:
    """Reads a JSON file; `what` as in `read_file`.

    Raises:
        UserError: If it cannot be read or is no JSON.
    """
    content = read_file(path, what)
    try:
        return json.loads(content)
    except RecursionError as error:
        raise UserError(f"'{path}' is not a usable JSON file (nested too deeply); make it again.") from error
    except ValueError as error:
        raise UserError(f"'{path}' is not a JSON file ({error}); check the path, or make it again.") from error


def list_files(folder: Path, suffixes: Sequence[str], *, recursive: bool = False) -> list[Path]:
    """Lists the files in a folder that have one of some suffixes (in lower case) and are not hidden, sorted by name.

    Args:
        folder: The folder, which exists.
        suffixes: Suffixes in lower case, such as `.json`; those of the files may be in upper case.
        recursive: Whether to search subfolders, too.
    """
    files = [
        file
        for file in (folder.rglob("*") if recursive else folder.iterdir())
        if file.suffix.lower() in suffixes
        and not any(part.startswith(".") for part in file.relative_to(folder).parts)
        and file.is_file()
    ]
    return sorted(files, key=lambda file: (str(file).lower(), str(file)))


def distinct_names(files: Sequence[Path]) -> list[str]:
    """Names what is made of files: the stem of each, or its whole name where several would have the same.

    Names that differ only in upper and lower case count as the same, as they are on some file systems.
    """
    names = [file.stem for file in files]
    # A whole name may in turn be the stem of a third file (a.jpg, a.png, a.jpg.png), hence the repetition.
    while len({name.lower() for name in names}) < len(names):
        folded = [name.lower() for name in names]
        longer = [
            file.name if folded.count(name.lower()) > 1 else name for file, name in zip(files, names, strict=True)
        ]
        if longer == names:
            break  # They differ in upper and lower case only.
        names = longer
    return names


def image_id_of_name(name: str) -> int | str:
    """The id of an image in COCO files, from its name without ending: the number that it is, or else the name."""
    return int(name) if name.isascii() and name.isdigit() else name


def image_ids_of_names(names: Sequence[str]) -> list[int | str]:
    """The ids of images in COCO files, from their names without endings.

    Returns:
        As in COCO, numbers if the names are numbers that all differ; else the names.
    """
    ids = [image_id_of_name(name) for name in names]
    all_numbers = all(isinstance(image_id, int) for image_id in ids)
    return ids if all_numbers and len(set(ids)) == len(ids) else list(names)


# A letter alone is a drive of Windows. `Path` makes one slash of two.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def require_local(path: str | os.PathLike[str]) -> None:
    """Refuses addresses such as `gs://bucket/run`, which Python would take for a local folder `gs:`.

    Raises:
        UserError: If it is one.
    """
    text = os.fspath(path)
    if found := _ADDRESS.match(text):
        address = f"{found[1]}://{text[found.end() :]}"
        raise UserError(
            f"'{address}' is not a local path, and only local paths work; copy the data to a local folder, or mount "
            "the bucket and give the folder it is mounted on."
        )


@contextlib.contextmanager
def literal_folder(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a folder to functions of TensorFlow that take a path for a pattern, such as those that read a checkpoint.

    Args:
        folder: The folder.

    Yields:
        The folder, or a link to it if its path has characters that stand for others in a pattern. Errors of TensorFlow
        then name the link.
    """
    if not re.search(r"[][*?\\]", os.fspath(folder)):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "folder"
        link.symlink_to(os.path.abspath(folder), target_is_directory=True)
        yield link
