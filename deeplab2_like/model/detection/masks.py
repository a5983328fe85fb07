"""Instance masks: targets of the mask head, and predictions pasted into the image."""

from typing import Any

from keras import ops

from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.detection.roi_pooling import axis_samples
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.overlaps import paste_weights


def mask_targets(
    instance_map: Tensor,
    boxes: Tensor,
    row: Tensor,
    *,
    output_size: int = 28,
    sampling_ratio: int = 2,
    max_sampling_ratio: int = 8,
) -> Tensor:
    """Makes the targets of the mask head: the bins of a box of which its instance fills half or more.

    This is RoIAlign of the instance's bit mask without making that mask: the pixels around each sample are compared
    with the instance's row.

    Args:
        instance_map: int32 [B, H, W] of `instance_targets`.
        boxes: float32 [B, R, 4].
        row: int32 [B, R], the table row of each box's instance.
        output_size: Bins along each axis, P.
        sampling_ratio: As for `roi_align`, in image pixels.
        max_sampling_ratio: As for `roi_align`.

    Returns:
        bool [B, R, P, P].
    """
    batch, height, width = ops.shape(instance_map)
    flat = ops.reshape(instance_map, (batch, height * width))

    def axis(first: int, size: Any) -> tuple[Tensor, Tensor, Tensor]:
        sizes = ops.full_like(row, size)
        return axis_samples(
            boxes[..., first], boxes[..., first + 2], sizes, output_size, sampling_ratio, max_sampling_ratio
        )

    # Coordinates int32 and weights float32, each [B, R, P, G]; the second weight belongs to the next coordinate.
    y, y_weight, y_next = axis(0, height)
    x, x_weight, x_next = axis(1, width)
    samples = y.shape[-1]
    grid = output_size * samples
    rois = ops.shape(boxes)[1]

    def line(values: Tensor) -> Tensor:
        return ops.reshape(values, (batch, rois, grid))  # [B, R, P * G]

    total = ops.zeros((batch, rois, grid, grid), "float32")
    for y_step, y_share in ((0, y_weight), (1, y_next)):
        for x_step, x_share in ((0, x_weight), (1, x_next)):
            rows = ops.minimum(line(y) + y_step, height - 1)
            columns = ops.minimum(line(x) + x_step, width - 1)
            index = rows[..., :, None] * width + columns[..., None, :]  # [B, R, P * G, P * G]
            index = ops.reshape(index, (batch, rois * grid * grid))
            values = ops.reshape(take_rows(flat, index), (batch, rois, grid, grid))
            inside = ops.cast(values == row[..., None, None] + 1, "float32")
            total = total + inside * line(y_share)[..., :, None] * line(x_share)[..., None, :]
    total = ops.reshape(total, (batch, rois, output_size, samples, output_size, samples))
    return ops.sum(total, axis=(3, 5)) >= 0.5


def paste_masks(probabilities: Tensor, boxes: Tensor, height: Any, width: Any, *, threshold: float = 0.5) -> Tensor:
    """Pastes predicted masks into the image.

    Args:
        probabilities: float32 [B, N, P, P].
        boxes: float32 [B, N, 4] in pixels of that image. An empty box gives an empty mask.
        height: Height of the image, int or int32 scalar.
        width: Its width.
        threshold: Probability from which a pixel belongs to the mask.

    Returns:
        bool [B, N, H, W].
    """
    bins = probabilities.shape[-1]
    rows = paste_weights(boxes[..., 0], boxes[..., 2], bins=bins, size=height)  # [B, N, H, P]
    columns = paste_weights(boxes[..., 1], boxes[..., 3], bins=bins, size=width)  # [B, N, W, P]
    lines = ops.matmul(rows, ops.cast(probabilities, "float32"))  # [B, N, H, P]
    return ops.matmul(lines, ops.transpose(columns, (0, 1, 3, 2))) >= threshold


def resample_masks(masks: Tensor, boxes: Tensor, new_boxes: Tensor) -> Tensor:
    """Resamples predicted masks from the bins of their boxes to those of other boxes, zero outside of their own.

    Args:
        masks: float32 [B, N, P, P], probabilities.
        boxes: float32 [B, N, 4], the boxes of the masks.
        new_boxes: float32 [B, N, 4].

    Returns:
        float32 [B, N, P, P].
    """
    bins = masks.shape[-1]
    bin_index = ops.arange(bins, dtype="float32")

    def weights(axis: int) -> Tensor:
        start, end, new_start, new_end = (
            values[..., None] for table in (boxes, new_boxes) for values in (table[..., axis], table[..., axis + 2])
        )
        center = new_start + (bin_index + 0.5) / bins * (new_end - new_start)  # [B, N, P]
        position = (center - start) / ops.maximum(end - start, 1e-6) * bins - 0.5
        return ops.maximum(1.0 - ops.abs(position[..., None] - bin_index), 0.0)  # [B, N, P, P]

    return ops.matmul(ops.matmul(weights(0), masks), ops.transpose(weights(1), (0, 1, 3, 2)))
