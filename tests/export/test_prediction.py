import sys

import numpy as np
import pytest
from fake_predictor import INFO, FakePredictor, image_of
from pycocotools import mask as coco_mask

from deeplab2_like.errors import UserError
from deeplab2_like.export.prediction import PanopticPrediction

# Road, two cars (the second of two pixels that touch at a corner), void and sky.
CLASSES = np.array(
    [
        [0, 0, 1, 1, 9],
        [0, 0, 1, 0, 3],
        [1, 0, 0, 0, 3],
        [0, 1, 0, 3, 3],
    ]
)


@pytest.fixture
def prediction() -> PanopticPrediction:
    return FakePredictor(scores={0: 0.9, 1: 0.4, 3: 0.7})(image_of(CLASSES))


def test_mask_of_a_segment(prediction):
    car = prediction.segments[2]
    assert (car.id, car.category_name) == (1003, "car")
    expected = np.zeros((4, 5), bool)
    expected[2, 0] = expected[3, 1] = True
    np.testing.assert_array_equal(prediction.mask(car), expected)
    np.testing.assert_array_equal(prediction.mask(1003), expected)
    for unknown in (0, 1004, 255001):
        with pytest.raises(UserError, match=f"no segment with id {unknown}; take one of its 4 `segments`"):
            prediction.mask(unknown)


def test_semantic_map(prediction):
    semantic = prediction.to_semantic()
    assert semantic.dtype == np.int32
    np.testing.assert_array_equal(semantic, np.where(CLASSES == 9, 255, CLASSES))


def test_coco(prediction):
    assert prediction.to_coco()[1] == {
        "id": 1002, "category_id": 26, "iscrowd": 0, "area": 3, "bbox": [2, 0, 2, 2], "score": 0.4
    }  # fmt: skip
    assert [described["category_id"] for described in prediction.to_coco()] == [7, 26, 26, 23]


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # Of pycocotools' decoder.
def test_run_lengths_decode_to_the_masks(prediction):
    rows = prediction.to_rle()
    assert [{key: row[key] for key in row if key != "segmentation"} for row in rows] == prediction.to_coco()
    for row, segment in zip(rows, prediction.segments, strict=True):
        assert row["segmentation"]["size"] == [4, 5]
        assert isinstance(row["segmentation"]["counts"], str)
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]).astype(bool), prediction.mask(segment))
    random = FakePredictor()(image_of(np.random.default_rng(0).integers(0, 5, (13, 17))))
    for row, segment in zip(random.to_rle(), random.segments, strict=True):
        np.testing.assert_array_equal(coco_mask.decode(row["segmentation"]).astype(bool), random.mask(segment))
    assert FakePredictor()(image_of(np.full((2, 2), 9))).to_rle() == []


def test_select_by_score_and_class(prediction):
    assert prediction.select() is prediction
    kept = prediction.select(min_score=0.7)
    assert [segment.category_name for segment in kept.segments] == ["road", "sky"]
    np.testing.assert_array_equal(kept.to_semantic(), np.where(np.isin(CLASSES, (1, 9)), 255, CLASSES))
    assert kept.panoptic.dtype == np.int32
    kept = prediction.select(classes=["car", "sky"])
    assert [segment.id for segment in kept.segments] == [1002, 1003, 3001]
    assert prediction.select(min_score=0.5, classes=["car"]).segments == ()
    with pytest.raises(UserError, match=r"Unknown class 'cat'\. Did you mean 'car'\? Known: car, person, road, sky"):
        prediction.select(classes=["cat"])


def test_supervision(prediction):
    supervision = pytest.importorskip("supervision")
    detections = prediction.to_supervision()
    assert isinstance(detections, supervision.Detections)
    assert detections.xyxy[1].tolist() == [2, 0, 4, 2]
    np.testing.assert_array_equal(detections.mask[2], prediction.mask(1003))
    assert detections.class_id.tolist() == [0, 1, 1, 3]
    assert detections.confidence.tolist() == pytest.approx([0.9, 0.4, 0.4, 0.7])
    assert detections.data["class_name"].tolist() == ["road", "car", "car", "sky"]
    assert len(prediction.select(classes=["person"]).to_supervision()) == 0


def test_supervision_is_optional(prediction, monkeypatch):
    monkeypatch.setitem(sys.modules, "supervision", None)
    with pytest.raises(UserError, match=r"'supervision' is not installed; install it with `pip install 'deeplab2-like"):
        prediction.to_supervision()


def test_drawing_has_the_size_of_the_image(prediction):
    assert prediction.draw(image_of(CLASSES)).shape == (4, 5, 3)
    assert prediction.dataset_info is INFO
