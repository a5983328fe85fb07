"""The panoptic submodule: dynamic potential and what affinities add to it (section 3.4).

A *slot* is one candidate for a pixel: first the D detections, then the stuff classes. The potential of all slots lies
in one tensor at the resolution of the semantic map.
"""

from collections.abc import Callable, Sequence
from typing import Any, Literal

from keras import ops

from deeplab2_like.model.detection import paste_weights
from deeplab2_like.model.layers import Tensor, stage

Potential = Literal["a", "b", "c"]


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
    """What the semantic map and the detections say together of each slot (Figure 4, equations 1 and 2).

    A cell of the semantic map is in a box if its centre is. Stuff is in the whole image, with a score of 1 and without
    a mask.

    - `a`: logits, as in UPSNet: that of the class plus that of the mask, both zero outside of the box; no score.
    - `b`: the probability of the class times that of the mask times the score.
    - `c`: the sum of both probabilities, times the score.

    Args:
        semantic_logits: float32 [B, h, w, C].
        boxes: float32 [B, D, 4], in pixels of the image that the network saw.
        scores: float32 [B, D].
        classes: int32 [B, D], class ids.
        masks: float32 [B, D, P, P], or None for boxes alone.
        stuff_classes: Class ids of stuff, S of them.
        stride: Pixels per cell of the semantic map.
        potential: `a`, `b` or `c`.

    Returns:
        float32 [B, D + S, h, w]; zero, or for `a` very small, for detections that are not used.
    """
    height, width = ops.shape(semantic_logits)[1:3]
    values = semantic_logits if potential == "a" else ops.softmax(semantic_logits, axis=-1)
    values = ops.transpose(values, (0, 3, 1, 2))  # [B, C, h, w]
    # The value of the class of each detection, as a product of matrices.
    is_class = ops.one_hot(classes, semantic_logits.shape[-1], dtype="float32")  # [B, D, C]
    of_class = ops.einsum("bdc,bchw->bdhw", is_class, values)

    def is_inside(first: int, size: Any) -> Tensor:
        center = (ops.cast(ops.arange(size), "float32") + 0.5) * stride
        inside = (center >= boxes[..., first, None]) & (center < boxes[..., first + 2, None])  # [B, D, size]
        return ops.cast(inside, "float32")

    # The score is a factor of one axis: planes of all slots are large, and each pass over them takes time.
    rows, columns = is_inside(0, height), is_inside(1, width)
    if potential != "a":
        rows = rows * scores[..., None]
    box = rows[..., None] * columns[:, :, None]  # [B, D, h, w]
    if masks is None:
        things = of_class * box
    else:
        bins = masks.shape[-1]
        cells = ops.stop_gradient(boxes) / stride
        of_rows = paste_weights(cells[..., 0], cells[..., 2], bins=bins, size=height) * rows[..., None]  # [B, D, h, P]
        of_columns = paste_weights(cells[..., 1], cells[..., 3], bins=bins, size=width) * columns[..., None]
        pasted = ops.matmul(ops.matmul(of_rows, masks), ops.transpose(of_columns, (0, 1, 3, 2)))  # [B, D, h, w]
        if potential == "a":
            share = ops.clip(pasted, 0.01, 0.99)
            things = (of_class + ops.log(share / (1 - share))) * box
        elif potential == "b":
            things = of_class * pasted
        else:
            things = of_class * box + pasted
    if potential == "a":
        things = ops.where(scores[..., None, None] > 0, things, -1e3)
    return ops.concatenate([things, ops.take(values, ops.array(stuff_classes, "int32"), axis=1)], axis=1)


@stage
def add_affinities(potential: Tensor, hand_out: Tensor, gather: Tensor) -> Tensor:
    """Adds to each pixel what the pixels of its instance say (equation 4), `P = psi + phi_0 (phi_1^T psi)`.

    In this order no affinity of two pixels is ever held: what is gathered has C numbers per slot.

    Args:
        potential: psi, float32 [B, K, h, w].
        hand_out: phi_0, float32 [B, h, w, C].
        gather: phi_1, float32 [B, h, w, C].

    Returns:
        float32 [B, K, h, w].
    """
    batch, slots, height, width = ops.shape(potential)
    pixels = height * width
    hand_out, gather = (ops.reshape(factor, (batch, pixels, factor.shape[-1])) for factor in (hand_out, gather))
    potential = ops.reshape(potential, (batch, slots, pixels))
    gathered = ops.matmul(potential, gather)  # [B, K, C]
    potential = potential + ops.matmul(gathered, ops.transpose(hand_out, (0, 2, 1)))
    return ops.reshape(potential, (batch, slots, height, width))  # [B, K, h, w]


def slot_probability(potential: Tensor, *, is_logit: bool) -> Tensor:
    """The share of each slot in a pixel, float32 [B, h, w, K].

    Args:
        potential: float32 [B, K, h, w].
        is_logit: Whether these are logits (variant a); else they are not negative, and are divided by their sum. A
            softmax would flatten potentials between 0 and 1, and the order of slots is the same.
    """
    potential = ops.transpose(potential, (0, 2, 3, 1))  # [B, h, w, K]
    if is_logit:
        return ops.softmax(potential, axis=-1)
    return potential / ops.maximum(ops.sum(potential, axis=-1, keepdims=True), 1e-9)


def best_of_planes(plane: Callable[[Tensor], Tensor], number: int, shape: tuple[Any, Any, Any]) -> Tensor:
    """The best slot of each pixel, where the slots are made one after the other, as all would not fit at full size.

    Args:
        plane: From the number of a slot, an int32 scalar, to its potential, float32 [B, H, W], not negative.
        number: Slots, K.
        shape: B, H and W.

    Returns:
        int32 [B, H, W]; the first one of equals, K where all are zero.
    """

    def better(index: Tensor, best: Tensor, slot: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        here = plane(index)
        return index + 1, ops.maximum(best, here), ops.where(here > best, index, slot)

    start = (ops.array(0, "int32"), ops.zeros(shape, "float32"), ops.full(shape, number, "int32"))
    return ops.while_loop(lambda index, *_: index < number, better, start)[2]
