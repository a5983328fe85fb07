"""Merging of views: what all systems share, and the parts of each system, on outputs made by hand."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.errors import UserError
from deeplab2_like.model.base import View
from deeplab2_like.model.detection.config import RoiConfig
from deeplab2_like.model.detection.masks import resample_masks
from deeplab2_like.model.detection.views import merge_detections
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.lpsnet.config import BoxConfig, LPSNetConfig
from deeplab2_like.model.lpsnet.postprocess import predict_border_ness
from deeplab2_like.model.lpsnet.views import average_border_ness
from deeplab2_like.model.panoptic_fcn.config import PostprocessConfig
from deeplab2_like.model.panoptic_fcn.kernels import StuffKernels, ThingKernels
from deeplab2_like.model.panoptic_fcn.masks import mask_overlaps
from deeplab2_like.model.panoptic_fcn.views import average_stuff, join_things
from deeplab2_like.model.unifying.views import average_affinities
from deeplab2_like.model.views import Grid, average_maps, average_semantic, mirror_boxes


def make_view(outputs: dict[str, Any], *, size: tuple[int, int] | None = None, **options: Any) -> View:
    """A view of a system of stride 4; `size` is the network size, if the images were resized."""
    system: Any = SimpleNamespace(stride=4, name="fake", geometry=Geometry.of)
    tensors = {name: tf.constant(value, tf.float32) for name, value in outputs.items()}
    if "thing_classes" in outputs:
        tensors["thing_classes"] = tf.constant(outputs["thing_classes"], tf.int32)
    if size is not None:
        tensors["network_size"] = tf.constant(size)
    return View(system, tensors, **options)


def ramp(width: float, cells: int, *, mirrored: bool = False) -> np.ndarray:
    """A map of one row whose cells of stride 4 hold their place in an image of some width, from 0 to 1."""
    place = (np.arange(cells) + 0.5) * 4 / width
    return (1 - place if mirrored else place)[None, None, :, None]


# An image of 21 pixels has 6 cells, the last one mostly padding, and 11 cells at twice the size.
VIEWS = {
    "same size": make_view({"map": ramp(21, 6)}),
    "mirrored": make_view({"map": ramp(21, 6, mirrored=True)}, mirrored=True),
    "larger": make_view({"map": ramp(42, 11)}, size=(4, 42), scale=2.0),
    "larger and mirrored": make_view({"map": ramp(42, 11, mirrored=True)}, size=(4, 42), scale=2.0, mirrored=True),
}


@pytest.mark.parametrize("name", VIEWS)
def test_a_map_of_any_view_lies_on_the_image(name: str) -> None:
    view = VIEWS[name]
    full = average_maps([view], "map", (2, 21), lambda values, view: values)
    assert full.shape == (1, 2, 21, 1)
    # Interpolation keeps a ramp, except near the border, where values are repeated.
    np.testing.assert_allclose(full[0, 0, 2:17, 0], (np.arange(21) + 0.5)[2:17] / 21, atol=1e-5)
    # On the cells of the largest view of both.
    for other in (VIEWS["same size"], VIEWS["larger"]):
        grid = Grid.of([view, other], "map", (2, 21))
        width = 42 if 2.0 in (view.scale, other.scale) else 21
        expected = ramp(width, 11 if width == 42 else 6)
        assert grid.resample(view.outputs["map"], view).shape == expected.shape
        np.testing.assert_allclose(
            grid.resample(view.outputs["map"], view)[0, 0, 1:-2], expected[0, 0, 1:-2], atol=1e-5
        )


def test_views_of_other_classes_are_refused() -> None:
    views = [make_view({"semantic_logits": np.zeros((1, 1, 1, channels))}) for channels in (3, 4)]
    with pytest.raises(
        UserError, match="predict different things: 'semantic_logits' of 'fake' is missing or has other"
    ):
        average_semantic(views, (4, 4))


def test_boxes_are_mirrored() -> None:
    np.testing.assert_array_equal(mirror_boxes(tf.constant([[1.0, 2.0, 3.0, 9.0]]), 10), [[1, 1, 3, 8]])


def test_masks_are_resampled_to_another_box() -> None:
    # Four columns of one pixel each; the left two belong to the mask. The other box lies one pixel to the left.
    mask = np.tile([1.0, 1.0, 0.0, 0.0], (4, 1))
    boxes, others = (tf.constant([[[0.0, x, 4.0, x + 4.0]]]) for x in (5.0, 4.0))
    found = resample_masks(tf.constant(mask[None, None], tf.float32), boxes, others)
    np.testing.assert_allclose(found[0, 0], np.tile([0.0, 1.0, 1.0, 0.0], (4, 1)), atol=1e-6)
    same = resample_masks(tf.constant(mask[None, None], tf.float32), boxes, boxes)
    np.testing.assert_allclose(same[0, 0], mask, atol=1e-6)


def test_detections_of_all_views_are_merged() -> None:
    left, right = np.tile([1.0, 0.0], (2, 1)), np.tile([0.0, 1.0], (2, 1))
    views = [
        # An object of class 0, one of class 1 in the same place, and an unused row.
        make_view(
            {
                "boxes": [[[0, 0, 8, 8], [0, 0, 8, 8], [0, 0, 9, 9]]],
                "scores": [[0.6, 0.5, 0.0]],
                "thing_classes": [[0, 1, 0]],
                "masks": [[left, left, right]],
            }
        ),
        # The first one again in the mirror image at twice the size, and an object that only this view shows.
        make_view(
            {
                "boxes": [[[0, 24, 16, 40], [20, 0, 30, 10], [0, 0, 0, 0]]],
                "scores": [[0.9, 0.4, 0.0]],
                "thing_classes": [[0, 0, 0]],
                "masks": [[left, left, left]],
            },
            size=(40, 40),
            scale=2.0,
            mirrored=True,
        ),
    ]
    found = merge_detections(views, (20, 20), RoiConfig(detections=4))
    np.testing.assert_allclose(found["scores"], [[0.9, 0.5, 0.4, 0.0]])
    np.testing.assert_array_equal(found["thing_classes"][0, :3], [0, 1, 0])
    # 40 - 40 = 0 to 40 - 24 = 16 network pixels are 0 to 8; 30 to 40 are 15 to 20.
    np.testing.assert_allclose(found["boxes"][0, :3], [[0, 0, 8, 8], [0, 0, 8, 8], [10, 15, 15, 20]], atol=1e-5)
    # The mirrored left half is the right one; its weight is 0.9 of 0.9 + 0.6.
    np.testing.assert_allclose(found["masks"][0, 0], np.tile([0.4, 0.6], (2, 1)), atol=1e-6)
    np.testing.assert_allclose(found["masks"][0, 1], left, atol=1e-6)
    np.testing.assert_allclose(found["masks"][0, 2], right, atol=1e-6)


def test_affinities_are_averaged() -> None:
    random = np.random.default_rng(1)
    views = []
    for _ in range(2):
        key = random.random((1, 2, 3, 5))
        views.append(
            make_view({"query": random.random((1, 2, 3, 5)), "key": key / key.sum(axis=(1, 2), keepdims=True)})
        )
    found = average_affinities(views, Grid.of(views, "query", (8, 12)))
    affinities = [np.einsum("bhwa,bija->hwij", view.outputs["query"], view.outputs["key"]) for view in views]
    np.testing.assert_allclose(
        np.einsum("bhwa,bija->hwij", found["query"], found["key"]), np.mean(affinities, axis=0), atol=1e-5
    )


def test_mask_overlaps() -> None:
    # Cells of one row: masks 0..2, 1..3 and none. Two cells of four are in both.
    feature = np.zeros((1, 1, 4, 3), np.float32)
    feature[0, 0, :, :] = np.array([[5, -5, -5], [5, 5, -5], [5, 5, -5], [-5, 5, -5]])
    found = mask_overlaps(tf.constant(feature), tf.eye(3)[None], threshold=0.5)
    np.testing.assert_allclose(found[0], [[1, 0.5, 0], [0.5, 1, 0], [0, 0, 0]], atol=1e-6)


def test_kernels_of_the_same_object_in_two_views_are_averaged() -> None:
    # Two views with one channel for each of two objects: cells 0 and 1, cells 2 and 3. The second view finds the first
    # object with a weaker kernel; both find the second object, but as different classes.
    one_view = np.array([[4, -4], [4, -4], [-4, 4], [-4, 4]], np.float32)
    feature = tf.constant(np.concatenate([one_view, one_view], axis=1)[None, None])
    first = ThingKernels(
        tf.constant([[[1.0, 0, 0, 0], [0, 1.0, 0, 0]]]), tf.constant([[0.9, 0.6]]), tf.constant([[0, 1]])
    )
    second = ThingKernels(
        tf.constant([[[0, 0, 0.5, 0], [0, 0, 0, 1.0]]]), tf.constant([[0.8, 0.7]]), tf.constant([[0, 0]])
    )
    found = join_things(feature, [first, second], PostprocessConfig(class_aware=True))
    np.testing.assert_allclose(found.scores, [[0.9, 0.0, 0.7, 0.6]])
    np.testing.assert_array_equal(found.classes, [[0, 0, 0, 1]])
    np.testing.assert_allclose(found.weights[0, 0], [0.5, 0, 0.25, 0])
    np.testing.assert_allclose(found.weights[0, 2:], [[0, 0, 0, 1], [0, 1, 0, 0]])
    # If classes do not matter, the second object is found once, too.
    found = join_things(feature, [first, second], PostprocessConfig(class_aware=False))
    np.testing.assert_allclose(found.scores, [[0.9, 0.0, 0.7, 0.0]])
    np.testing.assert_allclose(found.weights[0, 2], [0, 0.5, 0, 0.5])


def test_stuff_is_averaged_over_the_views_that_show_it() -> None:
    stuff = [
        StuffKernels(tf.constant([[[2.0, 0], [2.0, 0], [9.0, 0]]]), tf.constant([[True, True, False]])),
        StuffKernels(tf.constant([[[0, 4.0], [0, 9.0], [0, 9.0]]]), tf.constant([[True, False, False]])),
    ]
    found = average_stuff(stuff)
    np.testing.assert_allclose(found.weights, [[[1, 2], [2, 0], [0, 0]]])
    np.testing.assert_array_equal(found.present, [[True, True, False]])


def test_border_ness_is_that_of_the_views_of_the_own_size() -> None:
    config = LPSNetConfig(box=BoxConfig(levels=("p3", "p4"), size_limits=(16,)))
    system: Any = SimpleNamespace(config=config)

    def view(values: list[float], scale: float, *, mirrored: bool = False) -> View:
        """An image of 8 x 16 pixels with two cells on the finer level and one on the coarser."""
        size = round(scale)
        logits = np.log(np.array(values) / (1 - np.array(values)))
        outputs = {
            "border_ness_p3": tf.constant(np.kron(logits[None, None], np.ones((1, size, size))), tf.float32),
            "border_ness_p4": tf.zeros((1, size, size)),
        }
        return View(system, outputs | ({"network_size": tf.constant([16, 32])} if size > 1 else {}), scale, mirrored)

    views = [view([0.9, 0.9], 2.0), view([0.2, 0.6], 1.0), view([0.8, 0.4], 1.0, mirrored=True)]
    found = average_border_ness(views, (8, 16), config)
    # The mirror image of 0.8, 0.4 is 0.4, 0.8: means are 0.3 and 0.7. The outer half of a cell repeats its value.
    np.testing.assert_allclose(found["border_ness"][0, 0, :, :4], 0.3 * np.ones((8, 4)), atol=1e-5)
    np.testing.assert_allclose(found["border_ness"][0, 0, :, -4:], 0.7 * np.ones((8, 4)), atol=1e-5)
    np.testing.assert_allclose(found["border_ness"][0, 1], 0.5 * np.ones((8, 16)), atol=1e-5)
    assert found["border_ness_scale"] == 1.0
    # A view at twice the size alone: its levels are for half the distances.
    found = average_border_ness(views[:1], (8, 16), config)
    np.testing.assert_allclose(found["border_ness"][0, 0], 0.9 * np.ones((8, 16)), atol=1e-5)
    border_ness = predict_border_ness(found, Geometry((8, 16)), config)
    assert border_ness is not None
    np.testing.assert_allclose(border_ness.size_limits, [8.0])
