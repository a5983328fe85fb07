"""The importer of Detectron2's weights; the reference numbers are described in data/detectron2_panoptic_deeplab."""

from pathlib import Path

import keras
import numpy as np
import pytest
from reference_state import read_reference_state

from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import Category, DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.model.panoptic_deeplab import PanopticDeepLab
from deeplab2_like.weights.detectron2_panoptic_deeplab import (
    load_panoptic_deeplab,
    panoptic_deeplab_name,
)

DATA = Path(__file__).parents[1] / "data" / "detectron2_panoptic_deeplab"
INFO = DatasetInfo(
    name="cityscapes_like",
    categories=tuple(Category(id=i, name=f"class {i}", is_thing=i >= 11, color=(i, i, i)) for i in range(19)),
)


def build_system(*, separable: bool = True) -> PanopticDeepLab:
    overrides = ["model.aspp.pooling_window=[8,8]", "model.resize=null"]
    overrides.append(f"model.decoder.convolution={'separable' if separable else 'plain'}")
    system = PanopticDeepLab(load_config("panoptic_deeplab/cityscapes_detectron2", overrides).model, INFO)
    system(keras.KerasTensor((1, 128, 128, 3), "uint8"))  # Creates the variables; computes nothing.
    return system


@pytest.fixture(scope="module")
def state() -> dict[str, np.ndarray]:
    return read_reference_state(DATA)


@pytest.fixture(scope="module")
def system() -> PanopticDeepLab:
    return build_system()


def test_network_computes_what_detectron2_computes(system: PanopticDeepLab, state: dict[str, np.ndarray]) -> None:
    load_panoptic_deeplab(system, state)
    with np.load(DATA / "forward.npz") as file:
        expected = dict(file)
    images = expected.pop("image")[None]

    prepared = system.prepare_images(images)
    features = system.backbone(prepared)
    outputs = system(images)
    computed = {
        "stem": system.backbone.stem(prepared)[1][0, ::4, ::4, ::2],
        "res2": features["res2"][0, ::4, ::4, ::4],
        "res3": features["res3"][0, ::4, ::4, ::4],
        "res5": features["res5"][0, ::2, ::2, ::16],
        "semantic_aspp": system.semantic_aspp(features["res5"])[0, ::2, ::2, ::2],
        "semantic_logits": outputs["semantic_logits"][0, ::4, ::4],
        "center": outputs["center"][0, ::2, ::2],
        # Ours are in image pixels; the reference's, before its last step, in pixels of the map.
        "offset": outputs["offset"][0, ::2, ::2] / 4,
    }
    # Both sides are float32, each with an error that grows with depth: the reference is up to 1e-3 away from its own
    # float64 result in res5 and after, in standard deviations of the map, and about 1e-5 in the first stages.
    tolerance = {"stem": 5e-5, "res2": 2e-4, "res3": 5e-4}
    assert computed.keys() == expected.keys()
    for name, reference in expected.items():
        difference = np.abs(keras.ops.convert_to_numpy(computed[name]) - reference) / reference.std()
        assert difference.max() < tolerance.get(name, 5e-3), name
        assert difference.mean() < tolerance.get(name, 5e-3) / 5, name


def test_every_stored_tensor_has_a_place_and_parameters_are_those_of_the_release(system: PanopticDeepLab) -> None:
    names = [line.split("\t")[0] for line in (DATA / "state_keys.tsv").read_text().splitlines()]
    names = [name for name in names if not name.endswith("num_batches_tracked")]
    assert sorted(names) == sorted(panoptic_deeplab_name(weight.path) or weight.path for weight in system.weights)
    # Detectron2 reports 30.27 M for its Cityscapes model with separable convolutions.
    assert sum(int(np.prod(weight.shape)) for weight in system.trainable_weights) == 30_271_350


def test_plain_convolutions_have_the_size_of_the_release_and_names() -> None:
    system = build_system(separable=False)
    assert sum(int(np.prod(weight.shape)) for weight in system.trainable_weights) == 59_770_166  # 59.77 M
    names = {panoptic_deeplab_name(weight.path) for weight in system.weights}
    assert None not in names
    assert {
        "sem_seg_head.decoder.res3.fuse_conv.1.weight",
        "sem_seg_head.decoder.res5.project_conv.convs.3.norm.bias",
        "sem_seg_head.head.0.weight",
        "ins_embed_head.offset_head.1.norm.running_var",
    } <= names


def test_layouts_of_kernels(system: PanopticDeepLab, state: dict[str, np.ndarray]) -> None:
    load_panoptic_deeplab(system, state)
    weights = {panoptic_deeplab_name(weight.path): weight.numpy() for weight in system.weights}
    name = "backbone.res2.0.conv2.weight"
    assert weights[name][0, 2, 5, 7] == state[name][7, 5, 0, 2]
    name = "ins_embed_head.decoder.res2.fuse_conv.depthwise.weight"
    assert weights[name][1, 4, 9, 0] == state[name][9, 0, 1, 4]


def test_what_does_not_fit_is_named_and_changes_nothing(system: PanopticDeepLab, state: dict[str, np.ndarray]) -> None:
    before = [weight.numpy() for weight in system.weights]
    wrong = {name: array + 1 for name, array in state.items()}
    del wrong["backbone.stem.conv2.weight"]
    wrong["roi_heads.box.weight"] = np.zeros(3, np.float32)
    wrong["backbone.stem.conv1.weight"] = np.zeros((64, 3, 7, 7), np.float32)
    with pytest.raises(
        UserError,
        match=r"1 missing \(backbone\.stem\.conv2\.weight\); 1 unexpected \(roi_heads\.box\.weight\); "
        r"1 of another shape \(backbone\.stem\.conv1\.weight is \(64, 3, 7, 7\), which gives \(7, 7, 3, 64\) "
        r"instead of \(3, 3, 3, 64\)\)",
    ):
        load_panoptic_deeplab(system, wrong)
    for weight, value in zip(system.weights, before, strict=True):
        np.testing.assert_array_equal(weight.numpy(), value)


def test_other_classes_need_keep_initial(system: PanopticDeepLab, state: dict[str, np.ndarray]) -> None:
    state = state | {
        "sem_seg_head.predictor.weight": np.zeros((133, 256, 1, 1), np.float32),
        "sem_seg_head.predictor.bias": np.zeros(133, np.float32),
        "ins_embed_head.center_predictor.bias": np.array([0.25], np.float32),
    }
    with pytest.raises(UserError, match=r"2 of another shape \(sem_seg_head\.predictor\.\w+ is .*keep_initial"):
        load_panoptic_deeplab(system, state)
    initial = system.semantic_head.predictor.kernel.numpy()
    load_panoptic_deeplab(system, state, keep_initial=["sem_seg_head.predictor.*"])
    np.testing.assert_array_equal(system.semantic_head.predictor.kernel.numpy(), initial)
    assert float(system.center_head.predictor.bias[0]) == 0.25


def test_pattern_that_keeps_nothing_is_an_error(system: PanopticDeepLab, state: dict[str, np.ndarray]) -> None:
    with pytest.raises(UserError, match=r"Pattern 'sem_seg_haed\.\*' of names to keep initial matches no name"):
        load_panoptic_deeplab(system, state, keep_initial=["sem_seg_haed.*"])


def test_other_epsilon_is_refused(
    system: PanopticDeepLab, state: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(system.semantic_aspp.project.norm, "epsilon", 1e-3)
    with pytest.raises(UserError, match=r"'model\.norm\.epsilon' is 0\.001, but .* 1e-05"):
        load_panoptic_deeplab(system, state)


def test_variables_without_counterpart_have_no_name() -> None:
    assert panoptic_deeplab_name("panoptic_deeplab/backbone/res6/block1/gate/conv/kernel") is None
    assert panoptic_deeplab_name("panoptic_deeplab/backbone/res2/block1/squeeze_excite/reduce/conv/kernel") is None
    assert panoptic_deeplab_name("panoptic_deeplab/backbone/stem/conv1/conv/other") is None
