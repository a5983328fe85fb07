"""AP: equal to pycocotools fed directly through its own files and `loadRes`."""

import contextlib
import dataclasses
import io

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.instance_ap import InstanceAP, segments_to_rle

INFO = DatasetInfo(
    "toy",
    (
        Category(1, "sky", False, (0, 0, 255)),
        Category(5, "cat", True, (255, 0, 0)),
        Category(6, "dog", True, (0, 255, 0)),
    ),
    label_divisor=100,
    ignore_label=9,
)
CAT, DOG, VOID = 100, 200, 900


def random_map(random, height=120, width=140):
    """A panoptic map with boxes of all COCO size classes, some of them crowds."""
    panoptic = np.zeros((height, width), np.int32)
    for instance in range(1, 8):
        y, x = random.integers(0, height - 10), random.integers(0, width - 10)
        size_y, size_x = random.choice([8, 20, 40, 110], 2)
        class_value = random.choice([CAT, DOG])
        panoptic[y : y + size_y, x : x + size_x] = class_value + (0 if random.random() < 0.15 else instance)
    panoptic[:5, :5] = VOID
    return panoptic


def pycocotools_stats(truths, found, kind):
    """Runs pycocotools the way its examples do. `found`: (image, class, score, mask, COCO box) rows."""
    annotations = []
    for image, panoptic in enumerate(truths):
        for value in np.unique(panoptic):
            if value // 100 in (1, 2):
                rle = mask_utils.encode(np.asfortranarray(panoptic == value, dtype=np.uint8))
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": image,
                        "category_id": int(value // 100),
                        "segmentation": rle,
                        "area": int((panoptic == value).sum()),
                        "bbox": list(mask_utils.toBbox(rle)),
                        "iscrowd": int(value % 100 == 0),
                    }
                )
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO()
        coco.dataset = {
            "images": [{"id": i, "height": 120, "width": 140} for i in range(len(truths))],
            "categories": [{"id": 1}, {"id": 2}],
            "annotations": annotations,
        }
        coco.createIndex()
        results = []
        for image, class_id, score, mask, box in found:
            row = {"image_id": image, "category_id": int(class_id), "score": float(score)}
            if kind == "bbox":
                row["bbox"] = box
            else:
                row["segmentation"] = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
            results.append(row)
        evaluation = COCOeval(coco, coco.loadRes(results), kind)
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
    return evaluation.stats[:6]


def stats(precision):
    values = (
        precision.ap,
        precision.ap50,
        precision.ap75,
        precision.ap_small,
        precision.ap_medium,
        precision.ap_large,
    )
    return [-1 if value is None else value for value in values]


def test_perfect_and_missed(capsys):
    # One cat is found, one is not, and the found one outscores nothing wrong: recall 1/2 at precision 1. COCO averages
    # the precision at 101 recalls 0, 0.01, ..., 1, of which 0..0.50 (51 of them) are reached: AP 51/101.
    panoptic = np.zeros((20, 20), np.int32)
    panoptic[2:8, 2:8] = CAT + 1
    panoptic[12:18, 12:18] = CAT + 2
    prediction = np.where(panoptic == CAT + 2, 0, panoptic)
    metric = InstanceAP(INFO)
    metric.update_from_panoptic(
        "a", panoptic, prediction, segment_id=[CAT + 1, 0], segment_class=[1, 0], segment_score=[0.9, 0.0]
    )
    result = metric.result()
    for precision in (result.mask, result.box):
        assert precision.ap == pytest.approx(51 / 101)
        assert precision.ap50 == pytest.approx(51 / 101)
        assert precision.ap_small == pytest.approx(51 / 101)
        assert precision.ap_large is None
        assert precision.per_class == {"cat": pytest.approx(51 / 101), "dog": None}
    assert capsys.readouterr().out == ""


def test_panoptic_segments_equal_pycocotools():
    random = np.random.default_rng(0)
    whole, parts = InstanceAP(INFO), [InstanceAP(INFO), InstanceAP(INFO)]
    truths, found = [], []
    for image in range(12):
        truth = random_map(random)
        prediction = np.roll(truth, random.integers(-3, 4, 2), axis=(0, 1))
        prediction[random.random(truth.shape) < 0.02] = VOID
        values = np.unique(prediction)
        values = values[(values // 100 != 9) & (values % 100 != 0)]
        scores = random.random(values.size) + 0.01
        truths.append(truth)
        for value, score in zip(values, scores, strict=True):
            mask = prediction == value
            box = list(mask_utils.toBbox(mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))))
            found.append((image, value // 100, np.float32(score), mask, box))
        rows = {
            # A stuff row, a segment that has no pixel, and unused rows must all be left out.
            "segment_id": np.array([0, CAT + 99, *values, 0, 0]),
            "segment_class": np.array([0, 1, *(values // 100), 0, 0]),
            "segment_score": np.array([0.9, 0.9, *scores, 0, 0], np.float32),
        }
        whole.update_from_panoptic(image, truth, prediction, **rows)
        parts[image // 6].update_from_panoptic(image, truth, prediction, **rows)
    parts[0].merge(parts[1])
    for metric in (whole, parts[0]):
        result = metric.result()
        for kind, precision in (("segm", result.mask), ("bbox", result.box)):
            expected = pycocotools_stats(truths, found, kind)
            assert 0.05 < expected[0] < 0.95  # Neither all right nor all wrong.
            np.testing.assert_allclose(stats(precision), expected, rtol=1e-12)
            assert np.mean(list(precision.per_class.values())) == pytest.approx(precision.ap)
    whole.reset_state()
    assert whole.result().mask.ap is None


def test_explicit_masks_and_boxes_equal_pycocotools():
    random = np.random.default_rng(1)
    metric = InstanceAP(INFO)
    truths, found = [], []
    for image in range(8):
        truth = random_map(random)
        values = [value for value in np.unique(truth) if value // 100 in (1, 2)] * 2  # Overlapping duplicates.
        masks = np.array([np.roll(truth == value, random.integers(-4, 5, 2), (0, 1)) for value in values])
        classes = np.array(values) // 100
        scores = random.random(len(values)) + 0.01
        low = random.uniform(0, 60, (len(values), 2))
        boxes = np.concatenate([low, low + random.uniform(5, 60, (len(values), 2))], axis=1)
        for row, value in enumerate(values):
            if row % 2:
                rows, columns = np.nonzero(truth == value)
                boxes[row] = rows.min(), columns.min(), rows.max() + 1, columns.max()
            y_min, x_min, y_max, x_max = boxes[row]
            found.append((image, classes[row], scores[row], masks[row], [x_min, y_min, x_max - x_min, y_max - y_min]))
        truths.append(truth)
        unused = np.zeros((1, *truth.shape), bool)
        metric.update_from_instances(
            image,
            truth,
            masks=np.concatenate([masks, unused]) if image % 2 else iter([*masks, unused[0]]),
            scores=np.append(scores, 0),
            classes=np.append(classes, 0),
            boxes=np.concatenate([boxes, np.zeros((1, 4))]),
        )
    result = metric.result()
    for kind, precision in (("segm", result.mask), ("bbox", result.box)):
        expected = pycocotools_stats(truths, found, kind)
        assert 0.05 < expected[0] < 0.95
        np.testing.assert_allclose(stats(precision), expected, rtol=1e-12)


def test_boxes_default_to_those_of_the_masks():
    truth = np.zeros((10, 10), np.int32)
    truth[2:7, 3:9] = DOG + 1
    metric = InstanceAP(INFO)
    metric.update_from_instances("a", truth, masks=truth[None] > 0, scores=[0.5], classes=[2])
    assert metric.result().box.ap == pytest.approx(1.0)


def test_nothing_found_and_nothing_to_find():
    truth = np.zeros((10, 10), np.int32)
    empty = {"segment_id": [0], "segment_class": [0], "segment_score": [0.0]}
    metric = InstanceAP(INFO)
    metric.update_from_panoptic("stuff only", truth, truth, **empty)
    assert metric.result().mask.ap is None
    truth[:5] = CAT + 1
    metric.update_from_panoptic("a cat", truth, truth, **empty)
    assert metric.result().mask.ap == 0.0
    stuff_only = dataclasses.replace(INFO, categories=INFO.categories[:1])
    metric = InstanceAP(stuff_only)
    metric.update_from_panoptic("a", np.zeros((2, 2), np.int32), np.zeros((2, 2), np.int32), **empty)
    assert metric.result().box.ap is None
    assert metric.result().box.per_class == {}


def test_crowd_is_neither_missed_nor_wrong():
    truth = np.zeros((30, 30), np.int32)
    truth[:10] = CAT  # A crowd of cats.
    truth[20:] = CAT + 1
    metric = InstanceAP(INFO)
    masks = np.array([truth == CAT + 1, np.pad(np.ones((10, 10), bool), ((0, 20), (0, 20)))])
    # The cat on the crowd has the better score; counted as wrong it would halve the precision.
    metric.update_from_instances("a", truth, masks=masks, scores=[0.5, 0.9], classes=[1, 1])
    assert metric.result().mask.ap == pytest.approx(1.0)


def test_run_lengths_equal_encoded_masks():
    random = np.random.default_rng(3)
    for _ in range(30):
        panoptic = random.integers(0, 4, random.integers(1, 7, 2)).astype(np.int32)
        for value, rle in zip(range(5), segments_to_rle(panoptic, range(5)), strict=True):
            assert rle == mask_utils.encode(np.asfortranarray(panoptic == value, dtype=np.uint8))


def test_errors_name_the_fault():
    truth = np.zeros((4, 4), np.int32)
    metric = InstanceAP(INFO)
    metric.update_from_instances("a", truth, masks=[], scores=[], classes=[])
    with pytest.raises(UserError, match="Image 'a' was added twice"):
        metric.update_from_instances("a", truth, masks=[], scores=[], classes=[])
    with pytest.raises(UserError, match="Image 'a' was added twice"):
        metric.merge(metric)
    with pytest.raises(UserError, match=r"Image 'b' has a mask of shape \(2, 2\)"):
        metric.update_from_instances("b", truth, masks=[np.ones((2, 2), bool)], scores=[1], classes=[1])
    with pytest.raises(UserError, match=r"instance of class 0, which is no thing class .* \[1, 2\]"):
        metric.update_from_instances("b", truth, masks=[truth > 0], scores=[1], classes=[0])
    with pytest.raises(UserError, match="ground-truth map holds value 700, which is class 7"):
        metric.update_from_instances("b", truth + 700, masks=[], scores=[], classes=[])
    with pytest.raises(UserError, match="their categories differ"):
        metric.merge(InstanceAP(dataclasses.replace(INFO, categories=INFO.categories[:2])))
