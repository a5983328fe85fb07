"""The two sizes of an image: its own, and the network size, to which it is resized before the network."""

import functools
from collections.abc import Mapping
from typing import Any, NamedTuple, Self

from keras import ops

from deeplab2_like.configs.schema import ResizeConfig
from deeplab2_like.model.layers import Tensor
from deeplab2_like.model.resampling import resize_bilinear, upsample_to_image, upsampled_argmax, upsampling_matrix

Size = tuple[Any, Any]  # Height and width, ints or int32 scalars.

# The raw output that holds the network size, int32 [2], if it differs from the image size.
NETWORK_SIZE = "network_size"
# The raw output, int32 scalar, that marks averages of several views at full resolution and holds the number of views.
NUM_VIEWS = "num_views"


class Geometry(NamedTuple):
    """The size of the images of a batch, and the size to which they are resized for the network.

    Attributes:
        image_size: Height H and width W of the images and of the panoptic maps, without padding.
        network_size: Height and width of the resized images, without padding; None if they are not resized.
        full_resolution: Whether dense maps have the resolution of the images, as averages of views have, and not that
            of the network; the `stride` of the methods below is 1 then.
        aligned_corners: Whether resizing aligns the corner pixels, see `resampling`.
    """

    image_size: Size
    network_size: Size | None = None
    full_resolution: bool = False
    aligned_corners: bool = False

    @classmethod
    def of(cls, outputs: Mapping[str, Tensor], image_size: Size, *, aligned_corners: bool = False) -> Self:
        """Reads from the raw outputs of a system what `resize_for_network` and `merge_views` add."""
        size = outputs.get(NETWORK_SIZE)
        network_size = None if size is None else (size[0], size[1])
        return cls(image_size, network_size, NUM_VIEWS in outputs, aligned_corners)

    @property
    def scale(self) -> Tensor:
        """Network pixels per image pixel along both axes, float32 [2]."""
        if self.network_size is None:
            return ops.ones((2,), "float32")
        network_size, image_size = _float_size(self.network_size), _float_size(self.image_size)
        if self.aligned_corners:
            return (network_size - 1) / ops.maximum(image_size - 1, 1.0)
        return network_size / image_size

    @property
    def network_sides(self) -> dict[str, Any]:
        """The network size as keywords of a stage, `network_height` and `network_width`; empty if not resized."""
        if self.network_size is None:
            return {}
        return {"network_height": self.network_size[0], "network_width": self.network_size[1]}

    def map_stride(self, stride: int) -> int:
        """Returns the stride of dense maps: that of the network, or 1 at full resolution."""
        return 1 if self.full_resolution else stride

    def boxes_to_image(self, boxes: Tensor) -> Tensor:
        """Scales boxes, float32 [B, N, 4], from network pixels to image pixels."""
        if self.network_size is None:
            return boxes
        scale = _float_size(self.image_size) / _float_size(self.network_size)
        return boxes * ops.concatenate([scale, scale])

    def boxes_to_network(self, boxes: Tensor) -> Tensor:
        """Scales boxes, float32 [B, N, 4], from image pixels to network pixels."""
        return boxes * ops.concatenate([self.scale, self.scale])

    def labels_at_cells(self, labels: Tensor, cells: Size, *, stride: int) -> Tensor:
        """Reads the label at the center of each cell of a feature map; cells beyond the image repeat its border.

        Args:
            labels: int32 [B, H, W].
            cells: Height h and width w of the feature map.
            stride: Network pixels per cell.

        Returns:
            int32 [B, h, w].
        """
        scale = self.scale
        for axis in (0, 1):
            center = (ops.cast(ops.arange(cells[axis]), "float32") + 0.5) * stride / scale[axis]
            index = ops.minimum(ops.cast(center, "int32"), self.image_size[axis] - 1)
            labels = ops.take(labels, index, axis=axis + 1)
        return labels

    def upsampling_matrices(self, cells: Size, *, stride: int) -> tuple[Tensor, Tensor]:
        """Returns `upsampling_matrix` of the rows and of the columns of a feature map.

        Args:
            cells: Height h and width w of the feature map.
            stride: Network pixels per cell.

        Returns:
            float32 [H, h] and float32 [W, w].
        """
        network_size: tuple[Any, Any] = self.network_size or (None, None)
        rows, columns = (
            upsampling_matrix(
                cells[axis],
                network_size[axis],
                self.image_size[axis],
                stride=self.map_stride(stride),
                aligned_corners=self.aligned_corners,
            )
            for axis in (0, 1)
        )
        return rows, columns

    def argmax(self, values: Tensor, *, stride: int) -> Tensor:
        """Finds the best class of every image pixel.

        Args:
            values: float32 [B, h, w, C], logits or probabilities.
            stride: Network pixels per value.

        Returns:
            int32 [B, H, W].
        """
        return upsampled_argmax(
            values,
            self.image_size,
            stride=self.map_stride(stride),
            network_size=self.network_size,
            aligned_corners=self.aligned_corners,
        )

    def upsample(self, values: Tensor, *, stride: int) -> Tensor:
        """Upsamples a map to the image, see `upsample_to_image`.

        Args:
            values: float [B, h, w, C].
            stride: Network pixels per value.

        Returns:
            float [B, H, W, C].
        """
        return upsample_to_image(
            values,
            self.image_size,
            stride=self.map_stride(stride),
            network_size=self.network_size,
            aligned_corners=self.aligned_corners,
        )


def resize_for_network(
    images: Tensor, config: ResizeConfig | None, *, scale: float = 1.0, aligned_corners: bool = False
) -> tuple[Tensor, dict[str, Tensor]]:
    """Resizes images to the network size.

    Args:
        images: uint8 or float [B, H, W, 3].
        config: The network size, of fixed `shorter_side`; None is that of the images.
        scale: Factor of the network size; with aligned corners, of the distances between its pixels, so that a side
            of `32 * k + 1` stays such a side.
        aligned_corners: See `resampling`.

    Returns:
        The images, [B, H', W', 3], and, if they were resized, the raw output `NETWORK_SIZE`, which `Geometry.of` reads.
    """
    if config is None and scale == 1:
        return images, {}
    height, width = ops.shape(images)[1:3]
    factor: Any = 1.0 if aligned_corners else scale
    if config is not None:
        shorter, longer = (ops.cast(side(height, width), "float32") for side in (ops.minimum, ops.maximum))
        factor = factor * functools.reduce(ops.minimum, config.scales(shorter, longer))
    sides = [ops.floor(ops.cast(side, "float32") * factor + 0.5) for side in (height, width)]
    if aligned_corners:
        sides = [ops.floor((side - 1) * scale + 1) for side in sides]
    sides = [ops.maximum(ops.cast(side, "int32"), 1) for side in sides]
    images = resize_bilinear(ops.cast(images, "float32"), *sides, aligned_corners=aligned_corners)
    sides = list(ops.shape(images)[1:3])
    return images, {NETWORK_SIZE: ops.stack([ops.convert_to_tensor(side, "int32") for side in sides])}


def _float_size(size: Size) -> Tensor:
    """Converts a size to float32 [2]."""
    return ops.cast(ops.stack([ops.convert_to_tensor(side, "int32") for side in size]), "float32")
