"""Import of Detectron2's Panoptic-DeepLab weights.

Arrays are transposed from PyTorch's layouts: convolutions (out, in, height, width) to (height, width, in, out),
depthwise ones (channels, 1, height, width) to (height, width, channels, 1).
"""

import re
from collections.abc import Mapping, Sequence

import numpy as np

from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab, PanopticDeepLabConfig
from deeplab2_like.weights.assign import (
    assign_by_name,
    check_epsilon,
    listed_name,
    residual_layer_name,
    split_path,
)

_EPSILON = 1e-5


def panoptic_deeplab_config(
    *, training_crop: tuple[int, int] = (512, 1024), separable: bool = True
) -> PanopticDeepLabConfig:
    """Returns the `model` section with which Detectron2's weights give the same results as in Detectron2.

    It differs from the defaults in the dilations 2, 4 and 8 of the last stage, the low-level channels of the instance
    decoder, plain convolutions in the center head, image pooling over a window of the size of the training crop,
    hardest pixels chosen over the batch, and the constants of batch normalization in PyTorch.

    Args:
        training_crop: Height and width that the model was trained with, in pixels; the Cityscapes models were trained
            with 512x1024, the COCO models with 640x640.
        separable: Whether the model has depthwise separable convolutions ("dsconv").
    """
    output_stride = 16
    return PanopticDeepLabConfig.model_validate(
        {
            "backbone": {
                "name": "resnet50",
                "output_stride": output_stride,
                "multi_grid": (1, 2, 4),
                "atrous_conversion": "detectron2",
            },
            "norm": {"momentum": 0.9, "epsilon": _EPSILON},
            "aspp": {"pooling_window": tuple(side // output_stride for side in training_crop)},
            "decoder": {
                "instance_low_level_channels": {"res3": 64, "res2": 32},
                "convolution": "separable" if separable else "plain",
                "center_head_convolution": "plain",
            },
            "loss": {"top_k_over": "batch"},
        }
    )


# Patterns of layer paths in this library, and Detectron2's names, in which `_BRANCHES` replaces {semantic}, {instance}.
_BRANCHES = {"semantic": "sem_seg_head", "instance": "ins_embed_head"}
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"backbone/stem/(conv\d)", r"backbone.stem.\1"),
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
    name = residual_layer_name(layer, "backbone") or listed_name(layer, _LAYERS)
    if name is None:
        return None
    if not name.startswith("backbone"):
        # Detectron2 counts pairs of plain convolutions from 0.
        name = re.sub(r"\.conv(\d)$", lambda number: f".{int(number[1]) - 1}", name.format(**_BRANCHES))
    return f"{name}.{variable}"


def load_panoptic_deeplab(
    system: PanopticDeepLab, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> None:
    """Sets the variables of a Panoptic-DeepLab to Detectron2's weights.

    Nothing changes unless all weights fit. Images are RGB in this model of Detectron2, as here. Settings that the
    weights do not contain (dilations, pooling window, mean color) must be set in the config, see
    `panoptic_deeplab_config`.

    Args:
        system: The system; its variables are created if needed.
        state: Arrays by Detectron2's names, see `read_checkpoint`.
        keep_initial: Patterns with `*` for Detectron2's names that are not loaded, for example
            `sem_seg_head.predictor.*` for a data set with other classes.

    Raises:
        UserError: If names are missing or left over, a shape differs, a pattern matches nothing, or batch normalization
            has another epsilon.
    """
    if not system.built:
        system.create_variables()
    check_epsilon(system, _EPSILON, "Detectron2")
    assign_by_name(
        system,
        state,
        name_of=panoptic_deeplab_name,
        to_keras=_to_keras,
        keep_initial=keep_initial,
        what="Panoptic-DeepLab",
        config_function="panoptic_deeplab_config",
    )


def _to_keras(path: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 4:
        return array
    return array.transpose((2, 3, 0, 1) if "/depthwise/conv/" in path else (2, 3, 1, 0))
