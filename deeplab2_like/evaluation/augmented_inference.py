"""Test-time augmentation, as the papers report it: mirror images, several scales, ensembles of models.

The network sees several views of an image, and their raw outputs are merged before post-processing. Each system defines
how (`PanopticSystem.merge_views`).
"""

import itertools
import math
from collections.abc import Sequence

import tensorflow as tf
from keras import ops

from deeplab2_like.errors import UserError
from deeplab2_like.model import PanopticSystem
from deeplab2_like.model.base import View
from deeplab2_like.model.stages import compute_after


def check_views(systems: Sequence[PanopticSystem], scales: Sequence[float]) -> None:
    """Checks that the outputs of these systems at these scales can be merged.

    Args:
        systems: One or more systems.
        scales: Factors of the size at which the network sees the images.

    Raises:
        UserError: If the systems are of different types or for different classes, or a scale is not positive.
    """
    if not scales or not all(math.isfinite(scale) and scale > 0 for scale in scales):
        raise UserError(f"Scales must be numbers above 0, got {list(scales)}; 1 is the size without scales.")
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
    """Runs every system on every view, merges their raw outputs, and applies the first system's post-processing.

    Args:
        systems: One or more, see `check_views`.
        images: uint8 [B, H, W, 3], any size.
        scales: Factors of the size at which the network sees the images.
        flip: Whether to add the mirror image of each scale.
        with_instances: See `PanopticSystem.infer`.

    Returns:
        The dictionary that `PanopticSystem.infer` returns.
    """
    image_size = tuple(ops.shape(images)[1:3])
    images = ops.cast(images, "float32")
    views = []
    for scale, mirrored, system in itertools.product(scales, (False, True) if flip else (False,), systems):
        outputs = system(images[:, :, ::-1] if mirrored else images, training=False, scale=scale)
        views.append(View(system, outputs, scale, mirrored))
        # One view after the other, as the features of all of them would not fit into memory.
        for values in outputs.values():
            images = compute_after(ops.cast(values, "float32"), images)
    first = systems[0]
    return first.finish(first.merge_views(views, image_size), image_size, with_instances=with_instances)
