"""The checkpoint files of a model folder: lists, finds, saves and deletes them, and keeps the best one."""

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tensorflow as tf

from deeplab2_like.checkpoint import is_whole, make_checkpoint
from deeplab2_like.errors import UserError
from deeplab2_like.files import cannot_write, require_local, write_atomically
from deeplab2_like.model import PanopticSystem
from deeplab2_like.parsing import parse_json
from deeplab2_like.temporary import TemporaryFolder, remove_leftovers, wait_for_folder

CHECKPOINT_FOLDER = "checkpoints"
BEST_FOLDER = "best"
BEST_FILE = "best.json"
CHECKPOINT_NAME = "ckpt"


def list_checkpoints(model_dir: str | os.PathLike[str]) -> list[str]:
    """Lists the checkpoints of a model folder, the oldest first, as paths without ending.

    It lists files, as TensorFlow's own list still names checkpoints that were deleted.
    """
    indices = (Path(model_dir) / CHECKPOINT_FOLDER).glob(f"{CHECKPOINT_NAME}-*.index")
    paths = [str(index.with_suffix("")) for index in indices]
    return sorted((path for path in paths if path.rpartition("-")[2].isdecimal()), key=checkpoint_step)


def checkpoint_step(path: str) -> int:
    """Returns the training step of a checkpoint, given its path without ending."""
    return int(path.rpartition("-")[2])


def find_checkpoint(model_dir: str | os.PathLike[str], which: str = "last") -> str:
    """Finds a checkpoint of a model folder.

    Args:
        model_dir: A folder that training wrote.
        which: `last`, the newest whole checkpoint, with a warning about newer damaged ones; `best`, that of the highest
            PQ during training; or the number of a training step.

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


def find_initial_checkpoint(source: str | os.PathLike[str]) -> str:
    """Finds the checkpoint to initialize a training from.

    Args:
        source: A model folder, for its newest checkpoint; a checkpoint's path without ending; or a file with the
            weights of a backbone, which is returned as it is.

    Raises:
        UserError: If there is no such checkpoint or file.
    """
    require_local(source)
    if Path(source).is_dir():
        return find_checkpoint(source)
    if not Path(f"{source}.index").is_file() and not Path(source).is_file():
        raise UserError(
            f"'{source}' to start from does not exist; give a model folder, the path of a checkpoint without ending, "
            "or a file with the weights of a backbone."
        )
    return str(source)


def newest_whole_checkpoint(paths: Sequence[str]) -> str:
    """Returns the newest whole checkpoint, and warns of newer damaged ones.

    Args:
        paths: Result of `list_checkpoints`, not empty.

    Raises:
        UserError: If none is whole.
    """
    for path in reversed(paths):
        if is_whole(path):
            return path
        print(f"Warning: checkpoint '{path}' is damaged or incomplete; looking for one before it.", file=sys.stderr)
    raise UserError(
        f"No checkpoint in '{Path(paths[0]).parent}' is whole, the newest is '{Path(paths[-1]).name}'; restore them "
        "from a copy, or train anew with another --model-dir."
    )


def read_best(model_dir: str | os.PathLike[str]) -> tuple[str, float] | None:
    """Returns the path of the best checkpoint and its PQ in percent, or None if none was kept yet."""
    file = Path(model_dir) / BEST_FOLDER / BEST_FILE
    if not file.is_file():
        return None
    advice = f"move '{file.parent}' elsewhere, and the next evaluation during a training keeps a new one"
    try:
        content = parse_json(file.read_bytes())
        default = f"{CHECKPOINT_NAME}-{int(content['step'])}"  # Older folders do not name it.
        path, quality = file.with_name(str(content.get("checkpoint", default))), float(content["pq"])
    except (ValueError, LookupError, TypeError, OverflowError) as error:
        raise UserError(f"'{file}' is damaged ({error!r}); {advice}.") from error
    if not path.with_name(f"{path.name}.index").is_file():
        raise UserError(f"'{file}' names checkpoint '{path.name}', which is not there; {advice}.")
    return str(path), quality


def save_if_best(model_dir: str | os.PathLike[str], system: PanopticSystem, *, step: int, pq: float) -> bool:
    """Saves a system as the best checkpoint of a model folder, if its quality is at least that of the current best.

    It is saved from memory, as training may have deleted the checkpoint during its evaluation. It holds only what
    evaluation and export need; training cannot resume from it.

    Args:
        model_dir: The model folder.
        system: The system with the variables that were evaluated.
        step: Their training step.
        pq: Their panoptic quality on the validation split, in percent.

    Returns:
        Whether it is the best so far.

    Raises:
        UserError: If it cannot be written.
    """
    folder = Path(model_dir) / BEST_FOLDER
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # `evaluate --follow` may run beside a training.
        with wait_for_folder(folder):
            best = read_best(model_dir)
            if best is not None and pq < best[1]:
                return False
            remove_leftovers(folder)
            # A resumed training may reach the step of the best checkpoint again; its files must stay whole until then.
            names = (f"{CHECKPOINT_NAME}-{step}", f"{CHECKPOINT_NAME}_again-{step}")
            name = names[best is not None and Path(best[0]).name == names[0]]
            with TemporaryFolder(folder / name) as temporary:
                make_checkpoint(system).write(str(temporary.path / name))
                for file in sorted(temporary.path.iterdir()):
                    file.replace(folder / file.name)
            # Written last, because it names a whole checkpoint.
            content = {"step": step, "pq": pq, "checkpoint": name}
            write_atomically(folder / BEST_FILE, (json.dumps(content) + "\n").encode())
            for file in folder.iterdir():
                other = file.name.partition(".")[0]
                if other != name and re.fullmatch(rf"{CHECKPOINT_NAME}(_again)?-\d+", other):
                    file.unlink(missing_ok=True)
    except (OSError, tf.errors.OpError) as error:
        raise cannot_write(folder, error) from error
    return True


def make_checkpoint_manager(
    checkpoint: tf.train.Checkpoint,
    model_dir: str | os.PathLike[str],
    *,
    step: tf.Variable,
    every: int,
    keep: int,
) -> tf.train.CheckpointManager:
    """Makes the manager that saves checkpoints into a model folder.

    Args:
        checkpoint: The checkpoint to save.
        model_dir: The model folder; for workers other than the chief a temporary folder, as all workers must save.
        step: Number of training steps done, int scalar.
        every: Steps between checkpoints.
        keep: Number of newest checkpoints to keep.
    """
    folder = Path(model_dir) / CHECKPOINT_FOLDER
    names = [Path(path).name for path in list_checkpoints(model_dir)]
    if names:
        # TensorFlow's own list, see `list_checkpoints`, as a text protocol buffer.
        lines = [f'model_checkpoint_path: "{names[-1]}"']
        for number, name in enumerate(names, start=1):
            # The manager counts only checkpoints with a time among those to keep; only their order matters.
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


class _CheckpointManager(tf.train.CheckpointManager):
    """Saves at multiples of its interval; TensorFlow's own counts from wherever the first loop happens to end."""

    _saved: int | None = None

    def save(self, checkpoint_number: Any = None, check_interval: bool = True, options: Any = None) -> str | None:
        """Saves a checkpoint unless it is saved already or, with `check_interval`, not due; returns its path."""
        number = int(checkpoint_number)
        if number == self._saved or (check_interval and number % self.checkpoint_interval):
            return None
        self._saved = number
        return super().save(number, check_interval=False, options=options)

    def _sweep(self) -> None:
        """Deletes the oldest checkpoints; TensorFlow's method treats paths as patterns, which may match others."""
        while len(self._maybe_delete) > self._max_to_keep:
            _delete_checkpoint(self._maybe_delete.popitem(last=False)[0])

    def restore_or_initialize(self) -> str | None:
        """Does nothing: training has already restored, and skips damaged checkpoints."""
        return None


def _delete_checkpoint(path: str) -> None:
    """Deletes the files of a checkpoint; `path` is without ending.

    The index is deleted last: if the process is killed before, `list_checkpoints` still finds the rest.
    """
    for file in Path(path).parent.glob(f"{Path(path).name}.*"):
        if file.suffix != ".index":
            file.unlink(missing_ok=True)
    Path(f"{path}.index").unlink(missing_ok=True)
