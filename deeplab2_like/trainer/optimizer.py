"""Optimizers and the learning rate schedules of the papers."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from deeplab2_like.configs.schema import OptimizerConfig, ScheduleConfig
from deeplab2_like.errors import unknown_name
from deeplab2_like.model import PanopticSystem

# Each takes the step, float32, and options of the config, and returns the factor of the peak learning rate.
SCHEDULES: dict[str, Callable[..., Any]] = {
    "constant": lambda step, **options: ops.ones_like(step),
    # To zero at the last step.
    "poly": lambda step, *, steps, power, **options: ops.power(ops.maximum(1.0 - step / steps, 0.0), power),
    "cosine": lambda step, *, steps, **options: 0.5 * (1.0 + ops.cos(math.pi * ops.minimum(step / steps, 1.0))),
    # A factor at each boundary that is reached.
    "step": lambda step, *, boundaries, decay_factor, **options: ops.power(
        decay_factor, ops.sum(ops.cast(step >= ops.array(boundaries, "float32"), "float32"))
    ),
}


class LearningRate(keras.optimizers.schedules.LearningRateSchedule):
    """A peak, times a decay, times a linear warm-up.

    Args:
        peak: The learning rate that the decay starts from.
        decay: From a step, float32 scalar, to a factor.
        warmup_steps: Steps over which the warm-up's factor grows to 1; 0 for no warm-up.
        warmup_start: Where that factor starts; in the n-th step it is
            `warmup_start + (1 - warmup_start) * n / warmup_steps`.
    """

    def __init__(
        self, *, peak: float, decay: Callable[[Any], Any], warmup_steps: int = 0, warmup_start: float = 0.0
    ) -> None:
        self.peak = peak
        self.decay = decay
        self.warmup_steps = warmup_steps
        self.warmup_start = warmup_start

    def __call__(self, step: Any) -> Any:
        """Returns the learning rate of a step, counted from 0, float32 scalar."""
        step = ops.cast(step, "float32")
        rate = self.peak * self.decay(step)
        if not self.warmup_steps:
            return rate
        progress = ops.minimum((step + 1.0) / self.warmup_steps, 1.0)
        return rate * (self.warmup_start + (1.0 - self.warmup_start) * progress)


def make_schedule(config: ScheduleConfig, *, peak: float, steps: int) -> LearningRate:
    """Builds the learning rate schedule.

    Args:
        config: Its name, a key of `SCHEDULES`, and options.
        peak: The highest learning rate.
        steps: Step at which `poly` and `cosine` are zero.

    Raises:
        UserError: If there is no such schedule.
    """
    if config.name not in SCHEDULES:
        raise unknown_name("schedule", config.name, SCHEDULES)
    options = {
        "steps": steps,
        "power": config.power,
        "boundaries": config.boundaries,
        "decay_factor": config.decay_factor,
    }
    return LearningRate(
        peak=peak,
        decay=lambda step: SCHEDULES[config.name](step, **options),
        warmup_steps=config.warmup_steps,
        warmup_start=config.warmup_start,
    )


class _Multiplied:
    """Learning rate multipliers, and gradients that are already summed over replicas.

    Attributes:
        multipliers: Factor of the learning rate of each variable, in the order of `build`; None for 1 everywhere.
    """

    multipliers: Sequence[float] | None = None

    def update_step(self: Any, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Updates one variable."""
        factor = 1.0 if self.multipliers is None else self.multipliers[self._get_variable_index(variable)]
        super().update_step(gradient, variable, learning_rate * factor)  # type: ignore[misc]

    def _all_reduce_sum_gradients(self, grads_and_vars: Any) -> Any:
        # The trainer has summed them over replicas already, as clipping needs the sum.
        return list(grads_and_vars)


class _Adam(_Multiplied, keras.optimizers.Adam):
    pass


class _SGD(_Multiplied, keras.optimizers.SGD):
    pass


# Each is called with the learning rate and the momentum; Adam keeps its usual constants.
OPTIMIZERS: dict[str, Callable[[Any, float], keras.optimizers.Optimizer]] = {
    "adam": lambda learning_rate, momentum: _Adam(learning_rate, epsilon=1e-8, name="adam"),
    "sgd": lambda learning_rate, momentum: _SGD(learning_rate, momentum=momentum, name="sgd"),
}


def make_optimizer(
    config: OptimizerConfig,
    *,
    learning_rate: Any,
    variables: Sequence[keras.Variable] | None = None,
    multipliers: Sequence[float] | None = None,
    scale_loss: bool = False,
) -> keras.optimizers.Optimizer:
    """Builds an optimizer for gradients that are already summed over replicas.

    Args:
        config: Its name, a key of `OPTIMIZERS`, and its momentum; the rest is applied by the trainer.
        learning_rate: A number or a Keras schedule.
        variables: The trainable variables; None builds the optimizer later.
        multipliers: Factor of the learning rate of each variable; None for 1 everywhere.
        scale_loss: Whether to scale the loss dynamically, as float16 needs, and to skip steps that overflow.

    Raises:
        UserError: If there is no such optimizer.
    """
    if config.name not in OPTIMIZERS:
        raise unknown_name("optimizer", config.name, OPTIMIZERS)
    optimizer = OPTIMIZERS[config.name](learning_rate, config.momentum)
    optimizer.multipliers = multipliers
    if scale_loss:
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale")
    if variables is not None:
        optimizer.build(variables)
    return optimizer


def learning_rate_multipliers(system: PanopticSystem, multipliers: Mapping[str, float]) -> dict[str, float]:
    """Finds the factor of the learning rate of every weight.

    Args:
        system: The system.
        multipliers: Factor by the name of a part: layer names joined by "/", from the top. The longest matching name
            wins.

    Returns:
        Factor by the weight's path, 1 where no name matches.

    Raises:
        UserError: If a name matches no weight.
    """
    relative = {weight.path: weight.path.partition("/")[2] for weight in system.weights}
    for part in multipliers:
        if not any(_is_within(path, part) for path in relative.values()):
            known = {path.partition("/")[0] for path in relative.values()}
            raise unknown_name("part of the network in trainer.optimizer.multipliers", part, known)
    factors = {}
    for path, inner in relative.items():
        fitting = [part for part in multipliers if _is_within(inner, part)]
        factors[path] = multipliers[max(fitting, key=len)] if fitting else 1.0
    return factors


def _is_within(path: str, part: str) -> bool:
    return f"{path}/".startswith(f"{part.rstrip('/')}/")


def freeze(system: PanopticSystem, factors: Mapping[str, float]) -> None:
    """Takes the weights whose factor is 0 out of training.

    A layer whose own weights are all frozen is frozen itself, so that batch normalization uses its stored statistics
    and does not update them.

    Args:
        system: The system, changed in place.
        factors: Result of `learning_rate_multipliers`.
    """
    for layer in system._flatten_layers():
        inner = {id(weight) for child in layer._flatten_layers(include_self=False) for weight in child.weights}
        own = [weight for weight in layer.weights if id(weight) not in inner]
        frozen = [weight for weight in own if factors[weight.path] == 0]
        if own and len(frozen) == len(own) and len(own) == len(layer.weights):
            layer.trainable = False
        for weight in frozen:
            weight.trainable = False


def add_weight_decay(
    gradients: Sequence[tf.Tensor], variables: Sequence[keras.Variable], weight_decay: float
) -> list[tf.Tensor]:
    """Adds the gradient of an L2 penalty, `weight_decay * w`, except to the scales and shifts of normalizations."""
    return [
        gradient + weight_decay * variable.value if variable.name not in ("gamma", "beta") else gradient
        for gradient, variable in zip(gradients, variables, strict=True)
    ]
