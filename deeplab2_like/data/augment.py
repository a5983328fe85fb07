"""Random augmentation of an image and its panoptic map: scale, crop, flip, color jitter.

Pure TensorFlow and stateless: the result depends on the example, the config and the seed alone. The scaled image is
never built: the window of the source that fills the crop is drawn first, and only this window is resampled, at a cost
that does not grow with the scale. Padding is added last, so that colors are jittered without it.
"""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

import tensorflow as tf

from deeplab2_like.configs.schema import ColorJitterConfig, DataConfig, ResizeConfig, SideChoices


@dataclasses.dataclass(frozen=True)
class _Axis:
    """One axis of the crop, in pixels.

    Attributes:
        start: int32 [], first pixel of the window in the source.
        window: int32 [], length of the window in the source.
        length: int32 [], length of the resampled window.
        before: int32 [], padding before it.
        after: int32 [], padding after it.
    """

    start: tf.Tensor
    window: tf.Tensor
    length: tf.Tensor
    before: tf.Tensor
    after: tf.Tensor


def augment(
    example: Mapping[str, tf.Tensor],
    config: DataConfig,
    *,
    seed: tf.Tensor,
    void: int,
    pad_value: Sequence[int],
) -> dict[str, tf.Tensor]:
    """Resizes, scales at random, takes a random crop, flips and jitters colors.

    The scale is that of `resize`, if it is set, times one drawn from `scale_range`. The window of the source begins and
    ends at whole pixels, which changes the scale of each axis by at most half a pixel of the window. Where the scaled
    image is smaller than the crop, it is placed at random and the rest is padded. The image is resampled bilinearly
    (with antialiasing below half its size), the label takes the nearest pixel; both with half-pixel centers, so they
    stay aligned. At scale 1 pixels stay as they are.

    Args:
        example: `image` uint8 [H, W, 3], `panoptic` int32 [H, W], and further keys, which are passed on.
        config: Section `data` of a config: `resize`, `scale_range`, `scale_step`, `crop_size`, `flip`, `dihedral` and
            `color_jitter`.
        seed: int32 or int64 [2].
        void: Panoptic value of padded pixels.
        pad_value: Color of padded pixels, red, green and blue.

    Returns:
        The same keys; `image` uint8 [h, w, 3], `panoptic` int32 [h, w] of static shape `crop_size`.
    """
    image, panoptic = example["image"], example["panoptic"]
    # Each number of this draw has one use, so that switching one augmentation on or off leaves the others as they are.
    # A longer draw begins with the same numbers, so new uses come last: runs of earlier versions resume unchanged.
    draws = tf.unstack(tf.random.stateless_uniform([11], seed=seed))
    draw_scale, draw_y, draw_x, draw_transpose, draw_flip_y, draw_flip_x, *draw_colors, draw_resize = draws

    if config.dihedral:
        # The transpose, with a flip of each axis below, gives all eight rotations and reflections of a square.
        image, panoptic = tf.cond(
            draw_transpose < 0.5,
            lambda: (tf.transpose(image, [1, 0, 2]), tf.transpose(panoptic)),
            lambda: (image, panoptic),
        )

    scale = _random_scale(config, draw_scale)
    if config.resize is not None:
        scale *= _resize_scale(config.resize, tf.shape(image)[:2], draw_resize)
    rows = _random_window(tf.shape(image)[0], config.crop_size[0], scale, draw_y)
    columns = _random_window(tf.shape(image)[1], config.crop_size[1], scale, draw_x)

    image = tf.slice(image, [rows.start, columns.start, 0], [rows.window, columns.window, 3])
    panoptic = tf.slice(panoptic, [rows.start, columns.start], [rows.window, columns.window])
    pixels = _resize(image, [rows.length, columns.length], antialias=scale < 0.5)
    # A gather along the first axis copies whole rows, much faster than single pixels along the second.
    panoptic = tf.transpose(tf.gather(tf.transpose(panoptic), _nearest_pixels(columns)))
    panoptic = tf.gather(panoptic, _nearest_pixels(rows))
    pixels = _jitter_colors(pixels, config.color_jitter, draw_colors)
    # The cast truncates, so adding 0.5 rounds values in 0..255; `tf.round` would take one more pass.
    image = tf.cast(pixels + 0.5, tf.uint8)

    if config.dihedral:
        image, panoptic = _reverse_if(draw_flip_y < 0.5, image, panoptic, axis=0)
    if config.flip or config.dihedral:
        image, panoptic = _reverse_if(draw_flip_x < 0.5, image, panoptic, axis=1)
    panoptic = tf.pad(panoptic, [[rows.before, rows.after], [columns.before, columns.after]], constant_values=void)
    image = _pad_image(image, rows, columns, pad_value)

    image = tf.ensure_shape(image, [*config.crop_size, 3])
    panoptic = tf.ensure_shape(panoptic, config.crop_size)
    return {**example, "image": image, "panoptic": panoptic}


def _random_scale(config: DataConfig, draw: tf.Tensor) -> tf.Tensor:
    """Draws from `scale_range`, in steps of `scale_step` if it is set; `draw` is in [0, 1)."""
    if config.possible_scales is not None:
        return _choose(config.possible_scales, draw)
    smallest, largest = config.scale_range
    return smallest + draw * (largest - smallest)


def _resize_scale(config: ResizeConfig, image_size: tf.Tensor, draw: tf.Tensor) -> tf.Tensor:
    """Returns the factor that resizes an image of this height and width, int32 [2]; `draw` is in [0, 1)."""
    sides = tf.cast(image_size, tf.float32)
    target = config.shorter_side
    if isinstance(target, SideChoices):
        target = _choose(target.choices, draw)
    elif isinstance(target, tuple):
        target = target[0] + draw * (target[1] - target[0])
    return functools.reduce(tf.minimum, config.scales(tf.reduce_min(sides), tf.reduce_max(sides), target=target))


def _choose(values: Sequence[float], draw: tf.Tensor) -> tf.Tensor:
    """Returns one of the values, float32 []; `draw` is in [0, 1)."""
    return tf.gather(tf.constant(values, tf.float32), tf.cast(draw * len(values), tf.int32))


def _random_window(source: tf.Tensor, crop: int, scale: tf.Tensor, draw: tf.Tensor) -> _Axis:
    """Places the crop on an axis: inside the scaled source, or around a shorter source; `draw` is in [0, 1)."""

    def to_pixels(length: tf.Tensor) -> tf.Tensor:
        return tf.maximum(tf.cast(tf.round(length), tf.int32), 1)

    def random_offset(max_offset: tf.Tensor) -> tf.Tensor:
        return tf.cast(draw * tf.cast(max_offset + 1, tf.float32), tf.int32)  # 0..max_offset

    full_window = to_pixels(crop / scale)  # Fills the crop; may be longer than the source.
    window = tf.minimum(full_window, source)
    scaled_source = tf.minimum(to_pixels(tf.cast(source, tf.float32) * scale), crop)
    length = tf.where(full_window > source, scaled_source, crop)
    start, after = random_offset(source - window), random_offset(crop - length)
    return _Axis(start=start, window=window, length=length, before=crop - length - after, after=after)


def _nearest_pixels(axis: _Axis) -> tf.Tensor:
    """Returns the pixel of the window under the center of each resampled pixel, int64 [length]."""
    # floor((position + 0.5) * window / length), computed exactly in integers.
    window, length = tf.cast(axis.window, tf.int64), tf.cast(axis.length, tf.int64)
    return (2 * tf.range(length) + 1) * window // (2 * length)


def _resize(image: tf.Tensor, size: Sequence[tf.Tensor], *, antialias: tf.Tensor) -> tf.Tensor:
    """Resamples `image`, uint8 [H, W, 3], bilinearly to float32 [h, w, 3], 0..255; `antialias` is bool []."""
    # At scale 0.5 or more, plain bilinear resampling reads every pixel; antialiasing takes up to eight times as long.
    return tf.cond(
        antialias,
        lambda: tf.image.resize(image, size, antialias=True),
        lambda: tf.image.resize(image, size),
    )


def _jitter_colors(pixels: tf.Tensor, jitter: ColorJitterConfig, draws: list[tf.Tensor]) -> tf.Tensor:
    """Changes the colors of `pixels`, float32 [h, w, 3], 0..255; a field of `jitter` that is 0 changes nothing."""
    brightness, contrast, saturation, hue = (2.0 * draw - 1.0 for draw in draws)
    if jitter.brightness:
        pixels = tf.clip_by_value(pixels * (1.0 + jitter.brightness * brightness), 0.0, 255.0)
    if jitter.contrast:
        mean = tf.reduce_mean(tf.image.rgb_to_grayscale(pixels))
        pixels = tf.clip_by_value(mean + (pixels - mean) * (1.0 + jitter.contrast * contrast), 0.0, 255.0)
    if jitter.saturation:
        own_gray = tf.image.rgb_to_grayscale(pixels)  # [h, w, 1]
        pixels = tf.clip_by_value(own_gray + (pixels - own_gray) * (1.0 + jitter.saturation * saturation), 0.0, 255.0)
    if jitter.hue:
        pixels = 255.0 * tf.image.adjust_hue(pixels / 255.0, jitter.hue * hue)
    return pixels


def _pad_image(image: tf.Tensor, rows: _Axis, columns: _Axis, pad_value: Sequence[int]) -> tf.Tensor:
    """Pads `image`, uint8 [h, w, 3], with a color."""

    def filled(height: tf.Tensor, width: tf.Tensor) -> tf.Tensor:
        return tf.broadcast_to(tf.constant(pad_value, tf.uint8), [height, width, 3])

    def pad() -> tf.Tensor:
        left, right = filled(rows.length, columns.before), filled(rows.length, columns.after)
        padded = tf.concat([left, image, right], axis=1)
        width = tf.shape(padded)[1]
        return tf.concat([filled(rows.before, width), padded, filled(rows.after, width)], axis=0)

    padding = rows.before + rows.after + columns.before + columns.after
    return tf.cond(padding > 0, pad, lambda: image)


def _reverse_if(
    condition: tf.Tensor, image: tf.Tensor, panoptic: tf.Tensor, *, axis: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Reverses image and label along `axis` if `condition`, bool []."""
    return tf.cond(
        condition, lambda: (tf.reverse(image, [axis]), tf.reverse(panoptic, [axis])), lambda: (image, panoptic)
    )
