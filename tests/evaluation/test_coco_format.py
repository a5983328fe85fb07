"""COCO panoptic files: worked segments, round trips, and messages about faulty files."""

import json

import cv2
import numpy as np
import pytest

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.coco_format import (
    CocoPanopticReader,
    CocoPanopticWriter,
    ids_to_panoptic,
    list_segments,
    parse_segments,
    segments_info,
)
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality, Segment

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
    assert segments == [Segment(1, 0), Segment(1001, 1, is_crowd=True), Segment(1002, 1)]
    metric = PanopticQuality(INFO)
    metric.update_from_segments(ids, segments, ids, segments)
    assert metric.result().all.pq == 1.0
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["b.png", "c.png", "val.json"]


def test_no_json_after_an_error(tmp_path):
    def write():
        with CocoPanopticWriter(tmp_path, INFO) as writer:
            writer.add(1, "a.jpg", LABELS)
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write()
    assert not (tmp_path / "panoptic.json").exists()


def test_ids_of_others():
    # Ids of any size; instances are numbered in the order of the list, two crowds and two skies become one each.
    ids = np.array([[9, 8, 70000], [5, 4, 0], [3, 2, 2]])
    segments = parse_segments(
        [
            {"id": 70000, "category_id": 7},
            {"id": 8, "category_id": 7, "iscrowd": 1},
            {"id": 9, "category_id": 7, "iscrowd": 1},
            {"id": 4, "category_id": 7, "iscrowd": 0},
            {"id": 5, "category_id": 12},
            {"id": 3, "category_id": 12},
            {"id": 2, "category_id": 7},
        ],
        INFO,
    )
    expected = [[1000, 1000, 1001], [0, 1002, VOID], [0, 1003, 1003]]
    np.testing.assert_array_equal(ids_to_panoptic(ids, segments, INFO), expected)


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


def test_segment_errors():
    ids = np.array([[1, 1, 0]])
    for segments, message in (
        ([], r"x: the PNG holds segment id 1, which segments_info does not list"),
        ([{"id": 1, "category_id": 7}, {"id": 2, "category_id": 7}], "x: segments_info lists id 2, which the PNG does"),
        ([{"id": 1, "category_id": 7}, {"id": 1, "category_id": 7}], "x: segment id 1 is listed twice"),
        ([{"id": 0, "category_id": 7}], "x: segment id 0 is void"),
        ([{"id": 1, "category_id": 8}], "x: segment 1 has category_id 8, which the categories of data set 'toy'"),
        ([{"id": 1}], "x: a segment lacks 'category_id'"),
    ):
        with pytest.raises(UserError, match=message):
            ids_to_panoptic(ids, parse_segments(segments, INFO, name="x"), INFO, name="x")
    few = DatasetInfo("few", INFO.categories, label_divisor=2)
    with pytest.raises(UserError, match=r"x has more than 1 instances of 'cat'; use a label_divisor above 2"):
        ids_to_panoptic(np.array([[1, 2]]), [Segment(1, 1), Segment(2, 1)], few, name="x")


def test_reader_errors(tmp_path):
    file = tmp_path / "a.json"
    with pytest.raises(UserError, match=r"JSON '.*a\.json' does not exist"):
        CocoPanopticReader(file, tmp_path)
    annotation = {"image_id": 1, "file_name": "1.png", "segments_info": []}
    for content, message in (
        ("{", "is not valid JSON"),
        ("[]", "has no 'annotations'; give a COCO panoptic JSON"),
        (json.dumps({"annotations": []}), "has no 'categories'"),
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
    with pytest.raises(UserError, match=r"1\.png', the PNG of image '1' .* does not exist"):
        reader.read(1)
    (tmp_path / "1.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="is not a readable image"):
        reader.read(1)
