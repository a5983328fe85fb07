"""The training targets of Panoptic-DeepLab as they are usually made, and made-up examples to make them for.

The speed of the library's own formulation is measured against this one (`benchmarks/input_pipeline.py`).
"""

import cv2
import numpy as np

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import render_scene, scenes_info


def plain_targets(
    panoptic: np.ndarray,
    info: DatasetInfo,
    *,
    sigma: float,
    small_instance_area: int,
    small_instance_weight: float,
) -> dict[str, np.ndarray]:
    """Makes the targets with one pass over the label map per instance.

    Args:
        panoptic: int32 [H, W], panoptic map.
        info: What its values mean.
        sigma: Standard deviation of the Gaussian around a center, in pixels.
        small_instance_area: Instances of fewer pixels count as small.
        small_instance_weight: Weight of small instances in the semantic loss.

    Returns:
        What `deeplab2_like.model.panoptic_deeplab.targets.make_targets` returns, as arrays.
    """
    height, width = panoptic.shape
    class_map, instance_map = panoptic // info.label_divisor, panoptic % info.label_divisor
    is_thing = np.isin(class_map, info.thing_classes)
    is_void = class_map == info.ignore_label
    weight = np.where(is_void, 0, 1).astype(np.float32)
    center = np.zeros((height, width), np.float32)
    offset = np.zeros((height, width, 2), np.float32)
    offset_weight = np.zeros((height, width), np.float32)
    radius = int(3 * sigma + 1)
    steps = np.arange(-radius, radius + 1)
    patch = np.exp(-(steps[:, None] ** 2 + steps**2) / (2 * sigma**2)).astype(np.float32)
    for value in np.unique(panoptic):
        if value // info.label_divisor not in info.thing_classes or value % info.label_divisor == 0:
            continue
        mask = panoptic == value
        rows, columns = np.nonzero(mask)
        if rows.size < small_instance_area:
            weight[mask] = small_instance_weight
        y, x = rows.mean(), columns.mean()
        offset[rows, columns, 0] = y - rows
        offset[rows, columns, 1] = x - columns
        offset_weight[mask] = 1
        top, left = round(y) - radius, round(x) - radius
        rows_inside = slice(max(top, 0), min(top + patch.shape[0], height))
        columns_inside = slice(max(left, 0), min(left + patch.shape[1], width))
        inside = patch[
            rows_inside.start - top : rows_inside.stop - top, columns_inside.start - left : columns_inside.stop - left
        ]
        target = center[rows_inside, columns_inside]
        np.maximum(target, inside, out=target)
    return {
        "semantic": class_map.astype(np.int32),
        "semantic_weight": weight,
        "center": center,
        "center_weight": (~is_void & ((instance_map > 0) | ~is_thing)).astype(np.float32),
        "offset": offset,
        "offset_weight": offset_weight,
    }


def make_example(index: int, size: tuple[int, int], instances: int) -> tuple[np.ndarray, np.ndarray]:
    """Makes an image, uint8 [H, W, 3], and its panoptic map, int32 [H, W], with at least so many instances.

    It is a built-in scene; what it lacks in instances is added as ellipses.
    """
    height, width = size
    info = scenes_info()
    image, panoptic = render_scene(index, height=height, width=width)
    random = np.random.default_rng(index)
    thing = info.thing_classes[0]
    number = 500
    while np.count_nonzero(np.unique(panoptic) % info.label_divisor) < instances:
        middle = (int(random.integers(0, width)), int(random.integers(0, height)))
        axes = tuple(int(axis) for axis in random.integers(height // 40, height // 10, 2))
        value = thing * info.label_divisor + number
        cv2.ellipse(panoptic, middle, axes, float(random.uniform(0, 180)), 0, 360, value, -1)
        cv2.ellipse(image, middle, axes, 0.0, 0, 360, [int(c) for c in random.integers(0, 256, 3)], -1)
        number += 1
    return image, panoptic
