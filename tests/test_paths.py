"""Paths that are no local ones, and local ones with characters that TensorFlow takes for a pattern."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tensorflow as tf

from deeplab2_like.checkpoint_files import list_checkpoints, make_checkpoint_manager
from deeplab2_like.cli import main
from deeplab2_like.configs import load_config
from deeplab2_like.configs.schema import Config
from deeplab2_like.data.convert.labelme import convert_labelme
from deeplab2_like.data.convert.scenes import convert_scenes
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.evaluate_files import evaluate_files
from deeplab2_like.evaluation.model_folder import evaluate_model_folder
from deeplab2_like.export.predictor import Predictor
from deeplab2_like.export.saved_model import export_model_folder
from deeplab2_like.files import literal_folder, require_local
from deeplab2_like.trainer.train import train

ADDRESS = "gs://bucket/run"
MESSAGE = (
    "'gs://bucket/run.*' is not a local path, and only local paths work; copy the data to a local folder, or mount the "
    "bucket and give the folder it is mounted on"
)
CONFIG = "panoptic_deeplab/scenes_tiny"


@pytest.mark.parametrize("path", ["gs://bucket/run", "s3://b", "hdfs://host:8020/x", "file:///tmp/x", Path("gs://b/x")])
def test_addresses_are_refused(path: str | Path) -> None:
    with pytest.raises(UserError, match=r"^'(gs|s3|hdfs|file)://.*' is not a local path"):
        require_local(path)


@pytest.mark.parametrize("path", ["run", "/a/b", "./gs", "C:/runs", "C:\\runs", "a/gs://b", "12:30", "lr=1e-3:x", ""])
def test_local_paths_pass(path: str) -> None:
    require_local(path)
    require_local(Path(path))


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--config", CONFIG, "--model-dir", ADDRESS],
        ["train", "--config", CONFIG, "--model-dir", "run", "--init-from", ADDRESS],
        ["train", "--config", f"{ADDRESS}.yaml", "--model-dir", "run"],
        ["train", "--config", CONFIG, "--model-dir", "run", "--set", f"data.path={ADDRESS}"],
        ["evaluate", "--model-dir", ADDRESS],
        ["evaluate", "--model-dir", ADDRESS, "--follow"],
        ["evaluate", "--model-dir", "run", "--ensemble", "other", ADDRESS],
        ["export", "--model-dir", "run", "--output-dir", ADDRESS],
        ["predict", "--model", "exported", "--input", ADDRESS, "--output-dir", "out"],
        ["inspect", ADDRESS, "--output-dir", "out"],
        ["describe", "--config", CONFIG, "--json", ADDRESS],
        ["demo", "--output-dir", ADDRESS],
        ["convert", "scenes", "--train", "1", "--val", "1", "--size", "32x64", "--output-dir", ADDRESS],
        ["convert", "labelme", "--root", ADDRESS, "--output-dir", "records"],
    ],
)
def test_commands_refuse_them_with_one_sentence(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "://bucket/run" in line
    assert "is not a local path, and only local paths work" in line
    assert list(tmp_path.iterdir()) == []


def tiny_config() -> Config:
    return load_config(CONFIG, ["data.path=records"])


@pytest.mark.parametrize(
    "call",
    [
        lambda: train(tiny_config(), ADDRESS),
        lambda: evaluate_model_folder(ADDRESS),
        lambda: export_model_folder(ADDRESS, "exported"),
        lambda: export_model_folder("run", ADDRESS),
        lambda: Predictor(ADDRESS),
        lambda: convert_scenes(train=1, val=1, size=(32, 64), output_dir=Path(ADDRESS)),
        lambda: convert_labelme(root=Path(ADDRESS), output_dir=Path("records")),
        lambda: evaluate_files(
            ground_truth=ADDRESS, ground_truth_dir="pngs", prediction="prediction.json", prediction_dir="predictions"
        ),
        lambda: load_config(f"{ADDRESS}.yaml"),
        lambda: load_config(CONFIG, [f"data.path={ADDRESS}"]),
    ],
)
def test_functions_refuse_them(call: Callable[[], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=MESSAGE):
        call()
    assert list(tmp_path.iterdir()) == []


def test_a_config_may_not_be_based_on_one(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"base: {ADDRESS}.yaml\n")
    with pytest.raises(UserError, match=MESSAGE):
        load_config(tmp_path / "mine.yaml")


@pytest.mark.parametrize("name", ["lr=[0.1]", "[", "a*", "a?", "a\\b"])
def test_a_folder_of_any_name_is_read(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variable = tf.Variable(1.0)
    (tmp_path / name).mkdir()
    tf.train.Checkpoint(variable=variable).write(str(tmp_path / name / "ckpt"))
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / name, Path(name)):
        variable.assign(0.0)
        with literal_folder(folder) as readable:
            tf.train.Checkpoint(variable=variable).read(str(readable / "ckpt")).assert_consumed()
        assert float(variable) == 1.0
    # Nothing is left of the link, and what it led to is there.
    assert readable == Path(name) or not readable.is_symlink()
    assert len(list((tmp_path / name).iterdir())) == 2


def test_old_checkpoints_are_deleted_by_name(tmp_path: Path) -> None:
    # As a pattern, the path of `a*` is that of `ab`, too, and that of `[c]` is that of `c`.
    for name in ("a*", "ab", "[c]", "c"):
        step = tf.Variable(0, dtype=tf.int64)
        checkpoint = tf.train.Checkpoint(step=step)
        keep = 1 if name in ("a*", "[c]") else 5
        manager = make_checkpoint_manager(checkpoint, tmp_path / name, step=step, every=1, keep=keep)
        for number in (1, 2):
            step.assign(number)
            manager.save(number)
    assert [Path(path).name for path in list_checkpoints(tmp_path / "a*")] == ["ckpt-2"]
    assert [Path(path).name for path in list_checkpoints(tmp_path / "[c]")] == ["ckpt-2"]
    files = {path.name for path in (tmp_path / "[c]" / "checkpoints").iterdir()}
    assert files == {"checkpoint", "ckpt-2.index", "ckpt-2.data-00000-of-00001"}
    manager = make_checkpoint_manager(checkpoint, tmp_path / "a*", step=step, every=1, keep=1)
    step.assign(3)
    manager.save(3)
    # Those of the run before count, too.
    assert [Path(path).name for path in list_checkpoints(tmp_path / "a*")] == ["ckpt-3"]
    for name in ("ab", "c"):
        files = {path.name for path in (tmp_path / name / "checkpoints").glob("*-*")}
        assert files == {f"ckpt-{step}.{end}" for step in (1, 2) for end in ("index", "data-00000-of-00001")}
