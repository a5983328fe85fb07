"""The training loop: exact resuming, several devices, what it writes, and when it refuses or stops."""

import dataclasses
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from one_convolution import one_convolution_config

from deeplab2_like.checkpoint_files import list_checkpoints
from deeplab2_like.configs import load_config
from deeplab2_like.configs.schema import DataConfig
from deeplab2_like.data import pipeline
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import list_shards
from deeplab2_like.errors import UserError
from deeplab2_like.model_folder import load_model_folder
from deeplab2_like.trainer import run as run_module
from deeplab2_like.trainer.summaries import StepProfiler
from deeplab2_like.trainer.train import train
from deeplab2_like.trainer.trainer import Trainer
from deeplab2_like.trainer.validation import Validation

# Panoptic-DeepLab with few channels, for a few steps. Dropout has a state, which resuming must restore.
SMALL = [
    "model.aspp={channels: 16, rates: [3, 6, 9], dropout: 0.1}",
    "model.decoder.semantic_channels=16",
    "model.decoder.semantic_head_channels=16",
    "model.decoder.instance_channels=16",
    "model.decoder.instance_head_channels=16",
    "model.decoder.low_level_channels={res3: 16, res2: 16}",
    "data.crop_size=[32, 64]",
    "trainer.batch_size=2",
    "trainer.steps=4",
    "trainer.log_every=1",
    "trainer.checkpoint_every=2",
]


class PowerCut(Exception):
    pass


def variables_of(path: str) -> dict[str, np.ndarray]:
    stored = tf.train.load_checkpoint(path)
    names = set(stored.get_variable_to_shape_map()) - {"_CHECKPOINTABLE_OBJECT_GRAPH"}
    return {name: stored.get_tensor(name) for name in sorted(names)}


def test_resuming_is_exact(records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = load_config("panoptic_deeplab/scenes_tiny", [*SMALL, f"data.path={records}"])
    train(config, tmp_path / "straight")

    def fail_in_step_4(self: Trainer, iterator: Any) -> None:
        if int(self._step) == 3:
            raise PowerCut
        original(self, iterator)

    original = Trainer.train_step
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", fail_in_step_4)
        with pytest.raises(PowerCut):
            train(config, tmp_path / "cut")
    assert [Path(path).name for path in list_checkpoints(tmp_path / "cut")] == ["ckpt-2"]
    train(config, tmp_path / "cut")

    straight, resumed = (variables_of(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "cut"))
    assert straight.keys() == resumed.keys()
    # Weights, running statistics, the optimizer's slots and step, the states of random generators.
    for part in ("kernel", "gamma", "moving_variance", "optimizer", "iteration", "step", "generators"):
        assert any(part in name for name in straight), part
    different = [name for name in straight if not np.array_equal(straight[name], resumed[name])]
    assert different == []
    # All of it has changed since the first checkpoint: else equality would say nothing.
    early = variables_of(list_checkpoints(tmp_path / "straight")[0])
    assert not any(np.array_equal(early[name], straight[name]) for name in straight if "kernel" in name)


MIRRORED = """
import json, sys
import keras
import numpy as np
import tensorflow as tf

tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
)
from deeplab2_like.configs import load_config
from deeplab2_like.configs.schema import DataConfig
from deeplab2_like.errors import UserError
from deeplab2_like.model import build_system
from deeplab2_like.trainer.train import train

overrides = json.loads(sys.argv[1])
weights = {}
for strategy in ("one_device", "mirrored"):
    config = load_config("panoptic_deeplab/scenes_tiny", [*overrides, f"trainer.strategy={strategy}"])
    system = train(config, f"{sys.argv[2]}/{strategy}")
    weights[strategy] = {weight.path: weight.numpy() for weight in system.weights}
try:
    uneven = [*overrides, "trainer.strategy=mirrored", "trainer.batch_size=3"]
    config = load_config("panoptic_deeplab/scenes_tiny", uneven)
    train(config, f"{sys.argv[2]}/uneven")
    message = ""
except UserError as error:
    message = str(error)
one, two = weights["one_device"], weights["mirrored"]
keras.utils.set_random_seed(config.trainer.seed)
start = {weight.path: weight.numpy() for weight in build_system(config).weights}


def distance(a, b):
    return max(float(np.abs(a[path] - b[path]).max()) for path in a)


found = {"count": len(one), "difference": distance(one, two), "change": distance(start, one), "uneven": message}
print(json.dumps(found))
"""


def test_two_devices_train_like_one(records: Path, tmp_path: Path) -> None:
    overrides = [
        *SMALL,
        f"data.path={records}",
        "model.norm.kind=sync_batch",
        "trainer.optimizer={name: sgd, weight_decay: 0.001, clip_norm: 1.0}",
        "trainer.learning_rate=0.05",
        "trainer.schedule.warmup_steps=0",
        "trainer.batch_size=4",
        "trainer.steps=3",
    ]
    command = [sys.executable, "-c", MIRRORED, json.dumps(overrides), str(tmp_path)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr[-3000:]
    found = json.loads(finished.stdout.splitlines()[-1])
    assert found["count"] > 50
    assert found["difference"] < 1e-4
    assert "trainer.batch_size is 3, which 2 devices cannot share evenly" in found["uneven"]
    assert found["change"] > 1e-2


def test_checkpoints_are_kept_as_configured(registered: None, records: Path, tmp_path: Path) -> None:
    def names_after(steps: int, keep: int) -> list[str]:
        train(one_convolution_config(data={"path": str(records)}, steps=steps, keep_checkpoints=keep), tmp_path)
        return [Path(path).name for path in list_checkpoints(tmp_path)]

    # Every 4 steps and at the end: 4, 8, 11, of which the newest two stay.
    assert names_after(11, keep=2) == ["ckpt-8", "ckpt-11"]
    # Where the first run ended does not move the next ones.
    assert names_after(17, keep=9) == ["ckpt-8", "ckpt-11", "ckpt-12", "ckpt-16", "ckpt-17"]


def test_model_folder_is_complete(trained_folder: Path, records: Path) -> None:
    config = one_convolution_config(data={"path": str(records)})
    assert load_config(trained_folder / "config.yaml") == config
    assert DatasetInfo.load(trained_folder) == DatasetInfo.load(records)
    assert [Path(path).name for path in list_checkpoints(trained_folder)] == ["ckpt-4", "ckpt-6"]
    assert not list(trained_folder.glob(".*"))


def test_tensorboard_has_every_value(trained_folder: Path) -> None:
    (events,) = (trained_folder / "train").iterdir()
    steps: dict[str, list[int]] = {}
    for record in tf.data.TFRecordDataset(str(events)).as_numpy_iterator():
        event = tf.compat.v1.Event.FromString(record)
        for value in event.summary.value:
            steps.setdefault(value.tag, []).append(event.step)
            assert value.tag.startswith("pictures/") or np.isfinite(tf.make_ndarray(value.tensor))
    # Six steps, every second one is logged; pictures of both validation images come with the first line.
    expected = ("semantic", "loss", "learning_rate", "gradient_norm", "images_per_second", "waiting_for_data")
    assert steps == {name: [2, 4, 6] for name in expected} | {f"pictures/{number}": [2] for number in range(2)}


def test_a_finished_training_says_so(
    trained_folder: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "model"))
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    # Other settings of the trainer do not replace those that it was trained with.
    system = train(one_convolution_config(data={"path": str(records)}, steps=3), folder)
    assert capsys.readouterr().out == f"Model folder '{folder}' is already trained to step 6.\n"
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
    stored = variables_of(list_checkpoints(folder)[-1])
    assert any(np.array_equal(system.weights[0].numpy(), value) for value in stored.values())


def test_progress_is_printed(
    trained_folder: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "model"))
    train(one_convolution_config(data={"path": str(records)}, steps=10), folder)
    first, *lines = capsys.readouterr().out.splitlines()
    assert re.fullmatch(
        r"Training on 1 [CG]PU: \d+ images, [\d,]+ parameters, 10 steps of \d images, \d+\.\d epochs\.", first
    )
    assert [line.split()[1] for line in lines] == ["8/10", "10/10"]
    assert all("semantic" in line and "loss" in line for line in lines)


def test_loops_end_where_something_is_due(
    registered: None, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = one_convolution_config(data={"path": str(records)}, steps=10, log_every=3, checkpoint_every=4)
    train(config, tmp_path)
    # Multiples of 3 are logged, those of 4 saved, and the end is both.
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()[1:]]
    assert steps == ["3/10", "6/10", "9/10", "10/10"]
    assert [Path(path).name for path in list_checkpoints(tmp_path)] == ["ckpt-4", "ckpt-8", "ckpt-10"]
    assert list(events_of(tmp_path / "train")["loss"]) == [3, 6, 9, 10]


def test_padding_has_the_mean_color(
    registered: None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {}

    def record(files: Any, **options: Any) -> None:
        asked.update(options)
        raise PowerCut

    monkeypatch.setattr(pipeline, "make_train_dataset", record)
    with pytest.raises(PowerCut):
        train(one_convolution_config(data={"path": str(records)}), tmp_path)
    # The system's mean is 127.5, which rounds to even.
    assert asked["pad_value"] == (128, 128, 128)


@pytest.mark.parametrize(
    ("name", "words"),
    [("center", "Loss 'center'"), ("loss", "The sum of the losses"), ("gradient_norm", "The gradient")],
)
def test_the_first_value_that_is_not_finite_stops(
    trained_folder: Path, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, words: str
) -> None:
    folder = Path(shutil.copytree(trained_folder, tmp_path / "model"))
    config = one_convolution_config(data={"path": str(records)}, steps=12, log_every=4)
    original = Trainer.replica_step

    def spoiled_from_step_7(self: Trainer, batch: dict[str, Any], is_last: bool) -> dict[str, Any]:
        """One value, and from step 8 on all: both steps are in the loop from 6 to 8."""
        values = original(self, batch, is_last)
        values = {"semantic": values.pop("semantic"), "center": tf.constant(0.0), **values}
        step = self._optimizer.iterations.value
        return {key: tf.where(step >= (7 if key == name else 8), np.nan, value) for key, value in values.items()}

    monkeypatch.setattr(Trainer, "replica_step", spoiled_from_step_7)
    # Step 7 is batch number 6, as the first is number 0.
    info = DatasetInfo.load(records)
    batches = pipeline.make_train_dataset(
        list_shards(records, "train"),
        DataConfig(crop_size=(16, 24)),
        make_targets=lambda panoptic: {},
        dataset_info=info,
        batch_size=2,
        pad_value=(128, 128, 128),
        seed=config.trainer.seed,
        start_step=6,
    )
    first, second = (name.decode() for name in next(iter(batches))["image_id"].numpy())
    message = rf"^{words} is not finite in step 7 on images '{first}', '{second}'; lower trainer.learning_rate"
    with pytest.raises(UserError, match=message):
        train(config, folder)
    assert [Path(path).name for path in list_checkpoints(folder)] == ["ckpt-4", "ckpt-6"]


def test_a_learning_rate_that_is_too_high_stops(registered: None, records: Path, tmp_path: Path) -> None:
    config = one_convolution_config(data={"path": str(records)}, learning_rate=1e30, optimizer={"name": "sgd"})
    message = (
        r"(Loss 'semantic'|The gradient) is not finite in step [23] on images 'scene_.*, and start again, as there "
        r"is no checkpoint yet\. Its images, labels and targets are in"
    )
    with pytest.raises(UserError, match=message):
        train(config, tmp_path)
    assert list_checkpoints(tmp_path) == []


def test_a_loss_that_is_not_finite_on_images_that_are_gone(
    registered: None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied = Path(shutil.copytree(records, tmp_path / "records"))
    original = Trainer.check_values

    def without_records(self: Trainer) -> None:
        for file in copied.glob("train-*"):
            file.unlink()
        original(self)

    monkeypatch.setattr(Trainer, "check_values", without_records)
    config = one_convolution_config(data={"path": str(copied)}, learning_rate=1e30, optimizer={"name": "sgd"}, steps=3)
    with pytest.raises(
        UserError, match=r"^\D* is not finite in step [23]; lower trainer.learning_rate.*checkpoint yet\.$"
    ):
        train(config, tmp_path / "model")


def test_precision_is_this_trainings_alone(registered: None, records: Path, tmp_path: Path) -> None:
    system = train(one_convolution_config(data={"path": str(records)}, steps=1, precision="mixed_bfloat16"), tmp_path)
    assert system.compute_dtype == "bfloat16"
    assert {weight.dtype for weight in system.weights} == {"float32"}
    assert keras.config.dtype_policy().name == "float32"


def test_every_seed_that_the_config_allows_can_be_set() -> None:
    keras.utils.set_random_seed(one_convolution_config(seed=2**32 - 1).trainer.seed)
    with pytest.raises(ValueError, match="less than or equal to 4294967295"):
        one_convolution_config(seed=2**32)


def test_what_does_not_fit_is_refused(registered: None, records: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"Config key 'data.path' is not set; give a folder that `deeplab2-like convert`"
    ):
        train(one_convolution_config(), tmp_path / "model")
    with pytest.raises(UserError, match=r"Folder '.*nowhere' does not exist"):
        train(one_convolution_config(data={"path": str(tmp_path / "nowhere")}), tmp_path / "model")
    with pytest.raises(UserError, match="has no split 'test'; splits there: train, val"):
        train(one_convolution_config(data={"path": str(records), "train_split": "test"}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_training_on_two_splits(registered: None, records: Path, tmp_path: Path) -> None:
    config = one_convolution_config(data={"path": str(records), "train_split": "val+train"})
    run = run_module.make_run(config, tmp_path, tf.distribute.get_strategy())
    assert run.files == [*list_shards(records, "val"), *list_shards(records, "train")]
    with pytest.raises(UserError, match="has no split 'test'; splits there: train, val"):
        train(one_convolution_config(data={"path": str(records), "train_split": "train+test"}), tmp_path / "model")


def test_records_without_examples(registered: None, records: Path, tmp_path: Path) -> None:
    DatasetInfo.load(records).save(tmp_path)
    (tmp_path / "train-00000-of-00001.tfrecord").touch()
    with pytest.raises(UserError, match="hold no examples"):
        train(one_convolution_config(data={"path": str(tmp_path)}), tmp_path / "model")
    assert not (tmp_path / "model").exists()


def events_of(folder: Path) -> dict[str, dict[int, Any]]:
    """TensorBoard's tags, and for each the values by step."""
    found: dict[str, dict[int, Any]] = {}
    for file in sorted(folder.glob("events*")):
        for record in tf.data.TFRecordDataset(str(file)).as_numpy_iterator():
            event = tf.compat.v1.Event.FromString(record)
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = tf.make_ndarray(value.tensor)
    return found


def test_pictures_of_the_same_images(registered: None, records: Path, tmp_path: Path) -> None:
    config = one_convolution_config(data={"path": str(records)}, steps=12, log_every=3, pictures_every=5)
    train(config, tmp_path)
    pictures = {tag: values for tag, values in events_of(tmp_path / "train").items() if tag.startswith("pictures/")}
    # With the first line, and at multiples of five.
    assert {tag: list(values) for tag, values in pictures.items()} == {f"pictures/{n}": [3, 5, 10] for n in range(2)}
    width, height, *encoded = pictures["pictures/0"][10]
    picture = tf.io.decode_png(encoded[0]).numpy()
    assert picture.shape == (int(height), int(width), 3)
    # Image and ground truth, in the left two thirds, stay; the prediction changes.
    before = tf.io.decode_png(pictures["pictures/0"][3][2]).numpy()
    third = picture.shape[1] // 3
    np.testing.assert_array_equal(picture[:, : 2 * third - 8], before[:, : 2 * third - 8])
    assert (picture[:, 2 * third :] != before[:, 2 * third :]).any()


def test_without_validation_split_there_are_no_pictures(registered: None, records: Path, tmp_path: Path) -> None:
    data = {"path": str(records), "val_split": "other"}
    train(one_convolution_config(data=data, steps=2), tmp_path / "model")
    assert not any(tag.startswith("pictures/") for tag in events_of(tmp_path / "model" / "train"))
    message = r"has no split 'other'; .* Key trainer.evaluate_every needs it; leave that key out to do without"
    with pytest.raises(UserError, match=message):
        train(one_convolution_config(data=data, evaluate_every=2), tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("ema_decay", [None, 0.5])
def test_evaluation_keeps_the_best(
    registered: None,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    ema_decay: float | None,
) -> None:
    qualities = iter([20.0, 30.0, 10.0])
    weights = []
    traces = []
    original = Validation.evaluate

    def pretended(self: Validation) -> dict[str, Any]:
        metrics = original(self)
        assert metrics is not None
        metrics["panoptic"]["all"]["pq"] = next(qualities)
        with self.evaluated_weights():
            weights.append([weight.numpy() for weight in self._system.weights])
        traces.append(self.infer.experimental_get_tracing_count())
        return metrics

    monkeypatch.setattr(Validation, "evaluate", pretended)
    config = one_convolution_config(
        data={"path": str(records)}, steps=7, evaluate_every=3, checkpoint_every=5, ema_decay=ema_decay
    )
    plain = train(
        config.model_copy(update={"trainer": config.trainer.model_copy(update={"evaluate_every": None})}),
        tmp_path / "plain",
    )
    system = train(config, tmp_path / "model")
    # At 3, 6, and at the end; nothing is traced again.
    assert next(qualities, None) is None
    assert traces == [1, 1, 1]
    said = [line for line in capsys.readouterr().out.splitlines() if "PQ" in line]
    assert said == [
        "step 3/7  PQ 20.00 on split 'val', the best so far",
        "step 6/7  PQ 30.00 on split 'val', the best so far",
        "step 7/7  PQ 10.00 on split 'val'",
    ]
    _, best, step = load_model_folder(tmp_path / "model", checkpoint="best")
    assert step == 6
    for weight, expected in zip(best.weights, weights[1], strict=True):
        np.testing.assert_array_equal(weight, expected)
    assert {tuple(values) for values in events_of(tmp_path / "model" / "val").values()} == {(3, 6, 7)}
    # Looking changes nothing; what is returned is what is evaluated last, and what is loaded.
    _, last, step = load_model_folder(tmp_path / "model")
    assert step == 7
    for one, other, evaluated, loaded in zip(system.weights, plain.weights, weights[2], last.weights, strict=True):
        np.testing.assert_array_equal(one, other)
        np.testing.assert_array_equal(one, evaluated)
        np.testing.assert_array_equal(one, loaded)


def terminate_evaluation(patch: pytest.MonkeyPatch, *, number: int) -> None:
    """Has one of a training's evaluations, counted from 0, cut short by SIGTERM."""
    original = Validation.evaluate
    numbers = itertools.count()

    def evaluate(self: Validation) -> dict[str, Any] | None:
        if next(numbers) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    patch.setattr(Validation, "evaluate", evaluate)


@pytest.mark.parametrize(("number", "step"), [(0, 3), (1, 5)])
def test_an_evaluation_that_is_cut_short_is_made_up_for(
    registered: None,
    records: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    number: int,
    step: int,
) -> None:
    # Evaluated at 3 and, as the last step, at 5.
    config = one_convolution_config(data={"path": str(records)}, steps=5, evaluate_every=3, pictures_every=None)
    for again in range(2):  # Also the one at a start may be cut short.
        with monkeypatch.context() as patch:
            terminate_evaluation(patch, number=0 if again else number)
            with pytest.raises(SystemExit) as stop:
                train(config, tmp_path)
        assert stop.value.code == 143
        message = f"Stopped by SIGTERM after step {step} of 5, which is saved; run the same command again to resume"
        assert capsys.readouterr().out.splitlines()[-1] == f"{message} from '{tmp_path}'."
        assert Path(list_checkpoints(tmp_path)[-1]).name == f"ckpt-{step}"
        assert len(list(tmp_path.glob("val/events*"))) == number
    train(config, tmp_path)
    said = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines() if "PQ" in line]
    assert said == ["step 3/5", "step 5/5"][number:]
    assert set(events_of(tmp_path / "val")["panoptic/pq"]) == {3, 5}
    metrics = json.loads((tmp_path / "val" / "metrics.json").read_text())
    assert metrics["panoptic"]["all"]["pq"] == pytest.approx(events_of(tmp_path / "val")["panoptic/pq"][5], rel=1e-5)
    assert metrics["evaluation"] == {"model_dir": str(tmp_path), "step": 5, "split": "val", "images": 2}
    # Now there is nothing left to do.
    train(config, tmp_path)
    assert capsys.readouterr().out == f"Model folder '{tmp_path}' is already trained to step 5.\n"


def test_what_is_due_is_saved_before_pictures_and_evaluation(
    registered: None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def die(*arguments: Any) -> None:
        raise PowerCut

    for number, (name, step) in enumerate((("draw", 4), ("draw", 3), ("evaluate", 3))):
        folder = tmp_path / str(number)
        config = one_convolution_config(
            data={"path": str(records)},
            steps=step if number == 1 else 9,
            log_every=10,
            pictures_every=step if name == "draw" else None,
            evaluate_every=3 if name == "evaluate" else None,
        )
        with monkeypatch.context() as patch:
            patch.setattr(Validation, name, die)
            with pytest.raises(PowerCut):
                train(config, folder)
        assert [Path(path).name for path in list_checkpoints(folder)] == [f"ckpt-{step}"]


@pytest.mark.parametrize(
    ("before", "now", "key"),
    [
        ({}, {"optimizer": {"name": "sgd"}}, "optimizer.name 'adam', whose checkpoints lack variables for 'sgd'"),
        ({"optimizer": {"name": "sgd", "momentum": 0}}, {"optimizer": {"name": "sgd"}}, "optimizer.momentum 0.0"),
        ({"optimizer": {"multipliers": {"norm": 0}}}, {}, r"optimizer.multipliers \{'norm': 0.0\}"),
        ({}, {"ema_decay": 0.5}, "ema_decay None, whose checkpoints lack variables for 0.5"),
        ({}, {"precision": "mixed_float16"}, "precision 'float32'"),
    ],
)
def test_changes_that_cannot_be_resumed_name_their_key(
    registered: None, records: Path, tmp_path: Path, before: dict[str, Any], now: dict[str, Any], key: str
) -> None:
    data = {"path": str(records)}
    train(one_convolution_config(data=data, steps=1, pictures_every=None, **before), tmp_path)
    with pytest.raises(UserError, match=rf"holds a run with trainer.{key}.*; set that key back, or use another"):
        train(one_convolution_config(data=data, steps=2, pictures_every=None, **now), tmp_path)
    # They are refused because they do not work.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_module, "_check_changes", lambda *arguments: None)
        with pytest.raises(UserError, match="does not fit the config"):
            train(one_convolution_config(data=data, steps=2, pictures_every=None, **now), tmp_path)


def test_changes_that_can_be_resumed(registered: None, records: Path, tmp_path: Path) -> None:
    data = {"path": str(records)}
    sgd = {"name": "sgd", "momentum": 0.9}
    train(one_convolution_config(data=data, steps=1, ema_decay=0.9, optimizer=sgd, pictures_every=None), tmp_path)
    half = one_convolution_config(
        data=data, steps=2, precision="mixed_float16", optimizer=sgd, pictures_every=None, checkpoint_every=9
    )
    train(half, tmp_path / "half")
    train(one_convolution_config(data=data, steps=3, optimizer=sgd, pictures_every=None), tmp_path / "half")
    stored = variables_of(list_checkpoints(tmp_path / "half")[-1])
    assert [stored[name] for name in stored if "optimizer" in name and "iteration" in name] == [3]
    changes = {
        "steps": 3,
        "batch_size": 4,
        "accumulate_steps": 2,
        "learning_rate": 0.02,
        "optimizer": {"name": "sgd", "momentum": 0, "clip_norm": 1.0, "multipliers": {"convolution": 0, "norm": 0.5}},
        "schedule": {"name": "constant"},
        "precision": "mixed_bfloat16",
        "strategy": "mirrored",
    }
    train(one_convolution_config(data=data, pictures_every=None, **changes), tmp_path)
    assert load_model_folder(tmp_path)[2] == 3


def test_freezing_random_weights_warns(
    trained_folder: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    optimizer = {"multipliers": {"convolution": 0, "norm": 0.5}}
    config = one_convolution_config(data={"path": str(records)}, steps=1, optimizer=optimizer, pictures_every=None)
    train(config, tmp_path / "tuned", init_from=trained_folder)
    assert capsys.readouterr().err == ""
    train(config, tmp_path / "fresh")
    assert capsys.readouterr().err == (
        "Warning: trainer.optimizer.multipliers freezes convolution with random weights; give trained ones with "
        "--init-from or `model.backbone.weights`.\n"
    )


def test_a_profile_is_recorded(
    registered: None, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(one_convolution_config(data={"path": str(records)}), tmp_path, profile=2)
    assert list((tmp_path / "train" / "plugins" / "profile").rglob("*.xplane.pb"))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(("steps_left", "recorded"), [(6, "3"), (3, "none"), (1, "none")])
def test_too_few_steps_to_profile(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], steps_left: int, recorded: str
) -> None:
    StepProfiler(tmp_path, 5, steps_left=steps_left)
    assert f"Warning: {recorded} of the 5 steps to profile will be recorded, as {steps_left} are" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("precision", ["float32", "mixed_float16"])
def test_everything_at_once_resumes_exactly(registered: None, records: Path, tmp_path: Path, precision: str) -> None:
    def settings(steps: int) -> Any:
        return one_convolution_config(
            data={"path": str(records)},
            steps=steps,
            accumulate_steps=2,
            ema_decay=0.8,
            precision=precision,
            schedule={"name": "step", "boundaries": [4], "warmup_steps": 3, "warmup_start": 0.1},
            optimizer={"name": "sgd", "multipliers": {"convolution": 0.5, "norm": 0}, "weight_decay": 1e-4},
        )

    train(settings(6), tmp_path / "straight")
    train(settings(3), tmp_path / "cut")
    train(settings(6), tmp_path / "cut")
    straight, resumed = (variables_of(list_checkpoints(tmp_path / name)[-1]) for name in ("straight", "cut"))
    different = [name for name in straight if not np.array_equal(straight[name], resumed[name])]
    assert [name for name in different if "save_counter" not in name] == []
    assert any("loss_scale" in name for name in straight) == (precision == "mixed_float16")


def test_out_of_memory_says_what_to_reduce(
    registered: None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Trainer, iterator: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(Trainer, "train_step", full)
    message = (
        r"^Out of memory with trainer.batch_size 2 and data.crop_size 16x24; lower trainer.batch_size .*"
        r"trainer.accumulate_steps.*lower data.crop_size, set trainer.precision=mixed_bfloat16"
    )
    with pytest.raises(UserError, match=message):
        train(one_convolution_config(data={"path": str(records)}), tmp_path)


def test_a_full_disk_is_no_lack_of_memory(
    registered: None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Trainer, iterator: Any) -> None:
        raise tf.errors.ResourceExhaustedError(None, None, "/somewhere/ckpt-4; No space left on device")

    monkeypatch.setattr(Trainer, "train_step", full)
    with pytest.raises(UserError, match=r"^Cannot write '.*' \(No space left on device\); choose a folder that can"):
        train(one_convolution_config(data={"path": str(records)}), tmp_path)


def test_the_batch_of_a_loss_that_is_not_finite_is_saved(
    registered: None, records: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    original = Trainer.replica_step

    def spoiled(self: Trainer, batch: dict[str, Any], is_last: bool) -> dict[str, Any]:
        tf.py_function(lambda image: seen.append(image.numpy()), [batch["image"]], [])
        values = original(self, batch, is_last)
        return {**values, "semantic": tf.where(self._optimizer.iterations.value >= 3, np.nan, values["semantic"])}

    monkeypatch.setattr(Trainer, "replica_step", spoiled)
    config = one_convolution_config(data={"path": str(records)}, accumulate_steps=2)
    with pytest.raises(UserError, match=r"Loss 'semantic' is not finite in step 3 .* targets are in '.*step_3'\.$"):
        train(config, tmp_path)
    folder = tmp_path / "non_finite_step_3"
    # The fifth and the sixth batch of two.
    images = [cv2.imread(str(path))[..., ::-1] for path in sorted(folder.glob("*.png"))]
    np.testing.assert_array_equal(images, np.concatenate(seen[4:6]))
    targets = np.load(folder / "targets.npz")
    assert set(targets) == {"panoptic", "classes", "weight"}
    np.testing.assert_array_equal(targets["panoptic"] // 1000, targets["classes"])
    assert targets["classes"].shape == (4, 16, 24)


def test_starting_from_another_training(
    trained_folder: Path, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Another number of classes: the last layer does not fit.
    for path in records.iterdir():
        shutil.copy(path, tmp_path)
    info = DatasetInfo.load(records)
    extra = dataclasses.replace(info.categories[-1], id=99, name="more")
    dataclasses.replace(info, categories=(*info.categories, extra)).save(tmp_path)
    config = one_convolution_config(data={"path": str(tmp_path)}, learning_rate=1e-30, steps=1)
    capsys.readouterr()
    system = train(config, tmp_path / "tuned", init_from=trained_folder)
    classes = info.num_classes
    out = capsys.readouterr().out.splitlines()
    assert out[:4] == [
        f"Started from '{trained_folder}/checkpoints/ckpt-6': 6 of 8 weights fit.",
        "Left out: 2",
        f"  one_convolution/logits/bias ({classes}, here {classes + 1})",
        f"  one_convolution/logits/kernel (1x1x4x{classes}, here 1x1x4x{classes + 1})",
    ]
    _, source, _ = load_model_folder(trained_folder)
    same = [
        weight.path
        for weight, origin in zip(system.weights, source.weights, strict=True)
        if weight.shape == origin.shape and "moving" not in weight.path and np.array_equal(weight, origin)
    ]
    assert len(same) == 4

    train(
        config.model_copy(update={"trainer": config.trainer.model_copy(update={"steps": 2})}),
        tmp_path / "tuned",
        init_from=trained_folder,
    )
    first = capsys.readouterr().out.splitlines()[0]
    assert first == f"Resuming from step 1 of '{tmp_path / 'tuned'}'; '{trained_folder}' is not used."


def test_starting_from_what_does_not_fit(trained_folder: Path, records: Path, tmp_path: Path) -> None:
    config = one_convolution_config(data={"path": str(records)}, model={"channels": 5})
    with pytest.raises(UserError, match=r"'.*nowhere' to start from does not exist; give a model folder"):
        train(config, tmp_path, init_from=tmp_path / "nowhere")
    # A checkpoint by its path: of the network only the bias of the logits is of the same shape.
    train(config, tmp_path / "some", init_from=list_checkpoints(trained_folder)[0])


def test_freezing_everything_is_refused(registered: None, records: Path, tmp_path: Path) -> None:
    everything = {"convolution": 0, "norm": 0, "logits": 0}
    with pytest.raises(UserError, match="multipliers freezes the whole network; leave a part to train"):
        train(one_convolution_config(data={"path": str(records)}, optimizer={"multipliers": everything}), tmp_path)
