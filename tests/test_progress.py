"""What is shown while a command runs."""

import os
import sys

import pytest

from deeplab2_like.progress import LenientOutput, TrainingProgress


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
