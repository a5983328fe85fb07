"""The actions of a training between its steps: save, report, draw, evaluate, stop."""

import contextlib
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from deeplab2_like.checkpoint_files import make_checkpoint_manager
from deeplab2_like.model_folder import prepare_model_folder
from deeplab2_like.progress import TrainingProgress
from deeplab2_like.trainer.run import Run, describe_run
from deeplab2_like.trainer.stopping import StopSignal
from deeplab2_like.trainer.summaries import StepProfiler, Summaries
from deeplab2_like.trainer.validation import Validation


class TrainingActions(contextlib.ExitStack):
    """Opens checkpoints, progress display and TensorBoard events of a run; a context manager.

    `actions` are called at the end of each loop of steps, in this order, with the values that the trainer reports, if
    any are due.

    Args:
        run: The training, its variables restored.
        stop: The stop signal.
        profile: Number of steps to record with TensorFlow's profiler.
    """

    def __init__(self, run: Run, stop: StopSignal, *, profile: int = 0) -> None:
        super().__init__()
        self._run = run
        self._stop = stop
        self._num_profiled_steps = profile
        self._start_step = int(run.step)
        self.actions = [self.save, self.report, self.draw, self.evaluate]

    def __enter__(self) -> Self:
        super().__enter__()
        run, settings = self._run, self._run.config.trainer
        if run.is_chief:
            # Written only now, because a start that fails must not leave a config behind.
            prepare_model_folder(run.model_dir, run.config, run.dataset_info)
            checkpoint_dir, events_dir = run.model_dir, run.model_dir / "train"
        else:
            # All workers have to save, but only the chief's checkpoint counts.
            checkpoint_dir, events_dir = Path(self.enter_context(tempfile.TemporaryDirectory())), None
        self.manager = make_checkpoint_manager(
            run.checkpoint,
            checkpoint_dir,
            step=run.step,
            every=settings.checkpoint_every,
            keep=settings.keep_checkpoints,
        )
        self._summaries = self.enter_context(Summaries(events_dir))
        steps_left = settings.steps - self._start_step
        self._profiler = self.enter_context(StepProfiler(events_dir, self._num_profiled_steps, steps_left=steps_left))
        self._progress = self.enter_context(
            TrainingProgress(start_step=self._start_step, steps=settings.steps, is_shown=run.is_chief)
        )
        self._progress.note(describe_run(run))
        self._validation = None
        if run.is_chief and run.validation_files:
            self._validation = make_validation(run, self._stop)
        return self

    def num_steps_of_loop(self, step: int) -> int:
        """Returns the number of steps until an action is due."""
        settings = self._run.config.trainer
        intervals = (
            settings.log_every,
            settings.checkpoint_every,
            settings.pictures_every,
            settings.evaluate_every,
        )
        return min(every - int(step) % every for every in intervals if every)

    def is_report_due(self, step: int) -> bool:
        """Whether the trainer reports after a step, counted from 1."""
        settings = self._run.config.trainer
        return step % settings.log_every == 0 or step >= settings.steps

    def after_step(self) -> None:
        """Advances the progress display; raises `StopTraining` after a signal."""
        self._progress.advance()
        self._profiler.advance()
        if not self._run.is_finished:
            self._stop.raise_if_any(self._stop.noted)

    def save(self, values: Mapping[str, Any]) -> None:
        """Saves a checkpoint if one is due; first, because the other actions take longer."""
        del values
        # Training can be resumed from every step that was evaluated.
        must_save = self._run.is_evaluation_due or self._run.is_finished
        self.manager.save(int(self._run.step), check_interval=not must_save)

    def save_before_stop(self) -> None:
        """Saves a checkpoint, unless no step was done."""
        if int(self._run.step) > self._start_step:
            self.manager.save(int(self._run.step), check_interval=False)

    def report(self, values: Mapping[str, Any]) -> None:
        """Logs the values of the trainer."""
        if values:
            self._progress.report(values)
            self._summaries.numbers(values, step=int(self._run.step))

    def draw(self, values: Mapping[str, Any]) -> None:
        """Writes pictures of validation images to TensorBoard if they are due."""
        del values
        if self._validation is not None and self._run.are_pictures_due:
            self._summaries.pictures(self._validation.draw(), step=int(self._run.step))

    def evaluate(self, values: Mapping[str, Any]) -> None:
        """Evaluates and keeps the best checkpoint if an evaluation is due; a signal ends it."""
        del values
        if not self._run.is_evaluation_due:
            return
        stopped_by = None
        if self._validation is not None:
            step, steps = int(self._run.step), self._run.config.trainer.steps
            quality = self._validation.evaluate_and_keep(step)
            if quality is None:
                stopped_by = self._stop.noted
            else:
                self._progress.note(f"step {step}/{steps}  {quality}")
        self._stop.raise_if_any(stopped_by)


def make_validation(run: Run, stop: StopSignal) -> Validation:
    """Makes the validation of a run, which a signal ends."""
    return Validation(
        run.system,
        run.validation_files,
        average=run.average,
        model_dir=run.model_dir,
        split=run.config.data.val_split,
        is_stopped=lambda: stop.noted is not None,
    )
