"""Targets of Panoptic FCN: heat maps of the objects' centres, and samples of label maps (section 3.1, appendix A.1)."""

from collections.abc import Mapping
from typing import Literal

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.detection.instances import class_and_instance_targets
from deeplab2_like.model.layers import Tensor


def make_targets(
    panoptic: Tensor,
    *,
    dataset_info: DatasetInfo,
    level_strides: Mapping[str, int],
    size_ranges: Mapping[str, tuple[float, float]],
    stride: int,
    size_multiple: int,
    max_instances: int,
    center: Literal["mass", "box"],
    min_overlap: float,
) -> dict[str, Tensor]:
    """Lists the instances of a label, and draws a Gaussian at the centre of each on the levels that it belongs to.

    Args:
        panoptic: int32 [H, W] panoptic map, static size.
        dataset_info: What its values mean.
        level_strides: Stride of each level of the position head, by its name.
        size_ranges: For each of them, between which sides (roots of the area of the box, in pixels, both ends included)
            its objects lie. Ranges overlap, so most objects are on two levels.
        stride: Stride of the encoded feature.
        size_multiple: The network sees images padded to a multiple of this.
        max_instances: Most instances, M; the largest.
        center: Whether the centre is that of an object's mass or of its box (Table 14).
        min_overlap: Overlap that a box keeps when its corners move by the radius of the Gaussian, as in CornerNet.

    Returns:
        `semantic`: int32 [H, W], class id, or the ignore label. What `instance_targets` returns, where void counts as
        crowd. `centers`: float32 [M, 2], (y, x) in pixels. `heat_<level>`: float32 [h, w, T], for each thing class the
        highest of its Gaussians, exactly 1 at the position that holds the centre.
    """
    import tensorflow as tf  # Here, because the networks must import without TensorFlow.

    height, width = panoptic.shape
    instances = class_and_instance_targets(panoptic, dataset_info, max_instances)
    boxes, valid = instances["boxes"], instances["valid"]

    center_of_box = (boxes[:, :2] + boxes[:, 2:]) / 2  # [M, 2]
    if center == "mass":
        padded = tf.pad(instances["instance_map"], [[0, -height % size_multiple], [0, -width % size_multiple]])
        samples = four_samples(padded[tf.newaxis], stride)[0]  # [h, w, 4]
        centers = _centers_of_mass(samples, max_instances) * stride
        # Objects of a few pixels can fall between the samples.
        centers = tf.where(tf.math.is_finite(centers), centers, center_of_box)
    else:
        centers = center_of_box
    centers = tf.where(valid[:, tf.newaxis], centers, 0.0)

    num_things = len(dataset_info.thing_classes)
    targets = {**instances, "centers": centers}
    for level, level_stride in level_strides.items():
        low, high = size_ranges[level]
        shape = [-(-(side + -side % size_multiple) // level_stride) for side in (height, width)]
        radius = _gaussian_radius((boxes[:, 2:] - boxes[:, :2]) / level_stride, min_overlap)  # [M]
        # Among boxes of one area the square has the largest radius.
        largest = min(high, max(height, width)) / level_stride
        patch = int(_gaussian_radius(tf.constant([[largest, largest]], tf.float64), min_overlap)[0]) + 1
        targets[f"heat_{level}"] = _draw_gaussians(
            tf.cast(tf.floor(centers / level_stride), tf.int32),
            radius,
            instances["classes"],
            valid & is_of_size(boxes, low, high),
            patch=patch,
            shape=(*shape, num_things),
        )
    return targets


def is_of_size(boxes: Tensor, low: float, high: float) -> Tensor:
    """Whether the root of each box's area lies in a range, both ends included: float32 [..., 4] to bool [...]."""
    side = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])) ** 0.5
    return (side >= low) & (side <= high)


def four_samples(labels: Tensor, stride: int) -> Tensor:
    """The four pixels around the centre of each cell; a mask's bilinear value there is the share that belongs to it.

    Args:
        labels: int32 [B, H, W], H and W multiples of the stride.
        stride: Pixels per cell along an axis, even.

    Returns:
        int32 [B, H / stride, W / stride, 4].
    """
    first = stride // 2 - 1
    pixels = [labels[:, first + y :: stride, first + x :: stride] for y in (0, 1) for x in (0, 1)]
    return ops.stack(pixels, axis=-1)


def _centers_of_mass(samples: Tensor, max_instances: int) -> Tensor:
    """Mean position of the cells that an instance has a part of.

    Args:
        samples: int32 [h, w, 4] of the instance map: row + 1 on instances.
        max_instances: Rows, M.

    Returns:
        float32 [M, 2], (y, x) in cells; not finite where an instance has no cell.
    """
    import tensorflow as tf

    height, width = samples.shape[:2]
    # A cell counts once for each of its instances: a sample that repeats an earlier one is dropped.
    parts = []
    for index in range(4):
        repeats = [samples[..., index] == samples[..., earlier] for earlier in range(index)]
        is_new = samples[..., index] > 0
        for repeat in repeats:
            is_new &= ~repeat
        parts.append(tf.where(is_new, samples[..., index], 0))
    rows = tf.stack(parts, axis=-1)  # [h, w, 4], 0 for what does not count

    def mean(size: int, coordinate: Tensor) -> Tensor:
        length = (max_instances + 1) * size
        counts = tf.math.bincount(rows * size + coordinate, minlength=length, maxlength=length)
        counts = tf.cast(tf.reshape(counts, (max_instances + 1, size))[1:], tf.float64)  # [M, size]
        return tf.reduce_sum(counts * tf.range(size, dtype=tf.float64), axis=1) / tf.reduce_sum(counts, axis=1)

    y = mean(height, tf.range(height)[:, tf.newaxis, tf.newaxis])
    x = mean(width, tf.range(width)[tf.newaxis, :, tf.newaxis])
    return tf.cast(tf.stack([y, x], axis=-1), tf.float32)


def _gaussian_radius(size: Tensor, min_overlap: float) -> Tensor:
    """How far both corners of a box may move outwards or inwards so that it keeps an overlap, as CornerNet computes it.

    Args:
        size: float [M, 2], height and width of the boxes.
        min_overlap: Intersection over union.

    Returns:
        float [M], rounded down to whole pixels.
    """
    import tensorflow as tf

    total, area = size[:, 0] + size[:, 1], size[:, 0] * size[:, 1]
    root = tf.sqrt((min_overlap * total) ** 2 + 4 * min_overlap * (1 - min_overlap) * area)
    # CornerNet's formula, which divides by 2 in place of twice the leading factor.
    return tf.floor(root - min_overlap * total)


def _draw_gaussians(
    positions: Tensor, radius: Tensor, classes: Tensor, drawn: Tensor, *, patch: int, shape: tuple[int, int, int]
) -> Tensor:
    """Draws in patches, so that no map per instance is needed.

    Args:
        positions: int32 [M, 2], (y, x).
        radius: float [M]: a Gaussian ends there, and its standard deviation is (2 radius + 1) / 3.
        classes: int32 [M].
        drawn: bool [M], false for rows that are not drawn.
        patch: No radius is larger than this.
        shape: h, w and number of classes.

    Returns:
        float32 [h, w, C], the maximum of the Gaussians of each class.
    """
    import tensorflow as tf

    offset = tf.range(-patch, patch + 1)
    dy, dx = offset[tf.newaxis, :, tf.newaxis], offset[tf.newaxis, tf.newaxis, :]
    radius = tf.cast(radius, tf.float32)[:, tf.newaxis, tf.newaxis]
    sigma = (2 * radius + 1) / 3
    value = tf.exp(-tf.cast(dy**2 + dx**2, tf.float32) / (2 * sigma**2))  # [M, P, P]
    y = positions[:, 0, tf.newaxis, tf.newaxis] + dy  # [M, P, 1]
    x = positions[:, 1, tf.newaxis, tf.newaxis] + dx  # [M, 1, P]
    is_inside = (y >= 0) & (y < shape[0]) & (x >= 0) & (x < shape[1]) & drawn[:, tf.newaxis, tf.newaxis]
    is_inside &= tf.cast(tf.maximum(tf.abs(dy), tf.abs(dx)), tf.float32) <= radius
    index = (y * shape[1] + x) * shape[2] + classes[:, tf.newaxis, tf.newaxis]  # [M, P, P]
    flat = tf.zeros([shape[0] * shape[1] * shape[2]])
    # What lies outside is drawn as 0.
    index, value = tf.where(is_inside, index, 0), tf.where(is_inside, value, 0.0)
    flat = tf.tensor_scatter_nd_max(flat, tf.reshape(index, [-1, 1]), tf.reshape(value, [-1]))
    return tf.reshape(flat, shape)


def level_shares(samples: Tensor, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Resizes the cells of the feature to a level, bilinearly, without a mask for each label.

    The value of a label's mask at a position of the level is the sum of the shares of the samples that have the label.

    Args:
        samples: int32 [B, H, W, 4] of `four_samples`.
        size: Height and width of the level, static.

    Returns:
        16 pairs of a label, int32 [B, h, w], and its share, float32 [h, w].
    """
    height, width = samples.shape[1:3]

    def axis(old: int, new: int) -> list[tuple[Tensor, Tensor]]:
        position = (ops.arange(new, dtype="float32") + 0.5) * (old / new) - 0.5
        position = ops.clip(position, 0.0, old - 1.0)
        first = ops.cast(ops.floor(position), "int32")
        weight = position - ops.floor(position)
        return [(first, 1 - weight), (ops.minimum(first + 1, old - 1), weight)]

    pairs = []
    for y, y_weight in axis(height, size[0]):
        line = ops.take(samples, y, axis=1)  # [B, h, W, 4]
        for x, x_weight in axis(width, size[1]):
            cells = ops.take(line, x, axis=2)  # [B, h, w, 4]
            share = y_weight[:, None] * x_weight[None, :] / 4  # [h, w]
            pairs += [(cells[..., index], share) for index in range(4)]
    return pairs
