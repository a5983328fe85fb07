"""Upper bounds of Panoptic-DeepLab: raw outputs that are replaced by the ground truth."""

from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_deeplab.views import inverse_sigmoid

# The raw output that each oracle part replaces.
OUTPUT_OF_PART = {"semantic": "semantic_logits", "centers": "center", "offsets": "offset"}


def perfect_outputs(targets: Mapping[str, Tensor], *, num_classes: int, center_is_logit: bool) -> dict[str, Tensor]:
    """Makes the raw outputs of a perfect network, at full resolution.

    Args:
        targets: Batched targets of `make_targets`, [B, H, W, ...].
        num_classes: C.
        center_is_logit: Whether `center` is a logit.

    Returns:
        `semantic_logits` float32 [B, H, W, C] and, if the targets have them, `center` [B, H, W, 1] and `offset`
        [B, H, W, 2].
    """
    # Logits of a probability of almost 1.
    outputs = {"semantic_logits": 20.0 * ops.one_hot(targets["semantic"], num_classes)}
    if "center" in targets:
        center = targets["center"][..., None]
        outputs |= {"center": inverse_sigmoid(center) if center_is_logit else center, "offset": targets["offset"]}
    return outputs


def replace_outputs(
    outputs: Mapping[str, Tensor], perfect: Mapping[str, Tensor], parts: Sequence[str]
) -> dict[str, Tensor]:
    """Replaces some raw outputs, at full resolution, by those of a perfect network.

    Args:
        outputs: Outputs of the network.
        perfect: Result of `perfect_outputs`.
        parts: Some keys of `OUTPUT_OF_PART`.
    """
    replaced = {OUTPUT_OF_PART[part] for part in parts}
    return {name: perfect[name] if name in replaced else values for name, values in outputs.items()}
