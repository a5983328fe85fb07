"""Encoding of panoptic maps: class and instance in one integer, and that integer in an RGB PNG.

The functions use only integer arithmetic, so they work on NumPy arrays and on tensors of any backend alike.
"""

from typing import Any

import numpy as np


def encode(class_map: Any, instance_map: Any, label_divisor: int) -> Any:
    """Combines classes and instances, any shape, int32, into `class * label_divisor + instance`."""
    return class_map * label_divisor + instance_map


def decode(panoptic: Any, label_divisor: int) -> tuple[Any, Any]:
    """Splits a panoptic map, any shape, int32, into its class map and its instance map."""
    return panoptic // label_divisor, panoptic % label_divisor


def ids_to_rgb(ids: np.ndarray) -> np.ndarray:
    """Writes ids as colours, `id = R + 256 G + 65536 B` (the COCO panoptic convention).

    Args:
        ids: int [H, W], values 0..2**24 - 1.

    Returns:
        uint8 [H, W, 3].
    """
    return np.stack([ids & 255, (ids >> 8) & 255, (ids >> 16) & 255], axis=-1).astype(np.uint8)


def rgb_to_ids(rgb: Any) -> Any:
    """Reads ids from colours, the inverse of `ids_to_rgb`.

    Args:
        rgb: int32 [H, W, 3] (cast before: uint8 would overflow).

    Returns:
        int32 [H, W].
    """
    return rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
