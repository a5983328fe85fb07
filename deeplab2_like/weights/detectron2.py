"""Files of Detectron2's weights: `.pkl`, `.pth` and `.npz`, read without running code from them."""

import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.files import require_local

_HOW_TO_CONVERT = (
    "where PyTorch is installed, run: import torch, numpy; "
    'state = torch.load("model.pth", map_location="cpu", weights_only=True)["model"]; '
    'numpy.savez("model.npz", **{name: tensor.numpy() for name, tensor in state.items()})'
)


def read_checkpoint(path: str | Path) -> dict[str, np.ndarray]:
    """Reads a Detectron2 checkpoint.

    Args:
        path: A `.pkl` from the model zoo, a `.npz` with one array per name, or, if PyTorch is installed, a `.pth`.

    Returns:
        The arrays by name, as stored.

    Raises:
        UserError: If the file does not exist, is damaged, or holds anything but arrays (a pickle could run code).
    """
    require_local(path)
    path = Path(path)
    if not path.is_file():
        raise UserError(f"Checkpoint '{path}' does not exist; give a .pkl, .npz or .pth file.")
    if path.suffix == ".pkl":
        content = _read_pickle(path)
    elif path.suffix == ".npz":
        content = _read_npz(path)
    elif path.suffix in (".pth", ".pt"):
        content = _read_torch(path)
    else:
        raise UserError(f"Checkpoint '{path}' ends in '{path.suffix}'; allowed are .pkl, .npz and .pth.")
    if isinstance(content, Mapping) and isinstance(content.get("model"), Mapping):
        content = content["model"]
    if not isinstance(content, Mapping):
        raise UserError(
            f"Checkpoint '{path}' holds a {type(content).__name__}, not arrays by name; is it a checkpoint?"
        )
    state = {str(name): np.asarray(value) for name, value in content.items() if not str(name).startswith("__")}
    for name, array in state.items():
        if array.dtype.kind not in "fiub":
            raise UserError(f"Checkpoint '{path}' holds '{name}' of type {array.dtype}; only numbers are allowed.")
    return state


class _ArrayUnpickler(pickle.Unpickler):
    """Builds only arrays and builtin containers, so a checkpoint cannot run code."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.numeric", "_frombuffer"),
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),  # Python 3 writes bytes for Python 2 this way; it only encodes text.
        }
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Returns an allowed class or function; raises `UserError` for any other."""
        # NumPy 1 wrote `numpy.core`, which NumPy 2 renamed.
        module_name = re.sub(r"^numpy\.core\b", "numpy._core", module_name)
        if (module_name, global_name) not in self._ALLOWED:
            raise UserError(f"asks for '{module_name}.{global_name}', but only arrays are allowed")
        if module_name.startswith("numpy._core") and not hasattr(np, "_core"):
            module_name = module_name.replace("numpy._core", "numpy.core")
        return super().find_class(module_name, global_name)


def _read_pickle(path: Path) -> Any:
    try:
        with path.open("rb") as file:
            # Python 2 wrote arrays as byte strings, which Latin-1 maps one to one.
            return _ArrayUnpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"Checkpoint '{path}' {error}; convert it to .npz with a program that you trust.") from None
    except Exception as error:  # A damaged pickle can raise anything.
        raise UserError(f"Checkpoint '{path}' is not a readable pickle ({error}); download the file again.") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise UserError(f"Checkpoint '{path}' is not a readable .npz of numbers ({error}); write it again.") from error


def _read_torch(path: Path) -> Any:
    try:
        import torch  # type: ignore[import-not-found,unused-ignore]
    except ImportError:
        raise UserError(
            f"Checkpoint '{path}' needs PyTorch, which is not installed; convert it to .npz: {_HOW_TO_CONVERT}."
        ) from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(
            f"Checkpoint '{path}' cannot be read by PyTorch as plain weights ({error}); download the file again."
        ) from error
    model = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(model, Mapping):
        return model
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in model.items()}
