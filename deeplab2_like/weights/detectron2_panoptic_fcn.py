"""Weights of the released Panoptic FCN, which is written on Detectron2.

Images are BGR there, yet the mean colour that is subtracted is in the order of RGB: 123.675 from blue. The released
weights were trained so, so `panoptic_fcn_config` swaps the mean, too.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from deeplab2_like.model.panoptic_fcn import PanopticFCN, PanopticFCNConfig
from deeplab2_like.weights.assign import (
    assign_by_name,
    check_epsilon,
    listed_name,
    residual_layer_name,
    semantic_layer_name,
    split_path,
)

_EPSILON = 1e-5


def panoptic_fcn_config(*, depth: Literal[50, 101] = 50, enhanced: bool = False) -> PanopticFCNConfig:
    """The `model` section with which the released weights compute what they compute there.

    The differences to our defaults: stride in the first convolution of a block, frozen batch normalisation, the swapped
    mean colour, images that are not divided by a standard deviation but resized, and the behaviour of that code.

    Args:
        depth: Layers of the ResNet.
        enhanced: Whether it is the enhanced version (marked * in the paper): an encoder of 256 channels with deformable
            convolutions.
    """
    return PanopticFCNConfig.model_validate(
        {
            "backbone": {
                "name": f"resnet{depth}",
                "output_stride": 32,
                "stem": "seven_by_seven",
                "stride_in_1x1": True,
            },
            "norm": {"kind": "frozen_batch", "epsilon": _EPSILON},
            # Of red, green and blue: what is subtracted from blue is the mean of red.
            "image_mean": (103.53, 116.28, 123.675),
            "image_std": (1.0, 1.0, 1.0),
            "encoder": {"channels": 256, "deformable": True} if enhanced else {},
            "postprocess": {"resize": {"short_side": 800, "long_side": 1333}},
            "reference_behavior": True,
        }
    )


# From the path of one of our layers to the name for it there.
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"backbone/stem/(conv\d)", r"backbone.bottom_up.stem.\1"),
    (r"fpn/(lateral|output)(\d)", r"backbone.fpn_\1\2"),
    (r"fpn/coarser(\d)", r"backbone.top_block.p\1"),
    # A deformable convolution has its own kernel beside the one of its offsets.
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
    """The released code's name of a variable of our Panoptic FCN.

    Args:
        path: Path of the variable, such as `panoptic_fcn/kernel_head/conv1/conv/kernel`.
        enhanced: Whether the encoder has deformable convolutions.

    Returns:
        The name, such as `kernel_head.kernel_head.kernel_head_head_1.weight`; None if there is nothing like it.
    """
    parts = split_path(path)
    if parts is None:
        return None
    layer, variable = parts[0].removesuffix("/conv"), parts[1]
    name = (
        residual_layer_name(layer, "backbone.bottom_up")
        or semantic_layer_name(layer, "encoder/semantic_fpn", "semantic_fpn")
        or listed_name(layer, _LAYERS)
    )
    if enhanced and re.fullmatch(r"encoder/conv\d", layer):
        name = f"{name}.dcnv2"
    return name and f"{name}.{variable}"


def load_panoptic_fcn(
    system: PanopticFCN, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> None:
    """Sets the variables of a Panoptic FCN to released weights.

    Nothing is changed unless everything fits. Images are RGB here: the first kernel is turned round. What leaves no
    trace in the weights (strides, mean colour, behaviour) must be set in the config, see `panoptic_fcn_config`.

    Args:
        system: The system; its variables are created if they are not there yet.
        state: Arrays by the names of the released code, see `deeplab2_like.weights.detectron2.read_checkpoint`.
        keep_initial: Patterns with `*` of names that are not loaded, for example `position_head.out_*` for a data set
            with other classes.

    Raises:
        UserError: If names are missing or left over, a shape differs, a pattern matches nothing, or batch normalisation
            has another epsilon.
    """
    if not system.built:
        system.create_variables()
    check_epsilon(system, _EPSILON, "Detectron2")
    enhanced = any(variable.path.endswith("encoder/conv1/offset/kernel") for variable in system.weights)
    assign_by_name(
        system,
        state,
        name_of=lambda path: panoptic_fcn_name(path, enhanced=enhanced),
        to_keras=_to_keras,
        keep_initial=keep_initial,
        what="Panoptic FCN",
        config_function="panoptic_fcn_config",
    )


def _to_keras(path: str, array: np.ndarray) -> np.ndarray:
    layer = path.partition("/")[2]
    if layer.startswith("kernel_head/embed_") and array.ndim == 4:
        return array[:, :, 0, 0].T  # A 1x1 convolution of kernels that are picked.
    if array.ndim == 4:
        array = array.transpose(2, 3, 1, 0)
        return array[:, :, ::-1] if layer == "backbone/stem/conv1/conv/kernel" else array
    return array
