"""A running average of the weights, which usually evaluates better than the last weights themselves."""

import contextlib
from collections.abc import Iterator, Mapping

import tensorflow as tf

from deeplab2_like.model import PanopticSystem


class WeightAverage:
    """An exponential moving average of all weights of a system, moving statistics included.

    Keras' own average of an optimizer leaves moving statistics out, which then do not fit the averaged weights.

    Attributes:
        variables: The averages by the weights' paths.

    Args:
        system: The system, at the start of its training; inside the scope of the strategy.
        decay: Share of the average that a step keeps; in step n it is at most (1 + n) / (10 + n), so that the first
            weights are soon forgotten.
    """

    def __init__(self, system: PanopticSystem, decay: float) -> None:
        self._weights = {weight.path: weight for weight in system.weights}
        self._decay = decay
        self.variables: Mapping[str, tf.Variable] = {
            path: tf.Variable(tf.identity(weight.value), trainable=False) for path, weight in self._weights.items()
        }
        self._strategy = tf.distribute.get_strategy()
        self._update = tf.function(self._update_all)

    def update(self, step: tf.Variable) -> None:
        """Updates the averages after a training step; `step` counts from 0, int scalar."""
        self._update(tf.cast(step, tf.float32))

    def _update_all(self, step: tf.Tensor) -> None:
        share = 1.0 - tf.minimum(self._decay, (1.0 + step) / (10.0 + step))
        for path, average in self.variables.items():
            self._strategy.extended.update(
                average,
                lambda variable, weight: variable.assign_sub(share * (variable - weight)),
                args=(self._weights[path].value,),
            )

    def copy_from_system(self) -> None:
        """Resets the averages to the system's weights."""
        for path, average in self.variables.items():
            average.assign(tf.identity(self._weights[path].value))

    def copy_to_system(self) -> None:
        """Replaces the system's weights by the averages."""
        for path, average in self.variables.items():
            self._weights[path].assign(average.read_value())

    @contextlib.contextmanager
    def in_system(self) -> Iterator[None]:
        """Replaces the system's weights by the averages while the context is open."""
        trained = {path: tf.identity(weight.value) for path, weight in self._weights.items()}
        self.copy_to_system()
        try:
            yield
        finally:
            for path, value in trained.items():
                self._weights[path].assign(value)
