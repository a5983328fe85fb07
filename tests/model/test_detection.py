"""The parts of two-stage detection: worked-out cases, and plain references in NumPy."""

import functools
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.model.boxes import decode_boxes
from deeplab2_like.model.detection.config import RoiConfig, RpnConfig
from deeplab2_like.model.detection.detector import Detector
from deeplab2_like.model.detection.instances import instance_targets
from deeplab2_like.model.detection.masks import mask_targets, paste_masks
from deeplab2_like.model.detection.matching import (
    crowd_share,
    match_boxes,
    sample_balanced,
    top_k_padded,
)
from deeplab2_like.model.detection.roi_heads import (
    BoxHead,
    MaskHead,
    box_losses,
    detect,
    mask_loss,
    sample_rois,
    select_masks,
)
from deeplab2_like.model.detection.roi_pooling import assign_levels, roi_align
from deeplab2_like.model.detection.rpn import RpnHead, make_anchors, propose, rpn_losses, sample_anchors
from deeplab2_like.model.random_numbers import random_uniform
from deeplab2_like.model.stages import compiled_stages

SEED = np.array([3, 5], np.int32)
SEEDS = SEED[None]  # Of one image.


# The table of instances.

# Class 1 and 3 are things: positions 0 and 1 among the things.
INFO = DatasetInfo(
    "made up",
    tuple(Category(id=k, name=f"class {k}", is_thing=k in (1, 3), color=(k, k, k)) for k in range(4)),
    label_divisor=100,
)
V = INFO.void
# Instances 101 (1 pixel), 102 (3 pixels, in two parts) and 301 (4 pixels); a crowd of class 3; stuff 0 and 200; void.
LABEL = np.array(
    [
        [0, 0, 0, 0, 0, 0],
        [0, 301, 301, 0, 102, V],
        [0, 301, 301, 0, 102, V],
        [101, 0, 0, 300, 300, 200],
        [102, 0, 0, 300, 0, 200],
    ],
    np.int32,
)


def table_of(label: np.ndarray, max_instances: int) -> dict[str, np.ndarray]:
    found = instance_targets(tf.constant(label), INFO, max_instances)
    return {name: value.numpy() for name, value in found.items()}


def test_instances_by_hand() -> None:
    found = table_of(LABEL, 4)
    np.testing.assert_array_equal(found["valid"], [True, True, True, False])
    np.testing.assert_array_equal(found["classes"], [1, 0, 0, 0])
    # The largest first; ends are exclusive; both parts of 102 are inside its box.
    np.testing.assert_array_equal(found["boxes"], [[1, 1, 3, 3], [1, 0, 5, 5], [3, 0, 4, 1], [0, 0, 0, 0]])
    expected = [
        [0, 0, 0, 0, 0, 0],
        [0, 1, 1, 0, 2, 0],
        [0, 1, 1, 0, 2, 0],
        [3, 0, 0, -1, -1, 0],
        [2, 0, 0, -1, 0, 0],
    ]
    np.testing.assert_array_equal(found["instance_map"], expected)
    assert {name: value.dtype.name for name, value in found.items()} == {
        "boxes": "float32",
        "classes": "int32",
        "valid": "bool",
        "instance_map": "int32",
    }


def test_instances_beyond_the_table_are_treated_like_crowd() -> None:
    found = table_of(LABEL, 2)
    assert found["valid"].all()
    np.testing.assert_array_equal(found["classes"], [1, 0])
    np.testing.assert_array_equal(found["instance_map"] == -1, (LABEL == 101) | (LABEL == 300))


@pytest.mark.parametrize("value", [0, V, 300])
def test_image_without_instances(value: int) -> None:
    found = table_of(np.full((4, 5), value, np.int32), 3)
    assert not found["valid"].any()
    np.testing.assert_array_equal(found["boxes"], np.zeros((3, 4)))
    np.testing.assert_array_equal(found["instance_map"], np.full((4, 5), -1 if value == 300 else 0))


def test_instances_have_static_shapes_in_a_graph() -> None:
    @tf.function(input_signature=[tf.TensorSpec([5, 6], tf.int32)])
    def make(label: tf.Tensor) -> dict[str, tf.Tensor]:
        return instance_targets(label, INFO, 7)

    shapes = {name: tuple(shape) for name, shape in make.get_concrete_function().output_shapes.items()}
    assert shapes == {"boxes": (7, 4), "classes": (7,), "valid": (7,), "instance_map": (5, 6)}


# Matching and sampling.


def batch(*rows: tuple[float, float, float, float]) -> np.ndarray:
    return np.array([rows], np.float32)


def test_matching_by_hand() -> None:
    truth = batch((0, 0, 4, 4), (0, 4, 4, 8), (9, 9, 9, 9))
    valid = np.array([[True, True, False]])
    # The first instance itself; half of the second (8 of 16) and nothing else; 8 of both, so the first of equals wins;
    # nothing; the box of the unused row.
    boxes = batch((0, 0, 4, 4), (0, 4, 4, 6), (0, 2, 4, 6), (20, 20, 30, 30), (9, 9, 9, 9))
    iou, row, is_best = match_boxes(boxes, truth, valid)
    np.testing.assert_allclose(iou, [[1, 0.5, 8 / 24, 0, 0]], rtol=1e-6)
    np.testing.assert_array_equal(row, [[0, 1, 0, 0, 0]])
    np.testing.assert_array_equal(is_best, [[True, True, False, False, False]])


def test_ties_for_the_best_overlap_all_count() -> None:
    truth = batch((0, 0, 4, 4))
    boxes = batch((0, 0, 4, 2), (0, 2, 4, 4), (0, 0, 4, 1))
    _, _, is_best = match_boxes(boxes, truth, np.array([[True]]))
    np.testing.assert_array_equal(is_best, [[True, True, False]])


def test_matching_in_parts_equals_matching_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    corner = rng.uniform(0, 50, (2, 40, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(1, 20, (2, 40, 2))], axis=-1).astype(np.float32)
    truth = boxes[:, :7] + 1
    valid = np.arange(7) < np.array([[7], [4]])
    at_once = match_boxes(boxes, truth, valid)
    monkeypatch.setattr("deeplab2_like.model.detection.matching._PAIRS_AT_ONCE", 80)  # Two instances at a time.
    for first, second in zip(at_once, match_boxes(boxes, truth, valid), strict=True):
        np.testing.assert_array_equal(first, second)
    assert set(np.unique(at_once[1][0])) == set(range(7))


def test_no_instance_matches_nothing() -> None:
    iou, _, is_best = match_boxes(batch((0, 0, 4, 4)), batch((0, 0, 4, 4)), np.array([[False]]))
    assert iou[0, 0] == 0
    assert not is_best[0, 0]


def test_crowd_share_counts_pixels() -> None:
    instance_map = np.zeros((2, 4, 6), np.int32)
    instance_map[0, 1:3, 2:4] = -1
    instance_map[1] = 5
    # All of the crowd in 4x4 pixels; the crowd alone; a row that is half crowd; half of the part of the box inside of
    # the image, whose height is 4; outside of the image.
    boxes = np.array([[[0, 1, 4, 5], [1, 2, 3, 4], [1, 2, 2, 6], [2, 2, 9, 4], [4, 6, 9, 9]]], np.float32)
    found = crowd_share(boxes, instance_map)
    np.testing.assert_allclose(found, [[4 / 16, 1, 2 / 4, 2 / 4, 0], [0] * 5])


def test_random_numbers_are_uniform_and_depend_on_the_seed() -> None:
    first = np.array(random_uniform(SEED, (100, 200)))
    np.testing.assert_array_equal(first, random_uniform(SEED, (100, 200)))
    assert first.min() >= 0
    assert first.max() < 1
    # 20000 values in ten bins: 2000 each, standard deviation 42.
    assert np.abs(np.histogram(first, bins=10, range=(0, 1))[0] - 2000).max() < 210
    for other in ([3, 6], [4, 5], [5, 3]):
        second = np.array(random_uniform(np.array(other, np.int32), (100, 200)))
        assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.04  # Standard deviation 0.007.
    assert abs(np.corrcoef(first[0], first[1])[0, 1]) < 0.3
    assert abs(np.corrcoef(first.ravel()[1:], first.ravel()[:-1])[0, 1]) < 0.04


@pytest.mark.parametrize(
    ("positives", "negatives", "expected"),
    [
        (10, 30, (4, 4)),  # Enough of both.
        (2, 30, (2, 6)),  # Negatives fill up.
        (10, 1, (4, 1)),  # Positives do not.
        (0, 0, (0, 0)),
    ],
)
def test_balanced_sampling(positives: int, negatives: int, expected: tuple[int, int]) -> None:
    positive = np.zeros((2, 50), bool)
    negative = np.zeros((2, 50), bool)
    positive[:, 5 : 5 + positives] = True
    negative[:, 20 : 20 + negatives] = True
    drawn = sample_balanced(positive, negative, number=8, max_positive=4, seeds=np.array([[3, 5], [4, 5]], np.int32))
    index, is_positive, valid = (np.array(value) for value in drawn)
    for image in range(2):
        assert (is_positive[image].sum(), valid[image].sum()) == (expected[0], sum(expected))
        assert not is_positive[image, expected[0] :].any()  # They come first.
        chosen = index[image, valid[image]]
        assert len(set(chosen)) == len(chosen)
        assert positive[image, chosen[: expected[0]]].all()
        assert negative[image, chosen[expected[0] :]].all()


def test_sampling_is_random_and_fair() -> None:
    positive, negative = np.zeros((1, 40), bool), np.ones((1, 40), bool)
    counts = np.zeros(40)
    for step in range(200):
        seeds = np.array([[0, step]], np.int32)
        index, _, _ = sample_balanced(positive, negative, number=10, max_positive=5, seeds=seeds)
        counts[np.array(index)] += 1
    # Each is drawn in a quarter of 200 draws: 50, standard deviation 6.
    assert counts.min() > 25
    assert counts.max() < 75


def test_sampling_of_an_image_does_not_depend_on_the_others() -> None:
    positive = np.random.default_rng(0).random((3, 40)) < 0.3
    seeds = np.array([[3, 5], [4, 5], [5, 5]], np.int32)
    whole, _, _ = sample_balanced(positive, ~positive, number=10, max_positive=5, seeds=seeds)
    for image in range(3):
        part = slice(image, image + 1)
        alone, _, _ = sample_balanced(positive[part], ~positive[part], number=10, max_positive=5, seeds=seeds[part])
        np.testing.assert_array_equal(alone, whole[part])
    # Images of equal boxes are sampled differently.
    index, _, _ = sample_balanced(positive[[0, 0]], ~positive[[0, 0]], number=10, max_positive=5, seeds=seeds[:2])
    assert not np.array_equal(index[0], index[1])


def test_top_k_of_too_few() -> None:
    values, index = top_k_padded(tf.constant([[1.0, 3.0]]), 4, fill=-9.0)
    np.testing.assert_array_equal(values, [[3, 1, -9, -9]])
    np.testing.assert_array_equal(index, [[1, 0, 0, 0]])


# Region proposal network.


def test_anchors_by_hand() -> None:
    # Ratios h/w of 1/4 and 1: half the size high, twice as wide. Centers at the top left of each 8x8 cell.
    maps = {"p3": np.zeros((1, 1, 2, 1)), "p4": np.zeros((1, 1, 1, 1))}
    found = make_anchors(maps, {"p3": 8, "p4": 16}, RpnConfig(anchor_sizes=(4.0, 8.0), anchor_ratios=(0.25, 1.0)))
    np.testing.assert_allclose(found["p3"], [[-1, -4, 1, 4], [-2, -2, 2, 2], [-1, 4, 1, 12], [-2, 6, 2, 10]])
    np.testing.assert_allclose(found["p4"], [[-2, -8, 2, 8], [-4, -4, 4, 4]])


def test_rpn_head_keeps_the_order_of_the_anchors() -> None:
    head = RpnHead(RpnConfig(channels=8))
    maps = {"p2": tf.zeros((2, 4, 5, 6)), "p3": tf.zeros((2, 2, 3, 6))}
    objectness, deltas = head(maps)
    assert {level: tuple(value.shape) for level, value in objectness.items()} == {"p2": (2, 60), "p3": (2, 18)}
    assert {level: tuple(value.shape) for level, value in deltas.items()} == {"p2": (2, 60, 4), "p3": (2, 18, 4)}
    # Without features only the biases are left: channel 4 k + j is number j of anchor k of every pixel.
    head.deltas.bias.assign(np.arange(12.0))
    head.objectness.bias.assign(np.arange(3.0))
    objectness, deltas = head(maps)
    np.testing.assert_array_equal(objectness["p3"][1], np.tile(np.arange(3), 6))
    np.testing.assert_array_equal(deltas["p3"][1], np.tile(np.arange(12).reshape(3, 4), (6, 1)))
    assert [variable.path.split("/", 1)[1] for variable in head.variables] == [
        f"{layer}/{kind}" for layer in ("conv", "objectness", "deltas") for kind in ("kernel", "bias")
    ]


def targets_by_hand() -> dict[str, np.ndarray]:
    """One instance of 16x16 pixels and a crowd of 16x16."""
    instance_map = np.zeros((1, 64, 64), np.int32)
    instance_map[0, :16, :16] = 1
    instance_map[0, 40:56, 40:56] = -1
    return {
        "boxes": batch((0, 0, 16, 16), (0, 0, 0, 0)),
        "classes": np.array([[1, 0]], np.int32),
        "valid": np.array([[True, False]]),
        "instance_map": instance_map,
    }


ANCHORS = batch(
    (0, 0, 16, 16),  # IoU 1.
    (0, 0, 16, 12),  # 0.75.
    (0, 0, 16, 8),  # 0.5: between the thresholds.
    (0, 0, 4, 16),  # 0.25: negative.
    (40, 40, 56, 56),  # Crowd.
    (40, 40, 56, 80),  # Crowd to two thirds of its part in the image.
    (20, 20, 60, 60),  # Crowd to 256 of 1600: negative.
)[0]


def test_sampled_anchors_by_hand() -> None:
    samples = sample_anchors(tf.constant(ANCHORS), targets_by_hand(), RpnConfig(samples=8), seeds=SEEDS)
    found = {name: np.array(value)[0] for name, value in samples.items()}
    assert found["valid"].sum() == 4
    assert set(found["index"][found["positive"]]) == {0, 1}
    assert set(found["index"][found["valid"] & ~found["positive"]]) == {3, 6}
    second = found["deltas"][found["index"] == 1][0]
    # From 12 columns around 6 to 16 around 8.
    np.testing.assert_allclose(second, [0, 2 / 12, 0, np.log(16 / 12)], atol=1e-6)


def test_an_instance_without_a_good_anchor_keeps_its_best() -> None:
    samples = sample_anchors(tf.constant(ANCHORS[3:]), targets_by_hand(), RpnConfig(samples=4), seeds=SEEDS)
    positive = np.array(samples["positive"])
    np.testing.assert_array_equal(np.array(samples["index"])[positive], [0])


def test_rpn_losses_by_hand() -> None:
    # A positive of probability 1/2, a negative of probability 1/4, one slot unused; 2 images.
    logits = np.array([[0, -np.log(3), 99.0]] * 2, np.float32)
    deltas = np.array([[[1, 2, 3, 4], [9, 9, 9, 9], [9, 9, 9, 9]]] * 2, np.float32)
    samples = {
        "index": np.array([[0, 1, 2]] * 2, np.int32),
        "valid": np.array([[True, True, False]] * 2),
        "positive": np.array([[True, False, False]] * 2),
        "deltas": np.array([[[1, 1, 1, 2], [0] * 4, [0] * 4]] * 2, np.float32),
    }
    fixed = rpn_losses(logits, deltas, samples, RpnConfig(normalizer="fixed"))
    np.testing.assert_allclose(fixed["rpn_class"], (2 * (np.log(2) + np.log(4 / 3)), 6), rtol=1e-6)
    np.testing.assert_allclose(fixed["rpn_box"], (2 * (1 + 2 + 2), 6), rtol=1e-6)
    sampled = rpn_losses(logits, deltas, samples, RpnConfig(normalizer="sampled"))
    assert {name: float(loss.normalizer) for name, loss in sampled.items()} == {"rpn_class": 4, "rpn_box": 4}


def test_proposals_by_hand() -> None:
    anchors = {
        "p2": tf.constant([[0, 0, 10, 10], [0, 1, 10, 11], [20, 20, 30, 30], [0, 40, 10, 50]], tf.float32),
        "p3": tf.constant([[0, 0, 10, 10], [-20, -20, -10, -10]], tf.float32),
    }
    objectness = {"p2": tf.constant([[1.0, 2.0, 0.5, -3.0]]), "p3": tf.constant([[1.5, 9.0]])}
    deltas = {level: tf.zeros((1, len(rows), 4)) for level, rows in anchors.items()}
    config = RpnConfig(test_candidates=3, proposals=5)
    found = propose(objectness, deltas, anchors, (32, 32), config)
    # p2: the last is not among the best three; the first falls to the second (IoU 90/110). p3: the same box as p2's
    # first stays, as levels do not suppress each other; the best one is outside of the image.
    np.testing.assert_array_equal(found["valid"][0], [True, True, True, False, False])
    np.testing.assert_array_equal(found["scores"][0], [2, 1.5, 0.5, 0, 0])
    np.testing.assert_allclose(found["boxes"][0, :3], [[0, 1, 10, 11], [0, 0, 10, 10], [20, 20, 30, 30]], atol=1e-5)
    np.testing.assert_array_equal(found["boxes"][0, 3:], np.zeros((2, 4)))
    config = RpnConfig(test_candidates=3, proposals=2)
    assert len(propose(objectness, deltas, anchors, (32, 32), config)["boxes"][0]) == 2


# RoIAlign.


def bilinear(features: np.ndarray, y: float, x: float) -> np.ndarray:
    """One sample of [h, w, C]: zero beyond one pixel outside of the map, else with its border repeated."""
    height, width, _ = features.shape
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(features.shape[-1])
    y, x = np.clip(y, 0, height - 1), np.clip(x, 0, width - 1)
    y0, x0 = int(y), int(x)
    y1, x1 = min(y0 + 1, height - 1), min(x0 + 1, width - 1)
    top = features[y0, x0] * (1 - (x - x0)) + features[y0, x1] * (x - x0)
    bottom = features[y1, x0] * (1 - (x - x0)) + features[y1, x1] * (x - x0)
    return top * (1 - (y - y0)) + bottom * (y - y0)


def plain_roi_align(features: np.ndarray, box: np.ndarray, stride: int, bins: int, ratio: int) -> np.ndarray:
    """RoIAlign of one box on one map, loop by loop."""
    start, size = box[:2] / stride - 0.5, (box[2:] - box[:2]) / stride / bins
    ny, nx = (ratio or int(np.ceil(side)) for side in size)
    out = np.zeros((bins, bins, features.shape[-1]))
    for i in range(bins):
        for j in range(bins):
            samples = [
                bilinear(features, start[0] + (i + (a + 0.5) / ny) * size[0], start[1] + (j + (b + 0.5) / nx) * size[1])
                for a in range(ny)
                for b in range(nx)
            ]
            out[i, j] = np.mean(samples, axis=0)
    return out


STRIDES = {"p2": 4, "p3": 8}


def small_pyramid(batch_size: int = 2, channels: int = 3) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        "p2": rng.standard_normal((batch_size, 12, 16, channels)).astype(np.float32),
        "p3": rng.standard_normal((batch_size, 6, 8, channels)).astype(np.float32),
    }


# In an image of 48x64: inside, over each border, tiny, and all of it. Two images.
ROIS = np.array(
    [
        [[3, 5, 21, 30], [-9, -9, 12, 12], [30, 40, 60, 80], [7, 7, 8, 9], [0, 0, 48, 64]],
        [[10, 0, 44, 9], [0, 50, 30, 64], [-30, -30, -20, -20], [1, 2, 3, 60], [20.5, 20.25, 40.75, 50.125]],
    ],
    np.float32,
)


@pytest.mark.parametrize("ratio", [0, 1, 2, 3])
def test_roi_align_equals_the_plain_loops(ratio: int) -> None:
    maps = small_pyramid()
    found = np.array(roi_align(maps, STRIDES, ROIS, output_size=3, sampling_ratio=ratio))
    assert found.shape == (2, 5, 3, 3, 3)
    for image in range(2):
        for roi, box in enumerate(ROIS[image]):
            # All of them are smaller than 112 pixels, which is where level 3 begins.
            expected = plain_roi_align(maps["p2"][image], box, 4, 3, ratio)
            np.testing.assert_allclose(found[image, roi], expected, atol=1e-5)


def test_roi_align_reads_the_level_that_suits_the_box() -> None:
    maps = {"p2": np.full((1, 64, 64, 1), 2.0), "p3": np.full((1, 32, 32, 1), 3.0), "p4": np.full((1, 16, 16, 1), 4.0)}
    boxes = batch((0, 0, 111, 111), (0, 0, 113, 113), (0, 0, 250, 250), (0, 0, 32, 256))
    found = roi_align(maps, {"p2": 4, "p3": 8, "p4": 16}, boxes, output_size=1)
    # 224 pixels are level 4, half of it level 3; the root of the last one's area is 90.
    np.testing.assert_array_equal(found[0, :, 0, 0, 0], [2, 3, 4, 2])


def test_levels_are_limited() -> None:
    boxes = batch((0, 0, 0, 0), (0, 0, 112, 112), (0, 0, 223, 224), (0, 0, 224, 224), (0, 0, 5000, 5000))
    np.testing.assert_array_equal(assign_levels(boxes, first=2, last=5), [[2, 3, 3, 4, 5]])


def test_adaptive_roi_align_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    maps = small_pyramid()
    at_once = roi_align(maps, STRIDES, ROIS, output_size=3, sampling_ratio=0)
    monkeypatch.setattr(
        "deeplab2_like.model.detection.roi_pooling._VALUES_AT_ONCE", 2 * 14 * 14 * 3
    )  # Two small boxes each.
    np.testing.assert_allclose(roi_align(maps, STRIDES, ROIS, output_size=3, sampling_ratio=0), at_once, atol=1e-6)


def test_adaptive_roi_align_of_long_boxes_is_exact() -> None:
    # 256 feature pixels in 2 bins, 128 samples each, and along the other axis 6 pixels, 3 samples each. The maps grow
    # by one along x or y, so the value of a bin is the coordinate of its center: that of feature pixel n is n.
    ramp = np.arange(256, dtype=np.float32)
    along_x = np.broadcast_to(ramp[None, None, :, None], (1, 256, 256, 1))
    wide, tall = batch((40, 0, 64, 1024)), batch((0, 40, 1024, 64))
    options: dict[str, Any] = {"output_size": 2, "sampling_ratio": 0, "max_sampling_ratio": 128}
    found = roi_align({"p2": along_x}, STRIDES, wide, **options)
    np.testing.assert_allclose(found[0, 0, :, :, 0], [[63.5, 191.5]] * 2, atol=1e-3)
    found = roi_align({"p2": along_x.transpose(0, 2, 1, 3)}, STRIDES, tall, **options)
    np.testing.assert_allclose(found[0, 0, :, :, 0], np.transpose([[63.5, 191.5]] * 2), atol=1e-3)
    # A pixel that 8 samples per bin would leave out: 1 of 128 pixels along x, in each of the three rows of a bin.
    dot = np.zeros((1, 256, 256, 1), np.float32)
    dot[0, :, 101] = 128
    found = roi_align({"p2": dot}, STRIDES, wide, **options)
    np.testing.assert_allclose(found[0, 0, :, :, 0], [[1, 0]] * 2, atol=1e-3)


def test_adaptive_roi_align_beyond_its_limit_reads_evenly() -> None:
    # A ramp along x: its mean over a bin is known. 16 pixels in one bin, of which 2 + 2 are read.
    ramp = np.tile(np.arange(16, dtype=np.float32)[:, None], (12, 1, 1))[None]
    found = roi_align(
        {"p2": ramp}, STRIDES, batch((0, 0, 48, 64)), output_size=1, sampling_ratio=0, max_sampling_ratio=2
    )
    np.testing.assert_allclose(found[0, 0, 0, 0, 0], 7.5, atol=2)


@pytest.mark.parametrize("ratio", [0, 2])
def test_gradient_of_roi_align(ratio: int) -> None:
    # RoIAlign is linear in the features: the slope along any direction is the value of that direction itself.
    maps = {level: tf.constant(values) for level, values in small_pyramid().items()}
    upstream = np.random.default_rng(1).standard_normal((2, 5, 3, 3, 3)).astype(np.float32)

    def total(features: dict[str, tf.Tensor]) -> tf.Tensor:
        return ops.sum(roi_align(features, STRIDES, ROIS, output_size=3, sampling_ratio=ratio) * upstream)

    with tf.GradientTape() as tape:
        tape.watch(maps)
        value = total(maps)
    gradient = tape.gradient(value, maps)
    for position in ((0, 0, 0, 0), (0, 3, 5, 1), (1, 11, 15, 2), (1, 5, 4, 0)):
        unit = np.zeros(maps["p2"].shape, np.float32)
        unit[position] = 1
        slope = total({"p2": tf.constant(unit), "p3": tf.zeros_like(maps["p3"])})
        np.testing.assert_allclose(gradient["p2"][position], slope, atol=1e-4)
    np.testing.assert_array_equal(gradient["p3"], np.zeros(maps["p3"].shape))
    assert np.abs(gradient["p2"]).max() > 0.1


def test_roi_align_keeps_the_type_of_the_features() -> None:
    maps = {level: tf.cast(values, tf.bfloat16) for level, values in small_pyramid().items()}
    rounded = {level: tf.cast(values, tf.float32) for level, values in maps.items()}
    for ratio in (0, 2):
        found = roi_align(maps, STRIDES, ROIS, output_size=3, sampling_ratio=ratio)
        assert found.dtype == tf.bfloat16
        expected = roi_align(rounded, STRIDES, ROIS, output_size=3, sampling_ratio=ratio)
        np.testing.assert_allclose(tf.cast(found, tf.float32), expected, atol=0.03)


# Heads.


def test_sampled_rois_by_hand() -> None:
    proposals = {
        "boxes": batch((0, 0, 16, 10), (0, 0, 16, 4), (30, 30, 60, 60), (40, 40, 56, 56), (0, 0, 16, 16)),
        "valid": np.array([[True, True, True, True, False]]),
    }
    config = RoiConfig(samples=8, foreground_share=0.5)
    samples = sample_rois(proposals, targets_by_hand(), config, num_classes=3, seeds=SEEDS)
    found = {name: np.array(value)[0] for name, value in samples.items()}
    # Foreground: the first (IoU 10/16) and the instance's own box; background: the second (4/16) and the third. The
    # fourth is crowd, the fifth and the second row of the table are unused.
    assert found["valid"].sum() == 4
    assert {tuple(box) for box in found["boxes"][found["foreground"]]} == {(0, 0, 16, 10), (0, 0, 16, 16)}
    background = found["valid"] & ~found["foreground"]
    assert {tuple(box) for box in found["boxes"][background]} == {(0, 0, 16, 4), (30, 30, 60, 60)}
    np.testing.assert_array_equal(found["classes"][found["foreground"]], [1, 1])
    assert set(found["classes"][background]) == {3}
    np.testing.assert_array_equal(found["row"][found["foreground"]], [0, 0])
    np.testing.assert_array_equal(found["matched_boxes"][found["foreground"]], [[0, 0, 16, 16]] * 2)
    assert not found["foreground"][4:].any()


def test_an_image_without_instances_gives_background_only() -> None:
    targets = targets_by_hand()
    targets["valid"] = np.zeros((1, 2), bool)
    proposals = {"boxes": batch((0, 0, 16, 16), (2, 2, 30, 30)), "valid": np.ones((1, 2), bool)}
    config = RoiConfig(samples=4, foreground_share=0.5)
    samples = sample_rois(proposals, targets, config, num_classes=3, seeds=SEEDS)
    assert not np.any(samples["foreground"])
    assert np.sum(samples["valid"]) == 2
    losses = box_losses(tf.zeros((1, 4, 4)), tf.zeros((1, 4, 3, 4)), samples, config)
    np.testing.assert_allclose(losses["box_class"], (2 * np.log(4), 2), rtol=1e-6)
    assert float(losses["box"].total) == 0
    loss = mask_loss(
        tf.zeros((1, 2, 4, 4, 3)), np.zeros((1, 2, 4, 4), bool), samples["classes"][:, :2], np.zeros((1, 2))
    )
    assert (float(loss.total), float(loss.normalizer)) == (0, 0)


def test_box_losses_by_hand() -> None:
    samples = {
        "boxes": batch((0, 0, 10, 10), (0, 0, 10, 10), (0, 0, 10, 10)),
        "matched_boxes": batch((1, 0, 11, 10), (0, 0, 9, 9), (0, 0, 9, 9)),
        "classes": np.array([[1, 2, 2]], np.int32),  # The second is background; the third is unused.
        "foreground": np.array([[True, False, False]]),
        "valid": np.array([[True, True, False]]),
    }
    # Equal logits: the logarithm of three classes each. The true class's delta dy is 0.5 instead of 0.1 * 10.
    deltas = np.zeros((1, 3, 2, 4), np.float32)
    deltas[:, :, 0] = 7
    deltas[:, :, 1, 0] = 0.5
    losses = box_losses(np.zeros((1, 3, 3), np.float32), deltas, samples, RoiConfig())
    np.testing.assert_allclose(losses["box_class"], (2 * np.log(3), 2), rtol=1e-6)
    np.testing.assert_allclose(losses["box"], (0.5, 2), rtol=1e-5)


def test_heads_have_the_shapes_and_names_that_checkpoints_rely_on() -> None:
    config = RoiConfig(box_channels=16, mask_channels=8, mask_convolutions=2)
    box_head = BoxHead(config, num_classes=3)
    class_logits, deltas = box_head(tf.zeros((2, 5, 7, 7, 4)))
    assert (tuple(class_logits.shape), tuple(deltas.shape)) == ((2, 5, 4), (2, 5, 3, 4))
    mask_head = MaskHead(config, num_classes=3)
    assert tuple(mask_head(tf.zeros((2, 5, 14, 14, 4))).shape) == (2, 5, 28, 28, 3)
    names = [variable.path.split("/", 1)[1] for variable in (*box_head.variables, *mask_head.variables)]
    layers = ("dense1", "dense2", "classes", "deltas", "conv1", "conv2", "enlarge", "masks")
    assert names == [f"{layer}/{kind}" for layer in layers for kind in ("kernel", "bias")]


def test_mask_of_a_class() -> None:
    logits = np.random.default_rng(0).standard_normal((1, 2, 4, 4, 3)).astype(np.float32)
    found = select_masks(logits, np.array([[2, 0]], np.int32))
    np.testing.assert_array_equal(found, np.stack([logits[:, 0, ..., 2], logits[:, 1, ..., 0]], axis=1))


def test_mask_loss_by_hand() -> None:
    # The first RoI: half of the pixels right with probability 3/4, half wrong. The second does not count.
    logits = np.full((1, 2, 2, 2, 2), np.log(3), np.float32)
    targets = np.array([[[[True, True], [False, False]]] * 2])
    loss = mask_loss(logits, targets, np.zeros((1, 2), np.int32), np.array([[True, False]]))
    np.testing.assert_allclose(loss, ((np.log(4 / 3) + np.log(4)) / 2, 1), rtol=1e-6)


@pytest.mark.parametrize("ratio", [0, 2])
def test_mask_targets_are_roi_align_of_the_bit_mask(ratio: int) -> None:
    rng = np.random.default_rng(0)
    instance_map = rng.integers(-1, 4, (2, 6, 8)).repeat(6, axis=1).repeat(7, axis=2).astype(np.int32)  # [2, 36, 56]
    corner = rng.uniform(-5, 30, (2, 6, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(3, 30, (2, 6, 2))], axis=-1).astype(np.float32)
    row = rng.integers(0, 3, (2, 6)).astype(np.int32)
    found = np.array(mask_targets(instance_map, boxes, row, output_size=7, sampling_ratio=ratio))
    for image in range(2):
        for roi in range(6):
            mask = (instance_map[image] == row[image, roi] + 1)[..., None].astype(float)
            share = plain_roi_align(mask, boxes[image, roi], 1, 7, ratio)[..., 0]
            clear = np.abs(share - 0.5) > 1e-4  # Rounding decides the others.
            np.testing.assert_array_equal(found[image, roi][clear], share[clear] > 0.5)
    assert 0.05 < found.mean() < 0.6


# Inference.


def test_detections_by_hand() -> None:
    boxes = batch((0, 0, 10, 10), (0, 1, 10, 11), (20, 20, 30, 30), (0, 0, 10, 10))
    proposals = {"boxes": boxes, "valid": np.array([[True, True, True, False]])}
    probability = np.array([[[0.5, 0.3, 0.2], [0.6, 0.02, 0.38], [0.04, 0.03, 0.93], [0.9, 0.05, 0.05]]])
    found = detect(
        np.log(probability).astype(np.float32),
        np.zeros((1, 4, 2, 4), np.float32),
        proposals,
        (32, 8),
        RoiConfig(detections=3),
    )
    # Class 0: the second (0.6) suppresses the first (0.5), IoU 70/80 after clipping; class 1: the first, 0.3. The third
    # is below the threshold, and the fourth is unused.
    np.testing.assert_allclose(found["scores"], [[0.6, 0.3, 0]], rtol=1e-5)
    np.testing.assert_array_equal(found["classes"], [[0, 1, 0]])
    np.testing.assert_array_equal(found["proposal"], [[1, 0, 0]])
    np.testing.assert_array_equal(found["valid"], [[True, True, False]])
    np.testing.assert_allclose(found["boxes"], [[[0, 1, 10, 8], [0, 0, 10, 8], [0, 0, 0, 0]]], atol=1e-5)


def test_detections_use_the_deltas_of_their_class() -> None:
    deltas = np.zeros((1, 1, 2, 4), np.float32)
    deltas[0, 0, 1] = (1, -1, 0.5, 0.25)
    proposals = {"boxes": batch((10, 10, 20, 20)), "valid": np.array([[True]])}
    weights = (10.0, 10.0, 5.0, 5.0)
    config = RoiConfig(box_weights=weights)
    found = detect(np.array([[[0.0, 9, 0]]], np.float32), deltas, proposals, (64, 64), config, max_detections=1)
    np.testing.assert_allclose(found["boxes"][0], decode_boxes(deltas[0, :, 1], proposals["boxes"][0], weights))


def test_scores_have_a_gradient_in_training_and_are_the_same() -> None:
    rpn = RpnConfig(channels=8, anchor_sizes=(16.0, 32.0), train_candidates=20, test_candidates=20, proposals=20)
    roi = RoiConfig(samples=8, box_channels=8, mask_channels=8, mask_convolutions=1, detections=5)
    detector = Detector(rpn, roi, num_classes=2, strides={"p2": 4, "p3": 8}, roi_levels=("p2", "p3"))
    rng = np.random.default_rng(0)
    maps = {
        level: tf.constant(rng.standard_normal((1, 64 // stride, 64 // stride, 8)), tf.float32)
        for level, stride in (("p2", 4), ("p3", 8))
    }
    expected = detector(maps, image_size=(64, 64))
    with tf.GradientTape() as tape:
        tape.watch(maps)
        found = detector(maps, image_size=(64, 64), targets=targets_by_hand(), max_detections=5)
        total = ops.sum(found["scores"])
    assert np.all(expected["scores"] > 0)
    for name in ("boxes", "scores", "thing_classes", "masks"):
        np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)
    gradients = tape.gradient(total, [*maps.values(), *(v.value for v in detector.box_head.trainable_variables)])
    assert sum(float(np.abs(gradient).sum()) for gradient in gradients[:2]) > 0
    # All layers of the box head but that of the deltas, which is the last.
    assert all(np.abs(gradient).max() > 0 for gradient in gradients[2:-2])
    assert gradients[-2:] == [None, None]


def test_pasting_by_hand() -> None:
    # 2x2 values over 4x4 pixels from (1, 2). Along each axis the four pixels read 3/4, 3/4, 1/4 and nothing of the
    # first value, as the outer ones lie partly among the zeros outside: 9/16 in the first 2x2 pixels, else less.
    probability = np.array([[[[1, 0], [0, 0]]]], np.float32)
    found = np.array(paste_masks(probability, batch((1, 2, 5, 6)), 6, 8))
    expected = np.zeros((6, 8), bool)
    expected[1:3, 2:4] = True
    np.testing.assert_array_equal(found[0, 0], expected)
    assert not np.any(paste_masks(probability, batch((1, 2, 5, 6)), 6, 8, threshold=0.57))


def test_a_full_mask_fills_its_box() -> None:
    boxes = batch((2, 3, 12, 20), (-5, 10, 4, 40), (3, 3, 3, 3), (0, 0, 0, 0))
    found = np.array(paste_masks(np.ones((1, 4, 28, 28), np.float32), boxes, 16, 24))[0]
    expected = np.zeros((4, 16, 24), bool)
    expected[0, 2:12, 3:20] = True
    expected[1, :4, 10:] = True
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["graph", "stages", "compiled"])
def test_everything_runs_in_a_graph_of_unknown_sizes(mode: str) -> None:
    rpn = RpnConfig(channels=8, anchor_sizes=(16.0, 32.0, 64.0), proposals=20, test_candidates=30)
    roi = RoiConfig(detections=5, box_channels=8, mask_channels=8, mask_convolutions=1)
    rpn_head, box_head, mask_head = RpnHead(rpn), BoxHead(roi, num_classes=2), MaskHead(roi, num_classes=2)
    strides = {"p2": 4, "p3": 8, "p4": 16}

    def infer(features: dict[str, tf.Tensor], size: tf.Tensor) -> dict[str, Any]:
        image_size = (size[0], size[1])
        objectness, deltas = rpn_head(features)
        anchors = make_anchors(features, strides, rpn)
        proposals = propose(objectness, deltas, anchors, image_size, rpn)
        pooled = roi_align(features, strides, proposals["boxes"], output_size=7)
        found = detect(*box_head(pooled), proposals, image_size, roi)
        pooled = roi_align(features, strides, found["boxes"], output_size=14)
        masks = ops.sigmoid(select_masks(mask_head(pooled), found["classes"]))
        return {"masks": masks, "pasted": paste_masks(masks, found["boxes"], *image_size), **found}

    rng = np.random.default_rng(0)
    maps = {
        level: tf.constant(rng.standard_normal((2, 32 // stride, 48 // stride, 4)), tf.float32)
        for level, stride in strides.items()
    }
    size = tf.constant([30, 45])
    eager = infer(maps, size)
    assert eager["pasted"].shape == (2, 5, 30, 45)
    assert np.all(eager["valid"])
    signature = [{level: tf.TensorSpec([None, None, None, 4]) for level in maps}, tf.TensorSpec([2], tf.int32)]
    if mode == "graph":
        found = tf.function(infer, input_signature=signature, autograph=False)(maps, size)
    elif mode == "stages":
        with compiled_stages(functools.partial(tf.function, jit_compile=True, autograph=False)):
            found = tf.function(infer, input_signature=signature, autograph=False)(maps, size)
    else:
        # The compiler must know the sizes of results.
        graph = tf.function(lambda features: infer(features, np.array([30, 45])), jit_compile=True, autograph=False)
        found = graph(maps)
    np.testing.assert_array_equal(found["pasted"], eager["pasted"])
    np.testing.assert_allclose(found["boxes"], eager["boxes"], atol=1e-3)
    np.testing.assert_allclose(found["scores"], eager["scores"], atol=1e-5)


def test_training_step_has_finite_gradients_for_every_variable() -> None:
    strides = {"p2": 4, "p3": 8}
    rpn = RpnConfig(channels=8, anchor_sizes=(16.0, 32.0), samples=32, train_candidates=50, proposals=30)
    roi = RoiConfig(samples=16, box_channels=8, mask_channels=8, mask_convolutions=1)
    layers: list[keras.layers.Layer] = [RpnHead(rpn), BoxHead(roi, num_classes=2), MaskHead(roi, num_classes=2)]
    rpn_head, box_head, mask_head = layers
    rng = np.random.default_rng(0)
    maps = {
        level: tf.constant(rng.standard_normal((1, 64 // stride, 64 // stride, 8)), tf.float32)
        for level, stride in strides.items()
    }
    targets = targets_by_hand()

    @tf.function(jit_compile=True, autograph=False)
    def step(seeds: tf.Tensor) -> tuple[dict[str, tf.Tensor], list[tf.Tensor]]:
        with tf.GradientTape() as tape:
            objectness, deltas = rpn_head(maps)
            anchors = make_anchors(maps, strides, rpn)
            samples = sample_anchors(ops.concatenate(list(anchors.values())), targets, rpn, seeds=seeds)
            losses = rpn_losses(
                ops.concatenate(list(objectness.values()), axis=1),
                ops.concatenate(list(deltas.values()), axis=1),
                samples,
                rpn,
            )
            proposals = propose(objectness, deltas, anchors, (64, 64), rpn, training=True)
            rois = sample_rois(proposals, targets, roi, num_classes=2, seeds=seeds)
            pooled = roi_align(maps, strides, rois["boxes"], output_size=7)
            losses |= box_losses(*box_head(pooled), rois, roi)
            boxes, row = rois["boxes"][:, :4], rois["row"][:, :4]
            pooled = roi_align(maps, strides, boxes, output_size=14)
            masks = mask_targets(targets["instance_map"], boxes, row)
            losses["mask"] = mask_loss(mask_head(pooled), masks, rois["classes"][:, :4], rois["foreground"][:, :4])
            total = ops.sum(ops.stack([loss.total / loss.normalizer for loss in losses.values()]))
        variables = [variable.value for layer in layers for variable in layer.trainable_variables]
        return {name: loss.total for name, loss in losses.items()}, tape.gradient(total, variables)

    for layer, inputs in zip(layers, (maps, tf.zeros((1, 1, 7, 7, 8)), tf.zeros((1, 1, 14, 14, 8))), strict=True):
        layer(inputs)
    losses, gradients = step(tf.constant(SEEDS))
    assert set(losses) == {"rpn_class", "rpn_box", "box_class", "box", "mask"}
    assert all(np.isfinite(value) and value > 0 for value in losses.values())
    for gradient in gradients:
        assert np.isfinite(gradient).all()
        assert np.abs(gradient).max() > 0


def test_initial_kernels_are_those_of_detectron2() -> None:
    rpn = RpnHead(RpnConfig(channels=64))
    rpn({"p2": np.zeros((1, 2, 2, 64), np.float32)})
    roi = RoiConfig(box_channels=128, mask_channels=64, mask_convolutions=2)
    box, mask = BoxHead(roi, num_classes=40), MaskHead(roi, num_classes=40)
    box(np.zeros((1, 1, 7, 7, 16), np.float32))
    mask(np.zeros((1, 1, 4, 4, 32), np.float32))
    kernels = {
        "rpn conv": (rpn.conv, 0.01),
        "rpn deltas": (rpn.deltas, 0.01),
        # Xavier fill of Caffe2: uniform with variance 1 / fan-in.
        "box dense1": (box.hidden[0], (1 / (7 * 7 * 16)) ** 0.5),
        "box dense2": (box.hidden[1], (1 / 128) ** 0.5),
        "box classes": (box.classes, 0.01),
        "box deltas": (box.deltas, 0.001),
        # MSRA fill: normal with variance 2 / fan-out. PyTorch counts the inputs of a transposed convolution as fan-out.
        "mask conv1": (mask.convolutions[0], (2 / (9 * 64)) ** 0.5),
        "mask conv2": (mask.convolutions[1], (2 / (9 * 64)) ** 0.5),
        "mask upsample": (mask.upsample, (2 / (4 * 64)) ** 0.5),
        "masks": (mask.masks, 0.001),
    }
    for name, (layer, deviation) in kernels.items():
        # Of at least 768 values: standard deviation at most 2.6 %.
        assert layer.kernel.numpy().std() == pytest.approx(deviation, rel=0.1), name
        assert not layer.bias.numpy().any(), name
    # A uniform distribution ends at the square root of 3 standard deviations.
    assert np.abs(box.hidden[1].kernel).max() <= (3 / 128) ** 0.5
    # No two layers start with the same numbers.
    first = [float(layer.kernel.numpy().ravel()[0] / deviation) for layer, deviation in kernels.values()]
    assert len({round(value, 4) for value in first}) == len(first)


def test_config_defaults() -> None:
    assert RoiConfig().foreground_samples == 128
    assert len(RpnConfig().anchor_sizes) == 5
