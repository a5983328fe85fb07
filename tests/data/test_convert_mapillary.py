"""Mapillary Vistas in its official layout, made here from a few pixels and labels."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from deeplab2_like.cli import main
from deeplab2_like.data import pipeline
from deeplab2_like.data.convert.mapillary import convert_mapillary
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.shards import list_shards
from deeplab2_like.errors import UserError


def label(name: str, readable: str, *, instances: bool, evaluate: bool = True) -> dict[str, Any]:
    return {"name": name, "readable": readable, "instances": instances, "evaluate": evaluate, "color": [1, 2, 3]}


LABELS = [
    label("construction--flat--road", "Road", instances=False),
    label("void--unlabeled", "Unlabeled", instances=False, evaluate=False),
    label("object--vehicle--car", "Car", instances=True),
]
# Label * 256 + instance: road; two cars, the first of which is instance 0; unlabeled.
INSTANCES = np.array([[0, 512, 512], [0, 513, 256]], np.uint16)
# Road is class 0, Car class 1; instances count from 1.
PANOPTIC = [[0, 1001, 1001], [0, 1002, 255000]]


class Source:
    """The data set on disk; tests damage it before `convert`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "vistas"

    def add(self, config: str, instances: str, labels: list[dict[str, Any]] = LABELS) -> None:
        self.root.mkdir(exist_ok=True)
        (self.root / config).write_text(json.dumps({"labels": labels, "version": 1.2}))
        for split in ("training", "validation"):
            for part in ("images", instances):
                (self.root / split / part).mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(self.root / split / "images" / "a.jpg"), np.zeros((2, 3, 3), np.uint8))
            cv2.imwrite(str(self.root / split / instances / "a.png"), INSTANCES)

    def convert(self, **changes: Any) -> Any:
        return convert_mapillary(**({"root": self.root, "output_dir": self.folder / "records"} | changes))

    def info(self) -> DatasetInfo:
        return DatasetInfo.load(self.folder / "records")

    def labels(self, split: str) -> list[np.ndarray]:
        files = list_shards(self.folder / "records", split)
        dataset = pipeline.make_eval_dataset(files, dataset_info=self.info())
        return [example["panoptic"] for example in dataset.as_numpy_iterator()]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


# The layouts of the downloads of 1.2, and of 2.0, which holds both.
@pytest.mark.parametrize(
    ("config", "instances"),
    [
        ("config.json", "instances"),
        ("config_v1.2.json", "v1.2/instances"),
        ("config_v2.0.json", "v2.0/instances"),
    ],
)
def test_the_download_is_enough(source: Source, config: str, instances: str) -> None:
    source.add(config, instances)
    assert [(report.split, report.examples) for report in source.convert()] == [("train", 1), ("val", 1)]
    for split in ("train", "val"):
        np.testing.assert_array_equal(source.labels(split), [PANOPTIC])
    assert source.info().categories == (Category(0, "Road", False, (1, 2, 3)), Category(2, "Car", True, (1, 2, 3)))


def test_the_newest_version_is_taken_unless_one_is_named(source: Source) -> None:
    source.add("config_v1.2.json", "v1.2/instances")
    source.add("config_v2.0.json", "v2.0/instances", [*LABELS[:2], {**LABELS[2], "readable": "Vehicle"}])
    source.convert(splits=["val"])
    assert source.info().categories[1].name == "Vehicle"
    source.convert(splits=["val"], version="1.2", output_dir=source.folder / "other")
    assert DatasetInfo.load(source.folder / "other").categories[1].name == "Car"


def test_long_names_are_taken_if_readable_ones_are_alike(source: Source) -> None:
    source.add("config.json", "instances", [LABELS[0], LABELS[1], {**LABELS[2], "readable": "Road"}])
    source.convert()
    assert [c.name for c in source.info().categories] == ["construction--flat--road", "object--vehicle--car"]


def test_unknown_label_is_named(source: Source) -> None:
    source.add("config.json", "instances")
    cv2.imwrite(str(source.root / "training" / "instances" / "a.png"), np.full((2, 3), 768, np.uint16))
    message = (
        r"Image 'a\.jpg' of .*'.*a\.png' has the value 768, which is label 3; '.*config\.json' lists labels 0 to 2"
    )
    with pytest.raises(UserError, match=message):
        source.convert()


def test_unmatched_files_are_named(source: Source) -> None:
    source.add("config.json", "instances")
    (source.root / "training" / "images" / "a.jpg").rename(source.root / "training" / "images" / "b.jpg")
    cv2.imwrite(str(source.root / "training" / "images" / "c.jpg"), np.zeros((2, 3, 3), np.uint8))
    cv2.imwrite(str(source.root / "training" / "instances" / "c.png"), INSTANCES)
    (report,) = source.convert(splits=["train"], on_error="skip")
    assert report.examples == 1
    assert "Image 'a' " in report.skipped[0]
    assert "cannot be read (No such file" in report.skipped[0]
    assert "Image 'b.jpg' " in report.skipped[1]
    assert "the instance PNG" in report.skipped[1]


def test_what_is_no_download_is_named(source: Source) -> None:
    source.add("config.json", "instances")
    with pytest.raises(UserError, match=r"vistas' has no config of version 2\.0; give the folder of the download"):
        source.convert(version="2.0")
    with pytest.raises(UserError, match=r"Unknown split of Mapillary Vistas 'training'.*Known: train, val"):
        source.convert(splits=["training"])
    without_flag = {key: value for key, value in LABELS[0].items() if key != "evaluate"}
    (source.root / "config.json").write_text(json.dumps({"labels": [without_flag]}))
    with pytest.raises(UserError, match=r"config\.json' has no list 'labels' with color, evaluate, instances, name"):
        source.convert()
    (source.root / "config.json").write_text(json.dumps({"labels": [{**LABELS[0], "evaluate": "false"}]}))
    with pytest.raises(UserError, match=r"'instances' and 'evaluate' true or false"):
        source.convert()


def test_command(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    source.add("config_v1.2.json", "v1.2/instances")
    arguments = ["--root", source.root, "--output-dir", source.folder / "records", "--version", "1.2", "--max-side", 2]
    assert main([str(word) for word in ("convert", "mapillary", *arguments)]) == 0
    assert "Split 'val': 1 image, 0 skipped." in capsys.readouterr().out
    assert source.labels("val")[0].shape == (1, 2)
