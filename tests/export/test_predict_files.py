import csv
import io
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from fake_predictor import INFO, FakePredictor, image_of
from PIL import Image

from deeplab2_like.data import images as images_module
from deeplab2_like.data import known_datasets
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import read_id_png, read_value_png
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.coco_format import CocoPanopticReader
from deeplab2_like.export import load_predictor
from deeplab2_like.export.journal import JOURNAL_FILE
from deeplab2_like.export.predict_files import predict_files
from deeplab2_like.files import OUTPUTS_FILE

# Sky above a road with two cars and a person.
CLASSES = np.zeros((12, 16), np.int64)
CLASSES[:4] = 3
CLASSES[5:8, 2:6] = CLASSES[5:7, 8:11] = 1
CLASSES[9:11, 4:8] = 2


def _write(path: Path, image: np.ndarray) -> Path:
    """Writes an image, uint8 [H, W, 3] RGB, in the format that the name asks for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    assert cv2.imwrite(str(path), image[..., ::-1])
    return path


def _scene(height: int = 12, width: int = 16) -> np.ndarray:
    return np.ascontiguousarray(image_of(CLASSES)[:height, :width])


@pytest.fixture(autouse=True)
def _decode_without_tensorflow(monkeypatch):
    """These tests are quick without it."""

    def decode(content: bytes, name: str) -> np.ndarray:
        try:
            return np.array(Image.open(io.BytesIO(content)).convert("RGB"))
        except OSError as error:
            raise UserError(f"'{name}' is not a readable image, or cut short") from error

    monkeypatch.setattr(images_module, "_decode_with_tensorflow", decode)


@pytest.fixture
def predictor() -> FakePredictor:
    return FakePredictor()


@pytest.fixture
def image_dir(tmp_path) -> Path:
    """Images, one of them in a subfolder, among other things that a folder may hold."""
    folder = tmp_path / "images"
    _write(folder / "b.png", _scene())
    _write(folder / "small.png", _scene(1, 1)).rename(folder / "A.PNG")
    _write(folder / "sub" / "b.png", _scene(10, 12))
    (folder / "notes.txt").write_text("")
    (folder / "._b.png").write_bytes(b"\0")
    return folder


def _written(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# --- Which inputs. ----------------------------------------------------------------------------------------------------


def test_predicts_a_folder_with_its_subfolders(predictor, image_dir, tmp_path):
    calls = []
    output = tmp_path / "new" / "out"
    summary = predict_files(predictor, image_dir, output, progress=lambda *counts: calls.append(counts))
    assert calls == [(1, 3), (2, 3), (3, 3)]
    assert (summary.images, summary.videos, summary.done_before, summary.skipped) == (3, 0, 0, ())
    assert summary.outputs == (output / "pictures", output / "panoptic.json", output / "panoptic")
    assert summary.first_picture == output / "pictures" / "A.png"
    names = ["A.png", "b.png", "sub/b.png"]
    results = [f"{folder}/{name}" for folder in ("panoptic", "pictures") for name in names]
    assert _written(output) == sorted([OUTPUTS_FILE, JOURNAL_FILE, "panoptic.json", *results])

    content = json.loads((output / "panoptic.json").read_text())
    assert content["images"] == [
        {"id": "A", "file_name": "A.PNG", "height": 1, "width": 1},
        {"id": "b", "file_name": "b.png", "height": 12, "width": 16},
        {"id": "sub/b", "file_name": "sub/b.png", "height": 10, "width": 12},
    ]
    assert content["categories"] == INFO.to_coco_categories()
    prediction = predictor(_scene())
    reader = CocoPanopticReader(output / "panoptic.json", output / "panoptic")
    np.testing.assert_array_equal(reader.read("b"), prediction.panoptic)
    assert reader.annotations["b"]["segments_info"] == prediction.to_coco()
    # Both panels and a gap: wider than two images.
    assert cv2.imread(str(output / "pictures" / "b.png")).shape[1] >= 2 * 16


def test_several_inputs_and_patterns(predictor, tmp_path):
    for name in ("day/a.png", "day/deep/b.jpg", "night/a.png", "night/c.png", "night/notes.txt", "d.png"):
        _write(tmp_path / "all" / name, _scene()) if not name.endswith("txt") else (tmp_path / "all" / name).write_text(
            ""
        )
    inputs = [tmp_path / "all" / "day", tmp_path / "all" / "n*" / "*", tmp_path / "all" / "d.png"]
    summary = predict_files(predictor, [*inputs, inputs[2]], tmp_path / "out")
    assert summary.images == 5
    names = ["d.png", "day/a.png", "day/deep/b.png", "night/a.png", "night/c.png"]
    assert list(_written(tmp_path / "out/pictures")) == names
    predict_files(predictor, tmp_path / "all" / "**" / "*.png", tmp_path / "patterns")
    assert _written(tmp_path / "patterns/pictures") == ["d.png", "day/a.png", "night/a.png", "night/c.png"]
    # Relative to the fixed part of the pattern, however many folders match.
    predict_files(predictor, tmp_path / "all" / "day" / "d*" / "*", tmp_path / "one")
    assert _written(tmp_path / "one/pictures") == ["deep/b.png"]


def test_predicts_one_file_and_names_with_letters_of_patterns(predictor, tmp_path):
    file = _write(tmp_path / "street [1].jpeg", _scene())
    assert predict_files(predictor, file, tmp_path / "out").images == 1
    assert (tmp_path / "out/pictures/street [1].png").is_file()
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert content["images"][0]["file_name"] == "street [1].jpeg"


def test_results_inside_the_input_folder_are_no_inputs(predictor, tmp_path):
    _write(tmp_path / "a.png", _scene())
    for _ in range(2):
        predict_files(predictor, tmp_path, tmp_path / "out")
        assert _written(tmp_path / "out/pictures") == ["a.png"]


def test_images_that_differ_in_their_endings_only_keep_apart(predictor, tmp_path):
    for index, name in enumerate(("a.jpg", "a.png", "a.jpg.bmp", "b.png")):
        _write(tmp_path / name, _scene(4 + index))
    predict_files(predictor, tmp_path, tmp_path / "out")
    # "a" would be the name of two, and "a.jpg" that of a.jpg.bmp and, then, of a.jpg.
    names = ["a.jpg", "a.jpg.bmp", "a.png", "b"]
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert [image["id"] for image in content["images"]] == names
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "a.jpg.bmp", "a.png", "b.png"]
    assert [annotation["file_name"] for annotation in content["annotations"]] == [f"{name}.png" for name in names]
    for name, height in zip(names, [4, 6, 5, 7], strict=True):
        assert cv2.imread(str(tmp_path / "out/panoptic" / f"{name}.png")).shape == (height, 16, 3)
        assert (tmp_path / "out/pictures" / f"{name}.png").is_file()


def test_a_result_and_a_folder_of_one_name(predictor, tmp_path):
    _write(tmp_path / "in" / "x.jpg", _scene())
    _write(tmp_path / "in" / "x.png" / "y.jpg", _scene())
    with pytest.raises(UserError, match=r"result of 'x' would be the file 'x\.png', but the inputs also have a folder"):
        predict_files(predictor, tmp_path / "in", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["000000000139.png", "000000000285.png"], [139, 285]),
        (["1.png", "01.png"], ["01", "1"]),
        (["1.png", "x.png"], ["1", "x"]),
    ],
)
def test_image_ids_are_numbers_as_in_coco_where_all_names_are(predictor, tmp_path, names, ids):
    for name in names:
        _write(tmp_path / name, _scene())
    predict_files(predictor, tmp_path, tmp_path / "out")
    content = json.loads((tmp_path / "out/panoptic.json").read_text())
    assert [image["id"] for image in content["images"]] == ids


def test_images_of_12_bits_are_scaled(predictor, tmp_path):
    (tmp_path / "images").mkdir()
    wide = _scene().astype(np.uint16) * 16
    wide[_scene() == 3] += 2048
    assert cv2.imwrite(str(tmp_path / "images" / "a.png"), wide)
    # 3 * 16 + 2048 needs 12 bits, and its upper 8 are 131, which is no class; 0, 1 and 2 come back.
    summary = predict_files(predictor, tmp_path / "images", tmp_path / "out")
    assert summary.bit_depth == 12
    expected = predictor(np.where(_scene() == 3, 131, _scene()).astype(np.uint8)).panoptic
    ids = read_id_png(tmp_path / "out" / "panoptic" / "a.png")
    np.testing.assert_array_equal(ids, np.where(expected == INFO.void, 0, expected + 1))
    assert predict_files(predictor, tmp_path / "images", tmp_path / "16", bit_depth=16).bit_depth == 16
    ids = read_id_png(tmp_path / "16" / "panoptic" / "a.png")
    assert (ids[CLASSES < 3] == 1).all()  # All are class 0 then.


def test_refuses_wrong_paths(predictor, image_dir, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="absent' does not exist; give an image file or a folder of images"):
        predict_files(predictor, tmp_path / "absent", out)
    with pytest.raises(UserError, match=r"Pattern '.*\*\.gif' matches no image or video \(\.bmp,"):
        predict_files(predictor, image_dir / "*.gif", out)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty' has no image in it"):
        predict_files(predictor, tmp_path / "empty", out)
    with pytest.raises(UserError, match="There is no input; give image files, folders or patterns"):
        predict_files(predictor, [], out)
    with pytest.raises(UserError, match="Unknown value of on_error 'ignore'"):
        predict_files(predictor, image_dir, out, on_error="ignore")
    with pytest.raises(UserError, match=r"notes\.txt' is not a readable image"):
        predict_files(predictor, image_dir / "notes.txt", out)
    image_dir.rename(tmp_path / "pictures")
    with pytest.raises(UserError, match=r"would replace the images in '.*pictures'; choose another output folder"):
        predict_files(predictor, tmp_path / "pictures", tmp_path)


def test_refuses_wrong_options_before_anything_is_written(predictor, image_dir, tmp_path):
    out = tmp_path / "out"
    with pytest.raises(UserError, match="Unknown format 'yolo'"):
        predict_files(predictor, image_dir, out, formats=["yolo"])
    with pytest.raises(UserError, match="Unknown class 'bus'"):
        predict_files(predictor, image_dir, out, classes=["bus"])
    with pytest.raises(
        UserError, match="An overlap of 128 pixels does not fit tiles of 64; give an --overlap of 0 to 32"
    ):
        predict_files(predictor, image_dir, out, tile=64)
    info = DatasetInfo.from_coco_categories([{"id": 1, "name": "a", "isthing": 0}], name="other")
    with pytest.raises(UserError, match="Class 'a' of data set 'other' is none of those that Cityscapes evaluates"):
        predict_files(FakePredictor(info), image_dir, out, formats=["cityscapes"])
    assert not out.exists()


def test_labels_are_not_replaced(predictor, image_dir, tmp_path):
    label = _write(tmp_path / "data" / "panoptic" / "b.png", _scene())
    content = label.read_bytes()
    with pytest.raises(
        UserError, match=r"'.*data/panoptic' is not from an earlier run .*; choose another --output-dir"
    ):
        predict_files(predictor, image_dir, tmp_path / "data")
    assert label.read_bytes() == content
    assert _written(tmp_path / "data") == ["panoptic/b.png"]


def test_images_among_links_are_not_replaced(predictor, tmp_path):
    folder = tmp_path / "out" / "pictures"
    _write(folder / "b.png", _scene())
    _write(tmp_path / "real" / "a.png", _scene())
    (folder / "a.png").symlink_to(tmp_path / "real" / "a.png")
    with pytest.raises(UserError, match=r"The output would replace the images in '.*out/pictures'"):
        predict_files(predictor, folder, tmp_path / "out")


# --- What fails. ------------------------------------------------------------------------------------------------------


def test_an_unreadable_image_stops_and_leaves_no_json(predictor, image_dir, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, image_dir, output)
    whole = (image_dir / "b.png").read_bytes()
    (image_dir / "b.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"b\.png' is not a readable image, or cut short"):
        predict_files(predictor, image_dir, output)
    # Nor that of the run before, which would describe other PNG files.
    assert not (output / "panoptic.json").exists()
    (image_dir / "b.png").write_bytes(whole)
    summary = predict_files(predictor, image_dir, output)
    assert len(json.loads((output / "panoptic.json").read_text())["images"]) == 3
    assert summary.images + summary.done_before == 3


def test_an_unreadable_image_is_skipped_and_reported(predictor, image_dir, tmp_path):
    (image_dir / "bad.jpg").write_bytes(b"no image")
    summary = predict_files(predictor, image_dir, tmp_path / "out", on_error="skip")
    assert summary.images == 3
    assert len(summary.skipped) == 1
    assert "bad.jpg' is not a readable image" in summary.skipped[0]
    assert _written(tmp_path / "out/panoptic") == ["A.png", "b.png", "sub/b.png"]


def test_refuses_if_nothing_can_be_read(predictor, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"None of the 1 inputs can be predicted, the first: '.*bad\.jpg' is not a read"
    ):
        predict_files(predictor, tmp_path, tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out/panoptic.json").exists()


def test_names_the_image_for_which_memory_does_not_suffice(image_dir, tmp_path):
    class Failing(FakePredictor):
        def __call__(self, image):
            raise UserError("The memory does not suffice.")

    with pytest.raises(UserError, match=r"b\.png' cannot be predicted: The memory does not suffice\."):
        predict_files(Failing(), image_dir / "b.png", tmp_path / "out")


# --- Runs that continue. ----------------------------------------------------------------------------------------------


def test_a_run_continues(predictor, image_dir, tmp_path):
    output = tmp_path / "out"
    predict_files(FakePredictor(), image_dir, tmp_path / "whole")

    class Interrupted(FakePredictor):
        def __call__(self, image):
            if len(self.sizes) == 2:
                raise KeyboardInterrupt
            return super().__call__(image)

    with pytest.raises(KeyboardInterrupt):
        predict_files(Interrupted(), image_dir, output)
    assert not (output / "panoptic.json").exists()
    # A line that a killed run has cut off does not count.
    journal = (output / JOURNAL_FILE).read_bytes()
    (output / JOURNAL_FILE).write_bytes(journal + journal.splitlines(keepends=True)[-1][:50])
    summary = predict_files(predictor, image_dir, output)
    assert summary.images + summary.done_before == 3
    assert summary.done_before == 2
    assert len(predictor.sizes) == summary.images
    assert _written(output) == _written(tmp_path / "whole")
    for name in _written(output):
        assert (output / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    # The second time nothing is left to do.
    predictor.sizes.clear()
    summary = predict_files(predictor, image_dir, output)
    assert (summary.images, summary.done_before, predictor.sizes) == (0, 3, [])
    assert (output / "panoptic.json").read_bytes() == (tmp_path / "whole" / "panoptic.json").read_bytes()


def test_what_has_changed_is_predicted_again(predictor, image_dir, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, image_dir, output)
    predictor.sizes.clear()
    _write(image_dir / "new.png", _scene(7))
    (output / "panoptic" / "A.png").unlink()
    _write(image_dir / "b.png", _scene(9, 9))
    os.utime(image_dir / "b.png", ns=(1, 1))
    summary = predict_files(predictor, image_dir, output)
    assert (summary.images, summary.done_before) == (3, 1)
    assert predictor.sizes == [(1, 1), (9, 9), (7, 16)]
    content = json.loads((output / "panoptic.json").read_text())
    assert [image["height"] for image in content["images"]] == [1, 9, 7, 10]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"min_score": 0.4}, r"of other options \(min-score: 0\.0 before, 0\.4 now\)"),
        ({"classes": ["car", "sky"]}, r"of other options \(classes: none before, car sky now\)"),
        ({"tile": 8, "overlap": 4}, r"of other options \(tile: none before, 8 now\)"),
        ({"formats": ["geojson"]}, r"of other options \(format: coco before, geojson now\)"),
        ({"model": FakePredictor(identity="another")}, "of another model"),
    ],
)
def test_results_of_other_runs_are_not_mixed(predictor, image_dir, tmp_path, options, message):
    output = tmp_path / "out"
    predict_files(predictor, image_dir, output)
    before = {name: (output / name).read_bytes() for name in _written(output)}
    arguments = {"model": predictor, "inputs": image_dir / "b.png", "output_dir": output, **options}
    with pytest.raises(
        UserError, match=rf"'.*out' has predictions {message}; choose another --output-dir, or predict all"
    ):
        predict_files(**arguments)
    assert {name: (output / name).read_bytes() for name in _written(output)} == before
    summary = predict_files(**arguments, replace=True)
    assert (summary.images, summary.done_before) == (1, 0)
    formats = options.get("formats", ["coco"])
    results = {"coco": ["panoptic.json", "panoptic/b.png"], "geojson": ["geojson/b.geojson"]}[formats[0]]
    assert _written(output) == sorted([OUTPUTS_FILE, JOURNAL_FILE, "pictures/b.png", *results])
    assert predict_files(**arguments).done_before == 1


def test_a_damaged_journal_is_not_trusted(predictor, image_dir, tmp_path):
    predict_files(predictor, image_dir, tmp_path / "out")
    (tmp_path / "out" / JOURNAL_FILE).write_bytes(b"{}\nrubbish")
    with pytest.raises(UserError, match="has predictions of an unknown run, as its journal is damaged; choose another"):
        predict_files(predictor, image_dir, tmp_path / "out")
    assert predict_files(predictor, image_dir, tmp_path / "out", replace=True).images == 3


def test_a_journal_cannot_delete_other_files(predictor, image_dir, tmp_path):
    output = tmp_path / "out"
    predict_files(predictor, image_dir, output)
    (tmp_path / "mine.txt").write_text("mine")
    lines = (output / JOURNAL_FILE).read_text().replace("pictures/A.png", "../mine.txt")
    (output / JOURNAL_FILE).write_text(lines)
    predict_files(FakePredictor(identity="another"), image_dir / "b.png", output, replace=True)
    assert (tmp_path / "mine.txt").read_text() == "mine"


# --- What is written. -------------------------------------------------------------------------------------------------


def test_scores_and_classes(image_dir, tmp_path):
    predictor = FakePredictor(scores={1: 0.9, 2: 0.6, 3: 0.2})
    predict_files(predictor, image_dir / "b.png", tmp_path / "out", min_score=0.5, classes=["car", "sky"])
    (annotation,) = json.loads((tmp_path / "out/panoptic.json").read_text())["annotations"]
    assert [(s["category_id"], s["score"]) for s in annotation["segments_info"]] == [(26, 0.9), (26, 0.9)]
    ids = read_id_png(tmp_path / "out/panoptic/b.png")
    np.testing.assert_array_equal(ids > 0, CLASSES == 1)


def test_tiles_give_the_same_files(image_dir, tmp_path):
    predict_files(FakePredictor(), image_dir, tmp_path / "whole")
    predictor = FakePredictor()
    predict_files(predictor, image_dir, tmp_path / "tiles", tile=10, overlap=5)
    assert (10, 10) in predictor.sizes
    for name in ("panoptic.json", "panoptic/b.png", "panoptic/sub/b.png", "pictures/b.png"):
        assert (tmp_path / "tiles" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_all_formats(image_dir, tmp_path):
    output = tmp_path / "out"
    predictor = FakePredictor(scores={1: 0.9, 2: 0.6, 3: 0.2})
    summary = predict_files(
        predictor, image_dir / "b.png", output, formats=["labels-tiff", "geojson", "cityscapes", "geojson"]
    )
    assert [path.name for path in summary.outputs] == ["pictures", "labels", "geojson", "cityscapes"]

    labels = cv2.imread(str(output / "labels/b.tif"), cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint16
    np.testing.assert_array_equal(labels > 0, np.isin(CLASSES, (1, 2)))
    assert [labels[5, 2], labels[5, 8], labels[9, 4]] == [1, 2, 3]
    with (output / "labels/b.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["label"], row["class"], row["score"], row["area"]) for row in rows] == [
        ("1", "car", "0.9", "12"), ("2", "car", "0.9", "6"), ("3", "person", "0.6", "8")
    ]  # fmt: skip

    content = json.loads((output / "geojson/b.geojson").read_text())
    assert content["type"] == "FeatureCollection"
    road, first_car, second_car, person, sky = content["features"]
    assert second_car == {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [[[8, 5], [11, 5], [11, 7], [8, 7], [8, 5]]]},
        "properties": {
            "objectType": "detection",
            "classification": {"name": "car", "color": [0, 0, 142]},
            "measurements": {"Score": 0.9},
        },
    }
    assert road["properties"]["objectType"] == sky["properties"]["objectType"] == "annotation"
    assert len(road["geometry"]["coordinates"]) == 4  # The outer ring, and a hole for each thing.
    assert person["geometry"]["coordinates"][0][0] == [4, 9]
    assert first_car["properties"]["classification"]["name"] == "car"

    label_ids = {category.name: category.id for category in known_datasets.CITYSCAPES}
    classes = read_value_png(output / "cityscapes/semantic/b_pred_labelIds.png", "class PNG")
    assert [classes[0, 0], classes[11, 0], classes[5, 2]] == [label_ids["sky"], label_ids["road"], label_ids["car"]]
    lines = (output / "cityscapes/instances/b.txt").read_text().splitlines()
    assert lines[0] == f"masks/b_000.png {label_ids['car']} 0.9"
    assert len(lines) == 3
    mask = read_value_png(output / "cityscapes/instances/masks/b_002.png", "mask")
    np.testing.assert_array_equal(mask, np.where(CLASSES == 2, 255, 0))


def test_instance_maps_of_many_objects_have_32_bits(tmp_path):
    info = DatasetInfo.from_coco_categories([{"id": 1, "name": "dot", "isthing": 1}], name="dots", label_divisor=65536)
    dots = np.full((520, 520), 9)
    dots[::2, ::2] = 0  # 260 x 260 = 67,600
    file = _write(tmp_path / "dots.png", image_of(dots))
    predict_files(FakePredictor(info), file, tmp_path / "out", formats=["labels-tiff"], tile=200, overlap=10)
    labels = cv2.imread(str(tmp_path / "out/labels/dots.tif"), cv2.IMREAD_UNCHANGED)
    assert labels.dtype == np.uint32
    expected = np.zeros((520, 520), np.uint32)
    expected[::2, ::2] = np.arange(1, 67601).reshape(260, 260)
    np.testing.assert_array_equal(labels, expected)


def test_a_segment_of_several_parts_is_a_multi_polygon(tmp_path):
    classes = np.zeros((3, 5), np.int64)
    classes[:, 2] = 3
    predict_files(FakePredictor(), _write(tmp_path / "a.png", image_of(classes)), tmp_path / "out", formats=["geojson"])
    road = json.loads((tmp_path / "out/geojson/a.geojson").read_text())["features"][0]
    assert road["geometry"]["type"] == "MultiPolygon"
    assert [polygon[0][0] for polygon in road["geometry"]["coordinates"]] == [[0, 0], [3, 0]]


def test_cityscapes_names_and_folders(tmp_path):
    _write(tmp_path / "in/aachen/aachen_000000_000019_leftImg8bit.png", _scene())
    predict_files(FakePredictor(), tmp_path / "in", tmp_path / "out", formats=["cityscapes"])
    folder = tmp_path / "out/cityscapes"
    assert (folder / "semantic/aachen/aachen_000000_000019_pred_labelIds.png").is_file()
    text = folder / "instances/aachen/aachen_000000_000019.txt"
    for line in text.read_text().splitlines():
        assert (text.parent / line.split()[0]).resolve().is_relative_to(folder.resolve() / "instances/masks")
        assert (text.parent / line.split()[0]).is_file()


def test_pictures_of_bounded_size(predictor, tmp_path, monkeypatch):
    # Upsampled to a readable height, one row of 8000 pixels would fill gigabytes.
    file = _write(tmp_path / "strip.png", np.zeros((1, 8000, 3), np.uint8))
    predict_files(predictor, file, tmp_path / "out")
    height, width = cv2.imread(str(tmp_path / "out/pictures/strip.png")).shape[:2]
    assert height < 100
    assert 16000 <= width < 17000
    monkeypatch.setattr("deeplab2_like.export.predict_files._MAX_PICTURE_PIXELS", 400 * 300)
    file = _write(tmp_path / "large.png", np.zeros((800, 600, 3), np.uint8))
    predict_files(predictor, file, tmp_path / "large")
    height, width = cv2.imread(str(tmp_path / "large/pictures/large.png")).shape[:2]
    assert 400 < height < 450
    assert 600 < width < 650
    assert cv2.imread(str(tmp_path / "large/panoptic/large.png")).shape == (800, 600, 3)


def test_decodes_in_bounded_memory(predictor, tmp_path, monkeypatch):
    # Of 12 images at most those are read ahead that two threads and the queues between the stages hold.
    for number in range(12):
        _write(tmp_path / "in" / f"{number}.png", _scene())
    from deeplab2_like.export import predict_files as module

    read, ahead = [], []
    monkeypatch.setattr(module, "read_image", lambda file, **_: (read.append(file), _scene())[1])

    class Counting(FakePredictor):
        def __call__(self, image):
            ahead.append(len(read) - len(self.sizes))
            return super().__call__(image)

    predict_files(Counting(), tmp_path / "in", tmp_path / "out")
    assert max(ahead) <= 6


# --- Models. ----------------------------------------------------------------------------------------------------------


def test_refuses_a_checkpoint_of_an_export(tmp_path, monkeypatch):
    (tmp_path / "1").mkdir()
    with pytest.raises(UserError, match="is no model folder, so it has no checkpoint 'best'; leave out --checkpoint"):
        load_predictor.load_predictor(tmp_path, checkpoint="best")


# --- Videos. ----------------------------------------------------------------------------------------------------------


def _write_video(path: Path, frames: int = 7, codec: str = "mp4v", size: tuple[int, int] = (48, 64)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*codec), 10, size[::-1])
    for number in range(frames):
        writer.write(np.full((*size, 3), 20 * number % 256, np.uint8))
    writer.release()
    return path


def _read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (read := capture.read())[0]:
        frames.append(read[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


@pytest.mark.parametrize(("suffix", "codec"), [(".mp4", "mp4v"), (".avi", "MJPG")])
def test_a_video(predictor, tmp_path, suffix, codec):
    calls = []
    film = _write_video(tmp_path / f"film{suffix}", codec=codec, size=(48, 64))
    summary = predict_files(predictor, film, tmp_path / "out", progress=lambda *counts: calls.append(counts))
    assert (summary.images, summary.videos, summary.notes) == (0, 1, ())
    assert calls == [(done, 7) for done in range(1, 8)]
    assert summary.first_picture == tmp_path / "out" / "videos" / f"film{suffix}"
    frames, rate = _read_video(summary.first_picture)
    assert [frame.shape for frame in frames] == [(48, 64, 3)] * 7
    assert rate == 10
    # A frame of brightness 20 is class 20, so void: it comes out at 45 % of its brightness.
    assert abs(frames[4].mean() - 0.45 * 80) < 6
    assert _written(tmp_path / "out") == sorted([OUTPUTS_FILE, JOURNAL_FILE, f"videos/film{suffix}"])
    assert predict_files(predictor, film, tmp_path / "out").done_before == 1


def test_videos_among_images(predictor, image_dir, tmp_path):
    _write_video(image_dir / "film.mp4")
    (image_dir / "bad.mov").write_bytes(b"no video")
    # A folder is searched for images; a pattern takes all.
    assert predict_files(predictor, image_dir, tmp_path / "folder").videos == 0
    summary = predict_files(predictor, image_dir / "*", tmp_path / "out", on_error="skip")
    assert (summary.images, summary.videos) == (2, 1)
    assert summary.skipped == (f"'{image_dir / 'bad.mov'}' is not a readable video, or cut short; convert it to MP4 "
                               "with H.264.",)  # fmt: skip
    assert len(json.loads((tmp_path / "out/panoptic.json").read_text())["images"]) == 2


def test_a_video_appears_whole_or_not_at_all(tmp_path):
    class Failing(FakePredictor):
        def __call__(self, image):
            if len(self.sizes) == 3:
                raise UserError("The memory does not suffice.")
            return super().__call__(image)

    film = _write_video(tmp_path / "film.mp4")
    with pytest.raises(UserError, match="memory does not suffice"):
        predict_files(Failing(), film, tmp_path / "out")
    assert _written(tmp_path / "out") == [OUTPUTS_FILE, JOURNAL_FILE]
    assert list((tmp_path / "out/videos").iterdir()) == []
    with pytest.raises(UserError, match="Formats are for images, but all inputs are videos; leave out --format"):
        predict_files(FakePredictor(), film, tmp_path / "out", formats=["coco"])
    with pytest.raises(UserError, match=r"'.*none\.mp4' does not exist"):
        predict_files(FakePredictor(), tmp_path / "none.mp4", tmp_path / "out")


def test_frames_that_are_missing_are_noted(predictor, tmp_path):
    film = _write_video(tmp_path / "film.avi", frames=40, codec="MJPG")
    content = film.read_bytes()
    film.write_bytes(content[: len(content) // 2])
    summary = predict_files(predictor, film, tmp_path / "out")
    assert len(summary.notes) == 1
    assert summary.notes[0].endswith(" of 40 frames could be read.")
