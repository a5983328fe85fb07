import keras
import numpy as np
import pytest

from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.backbone.mobilenet_v3 import (
    LARGE,
    SMALL,
    FinalConvolution,
    MobileNetV3,
    SqueezeExcite,
    Stages,
    halve_last_stage,
)
from deeplab2_like.model.config import BackboneConfig, Norm

NORM = Norm(kind="batch")


@pytest.mark.parametrize(("stages", "trainable"), [(LARGE, 2_971_952), (SMALL, 927_008)])
def test_size_is_that_of_keras_applications(stages: Stages, trainable: int) -> None:
    backbone = MobileNetV3(stages=stages, norm=NORM)
    backbone(keras.KerasTensor((1, 64, 64, 3)))
    # The trainable weights of keras.applications.MobileNetV3Large and -Small without their tops.
    assert sum(int(np.prod(weight.shape)) for weight in backbone.trainable_weights) == trainable


@pytest.mark.parametrize(("stages", "channels"), [(LARGE, 480), (SMALL, 288)])
def test_last_stage_is_halved(stages: Stages, channels: int) -> None:
    halved = halve_last_stage(stages)
    assert {key: halved[key] for key in halved if key != "res5"} == {
        key: stages[key] for key in stages if key != "res5"
    }
    first, second, third, final = halved["res5"]
    assert first.expansion == stages["res5"][0].expansion  # Follows from the stage before.
    assert first.filters == second.filters == third.filters == stages["res5"][0].filters // 2
    assert second.expansion == third.expansion == channels
    assert final == FinalConvolution(channels)


def test_last_stage_keeps_its_channels_if_asked() -> None:
    backbone = build_backbone(BackboneConfig(name="mobilenet_v3_large", halve_last_stage=False), norm=NORM)
    assert backbone.channels["res5"] == 960
    assert build_backbone(BackboneConfig(name="mobilenet_v3_large"), norm=NORM).channels["res5"] == 480


def test_dilation_takes_the_place_of_stride() -> None:
    backbone = build_backbone(BackboneConfig(name="mobilenet_v3_large", output_stride=8), norm=NORM)
    convolutions = {
        stage.name: [block.depthwise.conv for block in stage.blocks if hasattr(block, "depthwise")]
        for stage in backbone.stages
    }
    assert {name: [conv.dilation_rate[0] for conv in group] for name, group in convolutions.items()} == {
        "stem": [1],
        "res2": [1, 1],
        "res3": [1, 1, 1],
        # The first of each stage lost its stride.
        "res4": [1, 2, 2, 2, 2, 2],
        "res5": [2, 4, 4],
    }
    assert [group[0].strides[0] for group in convolutions.values()] == [1, 2, 2, 1, 1]


def test_squeeze_excite_weighs_channels_by_their_means() -> None:
    layer = SqueezeExcite(2)
    layer(np.zeros((1, 2, 2, 2), np.float32))
    # 8 inner channels; the first passes on the mean of channel 0, and makes the weight of channel 1.
    reduce, expand = np.zeros((1, 1, 2, 8), np.float32), np.zeros((1, 1, 8, 2), np.float32)
    reduce[0, 0, 0, 0] = 1
    expand[0, 0, 0, 1] = 1
    layer.reduce.conv.kernel.assign(reduce)
    layer.expand.conv.kernel.assign(expand)
    image = np.array([[[[0.0, 8.0], [2.0, 8.0]], [[4.0, 8.0], [0.0, 8.0]]]], np.float32)
    # Mean of channel 0 is 1.5. Hard sigmoid: clip(x + 3, 0, 6) / 6, so 0.5 for 0 and 0.75 for 1.5.
    weighed = keras.ops.convert_to_numpy(layer(image))
    np.testing.assert_allclose(weighed[..., 0], image[..., 0] * 0.5, rtol=1e-6)
    np.testing.assert_allclose(weighed[..., 1], 6.0, rtol=1e-6)


def test_the_gate_of_squeeze_excite() -> None:
    layer = SqueezeExcite(2, gate="sigmoid")
    layer(np.zeros((1, 1, 1, 2), np.float32))
    layer.expand.conv.kernel.assign(np.zeros((1, 1, 8, 2), np.float32))
    layer.expand.conv.bias.assign([0.0, -np.log(3.0)])
    # Factors 1 / (1 + 1) and 1 / (1 + 3).
    found = layer(np.full((1, 1, 1, 2), 8.0, np.float32))
    np.testing.assert_allclose(keras.ops.convert_to_numpy(found)[0, 0, 0], [4.0, 2.0], rtol=1e-6)
    config = BackboneConfig(name="mobilenet_v3_large", squeeze_gate="sigmoid")
    block = build_backbone(config, norm=NORM).stages[2].blocks[0]
    assert block.squeeze_excite.expand.activation is keras.activations.sigmoid


def test_features_of_depthwise_convolutions() -> None:
    config = BackboneConfig(name="mobilenet_v3_large", output_stride=16, depthwise_features=True)
    backbone = build_backbone(config, norm=NORM)
    images = np.random.default_rng(0).standard_normal((1, 64, 64, 3)).astype(np.float32)
    features = backbone(images)
    # The expansions of the last blocks; res5 ends with a convolution.
    assert backbone.channels == {"stem": 16, "res2": 72, "res3": 120, "res4": 672, "res5": 480}
    assert {name: value.shape[-1] for name, value in features.items()} == backbone.channels
    # The last block of res2, by hand.
    x = backbone.stages[0](images)[0]
    first, last = backbone.stages[1].blocks
    np.testing.assert_allclose(features["res2"], last.depthwise(last.expand(first(x))), atol=1e-6)
    # Later stages start from the outputs of the blocks, so res5 is the same with and without.
    plain = build_backbone(config.model_copy(update={"depthwise_features": False}), norm=NORM)
    plain(images)
    plain.set_weights(backbone.get_weights())
    np.testing.assert_allclose(plain(images)["res5"], features["res5"], atol=1e-6)


def test_squeezed_channels_are_rounded_to_eight() -> None:
    # A quarter of 72 is 18: 16 would lose more than a tenth, so 24. A quarter of 120 is 30: 32.
    assert [SqueezeExcite(channels).reduce.conv.filters for channels in (16, 72, 120, 480)] == [8, 24, 32, 120]


def test_dilations_and_shortcuts_of_earlier_versions() -> None:
    config = BackboneConfig(name="mobilenet_v3_small", output_stride=16, atrous_conversion="detectron2")
    blocks = [block for block in build_backbone(config, norm=NORM).stages[-1].blocks if hasattr(block, "depthwise")]
    assert [block.depthwise.conv.dilation_rate[0] for block in blocks] == [2, 2, 2]
    assert [block.has_shortcut for block in blocks] == [True, True, True]


def test_shortcuts_where_shapes_agree() -> None:
    backbone = build_backbone(BackboneConfig(name="mobilenet_v3_small", output_stride=16), norm=NORM)
    shortcuts = [
        [block.has_shortcut for block in stage.blocks if hasattr(block, "has_shortcut")] for stage in backbone.stages
    ]
    # conv, (16 -> 16, stride 2), (16 -> 24, 24), (24 -> 40, 40, 40, 40 -> 48, 48), (48 -> 48, lost its stride, 48, 48)
    assert shortcuts == [[], [False], [False, True], [False, True, True, False, True], [False, True, True]]
