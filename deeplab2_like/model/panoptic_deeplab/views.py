"""Resizing of Panoptic-DeepLab's raw outputs, and averages over scales and mirror images (section 4.3)."""

from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.model.base import View
from deeplab2_like.model.geometry import NETWORK_SIZE, NUM_VIEWS, Geometry, Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.views import average_maps, average_semantic


def resize_outputs(outputs: Mapping[str, Tensor], geometry: Geometry, *, stride: int) -> dict[str, Tensor]:
    """Upsamples raw outputs to the image; offsets change their unit from network pixels to image pixels.

    Args:
        outputs: Raw outputs, see `PanopticDeepLab`.
        geometry: Sizes of the images.
        stride: Network pixels per output pixel.

    Returns:
        The outputs at full resolution, [B, H, W, ...].
    """
    resized = {}
    for name, values in outputs.items():
        if name not in (NETWORK_SIZE, NUM_VIEWS):
            values = geometry.upsample(values, stride=stride)
            resized[name] = values / geometry.scale if name == "offset" else values
    return resized


def average_views(views: Sequence[View], image_size: Size, *, center_is_logit: bool) -> dict[str, Tensor]:
    """Averages class probabilities, heat and offsets at full resolution, as DeepLab2 does.

    Args:
        views: At least one, of Panoptic-DeepLab systems.
        image_size: Height and width of the images.
        center_is_logit: Whether the merged `center` is a logit; its probability is averaged in any case.

    Returns:
        Raw outputs at full resolution.
    """

    def heat(center: Tensor, view: View) -> Tensor:
        return ops.sigmoid(center) if view.system.center_is_logit else center

    def in_image_pixels(offset: Tensor, view: View) -> Tensor:
        # A mirror image points the other way.
        direction = ops.array([1.0, -1.0 if view.mirrored else 1.0])
        return offset / view.system.geometry(view.outputs, image_size).scale * direction

    merged = average_semantic(views, image_size)
    if "center" not in views[0].outputs:
        return merged
    center = average_maps(views, "center", image_size, heat)
    merged["center"] = inverse_sigmoid(center) if center_is_logit else center
    merged["offset"] = average_maps(views, "offset", image_size, in_image_pixels)
    return merged


def inverse_sigmoid(probability: Tensor) -> Tensor:
    """Returns the logit of a probability, finite for 0 and 1."""
    return ops.log(ops.maximum(probability, 1e-6) / ops.maximum(1 - probability, 1e-6))
