"""Targets of Panoptic FCN: heat maps of object centers, and samples of label maps (section 3.1, appendix A.1)."""

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.detection.instances import class_and_instance_targets
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fcn.config import PanopticFCNConfig


def make_targets(
    panoptic: Tensor, config: PanopticFCNConfig, dataset_info: DatasetInfo, *, size_multiple: int
) -> dict[str, Tensor]:
    """Lists the instances of one image, and draws a Gaussian at the center of each, with `tf` graph operations.

    An instance is drawn on every level whose size range contains it; the ranges overlap, so most are on two levels.

    Args:
        panoptic: int32 [H, W] panoptic map, static size.
        config: Levels, size ranges, kind of center, and size of the Gaussians: a box whose corners move by the radius
            keeps an IoU of `loss.min_overlap`, as in CornerNet.
        dataset_info: The meaning of the values of the map.
        size_multiple: Images are padded to a multiple of this many pixels before the network sees them.

    Returns:
        `semantic`: int32 [H, W], class id, or the ignore label.
        `boxes`, `classes`, `valid` and `instance_map` of `instance_targets`, with M = `loss.max_instances` rows; the
            instance map is -1 on void, too.
        `centers`: float32 [M, 2], (y, x) in pixels; 0 in unused rows.
        `heat_<level>`: float32 [h, w, T], the maximum of the Gaussians of each thing class, exactly 1 at the position
            that contains the center.
    """
    import tensorflow as tf  # Here, because the networks must import without TensorFlow.

    height, width = panoptic.shape
    max_instances, stride = config.loss.max_instances, config.stride
    instances = class_and_instance_targets(panoptic, dataset_info, max_instances)
    boxes, valid = instances["boxes"], instances["valid"]

    centers = (boxes[:, :2] + boxes[:, 2:]) / 2  # [M, 2]
    if config.loss.center == "mass":
        padded = tf.pad(instances["instance_map"], [[0, -height % size_multiple], [0, -width % size_multiple]])
        samples = sample_cells(padded[tf.newaxis], stride)[0]  # [h, w, 4]
        centers_of_mass = _centers_of_mass(samples, max_instances) * stride
        # Objects of a few pixels can lie between the samples; these keep the center of their box.
        centers = tf.where(tf.math.is_finite(centers_of_mass), centers_of_mass, centers)
    centers = tf.where(valid[:, tf.newaxis], centers, 0.0)

    num_things = len(dataset_info.thing_classes)
    targets = {**instances, "centers": centers}
    for level, level_stride in config.level_strides.items():
        low, high = config.size_ranges[level]
        shape = [-(-(side + -side % size_multiple) // level_stride) for side in (height, width)]
        radius = _gaussian_radius((boxes[:, 2:] - boxes[:, :2]) / level_stride, config.loss.min_overlap)  # [M]
        # Among boxes of equal area, the square has the largest radius.
        largest = min(high, max(height, width)) / level_stride
        max_radius = int(_gaussian_radius(tf.constant([[largest, largest]], tf.float64), config.loss.min_overlap)[0])
        targets[f"heat_{level}"] = _draw_gaussians(
            tf.cast(tf.floor(centers / level_stride), tf.int32),
            radius,
            instances["classes"],
            valid & is_in_size_range(boxes, low, high),
            max_radius=max_radius + 1,
            shape=(*shape, num_things),
        )
    return targets


def is_in_size_range(boxes: Tensor, low: float, high: float) -> Tensor:
    """Returns whether the square root of a box's area is in [low, high]: float32 [..., 4] to bool [...]."""
    size = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])) ** 0.5
    return (size >= low) & (size <= high)


def sample_cells(labels: Tensor, stride: int) -> Tensor:
    """Reads the four pixels around the center of each cell.

    The share of the four pixels that have a label is the value of that label's mask, resized bilinearly to the cells.

    Args:
        labels: int32 [B, H, W], H and W multiples of the stride.
        stride: Pixels per cell along an axis, even.

    Returns:
        int32 [B, H / stride, W / stride, 4].
    """
    first = stride // 2 - 1
    pixels = [labels[:, first + y :: stride, first + x :: stride] for y in (0, 1) for x in (0, 1)]
    return ops.stack(pixels, axis=-1)


def weighted_labels(samples: Tensor, size: tuple[int, int]) -> list[tuple[Tensor, Tensor]]:
    """Resizes samples to a level, bilinearly, without a mask for each label.

    At each position, the sum of the weights of all samples with a label is the value of that label's resized mask.

    Args:
        samples: int32 [B, H, W, 4] of `sample_cells`.
        size: Height and width of the level, static.

    Returns:
        16 pairs of a label, int32 [B, h, w], and its weight, float32 [h, w].
    """
    height, width = samples.shape[1:3]

    def neighbors(old: int, new: int) -> list[tuple[Tensor, Tensor]]:
        position = (ops.arange(new, dtype="float32") + 0.5) * (old / new) - 0.5
        position = ops.clip(position, 0.0, old - 1.0)
        first = ops.cast(ops.floor(position), "int32")
        weight = position - ops.floor(position)
        return [(first, 1 - weight), (ops.minimum(first + 1, old - 1), weight)]

    pairs = []
    for y, y_weight in neighbors(height, size[0]):
        row = ops.take(samples, y, axis=1)  # [B, h, W, 4]
        for x, x_weight in neighbors(width, size[1]):
            labels = ops.take(row, x, axis=2)  # [B, h, w, 4]
            weight = y_weight[:, None] * x_weight[None, :] / 4  # [h, w]
            pairs += [(labels[..., index], weight) for index in range(4)]
    return pairs


def label_share(pairs: list[tuple[Tensor, Tensor]], label: int) -> Tensor:
    """Returns the share of each position that has a label, float32 [B, h, w]; `pairs` is of `weighted_labels`."""
    share: Tensor = 0.0
    for labels, weight in pairs:
        share = share + ops.cast(labels == label, "float32") * weight
    return share


def region_targets(pairs: list[tuple[Tensor, Tensor]], num_regions: int) -> Tensor:
    """Returns the share of each position that has each label; shares below one half become 0.

    Args:
        pairs: Result of `weighted_labels`.
        num_regions: S; larger labels are left out.

    Returns:
        float32 [B, h, w, S].
    """
    share: Tensor = 0.0
    for labels, weight in pairs:
        share = share + ops.one_hot(labels, num_regions, dtype="float32") * weight[..., None]
    return ops.where(share >= 0.5, ops.minimum(share, 1.0), 0.0)


def _centers_of_mass(samples: Tensor, max_instances: int) -> Tensor:
    """Averages the positions of the cells that each instance touches.

    Args:
        samples: int32 [h, w, 4] of the instance map, which is the row + 1 on instances.
        max_instances: Number of rows, M.

    Returns:
        float32 [M, 2], (y, x) in cells; not finite for instances that touch no cell.
    """
    import tensorflow as tf

    height, width = samples.shape[:2]
    # A cell counts once for each of its instances: a sample equal to an earlier one of the cell becomes 0.
    parts = []
    for index in range(4):
        repeats = [samples[..., index] == samples[..., earlier] for earlier in range(index)]
        is_new = samples[..., index] > 0
        for repeat in repeats:
            is_new &= ~repeat
        parts.append(tf.where(is_new, samples[..., index], 0))
    rows = tf.stack(parts, axis=-1)  # [h, w, 4], 0 for samples that do not count

    def mean(size: int, coordinate: Tensor) -> Tensor:
        length = (max_instances + 1) * size
        counts = tf.math.bincount(rows * size + coordinate, minlength=length, maxlength=length)
        counts = tf.cast(tf.reshape(counts, (max_instances + 1, size))[1:], tf.float64)  # [M, size]
        return tf.reduce_sum(counts * tf.range(size, dtype=tf.float64), axis=1) / tf.reduce_sum(counts, axis=1)

    y = mean(height, tf.range(height)[:, tf.newaxis, tf.newaxis])
    x = mean(width, tf.range(width)[tf.newaxis, :, tf.newaxis])
    return tf.cast(tf.stack([y, x], axis=-1), tf.float32)


def _gaussian_radius(size: Tensor, min_overlap: float) -> Tensor:
    """Returns the distance that both corners of a box may move while it keeps an IoU, as CornerNet computes it.

    Args:
        size: float [M, 2], height and width of the boxes.
        min_overlap: The smallest IoU.

    Returns:
        float [M], rounded down to whole positions.
    """
    import tensorflow as tf

    total, area = size[:, 0] + size[:, 1], size[:, 0] * size[:, 1]
    root = tf.sqrt((min_overlap * total) ** 2 + 4 * min_overlap * (1 - min_overlap) * area)
    # CornerNet's formula, which divides by 2 instead of twice the leading coefficient.
    return tf.floor(root - min_overlap * total)


def _draw_gaussians(
    positions: Tensor, radius: Tensor, classes: Tensor, drawn: Tensor, *, max_radius: int, shape: tuple[int, int, int]
) -> Tensor:
    """Draws a Gaussian patch per instance, without a map per instance.

    Args:
        positions: int32 [M, 2], (y, x).
        radius: float [M], where a Gaussian is cut; its standard deviation is (2 radius + 1) / 3.
        classes: int32 [M].
        drawn: bool [M], false for rows to leave out.
        max_radius: Upper bound of all radii.
        shape: h, w and C, the number of classes.

    Returns:
        float32 [h, w, C], the maximum of the Gaussians of each class.
    """
    import tensorflow as tf

    offset = tf.range(-max_radius, max_radius + 1)
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
    # Pixels outside are drawn as 0 at position 0.
    index, value = tf.where(is_inside, index, 0), tf.where(is_inside, value, 0.0)
    flat = tf.tensor_scatter_nd_max(flat, tf.reshape(index, [-1, 1]), tf.reshape(value, [-1]))
    return tf.reshape(flat, shape)
