"""Converters: from a data set as it is published to a folder of TFRecords with its `dataset_info.json`.

Each converter is one file; what they share is in `common.py`.
"""

import importlib
from collections.abc import Callable
from typing import Any


def _converter(module: str, function: str) -> Callable[..., Any]:
    """A function of another module, which (and with it TensorFlow) is imported when it is first called."""

    def convert(**arguments: Any) -> Any:
        return getattr(importlib.import_module(f"{__name__}.{module}"), function)(**arguments)

    convert.__doc__ = f"See `{function}` in {module}.py."
    return convert


# By the name that `deeplab2-like convert` takes.
CONVERTERS: dict[str, Callable[..., Any]] = {
    "coco-panoptic": _converter("coco_panoptic", "convert_coco_panoptic"),
    "scenes": _converter("scenes", "convert_scenes"),
}
