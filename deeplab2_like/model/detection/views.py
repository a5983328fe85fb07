"""Merges the detections of several views: scales, mirror images and other models."""

from collections.abc import Sequence

from keras import ops

from deeplab2_like.model.base import View
from deeplab2_like.model.boxes import find_leaders, group_members, overlapping_pairs, suppress, take_rows
from deeplab2_like.model.detection.config import RoiConfig
from deeplab2_like.model.detection.masks import resample_masks
from deeplab2_like.model.geometry import Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.views import boxes_in_image, output_of


def merge_detections(views: Sequence[View], image_size: Size, config: RoiConfig) -> dict[str, Tensor]:
    """Merges the detections of `Detector` in several views by non-maximum suppression, as in a single view.

    The mask of a box that is kept is the mean of its own and those of the boxes that it suppresses, weighted by their
    scores. Detectron2 predicts the masks of the kept boxes again in every view, which needs the features of all views.

    Args:
        views: At least one.
        image_size: Height and width of the images.
        config: Thresholds.

    Returns:
        The detections in image pixels, the best first, see `Detector`.
    """
    by_view = [
        {
            "boxes": boxes_in_image(output_of(view, "boxes", like=views[0]), view, image_size),
            "scores": view.outputs["scores"],
            "thing_classes": view.outputs["thing_classes"],
        }
        for view in views
    ]
    if "masks" in views[0].outputs:
        for view, detections in zip(views, by_view, strict=True):
            masks = output_of(view, "masks", like=views[0])
            detections["masks"] = masks[..., ::-1] if view.mirrored else masks
    merged = {name: ops.concatenate([found[name] for found in by_view], axis=1) for name in by_view[0]}
    merged = _best(merged, merged["scores"].shape[1])

    boxes, scores = merged["boxes"], merged["scores"]
    overlaps = overlapping_pairs(boxes, iou_threshold=config.nms_iou, classes=merged["thing_classes"])
    keep = suppress(overlaps, scores > 0)
    if "masks" in merged:
        leader = find_leaders(overlaps & keep[:, :, None])
        weight = group_members(leader, scores > 0) * scores[:, None]  # [B, leader, member]
        masks = resample_masks(merged["masks"], boxes, take_rows(boxes, leader))
        total = ops.einsum("blm,bmyx->blyx", weight, masks)
        merged["masks"] = total / ops.maximum(ops.sum(weight, axis=-1), 1e-6)[..., None, None]
    return _best({**merged, "scores": ops.where(keep, scores, 0.0)}, config.detections)


def _best(detections: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """Returns the best detections, the best first; all of them if there are fewer."""
    scores, index = ops.top_k(detections["scores"], min(count, detections["scores"].shape[1]))
    return {name: take_rows(values, index) for name, values in detections.items()} | {"scores": scores}
