"""Errors of a training that cannot go on, with the batch saved for inspection."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deeplab2_like.data.images import write_png
from deeplab2_like.errors import UserError
from deeplab2_like.files import cannot_write
from deeplab2_like.temporary import TemporaryFile, remove_leftovers
from deeplab2_like.trainer.trainer import NonFiniteError

_VALUES = {"loss": "The sum of the losses", "gradient_norm": "The gradient"}


def non_finite(
    error: NonFiniteError, batch: Mapping[str, Any] | None, folder: Path | None, *, has_checkpoint: bool
) -> UserError:
    """Saves the batch of a step whose loss is not finite, and builds the error.

    Args:
        error: The error of the trainer.
        batch: The step's images, `image` uint8 [B, H, W, 3], their `image_id`, and `targets`; None if it is lost.
        folder: Where to save: the images as PNG files, labels and targets as `targets.npz`. None saves nothing.
        has_checkpoint: Whether there is a checkpoint to resume from.
    """
    value = _VALUES.get(error.value, f"Loss '{error.value}'")
    names = [] if batch is None else [name.decode() for name in batch["image_id"].numpy()]
    images = " on images " + ", ".join(f"'{name}'" for name in names) if names else ""
    remedy = "resume from the last checkpoint" if has_checkpoint else "start again, as there is no checkpoint yet"
    saved = "" if batch is None or folder is None else f" {_save_batch(batch, names, folder)}"
    return UserError(
        f"{value} is not finite in step {error.step}{images}; lower trainer.learning_rate, raise "
        f"trainer.schedule.warmup_steps or set trainer.optimizer.clip_norm, and {remedy}.{saved}"
    )


def _save_batch(batch: Mapping[str, Any], names: list[str], folder: Path) -> str:
    """Saves the batch; returns a sentence that names the folder, or says why it cannot be saved."""
    try:
        remove_leftovers(folder)
        for number, (name, image) in enumerate(zip(names, batch["image"].numpy(), strict=True)):
            write_png(folder / f"{number}_{Path(name).stem}.png", image)
        with TemporaryFile(folder / "targets.npz") as temporary:
            np.savez_compressed(temporary.file, **{name: value.numpy() for name, value in batch["targets"].items()})
            temporary.publish()
    except OSError as error:
        return f"The batch cannot be saved: {cannot_write(folder, error)}"
    except UserError as error:
        return f"The batch cannot be saved: {error}"
    return f"Its images, labels and targets are in '{folder}'."


def out_of_memory(*, batch_size: int, crop_size: tuple[int, int], precision: str) -> UserError:
    """Builds the error for a training that does not fit into memory, with the keys to change."""
    height, width = crop_size
    advice = "" if precision != "float32" else ", set trainer.precision=mixed_bfloat16"
    return UserError(
        f"Out of memory with trainer.batch_size {batch_size} and data.crop_size {height}x{width}; lower "
        "trainer.batch_size (and raise trainer.accumulate_steps as much, to keep the images per step), lower "
        f"data.crop_size{advice}, or spread the batch over more devices."
    )


def lost_worker() -> UserError:
    """Builds the error for a training that has lost one of several workers."""
    return UserError(
        "Another worker has gone, or cannot be reached; start all workers again with the same commands, and they "
        "resume from the newest checkpoint."
    )
