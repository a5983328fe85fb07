"""The panoptic submodule: dynamic potential and what affinities add to it (section 3.4).

A *slot* is one candidate for a pixel: first the D detections, then the S stuff classes. In training the potential of
all slots lies in one tensor at the resolution of the semantic map. The panoptic map is made at full size, where this
tensor would be too large: slot after slot.
"""

from collections.abc import Sequence
from typing import Any, Literal

from keras import ops

from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.merge import enlarge
from deeplab2_like.model.overlaps import paste_weights
from deeplab2_like.model.resampling import running_argmax
from deeplab2_like.model.stages import stage

Potential = Literal["a", "b", "c"]

# Less than any potential: what no slot has claimed, and the logit of detections that are not used.
_NOTHING, _UNUSED = -1e9, -1e3


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

    Stuff is in the whole image, with a score of 1 and without a mask.

    Args:
        semantic_logits: float32 [B, h, w, C].
        boxes: float32 [B, D, 4], in pixels of the image that the network saw.
        scores: float32 [B, D], zero for detections that are not used.
        classes: int32 [B, D], class ids.
        masks: float32 [B, D, P, P], or None for boxes alone.
        stuff_classes: Class ids of stuff, S of them.
        stride: Pixels per cell of the semantic map.
        potential: See `thing_potential`.

    Returns:
        float32 [B, D + S, h, w].
    """
    values = _class_values(semantic_logits, potential)  # [B, C, h, w]
    # The value of the class of each detection, as a product of matrices.
    is_class = ops.one_hot(classes, values.shape[1], dtype="float32")  # [B, D, C]
    of_class = ops.einsum("bdc,bchw->bdhw", is_class, values)
    things = thing_potential(of_class, ops.stop_gradient(boxes) / stride, scores, masks, potential=potential)
    return ops.concatenate([things, ops.take(values, ops.array(stuff_classes, "int32"), axis=1)], axis=1)


def _class_values(semantic_logits: Tensor, potential: str) -> Tensor:
    """What a potential is made of: the probabilities of classes, or their logits; float32 [B, C, h, w]."""
    values = semantic_logits if potential == "a" else ops.softmax(semantic_logits, axis=-1)
    return ops.transpose(values, (0, 3, 1, 2))


def thing_potential(of_class: Tensor, boxes: Tensor, scores: Tensor, masks: Tensor | None, *, potential: str) -> Tensor:
    """The potential of detections; zero outside of their boxes, and where they are not used.

    - `a`: logits, as in UPSNet: that of the class plus that of the mask, without the score; the logit of the mask is
      between -4.6 and 4.6, and a detection that is not used has -1000.
    - `b`: the probability of the class times that of the mask times the score.
    - `c`: the sum of both probabilities, times the score.

    Args:
        of_class: float32 [B, D, H, W], probability of the detection's class in each pixel, or its logit for `a`.
        boxes: float32 [B, D, 4], in these pixels; a pixel is inside if its centre is.
        scores: float32 [B, D].
        masks: float32 [B, D, P, P], or None for boxes alone.
        potential: `a`, `b` or `c`.

    Returns:
        float32 [B, D, H, W].
    """
    height, width = ops.shape(of_class)[2:]

    def is_inside(first: int, size: Any) -> Tensor:
        center = ops.cast(ops.arange(size), "float32") + 0.5
        inside = (center >= boxes[..., first, None]) & (center < boxes[..., first + 2, None])  # [B, D, size]
        return ops.cast(inside, "float32")

    # The score is a factor of one axis: planes of all slots are large, and each pass over them takes time.
    rows, columns = is_inside(0, height), is_inside(1, width)
    if potential != "a":
        rows = rows * scores[..., None]
    box = rows[..., None] * columns[:, :, None]  # [B, D, H, W]
    if masks is None:
        things = of_class * box
    else:
        bins = masks.shape[-1]
        of_rows = paste_weights(boxes[..., 0], boxes[..., 2], bins=bins, size=height) * rows[..., None]  # [B, D, H, P]
        of_columns = paste_weights(boxes[..., 1], boxes[..., 3], bins=bins, size=width) * columns[..., None]
        pasted = ops.matmul(ops.matmul(of_rows, masks), ops.transpose(of_columns, (0, 1, 3, 2)))  # [B, D, H, W]
        if potential == "a":
            share = ops.clip(pasted, 0.01, 0.99)
            things = (of_class + ops.log(share / (1 - share))) * box
        elif potential == "b":
            things = of_class * pasted
        else:
            things = of_class * box + pasted
    return ops.where(scores[..., None, None] > 0, things, _UNUSED) if potential == "a" else things


@stage
def affinity_update(potential: Tensor, hand_out: Tensor, gather: Tensor) -> Tensor:
    """What each pixel gets from the pixels of its instance (equation 4), `phi_0 (phi_1^T psi)`.

    In this order no affinity of two pixels is ever held: what is gathered has C numbers per slot.

    Args:
        potential: psi, float32 [B, K, h, w].
        hand_out: phi_0, float32 [B, h, w, C].
        gather: phi_1, float32 [B, h, w, C].

    Returns:
        float32 [B, K, h, w], to be added to psi.
    """
    batch, slots, height, width = ops.shape(potential)
    pixels = height * width
    hand_out, gather = (ops.reshape(factor, (batch, pixels, factor.shape[-1])) for factor in (hand_out, gather))
    gathered = ops.matmul(ops.reshape(potential, (batch, slots, pixels)), gather)  # [B, K, C]
    handed = ops.matmul(gathered, ops.transpose(hand_out, (0, 2, 1)))
    return ops.reshape(handed, (batch, slots, height, width))  # [B, K, h, w]


@stage
def best_slot(
    semantic_logits: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    masks: Tensor | None,
    handed: Tensor | None,
    rows: Tensor,
    columns: Tensor,
    *,
    stuff_classes: Sequence[int],
    potential: str,
) -> Tensor:
    """The slot of the largest potential in each pixel of the map, at full size (section 3.4).

    Probabilities of classes and what affinities add are enlarged bilinearly; boxes and masks are pasted at full size.

    Args:
        semantic_logits: float32 [B, h, w, C].
        boxes: float32 [B, D, 4], in pixels of the map.
        scores: float32 [B, D], the best detections first; zero for those that are not used.
        classes: int32 [B, D], class ids.
        masks: float32 [B, D, P, P], or None for boxes alone.
        handed: float32 [B, D + S, h, w], what `affinity_update` returned, or None for no affinities.
        rows: float32 [H, h], of `upsampling_matrices`.
        columns: float32 [W, w].
        stuff_classes: Class ids of stuff, S of them.
        potential: See `thing_potential`.

    Returns:
        int32 [B, H, W].
    """
    values = _class_values(semantic_logits, potential)
    number = boxes.shape[1]
    size = tuple(ops.shape(part)[0] for part in (values, rows, columns))
    stuff = ops.array(stuff_classes, "int32")

    def with_affinities(plane: Tensor, slot: Tensor) -> Tensor:
        return plane if handed is None else plane + enlarge(ops.take(handed, slot, axis=1), rows, columns)

    def thing(slot: Tensor) -> Tensor:
        box, score, class_id = (ops.take(each, slot, axis=1)[:, None] for each in (boxes, scores, classes))
        mask = None if masks is None else ops.take(masks, slot, axis=1)[:, None]
        own = ops.take_along_axis(values, class_id[:, :, None, None], axis=1)[:, 0]  # [B, h, w]
        plane = thing_potential(enlarge(own, rows, columns)[:, None], box, score, mask, potential=potential)[:, 0]
        # Affinities give nothing to a slot that nobody is in.
        return ops.where(score[..., None] > 0, with_affinities(plane, slot), _NOTHING)

    def region(slot: Tensor) -> Tensor:
        own = ops.take(values, ops.take(stuff, slot - number), axis=1)  # [B, h, w]
        return with_affinities(enlarge(own, rows, columns), slot)

    # Detections that are not used come last, and take no time.
    used = ops.max(ops.where(scores > 0, ops.arange(number) + 1, 0))
    nothing = ops.full(size, _NOTHING, "float32"), ops.full(size, number, "int32")
    best = running_argmax(thing, 0, used, nothing)
    return running_argmax(region, number, number + len(stuff_classes), best)[1]
