"""`deeplab2-like inspect`."""

import argparse
from pathlib import Path
from typing import Any

from deeplab2_like.cli.arguments import add_command, add_workers, positive_int


def add_parser(commands: Any) -> None:
    """Adds the command."""
    parser = add_command(
        commands, "inspect", run, "Show the content of a record folder: pictures, statistics, faults in the labels."
    )
    parser.add_argument("records", type=Path, metavar="RECORD_DIR", help="folder that convert wrote")
    parser.add_argument("--output-dir", type=Path, required=True, help="folder for pictures and statistics.json")
    parser.add_argument("--splits", nargs="+", metavar="SPLIT", help="splits to inspect (default: all)")
    parser.add_argument("--pictures", type=positive_int, default=16, help="pictures per split (default: %(default)s)")
    parser.add_argument(
        "--report",
        type=Path,
        metavar="FILE",
        help="also write everything as one HTML file; --output-dir is needed, too",
    )
    add_workers(parser, "number of records inspected at once")


def run(options: argparse.Namespace) -> None:
    """Inspects records; raises `UserError` if their labels have faults."""
    from deeplab2_like.data.dataset_info import DatasetInfo
    from deeplab2_like.data.shards import list_shards, list_splits
    from deeplab2_like.files import make_folder
    from deeplab2_like.inspection import inspect_records, print_inspection, raise_if_faulty
    from deeplab2_like.inspection_report import require_report_place, write_report
    from deeplab2_like.progress import progress_bar

    # Before the records are read, so that an error comes early; a wrong record folder leaves no output folder behind.
    DatasetInfo.load(options.records)
    for split in options.splits or list_splits(options.records):
        list_shards(options.records, split)
    if options.report is not None:
        require_report_place(options.report)
    make_folder(options.output_dir)
    with progress_bar("inspect") as progress:
        inspection = inspect_records(
            options.records,
            splits=options.splits,
            pictures=options.pictures,
            workers=options.workers,
            progress=progress,
        )
    inspection.save(options.output_dir)
    if options.report is not None:
        write_report(inspection, options.report, title=f"Records in {options.records}")
    print_inspection(inspection)
    print(f"Pictures and statistics.json are in {options.output_dir}")
    if options.report is not None:
        print(f"Report: {options.report}")
    advice = f"'{options.output_dir / 'statistics.json'}' lists them; fix the labels and convert again."
    raise_if_faulty(inspection, options.records, advice)
