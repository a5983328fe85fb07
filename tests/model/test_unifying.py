"""The unifying system: the contract, and what is particular to it."""

import numpy as np
import pytest
import tensorflow as tf
from system_contract import INFO, SystemContract, hand_made_label, paint, panoptic_quality

from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.model.detection.masks import mask_targets

SMALL = [
    "model.fpn.channels=32",
    "model.semantic={channels: 32, convolutions: 1, deformable: false}",
    "model.rpn.channels=32",
    "model.roi.box_channels=64",
    "model.roi.mask_channels=16",
    "model.postprocess.stuff_area_limit=0",
]


def build_small(info: DatasetInfo = INFO, *overrides: str) -> PanopticSystem:
    return build_system(load_config("unifying/scenes_tiny", [*SMALL, *overrides]), info)


class TestContract(SystemContract):
    config_name = "unifying/scenes_tiny"
    overfit_steps = 150
    overfit_learning_rate = 0.004

    def build(self, info: DatasetInfo) -> PanopticSystem:
        return build_small(info)

    def excite(self, system: PanopticSystem) -> None:
        random = np.random.default_rng(4)
        layers = [(system.semantic_head.predictor, 0.3), (system.detector.box_head.classes, 3.0)]
        if system.detector.mask_head is not None:
            layers.append((system.detector.mask_head.masks, 3.0))
        for layer, scale in layers:
            layer.kernel.assign(scale * random.standard_normal(layer.kernel.shape))


# The models of table 1 and the other choices, by what they change.
MODELS = {
    "A": ["model.panoptic={masks: false, affinity: false}", "model.loss.matching=false"],
    "B": ["model.panoptic.masks=false"],
    "C1": ["model.panoptic.affinity=false", "model.loss.matching=false", "model.postprocess.merge=heuristic"],
    "C2": ["model.panoptic.affinity=false", "model.loss.matching=false"],
    "D1": ["model.postprocess.merge=heuristic"],
    "D2": [],
}
VARIANTS = MODELS | {
    "potential a": ["model.panoptic.potential=a"],
    "potential b": ["model.panoptic.potential=b"],
    "potential a of boxes": ["model.panoptic={masks: false, potential: a}"],
    "true detections": ["model.loss.detections=truth"],
    "true boxes": ["model.loss.detections=truth", "model.panoptic.masks=false"],
    "separate training": ["model.loss.end_to_end=false"],
    "matching loss without affinities": ["model.panoptic.affinity=false"],
    "no excitation": ["model.squeeze_excitation=false"],
    "deformable": ["model.semantic.deformable=true", "model.semantic.convolutions=2"],
    "pyramid from stride 2": ["model.fpn.finest_level=p1", "model.rpn.anchor_sizes=[8, 16, 28, 48, 80, 128]"],
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
    assert ("panoptic" in losses) == (variant not in ("A", "C1", "C2"))
    assert ("mask" in losses) == system.config.panoptic.masks
    # No two objects of a class have boxes that overlap in this label, so masks are not needed for a perfect map.
    found = system.postprocess_targets(contract.targets_of(system, label))["panoptic"].numpy()[0]
    assert panoptic_quality(label, found, INFO) == 1.0
    # A size that is no multiple of any stride.
    contract.excite(system)
    found = system.infer(paint(label)[None, :37, :53], with_instances=True)
    assert found["panoptic"].shape == (1, 37, 53)
    assert found["instance_masks"].shape == (1, 40, 37, 53)
    # What mIoU is of: the class of each pixel before anything is put together.
    assert found["semantic"].shape == (1, 37, 53)
    assert set(np.unique(found["semantic"])) <= set(range(INFO.num_classes))


def perfect_outputs(system: PanopticSystem, label: np.ndarray) -> dict[str, tf.Tensor]:
    """What a perfect network says of a label: semantic map and detections at their own resolutions, no affinities."""
    targets = TestContract().targets_of(system, label)
    row = tf.range(targets["valid"].shape[1])[None]
    masks = mask_targets(targets["instance_map"], targets["boxes"], row, output_size=28)
    cells = system.stride
    outputs = {
        "semantic_logits": 20.0 * tf.one_hot(label[None, cells // 2 :: cells, cells // 2 :: cells] // 1000, 4),
        "boxes": targets["boxes"],
        "scores": tf.cast(targets["valid"], tf.float32),
        "thing_classes": targets["classes"],
    }
    if system.config.panoptic.masks:
        outputs["masks"] = tf.cast(masks, tf.float32)
    if system.affinity_head is not None:
        outputs["query"] = outputs["key"] = tf.zeros((1, *outputs["semantic_logits"].shape[1:3], 32))
    return outputs


@pytest.mark.parametrize("variant", [*MODELS, "potential a", "potential b", "potential a of boxes"])
def test_perfect_outputs_give_the_label(variant: str) -> None:
    """Axes, strides and order of slots, tied together without training."""
    system = build_small(INFO, *VARIANTS[variant])
    label = hand_made_label()
    found = system.postprocess(perfect_outputs(system, label), label.shape)["panoptic"].numpy()[0]
    metric = PanopticQuality(INFO)
    metric.update_state(label, found)
    # All segments are found; their borders are as fine as the cells.
    assert metric.result().all.rq == 1.0
    assert metric.result().all.sq > 0.9


def test_duplicates_are_left_out_of_the_map() -> None:
    """A second, worse detection of the car in lines 24 to 44, 8 lines lower: better ones cover 75 % of it.

    It has 20 lines of 24 pixels. The car covers 12 of these lines, the person below 6 x 12 pixels: 360 of 480.

    The semantic head says car in the other 8 lines, so nothing else stops the duplicate there.
    """
    label = hand_made_label()
    semantic = label.copy()
    semantic[44:52, 4:28] = 2000
    cars = {}
    for threshold in (0.5, 0.8, 1.0):
        system = build_small(INFO, "model.panoptic.affinity=false", f"model.postprocess.overlap_threshold={threshold}")
        outputs = {name: value.numpy() for name, value in perfect_outputs(system, label).items()}
        outputs["semantic_logits"] = perfect_outputs(system, semantic)["semantic_logits"].numpy()
        (first,) = np.flatnonzero((outputs["boxes"][0] == [24, 4, 44, 28]).all(axis=1))
        duplicate = np.flatnonzero(outputs["scores"][0] == 0)[0]
        for name in ("boxes", "thing_classes", "masks"):
            outputs[name][0, duplicate] = outputs[name][0, first]
        outputs["boxes"][0, duplicate] += [8, 0, 8, 0]
        outputs["scores"][0, duplicate] = 0.9
        found = system.postprocess({name: tf.constant(value) for name, value in outputs.items()}, label.shape)
        cars[threshold] = {value for value in np.unique(found["panoptic"]) if value // 1000 == 2}
    assert cars == {0.5: {2001, 2002}, 0.8: {2001, 2002, 2003}, 1.0: {2001, 2002, 2003}}


def test_one_slot_of_the_truth() -> None:
    """True detections on a semantic map that is wrong, and the other way round."""
    system = build_small(INFO, "model.panoptic.affinity=false")
    label = hand_made_label()
    targets = TestContract().targets_of(system, label)
    perfect = perfect_outputs(system, label)
    all_road = 20.0 * tf.one_hot(tf.ones((1, 16, 16), tf.int32), 4)
    found = system.postprocess_with_truth(perfect | {"semantic_logits": all_road}, targets, label.shape, ["detections"])
    assert set(np.unique(found["panoptic"])) == {1000}
    none = perfect | {"scores": tf.zeros_like(perfect["scores"])}
    found = system.postprocess_with_truth(none, targets, label.shape, ["semantic"])
    assert set(np.unique(found["panoptic"])) == {0, 1000}
    found = system.postprocess_with_truth(none, targets, label.shape, ["detections"])["panoptic"].numpy()[0]
    assert panoptic_quality(label, found, INFO) > 0.9


def test_matching_loss_alone_trains_the_affinities() -> None:
    """And in separate training it trains nothing else."""
    contract = TestContract()
    label = hand_made_label()
    for end_to_end in (True, False):
        system = build_small(INFO, f"model.loss.end_to_end={str(end_to_end).lower()}")
        contract.excite(system)
        targets = contract.targets_of(system, label)
        with tf.GradientTape(persistent=True) as tape:
            losses = system.compute_losses(targets, system(paint(label)[None], targets=targets, training=True))
        of_affinity = [variable.value for variable in system.affinity_head.trainable_variables]
        for name, loss in losses.items():
            gradients = tape.gradient(loss.total, of_affinity)
            reached = [gradient is not None and bool(np.any(gradient)) for gradient in gradients]
            assert all(reached) if name == "panoptic" else not any(reached), name
        for part in (system.detector.box_head, system.semantic_head, system.fpn, system.backbone):
            variables = [variable.value for variable in part.trainable_variables]
            gradients = tape.gradient(losses["panoptic"].total, variables)
            assert any(gradient is not None and np.any(gradient) for gradient in gradients) == end_to_end, part.name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.rpn.anchor_sizes=[8, 16]", r"rpn\.anchor_sizes must be 5 sizes, one for each level from p2 to p6"),
        ("model.loss.matching=false", r"panoptic\.affinity needs loss\.matching, as nothing else trains it"),
        ("model.roi.samples=1", r"roi\.samples \* roi\.foreground_share must be 1 or more"),
        ("model.panoptic.potential=d", "'a', 'b', 'c'"),
        ("model.postprocess.merge=rules", "'argmax', 'heuristic'"),
    ],
)
def test_wrong_configs(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("unifying/scenes_tiny", [override])
    separate = ["model.loss.end_to_end=false", "model.panoptic.affinity=false"]
    with pytest.raises(UserError, match=r"loss\.end_to_end can be off only with panoptic\.affinity"):
        load_config("unifying/scenes_tiny", separate)
    with pytest.raises(UserError, match=r"postprocess\.merge can be heuristic only with panoptic\.masks"):
        load_config("unifying/scenes_tiny", ["model.panoptic.masks=false", "model.postprocess.merge=heuristic"])


def test_data_sets_that_do_not_fit() -> None:
    stuff = DatasetInfo.from_coco_categories([{"id": 1, "name": "sky", "isthing": 0}], name="sky")
    with pytest.raises(UserError, match="'sky' has no things, so there is nothing for the detector to find"):
        build_small(stuff)
    things = DatasetInfo.from_coco_categories([{"id": 1, "name": "car", "isthing": 1}], name="cars")
    with pytest.raises(UserError, match="'cars' has no stuff, so pixels without an object have no slot"):
        build_small(things)
    both = [{"id": 1, "name": "car", "isthing": 1}, {"id": 2, "name": "sky", "isthing": 0}]
    few = DatasetInfo.from_coco_categories(both, name="few", label_divisor=16)
    with pytest.raises(UserError, match=r"is 40, but label_divisor 16 of data set 'few' has room for 15 instances"):
        build_small(few)
