"""The importer of the released weights of Panoptic FCN, and all parts of the system on these weights.

The reference numbers are described in data/detectron2_panoptic_fcn.
"""

import re
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
from deeplab2_like.model.geometry import NETWORK_SIZE
from deeplab2_like.model.panoptic_fcn import PanopticFCN
from deeplab2_like.model.panoptic_fcn.dice import dice_loss
from deeplab2_like.model.panoptic_fcn.kernels import find_centers, find_regions, pool_regions
from deeplab2_like.model.panoptic_fcn.losses import focal_loss, select_kernels
from deeplab2_like.model.panoptic_fcn.postprocess import find_stuff, find_things
from deeplab2_like.model.panoptic_fcn.targets import (
    is_in_size_range,
    region_targets,
    sample_cells,
    weighted_labels,
)
from deeplab2_like.weights.detectron2_panoptic_fcn import (
    CONFIG,
    load_panoptic_fcn,
    panoptic_fcn_name,
    panoptic_fcn_overrides,
)

DATA = Path(__file__).parents[1] / "data" / "detectron2_panoptic_fcn"
INFO = DatasetInfo(
    name="coco_like",
    categories=tuple(Category(id=i, name=f"class {i}", is_thing=i < 80, color=(i, i, i)) for i in range(133)),
)
IMAGE_SIZE = (120, 150)
MAP_SIZE = (180, 225)
LEVELS = ("p3", "p4", "p5", "p6", "p7")


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(DATA / f"{name}.npz") as file:
        return dict(file)


def build_system(depth: Literal[50, 101] = 50, enhanced: bool = False, **postprocess: Any) -> PanopticFCN:
    # The reference image is small and not resized.
    overrides = [f"model.backbone.name=resnet{depth}", "model.resize=null"]
    overrides += ["model.encoder.channels=256", "model.encoder.deformable=true"] if enhanced else []
    overrides += [f"model.postprocess.{key}={value}" for key, value in postprocess.items()]
    return PanopticFCN(load_config(CONFIG, overrides).model, INFO)


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return read_reference_state(DATA)


@pytest.fixture(scope="module")
def system(state: dict[str, np.ndarray]) -> PanopticFCN:
    system = build_system()
    system.create_variables()
    load_panoptic_fcn(system, state)
    return system


def test_network_computes_what_the_released_code_computes(system: PanopticFCN) -> None:
    expected = read("forward")
    image = system.prepare_images(expected.pop("image")[None])
    features = system.backbone(image)
    pyramid = system.fpn(features)
    # The heads get the levels of the reference, because deformable convolutions amplify errors.
    levels = {level: tf.constant(expected[level][None]) for level in LEVELS}
    centers, regions = system.position_head(levels)
    kernels = system.kernel_head(levels)
    deformable = system.position_head.convolutions[0]
    computed = {
        **{level: features[level][0, ::4, ::4, ::8] for level in ("res2", "res3")},
        **{level: features[level][0, ::2, ::2, ::16] for level in ("res4", "res5")},
        "p2": pyramid["p2"][0, ::4, ::4, ::8],
        **{level: pyramid[level][0] for level in LEVELS},
        "semantic_fpn": system.encoder.semantic_fpn(pyramid)[0, ::4, ::4, ::4],
        "feature": system.encoder(pyramid)[0, ::2, ::2, ::2],
        "offset": deformable.offset(deformable.pad(levels["p3"]))[0, ::2, ::2],
        "deformed": deformable(levels["p3"])[0, ::2, ::2, ::4],
    }
    for level in LEVELS:
        step = 2 if level == "p3" else 1
        computed[f"center_{level}"] = centers[level][0, ::step, ::step, :16]
        computed[f"region_{level}"] = regions[level][0, ::step, ::step, :16]
        computed[f"kernel_{level}"] = kernels[level][0, ::step, ::step, :32]
    assert computed.keys() == expected.keys()
    for name, reference in expected.items():
        difference = np.abs(keras.ops.convert_to_numpy(computed[name]) - reference) / reference.std()
        # The encoder adds up the errors of all levels; on the levels of the reference its error is 3e-5.
        assert difference.max() < (1.5e-3 if name == "feature" else 1e-3), name
        assert difference.mean() < 2e-4, name


@pytest.fixture(scope="module")
def outputs() -> dict[str, tf.Tensor]:
    """The raw outputs of the released code."""
    data = read("postprocess")
    names = [f"{kind}_{level}" for kind in ("center", "region", "kernel") for level in LEVELS] + ["feature"]
    return {name: tf.constant(data[name][None]) for name in names} | {NETWORK_SIZE: tf.constant(IMAGE_SIZE)}


def test_positions_and_fused_kernels(system: PanopticFCN, outputs: dict[str, tf.Tensor]) -> None:
    data = read("postprocess")
    found = [
        find_centers(
            outputs[f"center_{level}"],
            outputs[f"kernel_{level}"],
            window=3 if stride <= 32 else 5,
            threshold=0.05,
            count=50,
        )
        for level, stride in system.config.level_strides.items()
    ]
    is_used = [scores.numpy()[0] > 0 for _, scores, _ in found]
    assert [used.sum() for used in is_used] == data["centers_per_level"].tolist()
    scores = np.concatenate([scores.numpy()[0, used] for (_, scores, _), used in zip(found, is_used, strict=True)])
    classes = np.concatenate([classes.numpy()[0, used] for (*_, classes), used in zip(found, is_used, strict=True)])
    np.testing.assert_allclose(scores, data["center_scores"], atol=1e-6)
    np.testing.assert_array_equal(classes, data["center_classes"])
    regions = [find_regions(outputs[f"region_{level}"], threshold=0.05)[1] for level in LEVELS]
    assert [int(tf.reduce_sum(tf.cast(used, tf.int32))) for used in regions] == data["regions_per_level"].tolist()

    things = find_things(outputs, system.config, system.kernel_head)
    kept = np.flatnonzero(things.scores.numpy()[0])
    np.testing.assert_array_equal(things.classes.numpy()[0, kept], data["fused_classes"])
    sampled = outputs["feature"][0, ::8, ::8]
    logits = tf.einsum("hwe,ne->nhw", sampled, tf.gather(things.weights[0], kept))
    np.testing.assert_allclose(logits, data["thing_mask_logits"], atol=1e-4 * data["thing_mask_logits"].std())
    weights, present = find_stuff(outputs, system.config, system.kernel_head)
    kept = np.flatnonzero(present.numpy()[0])
    np.testing.assert_array_equal(kept, data["stuff_classes"])
    logits = tf.einsum("hwe,se->shw", sampled, tf.gather(weights[0], kept))
    np.testing.assert_allclose(logits, data["stuff_mask_logits"], atol=1e-4 * data["stuff_mask_logits"].std())


def test_masks_and_maps(system: PanopticFCN, outputs: dict[str, tf.Tensor]) -> None:
    data = read("postprocess")
    found = system.instances(outputs, MAP_SIZE)
    np.testing.assert_allclose(found["scores"][0], data["scores"], atol=1e-6)
    np.testing.assert_array_equal(found["classes"][0], data["classes"])
    masks = np.unpackbits(data["masks"], count=100 * MAP_SIZE[0] * MAP_SIZE[1]).reshape(100, *MAP_SIZE)
    np.testing.assert_array_equal(found["masks"][0], masks)
    stock = system.postprocess(outputs, MAP_SIZE)
    np.testing.assert_array_equal(stock["panoptic"][0], data["panoptic_stock"])
    other = build_system(map_score_threshold=0.05, stuff_area_limit=200)
    other.kernel_head = system.kernel_head
    np.testing.assert_array_equal(other.postprocess(outputs, MAP_SIZE)["panoptic"][0], data["panoptic_low"])


def unpacked_masks(data: dict[str, np.ndarray]) -> np.ndarray:
    return np.unpackbits(data["masks"], count=7 * 320 * 384).reshape(7, 320, 384).astype(np.int32)


def test_heat_maps(system: PanopticFCN) -> None:
    data = read("train")
    masks = unpacked_masks(data)
    panoptic = np.full((320, 384), INFO.void, np.int32)
    for number in range(7):
        # Two pairs of masks overlap by some pixels, which does not change the position of any center here.
        panoptic[masks[number] == 1] = data["classes"][number] * INFO.label_divisor + number + 1
    targets = system.make_targets(tf.constant(panoptic))
    for level in LEVELS:
        np.testing.assert_array_equal(targets[f"heat_{level}"], data[f"heat_{level}"])


def test_losses_and_gradients(system: PanopticFCN) -> None:
    data = read("train")
    masks = unpacked_masks(data)
    pairs, region_pairs = float(data["pairs"]), float(data["region_pairs"])
    regions = np.where(data["regions"] == 255, 54, data["regions"]).astype(np.int32)
    samples_of_regions = sample_cells(tf.constant(regions[None]), 4)
    for level in LEVELS:
        size = data[f"region_target_{level}"].shape[:2]
        targets = region_targets(weighted_labels(samples_of_regions, size), 54)
        np.testing.assert_array_equal(targets[0], data[f"region_target_{level}"])

    feature = tf.constant(data["feature"][None])
    all_cells = tf.ones((1, 80, 96))
    for level in ("p5", "p6", "p7"):
        center, kernels = (tf.constant(data[f"{kind}_{level}"][None]) for kind in ("center", "kernel"))
        everywhere = tf.ones(center.shape[:3])
        with tf.GradientTape() as tape:
            tape.watch([center, kernels])
            heat = data[f"heat_{level}"][None]
            total = focal_loss(center, heat, everywhere, alpha=0.25, gamma=2.0) / pairs
            for number in range(7):
                # One at a time, as these masks overlap, which those of a panoptic map do not.
                if not is_in_size_range(data["boxes"][number], *system.config.size_ranges[level]):
                    continue
                samples = sample_cells(tf.constant(masks[number][None]), 4)
                selected, share = select_kernels(
                    kernels,
                    center,
                    instances=weighted_labels(samples, tuple(kernels.shape[1:3])),
                    classes=tf.constant([[int(data["classes"][number])]]),
                    positions=tf.zeros((1, 1, 2), tf.int32),  # Not used where there is a mask.
                    count=7,
                    weighted=True,
                )
                weights = system.kernel_head.embed_things(selected)
                dice = dice_loss(feature, weights, tf.ones((1, 1), tf.int32), samples, all_cells)
                total += system.loss_weights["thing_mask"] * tf.reduce_sum(dice * share) / pairs
            is_region = tf.cast(data[f"region_target_{level}"][None] > 0, tf.float32)
            pooled = pool_regions(kernels, is_region, over_map=True)
            weights = system.kernel_head.embed_stuff(pooled)[:, :, None]
            dice = dice_loss(feature, weights, tf.range(54)[None], samples_of_regions, all_cells)[..., 0]
            used = tf.reduce_max(is_region, axis=(1, 2))
            total += system.loss_weights["stuff_mask"] * tf.reduce_sum(dice * used) / region_pairs
        for kind, gradient in zip(("center", "kernel"), tape.gradient(total, [center, kernels]), strict=True):
            reference = data[f"{kind}_gradient_{level}"]
            difference = np.abs(gradient[0] - reference) / reference.std()
            assert difference.max() < 1e-3, (kind, level)


# The released code reports 37.00 M and 38.84 M for the first two.
@pytest.mark.parametrize(
    ("depth", "enhanced", "parameters"),
    [(50, False, 36_999_511), (50, True, 38_837_710), (101, False, 36_999_511 + 17 * 1_114_112)],
)
def test_size_is_that_of_the_release(depth: Literal[50, 101], enhanced: bool, parameters: int) -> None:
    system = build_system(depth, enhanced)
    system.create_variables()
    assert sum(int(np.prod(weight.shape)) for weight in system.trainable_weights) == parameters
    names = [panoptic_fcn_name(weight.path, enhanced=enhanced) for weight in system.weights]
    assert None not in names
    assert len(set(names)) == len(names)
    if depth == 50 and not enhanced:
        lines = (DATA / "state_keys.tsv").read_text().splitlines()
        assert sorted(str(name) for name in names) == sorted(line.split("\t")[0] for line in lines)


@pytest.mark.parametrize("outputs", [27, 18])
def test_deformable_backbones(outputs: int, state: dict[str, np.ndarray]) -> None:
    # The layout of Detectron2's deformable blocks, with and without modulation; all zeros but a few values.
    other = dict(state)
    for name in state:
        found = re.fullmatch(r"(backbone\.bottom_up\.res[345]\.\d+\.conv2)\.weight", name)
        if found:
            other[f"{found[1]}_offset.weight"] = np.zeros((outputs, len(state[name]), 3, 3), np.float32)
            other[f"{found[1]}_offset.bias"] = np.arange(outputs, dtype=np.float32)
    overrides = panoptic_fcn_overrides(other)
    assert overrides == ["model.backbone.name=resnet50", "model.backbone.deformable_stages=[res3,res4,res5]"]
    system = PanopticFCN(load_config(CONFIG, [*overrides, "model.resize=null"]).model, INFO).create_variables()
    loaded = load_panoptic_fcn(system, other)
    # 13 blocks in these stages, each with two more arrays.
    assert len(loaded.loaded) == len(state) + 2 * 13
    biases = [weight for weight in system.weights if weight.path.endswith("res3/block1/conv2/offset/bias")]
    assert len(biases) == 1
    factors = np.asarray(keras.ops.sigmoid(biases[0][18:]))
    np.testing.assert_array_equal(biases[0][:18], np.arange(18))
    np.testing.assert_array_equal(
        factors, 1 / (1 + np.exp(-np.arange(18, 27, dtype=np.float32))) if outputs == 27 else 1
    )


def test_what_does_not_fit_is_named(system: PanopticFCN, state: dict[str, np.ndarray]) -> None:
    wrong = dict(state)
    del wrong["backbone.top_block.p6.bias"]
    with pytest.raises(
        UserError,
        match=r"does not fit this Panoptic FCN: 1 missing \(backbone\.top_block\.p6\.bias\); "
        r".*'panoptic_fcn/coco_detectron2'",
    ):
        load_panoptic_fcn(system, wrong)


def test_parts_can_keep_their_initial_weights(state: dict[str, np.ndarray]) -> None:
    system = build_system()
    system.create_variables()
    initial = system.position_head.centers.kernel.numpy()
    other = state | {"position_head.out_inst.weight": np.zeros((20, 256, 3, 3), np.float32)}
    load_panoptic_fcn(system, other, keep_initial=["position_head.out_inst.*"])
    np.testing.assert_array_equal(system.position_head.centers.kernel.numpy(), initial)
