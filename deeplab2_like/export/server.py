"""An export on MLServer, which speaks the Open Inference Protocol V2 over REST and gRPC.

`serve` runs a server with one model. `PanopticRuntime` is the runtime for a server of your own: name it as
`implementation` in a `model-settings.json`, and the folder of the export as `parameters.uri`.

Needs the package mlserver.
"""

import asyncio
import base64
import binascii
import dataclasses
import functools
import json
import logging
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlserver
import numpy as np
import prometheus_client
from mlserver.errors import InferenceError, MLServerError
from mlserver.types import (
    Datatype,
    InferenceRequest,
    InferenceResponse,
    MetadataModelResponse,
    MetadataTensor,
    Parameters,
    RequestInput,
    ResponseOutput,
)

from deeplab2_like.errors import UserError
from deeplab2_like.export.batching import Batcher, TooManyWaitingError
from deeplab2_like.export.image_files import ImageAnswer, ImageFile, ImageFilePredictor
from deeplab2_like.export.predictor import Predictor, find_export
from deeplab2_like.export.versions import version_number

# A request may hold several photographs, and 4 MB is gRPC's default.
_MAX_MESSAGE_LENGTH = 256 * 1024 * 1024
_SERVICE_UNAVAILABLE = 503

_INPUT, _NAMES = "image_bytes", "image_name"
# Name, type and shape without the axis of the batch, as in the signature `compact` of an export.
_OUTPUTS = {
    "status": (Datatype.BYTES, []),
    "panoptic_png_bytes": (Datatype.BYTES, []),
    "image_size": (Datatype.INT32, [2]),
    "segment_id": (Datatype.INT32, [-1]),
    "segment_class": (Datatype.INT32, [-1]),
    "segment_score": (Datatype.FP32, [-1]),
}


@dataclasses.dataclass(frozen=True)
class Batching:
    """Limits of adaptive batching.

    Attributes:
        max_size: Largest number of images in a call of the model.
        max_wait: Seconds for which an incomplete batch waits for more images.
        max_waiting: Number of images that may wait for the model; more are refused as busy.
    """

    max_size: int = 8
    max_wait: float = 0.0
    max_waiting: int = 1000


@functools.lru_cache(maxsize=1)
def _load_predictor(folder: str) -> Predictor:
    """Loads an export once, although both `serve`, for a clear error, and MLServer ask for it."""
    return Predictor(folder)


@functools.cache
def _metrics() -> tuple[Any, Any]:
    """The metrics that MLServer does not have: a counter of images by model and result, and the sizes of batches."""
    images = prometheus_client.Counter("panoptic_images", "Images answered", ["model", "result"])
    sizes = prometheus_client.Histogram(
        "panoptic_batch_size", "Images in a call of the model", ["model"], buckets=(1, 2, 4, 8, 16, 32, 64)
    )
    return images, sizes


class PanopticRuntime(mlserver.MLModel):
    """MLServer's runtime for an export.

    Input `image_bytes`, BYTES [B]: image files of any sizes, in JSON as base64. Input `image_name`, BYTES [B],
    optional: their names in the status. Outputs: see `ImageAnswer`; K is padded with zeros. Batches are made of single
    images, whichever request they came in, so `max_batch_size` of MLServer must stay 0; the limits are the fields of
    `Batching` in `parameters.extra`.
    """

    async def load(self) -> bool:
        """Loads the export; raises `UserError` if there is none or it is damaged."""
        parameters = self.settings.parameters
        if parameters is None or not parameters.uri:
            raise UserError(f"Model '{self.name}' has no parameters.uri; set it to the folder of an export.")
        limits = Batching(**(parameters.extra or {}))
        self._predictor = _load_predictor(parameters.uri)
        predict_images = ImageFilePredictor(self._predictor)
        images, sizes = _metrics()

        def predict(batch: list[ImageFile]) -> list[ImageAnswer]:
            answers = predict_images(batch)
            sizes.labels(model=self.name).observe(len(batch))
            for answer in answers:
                images.labels(model=self.name, result="refused" if answer.status else "predicted").inc()
            return answers

        self._batcher = Batcher(predict, **dataclasses.asdict(limits))
        self.inputs = [MetadataTensor(name=name, datatype=Datatype.BYTES, shape=[-1]) for name in (_INPUT, _NAMES)]
        self.outputs = [
            MetadataTensor(name=name, datatype=datatype, shape=[-1, *shape])
            for name, (datatype, shape) in _OUTPUTS.items()
        ]
        return True

    async def unload(self) -> bool:
        """Ends the threads."""
        self._batcher.close()
        return True

    async def metadata(self) -> MetadataModelResponse:
        """Describes inputs and outputs, and with the parameter `dataset_info`, as JSON, the classes."""
        described = await super().metadata()
        described.parameters = Parameters(dataset_info=json.dumps(self._predictor.dataset_info.to_dict()))
        return described

    async def predict(self, payload: InferenceRequest) -> InferenceResponse:
        """Predicts the images of a request; a bad image has a `status`, and the others are answered.

        Raises:
            InferenceError: If the request is not as described above.
            MLServerError: If too many images wait already.
        """
        request = _parse(payload)
        try:
            answers = await self._batcher.submit(request.images)
        except TooManyWaitingError as error:
            raise MLServerError(f"{error}; try again later.", status_code=_SERVICE_UNAVAILABLE) from error
        outputs = [_make_output(name, answers, request) for name in request.outputs]
        return InferenceResponse(model_name=self.name, model_version=self.version, outputs=outputs)


# --- Requests and responses. ------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Request:
    """A request that has been checked.

    Attributes:
        images: The images; what is no base64 is left as it is, and refused as an image.
        outputs: Names of the outputs to send.
        is_text: Whether the request came as JSON, so that bytes must be text.
        is_base64: Whether bytes are base64.
    """

    images: list[ImageFile]
    outputs: list[str]
    is_text: bool
    is_base64: bool


def _parse(payload: InferenceRequest) -> _Request:
    """Checks a request; raises `InferenceError`."""
    inputs = {tensor.name: tensor for tensor in payload.inputs}
    unknown = sorted(inputs.keys() - {_INPUT, _NAMES})
    if unknown or _INPUT not in inputs:
        raise InferenceError(
            f"The inputs are {_INPUT} and, optionally, {_NAMES}, but the request has: "
            f"{', '.join(sorted(inputs)) or 'none'}."
        )
    wanted = [output.name for output in payload.outputs or []] or list(_OUTPUTS)
    for name in wanted:
        if name not in _OUTPUTS:
            raise InferenceError(f"There is no output '{name}'; the outputs are {', '.join(_OUTPUTS)}.")
    contents = _read_bytes(inputs[_INPUT])
    is_text = any(isinstance(value, str) for value in contents)
    is_base64 = is_text or _content_type(inputs[_INPUT]) == "base64"
    if is_base64:
        contents = [_decode_base64(value) for value in contents]
    if _NAMES in inputs:
        names = [_decode_text(value) for value in _read_bytes(inputs[_NAMES])]
    else:
        names = [f"image {number}" for number in range(1, len(contents) + 1)]
    if len(names) != len(contents):
        raise InferenceError(f"{_NAMES} has {len(names)} values, but {_INPUT} has {len(contents)}; give one per image.")
    images = [ImageFile(content, name) for content, name in zip(contents, names, strict=True)]
    return _Request(images, wanted, is_text=is_text, is_base64=is_base64)


def _read_bytes(tensor: RequestInput) -> list[Any]:
    """Returns the values of an input, each str or bytes; raises `InferenceError` if type or shape are others."""
    if Datatype(tensor.datatype) != Datatype.BYTES:
        raise InferenceError(f"Input {tensor.name} must be BYTES, but is {Datatype(tensor.datatype).value}.")
    values = getattr(tensor.data, "root", tensor.data)
    values = list(values) if isinstance(values, list | tuple) else [values]
    if any(not isinstance(value, str | bytes) for value in values):
        raise InferenceError(f"Input {tensor.name} must be a flat list of texts, in base64 if they are files.")
    # [B, 1] is how some clients write a list.
    if tensor.shape not in ([len(values)], [len(values), 1]):
        raise InferenceError(
            f"Input {tensor.name} has {len(values)} values, but its shape is {tensor.shape} instead of [{len(values)}]."
        )
    return values


def _content_type(tensor: RequestInput) -> str | None:
    return None if tensor.parameters is None else tensor.parameters.content_type


def _decode_base64(value: str | bytes) -> bytes:
    """Decodes base64; what is none is returned as it is, and then refused as an image."""
    raw = value.encode() if isinstance(value, str) else value
    try:
        return base64.b64decode(raw, validate=True)
    except binascii.Error:
        return raw


def _decode_text(value: str | bytes) -> str:
    return value if isinstance(value, str) else value.decode(errors="replace")


def _make_output(name: str, answers: Sequence[ImageAnswer], request: _Request) -> ResponseOutput:
    """Makes an output, [B, ...], of the answers."""
    datatype, _ = _OUTPUTS[name]
    if name == "status":
        texts = [answer.status for answer in answers]
        data: list[Any] = texts if request.is_text else [text.encode() for text in texts]
        return ResponseOutput(name=name, datatype=datatype, shape=[len(data)], data=data)
    if name == "panoptic_png_bytes":
        contents = [answer.panoptic_png for answer in answers]
        if request.is_base64:
            contents = [base64.b64encode(content) for content in contents]
        data = [content.decode() for content in contents] if request.is_text else contents
        parameters = Parameters(content_type="base64") if request.is_base64 else None
        return ResponseOutput(name=name, datatype=datatype, shape=[len(data)], data=data, parameters=parameters)
    rows = [getattr(answer, name) for answer in answers]
    length = max((len(row) for row in rows), default=0)
    values = np.concatenate([np.pad(row, (0, length - len(row))) for row in rows]) if rows else np.zeros(0)
    return ResponseOutput(name=name, datatype=datatype, shape=[len(rows), length], data=values.tolist())


# --- The server. ------------------------------------------------------------------------------------------------------


def serve(
    exported_dir: Path,
    *,
    name: str | None = None,
    host: str = "127.0.0.1",
    port: int = 8080,
    grpc_port: int = 8081,
    metrics_port: int = 8082,
    batching: Batching | None = None,
    warmup_sizes: Sequence[tuple[int, int]] = (),
    announce: Callable[[str], None] = print,
) -> None:
    """Serves an export until the process is told to stop (SIGINT, SIGTERM).

    Args:
        exported_dir: An export, or a folder of versions, of which the newest is served.
        name: The name of the model; None: that of the folder, without the version.
        host: The address to listen at; `0.0.0.0` for all of the machine.
        port: Port for REST.
        grpc_port: Port for gRPC.
        metrics_port: Port for metrics in the format of Prometheus.
        batching: Limits of batches.
        warmup_sizes: Heights and widths of images to predict before the ports open, as the first one takes longer.
        announce: Called with the addresses when the model is loaded.

    Raises:
        UserError: If there is no export, it is damaged, or a port is taken.
    """
    folder = find_export(exported_dir)
    version = version_number(folder.name)
    if name is None:
        name = (folder.absolute().parent if version is not None else folder.absolute()).name
    for number in (port, grpc_port, metrics_port):
        _require_free(host, number)
    predictor = _load_predictor(str(folder))  # Before the ports open, so that every connection is answered.
    for height, width in warmup_sizes:
        predictor.infer(np.zeros((1, height, width, 3), np.uint8))
    settings = mlserver.Settings(
        host=host,
        http_port=port,
        grpc_port=grpc_port,
        metrics_port=metrics_port,
        grpc_max_message_length=_MAX_MESSAGE_LENGTH,
        # Worker processes would each load the model, and TensorFlow uses all cores as it is.
        parallel_workers=0,
        # PNGs and base64 of them are compressed already.
        gzip_enabled=False,
        debug=False,
        # Models can be loaded by name from here, and an export has none.
        model_repository_root=str(folder),
    )
    model = mlserver.ModelSettings(
        name=name,
        implementation=PanopticRuntime,
        platform="tensorflow_savedmodel",
        versions=[] if version is None else [str(version)],
        parameters={
            "uri": str(folder),
            "version": None if version is None else str(version),
            "extra": dataclasses.asdict(batching or Batching()),
        },
    )

    # MLServer logs a traceback for each request over gRPC that is wrong.
    logging.getLogger("mlserver.grpc").addFilter(_without_traceback)

    async def run() -> None:
        server = mlserver.MLServer(settings)
        announce(f"Model '{name}' is at http://{host}:{port}/v2/models/{name}, gRPC at {host}:{grpc_port}")
        await server.start([model])

    asyncio.run(run())


def _without_traceback(record: logging.LogRecord) -> bool:
    """A filter that reduces errors of clients to their message."""
    if record.exc_info and isinstance(record.exc_info[1], MLServerError):
        record.exc_info = None
    return True


def _require_free(host: str, port: int) -> None:
    """Raises `UserError` unless a port can be listened at; gRPC would share it silently with another server."""
    try:
        with socket.create_server((host, port), reuse_port=False):
            pass
    except OSError as error:
        raise UserError(f"Cannot listen at {host}:{port} ({error.strerror}); choose another port or host.") from error
