"""The client over gRPC, against TensorFlow Serving's service: with an export, and with a model that echoes.

The echoing model returns the file it gets as the PNG of the map, and refuses empty files in their row, as an export
does with files that are no images.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from prediction_service import WARMUP_FILE, PredictionService, start_server
from tensorflow_serving.apis import predict_pb2, prediction_log_pb2

from deeplab2_like.data.images import encode_png
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.export.client import Client, ServerError
from deeplab2_like.export.predictor import Predictor


@pytest.fixture(scope="module")
def echo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    @tf.function(input_signature=[tf.TensorSpec([None], tf.string, name="image_bytes")])
    def compact(image_bytes: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.shape(image_bytes)[0]
        return {
            "status": tf.where(tf.equal(image_bytes, ""), "The file is empty.", ""),
            "panoptic_png_bytes": image_bytes,
            "segment_id": tf.tile([[6002, 0]], [rows, 1]),
            # Tells how many calls were joined.
            "segment_score": tf.cast(tf.tile([[rows, 0]], [rows, 1]), tf.float32),
        }

    @tf.function(input_signature=[])
    def metadata() -> dict[str, tf.Tensor]:
        return {"dataset_info": tf.constant(json.dumps(scenes_info().to_dict()))}

    folder = tmp_path_factory.mktemp("echo") / "1"
    tf.saved_model.save(tf.Module(), str(folder), signatures={"compact": compact, "metadata": metadata})
    request = predict_pb2.PredictRequest()
    request.model_spec.signature_name = "compact"
    request.inputs["image_bytes"].CopyFrom(tf.make_tensor_proto([b"warm"]))
    log = prediction_log_pb2.PredictionLog(predict_log=prediction_log_pb2.PredictLog(request=request))
    (folder / WARMUP_FILE).parent.mkdir()
    with tf.io.TFRecordWriter(str(folder / WARMUP_FILE)) as writer:
        writer.write(log.SerializeToString())
    return folder


@pytest.fixture(scope="module")
def service(echo_dir: Path) -> PredictionService:
    return PredictionService(echo_dir, "echo", max_batch_size=4)


@pytest.fixture
def address(service: PredictionService) -> Iterator[str]:
    server, port = start_server(service)
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def _map(index: int) -> np.ndarray:
    """A map of its own size with one person, 6002, whose row is the index."""
    panoptic = np.zeros((index + 1, 5 + index % 3), np.int32)
    panoptic[index] = 6002
    return panoptic


def _file(panoptic: np.ndarray) -> bytes:
    return encode_png(ids_to_rgb(panoptic), is_label=True)


def test_agrees_with_the_export(export_dir, make_image):
    server, port = start_server(PredictionService(export_dir, "panoptic"))
    images = [make_image(37, 53), make_image(64, 40, index=1)]
    predictor = Predictor(export_dir)
    address = f"127.0.0.1:{port}"
    with Client(address, "panoptic", dataset_info=export_dir) as client:
        *predictions, bad = client.predict([*images, encode_png(images[0])[:100]], names=["a.png", "b.png", "cut.png"])
    server.stop(None).wait()
    for image, prediction in zip(images, predictions, strict=True):
        expected = predictor(image)
        np.testing.assert_array_equal(prediction.panoptic, expected.panoptic)
        assert prediction.segments == expected.segments
    assert str(bad).startswith(f"'cut.png' is refused by the model 'panoptic' at '{address}': ")
    assert not isinstance(bad, ServerError)


def test_batches_of_good_and_bad_images_from_many_clients(service, address):
    assert service.warmed_up == 1
    images = [b"" if index % 5 == 2 else _file(_map(index)) for index in range(60)]
    with Client(address, "echo") as client:
        assert client.dataset_info == scenes_info()
        results = client.predict(images, concurrency=16)
    joined = []
    for index, result in enumerate(results):
        if index % 5 == 2:
            name = f"image {index + 1}"
            assert str(result) == f"'{name}' is refused by the model 'echo' at '{address}': The file is empty."
            assert not isinstance(result, ServerError)
        else:
            np.testing.assert_array_equal(result.panoptic, _map(index))
            joined.append(max(segment.score for segment in result.segments))
    assert max(joined) > 1


def test_no_such_model(address):
    with (
        Client(address, "ecco", dataset_info=scenes_info()) as client,
        pytest.raises(UserError, match=rf"^There is no model 'ecco' at '{address}': Servable not found for request"),
    ):
        client(_file(_map(0)))


def test_survives_a_restart_of_the_server(service):
    server, port = start_server(service)
    address = f"127.0.0.1:{port}"
    with Client(address, "echo", retries=1) as client:
        client(_file(_map(0)))
        server.stop(None).wait()
        with pytest.raises(ServerError, match=rf"^The model 'echo' at '{address}' gave no answer, tried 2 times: "):
            client(_file(_map(1)))
        client.retries = 20
        server, _ = start_server(service, port)
        np.testing.assert_array_equal(client(_file(_map(2))).panoptic, _map(2))
    server.stop(None).wait()
