"""The building blocks: resizing and its gradient, padding, pooling, stages that are compiled on their own."""

import re
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from deeplab2_like.errors import UserError
from deeplab2_like.model.config import Norm, Padding
from deeplab2_like.model.layers import ConvNorm, GroupedConv2D, SeparableConvNorm
from deeplab2_like.model.resampling import (
    average_pool_within,
    pad_to_multiple,
    phase_weights,
    resize_bilinear,
    upsample_bilinear,
    upsample_to_image,
    upsample_window,
    upsampled_argmax,
)
from deeplab2_like.model.stages import compiled_stages, compute_after, stage


def random_map(*shape: int) -> tf.Tensor:
    return tf.constant(np.random.default_rng(0).standard_normal(shape).astype(np.float32))


def test_phases_of_factor_two() -> None:
    # Fine pixels 0 and 1 lie at -1/4 and 1/4 of coarse pixel 0: between -1 and 0 with 3/4 of 0, and between 0 and 1
    # with 1/4 of 1.
    assert phase_weights(2) == [(-1, 0.75), (0, 0.25)]


def test_upsampling_by_hand() -> None:
    # 0 and 4, upsampled by 2: the outer pixels repeat the border, the inner ones are 1/4 and 3/4 of the way.
    found = upsample_bilinear(tf.constant([[[[0.0], [4.0]]]]), 2)
    np.testing.assert_array_equal(found[0, :, :, 0], [[0, 1, 3, 4], [0, 1, 3, 4]])


SIZES = [(5, 7), (1, 6), (4, 1), (1, 1), (2, 2)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1, 2, 3, 4, 8])
def test_upsampling_and_its_gradient_equal_tf(size: tuple[int, int], factor: int) -> None:
    # Thirds are rounded, and TensorFlow works out its weights from positions.
    slack = 1e-5 if factor == 3 else 1e-6
    x = random_map(2, *size, 3)
    upstream = random_map(2, size[0] * factor, size[1] * factor, 3)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        found = upsample_bilinear(x, factor)
        expected = tf.image.resize(x, (size[0] * factor, size[1] * factor))
        # Not linear in the map, so that the gradient depends on it.
        found_loss, expected_loss = (tf.reduce_sum(upstream * tf.square(y)) for y in (found, expected))
    np.testing.assert_allclose(found, expected, rtol=slack, atol=slack)
    # Each value is a sum over some four times factor^2 pixels.
    atol = 10 * slack * factor**2
    np.testing.assert_allclose(tape.gradient(found_loss, x), tape.gradient(expected_loss, x), rtol=slack, atol=atol)


def aligned_resize(x: tf.Tensor, size: tuple[int, int]) -> tf.Tensor:
    """TensorFlow's resizing with aligned corners."""
    return tf.compat.v1.image.resize(x, size, align_corners=True)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("factor", [1, 2, 4, 8])
def test_upsampling_with_aligned_corners_equals_tf(size: tuple[int, int], factor: int) -> None:
    x = random_map(2, *size, 3)
    new_size = ((size[0] - 1) * factor + 1, (size[1] - 1) * factor + 1)
    upstream = random_map(2, *new_size, 3)
    with tf.GradientTape(persistent=True) as tape:
        tape.watch(x)
        found = upsample_bilinear(x, factor, aligned_corners=True)
        expected = aligned_resize(x, new_size)
        found_loss, expected_loss = (tf.reduce_sum(upstream * tf.square(y)) for y in (found, expected))
    np.testing.assert_allclose(found, expected, atol=1e-6)
    atol = 1e-5 * factor**2
    np.testing.assert_allclose(tape.gradient(found_loss, x), tape.gradient(expected_loss, x), rtol=1e-5, atol=atol)
    classes = upsampled_argmax(x, new_size, stride=factor, aligned_corners=True)
    np.testing.assert_array_equal(classes, tf.argmax(expected, axis=-1))


def test_upsampling_with_aligned_corners_by_hand() -> None:
    # 0 and 4, upsampled by 4: the corners keep their values, and three pixels lie between them.
    found = upsample_bilinear(tf.constant([[[[0.0], [4.0]]]]), 4, aligned_corners=True)
    np.testing.assert_array_equal(found[0, :, :, 0], [[0, 1, 2, 3, 4]])


def test_upsampling_a_map_of_unknown_size() -> None:
    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3])])
    def upsample(x: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = upsample_bilinear(x, 4)
        return y, tape.gradient(y, x)

    x = random_map(2, 3, 5, 3)
    found, gradient = upsample(x)
    np.testing.assert_allclose(found, tf.image.resize(x, (12, 20)), atol=1e-6)
    # Every coarse pixel is shared out over sixteen fine ones.
    np.testing.assert_allclose(gradient, np.full(x.shape, 16.0), rtol=1e-5)


@pytest.mark.parametrize("stride", [1, 4])
def test_upsampling_a_window(stride: int) -> None:
    # Of 12x20 pixels for a stride of 4, or the 3x5 cells themselves.
    x = random_map(2, 3, 5, 3)
    whole = upsample_bilinear(x, stride).numpy()
    values = tf.transpose(x, (0, 3, 1, 2))
    # In the first image a corner, in the second one the window before the last line and column.
    top, left, channel = [0, 3 * stride - 3], [0, 3 * stride], [2, 1]
    found = upsample_window(
        values, *map(tf.constant, (channel, top, left)), height=2, width=2 * stride, stride=stride
    ).numpy()
    for image in range(2):
        lines, columns = (slice(first[image], first[image] + size) for first, size in ((top, 2), (left, 2 * stride)))
        np.testing.assert_array_equal(found[image], whole[image, lines, columns, channel[image]])


@pytest.mark.parametrize("new_size", [(5, 7), (13, 9), (3, 20), (1, 1), (2, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_resizing_equals_tf(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    x = random_map(2, *size, 3)
    expected = tf.image.resize(x, new_size)
    np.testing.assert_allclose(resize_bilinear(x, *new_size), expected, atol=1e-5)

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3]), tf.TensorSpec([2], tf.int32)])
    def resize(x: tf.Tensor, new_size: tf.Tensor) -> tf.Tensor:
        return resize_bilinear(x, new_size[0], new_size[1])

    np.testing.assert_allclose(resize(x, tf.constant(new_size)), expected, atol=1e-5)


@pytest.mark.parametrize("new_size", [(5, 7), (13, 9), (3, 20), (2, 3)])
@pytest.mark.parametrize("size", SIZES)
def test_resizing_with_aligned_corners_equals_tf(size: tuple[int, int], new_size: tuple[int, int]) -> None:
    x = random_map(2, *size, 3)
    found = resize_bilinear(x, *new_size, aligned_corners=True)
    np.testing.assert_allclose(found, aligned_resize(x, new_size), atol=1e-5)


def test_a_resized_map_keeps_its_corners() -> None:
    # 3 values at stride 4 are 9 network pixels, of which 7 show the image, 13 pixels high: pixels 0 and 12 lie at
    # network pixels 0 and 6, values 0 and 1.5.
    values = tf.constant([0.0, 8.0, 16.0])
    sizes = {"stride": 4, "network_size": (7, 1), "aligned_corners": True}
    found = upsample_to_image(values[None, :, None, None], (13, 1), **sizes)
    np.testing.assert_allclose(found[0, :, 0, 0], np.arange(13.0), atol=1e-5)
    two_classes = tf.stack([values, 16 - values], axis=-1)[None, :, None]
    # From pixel 8 on, the first class is not smaller; at pixel 8 itself both are 8.
    classes = upsampled_argmax(two_classes, (13, 1), **sizes)
    np.testing.assert_array_equal(classes[0, :, 0], [1] * 8 + [0] * 5)


@pytest.mark.parametrize("window", [(1, 1), (3, 2), (6, 9), (4, 1)])
def test_pooling_equals_keras(window: tuple[int, int]) -> None:
    x = random_map(2, 6, 9, 3)
    expected = ops.average_pool(x, window, strides=1, padding="valid")
    np.testing.assert_allclose(average_pool_within(x, window), expected, atol=1e-5)
    signature = [tf.TensorSpec([None, None, None, 3])]
    pool = tf.function(lambda x: average_pool_within(x, window), input_signature=signature, autograph=False)
    np.testing.assert_allclose(pool(x), expected, atol=1e-5)


def test_pooling_window_is_cut_to_the_map() -> None:
    x = random_map(2, 6, 9, 3)
    found = average_pool_within(x, (8, 3))
    np.testing.assert_allclose(found, average_pool_within(x, (6, 3)), atol=1e-6)
    mean = tf.reduce_mean(x, (1, 2), keepdims=True)
    np.testing.assert_allclose(average_pool_within(x, (100, 100)), mean, atol=1e-5)


def test_padding_to_a_multiple() -> None:
    x = random_map(1, 5, 8, 2)
    found = pad_to_multiple(x, 4).numpy()
    assert found.shape == (1, 8, 8, 2)
    np.testing.assert_array_equal(found[:, :5], x)
    np.testing.assert_array_equal(found[:, 5:], 0)
    np.testing.assert_array_equal(pad_to_multiple(x, 1), x)
    signature = [tf.TensorSpec([None, None, None, 2])]
    pad = tf.function(lambda x: pad_to_multiple(x, 4), input_signature=signature, autograph=False)
    np.testing.assert_array_equal(pad(x), found)


def test_padding_to_more_than_a_multiple_and_to_a_smallest_size() -> None:
    # 5 = 4 * 1 + 1 stays; 8 becomes 4 * 2 + 1.
    x = random_map(1, 5, 8, 2)
    assert pad_to_multiple(x, 4, remainder=1).shape == (1, 5, 9, 2)
    # 6 becomes 9, and 8 is large enough.
    found = pad_to_multiple(x, 4, remainder=1, min_size=(6, 7))
    assert found.shape == (1, 9, 9, 2)
    np.testing.assert_array_equal(found[:, :5, :8], x)
    assert not np.any(found[:, 5:])
    assert not np.any(found[:, :, 8:])
    signature = [tf.TensorSpec([None, None, None, 2])]
    pad = tf.function(
        lambda x: pad_to_multiple(x, 4, remainder=1, min_size=(6, 7)), input_signature=signature, autograph=False
    )
    np.testing.assert_array_equal(pad(x), found)


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("size", [6, 7])
@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize(("kernel_size", "dilation"), [(1, 1), (3, 1), (3, 2), (7, 1)])
def test_convolutions_are_padded_alike_on_all_sides(
    kernel_size: int, dilation: int, strides: int, size: int, depthwise: bool
) -> None:
    x = random_map(1, size, size, 1)
    layer = ConvNorm(
        None if depthwise else 1,
        kernel_size,
        strides=strides,
        dilation=1 if strides > 1 else dilation,
        depthwise=depthwise,
        activation=None,
    )
    layer(x)
    # A kernel that picks the pixel in its middle shows which pixels the outputs are at: every `strides`-th from 0 on.
    kernel = np.zeros((kernel_size, kernel_size, 1, 1), np.float32)
    kernel[kernel_size // 2, kernel_size // 2] = 1
    layer.conv.kernel.assign(kernel)
    np.testing.assert_array_equal(layer(x), x[:, ::strides, ::strides])
    # Adding up the kernel's window at a corner finds zeros beyond it.
    layer.conv.kernel.assign(np.ones_like(kernel))
    reach, step = kernel_size // 2, layer.conv.dilation_rate[0]
    corner = x[0, : reach * step + 1 : step, : reach * step + 1 : step]
    np.testing.assert_allclose(layer(x)[0, 0, 0, 0], tf.reduce_sum(corner), rtol=1e-5, atol=1e-5)


def test_order_of_convolution_norm_and_activation() -> None:
    layer = ConvNorm(1, 1, norm=Norm(kind="frozen_batch", epsilon=1e-12))
    layer(tf.zeros((1, 1, 1, 1)))
    assert layer.conv.bias is None
    layer.conv.kernel.assign([[[[2.0]]]])
    for name, value in {"gamma": 3.0, "beta": 1.0, "moving_mean": 4.0, "moving_variance": 4.0}.items():
        getattr(layer.norm, name).assign([value])
    # (2 x - 4) / 2 * 3 + 1 = 3 x - 5, cut at zero: also in training, as the statistics are frozen.
    x = tf.reshape(tf.constant([1.0, 2.0, 3.0]), (1, 1, 3, 1))
    for training in (False, True):
        np.testing.assert_allclose(tf.reshape(layer(x, training=training), [-1]), [0, 1, 4], atol=1e-6)


@pytest.mark.parametrize("kind", ["batch", "sync_batch", "group", "none"])
def test_norms(kind: Any) -> None:
    layer = SeparableConvNorm(64, 3, norm=Norm(kind=kind))
    x = random_map(2, 6, 6, 32)
    assert layer(x).shape == (2, 6, 6, 64)
    assert (layer.depthwise.conv.bias is None) == (kind != "none")
    before = [variable.numpy() for variable in layer.non_trainable_variables]
    layer(x, training=True)
    moved = [
        not np.array_equal(variable.numpy(), value)
        for variable, value in zip(layer.non_trainable_variables, before, strict=True)
    ]
    # Mean and variance after both convolutions.
    assert moved == ([True] * 4 if "batch" in kind else [])


def test_group_norm_needs_multiples_of_32() -> None:
    with pytest.raises(UserError, match="divides channels into 32 groups, so 48 channels do not fit; make them a mult"):
        ConvNorm(48, 3, norm=Norm(kind="group"))


def test_initial_kernels_keep_the_variance() -> None:
    keras.utils.set_random_seed(0)
    depthwise = ConvNorm(None, 5, depthwise=True)
    depthwise(tf.zeros((1, 8, 8, 400)))
    # Two over the 25 pixels that an output sees.
    assert np.std(depthwise.conv.kernel) == pytest.approx(np.sqrt(2 / 25), rel=0.05)
    dense = ConvNorm(64, 5)
    dense(tf.zeros((1, 8, 8, 64)))
    assert np.std(dense.conv.kernel) == pytest.approx(np.sqrt(2 / (25 * 64)), rel=0.05)


class Compiler:
    """Counts what it compiles, and how often that is called."""

    def __init__(self) -> None:
        self.compiled = 0
        self.called = 0

    def __call__(self, function: Callable[..., Any]) -> Callable[..., Any]:
        self.compiled += 1

        def call(*arguments: Any, **options: Any) -> Any:
            self.called += 1
            return function(*arguments, **options)

        return call

    @property
    def counts(self) -> tuple[int, int]:
        return self.compiled, self.called


def make_stage() -> Callable[..., Any]:
    @stage
    def scale(x: Any, *, factor: float, shift: Any) -> Any:
        """Scales and shifts."""
        return factor * x + shift

    return scale


def test_stage_runs_as_it_is_outside_of_the_context() -> None:
    scale = make_stage()
    compiler = Compiler()
    with compiled_stages(compiler):
        pass
    assert scale(3, factor=2.0, shift=1) == 7
    assert compiler.counts == (0, 0)
    assert scale.__name__ == "scale"
    assert scale.__doc__ == "Scales and shifts."


def test_stage_is_compiled_once_per_option() -> None:
    scale = make_stage()
    compiler = Compiler()
    with compiled_stages(compiler):
        assert scale(3, factor=2.0, shift=1) == 7
        assert scale(4, factor=2.0, shift=1) == 9
        assert compiler.counts == (1, 2)
        # Another value of an option makes another program; a tensor as option does not.
        assert scale(4, factor=3.0, shift=1) == 13
        assert compiler.counts == (2, 3)
        assert int(scale(4, factor=3.0, shift=tf.constant(2.0))) == 14
        assert int(scale(4, factor=3.0, shift=tf.constant(5.0))) == 17
        assert compiler.counts == (3, 5)
    # What was compiled is found again.
    with compiled_stages(compiler):
        scale(5, factor=2.0, shift=1)
    assert compiler.counts == (3, 6)


def test_contexts_nest_and_are_left_after_an_error() -> None:
    scale = make_stage()
    outer, inner = Compiler(), Compiler()
    with compiled_stages(outer):
        with pytest.raises(TypeError, match="NoneType"), compiled_stages(inner):
            scale(1, factor=1.0, shift=None)
        scale(1, factor=1.0, shift=0)
        assert (outer.counts, inner.counts) == ((1, 1), (1, 1))
    scale(1, factor=1.0, shift=0)
    assert (outer.counts, inner.counts) == ((1, 1), (1, 1))


def test_stages_compiled_with_xla_give_the_same() -> None:
    scale = make_stage()

    def compile_with_xla(function: Callable[..., Any]) -> Callable[..., Any]:
        return tf.function(function, jit_compile=True)

    def twice(x: tf.Tensor, shift: tf.Tensor) -> tf.Tensor:
        with compiled_stages(compile_with_xla):
            return scale(scale(x, factor=2.0, shift=shift), factor=0.5, shift=1)

    x = random_map(3, 4)
    # ((2 x + 3) / 2) + 1 = x + 2.5
    for function in (twice, tf.function(twice)):
        np.testing.assert_allclose(function(x, tf.constant(3.0)), x + 2.5, atol=1e-6)
    program = tf.function(twice).get_concrete_function(x, tf.constant(3.0)).graph
    compiled = [op for op in program.get_operations() if "_XlaMustCompile" in op.node_def.attr]
    assert len(compiled) == 2


def test_grouped_convolution_is_that_of_tensorflow() -> None:
    layer = GroupedConv2D(12, 3, strides=2, groups=3, padding="same")
    x = random_map(2, 9, 7, 6)
    found = layer(x)
    assert layer.kernel.shape == (3, 3, 2, 12)
    expected = tf.nn.conv2d(x, layer.kernel.value, strides=2, padding="SAME")
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)
    # Nothing that needs XLA to run.
    graph = tf.function(layer).get_concrete_function(x).graph
    assert "PartitionedCall" not in {operation.type for operation in graph.get_operations()}


def test_waiting_adds_nothing() -> None:
    for earlier in (tf.constant([3.0, 4.0]), tf.constant([np.nan]), tf.constant([-np.inf]), tf.zeros((0, 3))):
        for values in (tf.constant([1, 2]), tf.constant([0.5])):
            np.testing.assert_array_equal(compute_after(earlier, values), values)


def test_compilers_keep_the_waiting() -> None:
    wait = tf.function(lambda earlier, values: compute_after(earlier * earlier, values), jit_compile=True)
    program = wait.experimental_get_compiler_ir(tf.zeros(4), tf.constant([1, 2, 3]))(stage="optimized_hlo")
    entry = program.rpartition("ENTRY")[2]
    (earlier,) = re.findall(r"(%\S+) = \S+ parameter\(0\)", entry)
    assert entry.count(earlier) > 1  # It is used.


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("kernel_size", [1, 3, 5, 7])
@pytest.mark.parametrize("size", [(8, 12), (9, 7)], ids=["even", "odd"])
def test_same_padding_is_that_of_tensorflow(size: tuple[int, int], kernel_size: int, depthwise: bool) -> None:
    x = random_map(2, *size, 3)
    filters = None if depthwise else 4
    layer = ConvNorm(filters, kernel_size, strides=2, depthwise=depthwise, padding="same", activation=None)
    found = layer(x)
    plain: Any
    if depthwise:
        plain = keras.layers.DepthwiseConv2D(kernel_size, strides=2, padding="same")
    else:
        plain = keras.layers.Conv2D(4, kernel_size, strides=2, padding="same")
    plain.build(x.shape)
    plain.set_weights(layer.conv.get_weights())
    np.testing.assert_allclose(found, plain(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("padding", "first"), [("symmetric", 0), ("same", 1)])
def test_where_a_convolution_with_stride_starts(padding: Padding, first: int) -> None:
    # The kernel copies the center of its 3x3 window. Symmetric padding puts the first center on the first pixel.
    layer = ConvNorm(1, 3, strides=2, padding=padding, activation=None)
    x = random_map(1, 6, 8, 1)
    layer(x)
    kernel = np.zeros((3, 3, 1, 1), np.float32)
    kernel[1, 1] = 1
    layer.conv.kernel.assign(kernel)
    np.testing.assert_allclose(layer(x), x[:, first::2, first::2], rtol=1e-6)
