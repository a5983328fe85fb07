"""Sets the variables of a system to the arrays of a released checkpoint: all of them, or none."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem

# Entries of a checkpoint that are not weights: counters, constants, and anchors that older versions stored.
_IGNORED = ("*.num_batches_tracked", "pixel_mean", "pixel_std", "*.anchor_generator.cell_anchors.*")


# PyTorch's names of the variables of a convolution or dense layer and of the normalization after it.
_VARIABLES = {
    "kernel": "weight",
    "bias": "bias",
    "norm/gamma": "norm.weight",
    "norm/beta": "norm.bias",
    "norm/moving_mean": "norm.running_mean",
    "norm/moving_variance": "norm.running_var",
}


def split_path(path: str) -> tuple[str, str] | None:
    """Splits the path of a variable.

    Args:
        path: Such as `panoptic_fpn/fpn/lateral2/conv/kernel`.

    Returns:
        The path of its layer inside the system and PyTorch's name of the variable, such as `fpn/lateral2/conv` and
        `weight`; None if PyTorch has no such variable.
    """
    match = re.fullmatch(r"[^/]+/(.+?)/((?:norm/)?\w+)", path)
    if match is None or match[2] not in _VARIABLES:
        return None
    return match[1], _VARIABLES[match[2]]


def residual_layer_name(layer: str, prefix: str) -> str | None:
    """Returns Detectron2's name of a layer.

    Args:
        layer: Path of the layer inside the system.
        prefix: Detectron2's name of the backbone, such as `backbone`.

    Returns:
        The name, such as `backbone.res2.0.conv1`; None if the layer is not part of a residual block.
    """
    block = re.fullmatch(r"backbone/(res\d)/block(\d+)/(\w+)", layer)
    return None if block is None else f"{prefix}.{block[1]}.{int(block[2]) - 1}.{block[3]}"


def semantic_layer_name(layer: str, branch: str, prefix: str) -> str | None:
    """Returns Detectron2's name of a layer.

    Args:
        layer: Path of the layer inside the system.
        branch: Path of Semantic FPN inside the system.
        prefix: Detectron2's name of Semantic FPN, such as `sem_seg_head`.

    Returns:
        The name, such as `sem_seg_head.p3.0`; None if the layer is not a convolution of Semantic FPN.
    """
    stage = re.fullmatch(rf"{branch}/(p\d)_conv(\d)", layer)
    # Detectron2 also counts the upsampling after each convolution.
    return None if stage is None else f"{prefix}.{stage[1]}.{2 * (int(stage[2]) - 1)}"


def listed_name(layer: str, names: Sequence[tuple[str, str]]) -> str | None:
    """Returns the name of a layer.

    Args:
        layer: Path of the layer inside the system.
        names: Regular expressions for paths, each with the template of the name.

    Returns:
        The name from the first expression that matches; None if none matches.
    """
    for pattern, name in names:
        found = re.fullmatch(pattern, layer)
        if found is not None:
            return found.expand(name)
    return None


def assign_by_name(
    system: PanopticSystem,
    state: Mapping[str, np.ndarray],
    *,
    name_of: Callable[[str], str | None],
    to_keras: Callable[[str, np.ndarray], np.ndarray],
    keep_initial: Sequence[str] = (),
    what: str,
    config_function: str,
) -> None:
    """Sets the variables of a system by name. Nothing changes unless all weights fit.

    Args:
        system: The system, with its variables created.
        state: Arrays by their names in the checkpoint.
        name_of: Maps the path of a variable to its name in the checkpoint, or to None if the checkpoint has no such
            variable.
        to_keras: Maps the path of a variable and the array in the checkpoint to the value of the variable.
        keep_initial: Patterns with `*` for names that are not loaded.
        what: Name of the system, for messages.
        config_function: Name of the function that returns the config for these weights, for messages.

    Raises:
        UserError: If names are missing or left over, a shape differs, or a pattern matches nothing.
    """
    for pattern in keep_initial:
        if not fnmatch.filter(state, pattern):
            raise UserError(
                f"keep_initial pattern '{pattern}' matches no name in the checkpoint; its names look like "
                f"{', '.join(list(state)[:2])}."
            )

    def kept(name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in keep_initial)

    unused = {name for name in state if not kept(name) and not any(fnmatch.fnmatchcase(name, p) for p in _IGNORED)}
    assignments: list[tuple[Any, np.ndarray]] = []
    missing, misshapen = [], []
    for variable in system.weights:
        name = name_of(variable.path)
        if name is not None and kept(name):
            continue
        if name is None or name not in state:
            missing.append(name or variable.path)
            continue
        unused.discard(name)
        try:
            array = to_keras(variable.path, state[name])
        except ValueError:  # The array has too few or too many axes.
            array = state[name]
        if array.shape != tuple(variable.shape):
            misshapen.append(
                f"{name} is {state[name].shape}, which gives {array.shape} instead of {tuple(variable.shape)}"
            )
        else:
            assignments.append((variable, array))
    problems = [
        f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
        for problem, names in (("missing", missing), ("left over", sorted(unused)), ("of another shape", misshapen))
        if names
    ]
    if problems:
        raise UserError(
            f"The checkpoint does not fit this {what}: {'; '.join(problems)}; use the config of "
            f"`{config_function}`, or list the names that should not be loaded in `keep_initial`."
        )
    for variable, array in assignments:
        variable.assign(array)


def check_epsilon(system: PanopticSystem, epsilon: float, source: str) -> None:
    """Raises `UserError` if the epsilon of the batch normalization differs from that of the weights.

    Args:
        system: The system, with its variables created.
        epsilon: The epsilon that the weights were trained with.
        source: Origin of the weights, for the message.
    """
    for layer in system._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and not np.isclose(layer.epsilon, epsilon, rtol=1e-3):
            raise UserError(
                f"Config key 'model.norm.epsilon' is {layer.epsilon}, but the weights of {source} were trained "
                f"with {epsilon}; set it to that value."
            )
