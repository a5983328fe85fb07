"""Averages over several views of the same images: scales, mirror images and other models."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Self

from keras import ops

from deeplab2_like.errors import UserError
from deeplab2_like.model.base import View
from deeplab2_like.model.geometry import NETWORK_SIZE, NUM_VIEWS, Geometry, Size
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.resampling import interpolate_axis
from deeplab2_like.model.stages import compute_after


def average_semantic(views: Sequence[View], image_size: Size) -> dict[str, Tensor]:
    """Averages the class probabilities of `semantic_logits` at full resolution.

    Args:
        views: At least one.
        image_size: Height and width of the images.

    Returns:
        `semantic_logits` float32 [B, H, W, C], the logarithms of the mean probabilities, and `NUM_VIEWS`.
    """
    mean = average_maps(views, "semantic_logits", image_size, lambda logits, view: ops.softmax(logits, axis=-1))
    return {"semantic_logits": log_probability(mean), NUM_VIEWS: ops.array(len(views), "int32")}


def average_maps(
    views: Sequence[View], name: str, image_size: Size, transform: Callable[[Tensor, View], Tensor]
) -> Tensor:
    """Averages a dense raw output at full resolution.

    Args:
        views: At least one.
        name: Name of the raw output, float32 [B, h, w, C] at the stride of the system.
        image_size: Height and width of the images.
        transform: What is averaged: a function of the upsampled output, float32 [B, H, W, C], and its view.

    Returns:
        float32 [B, H, W, C].
    """
    total: Tensor = 0.0
    for index, view in enumerate(views):
        values = output_of(view, name, like=views[0])
        if index:
            # One view after the other, as upsampled maps take much memory.
            values = compute_after(total, values)
        values = view.system.geometry(view.outputs, image_size).upsample(values, stride=view.system.stride)
        total = total + transform(values[:, :, ::-1] if view.mirrored else values, view)
    return total / len(views)


def log_probability(probability: Tensor) -> Tensor:
    """Returns logarithms of probabilities, finite for 0; their softmax over all classes is the probability again."""
    return ops.log(ops.maximum(probability, 1e-30))


def boxes_in_image(boxes: Tensor, view: View, image_size: Size) -> Tensor:
    """Maps boxes of a view, float32 [B, N, 4] in network pixels, to pixels of the image."""
    boxes = Geometry.of(view.outputs, image_size).boxes_to_image(boxes)
    return mirror_boxes(boxes, image_size[1]) if view.mirrored else boxes


def mirror_boxes(boxes: Tensor, width: Any) -> Tensor:
    """Swaps left and right of boxes, float32 [..., 4], in an image of the given width."""
    y_min, x_min, y_max, x_max = ops.unstack(boxes, 4, axis=-1)
    width = ops.cast(width, "float32")
    return ops.stack([y_min, width - x_max, y_max, width - x_min], axis=-1)


def output_of(view: View, name: str, *, like: View) -> Tensor:
    """Reads a raw output of a view.

    Args:
        view: The view.
        name: Name of the raw output.
        like: A view whose output has the same number of channels.

    Raises:
        UserError: If it has not, or there is no such output.
    """
    values = view.outputs.get(name)
    if values is None or values.shape[-1] != like.outputs[name].shape[-1]:
        raise UserError(
            f"The models of an ensemble predict different things: '{name}' of '{view.system.name}' is missing or has "
            "other channels in one of them; leave that model out."
        )
    return values


class Grid(NamedTuple):
    """The cells of the largest view, onto which feature maps of all views are resampled.

    Attributes:
        geometry: Sizes of the images in that view.
        cells: Height and width of its feature maps.
        stride: Network pixels per cell.
    """

    geometry: Geometry
    cells: Size
    stride: int

    @classmethod
    def of(cls, views: Sequence[View], name: str, image_size: Size) -> Self:
        """Returns the grid of a raw output, float32 [B, h, w, C], in the view of the largest scale."""
        largest = max(views, key=lambda view: view.scale)
        height, width = ops.shape(largest.outputs[name])[1:3]
        return cls(Geometry.of(largest.outputs, image_size), (height, width), largest.system.stride)

    @property
    def size_output(self) -> dict[str, Tensor]:
        """The raw output `NETWORK_SIZE` of the largest view; empty if its images were not resized."""
        size = self.geometry.network_size
        return (
            {} if size is None else {NETWORK_SIZE: ops.stack([ops.convert_to_tensor(side, "int32") for side in size])}
        )

    @property
    def is_inside(self) -> Tensor:
        """The cells that are not padding alone, bool [h, w]."""
        rows, columns = (
            ops.arange(cells) * self.stride < side for cells, side in zip(self.cells, self.network_size, strict=True)
        )
        return rows[:, None] & columns[None, :]

    @property
    def network_size(self) -> Size:
        """Height and width of the images in network pixels."""
        return self.geometry.network_size or self.geometry.image_size

    def resample(self, values: Tensor, view: View) -> Tensor:
        """Resamples a feature map of a view, float [B, h', w', C], to the cells of the grid, float [B, h, w, C]."""
        geometry = Geometry.of(view.outputs, self.geometry.image_size)
        view_size = geometry.network_size or geometry.image_size
        for axis in (0, 1):
            side, view_side = (ops.cast(size[axis], "float32") for size in (self.network_size, view_size))
            center = (ops.cast(ops.arange(self.cells[axis]), "float32") + 0.5) * self.stride / side  # 0..1 in the image
            if view.mirrored and axis == 1:
                center = 1 - center
            position = center * view_side / view.system.stride - 0.5
            values = interpolate_axis(values, position, axis=axis + 1)
        return values
