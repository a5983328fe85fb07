"""Import of Detectron2's Panoptic-DeepLab weights.

Arrays are transposed from PyTorch's layouts: convolutions (out, in, height, width) to (height, width, in, out),
depthwise ones (channels, 1, height, width) to (height, width, channels, 1).
"""

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab
from deeplab2_like.weights.assign import (
    Assignment,
    assign_by_name,
    backbone_layer_name,
    backbone_overrides,
    check_epsilon,
    has_prefixes,
    match_layer_name,
    split_path,
    transpose_kernel,
)

_EPSILON = 1e-5


# The configs by the number of classes of the semantic head.
CONFIGS = {
    19: ("panoptic_deeplab/cityscapes_detectron2", "cityscapes"),
    133: ("panoptic_deeplab/coco_detectron2", "coco"),
}
# Layers whose shape depends on the number of classes.
CLASS_LAYERS = ("sem_seg_head.predictor.*",)


def is_panoptic_deeplab(names: Collection[str]) -> bool:
    """Returns whether names are those of Detectron2's Panoptic-DeepLab."""
    return has_prefixes(names, "ins_embed_head.", "sem_seg_head.")


def find_panoptic_deeplab_config(state: Mapping[str, np.ndarray]) -> tuple[str | None, str | None]:
    """Returns the names of the config and the data set of a checkpoint, by its number of classes; None if unknown."""
    predictor = state.get("sem_seg_head.predictor.weight")
    return CONFIGS.get(0 if predictor is None else len(predictor), (None, None))


def panoptic_deeplab_overrides(state: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the config overrides for what a checkpoint shows: the backbone and the kind of convolutions."""
    is_separable = "sem_seg_head.head.depthwise.weight" in state
    return [
        *backbone_overrides(state, "backbone"),
        f"model.decoder.convolution={'separable' if is_separable else 'plain'}",
    ]


# Patterns of layer paths in this library, and Detectron2's names, in which `_BRANCHES` replaces {semantic}, {instance}.
_BRANCHES = {"semantic": "sem_seg_head", "instance": "ins_embed_head"}
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"(semantic|instance)_aspp/branch(\d)", r"{\1}.decoder.res5.project_conv.convs.\2"),
    (r"(semantic|instance)_aspp/branch(\d)/(depthwise|pointwise)", r"{\1}.decoder.res5.project_conv.convs.\2.\3"),
    (r"(semantic|instance)_aspp/pooling_branch", r"{\1}.decoder.res5.project_conv.convs.4.1"),
    (r"(semantic|instance)_aspp/project", r"{\1}.decoder.res5.project_conv.project"),
    (r"(semantic|instance)_decoder/project_(res\d)", r"{\1}.decoder.\2.project_conv"),
    (r"(semantic|instance)_decoder/fuse_(res\d)/separable/(\w+)", r"{\1}.decoder.\2.fuse_conv.\3"),
    (r"(semantic|instance)_decoder/fuse_(res\d)/(conv\d)", r"{\1}.decoder.\2.fuse_conv.\3"),
    (r"semantic_head/fuse/separable/(\w+)", r"{semantic}.head.\1"),
    (r"semantic_head/fuse/(conv\d)", r"{semantic}.head.\1"),
    (r"semantic_head/predictor", r"{semantic}.predictor"),
    (r"(center|offset)_head/fuse/separable/(\w+)", r"{instance}.\1_head.\2"),
    (r"(center|offset)_head/fuse/(conv\d)", r"{instance}.\1_head.\2"),
    (r"(center|offset)_head/predictor", r"{instance}.\1_predictor"),
)


def panoptic_deeplab_name(path: str) -> str | None:
    """Returns Detectron2's name of a variable of `PanopticDeepLab`.

    Args:
        path: Path of the variable, such as `panoptic_deeplab/backbone/res2/block1/conv1/conv/kernel`.

    Returns:
        The name, such as `backbone.res2.0.conv1.weight`; None if Detectron2 has no such variable.
    """
    parts = split_path(path)
    if parts is None:
        return None
    layer, variable = parts[0].removesuffix("/conv"), parts[1]
    name = backbone_layer_name(layer, "backbone") or match_layer_name(layer, _LAYERS)
    if name is None:
        return None
    if not name.startswith("backbone"):
        # Detectron2 counts pairs of plain convolutions from 0.
        name = re.sub(r"\.conv(\d)$", lambda number: f".{int(number[1]) - 1}", name.format(**_BRANCHES))
    return f"{name}.{variable}"


def load_panoptic_deeplab(
    system: PanopticDeepLab, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> Assignment:
    """Sets the variables of a Panoptic-DeepLab to Detectron2's weights.

    Nothing changes unless all weights fit. Images are RGB in this model of Detectron2, as here. Settings that the
    weights do not contain (dilations, pooling window, mean color) are those of `CONFIGS`.

    Args:
        system: The system; its variables are created if needed.
        state: Arrays by Detectron2's names, see `read_checkpoint`.
        keep_initial: Patterns with `*` for Detectron2's names that are not loaded, for example
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
        name_of=panoptic_deeplab_name,
        to_keras=transpose_kernel,
        keep_initial=keep_initial,
        what="Panoptic-DeepLab",
        config=CONFIGS[19][0],
    )
