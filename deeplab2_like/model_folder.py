"""Model folders: `config.yaml`, `dataset_info.json`, `checkpoints/` and, after evaluations during training, `best/`."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from deeplab2_like.checkpoint import restore_system
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
from deeplab2_like.files import make_folder, require_local
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.temporary import remove_leftovers

CONFIG_FILE = "config.yaml"


def check_model_folder(model_dir: str | os.PathLike[str], config: Config, dataset_info: DatasetInfo) -> None:
    """Checks that a training may use a model folder: it is new, has no checkpoints, or holds a run of the same model.

    Raises:
        UserError: If the folder holds checkpoints of another model or of other classes.
    """
    folder = Path(model_dir)
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


def load_model_folder(
    model_dir: str | os.PathLike[str], overrides: Sequence[str] = (), *, checkpoint: str = "last"
) -> tuple[Config, PanopticSystem, int]:
    """Loads a checkpoint of a model folder.

    Args:
        model_dir: A folder that training wrote.
        overrides: Changes to its config, `key.path=value`, such as thresholds of the post-processing.
        checkpoint: Which one, see `find_checkpoint`.

    Returns:
        The config, the system with its trained variables, and the step of the checkpoint.

    Raises:
        UserError: If this is no model folder, has no such checkpoint, or the overrides change the network.
    """
    config, system = build_from_model_folder(model_dir, overrides)
    path = find_checkpoint(model_dir, checkpoint)
    restore_system(system, path)
    return config, system, checkpoint_step(path)


def build_from_model_folder(
    model_dir: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[Config, PanopticSystem]:
    """Builds the system of a model folder without restoring its variables; arguments as for `load_model_folder`.

    Raises:
        UserError: If this is no model folder.
    """
    require_local(model_dir)
    folder = Path(model_dir)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"'{folder}' is no model folder, as it has no {CONFIG_FILE}; give the --model-dir of a training."
        )
    config = load_config(folder / CONFIG_FILE, overrides)
    return config, build_system(config, DatasetInfo.load(folder))
