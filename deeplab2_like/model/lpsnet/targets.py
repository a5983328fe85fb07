"""Targets of LPSNet: points that belong to objects, distances to the sides of boxes, border-ness (section 3.2).

A point of a level with stride s lies at (s / 2 + y * s, s / 2 + x * s), in pixels of the image, and belongs to the
pixel that begins there.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.boxes import box_area
from deeplab2_like.model.detection.instances import instance_targets
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.lpsnet.config import BoxConfig


def make_targets(
    panoptic: Tensor, config: BoxConfig, dataset_info: DatasetInfo, *, max_instances: int, size_multiple: int
) -> dict[str, Tensor]:
    """Assigns an object, or none, to each point of each level, and computes its targets (section 3.2).

    Args:
        panoptic: int32 [H, W] panoptic map, static size.
        config: Levels and kinds of targets. With `positives` "mask", a point belongs to the object whose mask it is in;
            with "box", as in FCOS, to the smallest object of the level whose box it is in (Figure 3). Border-ness is
            measured to the borders of the mask or, like the center-ness of FCOS, of the box (Figure 4).
        dataset_info: The meaning of the values of the map.
        max_instances: Largest number of instances, M; the largest ones are kept.
        size_multiple: Images are padded to a multiple of this many pixels before the network sees them.

    Returns:
        `semantic`: int32 [H, W], class id, or the ignore label.
        `boxes`, `classes`, `valid` and `instance_map` of `instance_targets`.
        `positive_<level>`: bool [h, w], the points that belong to an object.
        `distances_<level>`: float32 [h, w, 4], to the left, top, right and bottom side of the object's box, in pixels;
            0 where not positive.
        `border_ness_<level>`: float32 [h, w], 0 where not positive.
    """
    height, width = panoptic.shape
    instances = instance_targets(panoptic, dataset_info, max_instances)
    borders = mask_borders(instances["instance_map"][None], max_instances)
    targets = {"semantic": panoptic // dataset_info.label_divisor, **instances}
    for index, (level, stride) in enumerate(config.level_strides.items()):
        sides = [-(-(side + -side % size_multiple) // stride) for side in (height, width)]
        y, x = ((ops.cast(ops.arange(side), "float32") + 0.5) * stride for side in sides)
        y, x = y[:, None], x[None, :]
        if config.positives == "box":
            rows = _smallest_box(instances["boxes"], instances["valid"], y, x, index, config.size_limits)
        else:
            first = stride // 2
            rows = instances["instance_map"][first::stride, first::stride] - 1
            # Points in the padding belong to no object.
            margins = [[0, side - inside] for side, inside in zip(sides, rows.shape, strict=True)]
            rows = ops.pad(rows, margins, constant_values=-1)
        row = ops.maximum(rows, 0)
        distances = distances_to_boxes(ops.take(instances["boxes"], row, axis=0), y, x)  # [h, w, 4]
        positive = (rows >= 0) & (level_index(ops.max(distances, axis=-1), config.size_limits) == index)
        measured = distances
        if config.measured_to == "mask":
            inside_y, inside_x = ops.minimum(y, height - 1.0), ops.minimum(x, width - 1.0)
            measured = borders.distances(row[None], inside_y, inside_x)[0]
        targets[f"positive_{level}"] = positive
        targets[f"distances_{level}"] = ops.where(positive[..., None], distances, 0.0)
        targets[f"border_ness_{level}"] = ops.where(positive, border_ness(measured), 0.0)
    return targets


def border_ness(distances: Tensor) -> Tensor:
    """Computes border-ness: 1 in the middle between four borders, 0 on a border (equation 1).

    The root covers the whole product, as in FCOS. The equation can also be read as the root of one factor only, but
    then the two axes would count differently.

    Args:
        distances: float32 [..., 4], to the left, top, right and bottom border.

    Returns:
        float32 [...]; 0 if any distance is negative.
    """
    left, top, right, bottom = ops.unstack(distances, 4, axis=-1)
    return ops.sqrt(border_ratio(left, right) * border_ratio(top, bottom))


def border_ratio(first: Tensor, second: Tensor) -> Tensor:
    """Divides the smaller of two distances by the larger one, a factor of equation 1; 0 if one is negative."""
    return ops.maximum(ops.minimum(first, second), 0.0) / ops.maximum(ops.maximum(first, second), 1e-6)


def distances_to_boxes(boxes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Computes the distances of points to the sides of boxes, negative outside.

    Args:
        boxes: float32 [..., 4].
        y: float32, rows of the points; boxes, y and x broadcast.
        x: float32, columns of the points.

    Returns:
        float32 [..., 4], to the left, top, right and bottom side.
    """
    y_min, x_min, y_max, x_max = ops.unstack(boxes, 4, axis=-1)
    same_shape = ops.zeros_like(y_min + y + x)
    return ops.stack([side + same_shape for side in (x - x_min, y - y_min, x_max - x, y_max - y)], axis=-1)


class MaskBorders(NamedTuple):
    """The outermost pixels of each mask in each row and column; an occluder in front of an object adds no borders.

    Attributes:
        left: int32 [B, M, H], first column of the mask in each row; W if the row is empty.
        right: int32 [B, M, H], last column + 1; 0 if the row is empty.
        top: int32 [B, M, W], first row of the mask in each column; H if the column is empty.
        bottom: int32 [B, M, W], last row + 1; 0 if the column is empty.
    """

    left: Tensor
    right: Tensor
    top: Tensor
    bottom: Tensor

    def distances(self, rows: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Computes the distances of points to the borders of masks, in the pixel row and column of each point.

        Args:
            rows: int32 [B, ...], the mask of each point.
            y: float32, rows of the points; broadcasts to `rows`.
            x: float32, columns of the points; broadcasts to `rows`.

        Returns:
            float32 [B, ..., 4], to the left, top, right and bottom border; negative outside.
        """
        batch, masks, height = ops.shape(self.left)
        width = ops.shape(self.top)[2]
        image = ops.reshape(ops.arange(batch), (-1, *[1] * (len(rows.shape) - 1)))
        mask = image * masks + rows
        line = mask * height + ops.cast(y, "int32")
        column = mask * width + ops.cast(x, "int32")

        def read(table: Tensor, index: Tensor) -> Tensor:
            return ops.cast(ops.take(ops.reshape(table, (-1,)), index), "float32")

        left, right = read(self.left, line), read(self.right, line)
        top, bottom = read(self.top, column), read(self.bottom, column)
        return ops.stack([x - left, y - top, right - x, bottom - y], axis=-1)


def mask_borders(instance_map: Tensor, num_masks: int) -> MaskBorders:
    """Measures the borders of the masks in an instance map.

    Args:
        instance_map: int32 [B, H, W] of `instance_targets`: the row + 1 on instances.
        num_masks: Number of rows, M.
    """
    batch, height, width = ops.shape(instance_map)
    # Row 0 is for pixels without an instance.
    row = ops.maximum(instance_map, 0) + ops.arange(batch)[:, None, None] * (num_masks + 1)  # [B, H, W]
    y, x = ops.arange(height)[:, None], ops.arange(width)[None, :]

    def largest(value: Tensor, coordinate: Tensor, size: Any) -> Tensor:
        """Largest value of each mask at each coordinate along the other axis, 0 where it has no pixel."""
        index = ops.reshape(row * size + coordinate, (-1,))  # [B * H * W]
        value = ops.reshape(ops.broadcast_to(value, (batch, height, width)), (-1,))  # [B * H * W]
        maximum = ops.segment_max(value, index, num_segments=batch * (num_masks + 1) * size)
        return ops.maximum(ops.reshape(maximum, (batch, num_masks + 1, size))[:, 1:], 0)  # [B, M, size]

    return MaskBorders(
        left=width - largest(width - x, y, height),
        right=largest(x + 1, y, height),
        top=height - largest(height - y, x, width),
        bottom=largest(y + 1, x, width),
    )


def level_index(largest: Tensor, size_limits: Sequence[Any]) -> Tensor:
    """Returns the level of a point by its largest distance to a side of its box, as in FCOS.

    Args:
        largest: float32 [...], in pixels.
        size_limits: For each level but the last, the largest distance on it, in pixels.

    Returns:
        int32 [...], position among the levels.
    """
    level = ops.zeros_like(largest, "int32")
    for limit in size_limits:
        level = level + ops.cast(largest > limit, "int32")
    return level


def _smallest_box(
    boxes: Tensor, valid: Tensor, y: Tensor, x: Tensor, index: int, size_limits: Sequence[float]
) -> Tensor:
    """Returns the smallest box around each point among those of the level, int32 [h, w]; -1 where there is none."""
    distances = distances_to_boxes(boxes, y[..., None], x[..., None])  # [h, w, M, 4]
    fits = (ops.min(distances, axis=-1) > 0) & (level_index(ops.max(distances, axis=-1), size_limits) == index) & valid
    area = ops.where(fits, box_area(boxes), float("inf"))  # [h, w, M]
    return ops.where(ops.any(fits, axis=-1), ops.cast(ops.argmin(area, axis=-1), "int32"), -1)
