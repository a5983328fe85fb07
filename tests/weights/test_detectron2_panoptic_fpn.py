"""The importer of Detectron2's Panoptic FPN, and all that follows from its weights.

The reference numbers are described in data/detectron2_panoptic_fpn.
"""

from pathlib import Path
from typing import Any, Literal

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference_state import read_reference_state

from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.base import Loss
from deeplab2_like.model.boxes import encode_boxes
from deeplab2_like.model.detection.masks import mask_targets
from deeplab2_like.model.detection.roi_heads import box_losses, mask_loss, select_masks
from deeplab2_like.model.detection.rpn import label_anchors, make_anchors, rpn_losses
from deeplab2_like.model.panoptic_fpn import PanopticFPN
from deeplab2_like.model.semantic import semantic_loss
from deeplab2_like.weights.detectron2_panoptic_fpn import CONFIG, load_panoptic_fpn, panoptic_fpn_name

DATA = Path(__file__).parents[1] / "data" / "detectron2_panoptic_fpn"
INFO = DatasetInfo(
    name="coco_like",
    categories=tuple(Category(id=i, name=f"class {i}", is_thing=i < 80, color=(i, i, i)) for i in range(133)),
)
IMAGE_SIZE = (120, 150)
MAP_SIZE = (180, 225)


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def build_system(depth: Literal[50, 101] = 50, **postprocess: Any) -> PanopticFPN:
    # The reference image is small, and was not resized.
    overrides = [f"model.backbone.name=resnet{depth}", "model.resize=null"]
    overrides += [f"model.postprocess.{key}={value}" for key, value in postprocess.items()]
    return PanopticFPN(load_config(CONFIG, overrides).model, INFO)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return read_reference_state(DATA)


@pytest.fixture(scope="module")
def system(state: dict[str, np.ndarray]) -> PanopticFPN:
    system = build_system()
    system(keras.KerasTensor((1, 64, 64, 3), "uint8"))  # Creates the variables; computes nothing.
    load_panoptic_fpn(system, state)
    return system


def test_network_computes_what_detectron2_computes(system: PanopticFPN) -> None:
    expected = read("forward")
    images = expected.pop("image")[None]
    features = system.backbone(system.prepare_images(images))
    pyramid = system.fpn(features)
    objectness, deltas = system.detector.rpn_head(pyramid)
    grid = {level: (*value.shape[1:3], 3) for level, value in pyramid.items()}
    step = {"p2": 4, "p3": 2, "p4": 1, "p5": 1, "p6": 1}
    levels = {level: pyramid[level] for level in system.detector.roi_levels}
    pooled = system.detector.pool(levels, tf.constant(expected.pop("proposals")[None]), 7)
    class_logits, box_deltas = system.detector.box_head(pooled)
    found = {name: expected.pop(f"detection_{name}")[None] for name in ("boxes", "scores", "classes")}
    mask_features = system.detector.pool(levels, tf.constant(found["boxes"][:, :8]), 14)
    computed = {
        "res2": features["res2"][0, ::4, ::4, ::8],
        "res3": features["res3"][0, ::4, ::4, ::8],
        "res4": features["res4"][0, ::2, ::2, ::16],
        "res5": features["res5"][0, ::2, ::2, ::16],
        "p2": pyramid["p2"][0, ::4, ::4, ::8],
        "p3": pyramid["p3"][0, ::4, ::4, ::4],
        "p4": pyramid["p4"][0, ::2, ::2, ::4],
        "p5": pyramid["p5"][0, :, :, ::4],
        "p6": pyramid["p6"][0, :, :, ::4],
        "semantic_logits": system.semantic_branch(pyramid)[0, ::4, ::4],
        **{f"objectness_{k}": tf.reshape(objectness[k], grid[k])[:: step[k], :: step[k]] for k in pyramid},
        **{f"deltas_{k}": tf.reshape(deltas[k], (*grid[k], 4))[:: step[k], :: step[k]] for k in pyramid},
        "box_pooled": pooled[0, :16, :, :, ::16],
        "class_logits": class_logits[0],
        "box_deltas": tf.gather(box_deltas[0], expected.pop("box_delta_classes"), axis=1),
        "mask_logits": system.detector.mask_head(mask_features)[0, :, ::4, ::4],
    }
    assert computed.keys() == expected.keys()
    for name, reference in expected.items():
        difference = np.abs(keras.ops.convert_to_numpy(computed[name]) - reference) / reference.std()
        assert difference.max() < 1e-3, name
        assert difference.mean() < 2e-4, name

    # From the image to the detections. Values above are off by some 1e-4, so two that nearly tie may change places.
    outputs = system(images)
    same = [
        np.flatnonzero(
            (np.abs(outputs["boxes"][0] - box).max(axis=1) < 0.05)
            & (np.abs(outputs["scores"][0] - score) < 1e-3)
            & (outputs["thing_classes"][0] == class_id)
        ).size
        for box, score, class_id in zip(*(found[name][0] for name in ("boxes", "scores", "classes")), strict=True)
    ]
    assert np.sum(same) >= 98
    assert max(same) == 1


def test_masks_and_maps_are_those_of_detectron2(system: PanopticFPN) -> None:
    data = read("postprocess")
    outputs = {
        name: tf.constant(data[name][None]) for name in ("boxes", "scores", "thing_classes", "masks", "semantic_logits")
    }
    outputs["network_size"] = tf.constant(IMAGE_SIZE)
    found = system.instances(outputs, MAP_SIZE)
    assert found is not None
    np.testing.assert_allclose(found["boxes"][0], data["final_boxes"], rtol=1e-6)
    masks = np.unpackbits(data["final_masks"], count=100 * MAP_SIZE[0] * MAP_SIZE[1]).reshape(100, *MAP_SIZE)
    np.testing.assert_array_equal(found["masks"][0], masks)
    np.testing.assert_array_equal(found["classes"][0], data["thing_classes"])
    for name, score_threshold, area in (("stock", 0.5, 4096), ("low", 0.1, 200)):
        merged = build_system(score_threshold=score_threshold, stuff_area_limit=area).postprocess(outputs, MAP_SIZE)
        np.testing.assert_array_equal(merged["panoptic"][0], data[f"panoptic_{name}"])


def value(loss: Loss) -> float:
    return float(loss.total) / float(loss.normalizer)


def test_matching_and_losses_of_proposals(system: PanopticFPN) -> None:
    data = read("train")
    pyramid = {f"p{level}": np.zeros((1, -(-128 // 2**level), -(-160 // 2**level), 1)) for level in range(2, 7)}
    config = system.config.rpn
    by_level = make_anchors(pyramid, system.fpn.strides, config)
    anchors = tf.concat(list(by_level.values()), axis=0)
    targets = {
        "boxes": tf.constant(data["boxes"][None]),
        "valid": tf.ones((1, 5), bool),
        "instance_map": tf.zeros((1, *IMAGE_SIZE), tf.int32),
    }
    positive, negative, row = label_anchors(anchors, targets, config)
    label = np.where(positive[0], 1, np.where(negative[0], 0, -1))
    # An anchor of size 32 lies within an instance at many places alike: rounding decides which Detectron2 takes.
    ties = label != data["anchor_label"]
    assert ties.sum() == 9
    assert (label[ties] == 1).all()
    assert (data["anchor_label"][ties] == -1).all()
    np.testing.assert_array_equal(row[0], data["anchor_row"])

    drawn = np.flatnonzero(data["anchor_sampled"] >= 0).astype(np.int32)
    matched = data["boxes"][data["anchor_row"][drawn]]
    samples = {
        "index": tf.constant(drawn[None]),
        "valid": tf.ones((1, len(drawn)), bool),
        "positive": tf.constant(data["anchor_sampled"][drawn][None] == 1),
        "deltas": encode_boxes(tf.constant(matched[None]), tf.gather(anchors, drawn)[None], (1, 1, 1, 1)),
    }
    losses = rpn_losses(tf.constant(data["objectness"][None]), tf.constant(data["deltas"][None]), samples, config)
    for name, loss in losses.items():
        assert value(loss) == pytest.approx(float(data[f"loss_{name}"]), rel=1e-5), name


def test_losses_of_rois(system: PanopticFPN) -> None:
    data = read("train")
    classes = data["roi_classes"]
    number, foreground = len(classes), classes < 80
    samples = {
        "boxes": tf.constant(data["roi_boxes"][None]),
        "valid": tf.ones((1, number), bool),
        "foreground": tf.constant(foreground[None]),
        "classes": tf.constant(classes[None]),
        "matched_boxes": tf.constant(data["roi_matched_boxes"][None]),
    }
    deltas = np.zeros((1, number, 80, 4), np.float32)
    deltas[0, np.arange(number), np.minimum(classes, 79)] = data["roi_deltas_of_class"]
    losses = box_losses(tf.constant(data["roi_class_logits"][None]), tf.constant(deltas), samples, system.config.roi)
    for name, loss in losses.items():
        assert value(loss) == pytest.approx(float(data[f"loss_{name}"]), rel=1e-5), name

    expected = np.unpackbits(data["mask_targets"], count=foreground.sum() * 28**2).reshape(-1, 28, 28)
    masks = np.unpackbits(data["instance_masks"], count=5 * IMAGE_SIZE[0] * IMAGE_SIZE[1]).reshape(5, *IMAGE_SIZE)
    matched = (data["roi_matched_boxes"][foreground][:, None] == data["boxes"]).all(axis=2).argmax(axis=1)
    for instance in range(5):
        # One at a time, as these masks overlap, which those of a panoptic map do not.
        boxes = data["roi_boxes"][foreground][matched == instance]
        found = mask_targets(
            tf.constant(masks[instance][None].astype(np.int32)),
            tf.constant(boxes[None]),
            tf.zeros((1, len(boxes)), tf.int32),
            sampling_ratio=0,
        )
        np.testing.assert_array_equal(found[0], expected[matched == instance])
    one_class = tf.constant(data["mask_logits_of_class"][None, ..., None])
    zeros = tf.zeros((1, foreground.sum()), tf.int32)
    np.testing.assert_array_equal(select_masks(one_class, zeros), one_class[..., 0])
    loss = mask_loss(one_class, tf.constant(expected[None] == 1), zeros, tf.ones_like(zeros, bool))
    assert value(loss) == pytest.approx(float(data["loss_mask"]), rel=1e-5)


def test_semantic_loss(system: PanopticFPN) -> None:
    labels = read("train")["semantic_labels"].astype(np.int32)
    # Any thing class for "things", which is 0 there.
    class_map = np.where(labels == 255, 255, np.where(labels == 0, 3, labels + 79))
    logits = tf.constant(read("postprocess")["semantic_logits"][None])
    loss = semantic_loss(tf.constant(class_map[None]), logits, classes=system.classes, stride=4)
    weighted = system.loss_weights["semantic"] * value(loss)
    assert weighted == pytest.approx(float(read("train")["loss_semantic"]), rel=1e-5)


# Detectron2 reports 45.97 M. The deeper one has 17 more blocks in res4, of 2 * 1024 * 256 + 9 * 256 * 256 parameters.
@pytest.mark.parametrize(("depth", "parameters"), [(50, 45_973_990), (101, 45_973_990 + 17 * 1_114_112)])
def test_size_is_that_of_the_release(depth: Literal[50, 101], parameters: int) -> None:
    system = build_system(depth)
    system(keras.KerasTensor((1, 64, 64, 3), "uint8"))
    assert sum(int(np.prod(weight.shape)) for weight in system.trainable_weights) == parameters
    names = [panoptic_fpn_name(weight.path) for weight in system.weights]
    assert None not in names
    assert len(set(names)) == len(names)
    if depth == 50:
        lines = (DATA / "state_keys.tsv").read_text().splitlines()
        assert sorted(str(name) for name in names) == sorted(line.split("\t")[0] for line in lines)


def test_what_does_not_fit_is_named_and_changes_nothing(system: PanopticFPN, state: dict[str, np.ndarray]) -> None:
    before = system.fpn.laterals[0].conv.kernel.numpy()
    wrong = {name: array + 1 for name, array in state.items()}
    del wrong["backbone.fpn_lateral3.bias"]
    wrong["roi_heads.box_head.fc3.weight"] = np.zeros(3, np.float32)
    wrong["roi_heads.box_predictor.cls_score.weight"] = np.zeros((10, 1024), np.float32)
    with pytest.raises(
        UserError,
        match=r"does not fit this Panoptic FPN: 1 missing \(backbone\.fpn_lateral3\.bias\); "
        r"1 unexpected \(roi_heads\.box_head\.fc3\.weight\); 1 of another shape \(roi_heads\.box_predictor\.cls_score\."
        r"weight is \(10, 1024\), which gives \(1024, 10\) instead of \(1024, 81\)\); .*'panoptic_fpn/coco_detectron2'",
    ):
        load_panoptic_fpn(system, wrong)
    np.testing.assert_array_equal(system.fpn.laterals[0].conv.kernel.numpy(), before)


def test_parts_can_keep_their_initial_weights(state: dict[str, np.ndarray]) -> None:
    system = build_system()
    system(keras.KerasTensor((1, 64, 64, 3), "uint8"))
    initial = system.semantic_branch.predictor.kernel.numpy()
    other = state | {"sem_seg_head.predictor.weight": np.zeros((20, 128, 1, 1), np.float32)}
    load_panoptic_fpn(system, other, keep_initial=["sem_seg_head.predictor.*"])
    np.testing.assert_array_equal(system.semantic_branch.predictor.kernel.numpy(), initial)


def test_variables_without_counterpart_have_no_name() -> None:
    assert panoptic_fpn_name("panoptic_fpn/semantic_branch/p5_conv3/norm/gamma") == "sem_seg_head.p5.4.norm.weight"
    assert panoptic_fpn_name("panoptic_fpn/fpn/coarser6/conv/kernel") is None
    assert panoptic_fpn_name("panoptic_fpn/fpn/lateral2/conv/other") is None
