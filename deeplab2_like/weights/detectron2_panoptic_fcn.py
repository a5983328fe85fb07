"""The released weights of Panoptic FCN, whose code is based on Detectron2.

The released code reads images as BGR, but subtracts the mean color in RGB order: 123.675 from blue. The weights were
trained that way, so the config swaps the mean, too.
"""

import re
from collections.abc import Collection, Mapping, Sequence

import numpy as np

from deeplab2_like.model.panoptic_fcn import PanopticFCN
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


CONFIG = "panoptic_fcn/coco_detectron2"
# Layers whose shape depends on the number of classes.
CLASS_LAYERS = ("position_head.out_inst.*", "position_head.out_sem.*")
# A logit whose sigmoid is exactly 1 in float32.
_FACTOR_ONE = 30.0


def is_panoptic_fcn(names: Collection[str]) -> bool:
    """Returns whether names are those of the released Panoptic FCN."""
    return has_prefixes(names, "position_head.", "kernel_head.")


def panoptic_fcn_overrides(state: Mapping[str, np.ndarray]) -> list[str]:
    """Returns the config overrides for what a checkpoint shows: the backbone and the encoder."""
    overrides = backbone_overrides(state, "backbone.bottom_up")
    kernel = state.get("feature_encoder.encode_head.encode_head_head_1.dcnv2.weight")
    if kernel is not None:  # The enhanced version, marked * in the paper.
        overrides += ["model.encoder.deformable=true", f"model.encoder.channels={len(kernel)}"]
    return overrides


# Patterns of the path of a layer, and its name in the released code.
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"fpn/(lateral|output)(\d)", r"backbone.fpn_\1\2"),
    (r"fpn/coarser(\d)", r"backbone.top_block.p\1"),
    # A deformable convolution has its own kernel and the kernel of its offsets.
    (r"position_head/conv(\d)", r"position_head.position_head.position_head_head_\1.dcnv2"),
    (r"position_head/conv(\d)/offset", r"position_head.position_head.position_head_head_\1.offset_mask_conv"),
    (r"position_head/centers", r"position_head.out_inst"),
    (r"position_head/regions", r"position_head.out_sem"),
    (r"kernel_head/conv(\d)", r"kernel_head.kernel_head.kernel_head_head_\1"),
    (r"kernel_head/kernels", r"kernel_head.out_conv"),
    (r"kernel_head/embed_things", r"thing_generator.embed_extractor"),
    (r"kernel_head/embed_stuff", r"stuff_generator.embed_extractor"),
    (r"encoder/conv(\d)", r"feature_encoder.encode_head.encode_head_head_\1"),
    (r"encoder/conv(\d)/offset", r"feature_encoder.encode_head.encode_head_head_\1.offset_mask_conv"),
)


def panoptic_fcn_name(path: str, *, enhanced: bool = False) -> str | None:
    """Returns the name that a variable has in the released code.

    Args:
        path: Path of the variable, such as `panoptic_fcn/kernel_head/conv1/conv/kernel`.
        enhanced: Whether the encoder has deformable convolutions.

    Returns:
        The name, such as `kernel_head.kernel_head.kernel_head_head_1.weight`; None if it has none.
    """
    parts = split_path(path)
    if parts is None:
        return None
    layer, variable = parts[0].removesuffix("/conv"), parts[1]
    name = (
        backbone_layer_name(layer, "backbone.bottom_up")
        or semantic_layer_name(layer, "encoder/semantic_fpn", "semantic_fpn")
        or match_layer_name(layer, _LAYERS)
    )
    if enhanced and re.fullmatch(r"encoder/conv\d", layer):
        name = f"{name}.dcnv2"
    return name and f"{name}.{variable}"


def load_panoptic_fcn(
    system: PanopticFCN, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> Assignment:
    """Sets the variables of a Panoptic FCN to released weights.

    Nothing changes unless all weights fit. The input channels of the first kernel are reversed, because images are RGB
    here. Settings that the weights do not show (strides, mean color, behavior) come from the config `CONFIG`.

    Args:
        system: The system; its variables are created if needed.
        state: Arrays by their names in the released code, see `deeplab2_like.weights.files.read_checkpoint`.
        keep_initial: Patterns with `*` of names to leave out, for example `position_head.out_*` for a data set with
            other classes.

    Returns:
        What was loaded.

    Raises:
        UserError: If names are missing or unexpected, a shape differs, a pattern matches nothing, or batch
            normalization has another epsilon.
    """
    if not system.built:
        system.create_variables()
    check_epsilon(system, _EPSILON, "Detectron2")
    enhanced = any(variable.path.endswith("encoder/conv1/offset/kernel") for variable in system.weights)
    return assign_by_name(
        system,
        state,
        name_of=lambda path: panoptic_fcn_name(path, enhanced=enhanced),
        to_keras=_to_keras,
        keep_initial=keep_initial,
        what="Panoptic FCN",
        config=CONFIG,
    )


def _to_keras(path: str, array: np.ndarray) -> np.ndarray:
    layer = path.partition("/")[2]
    if "/conv2/offset/" in layer and len(array) == 18:
        # A backbone without modulation: 9 more outputs, which give the factor 1.
        is_bias = array.ndim == 1
        margins = [(0, 9), *[(0, 0)] * (array.ndim - 1)]
        array = np.pad(array, margins, constant_values=_FACTOR_ONE if is_bias else 0.0)
    if layer.startswith("kernel_head/embed_") and array.ndim == 4:
        return array[:, :, 0, 0].T  # A 1x1 convolution there, a dense layer here.
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        return array[:, :, ::-1] if layer == "backbone/stem/conv1/conv/kernel" else array
    return array
