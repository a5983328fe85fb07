"""Reads PyTorch's `.pth` files, in the zip format and in the legacy format, without PyTorch and without running code.

Both formats hold a pickle, in which each tensor refers to a storage by a key, and the raw values of the storages: in
the zip format as members `NAME/data/KEY`, in the legacy format one after another behind the pickle.
"""

import io
import math
from typing import Any

import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.weights.archives import Archive
from deeplab2_like.weights.pickles import Builders, Global, check_sizes, read_pickle

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_VERSION = 1001

_BFLOAT16 = "bfloat16"  # NumPy has no such type.
_DTYPES = {
    "DoubleStorage": "<f8",
    "FloatStorage": "<f4",
    "HalfStorage": "<f2",
    "BFloat16Storage": _BFLOAT16,
    "LongStorage": "<i8",
    "IntStorage": "<i4",
    "ShortStorage": "<i2",
    "CharStorage": "i1",
    "ByteStorage": "u1",
    "BoolStorage": "?",
}


class _Storage:
    """Values in memory that tensors view."""

    def __init__(self, dtype: str, count: int) -> None:
        self.dtype = dtype
        self.count = count
        self.num_bytes = count * (2 if dtype == _BFLOAT16 else np.dtype(dtype).itemsize)
        self._values: np.ndarray | None = None

    def fill(self, data: bytes | memoryview) -> None:
        """Sets the values."""
        if len(data) != self.num_bytes:
            raise ValueError("a storage is cut off, or has another size than it claims")
        if self.dtype == _BFLOAT16:
            self._values = float32_of_bfloat16(data)
        else:
            self._values = np.require(np.frombuffer(data, self.dtype), requirements="A")  # Aligned in memory.

    def values(self) -> np.ndarray:
        """Returns the values, `[count]`."""
        if self._values is None:
            raise ValueError("the values of a storage are missing")
        return self._values


class _Tensor:
    """A view of a storage, see `StoredArray`."""

    def __init__(self, storage: Any, offset: Any, shape: Any, strides: Any, *_: Any) -> None:
        check_sizes(shape)
        check_sizes(strides)
        if not isinstance(storage, _Storage) or len(shape) != len(strides) or type(offset) is not int or offset < 0:
            raise ValueError("a tensor is described wrongly")
        if 0 not in shape:
            last = offset + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
            if last >= storage.count or math.prod(shape) > storage.count:
                raise ValueError("a tensor is larger than its storage")
        self._storage, self._offset, self._shape, self._strides = storage, offset, tuple(shape), tuple(strides)

    def array(self) -> np.ndarray:
        """Returns the tensor; read-only."""
        values = self._storage.values()
        if 0 in self._shape:
            return np.zeros(self._shape, values.dtype)
        strides = [values.itemsize * stride for stride in self._strides]
        return np.lib.stride_tricks.as_strided(values[self._offset :], self._shape, strides, writeable=False)


_BUILDERS: Builders = {
    Global("torch._utils", "_rebuild_tensor"): _Tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _Tensor,
    Global("torch._utils", "_rebuild_parameter"): lambda tensor, *_: tensor,
    Global("torch", "Size"): lambda sizes: sizes,
    **{Global(module, name): None for module in ("torch", "torch.cuda") for name in _DTYPES},
}


class _Storages(dict[str, _Storage]):
    """The storages that a pickle refers to, by key."""

    def load(self, persistent_id: Any) -> _Storage:
        """Returns the storage of `("storage", type, key, device, count)`."""
        kind, storage_type, key, _, count, *view = persistent_id
        known = isinstance(storage_type, Global) and storage_type in _BUILDERS and storage_type.name in _DTYPES
        if kind != "storage" or not known or not isinstance(key, str) or any(view):
            raise ValueError("it refers to a storage in an unknown way")
        check_sizes((count,))
        storage = _Storage(_DTYPES[storage_type.name], count)
        known_storage = self.setdefault(key, storage)
        if (known_storage.dtype, known_storage.count) != (storage.dtype, count):
            raise ValueError("two storages have the same key")
        return known_storage


def float32_of_bfloat16(data: bytes | memoryview) -> np.ndarray:
    """Converts bfloat16, which is the upper half of a float32.

    Args:
        data: Little-endian values.

    Returns:
        float32 `[len(data) / 2]`.
    """
    return (np.frombuffer(data, "<u2").astype(np.uint32) << 16).view(np.float32)


def read_torch(content: bytes) -> Any:
    """Reads a `.pth` file.

    Args:
        content: The file.

    Returns:
        The object in it, of containers, text, numbers and `StoredArray`. Arrays of bfloat16 become float32.

    Raises:
        UserError: If the file asks for anything but arrays. The message lacks the subject.
        ValueError, zipfile.BadZipFile: If it is damaged, among others.
    """
    return _read_zip(content) if content.startswith(b"PK") else _read_legacy(content)


def _read_zip(content: bytes) -> Any:
    archive = Archive(content)
    folders = [name.removesuffix("/data.pkl") for name in archive.names if name.endswith("/data.pkl")]
    if len(folders) != 1:
        raise ValueError("it is a zip file without PyTorch's data.pkl")
    folder = folders[0]
    if f"{folder}/byteorder" in archive.names and archive.read(f"{folder}/byteorder") != b"little":
        raise UserError("was written on a big-endian machine; convert it to .npz there")
    storages = _Storages()
    value = read_pickle(
        io.BytesIO(archive.read(f"{folder}/data.pkl")), builders=_BUILDERS, persistent_load=storages.load
    )
    for key, storage in storages.items():
        storage.fill(archive.read(f"{folder}/data/{key}"))
    return value


def _read_legacy(content: bytes) -> Any:
    stream = io.BytesIO(content)
    magic, version, _ = (read_pickle(stream) for _ in range(3))  # The third are the sizes of types in C.
    if (magic, version) != (_LEGACY_MAGIC, _LEGACY_VERSION):
        raise ValueError("it has neither of PyTorch's formats")
    storages = _Storages()
    value = read_pickle(stream, builders=_BUILDERS, persistent_load=storages.load)
    for key in read_pickle(stream):
        storage = storages[key]
        if int.from_bytes(stream.read(8), "little") != storage.count:
            raise ValueError("a storage is cut off, or has another size than it claims")
        start = stream.tell()
        storage.fill(memoryview(content)[start : start + storage.num_bytes])
        stream.seek(storage.num_bytes, io.SEEK_CUR)
    return value
