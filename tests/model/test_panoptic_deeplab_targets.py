"""Targets of Panoptic-DeepLab: by hand, against a loop over the instances, and against Detectron2's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.model.panoptic_deeplab.config import LossConfig
from deeplab2_like.model.panoptic_deeplab.targets import make_targets

DETECTRON2 = Path(__file__).parents[1] / "data" / "detectron2_panoptic_deeplab" / "train.npz"


def dataset(num_stuff: int, num_things: int, label_divisor: int = 1000) -> DatasetInfo:
    """Stuff classes first, then things."""
    categories = tuple(
        Category(id=i, name=f"class {i}", is_thing=i >= num_stuff, color=(i, i, i))
        for i in range(num_stuff + num_things)
    )
    return DatasetInfo("made up", categories, label_divisor)


INFO = dataset(2, 2, label_divisor=100)
V = INFO.void
# An instance of class 2 of five pixels, one of class 3 of one pixel, a crowd of class 3, void, and two kinds of stuff.
LABEL = np.array(
    [
        [0, 0, 0, 0, 0, 0, V],
        [0, 201, 201, 0, 0, 0, V],
        [0, 201, 201, 201, 0, 300, 300],
        [0, 0, 0, 0, 0, 300, 300],
        [100, 100, 301, 100, 100, 100, 100],
    ],
    np.int32,
)


def targets_of(
    label: np.ndarray, info: DatasetInfo = INFO, *, semantic_only: bool = False, **changes: Any
) -> dict[str, np.ndarray]:
    options: dict[str, Any] = {"sigma": 1.0, "small_instance_area": 5, "small_instance_weight": 3.0, **changes}

    def make(panoptic: tf.Tensor) -> dict[str, tf.Tensor]:
        return make_targets(panoptic, LossConfig(**options), info, semantic_only=semantic_only)

    targets = {name: value.numpy() for name, value in make(tf.constant(label)).items()}
    in_graph = tf.function(make)(tf.constant(label))  # As the input pipeline does, where a part is compiled.
    assert sorted(in_graph) == sorted(targets)
    for name, value in targets.items():
        np.testing.assert_allclose(in_graph[name], value, atol=1e-5, rtol=1e-5, err_msg=name)
    return targets


def test_types_and_shapes() -> None:
    targets = targets_of(LABEL)
    types = {
        "semantic": np.int32,
        "semantic_weight": np.float32,
        "center": np.float32,
        "center_weight": np.uint8,
        "offset": np.float32,
        "offset_weight": np.uint8,
    }
    assert {name: value.dtype.type for name, value in targets.items()} == types
    assert targets.pop("offset").shape == (5, 7, 2)
    assert {value.shape for value in targets.values()} == {(5, 7)}


def test_shapes_are_static_in_a_graph() -> None:
    @tf.function(input_signature=[tf.TensorSpec([5, 7], tf.int32)])
    def make(label: tf.Tensor) -> dict[str, tf.Tensor]:
        return make_targets(label, LossConfig(sigma=1.0, small_instance_area=5, small_instance_weight=3.0), INFO)

    shapes = make.get_concrete_function().structured_outputs
    assert {name: tuple(spec.shape) for name, spec in shapes.items()} == {
        name: value.shape for name, value in targets_of(LABEL).items()
    }
    np.testing.assert_array_equal(make(LABEL)["center"], targets_of(LABEL)["center"])


def test_classes_and_their_weights() -> None:
    targets = targets_of(LABEL)
    np.testing.assert_array_equal(
        targets["semantic"],
        [
            [0, 0, 0, 0, 0, 0, 255],
            [0, 2, 2, 0, 0, 0, 255],
            [0, 2, 2, 2, 0, 3, 3],
            [0, 0, 0, 0, 0, 3, 3],
            [1, 1, 3, 1, 1, 1, 1],
        ],
    )
    # Small means under five pixels: 301, but not 201, and a crowd never.
    np.testing.assert_array_equal(
        targets["semantic_weight"],
        [
            [1, 1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1, 0],
            [1, 1, 1, 1, 1, 1, 1],
            [1, 1, 1, 1, 1, 1, 1],
            [1, 1, 3, 1, 1, 1, 1],
        ],
    )
    assert targets_of(LABEL, small_instance_area=6)["semantic_weight"][1, 1] == 3


def test_offsets_lead_to_the_center_of_mass() -> None:
    targets = targets_of(LABEL)
    # 201: y = (1 + 1 + 2 + 2 + 2) / 5 = 1.6, x = (1 + 2 + 1 + 2 + 3) / 5 = 1.8. 301 is its own center.
    expected = np.zeros((5, 7, 2), np.float32)
    expected[1, 1], expected[1, 2] = (0.6, 0.8), (0.6, -0.2)
    expected[2, 1], expected[2, 2], expected[2, 3] = (-0.4, 0.8), (-0.4, -0.2), (-0.4, -1.2)
    np.testing.assert_allclose(targets["offset"], expected, atol=1e-6)
    np.testing.assert_array_equal(targets["offset_weight"], np.isin(LABEL, [201, 301]))


def test_gaussians_around_rounded_centers() -> None:
    targets = targets_of(LABEL)
    center = targets["center"]
    # 201's center (1.6, 1.8) becomes pixel (2, 2), 301's is (4, 2).
    assert center[2, 2] == center[4, 2] == 1
    assert np.count_nonzero(center == 1) == 2
    # exp(-d^2 / 2): one pixel from both is the larger of two equal values, not their sum.
    assert center[3, 2] == pytest.approx(np.exp(-0.5))
    # Squared distances to (2, 2) and (4, 2): (2, 4) 4 and 8; (0, 1) 5 and 17; (4, 4) 8 and 4; (3, 0) 5 and 5.
    for position, square in {(2, 4): 4, (0, 1): 5, (4, 4): 4, (3, 0): 5}.items():
        assert center[position] == pytest.approx(np.exp(-square / 2)), position
    # No peak for the crowd at (2, 5): 9 from (2, 2).
    assert center[2, 5] == pytest.approx(np.exp(-4.5))
    # Neither void nor crowd says where centers are; stuff does.
    np.testing.assert_array_equal(targets["center_weight"], ~np.isin(LABEL, [V, 300]))


def test_gaussian_ends_after_three_sigma_and_one() -> None:
    label = np.zeros((1, 12), np.int32)
    label[0, 2] = 201
    center = targets_of(label)["center"][0]
    # With sigma 1 it reaches 4 pixels, to column 6.
    assert center[6] == pytest.approx(np.exp(-8.0))
    np.testing.assert_array_equal(center[7:], 0)


def test_a_crop_that_cuts_an_instance() -> None:
    targets = targets_of(LABEL[:, 2:])
    # Of 201, pixels (1, 0), (2, 0), (2, 1) are left: center (5/3, 1/3), pixel (2, 0); and three pixels are few.
    np.testing.assert_allclose(targets["offset"][1, 0], [2 / 3, 1 / 3], atol=1e-6)
    np.testing.assert_allclose(targets["offset"][2, 1], [-1 / 3, -2 / 3], atol=1e-6)
    assert targets["center"][2, 0] == 1
    assert targets["semantic_weight"][2, 1] == 3


@pytest.mark.parametrize("value", [0, 300, V])
def test_label_without_instances(value: int) -> None:
    targets = targets_of(np.full((4, 6), value, np.int32))
    for name in ("center", "offset", "offset_weight"):
        assert not targets[name].any(), name
    assert targets["center_weight"].all() == (value == 0)
    assert targets["semantic_weight"].all() == (value != V)


def test_semantic_only() -> None:
    targets = targets_of(LABEL, semantic_only=True)
    assert sorted(targets) == ["semantic", "semantic_weight"]
    np.testing.assert_array_equal(targets["semantic_weight"], targets_of(LABEL)["semantic_weight"])


def plain_targets(
    panoptic: np.ndarray, info: DatasetInfo, *, sigma: float, small_instance_area: int, small_instance_weight: float
) -> dict[str, np.ndarray]:
    """What `make_targets` says it computes, with a loop over the instances, in float64."""
    classes, numbers = np.divmod(panoptic, info.label_divisor)
    is_void = panoptic == info.void
    is_crowd = np.isin(classes, info.thing_classes) & (numbers == 0)
    targets = {
        "semantic": classes,
        "semantic_weight": np.where(is_void, 0.0, 1.0),
        "center": np.zeros(panoptic.shape),
        "center_weight": np.where(is_void | is_crowd, 0.0, 1.0),
        "offset": np.zeros((*panoptic.shape, 2)),
        "offset_weight": np.zeros(panoptic.shape),
    }
    grid = np.moveaxis(np.indices(panoptic.shape), 0, -1)  # [H, W, 2]
    for value in np.unique(panoptic[numbers > 0]):
        mask = panoptic == value
        mean = grid[mask].mean(axis=0)
        away = np.abs(grid - np.round(mean))  # [H, W, 2]
        gaussian = np.exp(-(away**2).sum(axis=-1) / (2 * sigma**2)) * (away.max(axis=-1) <= int(3 * sigma + 1))
        targets["center"] = np.maximum(targets["center"], gaussian)
        targets["offset"][mask] = mean - grid[mask]
        targets["offset_weight"][mask] = 1
        if mask.sum() < small_instance_area:
            targets["semantic_weight"][mask] = small_instance_weight
    return targets


@pytest.mark.parametrize("index", range(3))
def test_equals_a_loop_over_the_instances(index: int) -> None:
    info = scenes_info()
    _, panoptic = render_scene(index, height=130, width=190)
    if index == 0:  # A crowd and void, should the scene have none.
        panoptic[:20, :30] = info.thing_classes[0] * info.label_divisor
        panoptic[-10:] = info.void
    options: dict[str, Any] = {"sigma": 8.0, "small_instance_area": 300, "small_instance_weight": 3.0}
    expected = plain_targets(panoptic, info, **options)
    found = targets_of(panoptic, info, **options)
    assert set(np.unique(expected["semantic_weight"])) >= {1.0, 3.0}
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5, rtol=1e-5, err_msg=name)


def test_equals_detectron2() -> None:
    # The label has no crowds, which are the one thing that is done differently on purpose.
    info = dataset(11, 8)
    with np.load(DETECTRON2) as file:
        reference = dict(file)
    panoptic = np.full((128, 128), info.void, np.int32)
    for segment, class_id, is_crowd in reference["segments_id_category_crowd"].astype(int):
        assert not is_crowd
        number = segment if class_id in info.thing_classes else 0
        panoptic[reference["panoptic_ids"] == segment] = class_id * info.label_divisor + number
    found = targets_of(panoptic, info, sigma=10.0, small_instance_area=4096)
    assert len(found) == 6
    # On void, Detectron2 leaves the semantic weight at 1 and the loss leaves such pixels out.
    reference["semantic_weight"][reference["semantic"] == 255] = 0
    for name, value in found.items():
        np.testing.assert_allclose(value, reference[name], atol=1e-5, rtol=1e-5, err_msg=name)
