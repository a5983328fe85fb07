"""Random choices of an image, whatever batch it is in."""

import keras
import numpy as np
import tensorflow as tf

from deeplab2_like.model.random_numbers import ImageDropout, image_seeds, random_uniform


def test_seeds_by_hand() -> None:
    # The first number grows with the image, the second is that of the step.
    np.testing.assert_array_equal(image_seeds(np.array([7, 2], np.uint32), 3, None), [[7, 2], [8, 2], [9, 2]])
    numbers = np.array([40, 30], np.int32)
    np.testing.assert_array_equal(image_seeds(np.array([7, 2], np.uint32), 2, numbers), [[47, 2], [37, 2]])


def test_each_image_has_the_numbers_of_its_seed() -> None:
    seeds = np.array([[3, 5], [4, 5], [-4, 2**31 - 1]], np.int32)
    found = np.array(random_uniform(seeds, (4, 5)))
    assert found.shape == (3, 4, 5)
    for seed, numbers in zip(seeds, found, strict=True):
        np.testing.assert_array_equal(numbers, random_uniform(seed, (4, 5)))


def test_dropout_depends_on_the_image_alone() -> None:
    layer = ImageDropout(0.25)
    images = tf.ones((4, 50, 50, 2))
    numbers = tf.range(10, 14)
    start = layer.seed_generator.state.numpy()
    whole = layer(images, numbers=numbers, training=True).numpy()
    # What stays is divided by 1 - 0.25. Of 20000 values a quarter is dropped: standard deviation 0.3 %.
    assert set(np.unique(whole)) == {0.0, np.float32(1 / 0.75)}
    assert abs((whole == 0).mean() - 0.25) < 0.015
    assert not np.array_equal(whole[0], whole[1])

    # Two replicas of two images, which start with the same state.
    for part in (slice(0, 2), slice(2, 4)):
        layer.seed_generator.state.assign(start)
        half = tf.function(layer, jit_compile=True)(images[part], numbers=numbers[part], training=True)
        np.testing.assert_array_equal(half, whole[part])
    # The next step drops other values of the same images.
    assert not np.array_equal(layer(images, numbers=numbers, training=True), whole)
    # Without numbers, the images of a batch differ as well.
    unnumbered = layer(images, training=True).numpy()
    assert not np.array_equal(unnumbered[0], unnumbered[1])


def test_dropout_outside_of_training_and_of_nothing() -> None:
    images = np.ones((1, 2, 2, 3), np.float32)
    np.testing.assert_array_equal(ImageDropout(0.5)(images), images)
    layer = ImageDropout(0.0)
    np.testing.assert_array_equal(layer(images, training=True), images)
    assert layer.seed_generator is None


def test_dropout_keeps_the_dtype() -> None:
    keras.config.set_dtype_policy("mixed_bfloat16")
    assert ImageDropout(0.5)(np.ones((1, 2, 2, 3), np.float32), training=True).dtype == tf.bfloat16
