"""Every stage of detection against Detectron2, from the same input; see data/detectron2_detection/README.md."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.model.boxes import encode_boxes
from deeplab2_like.model.detection.config import RoiConfig, RpnConfig
from deeplab2_like.model.detection.masks import mask_targets, paste_masks
from deeplab2_like.model.detection.matching import match_boxes
from deeplab2_like.model.detection.roi_heads import box_losses, detect
from deeplab2_like.model.detection.roi_pooling import roi_align
from deeplab2_like.model.detection.rpn import label_anchors, make_anchors, propose, rpn_losses

FILE = Path(__file__).parents[1] / "data" / "detectron2_detection" / "stages.npz"
STRIDES = {"p2": 4, "p3": 8, "p4": 16, "p5": 32, "p6": 64}
ROI_LEVELS = ("p2", "p3", "p4", "p5")
IMAGE_SIZE = (120, 150)
WEIGHTS = (10.0, 10.0, 5.0, 5.0)


@pytest.fixture(scope="module")
def stages() -> dict[str, np.ndarray]:
    with np.load(FILE) as file:
        return dict(file)


def y_first(values: np.ndarray) -> np.ndarray:
    """Boxes and deltas with y before x, as a batch of one."""
    return values[None][..., [1, 0, 3, 2]].astype(np.float32)


def pyramid(stages: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {level: stages[f"features_{level}"].transpose(0, 2, 3, 1) for level in ROI_LEVELS}


def anchors(stages: dict[str, np.ndarray]) -> dict[str, tf.Tensor]:
    sizes = {"p2": (32, 40), "p3": (16, 20), "p4": (8, 10), "p5": (4, 5), "p6": (2, 3)}
    maps = {level: np.zeros((1, *size, 1)) for level, size in sizes.items()}
    return make_anchors(maps, STRIDES, RpnConfig())


def instance_masks(stages: dict[str, np.ndarray]) -> np.ndarray:
    return np.unpackbits(stages["gt_masks"])[: 5 * 120 * 150].reshape(5, 120, 150).astype(bool)


def targets(stages: dict[str, np.ndarray]) -> dict[str, Any]:
    return {
        "boxes": y_first(stages["gt_boxes"]),
        "classes": stages["gt_classes"][None],
        "valid": np.ones((1, 5), bool),
        "instance_map": np.zeros((1, *IMAGE_SIZE), np.int32),  # No crowd; the fixture's masks overlap.
    }


def test_proposals(stages: dict[str, np.ndarray]) -> None:
    objectness = {level: stages[f"rpn_objectness_{level}"][None] for level in STRIDES}
    deltas = {level: y_first(stages[f"rpn_deltas_{level}"]) for level in STRIDES if level != "p2"}
    p2 = np.zeros((1, objectness["p2"].shape[1], 4), np.float32)
    p2[0, stages["rpn_deltas_p2_rows"]] = y_first(stages["rpn_deltas_p2"])[0]
    found = propose(objectness, {"p2": p2, **deltas}, anchors(stages), IMAGE_SIZE, RpnConfig())
    assert int(tf.reduce_sum(tf.cast(found["valid"], tf.int32))) == 808
    np.testing.assert_array_equal(found["scores"][0, :808], stages["proposal_logits"])
    np.testing.assert_allclose(found["boxes"][0, :808:2], y_first(stages["proposal_boxes"])[0], atol=1e-4)


def test_anchor_matching(stages: dict[str, np.ndarray]) -> None:
    all_anchors = tf.concat(list(anchors(stages).values()), axis=0)
    positive, negative, row = label_anchors(all_anchors, targets(stages), RpnConfig())
    np.testing.assert_array_equal(row[0], stages["rpn_match_index"])
    found = np.where(positive[0], 1, np.where(negative[0], 0, -1))
    # Fourteen anchors have the same best overlap with the third instance. Rounding leaves Detectron2 with five of them;
    # here all of them are positive.
    tied = np.flatnonzero(found != stages["rpn_match_label"])
    assert len(tied) == 9
    iou, _, _ = match_boxes(all_anchors[None], targets(stages)["boxes"], targets(stages)["valid"])
    np.testing.assert_allclose(iou.numpy()[0, tied], 0.4267579, atol=2e-7)
    assert set(found[tied]) == {1}
    assert set(stages["rpn_match_index"][tied]) == {2}


def test_rpn_losses(stages: dict[str, np.ndarray]) -> None:
    all_anchors = tf.concat(list(anchors(stages).values()), axis=0)
    objectness = np.concatenate([stages[f"rpn_objectness_{level}"] for level in STRIDES])[None]
    index = np.flatnonzero(stages["rpn_sampled_label"] >= 0)
    positive = stages["rpn_sampled_label"][index] == 1
    deltas = np.zeros((1, len(all_anchors), 4), np.float32)
    deltas[0, index[positive]] = y_first(stages["rpn_deltas_positive"])[0]
    boxes = targets(stages)["boxes"][0, stages["rpn_match_index"][index]]
    samples = {
        "index": index[None].astype(np.int32),
        "valid": np.ones((1, len(index)), bool),
        "positive": positive[None],
        "deltas": encode_boxes(boxes, tf.gather(all_anchors, index), (1.0, 1.0, 1.0, 1.0))[None],
    }
    losses = rpn_losses(objectness, deltas, samples, RpnConfig())
    np.testing.assert_allclose(losses["rpn_class"].total / losses["rpn_class"].normalizer, stages["loss_rpn_cls"], 1e-5)
    np.testing.assert_allclose(losses["rpn_box"].total / losses["rpn_box"].normalizer, stages["loss_rpn_loc"], 1e-5)


@pytest.mark.parametrize(
    ("bins", "boxes", "expected"), [(7, "pooled_boxes", "pooled"), (14, "mask_pooled_boxes", "mask_pooled")]
)
def test_adaptive_roi_align(stages: dict[str, np.ndarray], bins: int, boxes: str, expected: str) -> None:
    found = roi_align(pyramid(stages), STRIDES, y_first(stages[boxes]), output_size=bins, sampling_ratio=0)
    np.testing.assert_allclose(found[0], stages[expected].transpose(0, 2, 3, 1), atol=2e-4)  # Deviation about 6.


def test_detections(stages: dict[str, np.ndarray]) -> None:
    proposal, thing = stages["delta_pairs"].T
    deltas = np.zeros((1, 100, 80, 4), np.float32)
    deltas[0, proposal, thing] = y_first(stages["deltas"])[0]
    proposals = {"boxes": y_first(stages["class_boxes"]), "valid": np.ones((1, 100), bool)}
    found = detect(stages["class_logits"][None], deltas, proposals, IMAGE_SIZE, RoiConfig(box_weights=WEIGHTS))
    np.testing.assert_array_equal(found["classes"][0], stages["det_classes"])
    np.testing.assert_array_equal(found["proposal"][0], stages["det_proposal"])
    np.testing.assert_allclose(found["scores"][0], stages["det_scores"], atol=1e-6)
    np.testing.assert_allclose(found["boxes"][0], y_first(stages["det_boxes"])[0], atol=1e-4)


def test_pasted_masks(stages: dict[str, np.ndarray]) -> None:
    expected = np.unpackbits(stages["paste_masks"])[: 10 * 180 * 225].reshape(10, 180, 225)
    found = paste_masks(stages["paste_probabilities"][None], y_first(stages["paste_boxes"]), 180, 225)
    np.testing.assert_array_equal(found[0], expected)


def test_roi_matching(stages: dict[str, np.ndarray]) -> None:
    truth = targets(stages)
    iou, row, _ = match_boxes(y_first(stages["roi_boxes"]), truth["boxes"], truth["valid"])
    classes = np.where(iou[0] >= 0.5, truth["classes"][0, row[0]], 80)
    np.testing.assert_array_equal(classes, stages["roi_classes"])
    np.testing.assert_array_equal(
        truth["boxes"][0, row[0]][classes < 80], y_first(stages["roi_gt_boxes"])[0][classes < 80]
    )


def test_box_regression_loss(stages: dict[str, np.ndarray]) -> None:
    # One class is enough for the deltas of the true class; the 512 - 54 background samples count in the normalizer.
    rois = y_first(stages["box_rois"])
    samples = {
        "boxes": np.pad(rois, [(0, 0), (0, 458), (0, 0)]),
        "matched_boxes": np.pad(y_first(stages["box_gt"]), [(0, 0), (0, 458), (0, 0)]),
        "classes": np.repeat([[0, 1]], [54, 458], axis=1).astype(np.int32),
        "foreground": np.repeat([[True, False]], [54, 458], axis=1),
        "valid": np.ones((1, 512), bool),
    }
    deltas = np.pad(y_first(stages["box_deltas"])[:, :, None], [(0, 0), (0, 458), (0, 0), (0, 0)])
    loss = box_losses(np.zeros((1, 512, 2), np.float32), deltas, samples, RoiConfig(box_weights=WEIGHTS))["box"]
    np.testing.assert_allclose(loss.total / loss.normalizer, stages["loss_box_reg"], 1e-5)


def test_mask_targets(stages: dict[str, np.ndarray]) -> None:
    # The masks overlap, as those of a panoptic map never do, so each instance has a map of its own.
    truth = targets(stages)
    _, row, _ = match_boxes(y_first(stages["mask_rois"]), truth["boxes"], truth["valid"])
    expected = np.unpackbits(stages["mask_targets"])[: 54 * 28 * 28].reshape(1, 54, 28, 28)
    found = np.zeros_like(expected)
    for k, mask in enumerate(instance_masks(stages)):
        instance_map = np.where(mask, k + 1, 0).astype(np.int32)[None]
        one = mask_targets(instance_map, y_first(stages["mask_rois"]), row, sampling_ratio=0)
        found = np.where(row[..., None, None] == k, one, found)
    np.testing.assert_array_equal(found, expected)
