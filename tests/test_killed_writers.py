"""Writers of many files that are killed: each file is the old or the new one, and the next run removes what is left."""

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pytest
from kills import files_in, hidden_in, kills
from one_convolution import one_convolution_config, one_convolution_registered

from deeplab2_like import model_folder
from deeplab2_like.data import pipeline
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.shards import ShardWriter
from deeplab2_like.evaluation import report
from deeplab2_like.evaluation.coco_format import CocoPanopticWriter
from deeplab2_like.evaluation.evaluate_files import evaluate_files
from deeplab2_like.evaluation.model_folder import ModelFolderEvaluation
from deeplab2_like.evaluation.submission import CityscapesSubmission
from deeplab2_like.export.journal import JOURNAL_FILE
from deeplab2_like.export.predict_files import predict_files
from deeplab2_like.export.prediction import PanopticPrediction, make_prediction
from deeplab2_like.files import OUTPUTS_FILE
from deeplab2_like.inspection import Inspection
from deeplab2_like.inspection_report import write_report
from deeplab2_like.model_folder import prepare_model_folder, write_imported
from deeplab2_like.trainer.failures import non_finite
from deeplab2_like.trainer.trainer import NonFiniteError

INFO = DatasetInfo.from_coco_categories(
    [{"id": 1, "name": "road", "isthing": 0}, {"id": 2, "name": "car", "isthing": 1}], name="small"
)
# Of class 0, then of class 1: what two models see in an image of 4 x 6 pixels.
OLD_MAP = np.zeros((4, 6), np.int32)
NEW_MAP = np.full((4, 6), INFO.label_divisor + 1, np.int32)


def _check_kills(folder: Path, run: Callable[[np.ndarray], object], *, jsons: tuple[str, ...]) -> None:
    """Kills a run that writes over the results of an earlier one.

    Args:
        folder: What it writes.
        run: Writes what follows from a panoptic map.
        jsons: The files that describe others, which may be missing: they are removed first and written last.
    """
    run(OLD_MAP)
    old = files_in(folder)
    run(NEW_MAP)
    new = files_in(folder)
    assert old.keys() == new.keys()
    changed = {name for name in old if old[name] != new[name]}
    assert set(jsons) <= changed
    hidden = 0

    def start() -> None:
        shutil.rmtree(folder)
        for name, content in old.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    for operation in kills(lambda: run(NEW_MAP), prepare=start):
        hidden += len(hidden_in(folder))
        found = {
            name: content
            for name, content in files_in(folder).items()
            if Path(name).name == OUTPUTS_FILE or not Path(name).name.startswith(".")
        }
        # The journal of an unfinished run is neither the old nor the new one.
        assert {name for name in old if name not in found} <= {*jsons, JOURNAL_FILE}, operation
        for name, content in found.items():
            assert content in (old[name], new[name]), f"{name} is damaged, {operation}"
        for name in jsons:
            # It never describes files of the other run.
            others = [other for other in changed if Path(other).is_relative_to(Path(name).with_suffix(""))]
            assert others, name
            for expected in (old, new):
                if found.get(name) == expected[name]:
                    assert all(found[other] == expected[other] for other in others), f"{name}, {operation}"
        run(NEW_MAP)
        assert files_in(folder) == new, operation
        assert hidden_in(folder) == [], operation
    assert hidden  # Some kills have left temporary files.


def test_predict(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    for name in ("a.png", "b.png"):
        assert cv2.imwrite(str(tmp_path / "images" / name), np.zeros((4, 6, 3), np.uint8))

    def run(panoptic: np.ndarray) -> None:
        class FakePredictor:
            dataset_info = INFO
            identity = str(panoptic[0, 0])

            def __call__(self, image: np.ndarray) -> PanopticPrediction:
                return make_prediction(panoptic, {}, INFO)

        predict_files(FakePredictor(), tmp_path / "images", tmp_path / "out", replace=True)

    _check_kills(tmp_path / "out", run, jsons=("panoptic.json",))


class _Fake:
    """Stands for a tensor, whose operations a forked process cannot run."""

    def __init__(self, value: object) -> None:
        self._value = value

    def numpy(self) -> object:
        return self._value


def test_evaluate_with_pictures_and_submission(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = tmp_path / "records"
    records.mkdir()
    INFO.save(records)
    with ShardWriter(records / "val-00000-of-00001.tfrecord") as writer:
        for _ in range(2):
            writer.write(b"not read")
    # Names with folders, which the files get, too.
    examples = [
        {"image": _Fake(np.zeros((4, 6, 3), np.uint8)), "panoptic": _Fake(NEW_MAP), "image_id": _Fake(name)}
        for name in (b"north/1.png", b"south/2.png")
    ]
    monkeypatch.setattr(pipeline, "make_eval_dataset", lambda *_args, **_options: examples)
    # TensorFlow's own file, with a new name every time.
    monkeypatch.setattr(report, "write_events", lambda *_args, **_options: None)
    with one_convolution_registered():
        prepare_model_folder(tmp_path / "model", one_convolution_config(data={"path": str(records)}), INFO)
        evaluation = ModelFolderEvaluation(
            tmp_path / "model", output_dir=tmp_path / "out", save_predictions=True, submission="coco"
        )
        evaluation.build()
    monkeypatch.setattr(evaluation, "_restore", lambda _: 1)

    def run(panoptic: np.ndarray) -> None:
        value = int(panoptic[0, 0])
        outputs = {
            "panoptic": panoptic,
            "segment_id": np.array([value], np.int32),
            "segment_class": np.array([value // INFO.label_divisor], np.int32),
            "segment_score": np.array([1.0], np.float32),
            "semantic": panoptic // INFO.label_divisor,
        }
        found = {name: _Fake(output[None]) for name, output in outputs.items()}
        monkeypatch.setattr(evaluation, "_infer", lambda _: found)
        evaluation.run()

    _check_kills(tmp_path / "out", run, jsons=("submission/panoptic.json",))


def test_evaluate_files(tmp_path: Path) -> None:
    def write(name: str, panoptic: np.ndarray) -> None:
        with CocoPanopticWriter(tmp_path / name, INFO) as writer:
            writer.add(1, "a.png", panoptic)

    write("truth", NEW_MAP)
    write("0", OLD_MAP)
    write(str(NEW_MAP[0, 0]), NEW_MAP)

    def run(panoptic: np.ndarray) -> None:
        folders = {"ground_truth": tmp_path / "truth", "prediction": tmp_path / str(panoptic[0, 0])}
        paths = {kind: folder / "panoptic.json" for kind, folder in folders.items()}
        paths |= {f"{kind}_dir": folder / "panoptic" for kind, folder in folders.items()}
        evaluate_files(**paths, output_dir=tmp_path / "out", workers=1)

    _check_kills(tmp_path / "out", run, jsons=())


def test_inspect_with_report(tmp_path: Path) -> None:
    def run(panoptic: np.ndarray) -> None:
        statistics: dict[str, Any] = {"splits": {}, "fault_counts": {}, "value": int(panoptic[0, 0])}
        sheet = np.full((4, 6, 3), panoptic[0, 0] // INFO.label_divisor, np.uint8)
        inspection = Inspection(statistics, {"train": sheet}, [])
        inspection.save(tmp_path / "out" / "pictures")
        write_report(inspection, tmp_path / "out" / "report.html", title=f"Class {sheet[0, 0, 0]}")

    _check_kills(tmp_path / "out", run, jsons=())


def test_batch_of_a_loss_that_is_not_finite(tmp_path: Path) -> None:
    def run(panoptic: np.ndarray) -> None:
        batch = {
            "image": _Fake(np.full((1, 4, 6, 3), panoptic[0, 0] // INFO.label_divisor, np.uint8)),
            "image_id": _Fake(np.array([b"a.png"])),
            "targets": {"panoptic": _Fake(panoptic)},
        }
        non_finite(NonFiniteError("total", 1), batch, tmp_path / "out", has_checkpoint=False)

    _check_kills(tmp_path / "out", run, jsons=())


def test_import_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class FakeCheckpoint:
        def write(self, prefix: str) -> None:
            for end in ("data-00000-of-00001", "index"):
                Path(f"{prefix}.{end}").write_text("weights")

    monkeypatch.setattr(model_folder, "make_checkpoint", lambda _: FakeCheckpoint())
    config, system = one_convolution_config(), SimpleNamespace(dataset_info=INFO)

    def run() -> None:
        write_imported(tmp_path / "models" / "new", config, system, {"file": "x.pkl"})

    run()
    whole = files_in(tmp_path / "models")
    assert len(whole) == 5
    hidden = 0
    for operation in kills(run, prepare=lambda: shutil.rmtree(tmp_path / "models", ignore_errors=True)):
        hidden += len(hidden_in(tmp_path / "models"))
        new = tmp_path / "models" / "new"
        if new.exists():
            assert {f"new/{name}": content for name, content in files_in(new).items()} == whole, operation
            shutil.rmtree(new)  # An import replaces nothing.
        run()
        assert files_in(tmp_path / "models") == whole, operation
    assert hidden


def test_submission_to_cityscapes(tmp_path: Path) -> None:
    """A list of instances never names masks of another run."""
    info = DatasetInfo.from_coco_categories([{"id": 26, "name": "car", "isthing": 1}], name="small")
    name = "city_000000_000000"
    maps = {size: np.full((4, 6), info.void, np.int32) for size in (1, 2)}
    for size, panoptic in maps.items():
        panoptic[:size] = 1  # The first car, in the upper rows.
        panoptic[3] = 2  # The second one.

    def run(size: int) -> None:
        submission = CityscapesSubmission(tmp_path / "out", info)
        submission.add(f"{name}_leftImg8bit.png", maps[size], {1: size / 4, 2: 0.9})
        submission.close()

    run(1)
    old = files_in(tmp_path / "out")
    run(2)
    new = files_in(tmp_path / "out")
    list_file = f"instances/{name}.txt"
    masks = [f"instances/masks/{name}_{number:03d}.png" for number in range(2)]
    assert {list_file, *masks} <= old.keys() == new.keys()
    assert old[list_file] != new[list_file]

    def start() -> None:
        shutil.rmtree(tmp_path / "out")
        run(1)

    for operation in kills(lambda: run(2), prepare=start):
        found = files_in(tmp_path / "out")
        for whole in (old, new):
            if found.get(list_file) == whole[list_file]:
                assert all(found[mask] == whole[mask] for mask in masks), operation
        run(2)
        assert files_in(tmp_path / "out") == new, operation
        assert hidden_in(tmp_path / "out") == [], operation
