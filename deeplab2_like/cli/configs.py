"""`deeplab2-like configs`."""

import argparse
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_overrides
from deeplab2_like.errors import UserError


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "configs", run, "List the built-in configs, or show one in full with the meaning of each key."
    )
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME_OR_FILE",
        help="config to show: a built-in one or a YAML file (default: list the built-in ones)",
    )
    add_overrides(parser)


def run(options: argparse.Namespace) -> None:
    """Lists configs, or prints one as annotated YAML."""
    from deeplab2_like.configs.reference import annotate_config, list_config_summaries

    if options.name is not None:
        print(annotate_config(options.name, options.set), end="")
        return
    if options.set:
        raise UserError("--set changes the keys of one config; give its name, too.")
    summaries = list_config_summaries()
    widths = {key: max(len(summary[key]) for summary in summaries) for key in ("name", "backbone", "machine")}
    for summary in summaries:
        columns = [summary[key].ljust(width) for key, width in widths.items()]
        print("  ".join([*columns, summary["summary"]]))
