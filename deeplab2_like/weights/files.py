"""Files of released weights: `.pkl`, `.npz`, `.pth`, `.pt` and `.safetensors`, read without running code from them."""

from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.files import read_file, require_local
from deeplab2_like.weights.archives import read_npz
from deeplab2_like.weights.pickles import StoredArray, array_of_bytes, read_pickle
from deeplab2_like.weights.torch_files import float32_of_bfloat16, read_torch


def _read_safetensors(content: bytes) -> dict[str, np.ndarray]:
    try:
        import safetensors
    except ImportError:
        raise UserError(
            "needs the package safetensors, which is not installed; run: pip install 'deeplab2-like[pretrained]'"
        ) from None
    names = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BOOL": "?"}
    names |= {f"{kind}{8 * size}": f"<{kind.lower()}{size}" for kind in "IU" for size in (1, 2, 4, 8)}
    state = {}
    for name, tensor in sorted(safetensors.deserialize(content), key=lambda entry: entry[0]):
        kind, data = tensor["dtype"], tensor["data"]
        if kind == "BF16":
            state[name] = float32_of_bfloat16(data).reshape(tensor["shape"])
        elif kind in names:
            state[name] = array_of_bytes(data, np.dtype(names[kind]), tensor["shape"])
        else:
            raise UserError(f"holds '{name}' of type {kind}; convert it to float32")
    return state


class _Format(NamedTuple):
    name: str
    read: Callable[[bytes], Any]


_TORCH = _Format("PyTorch file", read_torch)
_FORMATS = {
    ".npz": _Format(".npz file", read_npz),
    ".pkl": _Format("pickle", lambda content: read_pickle(BytesIO(content))),
    ".pt": _TORCH,
    ".pth": _TORCH,
    ".safetensors": _Format(".safetensors file", _read_safetensors),
}

_ARCHIVES = (".gz", ".tar", ".tgz", ".zip")

# Where training programs keep the weights beside other things, in order of preference.
_CONTAINERS = ("model", "state_dict", "model_state", "blobs")
_MAX_NAME_LENGTH = 500
# Training with several devices puts it before every name.
_PARALLEL_PREFIX = "module."


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a file of weights. Nothing in the file can run code.

    Args:
        path: A `.pkl` or `.npz` of arrays, a `.pth` or `.pt` of PyTorch, or a `.safetensors`. The arrays may be in a
            dictionary `model`, `state_dict`, `model_state` or `blobs` inside.

    Returns:
        The arrays by name, as stored, but bfloat16 as float32. A prefix `module.` that all names have is removed. The
        arrays are read-only and may share memory.

    Raises:
        UserError: If the file does not exist, is damaged, or holds anything but arrays.
    """
    require_local(path)
    path = Path(path)
    *others, last = _FORMATS
    allowed = f"{', '.join(others)} or {last}"
    if not path.is_file():
        raise UserError(f"Checkpoint '{path}' does not exist; give a file that ends in {allowed}.")
    if path.suffix in _ARCHIVES:
        raise UserError(f"Checkpoint '{path}' is an archive; unpack it, and give the file or the folder in it.")
    if path.suffix not in _FORMATS:
        raise UserError(
            f"Checkpoint '{path}' ends in '{path.suffix}'; give a file that ends in {allowed}, or a TensorFlow "
            "checkpoint."
        )
    try:
        return _decode(path, read_file(path, "Checkpoint"))
    except MemoryError as error:
        raise UserError(f"Checkpoint '{path}' needs more memory than there is; free some memory.") from error


def _decode(path: Path, content: bytes) -> dict[str, np.ndarray]:
    format_ = _FORMATS[path.suffix]
    try:
        _refuse_other_files(content)
        return _arrays(format_.read(content))
    except MemoryError:
        raise
    except UserError as error:
        raise UserError(f"Checkpoint '{path}' {_printable(error)}.") from None
    except Exception as error:  # A damaged file can raise anything.
        # The messages of these say nothing to a user.
        reason = "" if isinstance(error, LookupError | TypeError | AttributeError) else _printable(error)
        raise UserError(
            f"Checkpoint '{path}' is not a readable {format_.name} ({reason or 'it is damaged'}); download it again."
        ) from error


def _refuse_other_files(content: bytes) -> None:
    start = content[:512].lstrip().lower()
    if not start:
        raise UserError("is empty; download it again")
    if start.startswith(b"version https://git-lfs"):
        raise UserError("is a pointer of Git LFS, not the weights; run `git lfs pull`, or download the file itself")
    if start.startswith((b"<!doctype", b"<html", b"<?xml")):
        raise UserError("is a web page, not weights; the download went wrong, so open the address in a browser")


def _arrays(content: Any) -> dict[str, np.ndarray]:
    """Finds the arrays in the object that a file holds, by name."""
    for name in _CONTAINERS:
        if isinstance(content, Mapping) and isinstance(content.get(name), Mapping):
            content = content[name]
            break
    if not isinstance(content, Mapping):
        raise UserError(f"holds a {type(content).__name__}, not arrays by name; choose another file")
    state = {str(name): _array(str(name), value) for name, value in content.items() if not str(name).startswith("__")}
    if any(len(name) > _MAX_NAME_LENGTH or not name.isprintable() for name in state):
        raise ValueError("it has a name that is too long or has control characters")
    if not state:
        raise UserError("holds no arrays; choose another file")
    if all(name.startswith(_PARALLEL_PREFIX) for name in state):
        state = {name.removeprefix(_PARALLEL_PREFIX): array for name, array in state.items()}
    return state


def _array(name: str, value: Any) -> np.ndarray:
    if isinstance(value, int | float | str):
        value = np.asarray(value)
    elif isinstance(value, StoredArray):
        value = value.array()
    if isinstance(value, np.ndarray) and value.dtype.kind in "fiub":
        return value
    kind = value.dtype if isinstance(value, np.ndarray) else type(value).__name__
    raise UserError(f"holds '{name}' of type {kind}, but only numbers are allowed; write it again without that")


def _printable(error: Exception) -> str:
    """Returns the message of an error, shortened and without control characters: it may quote the file."""
    return "".join(char if char.isprintable() else "?" for char in str(error))[:500]
