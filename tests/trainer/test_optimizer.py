"""Learning rate schedule, weight decay, clipping."""

from typing import get_args

import keras
import numpy as np
import pytest
import tensorflow as tf
from one_convolution import OneConvolution

from deeplab2_like.configs.schema import OptimizerConfig, TrainerConfig
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.trainer.optimizer import OPTIMIZERS, PolynomialDecayWithWarmup, add_weight_decay, make_optimizer
from deeplab2_like.trainer.strategy import STRATEGIES, make_strategy
from deeplab2_like.trainer.train import Trainer


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 0.2 * 1 / 4),  # The first of four warm-up steps.
        (1, 0.2 * (1 - 1 / 10) * 2 / 4),
        (3, 0.2 * (1 - 3 / 10)),  # Warm-up is over.
        (5, 0.1),
        (10, 0.0),
        (12, 0.0),  # Beyond the end.
    ],
)
def test_linear_decay_with_warmup(step: int, expected: float) -> None:
    schedule = PolynomialDecayWithWarmup(peak=0.2, steps=10, power=1.0, warmup_steps=4)
    assert float(schedule(step)) == pytest.approx(expected)
    again = PolynomialDecayWithWarmup(**schedule.get_config())
    assert float(again(step)) == float(schedule(step))


def test_power_without_warmup() -> None:
    schedule = PolynomialDecayWithWarmup(peak=1.0, steps=100, power=0.5, warmup_steps=0)
    # 1 - 75 / 100 is 1 / 4, whose root is 1 / 2.
    assert [float(schedule(step)) for step in (0, 75)] == pytest.approx([1.0, 0.5])


def test_weight_decay_leaves_normalisation_alone() -> None:
    network = keras.Sequential([keras.layers.Conv2D(2, 1), keras.layers.BatchNormalization()])
    network.build((1, 2, 2, 3))
    variables = network.trainable_variables
    for variable in variables:
        variable.assign(np.full(variable.shape, 3.0))
    gradients = [tf.ones(variable.shape) for variable in variables]
    decayed = add_weight_decay(gradients, variables, 0.1)
    found = {
        variable.name: float(tf.reduce_max(gradient)) for variable, gradient in zip(variables, decayed, strict=True)
    }
    # 1 + 0.1 * 3 where it applies.
    assert found == pytest.approx({"kernel": 1.3, "bias": 1.3, "gamma": 1.0, "beta": 1.0})


def test_optimizers() -> None:
    def weight_after_two_steps(name: str) -> float:
        weight = keras.Variable(1.0)
        optimizer = make_optimizer(name, learning_rate=0.1, momentum=0.5)
        for _ in range(2):
            optimizer.apply([tf.constant(2.0)], [weight])
        return float(weight)

    # The velocity is 0.2, then 0.5 * 0.2 + 0.2.
    assert weight_after_two_steps("sgd") == pytest.approx(1 - 0.2 - 0.3)
    # Equal gradients make Adam's steps as long as the learning rate.
    assert weight_after_two_steps("adam") == pytest.approx(1 - 0.1 - 0.1, rel=1e-5)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"Unknown optimizer 'adamw'\. Did you mean 'adam'\? Known: adam, sgd"):
        make_optimizer("adamw", learning_rate=0.1, momentum=0.5)
    with pytest.raises(UserError, match=r"Unknown strategy 'mirror'\. Did you mean 'mirrored'\? Known: mirrored, one_"):
        make_strategy("mirror")


def test_the_config_allows_what_there_is() -> None:
    assert set(get_args(OptimizerConfig.model_fields["name"].annotation)) == set(OPTIMIZERS)
    assert set(get_args(TrainerConfig.model_fields["strategy"].annotation)) == set(STRATEGIES)


def step_of(*, clip_norm: float | None = None, weight_decay: float = 0.0) -> tuple[list[np.ndarray], float]:
    """How far one step of SGD, learning rate 1, moves the weights, and the norm of the gradient that it reports."""
    keras.utils.set_random_seed(4)
    system = OneConvolution(dataset_info=scenes_info(), channels=4).create_variables()
    optimizer = make_optimizer("sgd", learning_rate=1.0, momentum=0.0)
    optimizer.build(system.trainable_variables)
    trainer = Trainer(
        None,
        system=system,
        optimizer=optimizer,
        strategy=tf.distribute.get_strategy(),
        weight_decay=weight_decay,
        clip_norm=clip_norm,
        after_step=lambda: None,
    )
    label = np.repeat([[0], [3000]], 8, axis=0) + np.zeros((1, 8), np.int32)
    targets = {name: target[None] for name, target in system.make_targets(tf.constant(label, tf.int32)).items()}
    images = np.random.default_rng(0).integers(0, 256, (1, 16, 8, 3)).astype(np.uint8)
    before = [variable.numpy() for variable in system.trainable_variables]
    values = trainer.replica_step({"image": tf.constant(images), "targets": targets})
    after = [variable.numpy() for variable in system.trainable_variables]
    return [old - new for old, new in zip(before, after, strict=True)], float(values["gradient_norm"])


def test_clipping_shortens_the_whole_gradient() -> None:
    whole, norm = step_of()
    assert norm == pytest.approx(np.sqrt(sum(np.square(part).sum() for part in whole)), rel=1e-4)
    clipped, reported = step_of(clip_norm=norm / 8)
    assert reported == pytest.approx(norm, rel=1e-4)
    for long, short in zip(whole, clipped, strict=True):
        np.testing.assert_allclose(short, long / 8, atol=1e-6)
    untouched, _ = step_of(clip_norm=norm * 2)
    for long, same in zip(whole, untouched, strict=True):
        np.testing.assert_allclose(same, long, atol=1e-6)


def test_weight_decay_counts_before_clipping() -> None:
    _, norm = step_of()
    decayed, reported = step_of(weight_decay=10.0, clip_norm=0.5)
    assert reported > 2 * norm
    assert np.sqrt(sum(np.square(part).sum() for part in decayed)) == pytest.approx(0.5, rel=1e-4)
