"""Merges Panoptic FCN's raw outputs for several views: scales, mirror images and other models.

A kernel belongs to the feature of its view. Here the features of all V views are resampled to the cells of the largest
one and concatenated to V * E channels; a kernel of one view has zeros for the channels of the others. The mean of such
kernels gives the mean of the logits of their masks, so that post-processing is that of a single view.
"""

from collections.abc import Sequence

from keras import ops

from deeplab2_like.model.base import View
from deeplab2_like.model.boxes import group_members, suppress, take_rows
from deeplab2_like.model.geometry import Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.panoptic_fcn.config import PostprocessConfig
from deeplab2_like.model.panoptic_fcn.kernels import StuffKernels, ThingKernels
from deeplab2_like.model.panoptic_fcn.masks import mask_overlaps
from deeplab2_like.model.panoptic_fcn.postprocess import find_stuff, find_things, rank_things
from deeplab2_like.model.views import Grid

# IoU from which masks of two views are of the same object.
_SAME_OBJECT = 0.5


def merge_views(views: Sequence[View], image_size: Size, config: PostprocessConfig) -> dict[str, Tensor]:
    """Merges the kernels of several views.

    Args:
        views: At least one, of Panoptic FCN systems.
        image_size: Height and width of the images.
        config: Thresholds.

    Returns:
        Raw outputs for post-processing: `feature` float32 [B, h, w, V * E] of the largest view's cells, and its
        `network_size` if the images were resized; `thing_weights` float32 [B, N, V * E], `thing_scores` and
        `thing_classes` of `ThingKernels`; `stuff_weights` float32 [B, S, V * E] and `stuff_present` of `StuffKernels`.
    """
    grid = Grid.of(views, "feature", image_size)
    feature = ops.concatenate([grid.resample(view.outputs["feature"], view) for view in views], axis=-1)
    channels = [view.outputs["feature"].shape[-1] for view in views]
    things, stuff = [], []
    for index, view in enumerate(views):
        margins = [[0, 0], [0, 0], [sum(channels[:index]), sum(channels[index + 1 :])]]
        of_things = find_best_things(view)
        things.append(of_things._replace(weights=ops.pad(of_things.weights, margins)))
        of_stuff = find_stuff(view.outputs, view.system.config, view.system.kernel_head)
        stuff.append(of_stuff._replace(weights=ops.pad(of_stuff.weights, margins)))
    merged_things, merged_stuff = join_things(feature, things, config), average_stuff(stuff)
    return {
        **grid.size_output,
        "feature": feature,
        **{f"thing_{name}": values for name, values in merged_things._asdict().items()},
        **{f"stuff_{name}": values for name, values in merged_stuff._asdict().items()},
    }


def find_best_things(view: View) -> ThingKernels:
    """Returns the things that post-processing finds in a view, with the scores of their centers alone."""
    system, outputs = view.system, view.outputs
    things = find_things(outputs, system.config, system.kernel_head)
    ranked, _, index = rank_things(outputs["feature"], things, system.config.postprocess)
    return ranked._replace(scores=ops.where(ranked.scores > 0, take_rows(things.scores, index), 0.0))


def join_things(feature: Tensor, by_view: Sequence[ThingKernels], config: PostprocessConfig) -> ThingKernels:
    """Averages the kernels of the same object in different views, which are those whose masks overlap.

    Args:
        feature: float32 [B, h, w, V * E].
        by_view: Things of each view, with weights of V * E channels.
        config: Thresholds.

    Returns:
        The things of all views; the score of one that has joined a better one of another view is zero.
    """
    view_index = [index for index, things in enumerate(by_view) for _ in range(things.scores.shape[1])]
    things = ThingKernels(*(ops.concatenate(values, axis=1) for values in zip(*by_view, strict=True)))
    things, order = things.top(len(view_index))
    view_of = ops.take(ops.array(view_index, "int32"), order)  # [B, N]
    rank = ops.arange(len(view_index), dtype="int32")
    used = things.scores > 0

    iou = mask_overlaps(feature, things.weights, threshold=config.mask_threshold)
    same = (iou >= _SAME_OBJECT) & (view_of[:, :, None] != view_of[:, None, :])  # [B, N, N]
    if config.class_aware:
        same = same & (things.classes[:, :, None] == things.classes[:, None, :])
    keep = suppress(same & (rank[:, None] < rank[None, :]), used)
    most_similar = ops.argmax(ops.where(same & keep[:, :, None], iou, 0.0), axis=1)
    member = group_members(ops.where(keep, rank, ops.cast(most_similar, "int32")), used)  # [B, leader, member]
    weights = ops.matmul(member, things.weights) / ops.maximum(ops.sum(member, axis=-1, keepdims=True), 1.0)
    return ThingKernels(weights, ops.where(keep, things.scores, 0.0), things.classes)


def average_stuff(stuff: Sequence[StuffKernels]) -> StuffKernels:
    """Averages the kernels of each class over the views in which it is present."""
    present = [ops.cast(each.present, "float32")[..., None] for each in stuff]  # V x [B, S, 1]
    total = sum(each.weights * weight for each, weight in zip(stuff, present, strict=True))
    count = sum(present)
    return StuffKernels(total / ops.maximum(count, 1.0), count[..., 0] > 0)
