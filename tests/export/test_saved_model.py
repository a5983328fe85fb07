import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import cv2
import keras
import numpy as np
import pytest
import tensorflow as tf
from kills import files_in, kills
from tensorflow.core.protobuf import saved_model_pb2

import deeplab2_like
from deeplab2_like import model_folder as model_folder_module
from deeplab2_like import temporary
from deeplab2_like.checkpoint import make_checkpoint
from deeplab2_like.configs import load_config
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.errors import UserError
from deeplab2_like.export import parity, saved_model, versions
from deeplab2_like.export.options import ExportOptions
from deeplab2_like.export.parity import check_parity, generate_parity_images
from deeplab2_like.export.saved_model import export_model_folder, export_saved_model
from deeplab2_like.export.warmup import write_warmup_requests
from deeplab2_like.model_folder import prepare_model_folder

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


def _png(image: np.ndarray) -> bytes:
    return cv2.imencode(".png", image[..., ::-1])[1].tobytes()


def test_every_signature_agrees_with_the_system(loaded, small_system):
    signatures = {name: loaded.signatures[name] for name in ("serving_default", "encoded", "segments", "compact")}
    figures = check_parity(signatures, small_system, generate_parity_images(ExportOptions()))
    assert [figure.signature for figure in figures] == list(signatures)
    assert all(figure.images == 2 and figure.agreement == 1 for figure in figures)
    assert all(figure.score_difference < 1e-5 for figure in figures)


def test_a_bad_image_fails_alone(loaded, batches, expected):
    """Three good images of two sizes, of which no row sees another one, and one that is cut short."""
    images = [*batches["two"], batches["multiple"][0]]  # 37x53, 37x53, 32x64.
    files = [_png(image) for image in images]
    answer = _run(loaded.signatures["encoded"], image_bytes=tf.constant([*files, files[0][:-100]]))
    assert answer["status"].tolist() == [b"", b"", b"", b"The PNG file is damaged or cut short; send a whole file."]
    assert answer["image_size"].tolist() == [[37, 53], [37, 53], [32, 64], [0, 0]]
    assert answer["panoptic"].shape == (4, 37, 64)
    void = scenes_info().void
    alone = [{key: value[row] for key, value in expected["two"].items()} for row in (0, 1)]
    alone.append({key: value[0] for key, value in expected["multiple"].items()})
    for row, truth in enumerate(alone):
        height, width = truth["panoptic"].shape
        np.testing.assert_array_equal(answer["panoptic"][row, :height, :width], truth["panoptic"])
        assert (answer["panoptic"][row, height:] == void).all()
        assert (answer["panoptic"][row, :, width:] == void).all()
        for key in ("segment_id", "segment_class"):
            np.testing.assert_array_equal(answer[key][row], truth[key])
    assert (answer["panoptic"][3] == void).all()
    assert not any(answer[f"segment_{key}"][3].any() for key in ("id", "class", "score"))


def test_an_empty_request_gets_an_empty_answer(loaded):
    answer = _run(loaded.signatures["encoded"], image_bytes=tf.constant([], tf.string))
    assert {name: value.shape for name, value in answer.items()} == {
        "panoptic": (0, 0, 0),
        "segment_id": (0, 29),
        "segment_class": (0, 29),
        "segment_score": (0, 29),
        "status": (0,),
        "image_size": (0, 2),
    }


def test_too_many_pixels_are_refused(loaded):
    # The export of these tests has a limit of 64 * 8000 = 512000 pixels.
    answer = _run(loaded.signatures["segments"], image_bytes=tf.constant([_png(np.zeros((1, 512001, 3), np.uint8))]))
    assert answer["status"].tolist() == [
        b"The image has 1 x 512001 pixels (height x width), more than the limit of 512000; send it smaller or in parts."
    ]


def test_compact_tables_describe_the_png(loaded, make_image):
    answer = _run(loaded.signatures["compact"], image_bytes=tf.constant([_png(make_image(37, 53)), b"x"]))
    assert answer["panoptic_png_bytes"][1] == b""
    rgb = cv2.imdecode(np.frombuffer(answer["panoptic_png_bytes"][0], np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    panoptic = rgb.astype(np.int32) @ np.array([1, 256, 65536], np.int32)
    used = answer["segment_score"][0] > 0
    assert used.sum() >= 5
    for value, area, box in zip(*(answer[f"segment_{key}"][0][used] for key in ("id", "area", "box")), strict=True):
        rows, columns = np.nonzero(panoptic == value)
        assert area == len(rows)
        assert box.tolist() == [rows.min(), columns.min(), rows.max() + 1, columns.max() + 1]
    assert not answer["segment_area"][0][~used].any()
    assert not answer["segment_box"][0][~used].any()


def test_metadata_is_json(loaded, small_config):
    answer = {name: json.loads(value) for name, value in _run(loaded.signatures["metadata"]).items()}
    assert answer["classes"] == scenes_info().to_coco_categories()
    assert (answer["label_divisor"], answer["ignore_label"], answer["step"]) == (1000, 255, 7)
    assert answer["library_version"] == deeplab2_like.__version__
    assert answer["options"]["max_pixels"] == 512000
    assert answer["config"]["model"] == small_config.model_dump(mode="json")["model"]
    assert answer["config"]["data"]["path"] is None


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

    assert [name for name in loaded.signatures if asks_for_xla(name)] == ["compiled"]


def test_signatures_pin_nothing_to_a_device(loaded):
    for name in loaded.signatures:
        graph = loaded.signatures[name].graph.as_graph_def()
        nodes = [*graph.node, *(node for function in graph.library.function for node in function.node_def)]
        assert {node.device for node in nodes} <= {""}, name


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
    monkeypatch.setattr(saved_model, "trace_signatures", lambda *_: {"serving_default": function})
    monkeypatch.setattr(saved_model, "check_parity", lambda *_args, **_options: [])


def test_replaces_an_earlier_export_and_leaves_nothing_beside(small_system, small_config, tmp_path, monkeypatch):
    _fake_trace(monkeypatch)
    folder = tmp_path / "new" / "exported"
    export_saved_model(small_system, folder, config=small_config)
    assert (folder / "config.yaml").is_file()
    with pytest.raises(UserError, match=r"exported' already has an export; give a new folder, or replace .* --replace"):
        export_saved_model(small_system, folder)
    assert (folder / "config.yaml").is_file()
    assert export_saved_model(small_system, folder, replace=True) == folder
    assert not (folder / "config.yaml").exists()
    assert os.listdir(folder.parent) == ["exported"]


def test_a_failed_export_leaves_the_earlier_one(small_system, tmp_path, monkeypatch):
    _fake_trace(monkeypatch)
    folder = export_saved_model(small_system, tmp_path / "exported")
    before = (folder / "saved_model.pb").read_bytes()

    def fail(*_args, **_options):
        raise KeyboardInterrupt

    monkeypatch.setattr(saved_model, "check_parity", fail)
    with pytest.raises(KeyboardInterrupt):
        export_saved_model(small_system, folder, replace=True)
    assert (folder / "saved_model.pb").read_bytes() == before
    assert os.listdir(tmp_path) == ["exported"]


def test_an_export_that_answers_otherwise_does_not_appear(small_system, tmp_path, monkeypatch):
    _fake_trace(monkeypatch)
    # The fake signature answers with red values, which are no panoptic values.
    monkeypatch.setattr(saved_model, "check_parity", check_parity)
    monkeypatch.setattr(parity, "_compare", lambda answer, expected: (0.5, 0.0))
    with pytest.raises(RuntimeError, match=r"'serving_default' .* agrees with the system on only 50\.0 % of"):
        export_saved_model(small_system, tmp_path / "exported")
    assert os.listdir(tmp_path) == []


def test_refuses_options_that_do_not_fit_together():
    with pytest.raises(UserError, match=r"The size 10x20 has more pixels than the limit of 199; raise the limit with"):
        ExportOptions(size=(10, 20), max_pixels=199)
    with pytest.raises(UserError, match=r"The warm-up size 10x21 differs from the only size of the export, 10x20"):
        ExportOptions(size=(10, 20), warmup_sizes=((10, 21),))


def test_warmup_requests_need_a_package(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_serving.apis", None)
    with pytest.raises(UserError, match=r"need the package tensorflow-serving-api; run `pip install"):
        export_model_folder("model", tmp_path / "out", options=ExportOptions(warmup_sizes=((8, 8),)))


def test_warmup_requests_are_for_every_signature_with_input(tmp_path):
    logs = pytest.importorskip("tensorflow_serving.apis.prediction_log_pb2")
    write_warmup_requests(tmp_path, ["metadata", "serving_default", "segments"], [(8, 9)])
    records = tf.data.TFRecordDataset(str(tmp_path / "assets.extra" / "tf_serving_warmup_requests"))
    requests = [logs.PredictionLog.FromString(record).predict_log.request for record in records.as_numpy_iterator()]
    assert [request.model_spec.signature_name for request in requests] == ["segments", "serving_default"]
    image = tf.io.decode_jpeg(tf.make_ndarray(requests[0].inputs["image_bytes"])[0])
    assert image.shape == (8, 9, 3)
    assert tf.make_ndarray(requests[1].inputs["images"]).shape == (1, 8, 9, 3)


def test_refuses_folders_with_other_content(small_system, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "text.md").write_text("x")
    with pytest.raises(UserError, match="thesis' has files that are not an export"):
        export_saved_model(small_system, tmp_path / "thesis", replace=True)
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

    def remember(export, folder):
        exported.update(system=export.system, config=export.config)

    monkeypatch.setattr(saved_model, "_write", remember)
    overrides = ["model.postprocess.center_threshold=0.5"]
    assert export_model_folder(tmp_path / "model", tmp_path / "out", overrides) == tmp_path / "out" / "1"
    assert exported["config"].model.postprocess.center_threshold == 0.5
    for received, stored in zip(exported["system"].weights, small_system.weights, strict=True):
        np.testing.assert_array_equal(received.numpy(), stored.numpy(), err_msg=stored.path)


# --- Versions. --------------------------------------------------------------------------------------------------------


@pytest.fixture
def export(monkeypatch) -> Callable[..., Path]:
    """Exports a model that is no more than a text: `export(output_dir, content, replace=False)`."""
    content = ""

    def write(export, folder):
        make_export(folder, content)

    def run(output_dir: Path, new_content: str, **options) -> Path:
        nonlocal content
        content = new_content
        return export_model_folder("model", output_dir, **options)

    monkeypatch.setattr(saved_model, "_write", write)
    monkeypatch.setattr(model_folder_module, "load_model_folder", lambda *_args, **_options: (None, None, 0))
    return run


def make_export(folder: Path, content: str) -> None:
    (folder / "variables").mkdir(parents=True)
    (folder / "variables" / "variables.index").write_text(content)
    (folder / "saved_model.pb").write_text(content)
    (folder / "dataset_info.json").write_text(content)


def versions_in(folder: Path) -> dict[str, str]:
    """Name -> content of everything in a folder, hidden folders included; all are whole."""
    contents = {}
    for path in sorted(folder.iterdir()):
        assert set(files_in(path)) == {"dataset_info.json", "saved_model.pb", "variables/variables.index"}
        (contents[path.name],) = set(files_in(path).values())
    return {name: content.decode() for name, content in contents.items()}


def test_versions_are_numbered(export, tmp_path):
    models = tmp_path / "models"
    assert export(models, "first") == models / "1"
    assert export(models, "second") == models / "2"
    # A number that was free stays so.
    assert export(models / "9", "ninth") == models / "9"
    assert export(models, "tenth") == models / "10"
    assert versions_in(models) == {"1": "first", "10": "tenth", "2": "second", "9": "ninth"}
    assert versions.newest_export(models) == models / "10"


def test_paths_are_returned_as_they_were_given(export, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert export(Path("models"), "first") == Path("models/1")
    assert export(Path("."), "first") == Path("1")
    # The name of the link counts, not that of what it points to.
    (tmp_path / "link").symlink_to("1")
    (tmp_path / "link" / "saved_model.pb").unlink()
    assert export(Path("link"), "inside") == Path("link/1")


def test_other_things_in_a_folder_of_versions_stay(export, tmp_path):
    (tmp_path / "2").write_text("a file")
    (tmp_path / "notes.txt").write_text("x")
    assert export(tmp_path, "third") == tmp_path / "3"
    assert (tmp_path / "2").read_text() == "a file"
    with pytest.raises(UserError, match=r"2', which is a file; give a folder"):
        export(tmp_path / "2", "second", replace=True)
    with pytest.raises(UserError, match=r"notes\.txt', which is a file; give a folder"):
        export(tmp_path / "notes.txt", "first")


def test_a_version_is_replaced_only_when_asked_to(export, tmp_path):
    export(tmp_path, "first")
    export(tmp_path, "second")
    message = rf"1' already has an export; give '{tmp_path}' to write the next version, or replace this one with --rep"
    with pytest.raises(UserError, match=message):
        export(tmp_path / "1", "new")
    assert versions_in(tmp_path) == {"1": "first", "2": "second"}
    assert export(tmp_path / "1", "new", replace=True) == tmp_path / "1"
    assert versions_in(tmp_path) == {"1": "new", "2": "second"}


def test_without_a_number_the_newest_version_is_replaced(export, tmp_path):
    assert export(tmp_path, "first", replace=True) == tmp_path / "1"
    assert export(tmp_path, "second") == tmp_path / "2"
    (tmp_path / "3").mkdir()  # No export.
    assert export(tmp_path, "new", replace=True) == tmp_path / "2"
    (tmp_path / "3").rmdir()
    assert versions_in(tmp_path) == {"1": "first", "2": "new"}


def test_an_export_is_no_folder_of_versions(export, tmp_path):
    make_export(tmp_path / "exported", "old")
    with pytest.raises(UserError, match="exported' already has an export; give a new folder, or replace"):
        export(tmp_path / "exported", "new")
    assert versions_in(tmp_path) == {"exported": "old"}
    assert export(tmp_path / "exported", "new", replace=True) == tmp_path / "exported"
    assert versions_in(tmp_path) == {"exported": "new"}


def test_a_folder_with_a_saved_model_of_another_kind_is_kept(export, tmp_path):
    (tmp_path / "saved_model.pb").write_text("x")
    for replace in (False, True):
        with pytest.raises(UserError, match="has files that are not an export and would be lost"):
            export(tmp_path, "new", replace=replace)
    assert os.listdir(tmp_path) == ["saved_model.pb"]


def test_two_exports_at_once_get_two_numbers(export, tmp_path, monkeypatch):
    write = saved_model._write

    def write_slowly(export, folder):
        monkeypatch.setattr(saved_model, "_write", write)
        export_model_folder("model", tmp_path)  # Begins later, and ends first.
        write(export, folder)

    monkeypatch.setattr(saved_model, "_write", write_slowly)
    assert export(tmp_path, "x") == tmp_path / "2"
    assert versions_in(tmp_path) == {"1": "x", "2": "x"}


def test_two_exports_to_one_version_at_once(export, tmp_path, monkeypatch):
    write = saved_model._write

    def write_slowly(export, folder):
        write(export, folder)
        make_export(tmp_path / "1", "other")

    monkeypatch.setattr(saved_model, "_write", write_slowly)
    with pytest.raises(UserError, match="1' already has an export"):
        export(tmp_path / "1", "x")
    assert versions_in(tmp_path) == {"1": "other"}


# --- Kills. -----------------------------------------------------------------------------------------------------------


def test_killed_while_it_writes_a_version(export, tmp_path):
    models = tmp_path / "models"

    def start() -> None:
        shutil.rmtree(models, ignore_errors=True)
        make_export(models / "1", "first")

    for operation in kills(lambda: export(models, "new"), prepare=start):
        found = {name: content for name, content in _whole_in(models).items() if not name.startswith(".")}
        assert found in ({"1": "first"}, {"1": "first", "2": "new"}), operation
        number = len(found) + 1
        assert export(models, "next") == models / str(number), operation
        assert versions_in(models) == {**found, str(number): "next"}, operation


def _whole_in(folder: Path) -> dict[str, str]:
    """As `versions_in`, without what is unfinished and hidden."""
    return {
        path.name: (path / "saved_model.pb").read_text()
        for path in folder.iterdir()
        if len(files_in(path)) == 3 or not path.name.startswith(".")
    }


@pytest.mark.parametrize("way", ["exchange", "two steps"])
def test_killed_while_it_replaces_a_version(export, tmp_path, monkeypatch, way):
    def start() -> None:
        shutil.rmtree(tmp_path / "models", ignore_errors=True)
        make_export(tmp_path / "models" / "1", "old")

    def cannot_exchange(*_: Path) -> None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    if way == "two steps":
        monkeypatch.setattr(temporary, "exchange", cannot_exchange)
    version = tmp_path / "models" / "1"
    for operation in kills(lambda: export(version, "new", replace=True), prepare=start):
        if way == "exchange":
            assert (version / "saved_model.pb").read_text() in ("old", "new"), operation
            assert len(files_in(version)) == 3, operation
        # The next start puts back what was moved away, also if it then refuses to replace it.
        with pytest.raises(UserError, match="already has an export"):
            export(version, "new")
        assert versions_in(version.parent) in ({"1": "old"}, {"1": "new"}), operation
        export(version, "newer", replace=True)
        assert versions_in(version.parent) == {"1": "newer"}, operation
