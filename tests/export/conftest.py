"""One small system and its export, made once: tracing the signatures takes most of these tests' time."""

from pathlib import Path

import keras
import numpy as np
import pytest

from deeplab2_like.configs import Config, load_config
from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.export.options import ExportOptions
from deeplab2_like.export.saved_model import export_saved_model
from deeplab2_like.model import PanopticSystem, build_system


@pytest.fixture(scope="session")
def small_config() -> Config:
    widths = {
        "aspp.channels": "8",
        "decoder.low_level_channels": "{res2: 8}",
        "decoder.instance_low_level_channels": "{res2: 8}",
        "decoder.semantic_channels": "8",
        "decoder.semantic_head_channels": "8",
        "decoder.instance_channels": "8",
        "decoder.instance_head_channels": "8",
        "postprocess.top_k": "20",
    }
    return load_config("panoptic_deeplab/scenes_tiny", [f"model.{key}={value}" for key, value in widths.items()])


@pytest.fixture(scope="session")
def small_system(small_config: Config) -> PanopticSystem:
    """Untrained, but with random predictors whose outputs vary about zero, so that it sees classes and instances."""
    keras.utils.set_random_seed(1)
    system = build_system(small_config, scenes_info())
    random = np.random.default_rng(0)
    heads = {"semantic_logits": system.semantic_head, "center": system.center_head, "offset": system.offset_head}
    for head in heads.values():
        head.predictor.kernel.assign(random.standard_normal(head.predictor.kernel.shape))
    outputs = system(render_scene(0, height=64, width=64)[0][None], training=False)
    for name, head in heads.items():
        mean, deviation = (function(outputs[name], axis=(0, 1, 2)) for function in (np.mean, np.std))
        head.predictor.kernel.assign(head.predictor.kernel / deviation)
        stride = system.stride if name == "offset" else 1
        head.predictor.bias.assign(-mean / (stride * deviation))
    return system


@pytest.fixture(scope="session")
def export_dir(small_system: PanopticSystem, small_config: Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all signatures; `test_saved_model.py` compares them with the system, so the export itself does not."""
    folder = tmp_path_factory.mktemp("export") / "exported"
    options = ExportOptions(max_pixels=64 * 8000, xla=True)
    return export_saved_model(small_system, folder, config=small_config, step=7, options=options, check=False)


@pytest.fixture(scope="session")
def make_image():
    """Renders a scene of any size, uint8 [H, W, 3]."""

    def make(height: int, width: int, index: int = 0) -> np.ndarray:
        return render_scene(index, height=max(height, 16), width=max(width, 16))[0][:height, :width]

    return make
