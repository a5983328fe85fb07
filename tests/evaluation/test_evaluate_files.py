"""Evaluation of COCO panoptic files: to the last bit what a plain program in the way of panopticapi computes."""

import json
import subprocess
import sys

import cv2
import numpy as np
import pytest

from deeplab2_like import cli
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.coco_format import CocoPanopticReader
from deeplab2_like.evaluation.evaluate_files import evaluate_files
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.evaluation.semantic_iou import SemanticIoU

# Twelve classes, as NumPy adds more than eight numbers in another order than a plain loop, which shows in the last bit.
INFO = DatasetInfo(
    "toy",
    tuple(Category(3 * i + 5, f"class {i}", i % 2 == 0, (i, 2 * i, 3 * i)) for i in range(12)),
)


class Files:
    """COCO panoptic files in a folder; tests change the JSON content before `run`."""

    def __init__(self, folder):
        self.folder = folder
        self.truth = {"images": [], "annotations": [], "categories": INFO.to_coco_categories()}
        self.prediction = {"annotations": []}
        for name in ("truth", "prediction"):
            (folder / name).mkdir()

    def add(self, image_id, truth, prediction):
        """Adds an image; each map is (ids [H, W], segments_info)."""
        self.truth["images"].append({"id": image_id})
        for name, content, (ids, segments) in (
            ("truth", self.truth, truth),
            ("prediction", self.prediction, prediction),
        ):
            cv2.imwrite(str(self.folder / name / f"{image_id}.png"), ids_to_rgb(np.asarray(ids))[..., ::-1])
            content["annotations"].append(
                {"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments}
            )

    def write(self):
        (self.folder / "truth.json").write_text(json.dumps(self.truth))
        (self.folder / "prediction.json").write_text(json.dumps(self.prediction))
        return {
            "ground_truth": self.folder / "truth.json",
            "ground_truth_dir": self.folder / "truth",
            "prediction": self.folder / "prediction.json",
            "prediction_dir": self.folder / "prediction",
        }

    def run(self, **options):
        return evaluate_files(**self.write(), **options)


@pytest.fixture
def files(tmp_path):
    return Files(tmp_path)


def describe(random, ids, *, crowds):
    """Gives the ids of a map random classes; with crowds, and areas that are a little wrong, for ground truths."""
    segments = []
    for value in random.permutation(np.unique(ids)).tolist():
        if value:
            class_id = int(random.integers(12)) if random.random() < 0.3 else value % 12
            area = int((ids == value).sum())
            segment = {"id": value, "category_id": INFO.categories[class_id].id, "iscrowd": 0, "area": area}
            if crowds:
                segment["iscrowd"] = int(random.random() < 0.3)
                segment["area"] += int(random.integers(-1, 2)) if area > 1 else 0
            segments.append(segment)
    return ids, segments


def fill(files, images, seed=0):
    """Adds images of random rectangles, and predictions made of them or of nothing."""
    random = np.random.default_rng(seed)
    for image_id in range(images):
        ids = np.zeros(random.integers(2, 20, 2), int)
        for _ in range(random.integers(0, 15)):
            y, x = random.integers(0, ids.shape[0]), random.integers(0, ids.shape[1])
            ids[y : y + random.integers(1, 9), x : x + random.integers(1, 9)] = random.choice(
                [*range(1, 40), 2**24 - 1]
            )
        predicted = np.roll(ids, random.choice([0, 0, 1], 2), (0, 1))
        noise = random.random(ids.shape) < random.choice([0, 0.1, 0.2])
        predicted[noise] = random.choice([0, 1, 2, 70_000])
        files.add(image_id, describe(random, ids, crowds=True), describe(random, predicted, crowds=False))


def reference(truth, truth_maps, prediction, predicted_maps):  # noqa: C901 - a plain reference in one function
    """What panopticapi's evaluation does on one core: dictionaries of pairs, areas of the truth from the JSON."""
    stats = {category["id"]: {"iou": 0.0, "tp": 0, "fp": 0, "fn": 0} for category in truth["categories"]}
    annotation_of = {annotation["image_id"]: annotation for annotation in prediction["annotations"]}
    last_crowd_matters = 0
    for annotation in truth["annotations"]:
        image_id = annotation["image_id"]
        true_segments = {segment["id"]: segment for segment in annotation["segments_info"]}
        found_segments = {segment["id"]: segment for segment in annotation_of[image_id]["segments_info"]}
        pixels_of, area_of = {}, {}
        for pair in sorted(zip(truth_maps[image_id].ravel(), predicted_maps[image_id].ravel(), strict=True)):
            pixels_of[pair] = pixels_of.get(pair, 0) + 1
            area_of[pair[1]] = area_of.get(pair[1], 0) + 1
        true_matched, found_matched = set(), set()
        for (true_id, found_id), pixels in pixels_of.items():
            if true_id == 0 or found_id == 0 or true_segments[true_id]["iscrowd"]:
                continue
            category = true_segments[true_id]["category_id"]
            if category != found_segments[found_id]["category_id"]:
                continue
            void = pixels_of.get((0, found_id), 0)
            iou = pixels / (area_of[found_id] + true_segments[true_id]["area"] - pixels - void)
            if iou > 0.5:
                stats[category]["iou"] += iou
                stats[category]["tp"] += 1
                true_matched.add(true_id)
                found_matched.add(found_id)
        crowd_of = {}
        for true_id, segment in true_segments.items():
            if segment["iscrowd"]:
                last_crowd_matters += segment["category_id"] in crowd_of
                crowd_of[segment["category_id"]] = true_id
            elif true_id not in true_matched:
                stats[segment["category_id"]]["fn"] += 1
        for found_id, segment in found_segments.items():
            excused = pixels_of.get((0, found_id), 0)
            excused += pixels_of.get((crowd_of.get(segment["category_id"]), found_id), 0)
            if found_id not in found_matched and excused / area_of[found_id] <= 0.5:
                stats[segment["category_id"]]["fp"] += 1
    assert last_crowd_matters > 10

    result = {"per_class": {}}
    for group, wanted in (("all", (0, 1)), ("things", (1,)), ("stuff", (0,))):
        sums, count = {"pq": 0.0, "sq": 0.0, "rq": 0.0}, 0
        for category in truth["categories"]:
            values = stats[category["id"]]
            segments = values["tp"] + 0.5 * values["fp"] + 0.5 * values["fn"]
            if category["isthing"] not in wanted or not segments:
                continue
            quality = {
                "pq": values["iou"] / segments,
                "sq": values["iou"] / values["tp"] if values["tp"] else 0.0,
                "rq": values["tp"] / segments,
            }
            count += 1
            sums = {key: sums[key] + quality[key] for key in sums}
            result["per_class"][category["name"]] = {key: 100.0 * value for key, value in quality.items()} | {
                key: values[key] for key in ("tp", "fp", "fn")
            }
        result[group] = {key: 100.0 * (value / count) for key, value in sums.items()}
    return result


def read_maps(folder, images):
    return [cv2.imread(str(folder / f"{i}.png"))[..., ::-1].astype(int) @ [1, 256, 65536] for i in range(images)]


def test_equal_to_the_reference_to_the_last_bit(files, tmp_path):
    fill(files, 400)
    expected = reference(
        files.truth, read_maps(tmp_path / "truth", 400), files.prediction, read_maps(tmp_path / "prediction", 400)
    )
    metrics = files.run(reference_crowd_rule=True, workers=2)
    assert metrics["panoptic"] == expected
    assert 5 < expected["all"]["pq"] < 80
    assert all(quality["tp"] > 5 for quality in expected["per_class"].values())
    # Our own rule counts areas, and crowds all together.
    assert files.run()["panoptic"] != expected


def test_own_rule_equals_the_streaming_metrics(files):
    fill(files, 30)
    paths = files.write()
    truth = CocoPanopticReader(paths["ground_truth"], paths["ground_truth_dir"])
    predicted = CocoPanopticReader(paths["prediction"], paths["prediction_dir"], dataset_info=truth.dataset_info)
    quality, iou = PanopticQuality(truth.dataset_info), SemanticIoU(truth.dataset_info)
    for image_id in truth.annotations:
        quality.update_from_segments(*truth.read_segments(image_id), *predicted.read_segments(image_id))
        iou.update_state(truth.read(image_id), predicted.read(image_id))
    metrics = evaluate_files(**paths)
    assert metrics["panoptic"]["all"]["pq"] == 100 * quality.result().all.pq
    assert metrics["semantic"]["miou"] == 100 * iou.result().miou
    assert metrics["semantic"]["fwiou"] == 100 * iou.result().fwiou


def test_numbers_do_not_depend_on_workers(files):
    fill(files, 40)
    calls = []
    first = files.run(workers=1, progress=lambda done, total: calls.append((done, total)))
    assert calls == [(i + 1, 40) for i in range(40)]
    for workers in (2, 5, None):
        assert files.run(workers=workers) == first


def test_worked_example_and_files(files, tmp_path):
    # A cat (class 0) of 4 pixels, void, and sky (class 1); predicted: 3 of its pixels and the void, and all the sky.
    truth = [[9, 9, 0, 5], [9, 9, 0, 5]], [{"id": 9, "category_id": 5, "area": 4}, {"id": 5, "category_id": 8}]
    found = [[1, 1, 1, 2], [1, 2, 1, 2]], [{"id": 1, "category_id": 5}, {"id": 2, "category_id": 8}]
    files.add(7, truth, found)
    # Neither other images nor other categories of the prediction count.
    files.prediction["annotations"].append({"image_id": 8, "file_name": "none.png", "segments_info": []})
    files.prediction["categories"] = [{"id": 77, "name": "other", "isthing": 0}]
    metrics = files.run(output_dir=tmp_path / "out", workers=1)
    # Cat: IoU 3 / (4 + 5 - 3 - 2) = 3/4. Sky: 2 shared, union 3: 2/3. Two pixels are void.
    assert metrics["panoptic"]["things"]["pq"] == pytest.approx(75)
    assert metrics["panoptic"]["stuff"]["pq"] == pytest.approx(200 / 3)
    assert metrics["semantic"]["miou"] == pytest.approx((75 + 200 / 3) / 2)
    assert json.loads((tmp_path / "out/metrics.json").read_text()) == metrics
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["metrics.json"]
    # Another meaning of the same id would make nonsense of the numbers.
    files.prediction["categories"] = [{"id": 5, "name": "dog", "isthing": 0}]
    with pytest.raises(UserError, match=r"says that category 5 is 'dog' \(stuff\), but for data set .* \(thing\)"):
        files.run(workers=1)


def test_errors_name_image_and_fault(files, tmp_path):
    segments = [{"id": 1, "category_id": 5}]
    files.add(1, ([[1, 1]], segments), ([[1, 1]], segments))
    files.add(2, ([[1, 1]], segments), ([[1, 1]], segments))
    whole = json.dumps(files.prediction)

    def fails(message, **options):
        with pytest.raises(UserError, match=message):
            files.run(output_dir=tmp_path / "out", **options)
        assert not (tmp_path / "out/metrics.json").exists()
        files.prediction = json.loads(whole)

    del files.prediction["annotations"][1]
    fails(r"prediction\.json' has no annotation of image '2' \(1 of 2 images are missing\); predict every image")
    files.prediction["annotations"][1]["segments_info"] = []
    fails(r"^Image '2': the predicted map has pixels of id 1, which 'segments_info' does not list")
    files.prediction["annotations"][1]["segments_info"] = [{"id": 1, "category_id": 6}]
    fails(
        r"^Image '2' of '.*prediction\.json': segment 1 has category_id 6, which 'categories' does not list \(those of"
    )
    files.prediction["annotations"][1]["file_name"] = "3.png"
    fails(r"^Image '2' of '.*prediction\.json': the panoptic PNG '.*3\.png' cannot be read")
    fails("workers must be 1 or more, got 0", workers=0)
    cv2.imwrite(str(tmp_path / "prediction/2.png"), np.full((2, 1, 3), [0, 0, 1], np.uint8))
    fails(r"^Image '2': The ground-truth map has shape \(1, 2\) but the predicted map \(2, 1\)")
    files.truth["annotations"] = []
    fails(r"truth\.json' has no annotations, so there is nothing to evaluate")


def test_command(files, tmp_path, capsys):
    fill(files, 10)
    arguments = [f"--{key.replace('_', '-')}={path}" for key, path in files.write().items()]
    arguments += ["--output-dir", str(tmp_path / "out"), "--workers", "2", "--reference-crowd-rule"]
    assert cli.main(["evaluate-files", *arguments]) == 0
    printed = capsys.readouterr().out
    metrics = json.loads((tmp_path / "out/metrics.json").read_text())
    assert f"PQ all {metrics['panoptic']['all']['pq']:.2f}" in printed
    assert str(tmp_path / "out/metrics.json") in printed
    assert metrics == files.run(reference_crowd_rule=True)
    assert cli.main(["evaluate-files", *arguments, "--workers", "0"]) == 2


def test_tensorflow_is_not_imported(files):
    files.add(1, ([[0]], []), ([[0]], []))
    arguments = [f"--{key.replace('_', '-')}={path}" for key, path in files.write().items()]
    program = (
        "import sys; from deeplab2_like import cli; status = cli.main(sys.argv[1:]); "
        "sys.exit(status or ('tensorflow' in sys.modules or 'keras' in sys.modules) * 7)"
    )
    subprocess.run([sys.executable, "-c", program, "evaluate-files", *arguments], check=True)
