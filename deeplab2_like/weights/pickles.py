"""Reads pickles of arrays and containers without running code.

`pickle.Unpickler` is not enough, even if it may import only a few names: ten bytes can make it allocate gigabytes, and
it hands unchecked values to NumPy. This small interpreter knows the instructions that such pickles consist of, builds
only arrays and builtin containers, and never allocates more than a small multiple of the size of the file.
"""

import io
import math
import pickletools
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np

from deeplab2_like.errors import UserError

# A released checkpoint has some ten thousand.
_MAX_OPERATIONS = 500_000
_MAX_AXES = 32

_CONVERT = "convert it to .npz with a program that you trust"


@runtime_checkable
class StoredArray(Protocol):
    """An array in a checkpoint that is not decoded yet."""

    def array(self) -> np.ndarray:
        """Returns the array, which may share memory with others and be read-only."""


class Global(NamedTuple):
    """The name of a class or function in a pickle."""

    module: str
    name: str


# For each name that a pickle may use: what builds an object from arguments; None if the name may only be an argument.
Builders = Mapping[Global, Callable[..., Any] | None]


def read_pickle(
    stream: io.BytesIO, *, builders: Builders | None = None, persistent_load: Callable[[Any], Any] | None = None
) -> Any:
    """Reads the next pickle of a stream.

    Args:
        stream: The pickle, which may be followed by other data. Afterwards the position is behind the pickle.
        builders: Names that the pickle may use in addition to those of NumPy arrays.
        persistent_load: Returns the object that the pickle refers to by an id; None if ids are not allowed.

    Returns:
        The object, of dictionaries, lists, tuples, strings, bytes, numbers, None, `np.ndarray` and `StoredArray`.

    Raises:
        UserError: If the pickle asks for anything but arrays. The message lacks the subject.
        ValueError, TypeError, LookupError: If the pickle is damaged.
    """
    return _Interpreter(stream, builders or {}, persistent_load).run()


def array_of_bytes(
    data: bytes | bytearray | memoryview, dtype: np.dtype, shape: Sequence[int], *, order: Literal["C", "F"] = "C"
) -> np.ndarray:
    """Views bytes as an array.

    Args:
        data: The values.
        dtype: Their type.
        shape: The shape, which must fit the number of bytes.
        order: "C" or "F".

    Raises:
        ValueError: If the shape is impossible or does not fit.
    """
    check_sizes(shape)
    if math.prod(shape) * dtype.itemsize != len(data):
        raise ValueError(f"an array has {len(data)} bytes, which do not fit its shape")
    if order not in ("C", "F"):
        raise ValueError("an array has an unknown memory order")
    return np.ndarray(tuple(shape), dtype, buffer=data, order=order)


def check_sizes(sizes: Sequence[int]) -> None:
    """Raises `ValueError` if these are not the sizes, or the strides, of the axes of an array."""
    if not isinstance(sizes, tuple | list) or len(sizes) > _MAX_AXES:
        raise ValueError("an array has an impossible number of axes")
    if not all(type(size) is int and 0 <= size < 2**62 for size in sizes):
        raise ValueError("an array has an axis of an impossible size")


class _DType:
    """The type of the values of an array; `numpy.dtype` in the pickle."""

    def __init__(self, code: Any, *_: Any) -> None:
        if not isinstance(code, str) or not re.fullmatch(r"[<>|=]?([iu][1248]|f[248]|b1)", code):
            raise UserError("holds arrays of Python objects or text, but only numbers are allowed; " + _CONVERT)
        self.value = np.dtype(code)

    def set_state(self, state: Any) -> None:
        """Sets the order of the bytes."""
        self.value = self.value.newbyteorder(state[1])


class _Array:
    """An array that gets its content after its creation, as in NumPy's pickles."""

    def __init__(self, to_bytes: Callable[[Any], bytes | bytearray]) -> None:
        self._to_bytes = to_bytes
        self._value: np.ndarray | None = None

    def set_state(self, state: Any) -> None:
        """Sets the content from (version, shape, dtype, is_fortran, data)."""
        _, shape, dtype, is_fortran, data = state
        self._value = array_of_bytes(self._to_bytes(data), dtype.value, shape, order="F" if is_fortran else "C")

    def array(self) -> np.ndarray:
        """Returns the array."""
        if self._value is None:
            raise ValueError("an array has no content")
        return self._value


# Instructions that push their argument, or a constant.
_LITERALS = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
        *("SHORT_BINBYTES", "BINBYTES", "BINBYTES8", "BYTEARRAY8"),
    }
)
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}


class _Interpreter:
    """Runs the instructions of one pickle; see `read_pickle`."""

    def __init__(self, stream: io.BytesIO, builders: Builders, persistent_load: Callable[[Any], Any] | None) -> None:
        self.stream = stream
        self.persistent_load = persistent_load
        self.builders: Builders = {
            Global("collections", "OrderedDict"): self.dictionary,
            Global("_codecs", "encode"): self.encode,
            Global("__builtin__", "bytes"): lambda: b"",  # So Python 3 writes empty bytes for Python 2.
            Global("numpy", "ndarray"): None,
            Global("numpy", "dtype"): _DType,
            Global("numpy._core.multiarray", "_reconstruct"): lambda *_: _Array(self.to_bytes),
            Global("numpy._core.multiarray", "scalar"): self.scalar,
            Global("numpy._core.numeric", "_frombuffer"): self.array_of_buffer,
            **builders,
        }
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}
        self.operations_left = _MAX_OPERATIONS
        # Text is encoded into new bytes. All of it together is no longer than the file unless one text is used twice.
        self.bytes_left = stream.getbuffer().nbytes

    def run(self) -> Any:
        """Returns the object."""
        for opcode, argument, _ in pickletools.genops(self.stream):
            name = opcode.name
            self.count_operations(1)
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name])
            elif name in self.INSTRUCTIONS:
                self.INSTRUCTIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME", "STOP"):
                raise UserError(f"uses the pickle instruction {name}, which arrays do not need; " + _CONVERT)
        return self.stack.pop()

    def count_operations(self, count: int) -> None:
        self.operations_left -= count
        if self.operations_left < 0:
            raise UserError(f"has more than {_MAX_OPERATIONS} instructions; " + _CONVERT)

    def mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def items(self) -> list[Any]:
        """Removes the objects since the last mark from the stack."""
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def append(self, _: None) -> None:
        self.extend([self.stack.pop()])

    def extend(self, items: list[Any]) -> None:
        if not isinstance(self.stack[-1], list):
            raise ValueError("it appends to an object that is no list")
        self.stack[-1].extend(items)

    def short_tuple(self, length: int) -> None:
        items = [self.stack.pop() for _ in range(length)]
        self.stack.append(tuple(reversed(items)))

    def dictionary(self, pairs: Sequence[Any] = ()) -> dict[Any, Any]:
        """Makes a dictionary of [key, value] pairs."""
        self.count_operations(len(pairs))  # The pairs may be a list that is used many times.
        result: dict[Any, Any] = {}
        for key, value in pairs:
            # The hash of a nested tuple or a huge number would take too long.
            if not isinstance(key, str | bytes) and not (isinstance(key, int) and abs(key) < 2**63):
                raise ValueError("a dictionary has a key that is neither text nor a whole number")
            if key in result:
                raise ValueError(f"it has the name '{str(key)[:100]}' twice")
            result[key] = value
        return result

    def item_pairs(self) -> list[tuple[Any, Any]]:
        """Removes keys and values since the last mark from the stack."""
        items = self.items()
        return list(zip(items[::2], items[1::2], strict=True))

    def set_items(self, pairs: list[tuple[Any, Any]]) -> None:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise ValueError("it sets items of an object that is no dictionary")
        new = self.dictionary(pairs)
        if not target.keys().isdisjoint(new):
            raise ValueError("it has a name twice")
        target.update(new)

    def set_item(self, _: None) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.set_items([(key, value)])

    def put(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def push_global(self, module: str, name: str) -> None:
        # NumPy 1 wrote `numpy.core`, which NumPy 2 renamed.
        found = Global(re.sub(r"^numpy\.core\b", "numpy._core", module), name)
        if found not in self.builders:
            raise UserError(f"asks for '{f'{module}.{name}'[:200]}', but only arrays are allowed; " + _CONVERT)
        self.stack.append(found)

    def stack_global(self, _: None) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.push_global(module, name)

    def reduce(self, _: None) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        build = self.builders.get(function) if isinstance(function, Global) else None
        if build is None or not isinstance(arguments, tuple):
            raise ValueError("it calls an object that is no function")
        self.stack.append(build(*arguments))

    def build(self, _: None) -> None:
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Array | _DType):
            target.set_state(state)
        elif not isinstance(target, dict):  # The attributes of an ordered dictionary are not needed.
            raise ValueError("it sets attributes of an object that has none")

    def persistent(self, _: None) -> None:
        if self.persistent_load is None:
            raise UserError("refers to data outside the pickle; " + _CONVERT)
        self.stack.append(self.persistent_load(self.stack.pop()))

    def encode(self, text: Any, encoding: Any) -> bytes | bytearray:
        """Makes bytes as Python 3 writes them for Python 2."""
        if encoding not in ("latin1", "latin-1"):
            raise ValueError("it has bytes in an unknown encoding")
        return self.to_bytes(text)

    def to_bytes(self, data: Any) -> bytes | bytearray:
        """Returns bytes. Python 2 wrote them as strings, which are read as Latin-1."""
        if isinstance(data, bytes | bytearray):
            return data
        if not isinstance(data, str):
            raise ValueError("an array has a content that is not bytes")
        self.bytes_left -= len(data)
        if self.bytes_left < 0:
            raise ValueError("it has more arrays than bytes")
        return data.encode("latin-1")

    def scalar(self, dtype: _DType, data: Any) -> np.ndarray:
        return array_of_bytes(self.to_bytes(data), dtype.value, ())

    def array_of_buffer(self, data: Any, dtype: _DType, shape: Any, order: Any, axis_order: Any = None) -> np.ndarray:
        if order == "K" and axis_order is not None:
            return array_of_bytes(self.to_bytes(data), dtype.value, shape).transpose(axis_order)
        return array_of_bytes(self.to_bytes(data), dtype.value, shape, order=order)

    INSTRUCTIONS: Mapping[str, Callable[["_Interpreter", Any], None]] = {
        "MARK": mark,
        "EMPTY_LIST": lambda self, _: self.stack.append([]),
        "LIST": lambda self, _: self.stack.append(self.items()),
        "APPEND": append,
        "APPENDS": lambda self, _: self.extend(self.items()),
        "EMPTY_TUPLE": lambda self, _: self.short_tuple(0),
        "TUPLE1": lambda self, _: self.short_tuple(1),
        "TUPLE2": lambda self, _: self.short_tuple(2),
        "TUPLE3": lambda self, _: self.short_tuple(3),
        "TUPLE": lambda self, _: self.stack.append(tuple(self.items())),
        "EMPTY_DICT": lambda self, _: self.stack.append({}),
        "DICT": lambda self, _: self.stack.append(self.dictionary(self.item_pairs())),
        "SETITEM": set_item,
        "SETITEMS": lambda self, _: self.set_items(self.item_pairs()),
        "PUT": put,
        "BINPUT": put,
        "LONG_BINPUT": put,
        "MEMOIZE": put,
        "GET": lambda self, index: self.stack.append(self.memo[index]),
        "BINGET": lambda self, index: self.stack.append(self.memo[index]),
        "LONG_BINGET": lambda self, index: self.stack.append(self.memo[index]),
        "GLOBAL": lambda self, names: self.push_global(*names.split(" ", 1)),
        "STACK_GLOBAL": stack_global,
        "REDUCE": reduce,
        "BUILD": build,
        "BINPERSID": persistent,
    }
