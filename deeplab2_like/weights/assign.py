"""Sets the variables of a system to arrays of a released checkpoint: all of them, or none."""

import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem

# What stands in a checkpoint besides weights: counters, constants, and what older versions stored.
_IGNORED = ("*.num_batches_tracked", "pixel_mean", "pixel_std", "*.anchor_generator.cell_anchors.*")


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
    """Sets the variables of a system; nothing is changed unless everything fits.

    Args:
        system: The system, its variables created.
        state: Arrays by the checkpoint's names.
        name_of: From the path of a variable to its name in the checkpoint, or None if there is nothing like it.
        to_keras: From the path of a variable and the checkpoint's array to the value of the variable.
        keep_initial: Patterns with `*` of names that are not loaded.
        what: What the system is called in messages.
        config_function: What gives the config that fits, in messages.

    Raises:
        UserError: If names are missing or left over, a shape differs, or a pattern matches nothing.
    """
    for pattern in keep_initial:
        if not fnmatch.filter(state, pattern):
            raise UserError(
                f"keep_initial pattern '{pattern}' matches no name of the checkpoint; its names look like "
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
        except ValueError:  # A shape that cannot be brought into another order.
            array = state[name]
        if array.shape != tuple(variable.shape):
            misshapen.append(
                f"{name} is {state[name].shape}, which gives {array.shape} and not {tuple(variable.shape)}"
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
            f"`{config_function}`, or name in `keep_initial` what shall not be loaded."
        )
    for variable, array in assignments:
        variable.assign(array)


def check_epsilon(system: PanopticSystem, epsilon: float, source: str) -> None:
    """Raises `UserError` if the batch normalisation of the system adds something else to the variance than `epsilon`.

    Args:
        system: The system, its variables created.
        epsilon: What the weights were trained with.
        source: Whose weights these are, in the message.
    """
    for layer in system._flatten_layers():
        if isinstance(layer, keras.layers.BatchNormalization) and not np.isclose(layer.epsilon, epsilon, rtol=1e-3):
            raise UserError(
                f"Config key 'model.norm.epsilon' is {layer.epsilon}, but {source}'s weights were trained with "
                f"{epsilon}; set it to that."
            )
