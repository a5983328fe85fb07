"""The dice loss of masks, band by band of the feature, so that the masks are never held all at once.

The gradient computes the masks of each band again.
"""

from collections.abc import Callable

from keras import ops

from deeplab2_like.model.layers import Tensor

# Mask values per band and image, at most; a band has at least two rows of cells.
_BAND_SIZE = 2**21


def dice_loss(features: Tensor, weights: Tensor, labels: Tensor, samples: Tensor, counted: Tensor) -> Tensor:
    """Dice loss of masks (equation 6): `1 - 2 sum(p t) / (sum(p p) + sum(t t))`.

    The predicted mask p is the sigmoid of the product of weights and features; the true mask t is one label.

    Args:
        features: float32 [B, h, w, E].
        weights: float32 [B, R, k, E], k masks for each label.
        labels: int32 [B, R], the label of the true mask.
        samples: int32 [B, h, w, 4] of the label map, see `sample_cells`.
        counted: float32 [B, h, w], 1 for cells that count, 0 for others.

    Returns:
        float32 [B, R, k].
    """
    rows, masks_per_row, channels = weights.shape[1:]
    flat_weights = ops.reshape(weights, (-1, rows * masks_per_row, channels))  # [B, R * k, E]
    sums = _mask_sums(features, flat_weights, ops.repeat(labels, masks_per_row, axis=-1), samples, counted)
    product, predicted, true = ops.unstack(ops.reshape(sums, (3, -1, rows, masks_per_row)), 3)  # [B, R, k] each
    return 1 - 2 * product / (predicted + true + 1e-5)


def _mask_sums(features: Tensor, weights: Tensor, labels: Tensor, samples: Tensor, counted: Tensor) -> Tensor:
    """Sums p t, p p and t t over all cells.

    Args:
        features: float32 [B, h, w, E].
        weights: float32 [B, R, E].
        labels: int32 [B, R].
        samples: int32 [B, h, w, 4].
        counted: float32 [B, h, w].

    Returns:
        float32 [3, B, R], with gradients for features and weights.
    """
    height, width, channels = features.shape[1:]
    num_masks = weights.shape[1]
    rows = max(2, min(height, _BAND_SIZE // (width * num_masks)))  # Rows of cells per band.
    bands = -(-height // rows)
    missing = bands * rows - height

    def in_bands(x: Tensor) -> Tensor:
        x = ops.pad(x, [[0, 0], [0, missing], *([[0, 0]] * (len(x.shape) - 2))])
        x = ops.reshape(x, (-1, bands, rows * width, *x.shape[3:]))  # [B, bands, rows * w, ...]
        return ops.moveaxis(x, 1, 0)  # [bands, B, rows * w, ...]

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
            d_sums = args[0] if upstream is None else upstream  # [3, B, R]
            d_product, d_predicted = d_sums[0][:, None], d_sums[1][:, None]  # [B, 1, R] each

            def add_gradient(index: Tensor, gradients: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
                d_features, d_weights = gradients
                p = probability(index)
                d_logits = (d_product * truth(index) + 2 * d_predicted * p) * p * (1 - p)  # [B, P, R]
                band = ops.take(all_features, index, axis=0)
                d_weights = d_weights + ops.matmul(ops.transpose(d_logits, (0, 2, 1)), band)
                d_band = ops.matmul(d_logits, weights)[None]  # [1, B, P, E]
                return ops.slice_update(d_features, (index, 0, 0, 0), d_band), d_weights

            start = (ops.zeros_like(all_features), ops.zeros_like(weights))
            d_features, d_weights = ops.fori_loop(0, bands, add_gradient, start)
            d_features = ops.moveaxis(d_features, 0, 1)  # [B, bands, rows * w, E]
            d_features = ops.reshape(d_features, (-1, bands * rows, width, channels))  # [B, bands * rows, w, E]
            return d_features[:, :height], d_weights

        return totals, gradient

    return sums(features, weights)
