"""The safety net of a training: stop signals, and errors translated into `UserError`."""

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import NoReturn

import tensorflow as tf

from deeplab2_like.checkpoint_files import list_checkpoints
from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.files import cannot_write
from deeplab2_like.progress import LenientOutput
from deeplab2_like.trainer import failures
from deeplab2_like.trainer.batches import load_batch
from deeplab2_like.trainer.run import Run
from deeplab2_like.trainer.stopping import StopSignal, StopTraining, exit_status
from deeplab2_like.trainer.strategy import worker_of
from deeplab2_like.trainer.trainer import NonFiniteError


@contextlib.contextmanager
def training_guards(run: Run) -> Iterator[StopSignal]:
    """Notes stop signals, and translates the errors of a training into `UserError`.

    Yields:
        The stop signal. After a signal, the block must save a checkpoint and raise `StopTraining`.

    Raises:
        UserError: If a loss is not finite, memory does not suffice, a worker is lost, or a record or file is faulty.
        SystemExit: After `StopTraining`.
    """
    try:
        files = [*run.files, *run.validation_files]
        with StopSignal(run.strategy) as stop, report_bad_records(files), _translated_errors(run):
            yield stop
    except StopTraining as request:
        _exit(run, request)


@contextlib.contextmanager
def orbit_silenced() -> Iterator[None]:
    """Hides Orbit's line per loop, which repeats the progress display, and resets the summary step that it sets."""
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            yield
        finally:
            tf.summary.experimental.set_step(None)


@contextlib.contextmanager
def _translated_errors(run: Run) -> Iterator[None]:
    settings = run.config.trainer
    try:
        yield
    except NonFiniteError as error:
        folder = run.model_dir / f"non_finite_step_{error.step}" if run.is_chief else None
        has_checkpoint = bool(list_checkpoints(run.model_dir))
        batch = load_batch(run, error.step)
        raise failures.non_finite(error, batch, folder, has_checkpoint=has_checkpoint) from None
    except tf.errors.ResourceExhaustedError as error:
        if "No space left" in error.message:  # A full disk is the same error to TensorFlow.
            raise cannot_write(run.model_dir, error) from error
        raise failures.out_of_memory(
            batch_size=settings.batch_size, crop_size=run.config.data.crop_size, precision=settings.precision
        ) from error
    except (tf.errors.UnavailableError, tf.errors.AbortedError, tf.errors.DeadlineExceededError) as error:
        if worker_of(run.strategy)[1] == 1:
            raise
        raise failures.lost_worker() from error


def _exit(run: Run, request: StopTraining) -> NoReturn:
    """Ends the process after a signal; the checkpoint is saved already."""
    print(
        f"Stopped by {request.signal.name} after step {int(run.step)} of {run.config.trainer.steps}, which is saved; "
        f"run the same command again to resume from '{run.model_dir}'.",
        file=LenientOutput(sys.stdout),
        flush=True,
    )
    raise SystemExit(exit_status(request.signal))
