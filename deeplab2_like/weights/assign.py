"""Sets the variables of a system to the arrays of a released checkpoint: all of them, or none."""

import fnmatch
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

import keras
import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem

# Entries of a checkpoint that are not weights: counters, constants, and anchors that older versions stored.
_IGNORED = ("*.num_batches_tracked", "pixel_mean", "pixel_std", "*.anchor_generator.cell_anchors.*")


class Assignment(NamedTuple):
    """The result of loading a checkpoint, by the names in the checkpoint.

    Attributes:
        loaded: Names whose arrays were set.
        kept_initial: Names of the variables that keep their initial values, because a pattern says so.
        ignored: All other names of the checkpoint.
    """

    loaded: Sequence[str]
    kept_initial: Sequence[str]
    ignored: Sequence[str]


class MismatchError(UserError):
    """The checkpoint does not fit the system.

    Attributes:
        problems: The names that do not fit, as text.
        shape_mismatches: Names whose arrays have another shape.
        only_shapes: Whether other shapes are the only problem.
    """

    def __init__(
        self, what: str, problems: str, advice: str, *, shape_mismatches: Sequence[str], only_shapes: bool
    ) -> None:
        super().__init__(f"The checkpoint does not fit this {what}: {problems}; {advice}.")
        self.problems = problems
        self.shape_mismatches = shape_mismatches
        self.only_shapes = only_shapes


# PyTorch's names of the variables of a convolution or dense layer and of the normalization after it.
_VARIABLES = {
    "kernel": "weight",
    "bias": "bias",
    "norm/gamma": "norm.weight",
    "norm/beta": "norm.bias",
    "norm/moving_mean": "norm.running_mean",
    "norm/moving_variance": "norm.running_var",
}


# Blocks in the stage res4 of the ResNets that can be imported.
_RES4_BLOCKS = {6: "resnet50", 23: "resnet101"}


def has_prefixes(names: Collection[str], *prefixes: str) -> bool:
    """Returns whether some of the names start with each of the prefixes."""
    return all(any(name.startswith(prefix) for name in names) for prefix in prefixes)


def backbone_overrides(names: Collection[str], prefix: str) -> list[str]:
    """Returns the config overrides for the ResNet in a checkpoint of Detectron2: its depth and its deformable stages.

    Args:
        names: The names in the checkpoint.
        prefix: Detectron2's name of the backbone, such as `backbone`.

    Raises:
        UserError: If it is neither ResNet-50 nor ResNet-101.
    """
    blocks = {name.split(".")[-3] for name in names if re.fullmatch(rf"{prefix}\.res4\.\d+\.conv1\.weight", name)}
    if len(blocks) not in _RES4_BLOCKS:
        raise UserError(
            f"The checkpoint has {len(blocks)} blocks named '{prefix}.res4.*', but ResNet-50 has 6 and ResNet-101 has "
            "23; give a checkpoint with one of these backbones."
        )
    overrides = [f"model.backbone.name={_RES4_BLOCKS[len(blocks)]}"]
    deformable = [stage for stage in ("res3", "res4", "res5") if f"{prefix}.{stage}.0.conv2_offset.weight" in names]
    return [*overrides, f"model.backbone.deformable_stages=[{','.join(deformable)}]"] if deformable else overrides


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


def resnet_layer_name(layer: str) -> str | None:
    """Returns Detectron2's name of a layer of a ResNet.

    Args:
        layer: Path of the layer inside the backbone, such as `res2/block1/conv1`.

    Returns:
        The name inside the backbone, such as `res2.0.conv1`; None if Detectron2 has no such layer.
    """
    if re.fullmatch(r"stem/conv\d", layer):
        return layer.replace("/", ".")
    # A deformable convolution has a second one, for its offsets.
    block = re.fullmatch(r"(res\d)/block(\d+)/(conv\d|shortcut)(?:/(offset))?", layer)
    if block is None:
        return None
    name = f"{block[1]}.{int(block[2]) - 1}.{block[3]}"
    return f"{name}_offset" if block[4] else name


def backbone_layer_name(layer: str, prefix: str) -> str | None:
    """Returns Detectron2's name of a layer of the backbone of a system, which is a ResNet.

    Args:
        layer: Path of the layer inside the system, such as `backbone/res2/block1/conv1`.
        prefix: Detectron2's name of the backbone, such as `backbone.bottom_up`.

    Returns:
        The name, such as `backbone.bottom_up.res2.0.conv1`; None if the layer is not part of the backbone.
    """
    part, _, inside = layer.partition("/")
    name = resnet_layer_name(inside) if part == "backbone" else None
    return name and f"{prefix}.{name}"


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


def transpose_kernel(path: str, array: np.ndarray) -> np.ndarray:
    """Converts a kernel of a convolution from PyTorch's layout to that of Keras.

    Args:
        path: Path of the variable, which tells a depthwise convolution.
        array: (out, in, height, width), or (channels, 1, height, width) of a depthwise convolution; arrays that are no
            kernels are returned as they are.

    Returns:
        (height, width, in, out), or (height, width, channels, 1).
    """
    if array.ndim != 4:
        return array
    return array.transpose((2, 3, 0, 1) if "/depthwise/" in path else (2, 3, 1, 0))


def match_layer_name(layer: str, names: Sequence[tuple[str, str]]) -> str | None:
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


class Match(NamedTuple):
    """The arrays of a checkpoint that belong to variables, and what does not fit.

    Attributes:
        assignments: The variable and its new value, by the name in the checkpoint.
        kept_initial: Names of the variables that keep their initial values, because a pattern says so.
        missing: Names that the checkpoint lacks; paths of variables that have no name there.
        unexpected: Names of the checkpoint that belong to no variable.
        shape_mismatches: The two shapes as text, by the name in the checkpoint.
    """

    assignments: dict[str, tuple[Any, np.ndarray]]
    kept_initial: list[str]
    missing: list[str]
    unexpected: list[str]
    shape_mismatches: dict[str, str]

    def describe_problems(self) -> str:
        """Describes what does not fit; an empty string if everything does."""
        shapes = [f"{name} is {shape}" for name, shape in self.shape_mismatches.items()]
        parts = (("missing", self.missing), ("unexpected", self.unexpected), ("of another shape", shapes))
        return "; ".join(
            f"{len(names)} {problem} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})"
            for problem, names in parts
            if names
        )

    def assign(self) -> None:
        """Sets the variables."""
        for variable, array in self.assignments.values():
            variable.assign(array)


def match_by_name(
    variables: Sequence[Any],
    state: Mapping[str, np.ndarray],
    *,
    name_of: Callable[[str], str | None],
    to_keras: Callable[[str, np.ndarray], np.ndarray],
    ignored: Sequence[str],
    keep_initial: Sequence[str] = (),
) -> Match:
    """Matches the arrays of a checkpoint with variables, without changing them.

    Args:
        variables: The variables.
        state: Arrays by their names in the checkpoint.
        name_of: Maps the path of a variable to its name in the checkpoint, or to None if the checkpoint has no such
            variable.
        to_keras: Maps the path of a variable and the array in the checkpoint to the value of the variable.
        ignored: Patterns with `*` for names that belong to no variable.
        keep_initial: Patterns with `*` for names that are not loaded.
    """

    def matches(name: str, patterns: Sequence[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)

    unused = {name for name in state if not matches(name, (*keep_initial, *ignored))}
    match = Match({}, [], [], [], {})
    for variable in variables:
        name = name_of(variable.path)
        if name is not None and matches(name, keep_initial):
            match.kept_initial.append(name)
            continue
        if name is None or name not in state:
            match.missing.append(name or variable.path)
            continue
        unused.discard(name)
        try:
            array = to_keras(variable.path, state[name])
        except (IndexError, ValueError):  # The array has too few or too many axes.
            array = state[name]
        if array.shape == tuple(variable.shape):
            match.assignments[name] = variable, array
        else:
            transposed = f", which gives {array.shape}" if array.shape != state[name].shape else ""
            match.shape_mismatches[name] = f"{state[name].shape}{transposed} instead of {tuple(variable.shape)}"
    match.unexpected.extend(sorted(unused))
    return match


def assign_by_name(
    system: PanopticSystem,
    state: Mapping[str, np.ndarray],
    *,
    name_of: Callable[[str], str | None],
    to_keras: Callable[[str, np.ndarray], np.ndarray],
    keep_initial: Sequence[str] = (),
    what: str,
    config: str,
) -> Assignment:
    """Sets the variables of a system by name. Nothing changes unless all weights fit.

    Args:
        system: The system, with its variables created.
        state: Arrays by their names in the checkpoint.
        name_of: See `match_by_name`.
        to_keras: See `match_by_name`.
        keep_initial: Patterns with `*` for names that are not loaded.
        what: Name of the system, for messages.
        config: Name of a config for these weights, for messages.

    Returns:
        What was loaded.

    Raises:
        MismatchError: If names are missing or unexpected, or a shape differs.
        UserError: If a pattern matches nothing.
    """
    names = [name for name in map(name_of, (variable.path for variable in system.weights)) if name is not None]
    for pattern in keep_initial:
        if not fnmatch.filter([*state, *names], pattern):
            raise UserError(
                f"Pattern '{pattern}' of names to keep initial matches no name in the checkpoint; give a pattern for "
                f"names such as {', '.join(list(state)[:2])}."
            )
    match = match_by_name(
        system.weights, state, name_of=name_of, to_keras=to_keras, ignored=_IGNORED, keep_initial=keep_initial
    )
    if problems := match.describe_problems():
        raise MismatchError(
            what,
            problems,
            f"use config '{config}', or list the names that should not be loaded in `keep_initial`",
            shape_mismatches=list(match.shape_mismatches),
            only_shapes=not match.missing and not match.unexpected,
        )
    match.assign()
    used = {*match.assignments, *match.kept_initial}
    return Assignment(list(match.assignments), match.kept_initial, [name for name in state if name not in used])


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
