import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.data.images import read_id_png
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.coco_format import CocoPanopticReader
from deeplab2_like.export import predictor as predictor_module
from deeplab2_like.export.predictor import PanopticPrediction, Predictor, Segment, predict_files
from deeplab2_like.files import OUTPUTS_FILE


@pytest.fixture(scope="module")
def predictor(export_dir) -> Predictor:
    return Predictor(export_dir)


def _write(path: Path, image: np.ndarray) -> Path:
    """Writes an image, uint8 [H, W, 3] RGB, in the format that the name asks for."""
    assert cv2.imwrite(str(path), image[..., ::-1])
    return path


# ---------------------------------------------------------------------------------------------------------------------
# Predictor and prediction.
# ---------------------------------------------------------------------------------------------------------------------


def test_agrees_with_the_system(predictor, small_system, make_image):
    image = make_image(37, 53)
    prediction = predictor(image)
    expected = {key: value[0].numpy() for key, value in small_system.infer(tf.constant(image[None])).items()}
    assert prediction.panoptic.dtype == np.int32
    np.testing.assert_array_equal(prediction.panoptic, expected["panoptic"])
    info = scenes_info()
    assert prediction.dataset_info == info
    assert [segment.id - 1 for segment in prediction.segments] == np.unique(expected["panoptic"]).tolist()
    used = expected["segment_score"] > 0
    scores = dict(zip(expected["segment_id"][used].tolist(), expected["segment_score"][used].tolist(), strict=True))
    for segment in prediction.segments:
        mask = expected["panoptic"] == segment.id - 1
        category = info.categories[(segment.id - 1) // info.label_divisor]
        assert (segment.category_id, segment.category_name) == (category.id, category.name)
        assert segment.is_thing == category.is_thing == ((segment.id - 1) % info.label_divisor > 0)
        assert segment.area == mask.sum()
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert segment.bbox == (rows[0], columns[0], rows[-1] + 1, columns[-1] + 1)
        assert segment.score == pytest.approx(scores[segment.id - 1], rel=1e-4)
    assert prediction.draw(image).shape == image.shape


def test_segments_of_a_hand_made_answer(predictor):
    # Class 0 (sky) has panoptic value 0, as have unused rows of the table; 6002 is the second person.
    outputs = {
        "panoptic": np.array([[0, 0, 6002], [0, 255000, 6002]], np.int32),
        "segment_id": np.array([6002, 0, 0], np.int32),
        "segment_class": np.array([6, 0, 0], np.int32),
        "segment_score": np.array([0.75, 0.5, 0.0], np.float32),
    }
    prediction = predictor._describe(outputs)
    assert prediction.segments == (
        Segment(id=1, category_id=2, category_name="sky", is_thing=False, score=0.5, area=3, bbox=(0, 0, 2, 2)),
        Segment(id=6003, category_id=22, category_name="person", is_thing=True, score=0.75, area=2, bbox=(0, 2, 2, 3)),
    )
    assert prediction.scores == {0: 0.5, 6002: 0.75}


@pytest.mark.parametrize("size", [(1, 1), (1, 300), (64, 8000)])
def test_takes_any_size(predictor, make_image, size):
    assert predictor(make_image(*size)).panoptic.shape == size


@pytest.mark.parametrize(("compiled", "name"), [(False, "serving_default"), (True, "compiled")])
def test_runs_the_signature_that_is_asked_for(export_dir, monkeypatch, compiled, name):
    def answer(value):
        return lambda images: {
            "panoptic": tf.fill(tf.shape(images)[:3], value),
            "segment_id": tf.constant([[value]]),
            "segment_score": tf.constant([[0.5]]),
        }

    signatures = {"serving_default": answer(1000), "compiled": answer(2000)}
    monkeypatch.setattr(tf.saved_model, "load", lambda path: SimpleNamespace(signatures=signatures))
    expected = np.full((4, 5), {"serving_default": 1000, "compiled": 2000}[name])
    prediction = Predictor(export_dir, compiled=compiled)(np.zeros((4, 5, 3), np.uint8))
    np.testing.assert_array_equal(prediction.panoptic, expected)


def test_needs_neither_keras_nor_the_systems(export_dir):
    # None makes an import fail, as if the module did not exist.
    program = (
        "import sys\n"
        "sys.modules.update({'keras': None, 'tf_keras': None, 'deeplab2_like.model': None})\n"
        "import numpy as np, deeplab2_like as dl\n"
        "print(dl.Predictor(sys.argv[1])(np.zeros((5, 7, 3), np.uint8)).panoptic.shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(export_dir)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(5, 7)\n"


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((4, 5, 3), np.float32), r"has type float32 and shape \(4, 5, 3\); convert it first"),
        (np.zeros((4, 5), np.uint8), r"has type uint8 and shape \(4, 5\)"),
        (np.zeros((4, 5, 4), np.uint8), r"has type uint8 and shape \(4, 5, 4\)"),
        (np.zeros((0, 5, 3), np.uint8), r"of one pixel or more, but has type uint8 and shape \(0, 5, 3\)"),
        ([[[0, 0, 0]]], r"must be a NumPy array, uint8 \[H, W, 3\], but is a list"),
    ],
)
def test_refuses_other_arrays(predictor, image, message):
    with pytest.raises(UserError, match=message):
        predictor(image)


def test_says_that_memory_does_not_suffice(predictor, monkeypatch):
    def fail(images):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM when allocating tensor")

    monkeypatch.setattr(predictor, "_infer", fail)
    with pytest.raises(UserError, match="Not enough memory for an image of 4 x 5 pixels"):
        predictor(np.zeros((4, 5, 3), np.uint8))


def test_prediction_cannot_be_changed_by_accident(predictor, make_image):
    with pytest.raises(dataclasses.FrozenInstanceError):
        predictor(make_image(16, 16)).segments = ()


def test_save_coco_writes_what_the_segments_say(predictor, make_image, tmp_path):
    prediction = predictor(make_image(37, 53))
    json_file = prediction.save_coco(tmp_path, "street.jpg", image_id=17)
    assert json_file == tmp_path / "panoptic.json"
    (annotation,) = json.loads(json_file.read_text())["annotations"]
    assert (annotation["image_id"], annotation["file_name"]) == (17, "street.png")
    assert [(s["id"], s["category_id"], s["area"], s["score"]) for s in annotation["segments_info"]] == [
        (s.id, s.category_id, s.area, s.score) for s in prediction.segments
    ]
    for written, segment in zip(annotation["segments_info"], prediction.segments, strict=True):
        y_min, x_min, y_max, x_max = segment.bbox
        assert written["bbox"] == [x_min, y_min, x_max - x_min, y_max - y_min]
    ids = CocoPanopticReader(json_file, tmp_path / "panoptic").read_segments(17)[0]
    void = prediction.panoptic == scenes_info().void
    np.testing.assert_array_equal(ids, np.where(void, 0, prediction.panoptic + 1))


def test_save_coco_names_the_image_by_its_file(tmp_path):
    prediction = PanopticPrediction(np.zeros((2, 2), np.int32), (), scenes_info())
    content = json.loads(prediction.save_coco(tmp_path, "street.jpg").read_text())
    assert content["images"] == [{"id": "street", "file_name": "street.jpg", "height": 2, "width": 2}]


def test_refuses_folders_that_are_no_export(export_dir, tmp_path):
    with pytest.raises(UserError, match="absent' does not exist; give a folder that `deeplab2-like export` wrote"):
        Predictor(tmp_path / "absent")
    with pytest.raises(
        UserError, match=r"is not an exported model, because it has no saved_model\.pb; give a folder that"
    ):
        Predictor(tmp_path)
    (tmp_path / "model" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match="as it is a model folder, export it first with `deeplab2-like export`"):
        Predictor(tmp_path / "model")
    (tmp_path / "served").mkdir()
    (tmp_path / "served" / "first").symlink_to(export_dir)
    with pytest.raises(UserError, match=r"give the folder of one, such as '.*served/first'"):
        Predictor(tmp_path / "served")


def test_takes_the_newest_version_that_is_whole(export_dir, tmp_path):
    for name in ("2", "1", "first"):
        (tmp_path / name / "variables").mkdir(parents=True)
        (tmp_path / name / "saved_model.pb").write_bytes(b"damaged")
        shutil.copy(export_dir / "dataset_info.json", tmp_path / name)
    (tmp_path / "10").symlink_to(export_dir)
    (tmp_path / "11").mkdir()
    shutil.copy(export_dir / "dataset_info.json", tmp_path / "11")
    assert Predictor(tmp_path).dataset_info == scenes_info()
    (tmp_path / "10").unlink()
    with pytest.raises(UserError, match=r"/2' is damaged .*; export it again"):
        Predictor(tmp_path)


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("saved_model.pb", "empty"),
        ("saved_model.pb", "cut"),
        ("variables/variables.index", "absent"),
        ("variables/variables.data-00000-of-00001", "cut"),
    ],
)
def test_refuses_a_damaged_export(export_dir, tmp_path, file, damage):
    folder = shutil.copytree(export_dir, tmp_path / "exported")
    content = (folder / file).read_bytes()
    (folder / file).unlink()
    if damage != "absent":
        (folder / file).write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    with pytest.raises(UserError, match=r"exported' is damaged .*; export it again"):
        Predictor(folder)


def test_refuses_a_saved_model_of_another_kind(export_dir, tmp_path):
    tf.saved_model.save(tf.Module(), str(tmp_path / "other"))
    with pytest.raises(UserError, match=r"other' has no dataset_info\.json"):
        Predictor(tmp_path / "other")
    shutil.copy(export_dir / "dataset_info.json", tmp_path / "other")
    with pytest.raises(UserError, match="other' has no signature 'compiled'; export the model again"):
        Predictor(tmp_path / "other", compiled=True)


# ---------------------------------------------------------------------------------------------------------------------
# Files.
# ---------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def load_once(predictor, monkeypatch):
    """Lets `predict_files` take the model that is loaded already, as loading takes longer than these tests."""
    monkeypatch.setattr(predictor_module, "Predictor", lambda *_arguments, **_options: predictor)


@pytest.fixture
def image_dir(tmp_path, make_image) -> Path:
    """Two images among other things that a folder may hold."""
    folder = tmp_path / "images"
    (folder / "sub.png").mkdir(parents=True)
    _write(folder / "b.png", make_image(32, 48))
    _write(folder / "small.png", make_image(1, 1)).rename(folder / "A.PNG")
    (folder / "notes.txt").write_text("")
    (folder / "._b.png").write_bytes(b"\0")
    return folder


def test_labels_are_not_replaced(export_dir, image_dir, make_image, tmp_path):
    data = tmp_path / "data"
    (data / "panoptic").mkdir(parents=True)
    _write(data / "panoptic" / "b.png", make_image(32, 48))
    label = (data / "panoptic" / "b.png").read_bytes()
    with pytest.raises(
        UserError, match=r"'.*data/panoptic' is not from an earlier run .*; choose another --output-dir"
    ):
        predict_files(export_dir, image_dir, data)
    assert (data / "panoptic" / "b.png").read_bytes() == label
    assert sorted(path.name for path in data.iterdir()) == ["panoptic"]


def test_images_among_links_are_not_replaced(export_dir, make_image, tmp_path):
    folder = tmp_path / "out" / "pictures"
    folder.mkdir(parents=True)
    (tmp_path / "real").mkdir()
    _write(folder / "b.png", make_image(8, 8))
    _write(tmp_path / "real" / "a.png", make_image(8, 8))
    (folder / "a.png").symlink_to(tmp_path / "real" / "a.png")
    with pytest.raises(UserError, match=r"The output would replace the images in '.*out/pictures'"):
        predict_files(export_dir, folder, tmp_path / "out")


def test_predicts_a_folder(export_dir, predictor, image_dir, make_image, tmp_path):
    calls = []
    output = tmp_path / "new" / "out"
    summary = predict_files(export_dir, image_dir, output, progress=lambda *counts: calls.append(counts))
    assert calls == [(1, 2), (2, 2)]
    assert (summary.images, summary.skipped) == (2, ())
    assert summary.pictures_dir == output / "pictures"
    assert summary.json_file == output / "panoptic.json"
    written = sorted(str(file.relative_to(output)) for file in output.rglob("*") if file.is_file())
    assert written == [
        OUTPUTS_FILE,
        "panoptic.json",
        "panoptic/A.png",
        "panoptic/b.png",
        "pictures/A.png",
        "pictures/b.png",
    ]

    content = json.loads(summary.json_file.read_text())
    assert content["images"] == [
        {"id": "A", "file_name": "A.PNG", "height": 1, "width": 1},
        {"id": "b", "file_name": "b.png", "height": 32, "width": 48},
    ]
    # The data set's own category ids, which have gaps and do not start at 0.
    assert [category["id"] for category in content["categories"]] == [2, 3, 5, 8, 9, 21, 22, 30, 31]
    prediction = predictor(make_image(32, 48))
    reader = CocoPanopticReader(summary.json_file, output / "panoptic")
    ids, _ = reader.read_segments("b")
    np.testing.assert_array_equal(np.unique(ids[ids > 0]), [segment.id for segment in prediction.segments])
    assert reader.annotations["b"]["segments_info"][0]["score"] == prediction.segments[0].score
    # Both panels and a gap: wider than two images.
    picture = cv2.imread(str(output / "pictures" / "b.png"))
    assert picture.shape[1] >= 2 * 48


def test_predicts_one_file(export_dir, make_image, tmp_path):
    file = _write(tmp_path / "street.jpeg", make_image(20, 30))
    summary = predict_files(export_dir, file, tmp_path / "out")
    assert summary.images == 1
    assert (tmp_path / "out/pictures/street.png").is_file()
    assert json.loads(summary.json_file.read_text())["images"][0]["file_name"] == "street.jpeg"


@pytest.mark.usefixtures("load_once")
def test_a_strip_gives_a_picture_of_bounded_size(export_dir, make_image, tmp_path):
    # Upsampled to a readable height, one row of 8000 pixels would fill gigabytes.
    file = _write(tmp_path / "strip.png", make_image(16, 8000)[:1])
    predict_files(export_dir, file, tmp_path / "out")
    height, width = cv2.imread(str(tmp_path / "out/pictures/strip.png")).shape[:2]
    assert height < 100
    assert 16000 <= width < 17000


@pytest.mark.usefixtures("load_once")
def test_images_of_12_bits_are_scaled(export_dir, predictor, make_image, tmp_path):
    image = make_image(48, 64)
    (tmp_path / "images").mkdir()
    cv2.imwrite(str(tmp_path / "images" / "a.png"), image[..., ::-1].astype(np.uint16) * 16 + 15)
    summary = predict_files(export_dir, tmp_path / "images", tmp_path / "out")
    assert summary.bit_depth == 12
    png, void = tmp_path / "out" / "panoptic" / "a.png", predictor.dataset_info.void
    expected = predictor(image).panoptic + 1  # The ids of COCO's PNG, in which 0 is void.
    np.testing.assert_array_equal(read_id_png(png), np.where(expected == void + 1, 0, expected))
    summary = predict_files(export_dir, tmp_path / "images", tmp_path / "out", bit_depth=16)
    assert summary.bit_depth == 16
    expected = predictor(image // 16).panoptic + 1
    np.testing.assert_array_equal(read_id_png(png), np.where(expected == void + 1, 0, expected))


def test_images_that_differ_in_their_endings_only_keep_apart(export_dir, make_image, tmp_path):
    for index, name in enumerate(("a.jpg", "a.png", "a.jpg.bmp", "b.png")):
        _write(tmp_path / name, make_image(16 + index, 20))
    summary = predict_files(export_dir, tmp_path, tmp_path / "out")
    # "a" would be the name of two, and "a.jpg" that of a.jpg.bmp and, then, of a.jpg.
    names = ["a.jpg", "a.jpg.bmp", "a.png", "b"]
    content = json.loads(summary.json_file.read_text())
    assert [image["id"] for image in content["images"]] == names
    assert [image["file_name"] for image in content["images"]] == ["a.jpg", "a.jpg.bmp", "a.png", "b.png"]
    assert [annotation["file_name"] for annotation in content["annotations"]] == [f"{name}.png" for name in names]
    heights = [16, 18, 17, 19]
    for name, height in zip(names, heights, strict=True):
        assert cv2.imread(str(tmp_path / "out/panoptic" / f"{name}.png")).shape == (height, 20, 3)
        assert (tmp_path / "out/pictures" / f"{name}.png").is_file()


@pytest.mark.usefixtures("load_once")
@pytest.mark.parametrize(
    ("names", "ids"),
    [
        (["000000000139.png", "000000000285.png"], [139, 285]),
        (["1.png", "01.png"], ["01", "1"]),
        (["1.png", "x.png"], ["1", "x"]),
    ],
)
def test_image_ids_are_numbers_as_in_coco_where_all_names_are(export_dir, make_image, tmp_path, names, ids):
    for name in names:
        _write(tmp_path / name, make_image(16, 16))
    content = json.loads(predict_files(export_dir, tmp_path, tmp_path / "out").json_file.read_text())
    assert [image["id"] for image in content["images"]] == ids


@pytest.mark.usefixtures("load_once")
def test_an_unreadable_image_stops_and_leaves_no_json(export_dir, image_dir, tmp_path):
    output = tmp_path / "out"
    predict_files(export_dir, image_dir, output)
    (image_dir / "b.png").write_bytes((image_dir / "b.png").read_bytes()[:200])
    with pytest.raises(UserError, match=r"b\.png' is not a readable image, or cut short"):
        predict_files(export_dir, image_dir, output)
    # Nor that of the run before, which would describe other PNG files.
    assert not (output / "panoptic.json").exists()


@pytest.mark.usefixtures("load_once")
def test_an_unreadable_image_is_skipped_and_reported(export_dir, image_dir, tmp_path):
    (image_dir / "bad.jpg").write_bytes(b"no image")
    summary = predict_files(export_dir, image_dir, tmp_path / "out", on_error="skip")
    assert summary.images == 2
    assert len(summary.skipped) == 1
    assert "bad.jpg' is not a readable image" in summary.skipped[0]
    assert sorted(os.listdir(tmp_path / "out/panoptic")) == ["A.png", "b.png"]


@pytest.mark.usefixtures("load_once")
def test_refuses_if_nothing_can_be_read(export_dir, tmp_path):
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"None of the 1 images in .* the first: '.*bad\.jpg' is not a readable image"):
        predict_files(export_dir, tmp_path, tmp_path / "out", on_error="skip")
    assert not (tmp_path / "out/panoptic.json").exists()


def test_names_the_image_for_which_memory_does_not_suffice(export_dir, make_image, tmp_path, monkeypatch):
    def fail(self, image):
        raise UserError("The memory does not suffice.")

    monkeypatch.setattr(Predictor, "__call__", fail)
    file = _write(tmp_path / "huge.png", make_image(16, 16))
    with pytest.raises(UserError, match=r"huge\.png' cannot be predicted: The memory does not suffice\."):
        predict_files(export_dir, file, tmp_path / "out")


def test_refuses_wrong_paths(export_dir, image_dir, tmp_path):
    with pytest.raises(UserError, match="absent' does not exist; give an image file or a folder of images"):
        predict_files(export_dir, tmp_path / "absent", tmp_path / "out")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty' has no image directly in it"):
        predict_files(export_dir, tmp_path / "empty", tmp_path / "out")
    with pytest.raises(UserError, match="Unknown value of on_error 'ignore'"):
        predict_files(export_dir, image_dir, tmp_path / "out", on_error="ignore")
    with pytest.raises(UserError, match=r"notes\.txt' is not a readable image"):
        predict_files(export_dir, image_dir / "notes.txt", tmp_path / "out")
    image_dir.rename(tmp_path / "pictures")
    with pytest.raises(UserError, match=r"would replace the images in '.*pictures'; choose another output folder"):
        predict_files(export_dir, tmp_path / "pictures", tmp_path)
