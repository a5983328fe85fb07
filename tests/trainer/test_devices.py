"""Every system takes the same step on one device and on two: losses, dropout, sampling, batch normalization."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from one_convolution import one_convolution_config

from deeplab2_like.data.convert.scenes import convert_scenes
from deeplab2_like.trainer.batches import distribute_batches
from deeplab2_like.trainer.run import make_run
from deeplab2_like.trainer.strategy import make_strategy

ALL = [
    "data.crop_size=[64, 64]",
    "trainer.batch_size=2",
    "trainer.steps=1",
    # The change of the weights is the gradient, scaled to the norm 1.
    "trainer.learning_rate=1.0",
    "trainer.schedule={name: constant, warmup_steps: 0}",
    "trainer.optimizer={name: sgd, momentum: 0.0, clip_norm: 1.0}",
]
# Synchronizing the statistics takes long; one system does it.
FROZEN = "model.norm.kind=frozen_batch"
DETECTOR = [
    FROZEN,
    "model.fpn.channels=32",
    "model.semantic.channels=32",
    "model.rpn.channels=16",
    "model.rpn.samples=32",
    "model.rpn.train_candidates=50",
    "model.rpn.proposals=40",
    "model.roi={samples: 16, box_channels: 32, mask_channels: 16, mask_convolutions: 1}",
]
SYSTEMS = {
    "panoptic_deeplab": [
        "model.aspp={channels: 32, rates: [3], dropout: 0.3}",
        "model.loss.top_k_share=0.2",
        "model.norm.kind=sync_batch",
    ],
    "panoptic_fpn": DETECTOR,
    "panoptic_fcn": [FROZEN, "model.fpn.channels=32", "model.head.channels=32", "model.encoder.semantic_channels=32"],
    "lpsnet": [FROZEN, "model.fpn.channels=32", "model.context.channels=32", "model.box.channels=32"],
    "unifying": [*DETECTOR, "model.loss.max_detections=8"],
}


@pytest.fixture(scope="module")
def steps(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    records = tmp_path_factory.mktemp("records")
    convert_scenes(train=2, val=1, size=(64, 64), output_dir=records)
    configs = {
        name: (f"{name}/scenes_tiny", [*ALL, *overrides, f"data.path={records}"]) for name, overrides in SYSTEMS.items()
    }
    command = [sys.executable, str(Path(__file__).with_name("devices_process.py")), json.dumps(configs)]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
    assert finished.returncode == 0, finished.stderr[-3000:]
    return dict(json.loads(finished.stdout.splitlines()[-1]))


@pytest.mark.parametrize("name", SYSTEMS)
def test_two_devices_take_the_step_of_one(steps: dict[str, Any], name: str) -> None:
    step = steps[name]
    assert step["weights"] > 50
    assert step["change"] > 1e-2
    # Rounding differs with the size of the batch, and grows through the layers.
    assert step["difference"] < 1e-5


def test_accumulated_batches_have_numbers_of_their_own(registered: None, records: Path, tmp_path: Path) -> None:
    config = one_convolution_config(data={"path": str(records)}, batch_size=2, accumulate_steps=2)
    batches = iter(distribute_batches(make_run(config, tmp_path, make_strategy("one_device")), start_step=3))
    # Each of the three steps before has taken two batches of two examples.
    numbers = [next(batches)["targets"]["number"].numpy().tolist() for _ in range(2)]
    assert numbers == [[12, 13], [14, 15]]
