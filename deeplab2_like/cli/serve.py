"""`deeplab2-like serve`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_max_pixels, add_warmup_size, positive_int
from deeplab2_like.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "serve", run, "Serve an exported model with MLServer (Open Inference Protocol V2, REST and gRPC)."
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="EXPORTED_DIR",
        help="a version, or a folder of versions, of which the newest is served",
    )
    parser.add_argument("--name", help="name of the model (default: that of the folder, without the version)")
    parser.add_argument("--host", default="127.0.0.1", help="address; 0.0.0.0 for all networks (default: %(default)s)")
    parser.add_argument("--port", type=port, default=8080, help="port for REST (default: %(default)s)")
    parser.add_argument("--grpc-port", type=port, default=8081, help="port for gRPC (default: %(default)s)")
    parser.add_argument("--metrics-port", type=port, default=8082, help="port for /metrics (default: %(default)s)")
    parser.add_argument(
        "--max-batch-size",
        type=positive_int,
        default=8,
        help="largest number of images in a call of the model (default: %(default)s)",
    )
    parser.add_argument(
        "--max-batch-wait",
        type=milliseconds,
        default=0.0,
        metavar="MILLISECONDS",
        help="how long an incomplete batch waits for more images (default: 0, as images come while the model works)",
    )
    add_warmup_size(parser, "predict an image of this size before the ports open, so that the first request is quick")
    add_max_pixels(parser)


def port(text: str) -> int:
    """Parses the number of a port."""
    if not (text.isascii() and text.isdigit() and 0 < int(text) < 2**16):
        raise argparse.ArgumentTypeError(f"'{text}' is not a port, 1 to 65535")
    return int(text)


def milliseconds(text: str) -> float:
    """Parses a number of milliseconds, 0 to 60,000; returns seconds."""
    try:
        number = float(text)
    except ValueError:
        number = -1.0
    if not 0 <= number <= 60_000:
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of milliseconds, 0 to 60000")
    return number / 1000


def run(options: argparse.Namespace) -> None:
    """Serves an exported model until the process is told to stop."""
    try:
        import mlserver  # noqa: F401
    except ImportError as error:
        raise UserError(
            "`serve` needs the package mlserver, which is not installed; run: pip install 'deeplab2-like[mlserver]'"
        ) from error
    from deeplab2_like.export.server import Batching, serve

    serve(
        options.model,
        name=options.name,
        host=options.host,
        port=options.port,
        grpc_port=options.grpc_port,
        metrics_port=options.metrics_port,
        batching=Batching(max_size=options.max_batch_size, max_wait=options.max_batch_wait),
        warmup_sizes=options.warmup_size,
        announce=lambda text: print(text, flush=True),
    )
