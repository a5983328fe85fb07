"""Writes files in PyTorch's two formats. PyTorch is not needed."""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

_TYPES = {
    "float64": "DoubleStorage",
    "float32": "FloatStorage",
    "float16": "HalfStorage",
    "int64": "LongStorage",
    "int32": "IntStorage",
    "int16": "ShortStorage",
    "int8": "CharStorage",
    "uint8": "ByteStorage",
    "bool": "BoolStorage",
}


class Storage(NamedTuple):
    """Values in memory: PyTorch's name of their type, their key in the file, their number, and their bytes."""

    type: str
    key: str
    count: int
    data: bytes


class Tensor(NamedTuple):
    """A view of a storage; offset and strides count values."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


class Parameter(NamedTuple):
    """A tensor of a module."""

    tensor: Tensor


def tensor_of_array(array: np.ndarray, key: str) -> Tensor:
    """Makes a tensor with its own storage."""
    strides = tuple(stride // array.itemsize for stride in array.strides)
    return Tensor(Storage(_TYPES[array.dtype.name], key, array.size, array.tobytes()), 0, array.shape, strides)


def write_zip(path: Path, content: Any) -> None:
    """Writes the format of PyTorch 1.6 and later."""
    pickled, storages = _pickle(content)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("archive/data.pkl", pickled)
        file.writestr("archive/byteorder", "little")
        for storage in storages:
            file.writestr(f"archive/data/{storage.key}", storage.data)
        file.writestr("archive/version", "3\n")


def write_legacy(path: Path, content: Any) -> None:
    """Writes the format of earlier versions."""
    pickled, storages = _pickle(content)
    info = {"protocol_version": 1001, "little_endian": True, "type_sizes": {"short": 2, "int": 4, "long": 4}}
    heads = [pickle.dumps(head, protocol=2) for head in (0x1950A86A20F9469CFC6C, 1001, info)]
    keys = pickle.dumps([storage.key for storage in storages], protocol=2)
    values = [storage.count.to_bytes(8, "little") + storage.data for storage in storages]
    path.write_bytes(b"".join([*heads, pickled, keys, *values]))


WRITERS: dict[str, Callable[[Path, Any], None]] = {"zip": write_zip, "legacy": write_legacy}


def _module(name: str, *members: str) -> types.ModuleType:
    """Makes a module with empty classes, so that the pickle can refer to them."""
    module = types.ModuleType(name)
    for member in members:
        setattr(module, member, type(member, (), {"__module__": name}))
    return module


def _pickle(content: Any) -> tuple[bytes, list[Storage]]:
    torch = _module("torch", *_TYPES.values(), "BFloat16Storage")
    utils = _module("torch._utils", "_rebuild_tensor_v2", "_rebuild_parameter")
    storages: dict[str, Storage] = {}

    class Pickler(pickle.Pickler):
        def persistent_id(self, value: Any) -> Any:
            if not isinstance(value, Storage):
                return None
            storages[value.key] = value
            return "storage", getattr(torch, value.type), value.key, "cpu", value.count

        def reducer_override(self, value: Any) -> Any:
            if isinstance(value, Tensor):
                return utils._rebuild_tensor_v2, (*value, False, OrderedDict())
            if isinstance(value, Parameter):
                return utils._rebuild_parameter, (value.tensor, True, OrderedDict())
            return NotImplemented

    stream = io.BytesIO()
    with mock.patch.dict(sys.modules, {"torch": torch, "torch._utils": utils}):
        Pickler(stream, protocol=2).dump(content)
    return stream.getvalue(), list(storages.values())
