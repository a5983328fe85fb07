"""LPSNet: the contract, and what is particular to it."""

import numpy as np
import pytest
import tensorflow as tf
from system_contract import INFO, SystemContract, hand_made_label, paint, panoptic_quality

from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.model import PanopticSystem, build_system

SMALL = [
    "model.fpn.channels=32",
    "model.context.channels=32",
    "model.box={levels: [p3, p4, p5], size_limits: [16, 32], channels: 32, convolutions: 1}",
    "model.semantic={channels: 16, convolutions: 1}",
    "model.postprocess.stuff_area_limit=0",
]


def build_small(info: DatasetInfo = INFO, *overrides: str) -> PanopticSystem:
    return build_system(load_config("lpsnet/scenes_tiny", [*SMALL, *overrides]), info)


class TestContract(SystemContract):
    config_name = "lpsnet/scenes_tiny"
    overfit_learning_rate = 0.002

    def build(self, info: DatasetInfo) -> PanopticSystem:
        return build_small(info)

    def excite(self, system: PanopticSystem) -> None:
        random = np.random.default_rng(2)
        for layer, scale in ((system.semantic_head.predictor, 3.0), (system.box_head.predictor, 0.3)):
            layer.kernel.assign(scale * random.standard_normal(layer.kernel.shape))

    def solvable(self, label: np.ndarray, info: DatasetInfo) -> np.ndarray | None:
        """Leaves out things whose boxes overlap within their class: border-ness may not tell these apart."""
        return np.where(overlap_within_class(label, info), info.void, label)


def overlap_within_class(label: np.ndarray, info: DatasetInfo) -> np.ndarray:
    """Marks crowds, and things whose box shares a pixel of their class with another box of that class."""
    things = [value for value in np.unique(label) if value // info.label_divisor in info.thing_classes]
    masks = {}
    for value in things:
        y, x = np.nonzero(label == value)
        inside = np.zeros(label.shape, bool)
        inside[y.min() : y.max() + 1, x.min() : x.max() + 1] = True
        masks[value] = inside & (label // info.label_divisor == value // info.label_divisor)
    overlapping = np.zeros(label.shape, bool)
    for value in things:
        is_crowd = value % info.label_divisor == 0
        others = [mask for other, mask in masks.items() if other != value]
        overlapping |= (label == value) & (is_crowd or any((masks[value] & mask).any() for mask in others))
    return overlapping


def test_scenes_that_cannot_be_perfect() -> None:
    """Where boxes of a class overlap, much of the oracle's map is still right."""
    info = scenes_info()
    system = build_small(info)
    contract = TestContract()
    metric = PanopticQuality(info)
    scenes = [render_scene(index, height=96, width=192)[1] for index in range(20)]
    assert all(overlap_within_class(label, info).any() for label in scenes)
    for label in scenes:
        metric.update_state(
            label, system.postprocess_targets(contract.targets_of(system, label))["panoptic"].numpy()[0]
        )
    assert 0.6 < metric.result().things.pq < 1.0
    assert metric.result().stuff.pq == 1.0


# The options of the paper's tables and of this library.
VARIANTS = {
    "global average": ["model.context.kind=global_average"],
    "no context": ["model.context.kind=none"],
    "levels to p7": ["model.box={levels: [p3, p4, p5, p6, p7], size_limits: [8, 16, 32, 64], channels: 32}"],
    "pyramid from stride 2": [
        "model.fpn.finest_level=p1",
        "model.box={levels: [p1, p2], size_limits: [8], channels: 32}",
    ],
    "points in boxes": ["model.box.positives=box"],
    "center-ness": ["model.box.measured_to=box"],
    "as FCOS": ["model.box.positives=box", "model.box.measured_to=box"],
    "three plain convolutions": ["model.semantic.convolutions=3", "model.semantic.deformable=false"],
    "normalized semantic head": ["model.semantic.channels=32", "model.semantic.norm={kind: group}"],
    "smallest area": ["model.postprocess.conflicts=smallest_area"],
    "highest score": ["model.postprocess.conflicts=highest_score"],
    "other size": ["model.resize={shorter_side: 96, longer_side: {max: 128}}"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_predict(variant: str) -> None:
    contract = TestContract()
    system = build_small(INFO, *VARIANTS[variant])
    label = hand_made_label()
    losses = contract.losses_of(system, paint(label)[None], label)
    assert list(losses) == list(system.loss_weights)
    assert all(0 < value < np.inf for value in losses.values())
    found = system.postprocess_targets(contract.targets_of(system, label))["panoptic"].numpy()[0]
    assert panoptic_quality(label, found, INFO) == 1.0
    # A size that is not a multiple of any stride.
    contract.excite(system)
    found = system.infer(paint(label)[None, :37, :53], with_instances=True)
    assert found["panoptic"].shape == (1, 37, 53)
    assert found["instance_masks"].shape == (1, 40, 37, 53)
    boxes = found["instance_boxes"].numpy()[0]
    assert (boxes >= 0).all()
    assert (boxes <= [37, 53, 37, 53]).all()


def perfect_outputs(system: PanopticSystem, label: np.ndarray) -> dict[str, tf.Tensor]:
    """The outputs of a perfect network, at the resolution of its heads."""
    targets = TestContract().targets_of(system, label)
    outputs = {"semantic_logits": 20.0 * tf.one_hot(label[None, 2::4, 2::4] // 1000, 4) - 10.0}
    for level in system.config.box.levels:
        outputs[f"distances_{level}"] = tf.maximum(targets[f"distances_{level}"], 1.0)
        # Away from 0 and 1, whose logits are infinite.
        border_ness = tf.clip_by_value(targets[f"border_ness_{level}"], 0.001, 0.999)
        outputs[f"border_ness_{level}"] = tf.math.log(border_ness / (1 - border_ness))
    return outputs


def test_perfect_outputs_give_the_label() -> None:
    """Signs, axes and strides of targets, boxes and heads, tied together without training."""
    system = build_small()
    label = np.where(np.arange(64)[:, None] < 32, 0, 1000) * np.ones((1, 64), np.int32)
    label = label.astype(np.int32)
    label[4:28, 4:28] = 2001
    label[4:28, 32:60] = 2002
    label[36:60, 12:32] = 3001
    found = system.postprocess(perfect_outputs(system, label), label.shape)
    # Interpolation rounds corners.
    assert panoptic_quality(label, found["panoptic"].numpy()[0], INFO) > 0.98
    # The best points are at y 12, x 12 of the first car: sqrt(8/16 * 8/16) = 1/2; y 12, x 44 of the second:
    # sqrt(8/16 * 12/16) = 0.612; y 44, x 20 of the person: sqrt(8/16 * 8/12) = 0.577.
    np.testing.assert_allclose(found["segment_score"].numpy()[0, :3], [0.612, 0.577, 0.5], atol=1e-3)


def test_oracle_parts() -> None:
    """True boxes on a predicted semantic map, and predicted boxes on a true one."""
    system = build_small()
    label = hand_made_label()
    targets = TestContract().targets_of(system, label)
    perfect = perfect_outputs(system, label)
    # A network that predicts road everywhere has no things, for any boxes.
    all_road = perfect | {"semantic_logits": tf.one_hot(tf.ones((1, 16, 16), tf.int32), 4) * 9.0}
    found = system.postprocess_with_truth(all_road, targets, label.shape, ["boxes"])["panoptic"].numpy()
    assert set(np.unique(found)) == {1000}
    # A network without boxes has stuff only.
    without_boxes = perfect | {
        f"border_ness_{level}": perfect[f"border_ness_{level}"] * 0 - 9 for level in ("p3", "p4", "p5")
    }
    found = system.postprocess_with_truth(without_boxes, targets, label.shape, ["semantic"])["panoptic"].numpy()
    assert set(np.unique(found)) == {0, 1000, INFO.void}
    found = system.postprocess_with_truth(without_boxes, targets, label.shape, ["boxes"])["panoptic"].numpy()[0]
    assert panoptic_quality(label, found, INFO) > 0.9


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.box.levels=[p4, p3]", "levels must be one after the other, fine to coarse"),
        ("model.box.size_limits=[16]", "size_limits must be 2 numbers, one between each two of levels"),
        ("model.box.size_limits=[64, 32]", "size_limits must grow from one to the next"),
        ("model.box={levels: [p1], size_limits: []}", r"box\.levels begins with p1, finer than fpn\.finest_level"),
        ("model.context.kind=attention", "'pyramid_pooling', 'global_average', 'none'"),
        ("model.postprocess.conflicts=nearest", "'closest_border_ness', 'smallest_area', 'highest_score'"),
    ],
)
def test_wrong_configs(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("lpsnet/scenes_tiny", [override])


def test_data_sets_that_do_not_fit() -> None:
    stuff = DatasetInfo.from_coco_categories([{"id": 1, "name": "sky", "isthing": 0}], name="sky")
    with pytest.raises(UserError, match="'sky' has no things, so there are no boxes for LPSNet to find"):
        build_small(stuff)
    few = DatasetInfo.from_coco_categories([{"id": 1, "name": "car", "isthing": 1}], name="few", label_divisor=16)
    with pytest.raises(
        UserError,
        match=r"model.postprocess.detections is 40, but label_divisor 16 of data set 'few' has room for 15 instances",
    ):
        build_small(few)


def test_layers_after_the_pyramid_start_as_in_retinanet() -> None:
    # Kernels of 8192 elements and more: their deviation is within 3 % of the true one. The offsets of deformable
    # convolutions start at zero, so that these start as plain convolutions.
    system = build_system(
        load_config("lpsnet/scenes_tiny", ["model.semantic={channels: 64, deformable: true}"]), scenes_info()
    )
    kernels = {
        weight.path: weight
        for layer in (system.context, system.box_head, system.semantic_head)
        for weight in layer.trainable_weights
        if weight.path.endswith("kernel") and np.prod(weight.shape) >= 8192 and "offset" not in weight.path
    }
    assert {path.split("/")[1] for path in kernels} == {"context", "box_head", "semantic_head"}
    for path, kernel in kernels.items():
        assert np.std(kernel) == pytest.approx(0.01, rel=0.03), path
    # Each layer has values of its own.
    assert len({round(float(np.sum(kernel)), 6) for kernel in kernels.values()}) == len(kernels)
