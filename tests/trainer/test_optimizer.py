"""Learning rate schedule, weight decay, clipping."""

from typing import Any, get_args

import keras
import numpy as np
import pytest
import tensorflow as tf
from one_convolution import OneConvolution, OneConvolutionConfig

from deeplab2_like.configs.schema import OptimizerConfig, ScheduleConfig, TrainerConfig
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.trainer.optimizer import (
    OPTIMIZERS,
    SCHEDULES,
    add_weight_decay,
    freeze,
    learning_rate_multipliers,
    make_optimizer,
    make_schedule,
)
from deeplab2_like.trainer.strategy import STRATEGIES, make_strategy
from deeplab2_like.trainer.trainer import Trainer


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
    schedule = make_schedule(ScheduleConfig(power=1.0, warmup_steps=4), peak=0.2, steps=10)
    assert float(schedule(step)) == pytest.approx(expected)


def test_schedules() -> None:
    def rates(name: str, *at: int, **options: Any) -> list[float]:
        schedule = make_schedule(ScheduleConfig(name=name, **options), peak=2.0, steps=100)
        return [float(schedule(step)) for step in at]

    # 1 - 75 / 100 is 1 / 4, whose root is 1 / 2.
    assert rates("poly", 0, 75, power=0.5) == pytest.approx([2.0, 1.0])
    assert rates("constant", 0, 99, 500) == [2.0, 2.0, 2.0]
    # Half a cosine: 1, then cos(60 degrees), cos(90 degrees), cos(180 degrees), each moved from -1..1 to 0..2.
    assert rates("cosine", 0, 33, 50, 100, 150) == pytest.approx([2.0, 1.0 + np.cos(0.33 * np.pi), 1.0, 0.0, 0.0])
    # Panoptic FPN: to a tenth at each of two steps.
    expected = [2.0, 2.0, 0.2, 0.2, 0.02, 0.02]
    assert rates("step", 0, 59, 60, 79, 80, 99, boundaries=(60, 80)) == pytest.approx(expected)
    # The warm-up goes from a quarter to one, in thirds of the rest: 1/4 + 3/4 * n/3.
    assert rates("constant", 0, 1, 2, 3, warmup_steps=3, warmup_start=0.25) == pytest.approx([1.0, 1.5, 2.0, 2.0])


def test_a_schedule_computes_in_a_graph() -> None:
    config = ScheduleConfig(name="step", boundaries=(3,), decay_factor=0.5, warmup_steps=2)
    schedule = make_schedule(config, peak=1.0, steps=100)
    rate = tf.function(schedule, jit_compile=True)
    assert [float(rate(tf.constant(step, tf.int64))) for step in (0, 2, 3)] == [0.5, 1.0, 0.5]


def test_boundaries_belong_to_steps() -> None:
    with pytest.raises(ValueError, match="`boundaries` belong to the schedule `step`, which needs at least one"):
        ScheduleConfig(name="step")
    with pytest.raises(ValueError, match="`boundaries` belong to the schedule `step`"):
        ScheduleConfig(name="poly", boundaries=(4,))
    with pytest.raises(ValueError, match="must grow from one step to the next"):
        ScheduleConfig(name="step", boundaries=(4, 4))
    assert ScheduleConfig(name="step", boundaries=(4, 6)).boundaries == (4, 6)


def test_weight_decay_leaves_normalization_alone() -> None:
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
        optimizer = make_optimizer(OptimizerConfig(name=name, momentum=0.5), learning_rate=0.1)
        for _ in range(2):
            optimizer.apply([tf.constant(2.0)], [weight])
        return float(weight)

    # The velocity is 0.2, then 0.5 * 0.2 + 0.2.
    assert weight_after_two_steps("sgd") == pytest.approx(1 - 0.2 - 0.3)
    # Equal gradients make Adam's steps as long as the learning rate.
    assert weight_after_two_steps("adam") == pytest.approx(1 - 0.1 - 0.1, rel=1e-5)


def test_unknown_names_are_refused() -> None:
    with pytest.raises(UserError, match=r"Unknown optimizer 'adamw'\. Did you mean 'adam'\? Known: adam, sgd"):
        make_optimizer(OptimizerConfig.model_construct(name="adamw"), learning_rate=0.1)
    with pytest.raises(UserError, match=r"Unknown schedule 'cosin'\. Did you mean 'cosine'\? Known: constant, cosine"):
        make_schedule(ScheduleConfig.model_construct(name="cosin"), peak=1.0, steps=10)
    with pytest.raises(
        UserError, match=r"Unknown strategy 'mirror'\. Did you mean 'mirrored'\? Known: mirrored, multi"
    ):
        make_strategy("mirror")


def test_the_config_allows_what_there_is() -> None:
    assert set(get_args(OptimizerConfig.model_fields["name"].annotation)) == set(OPTIMIZERS)
    assert set(get_args(ScheduleConfig.model_fields["name"].annotation)) == set(SCHEDULES)
    assert set(get_args(TrainerConfig.model_fields["strategy"].annotation)) == set(STRATEGIES)


def step_of(
    *, clip_norm: float | None = None, clip_value: float | None = None, weight_decay: float = 0.0
) -> tuple[list[np.ndarray], float]:
    """How far one step of SGD, learning rate 1, moves the weights, and the norm of the gradient that it reports."""
    keras.utils.set_random_seed(4)
    system = OneConvolution(OneConvolutionConfig(), scenes_info()).create_variables()
    optimizer = make_optimizer(OptimizerConfig(name="sgd", momentum=0.0), learning_rate=1.0)
    optimizer.build(system.trainable_variables)
    settings = OptimizerConfig(weight_decay=weight_decay, clip_norm=clip_norm, clip_value=clip_value)
    trainer = Trainer(
        None,
        TrainerConfig(steps=1, batch_size=1, learning_rate=1.0, optimizer=settings),
        system=system,
        optimizer=optimizer,
        strategy=tf.distribute.get_strategy(),
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


def test_clipping_by_value_cuts_each_element() -> None:
    whole, _ = step_of()
    limit = float(np.median(np.abs(whole[0])))
    clipped, _ = step_of(clip_value=limit)
    assert np.abs(whole[0]).max() > 2 * limit
    for long, short in zip(whole, clipped, strict=True):
        np.testing.assert_allclose(short, np.clip(long, -limit, limit), atol=1e-6)


def one_convolution() -> OneConvolution:
    keras.utils.set_random_seed(4)
    return OneConvolution(OneConvolutionConfig(), scenes_info()).create_variables()


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_multipliers_scale_the_steps_of_a_part(name: str) -> None:
    def moves(multipliers: dict[str, float]) -> dict[str, np.ndarray]:
        system = one_convolution()
        factors = learning_rate_multipliers(system, multipliers)
        variables = system.trainable_variables
        optimizer = make_optimizer(
            OptimizerConfig(name=name),
            learning_rate=0.01,
            variables=variables,
            multipliers=[factors[variable.path] for variable in variables],
        )
        before = {variable.path.partition("/")[2]: variable.numpy() for variable in variables}
        for _ in range(2):
            optimizer.apply_gradients([(tf.ones(variable.shape), variable) for variable in variables])
        return {path: before[path] - variable.numpy() for path, variable in zip(before, variables, strict=True)}

    plain = moves({})
    # The longer name counts; "conv" is no part, though a name begins so.
    scaled = moves({"convolution": 0.5, "convolution/bias": 3.0})
    for path, factor in (("convolution/kernel", 0.5), ("convolution/bias", 3.0), ("logits/kernel", 1.0)):
        np.testing.assert_allclose(scaled[path], factor * plain[path], rtol=1e-3)
        assert np.abs(plain[path]).min() > 1e-3
    message = (
        r"Unknown part of the network in trainer.optimizer.multipliers 'conv'\. .*Known: convolution, logits, norm\."
    )
    with pytest.raises(UserError, match=message):
        moves({"conv": 1.0})


def test_a_frozen_part_keeps_weights_and_statistics() -> None:
    system = one_convolution()
    freeze(system, learning_rate_multipliers(system, {"norm": 0.0, "logits/bias": 0.0}))
    assert [variable.path.partition("/")[2] for variable in system.trainable_variables] == [
        "convolution/kernel",
        "convolution/bias",
        "logits/kernel",
    ]
    norm = system.stages[1]
    norm.moving_mean.assign([1.0, 2.0, 3.0, 4.0])
    features = np.random.default_rng(0).normal(size=(1, 5, 5, 4)).astype(np.float32)
    expected = (features - [1.0, 2.0, 3.0, 4.0]) / np.sqrt(1 + norm.epsilon)
    np.testing.assert_allclose(norm(features, training=True), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(norm.moving_mean, [1.0, 2.0, 3.0, 4.0])
