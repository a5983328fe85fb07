"""Upper bounds of LPSNet: semantic map and boxes that are replaced by the ground truth (Table 6)."""

from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.boxes import take_rows
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.lpsnet.config import LPSNetConfig
from deeplab2_like.model.lpsnet.postprocess import (
    BorderNess,
    Detections,
    paste_detections,
    predict_border_ness,
    score_regions,
    select_detections,
)
from deeplab2_like.model.lpsnet.targets import border_ness, distances_to_boxes, mask_borders
from deeplab2_like.model.segments import segment_outputs
from deeplab2_like.model.semantic import SemanticClasses


def postprocess_with_truth(
    outputs: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    geometry: Geometry,
    parts: Sequence[str],
    config: LPSNetConfig,
    dataset_info: DatasetInfo,
    classes: SemanticClasses,
) -> dict[str, Tensor]:
    """Post-processes raw outputs of which some parts are replaced by the ground truth.

    Args:
        outputs: Raw outputs, see `LPSNet`.
        targets: Batched targets of the whole images.
        geometry: Sizes of the images.
        parts: `semantic`: the class of each pixel; boxes keep their predicted classes. `boxes`: the boxes, their
            classes, and the border-ness of each pixel, measured as in training.
        config: Levels and thresholds.
        dataset_info: The meaning of the panoptic map.
        classes: The classes of the semantic head.

    Returns:
        The dictionary of `postprocess`.
    """
    if "semantic" in parts:
        semantic = classes.of_class_map(targets["semantic"])
    else:
        semantic = geometry.argmax(outputs["semantic_logits"], stride=config.stride)
    pixels: BorderNess | None
    if "boxes" in parts:
        detections = Detections(targets["boxes"], ops.cast(targets["valid"], "float32"), targets["classes"])
        pixels = true_border_ness(targets, config)
    else:
        detections = select_detections(outputs, geometry, config, dataset_info)
        pixels = predict_border_ness(outputs, geometry, config)
    table = paste_detections(semantic, detections, pixels, config.postprocess, dataset_info)
    if "semantic" in parts:
        scores = ops.ones((ops.shape(detections.scores)[0], dataset_info.num_classes), "float32")
    else:
        scores = score_regions(outputs, table, geometry, config, classes)
    return segment_outputs(table, detections.scores, scores)


def true_border_ness(targets: Mapping[str, Tensor], config: LPSNetConfig) -> BorderNess:
    """Measures the border-ness of the pixels of all objects as in training; 0 elsewhere.

    Args:
        targets: Batched targets.
        config: The borders that border-ness is measured to.
    """
    instance_map = targets["instance_map"]
    batch, height, width = ops.shape(instance_map)
    y = (ops.cast(ops.arange(height), "float32") + 0.5)[:, None]
    x = (ops.cast(ops.arange(width), "float32") + 0.5)[None, :]
    rows = ops.maximum(instance_map - 1, 0)
    if config.box.measured_to == "mask":
        distances = mask_borders(instance_map, targets["valid"].shape[1]).distances(rows, y, x)
    else:
        boxes = take_rows(targets["boxes"], ops.reshape(rows, (batch, height * width)))
        distances = distances_to_boxes(ops.reshape(boxes, (batch, height, width, 4)), y, x)
    values = ops.where(instance_map > 0, border_ness(distances), 0.0)
    return BorderNess(values[:, None], size_limits=())
