"""From the maps of Panoptic FCN to things, stuff and one panoptic map (sections 3.2 and 3.4, appendix A.2).

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.layers.compiled_stages`.
"""

from typing import Any, NamedTuple

from keras import ops

from deeplab2_like.model.boxes import keep_best, take_rows
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.overlaps import resolve_overlaps
from deeplab2_like.model.stages import stage

# Lines of the feature whose masks are made at the same time when they are measured.
_BAND_LINES = 8


class Things(NamedTuple):
    """Objects, best first.

    Attributes:
        weights: float32 [B, N, E], of the convolution that makes their masks.
        scores: float32 [B, N], zero in unused rows.
        classes: int32 [B, N], positions among the thing classes.
    """

    weights: Tensor
    scores: Tensor
    classes: Tensor

    def best(self, number: int) -> tuple["Things", Tensor]:
        """The best of them, in the order of their scores, and which rows they were, int32 [B, number]."""
        scores, index = ops.top_k(self.scores, min(number, self.scores.shape[1]))
        return Things(take_rows(self.weights, index), scores, take_rows(self.classes, index)), index


@stage
def find_centers(
    center_logits: Tensor, kernels: Tensor, *, window: int, threshold: float, number: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the peaks of a level: where a class scores best among its neighbours.

    Args:
        center_logits: float32 [B, h, w, T].
        kernels: float32 [B, h, w, K].
        window: Odd side of the window whose mean is averaged with the probability first, so that a broad peak beats a
            single pixel.
        threshold: Weaker peaks do not count.
        number: N, how many of the best are kept; of a small level no more than it has positions.

    Returns:
        Kernels float32 [B, N, K], scores float32 [B, N], zero in unused rows, and classes int32 [B, N].
    """
    batch, height, width = ops.shape(center_logits)[:3]
    num_classes = center_logits.shape[-1]
    margin = window // 2
    probability = ops.sigmoid(center_logits)
    # Zeros around the map count, too.
    padded = ops.pad(probability, [[0, 0], [margin, margin], [margin, margin], [0, 0]])
    probability = (probability + ops.average_pool(padded, window, strides=1)) / 2
    is_peak = probability == ops.max_pool(probability, 3, strides=1, padding="same")
    score = ops.where(is_peak & (probability > threshold), probability, 0.0)
    # With more zeros, so that there are always enough to choose from.
    flat = ops.pad(ops.reshape(score, (batch, height * width * num_classes)), [[0, 0], [0, number]])
    score, index = ops.top_k(flat, number)
    score = ops.where(ops.arange(number) < height * width, score, 0.0)
    index = ops.minimum(index, height * width * num_classes - 1)
    flat_kernels = ops.reshape(kernels, (batch, height * width, kernels.shape[-1]))
    return take_rows(flat_kernels, index // num_classes), score, index % num_classes


@stage
def find_regions(region_logits: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Divides a level among the classes of regions: each position belongs to the best one.

    Args:
        region_logits: float32 [B, h, w, S].
        threshold: A class counts if its mean probability over its region is above this.

    Returns:
        The regions, float32 [B, h, w, S] of zeros and ones, and which classes count, bool [B, S].
    """
    probability = ops.sigmoid(region_logits)
    regions = ops.one_hot(ops.argmax(probability, axis=-1), region_logits.shape[-1], dtype="float32")
    score = ops.sum(regions * probability, axis=(1, 2)) / ops.maximum(ops.sum(regions, axis=(1, 2)), 1.0)
    return regions, score > threshold


@stage
def fuse_things(
    weights: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    similarity: float,
    class_aware: bool,
    reference_behavior: bool,
) -> tuple[Tensor, Tensor]:
    """Makes one of all that stand for the same object: those whose weights point in the same direction (section 3.2).

    Args:
        weights: float32 [B, N, E], the best first.
        scores: float32 [B, N], zero in unused rows.
        classes: int32 [B, N].
        similarity: Cosine from which two are the same object.
        class_aware: Whether they must be of one class, too.
        reference_behavior: Whether a row goes if any better one is like it, even one that has gone itself; what is
            like the latter alone is lost then. Else it goes only if it is like one that stays, to which it is added.

    Returns:
        Mean weights of those that are the same, float32 [B, N, E], and scores, float32 [B, N], zero where a row went.
    """
    length = ops.sqrt(ops.sum(weights * weights, axis=-1, keepdims=True))
    direction = weights / ops.maximum(length, 1e-8)
    cosine = ops.matmul(direction, ops.transpose(direction, (0, 2, 1)))  # [B, N, N]
    rank = ops.arange(weights.shape[1])
    used = scores > 0
    same = (cosine >= similarity) & used[:, :, None] & used[:, None, :]
    same = same & (rank[:, None] < rank[None, :])  # [B, better, worse]
    if class_aware:
        same = same & (classes[:, :, None] == classes[:, None, :])
    keep = used & ~ops.any(same, axis=1) if reference_behavior else keep_best(same, used)

    # Each joins the first that it is like.
    to_join = same if reference_behavior else same & keep[:, :, None]
    first = ops.argmax(ops.cast(to_join, "int32"), axis=1)  # [B, worse]
    leader = ops.where(ops.any(to_join, axis=1), first, rank)
    member = ops.cast((leader[:, None, :] == rank[:, None]) & used[:, None, :], "float32")  # [B, leader, member]
    mean = ops.matmul(member, weights) / ops.maximum(ops.sum(member, axis=-1, keepdims=True), 1.0)
    return mean, ops.where(keep, scores, 0.0)


@stage
def measure_masks(feature: Tensor, weights: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Measures masks at the resolution of the feature, band by band, so that they are never held all at once.

    Args:
        feature: float32 [B, h, w, E].
        weights: float32 [B, N, E].
        threshold: Probability above which a cell belongs to the mask.

    Returns:
        Mean probability inside each mask, float32 [B, N], zero for empty ones, and which lines of cells it has a part
        of, bool [B, N, h].
    """
    batch, height, width = ops.shape(feature)[:3]
    bands = (height + _BAND_LINES - 1) // _BAND_LINES
    feature = ops.pad(feature, [[0, 0], [0, bands * _BAND_LINES - height], [0, 0], [0, 0]])
    feature = ops.reshape(feature, (batch, bands, _BAND_LINES * width, feature.shape[-1]))
    number = weights.shape[1]
    transposed = ops.transpose(weights, (0, 2, 1))
    line = ops.arange(_BAND_LINES)

    def measure(index: Tensor, inside: Tensor, total: Tensor, lines: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        band = ops.sigmoid(ops.matmul(ops.take(feature, index, axis=1), transposed))  # [B, P, N]
        band = ops.reshape(band, (batch, _BAND_LINES, width, number))
        # Lines below the feature are no part of it.
        is_inside = (band > threshold) & (index * _BAND_LINES + line < height)[:, None, None]
        pixels = ops.cast(is_inside, "float32")
        is_in_line = ops.cast(ops.any(is_inside, axis=2), "int32")  # [B, lines, N]
        return (
            index + 1,
            inside + ops.sum(pixels, axis=(1, 2)),
            total + ops.sum(pixels * band, axis=(1, 2)),
            ops.scatter_update(lines, (index * _BAND_LINES + line)[:, None], ops.transpose(is_in_line, (1, 0, 2))),
        )

    start = (
        ops.array(0, "int32"),
        ops.zeros((batch, number), "float32"),
        ops.zeros((batch, number), "float32"),
        ops.zeros((bands * _BAND_LINES, batch, number), "int32"),
    )
    _, inside, total, lines = ops.while_loop(lambda index, *_: index < bands, measure, start)
    return total / ops.maximum(inside, 1.0), ops.transpose(lines[:height], (1, 2, 0)) > 0


@stage
def claim_masks(
    used: Tensor,
    weights: Tensor,
    has_part: Tensor,
    feature: Tensor,
    enlarge_rows: Tensor,
    enlarge_columns: Tensor,
    *,
    threshold: float,
    overlap_threshold: float,
) -> Tensor:
    """Gives pixels to things in the order of their rows, see `deeplab2_like.model.merge.resolve_mask_overlaps`.

    Args:
        used: bool [B, N], true for the first rows of each image, those that take part.
        weights: float32 [B, N, E].
        has_part: bool [B, N, h], the lines of cells that each mask has a part of.
        feature: float32 [B, h, w, E].
        enlarge_rows: float32 [H, h], see `deeplab2_like.model.merge.upsampling_matrix`.
        enlarge_columns: float32 [W, w].
        threshold: Probability above which a pixel belongs to a mask.
        overlap_threshold: A thing of which a larger share is claimed already is dropped.

    Returns:
        int32 [B, H, W]: the thing, or N for pixels that none has.
    """
    height, width = ops.shape(enlarge_rows)[0], ops.shape(enlarge_columns)[0]
    # A line of the map is touched if any of the lines of cells that it is made of is.
    is_touched = ops.matmul(ops.cast(has_part, "float32"), ops.transpose(enlarge_rows)) > 0  # [B, N, H]
    line = ops.arange(height)
    first_line = ops.min(ops.where(is_touched, line, height), axis=-1)  # [B, N]
    last_line = ops.max(ops.where(is_touched, line + 1, 0), axis=-1)
    first_line = ops.minimum(first_line, last_line)

    def mask_in_window(n: Tensor, top: Tensor, lines: Any) -> Tensor:
        rows = ops.take(enlarge_rows, top[:, None] + ops.arange(lines), axis=0)  # [B, L, h]
        return mask_of(feature, ops.take(weights, n, axis=1), rows, enlarge_columns, threshold=threshold)

    return resolve_overlaps(
        used, first_line, last_line, mask_in_window, height=height, width=width, overlap_threshold=overlap_threshold
    )


def mask_of(
    feature: Tensor, weights: Tensor, enlarge_rows: Tensor, enlarge_columns: Tensor, *, threshold: float
) -> Tensor:
    """One mask per image, from weights float32 [B, E]: bool [B, H, W], or fewer lines if there are fewer rows.

    The rows of the enlarging matrix may differ from image to image, float32 [B, L, h]; see `claim_masks`.
    """
    batch, height, width = ops.shape(feature)[:3]
    flat = ops.reshape(feature, (batch, height * width, feature.shape[-1]))
    logits = ops.matmul(flat, weights[..., None])  # [B, h * w, 1]
    probability = ops.reshape(ops.sigmoid(logits), (batch, height, width))  # [B, h, w]
    return ops.matmul(ops.matmul(enlarge_rows, probability), ops.transpose(enlarge_columns)) > threshold


def all_masks(
    feature: Tensor, weights: Tensor, enlarge_rows: Tensor, enlarge_columns: Tensor, *, threshold: float
) -> Tensor:
    """All masks at the size of the map, made one after the other: bool [B, N, H, W]; see `claim_masks`."""
    masks = ops.map(  # [N, B, H, W]
        lambda of_one: mask_of(feature, of_one, enlarge_rows, enlarge_columns, threshold=threshold),
        ops.transpose(weights, (1, 0, 2)),
    )
    return ops.transpose(masks, (1, 0, 2, 3))


def boxes_of(masks: Tensor) -> Tensor:
    """Tight boxes around masks, bool [B, N, H, W] to float32 [B, N, 4]; zeros around empty ones."""
    sides = []
    for axis in (3, 2):
        is_touched = ops.cast(ops.any(masks, axis=axis), "int32")  # [B, N, H] or [B, N, W]
        size = ops.shape(is_touched)[-1]
        first = ops.argmax(is_touched, axis=-1)
        last = size - ops.argmax(ops.flip(is_touched, axis=-1), axis=-1)
        is_empty = ops.sum(is_touched, axis=-1) == 0
        sides.append([ops.where(is_empty, 0, ops.cast(side, "int32")) for side in (first, last)])
    (top, bottom), (left, right) = sides
    return ops.cast(ops.stack([top, left, bottom, right], axis=-1), "float32")
