"""Texts made from the schema: every key has a meaning, and the guides and annotated configs agree with the code."""

from pathlib import Path

import pytest

from deeplab2_like.configs import list_configs, load_config
from deeplab2_like.configs.reference import (
    annotate_config,
    list_config_summaries,
    undescribed_keys,
    write_key_tables,
)
from deeplab2_like.configs.schema import DataConfig, TrainerConfig
from deeplab2_like.configs.systems import SYSTEMS, find_config_class
from deeplab2_like.model.backbone import BACKBONES
from deeplab2_like.model.config import BackboneConfig

GUIDES = sorted((Path(__file__).resolve().parents[2] / "docs").glob("*.md"))


@pytest.mark.parametrize("system", SYSTEMS)
def test_every_key_of_a_system_has_a_description(system: str) -> None:
    assert undescribed_keys(find_config_class(system), "model") == []


def test_every_key_of_data_and_trainer_has_a_description() -> None:
    assert undescribed_keys(DataConfig, "data") == []
    assert undescribed_keys(TrainerConfig, "trainer") == []


def test_the_description_of_the_backbone_lists_all_names() -> None:
    description = BackboneConfig.model_fields["name"].description or ""
    assert all(f"`{name}`" in description for name in BACKBONES)


@pytest.mark.parametrize("guide", GUIDES, ids=lambda guide: guide.name)
def test_key_tables_of_the_guides_are_up_to_date(guide: Path) -> None:
    text = guide.read_text()
    assert write_key_tables(text) == text, "run: python -m deeplab2_like.configs.reference docs/*.md"


def test_each_section_has_its_table_in_the_guides() -> None:
    tables = {line for guide in GUIDES for line in guide.read_text().splitlines() if line.startswith("<!-- keys:")}
    systems = {f"<!-- keys: model of {system} -->" for system in SYSTEMS}
    assert tables == {"<!-- keys: data -->", "<!-- keys: trainer -->"} | systems


def test_a_stale_table_is_replaced_and_the_text_around_it_stays() -> None:
    text = "Before.\n\n<!-- keys: data -->\n| stale |\n<!-- end of keys -->\n\nAfter.\n"
    lines = write_key_tables(text).splitlines()
    assert lines[:4] == ["Before.", "", "<!-- keys: data -->", "| key | default | meaning |"]
    assert "| `data.crop_size` | required | Height and width of training crops, in pixels. |" in lines
    assert "| `data.train_split` | `train` | Split of the records to train on; `train+val` is both. |" in lines
    assert "| stale |" not in lines
    assert lines[-3:] == ["<!-- end of keys -->", "", "After."]


@pytest.mark.parametrize("name", list_configs())
def test_annotated_configs_load_back_equal(name: str, tmp_path: Path) -> None:
    path = tmp_path / "annotated.yaml"
    path.write_text(annotate_config(name))
    assert load_config(path) == load_config(name)


def test_summaries_list_every_config_once() -> None:
    summaries = list_config_summaries()
    assert [summary["name"] for summary in summaries] == list_configs()


@pytest.mark.parametrize("summary", list_config_summaries(), ids=lambda summary: summary["name"])
def test_the_first_line_of_a_config_is_its_summary(summary: dict[str, str]) -> None:
    assert 10 <= len(summary["summary"]) <= 98  # At most 100 characters in the file, with the "# " in front.
    assert not summary["summary"].startswith("#")
