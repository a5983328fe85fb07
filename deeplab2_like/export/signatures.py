"""The signatures of an export, as traced functions of tensors; see `docs/serving.md`.

- `serving_default`: `images`, uint8 [B, H, W, 3] RGB; B, H and W are arbitrary. Returns the dictionary of
  `PanopticSystem.postprocess`.
- `encoded`: `image_bytes`, string [B] of whole JPEG, PNG, BMP, GIF or WebP files of any sizes; B may be 0. Returns the
  same, padded with void to the largest image, and `image_size`, int32 [B, 2], and `status`, string [B], which is empty
  for a good file and else says what is wrong with it.
- `segments`: as `encoded`, but instead of the map `segment_area`, int32 [B, K], and `segment_box`, int32 [B, K, 4].
- `compact`: as `segments`, with `panoptic_png_bytes`, string [B], the map as RGB PNG, `id = R + 256 G + 65536 B`.
- `metadata`: no input; JSON texts, each string [].
- `compiled`, only on request: as `serving_default`, with the post-processing compiled by XLA in stages.

The image of a row never influences another row, because servers put the requests of strangers into one batch.
"""

from collections.abc import Callable, Mapping
from typing import Any

import tensorflow as tf

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.evaluation.inference import compile_with_xla, make_inference_function
from deeplab2_like.export.encoded import Headers, damaged, decode_equal_sizes, read_headers
from deeplab2_like.export.options import ExportOptions
from deeplab2_like.model.base import PanopticSystem
from deeplab2_like.model.stages import compiled_stages

_TABLE = ("segment_id", "segment_class", "segment_score")

Outputs = dict[str, tf.Tensor]
# A `tf.types.experimental.ConcreteFunction`, whose type is unknown to type checkers.
ConcreteFunction = Any


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
    infer_anything = make_inference_function(system, flip=options.flip).python_function  # type: ignore[attr-defined]

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
    return {**_table(outputs, largest, void), "panoptic_png_bytes": png}


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
        outputs = self._infer_groups(contents, headers)
        is_good = outputs.pop("is_good")
        fault = tf.where(tf.equal(headers.fault, ""), damaged(headers.format), headers.fault)
        outputs["status"] = tf.where(is_good, "", fault)
        outputs["image_size"] = tf.where(is_good[:, None], tf.cast(headers.size, tf.int32), 0)
        return {name: value[:count] for name, value in outputs.items()}

    def _infer_groups(self, contents: tf.Tensor, headers: Headers) -> Outputs:
        """Predicts the images of each size in one call, as a network would see the padding of smaller images.

        The network is called at one place only: each place has to be optimized when the export is first used.
        """
        sizes, group_of_row = tf.unique(headers.size[:, 0] * 2**32 + headers.size[:, 1])
        largest = tf.cast(tf.reduce_max(headers.size, axis=0), tf.int32)
        answers = _Rows(self._specs(), tf.size(contents))

        def add_group(group: tf.Tensor, state: _State) -> tuple[tf.Tensor, "_State"]:
            rows = tf.where(group_of_row == group)[:, 0]
            images, is_good = decode_equal_sizes(contents, headers, rows, self._info.bit_depth)
            size = tf.shape(images)[1:3]
            found = tf.cond(
                tf.reduce_any(is_good), lambda: self._call(images), lambda: self._nothing(tf.size(rows), size)
            )
            nothing = {name: value[0] for name, value in self._nothing(1, size).items()}

            def add_row(position: tf.Tensor, state: _State) -> tuple[tf.Tensor, "_State"]:
                good = is_good[position]
                outputs = {name: tf.where(good, found[name][position], value) for name, value in nothing.items()}
                answer = self._describe_row(outputs, largest, self._info.void)
                return position + 1, answers.add(state, rows[position], {**answer, "is_good": good})

            return group + 1, answers.loop(tf.size(rows), add_row, state)

        return answers.stack(answers.loop(tf.size(sizes), add_group, answers.start()))

    def _specs(self) -> dict[str, tf.TensorSpec]:
        """Returns the types and shapes of the answer for a row."""

        def describe() -> Outputs:
            outputs = {name: value[0] for name, value in self._nothing(1, (1, 1)).items()}
            return {**self._describe_row(outputs, tf.constant([1, 1]), self._info.void), "is_good": tf.constant(True)}

        outputs = tf.function(describe, autograph=False).get_concrete_function().structured_outputs
        specs = {name: tf.TensorSpec(value.shape, value.dtype) for name, value in outputs.items()}
        return {**specs, **({"panoptic": tf.TensorSpec([None, None], tf.int32)} if "panoptic" in specs else {})}

    def _call(self, images: tf.Tensor) -> Outputs:
        if self._options.size is not None:
            images = tf.ensure_shape(images, [None, *self._options.size, 3])
        return self._infer(images)

    def _nothing(self, count: tf.Tensor | int, size: tf.Tensor | tuple[int, int]) -> Outputs:
        """Returns the outputs for images of height and width `size` that cannot be read."""
        specs = self._infer.structured_outputs
        table = {name: tf.zeros([count, *specs[name].shape[1:]], specs[name].dtype) for name in _TABLE}
        return {"panoptic": tf.fill([count, size[0], size[1]], self._info.void), **table}


# Arrays of the numbers of all rows; for texts, those of the rows that are done; and the numbers of these rows.
_State = tuple[dict[str, tf.TensorArray], Outputs, tf.Tensor]


class _Rows:
    """The answers of all rows, which loops in a graph add in any order.

    Args:
        specs: Types and shapes of the answer for a row; sizes may be unknown but are equal for all rows.
        count: int32 [], the number of rows, at least 1.
    """

    def __init__(self, specs: Mapping[str, tf.TensorSpec], count: tf.Tensor) -> None:
        # Texts do not go into arrays, which may be placed on a GPU.
        self._numbers = {name: spec for name, spec in specs.items() if spec.dtype != tf.string}
        self._texts = [name for name, spec in specs.items() if spec.dtype == tf.string]
        self._count = count

    def start(self) -> _State:
        """Returns the state without rows."""
        arrays = {
            name: tf.TensorArray(spec.dtype, size=self._count, element_shape=spec.shape, infer_shape=False)
            for name, spec in self._numbers.items()
        }
        return arrays, {name: tf.fill([0], "") for name in self._texts}, tf.zeros([0], tf.int64)

    def add(self, state: _State, row: tf.Tensor, answer: Outputs) -> _State:
        """Adds the answer of a row, int64 []."""
        arrays, texts, done = state
        return (
            {name: array.write(tf.cast(row, tf.int32), answer[name]) for name, array in arrays.items()},
            {name: tf.concat([text, answer[name][tf.newaxis]], axis=0) for name, text in texts.items()},
            tf.concat([done, row[tf.newaxis]], axis=0),
        )

    def loop(
        self, count: tf.Tensor, body: Callable[[tf.Tensor, _State], tuple[tf.Tensor, _State]], state: _State
    ) -> _State:
        """Calls `body` with the numbers 0 to `count` - 1, int32 [], one after the other."""
        arrays, texts, _ = state
        invariants = (dict.fromkeys(arrays), {name: tf.TensorShape([None]) for name in texts})
        return tf.while_loop(
            lambda number, _: number < count,
            body,
            (tf.constant(0), state),
            shape_invariants=(tf.TensorShape([]), (*invariants, tf.TensorShape([None]))),
            parallel_iterations=1,  # Several networks at once would not fit into memory.
        )[1]

    def stack(self, state: _State) -> Outputs:
        """Returns the answers of all rows, with a leading batch axis."""
        arrays, texts, done = state
        order = tf.argsort(done)
        return {
            **{name: array.stack() for name, array in arrays.items()},
            **{name: tf.gather(text, order) for name, text in texts.items()},
        }
