"""The converter of masks in Pascal VOC's layout, on small folders made here."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_data_sets import read_labels, write_image, write_palette_png

from deeplab2_like.cli import main
from deeplab2_like.data.convert.voc_masks import convert_voc_masks
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError

# Aeroplane is 1 and bicycle 2; 255 is a border. Two aeroplanes, and a bicycle without a number.
CLASSES = [[1, 1, 255, 1], [0, 0, 2, 2]]
OBJECTS = [[1, 1, 255, 2], [0, 0, 0, 255]]
# Aeroplane is class 0, bicycle 1, and the background the last, 20. Pixels without an object are a crowd region.
PANOPTIC = [[1, 1, 255000, 2], [20000, 20000, 1000, 1000]]


@pytest.fixture
def voc(tmp_path: Path) -> dict[str, Any]:
    """Arguments for a data set of three images, the last without a label."""
    root = tmp_path / "VOC2012"
    for name in ("a", "b", "c"):
        write_image(root / "JPEGImages" / f"{name}.jpg", np.zeros((2, 4, 3)))
    for name in ("a", "b"):
        write_palette_png(root / "SegmentationClass" / f"{name}.png", CLASSES)
        write_palette_png(root / "SegmentationObject" / f"{name}.png", OBJECTS)
    lists = root / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    for name, text in (("train", "a\n"), ("val", "b\n"), ("trainval", "a\nb\n")):
        (lists / f"{name}.txt").write_text(text)
    return {"root": root, "output_dir": tmp_path / "records"}


def test_splits_and_classes_of_voc(voc: dict[str, Any]) -> None:
    train, val = convert_voc_masks(**voc)
    assert (train.split, train.examples, val.split, val.examples) == ("train", 1, "val", 1)
    assert read_labels(voc["output_dir"]) == {"a.jpg": PANOPTIC}
    assert read_labels(voc["output_dir"], "val") == {"b.jpg": PANOPTIC}
    info = DatasetInfo.load(voc["output_dir"])
    assert (info.num_classes, info.categories[20].name, info.stuff_classes) == (21, "background", (20,))
    assert "Left out 1 image without class PNG that 'ImageSets' does not list." in train.notes
    assert "The background is the class 'background'; --void-background makes it void." in train.notes


def test_lists_without_labels_are_left_out(voc: dict[str, Any]) -> None:
    (voc["root"] / "ImageSets" / "Segmentation" / "test.txt").write_text("c\n")
    assert [report.split for report in convert_voc_masks(**voc)] == ["train", "val"]
    with pytest.raises(UserError, match=r"has subsets \(train: 1, val: 1 images\) but no 'test'"):
        convert_voc_masks(**voc, split="test")


def test_background_can_be_void(voc: dict[str, Any]) -> None:
    convert_voc_masks(**voc, void_background=True)
    assert read_labels(voc["output_dir"])["a.jpg"][1] == [255000, 255000, 1000, 1000]
    assert DatasetInfo.load(voc["output_dir"]).num_classes == 20


def test_own_classes(voc: dict[str, Any]) -> None:
    classes = voc["root"] / "class_names.txt"
    classes.write_text("_background_\nleaf\nstem\n")  # As labelme's script writes it.
    convert_voc_masks(**voc, classes=classes, stuff=["stem"])
    # Leaf is class 0, stem 1, the background 2.
    assert read_labels(voc["output_dir"])["a.jpg"] == [[1, 1, 255000, 2], [2000, 2000, 1000, 1000]]
    info = DatasetInfo.load(voc["output_dir"])
    assert [(c.name, c.is_thing) for c in info.categories] == [("leaf", True), ("stem", False), ("background", False)]


def test_faults_are_named(voc: dict[str, Any]) -> None:
    classes = voc["root"] / "classes.txt"
    classes.write_text("1 leaf\n")
    with pytest.raises(UserError, match=r"a\.png' has the value 2, which '.*classes\.txt' does not list; add it there"):
        convert_voc_masks(**voc, classes=classes)
    (report, _) = convert_voc_masks(**voc, classes=classes, on_error="skip-annotation")
    assert report.lost["faulty, left out by --on-error"] == {"value 2": (0, 2)}
    with pytest.raises(UserError, match=r"other categories \(id 1 'leaf' there, id 1 'aeroplane' here\)"):
        convert_voc_masks(**voc)
    voc["output_dir"] = voc["output_dir"].with_name("others")
    classes.write_text("0 background\n255 void\n")
    with pytest.raises(UserError, match=r"classes\.txt' has no class besides the background and void; add one"):
        convert_voc_masks(**voc, classes=classes)
    write_image(voc["root"] / "SegmentationClass" / "a.png", np.zeros((2, 4, 3)))
    with pytest.raises(UserError, match=r"the class PNG '.*a\.png' has 3 channels; it must be gray"):
        convert_voc_masks(**voc)
    for name in "ab":
        (voc["root"] / "SegmentationClass" / f"{name}.png").unlink()
    with pytest.raises(UserError, match=r"VOC2012' has no image with a PNG in 'SegmentationClass'"):
        convert_voc_masks(**voc)


def test_command(voc: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(voc["root"]), "--output-dir", str(voc["output_dir"]), "--split", "val"]
    assert main(["convert", "voc-masks", *arguments]) == 0
    assert "Split 'val': 1 image, 0 skipped." in capsys.readouterr().out


def test_object_numbers_of_more_than_24_bits(voc: dict[str, Any]) -> None:
    values = np.array(OBJECTS, np.int32)
    values[0] += 2**24
    Image.fromarray(values).save(voc["root"] / "SegmentationObject" / "a.tif")
    (voc["root"] / "SegmentationObject" / "a.tif").rename(voc["root"] / "SegmentationObject" / "a.png")
    convert_voc_masks(**voc)
    # The classes stay as they are; 255 of a wide file is an object, here a bicycle of one pixel beside the crowd.
    assert read_labels(voc["output_dir"])["a.jpg"] == [PANOPTIC[0], [20000, 20000, 1000, 1001]]


def test_object_255_of_16_bits_is_an_object(voc: dict[str, Any]) -> None:
    Image.fromarray(np.array(OBJECTS, np.uint16)).save(voc["root"] / "SegmentationObject" / "a.png")
    convert_voc_masks(**voc)
    assert read_labels(voc["output_dir"])["a.jpg"] == [PANOPTIC[0], [20000, 20000, 1000, 1001]]


def test_names_in_lists_may_have_suffix_and_folder(voc: dict[str, Any]) -> None:
    lists = voc["root"] / "ImageSets" / "Segmentation"
    (lists / "train.txt").write_text("JPEGImages/a.jpg\nlost\n")
    (lists / "val.txt").write_text("b.jpg\n")
    (lists / "test.txt").write_text("gone\n")
    train, val = convert_voc_masks(**voc)
    assert (train.split, train.examples, val.split, val.examples) == ("train", 1, "val", 1)
    folder = voc["root"] / "ImageSets"
    assert f"Left out the list test of '{folder}', because its names match no file." in train.notes
    assert f"Warning: 2 names in '{folder}' without an image or class PNG, such as 'gone'." in train.notes
