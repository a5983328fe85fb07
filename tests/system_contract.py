"""The tests that every system inherits: subclass `SystemContract` and say how to build a small system."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

from deeplab2_like.checkpoint import make_checkpoint, restore
from deeplab2_like.configs import load_config
from deeplab2_like.configs.schema import TrainerConfig
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import render_scene, scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.inference import InferenceFunction, make_inference_function, make_oracle_function
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.evaluation.semantic_iou import SemanticIoU
from deeplab2_like.export.saved_model import export_saved_model
from deeplab2_like.model import PanopticSystem, overlaps
from deeplab2_like.model.base import View
from deeplab2_like.trainer.trainer import Trainer

# Two stuff classes (0, 1) and two thing classes (2, 3).
INFO = DatasetInfo.from_coco_categories(
    [
        {"id": 7, "name": "sky", "isthing": 0},
        {"id": 8, "name": "road", "isthing": 0},
        {"id": 11, "name": "car", "isthing": 1},
        {"id": 13, "name": "person", "isthing": 1},
    ],
    name="contract",
)


def trainer_config(**changes: Any) -> TrainerConfig:
    """A trainer section for a single step."""
    return TrainerConfig.model_validate({"steps": 1, "batch_size": 1, "learning_rate": 0.01, **changes})


def hand_made_label(size: int = 64) -> np.ndarray:
    """Two cars side by side that touch, a person on top of one, a person alone, road below, sky above."""
    label = np.zeros((size, size), np.int32)
    label[size // 2 :] = 1000
    label[24:44, 4:28] = 2001
    label[24:44, 28:56] = 2002
    label[16:36, 36:44] = 3001
    label[46:60, 8:20] = 3002
    return label


def paint(label: np.ndarray) -> np.ndarray:
    """An image in which every segment has a color of its own, uint8 [H, W, 3]."""
    values = np.unique(label)
    colors = np.random.default_rng(3).integers(20, 235, (len(values), 3))
    return colors[np.searchsorted(values, label)].astype(np.uint8)


def panoptic_quality(label: np.ndarray, prediction: np.ndarray, info: DatasetInfo) -> float:
    metric = PanopticQuality(info)
    metric.update_state(label, prediction)
    return metric.result().all.pq


class SystemContract:
    """Inherit, and override `config_name`, `build`, `excite` and, if they matter, the rest."""

    config_name: str
    # Steps and learning rate with which the small system overfits one image.
    overfit_steps = 80
    overfit_learning_rate = 0.01
    # Of the fresh system that overfits.
    overfit_seed = 1

    def build(self, info: DatasetInfo) -> PanopticSystem:
        """Builds a small system with fresh variables."""
        raise NotImplementedError

    def excite(self, system: PanopticSystem) -> None:
        """Changes the variables of an untrained system so that it predicts several classes and instances."""
        raise NotImplementedError

    def solvable(self, label: np.ndarray, info: DatasetInfo) -> np.ndarray | None:
        """What of a label perfect outputs give again, the rest as void; None if nothing.

        Here: labels without crowds; these have no center, so their pixels go to some instance nearby.
        """
        crowd = np.isin(label // info.label_divisor, info.thing_classes) & (label % info.label_divisor == 0)
        return None if crowd.any() else label

    # --- helpers -----------------------------------------------------------------------------------------------------

    def targets_of(self, system: PanopticSystem, *labels: np.ndarray) -> dict[str, tf.Tensor]:
        every = [system.make_targets(tf.constant(label)) for label in labels]
        return {name: tf.stack([targets[name] for targets in every]) for name in every[0]}

    def losses_of(self, system: PanopticSystem, images: np.ndarray, *labels: np.ndarray) -> dict[str, float]:
        targets = self.targets_of(system, *labels)
        losses = system.compute_losses(targets, system(images, targets=targets, training=True))
        return {name: float(tf.math.divide_no_nan(loss.total, loss.normalizer)) for name, loss in losses.items()}

    def train_step(self, system: PanopticSystem, learning_rate: float = 0.01) -> Any:
        optimizer = keras.optimizers.Adam(learning_rate)
        optimizer.build(system.trainable_variables)
        trainer = Trainer(
            None,
            trainer_config(optimizer={"weight_decay": 1e-4, "clip_norm": 10.0}),
            system=system,
            optimizer=optimizer,
            strategy=tf.distribute.get_strategy(),
        )
        return trainer.replica_step, optimizer

    @pytest.fixture(autouse=True, scope="class")
    @classmethod
    def _two_window_sizes(cls) -> Iterator[None]:
        """A loop for each size of a window takes seconds to trace; `test_overlaps.py` has all sizes."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(overlaps, "WINDOW_DIVISORS", ((4, 4), (1, 1)))
            yield

    @pytest.fixture
    def system(self) -> PanopticSystem:
        """A fresh system, to train."""
        keras.utils.set_random_seed(self.overfit_seed)
        return self.build(INFO)

    @pytest.fixture(scope="class")
    @classmethod
    def untrained(cls) -> PanopticSystem:
        """A system with the weights of the start; tests share it and leave these as they are."""
        keras.utils.set_random_seed(1)
        return cls().build(INFO)

    @pytest.fixture(scope="class")
    @classmethod
    def excited(cls) -> PanopticSystem:
        """A system that predicts something; tests share it and leave it as it is."""
        keras.utils.set_random_seed(1)
        contract = cls()
        system = contract.build(INFO)
        contract.excite(system)
        return system

    @pytest.fixture(scope="class")
    @classmethod
    def graph(cls, excited: PanopticSystem) -> InferenceFunction:
        """The inference function of `excited`, which takes seconds to trace."""
        return make_inference_function(excited)

    @pytest.fixture
    def eager(self) -> Iterator[None]:
        """Runs a test without graphs, each of which takes seconds to trace; the graphs have tests of their own."""
        tf.config.run_functions_eagerly(True)
        yield
        tf.config.run_functions_eagerly(False)

    # --- the contract ------------------------------------------------------------------------------------------------

    @pytest.mark.parametrize("size", [(64, 64), (37, 53), (1, 1)])
    def test_shapes_and_types(self, excited: PanopticSystem, size: tuple[int, int]) -> None:
        found = excited.infer(np.zeros((2, *size, 3), np.uint8))
        assert found["panoptic"].shape == (2, *size)
        assert found["panoptic"].dtype == tf.int32
        rows = found["segment_id"].shape[1]
        for name, dtype in (("segment_id", tf.int32), ("segment_class", tf.int32), ("segment_score", tf.float32)):
            assert found[name].shape == (2, rows)
            assert found[name].dtype == dtype

    def test_segments_describe_the_map(self, excited: PanopticSystem) -> None:
        image = paint(hand_made_label())
        found = {name: value.numpy()[0] for name, value in excited.infer(image[None]).items()}
        used = found["segment_score"] > 0
        assert used.sum() >= 3  # Else this test would show nothing.
        in_map = set(np.unique(found["panoptic"])) - {INFO.void}
        assert set(found["segment_id"][used]) == in_map
        assert len(in_map) == used.sum()
        assert (found["segment_id"][used] // INFO.label_divisor == found["segment_class"][used]).all()
        assert not found["segment_id"][~used].any()
        assert not found["segment_class"][~used].any()

    def test_targets_have_static_shapes_in_a_pipeline(self, untrained: PanopticSystem) -> None:
        dataset = tf.data.Dataset.from_tensors(hand_made_label()).map(untrained.make_targets)
        assert all(spec.shape.is_fully_defined() for spec in dataset.element_spec.values())

    def test_gradients_are_finite_and_reach_every_variable(self, untrained: PanopticSystem) -> None:
        label = hand_made_label()
        targets = self.targets_of(untrained, label)
        with tf.GradientTape() as tape:
            losses = untrained.compute_losses(targets, untrained(paint(label)[None], targets=targets, training=True))
            total = tf.add_n([loss.total for loss in losses.values()])
        assert set(losses) == set(untrained.loss_weights)
        variables = untrained.trainable_variables
        gradients = tape.gradient(total, [variable.value for variable in variables])
        for variable, gradient in zip(variables, gradients, strict=True):
            assert gradient is not None, variable.path
            assert np.isfinite(gradient).all(), variable.path
            # A convolution bias before ReLU units that all sleep gets zeros; kernels never do.
            assert "kernel" not in variable.name or np.any(gradient), variable.path

    def test_overfits_one_image(self, system: PanopticSystem) -> None:
        label = hand_made_label()
        batch = {"image": tf.constant(paint(label)[None]), "targets": self.targets_of(system, label)}
        step = tf.function(self.train_step(system, self.overfit_learning_rate)[0])
        first = float(step(batch)["loss"])
        for _ in range(self.overfit_steps):
            last = float(step(batch)["loss"])
        assert last < 0.5 * first
        assert panoptic_quality(label, system.infer(batch["image"])["panoptic"].numpy()[0], INFO) > 0.75

    def test_oracle_round_trip(self, untrained: PanopticSystem) -> None:
        label = hand_made_label()
        found = untrained.postprocess_targets(self.targets_of(untrained, label))
        assert panoptic_quality(label, found["panoptic"].numpy()[0], INFO) == 1.0

    def test_oracle_round_trip_on_scenes(self) -> None:
        info = scenes_info()
        system = self.build(info)
        metric = PanopticQuality(info)
        scenes = [render_scene(index, height=96, width=192)[1] for index in range(12)]
        labels = [label for scene in scenes if (label := self.solvable(scene, info)) is not None]
        assert len(labels) > 3
        for label in labels:
            found = system.postprocess_targets(self.targets_of(system, label))
            metric.update_state(label, found["panoptic"].numpy()[0])
        assert metric.result().all.pq == 1.0

    def test_oracle_without_parts_is_the_prediction(self, excited: PanopticSystem) -> None:
        label = hand_made_label()
        image = paint(label)[None]
        outputs = excited(image, training=False)
        found = excited.postprocess_with_truth(outputs, self.targets_of(excited, label), label.shape, ())
        expected = excited.infer(image)
        # Upsampling first may round differently, which moves single pixels on borders.
        same = found["panoptic"].numpy() == expected["panoptic"].numpy()
        assert same.mean() > 0.999
        np.testing.assert_array_equal(found["segment_class"], expected["segment_class"])

    @pytest.mark.usefixtures("eager")
    def test_oracle_with_all_parts_is_the_label(self, excited: PanopticSystem) -> None:
        assert excited.oracle_parts
        label = hand_made_label()
        found = make_oracle_function(excited, excited.oracle_parts)(
            {"image": tf.constant(paint(label)), "panoptic": tf.constant(label)}
        )
        assert panoptic_quality(label, found["panoptic"].numpy()[0], INFO) == 1.0

    @pytest.mark.usefixtures("eager")
    def test_semantic_map_of_a_perfect_network_has_a_mean_iou_of_1(self, excited: PanopticSystem) -> None:
        label = hand_made_label()
        example = {"image": tf.constant(paint(label)), "panoptic": tf.constant(label)}
        part = ["semantic"] if "semantic" in excited.oracle_parts else excited.oracle_parts
        found = make_oracle_function(excited, part)(example)["semantic"].numpy()[0]
        metric = SemanticIoU(INFO, classes=excited.semantic_classes)
        metric.update_from_class_maps(label // INFO.label_divisor, found)
        assert metric.result().miou == 1.0
        assert len(metric.result().per_class) == len(excited.semantic_classes)

    def test_semantic_map_is_that_of_the_logits(self, excited: PanopticSystem) -> None:
        outputs = dict(excited(np.zeros((1, 64, 64, 3), np.uint8)))
        if "semantic_logits" not in outputs:
            assert self.config_name.startswith("panoptic_fcn")  # Its masks are products of kernels and a feature.
            return
        # Four quarters of one class each; upsampling keeps straight borders between cells of stride 4.
        label = np.repeat(np.repeat(np.arange(4).reshape(2, 2), 32, axis=0), 32, axis=1)
        classes = getattr(excited, "classes", None)
        channels = label if classes is None else np.asarray(classes.of_class)[label]
        num_channels = outputs["semantic_logits"].shape[-1]
        outputs["semantic_logits"] = 20.0 * tf.one_hot(channels[None, ::4, ::4], num_channels)
        found = excited.semantic_map(outputs, (64, 64)).numpy()[0]
        np.testing.assert_array_equal(
            found, np.where(np.isin(label, excited.semantic_classes), label, INFO.ignore_label)
        )

    def test_semantic_map_has_the_classes_of_the_head(self, excited: PanopticSystem) -> None:
        found = excited.infer(paint(hand_made_label())[None, :37, :53], with_instances=True)["semantic"]
        assert found.dtype == tf.int32
        assert found.shape == (1, 37, 53)
        assert set(np.unique(found)) <= {*excited.semantic_classes, INFO.ignore_label}

    @pytest.mark.usefixtures("eager")
    def test_views_are_merged_in_place(self, excited: PanopticSystem) -> None:
        image = tf.constant(paint(hand_made_label())[None])
        expected = excited.infer(image)["panoptic"].numpy()[0]
        assert len(np.unique(expected)) > 2
        # The same view twice, as an ensemble of one model with itself.
        twice = make_inference_function(excited, ensemble=[excited])(image)["panoptic"].numpy()[0]
        assert panoptic_quality(expected, twice, INFO) > 0.99
        # The mirror image of a mirror image, alone.
        size = tuple(image.shape[1:3])
        outputs = excited.merge_views([View(excited, excited(image[:, :, ::-1]), mirrored=True)], size)
        mirrored = excited.infer(image[:, :, ::-1])["panoptic"].numpy()[0, :, ::-1]
        assert panoptic_quality(mirrored, excited.finish(outputs, size)["panoptic"].numpy()[0], INFO) > 0.95

    def test_a_resized_image_has_a_map_of_its_own_size(self, excited: PanopticSystem) -> None:
        def resized(resize: dict[str, Any]) -> PanopticSystem:
            content = excited.get_config()
            system = type(excited).from_config(content | {"config": content["config"] | {"resize": resize}})
            system.create_variables().set_weights(excited.get_weights())
            return system

        image = paint(hand_made_label())[None]
        expected = excited.infer(image)["panoptic"].numpy()[0]
        assert len(np.unique(expected)) > 2
        # The network size is the image size: the same map, up to rounding on borders.
        same = resized({"longer_side": 64}).infer(image)["panoptic"].numpy()[0]
        assert panoptic_quality(expected, same, INFO) > 0.95
        # 48x64 pixels: the limit of the longer side allows the factor 120 / 64 = 1.875 only, not 96 / 48 = 2.
        larger = resized({"shorter_side": 96, "longer_side": {"max": 120}})
        outputs = larger(image[:, :48], training=False)
        np.testing.assert_array_equal(outputs["network_size"], [90, 120])
        assert larger.postprocess(outputs, (48, 64))["panoptic"].shape == (1, 48, 64)

    @pytest.mark.usefixtures("eager")
    def test_views_of_several_scales_give_a_valid_map(self, excited: PanopticSystem) -> None:
        image = tf.constant(paint(hand_made_label())[None, :61, :53])
        infer = make_inference_function(excited, scales=(1.0, 1.5), flip=True, with_instances=True)
        found = {name: value.numpy()[0] for name, value in infer(image).items()}
        assert found["panoptic"].shape == (61, 53)
        used = found["segment_score"] > 0
        assert used.any()  # Else this test would show nothing.
        assert set(found["segment_id"][used]) == set(np.unique(found["panoptic"])) - {INFO.void}

    def test_image_without_things(self, untrained: PanopticSystem) -> None:
        label = np.where(np.arange(64)[:, None] < 32, 0, 1000) * np.ones((1, 64), np.int32)
        label = label.astype(np.int32)
        assert all(np.isfinite(value) for value in self.losses_of(untrained, paint(label)[None], label).values())
        found = untrained.postprocess_targets(self.targets_of(untrained, label))
        np.testing.assert_array_equal(found["panoptic"].numpy()[0], label)

    def test_all_void_image_teaches_nothing(self, untrained: PanopticSystem) -> None:
        label = np.full((64, 64), INFO.void, np.int32)
        assert set(self.losses_of(untrained, paint(label)[None], label).values()) == {0.0}

    def test_crowd_gives_finite_losses_and_a_valid_map(self, untrained: PanopticSystem) -> None:
        label = hand_made_label()
        label[0:20, 0:30] = 3000  # Instance 0 of a thing class.
        assert all(np.isfinite(value) for value in self.losses_of(untrained, paint(label)[None], label).values())
        found = untrained.postprocess_targets(self.targets_of(untrained, label))["panoptic"].numpy()[0]
        outside = label != 3000
        assert set(np.unique(found[outside])) <= {*np.unique(label), INFO.void}

    def test_batch_of_two_equals_two_batches_of_one(self, excited: PanopticSystem) -> None:
        images = np.stack([paint(hand_made_label()), paint(np.rot90(hand_made_label()).copy())])
        both = excited.infer(images)
        for position in range(2):
            one = excited.infer(images[position : position + 1])
            np.testing.assert_array_equal(both["panoptic"][position], one["panoptic"][0])
            np.testing.assert_array_equal(both["segment_id"][position], one["segment_id"][0])
            np.testing.assert_allclose(both["segment_score"][position], one["segment_score"][0], atol=1e-5)

    def test_eager_graph_and_xla_agree(self, excited: PanopticSystem, graph: InferenceFunction) -> None:
        image = tf.constant(paint(hand_made_label())[None])
        eager = excited.infer(image)
        for infer in (
            graph,
            make_inference_function(excited, compiled=True),
            tf.function(excited.infer, jit_compile=True),
        ):
            found = infer(image)
            np.testing.assert_array_equal(found["panoptic"], eager["panoptic"])
            np.testing.assert_allclose(found["segment_score"], eager["segment_score"], atol=1e-4)

    def test_training_step_compiles_with_xla(self, system: PanopticSystem) -> None:
        label = hand_made_label()
        batch = {"image": tf.constant(paint(label)[None]), "targets": self.targets_of(system, label)}
        step, optimizer = self.train_step(system)
        losses = tf.function(step, jit_compile=True)(batch)
        assert np.isfinite(float(losses["loss"]))
        assert int(optimizer.iterations) == 1

    def test_trains_in_bfloat16_with_float32_losses(self) -> None:
        keras.config.set_dtype_policy("mixed_bfloat16")
        system = self.build(INFO)
        label = hand_made_label()
        batch = {"image": tf.constant(paint(label)[None]), "targets": self.targets_of(system, label)}
        outputs = system(batch["image"], targets=batch["targets"], training=True)
        losses = system.compute_losses(batch["targets"], outputs)
        assert {loss.total.dtype for loss in losses.values()} == {tf.float32}
        step, optimizer = self.train_step(system)
        values = step(batch)
        assert all(np.isfinite(float(value)) for value in values.values()), values
        assert float(values["gradient_norm"]) > 0
        assert int(optimizer.iterations) == 1

    def test_restored_and_exported_maps_are_equal(
        self, excited: PanopticSystem, graph: InferenceFunction, tmp_path: Path
    ) -> None:
        image = tf.constant(paint(hand_made_label())[None])
        expected = graph(image)

        optimizer = self.train_step(excited)[1]
        path = make_checkpoint(excited, optimizer).save(str(tmp_path / "ckpt"))
        restored = self.build(INFO)
        restore(make_checkpoint(restored), path)
        np.testing.assert_array_equal(restored.infer(image)["panoptic"], expected["panoptic"])

        export_saved_model(excited, tmp_path / "export", check=False)
        exported = tf.saved_model.load(str(tmp_path / "export")).signatures["serving_default"](images=image)
        assert set(exported) == set(expected)
        for name, value in expected.items():
            np.testing.assert_allclose(exported[name], value, atol=1e-5)

    # Keras itself converts its variables in a way that NumPy 2 deprecates.
    @pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
    def test_keras_saves_and_loads_the_model(self, excited: PanopticSystem, tmp_path: Path) -> None:
        image = paint(hand_made_label())[None]
        excited.save(tmp_path / "model.keras")
        loaded = keras.saving.load_model(tmp_path / "model.keras")
        assert type(loaded) is type(excited)
        assert loaded.get_config() == excited.get_config()
        assert [weight.path for weight in loaded.weights] == [weight.path for weight in excited.weights]
        expected = excited.infer(image)
        for name, value in loaded.infer(image).items():
            np.testing.assert_array_equal(value, expected[name])

    def test_summary_lists_the_parameters(self, excited: PanopticSystem) -> None:
        lines: list[str] = []
        excited.summary(print_fn=lines.append)
        assert f"Total params: {excited.count_params():,}" in "\n".join(lines)

    def test_unknown_model_key_is_refused(self) -> None:
        with pytest.raises(UserError, match=r"Unknown config key 'model\.no_such_key'\. Known in 'model': .*backbone"):
            load_config(self.config_name, ["model.no_such_key=1"])
