"""Every converter's second run: nothing is done, and one changed label makes its split anew."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from deeplab2_like.cli import main

HEIGHT, WIDTH = 2, 4


def write_png(path: Path, values: Any) -> None:
    """Writes gray values [H, W], 8 or 16 bits, or colors [H, W, 3] (blue, green, red)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cv2.imwrite(str(path), np.asarray(values))


def write_image(path: Path) -> None:
    write_png(path, np.zeros((HEIGHT, WIDTH, 3), np.uint8))


def gray(value: int, kind: type = np.uint8) -> np.ndarray:
    return np.full((HEIGHT, WIDTH), value, kind)


def colors(blue: int, green: int, red: int) -> np.ndarray:
    return np.full((HEIGHT, WIDTH, 3), (blue, green, red), np.uint8)


# Each writes a data set of one image, and returns the words of the command and the label of the image.


def cityscapes(root: Path) -> tuple[list[str], Path]:
    write_image(root / "leftImg8bit" / "train" / "ulm" / "ulm_0_1_leftImg8bit.png")
    label = root / "gtFine" / "train" / "ulm" / "ulm_0_1_gtFine_instanceIds.png"
    write_png(label, gray(26001, np.uint16))
    return ["cityscapes", "--root", str(root), "--splits", "train"], label


def mapillary(root: Path) -> tuple[list[str], Path]:
    car = {"name": "object--car", "readable": "Car", "instances": True, "evaluate": True, "color": [1, 2, 3]}
    write_image(root / "training" / "images" / "a.jpg")
    (root / "config.json").write_text(json.dumps({"labels": [car]}))
    label = root / "training" / "instances" / "a.png"
    write_png(label, gray(1, np.uint16))
    return ["mapillary", "--root", str(root), "--splits", "train"], label


def ade20k(root: Path) -> tuple[list[str], Path]:
    write_image(root / "images" / "training" / "a.png")
    write_png(root / "annotations" / "training" / "a.png", gray(1))
    label = root / "annotations_instance" / "training" / "a.png"
    write_png(label, colors(0, 1, 1))
    return ["ade20k", "--root", str(root), "--splits", "train"], label


def coco_instances(root: Path) -> tuple[list[str], Path]:
    write_image(root / "images" / "a.png")
    label = root / "stuff" / "a.png"
    write_png(label, gray(7))
    (root / "classes.txt").write_text("7 road\n")
    content = {
        "images": [{"id": 1, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": [[0, 0, 2, 0, 2, 2, 0, 2]]}],
        "categories": [{"id": 1, "name": "car"}],
    }
    (root / "train.json").write_text(json.dumps(content))
    words = ["coco-instances", "--images", "images", "--json", "train.json", "--stuff-pngs", "stuff"]
    words = [str(root / word) if (root / word).exists() else word for word in words]
    return [*words, "--stuff-classes", str(root / "classes.txt")], label


def labelme(root: Path) -> tuple[list[str], Path]:
    write_image(root / "a.png")
    label = root / "a.json"
    shape = {"label": "car", "points": [[0, 0], [2, 0], [2, 2], [0, 2]], "shape_type": "polygon"}
    content = {"shapes": [shape], "imagePath": "a.png", "imageHeight": HEIGHT, "imageWidth": WIDTH}
    label.write_text(json.dumps(content))
    return ["labelme", "--root", str(root), "--split", "train"], label


def cvat_masks(root: Path) -> tuple[list[str], Path]:
    write_image(root / "JPEGImages" / "a.png")
    write_png(root / "SegmentationClass" / "a.png", colors(0, 0, 255))
    label = root / "SegmentationObject" / "a.png"
    write_png(label, colors(0, 0, 9))
    (root / "labelmap.txt").write_text("car:255,0,0::\n")
    return ["cvat-masks", "--root", str(root), "--split", "train"], label


def semantic_pngs(root: Path) -> tuple[list[str], Path]:
    write_image(root / "images" / "a.jpg")
    label = root / "labels" / "a.png"
    write_png(label, gray(0))
    (root / "classes.txt").write_text("road\n")
    words = ["semantic-pngs", "--images", str(root / "images"), "--labels", str(root / "labels")]
    return [*words, "--classes", str(root / "classes.txt"), "--split", "train"], label


def test_other_labels_of_the_same_images_are_another_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "source").mkdir()
    words, _ = coco_instances(tmp_path / "source")
    write_png(tmp_path / "other" / "a.png", gray(7))
    command = ["convert", *words, "--output-dir", str(tmp_path / "records")]
    assert main(command) == 0
    command[command.index("--stuff-pngs") + 1] = str(tmp_path / "other")
    assert main(command) == 2
    assert f"stuff', not from '{tmp_path / 'source' / 'train.json'}'" in capsys.readouterr().err
    assert main([*command, "--replace"]) == 0

    # The images of two folders of ADE20K may be the same, by a link.
    ade20k(tmp_path / "first")
    ade20k(tmp_path / "second")
    shutil.rmtree(tmp_path / "second" / "images")
    (tmp_path / "second" / "images").symlink_to(tmp_path / "first" / "images")
    output = ["--splits", "train", "--output-dir", str(tmp_path / "ade20k")]
    assert main(["convert", "ade20k", "--root", str(tmp_path / "first"), *output]) == 0
    assert main(["convert", "ade20k", "--root", str(tmp_path / "second"), *output]) == 2


SOURCES = (cityscapes, mapillary, ade20k, coco_instances, labelme, cvat_masks, semantic_pngs)


@pytest.mark.parametrize("write_source", SOURCES, ids=lambda source: source.__name__)
def test_second_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], write_source: Callable[[Path], tuple[list[str], Path]]
) -> None:
    (tmp_path / "source").mkdir()
    words, label = write_source(tmp_path / "source")
    command = ["convert", *words, "--output-dir", str(tmp_path / "records")]

    def said(*more: str) -> str:
        assert main([*command, *more]) == 0
        return capsys.readouterr().out

    unchanged = "Split 'train': 1 image, 0 skipped. It already exists"
    first = said("--check")
    assert "Split 'train': 1 image, 0 skipped.\n" in first
    assert "train: 1 image," in first  # Of the check.
    assert unchanged in said()
    assert unchanged in said("--check")
    assert unchanged not in said("--max-side", "2")
    assert unchanged not in said()
    os.utime(label, ns=(1, 1))
    assert unchanged not in said()
    assert unchanged in said()
