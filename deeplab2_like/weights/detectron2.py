"""Import of Detectron2's Panoptic-DeepLab weights.

Arrays are transposed from PyTorch's layouts: convolutions (out, in, height, width) to (height, width, in, out),
depthwise ones (channels, 1, height, width) to (height, width, channels, 1).
"""

import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.files import require_local
from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab, PanopticDeepLabConfig
from deeplab2_like.weights.assign import (
    assign_by_name,
    check_epsilon,
    listed_name,
    residual_layer_name,
    split_path,
)

_EPSILON = 1e-5
_HOW_TO_CONVERT = (
    "where PyTorch is installed, run: import torch, numpy; "
    'state = torch.load("model.pth", map_location="cpu", weights_only=True)["model"]; '
    'numpy.savez("model.npz", **{name: tensor.numpy() for name, tensor in state.items()})'
)


def panoptic_deeplab_config(
    *, training_crop: tuple[int, int] = (512, 1024), separable: bool = True
) -> PanopticDeepLabConfig:
    """Returns the `model` section with which Detectron2's weights give the same results as in Detectron2.

    It differs from the defaults in the dilations 2, 4 and 8 of the last stage, plain convolutions in the center head,
    image pooling over a window of the size of the training crop, and the constants of batch normalization in PyTorch.

    Args:
        training_crop: Height and width that the model was trained with, in pixels; the Cityscapes models were trained
            with 512x1024, the COCO models with 640x640.
        separable: Whether the model has depthwise separable convolutions ("dsconv").
    """
    output_stride = 16
    return PanopticDeepLabConfig.model_validate(
        {
            "backbone": {"name": "resnet50", "output_stride": output_stride, "multi_grid": (1, 2, 4)},
            "norm": {"momentum": 0.9, "epsilon": _EPSILON},
            "aspp": {"pooling_window": tuple(side // output_stride for side in training_crop)},
            "decoder": {
                "convolution": "separable" if separable else "plain",
                "center_head_convolution": "plain",
            },
        }
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


# Patterns of layer paths in this library, and Detectron2's names, in which `_BRANCHES` replaces {semantic}, {instance}.
_BRANCHES = {"semantic": "sem_seg_head", "instance": "ins_embed_head"}
_LAYERS: tuple[tuple[str, str], ...] = (
    (r"backbone/stem/(conv\d)", r"backbone.stem.\1"),
    (r"(semantic|instance)_aspp/branch(\d)", r"{\1}.decoder.res5.project_conv.convs.\2"),
    (r"(semantic|instance)_aspp/branch(\d)/(depthwise|pointwise)", r"{\1}.decoder.res5.project_conv.convs.\2.\3"),
    (r"(semantic|instance)_aspp/pooling_branch", r"{\1}.decoder.res5.project_conv.convs.4.1"),
    (r"(semantic|instance)_aspp/project", r"{\1}.decoder.res5.project_conv.project"),
    (r"(semantic|instance)_decoder/project_(res\d)", r"{\1}.decoder.\2.project_conv"),
    (r"(semantic|instance)_decoder/fuse_(res\d)/separable/(\w+)", r"{\1}.decoder.\2.fuse_conv.\3"),
    (r"(semantic|instance)_decoder/fuse_(res\d)/(conv\d)", r"{\1}.decoder.\2.fuse_conv.\3"),
    (r"semantic_head/fuse/separable/(\w+)", r"{semantic}.head.\1"),
    (r"semantic_head/fuse/(conv\d)", r"{semantic}.head.\1"),
    (r"semantic_head/predictor", r"{semantic}.predictor"),
    (r"(center|offset)_head/fuse/separable/(\w+)", r"{instance}.\1_head.\2"),
    (r"(center|offset)_head/fuse/(conv\d)", r"{instance}.\1_head.\2"),
    (r"(center|offset)_head/predictor", r"{instance}.\1_predictor"),
)


def panoptic_deeplab_name(path: str) -> str | None:
    """Returns Detectron2's name of a variable of `PanopticDeepLab`.

    Args:
        path: Path of the variable, such as `panoptic_deeplab/backbone/res2/block1/conv1/conv/kernel`.

    Returns:
        The name, such as `backbone.res2.0.conv1.weight`; None if Detectron2 has no such variable.
    """
    parts = split_path(path)
    if parts is None:
        return None
    layer, variable = parts[0].removesuffix("/conv"), parts[1]
    name = residual_layer_name(layer, "backbone") or listed_name(layer, _LAYERS)
    if name is None:
        return None
    if not name.startswith("backbone"):
        # Detectron2 counts pairs of plain convolutions from 0.
        name = re.sub(r"\.conv(\d)$", lambda number: f".{int(number[1]) - 1}", name.format(**_BRANCHES))
    return f"{name}.{variable}"


def load_panoptic_deeplab(
    system: PanopticDeepLab, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> None:
    """Sets the variables of a Panoptic-DeepLab to Detectron2's weights.

    Nothing changes unless all weights fit. Images are RGB in this model of Detectron2, as here. Settings that the
    weights do not contain (dilations, pooling window, mean color) must be set in the config, see
    `panoptic_deeplab_config`.

    Args:
        system: The system; its variables are created if needed.
        state: Arrays by Detectron2's names, see `read_checkpoint`.
        keep_initial: Patterns with `*` for Detectron2's names that are not loaded, for example
            `sem_seg_head.predictor.*` for a data set with other classes.

    Raises:
        UserError: If names are missing or left over, a shape differs, a pattern matches nothing, or batch normalization
            has another epsilon.
    """
    if not system.built:
        system.create_variables()
    check_epsilon(system, _EPSILON, "Detectron2")
    assign_by_name(
        system,
        state,
        name_of=panoptic_deeplab_name,
        to_keras=_to_keras,
        keep_initial=keep_initial,
        what="Panoptic-DeepLab",
        config_function="panoptic_deeplab_config",
    )


def _to_keras(path: str, array: np.ndarray) -> np.ndarray:
    if array.ndim != 4:
        return array
    return array.transpose((2, 3, 0, 1) if "/depthwise/conv/" in path else (2, 3, 1, 0))
