"""Names of ImageNet weights of backbones in the files of Detectron2, torchvision and timm.

Arrays are transposed from PyTorch's layouts: convolutions (out, in, height, width) to (height, width, in, out), also
with groups, and depthwise ones (channels, 1, height, width) to (height, width, channels, 1).
"""

import re
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from deeplab2_like.model.backbone.mobilenet_v3 import LARGE, SMALL, Bottleneck, Stages, list_blocks
from deeplab2_like.model.pretrained import Settings
from deeplab2_like.weights.assign import resnet_layer_name, transpose_kernel

State = Mapping[str, np.ndarray]  # Arrays by their names in a file.


def _unchanged(state: State) -> State:
    return state


class BackboneSource(NamedTuple):
    """A kind of files with weights of backbones.

    Attributes:
        backbones: Names of the backbones that such files are for.
        recognizes: Whether these arrays are of this kind.
        name_of: Maps the path of a variable inside the backbone, such as `res2/block1/conv1/conv/kernel`, and the name
            of the backbone to the name in the file; None if the file has no such variable.
        to_keras: Maps this path and the array of the file to the value of the variable.
        ignored: Patterns with `*` of names that are not part of the backbone.
        settings: Maps the name of the backbone to the config keys that belong to the weights.
        prepare: Changes the arrays before all else, for instance to fold biases into normalization.
    """

    backbones: tuple[str, ...]
    recognizes: Callable[[State], bool]
    name_of: Callable[[str, str], str | None]
    to_keras: Callable[[str, np.ndarray], np.ndarray]
    ignored: tuple[str, ...]
    settings: Callable[[str], Settings]
    prepare: Callable[[State], State] = _unchanged


_RESNETS = ("resnet50", "resnet101", "resnet152")
_RESNEXTS = ("resnext101_32x8d", "resnext101_64x4d", "resnext152_32x8d")
_COUNTERS = "*.num_batches_tracked"
_EPSILON = 1e-5  # PyTorch's default.
_IMAGENET_COLORS = {"image_mean": (123.675, 116.28, 103.53), "image_std": (58.395, 57.12, 57.375)}  # Red, green, blue.
_RESNET_SETTINGS: Settings = {
    **_IMAGENET_COLORS,
    "norm.epsilon": _EPSILON,
    "backbone.stem": "seven_by_seven",
    "backbone.max_pool": True,
    "backbone.stride_in_1x1": False,
    "backbone.padding": "symmetric",
}
_MOBILENET_SETTINGS: Settings = {
    **_IMAGENET_COLORS,
    "backbone.padding": "symmetric",
    "backbone.halve_last_stage": False,
    "backbone.squeeze_gate": "hard_sigmoid",
}

_VARIABLES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}


def _split(path: str) -> tuple[str, str, str] | None:
    """Splits a path such as `res2/block1/conv1/norm/gamma` into `res2/block1/conv1`, `norm` and PyTorch's `weight`."""
    # A deformable convolution is one layer, so its kernel is not in a layer `conv`.
    match = re.fullmatch(rf"(.+?)/(?:(conv|norm)/)?({'|'.join(_VARIABLES)})", path)
    return match and (match[1], match[2] or "conv", _VARIABLES[match[3]])


# ResNet and ResNeXt. Paths count stages from res2 and blocks from 1; files count blocks from 0.


def _split_residual(layer: str) -> tuple[int, int, str] | None:
    """Splits `res2/block1/conv1` into the stage 2, the block 0 and `conv1`."""
    match = re.fullmatch(r"res(\d)/block(\d+)/(conv\d|shortcut)", layer)
    return match and (int(match[1]), int(match[2]) - 1, match[3])


def _torchvision_resnet_name(path: str, backbone: str) -> str | None:
    """Such as `layer1.0.bn1.weight` and, of a shortcut, `layer1.0.downsample.1.weight`."""
    if (parts := _split(path)) is None:
        return None
    layer, kind, variable = parts
    prefix = ""
    if (residual := _split_residual(layer)) is not None:
        stage, block, layer = residual
        prefix = f"layer{stage - 1}.{block}."
    elif layer == "stem/conv1":
        layer = "conv1"
    else:
        return None
    if layer == "shortcut":
        layer = "downsample.0" if kind == "conv" else "downsample.1"
    elif kind == "norm":
        layer = layer.replace("conv", "bn")
    return f"{prefix}{layer}.{variable}"


def _detectron2_resnet_name(path: str, backbone: str) -> str | None:
    """Such as `res2.0.conv1.norm.weight`."""
    if (parts := _split(path)) is None:
        return None
    layer, kind, variable = parts
    if (name := resnet_layer_name(layer)) is None:
        return None
    return f"{name}.norm.{variable}" if kind == "norm" else f"{name}.{variable}"


_CAFFE2_LAYERS = {"conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c", "shortcut": "branch1"}
_CAFFE2_NORM = {"weight": "gamma", "bias": "beta", "running_mean": "running_mean", "running_var": "running_var"}


def _caffe2_resnet_name(path: str, backbone: str) -> str | None:
    """Such as `res2_0_branch2a_bn_gamma`."""
    if (parts := _split(path)) is None:
        return None
    layer, kind, variable = parts
    if (residual := _split_residual(layer)) is not None:
        stage, block, layer = residual
        layer = f"res{stage}_{block}_{_CAFFE2_LAYERS[layer]}"
    elif layer == "stem/conv1":
        layer = "conv1" if kind == "conv" else "res_conv1"
    else:
        return None
    return f"{layer}_w" if kind == "conv" else f"{layer}_bn_{_CAFFE2_NORM[variable]}"


def _caffe2_to_keras(path: str, array: np.ndarray) -> np.ndarray:
    array = transpose_kernel(path, array)
    # The network was trained with images in BGR.
    return array[:, :, ::-1] if path == "stem/conv1/conv/kernel" else array


def _complete_affine_norms(state: State) -> State:
    """Completes normalization that the file holds as scale and offset, `_bn_s` and `_bn_b`, by neutral statistics."""
    result = dict(state)
    for name in state:
        if name.endswith("_bn_s"):
            layer = name.removesuffix("s")
            result[f"{layer}gamma"] = scale = result.pop(name)
            result[f"{layer}running_mean"] = np.zeros_like(scale)
            result[f"{layer}running_var"] = np.full_like(scale, 1 - _EPSILON)
        elif name.endswith("_bn_b"):
            result[f"{name.removesuffix('b')}beta"] = result.pop(name)
    return result


def _caffe2_settings(backbone: str) -> Settings:
    if backbone in _RESNEXTS:
        return _RESNET_SETTINGS
    # ResNets of MSRA, trained with images that were not divided by a standard deviation.
    return {**_RESNET_SETTINGS, "image_std": (1.0, 1.0, 1.0), "backbone.stride_in_1x1": True}


# MobileNetV3. Paths count the blocks of each stage from 1.

_MOBILENETS: dict[str, Stages] = {"mobilenet_v3_large": LARGE, "mobilenet_v3_small": SMALL}
_STEM = "stem/conv1"

# Names of a convolution and of the normalization after it, by the path of the layer.
_Layers = dict[str, tuple[str, str]]


class _Block(NamedTuple):
    """A block of MobileNetV3, or its final convolution.

    Attributes:
        path: Such as `res2/block1`, or `res5` for the final convolution.
        number: Number among all blocks, from 1.
        group: Index among the groups of consecutive blocks with equal output channels.
        index_in_group: Index in its group.
        expands: Whether it begins with an expansion.
        squeezes: Whether it has squeeze-and-excite.
        is_final: Whether it is the final convolution.
    """

    path: str
    number: int
    group: int
    index_in_group: int
    expands: bool
    squeezes: bool
    is_final: bool


def _blocks(stages: Stages) -> list[_Block]:
    blocks: list[_Block] = []
    filters, group, index_in_group = 16, -1, 0  # The first convolution has 16 channels, but is no block.
    for number, (path, row) in enumerate(list_blocks(stages), start=1):
        is_new = not blocks or row.filters != filters
        group, index_in_group = (group + 1, 0) if is_new else (group, index_in_group + 1)
        place = (path, number, group, index_in_group)
        if isinstance(row, Bottleneck):
            blocks.append(_Block(*place, expands=row.expansion != filters, squeezes=row.squeeze, is_final=False))
        else:
            blocks.append(_Block(*place, expands=False, squeezes=False, is_final=True))
        filters = row.filters
    return blocks


def _torchvision_mobilenet_layers(stages: Stages) -> _Layers:
    """Such as `features.2.block.0.0` and `features.2.block.0.1`; a block counts the parts that it has."""
    layers: _Layers = {_STEM: ("features.0.0", "features.0.1")}
    for block in _blocks(stages):
        name = f"features.{block.number}"
        if block.is_final:
            layers[f"{block.path}/conv"] = (f"{name}.0", f"{name}.1")
            continue
        has_part = {"expand": block.expands, "depthwise": True, "squeeze_excite": block.squeezes, "project": True}
        for number, part in enumerate(part for part, has in has_part.items() if has):
            if part == "squeeze_excite":
                layers[f"{block.path}/{part}/reduce"] = (f"{name}.block.{number}.fc1", "")
                layers[f"{block.path}/{part}/expand"] = (f"{name}.block.{number}.fc2", "")
            else:
                layers[f"{block.path}/{part}"] = (f"{name}.block.{number}.0", f"{name}.block.{number}.1")
    return layers


def _timm_mobilenet_layers(stages: Stages) -> _Layers:
    """Such as `blocks.1.0.conv_pw` and `blocks.1.0.bn1`; blocks of equal output channels are a group."""
    layers: _Layers = {_STEM: ("conv_stem", "bn1")}
    for block in _blocks(stages):
        name = f"blocks.{block.group}.{block.index_in_group}"
        if block.is_final:
            parts = {"conv": ("conv", "bn1")}
        elif block.expands:
            parts = {"expand": ("conv_pw", "bn1"), "depthwise": ("conv_dw", "bn2"), "project": ("conv_pwl", "bn3")}
        else:
            parts = {"depthwise": ("conv_dw", "bn1"), "project": ("conv_pw", "bn2")}
        for part, (convolution, norm) in parts.items():
            layers[f"{block.path}/{part}"] = (f"{name}.{convolution}", f"{name}.{norm}")
        if block.squeezes:
            layers[f"{block.path}/squeeze_excite/reduce"] = (f"{name}.se.conv_reduce", "")
            layers[f"{block.path}/squeeze_excite/expand"] = (f"{name}.se.conv_expand", "")
    return layers


def _mobilenet_name(make_layers: Callable[[Stages], _Layers]) -> Callable[[str, str], str | None]:
    def name_of(path: str, backbone: str) -> str | None:
        parts = _split(path)
        if parts is None or backbone not in _MOBILENETS:
            return None
        layer, kind, variable = parts
        convolution, norm = make_layers(_MOBILENETS[backbone]).get(layer, ("", ""))
        name = convolution if kind == "conv" else norm
        return f"{name}.{variable}" if name else None

    return name_of


def _has(*names: str, without: str = "") -> Callable[[State], bool]:
    return lambda state: state.keys() >= set(names) and without not in state


# By the name of the source, for messages. At most one of them recognizes a file.
PYTORCH_SOURCES: dict[str, BackboneSource] = {
    "torchvision's or timm's ResNet": BackboneSource(
        backbones=(*_RESNETS, *_RESNEXTS),
        recognizes=_has("conv1.weight", "layer1.0.conv1.weight"),
        name_of=_torchvision_resnet_name,
        to_keras=transpose_kernel,
        ignored=("fc.*", _COUNTERS),
        settings=lambda backbone: _RESNET_SETTINGS,
    ),
    "Detectron2's ResNet of torchvision": BackboneSource(
        backbones=(*_RESNETS, *_RESNEXTS),
        recognizes=_has("stem.conv1.weight", "res2.0.conv1.weight", without="stem.conv3.weight"),
        name_of=_detectron2_resnet_name,
        to_keras=transpose_kernel,
        ignored=("stem.fc.*", _COUNTERS),
        settings=lambda backbone: _RESNET_SETTINGS,
    ),
    "Detectron2's ResNet of DeepLab": BackboneSource(
        backbones=_RESNETS,
        recognizes=_has("stem.conv3.weight", "res2.0.conv1.weight"),
        name_of=_detectron2_resnet_name,
        to_keras=transpose_kernel,
        ignored=("stem.fc.*", _COUNTERS),
        settings=lambda backbone: {**_RESNET_SETTINGS, "backbone.stem": "three_convolutions"},
    ),
    "Detectron2's ResNet of Caffe2": BackboneSource(
        backbones=(*_RESNETS, *_RESNEXTS),
        recognizes=_has("conv1_w", "res2_0_branch2a_w"),
        name_of=_caffe2_resnet_name,
        to_keras=_caffe2_to_keras,
        ignored=("conv1_b", "fc1000_*", "pred_*", "*_momentum"),  # Detectron2 ignores the bias `conv1_b`, too.
        settings=_caffe2_settings,
        prepare=_complete_affine_norms,
    ),
    "torchvision's MobileNetV3": BackboneSource(
        backbones=tuple(_MOBILENETS),
        recognizes=_has("features.0.0.weight", "features.1.block.0.0.weight"),
        name_of=_mobilenet_name(_torchvision_mobilenet_layers),
        to_keras=transpose_kernel,
        ignored=("classifier.*", _COUNTERS),
        settings=lambda backbone: {**_MOBILENET_SETTINGS, "norm.epsilon": 1e-3},
    ),
    # Not those with `tf_` in their names, which need TensorFlow's padding and epsilon.
    "timm's MobileNetV3": BackboneSource(
        backbones=tuple(_MOBILENETS),
        recognizes=_has("conv_stem.weight", "blocks.0.0.conv_dw.weight", without="bn2.weight"),  # Of EfficientNet.
        name_of=_mobilenet_name(_timm_mobilenet_layers),
        to_keras=transpose_kernel,
        ignored=("conv_head.*", "classifier.*", _COUNTERS),
        settings=lambda backbone: {**_MOBILENET_SETTINGS, "norm.epsilon": _EPSILON},
    ),
}
