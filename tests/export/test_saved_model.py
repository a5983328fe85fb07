import os
import subprocess
import sys
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from deeplab2_like.checkpoint import make_checkpoint, prepare_model_folder
from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.export import saved_model
from deeplab2_like.export.saved_model import export_model_folder, export_saved_model

# None makes an import fail, as if the package were not installed.
_LOAD_ELSEWHERE = """
import sys
sys.modules.update(keras=None, tf_keras=None, deeplab2_like=None)
import numpy as np
import tensorflow as tf
model = tf.saved_model.load(sys.argv[1])
images = np.load(sys.argv[2])
results = {}
for name, image in images.items():
    for key, value in model.signatures["serving_default"](images=tf.constant(image)).items():
        results[f"{name}/{key}"] = value.numpy()
np.savez(sys.argv[3], **results)
"""

_SIZES = {"odd": (37, 53), "multiple": (32, 64), "pixel": (1, 1), "wide": (3, 700)}


@pytest.fixture(scope="module")
def batches(make_image) -> dict[str, np.ndarray]:
    images = {name: make_image(*size)[None] for name, size in _SIZES.items()}
    images["two"] = np.stack([make_image(37, 53, index) for index in (0, 1)])
    return images


@pytest.fixture(scope="module")
def expected(small_system, batches) -> dict[str, dict[str, np.ndarray]]:
    """What the system itself answers, run eagerly."""
    return {
        name: {key: value.numpy() for key, value in small_system.infer(tf.constant(batch)).items()}
        for name, batch in batches.items()
    }


def _assert_same(received: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(received) == ["panoptic", "segment_class", "segment_id", "segment_score"]
    for key in ("panoptic", "segment_id", "segment_class"):
        assert received[key].dtype == np.int32
        np.testing.assert_array_equal(received[key], expected[key], err_msg=key)
    assert received["segment_score"].dtype == np.float32
    np.testing.assert_allclose(received["segment_score"], expected["segment_score"], rtol=1e-4, atol=1e-6)


def test_the_test_images_show_several_classes_and_instances(expected):
    values = np.unique(expected["two"]["panoptic"])
    assert len(set(values // 1000)) >= 4
    assert np.count_nonzero(values % 1000) >= 5


def test_loads_without_keras_and_this_package_with_equal_results(export_dir, batches, expected, tmp_path):
    np.savez(tmp_path / "images.npz", **batches)
    arguments = [export_dir, tmp_path / "images.npz", tmp_path / "results.npz"]
    done = subprocess.run(
        [sys.executable, "-c", _LOAD_ELSEWHERE, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "TF_CPP_MIN_LOG_LEVEL": "3"},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    with np.load(tmp_path / "results.npz") as results:
        for name, answer in expected.items():
            _assert_same({key: results[f"{name}/{key}"] for key in answer}, answer)


@pytest.fixture(scope="module")
def loaded(export_dir):
    return tf.saved_model.load(str(export_dir))


def _run(signature, **inputs) -> dict[str, np.ndarray]:
    return {key: value.numpy() for key, value in signature(**inputs).items()}


def test_compiled_signature_agrees_at_any_size(loaded, batches, expected):
    for name in ("pixel", "two"):
        _assert_same(_run(loaded.signatures["compiled"], images=tf.constant(batches[name])), expected[name])


def test_encoded_signature_takes_several_files_of_one_size(loaded, batches, expected):
    files = [cv2.imencode(".png", image[..., ::-1])[1].tobytes() for image in batches["two"]]
    _assert_same(_run(loaded.signatures["encoded"], image_bytes=tf.constant(files)), expected["two"])


def test_encoded_signature_takes_jpeg(loaded, small_system, make_image):
    content = cv2.imencode(".jpg", make_image(40, 30))[1].tobytes()
    answer = small_system.infer(tf.io.decode_jpeg(content, channels=3)[None])
    received = _run(loaded.signatures["encoded"], image_bytes=tf.constant([content]))
    _assert_same(received, {key: value.numpy() for key, value in answer.items()})


def test_encoded_signature_names_the_fault_of_unequal_sizes(loaded):
    files = [cv2.imencode(".png", np.zeros((height, 20, 3), np.uint8))[1].tobytes() for height in (10, 12)]
    with pytest.raises(tf.errors.InvalidArgumentError, match="images of one request must be of equal size"):
        loaded.signatures["encoded"](image_bytes=tf.constant(files))


def test_signatures_say_what_is_free(loaded):
    default = loaded.signatures["serving_default"]
    assert default.structured_input_signature[1] == {"images": tf.TensorSpec([None] * 3 + [3], tf.uint8, "images")}
    outputs = default.structured_outputs
    assert outputs["panoptic"] == tf.TensorSpec([None, None, None], tf.int32, "panoptic")
    # K is fixed: 20 instances and 9 classes.
    assert outputs["segment_score"] == tf.TensorSpec([None, 29], tf.float32, "segment_score")


def _graph_of(folder: Path) -> tf.compat.v1.GraphDef:
    return saved_model_pb2.SavedModel.FromString((folder / "saved_model.pb").read_bytes()).meta_graphs[0].graph_def


def test_has_no_custom_op(export_dir):
    graph = _graph_of(export_dir)
    functions = {function.signature.name for function in graph.library.function}
    nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
    used = {node.op for node in nodes} - functions
    assert "Conv2D" in used
    assert [name for name in used if not hasattr(tf.raw_ops, name)] == []


def test_default_signature_needs_no_xla(loaded):
    """Servers may be built without XLA, so only `compiled` may ask for it."""

    def asks_for_xla(name: str) -> bool:
        graph = loaded.signatures[name].graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        marked = [*nodes, *graph.library.function]
        return any(item.attr["_XlaMustCompile"].b for item in marked)

    assert {name: asks_for_xla(name) for name in ("serving_default", "encoded", "compiled")} == {
        "serving_default": False,
        "encoded": False,
        "compiled": True,
    }


def test_stores_every_variable_once(export_dir, small_system):
    size = sum(file.stat().st_size for file in (export_dir / "variables").iterdir())
    parameters = sum(int(np.prod(weight.shape)) for weight in small_system.weights)
    # Four bytes each; the rest are names.
    assert 4 * parameters <= size < 4 * parameters + 200_000


def test_carries_dataset_info_and_config(export_dir, small_config):
    assert DatasetInfo.load(export_dir) == scenes_info()
    assert load_config(export_dir / "config.yaml") == small_config


def _fake_trace(monkeypatch) -> None:
    """Makes exports quick where their content does not matter."""
    function = tf.function(
        lambda images: {"panoptic": tf.cast(images[..., 0], tf.int32)},
        input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8, name="images")],
    ).get_concrete_function()
    monkeypatch.setattr(saved_model, "_trace", lambda system: {"serving_default": function})


def test_replaces_an_earlier_export_and_leaves_nothing_beside(small_system, small_config, tmp_path, monkeypatch):
    _fake_trace(monkeypatch)
    folder = tmp_path / "new" / "exported"
    export_saved_model(small_system, folder, config=small_config)
    assert (folder / "config.yaml").is_file()
    assert export_saved_model(small_system, folder) == folder
    assert not (folder / "config.yaml").exists()
    assert os.listdir(folder.parent) == ["exported"]


def test_a_failed_export_leaves_the_earlier_one(small_system, tmp_path, monkeypatch):
    _fake_trace(monkeypatch)
    folder = export_saved_model(small_system, tmp_path / "exported")
    before = (folder / "saved_model.pb").read_bytes()

    def fail(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_model, "_check", fail)
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(small_system, folder)
    assert (folder / "saved_model.pb").read_bytes() == before
    assert os.listdir(tmp_path) == ["exported"]


def test_an_export_that_answers_otherwise_does_not_appear(small_system, tmp_path, monkeypatch):
    _fake_trace(monkeypatch)
    load = tf.saved_model.load

    def load_another(path):
        model = load(path)
        right = model.signatures["serving_default"]

        class Wrong:
            signatures = {"serving_default": lambda images: {"panoptic": 1 + right(images=images)["panoptic"]}}  # noqa: RUF012

        return Wrong

    monkeypatch.setattr(tf.saved_model, "load", load_another)
    with pytest.raises(RuntimeError, match=r"agrees with the system on only 0\.0 %"):
        export_saved_model(small_system, tmp_path / "exported")
    assert os.listdir(tmp_path) == []


def test_refuses_folders_with_other_content(small_system, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.md").write_text("x")
    with pytest.raises(UserError, match="thesis' holds something else than an export"):
        export_saved_model(small_system, tmp_path / "thesis")
    with pytest.raises(UserError, match=r"text\.md', which is a file; give a folder"):
        export_saved_model(small_system, tmp_path / "thesis" / "text.md")
    assert (tmp_path / "thesis" / "text.md").read_text() == "x"


def test_says_where_it_cannot_write(small_system, tmp_path, monkeypatch):
    _fake_trace(monkeypatch)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/exported' \(Not a directory\); choose a folder that can be written"):
        export_saved_model(small_system, tmp_path / "file" / "exported")


def test_export_model_folder_refuses_other_folders(tmp_path):
    with pytest.raises(UserError, match=r"is no model folder, as it has no config\.yaml"):
        export_model_folder(tmp_path, tmp_path / "exported")


def test_export_model_folder_exports_the_newest_checkpoint(small_system, small_config, tmp_path, monkeypatch):
    prepare_model_folder(tmp_path / "model", small_config, scenes_info())
    optimizer = keras.optimizers.SGD()
    optimizer.build(small_system.trainable_variables)
    make_checkpoint(small_system, optimizer).save(str(tmp_path / "model/checkpoints/ckpt"))
    exported = {}

    def remember(system, output_dir, *, config):
        exported.update(system=system, config=config)
        return Path(output_dir)

    monkeypatch.setattr(saved_model, "export_saved_model", remember)
    overrides = ["model.postprocess.center_threshold=0.5"]
    assert export_model_folder(tmp_path / "model", tmp_path / "out", overrides) == tmp_path / "out"
    assert exported["config"].model.postprocess.center_threshold == 0.5
    for received, stored in zip(exported["system"].weights, small_system.weights, strict=True):
        np.testing.assert_array_equal(received.numpy(), stored.numpy(), err_msg=stored.path)
