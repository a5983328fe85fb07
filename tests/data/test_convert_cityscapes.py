"""Cityscapes in its official layout, made here from a few pixels; and what all sources with label PNGs share."""

import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab2_like.cli import main
from deeplab2_like.data import panoptic_label, pipeline
from deeplab2_like.data.convert import labeled_images
from deeplab2_like.data.convert.cityscapes import convert_cityscapes
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.images import decode_image, read_value_png
from deeplab2_like.data.shards import list_shards, list_splits
from deeplab2_like.errors import UserError

# 7 is the road, 26 a car; 26001 and 26004 are single cars, 26 alone is a group of them; 29001 is a caravan, which is no
# class of the benchmark, as 4, static, is none; 23 is the sky; 33000 is the first bicycle, 33002 another.
INSTANCE_IDS = np.array([[7, 7, 26001, 26004], [26, 29001, 4, 23], [33000, 33002, 33002, 0]], np.uint16)
# Classes are train ids: road 0, sky 10, car 13, bicycle 18. Instances count from 1 by class; 255 is void.
PANOPTIC = [[0, 0, 13001, 13002], [13000, 255000, 255000, 10000], [18001, 18002, 18002, 255000]]
LABEL_IDS = {
    "road": 7,
    "sidewalk": 8,
    "building": 11,
    "wall": 12,
    "fence": 13,
    "pole": 17,
    "traffic light": 19,
    "traffic sign": 20,
    "vegetation": 21,
    "terrain": 22,
    "sky": 23,
    "person": 24,
    "rider": 25,
    "car": 26,
    "truck": 27,
    "bus": 28,
    "train": 31,
    "motorcycle": 32,
    "bicycle": 33,
}
NAMES = ("aachen/aachen_000000_000019", "ulm/ulm_000001_000019")


class Source:
    """The data set on disk; tests damage it before `convert`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "cityscapes"

    def add(self, split: str, *, labels: str = "gtFine", names: tuple[str, ...] = NAMES) -> None:
        for number, name in enumerate(names):
            image = self.image(split, name)
            image.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(image), np.full((3, 4, 3), number, np.uint8))
            label = self.label(split, name, labels=labels)
            label.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(label), INSTANCE_IDS)

    def image(self, split: str, name: str) -> Path:
        return self.root / "leftImg8bit" / split / f"{name}_leftImg8bit.png"

    def label(self, split: str, name: str, *, labels: str = "gtFine") -> Path:
        return self.root / labels / split / f"{name}_{labels}_instanceIds.png"

    def convert(self, **changes: Any) -> Any:
        return convert_cityscapes(**({"root": self.root, "output_dir": self.folder / "records"} | changes))

    def examples(self, split: str) -> list[dict[str, Any]]:
        folder = self.folder / "records"
        dataset = pipeline.make_eval_dataset(list_shards(folder, split), dataset_info=DatasetInfo.load(folder))
        return list(dataset.as_numpy_iterator())


@pytest.fixture
def source(tmp_path: Path) -> Source:
    source = Source(tmp_path)
    source.add("train")
    return source


def test_the_download_is_enough(source: Source) -> None:
    source.add("val", names=("bonn/bonn_000002_000019",))
    reports = source.convert()
    assert [(report.split, report.examples, report.skipped) for report in reports] == [("train", 2, ()), ("val", 1, ())]
    examples = source.examples("train")
    assert [example["image_id"] for example in examples] == [
        b"aachen_000000_000019_leftImg8bit.png",
        b"ulm_000001_000019_leftImg8bit.png",
    ]
    for number, example in enumerate(examples):
        np.testing.assert_array_equal(example["panoptic"], PANOPTIC)
        np.testing.assert_array_equal(example["image"], np.full((3, 4, 3), number))
    assert [example["image_id"] for example in source.examples("val")] == [b"bonn_000002_000019_leftImg8bit.png"]


def test_classes_are_those_of_the_benchmark(source: Source) -> None:
    source.convert(splits=["train"])
    info = DatasetInfo.load(source.folder / "records")
    assert (info.num_classes, info.label_divisor, info.ignore_label) == (19, 1000, 255)
    # Person to bicycle.
    assert info.thing_classes == tuple(range(11, 19))
    assert info.categories[13] == Category(26, "car", True, (0, 0, 142))


def test_coarse_labels_are_a_split_of_their_own(source: Source) -> None:
    source.add("train_extra", labels="gtCoarse", names=("erlangen/erlangen_000000_000000",))
    source.convert(splits=["train"])
    assert [report.split for report in source.convert(coarse=True)] == ["train_extra_coarse"]
    np.testing.assert_array_equal(source.examples("train_extra_coarse")[0]["panoptic"], PANOPTIC)
    assert list_splits(source.folder / "records") == ["train", "train_extra_coarse"]


# Label ids, and the train ids that csCreatePanopticImgs writes on request.
@pytest.mark.parametrize("ids", [LABEL_IDS, {name: i for i, name in enumerate(LABEL_IDS)}], ids=["label", "train"])
def test_official_panoptic_folder_is_used_when_there(source: Source, ids: dict[str, int]) -> None:
    # Of one image only; the PNG of instance ids of this image must not matter.
    names = NAMES[:1]
    source.image("train", NAMES[1]).unlink()
    source.label("train", names[0]).write_bytes(b"")
    folder = source.root / "gtFine" / "cityscapes_panoptic_train"
    folder.mkdir()
    values = np.array([[7, 7, 7, 7], [26001, 26001, 26, 26], [26002, 0, 0, 0]])
    png = "aachen_000000_000019_gtFine_panoptic.png"
    cv2.imwrite(str(folder / png), panoptic_label.ids_to_rgb(values)[..., ::-1])
    segments = [
        {"id": 7, "category_id": ids["road"], "iscrowd": 0},
        {"id": 26001, "category_id": ids["car"], "iscrowd": 0},
        {"id": 26, "category_id": ids["car"], "iscrowd": 1},
        {"id": 26002, "category_id": ids["car"], "iscrowd": 0},
    ]
    annotation = {"image_id": "aachen_000000_000019", "file_name": png, "segments_info": segments}
    categories = [{"id": i, "name": name} for name, i in ids.items()]
    content = {"images": [], "annotations": [annotation], "categories": categories}
    folder.with_suffix(".json").write_text(json.dumps(content))

    (report,) = source.convert(splits=["train"])
    assert report.examples == 1
    expected = [[0, 0, 0, 0], [13001, 13001, 13000, 13000], [13002, 255000, 255000, 255000]]
    np.testing.assert_array_equal(source.examples("train")[0]["panoptic"], expected)

    # An image that the JSON does not know is named.
    source.add("train", names=NAMES[1:])
    with pytest.raises(UserError, match=r"ulm_000001_000019_leftImg8bit\.png' of .*has no list 'segments_info'"):
        source.convert(splits=["train"])
    # Neither label ids nor train ids.
    del categories[3]
    folder.with_suffix(".json").write_text(json.dumps(content))
    with pytest.raises(
        UserError, match=r"is not in the format of Cityscapes' own tools \(KeyError\('wall'\)\); make it again"
    ):
        source.convert(splits=["train"])


# Faults.


def absent_image(source: Source) -> None:
    source.image("train", NAMES[0]).unlink()


def absent_label(source: Source) -> None:
    source.label("train", NAMES[0]).unlink()


def truncated_label(source: Source) -> None:
    path = source.label("train", NAMES[0])
    path.write_bytes(path.read_bytes()[:50])


def color_label(source: Source) -> None:
    cv2.imwrite(str(source.label("train", NAMES[0])), np.zeros((3, 4, 3), np.uint8))


def unknown_label_id(source: Source) -> None:
    cv2.imwrite(str(source.label("train", NAMES[0])), np.full((3, 4), 34001, np.uint16))


def other_size(source: Source) -> None:
    cv2.imwrite(str(source.label("train", NAMES[0])), INSTANCE_IDS[:2])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (absent_image, r"the image '.*leftImg8bit\.png' cannot be read \(No such file"),
        (absent_label, r"the PNG of instance ids '.*_gtFine_instanceIds\.png' cannot be read \(No such file"),
        (truncated_label, r"the PNG of instance ids '.*instanceIds\.png' is not a readable PNG, or cut short"),
        (color_label, r"the PNG of instance ids '.*instanceIds\.png' has 3 channels; it must be gray"),
        (unknown_label_id, r"instanceIds\.png' has the value 34001; it must be a label id, 0 to 33, or such an id \*"),
        (other_size, r"is 3x4 but its label is 2x4"),
    ],
)
def test_faulty_image_stops_or_is_skipped(source: Source, damage: Any, message: str) -> None:
    damage(source)
    with pytest.raises(UserError, match=r"^Image 'aachen_000000_000019_leftImg8bit\.png' of '.*train': .*" + message):
        source.convert(splits=["train"])
    assert not (source.folder / "records").exists()
    (report,) = source.convert(splits=["train"], on_error="skip-image")
    assert (report.examples, len(report.skipped)) == (1, 1)
    assert [example["image_id"] for example in source.examples("train")] == [b"ulm_000001_000019_leftImg8bit.png"]


def test_missing_folders_are_named(source: Source) -> None:
    with pytest.raises(UserError, match=r"The image folder '.*leftImg8bit.val' does not exist"):
        source.convert()
    with pytest.raises(UserError, match=r"The label folder '.*gtCoarse.train' does not exist"):
        source.convert(splits=["train"], coarse=True)


def test_folders_without_cities_are_named(source: Source) -> None:
    for folder in ("leftImg8bit", "gtFine"):
        (source.root / folder / "val").mkdir()
    with pytest.raises(
        UserError, match=r"leftImg8bit.val' has no image CITY/\*_leftImg8bit\.png, and '.*gtFine.val' no"
    ):
        source.convert(splits=["val"])


def test_command(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    records = source.folder / "records"
    arguments = ["convert", "cityscapes", "--root", source.root, "--splits", "train", "--output-dir", records]
    assert main([str(argument) for argument in arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["Split 'train': 2 images, 0 skipped.", f"Records are in {records}"]
    # Of 12 pixels per image: 2 road, 1 sky, 3 of cars, of which two are single, 3 of two bicycles, and 3 void.
    assert lines[3] == "train: 25.0% of the pixels are void"
    assert [line.split() for line in lines[5:11] if "─" not in line] == [
        ["class", "kind", "objects", "pixels"],
        ["road", "stuff", "16.7%"],
        ["sky", "stuff", "8.3%"],
        ["car", "thing", "4", "25.0%"],
        ["bicycle", "thing", "4", "25.0%"],
    ]
    assert lines[12].startswith("Without pixels: sidewalk (stuff); building (stuff); wall (stuff); fence (stuff);")
    assert lines[12].endswith(
        "; person (thing); rider (thing); truck (thing); bus (thing); train (thing); motorcycle (thing)"
    )
    assert lines[13:] == [
        "Lost (not a class of the data set, so void): label id 0, 8.3% of the pixels; label id 4, 8.3% of the pixels; "
        "label id 29, 8.3% of the pixels",
        "Lost (crowd regions, which are not objects): car, 8.3% of the pixels",
        "Warning: 15 of 19 classes have no pixels in split 'train', see above.",
    ]


@pytest.mark.parametrize("field", ["file_name", "image_id"])
def test_a_json_does_not_lead_out_of_its_folder(source: Source, field: str) -> None:
    folder = source.root / "gtFine" / "cityscapes_panoptic_train"
    folder.mkdir()
    ids = np.full((3, 4), 7)
    values: dict[str, Any] = {"image_id": "ulm_000001_000019", "file_name": "a.png"}
    for path in (folder / "a.png", source.folder / "outside.png"):
        cv2.imwrite(str(path), panoptic_label.ids_to_rgb(ids)[..., ::-1])
    cv2.imwrite(str(source.folder / "x_leftImg8bit.png"), np.zeros((3, 4, 3), np.uint8))
    values |= {"file_name": "../../../outside.png"} if field == "file_name" else {"image_id": "../../../../x"}
    annotation = {**values, "segments_info": [{"id": 7, "category_id": 7}]}
    categories = [{"id": i, "name": name} for name, i in LABEL_IDS.items()]
    content = {"images": [], "annotations": [annotation], "categories": categories}
    folder.with_suffix(".json").write_text(json.dumps(content))
    source.image("train", NAMES[0]).unlink()
    source.image("train", NAMES[1]).unlink(missing_ok=field == "image_id")
    if field == "file_name":
        source.add("train", names=NAMES[1:])
    with pytest.raises(
        UserError, match=rf"The file name '{values[field]}.*' leads outside of '.*train'; give the fold"
    ):
        source.convert(splits=["train"])


# What all sources with label PNGs share.

INFO = DatasetInfo("test", (Category(1, "sky", False, (0, 0, 0)), Category(2, "car", True, (1, 1, 1))))


def test_large_images_are_shrunk(source: Source) -> None:
    name = NAMES[0]
    # The left half of the image is dark and road, the right half light and one car.
    image, label = np.zeros((40, 60, 3), np.uint8), np.full((40, 60), 7, np.uint16)
    image[:, 30:], label[:, 30:] = 200, 26001
    cv2.imwrite(str(source.image("train", name)), image)
    cv2.imwrite(str(source.label("train", name)), label)
    source.convert(splits=["train"], max_side=30)
    large, small = source.examples("train")
    np.testing.assert_array_equal(large["panoptic"], np.repeat([[0] * 15 + [13001] * 15], 20, axis=0))
    np.testing.assert_array_equal(large["image"][..., 0], np.repeat([[0] * 15 + [200] * 15], 20, axis=0))
    np.testing.assert_array_equal(small["panoptic"], PANOPTIC)


def test_a_shrunk_jpeg_stays_a_jpeg() -> None:
    _, jpeg = cv2.imencode(".jpg", np.full((10, 20, 3), 90, np.uint8))
    shrunk, panoptic = labeled_images.downscale(jpeg.tobytes(), np.zeros((10, 20), np.int32), 10, name="a.jpg")
    assert shrunk[:3] == b"\xff\xd8\xff"
    assert decode_image(shrunk, "a.jpg").shape == (5, 10, 3)
    assert panoptic.shape == (5, 10)


def test_max_side_is_checked(source: Source) -> None:
    with pytest.raises(UserError, match="max_side must be 1 or more, got 0"):
        source.convert(splits=["train"], max_side=0)


def test_too_many_instances_ask_for_a_divisor() -> None:
    values = np.arange(1000).reshape(10, 100)
    with pytest.raises(UserError, match=r"more than 999 instances of 'car'; use a label_divisor above 1000"):
        labeled_images.values_to_panoptic(values, lambda _: (1, True), INFO)


def test_random_map_equals_a_pass_per_value() -> None:
    values = np.random.default_rng(0).integers(0, 40, (30, 50))
    # Odd values are cars, those that four divides sky, the others void.
    found = labeled_images.values_to_panoptic(
        values, lambda v: (1, True) if v % 2 else (0, False) if v % 4 == 0 else None, INFO
    )
    expected = np.full(values.shape, 255_000)
    expected[values % 4 == 0] = 0
    for number, value in enumerate(range(1, 40, 2), start=1):
        expected[values == value] = 1000 + number
    np.testing.assert_array_equal(found, expected)


def test_a_palette_is_not_turned_into_colors(tmp_path: Path) -> None:
    values = np.array([[0, 3], [2, 1]], np.uint8)
    image = Image.frombytes("P", (2, 2), values.tobytes())
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90, 1, 2, 3])
    image.save(tmp_path / "palette.png")
    np.testing.assert_array_equal(read_value_png(tmp_path / "palette.png", "PNG"), values)
