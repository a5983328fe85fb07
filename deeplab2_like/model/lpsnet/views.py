"""Merges LPSNet's raw outputs for several views: scales, mirror images and other models."""

import math
from collections.abc import Sequence

from keras import ops

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.model.base import View
from deeplab2_like.model.geometry import Geometry, Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.lpsnet.config import LPSNetConfig
from deeplab2_like.model.lpsnet.postprocess import (
    Detections,
    find_detections,
    remove_duplicates,
    upsample_border_ness,
)
from deeplab2_like.model.views import average_semantic, mirror_boxes


def merge_views(
    views: Sequence[View], image_size: Size, config: LPSNetConfig, dataset_info: DatasetInfo
) -> dict[str, Tensor]:
    """Averages class probabilities, and removes duplicates among the boxes of all views.

    Args:
        views: At least one, of LPSNet systems.
        image_size: Height and width of the images.
        config: Levels and thresholds of the merged boxes.
        dataset_info: The thing classes.

    Returns:
        Raw outputs at full resolution: `semantic_logits` float32 [B, H, W, C]; the merged `Detections` in image pixels
        as `boxes`, `scores` and `thing_classes`; and, if conflicts are decided by it, the result of
        `average_border_ness`.
    """
    found = []
    for view in views:
        geometry = Geometry.of(view.outputs, image_size)
        detections = find_detections(view.outputs, geometry, view.system.config, dataset_info)
        if view.mirrored:
            detections = detections._replace(boxes=mirror_boxes(detections.boxes, image_size[1]))
        found.append(detections)
    boxes, scores, classes = (ops.concatenate(values, axis=1) for values in zip(*found, strict=True))
    merged = remove_duplicates(Detections(boxes, scores, classes), config.postprocess)
    outputs = average_semantic(views, image_size) | {
        "boxes": merged.boxes,
        "scores": merged.scores,
        "thing_classes": merged.classes,
    }
    if config.postprocess.conflicts == "closest_border_ness":
        outputs |= average_border_ness(views, image_size, config)
    return outputs


def average_border_ness(views: Sequence[View], image_size: Size, config: LPSNetConfig) -> dict[str, Tensor]:
    """Averages border-ness over the views whose scale is closest to 1.

    In a view of another scale an object may be on another level, and border-ness is trained only on the level of the
    object. For the same reason, models of an ensemble that have other levels do not take part.

    Args:
        views: At least one.
        image_size: Height and width of the images.
        config: Levels.

    Returns:
        `border_ness` float32 [B, L, H, W], probabilities, and `border_ness_scale`, float32 scalar, the network pixels
        per image pixel in these views.
    """

    def has_levels(view: View) -> bool:
        box = view.system.config.box
        return (box.levels, box.size_limits) == (config.box.levels, config.box.size_limits)

    views = [view for view in views if has_levels(view)]
    distance = min(abs(math.log(view.scale)) for view in views)
    views = [view for view in views if abs(math.log(view.scale)) == distance]
    total: Tensor = 0.0
    for view in views:
        values = upsample_border_ness(view.outputs, Geometry.of(view.outputs, image_size), view.system.config).values
        total = total + (values[..., ::-1] if view.mirrored else values)
    scale = Geometry.of(views[0].outputs, image_size).scale[0]
    return {"border_ness": total / len(views), "border_ness_scale": scale}
