"""Resizing of Panoptic-DeepLab's raw outputs, and averages over scales and mirror images (section 4.3)."""

from collections.abc import Mapping, Sequence

from keras import ops

from deeplab2_like.model.base import View
from deeplab2_like.model.geometry import NETWORK_SIZE, Geometry, Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.resampling import resize_bilinear, upsample_bilinear


def resize_outputs(outputs: Mapping[str, Tensor], geometry: Geometry, *, stride: int) -> dict[str, Tensor]:
    """Upsamples raw outputs to the image; offsets change their unit from network pixels to image pixels.

    Args:
        outputs: Raw outputs, see `PanopticDeepLab`.
        geometry: Sizes of the images.
        stride: Network pixels per output pixel.

    Returns:
        The outputs at full resolution, [B, H, W, ...].
    """
    height, width = geometry.network_size or geometry.image_size
    resized = {}
    for name, values in outputs.items():
        if name == NETWORK_SIZE:
            continue
        values = upsample_bilinear(values, stride)[:, :height, :width]
        if geometry.network_size is not None:
            values = resize_bilinear(values, *geometry.image_size)
            if name == "offset":
                values = values / geometry.scale
        resized[name] = values
    return resized


def average_views(views: Sequence[View], image_size: Size, *, stride: int, center_is_logit: bool) -> dict[str, Tensor]:
    """Averages class probabilities, heat and offsets.

    Args:
        views: At least one.
        image_size: Height and width of the images, multiples of `stride`.
        stride: Image pixels per output pixel.
        center_is_logit: Whether `center` is a logit; its probability is averaged then.

    Returns:
        Raw outputs of the images at `image_size`.
    """
    height, width = image_size

    def align(view: View, name: str) -> Tensor:
        outputs, scale = view.outputs, view.geometry.scale
        if NETWORK_SIZE in outputs:
            outputs = resize_outputs(outputs, Geometry.of(outputs, image_size), stride=stride)
            scale = ops.ones((2,), "float32")
        values = outputs[name]
        values = values[:, :, ::-1] if view.mirrored else values
        values = resize_bilinear(values, height // stride, width // stride)
        if name == "semantic_logits":
            return ops.softmax(values, axis=-1)
        if name == "center":
            return ops.sigmoid(values) if center_is_logit else values
        # Offsets are in pixels of the view, and a mirror image points the other way.
        return values / scale * ops.array([1.0, -1.0 if view.mirrored else 1.0])

    names = [name for name in views[0].outputs if name != NETWORK_SIZE]
    mean = {name: sum(align(view, name) for view in views) / len(views) for name in names}
    merged = {"semantic_logits": ops.log(ops.maximum(mean.pop("semantic_logits"), 1e-30)), **mean}
    if center_is_logit and "center" in merged:
        merged["center"] = inverse_sigmoid(merged["center"])
    return merged


def inverse_sigmoid(probability: Tensor) -> Tensor:
    """Returns the logit of a probability, finite for 0 and 1."""
    return ops.log(ops.maximum(probability, 1e-6) / ops.maximum(1 - probability, 1e-6))
