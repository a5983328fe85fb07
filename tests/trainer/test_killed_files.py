"""A training that is killed before any of its file operations leaves the old files or the new ones, and can go on.

TensorFlow's own part is replaced by writers of small texts, as it would not survive the fork in `kills`. What is left
is everything else that a training does to its folder, in its order.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kills import files_in, hidden_in, kills
from one_convolution import one_convolution_config
from tensorflow.python.checkpoint import checkpoint_management

from deeplab2_like import checkpoint_files as checkpoint_module
from deeplab2_like.checkpoint_files import (
    checkpoint_step,
    list_checkpoints,
    make_checkpoint_manager,
    newest_whole_checkpoint,
    read_best,
)
from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.evaluation import report
from deeplab2_like.model_folder import check_model_folder, clean_model_folder, prepare_model_folder
from deeplab2_like.trainer import validation as validation_module
from deeplab2_like.trainer.run_lock import LOCK_FILE, run_lock
from deeplab2_like.trainer.validation import Validation, read_evaluated_step


class FakeCheckpoint:
    """Writes a text in place of variables, with the file operations of TensorFlow in their order."""

    def __init__(self, text: Callable[[], str]) -> None:
        self._text = text
        self.save_counter = SimpleNamespace(assign_add=lambda _: None)

    def write(self, prefix: str) -> None:
        temporary = Path(f"{prefix}_temp")
        temporary.mkdir(parents=True)
        for end in ("data-00000-of-00001", "index"):
            (temporary / end).write_text(self._text())
        for end in ("data-00000-of-00001", "index"):
            (temporary / end).replace(f"{prefix}.{end}")
        temporary.rmdir()

    def _write(self, prefix: str, options: Any) -> None:
        self.write(prefix)
        for callback in options.experimental_write_callbacks:
            callback(prefix)


class FakeStep:
    def __init__(self) -> None:
        self.value = 0

    def __int__(self) -> int:
        return self.value

    def numpy(self) -> int:
        return self.value


def text_of(path: str) -> str | None:
    """The text of a fake checkpoint; None if it is not whole."""
    files = [Path(f"{path}.{end}") for end in ("data-00000-of-00001", "index")]
    texts = {file.read_text() if file.exists() else None for file in files}
    return texts.pop() if len(texts) == 1 else None


@pytest.fixture
def fake_training(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """Does to a model folder what a training up to some step does, saving and evaluating after each one."""
    step = FakeStep()
    checkpoint = FakeCheckpoint(lambda: f"step {step.value}")
    monkeypatch.setattr(checkpoint_module, "make_checkpoint", lambda *_: checkpoint)
    monkeypatch.setattr(checkpoint_module, "is_whole", lambda path: text_of(path) is not None)
    monkeypatch.setattr(report, "write_events", lambda *_, **__: None)
    monkeypatch.setattr(validation_module.pipeline, "make_eval_dataset", lambda *_, **__: None)
    monkeypatch.setattr(validation_module, "make_inference_function", lambda *_, **__: None)
    # It gets better with each step.
    monkeypatch.setattr(Validation, "evaluate", lambda self: {"panoptic": {"all": {"pq": float(step.value)}}})
    monkeypatch.setattr(checkpoint_management, "_evaluate", int)

    def train(folder: Path, steps: int) -> None:
        config, info = one_convolution_config(steps=steps), scenes_info()
        with run_lock(folder):
            clean_model_folder(folder)
            check_model_folder(folder, config, info)
            paths = list_checkpoints(folder)
            step.value = checkpoint_step(newest_whole_checkpoint(paths)) if paths else 0
            evaluated_step = read_evaluated_step(folder, "val")
            system: Any = SimpleNamespace(dataset_info=info)
            validation = Validation(system, [], average=None, model_dir=folder, split="val", is_stopped=lambda: False)
            if step.value < steps:
                prepare_model_folder(folder, config, info)
                manager = make_checkpoint_manager(checkpoint, folder, step=step, every=1, keep=1)  # type: ignore[arg-type]
            if step.value and evaluated_step != step.value:
                validation.evaluate_and_keep(step.value)
            while step.value < steps:
                step.value += 1
                manager.save(step.value)
                validation.evaluate_and_keep(step.value)

    return train


def check_finished(folder: Path, *, step: int, operation: str) -> None:
    """Checks that a folder holds what a training of so many steps leaves, and nothing else."""
    assert hidden_in(folder) == [], operation
    assert load_config(folder / "config.yaml").trainer.steps == step, operation
    assert read_evaluated_step(folder, "val") == step, operation
    best = read_best(folder)
    assert best is not None
    assert (text_of(best[0]), best[1]) == (f"step {step}", step), operation
    assert text_of(list_checkpoints(folder)[-1]) == f"step {step}", operation
    ends = ("data-00000-of-00001", "index")
    expected = {"config.yaml", "dataset_info.json", "best/best.json", "val/metrics.json", "val/evaluated_step"}
    expected |= {f"checkpoints/ckpt-{step}.{end}" for end in ends}
    expected |= {f"best/{Path(best[0]).name}.{end}" for end in ends}
    # The one before goes with the next save, which does not come if the last one was cut short after it was whole.
    found = {name for name in files_in(folder) if not name.startswith(f"checkpoints/ckpt-{step - 1}.")}
    # The list of checkpoints is TensorFlow's own, and is written with the next save, too.
    assert found - {"checkpoints/checkpoint"} == expected, operation
    assert {path.name for path in folder.rglob("*") if path.is_dir()} == {"checkpoints", "best", "val"}, operation


@pytest.mark.usefixtures("registered")
def test_a_resumed_training_killed_at_any_file(fake_training: Callable[[Path, int], None], tmp_path: Path) -> None:
    start, folder = tmp_path / "start", tmp_path / "model"
    fake_training(start, 1)
    check_finished(start, step=1, operation="not killed")

    def prepare() -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(start, folder)

    operations = []
    for operation in kills(lambda: fake_training(folder, 3), prepare=prepare):
        operations.append(operation)
        # The old or the new, whole.
        assert load_config(folder / "config.yaml").trainer.steps in (1, 3), operation
        assert DatasetInfo.load(folder) == scenes_info(), operation
        newest = newest_whole_checkpoint(list_checkpoints(folder))
        assert text_of(newest) == f"step {checkpoint_step(newest)}", operation
        best = read_best(folder)
        assert best is not None
        assert text_of(best[0]) == f"step {best[1]:g}", operation
        # What is evaluated, or best, can be resumed from.
        evaluated_step = read_evaluated_step(folder, "val")
        assert evaluated_step is not None
        assert evaluated_step <= best[1] <= checkpoint_step(newest), operation
        # The next run goes on, and removes what was left.
        fake_training(folder, 3)
        check_finished(folder, step=3, operation=operation)
    for part in (
        LOCK_FILE,
        "config.yaml",
        "dataset_info.json",
        "ckpt-2_temp",
        "ckpt-1.index",
        "best.json",
        "evaluated_step",
    ):
        assert any(part in operation for operation in operations), part


@pytest.mark.usefixtures("registered")
def test_a_first_training_killed_at_any_file(fake_training: Callable[[Path, int], None], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    for operation in kills(lambda: fake_training(folder, 1), prepare=lambda: shutil.rmtree(folder, ignore_errors=True)):
        fake_training(folder, 1)
        check_finished(folder, step=1, operation=operation)
