"""The client against a server of HTTP that answers as TensorFlow Serving and MLServer do."""

import base64
import json
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest

from deeplab2_like.data.images import decode_image, encode_png
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.export import client as client_module
from deeplab2_like.export.client import Client, ServerError
from deeplab2_like.export.prediction import make_prediction

# Class 0 is sky, which is stuff, and 6002 the second person. What the fake servers predict, whatever the image.
PANOPTIC = np.array([[0, 0, 6002], [0, 255000, 6002]], np.int32)
SEGMENTS = {"segment_id": [6002, 0, 0], "segment_class": [6, 0, 0], "segment_score": [0.75, 0.5, 0.0]}
PIXELS = np.zeros((2, 3, 3), np.uint8)


class Server:
    """A server on a free port, whose answers `answer` gives from method, path and JSON: a status and JSON or bytes."""

    def __init__(self) -> None:
        self.answer: Callable[[str, str, dict | None], tuple[int, dict | bytes]] = lambda *_: (500, {})
        self.requests: list[tuple[str, str, dict | None]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self.reply("GET", None)

            def do_POST(self) -> None:
                self.reply("POST", json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

            def reply(self, method: str, content: dict | None) -> None:
                server.requests.append((method, self.path, content))
                status, body = server.answer(method, self.path, content)
                if status == 0:  # As a server that is killed.
                    self.connection.shutdown(socket.SHUT_RDWR)
                    self.close_connection = True
                    return
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.http.handle_error = lambda *_: None  # Connections that a test cuts.
        self.address = f"127.0.0.1:{self.http.server_address[1]}"
        self._thread = threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()

    def close(self) -> None:
        self.http.shutdown()
        self._thread.join()
        self.http.server_close()


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server()
    yield server
    server.close()


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "_FIRST_PAUSE", 0.001)


def _b64(content: bytes) -> str:
    return base64.b64encode(content).decode()


class Serving:
    """Answers like TensorFlow Serving with an export of this version, or an earlier one with `encoded` only."""

    def __init__(self, *, compact: bool = False) -> None:
        self.compact = compact
        self.status = ""
        self.images: list[bytes] = []

    def __call__(self, method: str, path: str, content: dict | None) -> tuple[int, dict | bytes]:
        names = ["serving_default", "encoded", *(["compact", "metadata"] if self.compact else [])]
        if method == "GET":
            assert path in ("/v1/models/panoptic/metadata", "/v1/models/panoptic/versions/3/metadata")
            signatures = {"signature_def": {"signature_def": {name: {} for name in names}}}
            return 200, {"model_spec": {"name": "panoptic"}, "metadata": signatures}
        assert path in ("/v1/models/panoptic:predict", "/v1/models/panoptic/versions/3:predict")
        if content["signature_name"] == "metadata":
            info = scenes_info().to_dict()
            values = {"classes": info["categories"], "step": 900}
            values |= {key: info[key] for key in ("label_divisor", "ignore_label")}
            return 200, {"outputs": {key: json.dumps(value) for key, value in values.items()}}
        assert content["signature_name"] == ("compact" if self.compact else "encoded")
        [image] = content["inputs"]["image_bytes"]
        self.images.append(base64.b64decode(image["b64"]))
        outputs = {key: [value] for key, value in SEGMENTS.items()}
        if self.compact:
            png = encode_png(ids_to_rgb(PANOPTIC), is_label=True)
            outputs |= {"panoptic_png_bytes": [{"b64": _b64(png)}], "status": [self.status]}
        else:
            outputs |= {"panoptic": [PANOPTIC.tolist()]}
        return 200, {"outputs": outputs}


class OpenInference:
    """Answers like `deeplab2-like serve`."""

    def __init__(self) -> None:
        self.status = ""
        self.images: list[bytes] = []

    def __call__(self, method: str, path: str, content: dict | None) -> tuple[int, dict | bytes]:
        if method == "GET":
            assert path in ("/v2/models/panoptic", "/v2/models/panoptic/versions/3")
            return 200, {"name": "panoptic", "parameters": {"dataset_info": json.dumps(scenes_info().to_dict())}}
        assert path in ("/v2/models/panoptic/infer", "/v2/models/panoptic/versions/3/infer")
        inputs = {tensor["name"]: tensor for tensor in content["inputs"]}
        self.images.append(base64.b64decode(inputs["image_bytes"]["data"][0]))
        png = encode_png(ids_to_rgb(PANOPTIC), is_label=True)
        base64_type = {"content_type": "base64"}
        return 200, {
            "outputs": [
                {"name": "status", "shape": [1], "datatype": "BYTES", "data": [self.status]},
                {"name": "panoptic_png_bytes", "shape": [1], "parameters": base64_type, "data": [_b64(png)]},
                {"name": "image_size", "shape": [1, 2], "data": [2, 3]},
                *({"name": key, "shape": [1, 3], "data": value} for key, value in SEGMENTS.items()),
            ]
        }


@pytest.fixture
def expected():
    # The last row of the table is unused.
    return make_prediction(PANOPTIC, {6002: 0.75, 0: 0.5}, scenes_info())


@pytest.mark.parametrize(
    ("protocol", "answer"),
    [("rest", Serving()), ("rest", Serving(compact=True)), ("v2", OpenInference())],
    ids=["encoded", "compact", "v2"],
)
@pytest.mark.parametrize("version", [None, 3])
def test_predicts(server, expected, tmp_path, protocol, answer, version):
    server.answer = answer
    info = None if protocol == "v2" or answer.compact else scenes_info()
    file = tmp_path / "photo.png"
    file.write_bytes(encode_png(PIXELS))
    answer.images.clear()
    with Client(server.address, "panoptic", protocol=protocol, version=version, dataset_info=info) as client:
        for image in (PIXELS, encode_png(PIXELS), file, str(file)):
            prediction = client(image)
            np.testing.assert_array_equal(prediction.panoptic, PANOPTIC)
            assert prediction.panoptic.dtype == np.int32
            assert prediction.segments == expected.segments
            assert prediction.dataset_info == scenes_info()
    # What arrives are image files with the same pixels.
    assert len(answer.images) == 4
    for content in answer.images:
        np.testing.assert_array_equal(decode_image(content, "image"), PIXELS)
    # Names of signatures and classes are asked for once.
    assert len({path for method, path, _ in server.requests if method == "GET"}) <= 2
    assert sum(method == "GET" for method, *_ in server.requests) <= 2


@pytest.mark.parametrize(("protocol", "answer"), [("rest", Serving(compact=True)), ("v2", OpenInference())])
def test_a_bad_image_is_refused_by_name_and_the_others_are_predicted(server, tmp_path, protocol, answer):
    def refuse_large(method, path, content):
        answer.status = "" if len(json.dumps(content or {})) < 1000 else "not a readable image"
        return answer(method, path, content)

    server.answer = refuse_large
    with Client(server.address, "panoptic", protocol=protocol) as client:
        name = f"'bad.jpg' is refused by the model 'panoptic' at '{server.address}': not a readable image"
        with pytest.raises(UserError, match=f"^{name}$"):
            client(b"x" * 1000, name="bad.jpg")
        good, bad, missing, last = client.predict([PIXELS, b"x" * 1000, tmp_path / "none.jpg", PIXELS], concurrency=1)
        np.testing.assert_array_equal(good.panoptic, PANOPTIC)
        np.testing.assert_array_equal(last.panoptic, PANOPTIC)
        assert str(bad).startswith("'image 2' is refused by the model 'panoptic'")
        assert "none.jpg' cannot be read" in str(missing)
        assert not isinstance(bad, ServerError)


def test_a_padded_map_is_cropped(server):
    padded = np.pad(PANOPTIC, ((0, 4), (0, 5)))

    def answer(method, path, content):
        status, body = Serving()(method, path, content)
        if method == "POST":
            body["outputs"] |= {"panoptic": [padded.tolist()], "image_size": [[2, 3]]}
        return status, body

    server.answer = answer
    with Client(server.address, "panoptic", protocol="rest", dataset_info=scenes_info()) as client:
        np.testing.assert_array_equal(client(PIXELS).panoptic, PANOPTIC)


@pytest.mark.parametrize(
    "failure", [(503, {"error": "busy"}), (0, b""), (502, b"<html>"), (429, {"error": "slow down"})]
)
@pytest.mark.parametrize(("protocol", "answer"), [("rest", Serving(compact=True)), ("v2", OpenInference())])
def test_tries_again(server, protocol, answer, failure):
    failures = iter([failure, failure])
    server.answer = lambda *request: next(failures, None) or answer(*request)
    with Client(server.address, "panoptic", protocol=protocol, retries=2) as client:
        np.testing.assert_array_equal(client(PIXELS).panoptic, PANOPTIC)
        assert next(failures, None) is None


def test_gives_up_after_the_retries(server):
    server.answer = lambda *_: (503, {"error": "The batch scheduling queue is full"})
    with (
        Client(server.address, "panoptic", protocol="v2", retries=3) as client,
        pytest.raises(
            ServerError,
            match=rf"^The model 'panoptic' at '{server.address}' gave no answer, tried 4 times: The batch scheduling "
            "queue is full; start the server, give another address, or allow a longer timeout or more retries.$",
        ),
    ):
        client(PIXELS)
    assert len(server.requests) == 4


@pytest.mark.parametrize("protocol", ["rest", "v2"])
def test_no_server(server, protocol):
    server.close()
    try:
        with (
            Client(server.address, "panoptic", protocol=protocol, retries=1) as client,
            pytest.raises(ServerError, match="gave no answer, tried 2 times: Connection refused; start the server"),
        ):
            client(PIXELS)
    finally:  # For the fixture, which closes it again.
        server.__init__()


def test_a_server_that_does_not_answer(server):
    stop = threading.Event()
    server.answer = lambda *_: (stop.wait(30) and 200, b"")
    with (
        Client(server.address, "panoptic", protocol="rest", dataset_info=scenes_info(), timeout=0.2) as client,
        pytest.raises(ServerError, match=r"gave no answer, tried once: no answer within 0.2 s; start"),
    ):
        client(PIXELS)
    stop.set()


@pytest.mark.parametrize(
    ("failure", "kind", "message"),
    [
        (
            (404, {"error": "Servable not found"}),
            UserError,
            "There is no model 'panoptic' at '.*': Servable not found; ",
        ),
        ((500, {"error": "out of memory"}), ServerError, "The model 'panoptic' at '.*' failed: out of memory.$"),
        ((500, b"<html>"), ServerError, "The model 'panoptic' at '.*' failed: HTTP status 500.$"),
        ((200, b"<html>"), ServerError, "failed: the answer is not JSON, so this may be another server.$"),
        ((200, {}), ServerError, "so this may be another server.$"),
        ((200, []), ServerError, "so this may be another server.$"),
        (
            (400, {"error": "wrong shape"}),
            UserError,
            "'photo.jpg' is refused by the model 'panoptic' at '.*': wrong shape$",
        ),
    ],
)
@pytest.mark.parametrize("protocol", ["rest", "v2"])
def test_errors_name_model_address_and_cause(server, protocol, failure, kind, message):
    serving = Serving(compact=True) if protocol == "rest" else OpenInference()
    server.answer = lambda method, *rest: serving(method, *rest) if method == "GET" else failure
    with (
        Client(server.address, "panoptic", protocol=protocol, dataset_info=scenes_info()) as client,
        pytest.raises(UserError, match=message) as caught,
    ):
        client(PIXELS, name="photo.jpg")
    assert type(caught.value) is kind
    assert sum(method == "POST" for method, *_ in server.requests) == 1


@pytest.mark.parametrize(("output", "name"), [("panoptic_png", "encoded"), ("panoptic_png_bytes", "compact")])
def test_uses_compact_over_rest_only_if_its_png_comes_as_base64(server, output, name):
    answer = Serving(compact=name == "compact")
    signatures = {"encoded": {}, "compact": {"outputs": {"status": {}, output: {}}}}
    server.answer = lambda method, *rest: (
        (200, {"metadata": {"signature_def": {"signature_def": signatures}}})
        if method == "GET"
        else answer(method, *rest)
    )
    with Client(server.address, "panoptic", protocol="rest", dataset_info=scenes_info()) as client:
        np.testing.assert_array_equal(client(PIXELS).panoptic, PANOPTIC)
    assert server.requests[-1][2]["signature_name"] == name


def test_a_model_that_does_not_tell_its_classes(server):
    server.answer = Serving()
    with (
        Client(server.address, "panoptic", protocol="rest") as client,
        pytest.raises(UserError, match="does not name its classes; give Client the argument dataset_info"),
    ):
        client(PIXELS)


def test_another_model(server):
    signatures = {"signature_def": {"signature_def": {"serving_default": {}}}}
    server.answer = lambda *_: (200, {"metadata": signatures})
    with (
        Client(server.address, "panoptic", protocol="rest", dataset_info=scenes_info()) as client,
        pytest.raises(UserError, match=r"no signature for image files \(compact or encoded\), but serving_default;"),
    ):
        client(PIXELS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"protocol": "soap"}, "Unknown protocol 'soap'. Known: grpc, rest, v2."),
        ({"timeout": 0}, "timeout must be above 0 and retries 0 or more, got 0 and 5."),
        (
            {"address": "http://localhost:8500"},
            "'http://localhost:8500' is not an address for gRPC; give host and port",
        ),
        (
            {"protocol": "rest", "tls": True},
            "'localhost:1' is not encrypted; over REST, tls=True needs an address with",
        ),
    ],
)
def test_wrong_arguments(arguments, message):
    with pytest.raises(UserError, match=message):
        Client(**{"address": "localhost:1", "model": "panoptic", **arguments})


def test_a_wrong_address():
    with (
        Client("http://:80:80", "panoptic", protocol="rest") as client,
        pytest.raises(UserError, match="'http://:80:80' cannot be called: "),
    ):
        client(PIXELS)


def test_grpc_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(UserError, match=r"needs the package tensorflow-serving-api, .* 'deeplab2-like\[serving\]'"):
        Client("localhost:8500", "panoptic")
