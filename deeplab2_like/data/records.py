"""The schema of a record: one image and its label, written and parsed side by side.

The keys are DeepLab2's, so records made by DeepLab2 (label as `raw` int32 bytes) are read unchanged. Our own records
hold the label as an RGB PNG, `id = R + 256 G + 65536 B`, which is smaller and opens in any viewer, or also as `raw`.
"""

from typing import Literal, get_args

import numpy as np
import tensorflow as tf

from deeplab2_like.data import panoptic_label
from deeplab2_like.data.dataset_info import MAX_PANOPTIC_VALUE
from deeplab2_like.data.images import decode_image, encode_png, is_jpeg, is_rgb_jpeg_or_png
from deeplab2_like.data.record_errors import require
from deeplab2_like.errors import UserError, unknown_name

# How a record holds its label: as an RGB PNG, or as the little-endian int32 values that DeepLab2's parser reads.
LabelFormat = Literal["png", "raw"]

_ENCODED = "image/encoded"
_FILENAME = "image/filename"
_FORMAT = "image/format"
_HEIGHT = "image/height"
_WIDTH = "image/width"
_CHANNELS = "image/channels"
_LABEL = "image/segmentation/class/encoded"
_LABEL_FORMAT = "image/segmentation/class/format"

# The first bytes of the image files that TensorFlow reads: JPEG, PNG, GIF, BMP, WebP.
_PNG_SIGNATURE = b"\x89PNG"
_IMAGE_SIGNATURES = (b"\xff\xd8\xff", _PNG_SIGNATURE, b"GIF8", b"BM", b"RIFF")


def serialize_example(
    *,
    image: bytes | np.ndarray,
    panoptic: np.ndarray,
    filename: str,
    bit_depth: int | None = None,
    label_format: LabelFormat = "png",
) -> bytes:
    """Serializes one record; `parse_example` is the inverse.

    Args:
        image: The content of a whole image file, which is kept if it is an 8-bit RGB JPEG or PNG, and else encoded
            again as RGB PNG; or the pixels, uint8 [H, W, 3] RGB.
        panoptic: int [H, W], panoptic map with values 0..2**24 - 1.
        filename: The image's file name; `parse_example` returns it as `image_id`.
        bit_depth: For image files of more than 8 bits per channel, see `decode_image`.
        label_format: How the label is stored; "raw" takes more space, but DeepLab2 reads it.

    Returns:
        The serialized `tf.train.Example`; equal input gives equal bytes.

    Raises:
        UserError: If the image cannot be read, or image and label do not fit each other or the format.
    """
    if label_format not in get_args(LabelFormat):
        raise unknown_name("label format", label_format, get_args(LabelFormat))
    if isinstance(image, bytes):
        pixels = decode_image(image, filename, bit_depth=bit_depth)
        encoded = image if is_rgb_jpeg_or_png(image) else encode_png(pixels)
    else:
        pixels, encoded = image, encode_png(image)
    height, width = pixels.shape[:2]
    if panoptic.shape != (height, width):
        raise UserError(
            f"Image '{filename}' is {_size(pixels)} but its label is {_size(panoptic)} (height x width); "
            "they must be of equal size."
        )
    if panoptic.min() < 0 or panoptic.max() > MAX_PANOPTIC_VALUE:
        raise UserError(
            f"The label of '{filename}' has values {panoptic.min()}..{panoptic.max()}; "
            f"a record holds 0..{MAX_PANOPTIC_VALUE}."
        )
    try:
        encoded_name = filename.encode()
    except UnicodeEncodeError as error:
        raise UserError(f"The file name {filename!r} is not Unicode text; rename the file.") from error
    is_raw = label_format == "raw"
    label = (
        panoptic.astype("<i4").tobytes() if is_raw else encode_png(panoptic_label.ids_to_rgb(panoptic), is_label=True)
    )
    features = {
        _ENCODED: encoded,
        _FILENAME: encoded_name,
        _FORMAT: b"jpeg" if is_jpeg(encoded) else b"png",
        _HEIGHT: height,
        _WIDTH: width,
        _CHANNELS: 3,
        _LABEL: label,
        _LABEL_FORMAT: label_format.encode(),
    }
    example = tf.train.Example()
    for key, value in features.items():
        if isinstance(value, bytes):
            example.features.feature[key].bytes_list.value.append(value)
        else:
            example.features.feature[key].int64_list.value.append(value)
    return example.SerializeToString(deterministic=True)


def parse_example(serialized: tf.Tensor) -> dict[str, tf.Tensor]:
    """Parses one record that `serialize_example` or DeepLab2 made; runs in a TensorFlow graph.

    Args:
        serialized: string [], a serialized `tf.train.Example`.

    Returns:
        `image` uint8 [H, W, 3] RGB, `panoptic` int32 [H, W], `image_id` string [] (the file name).

    Raises:
        tf.errors.InvalidArgumentError: If the record is faulty; `report_bad_records` turns it into a `UserError`.
    """
    features = tf.io.parse_single_example(
        serialized,
        {
            # Empty if missing, so that the error message can name the image.
            _ENCODED: tf.io.FixedLenFeature([], tf.string, ""),
            _FILENAME: tf.io.FixedLenFeature([], tf.string, ""),
            _LABEL: tf.io.FixedLenFeature([], tf.string, ""),
            _LABEL_FORMAT: tf.io.FixedLenFeature([], tf.string, "raw"),
        },
    )
    name = features[_FILENAME]
    label_format = features[_LABEL_FORMAT]
    _require_feature(features, _ENCODED, name)
    _require_feature(features, _LABEL, name)
    known_image = require(
        _starts_with(features[_ENCODED], *_IMAGE_SIGNATURES),
        lambda: ["image '", name, "' is not a JPEG, PNG, GIF, BMP or WebP file."],
    )
    readable_image = require(
        is_readable_by_tensorflow(features[_ENCODED]),
        lambda: ["image '", name, "' is a BMP with a palette or few bits, which is misread; make its record as PNG."],
    )
    with tf.control_dependencies([known_image, readable_image]):
        # Animated files would have rank 4.
        image = tf.io.decode_image(features[_ENCODED], channels=3, expand_animations=False)
    image.set_shape([None, None, 3])
    is_raw = tf.equal(label_format, "raw")
    known_format = require(
        is_raw | tf.equal(label_format, "png"),
        lambda: ["image '", name, "' has a label of format '", label_format, "'; 'raw' and 'png' are read."],
    )
    with tf.control_dependencies([known_format]):
        panoptic = tf.cond(
            is_raw,
            lambda: _decode_raw_label(features[_LABEL], tf.shape(image), name),
            lambda: _decode_png_label(features[_LABEL], name),
        )
    panoptic.set_shape([None, None])
    image_size, label_size = tf.shape(image)[:2], tf.shape(panoptic)
    equal_size = require(
        tf.reduce_all(image_size == label_size),
        lambda: ["image '", name, "' is ", image_size, " but its label is ", label_size, " (height, width)."],
    )
    with tf.control_dependencies([equal_size]):
        panoptic = tf.identity(panoptic)
    return {"image": image, "panoptic": panoptic, "image_id": name}


def is_readable_by_tensorflow(content: tf.Tensor) -> tf.Tensor:
    """Returns whether an image file, string [], is not a BMP that TensorFlow misreads; bool []. Runs in a graph.

    TensorFlow takes the indices of a palette for gray values. It reads BMPs of 24 and 32 bits per pixel.
    """
    # Byte 28 of a BMP is the number of bits; a file that ends before it is faulty anyway.
    bits = tf.strings.substr(tf.strings.join([content, "\0" * 30]), 28, 2)
    return ~_starts_with(content, b"BM") | _starts_with(bits, b"\x18\0", b"\x20\0")


def _require_feature(features: dict[str, tf.Tensor], key: str, name: tf.Tensor) -> None:
    """Raises an error unless the record of the image called `name` has the feature `key`."""
    require(tf.not_equal(features[key], ""), lambda: ["the record of image '", name, f"' has no '{key}'."])


def _decode_raw_label(content: tf.Tensor, image_shape: tf.Tensor, name: tf.Tensor) -> tf.Tensor:
    """Decodes DeepLab2's label, H * W little-endian int32; returns int32 [H, W]."""
    expected = 4 * image_shape[0] * image_shape[1]
    has_right_length = require(
        tf.equal(tf.strings.length(content), expected),
        lambda: ["image '", name, "' has a raw label of ", tf.strings.length(content), " bytes, not ", expected, "."],
    )
    with tf.control_dependencies([has_right_length]):
        return tf.reshape(tf.io.decode_raw(content, tf.int32, little_endian=True), image_shape[:2])  # [H, W]


def _decode_png_label(content: tf.Tensor, name: tf.Tensor) -> tf.Tensor:
    """Decodes our label, an RGB PNG; returns int32 [H, W]."""
    is_png = require(
        _starts_with(content, _PNG_SIGNATURE), lambda: ["the label of image '", name, "' is not a PNG file."]
    )
    # Bytes 24 and 25 of a PNG are bit depth and color type; a file that ends before them is faulty anyway.
    header = tf.strings.join([tf.strings.substr(content, 0, 26), "\0" * 26])
    with tf.control_dependencies([is_png]):
        is_rgb = require(
            tf.equal(tf.strings.substr(header, 24, 2), b"\x08\x02"),
            lambda: ["the label of image '", name, "' is not an RGB PNG with 8 bits per channel."],
        )
    with tf.control_dependencies([is_rgb]):
        rgba = tf.io.decode_png(content, channels=4)
    # Four bytes are one little-endian integer, R + 256 G + 65536 B + 2**24 A; this takes one pass over the pixels.
    return tf.bitwise.bitwise_and(tf.bitcast(rgba, tf.int32), 2**24 - 1)


def _starts_with(content: tf.Tensor, *prefixes: bytes) -> tf.Tensor:
    """Returns whether `content`, string [], starts with any of `prefixes`; bool []."""
    return tf.reduce_any([tf.equal(tf.strings.substr(content, 0, len(prefix)), prefix) for prefix in prefixes])


def _size(image: np.ndarray) -> str:
    return f"{image.shape[0]}x{image.shape[1]}"
