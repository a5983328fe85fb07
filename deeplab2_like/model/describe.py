"""The cost of a system: parameters, multiply-adds and output shapes of each layer, without running it."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from unittest import mock

import keras
from rich.console import Console
from rich.table import Table
from rich.text import Text

from deeplab2_like.model.base import PanopticSystem
from deeplab2_like.model.deformable import DeformableConvNorm
from deeplab2_like.model.geometry import resize_for_network
from deeplab2_like.model.layers import ConvNorm
from deeplab2_like.printing import print_whole_table

Shape = tuple[int, ...]


@dataclasses.dataclass
class Part:
    """One layer of a network, including its inner layers.

    Attributes:
        name: Names of the layers from the network to this one, joined by "/".
        parameters: Elements of all its weights, including moving statistics.
        multiply_adds: Multiply-adds for one image.
        output_shapes: Shape of each output of the last call by name, without the batch axis; a single tensor has the
            name "".
        calls: Number of calls for one image; a head on a pyramid has one per level.
    """

    name: str
    parameters: int
    multiply_adds: int = 0
    output_shapes: dict[str, Shape] = dataclasses.field(default_factory=dict)
    calls: int = 0


@dataclasses.dataclass
class PaperCount:
    """The multiply-adds that a paper counts, if it leaves out parts of the network.

    Attributes:
        parts: Names of the parts that it counts.
        multiply_adds: Their multiply-adds for one image at the network size without padding.
    """

    parts: list[str]
    multiply_adds: int


@dataclasses.dataclass
class Description:
    """The cost of a network for one image.

    As in most papers, multiply-adds are those of convolutions and dense layers only, without normalization (which can
    be folded into a convolution), activation functions, resizing and post-processing; activations are the elements of
    the outputs of these layers.

    Attributes:
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
        parameters: Elements of all weights, including moving statistics of normalizations.
        trainable_parameters: Elements of the trainable weights.
        multiply_adds: Multiply-adds for one image.
        activations: Elements of the outputs of convolutions and dense layers for one image.
        output_shapes: Shape of each output by name, without the batch axis.
        parts: Layers of the network and their inner layers, in the order in which they run.
        uncounted: Names of layers that have kernels but no rule to count them; empty if `multiply_adds` is complete.
        paper: What the paper of the system counts; None if it counts the whole network.
    """

    height: int
    width: int
    parameters: int
    trainable_parameters: int
    multiply_adds: int
    activations: int
    output_shapes: dict[str, Shape]
    parts: list[Part]
    uncounted: list[str]
    paper: PaperCount | None = None

    def to_dict(self) -> dict[str, Any]:
        """Returns the description as numbers, strings, lists and dictionaries, for JSON."""
        return dataclasses.asdict(self)


def describe(system: PanopticSystem, height: int, width: int) -> Description:
    """Counts the cost of a system for one image, without running it.

    The system pads the image, so the multiply-adds are those of the padded size.

    Args:
        system: The system; its variables are created if needed.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.
    """
    description = describe_layer(system, (height, width, 3), dtype="uint8")
    if system.parts_in_paper:
        description.paper = _count_as_in_paper(system, description)
    return description


def _count_as_in_paper(system: PanopticSystem, description: Description) -> PaperCount:
    """Adds up the parts that the paper counts, scaled from the padded size to the network size."""
    image = keras.ops.zeros((1, description.height, description.width, 3), "uint8")
    network_size = resize_for_network(image, system.config.resize)[0].shape[1:3]
    padded_size = [math.ceil(side / system.size_multiple) * system.size_multiple for side in network_size]
    multiply_adds = {part.name: part.multiply_adds for part in description.parts}
    total = sum(multiply_adds[name] for name in system.parts_in_paper)
    scaled = round(total * math.prod(network_size) / math.prod(padded_size))
    return PaperCount(parts=list(system.parts_in_paper), multiply_adds=scaled)


def print_description(description: Description, *, console: Console | None = None) -> None:
    """Prints a table of the parts and a line of totals.

    Args:
        description: Result of `describe`.
        console: The console; standard output by default.
    """
    console = console or Console()
    table = Table(title=f"Image of {description.height} x {description.width} pixels", title_justify="left")
    table.add_column("part", no_wrap=True)
    for header in ("parameters", "multiply-adds (G)"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("output shape (height, width, channels)")
    for part in description.parts:
        depth = part.name.count("/")
        # Text, as rich would read brackets in a plain name as markup.
        name = Text("  " * depth + part.name.rpartition("/")[2], style="" if depth else "bold")
        shapes = "\n".join(_shape_text(output, shape) for output, shape in part.output_shapes.items())
        table.add_row(name, f"{part.parameters:,}", f"{part.multiply_adds / 1e9:.3f}", Text(shapes))
    print_whole_table(table, console)
    outputs = ", ".join(_shape_text(output, shape) for output, shape in description.output_shapes.items())
    console.print(
        f"Total: {description.parameters / 1e6:.2f} M parameters ({description.trainable_parameters / 1e6:.2f} M "
        f"trainable), {description.multiply_adds / 1e9:.2f} G multiply-adds, {description.activations / 1e9:.3f} G "
        "activations",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"Outputs: {outputs}", highlight=False, soft_wrap=True, markup=False)
    if description.paper is not None:
        console.print(
            f"As the paper counts: {description.paper.multiply_adds / 1e9:.2f} G multiply-adds of "
            f"{' + '.join(description.paper.parts)}, without padding",
            highlight=False,
            soft_wrap=True,
            markup=False,
        )
    if description.uncounted:
        console.print(f"Not counted: {', '.join(description.uncounted)}", highlight=False, soft_wrap=True, markup=False)


def describe_layer(layer: keras.layers.Layer, input_shape: Sequence[int], *, dtype: str = "float32") -> Description:
    """Counts the cost of a layer for one input, without running it.

    Args:
        layer: The layer; it is built if needed.
        input_shape: Shape of its input without the batch axis; height and width first.
        dtype: Dtype of its input.
    """
    inputs = keras.KerasTensor((1, *input_shape), dtype=dtype)
    if not layer.built:
        layer(inputs)
    recorder = _Recorder(layer)
    with recorder.recording():
        outputs = _Call(layer)(inputs)
    return Description(
        height=input_shape[0],
        width=input_shape[1],
        parameters=_elements(layer.weights),
        trainable_parameters=_elements(layer.trainable_weights),
        multiply_adds=recorder.total,
        activations=recorder.activations,
        output_shapes=_shapes(outputs),
        parts=list(recorder.parts.values()),
        uncounted=recorder.uncounted,
    )


class _Call(keras.layers.Layer):
    """Calls a layer from its own call, because a functional model called directly skips the calls of its layers."""

    def __init__(self, layer: keras.layers.Layer) -> None:
        super().__init__()
        self.layer = layer

    def call(self, inputs: Any) -> Any:
        """Calls the layer."""
        return self.layer(inputs)


class _Recorder:
    """Records the calls of the inner layers of a layer; parts are listed two levels deep."""

    def __init__(self, root: keras.layers.Layer) -> None:
        self.root = root
        self.total = 0
        self.activations = 0
        self.parts: dict[str, Part] = {}
        self.uncounted: list[str] = []
        self._stack: list[keras.layers.Layer] = []

    def recording(self) -> Any:
        """Returns a context in which calls are recorded."""
        original = keras.layers.Layer.__call__

        @functools.wraps(original)
        def call(layer: keras.layers.Layer, *args: Any, **kwargs: Any) -> Any:
            if not self._stack and layer is not self.root:
                return original(layer, *args, **kwargs)
            self._stack.append(layer)
            try:
                self._enter()
                outputs = original(layer, *args, **kwargs)
                self._leave(args[0] if args else None, outputs)
            finally:
                self._stack.pop()
            return outputs

        return mock.patch.object(keras.layers.Layer, "__call__", call)

    def _name(self, depth: int) -> str:
        return "/".join(layer.name for layer in self._stack[1 : depth + 1])

    def _enter(self) -> None:
        depth = len(self._stack) - 1
        layer = self._stack[-1]
        if depth == 0 or depth > 2 or not layer.weights or isinstance(self._stack[-2], ConvNorm):
            return
        name = self._name(depth)
        if name not in self.parts:
            self.parts[name] = Part(name=name, parameters=_elements(layer.weights))

    def _leave(self, inputs: Any, outputs: Any) -> None:
        depth = len(self._stack) - 1
        layer = self._stack[-1]
        count = multiply_adds(layer, inputs, outputs)
        if count is None:
            name = self._name(depth)
            if name not in self.uncounted:
                self.uncounted.append(name)
        self.total += count or 0
        if count:
            self.activations += math.prod(outputs.shape)
        for level in range(1, min(depth, 2) + 1):
            part = self.parts.get(self._name(level))
            if part is not None:
                part.multiply_adds += count or 0
        own = self.parts.get(self._name(depth)) if 1 <= depth <= 2 else None
        if own is not None:
            own.calls += 1
            own.output_shapes = _shapes(outputs)


def multiply_adds(layer: Any, inputs: Any, outputs: Any) -> int | None:
    """Counts the multiply-adds of one call of a layer, without its inner layers.

    Args:
        layer: A Keras layer.
        inputs: Its input, [B, ..., C].
        outputs: Its output, [B, ..., C].

    Returns:
        The count for the whole batch; 0 for layers without a kernel; None if no rule counts the layer.
    """
    for kinds, positions in _RULES:
        if isinstance(layer, kinds):
            return math.prod(positions(inputs, outputs)) * math.prod(layer.kernel.shape)
    inner = {id(variable) for child in layer._flatten_layers(include_self=False) for variable in child.weights}
    has_kernel = any(len(variable.shape) > 1 and id(variable) not in inner for variable in layer.weights)
    return None if has_kernel else 0


# Kinds of layers, and the positions at which they apply their kernel: those of the output, or, for a transposed
# convolution, of the input.
_RULES: tuple[tuple[Any, Callable[[Any, Any], Sequence[int]]], ...] = (
    ((keras.layers.Conv2DTranspose,), lambda inputs, outputs: inputs.shape[:-1]),
    (
        (
            keras.layers.Conv1D,
            keras.layers.Conv2D,
            keras.layers.DepthwiseConv2D,
            keras.layers.Dense,
            DeformableConvNorm,
        ),
        lambda inputs, outputs: outputs.shape[:-1],
    ),
)


def _shape_text(name: str, shape: Shape) -> str:
    sizes = " x ".join(str(size) for size in shape)
    return f"{name} {sizes}" if name else sizes


def _elements(variables: Sequence[Any]) -> int:
    return sum(math.prod(variable.shape) for variable in variables)


def _shapes(outputs: Any) -> dict[str, Shape]:
    if isinstance(outputs, Mapping):
        items = list(outputs.items())
    elif isinstance(outputs, list | tuple):
        items = [(str(index), output) for index, output in enumerate(outputs)]
    else:
        items = [("", outputs)]
    return {
        "/".join(part for part in (name, inner) if part): shape
        for name, output in items
        for inner, shape in (
            _shapes(output).items() if isinstance(output, Mapping | list | tuple) else [("", tuple(output.shape[1:]))]
        )
    }
