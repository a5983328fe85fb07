"""The settings that belong to pretrained weights of backbones. Nothing here imports Keras."""

import functools
import math
from collections.abc import Mapping
from typing import Any

# Values of config keys, by their path in the `model` section, such as `norm.epsilon`.
Settings = Mapping[str, Any]

# The value of `backbone.weights` for the weights that this library finds itself.
IMAGENET = "imagenet"

EFFICIENTNET_LITE: Settings = {
    "image_mean": (127.5, 127.5, 127.5),
    "image_std": (127.5, 127.5, 127.5),
    "norm.epsilon": 1e-3,
    "backbone.padding": "same",
}

# Keras subtracts a mean color from images in BGR; here, the first kernel is reversed instead.
KERAS_RESNET: Settings = {
    "image_mean": (123.68, 116.779, 103.939),
    "image_std": (1.0, 1.0, 1.0),
    "norm.epsilon": 1.001e-5,
    "backbone.stem": "seven_by_seven",
    "backbone.stride_in_1x1": True,
    "backbone.max_pool": True,
    "backbone.padding": "symmetric",
}
KERAS_MOBILENET_V3: Settings = {
    "image_mean": (127.5, 127.5, 127.5),
    "image_std": (127.5, 127.5, 127.5),
    "norm.epsilon": 1e-3,
    "backbone.padding": "same",
    "backbone.halve_last_stage": False,
    "backbone.squeeze_gate": "hard_sigmoid",
}

# The backbones that have ImageNet weights.
IMAGENET_SETTINGS: dict[str, Settings] = {
    "efficientnet_lite0": EFFICIENTNET_LITE,
    "efficientnet_lite1": EFFICIENTNET_LITE,
    "efficientnet_lite2": EFFICIENTNET_LITE,
    "mobilenet_v3_large": KERAS_MOBILENET_V3,
    "mobilenet_v3_small": KERAS_MOBILENET_V3,
    "resnet50": KERAS_RESNET,
    "resnet101": KERAS_RESNET,
    "resnet152": KERAS_RESNET,
}


def wrong_settings(config: Any, settings: Settings) -> Settings:
    """Returns the settings that a config has otherwise.

    Args:
        config: The `model` section of a config.
        settings: What it should have.
    """
    return {
        key: value
        for key, value in settings.items()
        if not _are_equal(functools.reduce(getattr, key.split("."), config), value)
    }


def describe_settings(settings: Settings) -> str:
    """Returns settings as text for an error, such as `model.norm.epsilon=0.001`, as after `--set`."""
    return ", ".join(f"model.{key}={_describe(value)}" for key, value in settings.items())


def _are_equal(value: Any, other: Any) -> bool:
    if isinstance(value, tuple):
        return all(_are_equal(*pair) for pair in zip(value, other, strict=True))
    if isinstance(value, float):
        return math.isclose(value, other, rel_tol=2e-3)  # 1.001e-5 and 1e-5 are the same epsilon.
    return bool(value == other)


def _describe(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(map(_describe, value))}]"
    return str(value).lower() if isinstance(value, bool) else str(value)
