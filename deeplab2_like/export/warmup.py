"""Warm-up requests, which TensorFlow Serving answers before it announces a version, so that no client waits for that.

They need the package `tensorflow-serving-api`, the extra `serving`.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

import numpy as np
import tensorflow as tf

from deeplab2_like.data.images import encode_jpeg
from deeplab2_like.errors import UserError

WARMUP_FILE = "assets.extra/tf_serving_warmup_requests"


def require_serving_api() -> tuple[ModuleType, ModuleType]:
    """Imports the messages of TensorFlow Serving.

    Returns:
        The modules `predict_pb2` and `prediction_log_pb2`.

    Raises:
        UserError: If the package is not installed.
    """
    try:
        from tensorflow_serving.apis import predict_pb2, prediction_log_pb2
    except ImportError as error:
        raise UserError(
            "Warm-up requests need the package tensorflow-serving-api; run `pip install 'deeplab2-like[serving]'`, or "
            "leave out --warmup-size."
        ) from error
    return predict_pb2, prediction_log_pb2


def write_warmup_requests(folder: Path, signatures: Iterable[str], sizes: Sequence[tuple[int, int]]) -> None:
    """Writes one request for each signature and size into an export.

    `metadata` gets none: it needs no warm-up, and a server that batches requests refuses those without input.

    Args:
        folder: The export.
        signatures: Names of its signatures.
        sizes: Heights and widths of the images.

    Raises:
        UserError: If the package `tensorflow-serving-api` is not installed.
    """
    predict_pb2, prediction_log_pb2 = require_serving_api()
    (folder / WARMUP_FILE).parent.mkdir(exist_ok=True)
    with tf.io.TFRecordWriter(str(folder / WARMUP_FILE)) as writer:
        for height, width in sizes:
            image = np.full((height, width, 3), 128, np.uint8)
            inputs = {
                "images": tf.make_tensor_proto(image[None]),
                "image_bytes": tf.make_tensor_proto([encode_jpeg(image)]),
            }
            for signature in sorted(set(signatures) - {"metadata"}):
                name = "images" if signature in ("serving_default", "compiled") else "image_bytes"
                request = predict_pb2.PredictRequest()
                request.model_spec.name = "warmup"
                request.model_spec.signature_name = signature
                request.inputs[name].CopyFrom(inputs[name])
                log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
                writer.write(log.SerializeToString())
