"""`deeplab2-like describe`."""

import argparse
import json
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_config, image_size, positive_int
from deeplab2_like.files import require_no_folder

_DEFAULT_CLASSES = 19


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(commands, "describe", run, "Show parameters, multiply-adds and shapes of a system.")
    add_config(parser)
    parser.add_argument("--size", type=image_size, metavar="HxW", help="image size (default: the training crop)")
    parser.add_argument(
        "--classes",
        type=positive_int,
        help=f"number of made-up classes, instead of those of data.path (default without it: {_DEFAULT_CLASSES})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything as JSON, too")


def run(options: argparse.Namespace) -> None:
    """Describes the system of a config."""
    from deeplab2_like.configs import load_config

    # Wrong options are reported before Keras is imported, which takes seconds.
    if options.json is not None:
        require_no_folder(options.json, "JSON file")
    config = load_config(options.config, options.set)

    from deeplab2_like.data.dataset_info import DatasetInfo
    from deeplab2_like.files import write_atomically
    from deeplab2_like.model import build_system
    from deeplab2_like.model.describe import describe, print_description
    from deeplab2_like.temporary import remove_leftovers

    info = None
    if config.data.path is None or options.classes:
        num_classes = options.classes or _DEFAULT_CLASSES
        categories = [{"id": i, "name": f"class {i}", "isthing": i % 2} for i in range(num_classes)]
        info = DatasetInfo.from_coco_categories(categories, name="described")
    height, width = options.size or config.data.crop_size
    description = describe(build_system(config, info), height, width)
    print_description(description)
    if options.json is not None:
        remove_leftovers(options.json.parent, of=options.json.name)
        write_atomically(options.json, (json.dumps(description.to_dict(), indent=1) + "\n").encode())
