"""Import of Detectron2's Panoptic FPN weights.

Layouts differ in more than the order of axes: Detectron2 reads images in BGR, orders box deltas as (dx, dy, dw, dh),
and flattens the features of a box channels first.
"""

from collections.abc import Collection, Mapping, Sequence

import numpy as np

from deeplab2_like.model.panoptic_fpn import PanopticFPN
from deeplab2_like.weights.assign import (
    Assignment,
    assign_by_name,
    backbone_layer_name,
    backbone_overrides,
    check_epsilon,
    has_prefixes,
    match_layer_name,
    semantic_layer_name,
    split_path,
)

_EPSILON = 1e-5


CONFIG = "panoptic_fpn/coco_detectron2"
# Layers whose shape depends on the number of classes.
CLASS_LAYERS = (
    "sem_seg_head.predictor.*",
    "roi_heads.box_predictor.*",
    "roi_heads.mask_head.predictor.*",
)


def is_panoptic_fpn(names: Collection[str]) -> bool:
    """Returns whether names are those of Detectron2's Panoptic FPN."""
    return has_prefixes(names, "proposal_generator.", "roi_heads.", "sem_seg_head.")


def panoptic_fpn_overrides(state: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the config overrides for what a checkpoint shows: the backbone."""
    return backbone_overrides(state, "backbone.bottom_up")


# Patterns of layer paths in this library, and Detectron2's names.
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"fpn/(lateral|output)(\d)", r"backbone.fpn_\1\2"),
    (r"semantic_branch/predictor", r"sem_seg_head.predictor"),
    (r"rpn_head/conv", r"proposal_generator.rpn_head.conv"),
    (r"rpn_head/objectness", r"proposal_generator.rpn_head.objectness_logits"),
    (r"rpn_head/deltas", r"proposal_generator.rpn_head.anchor_deltas"),
    (r"box_head/dense(\d)", r"roi_heads.box_head.fc\1"),
    (r"box_head/classes", r"roi_heads.box_predictor.cls_score"),
    (r"box_head/deltas", r"roi_heads.box_predictor.bbox_pred"),
    (r"mask_head/conv(\d)", r"roi_heads.mask_head.mask_fcn\1"),
    (r"mask_head/enlarge", r"roi_heads.mask_head.deconv"),
    (r"mask_head/masks", r"roi_heads.mask_head.predictor"),
)
_BOX_RESOLUTION = 7


def panoptic_fpn_name(path: str) -> str | None:
    """Returns Detectron2's name of a variable of `PanopticFPN`.

    Args:
        path: Path of the variable, such as `panoptic_fpn/backbone/res2/block1/conv1/conv/kernel`.

    Returns:
        The name, such as `backbone.bottom_up.res2.0.conv1.weight`; None if Detectron2 has no such variable.
    """
    parts = split_path(path)
    if parts is None:
        return None
    layer, variable = parts
    layer = layer.removeprefix("detector/")
    layer = layer if layer == "rpn_head/conv" else layer.removesuffix("/conv")
    name = (
        backbone_layer_name(layer, "backbone.bottom_up")
        or semantic_layer_name(layer, "semantic_branch", "sem_seg_head")
        or match_layer_name(layer, _LAYERS)
    )
    return name and f"{name}.{variable}"


def load_panoptic_fpn(
    system: PanopticFPN, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> Assignment:
    """Sets the variables of a Panoptic FPN to Detectron2's weights.

    Nothing is changed unless all weights fit. Images are RGB here, so the input channels of the first kernel are
    reversed. Settings that the weights do not contain (strides, mean color) are those of the config `CONFIG`.

    Args:
        system: The system; missing variables are created.
        state: Arrays by Detectron2's names, see `deeplab2_like.weights.files.read_checkpoint`.
        keep_initial: Patterns with `*` of Detectron2's names that are not loaded, for example
            `sem_seg_head.predictor.*` for a data set with other classes.

    Returns:
        What was loaded.

    Raises:
        UserError: If names are missing or unexpected, a shape differs, a pattern matches nothing, or batch
            normalization has another epsilon.
    """
    if not system.built:
        system.create_variables()
    check_epsilon(system, _EPSILON, "Detectron2")
    return assign_by_name(
        system,
        state,
        name_of=panoptic_fpn_name,
        to_keras=_to_keras,
        keep_initial=keep_initial,
        what="Panoptic FPN",
        config=CONFIG,
    )


def _to_keras(path: str, array: np.ndarray) -> np.ndarray:
    """Converts an array of Detectron2 to the layout of the variable with this path."""
    layer = path.partition("/")[2].removeprefix("detector/")
    if layer.startswith(("rpn_head/deltas", "box_head/deltas")):
        # (dx, dy, dw, dh) of each anchor or class, to (dy, dx, dh, dw).
        array = array.reshape(-1, 4, *array.shape[1:])[:, [1, 0, 3, 2]].reshape(array.shape)
    if layer == "box_head/dense1/kernel":
        array = array.reshape(array.shape[0], -1, _BOX_RESOLUTION, _BOX_RESOLUTION)  # [out, C, 7, 7]
        return array.transpose(2, 3, 1, 0).reshape(-1, array.shape[0])
    if array.ndim == 2:
        return array.T
    if array.ndim == 4:
        # A transposed convolution stores (in, out, height, width), and Keras (height, width, out, in).
        array = array.transpose(2, 3, 1, 0)
        return array[:, :, ::-1] if layer == "backbone/stem/conv1/conv/kernel" else array
    return array
