"""Finds the JSONs of splits in a folder, as Roboflow and CVAT export them."""

import dataclasses
from pathlib import Path

from deeplab2_like import files
from deeplab2_like.data.convert.splits import split_of_name
from deeplab2_like.errors import UserError

_ROBOFLOW_JSON = "_annotations.coco.json"
_CVAT_PREFIX = "instances_"


@dataclasses.dataclass(frozen=True)
class CocoSource:
    """The JSON and the images of one split; `split` is None if its name is to be guessed."""

    json_file: Path
    images: Path
    split: str | None


def find_splits(root: Path, images: Path | None, split: str | None) -> tuple[list[CocoSource], list[str]]:
    """Finds the splits in a folder: those of Roboflow, or else of CVAT.

    Args:
        root: The folder.
        images: Folder of the images; None: as the tools arrange it.
        split: The only split, or None.

    Returns:
        The splits, and sentences for the user on folders that are left out.

    Raises:
        UserError: If there are none, not the one that is wanted, or two of the same name.
    """
    found, unnamed = _find_roboflow_splits(root, images)
    notes = [
        f"Warning: left out '{path}', because its folder has no name of a split; --json converts it alone."
        for path in unnamed
    ]
    found = found or _find_cvat_splits(root, images)
    if not found and (root / _ROBOFLOW_JSON).is_file():
        return [CocoSource(root / _ROBOFLOW_JSON, root if images is None else images, split)], notes
    if list(found) == ["default"]:  # CVAT's name for images in no subset.
        return [dataclasses.replace(found["default"], split=split)], notes
    if split is not None and split in found:
        return [found[split]], notes
    if split is not None or not found:
        raise UserError(
            f"'{root}' has no folder of the split '{split or 'train'}' with {_ROBOFLOW_JSON} (found: "
            f"{', '.join(found) or 'none'}), and no {_CVAT_PREFIX}{split or 'train'}.json; give the JSON itself with "
            "--json."
        )
    return list(found.values()), notes


def _find_roboflow_splits(root: Path, images: Path | None) -> tuple[dict[str, CocoSource], list[Path]]:
    """Finds folders of splits with a JSON, by the name of the split, and the JSONs in folders of other names."""
    found: dict[str, CocoSource] = {}
    unnamed = []
    for path in sorted(root.glob(f"*/{_ROBOFLOW_JSON}")):
        name = split_of_name(path.parent.name)
        if name is None:
            unnamed.append(path)
        else:
            _add(found, CocoSource(path, path.parent if images is None else images / path.parent.name, name), name)
    return found, unnamed


def _find_cvat_splits(root: Path, images: Path | None) -> dict[str, CocoSource]:
    """Finds JSONs of splits, by the name of the split; their images may be in a folder of the same name."""
    folder = root / "annotations" if (root / "annotations").is_dir() else root
    found: dict[str, CocoSource] = {}
    for path in files.list_files(folder, (".json",)):
        subset = path.stem.removeprefix(_CVAT_PREFIX)
        if subset == path.stem:
            continue
        name = split_of_name(subset) or subset
        export = root if folder != root else root.parent
        parents = [export / "images", export] if images is None else [images]
        candidates = [*(parent / subset for parent in parents), *parents]
        folder_of_images = next((path for path in candidates if path.is_dir()), candidates[0])
        _add(found, CocoSource(path, folder_of_images, name), name)
    return found


def _add(found: dict[str, CocoSource], source: CocoSource, name: str) -> None:
    """Adds a split; raises `UserError` if there is another of the same name."""
    if name in found:
        raise UserError(
            f"'{found[name].json_file}' and '{source.json_file}' are both of the split '{name}'; give one of them with "
            "--json, and name its split with --split."
        )
    found[name] = source
