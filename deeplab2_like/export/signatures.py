"""The signatures of an export, as traced functions of tensors; see `docs/serving.md`.

- `serving_default`: `images`, uint8 [B, H, W, 3] RGB; B, H and W are arbitrary. Returns the dictionary of
  `PanopticSystem.postprocess`.
- `encoded`: `image_bytes`, string [B] of whole JPEG, PNG, BMP, GIF or WebP files of any sizes; B may be 0. Returns the
  same, padded with void to the largest image, and `image_size`, int32 [B, 2], and `status`, string [B], which is empty
  for a good file and else says what is wrong with it.
- `segments`: as `encoded`, but instead of the map `segment_area`, int32 [B, K], and `segment_box`, int32 [B, K, 4].
- `compact`: as `segments`, with `panoptic_png`, string [B], the map as RGB PNG, `id = R + 256 G + 65536 B`.
- `metadata`: no input; JSON texts, each string [].
- `compiled`, only on request: as `serving_default`, with the post-processing compiled by XLA in stages.

The image of a row never influences another row, because servers put the requests of strangers into one batch.
"""

import dataclasses
from collections.abc import Callable, Mapping

import tensorflow as tf

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.evaluation.inference import compile_with_xla, make_inference_function
from deeplab2_like.export.encoded import (
    Headers,
    damaged,
    decode_equal_sizes,
    decode_upright,
    format_names,
    read_headers,
)
from deeplab2_like.model.base import PanopticSystem
from deeplab2_like.model.stages import compiled_stages

# Enough for the cameras of today, and few enough that one image does not take all memory of a server.
DEFAULT_MAX_PIXELS = 50_000_000

_TABLE = ("segment_id", "segment_class", "segment_score")

Outputs = dict[str, tf.Tensor]
ConcreteFunction = tf.types.experimental.ConcreteFunction


@dataclasses.dataclass(frozen=True)
class ExportOptions:
    """What an export is made for.

    Attributes:
        size: Height and width of all images; None: any.
        max_pixels: Largest number of pixels of an encoded image that is decoded.
        flip: Whether the network sees the mirror images, too, which doubles the time.
        xla: Whether to add the signature `compiled`, which a server without XLA may be unable to load.
    """

    size: tuple[int, int] | None = None
    max_pixels: int = DEFAULT_MAX_PIXELS
    flip: bool = False
    xla: bool = False


def trace_signatures(
    system: PanopticSystem, options: ExportOptions, metadata: Mapping[str, str]
) -> dict[str, ConcreteFunction]:
    """Traces the signatures of a system.

    Args:
        system: The system, with its variables.
        options: What the export is made for.
        metadata: The answer of the signature `metadata`.

    Returns:
        The signatures by name.
    """
    height, width = options.size or (None, None)
    images = tf.TensorSpec([None, height, width, 3], tf.uint8, name="images")
    infer_anything = make_inference_function(system, flip=options.flip).python_function

    def trace(function: Callable[..., Outputs], *inputs: tf.TensorSpec) -> ConcreteFunction:
        return tf.function(function, input_signature=inputs, autograph=False).get_concrete_function()

    def infer_compiled(images: tf.Tensor) -> Outputs:
        with compiled_stages(compile_with_xla):
            return infer_anything(images)

    infer = trace(infer_anything, images)
    # TensorFlow Serving's REST interface recognizes base64 values by the suffix `_bytes`.
    image_bytes = tf.TensorSpec([None], tf.string, name="image_bytes")
    signatures = {"serving_default": infer}
    for name, describe_row in (("encoded", _padded_map), ("segments", _table), ("compact", _table_and_png)):
        files = _FileInference(infer, system.dataset_info, options, describe_row)
        signatures[name] = trace(files, image_bytes)
    signatures["metadata"] = trace(lambda: {name: tf.constant(text) for name, text in metadata.items()})
    if options.xla:
        signatures["compiled"] = trace(infer_compiled, images)
    return signatures


# --- Rows. ------------------------------------------------------------------------------------------------------------

# Makes the answer of one row of the outputs for the image of that row, without the batch axis; further arguments are
# the height and width of the largest image of the request, int32 [2], and the panoptic value of void.
RowFunction = Callable[[Outputs, tf.Tensor, int], Outputs]


def _padded_map(outputs: Outputs, largest: tf.Tensor, void: int) -> Outputs:
    """Pads the map with void to the size of the largest image."""
    missing = largest - tf.shape(outputs["panoptic"])
    padding = tf.stack([tf.zeros_like(missing), missing], axis=1)
    padded = tf.pad(outputs["panoptic"], padding, constant_values=void)
    return {"panoptic": padded, **{name: outputs[name] for name in _TABLE}}


def _table(outputs: Outputs, largest: tf.Tensor, void: int) -> Outputs:
    """Replaces the map by the area and the box of each segment."""
    del largest
    ids, used = outputs["segment_id"], outputs["segment_score"] > 0  # [K]
    panoptic = outputs["panoptic"]  # [H, W]
    number_of_rows = ids.shape[0]
    # The row of each panoptic value; values that are no segment get a row after the last.
    rows = tf.fill([void + 2], number_of_rows)
    places = tf.where(used, ids, void + 1)  # Unused rows have the id 0, which may be that of a segment.
    rows = tf.tensor_scatter_nd_update(rows, places[:, None], tf.range(number_of_rows))
    row_of_pixel = tf.gather(rows, tf.reshape(panoptic, [-1]))  # [H * W]
    height, width = tf.shape(panoptic)[0], tf.shape(panoptic)[1]
    y = tf.reshape(tf.broadcast_to(tf.range(height)[:, None], [height, width]), [-1])
    x = tf.reshape(tf.broadcast_to(tf.range(width)[None], [height, width]), [-1])

    def reduce(function: Callable[..., tf.Tensor], values: tf.Tensor) -> tf.Tensor:
        return function(values, row_of_pixel, number_of_rows + 1)[:number_of_rows]

    area = reduce(tf.math.unsorted_segment_sum, tf.ones_like(row_of_pixel))
    box = [
        reduce(tf.math.unsorted_segment_min, y),
        reduce(tf.math.unsorted_segment_min, x),
        1 + reduce(tf.math.unsorted_segment_max, y),
        1 + reduce(tf.math.unsorted_segment_max, x),
    ]
    # Minima and maxima of nothing are the largest and smallest integers.
    boxes = tf.where((area > 0)[:, None], tf.stack(box, axis=1), 0)
    return {**{name: outputs[name] for name in _TABLE}, "segment_area": area, "segment_box": boxes}


def _table_and_png(outputs: Outputs, largest: tf.Tensor, void: int) -> Outputs:
    """Replaces the map by a PNG of it, and adds the area and the box of each segment."""
    panoptic = outputs["panoptic"]
    # A panoptic value has 24 bits, so the three lower bytes hold it; bitcasting puts the lowest byte first.
    rgb = tf.bitcast(panoptic, tf.uint8)[..., :3]
    # A PNG cannot have zero pixels, as the map of a faulty file has.
    png = tf.cond(tf.size(panoptic) > 0, lambda: tf.io.encode_png(rgb), lambda: tf.constant(b""))
    return {**_table(outputs, largest, void), "panoptic_png": png}


# --- Files. -----------------------------------------------------------------------------------------------------------


class _FileInference:
    """Inference of image files of any sizes, of which bad ones get a status instead of an answer."""

    def __init__(
        self, infer: ConcreteFunction, info: DatasetInfo, options: ExportOptions, describe_row: RowFunction
    ) -> None:
        self._infer = infer
        self._info = info
        self._options = options
        self._describe_row = describe_row

    def __call__(self, image_bytes: tf.Tensor) -> Outputs:
        """Returns the answer for files, string [B]."""
        count = tf.size(image_bytes)
        # At least one row, as nothing cannot be stacked: an empty request is that of one empty file, without its row.
        contents = tf.concat([image_bytes, tf.fill([tf.cast(tf.equal(count, 0), tf.int32)], "")], axis=0)
        headers = read_headers(contents, max_pixels=self._options.max_pixels, size=self._options.size)
        largest = tf.reduce_max(headers.size, axis=0)
        # One call for images of one size. Others are predicted one by one, because a network sees padding.
        outputs = tf.cond(
            tf.reduce_all(headers.size == largest) & tf.reduce_all(largest > 0),
            lambda: self._infer_at_once(contents, headers),
            lambda: self._infer_one_by_one(contents, headers, largest),
        )
        is_good = outputs.pop("is_good")
        fault = tf.where(tf.equal(headers.fault, ""), damaged(format_names(contents)), headers.fault)
        outputs["status"] = tf.where(is_good, "", fault)
        outputs["image_size"] = tf.where(is_good[:, None], tf.cast(headers.size, tf.int32), 0)
        return {name: value[:count] for name, value in outputs.items()}

    def _infer_at_once(self, contents: tf.Tensor, headers: Headers) -> Outputs:
        """Predicts all images in one call; they are of one size."""
        images, is_good = decode_equal_sizes(contents, headers, self._info.bit_depth)
        found = self._call(images)
        size = tf.shape(images)[1:3]

        def describe(row: tf.Tensor) -> Outputs:
            outputs = {name: value[row] for name, value in found.items()}
            return self._describe(outputs, is_good[row], size, size)

        return _stack_rows(describe, tf.size(contents, tf.int64))

    def _infer_one_by_one(self, contents: tf.Tensor, headers: Headers, largest: tf.Tensor) -> Outputs:
        """Predicts one image after the other."""
        largest = tf.cast(largest, tf.int32)

        def describe(row: tf.Tensor) -> Outputs:
            image, is_good = decode_upright(contents, headers, row, self._info.bit_depth)
            size = tf.shape(image)[:2]
            outputs = tf.cond(
                is_good,
                lambda: {name: value[0] for name, value in self._call(image[tf.newaxis]).items()},
                lambda: self._nothing(size),
            )
            return self._describe(outputs, is_good, size, largest)

        return _stack_rows(describe, tf.size(contents, tf.int64))

    def _call(self, images: tf.Tensor) -> Outputs:
        if self._options.size is not None:
            images = tf.ensure_shape(images, [None, *self._options.size, 3])
        return self._infer(images)

    def _nothing(self, size: tf.Tensor) -> Outputs:
        """Returns the outputs for an image that cannot be read, without the batch axis."""
        specs = self._infer.structured_outputs
        table = {name: tf.zeros(specs[name].shape[1:], specs[name].dtype) for name in _TABLE}
        return {"panoptic": tf.fill(size, self._info.void), **table}

    def _describe(self, outputs: Outputs, is_good: tf.Tensor, size: tf.Tensor, largest: tf.Tensor) -> Outputs:
        """Makes the answer of a row, with `is_good`, bool []."""
        nothing = self._nothing(size)
        outputs = {name: tf.where(is_good, outputs[name], value) for name, value in nothing.items()}
        return {**self._describe_row(outputs, largest, self._info.void), "is_good": is_good}


def _stack_rows(function: Callable[[tf.Tensor], Outputs], count: tf.Tensor) -> Outputs:
    """Calls a function with the numbers 0 to `count` - 1, int64 [], one after the other, and stacks what it returns.

    Args:
        function: Returns tensors of which those with one name have one shape, known or not.
        count: int64 [], at least 1.
    """
    specs: dict[str, tuple[tf.DType, tf.TensorShape]] = {}

    def first(row: tf.Tensor) -> Outputs:
        outputs = function(row)
        specs.update({name: (value.dtype, value.shape) for name, value in outputs.items()})
        return outputs

    tf.function(first, autograph=False).get_concrete_function(tf.TensorSpec([], tf.int64))
    # Texts do not go into arrays, which may be placed on a GPU.
    texts = {name: tf.fill([0], "") for name, (dtype, _) in specs.items() if dtype == tf.string}
    arrays = {
        name: tf.TensorArray(dtype, size=tf.cast(count, tf.int32), element_shape=shape, infer_shape=False)
        for name, (dtype, shape) in specs.items()
        if dtype != tf.string
    }

    def step(row: tf.Tensor, arrays: dict[str, tf.TensorArray], texts: Outputs) -> tuple[tf.Tensor, dict, Outputs]:
        outputs = function(row)
        arrays = {name: array.write(tf.cast(row, tf.int32), outputs[name]) for name, array in arrays.items()}
        texts = {name: tf.concat([text, outputs[name][tf.newaxis]], axis=0) for name, text in texts.items()}
        return row + 1, arrays, texts

    _, arrays, texts = tf.while_loop(
        lambda row, *_: row < count,
        step,
        (tf.constant(0, tf.int64), arrays, texts),
        shape_invariants=(
            tf.TensorShape([]),
            {name: tf.TensorShape(None) for name in arrays},
            {name: tf.TensorShape([None]) for name in texts},
        ),
        parallel_iterations=1,  # Several networks at once would not fit into memory.
    )
    return {**{name: array.stack() for name, array in arrays.items()}, **texts}
