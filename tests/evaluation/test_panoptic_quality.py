"""Panoptic quality: worked examples, and random maps against a plain implementation that follows the definition."""

import dataclasses
from collections import Counter

import numpy as np
import pytest

from deeplab2_like.data.coco_segments import Segment
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.overlaps import count_overlaps
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality

# Classes 0 and 1 are things, 2 and 3 stuff; divisor 10, so 11 is instance 1 of class 1; 90 is void.
INFO = DatasetInfo(
    "toy",
    (
        Category(1, "cat", True, (255, 0, 0)),
        Category(2, "dog", True, (0, 255, 0)),
        Category(7, "sky", False, (0, 0, 255)),
        Category(9, "sea", False, (0, 255, 255)),
    ),
    label_divisor=10,
    ignore_label=9,
)
CAT, CAT_CROWD, SKY, SEA, VOID = 1, 0, 20, 30, 90


def quality(ground_truth, prediction):
    metric = PanopticQuality(INFO)
    metric.update_state(np.array(ground_truth, np.int32), np.array(prediction, np.int32))
    return metric.result()


def counts(class_quality):
    return class_quality.true_positives, class_quality.false_positives, class_quality.false_negatives


def test_perfect_prediction():
    labels = [[SKY, SKY, CAT], [SKY, 11, 12]]
    result = quality(labels, labels)
    # cat, dog and sky are there: 3 classes, 2 of them things.
    assert (result.all.pq, result.all.sq, result.all.rq, result.all.num_classes) == (1.0, 1.0, 1.0, 3)
    assert (result.things.num_classes, result.stuff.num_classes) == (2, 1)
    assert counts(result.per_class["dog"]) == (2, 0, 0)
    assert counts(result.per_class["sea"]) == (0, 0, 0)


def test_worked_example():
    ground_truth = [
        [CAT, CAT, CAT, SKY],
        [CAT, CAT, CAT, SKY],
        [2, 2, SKY, SKY],
    ]
    prediction = [
        [3, 3, 3, 3],
        [3, 3, SKY, SKY],
        [SKY, 11, SKY, SKY],
    ]
    result = quality(ground_truth, prediction)
    # cat: predicted 3 (6 pixels) and true 1 (6 pixels) share 5: IoU 5/7, a match. True 2 is missed. TP 1, FP 0, FN 1:
    # SQ 5/7, RQ 1 / 1.5, PQ 10/21. The instance numbers differ, which does not matter.
    cat = result.per_class["cat"]
    assert counts(cat) == (1, 0, 1)
    assert cat.sq == pytest.approx(5 / 7)
    assert cat.rq == pytest.approx(2 / 3)
    assert cat.pq == pytest.approx(10 / 21)
    # dog is only hallucinated: FP 1, PQ 0, and it counts in the mean.
    assert counts(result.per_class["dog"]) == (0, 1, 0)
    # sky: 4 true pixels, 5 predicted, 3 shared: IoU 3/6 is not above one half, so FP 1 and FN 1.
    assert counts(result.per_class["sky"]) == (0, 1, 1)
    assert result.all.pq == pytest.approx((10 / 21 + 0 + 0) / 3)
    assert result.things.pq == pytest.approx(10 / 21 / 2)
    assert result.stuff.pq == 0.0


def test_iou_of_exactly_one_half_is_no_match():
    # One shared pixel, union 2. With three of five shared pixels it is above one half.
    assert counts(quality([[SKY, SKY, VOID]], [[SKY, SEA, VOID]]).per_class["sky"]) == (0, 1, 1)
    assert counts(quality([[SKY] * 5], [[SKY] * 3 + [VOID] * 2]).per_class["sky"]) == (1, 0, 0)


def test_prediction_on_void_is_left_out_of_the_union():
    # The predicted cat has 5 pixels, 3 of them on void; the true one 2: IoU 2 / (2 + 5 - 2 - 3) = 1.
    result = quality([[CAT, CAT, VOID, VOID, VOID]], [[CAT] * 5])
    assert result.per_class["cat"].pq == 1.0


@pytest.mark.parametrize(("void_pixels", "false_positives"), [(2, 1), (3, 0)])
def test_unmatched_prediction_mostly_on_void_is_excused(void_pixels, false_positives):
    # A predicted dog of 4 pixels: 2 on void is exactly one half, which does not excuse it; 3 do.
    ground_truth = [[SKY] * (4 - void_pixels) + [VOID] * void_pixels]
    assert counts(quality(ground_truth, [[11] * 4]).per_class["dog"]) == (0, false_positives, 0)


def test_crowd_excuses_its_own_class_only_and_is_never_missed():
    ground_truth = [[CAT_CROWD] * 4 + [SKY]]
    # Two cats on the crowd: no match, no false positive. The crowd is no false negative.
    assert counts(quality(ground_truth, [[1, 1, 2, 2, SKY]]).per_class["cat"]) == (0, 0, 0)
    # Dogs on a crowd of cats are false positives.
    result = quality(ground_truth, [[11, 11, 12, 12, SKY]])
    assert counts(result.per_class["dog"]) == (0, 2, 0)
    assert counts(result.per_class["cat"]) == (0, 0, 0)


def test_void_and_crowd_add_up_as_excuse():
    # 3 pixels: 1 on void, 1 on crowd, 1 on sky: 2/3 excused, though neither alone is above one half.
    assert counts(quality([[VOID, CAT_CROWD, SKY]], [[CAT] * 3]).per_class["cat"]) == (0, 0, 0)


def test_instance_zero_of_a_thing_is_a_segment_in_predictions():
    # Predictions have no crowds: thing value 0 is matched like an instance.
    assert counts(quality([[CAT, CAT, SKY]], [[CAT_CROWD, CAT_CROWD, SKY]]).per_class["cat"]) == (1, 0, 0)
    assert counts(quality([[SEA, SEA, SKY]], [[CAT_CROWD, CAT_CROWD, SKY]]).per_class["cat"]) == (0, 1, 0)


def test_void_images_and_no_images():
    for result in (
        quality([[VOID] * 3], [[VOID] * 3]),
        PanopticQuality(INFO).result(),
        quality(np.zeros((0, 4)), np.zeros((0, 4))),
    ):
        assert (result.all.pq, result.all.num_classes) == (0.0, 0)
    # Everything predicted on an all-void image is excused; whatever is void in the prediction is missed.
    assert counts(quality([[VOID] * 3], [[CAT, CAT, SKY]]).per_class["cat"]) == (0, 0, 0)
    assert counts(quality([[CAT, CAT, SKY]], [[VOID] * 3]).per_class["cat"]) == (0, 0, 1)
    # Any instance id of the void class is void.
    assert counts(quality([[93] * 3], [[CAT, CAT, SKY]]).per_class["cat"]) == (0, 0, 0)


def test_largest_values_do_not_overflow():
    # class * divisor reaches 16,000,000 of 2**24, and long runs exceed 16 bits.
    classes = tuple(Category(i, f"c{i}", False, (0, 0, 0)) for i in range(160))
    info = DatasetInfo("large", classes, label_divisor=100_000, ignore_label=160)
    labels = np.full((300, 1000), 159 * 100_000, np.int32)
    labels[0, 0] = 158 * 100_000 + 99_999
    prediction = labels.copy()
    prediction[-1] = info.void
    metric = PanopticQuality(info)
    metric.update_state(labels, prediction)
    # 299,999 true pixels, 298,999 of them found.
    assert metric.result().per_class["c159"].pq == pytest.approx(298_999 / 299_999)
    assert metric.result().per_class["c158"].pq == 1.0
    assert metric.result().all.num_classes == 2


@pytest.mark.parametrize("dtype", [np.uint8, np.int64, np.uint32])
def test_integer_types(dtype):
    metric = PanopticQuality(INFO)
    metric.update_state(np.array([[CAT, VOID]], dtype), np.array([[CAT, SKY]], np.int32))
    assert metric.result().all.pq == 1.0


def test_errors_name_the_fault():
    labels = np.full((2, 3), SKY, np.int32)
    for prediction, message in (
        (np.full((3, 2), SKY), r"shape \(2, 3\) but the predicted map \(3, 2\); resize"),
        (
            np.full((2, 3), 47),
            r"predicted map holds value 47, which is class 4; data set 'toy' has classes 0\.\.3 and 9",
        ),
        (np.full((2, 3), -1), r"value -1; values must be 0\.\."),
        (np.full((2, 3), 2**24), "value 16777216; values must be"),
        (np.full((2, 3), 1.5), "predicted map has type float64"),
    ):
        with pytest.raises(UserError, match=message):
            PanopticQuality(INFO).update_state(labels, prediction)
    with pytest.raises(UserError, match=r"\[H, W\] or \[B, H, W\], got shape \(3,\)"):
        PanopticQuality(INFO).update_state(labels[0], labels[0])
    with pytest.raises(UserError, match="ground-truth map holds value 47"):
        PanopticQuality(INFO).update_state(labels + 27, labels)
    other = dataclasses.replace(INFO, name="other", categories=INFO.categories[:3])
    with pytest.raises(UserError, match="'toy' and 'other': their categories differ"):
        PanopticQuality(INFO).merge(PanopticQuality(other))


def test_several_crowds_of_a_class():
    # Two cat crowds (ids 5 and 6) under one predicted cat of 5 pixels: 2 on each crowd, 1 on sky (id 7).
    ground_truth, predicted = np.array([[5, 5, 6, 6, 7]]), np.array([[3] * 5])
    truth_segments = [Segment(5, 0, is_crowd=True), Segment(6, 0, is_crowd=True), Segment(7, 2)]
    for reference_crowd_rule, false_positives in ((False, 0), (True, 1)):
        # Together the crowds cover 4/5 of it; the last listed one alone only 2/5, which makes it a false positive.
        metric = PanopticQuality(INFO, reference_crowd_rule=reference_crowd_rule)
        metric.update_from_segments(ground_truth, truth_segments, predicted, [Segment(3, 0)])
        assert counts(metric.result().per_class["cat"]) == (0, false_positives, 0)
        assert counts(metric.result().per_class["sky"]) == (0, 0, 1)


def test_segment_lists_must_fit_their_maps():
    labels = np.array([[5, 5, 0]])
    for segments, message in (
        ([], "the ground-truth map has pixels of id 5, which 'segments_info' does not list"),
        ([Segment(5, 0), Segment(8, 0)], "lists id 8, of which the ground-truth map has no pixels"),
        ([Segment(5, 4)], r"ground-truth segment 5 has class 4; data set 'toy' has classes 0\.\.3"),
    ):
        with pytest.raises(UserError, match=message):
            PanopticQuality(INFO).update_from_segments(labels, segments, labels, [Segment(5, 0)])


def random_labels(random):
    """A small map of random rectangles; often with void, crowds, or nothing but void."""
    height, width = random.integers(1, 12, 2)
    pool = random.choice([0, 1, 2, 3, 10, 11, 12, 20, 30, VOID, 95], size=random.integers(1, 7))
    labels = np.full((height, width), random.choice([VOID, *pool]), np.int32)
    for value in pool:
        y, x = random.integers(0, height), random.integers(0, width)
        labels[y : y + random.integers(1, 8), x : x + random.integers(1, 8)] = value
    return labels


def random_pair(random):
    """A map, and a disturbed copy or an unrelated map of the same size."""
    ground_truth = random_labels(random)
    if random.random() < 0.4:
        prediction = np.resize(random_labels(random), ground_truth.shape)
    else:
        prediction = np.roll(ground_truth, random.choice([0, 0, 0, 1, -1], 2), axis=(0, 1))
        noise = random.random(ground_truth.shape) < random.choice([0, 0.1, 0.3])
        prediction[noise] = random.choice([0, 1, 11, 20, 30, VOID], size=noise.sum())
    return ground_truth, prediction


def plain_counts(ground_truth, prediction, true_class, found_class, crowds):
    """TP, FP, FN and the sum of IoU per class of one image, pixel mask by pixel mask, as the paper says it.

    `true_class` and `found_class` map a value to its class, -1 for void; `crowds` are the crowd values of the truth.
    """
    totals = {class_id: [0, 0, 0, 0.0] for class_id in range(4)}
    true_values, found_values = np.unique(ground_truth).tolist(), np.unique(prediction).tolist()
    void = np.isin(ground_truth, [value for value in true_values if true_class(value) < 0])
    matched_truth, matched_prediction = set(), set()
    for true_value in true_values:
        class_id = true_class(true_value)
        if class_id < 0 or true_value in crowds:
            continue
        for value in found_values:
            if found_class(value) != class_id:
                continue
            true_mask, mask = ground_truth == true_value, (prediction == value) & ~void
            iou = (true_mask & mask).sum() / (true_mask | mask).sum()
            if iou > 0.5:
                totals[class_id][0] += 1
                totals[class_id][3] += iou
                matched_truth.add(true_value)
                matched_prediction.add(value)
        totals[class_id][2] += true_value not in matched_truth
    for value in found_values:
        class_id = found_class(value)
        mask = prediction == value
        excuse = void | np.isin(ground_truth, [crowd for crowd in crowds if true_class(crowd) == class_id])
        if class_id >= 0 and value not in matched_prediction and (mask & excuse).sum() / mask.sum() <= 0.5:
            totals[class_id][1] += 1
    return totals


def class_of_panoptic(value):
    return -1 if value // 10 == 9 else value // 10


def assert_counts(metric, expected, case):
    for class_id, (tp, fp, fn, iou) in expected.items():
        assert metric.true_positives[class_id] == tp, case
        assert metric.false_positives[class_id] == fp, case
        assert metric.false_negatives[class_id] == fn, case
        assert metric.iou_sum[class_id] == pytest.approx(iou), case


def test_random_maps_equal_the_plain_definition():
    random = np.random.default_rng(1)
    whole, parts = PanopticQuality(INFO), [PanopticQuality(INFO), PanopticQuality(INFO)]
    sums = {class_id: np.zeros(4) for class_id in range(4)}
    seen = Counter()
    for case in range(1000):
        ground_truth, prediction = random_pair(random)
        expected = plain_counts(ground_truth, prediction, class_of_panoptic, class_of_panoptic, crowds=(0, 10))
        true_classes, found_classes = ({class_of_panoptic(v) for v in m.flat} for m in (ground_truth, prediction))
        seen["all void"] += true_classes == {-1}
        seen["predicted void"] += found_classes == {-1}
        seen["hallucinated only"] += not true_classes & found_classes - {-1} and found_classes > {-1}
        seen["crowd"] += bool(np.isin(ground_truth, (0, 10)).any())
        seen["class without segments"] += any(not sum(counted[:3]) for counted in expected.values())
        single = PanopticQuality(INFO)
        for metric in (single, whole, parts[case % 2]):
            metric.update_state(ground_truth, prediction)
        assert_counts(single, expected, case)
        for class_id, values in expected.items():
            sums[class_id] += values
    assert min(seen.values()) > 20, seen  # The cases must be of all these kinds.
    parts[0].merge(parts[1])
    for metric in (whole, parts[0]):
        result = metric.result()
        expected_pq = []
        for class_id, category in enumerate(INFO.categories):
            tp, fp, fn, iou = sums[class_id]
            assert tp > 50  # The cases must exercise matches of every class.
            assert fp > 50
            assert fn > 50
            expected_pq.append(iou / (tp + fp / 2 + fn / 2))
            assert result.per_class[category.name].pq == pytest.approx(expected_pq[-1])
            assert result.per_class[category.name].sq == pytest.approx(iou / tp)
        assert result.all.pq == pytest.approx(np.mean(expected_pq))
        assert result.things.pq == pytest.approx(np.mean(expected_pq[:2]))
        assert result.stuff.pq == pytest.approx(np.mean(expected_pq[2:]))
    whole.reset_state()
    assert whole.result().all.num_classes == 0


def test_random_segments_equal_the_plain_definition():
    # Ids of any size in any order, several crowds of a class, several segments of a stuff class.
    random = np.random.default_rng(3)
    crowded = 0
    for case in range(300):
        new_ids = np.append(0, random.permutation(np.arange(1, 2**24, 2**16)))
        maps = [new_ids[labels % VOID] for labels in random_pair(random)]
        class_of, segments = [], []
        for part, labels in enumerate(maps):
            ids = [value for value in random.permutation(np.unique(labels)).tolist() if value]
            class_of.append({0: -1} | {value: int(random.integers(4)) for value in ids})
            segments.append(
                [Segment(value, class_of[-1][value], bool(part == 0 and random.random() < 0.6)) for value in ids]
            )
        crowds = [segment.id for segment in segments[0] if segment.is_crowd]
        crowded += len({class_of[0][value] for value in crowds}) < len(crowds)
        metric = PanopticQuality(INFO)
        metric.update_from_segments(maps[0], segments[0], maps[1], segments[1])
        assert_counts(metric, plain_counts(*maps, class_of[0].get, class_of[1].get, crowds), case)
    assert crowded > 20


def test_areas_of_the_list_count_under_the_reference_rule():
    # One cat of 4 pixels, 3 of them found. The list says 5: IoU 3/5 instead of 3/4.
    labels, found = np.array([[1, 1, 1, 1]]), np.array([[2, 2, 2, 0]])
    for reference_crowd_rule, area, iou in ((False, 5, 3 / 4), (True, 5, 3 / 5), (True, None, 3 / 4)):
        metric = PanopticQuality(INFO, reference_crowd_rule=reference_crowd_rule)
        metric.update_from_segments(labels, [Segment(1, 0, area=area)], found, [Segment(2, 0, area=9)])
        assert metric.result().per_class["cat"].sq == pytest.approx(iou)


def test_a_batch_is_its_images():
    # The same value in two images is two segments: a match in one, an error in the other.
    ground_truth = np.array([[[CAT, CAT]], [[CAT, CAT]]])
    prediction = np.array([[[CAT, CAT]], [[SKY, SKY]]])
    metric = PanopticQuality(INFO)
    metric.update_state(ground_truth, prediction)
    assert counts(metric.result().per_class["cat"]) == (1, 0, 1)


def test_count_overlaps_equals_unique_pairs():
    random = np.random.default_rng(2)
    for _ in range(50):
        first, second = random_pair(random)
        overlaps = count_overlaps(first, second)
        pairs, pixels = np.unique(np.stack([first.ravel(), second.ravel()]), axis=1, return_counts=True)
        np.testing.assert_array_equal(overlaps.first_values[overlaps.first_index], pairs[0])
        np.testing.assert_array_equal(overlaps.second_values[overlaps.second_index], pairs[1])
        np.testing.assert_array_equal(overlaps.pixels, pixels)
