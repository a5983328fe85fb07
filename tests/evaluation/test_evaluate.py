"""The evaluation of a system: whole images, the metrics, and the same outputs as an export."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from one_convolution import (
    OneConvolution,
    OneConvolutionConfig,
    one_convolution_config,
    one_convolution_registered,
)

from deeplab2_like.cli import main
from deeplab2_like.configs import load_config
from deeplab2_like.data import known_datasets
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.data.shards import ShardWriter
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.evaluate import evaluate
from deeplab2_like.evaluation.inference import make_inference_function, make_oracle_function
from deeplab2_like.evaluation.instance_json import InstanceAnnotations
from deeplab2_like.evaluation.model_folder import ModelFolderEvaluation, _picture_name
from deeplab2_like.export.predictor import Predictor
from deeplab2_like.export.saved_model import export_saved_model
from deeplab2_like.model import build_system
from deeplab2_like.model_folder import load_model_folder, prepare_model_folder
from deeplab2_like.trainer.train import train

SIZES = ((16, 32), (24, 16), (16, 32))


class Oracle:
    """Stands for a system that knows the label: an image is its own label, as colors."""

    def __init__(self, info: DatasetInfo) -> None:
        self.dataset_info = info
        self.semantic_classes = tuple(range(info.num_classes))

    def infer(self, images: tf.Tensor, *, with_instances: bool = False) -> dict[str, tf.Tensor]:
        parts = tf.cast(images, tf.int32)
        panoptic = parts[..., 0] + 256 * parts[..., 1] + 65536 * parts[..., 2]
        ids = tf.unique(tf.reshape(panoptic, [-1])).y[None]  # [1, K]
        classes = ids // self.dataset_info.label_divisor
        scores = tf.where(classes == self.dataset_info.ignore_label, 0.0, 1.0)
        # Unused rows of the table are zero.
        used = tf.cast(scores > 0, tf.int32)
        return {
            "panoptic": panoptic,
            "segment_id": ids * used,
            "segment_class": classes * used,
            "segment_score": scores,
            "semantic": panoptic // self.dataset_info.label_divisor,
        }


def examples(*, shown: Any = lambda label: label) -> Iterator[dict[str, tf.Tensor]]:
    """Three scenes whose images are `shown(label)` as colors."""
    for number, (height, width) in enumerate(SIZES):
        label = render_scene(number, height=height, width=width)[1]
        seen = shown(label)
        image = np.stack([seen & 255, seen >> 8 & 255, seen >> 16], axis=-1).astype(np.uint8)
        # The first and the last share a name, as images from different folders may.
        yield {
            "image": tf.constant(image),
            "panoptic": tf.constant(label, tf.int32),
            "image_id": tf.constant(f"scene_{number % 2}.png"),
        }


def test_a_perfect_system_gets_everything() -> None:
    seen: list[str] = []

    def after_image(example: Mapping[str, tf.Tensor], found: Mapping[str, np.ndarray]) -> None:
        seen.append(example["image_id"].numpy().decode())
        np.testing.assert_array_equal(example["panoptic"], found["panoptic"])

    metrics = evaluate(Oracle(scenes_info()), examples(), after_image=after_image)  # type: ignore[arg-type]
    assert seen == ["scene_0.png", "scene_1.png", "scene_0.png"]
    shown = {name: quality for name, quality in metrics["panoptic"]["per_class"].items() if quality["tp"]}
    assert len(shown) >= 4
    assert all((quality["pq"], quality["fp"], quality["fn"]) == (100.0, 0, 0) for quality in shown.values())
    assert (metrics["semantic"]["miou"], metrics["semantic"]["fwiou"]) == (100.0, 100.0)
    assert metrics["semantic"]["per_class"] == dict.fromkeys(shown, 100.0)
    assert metrics["semantic"]["not_predicted"] == []
    assert metrics["panoptic"]["stuff"]["sq"] == 100.0
    assert metrics["instance"]["mask_ap"] == pytest.approx(100.0)
    assert metrics["instance"]["box_ap50"] == pytest.approx(100.0)


def test_a_blind_system_gets_nothing() -> None:
    info = scenes_info()
    metrics = evaluate(Oracle(info), examples(shown=lambda label: np.full_like(label, info.void)))  # type: ignore[arg-type]
    assert metrics["panoptic"]["all"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0}
    qualities = metrics["panoptic"]["per_class"].values()
    # Every segment of the labels is missed, and void is no prediction.
    assert sum(quality["fn"] for quality in qualities) > 0
    assert sum(quality["tp"] + quality["fp"] for quality in qualities) == 0
    assert metrics["instance"]["mask_ap"] == 0.0


class WithInstances(Oracle):
    """Its overlapping instances are all wrong, while its panoptic segments are right."""

    def infer(self, images: tf.Tensor, *, with_instances: bool = False) -> dict[str, tf.Tensor]:
        found = super().infer(images)
        if with_instances:
            size = tf.shape(images)[1:3]
            found["instance_masks"] = tf.ones(tf.concat([[1, 1], size], axis=0), tf.bool)
            found["instance_boxes"] = tf.cast(tf.concat([[0, 0], size], axis=0), tf.float32)[None, None]
            found["instance_classes"] = tf.constant([[self.dataset_info.thing_classes[0]]])
            found["instance_scores"] = tf.constant([[0.9]])
        return found


def test_average_precision_is_that_of_a_system_s_own_instances() -> None:
    metrics = evaluate(WithInstances(scenes_info()), examples())  # type: ignore[arg-type]
    assert metrics["instance"]["mask_ap"] == 0.0
    assert metrics["panoptic"]["stuff"]["sq"] == 100.0


def test_instance_iou_of_cityscapes() -> None:
    info = DatasetInfo("streets", known_datasets.CITYSCAPES)
    label = np.full((4, 8), info.void, np.int32)
    label[:, :4] = 0
    label[:2, 4:] = 13001
    label[2:, 4:6] = 13002

    def measure(shown: np.ndarray, system: Oracle) -> dict[str, Any]:
        image = np.stack([shown & 255, shown >> 8 & 255, shown >> 16], axis=-1).astype(np.uint8)
        name = tf.constant("a_000000_000000.png")
        example = {"image": tf.constant(image), "panoptic": tf.constant(label), "image_id": name}
        return evaluate(system, [example])["semantic"]  # type: ignore[arg-type]

    # The smaller car is missed: two cars of equal weight, and one is found.
    metrics = measure(np.where(label == 13002, 11001, label), Oracle(info))
    assert metrics["iiou_per_class"] == {"person": 0.0, "car": pytest.approx(50.0)}
    assert metrics["iiou"] == pytest.approx(25.0)
    # The person is no vehicle.
    assert metrics["category_iiou"] == pytest.approx(25.0)
    # A head that does not predict cars has no iIoU.
    assert "iiou" not in measure(label, BlindToThings(info))


class BlindToThings(Oracle):
    """Its panoptic map is void, and its semantic head predicts stuff alone: things are void."""

    def __init__(self, info: DatasetInfo) -> None:
        super().__init__(info)
        self.semantic_classes = info.stuff_classes

    def infer(self, images: tf.Tensor, *, with_instances: bool = False) -> dict[str, tf.Tensor]:
        found = super().infer(images)
        is_stuff = tf.reduce_any(found["semantic"][..., None] == tf.constant(self.dataset_info.stuff_classes), axis=-1)
        found["semantic"] = tf.where(is_stuff, found["semantic"], self.dataset_info.ignore_label)
        return found | {"panoptic": tf.fill(tf.shape(found["panoptic"]), self.dataset_info.void)}


def test_mean_iou_is_that_of_the_semantic_head() -> None:
    info = scenes_info()
    metrics = evaluate(BlindToThings(info), examples())  # type: ignore[arg-type]
    assert metrics["panoptic"]["all"]["pq"] == 0.0
    assert (metrics["semantic"]["miou"], metrics["semantic"]["fwiou"]) == (100.0, 100.0)
    stuff = [info.categories[i].name for i in info.stuff_classes]
    assert set(metrics["semantic"]["per_class"]) <= set(stuff)
    assert metrics["semantic"]["not_predicted"] == [info.categories[i].name for i in info.thing_classes]


@pytest.mark.parametrize("system", [Oracle, WithInstances])
def test_average_precision_on_annotations_of_a_json(system: type[Oracle], tmp_path: Path) -> None:
    info = scenes_info()
    thing = info.categories[info.thing_classes[0]]
    # The second scene has another size than the others. Each image shows an object in its first 10 columns.
    images = [
        {"id": number, "file_name": f"scene_{number}.png", "height": height, "width": width}
        for number, (height, width) in enumerate(SIZES[:2])
    ]
    annotations = [
        {"image_id": image["id"], "category_id": thing.id, "segmentation": [[0, 0, 10, 0, 10, height, 0, height]]}
        for image, (height, _) in zip(images, SIZES, strict=False)
    ]
    path = tmp_path / "instances.json"
    categories = [{"id": thing.id, "name": thing.name}]
    path.write_text(json.dumps({"images": images, "annotations": annotations, "categories": categories}))
    metrics = evaluate(system(info), examples(), annotations=InstanceAnnotations(path, info))  # type: ignore[arg-type]
    assert metrics["instance"]["ground_truth"] == "instances.json"
    # No segment of the scenes is like that. The masks of whole images are: IoU is 10/32, 10/16 and 10/32, so at the
    # thresholds 0.50, 0.55 and 0.60 one of three predictions is right. All have the same score, so those before it
    # count as wrong: precision 1/2 up to recall 1/3, which is 34 of 101 recalls. 3 of 10 thresholds.
    expected = 0.0 if system is Oracle else 100 * (1 / 2) * (34 / 101) * (3 / 10)
    assert metrics["instance"]["mask_ap"] == pytest.approx(expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_evaluation_sees_what_the_export_gives(compiled: bool, tmp_path_factory: pytest.TempPathFactory) -> None:
    system = OneConvolution(OneConvolutionConfig(channels=8), scenes_info()).create_variables()
    exported = export_saved_model(
        system, tmp_path_factory.mktemp("export") / "exported", config=one_convolution_config(), check=False
    )
    predictor = Predictor(exported)
    maps: list[np.ndarray] = []

    def after_image(example: Mapping[str, tf.Tensor], found: Mapping[str, np.ndarray]) -> None:
        np.testing.assert_array_equal(found["panoptic"], predictor(example["image"].numpy()).panoptic)
        maps.append(found["panoptic"])

    infer = make_inference_function(system, compiled=compiled, with_instances=True)
    evaluate(system, examples(), infer=lambda example: infer(example["image"][tf.newaxis]), after_image=after_image)
    assert tuple(prediction.shape for prediction in maps) == SIZES
    # Several classes: maps of one class alone would always agree.
    assert max(len(np.unique(prediction)) for prediction in maps) > 1


def test_the_number_of_threads_changes_nothing() -> None:
    info = scenes_info()
    # Labels with their borders moved, so that the numbers are not all 100.
    results = [
        evaluate(Oracle(info), examples(shown=lambda label: np.roll(label, 1, axis=1)), workers=workers)  # type: ignore[arg-type]
        for workers in (1, 4)
    ]
    assert results[0] == results[1]
    assert 0 < results[0]["panoptic"]["all"]["pq"] < 100


def test_systems_without_a_rule_have_neither_views_nor_oracle() -> None:
    system = OneConvolution(OneConvolutionConfig(), scenes_info()).create_variables()
    infer = make_inference_function(system, flip=True)
    with pytest.raises(UserError, match="System 'one_convolution' does not define how the outputs of several views"):
        infer(tf.zeros((1, 8, 8, 3), tf.uint8))
    with pytest.raises(UserError, match="System 'one_convolution' has no part 'semantic' that an oracle"):
        make_oracle_function(system, ["semantic"])


def test_views_that_do_not_fit_are_refused() -> None:
    system = OneConvolution(OneConvolutionConfig(), scenes_info())
    for scales in ((), (0.5, 0.0), (float("nan"),)):
        with pytest.raises(UserError, match="Scales must be numbers above 0"):
            make_inference_function(system, scales=scales)
    fewer = dataclasses.replace(scenes_info(), categories=scenes_info().categories[:3])
    with pytest.raises(UserError, match="An ensemble needs models for the same classes; those of data sets 'scenes'"):
        make_inference_function(system, ensemble=[OneConvolution(OneConvolutionConfig(), fewer)])
    other = build_system(load_config("panoptic_deeplab/scenes_tiny"), scenes_info())
    with pytest.raises(UserError, match="models of one system, got 'one_convolution' and 'panoptic_deeplab'"):
        make_inference_function(system, ensemble=[other])


def test_inference_takes_any_size() -> None:
    system = OneConvolution(OneConvolutionConfig(), scenes_info()).create_variables()
    infer = make_inference_function(system)
    for size in ((1, 1, 1), (2, 9, 5), (1, 8, 100)):
        assert infer(tf.zeros((*size, 3), tf.uint8))["panoptic"].shape == size
    assert infer.experimental_get_tracing_count() == 1


@pytest.fixture
def model_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A model folder without checkpoints, whose network must not be built, and `records` beside it."""
    (tmp_path / "records").mkdir()
    scenes_info().save(tmp_path / "records")
    with ShardWriter(tmp_path / "records" / "val-00000-of-00001.tfrecord") as writer:
        writer.write(b"not read")
    with one_convolution_registered():
        config = one_convolution_config(data={"path": str(tmp_path / "records")})
        prepare_model_folder(tmp_path / "model", config, scenes_info())
        monkeypatch.setattr(OneConvolution, "create_variables", lambda _: pytest.fail("The network is built."))
        yield tmp_path / "model"


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("run", {"instances_json": "missing.json"}, "the COCO instance JSON 'missing.json' cannot be read"),
        ("run", {"instances_json": __file__}, "is not a JSON file"),
        ("run", {"overrides": ["data.path=missing"]}, "'missing' does not exist"),
        ("run", {"split": "test"}, "has no split 'test'; splits there: val"),
        ("run", {"ensemble": ["missing"]}, "'missing' is no model folder"),
        ("run", {}, "holds no checkpoint yet; train first"),
        ("follow", {"overrides": ["data.path=missing"]}, "'missing' does not exist"),
        ("follow", {"split": "test"}, "has no split 'test'"),
        ("predict", {"save_predictions": True}, "Input 'missing' does not exist; give an image file or a folder"),
    ],
)
def test_inputs_are_checked_before_the_network_is_built(
    method: str, options: dict[str, Any], message: str, model_folder: Path
) -> None:
    arguments = {"predict": ["missing"]}.get(method, [])
    with pytest.raises(UserError, match=message):
        getattr(ModelFolderEvaluation(model_folder, **options), method)(*arguments)


def test_checkpoints_are_found_before_the_network_is_built(model_folder: Path) -> None:
    with pytest.raises(UserError, match="holds no checkpoint yet; train first"):
        ModelFolderEvaluation(model_folder, ensemble=[model_folder])
    with pytest.raises(UserError, match="holds no checkpoint yet; train first"):
        load_model_folder(model_folder)
    config = load_config(model_folder / "config.yaml")
    with pytest.raises(UserError, match="'missing' to start from does not exist; give a model folder"):
        train(config, model_folder, init_from="missing")


def test_following_checks_the_instance_json_before_it_waits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    # Without a time limit, so it would wait for the training forever.
    assert main(["evaluate", "--model-dir", str(tmp_path / "none"), "--follow", "--instances-json", __file__]) == 2
    output = capsys.readouterr()
    assert "is not a JSON file" in output.err
    assert output.out == ""


def test_pictures_are_named_apart_and_stay_in_their_folder() -> None:
    taken: set[str] = set()
    names = ["a/x.jpg", "a/x.png", "b.1", "b.2", "../../x.png", "/x.png", "", "a/x.jpg"]
    assert [_picture_name(name, taken) for name in names] == [
        "a/x.png",
        "a/x.png.png",
        "b.1.png",
        "b.2.png",
        "x.png",
        "x.png.png",
        ".-2.png",
        "a/x.jpg.png",
    ]
