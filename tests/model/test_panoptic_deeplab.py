"""Panoptic-DeepLab: the contract, and what is particular to it."""

from pathlib import Path

import keras
import numpy as np
import pytest
import tensorflow as tf
import yaml
from system_contract import INFO, SystemContract, hand_made_label, paint

from deeplab2_like.configs import load_config, save_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.inference import make_inference_function
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.model.base import View
from deeplab2_like.model.geometry import Geometry
from deeplab2_like.model.panoptic_deeplab.views import resize_outputs

SMALL = [
    "model.aspp.channels=16",
    "model.decoder.semantic_channels=16",
    "model.decoder.semantic_head_channels=16",
    "model.decoder.instance_channels=16",
    "model.decoder.instance_head_channels=16",
    "model.decoder.low_level_channels={res3: 16, res2: 16}",
    "model.decoder.instance_low_level_channels={res3: 8, res2: 8}",
    "model.loss.top_k_share=1.0",
    "model.postprocess.top_k=30",
]


def build_small(info: DatasetInfo = INFO, *overrides: str) -> PanopticSystem:
    return build_system(load_config("panoptic_deeplab/scenes_tiny", [*SMALL, *overrides]), info)


class TestContract(SystemContract):
    config_name = "panoptic_deeplab/scenes_tiny"

    def build(self, info: DatasetInfo) -> PanopticSystem:
        return build_small(info)

    def excite(self, system: PanopticSystem) -> None:
        random = np.random.default_rng(1)
        for head in (system.semantic_head, system.center_head, system.offset_head):
            kernel = head.predictor.kernel
            kernel.assign(3.0 * random.standard_normal(kernel.shape))


# Every row of the paper's Table 1 and the options of this library, by what they change.
VARIANTS = {
    "shared ASPP": ["model.dual_aspp=false"],
    "shared decoder": ["model.dual_aspp=false", "model.dual_decoder=false"],
    "sigmoid cross entropy": ["model.loss.center=sigmoid_cross_entropy"],
    "separable convolutions": ["model.decoder.convolution=separable", "model.decoder.center_head_convolution=plain"],
    "plain convolutions": ["model.decoder.convolution=plain", "model.decoder.center_head_convolution=plain"],
    "predictions at 1/2": [
        "model.decoder.low_level_channels={res3: 16, res2: 16, stem: 8}",
        "model.decoder.instance_low_level_channels={res3: 8, res2: 8, stem: 4}",
    ],
    "own ASPP of the instance branch": ["model.instance_aspp={channels: 8, rates: [2, 4]}"],
    "output stride 8": ["model.backbone.output_stride=8"],
    "output stride 32": ["model.backbone.output_stride=32", "model.backbone.multi_grid=[1, 2, 4]"],
    "MobileNetV3": ["model.backbone.name=mobilenet_v3_small"],
    "pooling window": ["model.aspp.pooling_window=[3, 2]"],
    "frozen batch norm": ["model.norm.kind=frozen_batch"],
    "aligned corners": ["model.resizing=aligned_corners", "model.aspp.pooling_window=[3, 2]"],
    "void class": ["model.void_class=true"],
    "ASPP of DeepLab2": ["model.aspp.pooling_norm=true", "model.aspp.convolution=plain"],
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_train_and_predict(variant: str) -> None:
    contract = TestContract()
    system = build_small(INFO, *VARIANTS[variant])
    label = hand_made_label()
    losses = contract.losses_of(system, paint(label)[None], label)
    assert list(losses) == ["semantic", "center", "offset"]
    assert all(np.isfinite(value) for value in losses.values())
    found = system.postprocess_targets(contract.targets_of(system, label))["panoptic"].numpy()[0]
    np.testing.assert_array_equal(found, label)
    # A size that is no multiple of any stride.
    assert system.infer(paint(label)[None, :37, :53])["panoptic"].shape == (1, 37, 53)


@pytest.mark.parametrize("center", ["mean_squared_error", "sigmoid_cross_entropy"])
def test_views_of_other_sizes_and_mirror_images_agree_on_pixels_of_the_image(center: str) -> None:
    system = build_small(INFO, f"model.loss.center={center}")
    # Constant maps, as interpolation leaves them alone: 3 pixels up and 5 to the right, at 32x64, in a view twice as
    # large, and in its mirror image.
    views = []
    for scale, mirrored in ((1, False), (2, False), (2, True)):
        grid = (1, scale * 32 // system.stride, scale * 64 // system.stride)
        offset = np.array([-3.0, -5.0 if mirrored else 5.0]) * scale
        outputs = {
            "semantic_logits": tf.constant([0.0, 3.0, 1.0, -1.0]) * tf.ones((*grid, 1)),
            "center": tf.fill((*grid, 1), 0.25),
            "offset": tf.constant(offset, tf.float32) * tf.ones((*grid, 1)),
        }
        if scale > 1:
            outputs["network_size"] = tf.constant([scale * 32, scale * 64])
        views.append(View(system, outputs, scale, mirrored))
    merged = system.merge_views(views, (32, 64))
    assert merged["offset"].shape == (1, 32, 64, 2)
    np.testing.assert_allclose(merged["offset"][0, 1, 2], [-3.0, 5.0], atol=1e-5)
    np.testing.assert_allclose(merged["center"][0, 1, 2], [0.25], atol=1e-5)
    expected = tf.nn.softmax([0.0, 3.0, 1.0, -1.0])
    np.testing.assert_allclose(tf.nn.softmax(merged["semantic_logits"][0, 1, 2]), expected, atol=1e-5)


def test_views_average_probabilities() -> None:
    """Two views, one sure of class 0, one of class 1 with three times the odds against: the mean is 0.5, 0.5."""
    system = build_small(INFO, "model.semantic_only=true")
    grid = np.ones((1, 32 // system.stride, 32 // system.stride, 1), np.float32)
    views = [
        View(system, {"semantic_logits": tf.constant(np.log([a, b, 1e-9, 1e-9]) * grid, tf.float32)})
        for a, b in ((0.75, 0.25), (0.25, 0.75))
    ]
    merged = system.merge_views(views, (32, 32))["semantic_logits"]
    np.testing.assert_allclose(np.exp(merged[0, 0, 0, :2]), [0.5, 0.5], atol=1e-6)


def read_linearly(values: np.ndarray, stride: int, scale: int, axis: int) -> np.ndarray:
    """Upsamples a map of a view `scale` times as large as the image by its stride, and resizes it to the image."""
    for factor in (1 / stride, scale):
        size = len(np.moveaxis(values, axis, 0))
        position = np.clip((np.arange(round(size / factor)) + 0.5) * factor - 0.5, 0, size - 1)
        first = np.floor(position).astype(int)
        weight = np.expand_dims(position - first, (1, 2) if axis == 0 else (0, 2))
        following = np.take(values, np.minimum(first + 1, size - 1), axis=axis)
        values = np.take(values, first, axis=axis) * (1 - weight) + following * weight
    return values


def perfect_logits(classes: np.ndarray, stride: int) -> np.ndarray:
    """The share of each class in each cell as a logit that upsampling keeps well: its value times 20."""
    height, width = classes.shape
    is_class = np.eye(4)[classes].reshape(height // stride, stride, width // stride, stride, 4)
    return 20.0 * is_class.mean(axis=(1, 3))


def test_views_are_averaged_at_full_resolution() -> None:
    """Perfect views at 1x and 2x of a label with thin structures, against plain numpy."""
    system = build_small(INFO, "model.semantic_only=true")
    stride = system.stride
    label = hand_made_label()
    label[:, 10:13] = 2001  # Three pixels wide, thinner than a cell of the 1x view.
    label[5:7, 20:60] = 1000
    label[50:53, 30:60] = 3001
    classes = label // 1000
    views, expected = [], np.zeros((64, 64, 4))
    for scale in (1, 2):
        logits = perfect_logits(np.kron(classes, np.ones((scale, scale), int)), stride)
        full = read_linearly(read_linearly(logits, stride, scale, axis=0), stride, scale, axis=1)
        expected += np.exp(full) / np.exp(full).sum(axis=-1, keepdims=True) / 2
        outputs = {"semantic_logits": tf.constant(logits[None], tf.float32)}
        views.append(View(system, outputs | ({"network_size": tf.constant([128, 128])} if scale > 1 else {}), scale))
    merged = system.merge_views(views, (64, 64))
    np.testing.assert_allclose(tf.nn.softmax(merged["semantic_logits"])[0], expected, atol=1e-5)
    found = system.postprocess(merged, (64, 64))["panoptic"].numpy()[0] // 1000
    np.testing.assert_array_equal(found, expected.argmax(axis=-1))
    # 80.4 for the 1x view alone, and for averages on the cells of the image.
    iou = [np.mean((found == k) & (classes == k)) / np.mean((found == k) | (classes == k)) for k in range(4)]
    assert 100 * np.mean(iou) == pytest.approx(91.48, abs=0.2)


def test_the_pooling_window_scales_with_the_view() -> None:
    system = build_small(INFO, "model.aspp.pooling_window=[4, 3]")
    features = tf.constant(np.random.default_rng(1).standard_normal((1, 10, 12, 128)), tf.float32)
    system.semantic_aspp(features)  # Creates the variables.
    found = system.semantic_aspp(features, scale=1.5)
    # 1.5 * 3 = 4.5 rounds to the even number.
    system.semantic_aspp.pooling_window = (6, 4)
    np.testing.assert_allclose(found, system.semantic_aspp(features), atol=1e-6)
    system.semantic_aspp.pooling_window = (4, 3)
    assert np.abs(found - system.semantic_aspp(features)).max() > 1e-3


def test_the_network_sees_a_view_at_its_scale() -> None:
    system = build_small()
    outputs = system(np.zeros((1, 30, 50, 3), np.uint8), scale=1.5)
    np.testing.assert_array_equal(outputs["network_size"], [45, 75])
    resized = build_small(INFO, "model.resize={shorter_side: 60, longer_side: {max: 128}}")
    np.testing.assert_array_equal(resized(np.zeros((1, 30, 50, 3), np.uint8), scale=0.5)["network_size"], [30, 50])


def test_outputs_of_a_resized_image_are_resized_back() -> None:
    # 64x128 network pixels of an image of 32x64; offsets of 6 up and 10 right are 3 and 5 image pixels.
    grid = tf.ones((1, 16, 32, 1))
    outputs = {
        "center": 0.25 * grid,
        "offset": tf.constant([-6.0, 10.0]) * grid,
        "network_size": tf.constant([64, 128]),
    }
    resized = resize_outputs(outputs, Geometry((32, 64), (64, 128)), stride=4)
    assert {name: tuple(value.shape) for name, value in resized.items()} == {
        "center": (1, 32, 64, 1),
        "offset": (1, 32, 64, 2),
    }
    np.testing.assert_allclose(resized["offset"][0, 7, 9], [-3.0, 5.0], atol=1e-5)


def test_the_keys_of_deeplab2_together() -> None:
    contract = TestContract()
    overrides = [
        "model.resizing=aligned_corners",
        "model.min_padded_size=[65, 33]",
        "model.void_class=true",
        "model.aspp.pooling_window=[3, 2]",
        *VARIANTS["ASPP of DeepLab2"],
    ]
    keras.utils.set_random_seed(1)
    system = build_small(INFO, *overrides)
    contract.excite(system)
    contract.test_eager_graph_and_xla_agree(system, make_inference_function(system))
    contract.test_batch_of_two_equals_two_batches_of_one(system)
    contract.test_segments_describe_the_map(system)


def test_images_are_padded_for_aligned_corners() -> None:
    system = build_small(INFO, "model.resizing=aligned_corners")
    # 37 and 64 become 32 * 2 + 1; 33 = 32 * 1 + 1 stays.
    images = np.full((1, 37, 33, 3), 255, np.uint8)
    prepared = system.prepare_images(images)
    assert prepared.shape == (1, 65, 33, 3)
    assert not np.any(prepared[:, 37:])
    stride = system.stride
    outputs = system(images)
    assert outputs["center"].shape == (1, 64 // stride + 1, 32 // stride + 1, 1)
    # At twice the scale, pixels 0 and 36 lie at 0 and 72.
    np.testing.assert_array_equal(system(images, scale=2.0)["network_size"], [73, 65])


def test_images_are_padded_to_a_smallest_size() -> None:
    system = build_small(INFO, "model.min_padded_size=[65, 97]", "model.resizing=aligned_corners")
    stride = system.stride
    images = np.zeros((1, 20, 100, 3), np.uint8)
    # 20 becomes 65, and 100 becomes 129. At half the scale, it is 33, and 100 is (100 - 1) / 2 + 1 = 50, so 65.
    assert system(images)["offset"].shape == (1, 64 // stride + 1, 128 // stride + 1, 2)
    assert system(images, scale=0.5)["offset"].shape == (1, 32 // stride + 1, 64 // stride + 1, 2)
    assert system.infer(images)["panoptic"].shape == (1, 20, 100)


def test_views_with_aligned_corners() -> None:
    """A map that grows linearly from the first to the last pixel is the same in all views, up to the mirror image."""
    system = build_small(INFO, "model.resizing=aligned_corners")
    stride = system.stride
    views = []
    for scale, mirrored in ((1, False), (2, False), (2, True)):
        cells = scale * 32 // stride + 1
        ramp = np.linspace(0, 1, cells)[:: -1 if mirrored else 1]
        grid = np.broadcast_to(ramp[None, None, :, None], (1, cells, cells, 1)).astype(np.float32)
        outputs = {
            "semantic_logits": tf.constant(grid * [0.0, 1.0, 0.0, 0.0], tf.float32),
            "center": tf.constant(grid),
            "offset": tf.constant(grid * [-3.0 * scale, (-5.0 if mirrored else 5.0) * scale], tf.float32),
        }
        if scale > 1:
            outputs["network_size"] = tf.constant([65, 65])
        views.append(View(system, outputs, scale, mirrored))
    merged = system.merge_views(views, (33, 33))
    np.testing.assert_allclose(merged["center"][0, 5, :, 0], np.arange(33) / 32, atol=1e-5)
    expected = np.arange(33)[:, None] / 32 * [-3.0, 5.0]
    np.testing.assert_allclose(merged["offset"][0, 5], expected, atol=1e-4)


def test_semantic_map_with_a_void_class() -> None:
    system = build_small(INFO, "model.void_class=true")
    system(np.zeros((1, 32, 32, 3), np.uint8))
    # The fifth logit is that of void, which is best in the left half.
    logits = np.zeros((1, 32 // system.stride, 32 // system.stride, 5), np.float32)
    logits[:, :, :4, 4], logits[:, :, 4:, 2] = 9.0, 9.0
    found = system.semantic_map({"semantic_logits": tf.constant(logits)}, (32, 32)).numpy()[0]
    np.testing.assert_array_equal(np.unique(found[:, : 4 * system.stride - 4]), [INFO.ignore_label])
    np.testing.assert_array_equal(np.unique(found[:, 4 * system.stride + 4 :]), [2])


def test_semantic_only_has_no_instance_branch() -> None:
    contract = TestContract()
    system = build_small(INFO, "model.semantic_only=true")
    label = hand_made_label()
    assert list(contract.losses_of(system, paint(label)[None], label)) == ["semantic"]
    assert not [v.path for v in system.trainable_variables if "instance" in v.path or "center" in v.path]
    found = system.postprocess_targets(contract.targets_of(system, label))["panoptic"].numpy()[0]
    # Things come out as regions without instances.
    np.testing.assert_array_equal(found, label // 1000 * 1000)


def test_semantic_labels_train_without_instance_losses() -> None:
    """Labels without instances are crowds everywhere: their things teach classes, but no centers and offsets."""
    label = hand_made_label() // 1000 * 1000
    targets = build_small().make_targets(tf.constant(label))
    assert not targets["offset_weight"].numpy().any()
    assert not targets["center"].numpy().any()
    np.testing.assert_array_equal(targets["center_weight"], label < 2000)
    assert targets["semantic_weight"].numpy().all()


def test_the_instance_branch_has_its_own_widths() -> None:
    system = build_small(INFO, "model.instance_aspp={channels: 8, rates: [2, 4]}").create_variables()
    shapes = {weight.path.partition("/")[2]: tuple(weight.shape) for weight in system.weights}
    # Features of resnet_tiny: res2 has 32 channels, res3 64 and res5 128.
    assert shapes["semantic_decoder/project_res3/conv/kernel"] == (1, 1, 64, 16)
    assert shapes["instance_decoder/project_res3/conv/kernel"] == (1, 1, 64, 8)
    assert shapes["instance_decoder/project_res2/conv/kernel"] == (1, 1, 32, 8)
    assert shapes["semantic_aspp/project/conv/kernel"] == (1, 1, 5 * 16, 16)
    assert shapes["instance_aspp/project/conv/kernel"] == (1, 1, 4 * 8, 8)


def test_the_output_stride_can_change_after_training() -> None:
    trained = build_small().create_variables()
    dense = build_small(INFO, "model.backbone.output_stride=8", "model.aspp.rates=[6, 12, 18]").create_variables()
    assert [(weight.path, weight.shape) for weight in dense.weights] == [
        (weight.path, weight.shape) for weight in trained.weights
    ]
    dense.set_weights(trained.get_weights())
    assert dense(paint(hand_made_label())[None], training=False)["center"].shape == (1, 16, 16, 1)


def test_models_of_earlier_versions_keep_their_network(tmp_path: Path) -> None:
    # In a model folder, config.yaml has all keys, so a key that is missing did not exist yet. Then both decoders had
    # equal widths, and a whole stage had one dilation.
    config = load_config("panoptic_deeplab/cityscapes_resnet50")
    assert config.model.decoder.instance_low_level_channels == {"res3": 32, "res2": 16}
    assert config.model.backbone.atrous_conversion == "exact"
    content = config.model_dump(mode="json")
    del content["model"]["decoder"]["instance_low_level_channels"]
    del content["model"]["backbone"]["atrous_conversion"]
    del content["model"]["instance_aspp"]
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    model = load_config(path, ["model.backbone.output_stride=8"]).model
    assert model.decoder.instance_low_level_channels == {"res3": 64, "res2": 32}
    assert model.backbone.atrous_conversion == "detectron2"
    # A config of the current version keeps its own values.
    save_config(config, path)
    assert load_config(path) == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.backbone.name=resnet51"], r"Unknown backbone 'resnet51'\. Did you mean 'resnet50'\?"),
        (["model.dual_decoder=false"], "dual_aspp needs dual_decoder"),
        (["model.postprocess.nms_kernel=6"], "'model.postprocess.nms_kernel' .* is 6, but must be odd"),
        (["model.postprocess.top_k=1000"], r"top_k is 1000, but label_divisor 1000 .* room for 999 instances"),
        (["model.decoder.low_level_channels={res2: 8, res4: 8}"], "its keys must be some of res3, res2, stem"),
        (
            ["model.decoder.low_level_channels={res3: 8, res2: 8, stem: 8}"],
            r"instance_low_level_channels has the features res3, res2, but decoder.low_level_channels has res3, res2, "
            "stem; set both keys to the same features",
        ),
        (["model.dual_aspp=false", "model.instance_aspp={}"], "instance_aspp needs dual_aspp"),
        (["model.backbone.output_stride=4"], "'model.backbone.output_stride' .* is 4, but must be one of 8, 16, 32"),
    ],
)
def test_wrong_configs_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_small(INFO, *overrides)
