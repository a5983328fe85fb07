"""Random augmentation of an image and its panoptic map: scale, crop, flip, colours.

Pure TensorFlow and stateless: the outcome depends on the example, the arguments and the seed alone. The scaled image
is never built: the crop window in it is drawn first, and only this window is resampled from the source, at a cost that
does not grow with the scale.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import tensorflow as tf

from deeplab2_like.configs.schema import ColorJitterConfig


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One axis of the crop window; all members are int32 []."""

    source: tf.Tensor  # Length of the source.
    scaled: tf.Tensor  # Length of the source once scaled.
    offset: tf.Tensor  # Where the crop begins in the scaled source; negative if the crop is longer than that.
    crop: int


def augment(
    example: Mapping[str, tf.Tensor],
    *,
    seed: tf.Tensor,
    crop_size: tuple[int, int],
    void: int,
    pad_value: Sequence[int],
    scale_range: tuple[float, float] = (1.0, 1.0),
    flip: bool = False,
    dihedral: bool = False,
    color_jitter: ColorJitterConfig | None = None,
) -> dict[str, tf.Tensor]:
    """Scales at random, takes a random crop, flips and changes colours.

    The scale is drawn uniformly from `scale_range`. Where the scaled image is smaller than the crop it is placed at
    random and the rest padded. The image is resampled bilinearly (with antialiasing when it shrinks), the label takes
    the nearest pixel; both with half-pixel centres, so they stay aligned. At scale 1 pixels come through unchanged.

    Args:
        example: `image` uint8 [H, W, 3], `panoptic` int32 [H, W], and further keys, which are passed on.
        seed: int32 or int64 [2].
        crop_size: Height and width of the result.
        void: Panoptic value of padded pixels.
        pad_value: Colour of padded pixels, red, green and blue.
        scale_range: Smallest and largest scale.
        flip: Whether to mirror left and right, half of the times.
        dihedral: Whether to apply one of the eight turns and mirrorings of a square, all equally likely; for pictures
            without an up, such as microscopy.
        color_jitter: How to change colours; None leaves them alone.

    Returns:
        The same keys; `image` uint8 [h, w, 3], `panoptic` int32 [h, w] of static shape `crop_size`.
    """
    image, panoptic = example["image"], example["panoptic"]
    # One draw for everything: each number of it has one use, whatever else is switched on.
    draws = tf.unstack(tf.random.stateless_uniform([10], seed=seed))
    draw_scale, draw_y, draw_x, draw_transpose, draw_flip_y, draw_flip_x, *draw_colors = draws

    if dihedral:
        image, panoptic = tf.cond(
            draw_transpose < 0.5,
            lambda: (tf.transpose(image, [1, 0, 2]), tf.transpose(panoptic)),
            lambda: (image, panoptic),
        )

    smallest, largest = scale_range
    scale = smallest + draw_scale * (largest - smallest)
    rows = _random_window(tf.shape(image)[0], crop_size[0], scale, draw_y)
    columns = _random_window(tf.shape(image)[1], crop_size[1], scale, draw_x)
    row_sources, rows_inside = _nearest_sources(rows)
    column_sources, columns_inside = _nearest_sources(columns)
    inside = rows_inside[:, None] & columns_inside[None, :]  # [h, w]

    panoptic = tf.gather(tf.gather(panoptic, row_sources, axis=0), column_sources, axis=1)  # [h, w]
    panoptic = tf.where(inside, panoptic, tf.constant(void, panoptic.dtype))

    pixels = _bilinear_window(image, rows, columns)
    if color_jitter is not None:
        pixels = _jitter_colors(pixels, inside, color_jitter, draw_colors)
    pixels = tf.where(inside[:, :, None], pixels, tf.constant(pad_value, tf.float32))
    image = tf.cast(tf.round(tf.clip_by_value(pixels, 0.0, 255.0)), tf.uint8)

    if dihedral:
        image, panoptic = _reverse_if(draw_flip_y < 0.5, image, panoptic, axis=0)
    if flip or dihedral:
        image, panoptic = _reverse_if(draw_flip_x < 0.5, image, panoptic, axis=1)

    image = tf.ensure_shape(image, [*crop_size, 3])
    panoptic = tf.ensure_shape(panoptic, [*crop_size])
    return {**example, "image": image, "panoptic": panoptic}


def _random_window(source: tf.Tensor, crop: int, scale: tf.Tensor, draw: tf.Tensor) -> _Axis:
    """Places the crop on one axis: inside the scaled source, or around it if that is shorter; `draw` is in [0, 1)."""
    scaled = tf.maximum(tf.cast(tf.round(tf.cast(source, tf.float32) * scale), tf.int32), 1)
    room = scaled - crop
    choices = tf.cast(tf.abs(room) + 1, tf.float32)
    offset = tf.minimum(room, 0) + tf.cast(draw * choices, tf.int32)
    return _Axis(source, scaled, offset, crop)


def _nearest_sources(axis: _Axis) -> tuple[tf.Tensor, tf.Tensor]:
    """The source pixel under each crop pixel's centre, int32 [crop], and whether there is one, bool [crop]."""
    position = tf.range(axis.crop) + axis.offset
    inside = (position >= 0) & (position < axis.scaled)
    # floor((position + 0.5) * source / scaled), in integers and so exact.
    wide = tf.cast(position, tf.int64)
    source, scaled = tf.cast(axis.source, tf.int64), tf.cast(axis.scaled, tf.int64)
    nearest = ((2 * wide + 1) * source) // (2 * scaled)
    return tf.cast(tf.clip_by_value(nearest, 0, source - 1), tf.int32), inside


def _bilinear_window(image: tf.Tensor, rows: _Axis, columns: _Axis) -> tf.Tensor:
    """Resamples the window of `image` uint8 [H, W, 3]; float32 [h, w, 3], 0..255, arbitrary outside of the image."""
    # `tf.image.resize` knows neither windows nor offsets; this is the operation beneath it.
    resampled = tf.raw_ops.ScaleAndTranslate(
        images=image[None],
        size=[rows.crop, columns.crop],
        scale=tf.stack([tf.cast(axis.scaled / axis.source, tf.float32) for axis in (rows, columns)]),
        translation=tf.stack([-tf.cast(axis.offset, tf.float32) for axis in (rows, columns)]),
        kernel_type="triangle",
        antialias=True,
    )
    return resampled[0]


def _jitter_colors(
    pixels: tf.Tensor, inside: tf.Tensor, jitter: ColorJitterConfig, draws: list[tf.Tensor]
) -> tf.Tensor:
    """Changes the colours of `pixels` float32 [h, w, 3], 0..255; `inside` bool [h, w] says which are of the image."""
    brightness, contrast, saturation, hue = (2.0 * draw - 1.0 for draw in draws)
    if jitter.brightness:
        pixels = tf.clip_by_value(pixels * (1.0 + jitter.brightness * brightness), 0.0, 255.0)
    if jitter.contrast:
        grey = tf.image.rgb_to_grayscale(pixels)[..., 0]  # [h, w]
        count = tf.maximum(tf.reduce_sum(tf.cast(inside, tf.float32)), 1.0)
        mean = tf.reduce_sum(tf.where(inside, grey, 0.0)) / count
        pixels = tf.clip_by_value(mean + (pixels - mean) * (1.0 + jitter.contrast * contrast), 0.0, 255.0)
    if jitter.saturation:
        own_grey = tf.image.rgb_to_grayscale(pixels)  # [h, w, 1]
        pixels = tf.clip_by_value(own_grey + (pixels - own_grey) * (1.0 + jitter.saturation * saturation), 0.0, 255.0)
    if jitter.hue:
        pixels = 255.0 * tf.image.adjust_hue(pixels / 255.0, jitter.hue * hue)
    return pixels


def _reverse_if(
    condition: tf.Tensor, image: tf.Tensor, panoptic: tf.Tensor, *, axis: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Reverses image and label along `axis` if `condition`, bool []."""
    return tf.cond(
        condition, lambda: (tf.reverse(image, [axis]), tf.reverse(panoptic, [axis])), lambda: (image, panoptic)
    )
