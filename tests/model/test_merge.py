"""Merging instances and semantic classes: by hand, and against a plain loop over masks."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from deeplab2_like.model.merge import resized_argmax, semantic_argmax

from deeplab2_like.model.detection.masks import paste_masks
from deeplab2_like.model.overlaps import resolve_mask_overlaps
from deeplab2_like.model.resampling import resize_bilinear, upsample_bilinear
from deeplab2_like.model.segments import count_pixels, look_up, mean_probability, merge, number_within_class


def full_boxes(*boxes: tuple[float, float, float, float]) -> dict[str, tf.Tensor]:
    """Instances that fill their boxes, as arguments of `resolve_mask_overlaps`."""
    return {
        "used": tf.ones((1, len(boxes)), bool),
        "boxes": tf.constant([boxes], tf.float32),
        "probabilities": tf.ones((1, len(boxes), 4, 4)),
    }


def test_earlier_instances_win_and_covered_ones_are_dropped() -> None:
    # In an 8x8 map:       0 1 2 3 4 5 6 7
    #   instance 0 takes   x x x x . . . .   of rows 0 to 3;
    #   instance 1 wants   . . x x x x x x   of them: 2 of 6 columns are taken, 1/3 <= 0.5, so it gets columns 4 to 7;
    #   instance 2 wants   x x x x x . . .   of them: all 5 columns are taken, so it is dropped;
    #   instance 3 wants columns 0 to 3 of rows 2 to 5, of which exactly half is taken: it gets rows 4 and 5.
    instances = full_boxes((0, 0, 4, 4), (0, 2, 4, 8), (0, 0, 4, 5), (2, 0, 6, 4))
    owner = resolve_mask_overlaps(**instances, height=8, width=8, overlap_threshold=0.5)
    expected = np.full((8, 8), 4)
    expected[:4, :4] = 0
    expected[:4, 4:] = 1
    expected[4:6, :4] = 3
    np.testing.assert_array_equal(owner[0], expected)
    # With a little less allowed, the last one is dropped, too.
    owner = resolve_mask_overlaps(**instances, height=8, width=8, overlap_threshold=0.49)
    assert set(np.unique(owner)) == {0, 1, 4}


def test_unused_rows_claim_nothing() -> None:
    instances = full_boxes((0, 0, 4, 4), (4, 4, 8, 8))
    instances["used"] = tf.constant([[True, False]])
    owner = resolve_mask_overlaps(**instances, height=8, width=8, overlap_threshold=0.5)
    assert set(np.unique(owner)) == {0, 2}
    instances["used"] = tf.constant([[False, False]])
    assert (resolve_mask_overlaps(**instances, height=8, width=8, overlap_threshold=0.5).numpy() == 2).all()


@pytest.mark.parametrize(("height", "width"), [(61, 40), (16, 33), (5, 7)])
def test_claims_are_those_of_a_plain_loop(height: int, width: int) -> None:
    random = np.random.default_rng(height)
    batch, number = 2, 25
    corners = random.uniform(-3, [height, width], (batch, number, 2))
    sides = random.uniform(0.5, [height, width], (batch, number, 2)) ** random.uniform(0.3, 1, (batch, number, 1))
    boxes = np.concatenate([corners, corners + sides], axis=-1).astype(np.float32)
    masks = random.uniform(0, 1, (batch, number, 6, 6)).astype(np.float32) ** 0.5
    # One image uses more rows than the other.
    used = np.arange(number) < np.array([[20], [11]])

    pasted = paste_masks(tf.constant(masks), tf.constant(boxes), height, width).numpy()
    expected = np.full((batch, height, width), number)
    dropped = 0
    for image in range(batch):
        for n in np.flatnonzero(used[image]):
            mask = pasted[image, n]
            free = mask & (expected[image] == number)
            if mask.sum() - free.sum() <= 0.4 * mask.sum():
                expected[image][free] = n
            else:
                dropped += 1
    arguments = (tf.constant(used), tf.constant(boxes), tf.constant(masks))
    options: dict[str, Any] = {"height": height, "width": width, "overlap_threshold": 0.4}
    np.testing.assert_array_equal(resolve_mask_overlaps(*arguments, **options), expected)
    assert dropped > 3  # Else this would show little.
    compiled = tf.function(lambda *tensors: resolve_mask_overlaps(*tensors, **options), jit_compile=True)
    np.testing.assert_array_equal(compiled(*arguments), expected)


def test_map_and_table() -> None:
    # Semantic classes: 0 is "other", 1 and 2 are the classes 0 and 3. Three instances of the classes 1, 2 and 1.
    semantic = tf.constant([[[1, 1, 1, 2], [1, 0, 0, 2], [0, 0, 1, 1]]])
    owner = tf.constant([[[0, 3, 3, 3], [0, 3, 1, 3], [2, 2, 3, 3]]])
    merged = merge(
        semantic,
        owner,
        tf.constant([[1, 2, 1]]),
        class_of_semantic=(-1, 0, 3),
        num_classes=4,
        stuff_area_limit=3,
        label_divisor=10,
        void=2550,
    )
    # Class 3 has 2 pixels left, too few; class 0 has 4; "other" where no instance is becomes void.
    np.testing.assert_array_equal(merged.panoptic[0], [[11, 0, 0, 2550], [11, 2550, 21, 2550], [12, 12, 0, 0]])
    np.testing.assert_array_equal(merged.segment_id[0], [11, 21, 12, 0, 0, 0, 0])
    np.testing.assert_array_equal(merged.segment_class[0], [1, 2, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(merged.kept[0], [True, True, True, True, False, False, False])
    np.testing.assert_array_equal(merged.area[0], [2, 1, 2, 4, 0, 0, 2, 1])
    np.testing.assert_array_equal(merged.rows[0, 0], [0, 3, 3, 6])


def test_numbers_count_those_that_are_there_within_a_class() -> None:
    classes, present = tf.constant([[5, 5, 6, 5, 6]]), tf.constant([[True, False, True, True, True]])
    np.testing.assert_array_equal(number_within_class(classes, present)[0].numpy()[[0, 2, 3, 4]], [1, 1, 2, 2])


def test_pixels_are_counted_for_each_image() -> None:
    rows = tf.constant([[[0, 0], [2, 0]], [[1, 1], [2, 2]]])
    np.testing.assert_array_equal(count_pixels(rows, num_rows=4), [[3, 0, 1, 0], [0, 2, 2, 0]])
    np.testing.assert_array_equal(
        look_up(tf.constant([[9, 8, 7], [6, 5, 4]]), rows), [[[9, 9], [7, 9]], [[5, 5], [4, 4]]]
    )


def test_argmax_of_a_resized_image() -> None:
    """The network saw 20x28 pixels, padded to 24x32, of an image of 33x17."""
    logits = tf.constant(np.random.default_rng(0).normal(size=(2, 6, 8, 5)).astype(np.float32))
    found = resized_argmax(logits, seen_height=20, seen_width=28, height=33, width=17, stride=4)
    enlarged = resize_bilinear(upsample_bilinear(logits, 4)[:, :20, :28], 33, 17)
    np.testing.assert_array_equal(found, np.argmax(enlarged, axis=-1))
    # At the same size it is what `semantic_argmax` finds.
    same = resized_argmax(logits, seen_height=20, seen_width=28, height=20, width=28, stride=4)
    np.testing.assert_array_equal(same, semantic_argmax(logits, height=20, width=28, stride=4))


def test_mean_probability_reads_where_the_network_looked() -> None:
    # Two probabilities side by side at stride 4 of an image seen at 4x8, shown at 2x4: each covers 2 columns of it.
    probability = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    rows = tf.constant([[[0, 0, 0, 1], [0, 0, 1, 1]]])
    found = mean_probability(
        tf.constant(probability[None, None]),  # [1, 1, 2, 2]
        rows,
        tf.constant([[0, 1]]),
        tf.constant([[5, 3]]),
        stride=4,
        seen_height=4,
        seen_width=8,
    )
    # Row 0, class 0: four pixels of the left one, one of the right. Row 1, class 1: three of the right one.
    np.testing.assert_allclose(found[0], [(4 * 0.9 + 0.2) / 5, 0.8], rtol=1e-5)
