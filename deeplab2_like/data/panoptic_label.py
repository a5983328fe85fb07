"""Encoding of panoptic maps: class and instance as one integer, and that integer as the color of an RGB PNG.

`encode`, `decode` and `rgb_to_ids` use only integer arithmetic, so they work on NumPy arrays and on tensors of any
backend alike.
"""

from typing import Any

import numpy as np

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError


def encode(class_map: Any, instance_map: Any, label_divisor: int) -> Any:
    """Combines classes and instances, any shape, int32, into `class * label_divisor + instance`."""
    return class_map * label_divisor + instance_map


def decode(panoptic: Any, label_divisor: int) -> tuple[Any, Any]:
    """Splits a panoptic map, any shape, int32, into its class map and its instance map."""
    return panoptic // label_divisor, panoptic % label_divisor


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Converts ids to colors, `id = R + 256 G + 65536 B` (the COCO panoptic convention).

    Args:
        ids: int [H, W], values 0..2**24 - 1.

    Returns:
        uint8 [H, W, 3].
    """
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def rgb_to_ids(rgb: Any) -> Any:
    """Converts colors to ids, the inverse of `ids_to_rgb`.

    Args:
        rgb: int32 [H, W, 3], not uint8, which would overflow.

    Returns:
        int32 [H, W].
    """
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]


def classes_of_values(
    values: np.ndarray, dataset_info: DatasetInfo, *, name: str, divisor: int | None = None
) -> np.ndarray:
    """Returns the class of each value of a label map, -1 for void.

    Args:
        values: int64 [N], distinct values `class * divisor + instance`, not negative.
        dataset_info: The meaning of the classes.
        name: Name of the map in the message ("ground-truth", "predicted").
        divisor: The data set's label_divisor if not given; 1 for class maps.

    Returns:
        int64 [N], contiguous class ids or -1.

    Raises:
        UserError: If the class of a value is neither a class of the data set nor void.
    """
    divisor = divisor or dataset_info.label_divisor
    classes = values // divisor
    classes[classes == dataset_info.ignore_label] = -1
    unknown = classes >= dataset_info.num_classes
    if np.count_nonzero(unknown):
        value = int(values[unknown][0])
        raise UserError(
            f"The {name} map holds value {value}, which is class {value // divisor}; data set '{dataset_info.name}' "
            f"has classes 0..{dataset_info.num_classes - 1} and {dataset_info.ignore_label} for void (values are class "
            f"* {divisor} + instance): check that the map belongs to this data set."
        )
    return classes
