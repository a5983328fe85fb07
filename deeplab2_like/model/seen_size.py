"""The size at which a network sees an image, where that is not the image's own."""

from typing import Any

import pydantic
from keras import ops

from deeplab2_like.configs.schema import StrictModel
from deeplab2_like.model.layers import Tensor, resize_bilinear


class ResizeConfig(StrictModel):
    """The size at which images are seen outside of training; they keep their proportions."""

    short_side: int = pydantic.Field(800, ge=1)
    long_side: int = pydantic.Field(1333, ge=1, description="The longer side is not made longer than this.")


def seen_images(images: Tensor, config: ResizeConfig | None) -> tuple[Tensor, dict[str, Tensor]]:
    """The images that a network sees, and what its raw outputs say of their size.

    Args:
        images: uint8 or float [B, H, W, 3].
        config: The size at which they shall be seen; None for their own.

    Returns:
        The images, [B, H', W', 3]; and `seen_size`, int32 [2], H' and W', or nothing if they are as they were.
    """
    if config is None:
        return images, {}
    images = resize_images(images, config)
    sides: list[Any] = list(ops.shape(images)[1:3])
    return images, {"seen_size": ops.stack([ops.convert_to_tensor(side, "int32") for side in sides])}


def seen_scale(seen_size: Tensor | None, image_size: tuple[Any, Any]) -> Tensor:
    """Pixels that the network saw per pixel of the map, along both axes, float32 [2]; see `boxes_in_map`."""
    if seen_size is None:
        return ops.ones((2,), "float32")
    size = ops.stack([ops.convert_to_tensor(side, "int32") for side in image_size])
    return ops.cast(seen_size, "float32") / ops.cast(size, "float32")


def read_at_cells(
    labels: Tensor, cells: tuple[Any, Any], seen_size: Tensor | None, image_size: tuple[Any, Any], *, stride: int
) -> Tensor:
    """The label in the middle of each cell of a feature; beyond the map, that of its last line or column.

    Args:
        labels: int32 [B, H, W].
        cells: Height and width of the feature.
        seen_size: As of `boxes_in_map`.
        image_size: H and W.
        stride: Pixels that the network saw per cell.

    Returns:
        int32 [B, h, w].
    """
    scale = seen_scale(seen_size, image_size)
    for axis in (0, 1):
        center = (ops.cast(ops.arange(cells[axis]), "float32") + 0.5) * stride / scale[axis]
        labels = ops.take(labels, ops.minimum(ops.cast(center, "int32"), image_size[axis] - 1), axis=axis + 1)
    return labels


def boxes_in_map(boxes: Tensor, seen_size: Tensor | None, image_size: tuple[Any, Any]) -> Tensor:
    """Boxes in pixels of the map, from those in pixels of the image that the network saw.

    Args:
        boxes: float32 [B, N, 4].
        seen_size: int32 [2], what `seen_images` says of the size; None if it is that of the map.
        image_size: Height and width of the map, ints or int32 scalars.

    Returns:
        float32 [B, N, 4].
    """
    if seen_size is None:
        return boxes
    size = ops.cast(ops.stack([ops.convert_to_tensor(side, "int32") for side in image_size]), "float32")
    scale = size / ops.cast(seen_size, "float32")
    return boxes * ops.concatenate([scale, scale])


def resize_images(images: Tensor, config: ResizeConfig) -> Tensor:
    """Resizes images so that their shorter side is the wanted one.

    Args:
        images: uint8 or float [B, H, W, 3].
        config: The size.

    Returns:
        float32 [B, H', W', 3].
    """
    height, width = ops.shape(images)[1:3]
    short, long = ops.minimum(height, width), ops.maximum(height, width)
    scale = ops.minimum(config.short_side / ops.cast(short, "float32"), config.long_side / ops.cast(long, "float32"))
    sides = [ops.cast(ops.floor(ops.cast(side, "float32") * scale + 0.5), "int32") for side in (height, width)]
    return resize_bilinear(ops.cast(images, "float32"), *(ops.maximum(side, 1) for side in sides))
