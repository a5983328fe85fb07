"""iIoU of Cityscapes: a worked example, and the ways in which images are added."""

import dataclasses

import numpy as np
import pytest

from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.known_datasets import CITYSCAPES
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.instance_iou import AVERAGE_SIZES, InstanceIoU, has_cityscapes_classes

INFO = DatasetInfo("cityscapes", CITYSCAPES)
CLASS = {category.name: i for i, category in enumerate(CITYSCAPES)}
VOID = INFO.ignore_label

# (class, object number) of the ground truth and class of the prediction, and a number of such pixels.
PIXELS = [
    (("road", 0), "road", 5),
    (("road", 0), "car", 40),
    (("car", 1), "car", 3),
    (("car", 1), "road", 1),
    (("car", 2), "truck", 2),
    (("car", 0), "car", 7),  # A group of cars.
    (("car", 0), "person", 9),
    (("person", 1), "rider", 1),
    (("person", 1), "void", 1),
    (("void", 0), "bus", 8),
    (("void", 0), "truck", 4),
]


def make_maps() -> tuple[np.ndarray, np.ndarray]:
    ids = CLASS | {"void": VOID}
    truth = [ids[name] * INFO.label_divisor + number for (name, number), _, pixels in PIXELS for _ in range(pixels)]
    predicted = [ids[name] for _, name, pixels in PIXELS for _ in range(pixels)]
    return np.array([truth]), np.array([predicted])


def test_worked_example() -> None:
    metric = InstanceIoU(INFO)
    metric.update_state(*make_maps())
    result = metric.result()
    car, person = AVERAGE_SIZES["car"], AVERAGE_SIZES["person"]
    # Car 1 has 4 pixels, 3 of them found: iTP 3/4 car, iFN 1/4 car. Car 2 is lost: iFN 1 car. 40 pixels of road are
    # called car: FP 40. The group's pixels are nothing for car. As a vehicle, car 2 is found, too, as a truck.
    assert metric.counts["car"] == pytest.approx([0.75 * car, 1.25 * car, 40])
    assert metric.counts["vehicle"] == pytest.approx([1.75 * car, 0.25 * car, 40])
    # The person is lost, half of it to rider, which is human, too, and half to void. 9 pixels of the group of cars are
    # called person.
    assert metric.counts["person"] == pytest.approx([0, person, 9])
    assert metric.counts["human"] == pytest.approx([0.5 * person, 0.5 * person, 9])
    # Pixels called truck: 2 of car 2, and 4 void ones, which are ignored. Rider: 1 pixel of the person.
    assert metric.counts["truck"] == pytest.approx([0, 0, 2])
    assert metric.counts["rider"] == pytest.approx([0, 0, 1])
    # Buses are only where the ground truth is void: no pixel counts, and the class is not in the mean.
    assert result.per_class == {
        "person": 0,
        "rider": 0,
        "car": pytest.approx(0.75 * car / (2 * car + 40)),
        "truck": 0,
        "bus": None,
        "train": None,
        "motorcycle": None,
        "bicycle": None,
    }
    assert result.iiou == pytest.approx(0.75 * car / (2 * car + 40) / 4)
    assert result.per_category == pytest.approx(
        {"human": 0.5 * person / (person + 9), "vehicle": 1.75 * car / (2 * car + 40)}
    )
    assert result.category_iiou == pytest.approx(sum(result.per_category.values()) / 2)


def test_objects_of_one_class_count_alike() -> None:
    # 99 pixels of a large car are found, the 1 pixel of a small one is not: IoU is 99 %, iIoU one car of two.
    metric = InstanceIoU(INFO)
    truth = np.full((10, 10), CLASS["car"] * 1000 + 1)
    truth[0, 0] += 1
    prediction = np.full((10, 10), CLASS["car"])
    prediction[0, 0] = VOID
    metric.update_state(truth, prediction)
    assert metric.result().iiou == pytest.approx(0.5)


def test_a_perfect_prediction_has_100_percent() -> None:
    truth, _ = make_maps()
    metric = InstanceIoU(INFO)
    metric.update_state(truth, truth // 1000)
    result = metric.result()
    assert result.per_class["car"] == result.per_class["person"] == result.iiou == result.category_iiou == 1


def test_images_and_metrics_add_up() -> None:
    truth, predicted = make_maps()
    whole, parts, part = InstanceIoU(INFO), InstanceIoU(INFO), InstanceIoU(INFO)
    # The weight of an object is that in its image, so a batch of two images has twice the counts of one.
    whole.update_state(np.stack([truth, truth]), np.stack([predicted, predicted]))
    parts.update_state(truth, predicted)
    part.update_state(truth, predicted)
    parts.merge(part)
    assert whole.result() == parts.result() == part.result()
    assert whole.counts["car"] == pytest.approx(2 * part.counts["car"])
    whole.reset_state()
    assert whole.result().iiou is None


def test_the_order_of_the_classes_is_free_but_not_the_classes() -> None:
    assert has_cityscapes_classes(INFO)
    mixed = dataclasses.replace(INFO, categories=CITYSCAPES[::-1])
    metric = InstanceIoU(mixed)
    car = [category.name for category in mixed.categories].index("car")
    metric.update_state(np.array([[car * 1000 + 1] * 4]), np.array([[car, car, car, 0]]))
    assert metric.result().per_class["car"] == pytest.approx(0.75)  # The other pixel is called bicycle.
    assert metric.counts["bicycle"] == pytest.approx([0, 0, 1])
    other = DatasetInfo("toy", (Category(1, "car", True, (0, 0, 0)),))
    assert not has_cityscapes_classes(other)
    with pytest.raises(UserError, match="known for Cityscapes only; data set 'toy'"):
        InstanceIoU(other)
    with pytest.raises(UserError, match="Cannot merge the iIoU"):
        InstanceIoU(INFO).merge(metric)
