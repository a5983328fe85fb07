"""Weights of `keras.applications`: the features are those of Keras' network, stage by stage."""

from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

from deeplab2_like.configs import load_config
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.weights.backbones import load_backbone_weights
from deeplab2_like.weights.keras_applications import APPLICATIONS, KERAS_SOURCES

# Keras' own calls of NumPy, while it writes and reads files.
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")

SHAPE = (224, 224, 3)
IMAGE = np.random.default_rng(0).uniform(0, 255, (1, 64, 96, 3)).astype(np.float32)


def build(name: str) -> PanopticSystem:
    # The weights `imagenet` set all the keys that they need.
    overrides = [f"model.backbone={{name: {name}, output_stride: 32, weights: imagenet}}", "model.resize=null"]
    return build_system(load_config("panoptic_deeplab/scenes_tiny", overrides), scenes_info())


def randomize(model: Any) -> Any:
    """Gives a network of Keras biases, scales and statistics that are not the initial ones."""
    random = np.random.default_rng(1)
    for weight in model.weights:
        if weight.name in ("gamma", "moving_variance"):
            weight.assign(random.uniform(0.5, 1.0, weight.shape))
        elif weight.name != "kernel":
            weight.assign(0.2 * random.standard_normal(weight.shape))
    return model


def check_features(system: Any, model: Any, ends: dict[str, Any], image: np.ndarray) -> None:
    """Compares the features of the backbone with tensors of Keras' network, by stage."""
    expected = keras.Model(model.input, ends)(image)
    found = system.backbone(system.prepare_images(IMAGE))
    assert found.keys() == expected.keys()
    for stage, value in expected.items():
        difference = np.abs(np.array(found[stage]) - np.array(value)).max()
        assert difference < 1e-4 * np.array(value).std(), stage


def test_resnet(tmp_path: Path) -> None:
    model = randomize(keras.applications.ResNet50(weights=None, include_top=False, input_shape=(64, 96, 3)))
    file = tmp_path / "resnet50.weights.h5"
    model.save_weights(file)
    system = build("resnet50")
    load_backbone_weights(system, str(file))
    names = {
        "stem": "conv1_relu",
        "res2": "conv2_block3_out",
        "res3": "conv3_block4_out",
        "res4": "conv4_block6_out",
        "res5": "conv5_block3_out",
    }
    ends = {stage: model.get_layer(name).output for stage, name in names.items()}
    check_features(system, model, ends, keras.applications.resnet.preprocess_input(IMAGE.copy()))


def test_mobilenet_with_a_classifier(tmp_path: Path) -> None:
    classifier = randomize(keras.applications.MobileNetV3Small(weights=None, input_shape=SHAPE))
    file = tmp_path / "small.weights.h5"
    classifier.save_weights(file)
    system = build("mobilenet_v3_small")
    load_backbone_weights(system, str(file))
    model = keras.applications.MobileNetV3Small(weights=None, include_top=False, input_shape=(64, 96, 3))
    model.set_weights([weight.numpy() for weight in classifier.weights[: len(model.weights)]])
    # The last blocks of the stages are the first, the third, and the eighth of 11.
    ends = {
        "stem": model.get_layer("expanded_conv_depthwise_pad").input,
        "res2": model.get_layer("expanded_conv_project_bn").output,
        "res3": model.get_layer("expanded_conv_2_add").output,
        "res4": model.get_layer("expanded_conv_7_add").output,
        "res5": model.output,
    }
    check_features(system, model, ends, IMAGE)


def test_imagenet_is_what_keras_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    make = keras.applications.MobileNetV3Large
    made: dict[str, Any] = {}

    def make_random(*, weights: str, **options: Any) -> Any:
        made.update(options, weights=weights, model=randomize(make(weights=None, **options)))
        return made["model"]

    monkeypatch.setattr(keras.applications, "MobileNetV3Large", make_random)
    system: Any = build("mobilenet_v3_large")
    load_backbone_weights(system, "imagenet")
    assert (made["weights"], made["include_top"]) == ("imagenet", False)
    first = made["model"].get_layer("expanded_conv_3_squeeze_excite_conv_1").bias
    block = system.backbone.stages[2].blocks[0]  # The fourth block, the first of res3.
    np.testing.assert_array_equal(block.squeeze_excite.expand.conv.bias, first)
    np.testing.assert_array_equal(
        system.backbone.stages[4].blocks[-1].norm.moving_variance,
        made["model"].get_layer("conv_1_bn").moving_variance,
    )


def test_without_a_network_the_error_names_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(**options: Any) -> Any:
        raise Exception("URL fetch failure on https://example.org/file: None -- no route")

    monkeypatch.setattr(keras.applications, "MobileNetV3Small", fail)
    with pytest.raises(
        UserError,
        match=r"^The ImageNet weights of mobilenet_v3_small could not be downloaded \(URL fetch failure on .*\); "
        r"put Keras' file 'weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5' into the folder '.*models', or set "
        r"model.backbone.weights to its path\.$",
    ):
        load_backbone_weights(build("mobilenet_v3_small"), "imagenet")


def test_names_of_deeper_networks() -> None:
    resnet, mobilenet = (source.name_of for source in KERAS_SOURCES.values())
    assert resnet("res4/block36/conv3/norm/beta", "resnet152") == "conv4_block36_3_bn/beta"
    assert resnet("res4/block2/conv2/kernel", "resnet101") == "conv4_block2_2_conv/kernel"  # Deformable.
    assert resnet("stem/conv2/conv/kernel", "resnet50") is None
    assert mobilenet("res5/block3/depthwise/conv/kernel", "mobilenet_v3_large") == "expanded_conv_14_depthwise/kernel"


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    file = tmp_path / "large.weights.h5"
    keras.Sequential([keras.layers.Input((2,)), keras.layers.Dense(3)]).save_weights(file)
    system = build("mobilenet_v3_small")
    with pytest.raises(
        UserError, match=r"large.weights.h5' are no readable file of keras.applications.MobileNetV3Smal"
    ):
        load_backbone_weights(system, str(file))
    file.write_bytes(b"cut off")
    with pytest.raises(
        UserError, match=r"large.weights.h5' are no readable file of keras.applications.MobileNetV3Smal"
    ):
        load_backbone_weights(system, str(file))
    with pytest.raises(UserError, match=r"Weights '.*none.h5' of config key .* do not exist; give"):
        load_backbone_weights(system, str(tmp_path / "none.h5"))


@pytest.mark.parametrize("name", APPLICATIONS)
def test_every_network_exists(name: str) -> None:
    assert callable(getattr(keras.applications, APPLICATIONS[name]))
