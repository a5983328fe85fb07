"""Pretrained weights of a backbone alone: `model.backbone.weights`, and files for `train --init-from`.

`BACKBONE_SOURCES` is the registry of the kinds of files, `IMAGENET_READERS` that of the ImageNet weights.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from deeplab2_like.errors import UserError
from deeplab2_like.files import require_local
from deeplab2_like.model import PanopticSystem
from deeplab2_like.model.pretrained import (
    EFFICIENTNET_LITE,
    IMAGENET,
    IMAGENET_SETTINGS,
    describe_settings,
    wrong_settings,
)
from deeplab2_like.weights import deeplab2_panoptic_deeplab, efficientnet_lite, keras_applications
from deeplab2_like.weights.assign import match_by_name, transpose_kernel
from deeplab2_like.weights.backbone_names import PYTORCH_SOURCES, BackboneSource, State
from deeplab2_like.weights.files import read_checkpoint

# By the name of the source, for messages. The first one that recognizes the arrays is used.
BACKBONE_SOURCES: dict[str, BackboneSource] = {
    "EfficientNet-Lite": BackboneSource(
        backbones=tuple(efficientnet_lite.SCALES),
        recognizes=efficientnet_lite.is_efficientnet_lite,
        name_of=efficientnet_lite.efficientnet_lite_name,
        to_keras=transpose_kernel,
        ignored=efficientnet_lite.IGNORED,
        settings=lambda backbone: EFFICIENTNET_LITE,
    ),
    **PYTORCH_SOURCES,
    **keras_applications.KERAS_SOURCES,
    **deeplab2_panoptic_deeplab.DEEPLAB2_SOURCES,
}

# Detectron2 puts one of these before the names of a backbone.
_PREFIXES = ("backbone.bottom_up.", "backbone.")

# Reads the ImageNet weights of a backbone, by its name; the same names as in `IMAGENET_SETTINGS`.
IMAGENET_READERS: dict[str, Callable[[str], State]] = {
    **dict.fromkeys(efficientnet_lite.SCALES, efficientnet_lite.read_package),
    **dict.fromkeys(keras_applications.APPLICATIONS, keras_applications.read_imagenet),
}


def load_backbone_weights(system: PanopticSystem, weights: str) -> None:
    """Sets the variables of a system's backbone. Nothing changes unless all of them are found.

    Args:
        system: The system, its variables created.
        weights: `imagenet`, or the path of a file or of a TensorFlow checkpoint. The classifier in the file is ignored.

    Raises:
        UserError: If there are no such weights, the file is of no known kind, names are missing or unexpected, a shape
            differs, or the config has other settings than belong to the weights.
    """
    backbone: Any = system.backbone
    name = system.config.backbone.name
    if weights == IMAGENET:
        if name not in IMAGENET_READERS:
            raise UserError(
                f"There are no ImageNet weights for backbone '{name}'; set model.backbone.name to one of "
                f"{', '.join(IMAGENET_SETTINGS)}, or model.backbone.weights to a file or null."
            )
        state = IMAGENET_READERS[name](name)
        what = f"The ImageNet weights of {name}"
    else:
        require_local(weights)
        if not Path(weights).exists() and not deeplab2_panoptic_deeplab.is_tensorflow_checkpoint(Path(weights)):
            raise UserError(
                f"Weights '{weights}' of config key 'model.backbone.weights' do not exist; give `imagenet`, the path "
                "of a file, or null."
            )
        if weights.endswith(keras_applications.SUFFIXES):
            state = keras_applications.read_file(weights, name)
        elif deeplab2_panoptic_deeplab.is_tensorflow_checkpoint(Path(weights)):
            state = deeplab2_panoptic_deeplab.read_deeplab2_checkpoint(weights)
        else:
            state = read_checkpoint(weights)
        what = f"Weights '{weights}'"
    found = recognize_backbone(state)
    if found is None:
        raise UserError(
            f"{what} have names, such as {', '.join(list(state)[:2])}, that are not those of a known backbone; give a "
            f"file of {', '.join(BACKBONE_SOURCES)}."
        )
    kind, state = found
    source = BACKBONE_SOURCES[kind]
    if name not in source.backbones:
        raise UserError(
            f"{what} are those of {kind} and do not fit backbone '{name}'; set model.backbone.name to one of "
            f"{', '.join(source.backbones)}, or give other weights."
        )
    state = source.prepare(state)
    if wrong := wrong_settings(system.config, source.settings(name)):
        raise UserError(f"{what} were trained with other settings than the config has; set {describe_settings(wrong)}.")
    match = match_by_name(
        # Offsets of deformable convolutions start at zero; no classifier has them.
        [variable for variable in backbone.weights if "/offset/" not in variable.path],
        state,
        name_of=lambda path: source.name_of(_inside_backbone(path), name),
        to_keras=lambda path, array: source.to_keras(_inside_backbone(path), array),
        ignored=source.ignored,
    )
    if problems := match.describe_problems():
        raise UserError(
            f"{what} do not fit backbone '{name}': {problems}; set model.backbone.name to the backbone of the weights."
        )
    match.assign()
    print(f"Backbone: loaded {what[0].lower()}{what[1:]}, {len(backbone.weights)} arrays.")


def recognize_backbone(state: State) -> tuple[str, State] | None:
    """Recognizes the weights of a backbone alone, with or without its classifier.

    Args:
        state: Arrays by their names in a file.

    Returns:
        The key in `BACKBONE_SOURCES`, and the arrays by their names without the prefix `backbone.` of Detectron2; None
        if the arrays are of no known kind.
    """
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): array for name, array in state.items()}
    for kind, source in BACKBONE_SOURCES.items():
        if source.recognizes(state):
            return kind, state
    return None


def _inside_backbone(path: str) -> str:
    """Returns the path of a variable inside the backbone, such as `res2/block1/conv1/conv/kernel`."""
    return path.partition("backbone/")[2]
