"""The converter of Label Studio's exports, on small ones made here, and its decoder of brush masks."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data_sets import read_labels, write_image

from deeplab2_like.cli import main
from deeplab2_like.data.convert.label_studio import convert_label_studio
from deeplab2_like.data.convert.label_studio_rle import decode_brush
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError

HEIGHT, WIDTH = 2, 4


def bytes_of_bits(*parts: str) -> list[int]:
    bits = "".join(parts).replace(" ", "")
    bits += "0" * (-len(bits) % 8)
    return [int(bits[start : start + 8], 2) for start in range(0, len(bits), 8)]


# 32 values (2 x 4 pixels of red, green, blue and opacity) of 8 bits; lengths have 3, 4, 8 or 16 bits.
HEADER = f"{32:032b} {7:05b} {2:04b} {3:04b} {7:04b} {15:04b}"
BRUSH = bytes_of_bits(
    HEADER,
    # Three pixels of zeros: equal values (1), a length of 4 bits (01), 12 - 1.
    f"1 01 {11:04b} {0:08b}",
    # One pixel with values of its own (0), of which the last is the opacity.
    f"0 00 {3:03b} {1:08b} {2:08b} {3:08b} {255:08b}",
    # The last row: 16 equal values.
    f"1 10 {15:08b} {255:08b}",
)
BRUSH_MASK = [[False, False, False, True], [True, True, True, True]]


def test_brush_masks() -> None:
    np.testing.assert_array_equal(decode_brush(BRUSH, (HEIGHT, WIDTH)), BRUSH_MASK)


def test_beginning_of_a_published_mask() -> None:
    """Of an image of 2527 x 3332, whose mask begins with runs of 65536 zeros (https://huggingface.co)."""
    beginning = [2, 1, 233, 240, 57, 27, 255, 255, 255, 0, 255, 255, 224, 31, 255, 252, 3, 255, 255, 128, 127]
    with pytest.raises(ValueError, match="cut short"):
        decode_brush(beginning, (2527, 3332))
    with pytest.raises(ValueError, match="they have 8419964 pixels, but the image 8"):
        decode_brush(beginning, (HEIGHT, WIDTH))


@pytest.mark.parametrize(
    ("rle", "message"),
    [
        (bytes_of_bits(HEADER, f"1 11 {32:016b} {0:08b}"), "more pixels than the image"),
        ([1, 2, 3], "no list of bytes"),
        ([*BRUSH[:-1], 256], "a number that is no byte"),
        (["a"] * 20, "no list of bytes"),
    ],
)
def test_damaged_brush_masks_are_refused(rle: list[Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        decode_brush(rle, (HEIGHT, WIDTH))


def region(kind: str, label: str | None, **value: Any) -> dict[str, Any]:
    labels = {} if label is None else {f"{kind}labels": [label]}
    return {
        "type": f"{kind}labels",
        "original_width": WIDTH,
        "original_height": HEIGHT,
        "image_rotation": 0,
        "value": {**value, **labels},
    }


# In percent: the left half, and the upper right quarter.
POLYGON = region("polygon", "road", points=[[0, 0], [50, 0], [50, 100], [0, 100]])
RECTANGLE = region("rectangle", "car", x=50, y=0, width=50, height=50, rotation=0)


class Source:
    """An export of tasks a and b; tests change it before `convert`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.json_file = folder / "project-1-train.json"
        write_image(folder / "images" / "a.png", np.zeros((HEIGHT, WIDTH, 3)))
        self.write([POLYGON, RECTANGLE])

    def write(self, *results: list[dict[str, Any]], image: str = "/data/upload/1/0123abcd-a.png") -> None:
        annotations = [{"id": number, "result": result} for number, result in enumerate(results)]
        self.json_file.write_text(json.dumps([{"id": 7, "data": {"image": image}, "annotations": annotations}]))

    def convert(self, **changes: Any) -> Any:
        arguments = {
            "json_file": self.json_file,
            "images": self.folder / "images",
            "output_dir": self.folder / "records",
            "stuff": ["road"],
            "classes": ["car", "road"],
        }
        (report,) = convert_label_studio(**(arguments | changes))
        return report

    def label(self, **changes: Any) -> list[list[int]]:
        self.convert(**changes)
        (label,) = read_labels(self.folder / "records").values()
        return label


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_regions_become_a_panoptic_map(source: Source) -> None:
    report = source.convert(classes=None)
    # By the alphabet car is class 0, road 1.
    assert read_labels(source.folder / "records") == {"a.png": [[1000, 1000, 1, 1], [1000, 1000, 255000, 255000]]}
    assert [c.name for c in DatasetInfo.load(source.folder / "records").categories] == ["car", "road"]
    assert "The classes are car, road, in this order; --classes gives others." in report.notes


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        (region("brush", "car", format="rle", rle=BRUSH), [[255000] * 3 + [1], [1] * 4]),
        # 3.2 pixels wide and 2 high: the centers of the pixels at the corners are outside.
        (region("ellipse", "car", x=50, y=50, radiusX=40, radiusY=50), [[255000, 1, 1, 255000]] * 2),
        # 2 pixels wide and 3.2 high, turned by 90 degrees, is the same.
        (region("ellipse", "car", x=50, y=50, radiusX=25, radiusY=80, rotation=90), [[255000, 1, 1, 255000]] * 2),
        # A box 2 pixels wide and 1 high, from the corner at x 3, y 0, turned clockwise to x 2..3, y 0..2.
        (
            region("rectangle", "car", x=75, y=0, width=50, height=50, rotation=90),
            [[255000, 255000, 1, 255000]] * 2,
        ),
    ],
)
def test_every_kind_of_region(source: Source, shape: dict[str, Any], expected: list[list[int]]) -> None:
    source.write([shape])
    assert source.label() == expected


def test_labels_may_be_a_result_of_their_own(source: Source) -> None:
    shape = {**region("rectangle", None, x=50, y=0, width=50, height=50), "type": "rectangle", "id": "r1"}
    labels = {"type": "labels", "id": "r1", "value": {**shape["value"], "labels": ["car"]}}
    choice = {"type": "choices", "id": "c1", "value": {"choices": ["sunny"]}}
    source.write([shape, labels, choice])
    assert source.label()[0] == [255000, 255000, 1, 1]


@pytest.mark.parametrize(
    "address",
    [
        "/data/local-files/?d=project%2Fa.png",
        "/data/local-files/?d=images\\a.png",
        "s3://bucket/folder/a.png",
        "https://host/folder/0123abcd-a.png?token=1",
        "C:\\photos\\a.png",
    ],
)
def test_images_are_found_by_their_address(source: Source, address: str) -> None:
    source.write([RECTANGLE], image=address)
    assert source.label()[0] == [255000, 255000, 1, 1]


def test_the_size_may_be_that_of_the_image(source: Source) -> None:
    expected = source.label()
    without = [{key: value for key, value in r.items() if "original" not in key} for r in (POLYGON, RECTANGLE)]
    source.write(without)
    assert source.label(replace=True) == expected


def test_of_several_annotations_one_is_used(source: Source) -> None:
    source.write([POLYGON], [RECTANGLE])
    assert source.label()[0] == [255000, 255000, 1, 1]
    assert source.label(annotation="first")[0] == [1000, 1000, 255000, 255000]
    tasks = json.loads(source.json_file.read_text())
    tasks[0]["annotations"][0]["ground_truth"] = True
    source.json_file.write_text(json.dumps(tasks))
    assert source.label()[0] == [1000, 1000, 255000, 255000]
    assert any(note.startswith("1 task with several annotations: the last is used") for note in source.convert().notes)


def test_an_annotation_without_regions_is_an_image_without_objects(source: Source) -> None:
    source.write([])
    assert source.label(background="rest") == [[2000] * 4] * 2


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (region("polygon", "car", points=[[0, 0], [1, 1]]), r"region 1 has 2 points, but a polygon has three or more"),
        (region("keypoint", "car", x=1, y=1), r"region 1 is a keypointlabels, which has no inside; use polygon, brush"),
        (region("polygon", None, points=[[0, 0], [1, 1], [2, 2]]), r"region 1 has 0 labels, but a region has one"),
        (region("polygon", "bus", points=[[0, 0], [1, 1], [2, 2]]), r"region 1 has the label 'bus', which is not a cl"),
        (region("brush", "car", rle=BRUSH[:9]), r"region 1 has run lengths that cannot be read \(they are cut short\)"),
        (region("ellipse", "car", x=1), r"region 1 lacks a number among x, y, radiusX, radiusY|region 1 is a ellipse"),
        ({**POLYGON, "image_rotation": 90}, r"region 1 was drawn on the image rotated by 90 degrees; undo the rotati"),
    ],
)
def test_faulty_regions_are_named_or_left_out(source: Source, shape: dict[str, Any], message: str) -> None:
    source.write([POLYGON, shape])
    with pytest.raises(UserError, match=message):
        source.convert()
    assert len(source.convert(on_error="skip-annotation").skipped_annotations) == 1
    (label,) = read_labels(source.folder / "records").values()
    assert label == [[1000, 1000, 255000, 255000]] * 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            '{"a": 1}',
            r"train\.json' has no task with 'data' and 'annotations', as in an export of type JSON-MIN or COCO",
        ),
        ("[1]", r"train\.json' is no list of tasks; export from Label Studio as JSON"),
        ('[{"data": {"image": "a.png"}}]', r"No region in '.*train\.json' has a label; draw some in Label Studio"),
    ],
)
def test_other_files_are_named(source: Source, text: str, message: str) -> None:
    source.json_file.write_text(text)
    with pytest.raises(UserError, match=message):
        source.convert(classes=None)


def test_faulty_tasks_are_named(source: Source) -> None:
    tasks = json.loads(source.json_file.read_text())
    tasks[0]["annotations"] = []
    source.json_file.write_text(json.dumps(tasks))
    with pytest.raises(UserError, match=r"Image 'a\.png' of .*: it has no annotation; label it, or leave it out"):
        source.convert()
    source.write([POLYGON], image="/data/upload/1/missing.png")
    with pytest.raises(UserError, match=r"Image 'missing\.png' of .*: the image '.*missing\.png' cannot be read"):
        source.convert()
    source.write([{**POLYGON, "original_width": "wide"}])
    with pytest.raises(
        UserError, match=r"a region has original_height 2 and original_width 'wide', which are no whole"
    ):
        source.convert()


def test_command(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    folders = ["--json", source.json_file, "--images", source.folder / "images", "--output-dir", source.folder / "r"]
    assert main(["convert", "label-studio", *map(str, folders), "--background", "rest"]) == 0
    assert "Split 'train': 1 image, 0 skipped." in capsys.readouterr().out
