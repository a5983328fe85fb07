"""Stages of inference that are compiled one by one, and the order in which tensors are computed."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from keras import ops

from deeplab2_like.model.layers import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])


_stage_compiler: Callable[[Callable[..., Any]], Callable[..., Any]] | None = None


def stage(function: _Function) -> _Function:
    """Marks a function of tensors as one stage of inference, to be compiled on its own inside `compiled_stages`.

    XLA recomputes an upsampled map in each of its consumers when a whole post-processing is one program; compiled in
    stages, every map is made once. Outside of `compiled_stages` the function runs uncompiled.
    """
    compiled: dict[Any, Callable[..., Any]] = {}

    @functools.wraps(function)
    def wrapper(*tensors: Tensor, **options: Any) -> Any:
        if _stage_compiler is None:
            return function(*tensors, **options)
        # Options that are plain values become part of the program; sizes may be tensors and are passed to it.
        static = {key: value for key, value in options.items() if isinstance(value, bool | int | float | str)}
        dynamic = {key: value for key, value in options.items() if key not in static}
        key = (_stage_compiler, tuple(sorted(static.items())))
        if key not in compiled:
            compiled[key] = _stage_compiler(functools.partial(function, **static))
        return compiled[key](*tensors, **dynamic)

    return wrapper  # type: ignore[return-value]


@contextlib.contextmanager
def compiled_stages(compiler: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Compiles every `stage` that is called inside the context.

    Args:
        compiler: Turns a function of tensors into a compiled one, such as `jax.jit` or
            `functools.partial(tf.function, jit_compile=True)`. Pass the same object to reuse compiled functions.
    """
    global _stage_compiler
    before, _stage_compiler = _stage_compiler, compiler
    try:
        yield
    finally:
        _stage_compiler = before


def compute_after(earlier: Tensor, values: Tensor) -> Tensor:
    """Returns `values` with a control dependency: its users wait until `earlier` is computed.

    Independent terms of a sum may otherwise be computed at the same time, and all be held in memory. The dependency is
    the addition of a zero that compilers cannot fold.
    """
    first = ops.sum(ops.reshape(earlier, (-1,))[:1])  # The sum also accepts an empty tensor.
    first = ops.where(ops.isnan(first), 0, first)  # NaN must not reach `values`, which may be indices.
    return values + ops.cast(ops.minimum(ops.abs(first), 0), values.dtype)
