"""Resolution of overlaps: by hand, and against a plain loop over masks."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.model import overlaps
from deeplab2_like.model.detection.masks import paste_masks
from deeplab2_like.model.overlaps import Window, pixel_bounds, resolve_mask_overlaps, update_in_windows


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
def test_overlaps_are_resolved_as_by_a_plain_loop(height: int, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlaps, "BLOCK", 4)  # So that there are windows in these small images.
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


def test_windows_hold_their_instances(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every instance paints its bounds over a map of 16 lines and 30 columns, which are 8 blocks of 4, with padding."""
    monkeypatch.setattr(overlaps, "BLOCK", 4)
    bounds = np.array(
        [
            # Image 0: a corner; one column at the right border; all lines and columns; a line; nothing; one not used.
            [(0, 0, 2, 4), (3, 29, 5, 30), (0, 0, 16, 30), (7, 1, 8, 30), (9, 9, 9, 9), (0, 0, 16, 30)],
            # Image 1: the same instances have other places and sizes.
            [(14, 26, 16, 30), (0, 4, 2, 8), (1, 29, 2, 30), (7, 11, 8, 12), (2, 7, 16, 9), (6, 12, 12, 17)],
        ],
        np.int32,
    )
    used = np.array([[True] * 5 + [False], [True] * 6])
    sizes = []

    def paint(n: tf.Tensor, window: Window, parts: tuple[tf.Tensor, ...]) -> tuple[tf.Tensor, ...]:
        sizes.append((window.height, window.width))
        number, count = parts
        box = tf.gather(tf.constant(bounds), n, axis=1)[:, :, None]  # [B, 4, 1]
        lines = (window.lines >= box[:, 0]) & (window.lines < box[:, 2])
        columns = (window.columns >= box[:, 1]) & (window.columns < box[:, 3])
        inside = lines[:, :, None] & columns[:, None] & tf.gather(tf.constant(used), n, axis=1)[:, None, None]
        return tf.where(inside, n + 1, number), count + tf.cast(inside, tf.float32)

    number, count = np.zeros((2, 16, 30), int), np.zeros((2, 16, 30))
    for n, image in np.ndindex(6, 2):
        top, left, bottom, right = bounds[image, n]
        if used[image, n]:
            number[image, top:bottom, left:right] = n + 1
            count[image, top:bottom, left:right] += 1
    maps = (tf.zeros((2, 16, 30), tf.int32), tf.zeros((2, 16, 30)))
    found = update_in_windows(maps, paint, tf.constant(used), tf.constant(bounds))
    np.testing.assert_array_equal(found[0], number)
    np.testing.assert_array_equal(found[1], count)
    # Lines and blocks that the instances take: 2 and 2, 2 and 1, all, 1 and 8, 14 and 2, 6 and 2. The first window that
    # holds 2 and 2 is a quarter of the 16 lines and of the 8 blocks.
    assert sizes == [(4, 8), (2, 4), (16, 32), (16, 32), (16, 8), (8, 16)]


def test_pixels_that_boxes_touch() -> None:
    boxes = tf.constant([[[0.5, 1.0, 2.5, 3.0], [-4, -1e30, 5, 1e30], [7, 9.5, 8, 12], [0, 0, 0, 0]]])
    expected = [[0, 1, 3, 3], [0, 0, 5, 10], [6, 9, 6, 10], [0, 0, 0, 0]]
    np.testing.assert_array_equal(pixel_bounds(boxes, 6, 10)[0], expected)
