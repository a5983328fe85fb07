"""Training targets of Panoptic FPN (section 3.2): the class of each pixel, and the instances."""

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.detection.instances import class_and_instance_targets
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fpn.config import LossConfig


def make_targets(
    panoptic: Tensor, config: LossConfig, dataset_info: DatasetInfo, *, semantic_only: bool = False
) -> dict[str, Tensor]:
    """Computes the targets of one image with `tf` graph operations.

    Args:
        panoptic: int32 [H, W] panoptic map, static size.
        config: Largest number of instances, M.
        dataset_info: The meaning of the values of the map.
        semantic_only: Whether to leave out the instances.

    Returns:
        `semantic`: int32 [H, W], class id, or the ignore label; and, unless `semantic_only`, `boxes` float32 [M, 4],
        `classes` int32 [M], `valid` bool [M] and `instance_map` int32 [H, W], see `class_and_instance_targets`.
    """
    if semantic_only:
        return {"semantic": panoptic // dataset_info.label_divisor}
    return class_and_instance_targets(panoptic, dataset_info, config.max_instances)
