"""The semantic branch of Panoptic FPN: classes, layers, loss."""

from typing import Literal

import keras
import numpy as np
import pytest
import tensorflow as tf
from system_contract import INFO

from deeplab2_like.model.config import Norm
from deeplab2_like.model.resampling import upsample_bilinear
from deeplab2_like.model.semantic import SemanticBranch, SemanticClasses, semantic_loss

STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32}


def test_classes_with_other() -> None:
    # sky, road, car, person: other is 0, sky 1, road 2.
    classes = SemanticClasses.of(INFO, things="other", paint_things=False)
    assert classes.of_class == (1, 2, 0, 0)
    assert classes.class_id == (-1, 0, 1)
    assert classes.painted_class == (-1, 0, 1)


@pytest.mark.parametrize(("paint_things", "painted"), [(False, (0, 1, -1, -1)), (True, (0, 1, 2, 3))])
def test_classes_with_all_things(paint_things: bool, painted: tuple[int, ...]) -> None:
    classes = SemanticClasses.of(INFO, things="all", paint_things=paint_things)
    assert classes.of_class == classes.class_id == (0, 1, 2, 3)
    assert classes.painted_class == painted


def branch(aggregation: Literal["sum", "concatenation"] = "sum", channels: int = 32) -> SemanticBranch:
    return SemanticBranch(
        5,
        strides=STRIDES,
        channels=channels,
        aggregation=aggregation,
        norm=Norm(kind="group", epsilon=1e-5),
        name="semantic",
    )


def test_initial_kernels_are_those_of_detectron2() -> None:
    layer = branch(channels=64)
    layer({level: np.zeros((1, 64 // stride, 64 // stride, 16), np.float32) for level, stride in STRIDES.items()})
    # Normal with variance 2 / fan-out: 64 channels of 3x3 values, five classes of one.
    for convolution in layer.convolutions:
        assert convolution.conv.kernel.numpy().std() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)
    # 320 values: standard deviation 4 %.
    assert layer.predictor.kernel.numpy().std() == pytest.approx((2 / 5) ** 0.5, rel=0.15)
    kernels = [convolution.conv.kernel.numpy() for convolution in layer.convolutions]
    assert not np.array_equal(kernels[-1], kernels[-2])


def pyramid() -> dict[str, tf.Tensor]:
    random = np.random.default_rng(0)
    shapes = {level: (1, 64 // stride, 96 // stride, 8) for level, stride in STRIDES.items()}
    return {level: tf.constant(random.normal(size=shape), tf.float32) for level, shape in shapes.items()}


@pytest.mark.parametrize("aggregation", ["sum", "concatenation"])
def test_branch_does_what_figure_3_says(aggregation: Literal["sum", "concatenation"]) -> None:
    layer = branch(aggregation)
    levels = pyramid()
    found = layer(levels)
    assert found.shape == (1, 16, 24, 5)
    stages = {level: [stage.name for stage in stages] for level, stages in layer.stages.items()}
    assert stages == {
        "p2": ["p2_conv1"],
        "p3": ["p3_conv1"],
        "p4": ["p4_conv1", "p4_conv2"],
        "p5": ["p5_conv1", "p5_conv2", "p5_conv3"],
    }
    # Level by level, each stage followed by its own upsampling.
    maps = []
    for level, x in levels.items():
        for stage in layer.stages[level]:
            x = stage(x)
            x = x if level == "p2" else upsample_bilinear(x, 2)
        maps.append(x)
    joined = tf.add_n(maps) if aggregation == "sum" else tf.concat(maps, axis=-1)
    np.testing.assert_allclose(found, layer.predictor(joined), rtol=1e-4, atol=1e-4)


def test_branch_has_the_size_of_the_paper() -> None:
    """Seven 3x3 convolutions to 128 channels, four of them from 256, each with 2 * 128 of group norm, and a 1x1."""
    layer = SemanticBranch(
        54, strides=STRIDES, channels=128, aggregation="sum", norm=Norm(kind="group"), name="semantic"
    )
    layer({level: keras.KerasTensor((1, 64 // stride, 64 // stride, 256)) for level, stride in STRIDES.items()})
    expected = 4 * 9 * 256 * 128 + 3 * 9 * 128 * 128 + 7 * 2 * 128 + 128 * 54 + 54
    assert layer.count_params() == expected


def test_loss_is_a_mean_over_labeled_pixels() -> None:
    classes = SemanticClasses.of(INFO, things="other", paint_things=False)
    # One logit covers 2x2 pixels; constant logits stay constant when upsampled.
    probability = np.array([0.5, 0.3, 0.2], np.float32)
    logits = tf.constant(np.log(probability) * np.ones((1, 1, 1, 1), np.float32))
    # sky, car, person, void: the classes 1, 0, 0 and none.
    loss = semantic_loss(tf.constant([[[0, 2], [3, 255]]]), logits, classes=classes, stride=2)
    assert float(loss.total) == pytest.approx(-np.log(0.3) - 2 * np.log(0.5), rel=1e-5)
    assert float(loss.normalizer) == 3


def test_loss_leaves_padding_out() -> None:
    classes = SemanticClasses.of(INFO, things="all", paint_things=False)
    logits = tf.zeros((1, 4, 4, 4))
    loss = semantic_loss(tf.zeros((1, 5, 7), tf.int32), logits, classes=classes, stride=2)
    assert float(loss.normalizer) == 35
    assert float(loss.total) == pytest.approx(35 * np.log(4), rel=1e-5)
