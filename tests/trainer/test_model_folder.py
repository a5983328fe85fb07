"""Model folders: what is saved comes back, and what does not fit is refused."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from one_convolution import one_convolution_config

from deeplab2_like.checkpoint import restore_system
from deeplab2_like.checkpoint_files import checkpoint_step, find_checkpoint, list_checkpoints, read_best, save_if_best
from deeplab2_like.configs import load_config, save_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.model_folder import (
    build_from_model_folder,
    check_model_folder,
    load_model_folder,
    prepare_model_folder,
)
from deeplab2_like.trainer.train import train


@pytest.fixture
def folder(trained_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(trained_folder, tmp_path / "model"))


def test_every_variable_is_restored(folder: Path) -> None:
    config, system, step = load_model_folder(folder)
    assert step == 6
    assert config.system == "one_convolution"
    stored = tf.train.load_checkpoint(list_checkpoints(folder)[-1])
    # Keras names them; "/" is "." then, escaped.
    names = [name for name in stored.get_variable_to_shape_map() if name.startswith("system/weights/")]
    values = {name.split("/")[2].replace(".S", "/"): stored.get_tensor(name) for name in names}
    # Two convolutions of kernel and bias, and the four vectors of batch normalization: all are kept in a list.
    assert len(system.weights) == len(values) == 8
    for weight in system.weights:
        np.testing.assert_array_equal(weight.numpy(), values[weight.path])
    moving_mean = next(weight for weight in system.weights if weight.name == "moving_mean")
    assert np.abs(moving_mean.numpy()).min() > 0  # Trained, that is.


def test_overrides_reach_the_config(folder: Path) -> None:
    config, _, _ = load_model_folder(folder, ["data.val_split=other"])
    assert config.data.val_split == "other"


@pytest.mark.parametrize("damage", ["changed", "cut", "missing", "index"])
def test_the_one_before_a_damaged_checkpoint_is_used(
    folder: Path, trained_folder: Path, records: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = list_checkpoints(folder)[-1]
    data = Path(f"{path}.data-00000-of-00001")
    content = bytearray(data.read_bytes())
    if damage == "changed":
        content = bytearray(255 - value for value in content)
        data.write_bytes(content)
    elif damage == "cut":
        data.write_bytes(content[: len(content) // 2])
    elif damage == "missing":
        data.unlink()
    else:
        Path(f"{path}.index").write_bytes(b"nothing")
    # Asked for by its step, it is an error.
    with pytest.raises(
        UserError,
        match=r"Checkpoint '.*ckpt-6' is damaged or incomplete; use another one \(`last` is the newest that is",
    ):
        load_model_folder(folder, checkpoint="6")
    # The newest is the one before, with a warning.
    capsys.readouterr()
    assert load_model_folder(folder)[2] == 4
    warning = f"Warning: checkpoint '{path}' is damaged or incomplete; looking for one before it.\n"
    assert capsys.readouterr().err == warning
    # So it is for training, which saves a whole one in its place.
    expected = [weight.numpy() for weight in load_model_folder(trained_folder)[1].weights]
    train(one_convolution_config(data={"path": str(records)}), folder)
    assert capsys.readouterr().err == warning
    _, system, step = load_model_folder(folder)
    assert step == 6
    assert capsys.readouterr().err == ""
    for weight, value in zip(system.weights, expected, strict=True):
        np.testing.assert_array_equal(weight, value)


def test_no_checkpoint_is_whole(folder: Path) -> None:
    for file in (folder / "checkpoints").glob("*.index"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match=r"No checkpoint in '.*checkpoints' is whole, the newest is 'ckpt-6'; restore"):
        load_model_folder(folder)


def test_checkpoints_are_found(folder: Path) -> None:
    checkpoints = folder / "checkpoints"
    assert find_checkpoint(folder) == str(checkpoints / "ckpt-6")
    assert find_checkpoint(folder, "4") == str(checkpoints / "ckpt-4")
    assert checkpoint_step(find_checkpoint(folder, "4")) == 4
    with pytest.raises(UserError, match=r"has no checkpoint '5'; give `last`, `best` or one of the steps 4, 6\."):
        find_checkpoint(folder, "5")
    with pytest.raises(UserError, match=r"has no best checkpoint, as none was evaluated during training; run"):
        find_checkpoint(folder, "best")
    with pytest.raises(UserError, match="holds no checkpoint yet; train first"):
        find_checkpoint(folder / "nowhere")


def test_the_best_is_kept(folder: Path) -> None:
    assert read_best(folder) is None
    _, system, _ = load_model_folder(folder, checkpoint="4")
    assert save_if_best(folder, system, step=4, pq=12.5)
    assert not save_if_best(folder, system, step=6, pq=12.4)
    assert read_best(folder) == (str(folder / "best" / "ckpt-4"), 12.5)
    # Training deletes its own; this one stays, also under its number.
    for file in (folder / "checkpoints").glob("ckpt-4.*"):
        file.unlink()
    assert find_checkpoint(folder, "4") == find_checkpoint(folder, "best") == str(folder / "best" / "ckpt-4")
    config, loaded, step = load_model_folder(folder, checkpoint="best")
    assert (config.system, step) == ("one_convolution", 4)
    for weight, expected in zip(loaded.weights, system.weights, strict=True):
        np.testing.assert_array_equal(weight, expected)
    # A better one takes its place, also one of the same step, whose files are never mixed with those of the other.
    _, better, _ = load_model_folder(folder)
    for step, name in ((6, "ckpt-6"), (6, "ckpt_again-6"), (6, "ckpt-6")):
        assert save_if_best(folder, better, step=step, pq=13.0)
        assert {path.name.partition(".")[0] for path in (folder / "best").iterdir()} == {"best", name}
        assert find_checkpoint(folder, "best") == str(folder / "best" / name)
        assert checkpoint_step(find_checkpoint(folder, "best")) == step
    np.testing.assert_array_equal(load_model_folder(folder, checkpoint="best")[1].weights[0], better.weights[0])
    (folder / "best" / "best.json").write_text("{}")
    with pytest.raises(UserError, match=r"best.json' is damaged .*; move '.*best' elsewhere, and the next evaluation"):
        read_best(folder)


def test_a_system_without_its_variables(folder: Path) -> None:
    config, system = build_from_model_folder(folder, ["data.val_split=other"])
    assert config.data.val_split == "other"
    trained = load_model_folder(folder)[1]
    assert not np.array_equal(system.weights[0], trained.weights[0])
    restore_system(system, find_checkpoint(folder))
    np.testing.assert_array_equal(system.weights[0], trained.weights[0])


def test_training_goes_on_from_the_one_before(folder: Path, records: Path) -> None:
    for file in (folder / "checkpoints").glob("ckpt-6.*"):
        file.unlink()
    train(one_convolution_config(data={"path": str(records)}), folder)
    assert load_model_folder(folder)[2] == 6


def test_training_starts_over_without_checkpoints(folder: Path, records: Path) -> None:
    for file in (folder / "checkpoints").glob("ckpt-*"):
        file.unlink()
    train(one_convolution_config(data={"path": str(records)}, steps=2), folder)
    assert load_model_folder(folder)[2] == 2


def test_checkpoint_of_another_config(folder: Path, records: Path) -> None:
    # Of nine variables, two are as before: the bias of the logits, and the state of dropout's random numbers.
    message = (
        r"Checkpoint '.*ckpt-6' does not fit the config in 7 of 9 variables: one_convolution/convolution/kernel "
        r"\(3x3x3x4 in the checkpoint, 3x3x3x5 here\), one_convolution/convolution/bias \(4 in the "
        r"checkpoint, 5 here\), .*, \.\.\.; use the config it was trained with"
    )
    with pytest.raises(UserError, match=message):
        load_model_folder(folder, ["model.channels=5"])
    (folder / "config.yaml").unlink()
    # Another optimizer has other variables: its step, and a momentum for each of six weights.
    message = (
        r"does not fit the config in 7 of 17 variables: optimizer/sgd/\S+ \(missing in the checkpoint, .* here\), .*; "
        r"use the config it was trained with, trainer.optimizer and trainer.precision for the optimizer's variables\.$"
    )
    with pytest.raises(UserError, match=message):
        train(one_convolution_config(data={"path": str(records)}, steps=9, optimizer={"name": "sgd"}), folder)
    message = (
        r"in 8 of 31 variables: average of one_convolution/convolution/kernel \(missing in the checkpoint, 3x3x3x4 "
        r"here\), .*; use the config it was trained with, trainer.ema_decay for the averages\.$"
    )
    with pytest.raises(UserError, match=message):
        train(one_convolution_config(data={"path": str(records)}, steps=9, ema_decay=0.9), folder)


def test_no_checkpoint_yet(tmp_path: Path) -> None:
    prepare_model_folder(tmp_path, one_convolution_config(), scenes_info())
    with pytest.raises(UserError, match="holds no checkpoint yet; train first"):
        load_model_folder(tmp_path)


def test_no_model_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"is no model folder, as it has no config.yaml; give the --model-dir of a"):
        load_model_folder(tmp_path)
    with pytest.raises(UserError, match="is no model folder"):
        load_model_folder(tmp_path / "missing")


def test_a_folder_keeps_to_one_model_and_one_data_set(folder: Path, records: Path) -> None:
    info = DatasetInfo.load(records)
    # The trainer's section may change, say, for a longer training.
    check_model_folder(folder, one_convolution_config(steps=9), info)
    other_model = one_convolution_config(model={"channels": 5})
    with pytest.raises(UserError, match=r"holds a run whose 'model' section differs from this config; use another"):
        check_model_folder(folder, other_model, info)
    other_info = dataclasses.replace(info, label_divisor=500)
    with pytest.raises(
        UserError, match=r"was trained on data set '.*', whose classes or label divisor differ from those"
    ):
        check_model_folder(folder, one_convolution_config(), other_info)
    # Without checkpoints there is nothing to protect.
    for file in (folder / "checkpoints").glob("ckpt-*"):
        file.unlink()
    check_model_folder(folder, other_model, other_info)


def test_the_path_of_the_data_holds_from_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    prepare_model_folder("model", one_convolution_config(data={"path": "../records"}), scenes_info())
    config = load_config(tmp_path / "here" / "model" / "config.yaml")
    assert config == one_convolution_config(data={"path": str(tmp_path / "records")})


def test_a_file_in_the_way(registered: None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model"
    save_config(one_convolution_config(), path)
    before = path.read_bytes()

    def too_late(*arguments: object) -> None:
        raise AssertionError("built")

    monkeypatch.setattr("deeplab2_like.trainer.run.build_system", too_late)
    for folder, reason in ((path, "there is a file in its place"), (path / "below" / "it", "Not a directory")):
        with pytest.raises(
            UserError, match=rf"^Output folder '{folder}' cannot be created \({reason}\); choose another"
        ):
            train(one_convolution_config(data={"path": str(records)}), folder)
    assert path.read_bytes() == before
