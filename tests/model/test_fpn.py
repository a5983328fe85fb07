"""The feature pyramid: by hand, and its shapes."""

import keras
import numpy as np
import pytest

from deeplab2_like.errors import UserError
from deeplab2_like.model.config import Norm
from deeplab2_like.model.fpn import FeaturePyramid, repeat_pixels
from deeplab2_like.model.panoptic_fpn.network import split_channels

STRIDES = {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}


def features(height: int = 64, width: int = 96, channels: int = 3) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        name: random.normal(size=(2, height // stride, width // stride, channels)).astype(np.float32)
        for name, stride in STRIDES.items()
    }


def test_repeat_pixels() -> None:
    x = np.array([[1, 2], [3, 4]], np.float32)[None, :, :, None]
    expected = [[1, 1, 2, 2], [1, 1, 2, 2], [3, 3, 4, 4], [3, 3, 4, 4]]
    np.testing.assert_array_equal(repeat_pixels(x)[0, :, :, 0], expected)


def test_levels_add_up_from_the_coarsest_down() -> None:
    pyramid = FeaturePyramid(strides=STRIDES, channels=1)
    inputs = features(channels=1)
    pyramid(inputs)
    # Laterals that multiply by 1, 10, 100, 1000; outputs that copy (the center of a 3x3 kernel is 1) and add 0.5.
    for power, (lateral, output) in enumerate(zip(pyramid.laterals, pyramid.outputs, strict=True)):
        lateral.conv.kernel.assign(np.full((1, 1, 1, 1), 10.0**power))
        output.conv.kernel.assign(np.pad(np.ones((1, 1, 1, 1)), [(1, 1), (1, 1), (0, 0), (0, 0)]))
        output.conv.bias.assign([0.5])
    found = pyramid(inputs)
    total: np.ndarray | None = None
    for power, feature in reversed(list(enumerate(("res2", "res3", "res4", "res5")))):
        own = 10.0**power * inputs[feature]
        total = own if total is None else own + total.repeat(2, axis=1).repeat(2, axis=2)
        # The output convolution must not leak into the levels below.
        np.testing.assert_allclose(found[f"p{power + 2}"], total + 0.5, rtol=1e-4, atol=1e-2)
    np.testing.assert_array_equal(found["p6"], found["p5"][:, ::2, ::2])


def test_shapes_strides_and_order_of_levels() -> None:
    pyramid = FeaturePyramid(strides=STRIDES, channels=8, name="fpn")
    # 160 / 32 = 5 is odd: p6 has ceil(5 / 2) = 3 rows.
    found = pyramid(features(160, 96))
    assert pyramid.strides == {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
    assert [(name, level.shape) for name, level in found.items()] == [
        ("p2", (2, 40, 24, 8)),
        ("p3", (2, 20, 12, 8)),
        ("p4", (2, 10, 6, 8)),
        ("p5", (2, 5, 3, 8)),
        ("p6", (2, 3, 2, 8)),
    ]
    assert {weight.path for weight in pyramid.weights} == {
        f"fpn/{kind}{level}/conv/{variable}"
        for kind in ("lateral", "output")
        for level in range(2, 6)
        for variable in ("kernel", "bias")
    }


def test_coarser_levels_by_convolutions() -> None:
    pyramid = FeaturePyramid(
        strides=STRIDES, features=("res3", "res4", "res5"), channels=8, coarser_levels=2, coarser="convolve", name="fpn"
    )
    found = pyramid(features(128, 64))
    assert pyramid.strides == {"p3": 8, "p4": 16, "p5": 32, "p6": 64, "p7": 128}
    assert {name: level.shape[1:3] for name, level in found.items()} == {
        "p3": (16, 8),
        "p4": (8, 4),
        "p5": (4, 2),
        "p6": (2, 1),
        "p7": (1, 1),
    }
    assert "fpn/coarser7/conv/kernel" in {weight.path for weight in pyramid.weights}
    # p7 comes from the ReLU of p6.
    assert pyramid.coarser is not None
    again = pyramid.coarser[1](keras.ops.relu(found["p6"]))
    np.testing.assert_allclose(found["p7"], again, rtol=1e-5)


def test_levels_start_at_the_finest_feature() -> None:
    pyramid = FeaturePyramid(strides=STRIDES, features=tuple(STRIDES), channels=8, coarser_levels=0)
    assert list(pyramid(features())) == ["p1", "p2", "p3", "p4", "p5"]


def test_normalization() -> None:
    pyramid = FeaturePyramid(strides=STRIDES, channels=32, norm=Norm(kind="group"), name="fpn")
    pyramid(features())
    paths = {weight.path for weight in pyramid.weights}
    assert "fpn/output2/norm/gamma" in paths
    assert "fpn/output2/conv/bias" not in paths


def test_each_branch_gets_its_own_half_of_the_channels() -> None:
    level = np.arange(4, dtype=np.float32) * np.ones((1, 2, 2, 4), np.float32)
    first, second = split_channels({"p2": level})
    np.testing.assert_array_equal(first["p2"][0, 0, 0], [0, 1])
    np.testing.assert_array_equal(second["p2"][0, 0, 0], [2, 3])


def test_atrous_backbones_are_refused() -> None:
    with pytest.raises(UserError, match=r"'res5' has stride 16 instead of 32; set config key 'model\.backbone\.output"):
        FeaturePyramid(strides=STRIDES | {"res5": 16})
