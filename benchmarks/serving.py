"""How a server of an export answers many clients, and whether it survives being killed.

Clients send files of good images, of several sizes and formats, and of bad ones, in random order. Every prediction is
compared with that of `Predictor` in this process, every bad file must be refused by its name. With `--kills`, the
server is ended by SIGKILL when a share of the requests is answered, and started again at once; the clients try again.

The table has the latency that a client sees (median and 99 %), with bad files, predictions per second, and the memory
of the server (resident, at the end and at most). `wrong` counts predictions that differ and refusals of good files or
without the name, `lost` requests that ended with an error of the connection, `hung` those without an end.

`--server mlserver` runs `deeplab2-like serve`, `tensorflow-serving` the service of the tests with that interface, which
batches like TensorFlow Serving (`--max-batch-size`). Both run on the Python of this script. For a server that runs
already, give `--address` and `--protocol`.

    python benchmarks/serving.py --model models/panoptic --server mlserver [--requests 1000] [--clients 16]
        [--kills 1] [--json FILE]
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import numpy as np
from rich.console import Console
from rich.table import Table

from deeplab2_like.data.images import decode_image, encode_jpeg, encode_png
from deeplab2_like.data.scenes import render_scene
from deeplab2_like.errors import UserError
from deeplab2_like.export.client import Client, ServerError
from deeplab2_like.export.prediction import PanopticPrediction
from deeplab2_like.export.predictor import Predictor, find_export
from deeplab2_like.files import write_atomically

ROOT = Path(__file__).resolve().parents[1]
NAME = "benchmarked"
PROTOCOLS = {"mlserver": "v2", "tensorflow-serving": "grpc"}
# A client waits this long for an answer, and a request that takes longer than twice as long has hung.
TIMEOUT = 120.0


@dataclasses.dataclass(frozen=True)
class Example:
    """A file to send; `expected` is None if it is bad."""

    name: str
    content: bytes
    expected: PanopticPrediction | None


def make_examples(predictor: Predictor, sizes: list[tuple[int, int]], number: int) -> list[Example]:
    """Makes good files, and a bad one for every four of them."""
    examples = []
    for index in range(number):
        height, width = sizes[index % len(sizes)]
        image = render_scene(index, height=height, width=width)[0]
        content = encode_jpeg(image) if index % 2 else encode_png(image)
        suffix = "jpg" if index % 2 else "png"
        expected = predictor(decode_image(content, "image"))
        examples.append(Example(f"good_{index}.{suffix}", content, expected))
    good = examples[1].content
    bad = {
        "cut.jpg": good[: len(good) // 2],
        "cut.png": examples[0].content[:200],
        "empty.jpg": b"",
        "text.jpg": b"This is no image.",
        "page.html": b"<html><body>404</body></html>",
        "zeros.png": b"\x89PNG\r\n\x1a\n" + bytes(500),
    }
    names = list(bad)
    return examples + [Example(names[i % len(names)], bad[names[i % len(names)]], None) for i in range(number // 4)]


class Server:
    """A server process that can be killed and started again on the same ports."""

    def __init__(self, command: list[str], address: str, log: Path) -> None:
        host, _, port = address.partition(":")
        self._command, self._log = command, log
        self.address = host, int(port)
        self.process: subprocess.Popen[bytes] | None = None
        self.peak_memory = 0.0

    def start(self) -> None:
        """Starts the process; does not wait until it answers."""
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, cwd=ROOT, env=environment())

    def wait(self) -> None:
        """Waits until the process listens, and stops this program if it ends instead."""
        assert self.process is not None
        while self.process.poll() is None:
            with contextlib.suppress(OSError), socket.create_connection(self.address):
                return
            time.sleep(0.2)
        sys.exit(f"The server ended with status {self.process.returncode}; see {self._log}.")

    def kill(self) -> None:
        """Ends the process by SIGKILL."""
        assert self.process is not None
        self.memory()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def memory(self) -> float:
        """Resident memory in MB; 0 where there is no /proc. Keeps the peak."""
        assert self.process is not None
        status = Path(f"/proc/{self.process.pid}/status")
        if not status.is_file() or self.process.poll() is not None:
            return 0.0
        values = dict(line.split(":", 1) for line in status.read_text().splitlines())
        self.peak_memory = max(self.peak_memory, int(values["VmHWM"].split()[0]) / 1000)
        return int(values["VmRSS"].split()[0]) / 1000


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}


def free_ports(number: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(number)]
        return [each.getsockname()[1] for each in sockets]


def server_command(kind: str, folder: Path, max_batch_size: int) -> tuple[list[str], str]:
    """Returns the command of a server, and its address."""
    port, grpc_port, metrics_port = free_ports(3)
    if kind == "mlserver":
        command = ["-m", "deeplab2_like", "serve", "--model", str(folder), "--name", NAME, "--port", str(port)]
        command += ["--grpc-port", str(grpc_port), "--metrics-port", str(metrics_port)]
    else:
        command = ["tests/export/prediction_service.py", str(folder), "--name", NAME, "--port", str(port)]
    command += ["--max-batch-size", str(max_batch_size)]
    return [sys.executable, *command], f"127.0.0.1:{port}"


@contextlib.contextmanager
def running(options: argparse.Namespace, folder: Path) -> Iterator[tuple[Server | None, str, str]]:
    """Runs the server that the options ask for; yields it, its address and its protocol."""
    if options.address is not None:
        yield None, options.address, options.protocol
        return
    command, address = server_command(options.server, folder, options.max_batch_size)
    server = Server(command, address, options.log)
    server.start()
    try:
        server.wait()
        yield server, address, PROTOCOLS[options.server]
    finally:
        server.kill()


def judge(example: Example, result: PanopticPrediction | UserError) -> str:
    """Names the outcome of a request."""
    if isinstance(result, ServerError):
        return "lost"
    if isinstance(result, UserError):
        return "refused by name" if example.expected is None and f"'{example.name}'" in str(result) else "wrong"
    if example.expected is None:
        return "wrong"
    same = np.array_equal(result.panoptic, example.expected.panoptic)
    return "right" if same and result.segments == example.expected.segments else "wrong"


def load(client: Client, examples: list[Example], options: argparse.Namespace, server: Server | None) -> dict[str, Any]:
    """Sends the requests; returns the figures of the table."""
    order = random.Random(0).choices(examples, k=options.requests)
    kills = [options.requests * (index + 1) // (options.kills + 1) for index in range(options.kills)]
    lock, outcomes, latencies, done = threading.Lock(), Counter[str](), [], 0
    errors: list[str] = []

    def call(example: Example) -> None:
        nonlocal done
        start = time.perf_counter()
        result: PanopticPrediction | UserError
        try:
            result = client(example.content, name=example.name)
        except UserError as error:
            result = error
        seconds = time.perf_counter() - start
        outcome = judge(example, result)
        with lock:
            outcomes[outcome] += 1
            latencies.append(seconds)
            if outcome in ("wrong", "lost"):
                errors.append(f"{example.name}: {outcome}: {result}")
            done += 1
            if server is not None and done in kills:
                server.kill()
                server.start()

    start = time.perf_counter()
    pool = concurrent.futures.ThreadPoolExecutor(max_workers=options.clients)
    futures = [pool.submit(call, example) for example in order]
    limit = 2 * TIMEOUT + options.requests  # At least one request per second.
    _, unfinished = concurrent.futures.wait(futures, timeout=limit)
    seconds = time.perf_counter() - start
    for future in futures:
        if future.done():
            future.result()  # Raises what should not happen.
    pool.shutdown(wait=False, cancel_futures=True)
    for error in errors[:5]:
        print(error)
    return {
        "requests": options.requests,
        "kills": options.kills,
        "right": outcomes["right"],
        "refused by name": outcomes["refused by name"],
        "wrong": outcomes["wrong"],
        "lost": outcomes["lost"],
        "hung": len(unfinished),
        "p50 ms": 1000 * float(np.percentile(latencies, 50)),
        "p99 ms": 1000 * float(np.percentile(latencies, 99)),
        "longest s": max(latencies),
        "images/s": outcomes["right"] / seconds,
        "memory MB": 0.0 if server is None else server.memory(),
        "peak MB": 0.0 if server is None else server.peak_memory,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="the export, or its folder of versions")
    parser.add_argument("--server", choices=PROTOCOLS, default="mlserver")
    parser.add_argument("--address", help="a server that runs already, with a model named 'benchmarked'")
    parser.add_argument("--protocol", choices=("grpc", "rest", "v2"), default="grpc", help="that of --address")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--kills", type=int, default=0)
    parser.add_argument("--max-batch-size", type=int, default=8)
    parser.add_argument("--sizes", nargs="+", default=["128x192", "97x131", "256x256"], help="default: %(default)s")
    parser.add_argument("--log", type=Path, default=Path(os.devnull), help="file for the output of the server")
    parser.add_argument("--json", type=Path, metavar="FILE")
    options = parser.parse_args()
    sizes = [(int(size.split("x")[0]), int(size.split("x")[1])) for size in options.sizes]

    folder = find_export(options.model)
    predictor = Predictor(folder)
    examples = make_examples(predictor, sizes, number=40)
    with (
        running(options, folder) as (server, address, protocol),
        Client(
            address,
            NAME,
            protocol=protocol,
            dataset_info=predictor.dataset_info,
            timeout=TIMEOUT,
            retries=1000,
        ) as client,
    ):
        for example in examples[: 2 * len(sizes)]:  # Until the server is up, and has seen every size.
            client(example.content)
        figures = load(client, examples, options, server)
    table = Table(title=f"{options.address or options.server}, {options.clients} clients", title_justify="left")
    for name in figures:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.1f}" if isinstance(value, float) else str(value) for value in figures.values()))
    Console(width=160).print(table)
    if options.json is not None:
        write_atomically(options.json, (json.dumps(figures, indent=1) + "\n").encode())
    if figures["hung"]:
        os._exit(1)  # The threads that hang would keep the process.


if __name__ == "__main__":
    main()
