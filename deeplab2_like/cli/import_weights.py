"""`deeplab2-like import-weights`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_overrides
from deeplab2_like.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "import-weights", run, "Turn a released checkpoint into a model folder, or list known ones."
    )
    parser.add_argument(
        "file",
        nargs="?",
        type=Path,
        metavar="FILE_OR_DIR",
        help="the checkpoint: a file, or the folder of a TensorFlow one",
    )
    parser.add_argument(
        "--list", action="store_true", help="list released checkpoints: PQ, size of the weights, config, address"
    )
    parser.add_argument(
        "--config", metavar="NAME_OR_FILE", help="a built-in config or a YAML file (default: that of the checkpoint)"
    )
    parser.add_argument(
        "--data-set",
        metavar="NAME_OR_FILE",
        help="classes of the checkpoint: coco, cityscapes, or a JSON file (default: those of the checkpoint)",
    )
    parser.add_argument("--output-dir", type=Path, metavar="MODEL_DIR", help="model folder to write")
    parser.add_argument(
        "--keep-initial",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATTERN",
        help="names in the checkpoint that are not loaded, with * for any text; for other classes, for example",
    )
    add_overrides(parser)


def run(options: argparse.Namespace) -> None:
    """Imports a checkpoint, or lists known ones."""
    if options.list:
        _print_released()
        return
    if options.file is None or options.output_dir is None:
        raise UserError("Give a checkpoint and --output-dir MODEL_DIR, or --list to see released checkpoints.")

    from deeplab2_like.weights.import_weights import MODEL_SOURCES, import_weights

    imported = import_weights(
        options.file,
        options.output_dir,
        config=options.config,
        data_set=options.data_set,
        keep_initial=options.keep_initial,
        overrides=options.set,
    )
    loaded, kept_initial, ignored = (len(names) for names in imported.assignment)
    print(f"{options.file}: {MODEL_SOURCES[imported.source].title}")
    print(f"Config: {imported.config} with {' '.join(imported.overrides) or 'no changes'}")
    print(f"Data set: {imported.data_set}")
    print(f"{loaded} arrays loaded, {kept_initial} variables kept initial, {ignored} arrays ignored.")
    print(f"Model folder: {options.output_dir}")


def _print_released() -> None:
    from deeplab2_like.weights.released import RELEASED

    rows = [("source", "model", "data set", "PQ", "weights", "config", "file")]
    for released in RELEASED:
        pq, size = f"{released.quality:.1f}", f"about {released.megabytes} MB"
        rows.append((released.source, released.model, released.data_set, pq, size, released.config, released.address))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
