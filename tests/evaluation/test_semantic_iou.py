"""Mean IoU: a worked example, and random maps against plain masks."""

import dataclasses

import numpy as np
import pytest

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.semantic_iou import SemanticIoU

INFO = DatasetInfo(
    "toy",
    tuple(Category(i, name, i == 0, (0, 0, 0)) for i, name in enumerate(("cat", "sky", "sea"))),
    label_divisor=10,
    ignore_label=9,
)


def test_worked_example():
    metric = SemanticIoU(INFO)
    # Classes: cat (two instances) 0, sky 1, void 9 (any instance id).
    ground_truth = np.array([[1, 1, 2, 10, 10, 10, 90, 93]])
    prediction = np.array([[5, 10, 7, 10, 10, 90, 1, 10]])
    metric.update_state(ground_truth, prediction)
    result = metric.result()
    # cat: 2 of 3 pixels found, no other labeled pixel called cat: 2/3. sky: 2 shared; 3 true, 3 predicted on labeled
    # pixels, so the union is 4: 1/2. The void prediction makes sky miss a pixel. sea occurs nowhere: not in the mean.
    assert result.per_class == pytest.approx({"cat": 2 / 3, "sky": 1 / 2})
    assert result.miou == pytest.approx((2 / 3 + 1 / 2) / 2)
    # 3 of 6 labeled pixels are cat, 3 sky.
    assert result.fwiou == pytest.approx((2 / 3 + 1 / 2) / 2)
    np.testing.assert_array_equal(metric.confusion, [[2, 1, 0, 0], [0, 2, 0, 1], [0, 0, 0, 0]])


def test_frequency_weights_and_hallucinated_class():
    metric = SemanticIoU(INFO)
    metric.update_from_class_maps(np.array([[0, 1, 1, 1]]), np.array([[2, 1, 1, 1]]))
    # cat 0/1, sky 3/3, sea (only predicted) 0/1; a quarter of the pixels is cat, three quarters sky.
    assert metric.result().miou == pytest.approx(1 / 3)
    assert metric.result().fwiou == pytest.approx(3 / 4)


def test_classes_that_cannot_be_predicted_are_left_out():
    metric = SemanticIoU(INFO, classes=[1, 2])
    # Of 2 cat pixels one is void, which is right, one is called sky. Of 3 sky pixels 2 are found, one is called sea.
    metric.update_from_class_maps(np.array([[0, 0, 1, 1, 1]]), np.array([[9, 1, 1, 1, 2]]))
    result = metric.result()
    # sky: 2 shared, 3 true, 3 predicted: union 4. sea: predicted once, never true.
    assert result.per_class == pytest.approx({"sky": 1 / 2, "sea": 0.0})
    assert result.miou == pytest.approx(1 / 4)
    # All pixels of the two classes are sky.
    assert result.fwiou == pytest.approx(1 / 2)
    assert result.not_predicted == ("cat",)


def test_nothing_labeled():
    metric = SemanticIoU(INFO)
    assert (metric.result().miou, metric.result().fwiou) == (0.0, 0.0)
    metric.update_state(np.full((2, 2), 90), np.full((2, 2), 10))
    assert (metric.result().miou, metric.result().fwiou) == (0.0, 0.0)


def test_random_maps_equal_plain_masks():
    random = np.random.default_rng(0)
    truth = random.choice([0, 1, 2, 9], (20, 6, 7))
    predicted = np.where(random.random(truth.shape) < 0.5, truth, random.choice([0, 1, 2, 9], truth.shape))
    panoptic, class_maps, part = SemanticIoU(INFO), SemanticIoU(INFO), SemanticIoU(INFO)
    panoptic.update_state(truth[:10] * 10 + random.integers(0, 10, (10, 6, 7)), predicted[:10] * 10)
    for true_map, predicted_map in zip(truth[10:], predicted[10:], strict=True):
        part.update_state(true_map * 10, predicted_map * 10)
    panoptic.merge(part)
    class_maps.update_from_class_maps(truth, predicted)
    labeled = truth != 9
    expected = [
        ((truth == c) & (predicted == c)).sum() / (((truth == c) | (predicted == c)) & labeled).sum() for c in range(3)
    ]
    for metric in (panoptic, class_maps):
        assert list(metric.result().per_class.values()) == pytest.approx(expected)
        assert metric.result().miou == pytest.approx(np.mean(expected))
        share = [(truth == c).sum() / labeled.sum() for c in range(3)]
        assert metric.result().fwiou == pytest.approx(np.dot(share, expected))
    panoptic.reset_state()
    assert panoptic.confusion.sum() == 0


def test_errors_name_the_fault():
    metric = SemanticIoU(INFO)
    with pytest.raises(UserError, match=r"predicted map holds value 3, which is class 3; data set 'toy' has"):
        metric.update_from_class_maps(np.zeros((1, 2), int), np.full((1, 2), 3))
    with pytest.raises(UserError, match=r"shape \(1, 2\) but the predicted map \(2, 1\)"):
        metric.update_state(np.zeros((1, 2), int), np.zeros((2, 1), int))
    other = dataclasses.replace(INFO, name="other", categories=INFO.categories[:2])
    with pytest.raises(UserError, match="'toy' and 'other': their categories differ"):
        metric.merge(SemanticIoU(other))
