"""How a client reaches a server: one attempt of a call over gRPC or REST, and the kinds of errors.

`client.Client` repeats attempts and words the errors.
"""

import base64
import json
from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np

from deeplab2_like.errors import UserError


class UnavailableError(Exception):
    """An attempt failed in a way that may be over soon; the text says how."""


class RefusedError(Exception):
    """The server refuses the image; the text says why."""


class FailedError(Exception):
    """The server fails; the text says how."""


class NoModelError(Exception):
    """There is no such model or version; the text is what the server says."""


class Transport(Protocol):
    """One attempt of a call over a protocol.

    All methods raise `UnavailableError` for errors that may be over soon, `NoModelError`, and `FailedError` for others.
    """

    def __init__(self, address: str, model: str, version: int | None, tls: bool) -> None: ...

    def list_signatures(self, timeout: float) -> set[str]:
        """Returns the names of the model's signatures."""

    def find_dataset_info(self, timeout: float) -> str | bytes | None:
        """Returns the content of `dataset_info.json`; None if the model does not tell."""

    def infer(self, signature: str, content: bytes, name: str, timeout: float) -> dict[str, Any]:
        """Returns the outputs for an image file, without the axis of the batch; raises `RefusedError`, too."""

    def close(self) -> None:
        """Closes connections."""


class ServingGrpc:
    """TensorFlow Serving over gRPC; see `Transport`."""

    def __init__(self, address: str, model: str, version: int | None, tls: bool) -> None:
        try:
            import grpc
            from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_service_pb2_grpc
        except ImportError as error:
            raise UserError(
                "A client over gRPC needs the package tensorflow-serving-api, which is not installed; run: pip install "
                "'deeplab2-like[serving]', or use protocol='rest'."
            ) from error
        if "//" in address:
            raise UserError(
                f"'{address}' is not an address for gRPC; give host and port, such as localhost:8500, or use "
                "protocol='rest' for an address that begins with http://."
            )
        options = [
            # A map is larger than the 4 MB that gRPC allows by default.
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            # After a server has restarted, gRPC would wait for up to two minutes before it connects again.
            ("grpc.initial_reconnect_backoff_ms", 100),
            ("grpc.max_reconnect_backoff_ms", 1000),
        ]
        if tls:
            self._channel = grpc.secure_channel(address, grpc.ssl_channel_credentials(), options)
        else:
            self._channel = grpc.insecure_channel(address, options)
        self._grpc, self._predict, self._metadata = grpc, predict_pb2, get_model_metadata_pb2
        self._service = prediction_service_pb2_grpc.PredictionServiceStub(self._channel)
        self._model, self._version = model, version

    def list_signatures(self, timeout: float) -> set[str]:
        """See `Transport`."""
        return set(self._read_metadata(timeout))

    def _read_metadata(self, timeout: float) -> Mapping[str, Any]:
        request = self._metadata.GetModelMetadataRequest(metadata_field=["signature_def"])
        answer = self._call(self._service.GetModelMetadata, request, timeout)
        signatures = self._metadata.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(signatures)
        return signatures.signature_def

    def find_dataset_info(self, timeout: float) -> str | bytes | None:
        """See `Transport`."""
        if "metadata" not in self.list_signatures(timeout):
            return None
        return _find_info(self._infer("metadata", {}, timeout))

    def infer(self, signature: str, content: bytes, name: str, timeout: float) -> dict[str, Any]:
        """See `Transport`."""
        import tensorflow as tf

        outputs = self._infer(signature, {"image_bytes": tf.make_tensor_proto([content])}, timeout)
        return _require_ok({key: value[0] for key, value in outputs.items()})

    def _infer(self, signature: str, inputs: Mapping[str, Any], timeout: float) -> dict[str, np.ndarray]:
        import tensorflow as tf

        request = self._predict.PredictRequest()
        request.model_spec.signature_name = signature
        for key, value in inputs.items():
            request.inputs[key].CopyFrom(value)
        answer = self._call(self._service.Predict, request, timeout)
        return {key: tf.make_ndarray(value) for key, value in answer.outputs.items()}

    def _call(self, method: Any, request: Any, timeout: float) -> Any:
        request.model_spec.name = self._model
        if self._version is not None:
            request.model_spec.version.value = self._version
        codes = self._grpc.StatusCode
        try:
            return method(request, timeout=timeout)
        except self._grpc.RpcError as error:
            code, details = error.code(), _one_line(error.details())
            if code in (codes.UNAVAILABLE, codes.ABORTED):
                raise UnavailableError(details) from error
            if code == codes.DEADLINE_EXCEEDED:
                raise UnavailableError(f"no answer within {timeout:.3g} s") from error
            if code == codes.NOT_FOUND:
                raise NoModelError(details) from error
            if code in (codes.INVALID_ARGUMENT, codes.OUT_OF_RANGE):
                raise RefusedError(details) from error
            raise FailedError(f"{code.name}, {details}") from error

    def close(self) -> None:
        """See `Transport`."""
        self._channel.close()


class _Rest:
    """What the protocols over HTTP share."""

    def __init__(self, address: str, model: str, version: int | None, tls: bool) -> None:
        import requests

        if tls and not address.startswith("https://"):
            raise UserError(f"'{address}' is not encrypted; over REST, tls=True needs an address with https://.")
        self._requests = requests
        self._session = requests.Session()
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, requests.adapters.HTTPAdapter(pool_maxsize=64))
        self._address = address.rstrip("/") if "//" in address else f"http://{address.rstrip('/')}"
        self._model, self._version = model, version

    def _call(self, path: str, timeout: float, content: Mapping[str, Any] | None = None) -> Any:
        """Sends JSON, or asks without if there is none, and returns the JSON of the answer."""
        exceptions = self._requests.exceptions
        url = f"{self._address}{path}"
        try:
            if content is None:
                answer = self._session.get(url, timeout=timeout)
            else:
                answer = self._session.post(url, json=content, timeout=timeout)
        except exceptions.Timeout as error:
            raise UnavailableError(f"no answer within {timeout:.3g} s") from error
        except (exceptions.ConnectionError, exceptions.ChunkedEncodingError) as error:
            raise UnavailableError(_reason(error)) from error
        except exceptions.RequestException as error:  # Such as an address that is none.
            raise UserError(f"'{self._address}' cannot be called: {_one_line(str(error))}") from error
        if answer.status_code == 200:
            try:
                return answer.json()
            except ValueError as error:
                raise FailedError("the answer is not JSON, so this may be another server") from error
        text = _error_text(answer)
        if answer.status_code in (429, 502, 503, 504):
            raise UnavailableError(text)
        if answer.status_code == 404:
            raise NoModelError(text)
        if answer.status_code in (400, 413, 422):
            raise RefusedError(text)
        raise FailedError(text)

    def close(self) -> None:
        """See `Transport`."""
        self._session.close()


class ServingRest(_Rest):
    """TensorFlow Serving over REST; see `Transport`."""

    @property
    def _path(self) -> str:
        version = "" if self._version is None else f"/versions/{self._version}"
        return f"/v1/models/{self._model}{version}"

    def list_signatures(self, timeout: float) -> set[str]:
        """See `Transport`."""
        answer = self._call(f"{self._path}/metadata", timeout)
        try:
            signatures = answer["metadata"]["signature_def"]["signature_def"]
            outputs = signatures.get("compact", {}).get("outputs", {})
            # Only outputs of such names come as base64; others with bytes are no JSON.
            unreadable = {"compact"} if outputs and not any(name.endswith("_bytes") for name in outputs) else set()
            return set(signatures) - unreadable
        except (KeyError, TypeError) as error:
            raise FailedError("it does not list signatures, so this may be another server") from error

    def find_dataset_info(self, timeout: float) -> str | bytes | None:
        """See `Transport`."""
        if "metadata" not in self.list_signatures(timeout):
            return None
        return _find_info(self._infer("metadata", {}, timeout))

    def infer(self, signature: str, content: bytes, name: str, timeout: float) -> dict[str, Any]:
        """See `Transport`."""
        image = {"b64": base64.b64encode(content).decode()}
        outputs = self._infer(signature, {"image_bytes": [image]}, timeout)
        return _require_ok({key: _plain(value[0]) for key, value in outputs.items()})

    def _infer(self, signature: str, inputs: Mapping[str, Any], timeout: float) -> dict[str, Any]:
        request = {"signature_name": signature, "inputs": inputs}
        answer = self._call(f"{self._path}:predict", timeout, request)
        if not isinstance(answer, dict) or "outputs" not in answer:
            raise FailedError("the answer has no outputs, so this may be another server")
        # The name is left out if there is only one output.
        outputs = answer["outputs"]
        return outputs if isinstance(outputs, dict) and "b64" not in outputs else {"dataset_info": outputs}


class OpenInferenceRest(_Rest):
    """The Open Inference Protocol V2 over REST, as `deeplab2-like serve` speaks it; see `Transport`."""

    @property
    def _path(self) -> str:
        version = "" if self._version is None else f"/versions/{self._version}"
        return f"/v2/models/{self._model}{version}"

    def list_signatures(self, timeout: float) -> set[str]:
        """See `Transport`."""
        return {"compact"}

    def find_dataset_info(self, timeout: float) -> str | bytes | None:
        """See `Transport`."""
        parameters = self._call(self._path, timeout).get("parameters") or {}
        found: str | None = parameters.get("dataset_info")
        return found

    def infer(self, signature: str, content: bytes, name: str, timeout: float) -> dict[str, Any]:
        """See `Transport`."""
        image = {
            "name": "image_bytes",
            "shape": [1],
            "datatype": "BYTES",
            "parameters": {"content_type": "base64"},
            "data": [base64.b64encode(content).decode()],
        }
        names = {"name": "image_name", "shape": [1], "datatype": "BYTES", "data": [name]}
        answer = self._call(f"{self._path}/infer", timeout, {"inputs": [image, names]})
        outputs = {}
        for output in answer["outputs"]:
            values = output["data"]
            if (output.get("parameters") or {}).get("content_type") == "base64":
                values = [base64.b64decode(value) for value in values]
            outputs[output["name"]] = values[0] if output["shape"] == [1] else values
        return _require_ok(outputs)


TRANSPORTS: dict[str, type[Transport]] = {"grpc": ServingGrpc, "rest": ServingRest, "v2": OpenInferenceRest}


def _require_ok(outputs: dict[str, Any]) -> dict[str, Any]:
    """Returns the outputs for an image without their `status`; raises `RefusedError` if it says why there are none."""
    status = outputs.pop("status", "")
    status = status.decode(errors="replace") if isinstance(status, bytes) else str(status)
    if status not in ("", "ok"):
        raise RefusedError(status)
    return outputs


def _find_info(outputs: Mapping[str, Any]) -> str | bytes | None:
    """Makes the content of `dataset_info.json` of the outputs of the signature `metadata`, which are JSON texts."""
    texts = {name: _first_text(value) for name, value in outputs.items()}
    if "dataset_info" in texts:
        return texts["dataset_info"]
    if not {"classes", "label_divisor", "ignore_label"} <= texts.keys():
        return None
    content = {name: json.loads(texts[name] or "") for name in ("label_divisor", "ignore_label")}
    return json.dumps({"name": "the server's", **content, "categories": json.loads(texts["classes"] or "")})


def _first_text(value: Any) -> str | bytes | None:
    """Returns a text, whether it is alone or the only one of a list; None if it is no text."""
    if isinstance(value, np.ndarray | list):
        value = np.asarray(value, object).ravel()[0]
    value = _plain(value)
    return value if isinstance(value, str | bytes) else None


def _plain(value: Any) -> Any:
    """Decodes a value of TensorFlow Serving's JSON, in which bytes are `{"b64": TEXT}`."""
    return base64.b64decode(value["b64"]) if isinstance(value, dict) and "b64" in value else value


def _one_line(text: str | None) -> str:
    """Shortens a message, which may hold a stack trace, to one line."""
    return " ".join((text or "no reason given").split())[:300]


def _reason(error: Exception) -> str:
    """Names the innermost cause of an error of `requests`, whose text is a nest of class names."""
    cause: Any = error
    while getattr(cause, "args", None) and isinstance(getattr(cause.args[0], "reason", None), Exception):
        cause = cause.args[0].reason
    while cause.__cause__ or cause.__context__:
        cause = cause.__cause__ or cause.__context__
    return _one_line(getattr(cause, "strerror", None) or str(cause))


def _error_text(answer: Any) -> str:
    """The message in the body of an HTTP error: `{"error": TEXT}`, or else the status."""
    try:
        return _one_line(answer.json()["error"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP status {answer.status_code}"
