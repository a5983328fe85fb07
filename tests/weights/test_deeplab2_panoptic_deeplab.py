"""The importer of DeepLab2's checkpoints; the reference numbers are described in data/deeplab2_panoptic_deeplab."""

from collections.abc import Mapping
from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
from reference_state import read_deeplab2_state

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.config import BackboneConfig
from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab, PanopticDeepLabConfig
from deeplab2_like.weights.backbones import load_backbone_weights
from deeplab2_like.weights.deeplab2_panoptic_deeplab import (
    deeplab2_backbone,
    deeplab2_backbone_name,
    deeplab2_config,
    deeplab2_name,
    load_deeplab2,
    read_deeplab2_checkpoint,
)

DATA = Path(__file__).parents[1] / "data" / "deeplab2_panoptic_deeplab"
CITYSCAPES = DatasetInfo(
    name="cityscapes_like",
    categories=tuple(Category(id=i, name=f"class {i}", is_thing=i >= 11, color=(i, i, i)) for i in range(19)),
)
COCO = DatasetInfo(
    name="coco_like",
    categories=tuple(Category(id=i, name=f"class {i}", is_thing=i < 80, color=(i, i, i)) for i in range(133)),
)
# Trainable parameters as DeepLab2 counts them.
PARAMETERS = {
    "cityscapes_resnet50_os32": 54_973_702,
    "cityscapes_resnet50_beta_os32": 55_097_478,
    "cityscapes_mobilenet_v3_large_os16": 18_236_534,
    "coco_resnet50_os16": 55_003_257,
}


def write_checkpoint(prefix: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes a TensorFlow checkpoint with these names."""
    names = list(arrays)
    tf.raw_ops.SaveV2(
        prefix=str(prefix), tensor_names=names, shape_and_slices=[""] * len(names), tensors=list(arrays.values())
    )


def with_endings(state: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adds the ending that TensorFlow gives the names of Keras' variables."""
    return {f"{name}/.ATTRIBUTES/VARIABLE_VALUE": value for name, value in state.items()}


def build_system(config: PanopticDeepLabConfig, info: DatasetInfo) -> PanopticDeepLab:
    system = PanopticDeepLab(config, info)
    system(keras.KerasTensor((1, 129, 129, 3), "uint8"))  # Creates the variables; computes nothing.
    return system


@pytest.mark.parametrize("name", PARAMETERS)
def test_network_computes_what_deeplab2_computes(name: str, tmp_path: Path) -> None:
    state = read_deeplab2_state(DATA / f"{name}.txt")
    if "mobilenet" in name:  # The smallest one also takes the way through files.
        write_checkpoint(tmp_path / "ckpt-1", with_endings(state))
        read = read_deeplab2_checkpoint(tmp_path)
        assert state.keys() == read.keys()
        state = read
    with np.load(DATA / f"{name}.npz") as file:
        expected = dict(file)
    images = expected.pop("image")[None]
    data_set = name.partition("_")[0]
    info = COCO if data_set == "coco" else CITYSCAPES
    height, width = images.shape[1:3]
    config = deeplab2_config(
        state, data_set=data_set, output_stride=int(name[-2:]), training_crop=(height, width)
    ).model_copy(update={"resize": None})
    system = build_system(config, info)
    assert sum(int(np.prod(weight.shape)) for weight in system.trainable_weights) == PARAMETERS[name]
    load_deeplab2(system, state)

    features = system.backbone(system.prepare_images(images))
    outputs = system(images)
    logits = outputs["semantic_logits"][0, ::4, ::4]
    computed = {
        **{stage: features[stage][0, ::2, ::2, :16:2] for stage in ("res2", "res3", "res4", "res5")},
        # DeepLab2's void class is the first one, ours the last.
        "semantic_logits": np.roll(logits, 1, axis=-1) if config.void_class else logits,
        "center": outputs["center"][0, ::2, ::2],
        # Ours are in image pixels; the reference's, before its last step, in pixels of the map.
        "offset": outputs["offset"][0, ::2, ::2] / 4,
    }
    for part, values in computed.items():
        scale = expected[part].std()
        np.testing.assert_allclose(np.array(values) / scale, expected[part] / scale, rtol=0, atol=1e-4, err_msg=part)

    found = system.finish(outputs, (height, width), with_instances=True)
    semantic, panoptic = (np.array(found[part])[0] for part in ("semantic", "panoptic"))
    # COCO's classes count from 1 in DeepLab2, and void is 0.
    first = int(config.void_class)
    void = 0 if config.void_class else 255
    classes = np.where(panoptic == info.void, void, panoptic // info.label_divisor + first)
    np.testing.assert_array_equal(np.where(semantic == info.ignore_label, void, semantic + first), expected["semantic"])
    np.testing.assert_array_equal(classes, expected["panoptic_class"])
    # The numbers of instances differ: here they follow the heat of the centers. Each number has one counterpart.
    pairs = np.stack([classes, panoptic % info.label_divisor, expected["panoptic_instance"]]).reshape(3, -1)
    pairs = np.unique(pairs, axis=1)
    for numbers in (pairs[[0, 1]], pairs[[0, 2]]):
        assert len(np.unique(numbers, axis=1)[0]) == pairs.shape[1]
    assert pairs[1].max() > 1


def resnet50_state() -> dict[str, np.ndarray]:
    """The names and shapes of ResNet-50, all zero."""
    lines = (DATA / "cityscapes_resnet50_os32.txt").read_text().splitlines()
    names = dict(line.split() for line in lines)
    return {name: np.zeros(tuple(map(int, sizes.split("x"))), np.float32) for name, sizes in names.items()}


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return resnet50_state()


@pytest.fixture(scope="module")
def system(state: dict[str, np.ndarray]) -> PanopticDeepLab:
    return build_system(deeplab2_config(state, data_set="cityscapes"), CITYSCAPES)


def test_config_of_a_released_model(state: dict[str, np.ndarray]) -> None:
    config = deeplab2_config(state, data_set="cityscapes")
    # Crops of 1025x2049 are 33x65 features at output stride 32.
    assert config.aspp.pooling_window == (33, 65)
    assert config.aspp.rates == (3, 6, 9)
    assert config.min_padded_size == (1025, 2049)
    assert (config.postprocess.nms_kernel, config.postprocess.stuff_area_limit) == (13, 2048)
    coco = deeplab2_config(state, data_set="coco", output_stride=16)
    assert coco.aspp.pooling_window == (41, 41)
    assert coco.aspp.rates == (6, 12, 18)
    assert coco.resize is not None
    assert coco.resize.longer_side == 641
    assert (coco.postprocess.nms_kernel, coco.postprocess.stuff_area_limit) == (41, 4096)
    assert coco.void_class


def test_unknown_data_set_and_backbone(state: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"Unknown data set of DeepLab2 'citiscapes'\. Did you mean 'cityscapes'"):
        deeplab2_config(state, data_set="citiscapes")
    # A deeper network has more blocks.
    deeper = {**state, "encoder/_stage4/_block7/_conv2_bn_act/_conv/kernel": np.zeros((3, 3, 256, 256), np.float32)}
    with pytest.raises(
        UserError, match=r"such as encoder/_stage2.* have no backbone of DeepLab2 .* choose weights of ResNet-50, R"
    ):
        deeplab2_config(deeper, data_set="cityscapes")


def test_backbone_of_an_imagenet_checkpoint(state: dict[str, np.ndarray]) -> None:
    imagenet = {name: value for name, value in state.items() if name.startswith("encoder/")}
    imagenet["classifier/kernel"] = np.zeros((2048, 1000), np.float32)
    keys = deeplab2_backbone(imagenet)
    assert keys == {"name": "resnet50", "max_pool": False, "stem": "seven_by_seven"}
    names = {
        deeplab2_backbone_name(path, BackboneConfig(**keys))
        for path in ("stem/conv1/conv/kernel", "res3/block1/shortcut/norm/moving_mean", "res5/block3/conv3/norm/beta")
    }
    assert names <= imagenet.keys()


def test_a_backbone_starts_from_an_imagenet_checkpoint(state: dict[str, np.ndarray], tmp_path: Path) -> None:
    kernel = np.full((7, 7, 3, 64), 0.5, np.float32)
    imagenet = {name: value for name, value in state.items() if name.startswith("encoder/")}
    imagenet |= {"encoder/_stem/_conv/kernel": kernel, "classifier/kernel": np.zeros((2048, 1000), np.float32)}
    write_checkpoint(tmp_path / "ckpt-100", with_endings(imagenet))
    weights = str(tmp_path / "ckpt-100")
    keys = {"backbone": {"name": "resnet50", "stem": "seven_by_seven"}}
    with pytest.raises(UserError, match=r"other settings .*; set model.image_mean=.*model.backbone.max_pool=false"):
        load_backbone_weights(build_system(PanopticDeepLabConfig.model_validate(keys), CITYSCAPES), weights)
    keys["backbone"]["max_pool"] = False
    colors = {"image_mean": (127.5,) * 3, "image_std": (127.5,) * 3}
    system = build_system(PanopticDeepLabConfig.model_validate({**keys, **colors}), CITYSCAPES)
    load_backbone_weights(system, weights)
    np.testing.assert_array_equal(system.backbone.stem.convolutions[0].conv.kernel.numpy(), kernel)
    assert not system.backbone.stages[-1].blocks[-1].convolutions[-1].conv.kernel.numpy().any()


def test_names_of_mobilenet_v3_small() -> None:
    # One convolution, blocks of 1, 2, 5 and 3, and one convolution.
    kernels = {f"encoder/_blocks/{number}/_conv3_bn/_conv/kernel": np.zeros((1, 1, 8, 8)) for number in range(1, 12)}
    kernels["encoder/_blocks/0/_conv/kernel"] = np.zeros((3, 3, 3, 16))
    kernels["encoder/_blocks/12/_conv/kernel"] = np.zeros((1, 1, 96, 576))
    keys = deeplab2_backbone(kernels)
    assert keys["name"] == "mobilenet_v3_small"
    backbone = BackboneConfig(**keys)
    assert {
        path: deeplab2_backbone_name(path, backbone)
        for path in ("stem/conv1/conv/kernel", "res4/block5/expand/norm/beta", "res5/conv/conv/kernel")
    } == {
        "stem/conv1/conv/kernel": "encoder/_blocks/0/_conv/kernel",
        "res4/block5/expand/norm/beta": "encoder/_blocks/8/_conv1_bn_act/_batch_norm/beta",
        "res5/conv/conv/kernel": "encoder/_blocks/12/_conv/kernel",
    }
    assert deeplab2_name("backbone/res2/block1/squeeze_excite/reduce/conv/bias", backbone) == (
        "encoder/_blocks/1/_squeeze_excitation/_se_reduce/bias"
    )
    assert deeplab2_backbone_name("res6/block1/expand/conv/kernel", backbone) is None


def test_nothing_changes_unless_all_weights_fit(system: PanopticDeepLab, state: dict[str, np.ndarray]) -> None:
    before = system.backbone.stem.convolutions[0].conv.kernel.numpy()
    wrong = {**state, "encoder/_stem/_conv/kernel": np.ones((7, 7, 3, 64), np.float32), "other/kernel": np.zeros(3)}
    del wrong["encoder/_stem/_batch_norm/gamma"]
    message = (
        r"1 missing \(encoder/_stem/_batch_norm/gamma\); 1 unexpected \(other/kernel\); "
        r"use .*'panoptic_deeplab/cityscapes_deeplab2'"
    )
    with pytest.raises(UserError, match=message):
        load_deeplab2(system, wrong)
    np.testing.assert_array_equal(system.backbone.stem.convolutions[0].conv.kernel.numpy(), before)


def test_other_classes_need_keep_initial(system: PanopticDeepLab, state: dict[str, np.ndarray]) -> None:
    other = {**state, "semantic_last_layer/kernel": np.zeros((1, 1, 256, 7)), "semantic_last_layer/bias": np.zeros(7)}
    with pytest.raises(UserError, match=r"2 of another shape \(semantic_last_layer/kernel is .*keep_initial"):
        load_deeplab2(system, other)
    initial = system.semantic_head.predictor.kernel.numpy()
    load_deeplab2(system, other, keep_initial=["semantic_last_layer/*"])
    np.testing.assert_array_equal(system.semantic_head.predictor.kernel.numpy(), initial)
    assert not system.backbone.stem.convolutions[0].conv.kernel.numpy().any()


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small checkpoint with all that training saves."""
    kernel = "encoder/_stem/_conv/kernel"
    folder = tmp_path / "made [up]"
    folder.mkdir()
    arrays = with_endings(
        {
            kernel: np.arange(1000, dtype=np.float32),
            "semantic_last_layer/bias": np.ones(19, np.float32),
            f"{kernel}/.OPTIMIZER_SLOT/optimizer/m": np.ones(1000, np.float32),
            f"{kernel}/.OPTIMIZER_SLOT/optimizer/average": np.ones(1000, np.float32),
            "optimizer/iter": np.array(60_000),
            "optimizer/learning_rate": np.float32(0.1),
            "global_step": np.array(60_000),
            "save_counter": np.array(60),
        }
    )
    prefix = tmp_path / "ckpt-60000"
    write_checkpoint(prefix, arrays)
    for file in tmp_path.glob("ckpt-*"):
        file.rename(folder / file.name)
    return folder / prefix.name


def test_checkpoint_is_read_without_the_state_of_training(checkpoint: Path) -> None:
    for path in (checkpoint, checkpoint.parent, checkpoint.with_name("ckpt-60000.index"), str(checkpoint)):
        state = read_deeplab2_checkpoint(path)
        assert sorted(state) == ["encoder/_stem/_conv/kernel", "semantic_last_layer/bias"]
        np.testing.assert_array_equal(state["encoder/_stem/_conv/kernel"], np.arange(1000))


def test_checkpoint_that_is_not_there(checkpoint: Path) -> None:
    with pytest.raises(UserError, match=r"Checkpoint '.*ckpt-7' does not exist; give the common part of the names"):
        read_deeplab2_checkpoint(checkpoint.with_name("ckpt-7"))
    with pytest.raises(UserError, match=r"Folder '.*' has no TensorFlow checkpoint"):
        read_deeplab2_checkpoint(checkpoint.parents[1])
    checkpoint.with_name("ckpt-7.index").touch()
    with pytest.raises(UserError, match=r"has 2 checkpoints, such as 'ckpt-60000'; give one of them: '.*ckpt-60000'"):
        read_deeplab2_checkpoint(checkpoint.parent)


@pytest.mark.parametrize("length", [0, 10, 100])
@pytest.mark.parametrize("part", ["index", "data-00000-of-00001"])
def test_half_a_download(checkpoint: Path, part: str, length: int) -> None:
    file = checkpoint.with_name(f"{checkpoint.name}.{part}")
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(UserError, match=r"Checkpoint '.*ckpt-60000' is damaged or incomplete; download its files"):
        read_deeplab2_checkpoint(checkpoint)


def test_missing_part_of_a_checkpoint(checkpoint: Path) -> None:
    checkpoint.with_name(f"{checkpoint.name}.data-00000-of-00001").unlink()
    with pytest.raises(UserError, match="is damaged or incomplete"):
        read_deeplab2_checkpoint(checkpoint)


def test_checkpoint_of_something_else(tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "model.ckpt", {"resnet_v1_50/conv1/weights": np.ones(3, np.float32)})
    with pytest.raises(UserError, match=r"Checkpoint '.*model.ckpt' has no weights of Keras layers"):
        read_deeplab2_checkpoint(tmp_path / "model.ckpt")
