"""The table of the paper's rows in the guide of Panoptic FCN: every config with its overrides makes a system."""

import re
from pathlib import Path
from typing import NamedTuple

import pytest

from deeplab2_like.configs import load_config
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.model import build_system

_GUIDE = Path(__file__).resolve().parents[2] / "docs" / "panoptic_fcn.md"
_ROW = re.compile(r"^\| (?P<table>\d+) \| (?P<name>[^|]+) \| `(?P<config>\w+)` \|(?P<values>[^|]*)\|$", re.MULTILINE)


class Row(NamedTuple):
    """A row of the paper.

    Attributes:
        table: Number of the table.
        name: Its name in the guide.
        config: Name of a config in `panoptic_fcn/`.
        overrides: Its `--set` values.
    """

    table: int
    name: str
    config: str
    overrides: tuple[str, ...]


def read_rows() -> list[Row]:
    found = _ROW.finditer(_GUIDE.read_text())
    return [
        Row(int(row["table"]), row["name"], row["config"], tuple(re.findall("`([^`]+)`", row["values"])))
        for row in found
    ]


def test_every_table_of_the_paper_is_complete() -> None:
    rows = read_rows()
    # The rows about Panoptic FCN; in tables 10 to 13, the others are about other methods.
    expected = {1: 5, 2: 4, 3: 5, 4: 4, 5: 3, 6: 6, 7: 3, 8: 2, 9: 3, 10: 5, 11: 4, 12: 2, 13: 2, 14: 4}
    assert {table: sum(row.table == table for row in rows) for table in expected} == expected
    assert len(rows) == sum(expected.values())
    # Other rows of a table have other settings, except in Table 9, whose rows are commands.
    others = [row for row in rows if row.table != 9]
    assert len({(row.table, row.config, row.overrides) for row in others}) == len(others)


@pytest.mark.parametrize("config_and_overrides", sorted({row[2:] for row in read_rows()}), ids=str)
def test_each_row_builds(config_and_overrides: tuple[str, tuple[str, ...]]) -> None:
    name, overrides = config_and_overrides
    config = load_config(f"panoptic_fcn/{name}", overrides)
    system = build_system(config, scenes_info())
    assert system.config == config.model
