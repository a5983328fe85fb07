"""The segment table, worked out by hand."""

import numpy as np
import tensorflow as tf

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.model.resampling import resize_bilinear, upsample_bilinear, upsampled_argmax
from deeplab2_like.model.segments import count_pixels, look_up, mean_probability, number_within_class, paint_segments


def test_map_and_table() -> None:
    # Semantic classes: 0 is "other", 1 and 2 are the classes 0 and 3. Three instances of the classes 1, 2 and 1.
    semantic = tf.constant([[[1, 1, 1, 2], [1, 0, 0, 2], [0, 0, 1, 1]]])
    owner = tf.constant([[[0, 3, 3, 3], [0, 3, 1, 3], [2, 2, 3, 3]]])
    categories = tuple(Category(i, str(i), i in (1, 2), (0, 0, 0)) for i in range(4))
    table = paint_segments(
        semantic,
        owner,
        tf.constant([[1, 2, 1]]),
        class_of_semantic=(-1, 0, 3),
        dataset_info=DatasetInfo("made up", categories, label_divisor=10, ignore_label=255),
        stuff_area_limit=3,
    )
    # Class 3 has 2 pixels left, too few; class 0 has 4; "other" where no instance is becomes void.
    np.testing.assert_array_equal(table.panoptic[0], [[11, 0, 0, 2550], [11, 2550, 21, 2550], [12, 12, 0, 0]])
    np.testing.assert_array_equal(table.segment_id[0], [11, 21, 12, 0, 0, 0, 0])
    np.testing.assert_array_equal(table.segment_class[0], [1, 2, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(table.kept[0], [True, True, True, True, False, False, False])
    np.testing.assert_array_equal(table.area[0], [2, 1, 2, 4, 0, 0, 2, 1])
    np.testing.assert_array_equal(table.rows[0, 0], [0, 3, 3, 6])


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
    found = upsampled_argmax(logits, (33, 17), stride=4, network_size=(20, 28))
    upsampled = resize_bilinear(upsample_bilinear(logits, 4)[:, :20, :28], 33, 17)
    np.testing.assert_array_equal(found, np.argmax(upsampled, axis=-1))
    # With a network size equal to the image size, the result is that without a network size.
    same = upsampled_argmax(logits, (20, 28), stride=4, network_size=(20, 28))
    np.testing.assert_array_equal(same, upsampled_argmax(logits, (20, 28), stride=4))


def test_mean_probability_reads_where_the_network_looked() -> None:
    # Two probabilities side by side at stride 4 of a network size of 4x8, for an image of
    # 2x4: each covers 2 columns.
    probability = np.array([[0.9, 0.1], [0.2, 0.8]], np.float32)
    rows = tf.constant([[[0, 0, 0, 1], [0, 0, 1, 1]]])
    found = mean_probability(
        tf.constant(probability[None, None]),  # [1, 1, 2, 2]
        rows,
        tf.constant([[0, 1]]),
        tf.constant([[5, 3]]),
        stride=4,
        network_height=4,
        network_width=8,
    )
    # Row 0, class 0: four pixels of the left one, one of the right. Row 1, class 1: three of the right one.
    np.testing.assert_allclose(found[0], [(4 * 0.9 + 0.2) / 5, 0.8], rtol=1e-5)
