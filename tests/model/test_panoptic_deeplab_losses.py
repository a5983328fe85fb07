"""Losses of Panoptic-DeepLab: by hand, and against Detectron2's."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from keras import ops

from deeplab2_like.model.panoptic_deeplab.config import LossConfig
from deeplab2_like.model.panoptic_deeplab.losses import bootstrapped_cross_entropy, compute_losses

DETECTRON2 = Path(__file__).parents[1] / "data" / "detectron2_panoptic_deeplab" / "train.npz"
LN2, LN3 = np.log(2.0), np.log(3.0)


def cross_entropy(labels: Any, weights: Any, logits: Any, share: float, **options: Any) -> list[float]:
    loss = bootstrapped_cross_entropy(
        ops.array(labels, "int32"),
        ops.array(weights, "float32"),
        ops.array(logits, "float32"),
        top_k_share=share,
        **options,
    )
    return [float(loss.total), float(loss.normalizer)]


# Four pixels and two classes, [1, 2, 2, C]. Softmax of (0, 0) is (1/2, 1/2), of (ln 3, 0) it is (3/4, 1/4). The cross
# entropies are -ln(1/2) = ln 2, -ln(3/4) = 2 ln 2 - ln 3, -ln(1/4) = 2 ln 2, and 3 ln 2 for weight 3.
LABELS = [[[0, 0], [1, 1]]]
WEIGHTS = [[[1, 1], [1, 3]]]
LOGITS = [[[[0, 0], [LN3, 0]], [[LN3, 0], [0, 0]]]]


def test_hardest_half_of_four_pixels() -> None:
    # The two hardest are those of 2 ln 2 and 3 ln 2.
    assert cross_entropy(LABELS, WEIGHTS, LOGITS, 0.5) == pytest.approx([5 * LN2, 2])


def test_all_pixels() -> None:
    assert cross_entropy(LABELS, WEIGHTS, LOGITS, 1.0) == pytest.approx([8 * LN2 - LN3, 4])


def test_at_least_one_pixel() -> None:
    assert cross_entropy(LABELS, WEIGHTS, LOGITS, 0.01) == pytest.approx([3 * LN2, 1])


def test_ignored_pixels_count_in_the_share_only() -> None:
    # Without the last pixel the hardest are those of 2 ln 2 and ln 2: still two, half of four.
    labels, weights = [[[0, 0], [1, 255]]], [[[1, 1], [1, 0]]]
    assert cross_entropy(labels, weights, LOGITS, 0.5) == pytest.approx([3 * LN2, 2])
    assert cross_entropy(labels, weights, LOGITS, 1.0) == pytest.approx([5 * LN2 - LN3, 4])
    assert cross_entropy(np.full((1, 2, 2), 255), np.zeros((1, 2, 2)), LOGITS, 0.5) == [0, 2]


def test_share_is_taken_of_each_image_or_of_the_batch() -> None:
    # The same four pixels as two images of two: ln 2 and 2 ln 2 - ln 3; 2 ln 2 and 3 ln 2.
    images = np.reshape(LABELS, (2, 1, 2)), np.reshape(WEIGHTS, (2, 1, 2)), np.reshape(LOGITS, (2, 1, 2, 2))
    assert cross_entropy(*images, 0.5) == pytest.approx([LN2 + 3 * LN2, 2])
    # Both of the hardest of the batch are in the second image.
    assert cross_entropy(*images, 0.5, over_batch=True) == pytest.approx([5 * LN2, 2])


def test_an_easy_and_a_hard_image_on_one_device_and_on_two() -> None:
    # Five pixels each, of class 0, with logits (-x, 0): the cross entropy is ln(1 + e^x). A fifth is one pixel.
    easy, hard = [-2.0, -1.0, 0.0, -3.0, -2.0], [1.0, 3.0, 2.0, 2.5, 0.0]
    logits = np.stack([-np.array([easy, hard]), np.zeros((2, 5))], axis=-1)[:, None]  # [2, 1, 5, 2]
    labels, weights = np.zeros((2, 1, 5)), np.ones((2, 1, 5))
    # The hardest pixel of the easy image has x = 0, that of the hard one x = 3.
    expected = (LN2 + np.log(1 + np.exp(3.0))) / 2  # (0.693 + 3.049) / 2 = 1.871
    total, count = cross_entropy(labels, weights, logits, 0.2)
    assert total / count == pytest.approx(expected)
    halves = np.array([cross_entropy(labels[:1], weights[:1], logits[k : k + 1], 0.2) for k in (0, 1)])
    total, count = halves.sum(axis=0)
    assert total / count == pytest.approx(expected)
    # Over the batch, one device takes x = 3 and x = 2.5, both of the hard image: (3.049 + 2.579) / 2 = 2.814.
    total, count = cross_entropy(labels, weights, logits, 0.2, over_batch=True)
    assert total / count == pytest.approx((np.log(1 + np.exp(3.0)) + np.log(1 + np.exp(2.5))) / 2)


def losses_of(center_loss: Any = "mean_squared_error", **changes: Any) -> dict[str, list[float]]:
    """The losses of one image of 1x3 pixels: stuff, an instance, void."""
    targets: dict[str, Any] = {
        "semantic": [[[0, 1, 255]]],
        "semantic_weight": [[[1.0, 1.0, 0.0]]],
        "center": [[[0.25, 1.0, 0.5]]],
        "center_weight": [[[1.0, 1.0, 0.0]]],
        "offset": [[[[0.0, 0.0], [1.5, -2.0], [0.0, 0.0]]]],
        "offset_weight": [[[0.0, 1.0, 0.0]]],
        **changes,
    }
    outputs: dict[str, Any] = {
        "semantic_logits": [[[[0.0, 0.0], [0.0, LN3], [5.0, 7.0]]]],
        "center": [[[[0.0], [LN3], [9.0]]]],
        "offset": [[[[8.0, 8.0], [1.0, 1.0], [-7.0, 7.0]]]],
    }
    losses = compute_losses(
        {name: ops.array(value, "int32" if name == "semantic" else "float32") for name, value in targets.items()},
        {name: ops.array(value, "float32") for name, value in outputs.items()},
        LossConfig(top_k_share=1.0, center=center_loss),
        stride=1,
    )
    return {name: [float(loss.total), float(loss.normalizer)] for name, loss in losses.items()}


def test_mean_squared_error_and_offsets() -> None:
    losses = losses_of()
    # ln 2, and -ln(3/4); three pixels.
    assert losses["semantic"] == pytest.approx([LN2 + 2 * LN2 - LN3, 3])
    # (0 - 0.25)^2 + (ln 3 - 1)^2; void does not count.
    assert losses["center"] == pytest.approx([0.0625 + (LN3 - 1) ** 2, 2])
    # |1 - 1.5| + |1 + 2|, on the instance only.
    assert losses["offset"] == pytest.approx([3.5, 1])


def test_sigmoid_cross_entropy() -> None:
    # Logit 0 is 1/2, and -(0.25 ln(1/2) + 0.75 ln(1/2)) = ln 2; logit ln 3 is 3/4, and -ln(3/4) for target 1.
    assert losses_of("sigmoid_cross_entropy")["center"] == pytest.approx([LN2 + 2 * LN2 - LN3, 2])


def test_without_instances_the_normalizer_is_zero() -> None:
    losses = losses_of(offset_weight=[[[0.0, 0.0, 0.0]]], center_weight=[[[0.0, 0.0, 0.0]]])
    assert losses["offset"] == [0, 0]
    assert losses["center"] == [0, 0]


def test_predictions_are_upsampled_and_cropped() -> None:
    # One pixel at stride 4 for an image of 3x2: the same value everywhere, as nothing is beside it.
    zeros = np.zeros((1, 3, 2), np.float32)
    targets = {
        "semantic": zeros.astype(np.int32),
        "semantic_weight": zeros + 1,
        "center": zeros,
        "center_weight": zeros + 1,
        "offset": np.zeros((1, 3, 2, 2), np.float32),
        "offset_weight": zeros + 1,
    }
    outputs = {
        "semantic_logits": np.array([[[[0.0, LN3]]]]),
        "center": np.array([[[[0.5]]]]),
        "offset": np.array([[[[2.0, -1.0]]]]),
    }
    losses = compute_losses(targets, outputs, LossConfig(top_k_share=1.0), stride=4)
    found = {name: [float(loss.total), float(loss.normalizer)] for name, loss in losses.items()}
    assert found["semantic"] == pytest.approx([6 * 2 * LN2, 6])
    assert found["center"] == pytest.approx([6 * 0.25, 6])
    assert found["offset"] == pytest.approx([6 * 3, 6])


def test_semantic_only() -> None:
    targets = {"semantic": ops.array(LABELS, "int32"), "semantic_weight": ops.array(WEIGHTS, "float32")}
    outputs = {"semantic_logits": ops.array(LOGITS, "float32")}
    losses = compute_losses(targets, outputs, LossConfig(top_k_share=0.5), stride=1)
    assert list(losses) == ["semantic"]
    assert float(losses["semantic"].total) == pytest.approx(5 * LN2)


def test_equals_detectron2() -> None:
    with np.load(DETECTRON2) as file:
        reference = dict(file)
    names = ("semantic", "semantic_weight", "center", "center_weight", "offset", "offset_weight")
    targets = {name: ops.array(reference[name])[None] for name in names}
    targets["semantic"] = ops.cast(targets["semantic"], "int32")
    # On void, Detectron2 leaves the weight at 1 and the loss leaves such pixels out.
    targets["semantic_weight"] *= ops.cast(targets["semantic"] != 255, "float32")
    outputs = {
        "semantic_logits": ops.array(reference["predicted_logits"])[None],
        "center": ops.array(reference["predicted_center"])[None],
        "offset": 4 * ops.array(reference["predicted_offset"])[None],
    }
    # 20 % of 128 * 128 pixels are 3276.8. Detectron2 rounds down, this library to the nearest.
    share = 3276 / 128**2
    losses = compute_losses(targets, outputs, LossConfig(top_k_share=share, top_k_over="batch"), stride=4)
    assert float(losses["semantic"].normalizer) == 3276
    for name, weight in {"semantic": 1, "center": 200, "offset": 0.01}.items():
        total, normalizer = losses[name]
        assert float(weight * total / normalizer) == pytest.approx(float(reference[f"loss_{name}"]), rel=1e-4), name
