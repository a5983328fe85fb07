"""Writes and reads the small data sets of the tests of converters."""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from deeplab2_like.data import pipeline
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import list_shards


def write_image(path: Path, values: Any, dtype: Any = np.uint8) -> None:
    """Writes gray values [H, W] or colors [H, W, 3] to a PNG or TIFF."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, dtype)).save(path)


def write_palette_png(path: Path, values: Any) -> None:
    """Writes a PNG with a palette, as Pascal VOC has it: the colors say nothing about the values [H, W]."""
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.fromarray(np.asarray(values, np.uint8), mode="P")
    image.putpalette([(7 * index) % 256 for index in range(768)])
    image.save(path)


def read_labels(folder: Path, split: str = "train") -> dict[str, list[list[int]]]:
    """Returns the panoptic map of each image of a split by its name."""
    dataset = pipeline.make_eval_dataset(list_shards(folder, split), dataset_info=DatasetInfo.load(folder))
    return {example["image_id"].decode(): example["panoptic"].tolist() for example in dataset.as_numpy_iterator()}
