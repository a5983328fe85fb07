"""The training loop: reads from top to bottom, for any system and any `tf.distribute` strategy."""

import contextlib
import io
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import keras
import numpy as np
import orbit
import tensorflow as tf

from deeplab2_like.configs import Config
from deeplab2_like.data import pipeline, tfrecord
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.progress import TrainingProgress
from deeplab2_like.trainer.checkpoint import (
    check_model_folder,
    list_checkpoints,
    make_checkpoint,
    make_checkpoint_manager,
    prepare_model_folder,
    restore,
)
from deeplab2_like.trainer.optimizer import PolynomialDecayWithWarmup, add_weight_decay, make_optimizer
from deeplab2_like.trainer.strategy import make_strategy


def train(config: Config, model_dir: str | os.PathLike[str]) -> PanopticSystem:
    """Trains the system of a config, or resumes where an earlier run in the same model folder ended.

    Args:
        config: What to train, on which records, how long.
        model_dir: Folder for checkpoints, config and TensorBoard events; made if absent.

    Returns:
        The trained system.

    Raises:
        UserError: If the records, the config and the model folder do not fit together, or a loss is not finite.
    """
    dataset_info = DatasetInfo.load(config.data.record_folder)
    files = tfrecord.list_shards(config.data.record_folder, config.data.train_split)
    check_model_folder(model_dir, config, dataset_info)
    settings = config.trainer
    strategy = make_strategy(settings.strategy)
    if settings.batch_size % strategy.num_replicas_in_sync:
        raise UserError(
            f"trainer.batch_size is {settings.batch_size}, which {strategy.num_replicas_in_sync} devices cannot share "
            "evenly; use a multiple of the number of devices."
        )

    keras.utils.set_random_seed(settings.seed)
    with strategy.scope(), _dtype_policy(settings.precision):
        system = build_system(config, dataset_info)
        schedule = PolynomialDecayWithWarmup(
            peak=settings.learning_rate,
            steps=settings.steps,
            power=settings.schedule.power,
            warmup_steps=settings.schedule.warmup_steps,
        )
        optimizer = make_optimizer(
            settings.optimizer.name, learning_rate=schedule, momentum=settings.optimizer.momentum
        )
        # Before restoring, as a checkpoint finds the optimiser's variables by their order.
        optimizer.build(system.trainable_variables)

    checkpoint = make_checkpoint(system, optimizer)
    if paths := list_checkpoints(model_dir):
        restore(checkpoint, paths[-1])
    start_step = int(optimizer.iterations.value.numpy())
    if start_step >= settings.steps:
        print(f"Model folder '{model_dir}' is already trained to step {start_step}.")
        return system

    red, green, blue = (round(value) for value in system.image_mean)
    dataset = pipeline.make_train_dataset(
        files,
        make_targets=system.make_targets,
        dataset_info=dataset_info,
        batch_size=settings.batch_size,
        crop_size=config.data.crop_size,
        scale_range=config.data.scale_range,
        flip=config.data.flip,
        dihedral=config.data.dihedral,
        color_jitter=config.data.color_jitter,
        pad_value=(red, green, blue),
        seed=settings.seed,
        start_step=start_step,
    )
    # Only now, as a start that fails must not claim the folder.
    prepare_model_folder(model_dir, config, dataset_info)
    manager = make_checkpoint_manager(
        checkpoint,
        model_dir,
        step=optimizer.iterations.value,
        every=settings.checkpoint_every,
        keep=settings.keep_checkpoints,
    )
    intervals = (settings.log_every, settings.checkpoint_every)
    progress = TrainingProgress(start_step=start_step, steps=settings.steps, batch_size=settings.batch_size)
    trainer = Trainer(
        strategy.experimental_distribute_dataset(dataset),
        system=system,
        optimizer=optimizer,
        strategy=strategy,
        weight_decay=settings.optimizer.weight_decay,
        clip_norm=settings.optimizer.clip_norm,
        after_step=progress.advance,
    )
    with progress, _quiet(), tfrecord.user_errors():
        controller = orbit.Controller(
            trainer=trainer,
            strategy=strategy,
            global_step=optimizer.iterations.value,
            # A loop ends wherever something is to be logged or saved, also if the first one starts in between.
            steps_per_loop=lambda step: min(every - int(step) % every for every in intervals),
            checkpoint_manager=manager,
            summary_dir=str(Path(model_dir) / "train"),
            summary_interval=settings.log_every,
            train_actions=[progress.report],
        )
        controller.train(settings.steps)
    return system


class Trainer(orbit.StandardTrainer):
    """One optimiser step for Orbit's loop.

    Args:
        dataset: Distributed batches of `pipeline.make_train_dataset`.
        system: The system to train.
        optimizer: Its optimiser, built.
        strategy: The distribution strategy of both.
        weight_decay: Factor of the L2 penalty.
        clip_norm: Largest global norm of the gradient, or None.
        after_step: Called after every step.
    """

    def __init__(
        self,
        dataset: Any,
        *,
        system: PanopticSystem,
        optimizer: keras.optimizers.Optimizer,
        strategy: tf.distribute.Strategy,
        weight_decay: float,
        clip_norm: float | None,
        after_step: Callable[[], None],
    ) -> None:
        super().__init__(dataset, orbit.StandardTrainerOptions(use_tf_while_loop=False, use_tf_function=False))
        self._system = system
        self._optimizer = optimizer
        self._strategy = strategy
        self._weight_decay = weight_decay
        self._clip_norm = clip_norm
        self._after_step = after_step
        self._compiled_step = tf.function(self._distributed_step)
        self._losses: list[dict[str, tf.Tensor]] = []
        self._image_ids: list[Any] = []

    def train_loop_begin(self) -> None:
        """Forgets the steps of the last loop."""
        self._losses, self._image_ids = [], []

    def train_step(self, iterator: Iterator[Any]) -> None:
        """Takes the next batch and updates the variables."""
        batch = next(iterator)
        self._image_ids.append(batch.pop("image_id"))
        self._losses.append(self._compiled_step(batch))
        self._after_step()

    def train_loop_end(self) -> dict[str, float]:
        """Returns the means over the loop's steps, for the log and TensorBoard.

        Raises:
            UserError: If a loss or the gradient of any step is not finite; nothing was saved since.
        """
        steps = [{name: float(value) for name, value in step.items()} for step in self._losses]
        # The earliest step is the cause: its update spoils the weights, and with them all terms of the steps after it.
        for position, step in enumerate(steps):
            for name, value in step.items():
                if not np.isfinite(value):
                    self._stop_on_non_finite(name, position)
        return {
            **{name: float(np.mean([step[name] for step in steps])) for name in steps[0]},
            "learning_rate": float(self._optimizer.learning_rate),
        }

    def _stop_on_non_finite(self, name: str, position: int) -> NoReturn:
        step = int(self._optimizer.iterations.value.numpy()) - len(self._losses) + position + 1
        parts = self._strategy.experimental_local_results(self._image_ids[position])
        image_ids = ", ".join(f"'{image_id.decode()}'" for part in parts for image_id in part.numpy())
        what = {"loss": "The sum of the losses", "gradient_norm": "The gradient"}.get(name, f"Loss '{name}'")
        raise UserError(
            f"{what} is not finite in step {step} on images {image_ids}; lower trainer.learning_rate, raise "
            "trainer.schedule.warmup_steps or set trainer.optimizer.clip_norm, and resume from the last checkpoint."
        )

    def _distributed_step(self, batch: dict[str, Any]) -> dict[str, tf.Tensor]:
        per_replica = self._strategy.run(self.replica_step, args=(batch,))
        return {name: self._strategy.reduce("SUM", value, axis=None) for name, value in per_replica.items()}

    def replica_step(self, batch: dict[str, Any]) -> dict[str, tf.Tensor]:
        """One step on this replica's share; returns this replica's share of each loss."""
        context = tf.distribute.get_replica_context()
        variables = self._system.trainable_variables
        with tf.GradientTape() as tape:
            outputs = self._system(batch["image"], targets=batch["targets"], training=True)
            losses = self._system.compute_losses(batch["targets"], outputs)
            # Divided by what all replicas count together, so that the sum over replicas is the loss of the whole batch.
            counts = context.all_reduce("SUM", [loss.normalizer for loss in losses.values()])
            shares = {
                name: self._system.loss_weights[name] * tf.math.divide_no_nan(loss.total, count)
                for (name, loss), count in zip(losses.items(), counts, strict=True)
            }
            total = tf.add_n(list(shares.values()))
        gradients = tape.gradient(total, [variable.value for variable in variables])
        gradients = context.all_reduce("SUM", gradients)
        if self._weight_decay:
            gradients = add_weight_decay(gradients, variables, self._weight_decay)
        norm = tf.linalg.global_norm(gradients)
        if self._clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self._clip_norm, use_norm=norm)
        # The optimiser sums over replicas what is already summed.
        replicas = self._strategy.num_replicas_in_sync
        self._optimizer.apply_gradients(
            [(gradient / replicas, variable) for gradient, variable in zip(gradients, variables, strict=True)]
        )
        # The terms come first, so that a term is named rather than the sum.
        return {**shares, "loss": total, "gradient_norm": norm / replicas}


@contextlib.contextmanager
def _dtype_policy(name: str) -> Iterator[None]:
    """Layers made inside compute in this precision; what the process makes later does not."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(name)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Orbit prints a line per loop; the progress display says the same better."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield
