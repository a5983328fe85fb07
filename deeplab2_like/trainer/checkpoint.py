"""Model folders: `config.yaml`, `dataset_info.json`, `checkpoints/`. A model folder needs nothing else to be used."""

import os
from collections.abc import Sequence
from pathlib import Path

import keras
import tensorflow as tf

from deeplab2_like.configs import Config, load_config, save_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem, build_system

CONFIG_FILE = "config.yaml"
CHECKPOINT_FOLDER = "checkpoints"


def prepare_model_folder(model_dir: str | os.PathLike[str], config: Config, dataset_info: DatasetInfo) -> None:
    """Writes the config and the data set's facts into a model folder, new or of an earlier run of the same model.

    Raises:
        UserError: If the folder holds a run of another model or of other classes.
    """
    folder = Path(model_dir)
    if (folder / CONFIG_FILE).is_file():
        before = load_config(folder / CONFIG_FILE)
        changed = [key for key in ("system", "model") if getattr(before, key) != getattr(config, key)]
        if changed:
            raise UserError(
                f"Model folder '{folder}' holds a run whose '{changed[0]}' section differs from this config; use another "
                "--model-dir, or the config of that run."
            )
        if DatasetInfo.load(folder) != dataset_info:
            raise UserError(
                f"Model folder '{folder}' was trained on data set '{DatasetInfo.load(folder).name}', whose classes or "
                f"label divisor differ from those of '{dataset_info.name}'; use another --model-dir."
            )
    folder.mkdir(parents=True, exist_ok=True)
    dataset_info.save(folder)
    save_config(config, folder / CONFIG_FILE)


def load_model_folder(
    model_dir: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[Config, PanopticSystem, int]:
    """Loads the newest checkpoint of a model folder.

    Args:
        model_dir: A folder that training wrote.
        overrides: Changes to its config, `key.path=value`, such as thresholds of the post-processing.

    Returns:
        The config, the system with its trained variables, and the step of the checkpoint.

    Raises:
        UserError: If this is no model folder, holds no checkpoint yet, or the overrides change the network.
    """
    folder = Path(model_dir)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(f"'{folder}' is no model folder, as it has no {CONFIG_FILE}; give the --model-dir of a training.")
    config = load_config(folder / CONFIG_FILE, overrides)
    system = build_system(config, DatasetInfo.load(folder))
    path = tf.train.latest_checkpoint(folder / CHECKPOINT_FOLDER)
    if path is None:
        raise UserError(f"Model folder '{folder}' holds no checkpoint yet; train first.")
    restore(tf.train.Checkpoint(system=system), path)
    return config, system, int(path.rpartition("-")[2])


def make_checkpoint(system: PanopticSystem, optimizer: keras.optimizers.Optimizer) -> tf.train.Checkpoint:
    """Everything that training changes; the optimiser's variables must exist."""
    return tf.train.Checkpoint(system=system, optimizer=optimizer)


def restore(checkpoint: tf.train.Checkpoint, path: str) -> None:
    """Restores everything that `checkpoint` tracks.

    Raises:
        UserError: If the file is damaged, or does not hold all variables with the shapes that the config asks for.
    """
    try:
        checkpoint.restore(path).assert_existing_objects_matched().expect_partial()
    except (AssertionError, ValueError) as error:
        detail = str(error).strip().splitlines()[0]
        raise UserError(
            f"Checkpoint '{path}' does not fit the config ({detail}); use the config it was trained with."
        ) from error
    except (tf.errors.DataLossError, tf.errors.NotFoundError, tf.errors.OutOfRangeError) as error:
        raise UserError(f"Checkpoint '{path}' is damaged or incomplete; delete it to use the one before.") from error
