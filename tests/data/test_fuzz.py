"""Readers on damaged and nonsensical input: each ends in success with right data or in one sentence (`UserError`).

The seed is fixed, so the same inputs are read in every run. Warnings are errors here as in all tests.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like import inspection
from deeplab2_like.data import panoptic_label, pipeline
from deeplab2_like.data.convert.coco_panoptic import check_segments, convert_coco_panoptic
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import decode_image, is_rgb_jpeg_or_png, read_id_png
from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.records import parse_example
from deeplab2_like.data.shards import ShardWriter, count_examples, list_shards, list_splits, read_index
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.coco_format import CocoPanopticReader

SIZE = (12, 17)
# What stands in a JSON where something else should; some is legal in places.
JUNK: list[Any] = [
    None,
    True,
    False,
    0,
    1,
    -1,
    2,
    1.0,
    1.5,
    255,
    2**24,
    2**31,
    2**63,
    2**70,
    -(2**40),
    1e400,  # Infinity
    float("nan"),
    "",
    "1",
    "9" * 5000,
    "a.png",
    "../a.png",
    "a\0b",
    "\ud800",
    "x" * 5000,
    [],
    [1],
    [[]],
    {},
    {"id": 1},
    [300, -1, "x"],
]


def mutated_bytes(content: bytes, rng: np.random.Generator) -> bytes:
    """Flips, cuts, doubles, removes or inserts bytes."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        where = int(rng.integers(0, max(len(data), 1)))
        length = int(rng.integers(1, 9))
        match rng.integers(0, 6):
            case 0:
                data[where : where + 1] = bytes([rng.integers(0, 256)])
            case 1:
                data = data[:where]
            case 2:
                data[where:where] = data[where : where + length]
            case 3:
                del data[where : where + length]
            case 4:
                data[where:where] = rng.bytes(length)
            case _:
                if data:
                    data[where % len(data)] ^= 1 << int(rng.integers(0, 8))
    return bytes(data)


def mutated_tree(content: Any, rng: np.random.Generator) -> Any:
    """Replaces, removes or doubles one or two values somewhere in a JSON."""
    content = json.loads(json.dumps(content))
    for _ in range(int(rng.integers(1, 3))):
        node = content
        while True:
            keys = list(node) if isinstance(node, dict) else list(range(len(node)))
            if not keys:
                break
            key = keys[int(rng.integers(0, len(keys)))]
            if isinstance(node[key], (dict, list)) and node[key] and rng.random() < 0.8:
                node = node[key]
                continue
            match rng.integers(0, 4):
                case 0:
                    del node[key]
                case 1 if isinstance(node, list):
                    node.append(node[key])
                case _:
                    node[key] = JUNK[int(rng.integers(0, len(JUNK)))]
            break
    return content


class Source:
    """Two images in COCO panoptic format."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        rng = np.random.default_rng(3)
        self.ids = rng.choice([0, 5, 300, 70_000], SIZE).astype(np.int32)
        for name in ("images", "panoptic"):
            (folder / name).mkdir()
        for name in ("a", "b"):
            cv2.imwrite(str(folder / "images" / f"{name}.png"), rng.integers(0, 256, (*SIZE, 3), np.uint8))
            rgb = panoptic_label.ids_to_rgb(self.ids)
            cv2.imwrite(str(folder / "panoptic" / f"{name}.png"), rgb[:, :, ::-1])
        segments = [
            {"id": segment, "category_id": category, "iscrowd": crowd, "area": int((self.ids == segment).sum())}
            for segment, category, crowd in ((5, 7, 0), (300, 1, 0), (70_000, 1, 1))
        ]
        self.content = {
            "images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("ab")],
            "annotations": [
                {"image_id": i, "file_name": f"{name}.png", "segments_info": segments} for i, name in enumerate("ab")
            ],
            "categories": [
                {"id": 7, "name": "sky", "isthing": 0, "color": [1, 2, 3]},
                {"id": 1, "name": "person", "isthing": 1, "color": [4, 5, 6]},
            ],
        }

    def convert(self, content: bytes, output_dir: Path, on_error: Any) -> None:
        json_file = self.folder / "train.json"
        json_file.write_bytes(content)
        convert_coco_panoptic(
            images=self.folder / "images",
            panoptic=self.folder / "panoptic",
            json_file=json_file,
            output_dir=output_dir,
            on_error=on_error,
        )
        check_segments(panoptic=self.folder / "panoptic", json_file=json_file)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Source:
    return Source(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="module")
def records(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    source.convert(json.dumps(source.content).encode(), folder, "stop")
    return folder


def outcomes(cases: int, attempt: Callable[[np.random.Generator], None]) -> tuple[int, int]:
    """Runs attempts; returns how many succeed and how many end in a `UserError` that says something."""
    succeeded = refused = 0
    for case in range(cases):
        try:
            attempt(np.random.default_rng((7, case)))
            succeeded += 1
        except UserError as error:
            refused += bool(str(error))
        except BaseException as error:
            error.add_note(f"case {case}")
            raise
    return succeeded, refused


def read_all(folder: Path) -> list[Any]:
    files = list_shards(folder, "train")
    dataset = pipeline.make_eval_dataset(files, dataset_info=DatasetInfo.load(folder), num_parallel_calls=1)
    with report_bad_records(files):
        return list(dataset.as_numpy_iterator())


def test_json_of_labels(source: Source, tmp_path: Path) -> None:
    def attempt(rng: np.random.Generator) -> None:
        content = mutated_tree(source.content, rng)
        encoded = json.dumps(content).encode()
        if rng.random() < 0.3:
            encoded = mutated_bytes(encoded, rng)
        folder = tmp_path / str(rng.integers(0, 2**62))
        try:
            source.convert(encoded, folder, ("stop", "skip")[int(rng.integers(0, 2))])
        except UserError:
            assert not folder.exists() or not list_splits(folder)
            raise
        info = DatasetInfo.load(folder)
        for split in list_splits(folder):
            assert count_examples(list_shards(folder, split)) >= 1
        assert info.num_classes >= 1

    succeeded, refused = outcomes(400, attempt)
    assert succeeded > 30
    assert refused > 100


def test_json_of_predictions(source: Source, tmp_path: Path) -> None:
    info = DatasetInfo.from_coco_categories(source.content["categories"], name="x")
    path = tmp_path / "prediction.json"

    def attempt(rng: np.random.Generator) -> None:
        encoded = json.dumps(mutated_tree(source.content, rng)).encode()
        path.write_bytes(mutated_bytes(encoded, rng) if rng.random() < 0.3 else encoded)
        reader = CocoPanopticReader(path, source.folder / "panoptic", dataset_info=info)
        for _, panoptic in reader:
            assert panoptic.shape == SIZE

    succeeded, refused = outcomes(100, attempt)
    assert succeeded > 10
    assert refused > 10


def test_png_of_labels(source: Source, tmp_path: Path) -> None:
    content = (source.folder / "panoptic" / "a.png").read_bytes()
    path = tmp_path / "a.png"

    def attempt(rng: np.random.Generator) -> None:
        path.write_bytes(mutated_bytes(content, rng))
        ids = read_id_png(path)
        np.testing.assert_array_equal(ids, source.ids)

    _, refused = outcomes(300, attempt)
    assert refused > 200


@pytest.mark.parametrize("extension", [".png", ".jpg", ".bmp", ".tiff"])
def test_images(source: Source, extension: str) -> None:
    image = cv2.imread(str(source.folder / "images" / "a.png"))
    content = bytes(cv2.imencode(extension, image)[1])

    def attempt(rng: np.random.Generator) -> None:
        mutated = mutated_bytes(content, rng)
        decoded = decode_image(mutated, "a")
        assert is_rgb_jpeg_or_png(mutated) in (True, False)
        assert decoded.ndim == 3
        assert decoded.shape[2] == 3
        if extension == ".png":
            np.testing.assert_array_equal(decoded[:, :, ::-1], image)

    _, refused = outcomes(100, attempt)
    assert refused > 10


def test_record_files(records: Path, tmp_path: Path) -> None:
    expected = read_all(records)
    name = "train-00000-of-00001.tfrecord"
    content = (records / name).read_bytes()
    DatasetInfo.load(records).save(tmp_path)

    def attempt(rng: np.random.Generator) -> None:
        (tmp_path / name).write_bytes(mutated_bytes(content, rng))
        count = count_examples([str(tmp_path / name)])
        found = read_all(tmp_path)
        assert len(found) == count
        for example in found:
            wanted = next(other for other in expected if other["image_id"] == example["image_id"])
            for key, value in wanted.items():
                np.testing.assert_array_equal(example[key], value)

    _, refused = outcomes(100, attempt)
    assert refused > 80


def test_contents_of_records(records: Path, tmp_path: Path) -> None:
    index = read_index(list_shards(records, "train"))
    serialized = next(iter(tf.data.TFRecordDataset(index.files))).numpy()
    expected = read_all(records)[0]["panoptic"]
    parse = tf.function(parse_example, input_signature=[tf.TensorSpec([], tf.string)])

    def attempt(rng: np.random.Generator) -> None:
        with report_bad_records():
            example = parse(mutated_bytes(serialized, rng))
        np.testing.assert_array_equal(example["panoptic"], expected)

    _, refused = outcomes(200, attempt)
    assert refused > 100


def test_inspection_of_records(records: Path, tmp_path: Path) -> None:
    index = read_index(list_shards(records, "train"))
    serialized = next(iter(tf.data.TFRecordDataset(index.files))).numpy()
    info = json.loads((records / "dataset_info.json").read_text())

    def attempt(rng: np.random.Generator) -> None:
        (tmp_path / "dataset_info.json").write_text(json.dumps(mutated_tree(info, rng) if rng.random() < 0.5 else info))
        with ShardWriter(tmp_path / "train-00000-of-00001.tfrecord") as writer:
            for _ in range(3):
                writer.write(mutated_bytes(serialized, rng) if rng.random() < 0.5 else serialized)
        found = inspection.inspect_records(tmp_path, pictures=3)
        json.dumps(found.statistics, allow_nan=False)

    succeeded, refused = outcomes(60, attempt)
    assert succeeded > 10
    assert refused > 10
