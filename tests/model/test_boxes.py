"""Box arithmetic by hand, and suppression against the usual loop."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from deeplab2_like.model.boxes import (
    box_area,
    clip_boxes,
    decode_boxes,
    encode_boxes,
    non_maximum_suppression,
    pairwise_iou,
    take_rows,
)

ONES = (1.0, 1.0, 1.0, 1.0)


def boxes_of(*rows: tuple[float, float, float, float]) -> tf.Tensor:
    return tf.constant(rows, tf.float32)


def random_boxes(*shape: int, seed: int = 0) -> np.ndarray:
    """Boxes of sides 1 to 40 in an image of about 100 pixels."""
    rng = np.random.default_rng(seed)
    corner = rng.uniform(-10, 90, (*shape, 2))
    return np.concatenate([corner, corner + rng.uniform(1, 40, (*shape, 2))], axis=-1).astype(np.float32)


def test_area() -> None:
    # 3 rows of 5 columns; a box that ends before it starts has no area, even where both sides are negative.
    np.testing.assert_array_equal(box_area(boxes_of((1, 2, 4, 7), (4, 7, 1, 2), (0, 0, 0, 9))), [15, 0, 0])


def test_iou_by_hand() -> None:
    first = boxes_of((0, 0, 4, 4), (0, 0, 0, 0))
    # The same box; 2x2 of 16 + 16 - 4 in common; touching only; empty.
    second = boxes_of((0, 0, 4, 4), (2, 2, 6, 6), (4, 0, 8, 4), (1, 1, 1, 1))
    np.testing.assert_allclose(pairwise_iou(first, second), [[1, 4 / 28, 0, 0], [0, 0, 0, 0]], rtol=1e-6)


def test_iou_of_a_batch_compares_within_images() -> None:
    boxes = random_boxes(2, 5)
    found = pairwise_iou(boxes, boxes[:, :3])
    assert found.shape == (2, 5, 3)
    np.testing.assert_array_equal(found[1], pairwise_iou(boxes[1], boxes[1, :3]))
    np.testing.assert_allclose(np.diagonal(found[0]), 1, rtol=1e-5)


def test_encoding_by_hand() -> None:
    # The reference is 4 high, 10 wide, centered at (2, 5); the box is 8 high, 5 wide, centered at (3, 10): the center
    # moves by 1/4 of the height and 1/2 of the width, the height doubles, the width halves.
    reference, box = boxes_of((0, 0, 4, 10)), boxes_of((-1, 7.5, 7, 12.5))
    found = encode_boxes(box, reference, ONES)
    np.testing.assert_allclose(found, [[0.25, 0.5, np.log(2), -np.log(2)]], rtol=1e-6)
    np.testing.assert_allclose(
        encode_boxes(box, reference, (10, 20, 5, 1)), [[2.5, 10, 5 * np.log(2), -np.log(2)]], rtol=1e-6
    )


def test_decoding_inverts_encoding() -> None:
    boxes, reference = random_boxes(3, 7), random_boxes(3, 7, seed=1)
    weights = (10.0, 10.0, 5.0, 5.0)
    found = decode_boxes(encode_boxes(boxes, reference, weights), reference, weights)
    np.testing.assert_allclose(found, boxes, atol=1e-4)


def test_decoded_sides_are_limited() -> None:
    # A side of 16 grows to 1000 at most, around its center 8.
    found = decode_boxes(boxes_of((0, 0, 50, 1)), boxes_of((0, 0, 16, 16)), ONES)
    half = 8 * np.e
    np.testing.assert_allclose(found, [[8 - 500, 8 - half, 8 + 500, 8 + half]], rtol=1e-5)


def test_encoding_of_empty_rows_is_finite() -> None:
    empty = boxes_of((0, 0, 0, 0))
    assert np.isfinite(encode_boxes(empty, empty, ONES)).all()
    assert np.isfinite(encode_boxes(boxes_of((0, 0, 9, 9)), empty, ONES)).all()


@pytest.mark.parametrize("dynamic", [False, True])
def test_clipping(dynamic: bool) -> None:
    size = (tf.constant(10), tf.constant(20)) if dynamic else (10, 20)
    found = clip_boxes(boxes_of((-3, -4, 5, 6), (1, 2, 30, 30), (11, 5, 12, 6)), size)
    np.testing.assert_array_equal(found, [[0, 0, 5, 6], [1, 2, 10, 20], [10, 5, 10, 6]])


def test_rows_are_taken_from_their_own_table() -> None:
    table = np.arange(2 * 3 * 2).reshape(2, 3, 2)
    found = take_rows(table, np.array([[2, 0], [1, 1]], np.int32))
    np.testing.assert_array_equal(found, [[[4, 5], [0, 1]], [[8, 9], [8, 9]]])
    np.testing.assert_array_equal(take_rows(table[..., 0], np.array([[2], [0]], np.int32)), [[4], [6]])


def greedy(boxes: np.ndarray, valid: np.ndarray, threshold: float, classes: np.ndarray) -> np.ndarray:
    """The usual loop over one image."""
    overlap = np.array(pairwise_iou(boxes, boxes))
    kept: list[int] = []
    for row in range(len(boxes)):
        if valid[row] and all(overlap[row, k] <= threshold or classes[row] != classes[k] for k in kept):
            kept.append(row)
    return np.isin(np.arange(len(boxes)), kept)


@pytest.mark.parametrize("threshold", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("num_classes", [1, 4])
def test_suppression_equals_the_greedy_loop(threshold: float, num_classes: int) -> None:
    boxes = random_boxes(2, 150)
    rng = np.random.default_rng(1)
    valid, classes = rng.random((2, 150)) < 0.9, rng.integers(0, num_classes, (2, 150))
    found = non_maximum_suppression(boxes, valid, iou_threshold=threshold, classes=classes)
    expected = [greedy(*image, threshold, kinds) for *image, kinds in zip(boxes, valid, classes, strict=True)]
    np.testing.assert_array_equal(found, expected)
    assert 0 < np.sum(expected) < np.sum(valid)  # Some stay and some go, so the comparison means something.


def test_suppression_without_classes_is_that_of_one_class() -> None:
    boxes, valid = random_boxes(1, 60), np.ones((1, 60), bool)
    found = non_maximum_suppression(boxes, valid, iou_threshold=0.3)
    np.testing.assert_array_equal(found[0], greedy(boxes[0], valid[0], 0.3, np.zeros(60)))


def test_suppression_follows_chains() -> None:
    # Each box covers 2/3 of the one before (IoU 1/2) and 1/3 of the one before that (IoU 1/5): the second goes because
    # of the first, so it does not take the third with it.
    boxes = tf.constant([[[k, 0, k + 3, 1] for k in range(7)]], tf.float32)
    found = non_maximum_suppression(boxes, tf.ones((1, 7), tf.bool), iou_threshold=0.4)
    np.testing.assert_array_equal(found[0], [True, False, True, False, True, False, True])
    # Without the first, the roles change.
    valid = tf.constant([[False, True, True, True, True, True, True]])
    found = non_maximum_suppression(boxes, valid, iou_threshold=0.4)
    np.testing.assert_array_equal(found[0], [False, True, False, True, False, True, False])


def test_an_overlap_at_the_threshold_stays() -> None:
    boxes = tf.constant([[[0, 0, 2, 2], [0, 0, 2, 1]]], tf.float32)  # IoU 1/2.
    valid = tf.ones((1, 2), tf.bool)
    np.testing.assert_array_equal(non_maximum_suppression(boxes, valid, iou_threshold=0.5), [[True, True]])
    np.testing.assert_array_equal(non_maximum_suppression(boxes, valid, iou_threshold=0.49), [[True, False]])


@pytest.mark.parametrize("compiled", [False, True])
def test_suppression_in_a_graph(compiled: bool) -> None:
    boxes, valid = tf.constant(random_boxes(2, 50)), tf.ones((2, 50), tf.bool)
    suppress = tf.function(
        lambda b, v: non_maximum_suppression(b, v, iou_threshold=0.3), jit_compile=compiled, autograph=False
    )
    np.testing.assert_array_equal(suppress(boxes, valid), non_maximum_suppression(boxes, valid, iou_threshold=0.3))


def test_gradients_of_decoding_are_finite() -> None:
    deltas = tf.Variable(boxes_of((0.1, 0.2, 90, -3)))
    with tf.GradientTape() as tape:
        total = ops.sum(decode_boxes(deltas, boxes_of((0, 0, 16, 16)), ONES))
    gradient = keras.ops.convert_to_numpy(tape.gradient(total, deltas))
    # Both ends move by the side of the reference for each unit of shift; a scale that was cut has no gradient.
    np.testing.assert_allclose(gradient[0, :3], [32, 32, 0], rtol=1e-5)
