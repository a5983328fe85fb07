"""Records as DeepLab2's scripts write them: raw int32 labels, its keys, its label divisors."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.cli import main
from deeplab2_like.configs.schema import DataConfig
from deeplab2_like.data import pipeline
from deeplab2_like.data.convert import common
from deeplab2_like.data.convert.deeplab2_records import describe_deeplab2_records
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import list_shards
from deeplab2_like.errors import UserError

# With a divisor of 256: void; a person, which is class 1; a stuff class, the last one; another person.
COCO = np.array([[0, 256 + 1, 256 + 1], [133 * 256, 256 + 2, 0]], np.int32)
# With a divisor of 1000: void; road; car 13 with instances.
CITYSCAPES = np.array([[255_000, 0, 0], [13_001, 13_002, 0]], np.int32)


def write(folder: Path, label: np.ndarray | None, *, split: str = "train") -> None:
    """Writes two files of one record each, without a label if it is None."""
    folder.mkdir(exist_ok=True)
    for number in range(2):
        image = tf.io.encode_jpeg(np.zeros((2, 3, 3), np.uint8)).numpy()
        features: dict[str, Any] = {
            "image/encoded": image,
            "image/filename": f"{number:012d}".encode(),
            "image/format": b"jpeg",
            "image/height": 2,
            "image/width": 3,
            "image/channels": 3,
        }
        if label is not None:
            features["image/segmentation/class/encoded"] = label.tobytes()
            features["image/segmentation/class/format"] = b"raw"
        example = tf.train.Example()
        for key, value in features.items():
            feature = example.features.feature[key]
            (feature.bytes_list if isinstance(value, bytes) else feature.int64_list).value.append(value)
        with tf.io.TFRecordWriter(str(folder / f"{split}-{number:05d}-of-00002.tfrecord")) as writer:
            writer.write(example.SerializeToString())


def read(folder: Path, split: str = "train") -> list[np.ndarray]:
    dataset = pipeline.make_eval_dataset(list_shards(folder, split), dataset_info=DatasetInfo.load(folder))
    return [example["panoptic"] for example in dataset.as_numpy_iterator()]


def test_coco_has_void_0_and_classes_from_1(tmp_path: Path) -> None:
    write(tmp_path / "records", COCO)
    write(tmp_path / "records", COCO, split="val")
    write(tmp_path / "records", None, split="test")
    assert describe_deeplab2_records(tmp_path / "records", "coco") == {"train": 2, "val": 2}
    info = DatasetInfo.load(tmp_path / "records")
    assert (info.num_classes, len(info.thing_classes), info.label_divisor, info.ignore_label) == (133, 80, 256, 255)
    assert (info.categories[0].id, info.categories[0].name, info.categories[132].id) == (1, "person", 200)
    # Here classes count from 0, and void is class 255: 255 * 256 = 65280; the last class is 132.
    expected = [[65280, 1, 1], [132 * 256, 2, 65280]]
    np.testing.assert_array_equal(read(tmp_path / "records", "val"), [expected, expected])


def test_training_sees_the_same_labels(tmp_path: Path) -> None:
    write(tmp_path / "records", COCO)
    describe_deeplab2_records(tmp_path / "records", "coco")
    dataset = pipeline.make_train_dataset(
        list_shards(tmp_path / "records", "train"),
        DataConfig(crop_size=(2, 4), flip=False),
        make_targets=lambda panoptic: {"panoptic": panoptic},
        dataset_info=DatasetInfo.load(tmp_path / "records"),
        batch_size=1,
        pad_value=(0, 0, 0),
    )
    label = next(dataset.as_numpy_iterator())["targets"]["panoptic"][0]
    # A column is added to reach the crop size, on either side, and is void.
    columns = sorted(label.T.tolist())
    assert columns == sorted([[65280, 132 * 256], [1, 2], [1, 65280], [65280, 65280]])


def test_cityscapes(tmp_path: Path) -> None:
    write(tmp_path / "records", CITYSCAPES)
    describe_deeplab2_records(tmp_path / "records", "cityscapes")
    np.testing.assert_array_equal(read(tmp_path / "records"), [CITYSCAPES, CITYSCAPES])
    assert DatasetInfo.load(tmp_path / "records").label_divisor == 1000
    assert "record_offset" not in json.loads((tmp_path / "records" / "dataset_info.json").read_text())


def test_ade20k_has_void_0_and_classes_from_1(tmp_path: Path) -> None:
    # With a divisor of 1000: void; two beds, class 8; a wall, class 1; a flag, the last class, 150.
    label = np.array([[0, 8001, 8002], [1000, 150_001, 0]], np.int32)
    write(tmp_path / "records", label)
    describe_deeplab2_records(tmp_path / "records", "ade20k")
    np.testing.assert_array_equal(read(tmp_path / "records")[0], [[255_000, 7001, 7002], [0, 149_001, 255_000]])
    info = DatasetInfo.load(tmp_path / "records")
    assert (info.num_classes, len(info.thing_classes), info.categories[149].name) == (150, 100, "flag")


OWN = [{"id": 2, "name": "leaf", "isthing": 1}, {"id": 1, "name": "soil", "isthing": 0}]


def test_own_categories(tmp_path: Path) -> None:
    """With class ids from 1 and a divisor of 100: void; soil; leaves."""
    write(tmp_path / "records", np.array([[0, 100, 201], [202, 202, 0]], np.int32))
    (tmp_path / "own.json").write_text(json.dumps({"categories": OWN}))
    describe_deeplab2_records(tmp_path / "records", json_file=tmp_path / "own.json", label_divisor=100)
    np.testing.assert_array_equal(read(tmp_path / "records")[0], [[25_500, 0, 101], [102, 102, 25_500]])


def test_own_categories_from_0(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path / "records", np.array([[9000, 1000, 1001], [2, 2, 1]], np.int32))
    own = [{"id": 0, "name": "leaf", "isthing": 1}, {"id": 1, "name": "stem", "isthing": 1}]
    (tmp_path / "own.json").write_text(json.dumps(own))
    command = ["convert", "deeplab2-records", "--records", str(tmp_path / "records"), "--json"]
    assert main([*command, str(tmp_path / "own.json"), "--ignore-label", "9"]) == 0
    np.testing.assert_array_equal(read(tmp_path / "records")[0], [[9000, 1000, 1001], [2, 2, 1]])
    assert main([*command, str(tmp_path / "own.json")]) == 2
    assert "dataset_info.json' differs from the one of the data set of '" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({}, {}, r"own\.json' has no list 'categories'; give a COCO panoptic JSON"),
        ([*OWN, {"id": 7, "name": "x", "isthing": 0}], {}, r"ids in '.*own\.json' have gaps \(1, 2, 7, \.\.\.\), but"),
        (OWN, {"ignore_label": 2}, r"ignore_label 2 is the id of a class in '.*own\.json'; give DeepLab2's"),
        (OWN, {"ignore_label": 255}, r"ignore_label 255 is not read with class ids from 1; list a category of id 0"),
        (OWN, {"data_set": "coco"}, r"Give the name of the data set, or a JSON with your own categories, but not both"),
    ],
)
def test_own_categories_that_make_no_sense(tmp_path: Path, content: Any, options: Any, message: str) -> None:
    write(tmp_path / "records", COCO)
    (tmp_path / "own.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=message):
        describe_deeplab2_records(tmp_path / "records", json_file=tmp_path / "own.json", **options)


def test_wrong_data_set_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "records", CITYSCAPES)
    message = (
        r"^Split 'train' in '.*records' cannot be read as DeepLab2's coco; if it is of another data set, name that one "
        r"\(cityscapes, ade20k\)\. Bad record: the label of image '0+' has the value 255000, which is class 996 with "
        r"label_divisor 256; classes are 1\.\.133 and less than 1 for void"
    )
    with pytest.raises(UserError, match=message):
        describe_deeplab2_records(tmp_path / "records", "coco")
    assert not (tmp_path / "records" / "dataset_info.json").exists()


@pytest.mark.parametrize(
    ("label", "data_set", "message"),
    [
        # A person of COCO, 257, would be instance 257 of a road.
        (
            np.array([[0, 257, 257]] * 2, np.int32),
            "cityscapes",
            r"class 0, 'road', which is stuff, has an instance 257\.",
        ),
        # A road of Cityscapes, 0, would be void.
        (np.zeros((2, 3), np.int32), "coco", r"All labels that were checked are void\."),
    ],
)
def test_labels_that_make_no_sense_are_refused(tmp_path: Path, label: np.ndarray, data_set: str, message: str) -> None:
    write(tmp_path / "records", label)
    with pytest.raises(UserError, match=message):
        describe_deeplab2_records(tmp_path / "records", data_set)


def test_negative_values_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "records", COCO - 1)
    with pytest.raises(UserError, match="has the value -1, which is class -1"):
        describe_deeplab2_records(tmp_path / "records", "coco")


def test_other_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Unknown data set of DeepLab2 'cocoo'\. Did you mean 'coco'\?"):
        describe_deeplab2_records(tmp_path, "cocoo")
    with pytest.raises(UserError, match=r"has no files like train-00000-of-00010\.tfrecord"):
        describe_deeplab2_records(tmp_path, "coco")
    write(tmp_path, COCO)
    info = DatasetInfo.from_coco_categories([{"id": 1, "name": "x", "isthing": 1}], name="other")
    info.save(tmp_path)
    with pytest.raises(UserError, match=r"dataset_info\.json' differs from the one of DeepLab2's coco"):
        describe_deeplab2_records(tmp_path, "coco")


def test_nothing_is_converted_into_such_a_folder(tmp_path: Path) -> None:
    write(tmp_path, COCO)
    describe_deeplab2_records(tmp_path, "coco")
    with pytest.raises(UserError, match="holds records that DeepLab2 made; choose another output folder"):
        common.agree_on_dataset_info(DatasetInfo.load(tmp_path), output_dir=tmp_path, split="val", max_instances=0)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, COCO)
    assert main(["convert", "deeplab2-records", "--records", str(tmp_path), "--data-set", "coco"]) == 0
    said = ["Split 'train': 2 images.", f"Records in {tmp_path} can be trained on."]
    assert capsys.readouterr().out.splitlines() == said
    # Once more, over its own file.
    assert main(["convert", "deeplab2-records", "--records", str(tmp_path), "--data-set", "coco"]) == 0


def test_check_takes_void_and_classes_as_training_does(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write(tmp_path, COCO)
    write(tmp_path, None, split="test")  # Left alone.
    command = ["convert", "deeplab2-records", "--records", str(tmp_path), "--data-set", "coco", "--check"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "id out of range" not in said
    assert "test:" not in said
    command = ["inspect", str(tmp_path), "--splits", "train", "--output-dir", str(tmp_path / "inspected")]
    assert main(command) == 0
    statistics = json.loads((tmp_path / "inspected" / "statistics.json").read_text())["splits"]
    # Of six pixels two are void; two persons have one and two, and the last stuff class the rest.
    assert (list(statistics), statistics["train"]["void_share"]) == (["train"], 2 / 6)
    counts = {name: values["segments"] for name, values in statistics["train"]["per_class"].items()}
    assert {name: count for name, count in counts.items() if count} == {"person": 4, "rug-merged": 2}
