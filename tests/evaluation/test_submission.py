"""Files for benchmark servers: worked contents, ids, reading back, and messages about what does not fit."""

import dataclasses
import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.coco_format import CocoPanopticReader
from deeplab2_like.evaluation.submission import (
    CITYSCAPES_LABEL_IDS,
    SUBMISSIONS,
    CityscapesSubmission,
    CocoSubmission,
    Instances,
    make_submission,
    read_image_ids,
)
from deeplab2_like.files import OUTPUTS_FILE

# Cityscapes with train ids, as `createPanopticImgs.py --use-train-id` makes it; its label ids are 7, 24 and 26.
INFO = DatasetInfo(
    "streets",
    (
        Category(0, "road", False, (128, 64, 128)),
        Category(11, "person", True, (220, 20, 60)),
        Category(13, "car", True, (0, 0, 142)),
    ),
)
ROAD, PERSON, CAR, OTHER_CAR, VOID = 0, 1001, 2001, 2002, 255000
PANOPTIC = np.array(
    [
        [ROAD, ROAD, CAR, CAR],
        [VOID, PERSON, CAR, OTHER_CAR],
    ],
    np.int32,
)
# The table of segments of a system also lists stuff, and segments that others cover.
SCORES = {ROAD: 0.9, CAR: 0.5, PERSON: 0.25, 2007: 0.4}
AACHEN = "aachen_000000_000019"


def _files(folder: Path) -> list[str]:
    """The files in a folder and its subfolders, hidden ones included."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != OUTPUTS_FILE)
    return sorted(str(path.relative_to(folder)) for path in paths)


def _read(path: Path) -> np.ndarray:
    """Reads an image as it is, uint8 [H, W] if it is gray."""
    image = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    assert image.dtype == np.uint8
    return image


# ---------------------------------------------------------------------------------------------------------------------
# COCO.
# ---------------------------------------------------------------------------------------------------------------------


def test_coco_holds_maps_under_the_ids_of_the_data_set(tmp_path):
    submission = CocoSubmission(tmp_path, INFO)
    submission.add("000000000139.jpg", PANOPTIC, SCORES)
    submission.add("sub/street.jpg", np.full((1, 2), CAR, np.int32), {})
    assert submission.close() == [tmp_path / "panoptic.json", tmp_path / "panoptic"]
    assert _files(tmp_path) == ["panoptic.json", "panoptic/000000000139.png", "panoptic/sub/street.png"]

    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert [(image["id"], image["file_name"]) for image in content["images"]] == [
        (139, "000000000139.jpg"),
        ("street", "sub/street.jpg"),
    ]
    # In ascending order of the panoptic values; only segments of the map.
    assert [(s["category_id"], s["area"], s.get("score")) for s in content["annotations"][0]["segments_info"]] == [
        (0, 2, 0.9),
        (11, 1, 0.25),
        (13, 3, 0.5),
        (13, 1, None),
    ]
    reader = CocoPanopticReader(tmp_path / "panoptic.json", tmp_path / "panoptic")
    assert reader.dataset_info == INFO
    np.testing.assert_array_equal(reader.read(139), PANOPTIC)
    np.testing.assert_array_equal(reader.read("street"), [[CAR, CAR]])


def test_coco_takes_ids_from_a_json(tmp_path):
    json_file = tmp_path / "image_info.json"
    images = [
        {"id": 7, "file_name": "a.jpg", "height": 2},
        {"id": "x", "file_name": "sub/b.png"},
        {"id": 9, "file_name": "0012.jpg"},
    ]
    json_file.write_text(json.dumps({"images": images, "categories": []}))
    image_ids = read_image_ids(json_file)
    assert image_ids == {"a.jpg": 7, "sub/b.png": "x", "0012.jpg": 9}
    with make_submission("coco", tmp_path / "out", INFO, image_ids=image_ids, stem="panoptic_test_mine") as submission:
        submission.add("test2017/a.jpg", PANOPTIC, SCORES)  # A folder that the JSON leaves out.
        submission.add("sub/b.png", PANOPTIC, SCORES)
        submission.add("0012", PANOPTIC, SCORES)  # Without an ending, as in DeepLab2's records; not 12.
        with pytest.raises(UserError, match=r"Image 'c\.jpg' is not among the 3 images of the JSON of image ids; give"):
            submission.add("c.jpg", PANOPTIC, SCORES)
        # Not only the name in a folder: 'b.png' would be another image.
        with pytest.raises(UserError, match=r"Image 'b\.png' is not among the 3 images"):
            submission.add("b.png", PANOPTIC, SCORES)
    content = json.loads((tmp_path / "out/panoptic_test_mine.json").read_text())
    assert [annotation["image_id"] for annotation in content["annotations"]] == [7, "x", 9]
    for annotation in content["annotations"]:
        assert (tmp_path / "out/panoptic_test_mine" / annotation["file_name"]).is_file()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"images": [', r"ids\.json' is not a JSON file \(Expecting value"),
        ("[]", r"ids\.json' does not list images \(TypeError"),
        ('{"annotations": []}', r"ids\.json' does not list images \(KeyError\('images'\)\); give a COCO JSON"),
        ('{"images": [{"id": 3}]}', r"ids\.json' does not list images \(KeyError\('file_name'\)\)"),
        ('{"images": [{"file_name": "a.jpg"}]}', r"ids\.json' does not list images \(KeyError\('id'\)\)"),
        (
            '{"images": [{"file_name": "a", "id": 1}, {"file_name": "b", "id": 2}, {"file_name": "b", "id": 3}]}',
            r"ids\.json' lists image 'b' twice; file names must differ",
        ),
    ],
)
def test_json_of_image_ids_that_is_none(tmp_path, content, message):
    (tmp_path / "ids.json").write_text(content)
    with pytest.raises(UserError, match=message):
        read_image_ids(tmp_path / "ids.json")


def test_json_of_image_ids_that_is_absent(tmp_path):
    with pytest.raises(UserError, match=r"JSON of image ids '.*absent\.json' cannot be read \(No such file"):
        read_image_ids(tmp_path / "absent.json")


# ---------------------------------------------------------------------------------------------------------------------
# Cityscapes.
# ---------------------------------------------------------------------------------------------------------------------


def test_cityscapes_of_a_worked_map(tmp_path):
    submission = CityscapesSubmission(tmp_path, INFO)
    submission.add(f"aachen/{AACHEN}_leftImg8bit.png", PANOPTIC, SCORES)
    assert submission.close() == [tmp_path / name for name in ("panoptic.json", "panoptic", "semantic", "instances")]
    assert _files(tmp_path) == [
        f"instances/{AACHEN}.txt",
        f"instances/masks/{AACHEN}_000.png",
        f"instances/masks/{AACHEN}_001.png",
        "panoptic.json",
        f"panoptic/{AACHEN}.png",
        f"semantic/{AACHEN}_pred_labelIds.png",
    ]
    labels = _read(tmp_path / f"semantic/{AACHEN}_pred_labelIds.png")
    np.testing.assert_array_equal(labels, [[7, 7, 26, 26], [0, 24, 26, 26]])

    # The car and the person. The other car has no score, and road is no thing; nothing is left of value 2007.
    assert (tmp_path / f"instances/{AACHEN}.txt").read_text() == (
        f"masks/{AACHEN}_000.png 26 0.5\nmasks/{AACHEN}_001.png 24 0.25\n"
    )
    car = _read(tmp_path / f"instances/masks/{AACHEN}_000.png")
    np.testing.assert_array_equal(car, [[0, 0, 255, 255], [0, 0, 255, 0]])
    person = _read(tmp_path / f"instances/masks/{AACHEN}_001.png")
    np.testing.assert_array_equal(person, [[0, 0, 0, 0], [0, 255, 0, 0]])

    reader = CocoPanopticReader(tmp_path / "panoptic.json", tmp_path / "panoptic")
    assert [(category.id, category.name) for category in reader.dataset_info.categories] == [
        (7, "road"),
        (24, "person"),
        (26, "car"),
    ]
    assert reader.annotations[AACHEN]["file_name"] == f"{AACHEN}.png"
    np.testing.assert_array_equal(reader.read(AACHEN), PANOPTIC)


def test_cityscapes_prefers_masks_that_may_overlap(tmp_path):
    masks = np.zeros((4, 2, 4), bool)
    masks[0, :, 2:] = True
    masks[1, 1] = True
    masks[3, 0, 0] = True
    # The third is empty, the fourth an unused row.
    scores = np.array([1 / 3, 1e-5, 0.7, 0.0], np.float32)
    with make_submission("cityscapes", tmp_path, INFO) as submission:
        submission.add(f"{AACHEN}.png", PANOPTIC, SCORES, Instances(masks, np.array([2, 1, 1, 2]), scores))
    lines = (tmp_path / f"instances/{AACHEN}.txt").read_text().splitlines()
    assert [line.split(" ")[:2] for line in lines] == [
        [f"masks/{AACHEN}_000.png", "26"],
        [f"masks/{AACHEN}_001.png", "24"],
    ]
    # As many digits as tell two floats of 32 bits apart.
    np.testing.assert_array_equal(np.array([line.split(" ")[2] for line in lines], np.float32), scores[:2])
    for mask, line in zip(masks, lines, strict=False):
        np.testing.assert_array_equal(_read(tmp_path / "instances" / line.split(" ")[0]), np.where(mask, 255, 0))


def test_cityscapes_image_without_instances_has_its_file(tmp_path):
    with CityscapesSubmission(tmp_path, INFO) as submission:
        submission.add(AACHEN, np.full((2, 3), VOID, np.int32), {})
    assert (tmp_path / f"instances/{AACHEN}.txt").read_bytes() == b""
    np.testing.assert_array_equal(_read(tmp_path / f"semantic/{AACHEN}_pred_labelIds.png"), np.zeros((2, 3)))
    reader = CocoPanopticReader(tmp_path / "panoptic.json", tmp_path / "panoptic", dataset_info=INFO)
    np.testing.assert_array_equal(reader.read(AACHEN), np.full((2, 3), VOID))


def test_cityscapes_label_ids_are_the_19_that_count():
    # The train ids are the ranks of the label ids.
    assert list(CITYSCAPES_LABEL_IDS.values()) == sorted(set(CITYSCAPES_LABEL_IDS.values()))
    assert [list(CITYSCAPES_LABEL_IDS)[train_id] for train_id in (0, 10, 11, 13, 18)] == [
        "road",
        "sky",
        "person",
        "car",
        "bicycle",
    ]
    assert len(CITYSCAPES_LABEL_IDS) == 19


@pytest.mark.parametrize(
    ("name", "image_id"),
    [
        (AACHEN, AACHEN),
        (f"val/{AACHEN}_leftImg8bit.jpg", AACHEN),
        # What createPanopticImgs.py writes as the file name of an image.
        (f"{AACHEN}_gtFine_leftImg8bit.png", AACHEN),
        ("bad-honnef_000001_123456.png", "bad-honnef_000001_123456"),
    ],
)
def test_cityscapes_id_is_the_beginning_of_the_name(tmp_path, name, image_id):
    with CityscapesSubmission(tmp_path, INFO) as submission:
        submission.add(name, PANOPTIC, SCORES)
    assert (tmp_path / f"panoptic/{image_id}.png").is_file()
    assert json.loads((tmp_path / "panoptic.json").read_text())["annotations"][0]["image_id"] == image_id


@pytest.mark.parametrize(
    "name", ["street.png", "aachen_000000.png", "aachen_00000_000019.png", "aachen_000000_0000190_leftImg8bit.png"]
)
def test_cityscapes_refuses_other_names(tmp_path, name):
    with pytest.raises(UserError, match=rf"Image '{name}' is not named as in Cityscapes, CITY_000000_000000_left"):
        CityscapesSubmission(tmp_path, INFO).add(name, PANOPTIC, SCORES)
    assert not _files(tmp_path)


def test_cityscapes_refuses_other_classes_and_a_json_of_ids(tmp_path):
    light = dataclasses.replace(INFO, categories=(*INFO.categories, Category(5, "traffic_light", True, (0, 0, 0))))
    with pytest.raises(UserError, match=r"Class 'traffic_light' of data set '.*' is none of those that Cityscapes"):
        CityscapesSubmission(tmp_path / "out", light)
    with pytest.raises(UserError, match="Image ids of Cityscapes are part of the file names; leave out"):
        make_submission("cityscapes", tmp_path / "out", INFO, image_ids={})
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("mask", "class_id", "message"),
    [
        (
            np.ones((4, 2), bool),
            2,
            r"a map of shape \(2, 4\), has an instance of class 2 with a mask of shape \(4, 2\)",
        ),
        (np.ones((2, 4), bool), 3, r"has an instance of class 3 with .* and classes are 0\.\.2\."),
        (np.ones((2, 4), bool), -1, r"has an instance of class -1 with"),
    ],
)
def test_cityscapes_refuses_instances_that_do_not_fit(tmp_path, mask, class_id, message):
    with pytest.raises(UserError, match=message):
        CityscapesSubmission(tmp_path, INFO).add(AACHEN, PANOPTIC, SCORES, Instances([mask], [class_id], [0.5]))
    assert not (tmp_path / "instances").exists()


# ---------------------------------------------------------------------------------------------------------------------
# Both.
# ---------------------------------------------------------------------------------------------------------------------


def test_unknown_submission_lists_the_known(tmp_path):
    with pytest.raises(UserError, match=r"Unknown submission 'cocoa'. Did you mean 'coco'\? Known: cityscapes, coco\."):
        make_submission("cocoa", tmp_path, INFO)


def test_names_are_checked_before_anything_is_predicted(tmp_path):
    submission = make_submission("coco", tmp_path, INFO)
    submission.check_names(["a/1.jpg", "b/2.jpg"])
    with pytest.raises(UserError, match=r"Images 'a/1.jpg' and 'b/1.png' have the same id, '1'"):
        submission.check_names(["a/1.jpg", "b/1.png"])


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_each_image_comes_once(tmp_path, name):
    submission = make_submission(name, tmp_path, INFO)
    submission.add(f"a/{AACHEN}.png", PANOPTIC, SCORES)
    with pytest.raises(
        UserError, match=rf"Images 'a/{AACHEN}\.png' and 'b/{AACHEN}\.jpg' have the same id, '{AACHEN}'"
    ):
        submission.add(f"b/{AACHEN}.jpg", PANOPTIC, SCORES)


@pytest.mark.parametrize("name", SUBMISSIONS)
def test_no_json_after_an_error_nor_that_of_an_earlier_run(tmp_path, name):
    with make_submission(name, tmp_path / "new/out", INFO) as submission:
        submission.add(AACHEN, PANOPTIC, SCORES)
    assert (tmp_path / "new/out/panoptic.json").is_file()

    def write():
        with make_submission(name, tmp_path / "new/out", INFO) as submission:
            submission.add(AACHEN, np.full((2, 2), 3000, np.int32), {})

    with pytest.raises(UserError, match="panoptic map holds value 3000, which is class 3; data set 'streets' has"):
        write()
    assert not (tmp_path / "new/out/panoptic.json").exists()


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Output folder '.*file' cannot be created \(there is a file in its place\)"):
        make_submission("coco", tmp_path / "file", INFO)


def test_cityscapes_pixel_level_result_is_that_of_the_semantic_head(tmp_path):
    # The head calls the person a car, and the pixel without a segment road. It leaves out two pixels of cars.
    semantic = np.array([[0, 0, 255, 2], [0, 2, 2, 255]], np.int32)
    with CityscapesSubmission(tmp_path, INFO) as submission:
        submission.add(AACHEN, PANOPTIC, SCORES, semantic=semantic)
    labels = _read(tmp_path / f"semantic/{AACHEN}_pred_labelIds.png")
    np.testing.assert_array_equal(labels, [[7, 7, 26, 26], [7, 26, 26, 26]])
    reader = CocoPanopticReader(tmp_path / "panoptic.json", tmp_path / "panoptic")
    np.testing.assert_array_equal(reader.read(AACHEN), PANOPTIC)
