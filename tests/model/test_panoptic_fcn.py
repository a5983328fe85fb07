"""Panoptic FCN: the contract, and what is particular to it."""

import numpy as np
import pytest
import tensorflow as tf
from system_contract import INFO, SystemContract, hand_made_label, paint, panoptic_quality

from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.model.config import ResizeConfig
from deeplab2_like.model.panoptic_fcn import PanopticFCNConfig

SMALL = [
    "model.fpn={channels: 32, finest_level: p2}",
    "model.head={channels: 32, convolutions: 1, deformable: false}",
    "model.encoder={semantic_channels: 32, channels: 16, convolutions: 1}",
    "model.postprocess.stuff_area_limit=0",
]


def build_small(info: DatasetInfo = INFO, *overrides: str) -> PanopticSystem:
    return build_system(load_config("panoptic_fcn/scenes_tiny", [*SMALL, *overrides]), info)


class TestContract(SystemContract):
    config_name = "panoptic_fcn/scenes_tiny"
    overfit_steps = 150
    overfit_learning_rate = 0.004

    def build(self, info: DatasetInfo) -> PanopticSystem:
        return build_small(info)

    def excite(self, system: PanopticSystem) -> None:
        random = np.random.default_rng(2)
        for layer, scale in (
            (system.position_head.centers, 0.2),
            (system.position_head.regions, 0.2),
            (system.kernel_head.kernels, 0.1),
            (system.kernel_head.embed_things, 0.3),
            (system.kernel_head.embed_stuff, 0.3),
        ):
            layer.kernel.assign(scale * random.standard_normal(layer.kernel.shape))


# The options of the paper's tables and of this library.
VARIANTS = {
    "deformable position head": ["model.head.deformable=true"],
    "four convolutions": ["model.head.convolutions=4"],
    "no coordinates": ["model.head.kernel_coordinates=false", "model.encoder.coordinates=false"],
    "feature of the finest level": ["model.encoder.feature=finest"],
    "sum of levels": ["model.encoder.feature=sum"],
    "enhanced encoder": ["model.encoder.deformable=true", "model.encoder.channels=64"],
    "plain dice loss": ["model.loss.weighted=false"],
    "one kernel": ["model.loss.kernels=1"],
    "centers of boxes": ["model.loss.center=box"],
    "fusion of any class": ["model.postprocess.class_aware=false"],
    "levels to p7": ["model.size_ranges={p3: [1, 64], p4: [32, 128], p5: [64, 256], p6: [128, 512], p7: [256, 2048]}"],
    "pyramid from stride 2": ["model.fpn.finest_level=p1", "model.size_ranges={p1: [1, 32], p2: [16, 256]}"],
    "as the released code": ["model.reference_behavior=true"],
    "other size": ["model.resize={short_side: 96, long_side: 128}"],
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


def perfect_outputs(system: PanopticSystem, label: np.ndarray) -> dict[str, tf.Tensor]:
    """The outputs of a perfect network: heat maps, regions, and kernels that pick one channel of the feature.

    Channel n of the feature is 10 on the nth segment and 0 elsewhere; the last one is 1 everywhere. A kernel has
    1 for its own segment and -5 in the last channel, so logits are 5 and -5.
    """
    targets = TestContract().targets_of(system, label)
    segments = np.unique(label)
    at_cells = label[2::4, 2::4]
    feature = np.stack([*(10.0 * (at_cells == segment) for segment in segments), np.ones(at_cells.shape)], axis=-1)
    width = system.encoder.convolutions[-1].conv.filters
    feature = np.pad(feature, [[0, 0], [0, 0], [0, width - feature.shape[-1]]])
    outputs = {"feature": tf.constant(feature[None], tf.float32)}
    for level, stride in system.config.level_strides.items():
        at_level = label[stride // 2 :: stride, stride // 2 :: stride]
        heat = targets[f"heat_{level}"]
        outputs[f"center_{level}"] = 20.0 * heat - 10.0
        region = system.classes.of_class_map(tf.constant(at_level // 1000))
        outputs[f"region_{level}"] = 20.0 * tf.one_hot(region, 3)[None] - 10.0
        # Each position has the kernel of the segment at its center.
        kernel = np.zeros((*at_level.shape, system.kernel_head.channels), np.float32)
        kernel[
            np.arange(at_level.shape[0])[:, None], np.arange(at_level.shape[1]), np.searchsorted(segments, at_level)
        ] = 1
        kernel[..., len(segments)] = -5
        outputs[f"kernel_{level}"] = tf.constant(kernel[None])
    for embed in (system.kernel_head.embed_things, system.kernel_head.embed_stuff):
        embed.kernel.assign(np.eye(*embed.kernel.shape))
    return outputs


def test_perfect_outputs_give_the_label() -> None:
    """Signs, axes and strides of targets, positions, kernels, feature and masks, tied together without training."""
    system = build_small(INFO, "model.postprocess.similarity=0.999")
    # Objects of similar sizes, so that each center of mass lies inside its object, in whole cells, on both levels.
    label = np.where(np.arange(64)[:, None] < 32, 0, 1000) * np.ones((1, 64), np.int32)
    label = label.astype(np.int32)
    label[4:28, 4:28] = 2001
    label[4:28, 32:60] = 2002
    label[36:60, 12:32] = 3001
    found = system.postprocess(perfect_outputs(system, label), label.shape)["panoptic"].numpy()[0]
    assert set(np.unique(found)) - {INFO.void} == set(np.unique(label))
    # Interpolation rounds corners, and where things meet stuff neither reaches one half.
    metric = PanopticQuality(INFO)
    metric.update_state(label, found)
    assert metric.result().all.rq == 1.0
    assert metric.result().all.sq > 0.93


def test_oracle_parts_build_on_positions() -> None:
    system = build_small()
    label = hand_made_label()
    contract = TestContract()
    outputs, targets = system(paint(label)[None]), contract.targets_of(system, label)
    with pytest.raises(
        UserError, match=r"'classes' of panoptic_fcn belongs to true positions; ask for --oracle positions class"
    ):
        system.postprocess_with_truth(outputs, targets, label.shape, ["classes"])
    # True masks with the classes of an untrained network: every object is one segment.
    found = system.postprocess_with_truth(outputs, targets, label.shape, ["positions", "masks"])
    things = label % INFO.label_divisor > 0
    for value in np.unique(label[things]):
        assert len(np.unique(found["panoptic"].numpy()[0][label == value])) == 1


def test_oracle_of_perfect_outputs() -> None:
    """With true positions and perfect outputs, predicted classes are the true ones."""
    system = build_small(INFO, "model.postprocess.similarity=0.999")
    label = hand_made_label()
    outputs = perfect_outputs(system, label)
    targets = TestContract().targets_of(system, label)
    for parts in (["positions"], ["positions", "classes"]):
        found = system.postprocess_with_truth(outputs, targets, label.shape, parts)
        assert panoptic_quality(label, found["panoptic"].numpy()[0], INFO) > 0.8


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.size_ranges={p4: [1, 64], p3: [32, 128]}", "its keys must be levels one after the other"),
        ("model.size_ranges={p3: [64, 1]}", "the range of p3 must be a smaller and a larger number"),
        ("model.size_ranges={p3: [1, 16], p4: [64, 300]}", "the range of p4 must begin at 16 or below"),
        ("model.size_ranges={p1: [1, 64]}", "size_ranges begins with p1, finer than fpn.finest_level"),
        ("model.loss.center=middle", "'mass', 'box'"),
    ],
)
def test_wrong_configs(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("panoptic_fcn/scenes_tiny", ["model.fpn.finest_level=p2", override])


def test_data_sets_that_do_not_fit() -> None:
    stuff = DatasetInfo.from_coco_categories([{"id": 1, "name": "sky", "isthing": 0}], name="sky")
    with pytest.raises(UserError, match="'sky' has no things, so there are no centers for Panoptic FCN to find"):
        build_small(stuff)
    things = DatasetInfo.from_coco_categories([{"id": 1, "name": "car", "isthing": 1}], name="cars")
    with pytest.raises(UserError, match="'cars' has no stuff, so Panoptic FCN has no class for the background"):
        build_small(things)
    few = DatasetInfo.from_coco_categories([{"id": 1, "name": "car", "isthing": 1}], name="few", label_divisor=16)
    with pytest.raises(UserError, match=r"is 40, but label_divisor 16 of data set 'few' has room for 15 instances"):
        build_small(few)


def test_a_center_counts_among_unknown_pixels() -> None:
    """A car of 5x5 pixels in void, in a position of 8x8 pixels, most of which are unknown."""
    system = build_small()
    label = np.full((64, 64), INFO.void, np.int32)
    label[25:30, 25:30] = 2001
    losses = TestContract().losses_of(system, paint(label)[None], label)
    # One positive at the prior of 0.1, about 0.25 * 0.9^2 * -ln 0.1 = 0.47, and nothing else.
    assert losses["center"] == pytest.approx(0.47, abs=0.15)


def test_old_keys_are_read() -> None:
    old = PanopticFCNConfig.model_validate(
        {"reference_behaviour": True, "postprocess": {"resize": {"short_side": 96, "long_side": 128}}}
    )
    assert old.reference_behavior
    assert old.resize == ResizeConfig(short_side=96, long_side=128)
    # An override sets the new key of an old config.
    both = PanopticFCNConfig.model_validate({"reference_behaviour": True, "reference_behavior": False})
    assert not both.reference_behavior
