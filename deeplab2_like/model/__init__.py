"""Systems and their parts. `SYSTEMS` is the registry; nothing here imports TensorFlow."""

from deeplab2_like.configs.schema import Config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import unknown_name
from deeplab2_like.model.lpsnet import LPSNet
from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab
from deeplab2_like.model.panoptic_fcn import PanopticFCN
from deeplab2_like.model.panoptic_fpn import PanopticFPN
from deeplab2_like.model.system import Loss, PanopticSystem
from deeplab2_like.model.unifying import Unifying

SYSTEMS: dict[str, type[PanopticSystem]] = {
    "panoptic_deeplab": PanopticDeepLab,
    "panoptic_fpn": PanopticFPN,
    "panoptic_fcn": PanopticFCN,
    "lpsnet": LPSNet,
    "unifying": Unifying,
}


def find_system(name: str) -> type[PanopticSystem]:
    """Looks up a system by its name; an unknown name lists the known ones."""
    if name not in SYSTEMS:
        raise unknown_name("system", name, SYSTEMS)
    return SYSTEMS[name]


def build_system(config: Config, dataset_info: DatasetInfo | None = None) -> PanopticSystem:
    """Builds the system that a config describes, with freshly initialised variables.

    Args:
        config: What `load_config` returned.
        dataset_info: The data set's facts; by default those of the TFRecord folder `config.data.path`.

    Returns:
        The system, its variables created.

    Raises:
        UserError: If neither `dataset_info` nor `config.data.path` is given, or the folder does not hold a data set.
    """
    if dataset_info is None:
        dataset_info = DatasetInfo.load(config.data.record_folder)
    return find_system(config.system).from_model_config(config.model, dataset_info).create_variables()


__all__ = ["SYSTEMS", "Loss", "PanopticSystem", "build_system", "find_system"]
