"""The weights that a new training starts from, and that nothing is read when there is a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from deeplab2_like.checkpoint_files import find_initial_checkpoint
from deeplab2_like.configs import load_config
from deeplab2_like.model import PanopticSystem
from deeplab2_like.trainer import run as run_module
from deeplab2_like.trainer.run import Run, make_run, restore_or_initialize

BACKBONE = "model.backbone={name: resnet_tiny, weights: /weights/tiny.npz}"
FIRST = "panoptic_deeplab/backbone/stem/conv1/norm/beta"


def first_weight(system: PanopticSystem) -> Any:
    return next(weight for weight in system.weights if weight.path == FIRST)


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the weights that were loaded; loading sets the first variable of the backbone to 7."""
    names: list[str] = []

    def load(system: PanopticSystem, weights: str) -> None:
        names.append(weights)
        first_weight(system).assign([7.0] * 24)

    monkeypatch.setattr(run_module, "load_backbone_weights", load)
    return names


def prepare(records: Path, folder: Path, *overrides: str) -> Run:
    config = load_config("panoptic_deeplab/scenes_tiny", ["trainer.batch_size=2", f"data.path={records}", *overrides])
    return make_run(config, folder, tf.distribute.get_strategy())


def test_a_new_training_starts_from_the_weights_of_the_backbone(
    records: Path, tmp_path: Path, loaded: list[str]
) -> None:
    run = prepare(records, tmp_path / "new", BACKBONE, "trainer.ema_decay=0.9")
    restore_or_initialize(run, None)
    assert loaded == ["/weights/tiny.npz"]
    assert run.average is not None
    assert run.average.variables[FIRST].numpy().tolist() == [7.0] * 24
    # A checkpoint takes their place, and so does the model folder of another training.
    (tmp_path / "new" / "checkpoints").mkdir(parents=True)
    first_weight(run.system).assign([8.0] * 24)
    run.average.copy_from_system()
    run.checkpoint.write(str(tmp_path / "new" / "checkpoints" / "ckpt-1"))
    for folder, init_from in (("new", None), ("new", tmp_path / "new"), ("other", tmp_path / "new")):
        other = prepare(records, tmp_path / folder, BACKBONE, "trainer.ema_decay=0.9")
        restore_or_initialize(other, init_from)
        assert first_weight(other.system).numpy().tolist() == [8.0] * 24
    assert loaded == ["/weights/tiny.npz"]


def test_a_file_to_start_from_holds_a_backbone(records: Path, tmp_path: Path, loaded: list[str]) -> None:
    file = tmp_path / "tiny.npz"
    file.touch()
    run = prepare(records, tmp_path / "new", BACKBONE)
    restore_or_initialize(run, find_initial_checkpoint(file))
    assert loaded == [str(file)]
    assert first_weight(run.system).numpy().tolist() == [7.0] * 24


def test_without_weights_nothing_is_loaded(records: Path, tmp_path: Path, loaded: list[str]) -> None:
    restore_or_initialize(prepare(records, tmp_path / "new"), None)
    assert loaded == []
