"""One training step for any system and any `tf.distribute` strategy, and the report of a loop of steps."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import keras
import numpy as np
import orbit
import tensorflow as tf

from deeplab2_like.configs.schema import TrainerConfig
from deeplab2_like.model import PanopticSystem
from deeplab2_like.trainer.average import WeightAverage
from deeplab2_like.trainer.optimizer import add_weight_decay


class NonFiniteError(Exception):
    """A loss or a gradient is not finite.

    Attributes:
        value: Name of the value: that of a loss term, `loss` for their sum, or `gradient_norm`.
        step: The training step, counted from 1.
    """

    def __init__(self, value: str, step: int) -> None:
        super().__init__(f"{value} is not finite in step {step}")
        self.value = value
        self.step = step


class Trainer(orbit.StandardTrainer):
    """One optimizer step for Orbit's loop.

    Args:
        dataset: Distributed batches of `pipeline.make_train_dataset`, of images and targets.
        config: Gradient clipping, weight decay, gradient accumulation, and the batch size, to report the speed. Each
            batch divides its losses by its own normalizers, so accumulation equals one large batch if these are equal.
        system: The system to train.
        optimizer: Its optimizer from `make_optimizer`, built.
        strategy: The distribution strategy of both.
        average: Moving average of the weights to update after each step, or None.
        step: Number of steps done, skipped ones included; int64 scalar.
        after_step: Called after every step.
        is_report_due: From a step, counted from 1, to whether a loop that ends there reports; by default always.
    """

    def __init__(
        self,
        dataset: Any,
        config: TrainerConfig,
        *,
        system: PanopticSystem,
        optimizer: keras.optimizers.Optimizer,
        strategy: tf.distribute.Strategy,
        average: WeightAverage | None = None,
        step: tf.Variable | None = None,
        after_step: Callable[[], None] = lambda: None,
        is_report_due: Callable[[int], bool] = lambda step: True,
    ) -> None:
        super().__init__(dataset, orbit.StandardTrainerOptions(use_tf_while_loop=False, use_tf_function=False))
        self._system = system
        self._optimizer = optimizer
        self._strategy = strategy
        self._weight_decay = config.optimizer.weight_decay
        self._clip_norm = config.optimizer.clip_norm
        self._clip_value = config.optimizer.clip_value
        self._accumulate_steps = config.accumulate_steps
        self._average = average
        self._step = make_step_counter() if step is None else step
        self._images_per_step = config.batch_size * config.accumulate_steps
        self._after_step = after_step
        self._is_report_due = is_report_due
        self._compiled_step = tf.function(self._distributed_step)
        self._scales_loss = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
        self._sums: list[tf.Variable] = []
        if self._accumulate_steps > 1:
            with strategy.scope():
                self._sums = [self._make_sum(variable) for variable in system.trainable_variables]
        # Values of each batch of each step since the last check, and of each step since the last report.
        self._values: list[list[dict[str, tf.Tensor]]] = []
        self._unreported: list[dict[str, float]] = []
        self._clock = _Clock()

    @property
    def traces(self) -> int:
        """How often the step was traced: once, or twice if gradients are accumulated, and never again."""
        return int(self._compiled_step.experimental_get_tracing_count())

    def train_loop_begin(self) -> None:
        """Starts the clock."""
        self._clock.start()

    def train_step(self, iterator: Iterator[Any]) -> None:
        """Takes the next batch, or batches, and updates the variables."""
        values = []
        for batch_number in range(self._accumulate_steps):
            with self._clock.waiting():
                batch = next(iterator)
            values.append(self._compiled_step(batch, is_last=batch_number == self._accumulate_steps - 1))
        if self._average is not None:
            self._average.update(self._step)
        self._step.assign_add(1)
        self._values.append(values)
        self._clock.count(lambda: [float(value) for value in values[-1].values()])
        self._after_step()

    def train_loop_end(self) -> dict[str, float]:
        """Returns the values to log of all steps since the last report, or nothing if no report is due.

        Values are means, except for the learning rate of the last step and the number of skipped steps.

        Raises:
            NonFiniteError: See `check_values`.
        """
        self.check_values()
        self._clock.stop()
        if not self._unreported or not self._is_report_due(int(self._step.numpy())):
            return {}
        steps, self._unreported = self._unreported, []
        means = {name: _mean_of_finite([step[name] for step in steps]) for name in steps[0]}
        skipped = sum(not np.isfinite(step["gradient_norm"]) for step in steps)
        return {
            **means,
            **({"skipped_steps": float(skipped)} if self._scales_loss else {}),
            "learning_rate": steps[-1]["learning_rate"],
            **self._clock.report(self._images_per_step),
        }

    def check_values(self) -> None:
        """Checks the steps since the last check; must be called before anything is saved.

        Raises:
            NonFiniteError: If a loss or the gradient of any of them is not finite. With a scaled loss, a gradient that
                overflows only skips its step.
        """
        steps = [
            {
                name: float(np.mean([float(values[name]) for values in batches if name in values]))
                for name in batches[-1]
            }
            for batches in self._values
        ]
        self._values = []
        # The earliest step is the cause: its update spoils the weights, and so all terms of later steps.
        for position, step in enumerate(steps):
            for name, value in step.items():
                overflows = name == "gradient_norm" and step.get("loss_scale", 1.0) > 1.0
                if not np.isfinite(value) and not overflows:
                    raise NonFiniteError(name, int(self._step.numpy()) - len(steps) + position + 1)
        self._unreported += steps

    def _distributed_step(self, batch: Mapping[str, Any], is_last: bool) -> dict[str, tf.Tensor]:
        per_replica = self._strategy.run(self.replica_step, args=(batch,), kwargs={"is_last": is_last})
        return {name: self._strategy.reduce("SUM", value, axis=None) for name, value in per_replica.items()}

    def replica_step(self, batch: Mapping[str, Any], is_last: bool = True) -> dict[str, tf.Tensor]:
        """One batch on this replica.

        Args:
            batch: This replica's share of the batch.
            is_last: Whether it is the last one of an optimizer step.

        Returns:
            This replica's share of each loss, of their sum and, for the last batch, of the gradient norm and of the
            learning rate; the sum over replicas gives the value.
        """
        gradients, shares = self._gradients(batch)
        if self._accumulate_steps > 1:
            gradients = [gradient / self._accumulate_steps for gradient in gradients]
            if not is_last:
                for total, gradient in zip(self._sums, gradients, strict=True):
                    total.assign_add(gradient)
                return shares
            gradients = [gradient + total for total, gradient in zip(self._sums, gradients, strict=True)]
            for total in self._sums:
                total.assign(tf.zeros_like(total))
        return {**shares, **self._apply(gradients)}

    def _gradients(self, batch: Mapping[str, Any]) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
        """Returns this replica's share of the gradients, and of each loss and their sum."""
        context = tf.distribute.get_replica_context()
        with tf.GradientTape() as tape:
            outputs = self._system(batch["image"], targets=batch["targets"], training=True)
            losses = self._system.compute_losses(batch["targets"], outputs)
            # The normalizer of all replicas, so that the sum over replicas is the loss of the whole batch.
            counts = context.all_reduce("SUM", [loss.normalizer for loss in losses.values()])
            shares = {
                name: self._system.loss_weights[name] * tf.math.divide_no_nan(loss.total, count)
                for (name, loss), count in zip(losses.items(), counts, strict=True)
            }
            total = tf.add_n(list(shares.values()))
            scaled = total * self._loss_scale()
        gradients = tape.gradient(scaled, [variable.value for variable in self._system.trainable_variables])
        if self._scales_loss:
            gradients = [gradient / self._loss_scale() for gradient in gradients]
        # Terms first, so that an error names a term rather than the sum.
        return gradients, {**shares, "loss": total}

    def _apply(self, gradients: Sequence[tf.Tensor]) -> dict[str, tf.Tensor]:
        """Sums gradients over replicas and updates the variables; returns the values to report."""
        context = tf.distribute.get_replica_context()
        variables = self._system.trainable_variables
        replicas = self._strategy.num_replicas_in_sync
        gradients = context.all_reduce("SUM", gradients)
        if self._weight_decay:
            gradients = add_weight_decay(gradients, variables, self._weight_decay)
        norm = tf.linalg.global_norm(gradients)
        # Read now, as the optimizer counts this step when it applies the gradients.
        rate = tf.cast(tf.convert_to_tensor(self._optimizer.learning_rate), tf.float32)
        report = {"gradient_norm": norm / replicas, "learning_rate": rate / replicas}
        if self._clip_norm is not None:
            gradients, _ = tf.clip_by_global_norm(gradients, self._clip_norm, use_norm=norm)
        if self._clip_value is not None:
            gradients = [tf.clip_by_value(gradient, -self._clip_value, self._clip_value) for gradient in gradients]
        if self._scales_loss:
            scale = self._loss_scale()
            report["loss_scale"] = scale / replicas
            # The optimizer divides by the scale, and must see an overflow that clipping may have hidden.
            scale = tf.where(tf.math.is_finite(norm), scale, np.nan)
            gradients = [gradient * scale for gradient in gradients]
        self._optimizer.apply_gradients(zip(gradients, variables, strict=True))
        return report

    def _loss_scale(self) -> Any:
        return tf.convert_to_tensor(self._optimizer.dynamic_scale.value) if self._scales_loss else 1.0

    def _make_sum(self, variable: keras.Variable) -> tf.Variable:
        # Each replica adds up its own gradients; only the sum is exchanged.
        return tf.Variable(
            tf.zeros(variable.shape, variable.dtype),
            trainable=False,
            synchronization=tf.VariableSynchronization.ON_READ,
            aggregation=tf.VariableAggregation.SUM,
        )


def make_step_counter() -> tf.Variable:
    """Makes the counter of the training steps done, int64 scalar."""
    with tf.device("CPU:0"):
        return tf.Variable(0, dtype=tf.int64, trainable=False, name="step")


def _mean_of_finite(values: Sequence[float]) -> float:
    finite = [value for value in values if np.isfinite(value)]
    return float(np.mean(finite)) if finite else 0.0


class _Clock:
    """Measures speed, and the share of time spent waiting for data, of the loops since the last report.

    Devices may compute while the program waits, so the share is an upper bound. The first step is left out, as it
    compiles.
    """

    def __init__(self) -> None:
        self._is_first = True
        self._forget()

    def _forget(self) -> None:
        self._seconds = self._waited = 0.0
        self._steps = 0

    def start(self) -> None:
        """Begins a loop."""
        self._started = time.perf_counter()

    def stop(self) -> None:
        """Ends a loop; the time between two loops, such as for saving, does not count."""
        self._seconds += time.perf_counter() - self._started

    def waiting(self) -> "_Clock":
        """Returns a context whose time counts as waiting time."""
        return self

    def __enter__(self) -> None:
        self._wait_started = time.perf_counter()

    def __exit__(self, *details: object) -> None:
        self._waited += time.perf_counter() - self._wait_started

    def count(self, wait_for_devices: Callable[[], Any]) -> None:
        """Ends a step."""
        self._steps += 1
        if self._is_first:
            wait_for_devices()
            self._is_first = False
            self._forget()
            self.start()

    def report(self, images_per_step: int) -> dict[str, float]:
        """Returns the speed since the last report; empty if only the first step was done."""
        seconds, waited, steps = self._seconds, self._waited, self._steps
        self._forget()
        if not steps or not images_per_step:
            return {}
        return {"images_per_second": steps * images_per_step / seconds, "waiting_for_data": waited / seconds}
