"""Losses of Panoptic-DeepLab (section 4): weighted bootstrapped cross entropy, center heat map, offsets.

Predictions are compared at full resolution, so they are upsampled to the size of the targets first.
"""

from collections.abc import Mapping

from keras import ops

from deeplab2_like.model.base import Loss
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_deeplab.config import LossConfig
from deeplab2_like.model.resampling import upsample_bilinear


def compute_losses(
    targets: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    config: LossConfig,
    *,
    stride: int,
    aligned_corners: bool = False,
) -> dict[str, Loss]:
    """Compares raw outputs with the targets of `make_targets`.

    Args:
        targets: Batched targets, [B, H, W, ...].
        outputs: `semantic_logits` [B, h, w, C] and, unless semantic only, `center` [B, h, w, 1] and
            `offset` [B, h, w, 2], at `stride`.
        config: Share of pixels in the semantic loss, and kind of the center loss.
        stride: Image pixels per output pixel.
        aligned_corners: How outputs are upsampled, see `resampling`.

    Returns:
        `semantic` and, unless semantic only, `center` and `offset`.
    """
    height, width = targets["semantic"].shape[1:3]
    upsampled = {
        name: upsample_bilinear(ops.cast(output, "float32"), stride, aligned_corners=aligned_corners)[
            :, :height, :width
        ]
        for name, output in outputs.items()
    }
    losses = {
        "semantic": bootstrapped_cross_entropy(
            targets["semantic"],
            targets["semantic_weight"],
            upsampled["semantic_logits"],
            top_k_share=config.top_k_share,
            over_batch=config.top_k_over == "batch",
        )
    }
    if "center" not in outputs:
        return losses

    predicted, expected = upsampled["center"][..., 0], targets["center"]
    if config.center == "mean_squared_error":
        difference = ops.square(predicted - expected)
    else:
        difference = ops.binary_crossentropy(expected, predicted, from_logits=True)
    weight = ops.cast(targets["center_weight"], "float32")
    losses["center"] = Loss(ops.sum(difference * weight), ops.sum(weight))

    distance = ops.sum(ops.abs(upsampled["offset"] - targets["offset"]), axis=-1)  # [B, H, W]
    weight = ops.cast(targets["offset_weight"], "float32")
    losses["offset"] = Loss(ops.sum(distance * weight), ops.sum(weight))
    return losses


def bootstrapped_cross_entropy(
    labels: Tensor, weights: Tensor, logits: Tensor, *, top_k_share: float, over_batch: bool = False
) -> Loss:
    """Cross entropy of the hardest pixels only, each pixel with its weight (section 3.1).

    Ignored pixels count in the share of the pixels.

    Args:
        labels: int32 [B, H, W] class ids; any value where the weight is 0.
        weights: float32 [B, H, W].
        logits: float32 [B, H, W, C].
        top_k_share: In (0, 1]; 1 takes all pixels.
        over_batch: Whether to choose the hardest pixels of this replica's whole batch, as in Detectron2, so that a hard
            image contributes more of them than an easy one; then the loss depends on the number of replicas. Otherwise
            each image contributes its own hardest pixels, as in DeepLab2.

    Returns:
        The sum over the hardest pixels and their number.
    """
    labels = ops.where(weights > 0, labels, 0)
    pixel_losses = ops.sparse_categorical_crossentropy(labels, logits, from_logits=True) * weights
    height, width = pixel_losses.shape[1:]
    pixel_losses = ops.reshape(pixel_losses, (1, -1) if over_batch else (-1, height * width))  # [1 or B, pixels]
    if top_k_share < 1:
        num_hardest = max(1, round(top_k_share * pixel_losses.shape[1]))
        pixel_losses, _ = ops.top_k(pixel_losses, num_hardest, sorted=False)
    return Loss(ops.sum(pixel_losses), ops.sum(ops.ones_like(pixel_losses)))
