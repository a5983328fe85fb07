"""What the labels of a data set mean: read from COCO categories, written, read back, and refused."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from deeplab2_like.data.dataset_info import FILE_NAME, Category, DatasetInfo, whole_number
from deeplab2_like.errors import UserError

CATEGORIES = [
    {"id": 7, "name": "sky", "isthing": 0, "color": [70, 130, 180], "supercategory": "nature"},
    {"id": 24, "name": "person", "isthing": 1, "color": [220, 20, 60]},
    {"id": 1, "name": "road", "isthing": 0},
]


def make_info(**changes: Any) -> DatasetInfo:
    return dataclasses.replace(DatasetInfo.from_coco_categories(CATEGORIES, name="streets"), **changes)


def test_classes_are_numbered_in_the_order_of_the_list() -> None:
    info = make_info()
    assert info.num_classes == 3
    assert (info.thing_classes, info.stuff_classes) == ((1,), (0, 2))
    assert info.class_of_category_id == {7: 0, 24: 1, 1: 2}
    assert info.categories[1] == Category(id=24, name="person", is_thing=True, color=(220, 20, 60))
    assert (info.label_divisor, info.ignore_label, info.void) == (1000, 255, 255000)


def test_colors_are_made_up_and_differ() -> None:
    plain = [{"id": i, "name": str(i), "isthing": 1} for i in range(30)]
    info = DatasetInfo.from_coco_categories(plain, name="plain")
    colors = [category.color for category in info.categories]
    assert len(set(colors)) == 30
    assert all(0 <= value <= 255 for color in colors for value in color)
    assert DatasetInfo.from_coco_categories(plain, name="plain") == info


def test_many_classes_move_void() -> None:
    categories = [{"id": i, "name": str(i), "isthing": 0} for i in range(300)]
    assert DatasetInfo.from_coco_categories(categories, name="many").ignore_label == 300


def test_categories_come_back() -> None:
    info = make_info()
    again = DatasetInfo.from_coco_categories(info.to_coco_categories(), name="streets")
    assert again == info
    assert info.to_coco_categories()[0] == {"id": 7, "name": "sky", "isthing": 0, "color": [70, 130, 180]}


def test_saved_and_loaded(tmp_path: Path) -> None:
    info = make_info(label_divisor=500, ignore_label=9, record_offset=1, bit_depth=12)
    info.save(tmp_path / "made")
    assert DatasetInfo.load(tmp_path / "made") == info
    assert DatasetInfo.load(tmp_path / "made").bit_depth == 12  # Not a part of the comparison.
    assert [path.name for path in (tmp_path / "made").iterdir()] == [FILE_NAME]


def test_saving_where_a_file_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"Cannot write '.*file/dataset_info.json'"):
        make_info().save(tmp_path / "file")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"categories": ()}, "Data set 'streets' has no categories; at least one is needed"),
        ({"ignore_label": 2}, "ignore_label 2 is also a class id, as there are 3 classes; use 3 or more"),
        ({"record_offset": -1}, "record_offset must be 0 or more, got -1"),
        ({"label_divisor": 1}, "label_divisor must be at least 2, got 1"),
        # 256 * 65536 - 1 is the largest that fits: one more does not.
        ({"label_divisor": 65537}, "gives panoptic values above 16777215, which an RGB PNG cannot hold"),
    ],
)
def test_facts_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        make_info(**changes)


def test_the_largest_label_divisor() -> None:
    assert make_info(label_divisor=65536).void == 255 * 65536


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ({"id": 3, "name": "x"}, "Category 1 of 'd' lacks 'isthing'; a COCO panoptic category has"),
        ({"id": 7, "name": "x", "isthing": 0}, "Data set 'd' lists category id 7 twice; ids must differ"),
        ({"id": "x", "name": "x", "isthing": 0}, "Category 1 of 'd' has a value of the wrong kind"),
        ({"id": 3, "name": None, "isthing": 0}, r"wrong kind \(name None\); 'id' is a number, 'name' text"),
        ({"id": 3, "name": " ", "isthing": 0}, r"wrong kind \(name ' '\)"),
        ({"id": 3, "name": "x", "isthing": "yes"}, "Category 1 of 'd' has a value of the wrong kind"),
        ({"id": 3, "name": "x", "isthing": 0, "color": [1, 2]}, "Category 1 of 'd' has a value of the wrong kind"),
        ({"id": 3, "name": "x", "isthing": 0, "color": "red"}, "Category 1 of 'd' has a value of the wrong kind"),
        ("person", "Category 1 of 'd' is 'person'; it must be keys and values"),
    ],
)
def test_wrong_categories(category: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        DatasetInfo.from_coco_categories([CATEGORIES[0], category], name="d")


def test_missing_folder_and_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"Folder '.*none' does not exist; give a folder that `deeplab2-like convert` wrote"
    ):
        DatasetInfo.load(tmp_path / "none")
    with pytest.raises(UserError, match=r"has no dataset_info.json; give a folder that"):
        DatasetInfo.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "3",
        json.dumps({"name": "d", "label_divisor": 1000, "ignore_label": 255}),
        json.dumps({"name": "d", "label_divisor": "x", "ignore_label": 255, "categories": CATEGORIES}),
        json.dumps({"name": "d", "label_divisor": 1000, "ignore_label": 255, "categories": 5}),
    ],
)
def test_damaged_file(tmp_path: Path, content: str) -> None:
    (tmp_path / FILE_NAME).write_text(content)
    with pytest.raises(UserError, match=r"dataset_info.json' is damaged \(.*\); convert the data set again"):
        DatasetInfo.load(tmp_path)


def test_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_bytes(b"\xff\x00\xff")
    with pytest.raises(UserError, match="is damaged"):
        DatasetInfo.load(tmp_path)


def test_a_name_that_is_no_text_is_refused():
    with pytest.raises(UserError, match=r"Category name 'a\\ud800' of 'x' is no Unicode text; use another name"):
        DatasetInfo.from_coco_categories([{"id": 1, "name": "a\ud800", "isthing": 1}], name="x")


@pytest.mark.parametrize(
    "change", [{"id": 1.5}, {"id": float("inf")}, {"isthing": 2}, {"color": [256, 0, 0]}, {"color": [-1, 0, 0]}]
)
def test_numbers_must_be_whole_and_in_range(change):
    with pytest.raises(UserError, match=r"Category 0 of 'x' has a value of the wrong kind"):
        DatasetInfo.from_coco_categories([{"id": 1, "name": "a", "isthing": 1, **change}], name="x")
    # As some tools write them.
    info = DatasetInfo.from_coco_categories([{"id": 1.0, "name": "a", "isthing": True}], name="x")
    assert (info.categories[0].id, info.categories[0].is_thing) == (1, True)


@pytest.mark.parametrize("value", [7, 7.0, "7", "7.0", " 7 "])
def test_whole_numbers_in_several_forms(value: Any) -> None:
    assert whole_number(value) == 7


@pytest.mark.parametrize(
    "value", [7.5, "7.5", "x", "", None, [7], float("inf"), float("nan"), "1e400", 2**63, "9" * 5000]
)
def test_what_is_no_whole_number(value: Any) -> None:
    with pytest.raises((ValueError, TypeError, OverflowError)):
        whole_number(value)


def test_a_color_may_be_hexadecimal() -> None:
    sky = {"id": 1, "name": "sky", "isthing": 0, "color": "#4682b4"}
    assert DatasetInfo.from_coco_categories([sky], name="x").categories[0].color == (70, 130, 180)
