"""The segment table of a panoptic map: instances painted over semantic classes, in static shapes.

A map is made of *rows*, int32 [B, H, W]: for each pixel the row of a table of segments, instances first, then one row
per class, then one for pixels without a segment. The table holds the value to paint, see `PanopticSystem.postprocess`.

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.stages`.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import stage


class SegmentTable(NamedTuple):
    """A panoptic map and the table of its segments: N instances and C classes.

    Attributes:
        panoptic: int32 [B, H, W].
        segment_id: int32 [B, N + C]: the value of each segment in the map, zero in unused rows. Row n is an instance,
            row N + c the region of class c.
        segment_class: int32 [B, N + C], its class id, zero in unused rows.
        kept: bool [B, N + C], the used rows.
        rows: int32 [B, H, W], the row of each pixel; N + C for pixels without a segment.
        area: int32 [B, N + C + 1], pixels of each row, used or not.
    """

    panoptic: Tensor
    segment_id: Tensor
    segment_class: Tensor
    kept: Tensor
    rows: Tensor
    area: Tensor


def paint_segments(
    semantic: Tensor,
    owner: Tensor,
    classes: Tensor,
    *,
    class_of_semantic: Sequence[int],
    dataset_info: DatasetInfo,
    stuff_area_limit: int,
) -> SegmentTable:
    """Paints instances over semantic classes (Panoptic FPN, section 3.2).

    A pixel without an instance belongs to the region of its semantic class. Regions that are too small, and pixels of
    semantic classes that are not painted, become void.

    Args:
        semantic: int32 [B, H, W], best semantic class of each pixel.
        owner: int32 [B, H, W], the instance of each pixel, or N where there is none, see `resolve_overlaps`.
        classes: int32 [B, N], class ids of the instances.
        class_of_semantic: Class id of each semantic class, or -1 for those that are not painted.
        dataset_info: The meaning of the panoptic map; it has C classes.
        stuff_area_limit: Regions of fewer pixels become void.

    Returns:
        The map and its table of N instances and C classes.
    """
    num_classes, divisor, void = dataset_info.num_classes, dataset_info.label_divisor, dataset_info.void
    batch, num_instances = ops.shape(classes)[0], classes.shape[1]
    row_of_semantic = [num_instances + (c if c >= 0 else num_classes) for c in class_of_semantic]
    rows = assign_rows(semantic, owner, ops.array(row_of_semantic, "int32"), num_instances=num_instances)
    area = count_pixels(rows, num_rows=num_instances + num_classes + 1)

    present = area[:, :num_instances] > 0
    instance_value = classes * divisor + number_within_class(classes, present)
    class_ids = ops.arange(num_classes)[None, :] + ops.zeros((batch, 1), "int32")  # [B, C]
    class_area = area[:, num_instances:-1]
    kept = ops.concatenate([present, (class_area >= stuff_area_limit) & (class_area > 0)], axis=1)  # [B, N + C]
    value = ops.concatenate([instance_value, class_ids * divisor], axis=1)
    table = ops.concatenate([ops.where(kept, value, void), ops.full((batch, 1), void, "int32")], axis=1)
    return SegmentTable(
        panoptic=look_up(table, rows),
        segment_id=ops.where(kept, value, 0),
        segment_class=ops.where(kept, ops.concatenate([classes, class_ids], axis=1), 0),
        kept=kept,
        rows=rows,
        area=area,
    )


def region_scores(
    probability: Tensor, table: SegmentTable, semantic_of_class: Sequence[int], geometry: Geometry, *, stride: int
) -> Tensor:
    """Averages the probability of each class over its region.

    Args:
        probability: float32 [B, h, w, S], of the semantic classes.
        table: The result of `paint_segments`.
        semantic_of_class: Semantic class of each class id.
        geometry: Sizes of the images.
        stride: Network pixels per probability.

    Returns:
        float32 [B, C], for each class id.
    """
    num_instances = table.area.shape[1] - len(semantic_of_class) - 1
    row_class = ops.array([0] * num_instances + [*semantic_of_class, 0], "int32")
    mean = mean_probability(
        probability,
        table.rows,
        ops.broadcast_to(row_class[None], ops.shape(table.area)),
        table.area,
        stride=geometry.map_stride(stride),
        **geometry.network_sides,
    )
    return mean[:, num_instances:-1]


def segment_outputs(table: SegmentTable, instance_scores: Tensor, region_scores: Tensor) -> dict[str, Tensor]:
    """Makes the dictionary that `PanopticSystem.postprocess` returns.

    Args:
        table: The result of `paint_segments`, of N instances and C classes.
        instance_scores: float32 [B, N].
        region_scores: float32 [B, C].
    """
    scores = ops.concatenate([instance_scores, region_scores], axis=1)
    return {
        "panoptic": table.panoptic,
        "segment_id": table.segment_id,
        "segment_class": table.segment_class,
        "segment_score": ops.where(table.kept, scores, 0.0),
    }


@stage
def assign_rows(semantic: Tensor, owner: Tensor, row_of_semantic: Tensor, *, num_instances: int) -> Tensor:
    """Returns the row of each pixel, int32 [B, H, W]: that of its instance, else of its semantic class."""
    return ops.where(owner < num_instances, owner, ops.take(row_of_semantic, semantic))


@stage
def count_pixels(rows: Tensor, *, num_rows: int) -> Tensor:
    """Counts the pixels of each row: int32 [B, H, W] to int32 [B, num_rows]."""
    batch = ops.shape(rows)[0]
    row = ops.reshape(ops.arange(batch)[:, None, None] * num_rows + rows, (-1,))  # [B * H * W]
    counts = ops.segment_sum(ops.ones_like(row), row, num_segments=batch * num_rows)
    return ops.reshape(counts, (batch, num_rows))  # [B, R]


def number_within_class(classes: Tensor, present: Tensor) -> Tensor:
    """Numbers instances from 1 within their class, in the order of their rows.

    Args:
        classes: int32 [B, N] class ids.
        present: bool [B, N], false for rows that do not count.

    Returns:
        int32 [B, N].
    """
    earlier = ops.tril(ops.ones((classes.shape[1], classes.shape[1]), "int32"))  # [N, N] pairs of later and earlier
    same_class = classes[:, :, None] == classes[:, None, :]
    return ops.sum(ops.where(same_class & present[:, None, :], earlier, 0), axis=-1)


@stage
def mean_probability(
    probability: Tensor,
    rows: Tensor,
    row_class: Tensor,
    area: Tensor,
    *,
    stride: int,
    network_height: Any | None = None,
    network_width: Any | None = None,
    aligned_corners: bool = False,
) -> Tensor:
    """Averages the probability of each segment's class over its pixels, read at the resolution of the probabilities.

    Args:
        probability: float32 [B, h, w, C].
        rows: int32 [B, H, W] row of the segment table of each pixel.
        row_class: int32 [B, R] class of each row.
        area: int32 [B, R] pixels of each row.
        stride: Network pixels per probability.
        network_height: Height of the network size, without padding; None if the image is not resized.
        network_width: Its width.
        aligned_corners: See `resampling`.

    Returns:
        float32 [B, R].
    """
    batch, height, width = ops.shape(rows)
    network_rows = height if network_height is None else network_height
    network_columns = width if network_width is None else network_width
    coarse_height, coarse_width = ops.shape(probability)[1:3]
    num_classes, num_rows = probability.shape[-1], area.shape[1]
    probability = ops.reshape(probability, (-1,))  # [B * h * w * C]
    image = ops.arange(batch)[:, None, None]
    if aligned_corners:
        # The nearest probability.
        y = _nearest(height, network_rows, stride)[None, :, None]
        x = _nearest(width, network_columns, stride)[None, None, :]
    else:
        # The cell that holds the center of each pixel.
        y = ((2 * ops.arange(height) + 1) * network_rows // (2 * height) // stride)[None, :, None]
        x = ((2 * ops.arange(width) + 1) * network_columns // (2 * width) // stride)[None, None, :]
    segment = image * num_rows + rows  # [B, H, W]
    pixel_class = ops.take(ops.reshape(row_class, (-1,)), segment)  # [B, H, W]
    position = ((image * coarse_height + y) * coarse_width + x) * num_classes + pixel_class
    total = ops.segment_sum(
        ops.reshape(ops.take(probability, position), (-1,)), ops.reshape(segment, (-1,)), num_segments=batch * num_rows
    )
    return ops.reshape(total, (batch, num_rows)) / ops.cast(ops.maximum(area, 1), "float32")  # [B, R]


def _nearest(side: Any, network_side: Any, stride: int) -> Tensor:
    """Returns the cell nearest to each pixel of an axis, with aligned corners, int32 [side]."""
    distance = ops.maximum(side - 1, 1) * stride  # Cell i lies at pixel i * distance / (network_side - 1).
    return (2 * ops.arange(side) * (network_side - 1) + distance) // (2 * distance)


@stage
def look_up(table: Tensor, rows: Tensor) -> Tensor:
    """Paints every pixel, int32 [B, H, W] rows, with the value of its row in the table, int32 [B, R]."""
    batch, num_rows = ops.shape(rows)[0], table.shape[1]
    image = ops.arange(batch)[:, None, None]
    return ops.take(ops.reshape(table, (-1,)), image * num_rows + rows)
