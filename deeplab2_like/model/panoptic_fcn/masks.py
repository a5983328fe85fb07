"""Masks of things from their kernels: measured, upsampled, and their overlaps resolved (appendix A.2).

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.stages`.
"""

from keras import ops

from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.overlaps import Window, resolve_overlaps
from deeplab2_like.model.resampling import upsample
from deeplab2_like.model.stages import stage

# Rows of cells per band in `measure_masks`.
_BAND_ROWS = 8


@stage
def measure_masks(feature: Tensor, weights: Tensor, *, threshold: float) -> tuple[Tensor, Tensor, Tensor]:
    """Measures the masks of kernels at the resolution of the feature, band by band, never holding all of them.

    Args:
        feature: float32 [B, h, w, E].
        weights: float32 [B, N, E].
        threshold: Probability that a cell of the mask exceeds.

    Returns:
        Mean probability inside each mask, float32 [B, N], zero for empty ones, and the rows and the columns of cells
        that it touches, bool [B, N, h] and bool [B, N, w].
    """
    batch, height, width = ops.shape(feature)[:3]
    feature = _in_bands(feature)
    bands = ops.shape(feature)[1]
    num_masks = weights.shape[1]
    transposed = ops.transpose(weights, (0, 2, 1))
    row = ops.arange(_BAND_ROWS)

    def measure(index: Tensor, area: Tensor, total: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, ...]:
        band = ops.sigmoid(ops.matmul(ops.take(feature, index, axis=1), transposed))  # [B, P, N]
        band = ops.reshape(band, (batch, _BAND_ROWS, width, num_masks))
        # The last band may extend beyond the feature.
        is_inside = (band > threshold) & (index * _BAND_ROWS + row < height)[:, None, None]
        pixels = ops.cast(is_inside, "float32")
        is_in_row = ops.cast(ops.any(is_inside, axis=2), "int32")  # [B, rows, N]
        return (
            index + 1,
            area + ops.sum(pixels, axis=(1, 2)),
            total + ops.sum(pixels * band, axis=(1, 2)),
            ops.scatter_update(rows, (index * _BAND_ROWS + row)[:, None], ops.transpose(is_in_row, (1, 0, 2))),
            columns | ops.any(is_inside, axis=1),
        )

    start = (
        ops.array(0, "int32"),
        ops.zeros((batch, num_masks), "float32"),
        ops.zeros((batch, num_masks), "float32"),
        ops.zeros((bands * _BAND_ROWS, batch, num_masks), "int32"),
        ops.zeros((batch, width, num_masks), "bool"),
    )
    _, area, total, rows, columns = ops.while_loop(lambda index, *_: index < bands, measure, start)
    mean = total / ops.maximum(area, 1.0)
    return mean, ops.transpose(rows[:height], (1, 2, 0)) > 0, ops.transpose(columns, (0, 2, 1))


@stage
def mask_overlaps(feature: Tensor, weights: Tensor, *, threshold: float) -> Tensor:
    """Computes the IoU of each pair of masks at the resolution of the feature, band by band.

    Args:
        feature: float32 [B, h, w, E].
        weights: float32 [B, N, E].
        threshold: Probability that a cell of a mask exceeds.

    Returns:
        float32 [B, N, N], 0 where both masks are empty.
    """
    batch, height, width = ops.shape(feature)[:3]
    feature = _in_bands(feature)
    bands = ops.shape(feature)[1]
    is_valid = ops.reshape(ops.arange(bands * _BAND_ROWS) < height, (bands, _BAND_ROWS, 1))
    is_valid = ops.reshape(ops.broadcast_to(is_valid, (bands, _BAND_ROWS, width)), (bands, _BAND_ROWS * width, 1))

    def add(index: Tensor, intersection: Tensor) -> tuple[Tensor, Tensor]:
        band = ops.sigmoid(ops.matmul(ops.take(feature, index, axis=1), ops.transpose(weights, (0, 2, 1))))
        inside = ops.cast((band > threshold) & ops.take(is_valid, index, axis=0), "float32")  # [B, P, N]
        return index + 1, intersection + ops.matmul(ops.transpose(inside, (0, 2, 1)), inside)

    num_masks = weights.shape[1]
    start = (ops.array(0, "int32"), ops.zeros((batch, num_masks, num_masks), "float32"))
    _, intersection = ops.while_loop(lambda index, *_: index < bands, add, start)
    area = ops.diagonal(intersection, axis1=1, axis2=2)
    union = area[:, :, None] + area[:, None, :] - intersection
    return intersection / ops.maximum(union, 1.0)


@stage
def resolve_thing_overlaps(
    used: Tensor,
    weights: Tensor,
    touched_rows: Tensor,
    touched_columns: Tensor,
    feature: Tensor,
    upsample_rows: Tensor,
    upsample_columns: Tensor,
    *,
    threshold: float,
    overlap_threshold: float,
) -> Tensor:
    """Resolves overlaps of the masks of things, see `resolve_overlaps`.

    Args:
        used: bool [B, N], the things that take part, the first rows of each image.
        weights: float32 [B, N, E].
        touched_rows: bool [B, N, h], the rows of cells that each mask touches, see `measure_masks`.
        touched_columns: bool [B, N, w], the columns of cells.
        feature: float32 [B, h, w, E].
        upsample_rows: float32 [H, h], see `Geometry.upsampling_matrices`.
        upsample_columns: float32 [W, w].
        threshold: Probability that a pixel of a mask exceeds.
        overlap_threshold: Largest share of a mask that earlier things may hold.

    Returns:
        int32 [B, H, W]: the thing of each pixel, or N for none.
    """
    height, width = ops.shape(upsample_rows)[0], ops.shape(upsample_columns)[0]
    first_line, last_line = _touched_pixels(touched_rows, upsample_rows)
    first_column, last_column = _touched_pixels(touched_columns, upsample_columns)

    def mask_in_window(n: Tensor, window: Window) -> Tensor:
        rows = ops.take(upsample_rows, window.lines, axis=0)  # [B, L, h]
        # Columns beyond the border repeat the last one.
        columns = ops.take(upsample_columns, ops.minimum(window.columns, width - 1), axis=0)  # [B, K, w]
        return thing_mask(feature, ops.take(weights, n, axis=1), rows, columns, threshold=threshold)

    return resolve_overlaps(
        used,
        ops.stack([first_line, first_column, last_line, last_column], axis=-1),
        mask_in_window,
        height=height,
        width=width,
        overlap_threshold=overlap_threshold,
    )


def _touched_pixels(touched: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Finds the pixels along one axis that are interpolated from touched cells.

    Args:
        touched: bool [B, N, c], whether each mask touches each cell.
        matrix: float32 [S, c], of `upsampling_matrix`.

    Returns:
        The first pixel and the one after the last, int32 [B, N] each; both are the same for an empty mask.
    """
    is_touched = ops.matmul(ops.cast(touched, "float32"), ops.transpose(matrix)) > 0  # [B, N, S]
    size = ops.shape(matrix)[0]
    pixel = ops.arange(size)
    last = ops.max(ops.where(is_touched, pixel + 1, 0), axis=-1)  # [B, N]
    return ops.minimum(ops.min(ops.where(is_touched, pixel, size), axis=-1), last), last


def thing_mask(
    feature: Tensor, weights: Tensor, upsample_rows: Tensor, upsample_columns: Tensor, *, threshold: float
) -> Tensor:
    """Computes one mask per image.

    Args:
        feature: float32 [B, h, w, E].
        weights: float32 [B, E].
        upsample_rows: float32 [H, h], or [B, H, h] for lines that differ between the images.
        upsample_columns: float32 [W, w], or [B, W, w].
        threshold: Probability that a pixel of the mask exceeds.

    Returns:
        bool [B, H, W].
    """
    batch, height, width = ops.shape(feature)[:3]
    flat = ops.reshape(feature, (batch, height * width, feature.shape[-1]))
    logits = ops.matmul(flat, weights[..., None])  # [B, h * w, 1]
    probability = ops.reshape(ops.sigmoid(logits), (batch, height, width))  # [B, h, w]
    return upsample(probability, upsample_rows, upsample_columns) > threshold


def thing_masks(
    feature: Tensor, weights: Tensor, upsample_rows: Tensor, upsample_columns: Tensor, *, threshold: float
) -> Tensor:
    """Computes all masks, one after the other; arguments as for `thing_mask`, but weights [B, N, E].

    Returns:
        bool [B, N, H, W].
    """
    masks = ops.map(  # [N, B, H, W]
        lambda one: thing_mask(feature, one, upsample_rows, upsample_columns, threshold=threshold),
        ops.transpose(weights, (1, 0, 2)),
    )
    return ops.transpose(masks, (1, 0, 2, 3))


def _in_bands(feature: Tensor) -> Tensor:
    """Splits the rows of cells into bands, padded with zeros: [B, h, w, E] to [B, bands, _BAND_ROWS * w, E]."""
    batch, height, width = ops.shape(feature)[:3]
    bands = (height + _BAND_ROWS - 1) // _BAND_ROWS
    feature = ops.pad(feature, [[0, 0], [0, bands * _BAND_ROWS - height], [0, 0], [0, 0]])
    return ops.reshape(feature, (batch, bands, _BAND_ROWS * width, feature.shape[-1]))
