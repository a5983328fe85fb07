"""Converts Mapillary Vistas 1.2 and 2.0 as downloaded: 16-bit PNGs of `label id * 256 + instance`.

The classes, their names, colors and kinds (thing or stuff) come from the `config*.json` of the download.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Unpack

import numpy as np

from deeplab2_like import files
from deeplab2_like.data.convert import common, labeled_images
from deeplab2_like.data.convert.losses import NO_CLASS, Losses
from deeplab2_like.data.convert.splits import require_one_split
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import read_value_png
from deeplab2_like.errors import UserError, unknown_name

_FOLDERS = {"train": "training", "val": "validation"}
_INSTANCE_FACTOR = 256


def convert_mapillary(
    *,
    root: Path,
    output_dir: Path,
    splits: Sequence[str] | None = None,
    version: str | None = None,
    encoding: str | None = None,
    **options: Unpack[labeled_images.LabelOptions],
) -> tuple[common.ConversionReport, ...]:
    """Converts splits of Mapillary Vistas.

    Labels with `"evaluate": false` become void.

    Args:
        root: The folder with `training`, `validation` and `config.json`, `config_v1.2.json` or `config_v2.0.json`.
        output_dir: The record folder.
        splits: `train` and `val`, or one of them; None: both.
        version: "1.2" or "2.0", if the download has both; None: the newest one there.
        encoding: Encoding of the config, see `files.read_text`.
        **options: See `labeled_images.LabelOptions`.

    Returns:
        A report per split.

    Raises:
        UserError: If an input is missing or faulty; splits that were converted before stay.
    """
    root = Path(root)
    config, labels_folder = _find_version(root, version)
    labels = _read_labels(config, encoding)
    info = _make_info(labels, name=f"mapillary {config.stem}")
    notes = [] if version is not None else [f"The classes are those of '{config.name}'; --version chooses others."]

    def load(pair: labeled_images.Pair, info: DatasetInfo, losses: Losses) -> tuple[bytes, np.ndarray]:
        def meaning(value: int) -> tuple[int, bool] | labeled_images.Void:
            label_id = value // _INSTANCE_FACTOR
            if label_id >= len(labels):
                raise UserError(
                    f"'{pair.label}' has the value {value}, which is label {label_id}; '{config}' lists labels 0 to "
                    f"{len(labels) - 1}: check that both are of the same version."
                )
            class_id = info.class_of_category_id.get(label_id)
            if class_id is None:
                return labeled_images.Void(NO_CLASS, labels[label_id]["readable"])
            # Instances are numbered from 0, so every value of a thing class is an instance.
            return class_id, info.categories[class_id].is_thing

        image = files.read_file(pair.image, "the image")
        values = read_value_png(pair.label, "instance PNG")
        return image, labeled_images.values_to_panoptic(values, meaning, info, losses)

    sources = {}
    for split in splits or _FOLDERS:
        if split not in _FOLDERS:
            raise unknown_name("split of Mapillary Vistas", split, _FOLDERS)
        sources[split] = [root / _FOLDERS[split] / "images", root / _FOLDERS[split] / labels_folder]
    require_one_split(list(sources), options.get("val_share"))
    common.require_replaceable(Path(output_dir), sources, replace=options.get("replace", False))
    reports: list[common.ConversionReport] = []
    for split, (images, label_pngs) in sources.items():
        reports += labeled_images.write_labeled_images(
            {split: labeled_images.pair_images(images, label_pngs)},
            load,
            inputs_of=lambda pair: [pair.image, pair.label],
            source=[images, label_pngs],
            info=info,
            output_dir=Path(output_dir),
            notes=() if reports else notes,
            **options,
        )
    return tuple(reports)


def _find_version(root: Path, version: str | None) -> tuple[Path, str]:
    """Returns the config file, and the subfolder of the instance PNGs in the folder of a split."""
    for known in ("2.0", "1.2"):
        config = root / f"config_v{known}.json"
        if version in (None, known) and config.is_file():
            return config, f"v{known}/instances"
    config = root / "config.json"
    if version in (None, "1.2") and config.is_file():
        return config, "instances"
    wanted = "config_v2.0.json, config_v1.2.json or config.json" if version is None else f"config of version {version}"
    raise UserError(f"'{root}' has no {wanted}; give the folder of the download of Mapillary Vistas 1.2 or 2.0.")


def _read_labels(config: Path, encoding: str | None) -> list[dict[str, Any]]:
    """Reads the labels; their positions in the list are their ids."""
    content = files.read_json(config, "the config of Mapillary Vistas", encoding=encoding)
    labels = content.get("labels") if isinstance(content, dict) else None
    needed = {"name", "readable", "instances", "evaluate", "color"}
    kinds = {"name": str, "readable": str, "instances": bool, "evaluate": bool}
    if not isinstance(labels, list) or not all(
        isinstance(x, dict) and needed <= set(x) and all(isinstance(x[key], kind) for key, kind in kinds.items())
        for x in labels
    ):
        raise UserError(
            f"'{config}' has no list 'labels' with {', '.join(sorted(needed))} of each, names as text, 'instances' and "
            "'evaluate' true or false; use the file of the download."
        )
    return labels


def _make_info(labels: list[dict[str, Any]], *, name: str) -> DatasetInfo:
    """Makes the classes from the evaluated labels, with readable names if these are distinct, else long ones."""
    evaluated = [(label_id, label) for label_id, label in enumerate(labels) if label["evaluate"]]
    key = "readable" if len({label["readable"] for _, label in evaluated}) == len(evaluated) else "name"
    categories = [
        {"id": label_id, "name": label[key], "isthing": int(label["instances"]), "color": label["color"]}
        for label_id, label in evaluated
    ]
    return DatasetInfo.from_coco_categories(categories, name=name)
