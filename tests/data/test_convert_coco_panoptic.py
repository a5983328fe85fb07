"""The COCO panoptic converter, on small data sets made here, and the scenes converter."""

import json

import cv2
import numpy as np
import pytest

from deeplab2_like.data import panoptic_label, pipeline
from deeplab2_like.data.convert import coco_panoptic, common
from deeplab2_like.data.convert.scenes import convert_scenes
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import list_shards, list_splits
from deeplab2_like.errors import UserError

# Ids with gaps and out of order; class ids are the positions: 0 sky, 1 person, 2 car.
CATEGORIES = [
    {"id": 7, "name": "sky", "isthing": 0, "color": [1, 2, 3]},
    {"id": 1, "name": "person", "isthing": 1, "color": [4, 5, 6]},
    {"id": 30, "name": "car", "isthing": 1, "color": [7, 8, 9]},
]
# One id per byte of the PNG's colors, and 0 for unlabeled.
IDS = np.array([[5, 5, 300, 300], [70_000, 70_001, 9, 0]])
SEGMENTS = [
    {"id": 300, "category_id": 1, "iscrowd": 0},
    {"id": 5, "category_id": 7, "iscrowd": 0},
    {"id": 9, "category_id": 1, "iscrowd": 1},
    {"id": 70_001, "category_id": 30, "iscrowd": 0},
    {"id": 70_000, "category_id": 1},
]
# 300 is the first person, 70000 the second, 9 a crowd, which has instance 0 like the sky; 0 is void.
PANOPTIC = np.array([[0, 0, 1001, 1001], [1002, 2001, 1000, 255_000]])


class Source:
    """A data set on disk; tests damage it before `convert`."""

    def __init__(self, folder, names=("a", "b", "c")):
        self.folder = folder
        (folder / "images").mkdir()
        (folder / "panoptic").mkdir()
        self.content = {"images": [], "annotations": [], "categories": json.loads(json.dumps(CATEGORIES))}
        rng = np.random.default_rng(0)
        for number, name in enumerate(names):
            self.write_image(name, rng.integers(0, 256, (2, 4, 3), np.uint8))
            self.write_ids(name, IDS)
            self.content["images"].append({"id": number, "file_name": f"{name}.png", "height": 2, "width": 4})
            self.content["annotations"].append(
                {"image_id": number, "file_name": f"{name}.png", "segments_info": json.loads(json.dumps(SEGMENTS))}
            )

    def write_image(self, name, image):
        cv2.imwrite(str(self.folder / "images" / f"{name}.png"), image)

    def write_ids(self, name, ids):
        cv2.imwrite(str(self.folder / "panoptic" / f"{name}.png"), panoptic_label.ids_to_rgb(ids)[:, :, ::-1])

    def convert(self, json_name="panoptic_train2017.json", **changes):
        (self.folder / json_name).write_text(json.dumps(self.content))
        arguments = {
            "images": self.folder / "images",
            "panoptic": self.folder / "panoptic",
            "json_file": self.folder / json_name,
            "output_dir": self.folder / "records",
        }
        (report,) = coco_panoptic.convert_coco_panoptic(**(arguments | changes))
        return report

    def examples(self, split="train"):
        folder = self.folder / "records"
        dataset = pipeline.make_eval_dataset(list_shards(folder, split), dataset_info=DatasetInfo.load(folder))
        return list(dataset.as_numpy_iterator())


@pytest.fixture
def source(tmp_path):
    return Source(tmp_path)


def records(folder):
    """All files of a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def test_labels_and_images_come_through_exactly(source):
    report = source.convert()
    assert report == common.ConversionReport("train", 3, ())
    examples = source.examples()
    assert [example["image_id"] for example in examples] == [b"a.png", b"b.png", b"c.png"]
    for name, example in zip("abc", examples, strict=True):
        np.testing.assert_array_equal(example["panoptic"], PANOPTIC)
        stored = cv2.imread(str(source.folder / "images" / f"{name}.png"))[:, :, ::-1]
        np.testing.assert_array_equal(example["image"], stored)


def test_classes_come_from_the_json_alone(source):
    source.convert()
    info = DatasetInfo.load(source.folder / "records")
    assert info.to_coco_categories() == CATEGORIES
    assert info.label_divisor == 1000
    assert info.thing_classes == (1, 2)


def test_random_map_equals_a_pass_per_segment(source):
    rng = np.random.default_rng(1)
    segment_ids = np.unique(rng.integers(1, 2**24, 200))
    ids = rng.choice(np.append(segment_ids, 0), (60, 70))
    ids.flat[: len(segment_ids)] = segment_ids
    segments = [{"id": int(i), "category_id": int(rng.choice([7, 1, 30]))} for i in rng.permutation(segment_ids)]
    expected = np.full(ids.shape, 255_000)
    seen = {1: 0, 30: 0}
    for segment in segments:
        if segment["category_id"] == 7:
            expected[ids == segment["id"]] = 0
        else:
            seen[segment["category_id"]] += 1
            class_id = {1: 1, 30: 2}[segment["category_id"]]
            expected[ids == segment["id"]] = class_id * 1000 + seen[segment["category_id"]]

    source.write_image("b", np.zeros((60, 70, 3), np.uint8))
    source.write_ids("b", ids)
    source.content["annotations"][1]["segments_info"] = segments
    source.convert()
    np.testing.assert_array_equal(source.examples()[1]["panoptic"], expected)


def test_unlabeled_image_is_all_void(source):
    source.write_ids("b", np.zeros((2, 4), int))
    source.content["annotations"][1]["segments_info"] = []
    source.convert()
    np.testing.assert_array_equal(source.examples()[1]["panoptic"], np.full((2, 4), 255_000))


def test_files_do_not_depend_on_workers(tmp_path):
    source = Source(tmp_path, names=[f"{number:02d}" for number in range(20)])
    for workers in (1, 3):
        source.convert(output_dir=tmp_path / str(workers), workers=workers, shards=2)
    assert records(tmp_path / "1") == records(tmp_path / "3")
    assert sorted(records(tmp_path / "1")) == [
        ".train.conversion.json",
        "dataset_info.json",
        "train-00000-of-00002.tfrecord",
        "train-00001-of-00002.tfrecord",
    ]


def test_there_are_no_more_shards_than_images(source):
    source.convert(shards=50)
    assert len(list_shards(source.folder / "records", "train")) == 3


@pytest.mark.parametrize(
    ("json_name", "split"),
    [
        ("panoptic_train2017.json", "train"),
        ("panoptic_val2017.json", "val"),
        ("my-Validation.json", "val"),
        ("test.json", "test"),
        ("instances_valid.json", "val"),
        ("panoptic_minival2014.json", "val"),
        ("dev.json", "val"),
        ("training.v2.json", "train"),
        ("image_info_test-dev2017.json", "test"),  # The first word counts.
        ("Testing/labels.json", "test"),
        ("valid/_annotations.coco.json", "val"),
        ("train/val.json", "val"),  # The file's name counts before the folder's.
    ],
)
def test_split_is_guessed_from_the_file_name(source, json_name, split):
    (source.folder / json_name).parent.mkdir(exist_ok=True)
    assert source.convert(json_name).split == split
    assert list_splits(source.folder / "records") == [split]


@pytest.mark.parametrize("json_name", ["a/valuable.json", "a/labels.json", "trainer/trainval2017.json", "a/devé.json"])
def test_split_must_be_given_if_no_word_tells_it(source, json_name):
    (source.folder / json_name).parent.mkdir()
    # An empty record folder gets "train"; the same source again is the same split.
    for _ in range(2):
        assert source.convert(json_name).split == "train"
    source.convert(json_name, split="mine")
    message = r"neither the name nor that of the folder above has one of the words train, training, val.*with --split"
    with pytest.raises(UserError, match=message):
        source.convert(json_name)
    assert list_splits(source.folder / "records") == ["mine", "train"]


def test_split_name_can_be_given(source):
    assert source.convert(split="nightly").split == "nightly"


def test_progress_counts_every_image(source):
    calls = []
    source.content["images"][1]["file_name"] = "absent.png"
    source.convert(on_error="skip", progress=lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)]


# Label divisor.


def many_instances(source, count):
    """Gives image a `count` persons, one pixel each."""
    ids = np.arange(1, count + 1).reshape(1, count)
    source.write_image("a", np.zeros((1, count, 3), np.uint8))
    source.write_ids("a", ids)
    source.content["annotations"][0]["segments_info"] = [{"id": int(i), "category_id": 1} for i in ids[0]]


# 999 is the last instance id that a divisor of 1000 can tell from the next class.
@pytest.mark.parametrize(("count", "divisor"), [(999, 1000), (1000, 10_000)])
def test_divisor_exceeds_the_number_of_instances(source, count, divisor):
    many_instances(source, count)
    source.convert()
    assert DatasetInfo.load(source.folder / "records").label_divisor == divisor
    np.testing.assert_array_equal(source.examples()[0]["panoptic"], divisor + np.arange(1, count + 1)[None])


def test_too_many_instances_ask_for_a_divisor(source):
    many_instances(source, 10_000)
    with pytest.raises(UserError, match=r"10000 instances of one class.*give a label_divisor above 10000"):
        source.convert()
    source.convert(label_divisor=12_000)
    assert source.examples()[0]["panoptic"].max() == 22_000


def test_given_divisor_must_be_large_enough(source):
    with pytest.raises(
        UserError, match=r"label_divisor 3 is too small: .* has 3 instances of one class; give 4 or more"
    ):
        source.convert(label_divisor=3)
    source.convert(label_divisor=4)
    assert source.examples()[0]["panoptic"][0, 2] == 5


def test_second_split_takes_the_divisor_of_the_first(source):
    source.convert(label_divisor=5000)
    source.convert("panoptic_val.json")
    assert DatasetInfo.load(source.folder / "records").label_divisor == 5000
    assert source.examples("val")[0]["panoptic"][0, 2] == 5001


def test_second_split_with_more_instances_is_refused(source):
    source.convert()
    before = records(source.folder / "records")
    many_instances(source, 1000)
    message = r"holds splits \(train\) with label_divisor 1000, but split 'val' needs 10000; convert all of them"
    with pytest.raises(UserError, match=message):
        source.convert("panoptic_val.json")
    assert records(source.folder / "records") == before
    # The same split alone may be replaced.
    source.convert()
    assert DatasetInfo.load(source.folder / "records").label_divisor == 10_000


def test_the_only_split_may_change_its_categories(source):
    source.convert()
    source.content["categories"][1]["name"] = "human"
    source.convert()
    assert "human" in [category.name for category in DatasetInfo.load(source.folder / "records").categories]


def test_other_categories_in_the_folder_are_refused(source):
    source.convert()
    source.content["categories"][1]["name"] = "human"
    with pytest.raises(UserError, match=r"other categories .*id 1 'person' there, id 1 'human' here.*another output"):
        source.convert("panoptic_val.json")


# Faults of single images.


def absent_image(source):
    (source.folder / "images" / "b.png").unlink()


def truncated_image(source):
    path = source.folder / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:60])


def absent_png(source):
    (source.folder / "panoptic" / "b.png").unlink()


def truncated_png(source):
    path = source.folder / "panoptic" / "b.png"
    path.write_bytes(path.read_bytes()[:60])


def gray_png(source):
    cv2.imwrite(str(source.folder / "panoptic" / "b.png"), np.zeros((2, 4), np.uint8))


def other_size(source):
    source.write_image("b", np.zeros((4, 2, 3), np.uint8))


def id_not_in_json(source):
    del source.content["annotations"][1]["segments_info"][0]


def id_not_in_png(source):
    source.content["annotations"][1]["segments_info"].append({"id": 77, "category_id": 7})


def largest_id_not_in_json(source):
    ids = IDS.copy()
    ids[1, 3] = 2**24 - 1
    source.write_ids("b", ids)


def unknown_category(source):
    source.content["annotations"][1]["segments_info"][0]["category_id"] = 8


def doubled_segment(source):
    source.content["annotations"][1]["segments_info"].append({"id": 300, "category_id": 7})


def segment_zero(source):
    source.content["annotations"][1]["segments_info"].append({"id": 0, "category_id": 7})


def segment_without_category(source):
    del source.content["annotations"][1]["segments_info"][0]["category_id"]


def segment_with_half_an_id(source):
    source.content["annotations"][1]["segments_info"][0]["id"] = 300.5


def segment_that_is_half_a_crowd(source):
    source.content["annotations"][1]["segments_info"][0]["iscrowd"] = 0.5


def impossible_name(source):
    source.content["annotations"][1]["file_name"] = "b\0.png"


def no_segments(source):
    del source.content["annotations"][1]["segments_info"]


def doubled_image(source):
    source.content["images"].append({"id": 1, "file_name": "d.png"})


IMAGE_FAULTS = [
    (absent_image, r"the image '.*images.b\.png' cannot be read \(No such file"),
    (truncated_image, r"it is not a readable image, or cut short"),
    (absent_png, r"the panoptic PNG '.*panoptic.b\.png' cannot be read \(No such file"),
    (truncated_png, r"'.*panoptic.b\.png' is not a readable PNG, or cut short"),
    (gray_png, r"panoptic.b\.png' has 1 channels; a panoptic PNG is RGB"),
    (other_size, r"it is 4x2 but its label is 2x4"),
    (id_not_in_json, r"panoptic.b\.png' has pixels of id 300, which 'segments_info' does not list"),
    (largest_id_not_in_json, r"has pixels of id 16777215, which 'segments_info' does not list"),
    (id_not_in_png, r"'segments_info' lists id 77, of which '.*panoptic.b\.png' has no pixels"),
    (unknown_category, r"segment 300 has category_id 8, which 'categories' does not list"),
    (doubled_segment, r"'segments_info' lists id 300 more than once"),
    (segment_zero, r"a segment has id 0, which stands for unlabeled pixels"),
    (segment_without_category, r"entry 0 of 'segments_info' lacks a whole number 'id' or 'category_id'"),
    (segment_with_half_an_id, r"entry 0 of 'segments_info' lacks a whole number 'id' or 'category_id'"),
    (segment_that_is_half_a_crowd, r"or an 'iscrowd' that is not 0 or 1"),
    (impossible_name, r"the panoptic PNG '.*' cannot be read \(embedded null"),
    (no_segments, r"its annotation has no list 'segments_info'"),
    (doubled_image, r"id 1 is in 'images' more than once"),
]


@pytest.mark.parametrize(("damage", "message"), IMAGE_FAULTS, ids=lambda value: getattr(value, "__name__", ""))
def test_faulty_image_stops_or_is_skipped(source, damage, message):
    damage(source)
    with pytest.raises(UserError, match=r"^Image 'b\.png' of '.*panoptic_train2017\.json': .*" + message):
        source.convert()
    assert records(source.folder / "records") == {}

    report = source.convert(on_error="skip-image")
    assert report.examples == 2
    assert len(report.skipped) == 1
    assert "'b.png'" in report.skipped[0]
    assert [example["image_id"] for example in source.examples()] == [b"a.png", b"c.png"]


def test_doubled_annotation_is_named(source):
    source.content["annotations"].append(source.content["annotations"][0])
    report = source.convert(on_error="skip")
    assert report.examples == 3
    assert "'a.png'" in report.skipped[0]
    assert (
        "entry 3 of 'annotations' is a second annotation of image_id 0; an image must have one: " in report.skipped[0]
    )


@pytest.mark.parametrize(
    ("kind", "entry", "message"),
    [
        ("images", {"id": 9, "file_name": "d.png"}, "Image 'd.png' of .*: 'annotations' has no entry for image_id 9"),
        ("images", {"file_name": "d.png"}, "Image 'd.png' of .*: entry 3 of 'images' lacks 'id' or 'file_name'"),
        (
            "annotations",
            {"image_id": 9, "file_name": "d.png"},
            "'d.png' .* has image_id 9, which 'images' does not list",
        ),
        ("annotations", {"image_id": 9}, "Image '9' of .*: entry 3 of 'annotations' lacks 'image_id' or 'file_name'"),
    ],
)
def test_unmatched_entries_are_named(source, kind, entry, message):
    source.content[kind].append(entry)
    with pytest.raises(UserError, match=message):
        source.convert()
    assert source.convert(on_error="skip").examples == 3


def test_the_first_fault_is_reported_whatever_the_workers(source):
    source.write_image("a", np.zeros((1, 1, 3), np.uint8))
    absent_image(source)
    with pytest.raises(UserError, match=r"Image 'a\.png'"):
        source.convert(workers=3)


def test_nothing_left_is_an_error(source):
    source.content["annotations"] = source.content["annotations"][:1]
    source.content["images"] = source.content["images"][:1]
    (source.folder / "images" / "a.png").unlink()
    with pytest.raises(
        UserError, match="Split 'train' has no examples to write: all 1 are faulty, the first: Image 'a"
    ):
        source.convert(on_error="skip")
    assert records(source.folder / "records") == {}


# Faults of the whole.


@pytest.mark.parametrize(("argument", "what"), [("images", "image folder"), ("panoptic", "folder of panoptic PNGs")])
def test_missing_folder_is_named(source, argument, what):
    with pytest.raises(UserError, match=f"The {what} '.*absent' does not exist"):
        source.convert(**{argument: source.folder / "absent"})


def test_missing_json_is_named(source):
    with pytest.raises(UserError, match=r"JSON '.*absent\.json' cannot be read \(No such file"):
        source.convert(json_file=source.folder / "absent.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", r"bad\.json' is not a JSON file"),
        ("[" * 100_000, r"bad\.json' is not a JSON file \(nested too deeply\)"),
        ("[]", "has no list 'images'"),
        ('{"images": [], "annotations": []}', "has no list 'categories'"),
        ('{"images": [], "annotations": [1], "categories": []}', "has no list 'annotations'"),
        ('{"images": [], "annotations": [], "categories": []}', "has no annotations, so there is nothing to convert"),
    ],
)
def test_faulty_json_is_named(source, text, message):
    path = source.folder / "bad.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        source.convert(json_file=path)


def test_output_folder_that_cannot_be_made_is_named(source):
    (source.folder / "file").touch()
    with pytest.raises(UserError, match=r"Output folder '.*file' cannot be created"):
        source.convert(output_dir=source.folder / "file")


def test_unknown_on_error_is_refused(source):
    with pytest.raises(
        UserError, match=r"Unknown value of on_error 'ignore'.*Known: skip, skip-annotation, skip-image, stop"
    ):
        source.convert(on_error="ignore")


def test_workers_are_checked(source):
    with pytest.raises(UserError, match="workers must be 1 or more, got 0"):
        source.convert(workers=0)


def test_default_number_of_shards_grows_with_the_data(tmp_path):
    info = DatasetInfo.from_coco_categories(CATEGORIES, name="x")
    for split, count in (("small", 3), ("large", 1100)):
        common.write_split(
            range(count), lambda i: common.Record(b"%d" % i), info=info, output_dir=tmp_path, split=split
        )
    assert len(list_shards(tmp_path, "small")) == 1
    assert len(list_shards(tmp_path, "large")) == 2


# Scenes.


def test_scenes_are_written_as_rendered(tmp_path):
    from deeplab2_like.data import scenes

    reports = convert_scenes(train=3, val=2, size=(48, 64), output_dir=tmp_path, seed=4)
    assert reports == (common.ConversionReport("train", 3), common.ConversionReport("val", 2))
    info = DatasetInfo.load(tmp_path)
    assert info == scenes.scenes_info()
    for split, first in (("train", 0), ("val", 1_000_000)):
        dataset = pipeline.make_eval_dataset(list_shards(tmp_path, split), dataset_info=info)
        for number, example in enumerate(dataset.as_numpy_iterator()):
            image, panoptic = scenes.render_scene(first + number, height=48, width=64, seed=4)
            np.testing.assert_array_equal(example["image"], image)
            np.testing.assert_array_equal(example["panoptic"], panoptic)


def test_scenes_need_a_number(tmp_path):
    with pytest.raises(UserError, match=r"scenes needs train and val of 0 or more, not both 0.*got train 0, val 0"):
        convert_scenes(train=0, val=0, size=(48, 64), output_dir=tmp_path)
