"""Reads and writes files, lists folders, and makes the names of outputs. Files appear whole or not at all."""

import collections
import contextlib
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError, enough_memory
from deeplab2_like.parsing import parse_json
from deeplab2_like.temporary import TemporaryFile, remove_leftovers

# In an output folder: the names of the results that a run has written there, one per line.
OUTPUTS_FILE = ".deeplab2-like-outputs"


def cannot_write(path: str | os.PathLike[str], error: Exception) -> UserError:
    """Builds the error for a file or folder that cannot be written.

    Args:
        path: The path as the user gave it.
        error: The error of Python or TensorFlow; TensorFlow's messages have the form `PATH; REASON`.

    Returns:
        The error to raise.
    """
    reason = getattr(error, "strerror", None) or str(getattr(error, "message", error)).rpartition("; ")[-1]
    return UserError(f"Cannot write '{path}' ({reason}); choose a folder that can be written.")


def require_no_folder(path: str | os.PathLike[str], kind: str) -> None:
    """Checks, before long work, that a file to be written has no folder in its place.

    Args:
        path: The file.
        kind: Kind of the file for the message, such as "JSON file".

    Raises:
        UserError: If there is a folder.
    """
    if Path(path).is_dir():
        raise UserError(f"'{path}' is a folder; give the name of a {kind}.")


def make_folder(folder: str | os.PathLike[str]) -> None:
    """Creates a folder and its parents if they are missing, and removes leftovers of killed runs directly in it.

    Call it once at the start of a run, because it lists the folder.

    Raises:
        UserError: If the folder cannot be created.
    """
    require_local(folder)
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = "there is a file in its place" if isinstance(error, FileExistsError) else error.strerror
        raise UserError(f"Output folder '{folder}' cannot be created ({reason}); choose another.") from error
    remove_leftovers(folder)


def reserve_outputs(output_dir: str | os.PathLike[str], names: Sequence[str]) -> None:
    """Checks that files and folders in an output folder may be replaced, and makes the folder.

    They may if they are missing or empty, or if an earlier run has reserved them: `OUTPUTS_FILE` lists these. So a
    folder of labels is not replaced because it has the name of a folder of results.

    Args:
        output_dir: The output folder; created if missing.
        names: Names of the files and folders to write in it.

    Raises:
        UserError: If one of them is not from an earlier run, or the folder cannot be written.
    """
    folder = Path(output_dir)
    reserved = read_reserved(folder)
    for name in names:
        path = folder / name
        is_used = any(path.iterdir()) if path.is_dir() else os.path.lexists(path)
        if is_used and name not in reserved:
            raise UserError(
                f"'{path}' is not from an earlier run of this command, which would replace it; choose another "
                "--output-dir."
            )
    make_folder(folder)
    if not reserved.issuperset(names):
        write_atomically(folder / OUTPUTS_FILE, "".join(f"{name}\n" for name in sorted(reserved.union(names))).encode())


def read_reserved(output_dir: str | os.PathLike[str]) -> set[str]:
    """Returns the names of the files and folders that earlier runs have reserved, see `reserve_outputs`."""
    list_file = Path(output_dir) / OUTPUTS_FILE
    return set(list_file.read_text(encoding="utf-8").splitlines()) if list_file.is_file() else set()


def write_atomically(path: str | os.PathLike[str], content: bytes) -> None:
    """Writes a file under a temporary name and renames it into place; creates missing folders.

    Args:
        path: The file.
        content: Its content.

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


def require_no_pipe(path: str | os.PathLike[str], what: str) -> None:
    """Refuses pipes and devices, which may never end, before they are opened.

    Args:
        path: The file.
        what: Name of the file in the message, such as "the image".

    Raises:
        UserError: If it is a pipe or a device.
        OSError, ValueError: If there is no such file.
    """
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):  # Reading a folder is an error of its own.
        raise UserError(f"{what} '{path}' is a pipe or a device; give a regular file.")


def read_file(path: str | os.PathLike[str], what: str) -> bytes:
    """Reads a whole regular file; pipes and devices, which may never end, are refused.

    Args:
        path: The file; an impossible name, for example with a null character, counts as missing.
        what: Name of the file in error messages, such as "the image".

    Raises:
        UserError: If the file cannot be read.
    """
    require_local(path)
    try:
        require_no_pipe(path, what)
        with enough_memory(f"{what} '{path}'"):
            return Path(path).read_bytes()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(f"{what} '{path}' cannot be read ({reason}); check the path.") from error


def read_text(path: str | os.PathLike[str], what: str, *, encoding: str | None = None) -> str:
    """Reads a text file: UTF-8, with or without a byte order mark, UTF-16, UTF-32, or another encoding by name.

    Args:
        path: The file.
        what: Name of the file in error messages.
        encoding: Encoding of files that are neither UTF-8 nor UTF-16 or UTF-32, such as "gbk". A folder may hold files
            of both kinds, because tools have changed their encoding between versions.

    Raises:
        UserError: If the file cannot be read or decoded, or the encoding is unknown.
    """
    content = read_file(path, what)
    if encoding is not None:
        try:
            b"0000".decode(encoding)
        except UnicodeError:
            pass  # A text encoding; whether it is the right one shows below.
        except (LookupError, ValueError) as error:
            raise UserError(
                f"Unknown encoding '{encoding}'; give a name that Python knows, such as gbk, cp1252 or shift_jis."
            ) from error
    found = json.detect_encoding(content)
    try:
        # Text of ASCII bytes alone may be in an encoding with escape sequences, such as ISO-2022-JP.
        return content.decode(encoding if encoding and found == "utf-8" and content.isascii() else found, "strict")
    except UnicodeDecodeError as error:
        if encoding is None:
            raise UserError(
                f"'{path}' is not text in {found.upper()} (byte {error.start} of {len(content)}); save it as UTF-8, "
                "or give its encoding to `convert`, such as --encoding gbk (Chinese Windows) or --encoding cp1252."
            ) from error
    try:
        return content.decode(encoding)
    except UnicodeError as error:
        raise UserError(
            f"'{path}' is text neither in {found.upper()} nor in {encoding} ({error}); give its --encoding."
        ) from error


def read_json(path: str | os.PathLike[str], what: str = "JSON file", *, encoding: str | None = None) -> Any:
    """Reads a JSON file.

    Args:
        path: The file.
        what: Name of the file in error messages.
        encoding: See `read_text`.

    Raises:
        UserError: If the file cannot be read or is not JSON.
    """
    text = read_text(path, what, encoding=encoding)
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"'{path}' is not a JSON file ({error}); check the path, or make it again.") from error


def walk(folder: Path) -> Iterator[Path]:
    """Yields all that is not a folder in a folder and its subfolders, hidden ones left out.

    Links to folders are followed, except to a folder that the link is in, which would never end.
    """
    yield from _walk(folder, {os.path.realpath(folder)})


def _walk(folder: Path, above: set[str]) -> Iterator[Path]:
    """Does the work of `walk`; `above` has the real paths of `folder` and the folders on the way to it."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if not path.is_dir():
            yield path
        elif (real := os.path.realpath(path)) not in above:
            yield from _walk(path, above | {real})


def folder_beside(folder: Path, file: Path) -> Path:
    """Returns a folder, or one of the same name beside a file if it does not exist, as on another machine."""
    if not folder.is_dir():
        for name in (folder, folder.name):  # An absolute path takes the place of the file's folder.
            if (file.parent / name).is_dir():
                return file.parent / name
    return folder


def list_files(folder: Path, suffixes: Sequence[str], *, recursive: bool = False) -> list[Path]:
    """Lists the files in a folder that have one of some suffixes (in lower case) and are not hidden, sorted by name.

    Links are included, also broken ones, and pipes: reading them is an error that names them.

    Args:
        folder: The folder, which exists.
        suffixes: Suffixes in lower case, such as `.json`; those of the files may be in upper case.
        recursive: Whether to search subfolders, too.
    """
    listed = walk(folder) if recursive else (path for path in folder.iterdir() if not path.is_dir())
    files = [file for file in listed if file.suffix.lower() in suffixes and not file.name.startswith(".")]
    return sorted(files, key=lambda file: (str(file).lower(), str(file)))


def hash_files(files: Sequence[Path]) -> str:
    """Returns the SHA-256 of the contents of files, in hexadecimal; a file that does not exist counts as empty."""
    digest = hashlib.sha256()
    for file in files:
        content = file.read_bytes() if file.is_file() else b""
        digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()


def distinct_names(files: Sequence[Path], *, root: Path | None = None) -> list[str]:
    """Makes a distinct name for the output of each file: its stem, or its whole name where stems are equal.

    Names that differ only in case count as equal, as on some file systems.

    Args:
        files: The files.
        root: A folder that holds them; names then are paths relative to it, with `/` between folders.
    """
    if root is not None:
        files = [file.relative_to(root) for file in files]
        folders = ["" if file.parent == Path() else f"{file.parent.as_posix()}/" for file in files]
    else:
        folders = [""] * len(files)
    names = [folder + file.stem for folder, file in zip(folders, files, strict=True)]
    # A whole name may be the stem of a third file (a.jpg, a.png, a.jpg.png), so this is repeated.
    while len({name.lower() for name in names}) < len(names):
        count_of = collections.Counter(name.lower() for name in names)
        longer = [
            folder + file.name if count_of[name.lower()] > 1 else name
            for folder, file, name in zip(folders, files, names, strict=True)
        ]
        if longer == names:
            break  # They differ only in case.
        names = longer
    return names


def image_id_of_name(name: str) -> int | str:
    """Returns the id of an image in COCO files: its name without suffix, as a number if it is one."""
    return int(name) if name.isascii() and name.isdigit() else name


def image_ids_of_names(names: Sequence[str]) -> list[int | str]:
    """Returns the ids of images in COCO files.

    Args:
        names: The names of the images without suffix.

    Returns:
        Numbers, as in COCO, if the names are different numbers; otherwise the names.
    """
    ids = [image_id_of_name(name) for name in names]
    all_numbers = all(isinstance(image_id, int) for image_id in ids)
    return ids if all_numbers and len(set(ids)) == len(ids) else list(names)


# A single letter is a drive on Windows. `Path` turns two slashes into one.
_ADDRESS = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+):/+")


def require_local(path: str | os.PathLike[str]) -> None:
    """Refuses addresses such as `gs://bucket/run`, which Python would treat as a local folder `gs:`.

    Raises:
        UserError: If the path is an address.
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
    """Passes a folder to TensorFlow functions that treat paths as glob patterns, such as those that read checkpoints.

    Args:
        folder: The folder.

    Yields:
        The folder, or a link to it if its path has glob characters. TensorFlow's errors then name the link.
    """
    if not re.search(r"[][*?\\]", os.fspath(folder)):
        yield Path(folder)
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "folder"
        link.symlink_to(os.path.abspath(folder), target_is_directory=True)
        yield link
