import dataclasses
import json
import os
import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.coco_format import CocoPanopticReader
from deeplab2_like.export.prediction import PanopticPrediction, Segment
from deeplab2_like.export.predictor import Predictor


@pytest.fixture(scope="module")
def predictor(export_dir) -> Predictor:
    return Predictor(export_dir)


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


def test_identity_is_that_of_the_content(export_dir, predictor, tmp_path):
    folder = shutil.copytree(export_dir, tmp_path / "copy")
    assert Predictor(folder).identity == predictor.identity
    info_file = folder / "dataset_info.json"
    info_file.write_text(info_file.read_text().replace('"road"', '"street"'))
    assert Predictor(folder).identity != predictor.identity
