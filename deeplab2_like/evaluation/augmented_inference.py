"""Test-time augmentation, as the papers report it: mirror images, several scales, ensembles of models.

The network sees several views of an image, and their raw outputs are averaged before post-processing. Every view covers
the padded image exactly and has a size that is a multiple of `size_multiple`, so the outputs of all views align
without cropping. Each system defines how its outputs are averaged (`PanopticSystem.merge_views`).
"""

import math
from collections.abc import Sequence
from typing import Any

import tensorflow as tf
from keras import ops

from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem
from deeplab2_like.model.base import View
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.resampling import pad_to_multiple, resize_bilinear


def check_views(systems: Sequence[PanopticSystem], scales: Sequence[float]) -> None:
    """Checks that the outputs of these systems at these scales can be averaged.

    Args:
        systems: One or more systems.
        scales: Factors of the image size.

    Raises:
        UserError: If the systems are of different types or for different classes, or a scale is not positive.
    """
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise UserError(f"Scales must be numbers above 0, got {list(scales)}; 1 is the image's own size.")
    first = systems[0]
    for other in systems[1:]:
        if type(other) is not type(first):
            raise UserError(
                f"An ensemble needs models of one system, got '{first.name}' and '{other.name}'; leave one out."
            )
        if other.dataset_info != first.dataset_info:
            raise UserError(
                f"An ensemble needs models for the same classes; those of data sets '{first.dataset_info.name}' and "
                f"'{other.dataset_info.name}' differ."
            )


def infer_views(
    systems: Sequence[PanopticSystem],
    images: tf.Tensor,
    *,
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
    with_instances: bool = False,
) -> dict[str, tf.Tensor]:
    """Runs every system on every view, averages their raw outputs, and applies the first system's post-processing.

    Args:
        systems: One or more, see `check_views`.
        images: uint8 [B, H, W, 3], any size.
        scales: Factors of the image size.
        flip: Whether to add the mirror image of each scale.
        with_instances: See `PanopticSystem.infer`.

    Returns:
        The dictionary that `PanopticSystem.infer` returns.
    """
    first = systems[0]
    multiple = math.lcm(*(system.size_multiple for system in systems))
    height, width = ops.shape(images)[1:3]
    # The network sees the mean color as zero; padding with it equals the padding of normalized images.
    mean = tf.constant(first.config.image_mean)
    padded = pad_to_multiple(tf.cast(images, tf.float32) - mean, multiple) + mean
    padded_size = tuple(ops.shape(padded)[1:3])
    views = []
    for scale in scales:
        view_size = tuple(_scale_side(side, scale, multiple) for side in padded_size)
        resized = padded if scale == 1 else resize_bilinear(padded, *view_size)
        for mirrored in (False, True) if flip else (False,):
            view_images = resized[:, :, ::-1] if mirrored else resized
            geometry = Geometry(padded_size, view_size)
            views += [View(system(view_images, training=False), geometry, mirrored) for system in systems]
    outputs = first.merge_views(views, padded_size)
    return first.finish(outputs, (height, width), with_instances=with_instances)


def _scale_side(side: Any, scale: float, multiple: int) -> Any:
    """Scales a side, int32 scalar, and rounds it to a positive multiple."""
    num_multiples = tf.cast(tf.round(tf.cast(side, tf.float32) * scale / multiple), tf.int32)
    return tf.maximum(num_multiples, 1) * multiple
