"""AP on a COCO instance JSON: worked examples, equality with pycocotools, and JSONs that do not fit."""

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as mask_utils
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from deeplab2_like.data.convert.shapes import decode_runs
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.instance_ap import InstanceAP, InstanceAPResult
from deeplab2_like.evaluation.instance_json import InstanceAnnotations

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
CATEGORIES = [{"id": 5, "name": "cat"}, {"id": 6, "name": "dog"}]
IMAGE = {"id": 7, "file_name": "7.png", "height": 20, "width": 20}
CAT = 1  # The class id.


def rectangle(x: int, y: int, width: int, height: int, **more: Any) -> dict[str, Any]:
    """An annotation of a cat."""
    polygon = [x, y, x + width, y, x + width, y + height, x, y + height]
    area, box = width * height, [x, y, width, height]
    return {"image_id": 7, "category_id": 5, "segmentation": [polygon], "area": area, "bbox": box, **more}


def mask_of(x: int, y: int, width: int, height: int) -> np.ndarray:
    mask = np.zeros((20, 20), bool)
    mask[y : y + height, x : x + width] = True
    return mask


def run_lengths(mask: np.ndarray) -> dict[str, Any]:
    """As COCO stores crowds: lengths down the columns."""
    flat = mask.reshape(-1, order="F").astype(int)
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write_json(*annotations: dict[str, Any], **lists: Any) -> Path:
        content = {
            "images": [IMAGE],
            "categories": CATEGORIES,
            "annotations": [{"id": i, **annotation} for i, annotation in enumerate(annotations, start=1)],
            **lists,
        }
        path = tmp_path / "instances_val.json"
        path.write_text(json.dumps(content))
        return path

    return write_json


def evaluate_masks(
    path: Path | None, masks: list[np.ndarray], label: np.ndarray | None = None, scores: tuple[float, ...] = (0.9, 0.8)
) -> InstanceAPResult:
    """Evaluates masks of cats on the image."""
    metric = InstanceAP(INFO, None if path is None else InstanceAnnotations(path, INFO))
    metric.update_from_instances(
        "0/7.png",
        np.zeros((20, 20), np.int32) if label is None else label,
        masks=masks,
        scores=scores[: len(masks)],
        classes=[CAT] * len(masks),
        file_name="7.png",
    )
    return metric.result()


def test_perfect_predictions_of_overlapping_objects(write: Write) -> None:
    # A panoptic label cannot hold both cats, as one covers a part of the other.
    path = write(rectangle(2, 2, 10, 10), rectangle(8, 8, 10, 10))
    result = evaluate_masks(path, [mask_of(2, 2, 10, 10), mask_of(8, 8, 10, 10)])
    assert result.mask.ap == result.box.ap == pytest.approx(1)
    assert result.mask.per_class == {"cat": pytest.approx(1), "dog": None}
    assert result.ground_truth == "instances_val.json"


def test_an_object_that_the_panoptic_label_lacks_lowers_ap(write: Write) -> None:
    label = np.where(mask_of(2, 2, 6, 6), CAT * 100 + 1, 0).astype(np.int32)
    found = [mask_of(2, 2, 6, 6)]
    assert evaluate_masks(None, found, label).mask.ap == pytest.approx(1)
    assert evaluate_masks(None, found, label).ground_truth == "panoptic labels"
    # The JSON has two cats, of which one is found: the precision is 1 up to recall 1/2, which is 51 of the 101 recalls
    # 0, 0.01, ..., 1 that COCO averages.
    path = write(rectangle(2, 2, 6, 6), rectangle(12, 12, 6, 6))
    result = evaluate_masks(path, found, label)
    assert result.mask.ap == pytest.approx(51 / 101)
    assert result.box.ap == pytest.approx(51 / 101)


def test_predictions_on_a_crowd_are_ignored(write: Write) -> None:
    cat, group = mask_of(2, 2, 6, 6), mask_of(10, 10, 8, 8)
    crowd = {**rectangle(10, 10, 8, 8), "segmentation": run_lengths(group), "iscrowd": 1}
    # The best prediction is on the group. As a crowd it does not count.
    result = evaluate_masks(write(rectangle(2, 2, 6, 6), crowd), [mask_of(11, 11, 4, 4), cat])
    assert result.mask.ap == result.box.ap == pytest.approx(1)
    # Without the crowd, it is a false positive above the only true positive: precision 1/2 at every recall.
    result = evaluate_masks(write(rectangle(2, 2, 6, 6)), [mask_of(11, 11, 4, 4), cat])
    assert result.mask.ap == result.box.ap == pytest.approx(1 / 2)


def test_areas_and_boxes_are_those_of_the_file(write: Write) -> None:
    # The mask of a half-hidden cat is small; the file says that it is of medium size, and has the box of all of it.
    path = write(rectangle(2, 2, 6, 6, area=2000, bbox=[2, 2, 18, 18]))
    result = evaluate_masks(path, [mask_of(2, 2, 6, 6)])
    assert (result.mask.ap_small, result.mask.ap_medium) == (None, pytest.approx(1))
    assert result.box.ap == 0  # The boxes overlap by 36 of 324 pixels.
    # Without area and box in the file, those of the mask count.
    bare = {key: value for key, value in rectangle(2, 2, 6, 6).items() if key not in ("area", "bbox")}
    result = evaluate_masks(write(bare), [mask_of(2, 2, 6, 6)])
    assert result.mask.ap_small == result.box.ap_small == pytest.approx(1)


def test_numbers_may_be_text(write: Write) -> None:
    cat = rectangle(2, 2, 6, 6, area="2000.5", bbox=["2", "2", "6", "6"], image_id="7", category_id=5.0)
    result = evaluate_masks(write(cat), [mask_of(2, 2, 6, 6)])
    assert result.mask.ap_medium == result.box.ap == pytest.approx(1)


def test_equal_to_pycocotools_on_its_own_files(write: Write) -> None:
    random = np.random.default_rng(0)
    images = [{"id": i, "file_name": f"{i:03}.jpg", "height": 120, "width": 140} for i in range(6)]
    annotations, found = [], []
    for image in images:
        for _ in range(6):
            # A random polygon, and a prediction that is moved by some pixels or lost.
            points = (random.random((7, 2)) * random.choice([20, 60, 110]) + random.random(2) * 20).round(2)
            polygon = points.reshape(-1).tolist()
            runs = mask_utils.merge(mask_utils.frPyObjects([polygon], 120, 140))
            category = int(random.choice([5, 6]))
            crowd = random.random() < 0.15
            segmentation: Any = run_lengths(decode_runs(runs)) if crowd else [polygon]
            annotations.append(
                {
                    "image_id": image["id"],
                    "category_id": category,
                    "segmentation": segmentation,
                    "area": float(mask_utils.area(runs)),
                    "bbox": mask_utils.toBbox(runs).tolist(),
                    "iscrowd": int(crowd),
                }
            )
            if random.random() < 0.8:
                moved = np.roll(decode_runs(runs), random.integers(0, 4, 2), axis=(0, 1))
                found.append((image, category, float(random.random()), moved))
    path = write(*annotations, images=images)
    metric = InstanceAP(INFO, InstanceAnnotations(path, INFO))
    for image in images:
        rows = [row for row in found if row[0] is image]
        metric.update_from_instances(
            image["file_name"],
            np.zeros((120, 140), np.int32),
            masks=[row[3] for row in rows],
            scores=[row[2] for row in rows],
            classes=[INFO.class_of_category_id[row[1]] for row in rows],
        )
    result = metric.result()
    for kind, precision in (("segm", result.mask), ("bbox", result.box)):
        with contextlib.redirect_stdout(io.StringIO()):
            truth = COCO(str(path))
            results = []
            for image, category, score, mask in found:
                runs = mask_utils.encode(np.asfortranarray(mask, dtype=np.uint8))
                place = {"bbox": mask_utils.toBbox(runs).tolist()} if kind == "bbox" else {"segmentation": runs}
                results.append({"image_id": image["id"], "category_id": category, "score": score, **place})
            evaluation = COCOeval(truth, truth.loadRes(results), kind)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        assert 0.1 < evaluation.stats[0] < 0.9
        values = (precision.ap, precision.ap50, precision.ap75, precision.ap_small, precision.ap_medium)
        assert values == pytest.approx(evaluation.stats[:5])


def test_images_are_found_by_name_stem_or_id(write: Write) -> None:
    images = [
        {"id": 139, "file_name": "val2017/000000000139.jpg", "height": 20, "width": 20},
        {"id": 285, "file_name": "b.jpg", "height": 20, "width": 20},
    ]
    path = write(rectangle(2, 2, 6, 6, image_id=139), rectangle(3, 3, 5, 5, image_id=285), images=images)
    annotations = InstanceAnnotations(path, INFO)
    for name in ("val2017/000000000139.jpg", "000000000139.jpg", "000000000139", "139", "other/139.png"):
        (found,) = annotations.of_image(name, (20, 20))
        assert (found["bbox"], found["category_id"]) == ([2, 2, 6, 6], CAT), name
    assert annotations.of_image("285.jpg", (20, 20))[0]["bbox"] == [3, 3, 5, 5]
    assert annotations.of_image("b", (20, 20))[0]["area"] == 25
    with pytest.raises(UserError, match=r"val\.json' has no image '286\.jpg', neither by file name nor by id"):
        annotations.of_image("286.jpg", (20, 20))
    with pytest.raises(UserError, match="gives image 'b' the height and width 20 and 20, but its label has 20 and 30"):
        annotations.of_image("b", (20, 30))
    double = [{**images[1], "id": 1, "file_name": "x/b.jpg"}, {**images[1], "id": 2, "file_name": "y/b.jpg"}]
    annotations = InstanceAnnotations(write(images=double), INFO)
    assert annotations.of_image("y/b.jpg", (20, 20)) == []
    with pytest.raises(UserError, match=r"has 2 images that may be 'b\.png', such as 'x/b\.jpg' and 'y/b\.jpg'"):
        annotations.of_image("b.png", (20, 20))


def test_categories_that_are_not_shared_are_counted(write: Write) -> None:
    path = write(rectangle(2, 2, 6, 6), rectangle(3, 3, 5, 5))
    assert InstanceAnnotations(path, INFO).notes == []
    categories = [CATEGORIES[0], {"id": 1, "name": "sky"}, {"id": 9, "name": "bird"}]
    cat, bird, sky = (rectangle(2, 2, 6, 6, category_id=number) for number in (5, 9, 1))
    annotations = InstanceAnnotations(write(cat, bird, bird, sky, categories=categories), INFO)
    assert annotations.notes == [
        "AP leaves out 3 annotations of 'instances_val.json' whose categories are no things of data set 'toy': sky, "
        "bird.",
        "AP leaves out the things that 'instances_val.json' does not have: dog.",
    ]
    assert len(annotations.of_image("7.png", (20, 20))) == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"categories": [{"id": 6, "name": "cat"}]}, "has category 6 'cat', but data set 'toy' has 6 'dog'; ids and"),
        ({"categories": [{"id": 3, "name": "cat"}]}, "has category 3 'cat', but data set 'toy' has 5 'cat'; ids and"),
        ({"categories": [{"id": 3, "name": "bird"}]}, "has none of the things of data set 'toy'"),
        ({"categories": [{"name": "cat"}]}, "entry 0 of 'categories' lacks 'id' or 'name'"),
        ({"images": [{"id": 7}]}, "entry 0 of 'images' lacks 'id' or 'file_name'"),
        ({"images": [IMAGE, IMAGE]}, "lists image id 7 twice"),
        ({"images": []}, "entry 0 of 'annotations' has image_id 7, which 'images' does not list"),
        ({"annotations": None}, "has no list 'annotations'"),
        (
            {"annotations": [rectangle(2, 2, 6, 6, category_id=77)]},
            "entry 0 of 'annotations' has category_id 77, which 'categories' does not list; add it there",
        ),
        ({"annotations": [rectangle(2, 2, 6, 6, category_id=[3])]}, r"has category_id \[3\], which 'categories' does"),
    ],
)
def test_faulty_files(change: dict[str, Any], message: str, write: Write) -> None:
    with pytest.raises(UserError, match=message):
        InstanceAnnotations(write(rectangle(2, 2, 6, 6), **change), INFO)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"segmentation": []}, "image '7.png': its annotation of id 1 has no 'segmentation'"),
        ({"area": -1}, "entry 0 of 'annotations' has bbox .* and area -1; they must be"),
        ({"area": "large"}, "and area 'large'"),
        ({"bbox": [1, 2, 3]}, r"has bbox \[1, 2, 3\] and area 36"),
        ({"bbox": [1, 2, 3, None]}, "has bbox"),
        ({"iscrowd": 2}, "has iscrowd 2; it must be 0 or 1"),
    ],
)
def test_faulty_annotations(change: dict[str, Any], message: str, write: Write) -> None:
    annotations = InstanceAnnotations(write(rectangle(2, 2, 6, 6, **change)), INFO)
    with pytest.raises(UserError, match=message):
        annotations.of_image("7.png", (20, 20))


def test_metrics_of_two_ground_truths_are_not_merged(write: Write) -> None:
    with pytest.raises(UserError, match="Cannot merge AP of two ground truths"):
        InstanceAP(INFO).merge(InstanceAP(INFO, InstanceAnnotations(write(), INFO)))
