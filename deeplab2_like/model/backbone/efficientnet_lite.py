"""EfficientNet-Lite (TensorFlow, 2020): EfficientNet (Tan and Le, 2019) without squeeze-and-excite, with ReLU6.

The features end with the last block; the convolution to 1280 channels and the classifier are left out.
"""

import math

from deeplab2_like.model.backbone.mobilenet_v3 import Bottleneck, Stages

# Channels of the first convolution, in all sizes.
FIRST_FILTERS = 32
ACTIVATION = "relu6"

# Kernel size, number of blocks, output channels and expansion factor of each group of equal blocks of size 0, by the
# stride of the output: 2 ("stem"), 4, 8, 16 and 32. The first block of a stage has the stride.
_GROUPS: dict[str, tuple[tuple[int, int, int, int], ...]] = {
    "stem": ((3, 1, 16, 1),),
    "res2": ((3, 2, 24, 6),),
    "res3": ((5, 2, 40, 6),),
    "res4": ((3, 3, 80, 6), (5, 3, 112, 6)),
    "res5": ((5, 4, 192, 6), (3, 1, 320, 6)),
}


# Factors of width and depth.
SCALES = {
    "efficientnet_lite0": (1.0, 1.0),
    "efficientnet_lite1": (1.0, 1.1),
    "efficientnet_lite2": (1.1, 1.2),
}


def efficientnet_lite_stages(width: float, depth: float) -> Stages:
    """Returns the blocks of EfficientNet-Lite.

    Args:
        width: Factor of the channels, which are rounded to multiples of 8, but not down by more than 10 %.
        depth: Factor of the number of blocks of each group, rounded up. Groups of one block, the first and the last,
            keep it.
    """
    stages: Stages = {}
    channels = FIRST_FILTERS
    for stage, groups in _GROUPS.items():
        rows: list[Bottleneck] = []
        for kernel_size, num_blocks, filters, expansion in groups:
            filters = _scale_channels(filters, width)
            for _ in range(math.ceil(num_blocks * depth) if num_blocks > 1 else 1):
                rows.append(Bottleneck(kernel_size, channels * expansion, filters, False, ACTIVATION))
                channels = filters
        stages[stage] = tuple(rows)
    return stages


def _scale_channels(channels: int, width: float) -> int:
    scaled = channels * width
    rounded = max(8, int(scaled + 4) // 8 * 8)
    return rounded + 8 if rounded < 0.9 * scaled else rounded
