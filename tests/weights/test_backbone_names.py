"""Names of ImageNet weights: made-up files with all names and shapes of the released ones."""

import fnmatch
import functools
import math
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from safetensors.numpy import save_file
from torch_files import tensor_of_array, write_zip

from deeplab2_like.configs import load_config
from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.backbone.mobilenet_v3 import LARGE, SMALL, MobileNetV3
from deeplab2_like.model.backbone.resnet import SEVEN_BY_SEVEN, THREE_CONVOLUTIONS, BlockKind, ResNet
from deeplab2_like.model.config import Norm
from deeplab2_like.weights.backbone_names import PYTORCH_SOURCES, BackboneSource
from deeplab2_like.weights.backbones import load_backbone_weights

Shapes = dict[str, tuple[int, ...]]


def conv(name: str, filters: int, inputs: int, size: int, *, bias: bool = False) -> Shapes:
    return {f"{name}.weight": (filters, inputs, size, size)} | ({f"{name}.bias": (filters,)} if bias else {})


def norm(name: str, channels: int) -> Shapes:
    vectors = ("weight", "bias", "running_mean", "running_var")
    return {f"{name}.{vector}": (channels,) for vector in vectors} | {f"{name}.num_batches_tracked": ()}


def dense(name: str, units: int, inputs: int) -> Shapes:
    return {f"{name}.weight": (units, inputs), f"{name}.bias": (units,)}


# Output channels of the stages divided by 4, blocks, and groups: a small ResNet and a small ResNeXt.
RESNET = {"widths": (8, 16, 24, 32), "depths": (2, 1, 1, 2), "groups": 1}
RESNEXT = {"widths": (8, 16, 24, 32), "depths": (1, 2, 1, 1), "groups": 4}


def torchvision_resnet(widths: tuple[int, ...], depths: tuple[int, ...], groups: int, group_width: int = 0) -> Shapes:
    shapes = conv("conv1", 64, 3, 7) | norm("bn1", 64)
    inputs = 64
    for layer, (width, depth) in enumerate(zip(widths, depths, strict=True), start=1):
        inner = groups * group_width * width // widths[0] if group_width else width
        for block in range(depth):
            name = f"layer{layer}.{block}"
            shapes |= conv(f"{name}.conv1", inner, inputs, 1) | norm(f"{name}.bn1", inner)
            shapes |= conv(f"{name}.conv2", inner, inner // groups, 3) | norm(f"{name}.bn2", inner)
            shapes |= conv(f"{name}.conv3", 4 * width, inner, 1) | norm(f"{name}.bn3", 4 * width)
            if block == 0:
                shapes |= conv(f"{name}.downsample.0", 4 * width, inputs, 1) | norm(f"{name}.downsample.1", 4 * width)
            inputs = 4 * width
    return shapes | dense("fc", 1000, inputs)


def detectron2_resnet(shapes: Shapes, *, stem: Shapes | None = None) -> Shapes:
    """The same network as Detectron2's converter names it, optionally with another stem."""
    renamed = {}
    for name, shape in shapes.items():
        name = re.sub(r"^(?!layer)", "stem.", name)
        name = re.sub(r"^layer(\d)", lambda match: f"res{int(match[1]) + 1}", name)
        name = re.sub(r"bn(\d)", r"conv\1.norm", name)
        renamed[name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = shape
    if stem is None:
        return renamed
    return {name: shape for name, shape in renamed.items() if not name.startswith("stem.conv1")} | stem


def caffe2_resnet(shapes: Shapes, *, folded: bool) -> Shapes:
    """The same network with names of Caffe2, and normalization as scale and offset if it is folded."""
    renamed = {"conv1_b": (64,)}
    vectors = {"weight": "s", "bias": "b"}
    if not folded:
        vectors = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}
    for name, shape in shapes.items():
        if match := re.fullmatch(r"(?:layer(\d)\.(\d+)\.)?(conv|bn|downsample\.)(\d)\.(\w+)", name):
            layer, block, kind, number, variable = match.groups()
            is_norm = kind == "bn" or name.split(".")[-3:-1] == ["downsample", "1"]
            if layer is None:
                place = "res_conv1" if is_norm else "conv1"
            else:
                branch = "branch1" if kind == "downsample." else f"branch2{' abc'[int(number)]}"
                place = f"res{int(layer) + 1}_{block}_{branch}"
            if not is_norm:
                renamed[f"{place}_w"] = shape
            elif variable in vectors:
                renamed[f"{place}_bn_{vectors[variable]}"] = shape
    return renamed | {"fc1000_w": (1000, 128), "fc1000_b": (1000,)}


# Rows of the tables of MobileNetV3: kernel size, channels of the depthwise convolution, output channels, and channels
# inside squeeze-and-excite or 0.
MOBILENET_LARGE = (
    *((3, 16, 16, 0), (3, 64, 24, 0), (3, 72, 24, 0), (5, 72, 40, 24), (5, 120, 40, 32), (5, 120, 40, 32)),
    *((3, 240, 80, 0), (3, 200, 80, 0), (3, 184, 80, 0), (3, 184, 80, 0), (3, 480, 112, 120), (3, 672, 112, 168)),
    *((5, 672, 160, 168), (5, 960, 160, 240), (5, 960, 160, 240)),
)
MOBILENET_SMALL = (
    *((3, 16, 16, 8), (3, 72, 24, 0), (3, 88, 24, 0), (5, 96, 40, 24), (5, 240, 40, 64), (5, 240, 40, 64)),
    *((5, 120, 48, 32), (5, 144, 48, 40), (5, 288, 96, 72), (5, 576, 96, 144), (5, 576, 96, 144)),
)


def torchvision_mobilenet(rows: tuple[tuple[int, int, int, int], ...], last: int) -> Shapes:
    def conv_norm(name: str, filters: int, inputs: int, size: int) -> Shapes:
        return conv(f"{name}.0", filters, inputs, size) | norm(f"{name}.1", filters)

    shapes = conv_norm("features.0", 16, 3, 3)
    inputs = 16
    for index, (size, expansion, filters, squeeze) in enumerate(rows, start=1):
        parts = [("expand", inputs)] if expansion != inputs else []
        parts += [("depthwise", 1), *([("squeeze", 0)] if squeeze else []), ("project", expansion)]
        for number, (part, part_inputs) in enumerate(parts):
            name = f"features.{index}.block.{number}"
            if part == "squeeze":
                shapes |= conv(f"{name}.fc1", squeeze, expansion, 1, bias=True)
                shapes |= conv(f"{name}.fc2", expansion, squeeze, 1, bias=True)
            else:
                part_filters = filters if part == "project" else expansion
                shapes |= conv_norm(name, part_filters, part_inputs, size if part == "depthwise" else 1)
        inputs = filters
    shapes |= conv_norm(f"features.{len(rows) + 1}", 6 * inputs, inputs, 1)
    return shapes | dense("classifier.0", last, 6 * inputs) | dense("classifier.3", 1000, last)


def timm_mobilenet(rows: tuple[tuple[int, int, int, int], ...], last: int) -> Shapes:
    shapes = conv("conv_stem", 16, 3, 3) | norm("bn1", 16)
    inputs, group, block = 16, 0, 0
    for index, (size, expansion, filters, squeeze) in enumerate(rows):
        if index > 0:
            group, block = (group, block + 1) if filters == inputs else (group + 1, 0)
        name = f"blocks.{group}.{block}"
        if expansion != inputs:
            shapes |= conv(f"{name}.conv_pw", expansion, inputs, 1) | norm(f"{name}.bn1", expansion)
            shapes |= conv(f"{name}.conv_dw", expansion, 1, size) | norm(f"{name}.bn2", expansion)
            shapes |= conv(f"{name}.conv_pwl", filters, expansion, 1) | norm(f"{name}.bn3", filters)
        else:  # The block without expansion.
            shapes |= conv(f"{name}.conv_dw", expansion, 1, size) | norm(f"{name}.bn1", expansion)
            shapes |= conv(f"{name}.conv_pw", filters, expansion, 1) | norm(f"{name}.bn2", filters)
        if squeeze:
            shapes |= conv(f"{name}.se.conv_reduce", squeeze, expansion, 1, bias=True)
            shapes |= conv(f"{name}.se.conv_expand", expansion, squeeze, 1, bias=True)
        inputs = filters
    final = f"blocks.{group + 1}.0"
    shapes |= conv(f"{final}.conv", 6 * inputs, inputs, 1) | norm(f"{final}.bn1", 6 * inputs)
    return shapes | conv("conv_head", last, 6 * inputs, 1, bias=True) | dense("classifier", 1000, last)


def num_parameters(shapes: Shapes) -> int:
    return sum(math.prod(shape) for name, shape in shapes.items() if name.endswith((".weight", ".bias")))


def test_made_up_files_have_the_published_sizes() -> None:
    """The numbers of parameters are those in the documentation of torchvision and timm."""
    widths = (64, 128, 256, 512)
    assert num_parameters(torchvision_resnet(widths, (3, 4, 6, 3), 1)) == 25_557_032
    assert num_parameters(torchvision_resnet(widths, (3, 4, 23, 3), 32, 8)) == 88_791_336
    assert num_parameters(torchvision_mobilenet(MOBILENET_LARGE, 1280)) == 5_483_032
    assert num_parameters(torchvision_mobilenet(MOBILENET_SMALL, 1024)) == 2_542_856
    assert num_parameters(timm_mobilenet(MOBILENET_LARGE, 1280)) == 5_483_032
    assert num_parameters(timm_mobilenet(MOBILENET_SMALL, 1024)) == 2_542_856


DEEP_STEM = {
    **(conv("stem.conv1", 64, 3, 3) | norm("stem.conv1.norm", 64)),
    **(conv("stem.conv2", 64, 64, 3) | norm("stem.conv2.norm", 64)),
    **(conv("stem.conv3", 128, 64, 3) | norm("stem.conv3.norm", 128)),
}
SMALL_RESNET = torchvision_resnet(**RESNET)
SMALL_RESNEXT = torchvision_resnet(**RESNEXT)
# Its first block has 128 inputs.
DEEP_STEM_RESNET = detectron2_resnet(SMALL_RESNET, stem=DEEP_STEM) | {
    "res2.0.conv1.weight": (8, 128, 1, 1),
    "res2.0.shortcut.weight": (32, 128, 1, 1),
}

# For each file: its source, the backbone, and the names and shapes.
FILES: dict[str, tuple[str, str, Shapes]] = {
    "torchvision_resnet": ("torchvision's or timm's ResNet", "resnet50", SMALL_RESNET),
    "torchvision_resnext": ("torchvision's or timm's ResNet", "resnext101_32x8d", SMALL_RESNEXT),
    "detectron2_resnet": ("Detectron2's ResNet of torchvision", "resnet50", detectron2_resnet(SMALL_RESNET)),
    "detectron2_deeplab": ("Detectron2's ResNet of DeepLab", "resnet50_deep_stem", DEEP_STEM_RESNET),
    "caffe2_resnet": ("Detectron2's ResNet of Caffe2", "resnet50", caffe2_resnet(SMALL_RESNET, folded=False)),
    "caffe2_folded": ("Detectron2's ResNet of Caffe2", "resnet50", caffe2_resnet(SMALL_RESNET, folded=True)),
    "caffe2_resnext": (
        "Detectron2's ResNet of Caffe2",
        "resnext101_32x8d",
        caffe2_resnet(SMALL_RESNEXT, folded=True),
    ),
    "torchvision_large": (
        "torchvision's MobileNetV3",
        "mobilenet_v3_large",
        torchvision_mobilenet(MOBILENET_LARGE, 1280),
    ),
    "torchvision_small": (
        "torchvision's MobileNetV3",
        "mobilenet_v3_small",
        torchvision_mobilenet(MOBILENET_SMALL, 1024),
    ),
    "timm_large": ("timm's MobileNetV3", "mobilenet_v3_large", timm_mobilenet(MOBILENET_LARGE, 1280)),
    "timm_small": ("timm's MobileNetV3", "mobilenet_v3_small", timm_mobilenet(MOBILENET_SMALL, 1024)),
}
NORM = Norm(kind="batch")


@functools.cache
def variables(name: str) -> Shapes:
    """The paths and shapes of the variables inside a backbone."""
    backbone: keras.layers.Layer
    if name.startswith("mobilenet"):
        backbone = MobileNetV3(stages=LARGE if name.endswith("large") else SMALL, norm=NORM, name="backbone")
    else:
        options = RESNEXT if name.startswith("resnext") else RESNET
        stem = THREE_CONVOLUTIONS if name.endswith("deep_stem") else SEVEN_BY_SEVEN
        backbone = ResNet(stem=stem, block=BlockKind.BOTTLENECK, **options, norm=NORM, name="backbone")
    backbone(keras.KerasTensor((1, 64, 64, 3)))
    return {weight.path.partition("/")[2]: tuple(weight.shape) for weight in backbone.weights}


def random_state(shapes: Shapes) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    return {name: generator.uniform(0.5, 1.5, shape).astype(np.float32) for name, shape in shapes.items()}


def source_of(name: str) -> BackboneSource:
    return PYTORCH_SOURCES[FILES[name][0]]


@pytest.mark.parametrize("name", list(FILES))
def test_exactly_one_source_recognizes_a_file(name: str) -> None:
    expected, _, shapes = FILES[name]
    state = random_state(shapes)
    assert [found for found, source in PYTORCH_SOURCES.items() if source.recognizes(state)] == [expected]


def test_no_source_recognizes_other_files() -> None:
    others = [
        torchvision_mobilenet(MOBILENET_LARGE, 1280).keys() - {"features.0.0.weight"},
        {"conv1.0.weight", "conv1.3.weight", "layer1.0.conv1.weight"},  # A ResNet-50-D of timm.
        {"conv_stem.weight", "blocks.0.0.conv_dw.weight", "bn2.weight"},  # An EfficientNet of timm.
        {"backbone.res2.0.conv1.weight", "backbone.stem.conv1.weight"},  # A whole system.
    ]
    for names in others:
        state = random_state(dict.fromkeys(names, (1,)))
        assert [found for found, source in PYTORCH_SOURCES.items() if source.recognizes(state)] == []


@pytest.mark.parametrize("name", list(FILES))
def test_every_variable_has_its_array(name: str) -> None:
    """The variables and the names in the file, without the classifier, correspond one to one, with equal shapes."""
    _, backbone_name, shapes = FILES[name]
    source = source_of(name)
    state = source.prepare(random_state(shapes))
    used = []
    for path, shape in variables(backbone_name).items():
        name_in_file = source.name_of(path, backbone_name)
        assert name_in_file is not None, path
        assert source.to_keras(path, state[name_in_file]).shape == shape, path
        used.append(name_in_file)
    ignored = {key for key in state for pattern in source.ignored if fnmatch.fnmatchcase(key, pattern)}
    assert sorted(used) == sorted(state.keys() - ignored)


@pytest.mark.parametrize(
    ("name", "path", "expected"),
    [
        ("torchvision_resnet", "stem/conv1/conv/kernel", "conv1.weight"),
        ("torchvision_resnet", "stem/conv1/norm/gamma", "bn1.weight"),
        ("torchvision_resnet", "res2/block1/conv3/norm/moving_variance", "layer1.0.bn3.running_var"),
        ("torchvision_resnet", "res5/block2/conv2/conv/kernel", "layer4.1.conv2.weight"),
        ("torchvision_resnet", "res5/block2/conv2/kernel", "layer4.1.conv2.weight"),  # Of a deformable convolution.
        ("torchvision_resnet", "res5/block2/conv2/offset/kernel", None),
        ("torchvision_resnet", "res3/block1/shortcut/conv/kernel", "layer2.0.downsample.0.weight"),
        ("torchvision_resnet", "res3/block1/shortcut/norm/beta", "layer2.0.downsample.1.bias"),
        ("torchvision_resnet", "stem/conv2/conv/kernel", None),
        ("detectron2_resnet", "res3/block1/shortcut/norm/beta", "res3.0.shortcut.norm.bias"),
        ("detectron2_deeplab", "stem/conv3/norm/moving_mean", "stem.conv3.norm.running_mean"),
        ("caffe2_resnet", "stem/conv1/norm/gamma", "res_conv1_bn_gamma"),
        ("caffe2_resnet", "res4/block12/conv2/conv/kernel", "res4_11_branch2b_w"),
        ("caffe2_resnet", "res4/block1/shortcut/norm/moving_variance", "res4_0_branch1_bn_running_var"),
        ("torchvision_large", "stem/block1/project/norm/gamma", "features.1.block.1.1.weight"),
        ("torchvision_large", "res3/block1/squeeze_excite/expand/conv/bias", "features.4.block.2.fc2.bias"),
        ("torchvision_large", "res5/conv/norm/beta", "features.16.1.bias"),
        ("torchvision_small", "res2/block1/squeeze_excite/reduce/conv/kernel", "features.1.block.1.fc1.weight"),
        ("timm_large", "stem/block1/depthwise/conv/kernel", "blocks.0.0.conv_dw.weight"),
        ("timm_large", "res4/block5/expand/conv/kernel", "blocks.4.0.conv_pw.weight"),
        ("timm_large", "res5/conv/conv/kernel", "blocks.6.0.conv.weight"),
        ("timm_small", "res4/block4/squeeze_excite/reduce/conv/bias", "blocks.3.0.se.conv_reduce.bias"),
    ],
)
def test_names(name: str, path: str, expected: str | None) -> None:
    assert source_of(name).name_of(path, FILES[name][1]) == expected


def test_a_mobilenet_file_has_no_names_for_a_resnet() -> None:
    assert source_of("timm_large").name_of("stem/conv1/conv/kernel", "resnet50") is None


def test_kernels_are_transposed() -> None:
    # Out, in, height, width: 0 to 23.
    array = np.arange(2 * 3 * 2 * 2, dtype=np.float32).reshape(2, 3, 2, 2)
    kernel = source_of("torchvision_resnet").to_keras("stem/conv1/conv/kernel", array)
    # Of the second output, third input, first row, second column.
    assert kernel[0, 1, 2, 1] == array[1, 2, 0, 1] == 21
    # Caffe2's third input is red, the first one here.
    kernel = source_of("caffe2_resnet").to_keras("stem/conv1/conv/kernel", array)
    assert kernel[0, 1, 0, 1] == 21
    assert source_of("caffe2_resnet").to_keras("res2/block1/conv1/conv/kernel", array)[0, 1, 2, 1] == 21
    depthwise = np.arange(3 * 2 * 2, dtype=np.float32).reshape(3, 1, 2, 2)
    kernel = source_of("timm_large").to_keras("res2/block1/depthwise/conv/kernel", depthwise)
    assert kernel.shape == (2, 2, 3, 1)
    assert kernel[1, 0, 2, 0] == depthwise[2, 0, 1, 0]


def test_folded_normalization_scales_and_shifts() -> None:
    source = source_of("caffe2_folded")
    state = {"res2_0_branch1_bn_s": np.array([2.0, 3.0]), "res2_0_branch1_bn_b": np.array([0.5, -1.0])}
    state = dict(source.prepare(state))
    norm_layer = keras.layers.BatchNormalization(epsilon=source.settings("resnet50")["norm.epsilon"])
    norm_layer.build((None, 2))
    for weight in norm_layer.weights:
        key = source.name_of(f"res2/block1/shortcut/norm/{weight.name}", "resnet50")
        weight.assign(state.pop(key))
    assert not state
    # 2 * 1 + 0.5 and 3 * 4 - 1.
    np.testing.assert_allclose(norm_layer(np.array([[1.0, 4.0]])), [[2.5, 11.0]], rtol=1e-6)


def test_settings() -> None:
    resnet = PYTORCH_SOURCES["Detectron2's ResNet of Caffe2"].settings("resnet50")
    assert (resnet["image_std"], resnet["backbone.stride_in_1x1"]) == ((1.0, 1.0, 1.0), True)
    resnext = PYTORCH_SOURCES["Detectron2's ResNet of Caffe2"].settings("resnext101_32x8d")
    assert (resnext["image_std"], resnext["backbone.stride_in_1x1"]) == ((58.395, 57.12, 57.375), False)
    deeplab = PYTORCH_SOURCES["Detectron2's ResNet of DeepLab"].settings("resnet50")
    assert deeplab["backbone.stem"] == "three_convolutions"
    epsilons = {name: source.settings("mobilenet_v3_small")["norm.epsilon"] for name, source in PYTORCH_SOURCES.items()}
    assert epsilons.pop("torchvision's MobileNetV3") == 1e-3
    assert set(epsilons.values()) == {1e-5}


def build(*overrides: str) -> Any:
    """Builds the part of a system that the backbone's weights need."""
    config: Any = load_config("panoptic_deeplab/scenes_tiny", overrides).model
    backbone = build_backbone(config.backbone, norm=config.norm)
    backbone(keras.KerasTensor((1, 64, 64, 3)))
    return SimpleNamespace(config=config, backbone=backbone)


SMALL_MOBILENET = "model.backbone={name: mobilenet_v3_small, halve_last_stage: false}"


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_a_file_is_loaded(tmp_path: Path, suffix: str) -> None:
    system = build(SMALL_MOBILENET, "model.norm.epsilon=1e-3")
    state = random_state(FILES["torchvision_small"][2])
    path = tmp_path / f"mobilenet{suffix}"
    if suffix == ".pth":
        write_zip(path, {name: tensor_of_array(array, name) for name, array in state.items()})
    else:
        save_file(state, path)
    load_backbone_weights(system, str(path))
    values = {weight.path.partition("backbone/")[2]: weight.numpy() for weight in system.backbone.weights}
    kernel = state["features.2.block.0.0.weight"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(values["res3/block1/expand/conv/kernel"], kernel)
    np.testing.assert_array_equal(values["res5/conv/norm/moving_mean"], state["features.12.1.running_mean"])


def test_a_file_of_caffe2_is_loaded_into_deformable_convolutions(tmp_path: Path) -> None:
    system = build(
        "model.backbone={name: resnet50, stem: seven_by_seven, stride_in_1x1: true, deformable_stages: [res5]}",
        "model.norm.epsilon=1e-5",
        "model.image_std=[1, 1, 1]",
    )
    state = random_state(caffe2_resnet(torchvision_resnet((64, 128, 256, 512), (3, 4, 6, 3), 1), folded=True))
    (tmp_path / "R-50.pkl").write_bytes(pickle.dumps(state, protocol=2))
    load_backbone_weights(system, str(tmp_path / "R-50.pkl"))
    values = {weight.path.partition("backbone/")[2]: weight.numpy() for weight in system.backbone.weights}
    blue = state["conv1_w"][:, 0].transpose(1, 2, 0)
    np.testing.assert_array_equal(values["stem/conv1/conv/kernel"][:, :, 2], blue)
    kernel = state["res5_2_branch2b_w"].transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(values["res5/block3/conv2/kernel"], kernel)
    assert not values["res5/block3/conv2/offset/kernel"].any()


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.backbone={name: mobilenet_v3_small}", "model.norm.epsilon=1e-5"],
            r"than the config has; set model\.backbone\.halve_last_stage=false, model\.norm\.epsilon=0\.001\.$",
        ),
        (
            ["model.backbone={name: mobilenet_v3_large, halve_last_stage: false}", "model.norm.epsilon=1e-3"],
            r"small\.npz' do not fit backbone 'mobilenet_v3_large': \d+ missing .* of another shape",
        ),
        (
            ["model.backbone={name: resnet_tiny}"],
            r"small\.npz' are those of torchvision's MobileNetV3 and do not fit backbone 'resnet_tiny'; set "
            r"model\.backbone\.name to one of mobilenet_v3_large, mobilenet_v3_small, or give other weights\.$",
        ),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    system = build(*overrides)
    np.savez(tmp_path / "small.npz", **random_state(FILES["torchvision_small"][2]))
    before = system.backbone.weights[0].numpy()
    with pytest.raises(UserError, match=message):
        load_backbone_weights(system, str(tmp_path / "small.npz"))
    np.testing.assert_array_equal(system.backbone.weights[0].numpy(), before)
