"""`deeplab2-like serve` with the real MLServer, on the loopback interface; `make test-servers` runs this file.

It is no `test_` file, because MLServer has an environment of its own. One server runs for all tests. Its model stands
for an export: class 1 is where red is above 100.
"""

import base64
import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
import requests
import tensorflow as tf
from mlserver.grpc import dataplane_pb2, dataplane_pb2_grpc

from deeplab2_like.data.images import decode_image, encode_png
from deeplab2_like.data.panoptic_label import rgb_to_ids
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.export.client import Client, ServerError

REPOSITORY = Path(__file__).resolve().parents[2]


def _ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


def _start(export_dir: Path, ports: list[int], log: Path, *options: str) -> subprocess.Popen[bytes]:
    names = ("--port", "--grpc-port", "--metrics-port")
    command = [sys.executable, "-m", "deeplab2_like", "serve", "--model", str(export_dir), *options]
    for name, port in zip(names, ports, strict=True):
        command += [name, str(port)]
    with log.open("wb") as file:
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "-1"}
        return subprocess.Popen(command, stdout=file, stderr=file, cwd=REPOSITORY, env=environment)


@pytest.fixture(scope="module")
def export_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    module = tf.Module()

    @tf.function(input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")])
    def infer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        rows = tf.shape(images)[0]
        return {
            "panoptic": tf.where(images[..., 0] > 100, 1000, 0),
            "segment_id": tf.tile([[1000, 0]], [rows, 1]),
            "segment_class": tf.tile([[1, 0]], [rows, 1]),
            "segment_score": tf.tile([[0.5, 0.25]], [rows, 1]),
        }

    folder = tmp_path_factory.mktemp("models") / "panoptic" / "7"
    tf.saved_model.save(module, str(folder), signatures={"serving_default": infer})
    scenes_info().save(folder)
    return folder.parent


@pytest.fixture(scope="module")
def ports(export_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[int]]:
    """The ports of a running server: REST, gRPC and metrics. It batches whatever comes within a tenth of a second."""
    ports = _ports(3)
    log = tmp_path_factory.mktemp("log") / "serve.log"
    process = _start(
        export_dir, ports, log, "--max-batch-wait", "100", "--max-pixels", "1000000", "--warmup-size", "8x8"
    )
    try:
        for _ in range(600):
            with contextlib.suppress(requests.ConnectionError):
                if requests.get(f"http://127.0.0.1:{ports[0]}/v2/health/ready", timeout=5).status_code == 200:
                    break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield ports
    finally:
        process.terminate()
        assert process.wait(timeout=30) == 0, log.read_text()
    text = log.read_text()
    assert "Traceback" not in text, text
    assert (
        f"Model 'panoptic' is at http://127.0.0.1:{ports[0]}/v2/models/panoptic, gRPC at 127.0.0.1:{ports[1]}" in text
    )


@pytest.fixture
def client(ports: list[int]) -> Iterator[Client]:
    with Client(f"127.0.0.1:{ports[0]}", "panoptic", protocol="v2") as client:
        yield client


def _row_image(height: int, width: int, row: int) -> np.ndarray:
    """Black, with one red row, so that each map tells whose it is."""
    image = np.zeros((height, width, 3), np.uint8)
    image[row, :, 0] = 255
    return image


def _row_map(height: int, width: int, row: int) -> np.ndarray:
    panoptic = np.zeros((height, width), np.int32)
    panoptic[row] = 1000
    return panoptic


def _infer(ports: list[int], inputs: list[dict], **more: object) -> requests.Response:
    url = f"http://127.0.0.1:{ports[0]}/v2/models/panoptic/infer"
    return requests.post(url, json={"inputs": inputs, **more}, timeout=30)


def _image_input(contents: list[bytes]) -> dict:
    data = [base64.b64encode(content).decode() for content in contents]
    return {"name": "image_bytes", "datatype": "BYTES", "shape": [len(data)], "data": data}


def test_health_and_description(ports: list[int], client: Client) -> None:
    address = f"http://127.0.0.1:{ports[0]}/v2"
    for path in ("health/live", "health/ready", "models/panoptic/ready", "models/panoptic/versions/7/ready"):
        assert requests.get(f"{address}/{path}", timeout=5).status_code == 200, path
    described = requests.get(f"{address}/models/panoptic", timeout=5).json()
    assert (described["name"], described["versions"]) == ("panoptic", ["7"])
    assert [tensor["name"] for tensor in described["inputs"]] == ["image_bytes", "image_name"]
    assert client.dataset_info == scenes_info()


def test_many_clients_with_good_and_bad_images_of_several_sizes(client: Client, ports: list[int]) -> None:
    cases = [(4 + index % 5, 6 + index % 3, index % 4) for index in range(200)]
    images = [
        b"" if index % 10 == 3 else encode_png(_row_image(*case))[: 60 if index % 10 == 7 else None]
        for index, case in enumerate(cases)
    ]
    names = [f"photo_{index}.png" for index in range(len(images))]
    results = client.predict(images, names=names, concurrency=16)
    for index, (case, result) in enumerate(zip(cases, results, strict=True)):
        if index % 10 in (3, 7):
            assert re.match(rf"'photo_{index}.png' is refused by .* is not a readable image", str(result)), result
            assert not isinstance(result, ServerError)
        else:
            np.testing.assert_array_equal(result.panoptic, _row_map(*case))
    metrics = requests.get(f"http://127.0.0.1:{ports[2]}/metrics", timeout=5).text
    assert re.search(r'panoptic_images_total{model="panoptic",result="refused"} (4\d|[5-9]\d)\.0', metrics)
    batches = float(re.search(r'panoptic_batch_size_count{model="panoptic"} (\S+)', metrics)[1])
    images_in_batches = float(re.search(r'panoptic_batch_size_sum{model="panoptic"} (\S+)', metrics)[1])
    assert images_in_batches > 1.5 * batches
    assert 'model_infer_request_success_total{model="panoptic"' in metrics


def test_several_images_in_a_request(ports: list[int]) -> None:
    contents = [encode_png(_row_image(4, 6, 1)), b"nothing", encode_png(_row_image(5, 3, 2))]
    names = {"name": "image_name", "datatype": "BYTES", "shape": [3], "data": ["a.png", "b.png", "c.png"]}
    answer = _infer(ports, [_image_input(contents), names]).json()
    outputs = {output["name"]: output for output in answer["outputs"]}
    assert outputs["status"]["data"][::2] == ["", ""]
    assert outputs["status"]["data"][1].startswith("'b.png' is not a readable image")
    assert outputs["image_size"]["shape"] == [3, 2]
    assert outputs["image_size"]["data"] == [4, 6, 0, 0, 5, 3]
    # The table of the bad image is padded to the length of the others.
    assert outputs["segment_id"]["shape"] == [3, 2]
    assert outputs["segment_id"]["data"] == [1000, 0, 0, 0, 1000, 0]
    pngs = [base64.b64decode(text) for text in outputs["panoptic_png_bytes"]["data"]]
    assert pngs[1] == b""
    np.testing.assert_array_equal(rgb_to_ids(decode_image(pngs[2], "map").astype(np.int32)), _row_map(5, 3, 2))


def test_only_some_outputs(ports: list[int]) -> None:
    answer = _infer(ports, [_image_input([encode_png(_row_image(4, 6, 1))])], outputs=[{"name": "segment_score"}])
    [output] = answer.json()["outputs"]
    assert (output["name"], output["data"]) == ("segment_score", [0.5, 0.25])


@pytest.mark.parametrize(
    ("inputs", "more", "message"),
    [
        ([], {}, "The inputs are image_bytes and, optionally, image_name, but the request has: none."),
        ([{**_image_input([b"a"]), "name": "images"}], {}, "but the request has: images."),
        ([{**_image_input([b"a"]), "shape": [5]}], {}, r"has 1 values, but its shape is \[5\] instead of \[1\]."),
        ([{**_image_input([b"a"]), "datatype": "UINT8"}], {}, "Input image_bytes must be BYTES, but is UINT8."),
        ([{**_image_input([b"a"]), "data": [[1]]}], {}, "must be a flat list of texts, in base64 if they are files."),
        ([_image_input([b"a"])], {"outputs": [{"name": "map"}]}, "There is no output 'map'; the outputs are status,"),
        (
            [_image_input([b"a"]), {"name": "image_name", "datatype": "BYTES", "shape": [2], "data": ["a", "b"]}],
            {},
            "image_name has 2 values, but image_bytes has 1; give one per image.",
        ),
    ],
)
def test_wrong_requests_fail_alone(ports: list[int], client: Client, inputs: list, more: dict, message: str) -> None:
    images = [_row_image(4, 6, row) for row in range(4)]
    results: list = []
    others = threading.Thread(target=lambda: results.extend(client.predict(images)))
    others.start()
    answer = _infer(ports, inputs, **more)
    others.join()
    assert answer.status_code == 400
    assert re.search(message, answer.json()["error"])
    for row, result in enumerate(results):
        np.testing.assert_array_equal(result.panoptic, _row_map(4, 6, row))


def test_grpc(ports: list[int]) -> None:
    with grpc.insecure_channel(f"127.0.0.1:{ports[1]}") as channel:
        service = dataplane_pb2_grpc.GRPCInferenceServiceStub(channel)
        assert service.ServerReady(dataplane_pb2.ServerReadyRequest(), timeout=5).ready
        contents = dataplane_pb2.InferTensorContents(bytes_contents=[encode_png(_row_image(4, 6, 2)), b"nothing"])
        tensor = dataplane_pb2.ModelInferRequest.InferInputTensor(
            name="image_bytes", datatype="BYTES", shape=[2], contents=contents
        )
        request = dataplane_pb2.ModelInferRequest(model_name="panoptic", inputs=[tensor])
        outputs = {output.name: output.contents for output in service.ModelInfer(request, timeout=30).outputs}
        # Bytes as they are, without base64.
        good, bad = outputs["panoptic_png_bytes"].bytes_contents
        np.testing.assert_array_equal(rgb_to_ids(decode_image(good, "map").astype(np.int32)), _row_map(4, 6, 2))
        assert bad == b""
        assert outputs["status"].bytes_contents[1].startswith(b"'image 2' is not a readable image")
        tensor.shape[:] = [7]
        with pytest.raises(grpc.RpcError) as caught:
            service.ModelInfer(dataplane_pb2.ModelInferRequest(model_name="panoptic", inputs=[tensor]), timeout=30)
        assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT


def test_images_above_the_limit_and_large_ones(client: Client) -> None:
    with pytest.raises(UserError, match=r"'big.png' is refused by .*1,?000,?000"):
        client(np.zeros((1001, 1000, 3), np.uint8), name="big.png")
    # The content is more than the 4 MB that gRPC and some servers allow by default.
    noise = np.random.default_rng(0).integers(0, 256, (1000, 1000, 3), np.uint8)
    np.testing.assert_array_equal(client(noise).panoptic, np.where(noise[..., 0] > 100, 1000, 0))


@pytest.mark.parametrize(
    ("folder", "message"),
    [("missing", "Exported model '.*missing' does not exist"), ("damaged", "The exported model '.*' is damaged")],
)
def test_no_export(tmp_path: Path, folder: str, message: str) -> None:
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "saved_model.pb").write_bytes(b"nothing")
    scenes_info().save(tmp_path / "damaged")
    process = _start(tmp_path / folder, _ports(3), tmp_path / "log")
    assert process.wait(timeout=60) == 2
    assert re.search(rf"^deeplab2-like: {message}", (tmp_path / "log").read_text(), re.MULTILINE)


def test_a_port_that_is_taken(ports: list[int], export_dir: Path, tmp_path: Path) -> None:
    free = _ports(2)
    process = _start(export_dir, [free[0], ports[1], free[1]], tmp_path / "log")
    assert process.wait(timeout=60) == 2
    message = rf"deeplab2-like: Cannot listen at 127.0.0.1:{ports[1]} \(.*\); choose another port or host."
    assert re.search(message, (tmp_path / "log").read_text())


def test_ends_at_ctrl_c(export_dir: Path, tmp_path: Path) -> None:
    ports = _ports(3)
    process = _start(export_dir, ports, tmp_path / "log")
    with Client(f"127.0.0.1:{ports[0]}", "panoptic", protocol="v2", retries=100) as client:
        client(_row_image(4, 6, 2))
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) in (0, 130), (tmp_path / "log").read_text()
