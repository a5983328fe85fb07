"""Resolution of overlaps: by hand, and against a plain loop over masks."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.model.detection.masks import paste_masks
from deeplab2_like.model.overlaps import resolve_mask_overlaps


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


def test_unused_rows_get_no_pixels() -> None:
    instances = full_boxes((0, 0, 4, 4), (4, 4, 8, 8))
    instances["used"] = tf.constant([[True, False]])
    owner = resolve_mask_overlaps(**instances, height=8, width=8, overlap_threshold=0.5)
    assert set(np.unique(owner)) == {0, 2}
    instances["used"] = tf.constant([[False, False]])
    assert (resolve_mask_overlaps(**instances, height=8, width=8, overlap_threshold=0.5).numpy() == 2).all()


@pytest.mark.parametrize(("height", "width"), [(61, 40), (16, 33), (5, 7)])
def test_overlaps_are_resolved_as_by_a_plain_loop(height: int, width: int) -> None:
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
