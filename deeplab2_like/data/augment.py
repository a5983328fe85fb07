"""Random augmentation of an image and its panoptic map: scale, crop, flip, colours.

Pure TensorFlow and stateless: the outcome depends on the example, the arguments and the seed alone. The scaled image
is never built: the window of the source that fills the crop is drawn first, and only this window is resampled, at a
cost that does not grow with the scale. Padding is added last, so nothing before it needs to know of it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

import tensorflow as tf

from deeplab2_like.configs.schema import ColorJitterConfig


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One axis of the crop; all members are int32 []."""

    start: tf.Tensor  # Where the window begins in the source.
    window: tf.Tensor  # Length of the window in the source.
    length: tf.Tensor  # What it is resampled to.
    before: tf.Tensor  # Padding before it.
    after: tf.Tensor  # Padding after it.


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

    The scale is drawn uniformly from `scale_range`. The window of the source that it enlarges to the crop begins and
    ends at whole pixels, which changes the scale of each axis by at most half a pixel of the window. Where the scaled
    image is smaller than the crop it is placed at random and the rest padded. The image is resampled bilinearly (with
    antialiasing below half its size), the label takes the nearest pixel; both with half-pixel centres, so they stay
    aligned. At scale 1 pixels come through unchanged.

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

    image = tf.slice(image, [rows.start, columns.start, 0], [rows.window, columns.window, 3])
    panoptic = tf.slice(panoptic, [rows.start, columns.start], [rows.window, columns.window])
    pixels = _resize(image, [rows.length, columns.length], antialias=scale < 0.5)
    # Along the first axis whole rows are copied, much faster than single pixels along the second.
    panoptic = tf.transpose(tf.gather(tf.transpose(panoptic), _nearest(columns)))
    panoptic = tf.gather(panoptic, _nearest(rows))
    if color_jitter is not None:
        pixels = _jitter_colors(pixels, color_jitter, draw_colors)
    # Values lie in 0..255, so they are rounded in no more passes than these.
    image = tf.cast(pixels + 0.5, tf.uint8)

    if dihedral:
        image, panoptic = _reverse_if(draw_flip_y < 0.5, image, panoptic, axis=0)
    if flip or dihedral:
        image, panoptic = _reverse_if(draw_flip_x < 0.5, image, panoptic, axis=1)
    panoptic = tf.pad(panoptic, [[rows.before, rows.after], [columns.before, columns.after]], constant_values=void)
    image = _pad_image(image, rows, columns, pad_value)

    image = tf.ensure_shape(image, [*crop_size, 3])
    panoptic = tf.ensure_shape(panoptic, [*crop_size])
    return {**example, "image": image, "panoptic": panoptic}


def _random_window(source: tf.Tensor, crop: int, scale: tf.Tensor, draw: tf.Tensor) -> _Axis:
    """Places the crop on one axis: inside the scaled source, or around it if that is shorter; `draw` is in [0, 1)."""

    def rounded(length: tf.Tensor) -> tf.Tensor:
        return tf.maximum(tf.cast(tf.round(length), tf.int32), 1)

    def place(room: tf.Tensor) -> tf.Tensor:
        return tf.cast(draw * tf.cast(room + 1, tf.float32), tf.int32)  # 0..room

    wanted = rounded(crop / scale)
    window = tf.minimum(wanted, source)
    length = tf.where(wanted > source, tf.minimum(rounded(tf.cast(source, tf.float32) * scale), crop), crop)
    after = place(crop - length)
    return _Axis(start=place(source - window), window=window, length=length, before=crop - length - after, after=after)


def _nearest(axis: _Axis) -> tf.Tensor:
    """The pixel of the window under the centre of each resampled one, int64 [length]."""
    # floor((position + 0.5) * window / length), in integers and so exact.
    window, length = tf.cast(axis.window, tf.int64), tf.cast(axis.length, tf.int64)
    return (2 * tf.range(length) + 1) * window // (2 * length)


def _resize(image: tf.Tensor, size: Sequence[tf.Tensor], *, antialias: tf.Tensor) -> tf.Tensor:
    """Resamples `image` uint8 [H, W, 3] bilinearly; float32 [h, w, 3], 0..255; `antialias` is bool []."""
    # Down to half the size bilinear reading leaves no pixel out, and antialiasing takes up to eight times as long.
    return tf.cond(
        antialias,
        lambda: tf.image.resize(image, size, antialias=True),
        lambda: tf.image.resize(image, size),
    )


def _jitter_colors(pixels: tf.Tensor, jitter: ColorJitterConfig, draws: list[tf.Tensor]) -> tf.Tensor:
    """Changes the colours of `pixels` float32 [h, w, 3], 0..255."""
    brightness, contrast, saturation, hue = (2.0 * draw - 1.0 for draw in draws)
    if jitter.brightness:
        pixels = tf.clip_by_value(pixels * (1.0 + jitter.brightness * brightness), 0.0, 255.0)
    if jitter.contrast:
        mean = tf.reduce_mean(tf.image.rgb_to_grayscale(pixels))
        pixels = tf.clip_by_value(mean + (pixels - mean) * (1.0 + jitter.contrast * contrast), 0.0, 255.0)
    if jitter.saturation:
        own_grey = tf.image.rgb_to_grayscale(pixels)  # [h, w, 1]
        pixels = tf.clip_by_value(own_grey + (pixels - own_grey) * (1.0 + jitter.saturation * saturation), 0.0, 255.0)
    if jitter.hue:
        pixels = 255.0 * tf.image.adjust_hue(pixels / 255.0, jitter.hue * hue)
    return pixels


def _pad_image(image: tf.Tensor, rows: _Axis, columns: _Axis, pad_value: Sequence[int]) -> tf.Tensor:
    """Surrounds `image` uint8 [h, w, 3] with a colour."""

    def colored(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        return tf.broadcast_to(tf.constant(pad_value, tf.uint8), [height, width, 3])

    def pad() -> tf.Tensor:
        left, right = colored(rows.length, columns.before), colored(rows.length, columns.after)
        padded = tf.concat([left, image, right], axis=1)
        width = tf.shape(padded)[1]
        return tf.concat([colored(rows.before, width), padded, colored(rows.after, width)], axis=0)

    padding = rows.before + rows.after + columns.before + columns.after
    return tf.cond(padding > 0, pad, lambda: image)


def _reverse_if(
    condition: tf.Tensor, image: tf.Tensor, panoptic: tf.Tensor, *, axis: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Reverses image and label along `axis` if `condition`, bool []."""
    return tf.cond(
        condition, lambda: (tf.reverse(image, [axis]), tf.reverse(panoptic, [axis])), lambda: (image, panoptic)
    )
