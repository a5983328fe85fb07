import keras
import numpy as np
import pytest

from deeplab2_like.model.backbone import build_backbone
from deeplab2_like.model.backbone.efficientnet_lite import efficientnet_lite_stages
from deeplab2_like.model.config import BackboneConfig, Norm

NORM = Norm(kind="batch")


@pytest.mark.parametrize(
    ("name", "classifier", "channels"),
    [
        ("efficientnet_lite0", 4_652_008, {"stem": 16, "res2": 24, "res3": 40, "res4": 112, "res5": 320}),
        ("efficientnet_lite1", 5_416_680, {"stem": 16, "res2": 24, "res3": 40, "res4": 112, "res5": 320}),
        ("efficientnet_lite2", 6_092_072, {"stem": 16, "res2": 24, "res3": 48, "res4": 120, "res5": 352}),
    ],
)
def test_size_is_that_of_the_classifier_without_its_head(name: str, classifier: int, channels: dict[str, int]) -> None:
    backbone = build_backbone(BackboneConfig(name=name), norm=NORM)
    backbone(keras.KerasTensor((1, 64, 64, 3)))
    # The head: a 1x1 convolution to 1280 channels with two parameters of normalization each, and 1000 classes.
    head = channels["res5"] * 1280 + 2 * 1280 + 1280 * 1000 + 1000
    assert sum(int(np.prod(weight.shape)) for weight in backbone.trainable_weights) == classifier - head
    assert backbone.channels == channels


def test_depth_repeats_all_groups_but_the_first_and_the_last() -> None:
    # Blocks of the groups: 1, 2, 2, 3 + 3, 4 + 1. Times 1.2, rounded up: 1, 3, 3, 4 + 4, 5 + 1.
    stages = efficientnet_lite_stages(1.0, 1.2)
    assert [len(rows) for rows in stages.values()] == [1, 3, 3, 8, 6]


def test_blocks() -> None:
    backbone = build_backbone(BackboneConfig(name="efficientnet_lite0", output_stride=32), norm=NORM)
    blocks = [block for stage in backbone.stages for block in stage.blocks if hasattr(block, "depthwise")]
    assert [block.depthwise.conv.kernel_size[0] for block in blocks] == [3, 3, 3, 5, 5, 3, 3, 3, 5, 5, 5, 5, 5, 5, 5, 3]
    assert [block.depthwise.conv.strides[0] for block in blocks] == [1, 2, 1, 2, 1, 2, 1, 1, 1, 1, 1, 2, 1, 1, 1, 1]
    # Where the number of channels changes, there is no shortcut either.
    assert [int(block.has_shortcut) for block in blocks] == [0, 0, 1, 0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 1, 1, 0]
    assert [block.expand is None for block in blocks] == [True] + [False] * 15
    assert all(block.squeeze_excite is None for block in blocks)


def test_activations_stop_at_six() -> None:
    backbone = build_backbone(BackboneConfig(name="efficientnet_lite0"), norm=Norm(kind="none"))
    first = backbone.stages[0].blocks[0]
    x = np.ones((1, 4, 4, 3), np.float32)
    first(x)
    first.conv.kernel.assign(np.full((3, 3, 3, 32), 10.0, np.float32))
    np.testing.assert_array_equal(keras.ops.convert_to_numpy(first(x)), np.full((1, 2, 2, 32), 6.0))
