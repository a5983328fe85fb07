"""The content of a checkpoint: variables that are saved, restored, or loaded as far as they fit."""

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from deeplab2_like.errors import UserError
from deeplab2_like.files import literal_folder
from deeplab2_like.model import PanopticSystem

# Number of names that an error or a note lists.
_MAX_NAMES = 5
# Prefix of the weights in a checkpoint, as TensorFlow spells it.
_WEIGHTS = "system/weights/"
_AVERAGE = "average/"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# Errors that TensorFlow raises, depending on the place of the damage.
_DAMAGES = (tf.errors.OpError, IndexError, RuntimeError, ValueError)


def make_checkpoint(
    system: PanopticSystem,
    optimizer: keras.optimizers.Optimizer | None = None,
    *,
    average: Mapping[str, tf.Variable] | None = None,
    step: tf.Variable | None = None,
) -> tf.train.Checkpoint:
    """Makes a checkpoint of everything that training changes, or of the system alone.

    Args:
        system: The system, with its variables.
        optimizer: Its optimizer, with its variables.
        average: Moving averages of the system's weights, by path.
        step: Number of training steps done.
    """
    parts: dict[str, Any] = {"system": _system_variables(system)}
    if optimizer is not None:
        parts["optimizer"] = _optimizer_variables(optimizer)
    if average is not None:
        parts["average"] = dict(average)
    if step is not None:
        parts["step"] = step
    return tf.train.Checkpoint(**parts)


def _system_variables(system: PanopticSystem) -> dict[str, Any]:
    """Returns the variables of a system: its weights by path, and the states of its random generators in order.

    `tf.train.Checkpoint` of the system itself would silently miss layers that other layers keep in lists or
    dictionaries.
    """
    weights = {weight.path: weight.value for weight in system.weights}
    # Their paths count all generators of the process, so they cannot serve as keys.
    generators = [variable.value for variable in system.variables if variable.path not in weights]
    return {"weights": weights, "generators": generators}


def _optimizer_variables(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """Returns the variables of an optimizer by path, as positions could change."""
    variables = {variable.path: variable.value for variable in optimizer.variables}
    if len(variables) != len(optimizer.variables):
        raise ValueError("Two variables of the optimizer have the same path.")
    return variables


def restore(checkpoint: tf.train.Checkpoint, path: str) -> None:
    """Restores everything that `checkpoint` tracks.

    Raises:
        UserError: If the file is damaged, or does not hold all variables with the shapes that the config asks for.
    """
    stored = _read_shapes(path)
    wanted = _tracked_variables(checkpoint)
    wrong = {name: variable for name, variable in wanted.items() if stored.get(name) != tuple(variable.shape)}
    if wrong:
        listed = [
            f"{'average of ' if name.startswith(_AVERAGE) else ''}{_short(name)} ({_shape_text(stored.get(name))} in "
            f"the checkpoint, {_shape_text(tuple(variable.shape))} here)"
            for name, variable in wrong.items()
        ]
        # Missing variables depend on how the model was trained; another shape means another network.
        missing = [name for name in wrong if name not in stored]
        keys = [
            f", {key} for the {kind}"
            for prefix, key, kind in (
                (_AVERAGE, "trainer.ema_decay", "averages"),
                ("optimizer/", "trainer.optimizer and trainer.precision", "optimizer's variables"),
            )
            if any(name.startswith(prefix) for name in missing)
        ]
        raise UserError(
            f"Checkpoint '{path}' does not fit the config in {len(wrong)} of {len(wanted)} variables: {_list(listed)}; "
            f"use the config it was trained with{''.join(keys)}."
        )
    try:
        with _literal_path(path) as readable:
            checkpoint.read(readable).expect_partial().assert_existing_objects_matched()
    except _DAMAGES as error:
        raise _damaged(path) from error


def restore_system(system: PanopticSystem, path: str, *, averaged: bool | None = None) -> None:
    """Restores the variables of a system for evaluation and export.

    Args:
        system: The system.
        path: A checkpoint's path without ending.
        averaged: Whether to use the moving averages of the weights; None: if the training kept them.

    Raises:
        UserError: If the training kept no averages although they are asked for; and see `restore`.
    """
    has_averages = any(name.startswith(_AVERAGE) for name in _read_shapes(path))
    if averaged and not has_averages:
        raise UserError(
            f"Checkpoint '{path}' has no averages of the weights, because trainer.ema_decay was null in the training; "
            "leave out --ema."
        )
    if has_averages if averaged is None else averaged:
        weights = {weight.path: weight.value for weight in system.weights}
        restore(tf.train.Checkpoint(average=weights), path)
    else:
        restore(make_checkpoint(system), path)


def load_fitting_weights(system: PanopticSystem, path: str) -> None:
    """Initializes a system with the weights of another training, and prints the weights that do not fit.

    Weights are matched by path and shape, so that with other classes only the last layers stay initial.

    Args:
        system: The system.
        path: A checkpoint's path without ending.

    Raises:
        UserError: If nothing in the checkpoint fits.
    """
    stored = _read_shapes(path)
    prefix = _AVERAGE if any(name.startswith(_AVERAGE) for name in stored) else _WEIGHTS
    shapes = {_short(name): shape for name, shape in stored.items() if name.startswith(prefix)}
    weights = {weight.path: weight for weight in system.weights}
    fitting = {name: weight.value for name, weight in weights.items() if shapes.get(name) == tuple(weight.shape)}
    if not fitting:
        raise UserError(
            f"Nothing in checkpoint '{path}' fits the config: none of its {len(shapes)} weights has name and shape of "
            "one here; start from a training of the same system."
        )
    part = {"average": fitting} if prefix == _AVERAGE else {"system": {"weights": fitting}}
    restore(tf.train.Checkpoint(**part), path)
    print(f"Started from '{path}': {len(fitting)} of {len(weights)} weights fit.")
    left_out = [
        f"{name} ({_shape_text(shape)}{f', here {_shape_text(tuple(weights[name].shape))}' if name in weights else ''})"
        for name, shape in sorted(shapes.items())
        if name not in fitting
    ]
    missing = [name for name in weights if name not in shapes]
    for title, names in (("Left out", left_out), ("Not found there, so fresh", missing)):
        if names:
            print(f"{title}: {len(names)}")
            print("".join(f"  {name}\n" for name in names), end="")


def is_whole(path: str) -> bool:
    """Returns whether the files of a checkpoint exist and match their checksums."""
    try:
        with _literal_path(path) as readable:
            reader = tf.train.load_checkpoint(readable)
            for name in reader.get_variable_to_shape_map():
                reader.get_tensor(name)
    except _DAMAGES:
        return False
    return True


def _read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each variable in a checkpoint, by its key there without `_VALUE`."""
    try:
        with _literal_path(path) as readable:
            shapes = tf.train.load_checkpoint(readable).get_variable_to_shape_map()
    except _DAMAGES as error:
        raise _damaged(path) from error
    return {name.removesuffix(_VALUE): tuple(shape) for name, shape in shapes.items() if name.endswith(_VALUE)}


@contextlib.contextmanager
def _literal_path(path: str) -> Iterator[str]:
    """Yields a path of a checkpoint, without ending, without glob characters, see `literal_folder`."""
    with literal_folder(os.path.dirname(path)) as folder:
        yield str(folder / os.path.basename(path))


def _tracked_variables(checkpoint: tf.train.Checkpoint) -> dict[str, tf.Variable]:
    """Returns the variables that a checkpoint tracks, by their keys in its files without `_VALUE`."""

    def walk(key: str, part: Any) -> dict[str, tf.Variable]:
        if isinstance(part, Mapping):
            items = [(name.replace(".", "..").replace("/", ".S"), inner) for name, inner in part.items()]
        elif isinstance(part, list | tuple):
            items = [(str(position), inner) for position, inner in enumerate(part)]
        else:
            return {key: part}
        return {name: value for inner, part in items for name, value in walk(f"{key}/{inner}", part).items()}

    # `save_counter` counts the saves of one object.
    names = [name for name in ("system", "optimizer", "average", "step") if hasattr(checkpoint, name)]
    return {key: value for name in names for key, value in walk(name, getattr(checkpoint, name)).items()}


def _short(key: str) -> str:
    """Returns the path of the variable in Keras, whose "/" is ".S" in a checkpoint."""
    for prefix in (_WEIGHTS, _AVERAGE):
        key = key.removeprefix(prefix)
    return key.replace(".S", "/").replace("..", ".")


def _shape_text(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "missing"
    return "x".join(str(size) for size in shape) or "a number"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_MAX_NAMES]) + (", ..." if len(names) > _MAX_NAMES else "")


def _damaged(path: str) -> UserError:
    return UserError(
        f"Checkpoint '{path}' is damaged or incomplete; use another one (`last` is the newest that is whole), or "
        "restore its files from a copy."
    )
