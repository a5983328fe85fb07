"""The converter of Ultralytics' data sets for segmentation, on small folders made here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data_sets import read_labels, write_image

from deeplab2_like.cli import main
from deeplab2_like.data.convert.losses import FAULTY
from deeplab2_like.data.convert.yolo_seg import convert_yolo_seg
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError

# Of an image of 2 x 4 pixels: its left half is a leaf, its lower right quarter a stem.
LEAF = "0 0 0 0.5 0 0.5 1 0 1\n"
STEM = "1 0.5 0.5 1 0.5 1.001 1 0.5 1\n"
PANOPTIC = [[1, 1, 255000, 255000], [1, 1, 1001, 1001]]


@pytest.fixture
def yolo(tmp_path: Path) -> dict[str, Any]:
    """Arguments for an image in train and another in val."""
    root = tmp_path / "leaves"
    for split in ("train", "val"):
        write_image(root / "images" / split / "a.png", np.zeros((2, 4, 3)))
        (root / "labels" / split).mkdir(parents=True)
        (root / "labels" / split / "a.txt").write_text(LEAF + STEM)
    (root / "data.yaml").write_text("path: .\ntrain: images/train\nval: images/val\nnames:\n  0: leaf\n  1: stem\n")
    return {"data": root / "data.yaml", "output_dir": tmp_path / "records"}


def test_splits_and_classes(yolo: dict[str, Any]) -> None:
    reports = convert_yolo_seg(**yolo)
    assert [(report.split, report.examples) for report in reports] == [("train", 1), ("val", 1)]
    assert read_labels(yolo["output_dir"], "val") == {"a.png": PANOPTIC}
    assert [c.name for c in DatasetInfo.load(yolo["output_dir"]).categories] == ["leaf", "stem"]


def test_stuff_background_and_images_without_objects(yolo: dict[str, Any]) -> None:
    write_image(yolo["data"].parent / "images" / "train" / "b.png", np.zeros((1, 2, 3)))
    (report,) = convert_yolo_seg(**yolo, split="train", stuff=["stem"], background="soil")
    assert read_labels(yolo["output_dir"]) == {"a.png": [[1, 1, 2000, 2000], [1, 1, 1000, 1000]], "b.png": [[2000] * 2]}
    assert "1 image without a text of polygons: taken as without objects." in report.notes


@pytest.mark.parametrize(
    "text",
    [
        # As Roboflow exports it, with folders train/images, which are not beside the folder of the YAML.
        "train: ../images/train\nval: ../images/val\nnames: [leaf, stem]\n",
        "path: /home/other/leaves\ntrain: images/train\nval: images\\val\nnames: [leaf, stem]\n",
        "path: ../leaves\ntrain: [images/train]\nval: val.txt\ntest: images/test\nnames: [leaf, stem]\n",
    ],
)
def test_paths_as_tools_write_them(yolo: dict[str, Any], text: str) -> None:
    yolo["data"].write_text(text)
    (yolo["data"].parent / "val.txt").write_text("./images/val/a.png\n")
    reports = convert_yolo_seg(**yolo)
    assert [report.split for report in reports] == ["train", "val"]
    assert list(read_labels(yolo["output_dir"], "val").values()) == [PANOPTIC]
    is_missing = "Warning: left out split 'test', because 'images/test' does not exist." in reports[0].notes
    assert is_missing == ("test:" in text)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("0 0.5 0.5 1 1", r"line 3 of '.*a\.txt' is a box, which does not say which pixels are meant; export polygons"),
        ("0 0 0 1 1 1 1 0", r"line 3 of '.*a\.txt' has 7 coordinates, but a polygon is x, y, \.\.\. of three points"),
        ("0 0 0 4 0 4 2", r"line 3 of '.*a\.txt' has a coordinate outside of 0 to 1, the shares of the image's width"),
        ("7 0 0 1 0 1 1", r"line 3 of '.*a\.txt' has class 7, but 'names' has 0, 1\."),
        ("leaf 0 0 1 0 1 1", r"line 3 of '.*a\.txt' is not a class and numbers; correct it\."),
    ],
)
def test_faulty_lines_are_named_or_left_out(yolo: dict[str, Any], line: str, message: str) -> None:
    (yolo["data"].parent / "labels" / "train" / "a.txt").write_text(f"{LEAF}{STEM}{line}\n")
    with pytest.raises(UserError, match=message):
        convert_yolo_seg(**yolo)
    train, _ = convert_yolo_seg(**yolo, on_error="skip-annotation")
    assert read_labels(yolo["output_dir"]) == {"a.png": PANOPTIC}
    assert len(train.skipped_annotations) == 1


def test_faults_of_the_yaml_are_named(yolo: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"data\.yaml' has no split 'test' \(found: train, val\); name one of them"):
        convert_yolo_seg(**yolo, split="test")
    for text, message in (
        ("train: images/train\n", r"data\.yaml' has no 'names'; list the class names there"),
        ("names: leaf\n", r"data\.yaml' has 'names: leaf'; it must be a list of class names, or map numbers"),
        ("names: [leaf\n", r"data\.yaml' is not a YAML file \(.*\); correct it"),
        ("- leaf\n", r"data\.yaml' has no keys and values; a YAML of Ultralytics has 'names'"),
        (
            "train: pictures\nnames: [leaf]\n",
            r"data\.yaml' has no split with images \(named: train; 'pictures' does not exist\); correct",
        ),
    ):
        yolo["data"].write_text(text)
        with pytest.raises(UserError, match=message):
            convert_yolo_seg(**yolo)
    yolo["data"].write_text("train: images\nnames: [leaf]\n")
    for text in yolo["data"].parent.rglob("a.txt"):
        text.unlink()
    with pytest.raises(UserError, match=r"No image of '.*data\.yaml' has a text of polygons; that of '.*a\.png' would"):
        convert_yolo_seg(**yolo)


def test_command(yolo: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--data", str(yolo["data"]), "--output-dir", str(yolo["output_dir"]), "--background", "soil"]
    assert main(["convert", "yolo-seg", *arguments]) == 0
    assert "Split 'val': 1 image, 0 skipped." in capsys.readouterr().out


def test_a_text_without_image_is_named(yolo: dict[str, Any]) -> None:
    labels = yolo["data"].parent / "labels" / "train"
    (labels / "classes.txt").write_text("leaf\nstem\n")
    convert_yolo_seg(**yolo)
    (labels / "b.txt").write_text(LEAF)
    with pytest.raises(UserError, match=r"images/train/b'"):
        convert_yolo_seg(**yolo)


def test_shared_images_are_named(yolo: dict[str, Any]) -> None:
    yolo["data"].write_text("train: images/train\nval: images/train\nnames: [leaf, stem]\n")
    notes = convert_yolo_seg(**yolo)[0].notes
    assert "Warning: splits 'train' and 'val' share 1 image, such as 'a.png'." in notes


def test_lost_polygons_are_counted_by_class(yolo: dict[str, Any]) -> None:
    (yolo["data"].parent / "labels" / "train" / "a.txt").write_text(LEAF + "1 0.5 0.5 1 1\n")
    report = convert_yolo_seg(**yolo, split="train", on_error="skip-annotation")[0]
    assert report.lost[FAULTY] == {"stem": (1, 0)}, report.lost
