"""Systems and their parts; nothing here imports TensorFlow, and Keras is imported on first use only."""

from typing import TYPE_CHECKING

from deeplab2_like.configs.schema import Config
from deeplab2_like.configs.systems import SYSTEMS, find_system
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.lazy import lazy_exports

if TYPE_CHECKING:
    from deeplab2_like.model.base import Loss, PanopticSystem

__all__ = ["SYSTEMS", "Loss", "PanopticSystem", "build_system", "find_system"]
__getattr__ = lazy_exports(__name__, {"Loss": ".base", "PanopticSystem": ".base"})


def build_system(config: Config, dataset_info: DatasetInfo | None = None) -> "PanopticSystem":
    """Builds the system that a config describes, with freshly initialized variables.

    Args:
        config: A config from `load_config`.
        dataset_info: The facts of the data set; by default those of the record folder `config.data.path`.

    Returns:
        The system, its variables created.

    Raises:
        UserError: If neither `dataset_info` nor `config.data.path` is given, or the folder does not hold a data set.
    """
    if dataset_info is None:
        dataset_info = DatasetInfo.load(config.data.record_folder)
    system: PanopticSystem = find_system(config.system)(config.model, dataset_info)
    return system.create_variables()
