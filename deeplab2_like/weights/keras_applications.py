"""ImageNet weights of `keras.applications`: ResNet and MobileNetV3.

Keras builds its network and downloads or reads the weights; they are then copied by the names of its layers.
"""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone.mobilenet_v3 import LARGE, SMALL, Stages, list_blocks
from deeplab2_like.model.pretrained import KERAS_MOBILENET_V3, KERAS_RESNET
from deeplab2_like.weights.backbone_names import BackboneSource, State

# Endings of Keras' files.
SUFFIXES = (".h5", ".hdf5")

_RESNETS = {"resnet50": "ResNet50", "resnet101": "ResNet101", "resnet152": "ResNet152"}
_MOBILENETS: dict[str, tuple[str, Stages]] = {
    "mobilenet_v3_large": ("MobileNetV3Large", LARGE),
    "mobilenet_v3_small": ("MobileNetV3Small", SMALL),
}
# The network of Keras for each backbone.
APPLICATIONS = {**_RESNETS, **{backbone: application for backbone, (application, _) in _MOBILENETS.items()}}
_SIZE = 224  # Keras warns of others.


def read_imagenet(backbone: str) -> State:
    """Returns the ImageNet weights of a backbone, which Keras downloads to its cache, and checks by their hash.

    Args:
        backbone: One of `APPLICATIONS`.

    Returns:
        Arrays by layer and variable, such as `conv1_conv/kernel`.

    Raises:
        UserError: If they are not in the cache and cannot be downloaded.
    """
    try:
        model = _build(backbone, weights="imagenet", include_top=False)
    except MemoryError:
        raise
    except Exception as error:  # Keras raises plain exceptions.
        reason = " ".join(str(error).split())[:200]
        folder = Path(os.environ.get("KERAS_HOME", Path.home() / ".keras")) / "models"
        raise UserError(
            f"The ImageNet weights of {backbone} could not be downloaded ({reason}); put Keras' file "
            f"'{_file_name(backbone)}' into the folder '{folder}', or set model.backbone.weights to its path."
        ) from error
    return _arrays(model)


def read_file(path: str, backbone: str) -> State:
    """Reads a file that Keras wrote for its network, with or without the classifier.

    Args:
        path: A `.weights.h5`, or a `.h5` of earlier versions; it must exist.
        backbone: One of `APPLICATIONS`.

    Returns:
        Arrays by layer and variable, such as `conv1_conv/kernel`.

    Raises:
        UserError: If Keras has no such network, or the file is damaged or is not of this network.
    """
    if backbone not in APPLICATIONS:
        raise UserError(
            f"Weights '{path}' are a file of Keras, which has no network for backbone '{backbone}'; set "
            f"model.backbone.name to one of {', '.join(APPLICATIONS)}, or give a file of another source."
        )
    reason = ""
    for include_top in (False, True):
        try:
            model = _build(backbone, weights=None, include_top=include_top)
            model.load_weights(path)
            return _arrays(model)
        except MemoryError:
            raise
        except Exception as error:  # Damaged files and those of other networks raise various exceptions.
            reason = " ".join(str(error).split())[:200]
    raise UserError(
        f"Weights '{path}' are no readable file of keras.applications.{APPLICATIONS[backbone]} ({reason}); download "
        "it again, or give a file of this network."
    )


def _build(backbone: str, *, weights: str | None, include_top: bool) -> Any:
    make: Callable[..., Any] = getattr(keras.applications, APPLICATIONS[backbone])
    return make(weights=weights, include_top=include_top, input_shape=(_SIZE, _SIZE, 3))


def _file_name(backbone: str) -> str:
    if backbone in _RESNETS:
        return f"{backbone}_weights_tf_dim_ordering_tf_kernels_notop.h5"
    return f"weights_{backbone}_224_1.0_float_no_top_v2.h5"


def _arrays(model: Any) -> State:
    return {f"{layer.name}/{weight.name}": weight.numpy() for layer in model.layers for weight in layer.weights}


_RESNET_CONVOLUTIONS = {"shortcut": 0, "conv1": 1, "conv2": 2, "conv3": 3}


def _resnet_name(path: str, backbone: str) -> str | None:
    """Such as `conv2_block1_0_bn/gamma` for `res2/block1/shortcut/norm/gamma`."""
    match = re.fullmatch(r"(?:stem/(conv1)|res(\d)/block(\d+)/(\w+))/(?:(conv|norm)/)?(\w+)", path)
    if match is None:
        return None
    first, stage, block, layer, kind, variable = match.groups()
    prefix = first or f"conv{stage}_block{block}_{_RESNET_CONVOLUTIONS[layer]}"
    # A deformable convolution is one layer, so its kernel is not in a layer `conv`.
    return f"{prefix}_{'bn' if kind == 'norm' else 'conv'}/{variable}"


def _fold_biases(state: State) -> State:
    """Subtracts the bias of each convolution from the mean of the normalization after it, which has the same effect."""
    folded = {}
    for name, value in state.items():
        if name.endswith("_bn/moving_mean"):
            folded[name] = value - state[name.replace("_bn/moving_mean", "_conv/bias")]
        elif not name.endswith("_conv/bias"):
            folded[name] = value
    return folded


def _resnet_to_keras(path: str, array: np.ndarray) -> np.ndarray:
    # The network was trained with images in BGR.
    return array[:, :, ::-1] if path == "stem/conv1/conv/kernel" else array


_MOBILENET_PARTS = {
    "expand": "expand",
    "depthwise": "depthwise",
    "project": "project",
    "squeeze_excite/reduce": "squeeze_excite_conv",
    "squeeze_excite/expand": "squeeze_excite_conv_1",
}


def _mobilenet_name(path: str, backbone: str) -> str | None:
    """Such as `expanded_conv_3_expand_bn/gamma` for `res3/block1/expand/norm/gamma`."""
    match = re.fullmatch(r"(?:(stem/conv1|res5/conv)|(\w+/block\d+)/([\w/]+))/(conv|norm)/(\w+)", path)
    if match is None or backbone not in _MOBILENETS:
        return None
    convolution, block, part, kind, variable = match.groups()
    if convolution:
        layer = "conv" if convolution == "stem/conv1" else "conv_1"
    else:
        # Keras numbers the blocks of all stages from 0, and leaves out the 0.
        index = [path for path, _ in list_blocks(_MOBILENETS[backbone][1])].index(block)
        layer = f"expanded_conv_{f'{index}_' if index else ''}{_MOBILENET_PARTS[part]}"
    return f"{layer}{'' if kind == 'conv' else '_bn'}/{variable}"


KERAS_SOURCES: dict[str, BackboneSource] = {
    "Keras' ResNet": BackboneSource(
        backbones=tuple(_RESNETS),
        recognizes=lambda state: "conv1_conv/kernel" in state,
        name_of=_resnet_name,
        to_keras=_resnet_to_keras,
        ignored=("predictions/*",),
        settings=lambda backbone: KERAS_RESNET,
        prepare=_fold_biases,
    ),
    "Keras' MobileNetV3": BackboneSource(
        backbones=tuple(_MOBILENETS),
        recognizes=lambda state: "expanded_conv_project/kernel" in state,
        name_of=_mobilenet_name,
        to_keras=lambda path, array: array,
        ignored=("conv_2/*", "logits/*"),
        settings=lambda backbone: KERAS_MOBILENET_V3,
    ),
}
