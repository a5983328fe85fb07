"""Training targets of Panoptic-DeepLab (sections 3.1 and 4): classes, centre heat map, offsets, and their weights."""

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.layers import Tensor


def make_targets(
    panoptic: Tensor,
    *,
    dataset_info: DatasetInfo,
    sigma: float,
    small_instance_area: int,
    small_instance_weight: float,
    semantic_only: bool = False,
    crowd_as_instance: bool = False,
) -> dict[str, Tensor]:
    """Computes the targets of one image with `tf` graph operations; there is no loop over instances.

    All centres and areas are those of the visible part inside the given map, so they follow a crop.

    Args:
        panoptic: int32 [H, W] panoptic map.
        dataset_info: What its values mean.
        sigma: Standard deviation of the Gaussian around a centre, in pixels.
        small_instance_area: Instances of fewer pixels count as small.
        small_instance_weight: Weight of small instances in the semantic loss.
        semantic_only: Whether to leave out the targets of the instance heads.
        crowd_as_instance: Whether a crowd region is learnt as one more instance, instead of being left out.

    Returns:
        `semantic`: int32 [H, W], class id, or the ignore label.
        `semantic_weight`: float32 [H, W], 0 on void, `small_instance_weight` on small instances, else 1.
        `center`: float32 [H, W], Gaussians of height 1 around the rounded centres of mass, the larger one winning.
        `center_weight`: float32 [H, W], 0 on void and crowd, else 1 (stuff teaches where no centre is).
        `offset`: float32 [H, W, 2], (y, x) from each instance pixel to its centre of mass, in pixels; 0 elsewhere.
        `offset_weight`: float32 [H, W], 1 on instances, else 0.
    """
    import tensorflow as tf  # Here, because the networks must import without TensorFlow.

    height, width = panoptic.shape
    divisor = dataset_info.label_divisor
    class_map, instance_map = panoptic_label.decode(panoptic, divisor)
    is_thing = tf.reduce_any(class_map[..., tf.newaxis] == tf.constant(dataset_info.thing_classes, tf.int32), axis=-1)
    is_instance = is_thing if crowd_as_instance else is_thing & (instance_map > 0)
    is_void = class_map == dataset_info.ignore_label

    # Statistics of every instance by its panoptic value; bin 0 is for the pixels outside of instances. Sums of
    # coordinates are int64: float32 would be off by a fraction of a pixel.
    bins = tf.where(is_instance, panoptic + 1, 0)  # [H, W]
    num_bins = dataset_info.num_classes * divisor + 1
    area = tf.math.unsorted_segment_sum(tf.cast(is_instance, tf.int32), bins, num_bins)  # [num_bins]

    is_small = is_instance & (tf.gather(area, bins) < small_instance_area)
    semantic_weight = tf.where(is_small, small_instance_weight, 1.0)
    targets = {
        "semantic": class_map,
        "semantic_weight": tf.where(is_void, 0.0, semantic_weight),
    }
    if semantic_only:
        return targets

    rows = tf.broadcast_to(tf.range(height)[:, tf.newaxis], (height, width))
    columns = tf.broadcast_to(tf.range(width)[tf.newaxis, :], (height, width))
    sums = [tf.math.unsorted_segment_sum(tf.cast(c, tf.int64), bins, num_bins) for c in (rows, columns)]
    mean = tf.cast(tf.stack(sums, axis=-1) / tf.cast(tf.maximum(area, 1), tf.int64)[:, tf.newaxis], tf.float32)
    coordinates = tf.cast(tf.stack([rows, columns], axis=-1), tf.float32)  # [H, W, 2]
    offset = tf.where(is_instance[..., tf.newaxis], tf.gather(mean, bins) - coordinates, 0.0)

    centers = tf.cast(tf.round(tf.boolean_mask(mean, area > 0)), tf.int32)  # [N, 2]
    targets["center"] = tf.ensure_shape(_gaussians(centers, height, width, sigma), (height, width))
    targets["center_weight"] = tf.cast(~is_void & (is_instance | ~is_thing), tf.float32)
    targets["offset"] = offset
    targets["offset_weight"] = tf.cast(is_instance, tf.float32)
    return targets


def _gaussians(centers: Tensor, height: int, width: int, sigma: float) -> Tensor:
    """The largest of the Gaussians around int32 [N, 2] (y, x) centres, each cut at 3 sigma + 1; float32 [H, W]."""
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
    heat = tf.tensor_scatter_nd_max(
        tf.zeros(height * width), tf.reshape(position, (-1, 1)), tf.reshape(values, (-1,))
    )  # [H * W]
    return tf.reshape(heat, (height, width))  # [H, W]
