"""Weights are saved by their paths: checkpoints of earlier versions load only if these stay as they are."""

from pathlib import Path

import pytest

from deeplab2_like.configs import load_config
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.model import SYSTEMS, build_system

FOLDER = Path(__file__).parents[1] / "data" / "weight_paths"
# Where `scenes_tiny` has another network today, the one of the stored paths.
OVERRIDES = {
    "panoptic_fcn": [
        "model.fpn={channels: 64, finest_level: p2}",
        "model.size_ranges={p3: [1, 32], p4: [16, 64], p5: [32, 256]}",
        "model.head.deformable=true",
        "model.encoder.semantic_channels=64",
    ]
}


@pytest.mark.parametrize("name", sorted(SYSTEMS))
def test_paths_and_shapes_stay(name: str) -> None:
    system = build_system(load_config(f"{name}/scenes_tiny", OVERRIDES.get(name, [])), scenes_info())
    lines = [f"{weight.path} {'x'.join(map(str, weight.shape))}" for weight in system.weights]
    assert sorted(lines) == (FOLDER / f"{name}.txt").read_text().splitlines()
