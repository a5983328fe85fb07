"""The COCO instance converter, on small JSONs made here, and the drawing of shapes that overlap."""

import json
import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from deeplab2_like.cli import main
from deeplab2_like.data import pipeline
from deeplab2_like.data.convert import shapes
from deeplab2_like.data.convert.class_lists import read_class_list
from deeplab2_like.data.convert.coco_instances import convert_coco_instances
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import list_shards
from deeplab2_like.errors import UserError

# Class ids are the positions: 0 car, 1 road, 2 person.
CATEGORIES = [{"id": 3, "name": "car"}, {"id": 100, "name": "road"}, {"id": 1, "name": "person"}]
HEIGHT, WIDTH = 4, 6


def box(left: int, top: int, right: int, bottom: int) -> list[list[float]]:
    """A polygon that covers the columns left..right-1 of the rows top..bottom-1."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def mask(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    inside = np.zeros((HEIGHT, WIDTH), np.uint8)
    inside[top:bottom, left:right] = 1
    return np.asfortranarray(inside)


# A large car as a polygon, a small one on it as packed run lengths, a crowd of persons over both as plain run lengths
# (by columns: 12 pixels, then the columns 3 to 5 with 4 rows each), and a road of two polygons.
PACKED = coco_mask.encode(mask(1, 1, 2, 2))
ANNOTATIONS = [
    {"id": 11, "category_id": 3, "segmentation": box(0, 0, 4, 2)},
    {"id": 12, "category_id": 3, "segmentation": {"size": [4, 6], "counts": PACKED["counts"].decode()}},
    {"id": 13, "category_id": 1, "iscrowd": 1, "segmentation": {"size": [4, 6], "counts": [12, 12]}},
    {"id": 14, "category_id": 100, "segmentation": box(0, 3, 1, 4) + box(2, 3, 4, 4)},
]
# The cars are 1 and 2 in the order of the JSON, the crowd has instance 0 and gives way to all others.
PANOPTIC = [
    [1, 1, 1, 1, 2000, 2000],
    [1, 2, 1, 1, 2000, 2000],
    [255000, 255000, 255000, 2000, 2000, 2000],
    [1000, 255000, 1000, 1000, 2000, 2000],
]


class Source:
    """The data set on disk; tests damage it before `convert`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "images").mkdir()
        self.content: dict[str, Any] = {
            "images": [],
            "annotations": [],
            "categories": json.loads(json.dumps(CATEGORIES)),
        }
        for number, name in enumerate("ab"):
            cv2.imwrite(str(folder / "images" / f"{name}.png"), np.full((HEIGHT, WIDTH, 3), number, np.uint8))
            self.content["images"].append({"id": number, "file_name": f"{name}.png", "height": HEIGHT, "width": WIDTH})
            for annotation in json.loads(json.dumps(ANNOTATIONS)):
                self.content["annotations"].append({**annotation, "image_id": number})

    def convert(self, **changes: Any) -> Any:
        json_file = self.folder / "instances_val.json"
        json_file.write_text(json.dumps(self.content))
        arguments = {
            "images": self.folder / "images",
            "json_file": json_file,
            "output_dir": self.folder / "records",
            "stuff": ["road"],
        }
        (report,) = convert_coco_instances(**(arguments | changes))
        return report

    def labels(self) -> list[np.ndarray]:
        folder = self.folder / "records"
        dataset = pipeline.make_eval_dataset(list_shards(folder, "val"), dataset_info=DatasetInfo.load(folder))
        return [example["panoptic"] for example in dataset.as_numpy_iterator()]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_polygons_and_run_lengths_become_a_panoptic_map(source: Source) -> None:
    report = source.convert()
    assert (report.split, report.examples, report.skipped) == ("val", 2, ())
    for label in source.labels():
        np.testing.assert_array_equal(label, PANOPTIC)
    info = DatasetInfo.load(source.folder / "records")
    assert [(c.id, c.name, c.is_thing) for c in info.categories] == [
        (3, "car", True),
        (100, "road", False),
        (1, "person", True),
    ]


def test_the_overlap_rule_decides(source: Source) -> None:
    # The small car comes first, so that the rules differ.
    source.content["annotations"] = [
        {"id": 1, "image_id": 0, "category_id": 3, "segmentation": box(1, 1, 2, 2)},
        {"id": 2, "image_id": 0, "category_id": 3, "segmentation": box(0, 0, 4, 2)},
    ]
    source.convert()
    assert source.labels()[0][:2, :4].tolist() == [[2, 2, 2, 2], [2, 1, 2, 2]]
    source.convert(overlap="later-on-top")
    assert source.labels()[0][:2, :4].tolist() == [[2, 2, 2, 2], [2, 2, 2, 2]]
    with pytest.raises(UserError, match=r"Unknown overlap rule 'larger'.*Known: later-on-top, smaller-on-top"):
        source.convert(overlap="larger")


def test_crowds_can_be_taken_as_objects(source: Source) -> None:
    source.convert(crowds_are_objects=True)
    # The persons have 12 pixels, the large car 8, the road 3, so who is on top is as before; the crowd is person 1.
    np.testing.assert_array_equal(source.labels()[0], np.where(np.array(PANOPTIC) == 2000, 2001, PANOPTIC))


def test_background_takes_what_is_left(source: Source) -> None:
    source.convert(background="rest")
    info = DatasetInfo.load(source.folder / "records")
    assert (info.categories[3].id, info.categories[3].name, info.categories[3].is_thing) == (101, "rest", False)
    np.testing.assert_array_equal(source.labels()[0], np.where(np.array(PANOPTIC) == 255000, 3000, PANOPTIC))
    # A category of the JSON may be the background, too.
    source.convert(background="road", stuff=[], output_dir=source.folder / "other")
    assert DatasetInfo.load(source.folder / "other").stuff_classes == (1,)


def test_an_image_without_annotations_is_void(source: Source) -> None:
    source.content["annotations"] = source.content["annotations"][:4]
    source.convert()
    np.testing.assert_array_equal(source.labels()[1], np.full((HEIGHT, WIDTH), 255000))


def test_stuff_comes_from_pngs(source: Source) -> None:
    (source.folder / "stuff").mkdir()
    (source.folder / "stuff.txt").write_text("# value and name\n7 road\n100 sky\n")
    for name in "ab":
        # The left three columns road, then sky, and a value without a class in the last column.
        values = np.tile(np.array([7, 7, 7, 100, 100, 9], np.uint8), (HEIGHT, 1))
        cv2.imwrite(str(source.folder / "stuff" / f"{name}.png"), values)
    # Leaves the two cars, which are above the stuff.
    source.content["annotations"] = [a for a in source.content["annotations"] if a["category_id"] == 3]
    options = {"stuff_pngs": source.folder / "stuff", "stuff_classes": source.folder / "stuff.txt"}
    source.convert(**options)
    expected = [
        [1, 1, 1, 1, 3000, 255000],
        [1, 2, 1, 1, 3000, 255000],
        [1000, 1000, 1000, 3000, 3000, 255000],
        [1000, 1000, 1000, 3000, 3000, 255000],
    ]
    np.testing.assert_array_equal(source.labels()[0], expected)
    info = DatasetInfo.load(source.folder / "records")
    # 100 is the road's id in the JSON, so the sky takes the next one.
    assert (info.categories[3].id, info.categories[3].name, info.categories[3].is_thing) == (101, "sky", False)

    with pytest.raises(UserError, match=r"Class 'road' of '.*stuff\.txt' is a thing in '.*instances_val\.json'"):
        source.convert(**options, stuff=[])
    with pytest.raises(UserError, match="stuff_pngs and stuff_classes belong together"):
        source.convert(stuff_pngs=source.folder / "stuff")
    cv2.imwrite(str(source.folder / "stuff" / "b.png"), np.zeros((2, 2), np.uint8))
    with pytest.raises(
        UserError, match=r"Image 'b\.png' .*the stuff PNG '.*b\.png' is \(2, 2\) but its image \(4, 6\)"
    ):
        source.convert(**options)


def test_maps_of_coco_stuff(source: Source) -> None:
    """Values are category ids minus one: 0 is the person 1, 2 the car 3, 91 the banner 92, 181 the wood 182."""
    source.content["categories"] = [category for category in CATEGORIES if category["name"] != "road"]
    source.content["annotations"] = [a for a in source.content["annotations"] if a["category_id"] != 100]
    (source.folder / "maps").mkdir()
    values = np.array(
        [[2, 2, 2, 2, 0, 0], [2, 2, 2, 2, 0, 0], [91, 91, 0, 0, 0, 0], [181, 255, 181, 0, 2, 2]], np.uint8
    )
    for name in "ab":
        cv2.imwrite(str(source.folder / "maps" / f"{name}.png"), values)
    source.convert(stuff=[], stuff_pngs=source.folder / "maps", stuff_classes=Path("coco-stuff"))
    info = DatasetInfo.load(source.folder / "records")
    class_of_name = {category.name: class_id for class_id, category in enumerate(info.categories)}
    assert info.num_classes == len(source.content["categories"]) + 91
    assert info.categories[class_of_name["wood"]].id == 182
    banner, wood = class_of_name["banner"] * 1000, class_of_name["wood"] * 1000
    # The cars and the crowd of persons, now class 1, are as without the maps; other pixels of things are void.
    expected = [
        [1, 1, 1, 1, 1000, 1000],
        [1, 2, 1, 1, 1000, 1000],
        [banner, banner, 255000, 1000, 1000, 1000],
        [wood, 255000, wood, 1000, 1000, 1000],
    ]
    np.testing.assert_array_equal(source.labels()[0], expected)


def test_divisor_exceeds_the_number_of_instances(source: Source) -> None:
    source.content["annotations"] = [{**source.content["annotations"][0], "id": i} for i in range(1000)]
    source.convert()
    # All cars lie on each other, and of equal areas the last is on top.
    assert DatasetInfo.load(source.folder / "records").label_divisor == 10_000
    assert source.labels()[0][0, 0] == 1000


def change(key: str, value: Any) -> Any:
    def damage(source: Source) -> None:
        source.content["annotations"][4][key] = value

    return damage


def other_size(source: Source) -> None:
    cv2.imwrite(str(source.folder / "images" / "b.png"), np.zeros((5, 6, 3), np.uint8))


def doubled_image(source: Source) -> None:
    source.content["images"].append(source.content["images"][1])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (change("category_id", 2), "its annotation of id 11 has category_id 2, which 'categories' does not list"),
        (change("category_id", None), "its annotation of id 11 has category_id None, which"),
        (
            lambda source: source.content["annotations"][4].update(id=None, category_id=2),
            "entry 4 of 'annotations' has",
        ),
        (change("segmentation", []), "id 11 has no 'segmentation'; a box does not say which pixels are meant"),
        (change("segmentation", [[0, 0, 1, 1]]), "id 11 has a polygon that is not a list x, y, x, y"),
        (change("segmentation", [[0, 0, 1, 1, 2, "x"]]), "id 11 has a polygon with a coordinate that is not a number"),
        (
            change("segmentation", [[0, 0, 1, 1, 2, 1e9]]),
            "id 11 has a polygon with a coordinate far outside of",
        ),
        (change("iscrowd", "no"), "id 11 has iscrowd 'no'; it must be 0 or 1"),
        (
            change("segmentation", {"size": [6, 4], "counts": [24]}),
            r"id 11 has run lengths of size \[6, 4\], but its image is \[4, 6\]",
        ),
        (change("segmentation", {"size": [4, 6], "counts": [1, 2]}), r"cannot be read \(they cover 3 of 24 pixels\)"),
        (change("segmentation", {"size": [4, 6], "counts": "62"}), r"cannot be read \(they cover 8 of 24 pixels\)"),
        (change("segmentation", {"size": [4, 6], "counts": None}), "id 11 has run lengths that cannot be read"),
        (doubled_image, "id 1 is in 'images' more than once"),
        (other_size, "it is 5x6 but its label is 4x6"),
        (lambda source: (source.folder / "images" / "b.png").unlink(), "the image '.*b.png' cannot be read"),
    ],
)
def test_faulty_image_stops_or_is_skipped(source: Source, damage: Any, message: str) -> None:
    damage(source)
    with pytest.raises(UserError, match=r"^Image 'b\.png' of '.*instances_val\.json': .*" + message):
        source.convert()
    report = source.convert(on_error="skip-image")
    assert (report.examples, len(report.skipped)) == (1, 1)
    np.testing.assert_array_equal(source.labels(), [PANOPTIC])


def test_crowds_may_be_written_in_other_ways(source: Source) -> None:
    for annotation, written in zip(source.content["annotations"], ("0", None, "1", False) * 2, strict=True):
        annotation["iscrowd"] = written
    source.convert()
    np.testing.assert_array_equal(source.labels(), [PANOPTIC, PANOPTIC])


@pytest.mark.parametrize(
    ("height", "message"),
    [
        (10**9, r"its label has 1000000000 x 6 pixels \(height x width\), more than the limit of 178956970; cut it"),
        (-3, r"its height and width are given as -3 and 6, which is impossible; correct them\.$"),
    ],
)
def test_a_size_that_no_image_has(source: Source, height: int, message: str) -> None:
    source.content["images"][1]["height"] = height
    with pytest.raises(UserError, match=message):
        source.convert()


def test_a_json_without_annotations_is_refused(source: Source) -> None:
    source.content["annotations"] = []
    with pytest.raises(UserError, match=r"has no annotations, so everything would be void"):
        source.convert()
    source.convert(background="other")
    assert (np.array(source.labels()) == 3000).all()


def test_unmatched_entries_are_named(source: Source) -> None:
    source.content["annotations"][0]["image_id"] = 7
    del source.content["images"][1]["id"]
    report = source.convert(on_error="skip")
    assert report.examples == 1
    assert "entry 0 of 'annotations' has image_id 7, which 'images' does not list" in report.skipped_annotations[0]
    assert "entry 1 of 'images' lacks 'id' or 'file_name'" in report.skipped[0]


def test_an_annotation_without_an_image_is_left_out_and_counted(source: Source) -> None:
    source.content["annotations"][0]["image_id"] = 7  # A car.
    with pytest.raises(
        UserError, match=r"instances_val\.json': entry 0 of 'annotations' has image_id 7, which 'images'"
    ):
        source.convert()
    report = source.convert(on_error="skip-annotation")
    assert report.examples == 2
    assert report.skipped == ()
    assert report.lost["faulty, left out by --on-error"] == {"car": (1, 0)}
    assert len(report.skipped_annotations) == 1
    (line,) = (source.folder / "records" / "errors.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == str(source.folder / "instances_val.json")


def test_polygons_of_pairs_are_named(source: Source) -> None:
    source.content["annotations"][0]["segmentation"] = [[[0, 0], [4, 0], [4, 2]]]
    with pytest.raises(
        UserError, match=r"has a polygon of pairs \[x, y\], but it must be a flat list x, y, x, y, \.\.\."
    ):
        source.convert()


def test_objects_that_become_background_are_warned_of(source: Source) -> None:
    # Each of the two images has two cars; the road is stuff.
    warning = "Warning: 4 objects of the class 'car' became background, which is stuff;"
    assert any(note.startswith(warning) for note in source.convert(background="car").notes)
    assert not any("became background" in note for note in source.convert(background="road").notes)


def test_unknown_stuff_suggests_a_name(source: Source) -> None:
    with pytest.raises(UserError, match=r"Unknown class in the list of stuff 'roads'\. Did you mean 'road'\?"):
        source.convert(stuff=["roads"])


def test_json_without_lists_is_named(source: Source) -> None:
    del source.content["annotations"]
    with pytest.raises(UserError, match=r"instances_val\.json' has no list 'annotations'; a COCO instance JSON has"):
        source.convert()


def test_command(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    source.convert()  # Writes the JSON.
    arguments = [
        "--images",
        source.folder / "images",
        "--json",
        source.folder / "instances_val.json",
        "--stuff",
        "road",
    ]
    command = ["convert", "coco-instances", *arguments, "--output-dir", source.folder / "records", "--split", "mine"]
    assert main([str(word) for word in command]) == 0
    assert "Split 'mine': 2 images, 0 skipped." in capsys.readouterr().out
    # A folder of another machine is looked for beside the JSON.
    command[3] = Path("/data/of/somebody/images")
    assert main([str(word) for word in command]) == 0
    found = source.folder / "images"
    assert f"'/data/of/somebody/images' does not exist; using '{found}', beside the JSON." in capsys.readouterr().out


def test_run_lengths_are_unpacked() -> None:
    random = np.random.default_rng(0)
    for density in (0.02, 0.5, 1.0):
        # Runs of less than 16 and of more than 1024 pixels, which take one character and three.
        inside = random.random((90, 70)) < density
        inside[:, 20:50] &= inside[:1, 20:50]
        packed = coco_mask.encode(np.asfortranarray(inside, np.uint8))
        np.testing.assert_array_equal(shapes.decode_runs(packed), inside)


# Lists of classes.


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("road\n\nsky blue\n", [{"id": 0, "name": "road"}, {"id": 1, "name": "sky blue"}]),
        ("# ids\n7: road\n9 sky blue", [{"id": 7, "name": "road"}, {"id": 9, "name": "sky blue"}]),
        ('["road", "sky"]', [{"id": 0, "name": "road"}, {"id": 1, "name": "sky"}]),
        ('{"7": "road"}', [{"id": 7, "name": "road"}]),
        ('[{"id": 7, "name": "road", "color": [1, 2, 3]}]', [{"id": 7, "name": "road", "color": [1, 2, 3]}]),
    ],
)
def test_list_of_classes(tmp_path: Path, text: str, expected: list[dict[str, Any]]) -> None:
    (tmp_path / "classes").write_text(text)
    assert read_class_list(tmp_path / "classes") == expected


@pytest.mark.parametrize("text", ['{"x": "road"}', '[{"id": 7}]', "[1, 2]", "{", '{"1": 2}'])
def test_list_of_classes_that_is_not_understood(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes").write_text(text)
    with pytest.raises(UserError, match=r"The list of classes '.*classes' is not understood .*it may be a text"):
        read_class_list(tmp_path / "classes")


def test_folders_of_one_split_are_refused_and_others_named(source: Source) -> None:
    source.convert()
    root = source.folder / "export"
    for name in ("train", "val", "holdout"):
        shutil.copytree(source.folder / "images", root / name)
        shutil.copy(source.folder / "instances_val.json", root / name / "_annotations.coco.json")
    arguments = {"json_file": root, "output_dir": source.folder / "other"}
    reports = convert_coco_instances(**arguments)
    assert [report.split for report in reports] == ["train", "val"]
    assert any("Warning: left out" in note and "holdout" in note for note in reports[0].notes)
    shutil.copytree(root / "val", root / "valid")
    with pytest.raises(UserError, match=r"val/_ann.* and '.*valid/_ann.*' are both of the split 'val'; give one of"):
        convert_coco_instances(**arguments)


def test_void_in_the_stuff_list_is_no_class(source: Source) -> None:
    (source.folder / "stuff").mkdir()
    (source.folder / "stuff.txt").write_text("100 sky\n255 void\n")
    for name in "ab":
        cv2.imwrite(str(source.folder / "stuff" / f"{name}.png"), np.full((HEIGHT, WIDTH), 255, np.uint8))
    report = source.convert(stuff_pngs=source.folder / "stuff", stuff_classes=source.folder / "stuff.txt")
    assert "void" not in [c.name for c in DatasetInfo.load(source.folder / "records").categories]
    assert "The value 255 of stuff PNGs is void because of its name 'void'." in report.notes
    np.testing.assert_array_equal(source.labels()[0], PANOPTIC)
