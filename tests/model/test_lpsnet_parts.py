"""LPSNet's parts on cases worked out by hand, and its panoptic head against plain loops."""

from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from system_contract import INFO, hand_made_label

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.config import Norm
from deeplab2_like.model.lpsnet import PanopticHead
from deeplab2_like.model.lpsnet.config import BoxConfig, ContextConfig, PostprocessConfig
from deeplab2_like.model.lpsnet.losses import border_ness_loss, box_loss
from deeplab2_like.model.lpsnet.network import PyramidPooling
from deeplab2_like.model.lpsnet.postprocess import average_at_points, boxes_from_distances, find_boxes
from deeplab2_like.model.lpsnet.targets import border_ness, make_targets, mask_borders
from deeplab2_like.model.semantic import SemanticSubnet

# --- border-ness ------------------------------------------------------------------------------------------------------


def test_border_ness() -> None:
    distances = [
        [2.0, 3.0, 8.0, 3.0],  # A quarter along x, the middle along y: sqrt(1/4 * 1) = 1/2.
        [5.0, 5.0, 5.0, 5.0],  # The middle.
        [1.0, 1.0, 4.0, 4.0],  # sqrt(1/4 * 1/4) = 1/4.
        [0.0, 3.0, 8.0, 3.0],  # On the border.
        [-1.0, 3.0, 8.0, 3.0],  # Outside.
    ]
    np.testing.assert_allclose(border_ness(tf.constant(distances)), [0.5, 1.0, 0.25, 0.0, 0.0], atol=1e-6)


def test_borders_of_a_mask() -> None:
    """An L, whose right part is only in the last row, and a crowd beside it."""
    instance_map = np.zeros((1, 4, 6), np.int32)
    instance_map[0, 0:4, 1] = 2  # Row 1 of the table.
    instance_map[0, 3, 1:5] = 2
    instance_map[0, 0, 4:] = -1
    borders = mask_borders(tf.constant(instance_map), 2)
    np.testing.assert_array_equal(borders.left[0, 1], [1, 1, 1, 1])
    np.testing.assert_array_equal(borders.right[0, 1], [2, 2, 2, 5])
    np.testing.assert_array_equal(borders.top[0, 1], [4, 0, 3, 3, 3, 4])  # Columns 0 and 5 are empty.
    np.testing.assert_array_equal(borders.bottom[0, 1], [0, 4, 4, 4, 4, 0])
    # The other mask is empty.
    np.testing.assert_array_equal(borders.left[0, 0], [6] * 4)
    np.testing.assert_array_equal(borders.right[0, 0], [0] * 4)
    # At (3.5, 3.5): 2.5 to the left border, 0.5 up, 1.5 to the right, 0.5 down.
    found = borders.distances(tf.constant([[1]]), tf.constant([[3.5]]), tf.constant([[3.5]]))
    np.testing.assert_allclose(found[0, 0], [2.5, 0.5, 1.5, 0.5])


def test_an_occluder_adds_no_borders() -> None:
    """A car of columns 2 to 10 with a post in front: a pixel left of it is as far from the right border as without."""
    instance_map = np.ones((1, 2, 12), np.int32)
    instance_map[0, :, :2] = instance_map[0, :, 10:] = 0
    instance_map[0, :, 6] = 2
    borders = mask_borders(tf.constant(instance_map), 2)
    found = borders.distances(tf.constant([[0]]), tf.constant([[0.0]]), tf.constant([[4.0]]))
    np.testing.assert_allclose(found[0, 0], [2, 0, 6, 2])


# --- targets ----------------------------------------------------------------------------------------------------------


def targets_of(label: np.ndarray, **box: Any) -> dict[str, np.ndarray]:
    config = BoxConfig(**({"levels": ("p3", "p4"), "size_limits": (16,)} | box))
    targets = make_targets(tf.constant(label), config, INFO, max_instances=4, size_multiple=32)
    return {name: value.numpy() for name, value in targets.items()}


def l_shape() -> np.ndarray:
    """32x32 road, a car like an L in box [0, 0, 24, 24], and a person of 8x8 in the corner that the L leaves free."""
    label = np.full((32, 32), 1000, np.int32)
    label[0:24, 0:8] = 2001
    label[16:24, 0:24] = 2001
    label[4:12, 12:20] = 3001
    return label


def test_points_inside_masks() -> None:
    """Points of p3 are at 4, 12, 20, 28 along both axes; those of p4 at 8 and 24."""
    found = targets_of(l_shape())
    # The largest distance of the L's points to a side of its box: (4, 4): 20, (12, 4): 20, (20, 4): 20, (20, 12): 20,
    # (20, 20): 20. All are above 16 and belong to p4, so p3 has only the person: its point (4, 12) is at the corner of
    # its box [4, 12, 12, 20], 8 from the far sides.
    expected = np.zeros((4, 4), bool)
    expected[0, 1] = True
    np.testing.assert_array_equal(found["positive_p3"], expected)
    np.testing.assert_allclose(found["distances_p3"][0, 1], [0, 0, 8, 8])
    assert found["border_ness_p3"][0, 1] == 0
    # On p4, (8, 8) is in the free corner and (24, 24) outside of the box.
    assert not found["positive_p4"].any()
    # Without limits p4 would have been p3: the same points, and all of the L.
    found = targets_of(l_shape(), levels=("p3",), size_limits=())
    expected = np.array([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    np.testing.assert_array_equal(found["positive_p3"], expected)
    # (y 4, x 4) in the upright of the L: 4 to the left side, 4 up, 20 to the right, 20 down.
    np.testing.assert_allclose(found["distances_p3"][0, 0], [4, 4, 20, 20])
    # To the borders of the mask: 4 to the left, 4 to the right, 4 up, 20 down: sqrt(1 * 1/5).
    assert found["border_ness_p3"][0, 0] == pytest.approx(0.2**0.5)
    # Points that are not positive have zeros.
    assert not found["distances_p3"][1, 1].any()


def test_center_ness_is_measured_to_boxes() -> None:
    found = targets_of(l_shape(), levels=("p3",), size_limits=(), measured_to="box")
    # 4 and 20 along both axes: sqrt(1/5 * 1/5).
    assert found["border_ness_p3"][0, 0] == pytest.approx(0.2)


def test_points_inside_boxes_belong_to_the_smallest() -> None:
    """As in FCOS: points in the free corner of the L belong to the car, except those in the person's box."""
    label = l_shape()
    label[4:12, 12:20] = 1000
    label[8:16, 10:18] = 3001  # The box [8, 10, 16, 18] contains the point (12, 12).
    found = targets_of(label, levels=("p3",), size_limits=(), positives="box", measured_to="box")
    np.testing.assert_array_equal(found["positive_p3"], np.pad(np.ones((3, 3), bool), [[0, 1], [0, 1]]))
    np.testing.assert_allclose(found["distances_p3"][1, 1], [2, 4, 6, 4])
    np.testing.assert_allclose(found["distances_p3"][0, 1], [12, 4, 12, 20])  # The car's, from (4, 12).


def test_level_limits() -> None:
    """A car of 32x32 and points at 4, 12, 20, 28: the largest distance is 28, 20, 20, 28 along each axis."""
    label = np.full((32, 32), 2001, np.int32)
    found = targets_of(label, size_limits=(20,))
    inner = np.pad(np.ones((2, 2), bool), 1)
    np.testing.assert_array_equal(found["positive_p3"], inner)
    # Those of p4 are at 8 and 24: 24 is above 20.
    assert found["positive_p4"].all()


def test_crowds_and_padding_have_no_points() -> None:
    label = hand_made_label(40)
    label[:20] = 3000
    found = targets_of(label, levels=("p3", "p4", "p5", "p6"), size_limits=(64, 65, 66))
    assert found["positive_p3"].shape == (8, 8)
    assert found["positive_p6"].shape == (1, 1)
    assert not found["positive_p3"][:2].any()
    assert not found["positive_p3"][5:].any()
    assert not found["positive_p3"][:, 5:].any()


# --- losses -----------------------------------------------------------------------------------------------------------


def test_box_loss() -> None:
    """Boxes [-1, -1, 1, 1] and [-1, -1, 1, 3] around a point: intersection 4, union 8."""
    predicted = [[[1.0, 1.0, 1.0, 1.0], [2.0, 2.0, 2.0, 2.0], [9.0, 9.0, 9.0, 9.0]]]
    true = [[[1.0, 1.0, 3.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 0.0]]]
    total, normalizer = box_loss(tf.constant(predicted), tf.constant(true), tf.constant([[0.5, 0.25, 0.0]]))
    assert float(total) == pytest.approx(0.5 * np.log(2))
    assert float(normalizer) == 0.75


def test_border_ness_loss() -> None:
    total, normalizer = border_ness_loss(
        tf.constant([[0.0, 200.0, -5.0]]), tf.constant([[0.3, 1.0, 0.0]]), tf.constant([[1.0, 1, 0]])
    )
    # Whatever the target, a probability of one half costs ln 2; a certain hit costs nothing.
    assert float(total) == pytest.approx(np.log(2))
    assert float(normalizer) == 2


# --- network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7, 10), (2, 3)])
def test_pyramid_pooling(size: tuple[int, int]) -> None:
    """Against plain averages of each bin, from floor(i h / b) to ceil((i + 1) h / b), read bilinearly."""
    layer = PyramidPooling(ContextConfig(bins=(1, 3), channels=32, norm=Norm(kind="none")), output_channels=5)
    x = np.random.default_rng(0).standard_normal((1, *size, 4)).astype(np.float32)
    found = layer(tf.constant(x)).numpy()

    def convolve(x: np.ndarray, layer: object) -> np.ndarray:
        return tf.nn.conv2d(x, layer.conv.kernel.value, 1, "SAME").numpy() + layer.conv.bias.numpy()

    parts = [x]
    for bins, grid in zip((1, 3), layer.grids, strict=True):
        pooled = np.zeros((1, bins, bins, 4), np.float32)
        for i in range(bins):
            for j in range(bins):
                rows = slice(i * size[0] // bins, -(-(i + 1) * size[0] // bins))
                columns = slice(j * size[1] // bins, -(-(j + 1) * size[1] // bins))
                pooled[:, i, j] = x[:, rows, columns].mean(axis=(1, 2))
        pooled = np.maximum(convolve(pooled, grid), 0)
        parts.append(tf.image.resize(pooled, size, "bilinear").numpy())
    joined = np.maximum(convolve(np.concatenate(parts, axis=-1), layer.join), 0)
    np.testing.assert_allclose(found, convolve(joined, layer.reduce), atol=1e-4)


def test_semantic_subnet_starts_as_plain_convolutions() -> None:
    """Offsets start at zero, and nothing is halved as with modulation."""
    options = {"strides": {"p2": 4, "p3": 8}, "input_channels": 6, "channels": 4, "convolutions": 3, "norm": None}
    plain, deformable = (SemanticSubnet(3, **options, deformable=value) for value in (False, True))
    random = np.random.default_rng(0)
    pyramid = {
        "p2": tf.constant(random.standard_normal((1, 8, 12, 6)), tf.float32),
        "p3": tf.constant(random.standard_normal((1, 4, 6, 6)), tf.float32),
    }
    expected, _ = plain(pyramid), deformable(pyramid)
    assert expected.shape == (1, 8, 12, 3)
    assert [layer.conv.filters for layer in plain.convolutions] == [6, 4, 4]
    for one, other in zip(plain.convolutions, deformable.convolutions, strict=True):
        other.kernel.assign(one.conv.kernel)
    deformable.predictor.kernel.assign(plain.predictor.kernel)
    np.testing.assert_allclose(deformable(pyramid), expected, atol=1e-5)


# --- detection --------------------------------------------------------------------------------------------------------


def test_boxes_from_distances() -> None:
    """Stride 8: the point of row 0, column 1 is at y 4, x 12."""
    distances = np.zeros((1, 1, 2, 4), np.float32)
    distances[0, 0, 1] = [2, 1, 3, 5]
    np.testing.assert_allclose(boxes_from_distances(tf.constant(distances), 8)[0, 0, 1], [3, 10, 9, 15])


def test_average_at_points() -> None:
    """Four cells per point, which lies between cells 1 and 2. The second row of points extends beyond the map."""
    values = np.arange(24, dtype=np.float32).reshape(1, 6, 4, 1)
    found = average_at_points(tf.constant(values), 4, (2, 1)).numpy()
    # Rows 1 and 2, columns 1 and 2: (5 + 6 + 9 + 10) / 4. Then row 5 and one row of zeros: (21 + 22) / 4.
    np.testing.assert_allclose(found[0, :, 0, 0], [7.5, 10.75])
    np.testing.assert_array_equal(average_at_points(tf.constant(values), 1, (6, 4)), values)


def test_find_boxes() -> None:
    """One level of stride 4 with three points: two of the same object of class 1, one of an object of class 0."""
    probability = np.zeros((1, 1, 3, 2), np.float32)
    probability[0, 0] = [[0.1, 0.8], [0.2, 0.6], [0.5, 0.1]]
    # Points are at x 2, 6, 10: the first two have the box [0, 0, 4, 8], the third has [0, 8, 4, 20], clipped at 12.
    distances = np.array([[[[2, 2, 6, 2], [6, 2, 2, 2], [2, 2, 10, 2]]]], np.float32)
    logits = np.array([[[0.0, 9.0, 9.0]]], np.float32)
    found = find_boxes(
        {"p2": tf.constant(distances)},
        {"p2": tf.constant(logits)},
        tf.constant(probability),
        (4, 12),
        PostprocessConfig(class_threshold=0.3, candidates=9, nms_iou=0.6, detections=5),
        strides={"p2": 4},
        semantic_stride=4,
    )
    # 0.8 * 0.5 is worse than 0.6 * 1, so the box of the first point is removed.
    np.testing.assert_allclose(found.scores[0], [0.6, 0.5, 0, 0, 0], atol=1e-3)
    np.testing.assert_array_equal(found.classes[0, :2], [1, 0])
    np.testing.assert_allclose(found.boxes[0, :2], [[0, 0, 4, 8], [0, 8, 4, 12]], atol=1e-5)


# --- panoptic head ----------------------------------------------------------------------------------------------------

CAR, PERSON = 2, 3


def paste(
    semantic: np.ndarray, boxes: list, scores: list, classes: list, predicted: object = None, **options: object
) -> np.ndarray:
    head = PanopticHead(INFO, **({"conflicts": "highest_score", "stuff_area_limit": 0} | options))
    found = head(
        tf.constant(semantic[None], tf.int32),
        *(tf.constant(np.asarray(values)[None]) for values in (boxes, scores, classes)),
        None if predicted is None else tf.constant(np.asarray(predicted)[None], tf.float32),
    )
    return found["panoptic"].numpy()[0]


def test_boxes_take_the_pixels_of_their_class() -> None:
    semantic = np.zeros((2, 8), int)
    semantic[:, 2:6] = CAR
    semantic[1, 3] = PERSON
    found = paste(semantic, [[0, 1, 2, 5]], [0.9], [CAR])
    # Column 5 has the class of the car but is in no box; the person has no box either: both are void.
    void = INFO.void
    np.testing.assert_array_equal(found, [[0, 0, 2001, 2001, 2001, void, 0, 0], [0, 0, 2001, void, 2001, void, 0, 0]])


def test_pixels_are_in_a_box_if_their_centers_are() -> None:
    semantic = np.full((1, 4), CAR)
    found = paste(semantic, [[0, 0.6, 1, 2.6]], [0.9], [CAR])
    np.testing.assert_array_equal(found, [[INFO.void, 2001, 2001, INFO.void]])


@pytest.mark.parametrize(("end", "kept"), [(17, True), (16, False)])
def test_overlap_decides_what_is_dropped(end: int, kept: bool) -> None:
    """Three columns of a mask from column 7 are covered: three of ten are allowed, three of nine are too many."""
    semantic = np.full((1, 24), CAR)
    found = paste(semantic, [[0, 0, 1, 10], [0, 7, 1, end]], [0.9, 0.8], [CAR, CAR])
    assert (found[0, :10] == 2001).all()
    assert (found[0, 10:16] == (2002 if kept else INFO.void)).all()


def test_order_is_that_of_scores() -> None:
    """The second box is better, so it is the first instance and keeps the pixels of both."""
    semantic = np.full((1, 20), CAR)
    found = paste(semantic, [[0, 0, 1, 10], [0, 8, 1, 20]], [0.7, 0.8], [CAR, CAR])
    np.testing.assert_array_equal(found[0], [2002] * 8 + [2001] * 12)


def test_three_rules_of_conflicts() -> None:
    """Boxes of columns 0 to 12 (the better one) and 9 to 19 share columns 9, 10 and 11, 3 of the second one's 10."""
    semantic = np.full((1, 19), CAR)
    boxes, scores, classes = [[0, 0, 1, 12], [0, 9, 1, 19]], [0.9, 0.8], [CAR, CAR]

    def shared(**options: object) -> list[int]:
        found = paste(semantic, boxes, scores, classes, **options)[0]
        assert (found[:9] == 2001).all()
        assert (found[12:] == 2002).all()
        return list(found[9:12])

    assert shared(conflicts="highest_score") == [2001] * 3
    assert shared(conflicts="smallest_area") == [2002] * 3
    # Border-ness of the centers of these columns, 9.5, 10.5, 11.5; along y all are in the middle.
    #   to the first box: sqrt(2.5 / 9.5) = 0.513, sqrt(1.5 / 10.5) = 0.378, sqrt(0.5 / 11.5) = 0.209
    #   to the second: sqrt(0.5 / 9.5) = 0.229, sqrt(1.5 / 8.5) = 0.420, sqrt(2.5 / 7.5) = 0.577
    # The prediction 0.5 is closer to the first; 0.41 to the second; 0.3 to the first (differences 0.09 and 0.28).
    predicted = np.zeros((1, 1, 19))
    predicted[0, 0, 9:12] = [0.5, 0.41, 0.3]
    assert shared(conflicts="closest_border_ness", predicted=predicted) == [2001, 2002, 2001]


def test_border_ness_is_read_on_the_level_of_the_pixel() -> None:
    """As above; the largest distance to a side of the first box is 9.5, 10.5, 11.5, of the second 9.5, 8.5, 7.5."""
    semantic = np.full((1, 19), CAR)
    boxes, scores, classes = [[0, 0, 1, 12], [0, 9, 1, 19]], [0.9, 0.8], [CAR, CAR]
    predicted = np.zeros((2, 1, 19))
    # With a limit of 10 column 10 reads the second level for the first box (0.378, exact), the first one for the
    # second.
    predicted[:, 0, 10] = [0.0, 0.378]
    found = paste(
        semantic, boxes, scores, classes, predicted=predicted, conflicts="closest_border_ness", size_limits=(10,)
    )
    assert found[0, 10] == 2001
    predicted[:, 0, 10] = [0.420, 0.0]
    found = paste(
        semantic, boxes, scores, classes, predicted=predicted, conflicts="closest_border_ness", size_limits=(10,)
    )
    assert found[0, 10] == 2002


def plain_head(
    semantic: np.ndarray,
    boxes: np.ndarray,
    scores: np.ndarray,
    classes: np.ndarray,
    predicted: np.ndarray,
    *,
    conflicts: str,
    size_limits: tuple[float, ...],
) -> np.ndarray:
    """The head with a loop over boxes and pixels."""
    height, width = semantic.shape
    owner = np.full(semantic.shape, -1)
    cost_of_owner = np.zeros(semantic.shape, np.float32)
    order = sorted(range(len(scores)), key=lambda n: -scores[n])
    for n in order:
        if scores[n] == 0:
            continue
        y_min, x_min, y_max, x_max = boxes[n]
        mask = [
            (y, x)
            for y in range(height)
            for x in range(width)
            if y_min < y + 0.5 < y_max and x_min < x + 0.5 < x_max and semantic[y, x] == classes[n]
        ]
        if sum(owner[pixel] >= 0 for pixel in mask) > 0.3 * len(mask):
            continue
        for y, x in mask:
            sides = np.float32([x + 0.5 - x_min, y + 0.5 - y_min, x_max - x - 0.5, y_max - y - 0.5])
            if conflicts == "closest_border_ness":
                level = sum(sides.max() > limit for limit in size_limits)
                ratio = (
                    min(sides[0], sides[2])
                    / max(sides[0], sides[2])
                    * (min(sides[1], sides[3]) / max(sides[1], sides[3]))
                )
                cost = abs(np.sqrt(ratio) - predicted[level, y, x])
            else:
                cost = (y_max - y_min) * (x_max - x_min) if conflicts == "smallest_area" else order.index(n)
            if owner[y, x] < 0 or cost < cost_of_owner[y, x]:
                owner[y, x], cost_of_owner[y, x] = n, cost
    panoptic = np.where(semantic < 2, semantic * 1000, INFO.void)
    for class_id in (CAR, PERSON):
        number = 0
        for n in order:
            if classes[n] == class_id and (owner == n).any():
                number += 1
                panoptic[owner == n] = class_id * 1000 + number
    return panoptic


@pytest.mark.parametrize("conflicts", ["closest_border_ness", "smallest_area", "highest_score"])
def test_panoptic_head_against_plain_loops(conflicts: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """500 random scenes: patches of classes, boxes of all sizes, some unused, some without a pixel of their class."""
    monkeypatch.setattr("deeplab2_like.model.overlaps.BLOCK", 3)  # So that there are windows in these small images.
    random = np.random.default_rng(0)
    head = PanopticHead(INFO, conflicts=conflicts, stuff_area_limit=0, size_limits=(4.0, 8.0))
    compiled = tf.function(head)
    batch, number, height, width = 25, 7, 12, 20
    overlaps = 0
    for _ in range(20):
        semantic = np.kron(random.integers(0, 4, (batch, height // 4, width // 4)), np.ones((1, 4, 4), int)).astype(
            np.int32
        )
        corners = np.sort(random.uniform(-1, [[height + 1], [width + 1]], (batch, number, 2, 2)), axis=-1)
        boxes = np.stack([corners[..., 0, 0], corners[..., 1, 0], corners[..., 0, 1], corners[..., 1, 1]], axis=-1)
        boxes = boxes.astype(np.float32)
        scores = np.where(random.random((batch, number)) < 0.2, 0, random.random((batch, number))).astype(np.float32)
        classes = random.integers(2, 4, (batch, number)).astype(np.int32)
        predicted = random.random((batch, 3, height, width)).astype(np.float32)
        found = compiled(*map(tf.constant, (semantic, boxes, scores, classes, predicted)))["panoptic"].numpy()
        for index in range(batch):
            inputs = semantic[index], boxes[index], scores[index], classes[index], predicted[index]
            expected = plain_head(*inputs, conflicts=conflicts, size_limits=(4.0, 8.0))
            np.testing.assert_array_equal(found[index], expected)
            overlaps += len(np.unique(expected[expected % 1000 > 0])) > 1
    assert overlaps > 200  # Otherwise the test covers few conflicts.


def test_head_refuses_wrong_arguments() -> None:
    with pytest.raises(UserError, match="needs the predicted border-ness of each pixel; give it, or choose conflicts"):
        paste(np.zeros((2, 2)), [[0, 0, 1, 1]], [0.5], [CAR], conflicts="closest_border_ness")
    with pytest.raises(
        UserError,
        match=r"Unknown rule of conflicts 'nearest'\. Known: closest_border_ness, highest_score, smallest",
    ):
        PanopticHead(INFO, conflicts="nearest")
    with pytest.raises(UserError, match=r"overlap_threshold is a share, 0 to 1, but it is 30"):
        PanopticHead(INFO, overlap_threshold=30)
    with pytest.raises(
        UserError, match=r"has the shape \(1, 2, 2\); PanopticHead with 0 size_limits needs \[B, 1, H, W\]"
    ):
        paste(np.zeros((2, 2)), [[0, 0, 1, 1]], [0.5], [CAR], np.zeros((2, 2)), conflicts="closest_border_ness")
    few = DatasetInfo.from_coco_categories([{"id": 1, "name": "car", "isthing": 1}], name="few", label_divisor=3)
    with pytest.raises(UserError, match="There are 3 boxes, but label_divisor 3 of data set 'few' has room for 2"):
        PanopticHead(few, conflicts="highest_score")(
            *(np.zeros(shape) for shape in ((1, 2, 2), (1, 3, 4), (1, 3), (1, 3)))
        )


def test_head_accepts_typical_outputs_of_models() -> None:
    """Void as 255, default types of NumPy, no boxes, NaN as a score, a class that is not a thing class."""
    semantic = np.full((4, 4), CAR)
    semantic[0] = 255
    void = INFO.void
    found = paste(semantic, np.zeros((0, 4)), np.zeros(0), np.zeros(0, int))
    assert set(np.unique(found)) == {void}
    head = PanopticHead(INFO, conflicts="highest_score", stuff_area_limit=0)
    boxes = np.array([[[0, 0, 4, 4], [0, 0, 4, 2], [0, 0, 4, 4]]])
    found = head(semantic[None], boxes, np.array([[np.nan, 0.5, 0.9]]), np.array([[CAR, CAR, 1]]))["panoptic"].numpy()[
        0
    ]
    np.testing.assert_array_equal(found, [[void] * 4, *[[2001, 2001, void, void]] * 3])
    # A box far larger than the image; a pixel inside one box only belongs to it even if its cost is NaN.
    boxes = np.array([[[-1e10, -1e10, 1e10, 1e10]]])
    for rule in ("highest_score", "closest_border_ness"):
        head = PanopticHead(INFO, conflicts=rule, stuff_area_limit=0)
        predicted = np.full((1, 1, 4, 4), np.nan)
        found = head(semantic[None], boxes, np.array([[0.5]]), np.array([[CAR]]), predicted)["panoptic"].numpy()[0]
        np.testing.assert_array_equal(found, [[void] * 4, *[[2001] * 4] * 3])


def test_points_in_the_padding_have_no_boxes() -> None:
    """An image of 4x4 pixels, padded to 4x8; the second point lies in the padding, and so does its box."""
    found = find_boxes(
        {"p2": tf.ones((1, 1, 2, 4))},
        {"p2": tf.zeros((1, 1, 2))},
        tf.fill((1, 1, 2, 1), 0.9),
        (4, 4),
        PostprocessConfig(class_threshold=0.1, candidates=4, nms_iou=0.6, detections=2),
        strides={"p2": 4},
        semantic_stride=4,
    )
    np.testing.assert_allclose(found.scores, [[0.45, 0]], atol=1e-6)
