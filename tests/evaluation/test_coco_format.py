"""COCO panoptic files: worked segments, round trips, and messages about faulty files."""

import json

import cv2
import numpy as np
import pytest

from deeplab2_like.data.coco_segments import Segment
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.images import write_png
from deeplab2_like.data.label_runs import list_segments
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.coco_format import (
    CocoPanopticReader,
    CocoPanopticWriter,
    segments_info,
)
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality

# Class 0 is stuff with panoptic value 0, the value that must not be taken for void.
INFO = DatasetInfo(
    "toy",
    (Category(12, "sky", False, (0, 0, 255)), Category(7, "cat", True, (255, 0, 0))),
    label_divisor=1000,
)
SKY, CAT_CROWD, CAT, VOID = 0, 1000, 1001, 255000
LABELS = np.array(
    [
        [SKY, SKY, SKY, CAT_CROWD],
        [SKY, CAT, CAT, CAT_CROWD],
        [VOID, CAT, SKY, SKY],
    ],
    np.int32,
)


def test_segments_of_a_worked_map():
    assert segments_info(LABELS, INFO, scores={CAT: 0.75}, ground_truth=True) == [
        # id = panoptic value + 1; boxes are x, y, width, height.
        {"id": 1, "category_id": 12, "iscrowd": 0, "area": 6, "bbox": [0, 0, 4, 3]},
        {"id": 1001, "category_id": 7, "iscrowd": 1, "area": 2, "bbox": [3, 0, 1, 2]},
        {"id": 1002, "category_id": 7, "iscrowd": 0, "area": 3, "bbox": [1, 1, 2, 2], "score": 0.75},
    ]
    # A prediction has no crowds.
    assert [segment["iscrowd"] for segment in segments_info(LABELS, INFO)] == [0, 0, 0]


def test_list_segments_equals_masks():
    random = np.random.default_rng(0)
    for _ in range(50):
        labels = random.integers(0, 5, random.integers(1, 8, 2))
        table = list_segments(labels)
        np.testing.assert_array_equal(table.values, np.unique(labels))
        for value, area, box in zip(*table, strict=True):
            rows, columns = np.nonzero(labels == value)
            assert area == rows.size
            assert box.tolist() == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    assert list_segments(np.zeros((0, 3), np.int32)).values.size == 0


def test_round_trip(tmp_path):
    with CocoPanopticWriter(tmp_path, INFO, name="val", ground_truth=True) as writer:
        writer.add(np.int64(42), "city/b.jpg", LABELS)
        writer.add(7, "c.jpg", np.full((2, 5), VOID, np.int32), scores={})
    content = json.loads((tmp_path / "val.json").read_text())
    assert content["images"][0] == {"id": 42, "file_name": "city/b.jpg", "height": 3, "width": 4}
    assert content["annotations"][0]["file_name"] == "city/b.png"
    assert [segment["id"] for segment in content["annotations"][0]["segments_info"]] == [1, 1001, 1002]
    assert content["annotations"][1]["segments_info"] == []
    # id = R + 256 G + 65536 B; 1002 = 234 + 3 * 256. OpenCV reads B, G, R.
    assert cv2.imread(str(tmp_path / "val/city/b.png"))[1, 1].tolist() == [0, 3, 234]

    reader = CocoPanopticReader(tmp_path / "val.json", tmp_path / "val")
    assert len(reader) == 2
    assert reader.dataset_info.categories == INFO.categories
    maps = dict(reader)
    assert list(maps) == [42, 7]
    np.testing.assert_array_equal(maps[42], LABELS)
    assert maps[42].dtype == np.int32
    np.testing.assert_array_equal(maps[7], np.full((2, 5), VOID))

    ids, segments = reader.read_segments(42)
    assert segments == [Segment(1, 0, area=6), Segment(1001, 1, is_crowd=True, area=2), Segment(1002, 1, area=3)]
    metric = PanopticQuality(INFO)
    metric.update_from_segments(ids, segments, ids, segments)
    assert metric.result().all.pq == 1.0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["b.png", "c.png", "val.json"]


def test_image_ids_may_be_text(tmp_path):
    with CocoPanopticWriter(tmp_path, INFO, name="val") as writer:
        writer.add(7, "c.jpg", LABELS)
    content = json.loads((tmp_path / "val.json").read_text())
    content["annotations"][0]["image_id"] = "7"
    (tmp_path / "val.json").write_text(json.dumps(content), encoding="utf-16")
    assert list(dict(CocoPanopticReader(tmp_path / "val.json", tmp_path / "val"))) == [7]


def test_no_json_after_an_error(tmp_path):
    def write():
        with CocoPanopticWriter(tmp_path, INFO) as writer:
            writer.add(1, "a.jpg", LABELS)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write()
    assert not (tmp_path / "panoptic.json").exists()


def test_writer_errors(tmp_path):
    writer = CocoPanopticWriter(tmp_path / "out", INFO)
    writer.add(1, "a.jpg", LABELS)
    with pytest.raises(UserError, match=r"Images '1' and '2' would both be written to 'a\.png'"):
        writer.add(2, "a.jpeg", LABELS)
    for name in ("../a.jpg", "/a.jpg"):
        with pytest.raises(UserError, match="leaves the output folder"):
            writer.add(2, name, LABELS)
    with pytest.raises(UserError, match="panoptic map holds value 2000, which is class 2"):
        writer.add(2, "b.jpg", np.full((2, 2), 2000))
    assert [path.name for path in (tmp_path / "out/panoptic").iterdir()] == ["a.png"]
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write '.*file/panoptic/a\.png'"):
        CocoPanopticWriter(tmp_path / "file", INFO).add(1, "a.jpg", LABELS)


def test_reader_errors(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"JSON '.*a\.json' does not exist"):
        CocoPanopticReader(file, tmp_path)
    annotation = {"image_id": 1, "file_name": "1.png", "segments_info": []}
    for content, message in (
        ("{", "is not a JSON file"),
        ("[]", "has no 'annotations'; give a COCO panoptic JSON"),
        (json.dumps({"annotations": []}), "has no 'categories'"),
        (json.dumps({"annotations": {}}), "has no 'annotations'"),
        (json.dumps({"annotations": [7], "categories": INFO.to_coco_categories()}), "entry 0 .* lacks 'image_id'"),
        (
            json.dumps({"annotations": [{"image_id": 1, "file_name": "a"}], "categories": INFO.to_coco_categories()}),
            "lacks 'segments_info'",
        ),
        (
            json.dumps({"annotations": [annotation, annotation], "categories": INFO.to_coco_categories()}),
            "annotates image 1 twice",
        ),
    ):
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            CocoPanopticReader(file, tmp_path)
    file.write_text(json.dumps({"annotations": [annotation]}))
    with pytest.raises(UserError, match=r"Folder '.*nowhere' with the PNG files"):
        CocoPanopticReader(file, tmp_path / "nowhere", dataset_info=INFO)
    reader = CocoPanopticReader(file, tmp_path, dataset_info=INFO)
    with pytest.raises(UserError, match="no annotation of image '2'"):
        reader.read(2)
    with pytest.raises(UserError, match=r"^Image '1' of '.*a\.json': the panoptic PNG '.*1\.png' cannot be read"):
        reader.read(1)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"^Image '1' of '.*a\.json': '.*1\.png' is not a readable PNG, BMP, GIF or TIF"
    ):
        reader.read(1)
    write_png(tmp_path / "1.png", np.full((2, 2, 3), [7, 1, 0], np.uint8))
    with pytest.raises(UserError, match=r"^Image '1' of '.*a\.json': '.*1\.png' has pixels of id 263, which 'segm"):
        reader.read(1)
