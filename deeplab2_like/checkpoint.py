"""Model folders: `config.yaml`, `dataset_info.json`, `checkpoints/`. A model folder needs nothing else to be used.

Once a training has been evaluated while it ran, `best/` holds the checkpoint of the highest PQ.
"""

import contextlib
import json
import os
import re
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import keras
import tensorflow as tf

from deeplab2_like.configs import Config, load_config, save_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.files import cannot_write, literal_folder, make_folder, require_local, write_atomically
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.temporary import TemporaryFolder, remove_leftovers

try:
    import fcntl
except ImportError:  # Windows.
    fcntl = None  # type: ignore[assignment]

CONFIG_FILE = "config.yaml"
CHECKPOINT_FOLDER = "checkpoints"
BEST_FOLDER = "best"
BEST_FILE = "best.json"
CHECKPOINT_NAME = "ckpt"

# How many names an error or a note lists.
_NAMES_SHOWN = 5
# Where the weights are in a checkpoint, as TensorFlow spells it.
_WEIGHTS = "system/weights/"
_AVERAGE = "average/"
_VALUE = "/.ATTRIBUTES/VARIABLE_VALUE"
# What TensorFlow raises, depending on where the damage is.
_DAMAGES = (tf.errors.OpError, IndexError, RuntimeError, ValueError)


def check_model_folder(model_dir: str | os.PathLike[str], config: Config, dataset_info: DatasetInfo) -> None:
    """Checks that a model folder is free for a training: new, without checkpoints, or of a run of the same model.

    Raises:
        UserError: If the folder holds checkpoints of another model or of other classes.
    """
    folder = Path(model_dir)
    has_checkpoint = bool(list_checkpoints(folder))
    if not has_checkpoint and (folder / BEST_FOLDER).exists():
        raise UserError(
            f"Model folder '{folder}' holds the best checkpoint of an earlier run, but none to resume from; use "
            f"another --model-dir, or move '{folder / BEST_FOLDER}' elsewhere."
        )
    if not has_checkpoint or not (folder / CONFIG_FILE).is_file():
        return
    before = load_config(folder / CONFIG_FILE)
    changed = [key for key in ("system", "model") if getattr(before, key) != getattr(config, key)]
    if changed:
        raise UserError(
            f"Model folder '{folder}' holds a run whose '{changed[0]}' section differs from this config; use "
            "another --model-dir, or the config of that run."
        )
    trained_on = DatasetInfo.load(folder)
    if trained_on != dataset_info:
        raise UserError(
            f"Model folder '{folder}' was trained on data set '{trained_on.name}', whose classes or "
            f"label divisor differ from those of '{dataset_info.name}'; use another --model-dir."
        )


def clean_model_folder(model_dir: str | os.PathLike[str]) -> None:
    """Removes what killed trainings have left of checkpoints, for the one training that has the folder locked."""
    for name in (CHECKPOINT_FOLDER, BEST_FOLDER):
        remove_leftovers(Path(model_dir) / name)
    for unfinished in (Path(model_dir) / CHECKPOINT_FOLDER).glob(f"{CHECKPOINT_NAME}-*_temp"):
        shutil.rmtree(unfinished, ignore_errors=True)


def prepare_model_folder(model_dir: str | os.PathLike[str], config: Config, dataset_info: DatasetInfo) -> None:
    """Writes the config and the data set's facts into a model folder, over those of an earlier run.

    Raises:
        UserError: If the folder cannot be written.
    """
    folder = Path(model_dir)
    if config.data.path is not None:
        # The folder is used from wherever, so it cannot keep a path that counts from here.
        data = config.data.model_copy(update={"path": os.path.abspath(config.data.path)})
        config = config.model_copy(update={"data": data})
    make_folder(folder)
    dataset_info.save(folder)
    save_config(config, folder / CONFIG_FILE)


def load_model_folder(
    model_dir: str | os.PathLike[str], overrides: Sequence[str] = (), *, checkpoint: str = "last"
) -> tuple[Config, PanopticSystem, int]:
    """Loads a checkpoint of a model folder.

    Args:
        model_dir: A folder that training wrote.
        overrides: Changes to its config, `key.path=value`, such as thresholds of the post-processing.
        checkpoint: Which one, see `find_checkpoint`.

    Returns:
        The config, the system with its trained variables, and the step of the checkpoint.

    Raises:
        UserError: If this is no model folder, has no such checkpoint, or the overrides change the network.
    """
    config, system = build_from_model_folder(model_dir, overrides)
    path = find_checkpoint(model_dir, checkpoint)
    restore_system(system, path)
    return config, system, checkpoint_step(path)


def restore_system(system: PanopticSystem, path: str) -> None:
    """Gives a system the variables of a checkpoint with which it is evaluated and exported.

    Those are the averaged weights, if the training kept them.

    Raises:
        UserError: See `restore`.
    """
    averaged = any(name.startswith(_AVERAGE) for name in _read_shapes(path))
    if averaged:
        weights = {weight.path: weight.value for weight in system.weights}
        restore(tf.train.Checkpoint(average=weights), path)
    else:
        restore(make_checkpoint(system), path)


def build_from_model_folder(
    model_dir: str | os.PathLike[str], overrides: Sequence[str] = ()
) -> tuple[Config, PanopticSystem]:
    """Builds the system of a model folder, without restoring its variables; arguments as of `load_model_folder`.

    Raises:
        UserError: If this is no model folder.
    """
    require_local(model_dir)
    folder = Path(model_dir)
    if not (folder / CONFIG_FILE).is_file():
        raise UserError(
            f"'{folder}' is no model folder, as it has no {CONFIG_FILE}; give the --model-dir of a training."
        )
    config = load_config(folder / CONFIG_FILE, overrides)
    return config, build_system(config, DatasetInfo.load(folder))


def list_checkpoints(model_dir: str | os.PathLike[str]) -> list[str]:
    """Lists the checkpoints of a model folder, the oldest first, as paths without ending.

    It looks at the files: TensorFlow's own list still names a checkpoint that somebody has deleted, say, as damaged.
    """
    indices = (Path(model_dir) / CHECKPOINT_FOLDER).glob(f"{CHECKPOINT_NAME}-*.index")
    paths = [str(index.with_suffix("")) for index in indices]
    return sorted((path for path in paths if path.rpartition("-")[2].isdecimal()), key=checkpoint_step)


def checkpoint_step(path: str) -> int:
    """The training step at which a checkpoint, as `list_checkpoints` names it, was saved."""
    return int(path.rpartition("-")[2])


def find_checkpoint(model_dir: str | os.PathLike[str], which: str = "last") -> str:
    """Finds a checkpoint of a model folder.

    Args:
        model_dir: A folder that training wrote.
        which: `last`, the newest that is whole, with a warning about damaged ones after it; `best`, that of the highest
            PQ among those evaluated during training; or the number of a training step.

    Returns:
        Its path without ending.

    Raises:
        UserError: If there is no such checkpoint.
    """
    paths = list_checkpoints(model_dir)
    if which == "last":
        if not paths:
            raise UserError(f"Model folder '{model_dir}' holds no checkpoint yet; train first.")
        return newest_whole_checkpoint(paths)
    best = read_best(model_dir)
    if which == "best":
        if best is None:
            raise UserError(
                f"Model folder '{model_dir}' has no best checkpoint, as none was evaluated during training; run "
                "`deeplab2-like evaluate --follow` on it, or choose `last` or a step."
            )
        return best[0]
    by_step = {str(checkpoint_step(path)): path for path in [*([best[0]] if best else []), *paths]}
    if which not in by_step:
        known = ", ".join(sorted(by_step, key=int)) or "none yet"
        raise UserError(
            f"Model folder '{model_dir}' has no checkpoint '{which}'; give `last`, `best` or one of the steps {known}."
        )
    return by_step[which]


def newest_whole_checkpoint(paths: Sequence[str]) -> str:
    """Returns the newest checkpoint whose files hold what their checksums say, and warns of those after it.

    Args:
        paths: What `list_checkpoints` returned, not empty.

    Raises:
        UserError: If none is whole.
    """
    for path in reversed(paths):
        if _is_whole(path):
            return path
        print(f"Warning: checkpoint '{path}' is damaged or incomplete; looking for one before it.", file=sys.stderr)
    raise UserError(
        f"No checkpoint in '{Path(paths[0]).parent}' is whole, the newest is '{Path(paths[-1]).name}'; restore them "
        "from a copy, or train anew with another --model-dir."
    )


def _is_whole(path: str) -> bool:
    try:
        with _literal_path(path) as readable:
            reader = tf.train.load_checkpoint(readable)
            for name in reader.get_variable_to_shape_map():
                reader.get_tensor(name)
    except _DAMAGES:
        return False
    return True


def read_best(model_dir: str | os.PathLike[str]) -> tuple[str, float] | None:
    """Returns the path of the best checkpoint and its PQ in percent, or None if none was kept yet."""
    file = Path(model_dir) / BEST_FOLDER / BEST_FILE
    if not file.is_file():
        return None
    advice = f"move '{file.parent}' elsewhere, and the next evaluation during a training keeps a new one"
    try:
        content = json.loads(file.read_bytes())
        default = f"{CHECKPOINT_NAME}-{int(content['step'])}"  # Older folders do not name it.
        path, quality = file.with_name(str(content.get("checkpoint", default))), float(content["pq"])
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"'{file}' is damaged ({error!r}); {advice}.") from error
    if not path.with_name(f"{path.name}.index").is_file():
        raise UserError(f"'{file}' names checkpoint '{path.name}', which is not there; {advice}.")
    return str(path), quality


def keep_best(model_dir: str | os.PathLike[str], system: PanopticSystem, *, step: int, pq: float) -> bool:
    """Saves a system as the best checkpoint of a model folder, if its quality is not lower than that of the one there.

    It is saved from memory, as training may have deleted the checkpoint while it was being evaluated; only what is
    evaluated and exported is kept, nothing to resume from.

    Args:
        model_dir: The model folder.
        system: The system with the variables that were evaluated.
        step: The training step that they are of.
        pq: Their panoptic quality on the validation split, in percent.

    Returns:
        Whether it is the best so far.

    Raises:
        UserError: If it cannot be written.
    """
    folder = Path(model_dir) / BEST_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _lock_folder(folder):
            best = read_best(model_dir)
            if best is not None and pq < best[1]:
                return False
            remove_leftovers(folder)
            # A training that was resumed may come to the step of the best one again, whose files must stay whole, too.
            names = (f"{CHECKPOINT_NAME}-{step}", f"{CHECKPOINT_NAME}_again-{step}")
            name = names[best is not None and Path(best[0]).name == names[0]]
            with TemporaryFolder(folder / name) as temporary:
                make_checkpoint(system).write(str(temporary.path / name))
                for file in sorted(temporary.path.iterdir()):
                    file.replace(folder / file.name)
            # The note comes last, as it names what is whole.
            content = {"step": step, "pq": pq, "checkpoint": name}
            write_atomically(folder / BEST_FILE, (json.dumps(content) + "\n").encode())
            for file in folder.iterdir():
                other = file.name.partition(".")[0]
                if other != name and re.fullmatch(rf"{CHECKPOINT_NAME}(_again)?-\d+", other):
                    file.unlink(missing_ok=True)
    except (OSError, tf.errors.OpError) as error:
        raise cannot_write(folder, error) from error
    return True


@contextlib.contextmanager
def _lock_folder(folder: Path) -> Iterator[None]:
    """Waits until no other process has the folder locked, as `evaluate --follow` may run beside a training.

    Where there are no locks it does not wait.
    """
    if fcntl is None:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # Some file systems have no locks, or none of folders.
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def make_checkpoint_manager(
    checkpoint: tf.train.Checkpoint,
    model_dir: str | os.PathLike[str],
    *,
    step: tf.Variable,
    every: int,
    keep: int,
) -> tf.train.CheckpointManager:
    """Makes what saves checkpoints into a model folder, and knows those that are there.

    Args:
        checkpoint: What to save.
        model_dir: The model folder; of all workers but the chief, a folder that is thrown away, as a strategy may need
            all workers to save.
        step: The step that training has reached, int scalar.
        every: Steps between checkpoints.
        keep: How many of the newest checkpoints stay.
    """
    folder = Path(model_dir) / CHECKPOINT_FOLDER
    names = [Path(path).name for path in list_checkpoints(model_dir)]
    if names:
        # TensorFlow's own list, see `list_checkpoints`, as a text protocol buffer.
        lines = [f'model_checkpoint_path: "{names[-1]}"']
        for number, name in enumerate(names, start=1):
            # The manager counts only checkpoints with a time among those to keep; their order is what matters.
            lines += [f'all_model_checkpoint_paths: "{name}"', f"all_model_checkpoint_timestamps: {number}"]
        write_atomically(folder / "checkpoint", ("\n".join(lines) + "\n").encode())
    else:
        (folder / "checkpoint").unlink(missing_ok=True)
    return _CheckpointManager(
        checkpoint,
        str(folder),
        max_to_keep=keep,
        checkpoint_name=CHECKPOINT_NAME,
        step_counter=step,
        checkpoint_interval=every,
    )


def _delete_checkpoint(path: str) -> None:
    """Deletes the files of a checkpoint; `path` is without ending.

    The index goes last: as long as it is there, `list_checkpoints` finds the rest, should the process be killed.
    """
    for file in Path(path).parent.glob(f"{Path(path).name}.*"):
        if file.suffix != ".index":
            file.unlink(missing_ok=True)
    Path(f"{path}.index").unlink(missing_ok=True)


class _CheckpointManager(tf.train.CheckpointManager):
    """Saves at multiples of its interval; TensorFlow's own counts from wherever the first loop happens to end."""

    _saved: int | None = None

    def save(self, checkpoint_number: Any = None, check_interval: bool = True, options: Any = None) -> str | None:
        """Saves, unless `check_interval` and it is not yet time, or it is done; returns the path if it did."""
        number = int(checkpoint_number)
        if number == self._saved or (check_interval and number % self.checkpoint_interval):
            return None
        self._saved = number
        return super().save(number, check_interval=False, options=options)

    def _sweep(self) -> None:
        """Deletes the oldest checkpoints. TensorFlow's own takes a path for a pattern, which other runs may match."""
        while len(self._maybe_delete) > self._max_to_keep:
            _delete_checkpoint(self._maybe_delete.popitem(last=False)[0])

    def restore_or_initialize(self) -> str | None:
        """Does nothing, though Orbit asks for it: `train` has restored, and knows which checkpoints are damaged."""
        return None


def make_checkpoint(
    system: PanopticSystem,
    optimizer: keras.optimizers.Optimizer | None = None,
    *,
    average: Mapping[str, tf.Variable] | None = None,
    step: tf.Variable | None = None,
) -> tf.train.Checkpoint:
    """Everything that training changes, or only the system's part.

    Args:
        system: The system, with its variables.
        optimizer: Its optimiser, with its variables.
        average: The averages of the system's weights by the weights' paths.
        step: The step that training has reached.
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
    """What a checkpoint keeps of a system: its weights by path, and the states of its random generators in order.

    Given the system itself, `tf.train.Checkpoint` would miss, without a word, all layers that other layers keep in
    lists or dictionaries.
    """
    weights = {weight.path: weight.value for weight in system.weights}
    # Their paths count all generators of the process, so they cannot serve as keys.
    generators = [variable.value for variable in system.variables if variable.path not in weights]
    return {"weights": weights, "generators": generators}


def _optimizer_variables(optimizer: keras.optimizers.Optimizer) -> dict[str, Any]:
    """An optimiser's variables by path; by position, they could be taken for those of another weight."""
    variables = {variable.path: variable.value for variable in optimizer.variables}
    if len(variables) != len(optimizer.variables):
        raise ValueError("Two variables of the optimiser have the same path.")
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
        # What a checkpoint lacks depends on how it was trained; another shape is another network.
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


def load_what_fits(system: PanopticSystem, source: str | os.PathLike[str]) -> None:
    """Starts from the weights of another training, and prints which of them were left out and which not found.

    Weights are matched by path and shape, so a change of classes leaves out no more than the last layers.

    Args:
        system: The system, at the start of its training.
        source: A model folder, of which the newest checkpoint is taken, or a checkpoint's path without ending.

    Raises:
        UserError: If there is no such checkpoint, or nothing in it fits.
    """
    require_local(source)
    path = str(source)
    if Path(source).is_dir():
        path = find_checkpoint(source)
    elif not Path(f"{path}.index").is_file():
        raise UserError(f"'{path}' to start from is neither a model folder nor a checkpoint (its path without ending).")
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
    for what, names in (("Left out", left_out), ("Not found there, so fresh", missing)):
        if names:
            print(f"{what}: {len(names)}")
            print("".join(f"  {name}\n" for name in names), end="")


def _read_shapes(path: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of what a checkpoint holds, by their keys in it without ending."""
    try:
        with _literal_path(path) as readable:
            shapes = tf.train.load_checkpoint(readable).get_variable_to_shape_map()
    except _DAMAGES as error:
        raise _damaged(path) from error
    return {name.removesuffix(_VALUE): tuple(shape) for name, shape in shapes.items() if name.endswith(_VALUE)}


@contextlib.contextmanager
def _literal_path(path: str) -> Iterator[str]:
    """A path of a checkpoint, without ending, that TensorFlow reads as it is, see `literal_folder`."""
    with literal_folder(os.path.dirname(path)) as folder:
        yield str(folder / os.path.basename(path))


def _tracked_variables(checkpoint: tf.train.Checkpoint) -> dict[str, tf.Variable]:
    """Returns the variables that a checkpoint tracks, by their keys in its files without ending."""

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
    """What Keras calls the variable: a "/" is ".S" in a checkpoint."""
    for prefix in (_WEIGHTS, _AVERAGE):
        key = key.removeprefix(prefix)
    return key.replace(".S", "/").replace("..", ".")


def _shape_text(shape: tuple[int, ...] | None) -> str:
    if shape is None:
        return "missing"
    return "x".join(str(size) for size in shape) or "a number"


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMES_SHOWN]) + (", ..." if len(names) > _NAMES_SHOWN else "")


def _damaged(path: str) -> UserError:
    return UserError(
        f"Checkpoint '{path}' is damaged or incomplete; use another one (`last` is the newest that is whole), or "
        "restore its files from a copy."
    )
