"""Kernels of things and stuff: found on each level, pooled, and fused across levels (sections 3.2 and 3.4).

Each function marked `stage` may be compiled on its own, see `deeplab2_like.model.stages`.
"""

from typing import NamedTuple

from keras import ops

from deeplab2_like.model.boxes import find_leaders, group_members, suppress, take_rows
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.stages import stage


class ThingKernels(NamedTuple):
    """The embedded kernels of things, the best first.

    Attributes:
        weights: float32 [B, N, E], of the 1x1 convolution that makes the mask.
        scores: float32 [B, N], zero in unused rows.
        classes: int32 [B, N], positions among the thing classes.
    """

    weights: Tensor
    scores: Tensor
    classes: Tensor

    def top(self, count: int) -> tuple["ThingKernels", Tensor]:
        """Returns the best kernels, the best first, and their rows, int32 [B, count]."""
        scores, index = ops.top_k(self.scores, min(count, self.scores.shape[1]))
        return ThingKernels(take_rows(self.weights, index), scores, take_rows(self.classes, index)), index


class StuffKernels(NamedTuple):
    """The embedded kernels of the regions, one for each class.

    Attributes:
        weights: float32 [B, S, E], of the 1x1 convolution that makes the mask.
        present: bool [B, S], the classes that were found.
    """

    weights: Tensor
    present: Tensor


@stage
def find_centers(
    center_logits: Tensor, kernels: Tensor, *, window: int, threshold: float, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Finds the peaks of a level: the positions where the score of a class is the largest of its 3x3 neighborhood.

    Args:
        center_logits: float32 [B, h, w, T].
        kernels: float32 [B, h, w, K].
        window: Odd side of a window; the score is the mean of the probability and its average over the window, so that
            a broad peak beats a single pixel.
        threshold: Score that a peak must exceed.
        count: Number of best peaks, N; a level of fewer positions has at most one peak per position.

    Returns:
        Kernels float32 [B, N, K], scores float32 [B, N], zero in unused rows, and classes int32 [B, N].
    """
    batch, height, width = ops.shape(center_logits)[:3]
    num_classes = center_logits.shape[-1]
    margin = window // 2
    probability = ops.sigmoid(center_logits)
    # The average includes the zeros around the map.
    padded = ops.pad(probability, [[0, 0], [margin, margin], [margin, margin], [0, 0]])
    probability = (probability + ops.average_pool(padded, window, strides=1)) / 2
    is_peak = probability == ops.max_pool(probability, 3, strides=1, padding="same")
    score = ops.where(is_peak & (probability > threshold), probability, 0.0)
    # Padded, because a small level has fewer than N values.
    flat = ops.pad(ops.reshape(score, (batch, height * width * num_classes)), [[0, 0], [0, count]])
    score, index = ops.top_k(flat, count)
    score = ops.where(ops.arange(count) < height * width, score, 0.0)
    index = ops.minimum(index, height * width * num_classes - 1)
    flat_kernels = ops.reshape(kernels, (batch, height * width, kernels.shape[-1]))
    return take_rows(flat_kernels, index // num_classes), score, index % num_classes


@stage
def find_regions(region_logits: Tensor, *, threshold: float) -> tuple[Tensor, Tensor]:
    """Assigns each position of a level to the region of its best class.

    Args:
        region_logits: float32 [B, h, w, S].
        threshold: Mean probability over its region that a class must exceed to be present.

    Returns:
        The regions, float32 [B, h, w, S] of zeros and ones, and the classes that are present, bool [B, S].
    """
    probability = ops.sigmoid(region_logits)
    regions = ops.one_hot(ops.argmax(probability, axis=-1), region_logits.shape[-1], dtype="float32")
    score = ops.sum(regions * probability, axis=(1, 2)) / ops.maximum(ops.sum(regions, axis=(1, 2)), 1.0)
    return regions, score > threshold


def pool_regions(kernels: Tensor, masks: Tensor, *, over_map: bool) -> Tensor:
    """Averages the kernels over each region of a level.

    Args:
        kernels: float32 [B, h, w, K].
        masks: float32 [B, h, w, S], 1 on the region of each class, 0 elsewhere.
        over_map: Whether to divide by the area of the map instead of the area of the region.

    Returns:
        float32 [B, S, K].
    """
    total = ops.einsum("bhws,bhwk->bsk", masks, kernels)
    height, width = ops.shape(kernels)[1:3]
    if over_map:
        return total / ops.cast(height * width, "float32")
    return total / ops.maximum(ops.sum(masks, axis=(1, 2)), 1.0)[..., None]


@stage
def fuse_kernels(
    weights: Tensor,
    scores: Tensor,
    classes: Tensor,
    *,
    similarity: float,
    class_aware: bool,
    reference_behavior: bool,
) -> tuple[Tensor, Tensor]:
    """Fuses the kernels of the same object, which point in similar directions (section 3.2).

    Args:
        weights: float32 [B, N, E], the best first.
        scores: float32 [B, N], zero in unused rows.
        classes: int32 [B, N].
        similarity: Cosine similarity from which two kernels are of the same object.
        class_aware: Whether they must have the same class, too.
        reference_behavior: Whether a kernel is removed if any better one is similar, even a removed one, so that it may
            join no kernel at all; otherwise it is removed only if it joins a kernel that stays.

    Returns:
        Mean weights of each kernel and those that join it, float32 [B, N, E], and scores, float32 [B, N], zero for
        removed kernels.
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
    keep = used & ~ops.any(same, axis=1) if reference_behavior else suppress(same, used)

    # Each joins the best one that is similar.
    to_join = same if reference_behavior else same & keep[:, :, None]
    member = group_members(find_leaders(to_join), used)  # [B, leader, member]
    mean = ops.matmul(member, weights) / ops.maximum(ops.sum(member, axis=-1, keepdims=True), 1.0)
    return mean, ops.where(keep, scores, 0.0)
