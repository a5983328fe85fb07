"""The dice loss of masks, block by block of masks, so that the masks are never held all at once.

The gradient computes the masks of each block again.
"""

from collections.abc import Callable

from keras import ops

from deeplab2_like.model.layers import Tensor

# Mask values per block and image, at most; a block has at least one mask.
_BLOCK_SIZE = 2**20


def dice_loss(
    features: Tensor,
    weights: Tensor,
    labels: Tensor,
    samples: Tensor,
    counted: Tensor,
    used: Tensor | None = None,
) -> Tensor:
    """Dice loss of masks (equation 6): `1 - 2 sum(p t) / (sum(p p) + sum(t t))`.

    The predicted mask p is the sigmoid of the product of weights and features; the true mask t is one label.

    Args:
        features: float32 [B, h, w, E].
        weights: float32 [B, R, k, E], k masks for each label.
        labels: int32 [B, R], the label of the true mask.
        samples: int32 [B, h, w, 4] of the label map, see `sample_cells`.
        counted: float32 [B, h, w], 1 for cells that count, 0 for others.
        used: bool [B, R], the rows whose loss is needed; None for all. Rows after the last used one take no time, so
            the used rows should come first.

    Returns:
        float32 [B, R, k]; the loss of unused rows has no meaning.
    """
    num_rows, masks_per_row, channels = weights.shape[1:]
    flat_weights = ops.reshape(weights, (-1, num_rows * masks_per_row, channels))  # [B, R * k, E]
    num_used: Tensor = num_rows
    if used is not None:
        num_used = ops.max(ops.where(used, ops.arange(1, num_rows + 1), 0))
    sums = _mask_sums(
        features,
        flat_weights,
        ops.repeat(labels, masks_per_row, axis=-1),
        samples,
        counted,
        num_used=num_used * masks_per_row,
    )
    product, predicted, true = ops.unstack(ops.reshape(sums, (3, -1, num_rows, masks_per_row)), 3)  # [B, R, k] each
    return 1 - 2 * product / (predicted + true + 1e-5)


def _mask_sums(
    features: Tensor, weights: Tensor, labels: Tensor, samples: Tensor, counted: Tensor, *, num_used: Tensor
) -> Tensor:
    """Sums p t, p p and t t over all cells.

    Args:
        features: float32 [B, h, w, E].
        weights: float32 [B, R, E].
        labels: int32 [B, R].
        samples: int32 [B, h, w, 4].
        counted: float32 [B, h, w].
        num_used: Number of masks that are needed, the first ones; int32 scalar.

    Returns:
        float32 [3, B, R], with gradients for features and weights; 0 for most of the masks that are not needed.
    """
    height, width, channels = features.shape[1:]
    num_cells, num_masks = height * width, weights.shape[1]
    block = max(1, min(num_masks, _BLOCK_SIZE // num_cells))  # Masks per block.
    num_blocks = -(-num_masks // block)
    num_used_blocks = (num_used + block - 1) // block

    def in_blocks(x: Tensor) -> Tensor:
        missing = num_blocks * block - num_masks
        x = ops.pad(x, [[0, 0], [0, missing], *([[0, 0]] * (len(x.shape) - 2))])
        x = ops.reshape(x, (-1, num_blocks, block, *x.shape[2:]))  # [B, blocks, masks, ...]
        return ops.moveaxis(x, 1, 0)  # [blocks, B, masks, ...]

    all_labels = in_blocks(labels)
    cell_samples = ops.reshape(samples, (-1, num_cells, 4))  # [B, P, 4]
    cell_counted = ops.reshape(counted, (-1, num_cells, 1))  # [B, P, 1]

    def truth(index: Tensor) -> Tensor:
        block_labels = ops.take(all_labels, index, axis=0)[:, None]  # [B, 1, R]
        same: Tensor = 0.0
        for sample in range(4):
            same = same + ops.cast(cell_samples[..., sample, None] == block_labels, "float32")
        return same / 4 * cell_counted  # [B, P, R]

    @ops.custom_gradient
    def sums(features: Tensor, weights: Tensor) -> tuple[Tensor, Callable[..., tuple[Tensor, Tensor]]]:
        cells = ops.reshape(features, (-1, num_cells, channels))  # [B, P, E]
        all_weights = in_blocks(weights)

        def probability(index: Tensor) -> Tensor:
            block_weights = ops.transpose(ops.take(all_weights, index, axis=0), (0, 2, 1))  # [B, E, R]
            return ops.sigmoid(ops.matmul(cells, block_weights)) * cell_counted  # [B, P, R]

        def add(index: Tensor, totals: Tensor) -> Tensor:
            p, t = probability(index), truth(index)
            block_totals = ops.stack([ops.sum(values, axis=1) for values in (p * t, p * p, t * t)])  # [3, B, R]
            return ops.slice_update(totals, (index, 0, 0, 0), block_totals[None])

        batch = ops.shape(features)[0]
        totals = ops.fori_loop(0, num_used_blocks, add, ops.zeros((num_blocks, 3, batch, block), "float32"))
        totals = ops.reshape(ops.transpose(totals, (1, 2, 0, 3)), (3, -1, num_blocks * block))[..., :num_masks]

        def gradient(*args: Tensor, upstream: Tensor | None = None) -> tuple[Tensor, Tensor]:
            d_sums = args[0] if upstream is None else upstream  # [3, B, R]
            d_product, d_predicted = in_blocks(d_sums[0]), in_blocks(d_sums[1])

            def add_gradient(index: Tensor, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                d_cells, d_weights = gradients
                p = probability(index)
                d_true = ops.take(d_product, index, axis=0)[:, None] * truth(index)
                d_logits = (d_true + 2 * ops.take(d_predicted, index, axis=0)[:, None] * p) * p * (1 - p)  # [B, P, R]
                d_cells = d_cells + ops.matmul(d_logits, ops.take(all_weights, index, axis=0))
                d_block = ops.matmul(ops.transpose(d_logits, (0, 2, 1)), cells)[None]  # [1, B, R, E]
                return d_cells, ops.slice_update(d_weights, (index, 0, 0, 0), d_block)

            start = (ops.zeros_like(cells), ops.zeros_like(all_weights))
            d_cells, d_weights = ops.fori_loop(0, num_used_blocks, add_gradient, start)
            d_weights = ops.reshape(ops.moveaxis(d_weights, 0, 1), (-1, num_blocks * block, channels))
            return ops.reshape(d_cells, (-1, height, width, channels)), d_weights[:, :num_masks]

        return totals, gradient

    return sums(features, weights)
