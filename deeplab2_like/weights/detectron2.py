"""Weights of Detectron2's Panoptic-DeepLab.

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
    """The `model` section with which Detectron2's weights compute what they compute there.

    The differences to our defaults: dilations 2, 4, 8 in the last stage, plain convolutions in the centre's head,
    image pooling over a window of the training crop, the constants of batch normalisation in PyTorch.

    Args:
        training_crop: Height and width that the model was trained with, in pixels; the Cityscapes models were trained
            with 512x1024, the COCO models with 640x640.
        separable: Whether it is a model with depthwise separable convolutions ("dsconv").
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
    """Reads a checkpoint of Detectron2.

    Args:
        path: A `.pkl` of the model zoo, a `.npz` with one array per name, or, where PyTorch is installed, a `.pth`.

    Returns:
        The arrays by their names, as stored.

    Raises:
        UserError: If the file is not there, is damaged, or holds anything but arrays (a pickle could run code).
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
    """Builds nothing but arrays and builtin containers, so that a checkpoint cannot run code."""

    _ALLOWED = frozenset(
        {
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "scalar"),
            ("numpy._core.numeric", "_frombuffer"),
            ("collections", "OrderedDict"),
            ("_codecs", "encode"),  # How Python 3 writes bytes for Python 2; encodes text, nothing more.
        }
    )

    def find_class(self, module_name: str, global_name: str) -> Any:
        """Finds a class, if it is allowed."""
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
            # Written by Python 2, arrays are byte strings, which Latin-1 maps one to one.
            return _ArrayUnpickler(file, encoding="latin1").load()
    except UserError as error:
        raise UserError(f"Checkpoint '{path}' {error}; convert it to .npz with a program that you trust.") from None
    except Exception as error:  # A damaged pickle can raise anything.
        raise UserError(f"Checkpoint '{path}' is not a readable pickle ({error}); get the file again.") from error


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
        raise UserError(f"Checkpoint '{path}' is not readable by PyTorch as plain weights ({error}).") from error
    model = content.get("model", content) if isinstance(content, Mapping) else content
    if not isinstance(model, Mapping):
        return model
    return {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in model.items()}


# From the path of one of our layers to Detectron2's name for it. `{branch}` is one of the two below.
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
    """Detectron2's name of a variable of our Panoptic-DeepLab.

    Args:
        path: Path of the variable, such as `panoptic_deeplab/backbone/res2/block1/conv1/conv/kernel`.

    Returns:
        The name, such as `backbone.res2.0.conv1.weight`; None if Detectron2 has nothing like it.
    """
    parts = split_path(path)
    if parts is None:
        return None
    layer, variable = parts[0].removesuffix("/conv"), parts[1]
    name = residual_layer_name(layer, "backbone") or listed_name(layer, _LAYERS)
    if name is None:
        return None
    if not name.startswith("backbone"):
        # Pairs of plain convolutions count from 0.
        name = re.sub(r"\.conv(\d)$", lambda number: f".{int(number[1]) - 1}", name.format(**_BRANCHES))
    return f"{name}.{variable}"


def load_panoptic_deeplab(
    system: PanopticDeepLab, state: Mapping[str, np.ndarray], *, keep_initial: Sequence[str] = ()
) -> None:
    """Sets the variables of a Panoptic-DeepLab to weights of Detectron2's.

    Nothing is changed unless everything fits. Detectron2 takes images in RGB, as we do. What leaves no trace in the
    weights (dilations, pooling window, mean colour) must be set in the config, see `panoptic_deeplab_config`.

    Args:
        system: The system; its variables are created if they are not there yet.
        state: Arrays by Detectron2's names, see `read_checkpoint`.
        keep_initial: Patterns with `*` of Detectron2's names that are not loaded, for example
            `sem_seg_head.predictor.*` for a data set with other classes.

    Raises:
        UserError: If names are missing or left over, a shape differs, a pattern matches nothing, or batch normalisation
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
