"""Segments of COCO panoptic annotations: worked maps, PNG files of all kinds, and messages about faults."""

import numpy as np
import pytest

from deeplab2_like.data.coco_segments import Segment, ids_to_panoptic, parse_segments
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError

INFO = DatasetInfo(
    "toy",
    (Category(12, "sky", False, (0, 0, 255)), Category(7, "cat", True, (255, 0, 0))),
    label_divisor=1000,
)
VOID = 255000


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


def test_fields_of_a_segment():
    listed = [{"id": "5", "category_id": 7, "iscrowd": 1, "area": 3, "bbox": []}, {"id": 6, "category_id": 12}]
    assert parse_segments(listed, INFO) == [Segment(5, 1, is_crowd=True, area=3), Segment(6, 0)]
    assert parse_segments([], INFO) == []


@pytest.mark.parametrize(
    ("segments", "message"),
    [
        (None, "its annotation has no list 'segments_info'"),
        (
            [{"id": 1, "category_id": 7}, {"id": 2}],
            "entry 1 of 'segments_info' lacks a whole number 'id' or 'category_",
        ),
        ([{"category_id": 7}], "entry 0 of 'segments_info' lacks a whole number 'id'"),
        ([{"id": "x", "category_id": 7}], "entry 0 of 'segments_info' lacks a whole number 'id'"),
        ([{"id": 1, "category_id": 7, "area": "x"}], "or has an 'area' that is no number"),
        ([5], "entry 0 of 'segments_info' lacks"),
        (
            [{"id": 1, "category_id": 8}],
            r"segment 1 has category_id 8, which 'categories' does not list \(those of 'toy'",
        ),
        ([{"id": 0, "category_id": 7}], "a segment has id 0, which stands for unlabeled pixels"),
        ([{"id": 1, "category_id": 7}] * 2, "'segments_info' lists id 1 more than once"),
    ],
)
def test_faulty_lists(segments, message):
    with pytest.raises(UserError, match=message):
        parse_segments(segments, INFO)


def test_map_and_list_must_fit():
    ids = np.array([[1, 1, 0, 4, 5, 6]])
    with pytest.raises(UserError, match=r"^the PNG has pixels of id 1, 4, 5 and 1 more, which 'segments"):
        ids_to_panoptic(ids, [], INFO)
    with pytest.raises(UserError, match=r"lists id 2, of which 'a\.png' has no pixels; correct the JSON\.$"):
        ids_to_panoptic(ids[:, :3], [Segment(1, 0), Segment(2, 0)], INFO, png="'a.png'")
    few = DatasetInfo("few", INFO.categories, label_divisor=2)
    with pytest.raises(UserError, match=r"has more than 1 instances of 'cat'; use a label_divisor above 2"):
        ids_to_panoptic(np.array([[1, 2]]), [Segment(1, 1), Segment(2, 1)], few)
