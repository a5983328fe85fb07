"""TensorFlow Serving's PredictionService over gRPC, from a SavedModel, as the server of tests and load tests.

What it has of TensorFlow Serving: the interface, the warm-up requests, and batching by a kernel of TensorFlow,
`BatchFunction`, which joins calls along the first axis, runs the signature once, and splits the outputs along the first
axis.

    python tests/export/prediction_service.py models/panoptic/1 --port 8500 --max-batch-size 8
"""

import argparse
import concurrent.futures
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import grpc
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2
from tensorflow_serving.apis import get_model_metadata_pb2, predict_pb2, prediction_log_pb2, prediction_service_pb2_grpc

WARMUP_FILE = Path("assets.extra", "tf_serving_warmup_requests")

Signature = Callable[..., dict[str, tf.Tensor]]


class PredictionService(prediction_service_pb2_grpc.PredictionServiceServicer):
    """One model.

    Args:
        folder: The SavedModel.
        name: The name of the model.
        max_batch_size: Largest number of images of a batch; 0: no batching. Only signatures with one input of strings
            are batched, as others would need images of equal size.
    """

    def __init__(self, folder: Path, name: str, *, max_batch_size: int = 0) -> None:
        self._name = name
        self._model = tf.saved_model.load(str(folder))
        self._definitions = saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes())
        self.signatures: dict[str, Signature] = dict(self._model.signatures)
        if max_batch_size:
            for key, signature in self._model.signatures.items():
                inputs = list(signature.structured_input_signature[1].values())
                if [spec.dtype for spec in inputs] == [tf.string]:
                    self.signatures[key] = make_batched(signature, inputs[0].name, max_batch_size)
        self.warmed_up = self._warm_up(folder / WARMUP_FILE)

    def _warm_up(self, file: Path) -> int:
        """Runs the requests that the export brings, if any; returns their number."""
        if not file.is_file():
            return 0
        records = list(tf.data.TFRecordDataset(str(file)).as_numpy_iterator())
        for record in records:
            self._run(prediction_log_pb2.PredictionLog.FromString(record).predict_log.request)
        return len(records)

    def _run(self, request: predict_pb2.PredictRequest) -> dict[str, tf.Tensor]:
        signature = self.signatures[request.model_spec.signature_name or "serving_default"]
        return signature(**{key: tf.constant(tf.make_ndarray(value)) for key, value in request.inputs.items()})

    def Predict(self, request: predict_pb2.PredictRequest, context: grpc.ServicerContext) -> Any:
        self._require_model(request, context)
        if request.model_spec.signature_name not in self.signatures:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"No signature '{request.model_spec.signature_name}'")
        try:
            outputs = self._run(request)
        except tf.errors.OpError as error:
            code = next(code for code in grpc.StatusCode if code.value[0] == error.error_code)
            context.abort(code, error.message)
        answer = predict_pb2.PredictResponse()
        for key, value in outputs.items():
            answer.outputs[key].CopyFrom(tf.make_tensor_proto(value.numpy()))
        return answer

    def GetModelMetadata(self, request: Any, context: grpc.ServicerContext) -> Any:
        self._require_model(request, context)
        signatures = get_model_metadata_pb2.SignatureDefMap()
        for key, signature in self._definitions.meta_graphs[0].signature_def.items():
            signatures.signature_def[key].CopyFrom(signature)
        answer = get_model_metadata_pb2.GetModelMetadataResponse()
        answer.metadata["signature_def"].Pack(signatures)
        return answer

    def _require_model(self, request: Any, context: grpc.ServicerContext) -> None:
        if request.model_spec.name != self._name:
            context.abort(
                grpc.StatusCode.NOT_FOUND, f"Servable not found for request: Latest({request.model_spec.name})"
            )


def make_batched(signature: Signature, input_name: str, max_batch_size: int) -> Signature:
    """Joins concurrent calls of a signature to batches."""
    names = sorted(signature.structured_outputs)

    @tf.nondifferentiable_batch_function(
        num_batch_threads=1,
        max_batch_size=max_batch_size,
        batch_timeout_micros=5000,
        max_enqueued_batches=1000,
        autograph=False,
        enable_large_batch_splitting=False,
    )
    def in_batches(strings: tf.Tensor) -> list[tf.Tensor]:
        outputs = signature(**{input_name: strings})
        return [outputs[name] for name in names]

    # Calls are joined if they come through one graph, whose operation owns the queue.
    graph = tf.function(in_batches, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False)
    graph.get_concrete_function()
    return lambda **inputs: dict(zip(names, graph(inputs[input_name]), strict=True))


def start_server(service: PredictionService, port: int = 0, *, threads: int = 32) -> tuple[grpc.Server, int]:
    """Starts a server on the loopback interface; returns it and its port, a free one for 0."""
    server = grpc.server(
        concurrent.futures.ThreadPoolExecutor(max_workers=threads),
        options=[
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.so_reuseport", 0),
        ],
    )
    prediction_service_pb2_grpc.add_PredictionServiceServicer_to_server(service, server)
    port = server.add_insecure_port(f"127.0.0.1:{port}")
    server.start()
    return server, port


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--name", default="panoptic")
    parser.add_argument("--port", type=int, default=8500)
    parser.add_argument("--max-batch-size", type=int, default=0)
    options = parser.parse_args()
    service = PredictionService(options.folder, options.name, max_batch_size=options.max_batch_size)
    server, port = start_server(service, options.port)
    print(f"{service.warmed_up} warm-up requests, listening at port {port}", flush=True)
    server.wait_for_termination()


if __name__ == "__main__":
    main()
