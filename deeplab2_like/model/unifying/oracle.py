"""Upper bounds of the unifying system: the argmax over the slots of the ground truth, and outputs replaced by it."""

from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.detection.instances import thing_class_ids
from deeplab2_like.model.detection.masks import mask_targets
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.resampling import running_argmax
from deeplab2_like.model.segments import segment_outputs
from deeplab2_like.model.semantic import SemanticClasses
from deeplab2_like.model.unifying.config import PostprocessConfig
from deeplab2_like.model.unifying.postprocess import paint_slots


def postprocess_targets(
    targets: Mapping[str, Tensor], config: PostprocessConfig, dataset_info: DatasetInfo, *, with_masks: bool
) -> dict[str, Tensor]:
    """Finds the best slot of each pixel at full size, where instances are slots, without affinities.

    Without masks, a pixel in the boxes of several instances of its class belongs to the largest of them.

    Args:
        targets: Batched result of `make_targets`.
        config: Smallest area of stuff.
        dataset_info: The meaning of the panoptic map.
        with_masks: Whether the slot of an instance has its mask, or its box and class alone.

    Returns:
        The dictionary of `PanopticSystem.postprocess`.
    """
    class_map, instance_map = targets["semantic"], targets["instance_map"]
    num_instances = targets["valid"].shape[1]
    classes = thing_class_ids(targets["classes"], dataset_info)
    y, x = (ops.cast(ops.arange(side), "float32") + 0.5 for side in class_map.shape[1:])
    stuff = ops.array(dataset_info.stuff_classes, "int32")

    def plane(slot: Tensor) -> Tensor:
        row = ops.minimum(slot, num_instances - 1)
        box = ops.take(targets["boxes"], row, axis=1)[..., None]  # [B, 4, 1]
        in_rows, in_columns = (y > box[:, 0]) & (y < box[:, 2]), (x > box[:, 1]) & (x < box[:, 3])
        is_thing = in_rows[:, :, None] & in_columns[:, None, :]
        is_thing = is_thing & (class_map == ops.take(classes, row, axis=1)[:, None, None])
        if with_masks:
            is_thing = is_thing & (instance_map == row + 1)
        is_stuff = class_map == ops.take(stuff, ops.maximum(slot - num_instances, 0))
        return ops.cast(ops.where(slot < num_instances, is_thing, is_stuff), "float32")

    num_slots, size = num_instances + len(dataset_info.stuff_classes), tuple(ops.shape(class_map))
    # Pixels without a slot are void, which is the number after the last slot.
    start = ops.zeros(size, "float32"), ops.full(size, num_slots, "int32")
    _, slot = running_argmax(plane, 0, num_slots, start)
    table = paint_slots(slot, targets["classes"], config, dataset_info)
    scores = ops.cast(targets["valid"], "float32")
    return segment_outputs(table, scores, ops.ones_like(table.kept[:, num_instances:], "float32"))


def replace_outputs(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    parts: Sequence[str],
    geometry: Geometry,
    *,
    classes: SemanticClasses,
    stride: int,
) -> dict[str, Tensor]:
    """Replaces some raw outputs by the ground truth, at their own resolution.

    Args:
        outputs: Raw outputs of the network.
        targets: Batched result of `make_targets`.
        parts: Some of `semantic`, the class of each cell of the semantic map, and `detections`.
        geometry: Sizes of the images.
        classes: The semantic classes.
        stride: Network pixels per semantic logit.
    """
    replaced = dict(outputs)
    if "semantic" in parts:
        cells = tuple(ops.shape(outputs["semantic_logits"])[1:3])
        semantic = geometry.labels_at_cells(classes.of_class_map(targets["semantic"]), cells, stride=stride)
        # Logits of a probability of almost 1; void has equal probabilities.
        replaced["semantic_logits"] = 20.0 * ops.one_hot(semantic, len(classes.class_id), dtype="float32")
    if "detections" in parts:
        replaced |= detections_of_targets(targets)
        replaced["boxes"] = geometry.boxes_to_network(targets["boxes"])
        if "masks" in outputs:
            row = ops.cumsum(ops.ones_like(targets["classes"]), axis=1) - 1
            num_bins = outputs["masks"].shape[-1]
            masks = mask_targets(targets["instance_map"], targets["boxes"], row, output_size=num_bins)
            replaced["masks"] = ops.cast(masks, "float32")
    return replaced


def detections_of_targets(targets: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the instances of the ground truth as detections without masks, in image pixels."""
    return {
        "boxes": targets["boxes"],
        "scores": ops.cast(targets["valid"], "float32"),
        "thing_classes": targets["classes"],
    }
