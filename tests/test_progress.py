"""What is shown while a command runs."""

import os
import sys

import pytest

from deeplab2_like import progress
from deeplab2_like.progress import LenientOutput, TrainingProgress, progress_bar


def test_output_that_nobody_reads_is_dropped() -> None:
    reader, writer = os.pipe()
    with os.fdopen(writer, "w") as stream:
        output = LenientOutput(stream)
        print("read", file=output, flush=True)
        assert os.read(reader, 100) == b"read\n"
        os.close(reader)
        print("lost", file=output, flush=True)
        print("lost", file=output, flush=True)
    # The stream closes without an error: what it has kept went nowhere.


def test_a_training_goes_on_when_nobody_reads_its_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        with TrainingProgress(start_step=0, steps=2) as progress:
            progress.advance()
            progress.report({"loss": 1.0})
            progress.note("PQ 1.00")
        monkeypatch.undo()


def test_without_a_terminal_lines_are_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    with progress_bar("convert") as update:
        # One item in 4 seconds from the first to the last: lines after 12 and 24 seconds, and at the end.
        for done in range(1, 9):
            update(done, 8)
            now += 4
        update(1, 1)  # Another split, which is done before a line is due.
    assert capsys.readouterr().out.splitlines() == [
        "convert: 4/8  0.2/s  0.3 min left",
        "convert: 7/8  0.2/s  0.1 min left",
        "convert: 8/8  0.2/s",
    ]
