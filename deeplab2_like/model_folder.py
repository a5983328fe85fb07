"""Model folders: `config.yaml`, `dataset_info.json`, `checkpoints/` and, after evaluations during training, `best/`."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from deeplab2_like.checkpoint import make_checkpoint, restore_system
from deeplab2_like.checkpoint_files import (
    BEST_FOLDER,
    CHECKPOINT_FOLDER,
    CHECKPOINT_NAME,
    checkpoint_step,
    find_checkpoint,
    list_checkpoints,
)
from deeplab2_like.configs import Config, load_config, save_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.files import cannot_write, make_folder, require_local, write_atomically
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.model.base import dtype_policy
from deeplab2_like.temporary import TemporaryFolder, remove_leftovers

CONFIG_FILE = "config.yaml"
# In folders of imported weights: where they are from.
SOURCE_FILE = "source.json"


def check_model_folder(model_dir: str | os.PathLike[str], config: Config, dataset_info: DatasetInfo) -> None:
    """Checks that a training may use a model folder: it is new, has no checkpoints, or holds a run of the same model.

    Raises:
        UserError: If the folder holds imported weights, or checkpoints of another model or of other classes.
    """
    folder = Path(model_dir)
    if (folder / SOURCE_FILE).is_file():
        raise UserError(
            f"Model folder '{folder}' holds imported weights, which no training can resume; train in another "
            f"--model-dir with --init-from {folder}."
        )
    has_checkpoint = bool(list_checkpoints(folder))
    if not has_checkpoint and (folder / BEST_FOLDER).exists():
        raise UserError(
            f"Model folder '{folder}' holds the best checkpoint of an earlier run, but none to resume from; use "
            f"another --model-dir, or move '{folder / BEST_FOLDER}' elsewhere."
        )
    if not has_checkpoint or not (folder / CONFIG_FILE).is_file():
        return
    before = load_config(folder / CONFIG_FILE)
    changed = [key for key in ("system", "model") if getattr(before, key) != getattr(config, key)]
    if changed:
        raise UserError(
            f"Model folder '{folder}' holds a run whose '{changed[0]}' section differs from this config; use "
            "another --model-dir, or the config of that run."
        )
    trained_on = DatasetInfo.load(folder)
    if trained_on != dataset_info:
        raise UserError(
            f"Model folder '{folder}' was trained on data set '{trained_on.name}', whose classes or "
            f"label divisor differ from those of '{dataset_info.name}'; use another --model-dir."
        )


def clean_model_folder(model_dir: str | os.PathLike[str]) -> None:
    """Removes incomplete checkpoints of killed trainings; only the training that has locked the folder may call it."""
    for name in (CHECKPOINT_FOLDER, BEST_FOLDER):
        remove_leftovers(Path(model_dir) / name)
    for unfinished in (Path(model_dir) / CHECKPOINT_FOLDER).glob(f"{CHECKPOINT_NAME}-*_temp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def prepare_model_folder(model_dir: str | os.PathLike[str], config: Config, dataset_info: DatasetInfo) -> None:
    """Writes the config and the dataset info into a model folder, replacing those of an earlier run.

    Raises:
        UserError: If the folder cannot be written.
    """
    folder = Path(model_dir)
    if config.data.path is not None:
        # The model folder may be used from another working directory, so a relative path would be wrong.
        data = config.data.model_copy(update={"path": os.path.abspath(config.data.path)})
        config = config.model_copy(update={"data": data})
    make_folder(folder)
    dataset_info.save(folder)
    save_config(config, folder / CONFIG_FILE)


def require_new_folder(model_dir: str | os.PathLike[str]) -> None:
    """Raises `UserError` unless a folder to be written is missing or empty."""
    require_local(model_dir)
    folder = Path(model_dir)
    if os.path.lexists(folder) and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(
            f"'{folder}' exists and is not an empty folder, and nothing is replaced; give a new or empty folder."
        )


def write_imported(
    model_dir: str | os.PathLike[str], config: Config, system: PanopticSystem, source: Mapping[str, Any]
) -> None:
    """Writes a model folder of imported weights, with a checkpoint of step 0. It appears whole or not at all.

    Args:
        model_dir: A folder that is missing or empty.
        config: The config of the system.
        system: The system, with its weights.
        source: Content of `source.json`.

    Raises:
        UserError: If the folder is not empty or cannot be written.
    """
    require_new_folder(model_dir)
    folder = Path(model_dir).resolve()
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder.parent, of=folder.name)
        with TemporaryFolder(folder) as temporary:
            prepare_model_folder(temporary.path, config, system.dataset_info)
            write_atomically(temporary.path / SOURCE_FILE, (json.dumps(source, indent=1) + "\n").encode())
            checkpoints = temporary.path / CHECKPOINT_FOLDER
            checkpoints.mkdir()
            make_checkpoint(system).write(str(checkpoints / f"{CHECKPOINT_NAME}-0"))
            temporary.publish()
    except (OSError, tf.errors.OpError) as error:
        raise cannot_write(model_dir, error) from error


def load_model_folder(
    model_dir: str | os.PathLike[str],
    overrides: Sequence[str] = (),
    *,
    checkpoint: str = "last",
    averaged: bool | None = None,
    precision: str | None = None,
) -> tuple[Config, PanopticSystem, int]:
    """Loads a checkpoint of a model folder.

    Args:
        model_dir: A folder that training wrote.
        overrides: Changes to its config, `key.path=value`, such as thresholds of the post-processing.
        checkpoint: Which one, see `find_checkpoint`.
        averaged: Whether to use the moving averages of the weights; None: if the training kept them.
        precision: Keras' dtype policy of the network, such as `mixed_bfloat16`; None: that of the process.

    Returns:
        The config, the system with its trained variables, and the step of the checkpoint.

    Raises:
        UserError: If this is no model folder, has no such checkpoint, the overrides change the network, or there are
            no averages.
    """
    config, dataset_info = read_model_folder(model_dir, overrides)
    path = find_checkpoint(model_dir, checkpoint)  # Before the network is built, so that an error comes early.
    with contextlib.nullcontext() if precision is None else dtype_policy(precision):
        system = build_system(config, dataset_info)
    restore_system(system, path, averaged=averaged)
    return config, system, checkpoint_step(path)


def build_from_model_folder(
    model_dir: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[Config, PanopticSystem]:
    """Builds the system of a model folder without restoring its variables; arguments as for `load_model_folder`.

    Raises:
        UserError: If this is no model folder.
    """
    config, dataset_info = read_model_folder(model_dir, overrides)
    return config, build_system(config, dataset_info)


def read_model_folder(model_dir: str | os.PathLike[str], overrides: Sequence[str] = ()) -> tuple[Config, DatasetInfo]:
    """Reads the config and the dataset info of a model folder, without building the system.

    Args:
        model_dir: A folder that training wrote.
        overrides: Changes to its config, `key.path=value`.

    Raises:
        UserError: If this is no model folder, or the overrides are wrong.
    """
    require_local(model_dir)
    folder = Path(model_dir)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"'{folder}' is no model folder, as it has no {CONFIG_FILE}; give the --model-dir of a training."
        )
    return load_config(folder / CONFIG_FILE, overrides), DatasetInfo.load(folder)
