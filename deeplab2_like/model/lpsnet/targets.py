"""Targets of LPSNet: which points of which level stand for an object, its sides seen from them, their border-ness.

A point of a level with stride s lies at (s / 2 + y * s, s / 2 + x * s), in pixels of the image, and belongs to the
pixel that begins there.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.boxes import box_area
from deeplab2_like.model.detection.instances import instance_targets
from deeplab2_like.model.layers import Tensor


def border_ness(distances: Tensor) -> Tensor:
    """How near a point is to the middle between four borders: 1 in the middle, 0 on a border (equation 1).

    The root is that of the whole product, as in FCOS; with the root of one factor only, as the equation may be read,
    the axes would count differently.

    Args:
        distances: float32 [..., 4], to the left, top, right and bottom border; 0 if any is negative.

    Returns:
        float32 [...].
    """
    left, top, right, bottom = ops.unstack(distances, 4, axis=-1)
    return ops.sqrt(border_ratio(left, right) * border_ratio(top, bottom))


def border_ratio(first: Tensor, second: Tensor) -> Tensor:
    """The share of equation 1 along one axis: the smaller of two distances by the larger one; 0 if one is negative."""
    return ops.maximum(ops.minimum(first, second), 0.0) / ops.maximum(ops.maximum(first, second), 1e-6)


def distances_to_boxes(boxes: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """Distances of points to the sides of boxes, negative outside.

    Args:
        boxes: float32 [..., 4].
        y: float32, of the points, broadcastable to the others.
        x: float32, broadcastable to the others.

    Returns:
        float32 [..., 4], to the left, top, right and bottom.
    """
    y_min, x_min, y_max, x_max = ops.unstack(boxes, 4, axis=-1)
    same_shape = ops.zeros_like(y_min + y + x)
    return ops.stack([side + same_shape for side in (x - x_min, y - y_min, x_max - x, y_max - y)], axis=-1)


class Borders(NamedTuple):
    """The outermost pixels of each mask in each row and column: what lies in front of an object does not cut it.

    Attributes:
        left: int32 [B, M, H], first column of the mask in each row; W where it has no pixel.
        right: int32 [B, M, H], the column after the last one; 0 where it has no pixel.
        top: int32 [B, M, W], first row of the mask in each column; H where it has no pixel.
        bottom: int32 [B, M, W], the row after the last one; 0 where it has no pixel.
    """

    left: Tensor
    right: Tensor
    top: Tensor
    bottom: Tensor

    def distances(self, rows: Tensor, y: Tensor, x: Tensor) -> Tensor:
        """Distances of points to the borders of masks, in the row and the column of the pixel that holds each.

        Args:
            rows: int32 [B, ...], the mask of each point.
            y: float32, broadcastable to `rows`.
            x: float32, broadcastable to `rows`.

        Returns:
            float32 [B, ..., 4], to the left, top, right and bottom; negative outside.
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


def mask_borders(instance_map: Tensor, number: int) -> Borders:
    """Measures masks, all kept in one map.

    Args:
        instance_map: int32 [B, H, W] of `instance_targets`: row + 1 on the instances.
        number: M, rows.
    """
    batch, height, width = ops.shape(instance_map)
    # Row 0 is for all that is no instance.
    row = ops.maximum(instance_map, 0) + ops.arange(batch)[:, None, None] * (number + 1)  # [B, H, W]
    y, x = ops.arange(height)[:, None], ops.arange(width)[None, :]

    def largest(value: Tensor, along: Tensor, size: Any) -> Tensor:
        """Largest value of each row at each place along the other axis, 0 where it has no pixel."""
        index = ops.reshape(row * size + along, (-1,))
        value = ops.reshape(ops.broadcast_to(value, (batch, height, width)), (-1,))
        found = ops.segment_max(value, index, num_segments=batch * (number + 1) * size)
        return ops.maximum(ops.reshape(found, (batch, number + 1, size))[:, 1:], 0)  # [B, M, size]

    return Borders(
        left=width - largest(width - x, y, height),
        right=largest(x + 1, y, height),
        top=height - largest(height - y, x, width),
        bottom=largest(y + 1, x, width),
    )


def level_of(largest: Tensor, size_limits: Sequence[float]) -> Tensor:
    """The level that a point belongs to by its largest distance to a side, as in FCOS.

    Args:
        largest: float32 [...], in pixels.
        size_limits: Between one level and the next, in pixels; a distance at a limit belongs to the finer level.

    Returns:
        int32 [...], position among the levels.
    """
    level = ops.zeros_like(largest, "int32")
    for limit in size_limits:
        level = level + ops.cast(largest > limit, "int32")
    return level


def make_targets(
    panoptic: Tensor,
    *,
    dataset_info: DatasetInfo,
    level_strides: Mapping[str, int],
    size_limits: Sequence[float],
    size_multiple: int,
    max_instances: int,
    positives: Literal["mask", "box"],
    measured_to: Literal["mask", "box"],
) -> dict[str, Tensor]:
    """Says for each point of each level whether it stands for an object, and what it shall predict (section 3.2).

    Args:
        panoptic: int32 [H, W] panoptic map, static size.
        dataset_info: What its values mean.
        level_strides: Stride of each level of the box head, by its name.
        size_limits: See `level_of`.
        size_multiple: The network sees images padded to a multiple of this.
        max_instances: Most instances, M; the largest.
        positives: Whether points stand for the object whose mask they are in, or, as in FCOS, for the smallest object
            of the level's size whose box they are in (Figure 3).
        measured_to: Whether border-ness is measured to the borders of the mask, or, as centre-ness in FCOS, to the
            sides of the box (Figure 4).

    Returns:
        `semantic`: int32 [H, W], class id, or the ignore label. What `instance_targets` returns. And for each level
        `positive_<level>`: bool [h, w]; `distances_<level>`: float32 [h, w, 4], to the left, top, right and bottom
        side of the object's box, in pixels; `border_ness_<level>`: float32 [h, w]. The last two are 0 where not
        positive.
    """
    height, width = panoptic.shape
    instances = instance_targets(panoptic, dataset_info, max_instances)
    borders = mask_borders(instances["instance_map"][None], max_instances)
    targets = {"semantic": panoptic // dataset_info.label_divisor, **instances}
    for index, (level, stride) in enumerate(level_strides.items()):
        sides = [-(-(side + -side % size_multiple) // stride) for side in (height, width)]
        # Points beyond the image stand for nothing.
        first = stride // 2
        rows = instances["instance_map"][first::stride, first::stride] - 1
        rows = ops.pad(
            rows, [[0, side - there] for side, there in zip(sides, rows.shape, strict=True)], constant_values=-1
        )
        y, x = ((ops.cast(ops.arange(side), "float32") + 0.5) * stride for side in sides)
        y, x = y[:, None], x[None, :]
        if positives == "box":
            rows = _smallest_box(instances["boxes"], instances["valid"], y, x, index, size_limits)
        row = ops.maximum(rows, 0)
        distances = distances_to_boxes(ops.take(instances["boxes"], row, axis=0), y, x)  # [h, w, 4]
        positive = (rows >= 0) & (level_of(ops.max(distances, axis=-1), size_limits) == index)
        if measured_to == "mask":
            inside_y, inside_x = ops.minimum(y, height - 1.0), ops.minimum(x, width - 1.0)
            measured = borders.distances(row[None], inside_y, inside_x)[0]
        else:
            measured = distances
        targets[f"positive_{level}"] = positive
        targets[f"distances_{level}"] = ops.where(positive[..., None], distances, 0.0)
        targets[f"border_ness_{level}"] = ops.where(positive, border_ness(measured), 0.0)
    return targets


def _smallest_box(
    boxes: Tensor, valid: Tensor, y: Tensor, x: Tensor, index: int, size_limits: Sequence[float]
) -> Tensor:
    """The smallest box of a level's size around each point: int32 [h, w], -1 where there is none."""
    distances = distances_to_boxes(boxes, y[..., None], x[..., None])  # [h, w, M, 4]
    fits = (ops.min(distances, axis=-1) > 0) & (level_of(ops.max(distances, axis=-1), size_limits) == index) & valid
    area = ops.where(fits, box_area(boxes), float("inf"))  # [h, w, M]
    return ops.where(ops.any(fits, axis=-1), ops.cast(ops.argmin(area, axis=-1), "int32"), -1)
