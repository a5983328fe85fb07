"""One training step: gradient accumulation, averaged weights, scaled losses, what is traced."""

from collections.abc import Iterator, Mapping
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops
from one_convolution import OneConvolution, OneConvolutionConfig

from deeplab2_like.configs.schema import OptimizerConfig, ScheduleConfig, TrainerConfig
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.model import Loss
from deeplab2_like.trainer.average import WeightAverage
from deeplab2_like.trainer.optimizer import make_optimizer, make_schedule
from deeplab2_like.trainer.trainer import NonFiniteError, Trainer

INFO = scenes_info()


class WithoutNorm(OneConvolution):
    """No batch normalization and no dropout, so that a batch may be cut without changing anything."""

    def __init__(self) -> None:
        super().__init__(OneConvolutionConfig(), INFO)
        for layer in self.stages[1:3]:
            self.stages.remove(layer)


class Overflowing(WithoutNorm):
    """Its loss is a factor, which tests set, times a weight's sum."""

    def __init__(self) -> None:
        super().__init__()
        self.factor = tf.Variable(1.0, trainable=False)

    def compute_losses(self, targets: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Loss]:
        return {"semantic": Loss(ops.sum(outputs["logits"]) * self.factor.read_value(), ops.ones(()))}


def batch_of(system: OneConvolution, images: int, seed: int = 0) -> dict[str, Any]:
    generator = np.random.default_rng(seed)
    labels = generator.integers(0, 5, (images, 8, 8)).astype(np.int32) * 1000
    targets = [system.make_targets(tf.constant(label)) for label in labels]
    return {
        "image": tf.constant(generator.integers(0, 256, (images, 8, 8, 3)).astype(np.uint8)),
        "targets": {name: tf.stack([target[name] for target in targets]) for name in targets[0]},
    }


def part_of(batch: dict[str, Any], first: int, last: int) -> dict[str, Any]:
    return tf.nest.map_structure(lambda value: value[first:last], batch)


def trainer_of(
    system: OneConvolution,
    batches: list[Any],
    *,
    optimizer: str = "sgd",
    scale_loss: bool = False,
    clip_norm: float | None = 1.0,
    clip_value: float | None = None,
    accumulate_steps: int = 1,
    batch_size: int = 1,
    **options: Any,
) -> Trainer:
    """A trainer over the batches, again and again."""
    built = make_optimizer(
        OptimizerConfig(name=optimizer),
        learning_rate=0.1,
        variables=system.trainable_variables,
        scale_loss=scale_loss,
    )

    def forever() -> Iterator[Any]:
        while True:
            yield from batches

    config = TrainerConfig(
        steps=1,
        batch_size=batch_size,
        learning_rate=0.1,
        accumulate_steps=accumulate_steps,
        optimizer=OptimizerConfig(weight_decay=0.01, clip_norm=clip_norm, clip_value=clip_value),
    )
    trainer = Trainer(None, config, system=system, optimizer=built, strategy=tf.distribute.get_strategy(), **options)
    trainer._train_iter = forever()
    return trainer


def fresh(kind: type[OneConvolution] = WithoutNorm, **options: Any) -> OneConvolution:
    keras.utils.set_random_seed(7)
    return kind(**options).create_variables()


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_accumulated_batches_equal_one_large_batch(optimizer: str) -> None:
    # All labels are valid, so that the losses of all batches are divided by the same number of pixels.
    large = batch_of(fresh(), 6)
    small = [part_of(large, 2 * part, 2 * part + 2) for part in range(3)]
    weights, reports = [], []
    for batches, accumulate_steps in (([large], 1), (small, 3)):
        system = fresh()
        trainer = trainer_of(system, batches, optimizer=optimizer, accumulate_steps=accumulate_steps)
        reports.append(trainer.train(tf.constant(3)))
        weights.append([variable.numpy() for variable in system.trainable_variables])
        assert int(trainer._optimizer.iterations) == 3
    start = [variable.numpy() for variable in fresh().trainable_variables]
    for one, three, before in zip(*weights, start, strict=True):
        np.testing.assert_allclose(three, one, atol=1e-5)
        assert np.abs(one - before).max() > 1e-3
    assert reports[0]["loss"] == pytest.approx(reports[1]["loss"], rel=1e-5)
    assert reports[0]["gradient_norm"] == pytest.approx(reports[1]["gradient_norm"], rel=1e-4)


def test_accumulated_batches_count_alike() -> None:
    """What is stated of losses whose normalizer differs: each batch counts as much as any other."""
    large = batch_of(fresh(), 2)
    weight = large["targets"]["weight"].numpy()
    weight[1, 2:] = 0  # The second image has a quarter of the pixels of the first.
    large["targets"]["weight"] = tf.constant(weight)
    halves = [part_of(large, 0, 1), part_of(large, 1, 2)]
    losses = [trainer_of(fresh(), [half]).train(tf.constant(1))["loss"] for half in halves]
    found = trainer_of(fresh(), halves, accumulate_steps=2).train(tf.constant(1))["loss"]
    assert found == pytest.approx(sum(losses) / 2, rel=1e-5)
    whole = trainer_of(fresh(), [large]).train(tf.constant(1))["loss"]
    assert whole == pytest.approx((4 * losses[0] + losses[1]) / 5, rel=1e-5)
    assert abs(whole - found) > 1e-4


@pytest.mark.parametrize(("accumulate_steps", "traces"), [(1, 1), (2, 2)])
def test_nothing_is_traced_again(accumulate_steps: int, traces: int) -> None:
    system = fresh()
    batches = [batch_of(system, 2, seed) for seed in range(3)]
    average = WeightAverage(system, 0.9)
    trainer = trainer_of(system, batches, accumulate_steps=accumulate_steps, average=average)
    for _ in range(3):
        trainer.train(tf.constant(2))
        assert trainer.traces == traces
    assert average._update.experimental_get_tracing_count() == 1


def test_average_of_weights() -> None:
    system = fresh(OneConvolution, dataset_info=INFO, channels=4)
    moving_mean = system.stages[1].moving_mean
    average = WeightAverage(system, 0.5)
    trainer = trainer_of(system, [batch_of(system, 2)], average=average)
    expected = {weight.path: weight.numpy() for weight in system.weights}
    # At most (1 + n) / (10 + n): 1/10, 2/11, ..., and from step 8 on a half.
    for step in range(10):
        trainer.train(tf.constant(1))
        decay = min(0.5, (1 + step) / (10 + step))
        for weight in system.weights:
            expected[weight.path] = decay * expected[weight.path] + (1 - decay) * weight.numpy()
    for weight in system.weights:
        np.testing.assert_allclose(average.variables[weight.path], expected[weight.path], rtol=1e-4, atol=1e-6)
    trained = {weight.path: weight.numpy() for weight in system.weights}
    assert np.abs(trained[moving_mean.path] - expected[moving_mean.path]).max() > 1e-6
    with average.in_system():
        np.testing.assert_array_equal(moving_mean, average.variables[moving_mean.path])
    for weight in system.weights:
        np.testing.assert_array_equal(weight, trained[weight.path])
    average.copy_to_system()
    np.testing.assert_array_equal(moving_mean, average.variables[moving_mean.path])


def test_a_scaled_loss_takes_the_same_steps() -> None:
    batch = batch_of(fresh(), 2)
    weights = []
    for scale_loss in (False, True):
        system = fresh()
        report = trainer_of(system, [batch], scale_loss=scale_loss).train(tf.constant(3))
        weights.append([variable.numpy() for variable in system.trainable_variables])
    assert report["loss_scale"] == 2**15
    assert report["skipped_steps"] == 0
    for plain, scaled in zip(*weights, strict=True):
        np.testing.assert_allclose(scaled, plain, atol=1e-6)


@pytest.mark.parametrize("accumulate_steps", [1, 2])
def test_a_step_that_overflows_is_left_out(accumulate_steps: int) -> None:
    system = fresh(Overflowing)
    trainer = trainer_of(
        system,
        [batch_of(system, 1)],
        scale_loss=True,
        accumulate_steps=accumulate_steps,
        clip_norm=None,
        clip_value=0.1,
    )
    trainer.train(tf.constant(1))
    before = [variable.numpy() for variable in system.trainable_variables]
    # Finite by itself, though not times 2^15.
    system.factor.assign(1e33)
    report = trainer.train(tf.constant(2))
    assert report["skipped_steps"] == 2
    assert np.isfinite(report["gradient_norm"])
    for variable, value in zip(system.trainable_variables, before, strict=True):
        np.testing.assert_array_equal(variable, value)
    assert int(trainer._step) == 3
    assert int(trainer._optimizer.iterations) == 1
    system.factor.assign(1.0)
    report = trainer.train(tf.constant(1))
    # Halved by each overflow; and nothing of them is left in the sums.
    assert report["loss_scale"] == 2**13
    assert report["skipped_steps"] == 0
    moved = [
        np.abs(variable.numpy() - value).max()
        for variable, value in zip(system.trainable_variables, before, strict=True)
    ]
    assert 0 < max(moved) < 0.1


def test_a_loss_that_is_not_finite_stops_also_when_scaled() -> None:
    system = fresh(Overflowing)
    trainer = trainer_of(system, [batch_of(system, 1)], scale_loss=True)
    trainer.train(tf.constant(2))
    system.factor.assign(np.inf)
    with pytest.raises(NonFiniteError, match="semantic is not finite in step 3") as error:
        trainer.train(tf.constant(2))
    assert (error.value.value, error.value.step) == ("semantic", 3)


def test_a_gradient_that_overflows_without_a_scale_stops() -> None:
    system = fresh(Overflowing)
    trainer = trainer_of(system, [batch_of(system, 1)], scale_loss=True)
    trainer._optimizer.dynamic_scale.assign(1.0)
    system.factor.assign(1e38)
    with pytest.raises(NonFiniteError, match=r"(gradient_norm|semantic|loss) is not finite in step 1"):
        trainer.train(tf.constant(1))


def test_speed_is_reported_after_the_first_step() -> None:
    system = fresh()
    trainer = trainer_of(system, [batch_of(system, 2)], batch_size=2)
    assert "images_per_second" not in trainer.train(tf.constant(1))
    report = trainer.train(tf.constant(3))
    assert report["images_per_second"] > 0
    assert 0 <= report["waiting_for_data"] < 1


def test_reports_cover_all_steps_since_the_last_one() -> None:
    system = fresh()
    batches = [batch_of(system, 2, seed) for seed in range(5)]
    every_step = trainer_of(fresh(), batches)
    single = [every_step.train(tf.constant(1)) for _ in range(5)]
    # Loops of 2, 1, and 2 steps; only those that end at a multiple of 3 or of 5 report.
    trainer = trainer_of(system, batches, is_report_due=lambda step: step % 3 == 0 or step % 5 == 0)
    reports = [trainer.train(tf.constant(steps)) for steps in (2, 1, 2)]
    assert not reports[0]
    for report, steps in ((reports[1], single[:3]), (reports[2], single[3:])):
        for name in ("semantic", "loss", "gradient_norm"):
            assert report[name] == pytest.approx(np.mean([step[name] for step in steps]), rel=1e-5)


@pytest.mark.parametrize("scale_loss", [False, True])
def test_the_learning_rate_is_that_of_the_step_done(scale_loss: bool) -> None:
    system = fresh()
    schedule = make_schedule(ScheduleConfig(power=1.0), peak=0.1, steps=4)
    optimizer = make_optimizer(
        OptimizerConfig(name="sgd"),
        learning_rate=schedule,
        variables=system.trainable_variables,
        scale_loss=scale_loss,
    )
    trainer = Trainer(
        None,
        TrainerConfig(steps=4, batch_size=1, learning_rate=0.1),
        system=system,
        optimizer=optimizer,
        strategy=tf.distribute.get_strategy(),
    )
    trainer._train_iter = iter([batch_of(system, 1)] * 4)
    # It falls from 0.1 by a quarter per step; the last step still has one.
    rates = [trainer.train(tf.constant(steps))["learning_rate"] for steps in (1, 2, 1)]
    assert rates == pytest.approx([0.1, 0.05, 0.025])


def test_the_whole_step_compiles_with_xla() -> None:
    batch = batch_of(fresh(), 2)
    weights = []
    for compiled in (False, True):
        system = fresh()
        trainer = trainer_of(system, [], optimizer="adam", clip_value=0.5)
        trainer._optimizer.multipliers = [0.5] * len(system.trainable_variables)
        step = tf.function(trainer.replica_step, jit_compile=compiled)
        report = [step(batch) for _ in range(2)][-1]
        assert set(report) == {"semantic", "loss", "gradient_norm", "learning_rate"}
        weights.append([variable.numpy() for variable in system.trainable_variables])
    for plain, compiled_weight in zip(*weights, strict=True):
        np.testing.assert_allclose(compiled_weight, plain, atol=1e-4)
