"""One training: its config, records, variables and checkpoint, built and restored."""

import dataclasses
import functools
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import keras
import tensorflow as tf

from deeplab2_like.checkpoint import load_fitting_weights, make_checkpoint, restore
from deeplab2_like.checkpoint_files import find_initial_checkpoint, list_checkpoints, newest_whole_checkpoint
from deeplab2_like.configs import Config, load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import count_examples, list_shards
from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.model.base import dtype_policy
from deeplab2_like.model_folder import CONFIG_FILE, check_model_folder
from deeplab2_like.trainer.average import WeightAverage
from deeplab2_like.trainer.optimizer import freeze, learning_rate_multipliers, make_optimizer, make_schedule
from deeplab2_like.trainer.strategy import is_chief
from deeplab2_like.trainer.trainer import make_step_counter
from deeplab2_like.weights.backbones import load_backbone_weights


@dataclasses.dataclass(frozen=True)
class Run:
    """A training and everything that it changes.

    Attributes:
        config: Its config.
        model_dir: Its model folder.
        strategy: Its distribution strategy.
        dataset_info: The facts of its data set.
        files: Record files to train on.
        validation_files: Record files to evaluate on; may be empty.
        system: The system.
        optimizer: The optimizer, built.
        average: Moving average of the weights, if the config asks for one.
        step: Number of training steps done, int64 scalar.
        checkpoint: Tracks all variables.
    """

    config: Config
    model_dir: Path
    strategy: tf.distribute.Strategy
    dataset_info: DatasetInfo
    files: Sequence[str]
    validation_files: Sequence[str]
    system: PanopticSystem
    optimizer: keras.optimizers.Optimizer
    average: WeightAverage | None
    step: tf.Variable
    checkpoint: tf.train.Checkpoint

    @property
    def is_chief(self) -> bool:
        """Whether this process writes the files that only one worker writes."""
        return is_chief(self.strategy)

    @property
    def is_finished(self) -> bool:
        """Whether all steps are done."""
        return int(self.step) >= self.config.trainer.steps

    @property
    def is_evaluation_due(self) -> bool:
        """Whether the config asks for an evaluation after the current step."""
        every, step = self.config.trainer.evaluate_every, int(self.step)
        return every is not None and step > 0 and (step % every == 0 or self.is_finished)

    @property
    def are_pictures_due(self) -> bool:
        """Whether the config asks for pictures after the current step."""
        every, step = self.config.trainer.pictures_every, int(self.step)
        return every is not None and (step % every == 0 or step == self.config.trainer.log_every)

    def use_average(self) -> None:
        """Gives the system the averaged weights, if there are any."""
        if self.average is not None:
            self.average.copy_to_system()


def make_run(config: Config, model_dir: str | os.PathLike[str], strategy: tf.distribute.Strategy) -> Run:
    """Checks that config, records and model folder fit together, and builds all variables.

    Variables are built before a checkpoint is restored, as it restores only those that exist.

    Raises:
        UserError: If they do not fit together.
    """
    settings = config.trainer
    dataset_info = DatasetInfo.load(config.data.record_folder)
    files = [file for split in config.data.train_splits for file in list_shards(config.data.record_folder, split)]
    validation_files = _list_validation_files(config)
    check_model_folder(model_dir, config, dataset_info)
    devices = strategy.num_replicas_in_sync
    if settings.batch_size % devices:
        raise UserError(
            f"trainer.batch_size is {settings.batch_size}, which {devices} devices cannot share evenly; use a multiple "
            "of the number of devices."
        )
    keras.utils.set_random_seed(settings.seed)
    with strategy.scope(), dtype_policy(settings.precision):
        system = build_system(config, dataset_info)
        factors = learning_rate_multipliers(system, settings.optimizer.multipliers)
        freeze(system, factors)
        variables = system.trainable_variables
        if not variables:
            raise UserError("trainer.optimizer.multipliers freezes the whole network; leave a part to train.")
        optimizer = make_optimizer(
            settings.optimizer,
            learning_rate=make_schedule(settings.schedule, peak=settings.learning_rate, steps=settings.steps),
            variables=variables,
            multipliers=[factors[variable.path] for variable in variables],
            scale_loss=settings.precision == "mixed_float16",
        )
        average = None if settings.ema_decay is None else WeightAverage(system, settings.ema_decay)
    step = make_step_counter()
    averages = None if average is None else average.variables
    return Run(
        config=config,
        model_dir=Path(model_dir),
        strategy=strategy,
        dataset_info=dataset_info,
        files=files,
        validation_files=validation_files,
        system=system,
        optimizer=optimizer,
        average=average,
        step=step,
        checkpoint=make_checkpoint(system, optimizer, average=averages, step=step),
    )


def describe_run(run: Run) -> str:
    """Says on which devices a training runs, and how large it is."""
    settings, num_images = run.config.trainer, count_examples(run.files)
    num_devices = run.strategy.num_replicas_in_sync
    kind = tf.DeviceSpec.from_string(run.strategy.extended.worker_devices[0]).device_type
    images_per_step = settings.batch_size * settings.accumulate_steps
    epochs = settings.steps * images_per_step / max(num_images, 1)
    return (
        f"Training on {num_devices} {kind}{'s' if num_devices > 1 else ''}: {num_images} images, "
        f"{run.system.count_params():,} parameters, {settings.steps} steps of {images_per_step} images, "
        f"{epochs:.1f} epochs."
    )


def restore_or_initialize(run: Run, init_from: str | os.PathLike[str] | None) -> None:
    """Restores the newest whole checkpoint of the model folder; without one, loads the weights to start from.

    These are `init_from`, a model folder or checkpoint, as far as it fits, or a file of a backbone; without it,
    `model.backbone.weights`.

    Raises:
        UserError: If a checkpoint or the weights do not fit the config.
    """
    weights = run.system.config.backbone.weights
    with run.strategy.scope():
        if paths := list_checkpoints(run.model_dir):
            _check_changes(run.system, run.config, run.model_dir)
            restore(run.checkpoint, newest_whole_checkpoint(paths))
            if init_from is not None:
                print(f"Resuming from step {int(run.step)} of '{run.model_dir}'; '{init_from}' is not used.")
        elif init_from is not None or weights is not None:
            if init_from is None:
                load_backbone_weights(run.system, weights)
            elif Path(init_from).is_file():
                load_backbone_weights(run.system, os.fspath(init_from))
            else:
                load_fitting_weights(run.system, find_initial_checkpoint(init_from))
            if run.average is not None:
                run.average.copy_from_system()
        elif frozen := [part for part, factor in run.config.trainer.optimizer.multipliers.items() if factor == 0]:
            print(
                f"Warning: trainer.optimizer.multipliers freezes {', '.join(frozen)} with random weights; give "
                "trained ones with --init-from or `model.backbone.weights`.",
                file=sys.stderr,
            )


def _check_changes(system: PanopticSystem, config: Config, folder: Path) -> None:
    """Refuses changes of trainer keys that need variables which are missing from the checkpoints of a folder.

    Raises:
        UserError: If there is such a change.
    """
    if not (folder / CONFIG_FILE).is_file():
        return
    before, now = load_config(folder / CONFIG_FILE).trainer, config.trainer
    factors_before = learning_rate_multipliers(system, before.optimizer.multipliers)
    factors = learning_rate_multipliers(system, now.optimizer.multipliers)
    refused = {
        "optimizer.name": before.optimizer.name != now.optimizer.name,
        "optimizer.momentum": now.optimizer.name == "sgd" and not before.optimizer.momentum and now.optimizer.momentum,
        "optimizer.multipliers": any(factors[path] and not factors_before[path] for path in factors),
        "ema_decay": before.ema_decay is None and now.ema_decay is not None,
        "precision": before.precision != "mixed_float16" and now.precision == "mixed_float16",
    }
    for key, is_refused in refused.items():
        if is_refused:
            values = [functools.reduce(getattr, key.split("."), settings) for settings in (before, now)]
            raise UserError(
                f"Model folder '{folder}' holds a run with trainer.{key} {values[0]!r}, whose checkpoints lack "
                f"variables for {values[1]!r}; set that key back, or use another --model-dir with --init-from "
                f"'{folder}'."
            )


def _list_validation_files(config: Config) -> list[str]:
    """Returns the files of the validation split; none if it is missing and no evaluation needs it."""
    if config.trainer.pictures_every is None and config.trainer.evaluate_every is None:
        return []
    try:
        return list_shards(config.data.record_folder, config.data.val_split)
    except UserError as error:
        if config.trainer.evaluate_every is None:
            return []
        raise UserError(f"{error} Key trainer.evaluate_every needs it; leave that key out to do without.") from error
