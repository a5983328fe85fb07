"""Upper bounds of Panoptic FPN: semantic classes and instances of the ground truth."""

from collections.abc import Mapping

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fpn.postprocess import Instances, no_instances


def instances_of_targets(targets: Mapping[str, Tensor], dataset_info: DatasetInfo) -> Instances:
    """Returns the instances of the ground truth, whose masks do not overlap.

    Args:
        targets: Batched result of `make_targets`; without instances there are none.
        dataset_info: The thing classes.
    """
    if "instance_map" not in targets:
        batch, height, width = ops.shape(targets["semantic"])
        return no_instances(batch, Geometry((height, width)))
    instance_map, valid = targets["instance_map"], targets["valid"]
    return Instances(
        owner=ops.where(instance_map > 0, instance_map - 1, valid.shape[1]),
        classes=thing_class_ids(targets["classes"], dataset_info),
        scores=ops.cast(valid, "float32"),
    )
