"""Optimisers and the learning rate schedule of the papers."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from deeplab2_like.errors import unknown_name


class PolynomialDecayWithWarmup(keras.optimizers.schedules.LearningRateSchedule):
    """The 'poly' schedule: `peak * (1 - step / steps) ** power`, with a linear warm-up multiplied in.

    Args:
        peak: The learning rate that the decay starts from.
        steps: Step at which it is zero.
        power: Exponent of the decay.
        warmup_steps: Steps over which the factor grows from `1 / warmup_steps` to 1.
    """

    def __init__(self, *, peak: float, steps: int, power: float, warmup_steps: int) -> None:
        self.peak = peak
        self.steps = steps
        self.power = power
        self.warmup_steps = warmup_steps

    def __call__(self, step: Any) -> Any:
        """Returns the learning rate of a step, float32 scalar."""
        step = ops.cast(step, "float32")
        rate = self.peak * ops.power(ops.maximum(1.0 - step / self.steps, 0.0), self.power)
        return rate * ops.minimum((step + 1.0) / self.warmup_steps, 1.0) if self.warmup_steps else rate

    def get_config(self) -> dict[str, Any]:
        """Returns the constructor's arguments."""
        return {"peak": self.peak, "steps": self.steps, "power": self.power, "warmup_steps": self.warmup_steps}


# Each is called with the learning rate and the momentum; Adam keeps its usual constants.
OPTIMIZERS: dict[str, Callable[[Any, float], keras.optimizers.Optimizer]] = {
    "adam": lambda learning_rate, momentum: keras.optimizers.Adam(learning_rate, epsilon=1e-8),
    "sgd": lambda learning_rate, momentum: keras.optimizers.SGD(learning_rate, momentum=momentum),
}


def make_optimizer(name: str, *, learning_rate: Any, momentum: float) -> keras.optimizers.Optimizer:
    """Builds an optimiser.

    Args:
        name: A key of `OPTIMIZERS`.
        learning_rate: A number or a Keras schedule.
        momentum: Momentum of SGD, unused by Adam.

    Raises:
        UserError: If there is no such optimiser.
    """
    if name not in OPTIMIZERS:
        raise unknown_name("optimizer", name, OPTIMIZERS)
    return OPTIMIZERS[name](learning_rate, momentum)


def add_weight_decay(
    gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable], weight_decay: float
) -> list[tf.Tensor]:
    """Adds the gradient of an L2 penalty, `weight_decay * w`, except to the scales and shifts of normalisations."""
    return [
        gradient + weight_decay * variable.value if variable.name not in ("gamma", "beta") else gradient
        for gradient, variable in zip(gradients, variables, strict=True)
    ]
