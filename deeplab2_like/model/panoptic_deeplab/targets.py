"""Training targets of Panoptic-DeepLab (sections 3.1 and 4): classes, center heat map, offsets, and their weights."""

import functools
from collections.abc import Callable
from typing import Any

import numpy as np

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_deeplab.config import LossConfig

# Kinds of pixels; the kinds of instances come last, see `_pixel_targets`.
_STUFF, _VOID, _CROWD, _INSTANCE, _SMALL_INSTANCE = range(5)


def make_targets(
    panoptic: Tensor, config: LossConfig, dataset_info: DatasetInfo, *, semantic_only: bool = False
) -> dict[str, Tensor]:
    """Computes the targets of one image with `tf` graph operations; there is no loop over instances.

    All centers and areas are those of the visible part inside the given map, so they follow a crop.

    Args:
        panoptic: int32 [H, W] panoptic map.
        config: Sizes of Gaussians and small instances, and the treatment of crowds.
        dataset_info: The meaning of the values of the map.
        semantic_only: Whether to leave out the targets of the instance heads.

    Returns:
        `semantic`: int32 [H, W], class id, or the ignore label.
        `semantic_weight`: float32 [H, W], 0 on void, `config.small_instance_weight` on small instances, else 1.
        `center`: float32 [H, W], Gaussians of height 1 around the rounded centers of mass, the larger one winning.
        `center_weight`: uint8 [H, W], 0 on void and crowd, else 1; stuff is a negative example.
        `offset`: float32 [H, W, 2], (y, x) from each instance pixel to its center of mass, in pixels; 0 elsewhere.
        `offset_weight`: uint8 [H, W], 1 on instances, else 0.
    """
    import tensorflow as tf  # Here, because the networks must import without TensorFlow.

    height, width = panoptic.shape
    # Everything about a pixel follows from its panoptic value; the last bin is for void.
    num_bins = dataset_info.num_classes * dataset_info.label_divisor + 1
    bin_class, bin_instance = panoptic_label.decode(np.arange(num_bins), dataset_info.label_divisor)
    is_thing = np.isin(bin_class, dataset_info.thing_classes)
    is_instance = is_thing if config.crowd_as_instance else is_thing & (bin_instance > 0)  # [num_bins]
    static_kind = np.select([is_instance, is_thing], [_INSTANCE, _CROWD], _STUFF)
    static_kind[-1] = _VOID

    area, mean = _measure(panoptic, num_bins)
    kind = tf.where(is_instance & (area < config.small_instance_area), _SMALL_INSTANCE, static_kind)
    pixels = _run_compiled(
        _pixel_targets,
        panoptic,
        tf.cast(kind, tf.int8),
        mean,
        dataset_info.label_divisor,
        float(config.small_instance_weight),
    )
    if semantic_only:
        return {name: pixels[name] for name in ("semantic", "semantic_weight")}
    centers = tf.cast(tf.round(tf.boolean_mask(mean, is_instance & (area > 0))), tf.int32)  # [N, 2]
    return {**pixels, "center": tf.ensure_shape(_gaussians(centers, height, width, config.sigma), (height, width))}


def _measure(panoptic: Tensor, num_bins: int) -> tuple[Tensor, Tensor]:
    """Measures the segments of a map from its runs of equal values, which are far fewer than its pixels.

    Args:
        panoptic: int32 [H, W], panoptic map.
        num_bins: Values from `num_bins - 1` on count as one.

    Returns:
        The area of each value, int64 [num_bins], and its center of mass (y, x), float32 [num_bins, 2], 0 if absent.
    """
    import tensorflow as tf

    width = panoptic.shape[1]
    is_end = _run_compiled(_run_ends, panoptic)
    ends = tf.where(tf.reshape(is_end, (-1,)))[:, 0]  # int64 [R], positions in the flat map.
    lengths = ends - tf.concat([tf.constant([-1], tf.int64), ends[:-1]], axis=0)
    bins = tf.minimum(tf.gather(tf.reshape(panoptic, (-1,)), ends), num_bins - 1)
    rows, last_columns = ends // width, ends % width
    # Integer sums of y and 2 x are exact; sums in float32 would be off by a fraction of a pixel.
    parts = tf.stack([lengths, lengths * rows, lengths * (2 * last_columns - lengths + 1)], axis=-1)  # [R, 3]
    sums = tf.math.unsorted_segment_sum(parts, bins, num_bins)  # [num_bins, 3]
    area = sums[:, 0]
    mean = tf.stack([sums[:, 1] / tf.maximum(area, 1), sums[:, 2] / tf.maximum(2 * area, 1)], axis=-1)
    return area, tf.cast(mean, tf.float32)


def _run_ends(panoptic: Tensor) -> Tensor:
    """Marks the last pixel of each run, the neighboring pixels of a row that have one value; bool [H, W]."""
    import tensorflow as tf

    last = tf.ones((panoptic.shape[0], 1), tf.bool)
    return tf.concat([panoptic[:, 1:] != panoptic[:, :-1], last], axis=1)


def _pixel_targets(
    panoptic: Tensor, kind: Tensor, mean: Tensor, label_divisor: int, small_instance_weight: float
) -> dict[str, Tensor]:
    """Computes all targets but the center heat map, see `make_targets`.

    Args:
        panoptic: int32 [H, W].
        kind: int8 [num_bins], kind of the pixels with each panoptic value.
        mean: float32 [num_bins, 2], center of mass (y, x) of each panoptic value.
        label_divisor: Factor between class and instance ids.
        small_instance_weight: `semantic_weight` of small instances.
    """
    import tensorflow as tf

    height, width = panoptic.shape
    bins = tf.minimum(panoptic, kind.shape[0] - 1)  # [H, W]
    kinds = tf.gather(kind, bins)  # int8 [H, W]
    is_instance = kinds >= _INSTANCE
    weight = tf.where(kinds == _SMALL_INSTANCE, small_instance_weight, tf.where(kinds == _VOID, 0.0, 1.0))
    to_row = tf.gather(mean[:, 0], bins) - tf.range(height, dtype=tf.float32)[:, tf.newaxis]
    to_column = tf.gather(mean[:, 1], bins) - tf.range(width, dtype=tf.float32)
    offsets = [tf.where(is_instance, distance, 0.0) for distance in (to_row, to_column)]  # [H, W] each
    return {
        "semantic": panoptic // label_divisor,
        "semantic_weight": weight,
        "center_weight": tf.cast((kinds != _VOID) & (kinds != _CROWD), tf.uint8),
        "offset": tf.stack(offsets, axis=-1),
        "offset_weight": tf.cast(is_instance, tf.uint8),
    }


def _run_compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function of maps of static size; in a graph, XLA compiles it and fuses its passes over the pixels."""
    import tensorflow as tf

    # Not eagerly: evaluation has images of many sizes, each of which would be compiled.
    return function(*arguments) if tf.executing_eagerly() else _compiled(function)(*arguments)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Any:
    import tensorflow as tf

    return tf.function(function, jit_compile=True, autograph=False)


def _gaussians(centers: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """Draws the maximum of Gaussians around centers, int32 [N, 2] (y, x), each cut at 3 sigma + 1; float32 [H, W]."""
    import tensorflow as tf

    radius = int(3 * sigma + 1)
    steps = tf.range(-radius, radius + 1)
    profile = tf.exp(-tf.square(tf.cast(steps, tf.float32)) / (2 * sigma**2))
    patch = profile[:, tf.newaxis] * profile[tf.newaxis, :]  # [P, P]
    y = centers[:, 0, tf.newaxis, tf.newaxis] + steps[:, tf.newaxis]  # [N, P, 1]
    x = centers[:, 1, tf.newaxis, tf.newaxis] + steps[tf.newaxis, :]  # [N, 1, P]
    inside = (y >= 0) & (y < height) & (x >= 0) & (x < width)  # [N, P, P]
    values = tf.where(inside, patch, 0.0)
    position = tf.where(inside, y * width + x, 0)  # [N, P, P]
    # Several times as fast as `tensor_scatter_nd_max`. Without a Gaussian it gives the lowest float, hence the ReLU.
    heat = tf.nn.relu(tf.math.unsorted_segment_max(values, position, height * width))  # [H * W]
    return tf.reshape(heat, (height, width))  # [H, W]
