"""Panoptic segmentation in TensorFlow and Keras 3: convert, train, evaluate, export, serve.

Import it as `import deeplab2_like as dl`. Names load on first use, so that importing the package is quick and does not
import TensorFlow before it is needed.
"""

import importlib
from typing import Any

_HOMES = {
    "load_config": "deeplab2_like.configs",
    "build_system": "deeplab2_like.model",
    "Client": "deeplab2_like.export.client",
    "Predictor": "deeplab2_like.export.predictor",
    "PanopticPrediction": "deeplab2_like.export.prediction",
    "predict_files": "deeplab2_like.export.predict_files",
}

__all__ = ["Client", "PanopticPrediction", "Predictor", "build_system", "load_config", "predict_files"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'deeplab2_like' has no attribute '{name}'")
    return getattr(importlib.import_module(_HOMES[name]), name)
