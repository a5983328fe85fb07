"""Losses of Panoptic FCN: focal loss of positions, weighted dice loss of masks (sections 3.1 and 3.4).

Masks are never held all at once: the sums of the dice loss are gathered band by band of the feature, and the gradient
computes each band again.
"""

from collections.abc import Callable, Mapping, Sequence

from keras import ops

from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.layers import Tensor

# Numbers that a band of masks may have per image; two lines at least.
_BAND_SIZE = 2**21


def focal_loss(logits: Tensor, targets: Tensor, weight: Tensor, *, alpha: float, gamma: float) -> Tensor:
    """Focal loss with soft targets: cross entropy, less of it the nearer a prediction is.

    Args:
        logits: float32 [B, h, w, C].
        targets: float32 [B, h, w, C], in 0..1.
        weight: float32 [B, h, w], of each position.
        alpha: Weight of positives; that of negatives is 1 - alpha, and that of soft targets lies between.
        gamma: Exponent of the distance.

    Returns:
        float32 scalar, the sum over everything.
    """
    probability = ops.sigmoid(logits)
    cross_entropy = ops.binary_crossentropy(targets, logits, from_logits=True)
    # Rounding must not make it negative, which has no root.
    distance = ops.maximum(1 - (probability * targets + (1 - probability) * (1 - targets)), 0.0)
    balance = alpha * targets + (1 - alpha) * (1 - targets)
    return ops.sum(balance * distance**gamma * cross_entropy * weight[..., None])


def pick_kernels(
    kernels: Tensor,
    center_logits: Tensor,
    *,
    instances: Sequence[tuple[Tensor, Tensor]],
    classes: Tensor,
    positions: Tensor,
    number: int,
    weighted: bool,
) -> tuple[Tensor, Tensor]:
    """Picks the kernels that each object shall be predicted with on one level.

    Args:
        kernels: float32 [B, h, w, K].
        center_logits: float32 [B, h, w, T].
        instances: What `level_shares` returned for the instance map and this level.
        classes: int32 [B, M], of the objects, positions among the thing classes.
        positions: int32 [B, M, 2], (y, x) of their centres on this level.
        number: k, kernels of an object.
        weighted: Whether to take the positions inside the object that score best for its class, and to weight them with
            these scores (equation 7); else all there is, is the kernel at the centre.

    Returns:
        The kernels, float32 [B, M, k, K], and their weights, float32 [B, M, k], which add up to 1.
    """
    batch, height, width, channels = ops.shape(kernels)
    num_objects = classes.shape[1]
    at_center = positions[..., 0] * width + positions[..., 1]  # [B, M]
    flat_kernels = ops.reshape(kernels, (batch, height * width, channels))
    if not weighted:
        picked = take_rows(flat_kernels, at_center)[:, :, None]  # [B, M, 1, K]
        return picked, ops.ones((batch, num_objects, 1), "float32")

    share: Tensor = 0.0
    for label, part in instances:
        is_here = ops.reshape(label, (batch, 1, height * width)) == ops.arange(1, num_objects + 1)[:, None]
        share = share + ops.cast(is_here, "float32") * ops.reshape(part, (height * width,))  # [B, M, h * w]
    is_inside = share > 0.1
    # An object that fills no position has its centre.
    is_center = ops.arange(height * width) == at_center[..., None]
    is_inside = ops.where(ops.any(is_inside, axis=-1, keepdims=True), is_inside, is_center)

    by_class = ops.transpose(ops.reshape(center_logits, (batch, height * width, -1)), (0, 2, 1))  # [B, T, h * w]
    score = ops.where(is_inside, ops.sigmoid(take_rows(by_class, classes)), 0.0)  # [B, M, h * w]
    number = min(number, height * width)
    score, best = ops.top_k(score, number)  # [B, M, k]
    picked = take_rows(flat_kernels, ops.reshape(best, (batch, num_objects * number)))
    picked = ops.reshape(picked, (batch, num_objects, number, channels))
    return picked, score / ops.maximum(ops.sum(score, axis=-1, keepdims=True), 1e-12)


def pool_regions(kernels: Tensor, masks: Tensor, *, over_map: bool) -> Tensor:
    """Averages the kernels of each region of a level.

    Args:
        kernels: float32 [B, h, w, K].
        masks: float32 [B, h, w, S], 1 on the region of each class.
        over_map: Whether to divide by the size of the map, not by that of the region.

    Returns:
        float32 [B, S, K].
    """
    total = ops.einsum("bhws,bhwk->bsk", masks, kernels)
    height, width = ops.shape(kernels)[1:3]
    if over_map:
        return total / ops.cast(height * width, "float32")
    return total / ops.maximum(ops.sum(masks, axis=(1, 2)), 1.0)[..., None]


def dice_loss(features: Tensor, weights: Tensor, labels: Tensor, samples: Tensor, counted: Tensor) -> Tensor:
    """Dice loss of the masks that weights make of a feature (equation 6), `1 - 2 sum(p t) / (sum(p p) + sum(t t))`.

    Args:
        features: float32 [B, h, w, E].
        weights: float32 [B, R, k, E], k for each label.
        labels: int32 [B, R], what label the masks shall have.
        samples: int32 [B, h, w, 4] of the label map, see `four_samples`.
        counted: float32 [B, h, w], 1 for cells that count, 0 for others.

    Returns:
        float32 [B, R, k].
    """
    rows, number, channels = weights.shape[1:]
    flat_weights = ops.reshape(weights, (-1, rows * number, channels))  # [B, R * k, E]
    sums = _mask_sums(features, flat_weights, ops.repeat(labels, number, axis=-1), samples, counted)
    product, predicted, true = ops.unstack(ops.reshape(sums, (3, -1, rows, number)), 3)
    return 1 - 2 * product / (predicted + true + 1e-5)


def _mask_sums(features: Tensor, weights: Tensor, labels: Tensor, samples: Tensor, counted: Tensor) -> Tensor:
    """Sums of p t, p p and t t over all cells: weights float32 [B, R, E], labels int32 [B, R], to float32 [3, B, R]."""
    height, width, channels = features.shape[1:]
    num_masks = weights.shape[1]
    lines = max(2, min(height, _BAND_SIZE // (width * num_masks)))
    bands = -(-height // lines)
    missing = bands * lines - height

    def in_bands(x: Tensor) -> Tensor:
        x = ops.pad(x, [[0, 0], [0, missing], *([[0, 0]] * (len(x.shape) - 2))])
        x = ops.reshape(x, (-1, bands, lines * width, *x.shape[3:]))  # [B, bands, lines * w, ...]
        return ops.moveaxis(x, 1, 0)  # [bands, B, lines * w, ...]

    all_samples, all_counted = in_bands(samples), in_bands(counted)

    def truth(index: Tensor) -> Tensor:
        band = ops.take(all_samples, index, axis=0)  # [B, P, 4]
        same: Tensor = 0.0
        for sample in range(4):
            same = same + ops.cast(band[..., sample, None] == labels[:, None, :], "float32")
        return same / 4 * ops.take(all_counted, index, axis=0)[..., None]  # [B, P, R]

    @ops.custom_gradient
    def sums(features: Tensor, weights: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, Tensor]]]:
        all_features = in_bands(features)

        def probability(index: Tensor) -> Tensor:
            band = ops.take(all_features, index, axis=0)  # [B, P, E]
            masks = ops.sigmoid(ops.matmul(band, ops.transpose(weights, (0, 2, 1))))
            return masks * ops.take(all_counted, index, axis=0)[..., None]  # [B, P, R]

        def add(index: Tensor, totals: Tensor) -> Tensor:
            p, t = probability(index), truth(index)
            return totals + ops.stack([ops.sum(values, axis=1) for values in (p * t, p * p, t * t)])

        totals = ops.fori_loop(0, bands, add, ops.zeros((3, *ops.shape(labels)), "float32"))

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
            change_of_sums = args[0] if upstream is None else upstream  # [3, B, R]
            to_product, to_predicted = change_of_sums[0][:, None], change_of_sums[1][:, None]  # [B, 1, R] each

            def add_gradient(index: Tensor, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                to_features, to_weights = found
                p = probability(index)
                change = (to_product * truth(index) + 2 * to_predicted * p) * p * (1 - p)  # Of the logits.
                band = ops.take(all_features, index, axis=0)
                to_weights = to_weights + ops.matmul(ops.transpose(change, (0, 2, 1)), band)
                of_band = ops.matmul(change, weights)[None]  # [1, B, P, E]
                return ops.slice_update(to_features, (index, 0, 0, 0), of_band), to_weights

            begin = (ops.zeros_like(all_features), ops.zeros_like(weights))
            to_features, to_weights = ops.fori_loop(0, bands, add_gradient, begin)
            to_features = ops.reshape(ops.moveaxis(to_features, 0, 1), (-1, bands * lines, width, channels))
            return to_features[:, :height], to_weights

        return totals, gradient

    return sums(features, weights)


def first_of(rows: Mapping[str, Tensor], used: Tensor, number: int) -> tuple[dict[str, Tensor], Tensor]:
    """Keeps the rows that are used, so that fewer of those that are not cost time.

    Args:
        rows: [B, N, ...] each.
        used: bool [B, N].
        number: How many rows are kept, the first that are used.

    Returns:
        [B, number, ...] each, and which are used, bool [B, number].
    """
    number = min(number, used.shape[1])
    is_used, index = ops.top_k(ops.cast(used, "float32"), number)  # The first of equal values come first.
    return {name: take_rows(values, index) for name, values in rows.items()}, is_used > 0
