"""The converters of labels in PNGs: of classes alone, CVAT's masks, and ADE20K, on small trees made here."""

import json
import struct
import zlib
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from deeplab2_like.cli import main
from deeplab2_like.data import known_datasets, panoptic_label, pipeline
from deeplab2_like.data.convert.ade20k import convert_ade20k
from deeplab2_like.data.convert.cvat_masks import convert_cvat_masks
from deeplab2_like.data.convert.semantic_pngs import convert_semantic_pngs
from deeplab2_like.data.convert.summary import print_summary
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import list_shards
from deeplab2_like.errors import UserError


def write_png(path: Path, values: Any) -> None:
    """Writes gray values [H, W] or colors [H, W, 3] (red, green, blue)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.asarray(values, np.uint8)).save(path)


def examples(folder: Path, split: str = "train") -> list[dict[str, Any]]:
    dataset = pipeline.make_eval_dataset(list_shards(folder, split), dataset_info=DatasetInfo.load(folder))
    return list(dataset.as_numpy_iterator())


# Labels without instances.


@pytest.fixture
def semantic(tmp_path: Path) -> dict[str, Any]:
    """Arguments for a data set of two images, one of them in a folder."""
    (tmp_path / "classes.txt").write_text("3 road\n1 sky\n")
    for name in ("a", "more/b"):
        write_png(tmp_path / "images" / f"{name}.png", np.zeros((2, 3, 3)))
        write_png(tmp_path / "labels" / f"{name}.png", [[3, 1, 1], [3, 255, 1]])
    return {
        "images": tmp_path / "images",
        "labels": tmp_path / "labels",
        "classes": tmp_path / "classes.txt",
        "output_dir": tmp_path / "records",
        "split": "train",
    }


def test_classes_alone(semantic: dict[str, Any]) -> None:
    (report,) = convert_semantic_pngs(**semantic)
    assert (report.split, report.examples) == ("train", 2)
    found = examples(semantic["output_dir"])
    assert [example["image_id"] for example in found] == [b"a.png", b"more/b.png"]
    for example in found:
        # Class ids are the places in the list: road 0, sky 1.
        np.testing.assert_array_equal(example["panoptic"], [[0, 1000, 1000], [0, 255000, 1000]])
    info = DatasetInfo.load(semantic["output_dir"])
    assert (info.thing_classes, [c.id for c in info.categories]) == ((), [3, 1])


def test_a_value_without_a_class_is_named(semantic: dict[str, Any]) -> None:
    write_png(semantic["labels"] / "a.png", [[3, 1, 1], [2, 255, 1]])
    with pytest.raises(
        UserError, match=r"Image 'a\.png' of .*a\.png' has the value 2, which '.*classes\.txt' does not"
    ):
        convert_semantic_pngs(**semantic)
    convert_semantic_pngs(**semantic, ignore=[2, 255])
    assert examples(semantic["output_dir"])[0]["panoptic"].tolist()[1] == [255000, 255000, 1000]
    # A class of the list may be ignored, too.
    convert_semantic_pngs(**(semantic | {"ignore": [2, 3, 255], "output_dir": semantic["images"].parent / "other"}))
    assert DatasetInfo.load(semantic["images"].parent / "other").num_classes == 1


def test_linked_folders_are_followed(semantic: dict[str, Any]) -> None:
    for name in ("images", "labels"):
        (semantic[name] / "more").rename(semantic[name].parent / f"real_{name}")
        (semantic[name] / "more").symlink_to(semantic[name].parent / f"real_{name}")
    convert_semantic_pngs(**semantic)
    assert [example["image_id"] for example in examples(semantic["output_dir"])] == [b"a.png", b"more/b.png"]


def write_wide(path: Path, largest: int) -> None:
    """A gray image of 16 bits with zeros and one value."""
    cv2.imwrite(str(path), np.array([[0, 0, 0], [0, 0, largest]], np.uint16))


def test_images_of_12_bits_are_scaled(semantic: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    write_wide(semantic["images"] / "a.png", 1000)
    write_wide(semantic["images"] / "more" / "b.png", 4095)
    arguments = [
        f"--{name.replace('_', '-')}={semantic[name]}" for name in ("images", "labels", "classes", "output_dir")
    ]
    assert main(["convert", "semantic-pngs", *arguments, "--split=train"]) == 0
    assert "more than 8 bits per channel: taken as 12 bits, so that 0..4095 became 0..255" in capsys.readouterr().out
    # The upper 8 of 12 bits: 1000 // 16 and 4095 // 16. Pixels of both images are scaled by the same rule.
    assert [example["image"][1, 2, 0] for example in examples(semantic["output_dir"])] == [62, 255]
    assert DatasetInfo.load(semantic["output_dir"]).bit_depth == 12
    # Another split, whose values are smaller, is scaled like the first.
    write_wide(semantic["images"] / "more" / "b.png", 1000)
    convert_semantic_pngs(**(semantic | {"split": "val"}))
    assert [example["image"][1, 2, 0] for example in examples(semantic["output_dir"], "val")] == [62, 62]
    with pytest.raises(
        UserError, match=r"holds other splits whose images were scaled from 12 bits to 8; give --bit-de"
    ):
        convert_semantic_pngs(**(semantic | {"split": "val"}), bit_depth=16)


def test_bit_depth_is_an_option(semantic: dict[str, Any]) -> None:
    write_wide(semantic["images"] / "a.png", 1000)
    convert_semantic_pngs(**semantic, bit_depth=16)
    assert examples(semantic["output_dir"])[0]["image"][1, 2, 0] == 1000 // 256
    convert_semantic_pngs(**semantic, bit_depth=10)  # Another option replaces the split.
    assert examples(semantic["output_dir"])[0]["image"][1, 2, 0] == 1000 // 4
    with pytest.raises(UserError, match=r"has values of 0 to 1000, but 9 bits hold 0 to 511; give another --bit-depth"):
        convert_semantic_pngs(**semantic, bit_depth=9)
    with pytest.raises(UserError, match=r"bit_depth must be 8 to 32, got 7\."):
        convert_semantic_pngs(**semantic, bit_depth=7)


def test_lossy_labels_are_named_before_anything_is_read(semantic: dict[str, Any]) -> None:
    Image.new("L", (3, 2)).save(semantic["labels"] / "a.jpg")
    with pytest.raises(
        UserError, match=r"The label '.*a\.jpg' is of a lossy format, which changes the values of pixels;"
    ):
        convert_semantic_pngs(**semantic, label_ending=".jpg")
    (semantic["labels"] / "a.png").unlink()
    with pytest.raises(UserError, match=r"the label PNG '.*a\.jpg' is a JPEG, which may change the values of pixels"):
        convert_semantic_pngs(**semantic)
    # A JPEG under the name of a PNG is found when it is read.
    (semantic["labels"] / "a.jpg").replace(semantic["labels"] / "a.png")
    with pytest.raises(UserError, match=r"the label PNG '.*a\.png' is a JPEG, which may change the values of pixels"):
        convert_semantic_pngs(**semantic)


def test_gray_of_few_bits_is_refused(semantic: dict[str, Any]) -> None:
    """Pillow would read 1 of 2 bits as 85."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    # Two rows of a filter byte and three pixels of value 1: bits 01 01 01 00.
    rows = zlib.compress(b"\x00\x54\x00\x54")
    header = struct.pack(">IIBBBBB", 3, 2, 2, 0, 0, 0, 0)
    content = chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    (semantic["labels"] / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n" + content)
    with pytest.raises(UserError, match=r"a\.png' is gray of 2 bits; save it with 8 or 16 bits"):
        convert_semantic_pngs(**semantic)


def test_labels_beside_their_images(semantic: dict[str, Any]) -> None:
    for label in semantic["labels"].rglob("*.png"):
        label.rename(semantic["images"] / label.relative_to(semantic["labels"]).with_name(f"{label.stem}_mask.png"))
    (report,) = convert_semantic_pngs(**(semantic | {"labels": semantic["images"], "label_ending": "_mask.png"}))
    assert report.examples == 2


def save_lying(path: Path, orientation: int) -> None:
    """Saves an image that is stored in 3 rows and 2 columns, of which the left one is bright."""
    pixels = np.zeros((3, 2, 3), np.uint8)
    pixels[:, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(path, exif=exif)


def test_an_image_lies_as_its_label_does(semantic: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    # By 90 degrees clockwise: the left column becomes the upper row.
    save_lying(semantic["images"] / "a.png", 6)
    save_lying(semantic["images"] / "more" / "b.png", 6)
    write_png(semantic["labels"] / "more" / "b.png", [[3, 1], [3, 1], [3, 1]])
    (report,) = convert_semantic_pngs(**semantic)
    assert report.turned == 1
    print_summary([report], semantic["output_dir"])
    assert "turned by the EXIF orientation, as the labels were drawn: 1 image." in capsys.readouterr().out
    shown, stored = examples(semantic["output_dir"])
    np.testing.assert_array_equal(shown["image"][..., 0], [[200, 200, 200], [0, 0, 0]])
    assert shown["panoptic"].shape == (2, 3)
    np.testing.assert_array_equal(stored["image"][..., 0], [[200, 0], [200, 0], [200, 0]])


def test_an_orientation_that_sizes_do_not_tell_is_refused(semantic: dict[str, Any]) -> None:
    save_lying(semantic["images"] / "a.png", 3)
    with pytest.raises(UserError, match=r"Image 'a\.png' of '.*': it is 3x2 but its label is 2x3"):
        convert_semantic_pngs(**semantic)
    write_png(semantic["labels"] / "a.png", [[3, 1], [3, 1], [3, 1]])
    with pytest.raises(
        UserError, match=r"Image 'a\.png' of .*: its EXIF orientation is 3, .*; save the image without an"
    ):
        convert_semantic_pngs(**semantic)


def test_semantic_command(semantic: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in semantic.items()]
    assert main(["convert", "semantic-pngs", *arguments, "--split", "val", "--ignore", "255", "3"]) == 0
    assert "Split 'val': 2 images, 0 skipped." in capsys.readouterr().out


def test_split_is_guessed_from_the_folders(semantic: dict[str, Any]) -> None:
    del semantic["split"]

    def move(images: str, labels: str) -> None:
        for key, name in (("images", images), ("labels", labels)):
            new = semantic["classes"].parent / name
            new.parent.mkdir(exist_ok=True)
            semantic[key] = semantic[key].rename(new)

    for images, labels, split in (
        ("images_valid", "labels", "val"),  # One of the two tells it.
        ("train/images", "train/labels", "train"),
        ("val/test", "train/labels", "test"),  # Their own names count first.
    ):
        move(images, labels)
        assert convert_semantic_pngs(**semantic)[0].split == split
    move("a/train", "a/val")
    with pytest.raises(
        UserError, match=r"a/train' and '.*a/val' are of different splits \(train, val\); name the split with --sp"
    ):
        convert_semantic_pngs(**semantic)
    move("a/images", "a/labels")
    with pytest.raises(
        UserError, match=r"a/labels' is unknown, because neither the name nor that of the folder above has"
    ):
        convert_semantic_pngs(**semantic)


def test_other_folders_do_not_replace_a_split(semantic: dict[str, Any]) -> None:
    convert_semantic_pngs(**semantic)
    before = {path.name: path.read_bytes() for path in semantic["output_dir"].iterdir()}
    other = {"labels": semantic["labels"].rename(semantic["labels"].with_name("others"))}
    with pytest.raises(UserError, match=r"was made from '.*images' and '.*labels', not from '.*images' and '.*others'"):
        convert_semantic_pngs(**(semantic | other))
    assert {path.name: path.read_bytes() for path in semantic["output_dir"].iterdir()} == before
    assert convert_semantic_pngs(**(semantic | other), replace=True)[0].examples == 2
    # Of two images of 6 pixels: 4 road, 6 sky, 2 void; classes without objects.
    (report,) = convert_semantic_pngs(**(semantic | other), max_side=3)
    assert (report.is_unchanged, report.objects, report.pixels) == (False, (0, 0), (4, 6, 2))


def test_labels_may_be_raw_as_deeplab2_reads_them(semantic: dict[str, Any]) -> None:
    convert_semantic_pngs(**semantic, label_format="raw")
    (file,) = list_shards(semantic["output_dir"], "train")
    record = tf.train.Example.FromString(next(tf.data.TFRecordDataset(file).as_numpy_iterator())).features.feature
    assert record["image/segmentation/class/format"].bytes_list.value == [b"raw"]
    # As DeepLab2 decodes it, with the height and width of the record.
    size = [record[f"image/{side}"].int64_list.value[0] for side in ("height", "width")]
    label = tf.io.decode_raw(record["image/segmentation/class/encoded"].bytes_list.value[0], tf.int32)
    np.testing.assert_array_equal(tf.reshape(label, size), [[0, 1000, 1000], [0, 255000, 1000]])
    np.testing.assert_array_equal(examples(semantic["output_dir"])[0]["panoptic"], tf.reshape(label, size))
    # Another format replaces the split, the same leaves it.
    assert convert_semantic_pngs(**semantic, label_format="raw")[0].is_unchanged
    assert not convert_semantic_pngs(**semantic)[0].is_unchanged
    with pytest.raises(UserError, match=r"Unknown label format 'jpg'"):
        convert_semantic_pngs(**semantic, label_format="jpg")


# CVAT's masks.

BLACK, RED, GREEN, BLUE = (0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)


@pytest.fixture
def cvat(tmp_path: Path) -> dict[str, Any]:
    """Arguments for an export of one image: two red cars, one without a number, green grass, and nothing."""
    root = tmp_path / "export"
    write_png(root / "JPEGImages" / "a.png", np.zeros((2, 4, 3)))
    write_png(root / "SegmentationClass" / "a.png", [[RED, RED, RED, BLACK], [GREEN, GREEN, RED, BLACK]])
    write_png(root / "SegmentationObject" / "a.png", [[RED, GREEN, GREEN, BLACK], [BLUE, BLACK, BLACK, BLACK]])
    lines = ["# label:color_rgb:parts:actions", "background:0,0,0::", "grass:0,255,0::", "car:255,0,0::"]
    (root / "labelmap.txt").write_text("\n".join(lines))
    return {"root": root, "output_dir": tmp_path / "records", "stuff": ["grass"], "split": "train"}


def test_cvat_masks(cvat: dict[str, Any]) -> None:
    convert_cvat_masks(**cvat)
    # Objects are numbered by their colors as R + 256 G + 65536 B: the red one is first.
    expected = [[1001, 1002, 1002, 255000], [0, 0, 1000, 255000]]
    np.testing.assert_array_equal(examples(cvat["output_dir"])[0]["panoptic"], expected)
    info = DatasetInfo.load(cvat["output_dir"])
    assert [(c.name, c.is_thing, c.color) for c in info.categories] == [("grass", False, GREEN), ("car", True, RED)]


def test_cvat_background_can_be_a_class(cvat: dict[str, Any]) -> None:
    # In any color.
    (cvat["root"] / "labelmap.txt").write_text("Background:0,0,255::\ngrass:0,255,0::\ncar:255,0,0::\n")
    write_png(cvat["root"] / "SegmentationClass" / "a.png", [[RED, RED, RED, BLACK], [GREEN, GREEN, RED, BLUE]])
    convert_cvat_masks(**cvat, background="rest")
    expected = [[1001, 1002, 1002, 2000], [0, 0, 1000, 2000]]
    np.testing.assert_array_equal(examples(cvat["output_dir"])[0]["panoptic"], expected)


def test_cvat_faults_are_named(cvat: dict[str, Any]) -> None:
    write_png(cvat["root"] / "SegmentationClass" / "a.png", [[(1, 2, 3)] * 4] * 2)
    with pytest.raises(UserError, match=r"Image 'a\.png' of .* has the color 1,2,3, which labelmap\.txt does not list"):
        convert_cvat_masks(**cvat)
    write_png(cvat["root"] / "SegmentationObject" / "a.png", [[RED]])
    with pytest.raises(
        UserError, match=r"SegmentationClass.a\.png' is \(2, 4\) but '.*SegmentationObject.a\.png' \(1, 1\)"
    ):
        convert_cvat_masks(**cvat)
    (cvat["root"] / "labelmap.txt").write_text("car 255,0,0\n")
    with pytest.raises(
        UserError, match=r"labelmap\.txt' has the line 'car 255,0,0'; a line is `name:red,green,blue::`"
    ):
        convert_cvat_masks(**cvat)
    (cvat["root"] / "labelmap.txt").write_text("car:255,0,0::\nbus:255,0,0::\n")
    with pytest.raises(UserError, match=r"labelmap\.txt' has two classes of the color \(255, 0, 0\)"):
        convert_cvat_masks(**cvat)
    with pytest.raises(UserError, match=r"The folder of object PNGs '.*nowhere.SegmentationObject' does not exist"):
        convert_cvat_masks(**(cvat | {"root": cvat["root"] / "nowhere"}))


def test_cvat_command(cvat: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    (cvat["root"] / "JPEGImages").rename(cvat["root"] / "pictures")
    cvat["root"] = cvat["root"].rename(cvat["root"].with_name("export_train"))
    arguments = ["--root", cvat["root"], "--output-dir", cvat["output_dir"], "--images", cvat["root"] / "pictures"]
    assert main([str(word) for word in ("convert", "cvat-masks", *arguments, "--stuff", "grass")]) == 0
    assert "Split 'train': 1 image, 0 skipped." in capsys.readouterr().out


# ADE20K.


@pytest.fixture
def ade20k(tmp_path: Path) -> dict[str, Any]:
    """Arguments for one image in either split."""
    root = tmp_path / "ADEChallengeData2016"
    for split in ("training", "validation"):
        write_png(root / "images" / split / "ADE_1.png", np.zeros((2, 4, 3)))
        # Classes from 1: wall, bed, person, and nothing. The person's last pixel belongs to no object.
        write_png(root / "annotations" / split / "ADE_1.png", [[1, 1, 8, 8], [13, 13, 0, 13]])
        # Class in the instance challenge (1 is bed, 4 person), number, anything. A bed covers a wall's pixel.
        objects = [[(0, 0, 9), (1, 1, 9), (1, 1, 7), (1, 2, 9)], [(4, 3, 0), (4, 3, 0), (0, 0, 0), (0, 0, 0)]]
        write_png(root / "annotations_instance" / split / "ADE_1.png", objects)
    return {"root": root, "output_dir": tmp_path / "records"}


def test_ade20k_without_preparation(ade20k: dict[str, Any]) -> None:
    assert [(report.split, report.examples) for report in convert_ade20k(**ade20k)] == [("train", 1), ("val", 1)]
    # Classes from 0: wall 0, bed 7, person 12.
    expected = [[0, 7001, 7001, 7002], [12001, 12001, 255000, 255000]]
    np.testing.assert_array_equal(examples(ade20k["output_dir"], "val")[0]["panoptic"], expected)
    info = DatasetInfo.load(ade20k["output_dir"])
    assert (info.num_classes, len(info.thing_classes)) == (150, 100)
    assert [info.categories[i].name for i in (0, 7, 12, 149)] == ["wall", "bed", "person", "flag"]


def test_ade20k_with_panoptic_json(ade20k: dict[str, Any]) -> None:
    root = ade20k["root"]
    ids = np.array([[5, 5, 6, 6], [0, 0, 0, 0]])
    (root / "ade20k_panoptic_val").mkdir()
    cv2.imwrite(str(root / "ade20k_panoptic_val" / "ADE_1.png"), panoptic_label.ids_to_rgb(ids)[..., ::-1])
    segments = [{"id": 5, "category_id": 0, "iscrowd": 0}, {"id": 6, "category_id": 7, "iscrowd": 0}]
    content = {
        "images": [{"id": "ADE_1", "file_name": "ADE_1.png"}],
        "annotations": [{"image_id": "ADE_1", "file_name": "ADE_1.png", "segments_info": segments}],
        "categories": [{"id": 0, "name": "wall", "isthing": 0}, {"id": 7, "name": "bed", "isthing": 1}],
    }
    (root / "ade20k_panoptic_val.json").write_text(json.dumps(content))
    (report,) = convert_ade20k(**ade20k, splits=["val"])
    assert report.split == "val"
    np.testing.assert_array_equal(
        examples(ade20k["output_dir"], "val")[0]["panoptic"], [[0, 0, 1001, 1001], [255000] * 4]
    )
    convert_ade20k(**ade20k, splits=["val"], max_side=2)
    np.testing.assert_array_equal(examples(ade20k["output_dir"], "val")[0]["image"].shape, (1, 2, 3))


def test_ade20k_faults_are_named(ade20k: dict[str, Any]) -> None:
    folder = ade20k["root"]
    write_png(folder / "annotations" / "training" / "ADE_1.png", np.full((2, 4), 151))
    with pytest.raises(UserError, match=r"Image 'ADE_1\.png' of .*ADE_1\.png' has class 151; it must be 0 to 150"):
        convert_ade20k(**ade20k)
    write_png(folder / "annotations_instance" / "training" / "ADE_1.png", np.full((2, 4, 3), 101))
    with pytest.raises(UserError, match=r"ADE_1\.png' has class 101 \(red\); it must be 0 to 100"):
        convert_ade20k(**ade20k)
    write_png(folder / "annotations_instance" / "training" / "ADE_1.png", np.zeros((1, 1, 3)))
    with pytest.raises(UserError, match=r"ADE_1\.png' is \(2, 4\) but '.*ADE_1\.png' \(1, 1\)"):
        convert_ade20k(**ade20k)
    with pytest.raises(UserError, match="Unknown split of ADE20K 'training'"):
        convert_ade20k(**ade20k, splits=["training"])
    (folder / "ade20k_panoptic_val.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"has ade20k_panoptic_val\.json but not such a JSON for every split, .* move this"
    ):
        convert_ade20k(**ade20k)


def test_ade20k_command(ade20k: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", str(ade20k["root"]), "--output-dir", str(ade20k["output_dir"]), "--splits", "val"]
    assert main(["convert", "ade20k", *arguments]) == 0
    assert "Split 'val': 1 image, 0 skipped." in capsys.readouterr().out


def test_sizes_of_the_known_lists() -> None:
    assert (len(known_datasets.ADE20K_NAMES), len(set(known_datasets.ADE20K_THINGS))) == (150, 100)
    coco = known_datasets.COCO_PANOPTIC
    assert (len(coco), sum(category.is_thing for category in coco)) == (133, 80)
