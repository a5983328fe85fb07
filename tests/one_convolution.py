"""A system of one convolution, for tests of what is around a system: it trains and exports in no time."""

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import keras
import pytest
from keras import ops

from deeplab2_like.configs.schema import Config
from deeplab2_like.configs.systems import SystemEntry
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model import SYSTEMS, Loss, PanopticSystem
from deeplab2_like.model.config import SystemConfig


class OneConvolutionConfig(SystemConfig):
    image_mean: tuple[float, float, float] = (127.5,) * 3
    image_std: tuple[float, float, float] = (127.5,) * 3
    channels: int = 4


class OneConvolution(PanopticSystem):
    """Semantic segmentation; things come out as regions without instances. Its layers are kept in a list."""

    config_class = OneConvolutionConfig
    size_multiple = 8

    def __init__(self, config: OneConvolutionConfig, dataset_info: DatasetInfo, *, name: str | None = None) -> None:
        super().__init__(config, dataset_info, name=name or "one_convolution")
        self.loss_weights = {"semantic": 1.0}
        self.stages = [
            keras.layers.Conv2D(config.channels, 3, padding="same", name="convolution"),
            keras.layers.BatchNormalization(name="norm"),
            keras.layers.Dropout(0.5, name="dropout"),
            keras.layers.Conv2D(dataset_info.num_classes, 1, name="logits"),
        ]

    def call(self, images: Any, targets: Any = None, training: bool = False, scale: float = 1.0) -> dict[str, Any]:
        features = self.prepare_images(images)
        for stage in self.stages:
            features = stage(features, training=training)
        return {"logits": features}

    def make_targets(self, panoptic: Any) -> dict[str, Any]:
        classes = panoptic // self.dataset_info.label_divisor
        return {"classes": classes, "weight": ops.cast(classes != self.dataset_info.ignore_label, "float32")}

    def compute_losses(self, targets: Mapping[str, Any], outputs: Mapping[str, Any]) -> dict[str, Loss]:
        classes = ops.minimum(targets["classes"], self.dataset_info.num_classes - 1)
        height, width = classes.shape[1:]
        loss = ops.sparse_categorical_crossentropy(
            classes, ops.cast(outputs["logits"][:, :height, :width], "float32"), from_logits=True
        )
        return {"semantic": Loss(ops.sum(loss * targets["weight"]), ops.sum(targets["weight"]))}

    def semantic_map(self, outputs: Mapping[str, Any], image_size: tuple[Any, Any]) -> Any:
        logits = outputs["logits"][:, : image_size[0], : image_size[1]]  # [B, H, W, classes]
        return ops.cast(ops.argmax(logits, axis=-1), "int32")

    def postprocess(self, outputs: Mapping[str, Any], image_size: tuple[Any, Any]) -> dict[str, Any]:
        classes = self.semantic_map(outputs, image_size)
        every = ops.arange(self.dataset_info.num_classes, dtype="int32")
        present = ops.any(classes[..., None] == every, axis=(1, 2))  # [B, classes]
        used = ops.cast(present, "int32") * every
        return {
            "panoptic": classes * self.dataset_info.label_divisor,
            "segment_id": used * self.dataset_info.label_divisor,
            "segment_class": used,
            "segment_score": ops.cast(present, "float32"),
        }


ENTRY = SystemEntry("one_convolution:OneConvolution", "one_convolution:OneConvolutionConfig")


@contextlib.contextmanager
def one_convolution_registered() -> Iterator[None]:
    """Puts the system into the registry."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "one_convolution", ENTRY)
        yield


def one_convolution_config(**changes: Any) -> Config:
    """A config of it; `changes` are `trainer` keys, and `data` and `model` as mappings."""
    data = {"crop_size": (16, 24), **changes.pop("data", {})}
    model = OneConvolutionConfig.model_validate(changes.pop("model", {}))
    trainer = {"steps": 6, "batch_size": 2, "learning_rate": 0.01, "log_every": 2, "checkpoint_every": 4, **changes}
    return Config.model_validate({"system": "one_convolution", "data": data, "model": model, "trainer": trainer})
