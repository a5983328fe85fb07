"""Progress of commands: a live bar on a terminal; for training, plain lines elsewhere."""

import contextlib
import io
import os
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
        the time left.
    """
    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), _RateColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=not sys.stdout.isatty()) as bar:
        task = bar.add_task(name, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class LenientOutput(io.TextIOBase):
    """Text output that drops text that cannot be written, so that a command outlives its terminal or reader.

    Args:
        stream: The stream to write to. After a failure its descriptor leads to the null device; otherwise the stream
            would try again when the process ends, and change its exit status.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """The encoding of the stream."""
        return self._stream.encoding

    def isatty(self) -> bool:
        """Whether the stream is a terminal."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """The descriptor of the stream."""
        return self._stream.fileno()

    def write(self, text: str) -> int:
        """Writes, or drops the text."""
        with self._dropping():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flushes, or drops the buffered text."""
        with self._dropping():
            self._stream.flush()

    @contextmanager
    def _dropping(self) -> Iterator[None]:
        try:
            yield
        except OSError:
            with contextlib.suppress(OSError), open(os.devnull, "w") as null:
                os.dup2(null.fileno(), self._stream.fileno())


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
        self._console = Console(file=cast(TextIO, LenientOutput(sys.stdout)), quiet=not is_shown)
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
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
        self._console.file.flush()

    def _num_timed_steps(self) -> int:
        return self._step - self._first_step - 1
