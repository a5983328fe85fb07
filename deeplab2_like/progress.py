"""Progress of commands: a live bar on a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Any, TextIO, cast

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from deeplab2_like.lenient_output import LenientOutput, unescaped
from deeplab2_like.printing import print_line

# Where there is no terminal.
_SECONDS_BETWEEN_LINES = 10.0


class _RateColumn(ProgressColumn):
    """Items per second."""

    def render(self, task: Task) -> Text:
        """Formats the rate; empty while it is unknown."""
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.1f}/s")


@contextmanager
def progress_bar(name: str) -> Iterator[Callable[[int, int], None]]:
    """Shows the progress of a command.

    Args:
        name: Name of the command or stage.

    Yields:
        A function to call with the number of items done and the total; on a terminal it updates a bar with the rate and
        the time left, elsewhere it prints a line every 10 seconds.
    """
    if not sys.stdout.isatty():
        yield _LineProgress(name).update
        return
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class _LineProgress:
    """Prints a line now and then, and at the end of a stage that has printed some, so that a log shows the progress.

    Args:
        name: Name of the command or stage.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._started = self._printed = time.monotonic()
        self._first: int | None = None  # Number of items done at the first call.
        self._num_lines = 0

    def update(self, done: int, total: int) -> None:
        """Notes the number of items done."""
        now = time.monotonic()
        if self._first is None:
            self._started, self._first = now, done  # The rate leaves out preparation, and files of an earlier run.
        if now - self._printed >= _SECONDS_BETWEEN_LINES or (done >= total and self._num_lines):
            self._print(done, total, seconds=now - self._started, counted=done - self._first)
            self._printed = now
            self._num_lines += 1
        if done >= total:  # Another split may follow.
            self._first, self._num_lines = None, 0

    def _print(self, done: int, total: int, *, seconds: float, counted: int) -> None:
        text = f"{self._name}: {done}/{total}"
        if counted and seconds > 0:
            text += f"  {counted / seconds:.1f}/s"
            if done < total:
                text += f"  {(total - done) * seconds / counted / 60:.1f} min left"
        print(text, flush=True)


# Values of a training step that are not losses.
_NOT_LOSSES = ("learning_rate", "gradient_norm", "images_per_second", "waiting_for_data", "loss_scale", "skipped_steps")


class TrainingProgress:
    """Progress of a training: step, losses by name, learning rate, images per second and time left.

    A context manager around the training loop.

    Args:
        start_step: Step at which the loop starts.
        steps: Step at which it ends.
        is_shown: Whether to show anything; of several workers only one should.
    """

    def __init__(self, *, start_step: int, steps: int, is_shown: bool = True) -> None:
        # Bound to stdout now, as the loop runs with stdout redirected. Training goes on if nobody reads the output.
        self._console = Console(file=cast(TextIO, LenientOutput(unescaped(sys.stdout))), quiet=not is_shown)
        self._steps = steps
        self._step = self._first_step = start_step
        self._started = time.perf_counter()
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[losses]} {task.fields[speed]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            redirect_stdout=False,
        )
        self._task = self._bar.add_task("train", total=steps, completed=start_step, losses="", speed="")

    def __enter__(self) -> "TrainingProgress":
        self._bar.start()
        self._started = time.perf_counter()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._bar.stop()

    def advance(self) -> None:
        """Counts one step."""
        self._step += 1
        if self._step == self._first_step + 1:
            self._started = time.perf_counter()  # The first step includes compilation, so it does not count.
        self._bar.update(self._task, completed=self._step)

    def report(self, values: Mapping[str, Any]) -> None:
        """Shows the mean losses since the last report, in their order, and the learning rate."""
        losses = "  ".join(f"{name} {float(value):.3f}" for name, value in values.items() if name not in _NOT_LOSSES)
        if "learning_rate" in values:
            losses += f"  learning rate {float(values['learning_rate']):.2e}"
        speed = f"{values['images_per_second']:.1f} images/s" if "images_per_second" in values else ""
        self._bar.update(self._task, losses=losses, speed=speed)
        if not self._console.is_terminal:
            left = (self._steps - self._step) * (time.perf_counter() - self._started) / max(self._num_timed_steps(), 1)
            text = f"step {self._step}/{self._steps}  {losses}  {speed}  {left / 60:.1f} min left"
            self._console.print(text, soft_wrap=True, highlight=False)
            self._console.file.flush()

    def note(self, text: str) -> None:
        """Prints a line, above the bar if there is one."""
        print_line(text, self._console)
        self._console.file.flush()

    def _num_timed_steps(self) -> int:
        return self._step - self._first_step - 1
