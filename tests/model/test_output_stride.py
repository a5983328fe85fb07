"""Atrous convolution in place of stride: the same weights give the same features on the common grid."""

from typing import Any

import keras
import numpy as np
import pytest

from deeplab2_like.model import backbone as backbones
from deeplab2_like.model.backbone import BACKBONES, ResNet, build_backbone
from deeplab2_like.model.config import BackboneConfig, Norm, Padding

NORM = Norm(kind="frozen_batch")
STAGES = ("stem", "res2", "res3", "res4", "res5")
PADDINGS: tuple[Padding, ...] = ("symmetric", "same")


def build(config: BackboneConfig, weights: dict[str, np.ndarray]) -> keras.layers.Layer:
    """Builds a backbone with `weights` by path, which the first backbone fills with random values."""
    backbone = build_backbone(config, norm=NORM)
    backbone(keras.KerasTensor((1, 32, 32, 3)))
    random = np.random.default_rng(0)
    for weight in backbone.weights:
        if weight.path not in weights:
            value = weight.numpy() + 0.1 * random.standard_normal(weight.shape)
            # Squeeze-and-excite averages the whole map, and a denser map has another average. Without the kernel,
            # it multiplies channels by constants.
            weights[weight.path] = value * (0 if "squeeze_excite/expand/conv/kernel" in weight.path else 1)
        weight.assign(weights[weight.path])
    return backbone


def largest_differences(configs: list[BackboneConfig]) -> list[float]:
    """Compares each backbone's features with those of the first one, the coarsest.

    Returns:
        For each of the others: the largest difference on the common grid, as a part of the standard deviation.
    """
    weights: dict[str, np.ndarray] = {}
    image = np.random.default_rng(1).standard_normal((1, 96, 128, 3)).astype(np.float32)
    coarse, *others = (
        {name: np.array(value) for name, value in build(config, weights)(image).items()} for config in configs
    )
    assert coarse["res5"].shape[1:3] == (3, 4)  # Borders and interior.
    differences = []
    for fine in others:
        largest = 0.0
        for stage in STAGES:
            step = fine[stage].shape[1] // coarse[stage].shape[1]
            difference = np.abs(fine[stage][:, ::step, ::step] - coarse[stage])
            largest = max(largest, float(difference.max() / coarse[stage].std()))
        differences.append(largest)
    return differences


@pytest.fixture(autouse=True)
def _small_resnets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes ResNets narrow, and each stage only as deep as needed to have all its kinds of blocks."""

    def build_small(**options: Any) -> ResNet:
        groups = {"groups": 2, "group_width": 4} if options.get("groups", 1) > 1 else {}
        return ResNet(**{**options, "depths": (1, 1, 2, 3), "widths": (8, 16, 24, 32), **groups})

    monkeypatch.setattr(backbones, "ResNet", build_small)


@pytest.mark.parametrize("name", BACKBONES)
def test_output_strides_agree(name: str) -> None:
    # Also at the borders: with image sizes that are multiples of 32, a map ends at the same pixel at every stride, and
    # a dilated convolution reads the zeros outside at the same places.
    configs = [BackboneConfig(name=name, output_stride=stride) for stride in (32, 16, 8)]
    assert max(largest_differences(configs)) < 1e-4


# One of each kind of block; ResNeXt has the bottlenecks of ResNet.
@pytest.mark.parametrize("name", ["resnet50", "resnet_tiny", "mobilenet_v3_small", "efficientnet_lite0"])
def test_output_strides_agree_with_the_padding_of_tensorflow(name: str) -> None:
    configs = [BackboneConfig(name=name, output_stride=stride, padding="same") for stride in (32, 16, 8)]
    assert max(largest_differences(configs)) < 1e-4


def test_the_two_paddings_differ() -> None:
    configs = [BackboneConfig(name="efficientnet_lite0", output_stride=32, padding=padding) for padding in PADDINGS]
    assert min(largest_differences(configs)) > 0.1


@pytest.mark.parametrize(
    ("option", "value"),
    [("multi_grid", (1, 2, 4)), ("stride_in_1x1", True), ("max_pool", False)],
    ids=["multi_grid", "stride_in_1x1", "max_pool"],
)
@pytest.mark.parametrize("padding", PADDINGS)
def test_options_agree(option: str, value: object, padding: str) -> None:
    configs = [
        BackboneConfig.model_validate({"name": "resnet50", "output_stride": stride, option: value, "padding": padding})
        for stride in (32, 16, 8)
    ]
    assert max(largest_differences(configs)) < 1e-4


def test_the_conversion_of_detectron2_differs() -> None:
    configs = [
        BackboneConfig(name="resnet_tiny", output_stride=stride, atrous_conversion="detectron2") for stride in (32, 16)
    ]
    assert min(largest_differences(configs)) > 0.1
