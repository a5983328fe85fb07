"""Model folders: `config.yaml`, `dataset_info.json`, `checkpoints/`. A model folder needs nothing else to be used."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from deeplab2_like.configs import Config, load_config, save_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.files import write_atomically
from deeplab2_like.model import PanopticSystem, build_system

CONFIG_FILE = "config.yaml"
CHECKPOINT_FOLDER = "checkpoints"
CHECKPOINT_NAME = "ckpt"


def check_model_folder(model_dir: str | os.PathLike[str], config: Config, dataset_info: DatasetInfo) -> None:
    """Checks that a model folder is free for a training: new, without checkpoints, or of a run of the same model.

    Raises:
        UserError: If the folder holds checkpoints of another model or of other classes.
    """
    folder = Path(model_dir)
    if not list_checkpoints(folder) or not (folder / CONFIG_FILE).is_file():
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


def prepare_model_folder(model_dir: str | os.PathLike[str], config: Config, dataset_info: DatasetInfo) -> None:
    """Writes the config and the data set's facts into a model folder, over those of an earlier run.

    Raises:
        UserError: If the folder cannot be written.
    """
    folder = Path(model_dir)
    if config.data.path is not None:
        # The folder is used from wherever, so it cannot keep a path that counts from here.
        data = config.data.model_copy(update={"path": os.path.abspath(config.data.path)})
        config = config.model_copy(update={"data": data})
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
        raise UserError(
            f"'{folder}' is no model folder, as it has no {CONFIG_FILE}; give the --model-dir of a training."
        )
    config = load_config(folder / CONFIG_FILE, overrides)
    system = build_system(config, DatasetInfo.load(folder))
    paths = list_checkpoints(folder)
    if not paths:
        raise UserError(f"Model folder '{folder}' holds no checkpoint yet; train first.")
    restore(make_checkpoint(system), paths[-1])
    return config, system, _step(paths[-1])


def list_checkpoints(model_dir: str | os.PathLike[str]) -> list[str]:
    """Lists the checkpoints of a model folder, the oldest first, as paths without ending.

    It looks at the files: TensorFlow's own list still names a checkpoint that somebody has deleted, say, as damaged.
    """
    indices = (Path(model_dir) / CHECKPOINT_FOLDER).glob(f"{CHECKPOINT_NAME}-*.index")
    return sorted((str(index.with_suffix("")) for index in indices), key=_step)


def make_checkpoint_manager(
    checkpoint: tf.train.Checkpoint, model_dir: str | os.PathLike[str], *, step: tf.Variable, every: int, keep: int
) -> tf.train.CheckpointManager:
    """Makes what saves checkpoints into a model folder, and knows those that are there.

    Args:
        checkpoint: What to save.
        model_dir: The model folder.
        step: The step that training has reached, int scalar.
        every: Steps between checkpoints.
        keep: How many of the newest checkpoints stay.
    """
    folder = Path(model_dir) / CHECKPOINT_FOLDER
    names = [Path(path).name for path in list_checkpoints(model_dir)]
    if names:
        # TensorFlow's own list, see `list_checkpoints`, as a text protocol buffer.
        lines = [f'model_checkpoint_path: "{names[-1]}"', *(f'all_model_checkpoint_paths: "{name}"' for name in names)]
        write_atomically(folder / "checkpoint", ("\n".join(lines) + "\n").encode())
    else:
        (folder / "checkpoint").unlink(missing_ok=True)
    return _CheckpointManager(
        checkpoint,
        str(folder),
        max_to_keep=keep,
        checkpoint_name=CHECKPOINT_NAME,
        step_counter=step,
        checkpoint_interval=every,
    )


class _CheckpointManager(tf.train.CheckpointManager):
    """Saves at multiples of its interval; TensorFlow's own counts from wherever the first loop happens to end."""

    def save(self, checkpoint_number: Any = None, check_interval: bool = True, options: Any = None) -> str | None:
        """Saves, unless `check_interval` and it is not yet time; returns the path if it did."""
        if check_interval and int(checkpoint_number) % self.checkpoint_interval:
            return None
        return super().save(checkpoint_number, check_interval=False, options=options)


def _step(path: str) -> int:
    return int(path.rpartition("-")[2])


def make_checkpoint(system: PanopticSystem, optimizer: keras.optimizers.Optimizer | None = None) -> tf.train.Checkpoint:
    """Everything that training changes, or only the system's part; the optimiser's variables must exist."""
    optional = {} if optimizer is None else {"optimizer": optimizer}
    return tf.train.Checkpoint(system=_variables(system), **optional)


def _variables(system: PanopticSystem) -> dict[str, Any]:
    """What a checkpoint keeps of a system: its weights by path, and the states of its random generators in order.

    Given the system itself, `tf.train.Checkpoint` would miss, without a word, all layers that other layers keep in
    lists or dictionaries.
    """
    weights = {weight.path: weight.value for weight in system.weights}
    # Their paths count all generators of the process, so they cannot serve as keys.
    generators = [variable.value for variable in system.variables if variable.path not in weights]
    return {"weights": weights, "generators": generators}


def restore(checkpoint: tf.train.Checkpoint, path: str) -> None:
    """Restores everything that `checkpoint` tracks.

    Raises:
        UserError: If the file is damaged, or does not hold all variables with the shapes that the config asks for.
    """
    try:
        checkpoint.restore(path).expect_partial().assert_existing_objects_matched()
    except (AssertionError, ValueError) as error:
        # TensorFlow's own texts print variables by the hundred.
        is_lacking = isinstance(error, AssertionError)
        detail = "it lacks variables of the network" if is_lacking else "its variables have other shapes"
        raise UserError(
            f"Checkpoint '{path}' does not fit the config ({detail}); use the config it was trained with."
        ) from error
    except (tf.errors.OpError, IndexError, RuntimeError) as error:  # Depending on where the damage is.
        raise UserError(f"Checkpoint '{path}' is damaged or incomplete; delete it to use the one before.") from error
