"""Inspection of records: statistics, faults and output files."""

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from rich.console import Console

from deeplab2_like import cli, inspection, inspection_report
from deeplab2_like.data import coco_segments
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.records import serialize_example
from deeplab2_like.data.shards import ShardWriter, read_index, shard_names
from deeplab2_like.errors import UserError
from deeplab2_like.files import OUTPUTS_FILE

INFO = DatasetInfo.from_coco_categories(
    [
        {"id": 1, "name": "cat", "isthing": 1, "color": [200, 40, 40]},
        {"id": 2, "name": "sky", "isthing": 0, "color": [60, 120, 220]},
    ],
    name="toy",
)
VOID = 255_000
# Two cats of 2 and 1 pixels, a crowd of 1, sky of 3, void of 1.
SMALL = np.array([[1, 1, 2, 0], [1000, 1000, 1000, VOID]], np.int32)
# A cat of 40 x 40 = 1600 pixels, which is more than 32**2, in a sky of 2400.
LARGE = np.full((40, 100), 1000, np.int32)
LARGE[:, :40] = 1


def write(folder: Path, splits: Mapping[str, list[np.ndarray]], info: DatasetInfo = INFO) -> None:
    """Writes records, each with an image of its own."""
    rng = np.random.default_rng(0)
    info.save(folder)
    for split, panoptics in splits.items():
        with ShardWriter(folder / shard_names(split, 1)[0]) as writer:
            for number, panoptic in enumerate(panoptics):
                image = rng.integers(0, 256, (*panoptic.shape, 3), np.uint8)
                name = f"{split}_{number}.png"
                writer.write(serialize_example(image=image, panoptic=panoptic, filename=name))


def inspect(folder: Path, **options: Any) -> inspection.Inspection:
    return inspection.inspect_records(folder, **options)


def faults(folder: Path) -> list[tuple[str, str, str]]:
    return [(fault.kind, fault.where, fault.text) for fault in inspect(folder).faults]


def test_statistics(tmp_path: Path) -> None:
    write(tmp_path, {"train": [SMALL, LARGE, SMALL], "val": [LARGE]})
    found = inspect(tmp_path, workers=2)
    train = found.statistics["splits"]["train"]
    pixels = 8 + 4000 + 8
    assert train == {
        "images": 3,
        "void_share": 2 / pixels,
        "image_sizes": {
            "different": 2,
            "smallest": [2, 4],
            "largest": [40, 100],
            "most_common": [[2, 4, 2], [40, 100, 1]],
        },
        "per_class": {
            "cat": {
                "is_thing": True,
                "images": 3,
                "segments": 5,  # 2 + 1 + 2.
                "pixel_share": (4 + 1600 + 4) / pixels,
                "crowds": 2,
                "area": {"min": 1, "mean": (3 + 1600 + 3) / 5, "max": 1600, "small": 4, "medium": 1, "large": 0},
            },
            "sky": {"is_thing": False, "images": 3, "segments": 3, "pixel_share": (3 + 2400 + 3) / pixels},
        },
    }
    assert found.statistics["splits"]["val"]["images"] == 1
    assert (found.faults, found.num_errors, found.statistics["fault_counts"]) == ([], 0, {})


def test_pictures(tmp_path: Path) -> None:
    write(tmp_path, {"train": [SMALL, LARGE, SMALL], "val": [LARGE] * 5})
    found = inspect(tmp_path, pictures=4)
    assert set(found.sheets) == {"train", "val"}
    # Four pictures in two columns and two rows, each of two panels of 100 x 4 = 400 pixels with a gap of 2.
    assert found.sheets["val"].shape[1] == 2 * 802 + 3 * 6
    assert inspect(tmp_path, pictures=0).sheets == {}


def test_no_faults_are_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"train": [LARGE]})
    assert cli.main(["inspect", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--workers", "1"]) == 0
    out = capsys.readouterr().out
    assert "train: 1 image, 1 size (most often 40x100: 1), void 0.0%" in out
    assert "No faults found." in out
    content = json.loads((tmp_path / "out" / "statistics.json").read_text())
    assert content == inspect(tmp_path).statistics
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        OUTPUTS_FILE,
        "statistics.json",
        "contact_sheet_train.png",
    }
    assert cv2.imread(str(tmp_path / "out" / "contact_sheet_train.png")) is not None


def test_report_is_one_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"train": [LARGE]})
    report = tmp_path / "report.html"
    command = ["inspect", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--report", str(report)]
    assert cli.main([*command, "--workers", "1"]) == 0
    assert f"Report: {report}" in capsys.readouterr().out
    text = report.read_text()
    assert "No faults found." in text
    assert text.count("<img ") == text.count('src="data:image/jpeg;base64,') == 1
    assert "http" not in text
    assert cli.main([*command, "--workers", "1"]) == 0  # A report may be replaced,
    report.write_text("<p>Mine.</p>")  # but no other file.
    assert cli.main(command) == 2
    assert "report.html' exists and is not a report of inspect, so it is not replaced;" in capsys.readouterr().err
    assert report.read_text() == "<p>Mine.</p>"


def test_report_shows_names_as_text(tmp_path: Path) -> None:
    fault = inspection.Fault("id out of range", "<b>x</b>", "a & b")
    entry = {"is_thing": False, "images": 1, "segments": 1, "pixel_share": 0.5}
    train = {"images": 1, "void_share": 0.5, "image_sizes": {"different": 1}, "per_class": {"<script>": entry}}
    statistics = {"splits": {"train": train}, "fault_counts": {"id out of range": 1}}
    found = inspection.Inspection(statistics, {}, [fault])
    inspection_report.write_report(found, tmp_path / "a.html", title="<i>")
    text = (tmp_path / "a.html").read_text()
    assert "<h1>&lt;i&gt;</h1>" in text
    assert "<td>&lt;script&gt;</td><td>stuff</td><td>1</td><td>1</td><td></td><td>50.0%</td>" in text
    assert "<li>&lt;b&gt;x&lt;/b&gt;: a &amp; b</li>" in text


def test_the_printed_table_breaks_no_cell() -> None:
    long = "a class with a name of several words, which alone is longer than a narrow terminal"
    area = {"min": 1, "mean": 1234567.0, "max": 2345678, "small": 345678, "medium": 456789, "large": 567890}
    thing = {"images": 118287, "segments": 1370357, "pixel_share": 0.5, "crowds": 123456, "area": area}
    sizes = {"different": 1, "most_common": [[4000, 6000, 118287]]}
    for names in (["cat"], [long]):
        per_class = dict.fromkeys(names, thing) | {long + " too": {"images": 0}}
        train = {"images": 118287, "image_sizes": sizes, "void_share": 0.25, "per_class": per_class}
        found = inspection.Inspection({"splits": {"train": train}, "fault_counts": {}}, {}, [])
        for width in (40, 80, 200):
            output = io.StringIO()
            inspection.print_inspection(found, console=Console(file=output, width=width))
            lines = [line.strip() for line in output.getvalue().splitlines()]
            assert lines[0] == "train: 118287 images, 1 size (most often 4000x6000: 118287), void 25.0%"
            cells = ["118287", "1370357", "123456", "50.0%", "1", "1234567", "2345678", "345678", "456789", "567890"]
            rows = [line.split() for line in lines]
            assert ["class", "images", "segm.", "crowds", "pixels", "min", "mean", "max", "S", "M", "L"] in rows
            assert [*names[0].split(), *cells] in rows
            assert f"Without pixels: {long} too" in lines


def test_ids_out_of_range(tmp_path: Path) -> None:
    write(tmp_path, {"train": [LARGE, np.array([[2001, 1003, 0]], np.int32)]})
    place = "image 'train_1.png' (train, record 1 of train-00000-of-00001.tfrecord)"
    assert faults(tmp_path) == [
        (
            "id out of range",
            place,
            "value 2001 is class 2 with label_divisor 1000; classes are 0..1 and 255 for void.",
        ),
        ("id out of range", place, "value 1003 is instance 3 of 'sky', which is stuff; stuff has instance 0."),
    ]
    # The picture is drawn nevertheless.
    assert set(inspect(tmp_path).sheets) == {"train"}


def test_instances_without_pixels(tmp_path: Path) -> None:
    write(tmp_path, {"train": [np.array([[1, 2, 5, 0]], np.int32)]})
    ((kind, _, text),) = faults(tmp_path)
    assert (kind, text) == (
        "instance without pixels",
        "'cat' has instances up to 5, but 2 of them have no pixels, the first is 3.",
    )
    assert inspect(tmp_path).num_errors == 0


def test_all_void(tmp_path: Path) -> None:
    write(tmp_path, {"train": [LARGE, np.full((2, 2), VOID, np.int32)]})
    ((kind, where, text),) = faults(tmp_path)
    assert (kind, text) == ("image without labels", "all of it is void.")
    assert "'train_1.png'" in where


def test_classes_of_one_color(tmp_path: Path) -> None:
    categories = [{**category, "color": [1, 2, 3]} for category in INFO.to_coco_categories()]
    write(tmp_path, {"train": [LARGE]}, DatasetInfo.from_coco_categories(categories, name="x"))
    expected = ("two classes of one color", "dataset_info.json", "cat, sky all have color [1, 2, 3].")
    assert faults(tmp_path) == [expected]


def test_identical_images(tmp_path: Path) -> None:
    write(tmp_path, {"train": [LARGE, LARGE], "val": [LARGE]})
    image = np.full((40, 100, 3), 7, np.uint8)
    # One as PNG and one as BMP, which the record holds as another PNG: the pixels count.
    with ShardWriter(tmp_path / "train-00000-of-00001.tfrecord") as writer:
        for name in ("a.png", "b.png"):
            writer.write(serialize_example(image=image, panoptic=LARGE, filename=name))
    with ShardWriter(tmp_path / "val-00000-of-00001.tfrecord") as writer:
        content = bytes(cv2.imencode(".bmp", image)[1])
        writer.write(serialize_example(image=content, panoptic=LARGE, filename="c.bmp"))
    assert faults(tmp_path) == [
        (
            "image in several splits",
            "image 'c.bmp' (val, record 0 of val-00000-of-00001.tfrecord)",
            "the same pixels are image 'a.png' of split 'train'.",
        ),
        (
            "image twice in a split",
            "image 'b.png' (train, record 1 of train-00000-of-00001.tfrecord)",
            "the same pixels are image 'a.png' of the same split.",
        ),
    ]
    assert inspect(tmp_path).num_errors == 1


def test_damaged_records_are_listed_and_the_rest_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, {"train": [LARGE] * 4})
    path = tmp_path / "train-00000-of-00001.tfrecord"
    index = read_index([str(path)])
    content = bytearray(path.read_bytes())
    content[index.offsets[2] + 500] ^= 255
    path.write_bytes(content)
    found = inspect(tmp_path)
    assert found.statistics["splits"]["train"]["images"] == 3
    (fault,) = found.faults
    assert (fault.kind, fault.where) == ("damaged record", "train, record 2 of train-00000-of-00001.tfrecord")
    assert cli.main(["inspect", str(tmp_path), "--output-dir", str(tmp_path / "out"), "--workers", "1"]) == 2
    out, err = capsys.readouterr()
    assert "fault: damaged record, 1 time" in out
    assert err.startswith(f"deeplab2-like: '{tmp_path}' has 1 faults, the first: damaged record, train, record 2 of")
    assert len(err.splitlines()) == 1
    assert (tmp_path / "out" / "statistics.json").exists()


def test_listed_faults_are_limited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inspection, "MAX_LISTED_FAULTS", 2)
    write(tmp_path, {"train": [np.full((2, 2), VOID, np.int32)] * 3, "val": [LARGE]})
    found = inspect(tmp_path)
    assert found.statistics["fault_counts"] == {"image without labels": 3}
    assert len(found.faults) == 2


def test_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist; give a folder that `deeplab2-like convert` wrote"):
        inspect(tmp_path / "absent")
    INFO.save(tmp_path)
    with pytest.raises(UserError, match="holds no records; give a folder that `deeplab2-like convert` wrote"):
        inspect(tmp_path)
    with pytest.raises(UserError, match="workers must be 1 or more, got 0"):
        inspect(tmp_path, workers=0)


def test_areas_and_boxes_of_the_json() -> None:
    # Segment 5 covers rows 0 and 1, columns 1 and 2: box x 1, y 0, width 2, height 2.
    ids = np.array([[0, 5, 5, 0], [0, 5, 5, 7]], np.int32)

    def compare(**stated: Any) -> list[str]:
        return coco_segments.compare_measures(ids, [{"id": 5, **stated}, {"id": 9, "area": 1}, {"area": 1}, 3])

    assert compare() == compare(area=4, bbox=[1, 0, 2, 2]) == compare(area=None, bbox="wide") == []
    # Some tools leave out the last row and column.
    assert compare(bbox=[1, 0, 1, 1]) == []
    assert compare(area=5) == ["segment 5 has area 5 in the JSON, 4 in the PNG."]
    message = "segment 5 has box [0, 1, 2, 4] in the JSON, [1, 0, 2, 2] in the PNG (x, y, width, height)."
    assert compare(bbox=[0, 1, 2, 4]) == [message]


def test_conversion_with_check(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("images", "panoptic"):
        (tmp_path / name).mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), np.full((4, 4, 3), 90, np.uint8))
    cv2.imwrite(str(tmp_path / "panoptic" / "a.png"), np.full((4, 4, 3), (0, 0, 5), np.uint8))
    segment = {"id": 5, "category_id": 1, "area": 16}
    content = {
        "images": [{"id": 1, "file_name": "a.png"}],
        "annotations": [{"image_id": 1, "file_name": "a.png", "segments_info": [segment]}],
        "categories": [{"id": 1, "name": "road", "isthing": 0}],
    }

    def convert() -> int:
        (tmp_path / "train.json").write_text(json.dumps(content))
        paths = [f"--{name}={tmp_path / file}" for name, file in (("images", "images"), ("panoptic", "panoptic"))]
        paths += [f"--json={tmp_path / 'train.json'}", f"--output-dir={tmp_path / 'records'}"]
        return cli.main(["convert", "coco-panoptic", *paths, "--workers", "1", "--check"])

    assert convert() == 0
    assert "No faults found." in capsys.readouterr().out
    segment["area"] = 15
    assert convert() == 2
    out, err = capsys.readouterr()
    assert "fault: segment differs from JSON, 1 time" in out
    assert "segment 5 has area 15 in the JSON, 16 in the PNG. The records are written; fix the labels" in err
