"""Parts of the unifying system on cases worked out by hand."""

import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from system_contract import INFO

from deeplab2_like.model import overlaps
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.unifying.config import SemanticConfig
from deeplab2_like.model.unifying.losses import match_detections, matching_loss, slot_targets
from deeplab2_like.model.unifying.network import AffinityHead, SqueezeExcitation
from deeplab2_like.model.unifying.postprocess import argmax_over_slots
from deeplab2_like.model.unifying.potential import affinity_update, dynamic_potential

# --- dynamic potential ------------------------------------------------------------------------------------------------

# Probabilities of one line of three cells, of classes 0 (stuff), 1 (stuff) and 2 (things).
PROBABILITY = np.array([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]], np.float32)


def potential(variant: str, masks: list[float] | None = None) -> np.ndarray:
    """Of one detection of class 2, score 0.5, around the last two cells of stride 4, and one row that is not used."""
    found = dynamic_potential(
        tf.constant(np.log(PROBABILITY)[None, None]),
        tf.constant([[[0.0, 4.0, 4.0, 12.0], [0.0, 0.0, 4.0, 12.0]]]),
        tf.constant([[0.5, 0.0]]),
        tf.constant([[2, 2]]),
        None if masks is None else tf.constant([[[masks, masks]] * 2], tf.float32),
        stuff_classes=(0, 1),
        stride=4,
        potential=variant,
    )
    return found.numpy()[0, :, 0].T  # [cells, slots]


@pytest.mark.parametrize("variant", ["b", "c"])
def test_potential_of_boxes(variant: str) -> None:
    """Without masks b and c are the same: score times probability inside, nothing outside; stuff has its own."""
    expected = [[0, 0, 0.5, 0.3], [0.4, 0, 0.1, 0.1], [0.3, 0, 0.2, 0.2]]
    np.testing.assert_allclose(potential(variant), expected, atol=1e-6)


def test_potential_of_boxes_and_masks() -> None:
    """A mask of two equal lines of two bins, 0.5 and 0.9, one for each cell of the box."""
    expected = [[0, 0, 0.5, 0.3], [0.5 * 0.8 * 0.5, 0, 0.1, 0.1], [0.5 * 0.6 * 0.9, 0, 0.2, 0.2]]
    np.testing.assert_allclose(potential("b", [0.5, 0.9]), expected, atol=1e-6)
    expected = [[0, 0, 0.5, 0.3], [0.5 * (0.8 + 0.5), 0, 0.1, 0.1], [0.5 * (0.6 + 0.9), 0, 0.2, 0.2]]
    np.testing.assert_allclose(potential("c", [0.5, 0.9]), expected, atol=1e-6)


def test_potential_of_logits() -> None:
    """Variant a: logits inside, zero outside, no score; a mask of 0.5 has the logit 0, one of 0.9 ln 9."""
    found = potential("a", [0.5, 0.9])
    np.testing.assert_allclose(found[:, 0], [0, np.log(0.8), np.log(0.6) + np.log(9)], atol=1e-5)
    assert (found[:, 1] == -1e3).all()
    np.testing.assert_allclose(found[:, 2:], np.log(PROBABILITY[:, :2]), atol=1e-6)


def interpolated(mask: np.ndarray, y: float, x: float) -> float:
    """Between the bins of a mask, with zeros around them; whole numbers are middles of bins."""
    total = 0.0
    for row, column in np.ndindex(*mask.shape):
        total += max(1 - abs(y - row), 0) * max(1 - abs(x - column), 0) * mask[row, column]
    return total


@pytest.mark.parametrize("variant", ["a", "b", "c"])
@pytest.mark.parametrize("with_masks", [True, False])
@pytest.mark.parametrize("with_affinities", [True, False])
@pytest.mark.parametrize("with_matrices", [True, False])
def test_argmax_over_slots_is_that_of_all_planes(
    variant: str, with_masks: bool, with_affinities: bool, with_matrices: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against each slot at full size on its own: an image of 9x14, cells of 4 pixels, classes 0 and 2 are stuff."""
    monkeypatch.setattr(overlaps, "BLOCK", 4)  # So that there are windows in this small image.
    random = np.random.default_rng(3)
    logits = random.normal(size=(1, 3, 4, 4)).astype(np.float32)
    boxes = np.array([[[1.0, 2, 7, 9], [0, 5, 9, 14], [0, 0, 9, 14], [0, 0, 9, 14]]], np.float32)
    scores, classes = np.array([[0.9, 0.6, 0.4, 0]], np.float32), np.array([[1, 3, 1, 3]], np.int32)
    masks = random.uniform(size=(1, 4, 3, 3)).astype(np.float32)
    update = 0.3 * random.uniform(size=(1, 6, 3, 4)).astype(np.float32)
    detections = {"boxes": boxes, "scores": scores, "classes": classes} | ({"masks": masks} if with_masks else {})
    found = argmax_over_slots(
        tf.constant(logits),
        {name: tf.constant(value) for name, value in detections.items()},
        tf.constant(update) if with_affinities else None,
        Geometry((9, 14)).upsampling_matrices((3, 4), stride=4) if with_matrices else None,
        pixels_per_cell=(4.0, 4.0),
        height=9,
        width=14,
        stride=4,
        stuff_classes=(0, 2),
        potential=variant,
    )

    values = logits if variant == "a" else tf.nn.softmax(logits).numpy()
    values = tf.image.resize(values, (12, 16)).numpy()[0, :9, :14]
    added = tf.image.resize(update.transpose(0, 2, 3, 1), (12, 16)).numpy()[0, :9, :14] * with_affinities
    expected = np.zeros((9, 14), int)
    for row, column in np.ndindex(9, 14):
        slots = []
        for slot in range(3):
            top, left, bottom, right = boxes[0, slot]
            value, score = values[row, column, classes[0, slot]], scores[0, slot]
            if with_masks:
                y, x = (row + 0.5 - top) / (bottom - top) * 3 - 0.5, (column + 0.5 - left) / (right - left) * 3 - 0.5
                mask = interpolated(masks[0, slot], y, x)
                share = np.clip(mask, 0.01, 0.99)
                value = {"a": value + np.log(share / (1 - share)), "b": value * mask, "c": value + mask}[variant]
            is_inside = top <= row + 0.5 < bottom and left <= column + 0.5 < right
            slots.append(value * is_inside * (1 if variant == "a" else score) + added[row, column, slot])
        slots.append(-np.inf)  # The detection that is not used.
        slots += [values[row, column, class_id] + added[row, column, 4 + i] for i, class_id in enumerate((0, 2))]
        expected[row, column] = np.argmax(slots)
    np.testing.assert_array_equal(found[0], expected)
    assert len(np.unique(expected)) > 2


def upsampled(maps: np.ndarray, geometry: Geometry, stride: int) -> np.ndarray:
    """Upsamples maps, [B, K, h, w], to the network size and from there to the image: [B, K, H, W]."""
    for sizes in (geometry.network_size or geometry.image_size, geometry.image_size):
        for axis, size in zip((2, 3), sizes, strict=True):
            scale = stride if stride > 1 else size / maps.shape[axis]
            position = np.clip((np.arange(size) + 0.5) / scale - 0.5, 0, maps.shape[axis] - 1)
            first = np.floor(position).astype(int)
            second = np.minimum(first + 1, maps.shape[axis] - 1)
            weight = (position - first).reshape((-1, 1) if axis == 2 else (-1,))
            maps = maps.take(first, axis) * (1 - weight) + maps.take(second, axis) * weight
        stride = 1
    return maps


@pytest.mark.parametrize("variant", ["a", "b", "c"])
@pytest.mark.parametrize("network_size", [None, (190, 60), (70, 50)])
def test_detections_reach_beyond_their_boxes(
    variant: str, network_size: tuple[int, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small boxes in a high image with affinities: the windows must hold every pixel that a detection wins."""
    monkeypatch.setattr(overlaps, "BLOCK", 4)
    geometry, stride, reached = Geometry((150, 40), network_size), 4, np.zeros(2)
    height, width = network_size or geometry.image_size
    for seed in range(6):
        random = np.random.default_rng(seed)
        cells = (-(-height // 32) * 8, -(-width // 32) * 8)
        logits = 2 * random.normal(size=(2, *cells, 4)).astype(np.float32)
        scores = random.uniform(0.3, 1, (2, 5)).astype(np.float32) * (random.uniform(size=(2, 5)) < 0.8)
        top = random.uniform(0, 130, (2, 5, 2)) * (1, 0.2)
        boxes = np.concatenate([top, top + random.uniform(3, 20, (2, 5, 2))], axis=-1).astype(np.float32)
        classes = random.choice([1, 3], (2, 5)).astype(np.int32)
        # The update of a detection is large in a few lines of cells only, of every other one in a few columns, too.
        update = random.uniform(0, 0.2, (2, 7, *cells)).astype(np.float32)
        update[:, :5] *= 4 * (random.uniform(size=(2, 5, cells[0], 1)) < 0.1)
        update[:, :5:2] *= random.uniform(size=(2, 3, 1, cells[1])) < 0.2
        found = argmax_over_slots(
            tf.constant(logits),
            {"boxes": tf.constant(boxes), "scores": tf.constant(scores), "classes": tf.constant(classes)},
            tf.constant(update),
            geometry.upsampling_matrices(cells, stride=stride) if network_size else None,
            pixels_per_cell=stride / geometry.scale,
            height=150,
            width=40,
            stride=stride,
            stuff_classes=(0, 2),
            potential=variant,
        ).numpy()

        of_class = (logits if variant == "a" else tf.nn.softmax(logits).numpy()).transpose(0, 3, 1, 2)
        values = upsampled(of_class, geometry, 4)
        added = upsampled(update, geometry, 4)
        y, x = np.arange(150)[:, None] + 0.5, np.arange(40) + 0.5
        planes = np.full((2, 7, 150, 40), -np.inf)
        for image, slot in np.ndindex(2, 5):
            top, left, bottom, right = boxes[image, slot]
            is_inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
            if scores[image, slot] > 0:
                own = values[image, classes[image, slot]] * (1 if variant == "a" else scores[image, slot])
                planes[image, slot] = own * is_inside + added[image, slot]
                won = found[image] == slot
                reached += won[~is_inside.any(axis=1)].sum(), won[:, ~is_inside.any(axis=0)].sum()
        planes[:, 5:] = values[:, [0, 2]] + added[:, 5:]
        # Rounding may swap slots that are equally good.
        best = np.take_along_axis(planes, found[:, None], axis=1)[:, 0]
        np.testing.assert_allclose(best, planes.max(axis=1), atol=1e-5)
    assert (reached > 100).all()  # Else this test would show nothing.


# --- affinities -------------------------------------------------------------------------------------------------------


def test_affinities_equal_the_explicit_product() -> None:
    random = np.random.default_rng(0)
    query, key = random.random((2, 2, 4, 5, 6)).astype(np.float32)
    psi = random.random((2, 7, 4, 5)).astype(np.float32)
    affinity = query.reshape(2, 20, 6) @ key.reshape(2, 20, 6).transpose(0, 2, 1)  # [B, pixels, pixels]
    expected = np.einsum("bpq,bkq->bkp", affinity, psi.reshape(2, 7, 20)).reshape(psi.shape)
    found = affinity_update(*map(tf.constant, (psi, query, key)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_affinities_reach_beyond_a_box() -> None:
    """Four pixels of two objects; the box of the first object misses one of its pixels, and affinity finds it."""
    psi = np.array([[0.9, 0.0, 0.1], [0.0, 0.0, 0.2], [0.0, 0.9, 0.1], [0.0, 0.9, 0.1]], np.float32)
    feature = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)  # The object of each pixel.
    factors = (tf.constant(x[None, None]) for x in (feature, feature / 2))
    found = psi + affinity_update(tf.constant(psi.T[None, :, None]), *factors).numpy()[0, :, 0].T
    np.testing.assert_array_equal(psi.argmax(axis=-1), [0, 2, 1, 1])
    np.testing.assert_array_equal(found.argmax(axis=-1), [0, 0, 1, 1])
    # The second pixel: 0 + (0.9 + 0) / 2 of the object, 0.2 + (0.1 + 0.2) / 2 of stuff.
    np.testing.assert_allclose(found[1], [0.45, 0, 0.2 + 0.3 / 2], atol=1e-6)


def test_affinities_never_hold_all_pairs() -> None:
    """At 800x1300, stride 4, all pairs of pixels would take 17 GB; the growth of the peak stays below one."""
    program = (
        "import tensorflow as tf\n"
        "from deeplab2_like.model.unifying.potential import affinity_update\n"
        "def peak():\n"
        "    return next(int(l.split()[1]) for l in open('/proc/self/status') if l.startswith('VmHWM')) / 2**20\n"
        "psi, phi = tf.random.uniform((1, 153, 200, 325)), tf.random.uniform((1, 200, 325, 128))\n"
        "before = peak()\n"
        "with tf.GradientTape() as tape:\n"
        "    tape.watch(phi)\n"
        "    total = tf.reduce_sum(affinity_update(psi, phi, phi))\n"
        "tape.gradient(total, phi)\n"
        "print(peak() - before)\n"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert float(result.stdout) < 1.0


def test_factors_of_the_affinities() -> None:
    """The key averages over the image without padding; the query is positive, and small at first."""
    config = SemanticConfig(channels=32, convolutions=1, deformable=False, norm=None)
    head = AffinityHead(config, strides={"p2": 4, "p3": 8}, input_channels=8)
    pyramid = {"p2": tf.random.normal((2, 8, 8, 8)), "p3": tf.random.normal((2, 4, 4, 8))}
    query, key = head(pyramid, image_size=(32, 17))
    assert query.shape == key.shape == (2, 8, 8, 32)
    # The last three columns of stride 4 are padding of an image of 17 columns.
    np.testing.assert_allclose(tf.reduce_sum(key[:, :, :5], axis=(1, 2)), np.ones((2, 32)), rtol=1e-5)
    assert (key[:, :, 5:].numpy() == 0).all()
    assert (query.numpy() > 0).all()
    assert query.numpy().sum(axis=-1).mean() < 0.2


def test_squeeze_excitation() -> None:
    """Against the two linear layers, on the mean of each channel."""
    layer = SqueezeExcitation(32)
    x = np.random.default_rng(0).standard_normal((2, 3, 4, 32)).astype(np.float32)
    found = layer(tf.constant(x)).numpy()
    reduce, expand = (part.conv.kernel.numpy()[0, 0] for part in (layer.reduce, layer.expand))
    assert reduce.shape == (32, 2)
    weight = 1 / (1 + np.exp(-np.maximum(x.mean(axis=(1, 2)) @ reduce, 0) @ expand))
    np.testing.assert_allclose(found, x * weight[:, None, None], atol=1e-5)


# --- matching ---------------------------------------------------------------------------------------------------------

TARGETS = {
    # A car in columns 0 to 10, a person in the same place, a car in columns 20 to 30, and a row that is not used.
    "boxes": tf.constant([[[0.0, 0, 10, 10], [0, 0, 10, 10], [0, 20, 10, 30], [0, 0, 0, 0]]]),
    "classes": tf.constant([[0, 1, 0, 0]]),
    "valid": tf.constant([[True, True, True, False]]),
}


def match(boxes: list, classes: list, used: list | None = None) -> tuple[list, list]:
    stays, detection = match_detections(
        tf.constant([boxes], tf.float32),
        tf.constant([classes]),
        tf.constant([used or [True] * len(boxes)]),
        TARGETS,
        iou_threshold=0.5,
    )
    return stays.numpy()[0].tolist(), detection.numpy()[0].tolist()


def test_detections_match_within_their_class() -> None:
    """The first car has IoU 0.8 with car 0, the person 1 with person 1; the third is near nothing of its class."""
    stays, detection = match([[0, 0, 10, 8], [0, 0, 10, 10], [0, 20, 10, 30]], [0, 1, 1])
    assert stays == [True, True, True]
    assert detection == [0, 1, -1, -1]


def test_duplicates_go_but_the_best() -> None:
    """IoU 0.7, 0.9 and 0.6 with the first car; the last one has 0.4, matches nothing, and stays as a wrong slot."""
    stays, detection = match([[0, 0, 10, 7], [0, 0, 10, 9], [0, 0, 10, 6], [0, 0, 10, 4]], [0, 0, 0, 0])
    assert stays == [False, True, False, True]
    assert detection == [1, -1, -1, -1]


def test_of_equals_the_first_one_stays() -> None:
    stays, detection = match([[0, 0, 10, 8], [0, 0, 10, 8]], [0, 0])
    assert stays == [True, False]
    assert detection[0] == 0


def test_rows_that_are_not_used_match_nothing() -> None:
    stays, detection = match([[0, 0, 10, 10], [0, 0, 0, 0]], [0, 0], used=[False, True])
    assert stays == [False, True]
    assert detection == [-1] * 4


def test_slots_of_pixels() -> None:
    """Detections 0 and 1 are slots 0 and 1; sky (class 0) is slot 2, road (class 1) slot 3."""
    targets = {
        "semantic": tf.constant([[[0, 1, 2, 2, 3, 3, 255]]]),
        "instance_map": tf.constant([[[0, 0, 1, 2, 3, -1, -1]]]),
    }
    # Instance 0 is detection 1, instance 1 has none, instance 2 is detection 0.
    found = slot_targets(targets, tf.constant([[1, -1, 0]]), dataset_info=INFO, num_detections=2, padded_size=(2, 8))
    np.testing.assert_array_equal(found[0], [[2, 3, 1, -1, 0, -1, -1, -1], [-1] * 8])


def test_matching_loss() -> None:
    """Pixels of probability 1/2 and 1/4 in their slots, and one that does not count."""
    potential = np.array([[[[1.0, 0.3, 0.0]], [[1.0, 0.1, 0.0]]]], np.float32)
    slots = tf.constant([[[0, 1, -1]]])
    for given, is_logit in ((potential, False), (np.log(potential + 1e-30), True)):
        total, normalizer = matching_loss(tf.constant(given), slots, is_logit=is_logit)
        assert float(total) == pytest.approx(np.log(2) + np.log(4))
        assert float(normalizer) == 2


def test_matching_loss_of_a_slot_without_potential() -> None:
    """It is bounded, and so is its gradient."""
    potential = tf.constant([[[[0.0]], [[0.5]]]])
    with tf.GradientTape() as tape:
        tape.watch(potential)
        total, _ = matching_loss(potential, tf.constant([[[0]]]), is_logit=False)
    assert float(total) == pytest.approx(-np.log(1e-6))
    assert np.isfinite(tape.gradient(total, potential)).all()
