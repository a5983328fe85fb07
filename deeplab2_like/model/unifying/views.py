"""Merges the unifying system's raw outputs for several views: scales, mirror images and other models."""

from collections.abc import Sequence

from keras import ops

from deeplab2_like.model.base import View
from deeplab2_like.model.detection.config import RoiConfig
from deeplab2_like.model.detection.views import merge_detections
from deeplab2_like.model.geometry import Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.views import Grid, log_probability, output_of


def merge_views(views: Sequence[View], image_size: Size, config: RoiConfig) -> dict[str, Tensor]:
    """Averages class probabilities and affinities, and merges the detections.

    Potentials of all slots are computed at the resolution of the network, so the averages have that of the largest
    view, and the result looks like the raw outputs for that view.

    Args:
        views: At least one, of unifying systems.
        image_size: Height and width of the images.
        config: Thresholds of the merged detections.

    Returns:
        Raw outputs, see `Unifying`, in network pixels of the largest view.
    """
    grid = Grid.of(views, "semantic_logits", image_size)
    total: Tensor = 0.0
    for view in views:
        logits = output_of(view, "semantic_logits", like=views[0])
        total = total + ops.softmax(grid.resample(logits, view), axis=-1)
    detections = merge_detections(views, image_size, config)
    detections["boxes"] = grid.geometry.boxes_to_network(detections["boxes"])
    outputs = {**grid.size_output, **detections, "semantic_logits": log_probability(total / len(views))}
    return outputs | (average_affinities(views, grid) if "query" in views[0].outputs else {})


def average_affinities(views: Sequence[View], grid: Grid) -> dict[str, Tensor]:
    """Averages the affinities of pixels over views.

    An affinity is the product of a query and a key, which are vectors of A channels. The vectors of all V views one
    after the other are a query and a key, too, and their product is the sum over the views.

    Args:
        views: At least one.
        grid: The cells.

    Returns:
        `query` and `key`, float32 [B, h, w, V * A].
    """
    queries, keys = [], []
    for view in views:
        queries.append(grid.resample(output_of(view, "query", like=views[0]), view))
        # The sum over all pixels is 1 again.
        key = ops.where(grid.is_inside[..., None], grid.resample(output_of(view, "key", like=views[0]), view), 0.0)
        keys.append(key / ops.maximum(ops.sum(key, axis=(1, 2), keepdims=True), 1e-30))
    return {
        "query": ops.concatenate(queries, axis=-1),
        "key": ops.concatenate(keys, axis=-1) / len(views),
    }
