"""Weights of Detectron2's Panoptic FPN.

Layouts differ in more than the order of axes: Detectron2 takes images in BGR, writes box deltas as (dx, dy, dw, dh),
and flattens the features of a box channels first.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np

from deeplab2_like.model.panoptic_fpn import PanopticFPN, PanopticFPNConfig
from deeplab2_like.weights.assign import (
    assign_by_name,
    check_epsilon,
    listed_name,
    residual_layer_name,
    semantic_layer_name,
    split_path,
)

_EPSILON = 1e-5


def panoptic_fpn_config(*, depth: Literal[50, 101] = 50) -> PanopticFPNConfig:
    """The `model` section with which Detectron2's weights compute what they compute there.

    The differences to our defaults: stride in the first convolution of a block, frozen batch normalisation, images that
    are not divided by a standard deviation but resized, and as many samples in RoIAlign as the size of a box asks for.

    Args:
        depth: Layers of the ResNet.
    """
    return PanopticFPNConfig.model_validate(
        {
            "backbone": {
                "name": f"resnet{depth}",
                "output_stride": 32,
                "stem": "seven_by_seven",
                "stride_in_1x1": True,
            },
            "norm": {"kind": "frozen_batch", "epsilon": _EPSILON},
            "image_std": (1.0, 1.0, 1.0),
            "roi": {"sampling_ratio": 0},
            "postprocess": {"resize": {"short_side": 800, "long_side": 1333}},
        }
    )


# From the path of one of our layers to Detectron2's name for it.
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"backbone/stem/(conv\d)", r"backbone.bottom_up.stem.\1"),
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
    """Detectron2's name of a variable of our Panoptic FPN.

    Args:
        path: Path of the variable, such as `panoptic_fpn/backbone/res2/block1/conv1/conv/kernel`.

    Returns:
        The name, such as `backbone.bottom_up.res2.0.conv1.weight`; None if Detectron2 has nothing like it.
    """
    parts = split_path(path)
    if parts is None:
        return None
    layer, variable = parts
    layer = layer.removeprefix("detector/")
    layer = layer if layer == "rpn_head/conv" else layer.removesuffix("/conv")
    name = (
        residual_layer_name(layer, "backbone.bottom_up")
        or semantic_layer_name(layer, "semantic_branch", "sem_seg_head")
        or listed_name(layer, _LAYERS)
    )
    return name and f"{name}.{variable}"


def load_panoptic_fpn(
    system: PanopticFPN, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> None:
    """Sets the variables of a Panoptic FPN to weights of Detectron2's.

    Nothing is changed unless everything fits. Images are RGB here: the first kernel is turned round. What leaves no
    trace in the weights (strides, mean colour) must be set in the config, see `panoptic_fpn_config`.

    Args:
        system: The system; its variables are created if they are not there yet.
        state: Arrays by Detectron2's names, see `deeplab2_like.weights.detectron2.read_checkpoint`.
        keep_initial: Patterns with `*` of Detectron2's names that are not loaded, for example
            `sem_seg_head.predictor.*` for a data set with other classes.

    Raises:
        UserError: If names are missing or left over, a shape differs, a pattern matches nothing, or batch normalisation
            has another epsilon.
    """
    if not system.built:
        system.create_variables()
    check_epsilon(system, _EPSILON, "Detectron2")
    assign_by_name(
        system,
        state,
        name_of=panoptic_fpn_name,
        to_keras=_to_keras,
        keep_initial=keep_initial,
        what="Panoptic FPN",
        config_function="panoptic_fpn_config",
    )


def _to_keras(path: str, array: np.ndarray) -> np.ndarray:
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
        # A transposed convolution stores (in, out, height, width), which Keras wants as (height, width, out, in).
        array = array.transpose(2, 3, 1, 0)
        return array[:, :, ::-1] if layer == "backbone/stem/conv1/conv/kernel" else array
    return array
