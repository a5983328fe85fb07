"""The client over gRPC, against TensorFlow Serving's service with a real export."""

from collections.abc import Iterator

import numpy as np
import pytest
from prediction_service import PredictionService, start_server

from deeplab2_like.data.images import encode_png
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.export.client import Client, ServerError
from deeplab2_like.export.predictor import Predictor


@pytest.fixture(scope="module")
def service(export_dir) -> PredictionService:
    return PredictionService(export_dir, "panoptic")


@pytest.fixture
def address(service) -> Iterator[str]:
    server, port = start_server(service)
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


def test_predicts_images_of_any_size_as_the_export_does(address, export_dir, make_image):
    images = [make_image(37, 53), make_image(64, 40, index=1), make_image(37, 53, index=2)]
    predictor = Predictor(export_dir)
    with Client(address, "panoptic", dataset_info=export_dir) as client:
        predictions = client.predict(images)
    for image, prediction in zip(images, predictions, strict=True):
        expected = predictor(image)
        np.testing.assert_array_equal(prediction.panoptic, expected.panoptic)
        assert prediction.segments == expected.segments


def test_a_bad_image_is_refused_by_name(address, export_dir, make_image):
    with Client(address, "panoptic", dataset_info=export_dir) as client:
        good, bad = client.predict([make_image(16, 16), encode_png(make_image(16, 16))[:100]], names=["a.png", "b.png"])
        assert good.panoptic.shape == (16, 16)
        assert str(bad).startswith(f"'b.png' is refused by the model 'panoptic' at '{address}': ")
        assert not isinstance(bad, ServerError)


def test_no_such_model(address):
    with (
        Client(address, "panoptik", dataset_info=scenes_info()) as client,
        pytest.raises(
            UserError, match=rf"^There is no model 'panoptik' at '{address}': Servable not found for request"
        ),
    ):
        client(np.zeros((4, 4, 3), np.uint8))


def test_survives_a_restart_of_the_server(service, export_dir, make_image):
    image = make_image(16, 16)
    server, port = start_server(service)
    address = f"127.0.0.1:{port}"
    with Client(address, "panoptic", dataset_info=export_dir, retries=1) as client:
        expected = client(image).panoptic
        server.stop(None).wait()
        with pytest.raises(ServerError, match=rf"^The model 'panoptic' at '{address}' gave no answer, tried 2 times: "):
            client(image)
        client.retries = 20
        server, _ = start_server(service, port)
        np.testing.assert_array_equal(client(image).panoptic, expected)
    server.stop(None).wait()
