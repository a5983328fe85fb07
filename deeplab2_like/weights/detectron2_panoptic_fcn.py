"""Weights of the authors' Panoptic FCN, which is written with Detectron2.

Images are BGR there, and the mean of red is taken from blue and the other way round: the released weights were trained
so, and `panoptic_fcn_config` has this mean. Masks and maps are those of the authors' code with `reference_behaviour`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from deeplab2_like.model.panoptic_fcn import PanopticFCN, PanopticFCNConfig
from deeplab2_like.weights.assign import assign_by_name, check_epsilon

_EPSILON = 1e-5
# Shorter and longer side of the images in tests, and the positions of each object in training, of each released model.
_SIZES = {400: (400, 854, 3), 512: (512, 854, 3), 600: (600, 1000, 5), 800: (800, 1333, 7)}


def panoptic_fcn_config(
    *, size: Literal[400, 512, 600, 800] = 800, enhanced: bool = False, reference_behaviour: bool = False
) -> PanopticFCNConfig:
    """The `model` section with which the released weights compute what they compute there.

    The differences to our defaults: stride in the first convolution of a block, frozen batch normalisation, images that
    are not divided by a standard deviation but resized, whose means of red and blue are exchanged, and kernels of stuff
    that are divided by the positions of the whole map.

    Args:
        size: Shorter side of the images; the models "400", "512" and "600" are trained for smaller ones.
        enhanced: Whether it is a model with a star: deformable convolutions and 256 channels in the encoder.
        reference_behaviour: Whether objects are lost in kernel fusion, as there.
    """
    short_side, long_side, positions = _SIZES[size]
    return PanopticFCNConfig.model_validate(
        {
            "backbone": {"name": "resnet50", "output_stride": 32, "stem": "seven_by_seven", "stride_in_1x1": True},
            "norm": {"kind": "frozen_batch", "epsilon": _EPSILON},
            "image_mean": (103.53, 116.28, 123.675),
            "image_std": (1.0, 1.0, 1.0),
            "generator": {"stuff_average": "map"},
            "encoder": {"channels": 256, "deformable": True} if enhanced else {},
            "loss": {"positions": positions},
            "postprocess": {
                "resize": {"short_side": short_side, "long_side": long_side},
                "reference_behaviour": reference_behaviour,
            },
        }
    )


# From the path of one of our layers to the name there.
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"backbone/stem/(conv\d)", r"backbone.bottom_up.stem.\1"),
    (r"fpn/(lateral|output)(\d)", r"backbone.fpn_\1\2"),
    (r"fpn/coarser(\d)", r"backbone.top_block.p\1"),
    (r"(position_head)/convolutions/conv(\d)/offset", r"\1.\1.\1_head_\2.offset_mask_conv"),
    (r"(position_head)/convolutions/conv(\d)", r"\1.\1.\1_head_\2.dcnv2"),
    (r"(kernel_head)/convolutions/conv(\d)", r"\1.\1.\1_head_\2"),
    (r"encoder/convolutions/conv(\d)/offset", r"feature_encoder.encode_head.encode_head_head_\1.offset_mask_conv"),
    (r"encoder/convolutions/conv(\d)", r"feature_encoder.encode_head.encode_head_head_\1"),
    (r"position_head/centers", r"position_head.out_inst"),
    (r"position_head/regions", r"position_head.out_sem"),
    (r"kernel_head/kernels", r"kernel_head.out_conv"),
    (r"(thing|stuff)_projection", r"\1_generator.embed_extractor"),
)
_VARIABLES = {
    "kernel": "weight",
    "bias": "bias",
    "norm/gamma": "norm.weight",
    "norm/beta": "norm.bias",
    "norm/moving_mean": "norm.running_mean",
    "norm/moving_variance": "norm.running_var",
}


def panoptic_fcn_name(path: str) -> str | None:
    """The authors' name of a variable of our Panoptic FCN.

    Args:
        path: Path of the variable, such as `panoptic_fcn/backbone/res2/block1/conv1/conv/kernel`.

    Returns:
        The name, such as `backbone.bottom_up.res2.0.conv1.weight`; None if there is nothing like it.
    """
    match = re.fullmatch(r"[^/]+/(.+?)/((?:norm/)?\w+)", path)
    if match is None or match[2] not in _VARIABLES:
        return None
    variable = _VARIABLES[match[2]]
    is_plain = match[1].endswith("/conv")
    layer = match[1].removesuffix("/conv")
    block = re.fullmatch(r"backbone/(res\d)/block(\d+)/(\w+)", layer)
    if block is not None:
        return f"backbone.bottom_up.{block[1]}.{int(block[2]) - 1}.{block[3]}.{variable}"
    stage = re.fullmatch(r"encoder/semantic/(p\d)_conv(\d)", layer)
    if stage is not None:
        # There, an enlargement follows each convolution and is counted, too.
        return f"semantic_fpn.{stage[1]}.{2 * (int(stage[2]) - 1)}.{variable}"
    for pattern, name in _LAYERS:
        found = re.fullmatch(pattern, layer)
        if found is not None:
            # A deformable convolution has its kernel itself, a plain one in a layer of its own.
            deformable = layer.startswith("encoder/convolutions/conv") and not is_plain and not layer.endswith("offset")
            return f"{found.expand(name)}{'.dcnv2' if deformable else ''}.{variable}"
    return None


def load_panoptic_fcn(
    system: PanopticFCN, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> None:
    """Sets the variables of a Panoptic FCN to the authors' weights.

    Nothing is changed unless everything fits. Images are RGB here: the first kernel is turned round. What leaves no
    trace in the weights (strides, mean colour) must be set in the config, see `panoptic_fcn_config`.

    Args:
        system: The system; its variables are created if they are not there yet.
        state: Arrays by the authors' names, see `deeplab2_like.weights.detectron2.read_checkpoint`.
        keep_initial: Patterns with `*` of the authors' names that are not loaded, for example `position_head.out_*` for a
            data set with other classes.

    Raises:
        UserError: If names are missing or left over, a shape differs, a pattern matches nothing, or batch normalisation
            has another epsilon.
    """
    if not system.built:
        system.create_variables()
    check_epsilon(system, _EPSILON, "the release")
    assign_by_name(
        system,
        state,
        name_of=panoptic_fcn_name,
        to_keras=_to_keras,
        keep_initial=keep_initial,
        what="Panoptic FCN",
        config_function="panoptic_fcn_config",
    )


def _to_keras(path: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 4:
        return array
    array = array.transpose(2, 3, 1, 0)
    if path.partition("/")[2].startswith(("thing_projection", "stuff_projection")):
        return array[0, 0]  # A 1x1 convolution.
    return array[:, :, ::-1] if path.endswith("backbone/stem/conv1/conv/kernel") else array
