"""Targets, losses and post-processing of Panoptic FCN on cases worked out by hand, and against plain versions."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from system_contract import INFO

from deeplab2_like.model import overlaps
from deeplab2_like.model.boxes import boxes_around_masks
from deeplab2_like.model.panoptic_fcn import PanopticFCNConfig, dice
from deeplab2_like.model.panoptic_fcn.config import LossConfig
from deeplab2_like.model.panoptic_fcn.dice import dice_loss
from deeplab2_like.model.panoptic_fcn.kernels import find_centers, find_regions, fuse_kernels, pool_regions
from deeplab2_like.model.panoptic_fcn.losses import focal_loss, select_kernels, take_used_rows
from deeplab2_like.model.panoptic_fcn.masks import measure_masks, resolve_thing_overlaps, thing_masks
from deeplab2_like.model.panoptic_fcn.targets import is_in_size_range, make_targets, sample_cells, weighted_labels
from deeplab2_like.model.resampling import upsampling_matrix

# --- targets ---------------------------------------------------------------------------------------------------------


def targets_of(label: np.ndarray, **loss: Any) -> dict[str, np.ndarray]:
    config = PanopticFCNConfig(
        size_ranges={"p3": (1, 32), "p4": (16, 64)}, loss=LossConfig(max_instances=5, min_overlap=0.7, **loss)
    )
    targets = make_targets(tf.constant(label), config, INFO, size_multiple=32)
    return {name: value.numpy() for name, value in targets.items()}


def test_heat_maps_of_two_cars_and_a_crowd() -> None:
    label = np.full((64, 96), 1000, np.int32)
    label[0:32, 0:32] = 2001  # Side 32, on both levels.
    label[40:48, 72:80] = 2002  # Side 8, on p3 alone.
    label[48:64, 32:64] = 3000  # A crowd has no center.
    targets = targets_of(label)
    assert targets["heat_p3"].shape == (8, 12, 2)
    assert targets["heat_p4"].shape == (4, 6, 2)
    # Car 1 fills the cells 0..7 of stride 4, mean 3.5, so 14 pixels: row 1 of p3. Its side there is 4: the radius is
    # sqrt((0.7 * 8)^2 + 0.84 * 16) - 0.7 * 8 = 1.09, so 1 whole pixel, and sigma (2 + 1) / 3 = 1.
    # Car 2 fills the cells 10, 11 and 18, 19: mean 10.5 and 18.5, 42 and 74 pixels, row 5 and column 9. Radius 0.
    expected = np.zeros((8, 12))
    expected[0:3, 0:3] = np.exp([[-1, -0.5, -1], [-0.5, 0, -0.5], [-1, -0.5, -1]])
    expected[5, 9] = 1
    np.testing.assert_allclose(targets["heat_p3"][..., 0], expected, rtol=1e-6)
    assert not targets["heat_p3"][..., 1].any()
    expected = np.zeros((4, 6))
    expected[0, 0] = 1  # 14 / 16; side 2, radius 0.
    np.testing.assert_allclose(targets["heat_p4"][..., 0], expected)
    np.testing.assert_allclose(targets["centers"][:2], [[14, 14], [42, 74]])


def test_center_of_a_box_and_of_mass() -> None:
    label = np.full((32, 32), 1000, np.int32)
    label[0:4, 0:32] = 2001  # The long side of an L,
    label[4:16, 0:4] = 2001  # and the short one: 8 cells in row 0, and one in each of the rows 1 to 3.
    # Rows (8 * 0 + 1 + 2 + 3) / 11 = 6 / 11, columns (0 + ... + 7 + 0) / 11 = 28 / 11, times 4.
    np.testing.assert_allclose(targets_of(label)["centers"][0], [24 / 11, 112 / 11], rtol=1e-6)
    np.testing.assert_allclose(targets_of(label, center="box")["centers"][0], [8, 16])
    # One pixel between the samples has the center of its box.
    dot = np.full((32, 32), 1000, np.int32)
    dot[8, 8] = 2001
    np.testing.assert_allclose(targets_of(dot)["centers"][0], [8.5, 8.5])


def test_sizes_are_inclusive() -> None:
    boxes = np.array([[0, 0, 4, 16], [0, 0, 16, 64], [0, 0, 1, 1]], np.float32)  # Sides 8, 32 and 1.
    np.testing.assert_array_equal(is_in_size_range(boxes, 8, 32), [True, True, False])


@pytest.mark.parametrize("size", [(4, 6), (2, 3), (3, 5), (1, 1)])
def test_weighted_labels_are_bilinear(size: tuple[int, int]) -> None:
    labels = np.random.default_rng(0).integers(0, 3, (1, 32, 48)).astype(np.int32)
    samples = sample_cells(tf.constant(labels), 4)
    assert samples.shape == (1, 8, 12, 4)
    for value in range(3):
        share = sum(np.where(label == value, part, 0.0) for label, part in weighted_labels(samples, size))
        # The mask at stride 4 is bilinear, too: the mean of the four pixels in the middle of 4x4 pixels.
        mask = tf.image.resize((labels == value)[..., None].astype(np.float32), (8, 12))
        np.testing.assert_allclose(share, tf.image.resize(mask, size)[..., 0], atol=1e-6)


# --- losses ----------------------------------------------------------------------------------------------------------


def test_focal_loss_by_hand() -> None:
    # A positive at probability 0.5: 0.25 * 0.5^2 * ln 2. A negative at 0.75: 0.75 * 0.75^2 * ln 4. The third: weight 0.
    logits = tf.constant([0.0, np.log(3), 5.0], tf.float32)[None, None, :, None]
    targets = tf.constant([1.0, 0.0, 0.0])[None, None, :, None]
    weight = tf.constant([1.0, 1.0, 0.0])[None, None]
    loss = focal_loss(logits, targets, weight, alpha=0.25, gamma=2.0)
    assert float(loss) == pytest.approx(0.25 * 0.25 * np.log(2) + 0.75 * 0.5625 * np.log(4), rel=1e-5)


def plain_dice(
    feature: tf.Tensor, weights: tf.Tensor, labels: np.ndarray, samples: np.ndarray, counted: np.ndarray
) -> tf.Tensor:
    """All masks at once, and their gradients from the tape."""
    masks = tf.sigmoid(tf.einsum("bhwe,brke->brkhw", feature, weights)) * counted[:, None, None]
    true = (samples[:, None] == labels[:, :, None, None, None]).mean(axis=-1) * counted[:, None]
    true = tf.constant(true[:, :, None], tf.float32)  # [B, R, 1, h, w]
    product = tf.reduce_sum(masks * true, axis=(3, 4))
    return 1 - 2 * product / (tf.reduce_sum(masks**2, axis=(3, 4)) + tf.reduce_sum(true**2, axis=(3, 4)) + 1e-5)


# 30 cells: blocks of one mask, of three (the last one is not full) and of all.
@pytest.mark.parametrize("block_size", [1, 90, 10**9])
def test_dice_loss_in_blocks_is_the_plain_one(block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dice, "_BLOCK_SIZE", block_size)
    random = np.random.default_rng(0)
    feature = tf.constant(random.standard_normal((2, 5, 6, 3)), tf.float32)
    weights = tf.constant(random.standard_normal((2, 4, 2, 3)), tf.float32)
    samples = random.integers(0, 3, (2, 5, 6, 4)).astype(np.int32)
    labels = random.integers(0, 4, (2, 4)).astype(np.int32)
    counted = (random.random((2, 5, 6)) < 0.8).astype(np.float32)
    results = []
    for function in (dice_loss, plain_dice):
        with tf.GradientTape() as tape:
            tape.watch([feature, weights])
            loss = function(feature, weights, labels, samples, counted)
            total = tf.reduce_sum(loss * random.standard_normal((2, 4, 2)) ** 0)
        results.append([loss, *tape.gradient(total, [feature, weights])])
    for ours, plain in zip(*results, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_dice_loss_leaves_out_unused_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    # Two masks per block: the first image uses two rows of two masks, the second one; row 2 and row 3 are NaN.
    monkeypatch.setattr(dice, "_BLOCK_SIZE", 2 * 30)
    random = np.random.default_rng(0)
    feature = tf.constant(random.standard_normal((2, 5, 6, 3)), tf.float32)
    weights = tf.constant(random.standard_normal((2, 4, 2, 3)), tf.float32)
    weights = tf.where(tf.range(4)[:, None, None] < 2, weights, np.nan)
    samples = random.integers(0, 3, (2, 5, 6, 4)).astype(np.int32)
    labels = random.integers(0, 4, (2, 4)).astype(np.int32)
    counted = np.ones((2, 5, 6), np.float32)
    used = tf.constant([[True, True, False, False], [True, False, False, False]])
    results = []
    for rows, arguments in ((4, (used,)), (2, ())):
        function = dice_loss if arguments else plain_dice
        with tf.GradientTape() as tape:
            tape.watch([feature, weights])
            loss = function(feature, weights[:, :rows], labels[:, :rows], samples, counted, *arguments)[:, :2]
            total = tf.reduce_sum(tf.boolean_mask(loss, used[:, :2]))
        results.append([loss, *tape.gradient(total, [feature, weights])])
    for ours, plain in zip(*results, strict=True):
        np.testing.assert_allclose(ours, plain, atol=1e-5)


def test_dice_loss_by_hand() -> None:
    # One line of two cells: the object is in the first. Logits 0 in both: p = 1/2, so 1 - 2 * 0.5 / (0.25 * 2 + 1).
    samples = np.array([[[[1] * 4, [0] * 4], [[0] * 4, [0] * 4]]], np.int32)
    counted = np.array([[[1, 1], [0, 0]]], np.float32)
    loss = dice_loss(tf.zeros((1, 2, 2, 3)), tf.zeros((1, 1, 1, 3)), tf.constant([[1]]), samples, tf.constant(counted))
    assert float(loss[0, 0, 0]) == pytest.approx(1 - 1 / 1.5, abs=1e-4)


def test_kernels_with_the_best_scores_inside_are_selected() -> None:
    # A level of 2x2 positions at stride 8; the object (row 0 of the table) covers the two of the left column.
    label = np.zeros((1, 16, 16), np.int32)
    label[:, :, :8] = 1
    samples = sample_cells(tf.constant(label), 4)
    kernels = tf.reshape(tf.range(4.0), (1, 2, 2, 1))
    # The scores of class 1; those of class 0 must not matter.
    score = np.array([[0.2, 0.9], [0.6, 0.8]])
    logits = np.stack([np.full((2, 2), 3.0), np.log(score / (1 - score))], axis=-1)[None]
    options: dict[str, Any] = {
        "instances": weighted_labels(samples, (2, 2)),
        "classes": tf.constant([[1]]),
        "positions": tf.constant([[[1, 1]]]),
    }
    selected, share = select_kernels(kernels, tf.constant(logits, tf.float32), count=3, weighted=True, **options)
    # The better of the two first, with weights 0.6 / 0.8 and 0.2 / 0.8; the third has weight 0.
    np.testing.assert_allclose(selected[0, 0, :2, 0], [2, 0])
    np.testing.assert_allclose(share[0, 0], [0.75, 0.25, 0], atol=1e-6)
    selected, share = select_kernels(kernels, tf.constant(logits, tf.float32), count=3, weighted=False, **options)
    np.testing.assert_allclose(selected[0, 0, :, 0], [3])  # The one at the center.
    np.testing.assert_allclose(share[0, 0], [1])
    # An object that fills no position, such as row 1 of the table here, uses the one at its center.
    options |= {"classes": tf.constant([[1, 1]]), "positions": tf.constant([[[0, 0], [0, 1]]])}
    selected, share = select_kernels(kernels, tf.constant(logits, tf.float32), count=3, weighted=True, **options)
    assert float(selected[0, 1, 0, 0]) == 1
    np.testing.assert_allclose(share[0, 1], [1, 0, 0], atol=1e-6)


def test_regions_are_averaged_over_themselves_or_over_the_map() -> None:
    kernels = tf.constant([[[[1.0], [3.0]], [[5.0], [7.0]]]])
    masks = tf.constant([[[[1.0, 0], [1, 0]], [[0, 0], [0, 0]]]])  # The first line; nothing.
    np.testing.assert_allclose(pool_regions(kernels, masks, over_map=False)[0, :, 0], [2, 0])
    np.testing.assert_allclose(pool_regions(kernels, masks, over_map=True)[0, :, 0], [1, 0])


def test_used_rows_come_first() -> None:
    rows = {"value": tf.constant([[10, 11, 12, 13]])}
    kept, used = take_used_rows(rows, tf.constant([[False, True, False, True]]), 3)
    np.testing.assert_array_equal(kept["value"][0, :2], [11, 13])
    np.testing.assert_array_equal(used[0], [True, True, False])


# --- post-processing -------------------------------------------------------------------------------------------------


def test_centers_are_peaks_of_the_smoothed_map() -> None:
    # 4x4 positions, one class. A peak of 0.9 in a corner with a neighbor of 0.6, and one of 0.8 far from it.
    probability = np.full((4, 4), 0.001)
    probability[0, 0], probability[0, 1], probability[3, 3] = 0.9, 0.6, 0.8
    logits = np.log(probability / (1 - probability))[None, ..., None].astype(np.float32)
    kernels = tf.reshape(tf.range(16.0), (1, 4, 4, 1))
    kernels_of_peaks, scores, classes = find_centers(tf.constant(logits), kernels, window=3, threshold=0.05, count=5)
    # (0.9 + (0.9 + 0.6 + 2 * 0.001) / 9) / 2 = 0.53344 and (0.8 + (0.8 + 3 * 0.001) / 9) / 2 = 0.44461.
    np.testing.assert_allclose(scores[0], [0.53344, 0.44461, 0, 0, 0], atol=1e-5)
    np.testing.assert_allclose(kernels_of_peaks[0, :2, 0], [0, 15])
    np.testing.assert_array_equal(classes[0, :2], [0, 0])


def test_regions_divide_a_level() -> None:
    # Two positions for class 0 with 0.9 and 0.7, one for class 1 with 0.04 against 0.03.
    probability = np.array([[[[0.9, 0.1], [0.7, 0.2], [0.03, 0.04]]]])
    regions, counts = find_regions(tf.constant(np.log(probability / (1 - probability)), tf.float32), threshold=0.05)
    np.testing.assert_array_equal(regions[0, 0], [[1, 0], [1, 0], [0, 1]])
    np.testing.assert_array_equal(counts[0], [True, False])


def test_fusion_of_a_chain() -> None:
    # Directions at 0, 20, 40 and 90 degrees: neighbors in the chain are similar, from a cosine of 0.9 (25 degrees).
    angle = np.radians([0, 20, 40, 90])
    weights = tf.constant(np.stack([np.cos(angle), np.sin(angle)], axis=-1)[None], tf.float32)
    scores, classes = tf.constant([[0.9, 0.8, 0.7, 0.6]]), tf.constant([[1, 1, 1, 1]])
    options: dict[str, Any] = {"similarity": 0.9, "class_aware": True}
    fused, kept = fuse_kernels(weights, scores, classes, reference_behavior=False, **options)
    # The second joins the first; the third is similar only to the second, which is removed, so it stays.
    np.testing.assert_allclose(kept[0], [0.9, 0, 0.7, 0.6])
    np.testing.assert_allclose(fused[0, 0], (weights[0, 0] + weights[0, 1]) / 2)
    np.testing.assert_allclose(fused[0, 2], weights[0, 2])
    fused, kept = fuse_kernels(weights, scores, classes, reference_behavior=True, **options)
    # The third is removed, because it is similar to the second, and joins none.
    np.testing.assert_allclose(kept[0], [0.9, 0, 0, 0.6])
    np.testing.assert_allclose(fused[0, 0], (weights[0, 0] + weights[0, 1]) / 2)
    # With another class, the second is another object, unless classes do not matter.
    other = tf.constant([[1, 0, 1, 1]])
    _, kept = fuse_kernels(weights, scores, other, reference_behavior=False, **options)
    np.testing.assert_allclose(kept[0], [0.9, 0.8, 0.7, 0.6])
    options["class_aware"] = False
    _, kept = fuse_kernels(weights, scores, other, reference_behavior=False, **options)
    np.testing.assert_allclose(kept[0], [0.9, 0, 0.7, 0.6])


def test_unused_rows_fuse_with_nothing() -> None:
    weights = tf.ones((1, 3, 2))
    fused, kept = fuse_kernels(
        weights,
        tf.constant([[0.9, 0.0, 0.0]]),
        tf.zeros((1, 3), tf.int32),
        similarity=0.9,
        class_aware=True,
        reference_behavior=False,
    )
    np.testing.assert_allclose(kept[0], [0.9, 0, 0])
    np.testing.assert_allclose(fused[0, 0], [1, 1])


@pytest.mark.parametrize("height", [3, 8, 19])
def test_masks_are_measured_in_bands(height: int) -> None:
    random = np.random.default_rng(height)
    feature, weights = random.standard_normal((2, height, 5, 3)), random.standard_normal((2, 4, 3))
    weights[1, 2] = 0  # Probability 1/2 everywhere, which is not above the threshold.
    masks = 1 / (1 + np.exp(-np.einsum("bhwe,bne->bnhw", feature, weights)))
    inside = masks > 0.5
    certainty, rows, columns = measure_masks(
        tf.constant(feature, tf.float32), tf.constant(weights, tf.float32), threshold=0.5
    )
    mean = (masks * inside).sum(axis=(2, 3)) / np.maximum(inside.sum(axis=(2, 3)), 1)
    np.testing.assert_allclose(certainty, mean, rtol=1e-5)
    np.testing.assert_array_equal(rows, inside.any(axis=3))
    np.testing.assert_array_equal(columns, inside.any(axis=2))
    assert certainty[1, 2] == 0


@pytest.mark.parametrize("size", [None, 20, 7])
def test_upsampling_is_bilinear_in_two_steps(size: int | None) -> None:
    values = np.random.default_rng(0).standard_normal((1, 4, 1, 1)).astype(np.float32)
    network_size = 13  # Of 16 pixels, 3 are padding.
    expected = tf.image.resize(values, (16, 1))[:, :network_size]
    if size is not None:
        expected = tf.image.resize(expected, (size, 1))
    matrix = upsampling_matrix(4, None if size is None else network_size, size or network_size, stride=4)
    np.testing.assert_allclose(matrix @ values[0, :, :, 0], expected[0, :, :, 0], atol=1e-6)


def test_boxes_of_masks() -> None:
    masks = np.zeros((1, 2, 5, 6), bool)
    masks[0, 0, 1:3, 2:6] = True
    np.testing.assert_array_equal(boxes_around_masks(tf.constant(masks))[0], [[1, 2, 3, 6], [0, 0, 0, 0]])


def test_overlaps_of_things_are_resolved_as_by_a_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round things in two images of 30x45, cells of 4 pixels; one thing is empty and one is not used."""
    monkeypatch.setattr(overlaps, "BLOCK", 4)  # So that there are windows in these small images.
    random = np.random.default_rng(0)
    y, x = np.mgrid[:8, :12].astype(np.float32)
    feature = np.stack([np.ones_like(y), y, x, y**2 + x**2], axis=-1)
    # r^2 - (y - v)^2 - (x - u)^2 is linear in these channels.
    v, u, r = (random.uniform(low, high, (2, 9)) for low, high in ((0, 8), (0, 12), (0.7, 4)))
    weights = np.stack([r**2 - v**2 - u**2, 2 * v, 2 * u, -np.ones_like(r)], axis=-1)
    weights[1, 2] = [-9, 0, 0, 0]
    used = np.arange(9) < np.array([[9], [8]])
    features, kernels = (tf.constant(each, tf.float32) for each in (np.stack([feature, feature]), weights))
    matrices = upsampling_matrix(8, None, 30, stride=4), upsampling_matrix(12, None, 45, stride=4)
    _, rows, columns = measure_masks(features, kernels, threshold=0.5)
    masks = thing_masks(features, kernels, *matrices, threshold=0.5).numpy()
    expected = np.full((2, 30, 45), 9)
    for image, n in np.ndindex(2, 9):
        free = masks[image, n] & (expected[image] == 9)
        if used[image, n] and masks[image, n].sum() - free.sum() <= 0.5 * masks[image, n].sum():
            expected[image][free] = n
    owner = resolve_thing_overlaps(
        tf.constant(used),
        kernels,
        rows,
        columns,
        features,
        *matrices,
        threshold=0.5,
        overlap_threshold=0.5,
    )
    np.testing.assert_array_equal(owner, expected)
    assert len(np.unique(expected)) > 5  # Else this would show little.
