"""The folders of exports: a single export, or a folder of versions 1, 2, ..., as TensorFlow Serving expects.

This module does not import Keras, because it is needed to load an export.
"""

from pathlib import Path

from deeplab2_like.data.dataset_info import FILE_NAME as INFO_FILE

MODEL_FILE = "saved_model.pb"


def is_export(folder: Path) -> bool:
    """Returns whether a folder is a whole export."""
    return (folder / MODEL_FILE).is_file() and (folder / INFO_FILE).is_file()


def version_number(name: str) -> int | None:
    """Returns the number of a version from the name of its folder; None for other names."""
    return int(name) if name.isascii() and name.isdigit() else None


def list_versions(folder: Path) -> dict[int, Path]:
    """Lists the paths in a folder, which may be missing, that are named like a version, in ascending order."""
    if not folder.is_dir():
        return {}
    numbered = ((version_number(path.name), path) for path in folder.iterdir())
    return dict(sorted((number, path) for number, path in numbered if number is not None))


def newest_export(folder: Path) -> Path | None:
    """Returns the highest version that is a whole export; None if there is none."""
    exports = [path for path in list_versions(folder).values() if is_export(path)]
    return exports[-1] if exports else None
