"""The instances of a panoptic map as a table of boxes and classes, and a map of table rows instead of masks."""

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.layers import Tensor


def class_and_instance_targets(panoptic: Tensor, dataset_info: DatasetInfo, max_instances: int) -> dict[str, Tensor]:
    """Lists the classes and the instances of one image; void counts as crowd, as its instances are unknown, too.

    Args:
        panoptic: int32 [H, W] panoptic map, static size.
        dataset_info: The meaning of its values.
        max_instances: See `instance_targets`.

    Returns:
        `semantic`: int32 [H, W], class id, or the ignore label; and the result of `instance_targets`, whose
        `instance_map` is -1 on void.
    """
    import tensorflow as tf  # Here, because the networks must import without TensorFlow.

    class_map = panoptic // dataset_info.label_divisor
    instances = instance_targets(panoptic, dataset_info, max_instances)
    instances["instance_map"] = tf.where(class_map == dataset_info.ignore_label, -1, instances["instance_map"])
    return {"semantic": class_map, **instances}


def instance_targets(panoptic: Tensor, dataset_info: DatasetInfo, max_instances: int) -> dict[str, Tensor]:
    """Lists the instances of one image with `tf` graph operations; there is no loop over instances.

    One map of row numbers holds the masks of all instances, as a pixel belongs to one instance at most.

    Args:
        panoptic: int32 [H, W] panoptic map, static size.
        dataset_info: The meaning of its values.
        max_instances: Rows of the table, M. If there are more instances, the largest are listed and the others count
            as crowd.

    Returns:
        `boxes`: float32 [M, 4], tight around the instance's pixels: [first row, first column, last row + 1, last
        column + 1]; 0 in unused rows.
        `classes`: int32 [M], position among `dataset_info.thing_classes` (not the class id); 0 in unused rows.
        `valid`: bool [M]; the used rows come first, in descending order of area.
        `instance_map`: int32 [H, W], row + 1 on the instances; -1 on crowd, that is, on thing pixels without a listed
        instance; 0 on stuff and void.
    """
    import tensorflow as tf  # Here, because the networks must import without TensorFlow.

    height, width = panoptic.shape
    divisor = dataset_info.label_divisor
    thing_of_class = [-1] * (max(dataset_info.ignore_label, dataset_info.num_classes) + 1)
    for position, class_id in enumerate(dataset_info.thing_classes):
        thing_of_class[class_id] = position
    is_thing = tf.gather(tf.constant(thing_of_class) >= 0, panoptic // divisor)  # [H, W]

    # Bin 0 is for everything but instances.
    bins = tf.where(is_thing & (panoptic % divisor > 0), panoptic, 0)  # [H, W]
    num_bins = dataset_info.num_classes * divisor
    area = tf.math.bincount(bins, minlength=num_bins, maxlength=num_bins)
    area = tf.concat([[0], area[1:], tf.zeros([max_instances], area.dtype)], axis=0)
    area, panoptic_id = tf.math.top_k(area, max_instances)
    valid = area > 0  # [M]
    row_of_bin = tf.scatter_nd(
        tf.where(valid, panoptic_id, num_bins)[:, tf.newaxis], tf.range(1, max_instances + 1), [num_bins + 1]
    )
    row = tf.gather(row_of_bin, bins)  # [H, W], row + 1
    instance_map = tf.where(is_thing & (row == 0), -1, row)

    def extent(axis: int, size: int) -> tuple[Tensor, Tensor]:
        """First and last + 1 coordinate of each row along an axis, by a histogram of pairs of row and coordinate."""
        coordinate = tf.range(size)[:, tf.newaxis] if axis == 0 else tf.range(size)[tf.newaxis, :]
        length = (max_instances + 1) * size
        counts = tf.math.bincount(row * size + coordinate, minlength=length, maxlength=length)
        present = tf.cast(tf.reshape(counts, (max_instances + 1, size))[1:] > 0, tf.int32)  # [M, size]
        return tf.argmax(present, axis=1), size - tf.argmax(present[:, ::-1], axis=1)

    (y_min, y_max), (x_min, x_max) = extent(0, height), extent(1, width)
    boxes = tf.cast(tf.stack([y_min, x_min, y_max, x_max], axis=-1), tf.float32)
    class_of_row = tf.gather(tf.constant(thing_of_class), tf.where(valid, panoptic_id // divisor, 0))
    return {
        "boxes": tf.where(valid[:, tf.newaxis], boxes, 0.0),
        "classes": tf.where(valid, class_of_row, 0),
        "valid": valid,
        "instance_map": instance_map,
    }


def thing_class_ids(positions: Tensor, dataset_info: DatasetInfo) -> Tensor:
    """Returns class ids, int32 [...], for positions among the thing classes, int32 [...]."""
    return ops.take(ops.array(dataset_info.thing_classes, "int32"), positions)
