"""Class and instance in one integer, and that integer in three bytes."""

import numpy as np
import tensorflow as tf

from deeplab2_like.data.panoptic_label import decode, encode, ids_to_rgb, rgb_to_ids


def test_encode_and_decode() -> None:
    classes = np.array([[0, 1], [255, 18]], np.int32)
    instances = np.array([[0, 2], [0, 999]], np.int32)
    panoptic = encode(classes, instances, 1000)
    np.testing.assert_array_equal(panoptic, [[0, 1002], [255000, 18999]])
    assert panoptic.dtype == np.int32
    for found, expected in zip(decode(panoptic, 1000), (classes, instances), strict=True):
        np.testing.assert_array_equal(found, expected)


def test_tensors_give_the_same() -> None:
    classes, instances = decode(tf.constant([[3007, 255000]]), 1000)
    np.testing.assert_array_equal(classes, [[3, 255]])
    np.testing.assert_array_equal(instances, [[7, 0]])
    np.testing.assert_array_equal(encode(classes, instances, 1000), [[3007, 255000]])


def test_ids_as_colors() -> None:
    # id = R + 256 G + 65536 B: 256 * 2 + 1, and the largest.
    ids = np.array([[0, 513, 65536, 2**24 - 1]])
    rgb = ids_to_rgb(ids)
    np.testing.assert_array_equal(rgb, [[[0, 0, 0], [1, 2, 0], [0, 0, 1], [255, 255, 255]]])
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb_to_ids(rgb.astype(np.int32)), ids)
    np.testing.assert_array_equal(rgb_to_ids(tf.cast(rgb, tf.int32)), ids)
