import keras
import numpy as np
import pytest

from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.backbone.resnet import STAGES, BlockKind, ResidualBlock, Stem, StemLayer, atrous_stages
from deeplab2_like.model.config import AtrousConversion, BackboneConfig, Norm
from deeplab2_like.model.deformable import DeformableConvNorm

NORM = Norm(kind="batch")


@pytest.mark.parametrize("name", ["resnet_tiny", "mobilenet_v3_large", "mobilenet_v3_small", "efficientnet_lite2"])
@pytest.mark.parametrize(
    ("output_stride", "strides"),
    [
        (8, {"stem": 2, "res2": 4, "res3": 8, "res4": 8, "res5": 8}),
        (16, {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 16}),
        (32, {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}),
    ],
)
def test_backbones_return_the_features_they_declare(name: str, output_stride: int, strides: dict[str, int]) -> None:
    backbone = build_backbone(BackboneConfig(name=name, output_stride=output_stride), norm=NORM)
    features = backbone(keras.KerasTensor((2, 64, 96, 3)))
    assert backbone.strides == strides
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        key: (2, 64 // stride, 96 // stride, backbone.channels[key]) for key, stride in strides.items()
    }


def test_size_is_that_of_the_classifier_without_its_last_layer() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet101", stem="seven_by_seven"), norm=NORM)
    features = backbone(keras.KerasTensor((1, 64, 96, 3)))
    # The network for ImageNet holds 44,549,160 parameters; 2,049,000 are the last layer's.
    assert sum(int(np.prod(weight.shape)) for weight in backbone.trainable_weights) == 42_500_160
    assert backbone.channels == {"stem": 64, "res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
    assert {key: tuple(value.shape) for key, value in features.items()} == {
        key: (1, 64 // stride, 96 // stride, backbone.channels[key]) for key, stride in backbone.strides.items()
    }


# The classifiers of 101 layers hold 88,791,336 (32x8d) and 83,455,272 (64x4d) parameters, 2,049,000 of them in the last
# layer. 152 layers are 4 more blocks in res3 (512 * 512 * 2 + 9 * 16 * 512, and 6 * 512 of normalization) and 13 more
# in res4, twice as wide.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("resnext101_32x8d", 86_742_336),
        ("resnext101_64x4d", 81_406_272),
        ("resnext152_32x8d", 86_742_336 + 4 * 601_088 + 13 * 2_398_208),
    ],
)
def test_resnext_has_groups_and_the_size_of_the_classifier(name: str, parameters: int) -> None:
    backbone = build_backbone(BackboneConfig(name=name, stem="seven_by_seven", output_stride=32), norm=NORM)
    backbone(keras.KerasTensor((1, 64, 64, 3)))
    assert sum(int(np.prod(weight.shape)) for weight in backbone.trainable_weights) == parameters
    assert backbone.channels == {"stem": 64, "res2": 256, "res3": 512, "res4": 1024, "res5": 2048}
    width = 4 if name.endswith("64x4d") else 8
    for position, stage in enumerate(backbone.stages):
        kernel = stage.blocks[-1].convolutions[1].conv.kernel
        assert tuple(kernel.shape) == (3, 3, width * 2**position, 256 * 2**position)


def test_groups_see_only_their_own_channels() -> None:
    block = ResidualBlock(
        BlockKind.BOTTLENECK,
        8,
        strides=1,
        dilation=1,
        stride_in_1x1=False,
        project=False,
        norm=Norm(kind="none"),
        groups=4,
        channels=16,
    )
    convolution = block.convolutions[1]
    x = np.random.default_rng(0).normal(size=(1, 5, 5, 8)).astype(np.float32)
    block(np.zeros((1, 5, 5, 16), np.float32))
    before = keras.ops.convert_to_numpy(convolution(x))
    x[..., 2:4] += 1  # The second of four groups of two channels.
    changed = np.abs(keras.ops.convert_to_numpy(convolution(x)) - before).max(axis=(0, 1, 2)) > 0
    assert set(np.flatnonzero(changed)) <= {2, 3}
    assert changed.any()


def test_tiny_is_small() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet_tiny"), norm=NORM)
    backbone(keras.KerasTensor((1, 64, 64, 3)))
    assert backbone.count_params() == pytest.approx(1_000_000, rel=0.1)


def test_atrous_stages() -> None:
    # (stride of the first block, dilation, stride of the features)
    assert list(atrous_stages(32).values()) == [(1, 1, 4), (2, 1, 8), (2, 1, 16), (2, 1, 32)]
    assert list(atrous_stages(16).values()) == [(1, 1, 4), (2, 1, 8), (2, 1, 16), (1, 2, 16)]
    assert list(atrous_stages(8).values()) == [(1, 1, 4), (2, 1, 8), (1, 2, 8), (1, 4, 8)]


@pytest.mark.parametrize(
    ("conversion", "output_stride", "multi_grid", "res4", "res5"),
    [
        ("exact", 32, (1, 1, 1), [1] * 6, [1, 1, 1]),
        ("exact", 16, (1, 1, 1), [1] * 6, [1, 2, 2]),
        ("exact", 16, (1, 2, 4), [1] * 6, [1, 4, 8]),
        ("exact", 16, (2, 2, 4), [1] * 6, [2, 4, 8]),
        ("exact", 8, (1, 2, 4), [1, 2, 2, 2, 2, 2], [2, 8, 16]),
        ("detectron2", 32, (1, 1, 1), [1] * 6, [1, 1, 1]),
        ("detectron2", 16, (1, 1, 1), [1] * 6, [2, 2, 2]),
        ("detectron2", 16, (1, 2, 4), [1] * 6, [2, 4, 8]),
        ("detectron2", 8, (1, 2, 4), [2] * 6, [4, 8, 16]),
    ],
)
def test_dilations(
    conversion: AtrousConversion,
    output_stride: int,
    multi_grid: tuple[int, int, int],
    res4: list[int],
    res5: list[int],
) -> None:
    config = BackboneConfig(
        name="resnet50", output_stride=output_stride, multi_grid=multi_grid, atrous_conversion=conversion
    )
    stages = {stage.name: stage for stage in build_backbone(config, norm=NORM).stages}
    for stage, expected in (("res3", [1] * 4), ("res4", res4), ("res5", res5)):
        dilations = [block.convolutions[1].conv.dilation_rate for block in stages[stage].blocks]
        assert dilations == [(rate, rate) for rate in expected]


def test_convolutions_after_the_lost_stride_are_dilated() -> None:
    # A basic block has its stride in its first 3x3 convolution. With `stride_in_1x1`, a bottleneck has it before its
    # only 3x3.
    tiny = build_backbone(BackboneConfig(name="resnet_tiny", output_stride=16), norm=NORM).stages[3].blocks[0]
    assert [convolution.conv.dilation_rate[0] for convolution in tiny.convolutions] == [1, 2]
    config = BackboneConfig(name="resnet50", output_stride=16, stride_in_1x1=True)
    block = build_backbone(config, norm=NORM).stages[3].blocks[0]
    assert [convolution.conv.dilation_rate[0] for convolution in block.convolutions] == [1, 2, 1]


@pytest.mark.parametrize(("stride_in_1x1", "strides"), [(False, [1, 2, 1]), (True, [2, 1, 1])])
def test_where_the_stride_is(stride_in_1x1: bool, strides: list[int]) -> None:
    backbone = build_backbone(BackboneConfig(name="resnet50", stride_in_1x1=stride_in_1x1), norm=NORM)
    block = backbone.stages[1].blocks[0]
    assert [convolution.conv.strides[0] for convolution in block.convolutions] == strides


def test_stages_can_be_deformable() -> None:
    config = BackboneConfig(name="resnet50", output_stride=32, deformable_stages=("res4", "res5"))
    backbone = build_backbone(config, norm=NORM)
    deformable = {
        stage.name: {isinstance(block.convolutions[1], DeformableConvNorm) for block in stage.blocks}
        for stage in backbone.stages
    }
    assert deformable == {"res2": {False}, "res3": {False}, "res4": {True}, "res5": {True}}
    # The stride stays where it was.
    assert [block.convolutions[1].strides for block in backbone.stages[3].blocks] == [2, 1, 1]
    assert backbone(np.zeros((1, 32, 32, 3), np.float32))["res5"].shape == (1, 1, 1, 2048)


def test_paths_of_variables() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet_tiny"), norm=NORM)
    backbone(keras.KerasTensor((1, 64, 64, 3)))
    assert {
        "backbone/stem/conv1/conv/kernel",
        "backbone/res2/block1/conv1/conv/kernel",
        "backbone/res2/block1/shortcut/norm/gamma",
        "backbone/res5/block2/conv2/norm/moving_variance",
    } <= {weight.path for weight in backbone.weights}


def test_max_pool_looks_at_both_sides() -> None:
    # One convolution of stride 2 whose kernel copies the upper left pixel of its 3x3 window is replaced by ones at its
    # center: output (y, x) = input (2y, 2x). Pooling then takes rows 2y - 1 to 2y + 1 of that.
    stem = StemLayer(Stem(((1, 3, 2),), max_pool=True), norm=Norm(kind="none"))
    stem(np.zeros((1, 16, 16, 3), np.float32))
    kernel = np.zeros((3, 3, 3, 1), np.float32)
    kernel[1, 1, 0, 0] = 1
    stem.convolutions[0].conv.kernel.assign(kernel)
    image = np.random.default_rng(0).uniform(size=(1, 16, 16, 3)).astype(np.float32)

    half, quarter = (keras.ops.convert_to_numpy(output)[0, :, :, 0] for output in stem(image))
    expected = image[0, ::2, ::2, 0]  # [8, 8]
    np.testing.assert_allclose(half, expected, rtol=1e-6)
    for y in range(4):
        for x in range(4):
            window = expected[max(2 * y - 1, 0) : 2 * y + 2, max(2 * x - 1, 0) : 2 * x + 2]
            assert quarter[y, x] == pytest.approx(window.max())


def test_block_adds_its_input_before_the_last_relu() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet_tiny"), norm=Norm(kind="none"))
    backbone(np.zeros((1, 32, 32, 3), np.float32))
    block = backbone.stages[1].blocks[1]  # The second of its stage: identity shortcut.
    x = np.random.default_rng(0).normal(size=(1, 4, 4, 64)).astype(np.float32)
    assert block.shortcut is None
    block.convolutions[1].conv.kernel.assign(np.zeros((3, 3, 64, 64), np.float32))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(block(x)), np.maximum(x, 0))


def test_training_moves_the_statistics_of_every_normalization() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet_tiny"), norm=NORM)
    images = np.random.default_rng(0).normal(size=(2, 64, 64, 3)).astype(np.float32)
    backbone(images, training=False)
    means = [weight for weight in backbone.weights if weight.path.endswith("moving_mean")]
    assert all(not np.any(mean.numpy()) for mean in means)
    backbone(images, training=True)
    # 2 in the stem, 3 in the first block of each stage, 2 in the second blocks of the last three.
    assert len(means) == 2 + 4 * 3 + 3 * 2
    assert all(np.any(mean.numpy()) for mean in means)


def test_features_of_a_batch_are_those_of_its_images() -> None:
    backbone = build_backbone(BackboneConfig(name="resnet_tiny", output_stride=8), norm=NORM)
    images = np.random.default_rng(0).normal(size=(2, 32, 64, 3)).astype(np.float32)
    together = backbone(images)
    for index in range(2):
        alone = backbone(images[index : index + 1])
        for stage in STAGES:
            np.testing.assert_allclose(
                keras.ops.convert_to_numpy(alone[stage])[0],
                keras.ops.convert_to_numpy(together[stage])[index],
                rtol=1e-4,
                atol=1e-5,
            )


@pytest.mark.parametrize(("stem", "channels"), [("seven_by_seven", 64), ("three_convolutions", 128)])
def test_res2_has_the_stride_without_max_pooling(stem: str, channels: int) -> None:
    config = BackboneConfig.model_validate({"name": "resnet50", "stem": stem, "max_pool": False, "output_stride": 32})
    backbone = build_backbone(config, norm=Norm(kind="batch"))
    shapes = {name: value.shape for name, value in backbone(keras.KerasTensor((1, 97, 129, 3))).items()}
    # Sides are halved and rounded up.
    assert shapes == {
        "stem": (1, 49, 65, channels),
        "res2": (1, 25, 33, 256),
        "res3": (1, 13, 17, 512),
        "res4": (1, 7, 9, 1024),
        "res5": (1, 4, 5, 2048),
    }
    assert backbone.strides == {"stem": 2, "res2": 4, "res3": 8, "res4": 16, "res5": 32}
    assert backbone.channels["stem"] == channels
    first, second, _ = backbone.stages[0].blocks
    assert [block.convolutions[1].conv.strides[0] for block in (first, second)] == [2, 1]
    assert first.shortcut.conv.strides[0] == 2


def test_unknown_backbone() -> None:
    with pytest.raises(
        UserError, match=r"Unknown backbone 'resnet5'\. Did you mean 'resnet50'\? Known: efficientnet_lite0"
    ):
        build_backbone(BackboneConfig(name="resnet5"), norm=NORM)


@pytest.mark.parametrize(
    ("name", "field", "value"),
    [
        ("resnet_tiny", "stem", "seven_by_seven"),
        ("resnet_tiny", "stride_in_1x1", True),
        ("mobilenet_v3_large", "multi_grid", (1, 2, 4)),
        ("mobilenet_v3_small", "stride_in_1x1", True),
        ("efficientnet_lite0", "halve_last_stage", False),
        ("resnext101_32x8d", "deformable_stages", ("res5",)),
        ("resnet50", "halve_last_stage", False),
        ("resnet50", "squeeze_gate", "sigmoid"),
        ("resnet_tiny", "depthwise_features", True),
        ("mobilenet_v3_large", "max_pool", False),
    ],
)
def test_options_that_a_backbone_does_not_have(name: str, field: str, value: object) -> None:
    with pytest.raises(UserError, match=f"Backbone '{name}' has no '{field}' .*leave out the config key"):
        build_backbone(BackboneConfig.model_validate({"name": name, field: value}), norm=NORM)


def test_deformable_convolutions_have_symmetric_padding() -> None:
    config = BackboneConfig(name="resnet50", deformable_stages=("res5",), padding="same")
    with pytest.raises(UserError, match=r"'backbone.padding' is same, but deformable convolutions have symmetric pad"):
        build_backbone(config, norm=NORM)


def test_max_pool_with_the_padding_of_tensorflow() -> None:
    # As above, but the convolution starts one pixel later: output (y, x) = input (2y + 1, 2x + 1). Pooling takes rows
    # 2y to 2y + 2 of that.
    stem = StemLayer(Stem(((1, 3, 2),), max_pool=True), padding="same", norm=Norm(kind="none"))
    stem(np.zeros((1, 16, 16, 3), np.float32))
    kernel = np.zeros((3, 3, 3, 1), np.float32)
    kernel[1, 1, 0, 0] = 1
    stem.convolutions[0].conv.kernel.assign(kernel)
    image = np.random.default_rng(0).uniform(size=(1, 16, 16, 3)).astype(np.float32)

    half, quarter = (keras.ops.convert_to_numpy(output)[0, :, :, 0] for output in stem(image))
    expected = image[0, 1::2, 1::2, 0]  # [8, 8]
    np.testing.assert_allclose(half, expected, rtol=1e-6)
    for y in range(4):
        for x in range(4):
            window = expected[2 * y : 2 * y + 3, 2 * x : 2 * x + 3]
            assert quarter[y, x] == pytest.approx(window.max())
