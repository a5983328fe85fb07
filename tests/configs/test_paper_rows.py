"""The guides' tables from rows of a paper to configs: each row must load and build.

Such a table follows the line `<!-- rows of the paper -->`. Its columns are the row, the config in backticks, the
arguments of `--set` in backticks (empty for none), and optional notes. A row that the library does not have gives the
reason in place of the config, without backticks.
"""

import functools
import re
import shlex
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from deeplab2_like.configs import load_config
from deeplab2_like.configs.systems import SYSTEMS, find_config_class, find_system
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.known_datasets import CITYSCAPES, COCO_PANOPTIC

DOCS = Path(__file__).resolve().parents[2] / "docs"
MARKER = "<!-- rows of the paper -->"
COCO = DatasetInfo("coco", COCO_PANOPTIC, label_divisor=1000, ignore_label=255)
CITY = DatasetInfo("cityscapes", CITYSCAPES, label_divisor=1000, ignore_label=255)


class Row(NamedTuple):
    """A row of a paper's table."""

    guide: str
    name: str
    config: str
    overrides: tuple[str, ...]


def read_rows(guide: str, text: str) -> list[Row]:
    """Reads the rows of all marked tables of a guide; `config` is empty for a row that the library does not have."""
    rows = []
    for part in text.split(MARKER + "\n")[1:]:
        lines = part.splitlines()
        table = lines[: next((i for i, line in enumerate(lines) if not line.startswith("|")), len(lines))]
        assert len(table) > 2, f"{guide}: no table follows {MARKER}"
        for line in table[2:]:
            name, config, overrides = (cell.strip() for cell in line.split("|")[1:4])
            assert name, line
            assert config, line
            arguments = [argument for span in re.findall(r"`([^`]*)`", overrides) for argument in shlex.split(span)]
            assert bool(arguments) == bool(overrides), f"--set needs backticks: {line}"
            (config,) = re.findall(r"`([^`]*)`", config) or [""]
            rows.append(Row(guide, name, config, tuple(arguments)))
    return rows


ROWS = [row for path in sorted(DOCS.glob("*.md")) for row in read_rows(path.stem, path.read_text())]


@functools.cache
def build(system: str, data: str, model: str) -> None:
    """Builds a system from its `model` section, without variables."""
    settings = find_config_class(system).model_validate_json(model)
    find_system(system)(settings, CITY if data == "cityscapes" else COCO)


@pytest.mark.parametrize("row", [row for row in ROWS if row.config], ids=lambda row: f"{row.guide}: {row.name}")
def test_every_row_builds(row: Row) -> None:
    config = load_config(row.config, row.overrides)
    assert config.system == row.guide
    build(config.system, row.config.partition("/")[2].partition("_")[0], config.model.model_dump_json())


def test_no_row_is_listed_twice() -> None:
    names = [(row.guide, row.name) for row in ROWS]
    assert len(names) == len(set(names))


def test_every_guide_has_rows() -> None:
    assert {row.guide for row in ROWS} == set(SYSTEMS)


# Number of rows by table; those of other methods do not count.
@pytest.mark.parametrize(
    ("guide", "expected"),
    [
        (
            "panoptic_fcn",
            {1: 5, 2: 4, 3: 5, 4: 4, 5: 3, 6: 6, 7: 3, 8: 2, 9: 3, 10: 5, 11: 4, 12: 2, 13: 2, 14: 4},
        ),
        ("unifying", {1: 6}),
    ],
)
def test_tables_are_complete(guide: str, expected: dict[int, int]) -> None:
    names = [row.name for row in ROWS if row.guide == guide]
    assert {table: sum(name.startswith(f"{table}, ") for name in names) for table in expected} == expected


@pytest.mark.parametrize("name", ["a", "b", "c1", "c2", "d1", "d2"])
def test_models_of_the_unifying_paper(name: str) -> None:
    config: Any = load_config("unifying/cityscapes_resnet50" + ("" if name == "d2" else f"_{name}")).model
    assert config.panoptic.masks == (name not in "ab")
    assert config.panoptic.affinity == config.loss.matching == (name in ("b", "d1", "d2"))
    assert config.postprocess.merge == ("heuristic" if name in ("c1", "d1") else "argmax")


def test_a_table_is_read() -> None:
    text = f"""
| not | `this` | |
{MARKER}
| row | config | `--set` | notes |
|---|---|---|---|
| 1, first | `lpsnet/nuclei` | | `evaluate --flip` |
| 1, second | `lpsnet/nuclei` | `'data.crop_size=[64, 64]' trainer.steps=5`, `model.box.positives=box` | |
| 1, third | no such backbone | |

| not | `this` | |
"""
    assert read_rows("guide", text) == [
        Row("guide", "1, first", "lpsnet/nuclei", ()),
        Row(
            "guide",
            "1, second",
            "lpsnet/nuclei",
            ("data.crop_size=[64, 64]", "trainer.steps=5", "model.box.positives=box"),
        ),
        Row("guide", "1, third", "", ()),
    ]
