"""The training loop: exact resuming, several devices, what it writes, and when it refuses or stops."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from one_convolution import one_convolution_config

from deeplab2_like.configs import load_config
from deeplab2_like.data import pipeline, tfrecord
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.trainer.checkpoint import list_checkpoints
from deeplab2_like.trainer.train import Trainer, train

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
        if int(self._optimizer.iterations) == 3:
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
    # Weights, running statistics, the optimiser's slots and step, the states of random generators.
    for part in ("kernel", "gamma", "moving_variance", "optimizer", "iterations", "generators"):
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
        "model.aspp.dropout=0.0",  # Which values are dropped depends on the devices.
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
            assert np.isfinite(tf.make_ndarray(value.tensor))
    # Six steps, every second one is logged.
    expected = ("semantic", "loss", "learning_rate", "gradient_norm", "steps_per_second")
    assert steps == {name: [2, 4, 6] for name in expected}


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
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == ["8/10", "10/10"]
    assert all("semantic" in line and "loss" in line for line in lines)


def test_loops_end_where_something_is_due(
    registered: None, records: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = one_convolution_config(data={"path": str(records)}, steps=10, log_every=3, checkpoint_every=4)
    train(config, tmp_path)
    # Multiples of 3 and of 4, and the end.
    steps = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert steps == ["3/10", "4/10", "6/10", "8/10", "9/10", "10/10"]
    assert [Path(path).name for path in list_checkpoints(tmp_path)] == ["ckpt-4", "ckpt-8", "ckpt-10"]


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

    def spoilt_from_step_7(self: Trainer, batch: dict[str, Any]) -> dict[str, Any]:
        """One value, and from step 8 on all: both steps are in the loop from 6 to 8."""
        values = original(self, batch)
        values = {"semantic": values.pop("semantic"), "center": tf.constant(0.0), **values}
        step = self._optimizer.iterations.value
        return {key: tf.where(step >= (7 if key == name else 8), np.nan, value) for key, value in values.items()}

    monkeypatch.setattr(Trainer, "replica_step", spoilt_from_step_7)
    # Step 7 is batch number 6, as the first is number 0.
    info = DatasetInfo.load(records)
    batches = pipeline.make_train_dataset(
        tfrecord.list_shards(records, "train"),
        make_targets=lambda panoptic: {},
        dataset_info=info,
        batch_size=2,
        crop_size=(16, 24),
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
    with pytest.raises(UserError, match=r"(Loss 'semantic'|The gradient) is not finite in step [23] on images 'scene_"):
        train(config, tmp_path)
    assert list_checkpoints(tmp_path) == []


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


def test_records_without_examples(registered: None, records: Path, tmp_path: Path) -> None:
    DatasetInfo.load(records).save(tmp_path)
    (tmp_path / "train-00000-of-00001.tfrecord").touch()
    with pytest.raises(UserError, match="hold no examples"):
        train(one_convolution_config(data={"path": str(tmp_path)}), tmp_path / "model")
    assert not (tmp_path / "model").exists()
