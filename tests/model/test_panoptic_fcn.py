"""Panoptic FCN: the contract, and what is particular to it."""

import numpy as np
from system_contract import INFO, SystemContract

from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model import PanopticSystem, build_system

SMALL = [
    "model.fpn.channels=32",
    "model.head={channels: 32, convolutions: 1, deformable: false}",
    "model.encoder={semantic_channels: 32, channels: 16, convolutions: 1}",
    "model.postprocess.stuff_area_limit=0",
]


def build_small(info: DatasetInfo = INFO, *overrides: str) -> PanopticSystem:
    return build_system(load_config("panoptic_fcn/scenes_tiny", [*SMALL, *overrides]), info)


class TestContract(SystemContract):
    config_name = "panoptic_fcn/scenes_tiny"
    overfit_steps = 150
    overfit_learning_rate = 0.004

    def build(self, info: DatasetInfo) -> PanopticSystem:
        return build_small(info)

    def excite(self, system: PanopticSystem) -> None:
        random = np.random.default_rng(2)
        for layer, scale in (
            (system.position_head.centers, 0.2),
            (system.position_head.regions, 0.2),
            (system.kernel_head.kernels, 0.1),
            (system.kernel_head.embed_things, 0.3),
            (system.kernel_head.embed_stuff, 0.3),
        ):
            layer.kernel.assign(scale * random.standard_normal(layer.kernel.shape))
