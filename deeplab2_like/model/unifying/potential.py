"""Dynamic potential and affinity update (section 3.4).

A *slot* is one candidate for a pixel: first the D detections, then the S stuff classes. In training the potential of
all slots is one tensor at the resolution of the semantic map. The panoptic map is made at full size, where this tensor
would be too large, so `postprocess.py` computes one slot after the other.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.overlaps import paste_weights
from deeplab2_like.model.stages import stage
from deeplab2_like.model.unifying.config import Potential

# The logit of unused detections.
_UNUSED = -1e3


def slot_potentials(
    outputs: Mapping[str, Tensor], dataset_info: DatasetInfo, *, potential: Potential, stride: int
) -> tuple[Tensor, Tensor | None]:
    """Computes the potential of every slot in every cell of the semantic map, and its affinity update.

    Args:
        outputs: `semantic_logits`, detections, and, with affinities, `query` and `key`, see `Unifying`.
        dataset_info: The classes.
        potential: See `thing_potential`.
        stride: Network pixels per cell.

    Returns:
        The potential before the update, float32 [B, D + S, h, w], and the affinity update to add, of the same shape;
        None without affinities.
    """
    values = dynamic_potential(
        outputs["semantic_logits"],
        outputs["boxes"],
        outputs["scores"],
        thing_class_ids(outputs["thing_classes"], dataset_info),
        outputs.get("masks"),
        stuff_classes=dataset_info.stuff_classes,
        stride=stride,
        potential=potential,
    )
    return values, affinity_update(values, outputs["query"], outputs["key"]) if "query" in outputs else None


@stage
def dynamic_potential(
    semantic_logits: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    masks: Tensor | None,
    *,
    stuff_classes: Sequence[int],
    stride: int,
    potential: str,
) -> Tensor:
    """Combines the semantic map and the detections into the potential of each slot (Figure 4, equations 1 and 2).

    Stuff covers the whole image, with a score of 1 and without a mask.

    Args:
        semantic_logits: float32 [B, h, w, C].
        boxes: float32 [B, D, 4], in network pixels.
        scores: float32 [B, D], zero for unused detections.
        classes: int32 [B, D], class ids.
        masks: float32 [B, D, P, P], or None for boxes alone.
        stuff_classes: Class ids of stuff, S of them.
        stride: Network pixels per cell of the semantic map.
        potential: See `thing_potential`.

    Returns:
        float32 [B, D + S, h, w].
    """
    values = class_values(semantic_logits, potential)  # [B, C, h, w]
    # Selects the value of each detection's class by a matrix product.
    is_class = ops.one_hot(classes, values.shape[1], dtype="float32")  # [B, D, C]
    value_of_class = ops.einsum("bdc,bchw->bdhw", is_class, values)
    things = thing_potential(value_of_class, ops.stop_gradient(boxes) / stride, scores, masks, potential=potential)
    return ops.concatenate([things, ops.take(values, ops.array(stuff_classes, "int32"), axis=1)], axis=1)


def class_values(semantic_logits: Tensor, potential: str) -> Tensor:
    """Returns the class values that enter a potential: logits for `a`, otherwise probabilities.

    Args:
        semantic_logits: float32 [B, h, w, C].
        potential: See `thing_potential`.

    Returns:
        float32 [B, C, h, w].
    """
    values = semantic_logits if potential == "a" else ops.softmax(semantic_logits, axis=-1)
    return ops.transpose(values, (0, 3, 1, 2))


def thing_potential(
    value_of_class: Tensor, boxes: Tensor, scores: Tensor, masks: Tensor | None, *, potential: str
) -> Tensor:
    """Computes the potential of detections; it is zero outside of their boxes and for unused detections.

    - `a`: logits, as in UPSNet: that of the class plus that of the mask, without the score; the logit of the mask is
      clipped to -4.6..4.6, and an unused detection has -1000.
    - `b`: the probability of the class times that of the mask times the score.
    - `c`: the sum of both probabilities, times the score.

    Args:
        value_of_class: float32 [B, D, H, W], probability of the detection's class in each pixel, or its logit for `a`.
        boxes: float32 [B, D, 4], in these pixels; a pixel is inside if its center is.
        scores: float32 [B, D], zero for unused detections.
        masks: float32 [B, D, P, P], or None for boxes alone.
        potential: `a`, `b` or `c`.

    Returns:
        float32 [B, D, H, W].
    """
    height, width = ops.shape(value_of_class)[2:]

    def is_inside(first: int, size: Any) -> Tensor:
        center = ops.cast(ops.arange(size), "float32") + 0.5
        inside = (center >= boxes[..., first, None]) & (center < boxes[..., first + 2, None])  # [B, D, size]
        return ops.cast(inside, "float32")

    # The score multiplies the rows, which are much smaller than the planes of all slots.
    rows, columns = is_inside(0, height), is_inside(1, width)
    if potential != "a":
        rows = rows * scores[..., None]
    box = rows[..., None] * columns[:, :, None]  # [B, D, H, W]
    if masks is None:
        things = value_of_class * box
    else:
        bins = masks.shape[-1]
        row_weights = paste_weights(boxes[..., 0], boxes[..., 2], bins=bins, size=height) * rows[..., None]
        column_weights = paste_weights(boxes[..., 1], boxes[..., 3], bins=bins, size=width) * columns[..., None]
        pasted = ops.matmul(ops.matmul(row_weights, masks), ops.transpose(column_weights, (0, 1, 3, 2)))  # [B, D, H, W]
        if potential == "a":
            probability = ops.clip(pasted, 0.01, 0.99)
            things = (value_of_class + ops.log(probability / (1 - probability))) * box
        elif potential == "b":
            things = value_of_class * pasted
        else:
            things = value_of_class * box + pasted
    return ops.where(scores[..., None, None] > 0, things, _UNUSED) if potential == "a" else things


@stage
def affinity_update(potential: Tensor, query: Tensor, key: Tensor) -> Tensor:
    """Computes the potential that each pixel receives from all pixels by their affinities (equation 4).

    The update is `query (key^T potential)`. In this order the affinities of all pairs of pixels are never in memory:
    the product in parentheses has A numbers per slot.

    Args:
        potential: psi, float32 [B, K, h, w].
        query: phi_0, float32 [B, h, w, A].
        key: phi_1, float32 [B, h, w, A].

    Returns:
        float32 [B, K, h, w], to be added to psi.
    """
    batch, slots, height, width = ops.shape(potential)
    pixels = height * width
    query, key = (ops.reshape(factor, (batch, pixels, factor.shape[-1])) for factor in (query, key))  # [B, h * w, A]
    sums = ops.matmul(ops.reshape(potential, (batch, slots, pixels)), key)  # [B, K, A]
    # An einsum, because XLA would copy a transposed query.
    update = ops.einsum("bka,bpa->bkp", sums, query)  # [B, K, h * w]
    return ops.reshape(update, (batch, slots, height, width))  # [B, K, h, w]
