"""Modulated deformable convolution against a plain version of it, forward and backward."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.model.config import Norm
from deeplab2_like.model.deformable import DeformableConvNorm, deformable_convolution, read_bilinear
from deeplab2_like.model.describe import describe_layer
from deeplab2_like.model.layers import ConvNorm


def plain_convolution(
    inputs: np.ndarray, offset: np.ndarray, kernel: np.ndarray, strides: int, dilation: int
) -> np.ndarray:
    """Loops over everything, in float64."""
    height, width = inputs.shape[1:3]
    size, taps = kernel.shape[0], kernel.shape[0] ** 2
    result = np.zeros((*offset.shape[:3], kernel.shape[3]))
    for b, i, j in np.ndindex(*offset.shape[:3]):
        for tap in range(taps):
            y = i * strides + (tap // size - size // 2) * dilation + offset[b, i, j, 2 * tap]
            x = j * strides + (tap % size - size // 2) * dilation + offset[b, i, j, 2 * tap + 1]
            modulation = 1 / (1 + np.exp(-offset[b, i, j, 2 * taps + tap]))
            for row in (int(np.floor(y)), int(np.floor(y)) + 1):
                for column in (int(np.floor(x)), int(np.floor(x)) + 1):
                    if 0 <= row < height and 0 <= column < width:
                        share = (1 - abs(y - row)) * (1 - abs(x - column)) * modulation
                        result[b, i, j] += share * inputs[b, row, column] @ kernel[tap // size, tap % size]
    return result


def example(strides: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A map of 5x6, offsets of some pixels that often leave it, a kernel."""
    random = np.random.default_rng(seed)
    inputs = random.standard_normal((2, 5, 6, 3))
    offset = 2.5 * random.standard_normal((2, -(-5 // strides), -(-6 // strides), 27))
    return inputs, offset, random.standard_normal((3, 3, 3, 4))


@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (1, 2), (2, 1), (2, 3)])
def test_forward_is_that_of_the_plain_version(strides: int, dilation: int) -> None:
    arrays = example(strides)
    expected = plain_convolution(*arrays, strides, dilation)
    tensors = [tf.constant(array, tf.float32) for array in arrays]
    for run in (
        deformable_convolution,
        tf.function(deformable_convolution, jit_compile=True),
        tf.function(deformable_convolution, input_signature=None, reduce_retracing=True),
    ):
        np.testing.assert_allclose(run(*tensors, strides=strides, dilation=dilation), expected, atol=1e-5)


@pytest.mark.parametrize(("strides", "dilation"), [(1, 1), (2, 2)])
def test_gradients_are_those_of_the_plain_version(strides: int, dilation: int) -> None:
    arrays = example(strides)
    tensors = [tf.constant(array, tf.float32) for array in arrays]
    weights = np.random.default_rng(5).standard_normal((*arrays[1].shape[:3], 4))

    def total(*changed: np.ndarray) -> float:
        return float((weights * plain_convolution(*changed, strides, dilation)).sum())

    with tf.GradientTape() as tape:
        tape.watch(tensors)
        loss = tf.reduce_sum(weights * deformable_convolution(*tensors, strides=strides, dilation=dilation))
    gradients = tape.gradient(loss, tensors)
    random = np.random.default_rng(6)
    step = 1e-5
    for argument, gradient in enumerate(gradients):
        for position in random.choice(arrays[argument].size, 25, replace=False):
            index = np.unravel_index(position, arrays[argument].shape)
            sides = []
            for sign in (1, -1):
                changed = [array.copy() for array in arrays]
                changed[argument][index] += sign * step
                sides.append(total(*changed))
            assert gradient.numpy()[index] == pytest.approx((sides[0] - sides[1]) / (2 * step), abs=2e-3)


def test_sizes_may_be_unknown_while_tracing() -> None:
    layer = DeformableConvNorm(4, 3, strides=2, norm=Norm(kind="batch"))
    image = np.random.default_rng(0).standard_normal((1, 7, 9, 3)).astype(np.float32)
    expected = layer(image)
    run = tf.function(layer, input_signature=[tf.TensorSpec([None, None, None, 3])])
    np.testing.assert_allclose(run(image), expected, atol=1e-6)
    assert expected.shape == (1, 4, 5, 4)


@pytest.mark.parametrize(("strides", "dilation"), [(1, 2), (2, 1)])
def test_without_offsets_it_is_a_convolution(strides: int, dilation: int) -> None:
    """Offsets and logits of modulation start at zero: half of a plain convolution."""
    image = np.random.default_rng(0).standard_normal((2, 8, 10, 3)).astype(np.float32)
    plain = ConvNorm(5, 3, strides=strides, dilation=dilation, activation=None)
    layer = DeformableConvNorm(5, 3, strides=strides, dilation=dilation, activation=None)
    expected = plain(image)
    layer.build(image.shape)
    layer.kernel.assign(2 * plain.conv.kernel)
    np.testing.assert_allclose(layer(image), expected, atol=1e-5)


def test_far_away_and_infinite_points_read_zero() -> None:
    values = tf.ones((1, 3, 3, 1))
    y = tf.constant([[1e9, -1e9, np.inf, 3.0, -1.0, 2.5]])
    read = read_bilinear(values, y, tf.ones((1, 6)), tf.ones((1, 6)))
    # The last point lies between the last row and the zeros below.
    np.testing.assert_allclose(read[0, :, 0], [0, 0, 0, 0, 0, 0.5], atol=1e-6)


def test_bfloat16_maps_are_read_at_float32_positions() -> None:
    """At column 300.25 bfloat16 positions would be whole numbers, two pixels apart."""
    keras.config.set_dtype_policy("mixed_bfloat16")
    ramp = tf.cast(tf.range(512), tf.bfloat16)[None, None, :, None] / 512
    read = read_bilinear(ramp, tf.zeros((1, 1)), tf.constant([[300.25]]), tf.ones((1, 1)))
    assert read.dtype == tf.bfloat16
    assert float(read[0, 0, 0]) * 512 == pytest.approx(300.25, abs=2)
    layer = DeformableConvNorm(4, 3)
    out = layer(ramp)
    assert out.dtype == tf.bfloat16
    assert layer.offset(layer.pad(ramp)).dtype == tf.float32
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(tf.cast(layer(ramp), tf.float32))
    gradients = tape.gradient(loss, [variable.value for variable in layer.trainable_variables])
    assert all(gradient is not None and np.isfinite(gradient).all() for gradient in gradients)


def test_multiply_adds_count_both_convolutions() -> None:
    description = describe_layer(DeformableConvNorm(4, 3), (10, 10, 5))
    assert description.multiply_adds == 100 * 9 * 5 * (27 + 4)
    assert description.parameters == 9 * 5 * (27 + 4) + 27 + 4
    assert description.uncounted == []


def test_large_maps_train_for_several_steps() -> None:
    # Where a graph takes more than 200 MB, TensorFlow rewrites sums of large terms so that they fail in a loop.
    inputs, offset, kernel = tf.ones((1, 128, 128, 256)), tf.zeros((1, 128, 128, 27)), tf.ones((3, 3, 256, 8))

    @tf.function(autograph=False)
    def step(*tensors: tf.Tensor) -> list[tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(tensors)
            total = tf.reduce_sum(deformable_convolution(*tensors, strides=1, dilation=1))
        return tape.gradient(total, tensors)

    for _ in range(2):
        to_inputs, _, to_kernel = step(inputs, offset, kernel)
    # Modulations are 1/2. Inside of the map, a pixel is read by 9 taps, each for 8 filters.
    assert to_inputs[0, 64, 64, 0] == 36
    # The tap in the middle reads all pixels.
    assert to_kernel[1, 1, 0, 0] == 128 * 128 / 2
