import dataclasses
import io
import json
import math
from typing import Any, ClassVar

import keras
import pytest
from rich.console import Console

from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.known_datasets import COCO_PANOPTIC
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.model import build_system
from deeplab2_like.model.backbone import BACKBONES
from deeplab2_like.model.config import Norm
from deeplab2_like.model.describe import describe, describe_layer, print_description
from deeplab2_like.model.layers import ConvNorm, SeparableConvNorm
from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab

NORM = Norm(kind="batch")


def test_convolution() -> None:
    description = describe_layer(ConvNorm(8, 3, strides=2, norm=NORM), (10, 6, 4))
    # 5 x 3 positions, each 3 * 3 * 4 * 8 products. The kernel, and 4 vectors of batch normalization, 2 of them trained.
    assert description.multiply_adds == 15 * 288
    assert description.activations == 15 * 8
    assert description.parameters == 288 + 4 * 8
    assert description.trainable_parameters == 288 + 2 * 8
    assert description.output_shapes == {"": (5, 3, 8)}
    assert description.uncounted == []


def test_depthwise_and_pointwise() -> None:
    description = describe_layer(SeparableConvNorm(16, 5, norm=NORM, name="separable"), (7, 9, 4))
    parts = {part.name: part for part in description.parts}
    assert parts["depthwise"].multiply_adds == 63 * 25 * 4
    assert parts["pointwise"].multiply_adds == 63 * 4 * 16
    assert description.multiply_adds == 63 * (100 + 64)


def test_groups_and_dense_and_transposed() -> None:
    layers = keras.Sequential(
        [
            keras.layers.Conv2D(8, 1, groups=2),  # 4 x 4 positions, 4 inputs of its group each: 16 * 4 * 8
            keras.layers.Conv2DTranspose(2, 2, strides=2),  # 4 x 4 input positions: 16 * 2 * 2 * 8 * 2
            keras.layers.Flatten(),
            keras.layers.Dense(3),  # 8 * 8 * 2 inputs: 128 * 3
        ]
    )
    assert describe_layer(layers, (4, 4, 8)).multiply_adds == 16 * 32 + 16 * 64 + 384


class Pyramid(keras.layers.Layer):
    """One head on two levels."""

    def __init__(self) -> None:
        super().__init__(name="pyramid")
        self.head = ConvNorm(2, 1, name="head")
        self.reduce = keras.layers.AveragePooling2D(2)

    def call(self, inputs: object) -> dict[str, object]:
        return {"fine": self.head(inputs), "coarse": self.head(self.reduce(inputs))}


def test_shared_head_counts_every_call_but_its_parameters_once() -> None:
    description = describe_layer(Pyramid(), (4, 4, 3))
    (head,) = description.parts
    assert (head.name, head.calls, head.parameters) == ("head", 2, 3 * 2 + 2)
    assert head.multiply_adds == description.multiply_adds == (16 + 4) * 6
    assert description.output_shapes == {"fine": (4, 4, 2), "coarse": (2, 2, 2)}


def test_kernels_without_a_rule_are_named() -> None:
    class Mixing(keras.layers.Layer):
        def build(self, input_shape: tuple[int, ...]) -> None:
            self.matrix = self.add_weight(shape=(input_shape[-1], 5), name="matrix")

        def call(self, inputs: object) -> object:
            return keras.ops.matmul(inputs, self.matrix)

    description = describe_layer(keras.Sequential([Mixing(name="mixing"), keras.layers.Dense(2)]), (3, 3, 4))
    assert description.uncounted == ["mixing"]
    assert description.multiply_adds == 9 * 5 * 2


class Switch(keras.layers.Layer):
    """Raises once `broken` is set."""

    broken = False

    def call(self, inputs: object) -> object:
        if self.broken:
            raise ValueError("switched off")
        return inputs


def test_counting_leaves_calls_as_they_were() -> None:
    call = keras.layers.Layer.__call__
    layer = Switch()
    describe_layer(layer, (2, 2, 1))
    assert keras.layers.Layer.__call__ is call
    layer.broken = True
    with pytest.raises(ValueError, match="switched off"):
        describe_layer(layer, (2, 2, 1))
    assert keras.layers.Layer.__call__ is call


CITYSCAPES_LIKE = DatasetInfo(
    name="test",
    categories=tuple(Category(id=i, name=f"class {i}", is_thing=i >= 11, color=(i, i, i)) for i in range(19)),
)


@pytest.mark.parametrize(
    ("backbone", "billions", "published", "tolerance"),
    [
        # The paper's table 9, in billions, at 1025x2049, which here is 1024x2048, the same number of strides. In the
        # ResNet of its authors' library the stride is in a stage's last block instead of in the next one's first.
        ("resnet50", 389.78, 381.39, 0.03),
        # The paper takes its low-level features from depthwise convolutions, which have 72 channels at stride 4 and 120
        # at stride 8. Blocks, as here, have 24 and 40, which saves 48 * (32 + 16) multiply-adds at 256 * 512 positions
        # and 80 * (64 + 32) at 128 * 256, 0.55 billion in all.
        ("mobilenet_v3_large", 53.10, 54.17, 0.02),
    ],
)
def test_panoptic_deeplab_costs_what_the_paper_says(
    backbone: str, billions: float, published: float, tolerance: float
) -> None:
    config: Any = load_config(f"panoptic_deeplab/cityscapes_{backbone}")
    system = PanopticDeepLab(config.model, CITYSCAPES_LIKE)
    description = describe(system, 1024, 2048)
    assert description.multiply_adds / 1e9 == pytest.approx(billions, abs=0.01)
    assert description.multiply_adds / 1e9 == pytest.approx(published, rel=tolerance)
    assert description.uncounted == []
    assert description.paper is None  # It counts the whole network.
    assert description.output_shapes == {
        "semantic_logits": (256, 512, 19),
        "center": (256, 512, 1),
        "offset": (256, 512, 2),
    }
    parts = {part.name: part for part in description.parts}
    assert {"backbone/res5", "semantic_aspp", "instance_decoder", "offset_head"} <= parts.keys()
    whole = [part for part in description.parts if "/" not in part.name]
    assert sum(part.multiply_adds for part in whole) == description.multiply_adds
    assert sum(part.parameters for part in whole) == description.parameters
    if backbone == "resnet50":
        # First block: 128 * 64 + 9 * 64 * 64 + 64 * 256, and 128 * 256 of its shortcut.
        # The others: 256 * 64 + 9 * 64 * 64 + 64 * 256.
        assert parts["backbone/res2"].multiply_adds == 256 * 512 * (94_208 + 2 * 69_632)
        assert parts["backbone/res2"].output_shapes == {"": (256, 512, 256)}
    printed = json.loads(json.dumps(description.to_dict()))
    assert printed["multiply_adds"] == description.multiply_adds
    assert printed["parts"][0]["name"] == "backbone"
    assert printed["output_shapes"]["center"] == [256, 512, 1]


class XceptionFeatures(keras.layers.Layer):
    """Stands in for Xception-71, the backbone of the paper's Table 1: its features, made without weights."""

    strides: ClassVar = {"res2": 4, "res3": 8, "res5": 16}
    channels: ClassVar = {"res2": 256, "res3": 728, "res5": 2048}

    def call(self, images: Any, training: bool = False) -> dict[str, Any]:
        height, width = images.shape[1:3]
        return {
            name: keras.ops.zeros((1, height // stride, width // stride, self.channels[name]))
            for name, stride in self.strides.items()
        }


SEMANTIC_128 = [
    "model.aspp.channels=128",
    "model.decoder.semantic_channels=128",
    "model.decoder.semantic_head_channels=128",
    "model.decoder.low_level_channels={res3: 32, res2: 16}",
]
INSTANCE_256 = [
    "model.decoder.instance_channels=256",
    "model.decoder.instance_head_channels=64",
    "model.decoder.instance_low_level_channels={res3: 64, res2: 32}",
]


def cost_of_both_branches(overrides: list[str]) -> tuple[float, float]:
    """Returns millions of kernel weights and billions of multiply-adds at 1025x2049, all but the backbone."""
    config: Any = load_config("panoptic_deeplab/cityscapes_resnet50", ["model.backbone.name=xception_71", *overrides])
    system = PanopticDeepLab(config.model, CITYSCAPES_LIKE)
    description = describe(system, 1024, 2048)
    assert description.uncounted == []
    total = 0.0
    for part in description.parts:
        if "/" in part.name:
            ((height, width, _),) = part.output_shapes.values()
            # The paper's maps have a row and a column more: 257x513 at stride 4. The pooled feature has one position.
            scale = (height + 1) * (width + 1) / (height * width) if height > 1 else 1.0
            total += part.multiply_adds * scale
    kernels = sum(math.prod(weight.shape) for weight in system.trainable_weights if len(weight.shape) == 4)
    return kernels / 1e6, total / 1e9


def test_steps_of_the_papers_ablation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES, "xception_71", lambda config, norm: XceptionFeatures(name="backbone"))
    shared = ["model.dual_aspp=false", "model.dual_decoder=false", *SEMANTIC_128]
    rows = {
        "MSE": cost_of_both_branches(shared),
        "De. x2": cost_of_both_branches([*SEMANTIC_128, "model.dual_aspp=false"]),
        "ASPP x2": cost_of_both_branches(SEMANTIC_128),
        "C_Sem = 256": cost_of_both_branches([]),
        "C_Ins = 256": cost_of_both_branches(INSTANCE_256),
        "Sem. Only": cost_of_both_branches(["model.semantic_only=true"]),
    }

    def step(before: str, after: str) -> tuple[float, float]:
        return rows[after][0] - rows[before][0], rows[after][1] - rows[before][1]

    # Table 1, M parameters and B multiply-adds. The second decoder: 41.85 to 41.93 and 496.84 to 501.88.
    # At stride 8, 728 * 32 + 25 * 160 + 160 * 128 weights at 129 * 257 positions; at stride 4, 256 * 16 + 25 * 144 +
    # 144 * 128 at 257 * 513.
    assert step("MSE", "De. x2") == pytest.approx((0.073904, 5.0286), abs=1e-4)
    assert step("MSE", "De. x2") == (pytest.approx(0.08, abs=0.01), pytest.approx(5.04, rel=0.01))
    # The instance branch: 43.60 to 46.72 and 518.84 to 547.49.
    assert step("Sem. Only", "C_Sem = 256") == pytest.approx((3.112592, 28.411), abs=1e-3)
    assert step("Sem. Only", "C_Sem = 256") == (pytest.approx(3.12, abs=0.01), pytest.approx(28.65, rel=0.01))
    # Parameters only, as the paper's count of the image pooling is not known: 41.93 to 43.37 to 46.72 to 46.88.
    assert step("De. x2", "ASPP x2")[0] == pytest.approx(1.44, abs=0.015)
    assert step("ASPP x2", "C_Sem = 256")[0] == pytest.approx(3.35, abs=0.015)
    assert step("C_Sem = 256", "C_Ins = 256")[0] == pytest.approx(0.16, abs=0.01)


def test_lpsnet_without_the_parts_that_the_paper_leaves_out() -> None:
    # Its table 1, in billions, at S x 1216: backbone 79.24, pyramid 55.10 with 0.19 for p6 and p7, and a 1x1 predictor
    # of 133 classes on 512 channels 4.14 are 138.67 at S = 800. At the other sizes, it is S / 800 of that.
    info = DatasetInfo("coco", COCO_PANOPTIC)
    system = build_system(load_config("lpsnet/coco_resnet50", ["model.resize=null"]), info)
    for shorter_side, counted, published in ((800, 138.67, 139), (882, 152.88, 153), (964, 167.09, 167)):
        description = describe(system, shorter_side, 1216)
        assert description.paper is not None
        assert description.paper.multiply_adds / 1e9 == pytest.approx(counted, abs=0.02)
        assert round(description.paper.multiply_adds / 1e9) == published
        if shorter_side == 800:
            parts = {part.name: part.multiply_adds / 1e9 for part in description.parts}
            assert parts["backbone"] == pytest.approx(79.24, abs=0.01)
            assert parts["fpn"] == pytest.approx(55.10 + 0.19, abs=0.01)
            assert parts["semantic_head/predictor"] == pytest.approx(4.14, abs=0.01)
    out = io.StringIO()
    print_description(description, console=Console(file=out, width=100))
    end = " G multiply-adds of backbone + fpn + semantic_head/predictor, without padding"
    assert f"As the paper counts: {description.paper.multiply_adds / 1e9:.2f}{end}" in out.getvalue()


def test_the_count_of_a_paper_is_that_of_the_network_size() -> None:
    # The image is resized from 50 x 100 to 60 x 120, which is padded to 64 x 128.
    config = load_config("lpsnet/scenes_tiny", ["model.resize={shorter_side: 60, longer_side: {max: 200}}"])
    description = describe(build_system(config, scenes_info()), 50, 100)
    parts = {part.name: part.multiply_adds for part in description.parts}
    padded = parts["backbone"] + parts["fpn"] + parts["semantic_head/predictor"]
    assert description.paper is not None
    assert description.paper.multiply_adds == round(padded * (60 * 120) / (64 * 128))


def test_printed_as_a_table() -> None:
    out = io.StringIO()
    description = describe_layer(Pyramid(), (4, 4, 3))
    print_description(description, console=Console(file=out, width=100))
    lines = out.getvalue().splitlines()
    assert lines[0].strip() == "Image of 4 x 4 pixels"
    (head,) = (line for line in lines if "head" in line)
    assert [cell.strip() for cell in head.split("│")[1:-1]] == ["head", "8", "0.000", "2 x 2 x 2"]
    # 8 parameters and 120 multiply-adds.
    assert lines[-2] == "Total: 0.00 M parameters (0.00 M trainable), 0.00 G multiply-adds, 0.000 G activations"
    assert lines[-1] == "Outputs: fine 4 x 4 x 2, coarse 2 x 2 x 2"


def test_table_in_millions_and_billions() -> None:
    out = io.StringIO()
    # 100 x 200 positions, 3 * 1000 products each: 0.06 billion. 3000 weights and 1000 biases.
    description = describe_layer(keras.Sequential([keras.layers.Conv2D(1000, 1, name="wide")]), (100, 200, 3))
    print_description(
        dataclasses.replace(description, parameters=2_345_678, uncounted=["mixing"]),
        console=Console(file=out, width=100),
    )
    text = out.getvalue()
    assert "Total: 2.35 M parameters (0.00 M trainable), 0.06 G multiply-adds" in text
    assert "wide" in text
    assert "4,000" in text
    assert "0.060" in text
    assert "Not counted: mixing" in text
