"""Import of released weights: recognizes the source of a checkpoint, and writes a model folder.

The folder is like that of a training, so that every command can use it. `source.json` in it says where the weights are
from.
"""

import fnmatch
import hashlib
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import keras
import numpy as np

from deeplab2_like.configs import Config, load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.known_datasets import find_data_set
from deeplab2_like.errors import UserError
from deeplab2_like.files import require_local
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.model_folder import require_new_folder, write_imported
from deeplab2_like.weights import (
    deeplab2_panoptic_deeplab,
    detectron2_panoptic_deeplab,
    detectron2_panoptic_fcn,
    detectron2_panoptic_fpn,
)
from deeplab2_like.weights.assign import Assignment, MismatchError
from deeplab2_like.weights.backbones import recognize_backbone
from deeplab2_like.weights.files import read_checkpoint

State = Mapping[str, np.ndarray]


class ModelSource(NamedTuple):
    """A kind of checkpoint that can be imported.

    Attributes:
        title: Its name for messages.
        system: The name of its system.
        recognizes: Whether names are those of such a checkpoint.
        find_config: Returns the name of the config and that of the data set for a checkpoint. Either is None if the
            user must give it.
        find_overrides: Returns the overrides of the config for what a checkpoint shows, such as the depth of a ResNet.
        load: Sets the variables of a system; it takes the system, the arrays, and `keep_initial`.
        class_layers: Patterns of the names whose shape depends on the number of classes.
    """

    title: str
    system: str
    recognizes: Callable[[Collection[str]], bool]
    find_config: Callable[[State], tuple[str | None, str | None]]
    find_overrides: Callable[[State], list[str]]
    load: Callable[..., Assignment]
    class_layers: Sequence[str]


# The first one that recognizes the names of a checkpoint is used.
MODEL_SOURCES: dict[str, ModelSource] = {
    "detectron2_panoptic_fpn": ModelSource(
        title="Panoptic FPN of Detectron2",
        system="panoptic_fpn",
        recognizes=detectron2_panoptic_fpn.is_panoptic_fpn,
        find_config=lambda state: (detectron2_panoptic_fpn.CONFIG, "coco"),
        find_overrides=detectron2_panoptic_fpn.panoptic_fpn_overrides,
        load=detectron2_panoptic_fpn.load_panoptic_fpn,
        class_layers=detectron2_panoptic_fpn.CLASS_LAYERS,
    ),
    "detectron2_panoptic_deeplab": ModelSource(
        title="Panoptic-DeepLab of Detectron2",
        system="panoptic_deeplab",
        recognizes=detectron2_panoptic_deeplab.is_panoptic_deeplab,
        find_config=detectron2_panoptic_deeplab.find_panoptic_deeplab_config,
        find_overrides=detectron2_panoptic_deeplab.panoptic_deeplab_overrides,
        load=detectron2_panoptic_deeplab.load_panoptic_deeplab,
        class_layers=detectron2_panoptic_deeplab.CLASS_LAYERS,
    ),
    "detectron2_panoptic_fcn": ModelSource(
        title="Panoptic FCN of its authors",
        system="panoptic_fcn",
        recognizes=detectron2_panoptic_fcn.is_panoptic_fcn,
        find_config=lambda state: (detectron2_panoptic_fcn.CONFIG, "coco"),
        find_overrides=detectron2_panoptic_fcn.panoptic_fcn_overrides,
        load=detectron2_panoptic_fcn.load_panoptic_fcn,
        class_layers=detectron2_panoptic_fcn.CLASS_LAYERS,
    ),
    "deeplab2_panoptic_deeplab": ModelSource(
        title="Panoptic-DeepLab of DeepLab2",
        system="panoptic_deeplab",
        recognizes=deeplab2_panoptic_deeplab.is_deeplab2,
        find_config=deeplab2_panoptic_deeplab.find_deeplab2_config,
        find_overrides=deeplab2_panoptic_deeplab.deeplab2_overrides,
        load=deeplab2_panoptic_deeplab.load_deeplab2,
        class_layers=deeplab2_panoptic_deeplab.CLASS_LAYERS,
    ),
}


class Import(NamedTuple):
    """What an import did.

    Attributes:
        source: A key of `MODEL_SOURCES`.
        config: Name or file of the config.
        overrides: Its overrides, those for what the checkpoint shows first.
        data_set: Name of the data set.
        assignment: What was loaded.
    """

    source: str
    config: str
    overrides: Sequence[str]
    data_set: str
    assignment: Assignment


def import_weights(
    file: str | os.PathLike[str],
    output_dir: str | os.PathLike[str],
    *,
    config: str | None = None,
    data_set: str | None = None,
    keep_initial: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> Import:
    """Imports a released checkpoint: writes a model folder, whole or not at all.

    Args:
        file: The checkpoint: a file of arrays, or of a TensorFlow checkpoint the folder or the common part of the
            names of its files.
        output_dir: The model folder; it must be missing or empty.
        config: Name or file of a config; by default the one that belongs to the source of the checkpoint.
        data_set: The classes of the checkpoint, see `find_data_set`; by default those of the source.
        keep_initial: Patterns with `*` for names in the checkpoint that are not loaded.
        overrides: Changes to the config, `key.path=value`.

    Returns:
        What was imported.

    Raises:
        UserError: If the checkpoint is not recognized, does not fit the config or the data set, or the folder cannot be
            written.
    """
    require_new_folder(output_dir)
    state = read_weights(file)
    name = recognize(state, file)
    source = MODEL_SOURCES[name]
    default_config, default_data_set = source.find_config(state)
    config = config or default_config
    data_set = data_set or default_data_set
    if config is None or data_set is None:
        raise _unknown_classes(file, source)
    _check_system(load_config(config), source, file=file, config=config, default=default_config)
    try:
        overrides = [*source.find_overrides(state), *overrides]
    except UserError as error:
        reason = str(error)
        raise UserError(f"'{file}' cannot be imported: {reason[0].lower()}{reason[1:]}") from error
    settings = load_config(config, overrides)
    info = find_data_set(data_set)
    # The variables that keep their initial values are the same in each import.
    keras.utils.set_random_seed(settings.trainer.seed)
    system = build_system(settings, info)
    if system.config.backbone.weights is not None:
        raise UserError(
            f"'{file}' has weights for the backbone, so no others can be loaded; leave out `model.backbone.weights`, "
            "or set it to null."
        )
    assignment = _load(source, system, state, keep_initial, file=file, config=config)
    imported = Import(name, config, overrides, info.name, assignment)
    write_imported(output_dir, settings, system, _describe(imported, Path(file)))
    return imported


def read_weights(file: str | os.PathLike[str]) -> dict[str, np.ndarray]:
    """Reads a checkpoint, see `import_weights`: arrays by name.

    Raises:
        UserError: If it cannot be read.
    """
    require_local(file)
    if deeplab2_panoptic_deeplab.is_tensorflow_checkpoint(Path(file)):
        return deeplab2_panoptic_deeplab.read_deeplab2_checkpoint(Path(file))
    return read_checkpoint(Path(file))


def recognize(state: State, file: str | os.PathLike[str]) -> str:
    """Returns the key in `MODEL_SOURCES` of the kind that a checkpoint is of.

    Args:
        state: The arrays of the checkpoint by name.
        file: The checkpoint, for messages.

    Raises:
        UserError: If no kind recognizes the names.
    """
    for name, source in MODEL_SOURCES.items():
        if source.recognizes(state):
            return name
    if recognize_backbone(state) is not None:
        raise UserError(
            f"'{file}' holds a backbone alone, which is no model; train one that starts from it, with "
            f"--set model.backbone.weights={file}."
        )
    known = ", ".join(source.title for source in MODEL_SOURCES.values())
    raise UserError(
        f"'{file}' cannot be imported, because its names, such as {', '.join(list(state)[:2])}, are not those of "
        f"{known}; choose a checkpoint that `deeplab2-like import-weights --list` shows."
    )


def _unknown_classes(file: str | os.PathLike[str], source: ModelSource) -> UserError:
    return UserError(
        f"'{file}' ({source.title}) has neither the number of classes of Cityscapes nor that of COCO; give its classes "
        "with --data-set FILE.json, and a config with --config."
    )


def _check_system(
    settings: Config, source: ModelSource, *, file: str | os.PathLike[str], config: str, default: str | None
) -> None:
    """Raises `UserError` if the config is for another system than the checkpoint."""
    if settings.system != source.system:
        advice = f", such as --config {default}" if default else ""
        raise UserError(
            f"'{file}' is a {source.title}, but config '{config}' is for {settings.system}; leave out --config, or "
            f"give one for {source.system}{advice}."
        )


def _load(
    source: ModelSource,
    system: PanopticSystem,
    state: State,
    keep_initial: Sequence[str],
    *,
    file: str | os.PathLike[str],
    config: str,
) -> Assignment:
    """Loads the arrays; an error says what to change in the command."""
    try:
        return source.load(system, state, keep_initial=keep_initial)
    except MismatchError as error:
        info: DatasetInfo = system.dataset_info
        depend_on_classes = all(
            any(fnmatch.fnmatchcase(name, pattern) for pattern in source.class_layers)
            for name in error.shape_mismatches
        )
        if error.only_shapes and depend_on_classes:
            patterns = " ".join(f"'{pattern}'" for pattern in source.class_layers)
            raise UserError(
                f"'{file}' has other classes than data set '{info.name}', which has {info.num_classes}: "
                f"{error.problems}; give the classes of the file with --data-set FILE.json, or keep the initial "
                f"weights of these layers with --keep-initial {patterns}."
            ) from error
        raise UserError(
            f"'{file}' does not fit config '{config}': {error.problems}; use the config that belongs to the file, or "
            "leave names out with --keep-initial PATTERN."
        ) from error


def _describe(imported: Import, file: Path) -> dict[str, Any]:
    """Returns the content of `source.json`."""
    files = [file]
    if deeplab2_panoptic_deeplab.is_tensorflow_checkpoint(file):
        index = deeplab2_panoptic_deeplab.find_checkpoint_prefix(file)
        files = sorted(path for path in index.parent.iterdir() if path.name.startswith(f"{index.name}."))
    digests = {}
    for path in files:
        with path.open("rb") as stream:
            digests[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
    return {
        "sha256": digests,
        "source": imported.source,
        "config": imported.config,
        "overrides": list(imported.overrides),
        **{name: list(names) for name, names in imported.assignment._asdict().items()},
    }
