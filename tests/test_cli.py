"""The command line: the whole chain, and one sentence and status 2 for whatever a user can do wrong."""

import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
import pytest

import deeplab2_like
from deeplab2_like.cli import describe, main
from deeplab2_like.cli.predict import FORMAT_NAMES
from deeplab2_like.configs import list_configs, load_config
from deeplab2_like.data.images import read_id_png
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.evaluation.coco_format import CocoPanopticReader
from deeplab2_like.export.journal import JOURNAL_FILE
from deeplab2_like.export.prediction_files import FORMATS
from deeplab2_like.files import OUTPUTS_FILE

CONFIG = """
base: panoptic_deeplab/scenes_tiny
data: {crop_size: [32, 64]}
model:
  aspp: {channels: 8}
  decoder:
    low_level_channels: {res3: 8, res2: 8}
    semantic_channels: 8
    semantic_head_channels: 8
    instance_channels: 8
    instance_head_channels: 8
  postprocess: {top_k: 20}
trainer: {steps: 2, batch_size: 2, log_every: 1}
"""


class Output(NamedTuple):
    status: int
    out: str
    err: str


Run = Callable[..., Output]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command line; arguments may be paths and numbers."""

    def run_main(*arguments: Any) -> Output:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        return Output(status, *capsys.readouterr())

    return run_main


@pytest.fixture
def refuse(run: Run) -> Callable[..., str]:
    """Runs the command line, which must refuse with one sentence, and returns that."""

    def run_refused(*arguments: Any) -> str:
        status, _, err = run(*arguments)
        assert status == 2, err
        assert "Traceback" not in err
        assert len(err.splitlines()) == 1, err
        assert err.startswith("deeplab2-like: ")
        return err.removeprefix("deeplab2-like: ")

    return run_refused


@pytest.fixture(scope="session")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which every command has run: records, model, exported, predicted; copy before changing it."""
    folder = tmp_path_factory.mktemp("chain")
    config = folder / "config.yaml"
    config.write_text(CONFIG)
    scenes = ["scenes", "--train", "4", "--val", "2", "--size", "32x64", "--workers", "1"]
    records, model, exported = (str(folder / name) for name in ("records", "model", "exported"))
    assert main(["convert", *scenes, "--output-dir", records]) == 0
    assert main(["train", "--config", str(config), "--model-dir", model, "--set", f"data.path={records}"]) == 0
    # A model folder needs nothing else.
    config.unlink()
    assert main(["evaluate", "--model-dir", model]) == 0
    assert main(["export", "--model-dir", model, "--output-dir", exported]) == 0
    images = folder / "images"
    images.mkdir()
    random = np.random.default_rng(0)
    for name, size in (("small.png", (1, 1)), ("odd.jpg", (37, 53)), ("long.png", (16, 8000))):
        assert cv2.imwrite(str(images / name), random.integers(0, 256, (*size, 3)).astype(np.uint8))
    assert (
        main(["predict", "--model", exported, "--input", str(images), "--output-dir", str(folder / "predicted")]) == 0
    )
    return folder


def hidden(folder: Path) -> list[Path]:
    """What a command that was cut off would leave behind."""
    return [path for path in folder.rglob(".*") if path.name not in (OUTPUTS_FILE, JOURNAL_FILE)]


# --- The whole chain. -------------------------------------------------------------------------------------------------


def test_what_the_chain_leaves(chain: Path) -> None:
    names = {path.name for path in (chain / "records").iterdir()}
    # By the hidden files a second conversion knows that there is nothing to do.
    known = {".train.conversion.json", ".val.conversion.json"}
    assert names == {"dataset_info.json", "train-00000-of-00001.tfrecord", "val-00000-of-00001.tfrecord", *known}
    assert {"config.yaml", "dataset_info.json", "checkpoints", "train", "val"} == {
        path.name for path in (chain / "model").iterdir()
    }
    metrics = json.loads((chain / "model" / "val" / "metrics.json").read_text())
    assert set(metrics) == {"panoptic", "semantic", "instance", "evaluation"}
    assert metrics["evaluation"] == {"model_dir": str(chain / "model"), "step": 2, "split": "val", "images": 2}
    assert 0 <= metrics["panoptic"]["all"]["pq"] <= 100
    assert {"saved_model.pb", "config.yaml", "dataset_info.json"} <= {
        path.name for path in (chain / "exported" / "1").iterdir()
    }
    assert {path.name for path in hidden(chain)} == known


def test_export_writes_versions(chain: Path, tmp_path: Path, run: Run, refuse: Callable[..., str]) -> None:
    shutil.copytree(chain / "exported" / "1", tmp_path / "models" / "1")
    arguments = ("export", "--model-dir", chain / "model", "--output-dir")
    status, out, _ = run(*arguments, tmp_path / "models")
    assert (status, out.splitlines()[-1]) == (0, f"SavedModel is in {tmp_path / 'models' / '2'}")
    message = refuse(*arguments, tmp_path / "models" / "1")
    assert message.startswith(f"'{tmp_path / 'models' / '1'}' already has an export; give '{tmp_path / 'models'}' to")
    (tmp_path / "models" / "2" / "notes.txt").write_text("of the replaced export")
    status, out, _ = run(*arguments, tmp_path / "models", "--replace")
    assert (status, out.splitlines()[-1]) == (0, f"SavedModel is in {tmp_path / 'models' / '2'}")
    assert not (tmp_path / "models" / "2" / "notes.txt").exists()
    assert sorted(path.name for path in (tmp_path / "models").iterdir()) == ["1", "2"]


def test_predictions_of_every_size(chain: Path) -> None:
    reader = CocoPanopticReader(chain / "predicted" / "panoptic.json", chain / "predicted" / "panoptic")
    assert {image_id: panoptic.shape for image_id, panoptic in reader} == {
        "small": (1, 1),
        "odd": (37, 53),
        "long": (16, 8000),
    }
    assert {path.name for path in (chain / "predicted" / "pictures").iterdir()} == {"small.png", "odd.png", "long.png"}


def test_evaluation_of_a_moved_folder(chain: Path, tmp_path: Path, run: Run) -> None:
    model, records = (Path(shutil.copytree(chain / name, tmp_path / name)) for name in ("model", "records"))
    status, out, err = run(
        "evaluate", "--model-dir", model, "--split", "train", "--output-dir", tmp_path / "out",
        "--set", f"data.path={records}",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert "step 2, split train, 4 images" in " ".join(out.split())
    assert f"Metrics are in {tmp_path / 'out' / 'metrics.json'}" in out
    assert (tmp_path / "out" / "metrics.json").is_file()


@pytest.fixture
def model(chain: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(chain / "model", tmp_path / "model"))


def test_evaluation_with_everything_at_once(model: Path, run: Run, tmp_path: Path) -> None:
    out_dir = tmp_path / "out"
    status, out, err = run(
        "evaluate", "--model-dir", model, "--output-dir", out_dir, "--checkpoint", 2, "--save-predictions",
        "--submission", "coco", "--flip", "--scales", 0.5, 1, "--ensemble", model, "--compile",
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert f"Files to submit are in {out_dir / 'submission'}" in out
    names = {path.name for path in (out_dir / "predictions").iterdir()}
    assert names == {"scene_1000000.png", "scene_1000001.png"}
    reader = CocoPanopticReader(out_dir / "submission" / "panoptic.json", out_dir / "submission" / "panoptic")
    assert {image_id: panoptic.shape for image_id, panoptic in reader} == {
        "scene_1000000": (32, 64),
        "scene_1000001": (32, 64),
    }
    assert hidden(tmp_path) == []


def test_evaluation_on_instance_annotations(model: Path, run: Run, refuse: Callable[..., str], tmp_path: Path) -> None:
    images = [{"id": i, "file_name": f"scene_{i}.png", "height": 32, "width": 64} for i in (1000000, 1000001)]
    box = {"image_id": 1000000, "category_id": 99, "segmentation": [[1, 1, 9, 1, 9, 9, 1, 9]]}
    things = [{"id": c.id, "name": c.name} for c in scenes_info().categories if c.is_thing]
    content = {"images": images, "categories": [*things, {"id": 99, "name": "kite"}], "annotations": [box]}
    path = tmp_path / "instances_val.json"
    path.write_text(json.dumps(content))
    status, out, err = run("evaluate", "--model-dir", model, "--instances-json", path)
    assert (status, err) == (0, "")
    assert "AP leaves out 1 annotations of 'instances_val.json' whose categories are no things" in out
    assert "AP of instances_val.json" in out
    # In a folder of its own, and not among the numbers of the plain evaluation.
    metrics = json.loads((model / "val_instances-instances_val.json" / "metrics.json").read_text())
    assert metrics["instance"]["ground_truth"] == "instances_val.json"
    assert metrics["evaluation"]["instances"] == [str(path)]
    path.write_text(json.dumps({**content, "images": images[1:], "annotations": []}))
    said = refuse("evaluate", "--model-dir", model, "--instances-json", path)
    assert "has no image 'scene_1000000.png', neither by file name nor by id" in said


def test_following_keeps_the_best_checkpoint(model: Path, run: Run, refuse: Callable[..., str]) -> None:
    assert "has no best checkpoint, as none was evaluated during training" in refuse(
        "evaluate", "--model-dir", model, "--checkpoint", "best"
    )
    status, out, err = run("evaluate", "--model-dir", model, "--follow")
    assert (status, err) == (0, "")
    assert "Step 2 is the best so far." in out
    assert list((model / "val").glob("events.out.tfevents.*"))
    # An oracle's numbers say nothing of which is best.
    shutil.rmtree(model / "best")
    out = run("evaluate", "--model-dir", model, "--follow", "--oracle", "semantic").out
    assert "The best checkpoint is not kept" in out
    assert not (model / "best").exists()
    assert "is the best so far" in run("evaluate", "--model-dir", model, "--follow").out
    for file in (model / "checkpoints").iterdir():
        file.unlink()
    assert "step 2, split val" in " ".join(run("evaluate", "--model-dir", model, "--checkpoint", "best").out.split())
    assert run("export", "--model-dir", model, "--output-dir", model / "e", "--checkpoint", "best").status == 0


def test_following_leaves_out_what_is_damaged_and_ends(model: Path, run: Run) -> None:
    for file in (model / "checkpoints").glob("ckpt-2.data*"):
        file.write_bytes(b"")
    output = run("evaluate", "--model-dir", model, "--follow", "--timeout", 1e-9)
    assert output.status == 0
    assert "Step 2 is left out: Checkpoint" in output.err


def test_following_a_training_that_never_starts(refuse: Callable[..., str], tmp_path: Path) -> None:
    message = refuse("evaluate", "--model-dir", tmp_path / "model", "--follow", "--timeout", 1e-9)
    assert f"No training has started in '{tmp_path / 'model'}' for 1e-09 minutes; check --model-dir, or " in message
    assert list(tmp_path.iterdir()) == []


def test_an_oracle_is_better_than_nothing(model: Path, run: Run) -> None:
    parts = ("semantic", "centers", "offsets")
    assert run("evaluate", "--model-dir", model, "--oracle", *parts).status == 0
    folder = model / "val_oracle-semantic-centers-offsets"
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["evaluation"] == {
        "model_dir": str(model),
        "step": 2,
        "split": "val",
        "images": 2,
        "oracle": list(parts),
    }
    # Numbers that are not the model's do not stand among those of the training.
    assert not list(folder.glob("events.*"))
    assert metrics["panoptic"]["stuff"]["sq"] == pytest.approx(100.0)
    # Not all: in so small scenes, two centers may lie within one window of the peak search.
    assert metrics["panoptic"]["all"]["pq"] > 80


def test_images_without_labels(chain: Path, model: Path, run: Run) -> None:
    status, out, err = run(
        "evaluate", "--model-dir", model, "--images", chain / "images", "--submission", "coco", "--save-predictions"
    )
    assert (status, err) == (0, "")
    assert "3 images predicted." in out
    folder = model / "images"
    reader = CocoPanopticReader(folder / "submission" / "panoptic.json", folder / "submission" / "panoptic")
    predicted = CocoPanopticReader(chain / "predicted" / "panoptic.json", chain / "predicted" / "panoptic")
    for image_id, panoptic in reader:
        np.testing.assert_array_equal(panoptic, predicted.read(image_id))
    assert len(list((folder / "predictions").iterdir())) == 3


def test_images_that_a_benchmark_names(model: Path, run: Run, refuse: Callable[..., str], tmp_path: Path) -> None:
    """Cityscapes keeps a folder per city; of COCO's test images only some are asked for, with ids of their own."""
    for name in ("a/1.png", "b/2.png", "b/3.png"):
        (tmp_path / "test" / name).parent.mkdir(parents=True, exist_ok=True)
        assert cv2.imwrite(str(tmp_path / "test" / name), np.zeros((8, 8, 3), np.uint8))
    ids = tmp_path / "ids.json"
    ids.write_text(json.dumps({"images": [{"file_name": "b/2.png", "id": 70}, {"file_name": "a/1.png", "id": 60}]}))
    options = (
        "--images",
        tmp_path / "test",
        "--submission",
        "coco",
        "--image-json",
        ids,
        "--output-dir",
        tmp_path / "o",
    )
    assert "2 images predicted." in run("evaluate", "--model-dir", model, *options).out
    content = json.loads((tmp_path / "o" / "submission" / "panoptic.json").read_text())
    assert [annotation["image_id"] for annotation in content["annotations"]] == [70, 60]
    (tmp_path / "test" / "a" / "1.png").unlink()
    said = refuse("evaluate", "--model-dir", model, *options)
    assert "lacks image 'a/1.png' (1 of 2 that the JSON of image ids names)" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--checkpoint", "7"], r"has no checkpoint '7'; give `last`, `best` or one of the steps 2."),
        (
            ["--oracle", "boxes"],
            "has no part 'boxes' that an oracle could replace; give some of semantic, ",
        ),
        (
            ["--oracle", "semantic", "--flip"],
            "An oracle looks at one view of one model, uncompiled; leave out --flip",
        ),
        (["--submission", "kitti"], "Unknown submission 'kitti'. Known: cityscapes, coco"),
        (["--submission", "cityscapes"], "of data set 'scenes' is none of those that Cityscapes evaluates"),
        (["--images", "."], "Images without labels give no metrics; ask for pictures"),
        (["--images", ".", "--submission", "coco", "--oracle", "semantic"], "have no truth for an oracle"),
        (["--images", ".", "--instances-json", "a.json"], "leave out one of --images and --instances-json"),
        (["--instances-json", "missing.json"], "the COCO instance JSON 'missing.json' cannot be read"),
        (["--images", ".", "--split", "val"], "leave out one of --images and --split"),
        (["--follow", "--checkpoint", "2"], "leave out --images and --checkpoint"),
        (["--image-json", "missing.json"], "The JSON of image ids 'missing.json' cannot be read"),
    ],
)
def test_evaluation_options_that_do_not_fit(
    options: list[str], message: str, chain: Path, tmp_path: Path, refuse: Callable[..., str]
) -> None:
    said = refuse("evaluate", "--model-dir", chain / "model", "--output-dir", tmp_path / "out", *options)
    assert message in said
    assert not (tmp_path / "out").exists()


def test_training_again_says_that_it_is_done(chain: Path, run: Run) -> None:
    status, out, _ = run("train", "--config", chain / "model" / "config.yaml", "--model-dir", chain / "model")
    assert status == 0
    assert f"Model folder '{chain / 'model'}' is already trained to step 2." in out


def test_describe(tmp_path: Path, run: Run) -> None:
    file = tmp_path / "new" / "description.json"
    status, out, err = run(
        "describe", "--config", "panoptic_deeplab/scenes_tiny", "--size", "32x64", "--classes", 4, "--json", file
    )
    assert (status, err) == (0, "")
    written = json.loads(file.read_text())
    assert (written["height"], written["width"]) == (32, 64)
    assert written["output_shapes"]["semantic_logits"][-1] == 4
    assert f"Total: {written['parameters'] / 1e6:.2f} M parameters" in out
    assert "backbone" in out


def test_help_is_a_success(run: Run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    for command in ("demo", "convert", "train", "evaluate", "export", "predict", "serve", "describe", "configs"):
        assert command in out
    assert run("convert", "scenes", "--help").status == 0


def test_version(run: Run) -> None:
    assert run("--version") == (0, f"deeplab2-like {deeplab2_like.__version__}\n", "")


def test_list_of_configs(run: Run, refuse: Callable[..., str]) -> None:
    status, out, err = run("configs")
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert [line.split()[0] for line in lines] == list_configs()
    (tiny,) = [line for line in lines if line.startswith("panoptic_deeplab/scenes_tiny ")]
    name, backbone, machine, summary = re.split(" {2,}", tiny)
    assert (name, backbone, machine) == ("panoptic_deeplab/scenes_tiny", "resnet_tiny", "CPU")
    assert summary
    assert refuse("configs", "--set", "trainer.steps=7").startswith("--set changes the keys of one config; give its")


def test_annotated_config(run: Run, refuse: Callable[..., str], tmp_path: Path) -> None:
    name, override = "panoptic_deeplab/scenes_tiny", "trainer.steps=7"
    status, out, err = run("configs", name, "--set", override)
    assert (status, err) == (0, "")
    (tmp_path / "shown.yaml").write_text(out)
    assert load_config(tmp_path / "shown.yaml") == load_config(name, [override])
    lines = out.splitlines()
    assert "  steps: 7" in lines
    assert lines[lines.index("  steps: 7") - 1].startswith("  # ")
    assert refuse("configs", "panoptic_deeplab/scenes_tine").startswith("Unknown config 'panoptic_deeplab/scenes_tine'")


# --- Refusals. --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["trane"], "invalid choice: 'trane'"),
        (["train", "--config", "x"], "the following arguments are required: --model-dir"),
        (["describe", "--config", "x", "--size", "12"], "'12' is not a size; give height and width as in 512x1024"),
        (["describe", "--config", "x", "--size", "0x4"], "'0x4' is not a size"),
        (["describe", "--config", "x", "--size", "²x4"], "'²x4' is not a size"),
        (["evaluate", "--model-dir", "m", "--follow", "--timeout", "nan"], "'nan' is not a finite number above 0"),
        (["evaluate", "--model-dir", "m", "--follow", "--timeout", "-1"], "'-1' is not a finite number above 0"),
        (["evaluate", "--model-dir", "m", "--follow", "--timeout", "soon"], "'soon' is not a finite number above 0"),
        (["evaluate", "--model-dir", "m", "--scales", "1", "inf"], "'inf' is not a finite number above 0"),
        (["evaluate", "--model-dir", "m", "--scales", "0"], "'0' is not a finite number above 0"),
        (["predict", "--model", "m", "--input", "i", "--output-dir", "o", "--on-error", "no"], "invalid choice: 'no'"),
        (
            ["convert", "scenes", "--train", "x", "--val", "1", "--size", "8x8", "--output-dir", "o"],
            "invalid int value",
        ),
        (["serve", "--model", "m", "--port", "0"], "'0' is not a port, 1 to 65535"),
        (["serve", "--model", "m", "--grpc-port", "65536"], "'65536' is not a port, 1 to 65535"),
        (["serve", "--model", "m", "--max-batch-wait", "nan"], "'nan' is not a number of milliseconds, 0 to 60000"),
        (["serve", "--model", "m", "--max-batch-wait", "soon"], "'soon' is not a number of milliseconds, 0 to 60000"),
        *(
            (["convert", "labelme", "--val-share", share], f"'{share}' is not a share above 0 and below 1")
            for share in ("0", "1", "1.5", "nan", "half")
        ),
        *(
            (
                ["convert", "labelme", "--bit-depth", bits],
                f"argument --bit-depth: '{bits}' is not a number of bits, 8 to 32\n",
            )
            for bits in ("99", "7", "x")
        ),
    ],
)
def test_wrong_words(run: Run, arguments: list[str], message: str) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert message in err
    assert err.startswith("usage: deeplab2-like")


def test_output_in_place_of_a_folder_or_file(tmp_path: Path, chain: Path, refuse: Callable[..., str]) -> None:
    message = refuse("describe", "--config", "panoptic_deeplab/scenes_tiny", "--json", tmp_path)
    assert message == f"'{tmp_path}' is a folder; give the name of a JSON file.\n"
    (tmp_path / "file").write_text("kept")
    message = refuse("inspect", chain / "records", "--output-dir", tmp_path / "file")
    assert message.startswith(f"Output folder '{tmp_path / 'file'}' cannot be created (there is a file in its place)")


def test_timeout_needs_follow(tmp_path: Path, refuse: Callable[..., str]) -> None:
    message = refuse("evaluate", "--model-dir", tmp_path, "--timeout", "5")
    assert message == "--timeout ends --follow; add --follow, or leave out --timeout.\n"


def test_wrong_configs(chain: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    tiny = "panoptic_deeplab/scenes_tiny"

    def train(config: Any, *overrides: str) -> str:
        pairs = [word for override in overrides for word in ("--set", override)]
        return refuse("train", "--config", config, "--model-dir", tmp_path / "model", *pairs)

    records = f"data.path={chain / 'records'}"
    assert train("panoptic_deeplab/scenes_tine").startswith(
        "Unknown config 'panoptic_deeplab/scenes_tine'. Did you mean"
    )
    assert train(tmp_path / "none.yaml").startswith(f"Config file '{tmp_path / 'none.yaml'}' does not exist")
    assert train(tiny, "trainer.stepz=3").startswith(
        "Unknown config key 'trainer.stepz'. Did you mean 'trainer.steps'?"
    )
    assert train(tiny, "trainer.steps=-1").startswith("Config key 'trainer.steps' in --set 'trainer.steps=-1' is")
    assert train(tiny, records, "model.backbone.name=resnet51").startswith("Unknown backbone 'resnet51'. Did you mean")
    assert train(tiny).startswith("Config key 'data.path' is not set; give a folder that `deeplab2-like convert` wrote")
    assert train(tiny, f"data.path={tmp_path / 'none'}").startswith(f"Folder '{tmp_path / 'none'}' does not exist")
    assert train(tiny, f"data.path={tmp_path}").startswith(f"'{tmp_path}' has no dataset_info.json")
    assert train(tiny, records, "data.train_split=x").startswith(f"'{chain / 'records'}' has no split 'x'")
    assert list(tmp_path.iterdir()) == []


def test_a_model_folder_of_another_config(chain: Path, refuse: Callable[..., str]) -> None:
    message = refuse(
        "train", "--config", "panoptic_deeplab/scenes_tiny", "--model-dir", chain / "model",
        "--set", f"data.path={chain / 'records'}",
    )  # fmt: skip
    assert message.startswith(f"Model folder '{chain / 'model'}' holds a run whose 'model' section differs")
    message = refuse("evaluate", "--model-dir", chain / "model", "--set", "model.aspp.channels=9")
    assert "does not fit the config" in message


def test_no_model_folder(chain: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    for command in (["evaluate"], ["export", "--output-dir", tmp_path / "out"]):
        for folder in (tmp_path, tmp_path / "none", chain / "records"):
            assert refuse(*command, "--model-dir", folder).startswith(f"'{folder}' is no model folder")
    assert list(tmp_path.iterdir()) == []


def test_a_file_in_place_of_the_output_folder(chain: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    (tmp_path / "file").write_text("mine")
    message = refuse(
        "predict", "--model", chain / "exported", "--input", chain / "images", "--output-dir", tmp_path / "file"
    )
    assert message.startswith(f"Output folder '{tmp_path / 'file'}' cannot be created (there is a file in its place)")
    message = refuse("evaluate", "--model-dir", chain / "model", "--output-dir", tmp_path / "file")
    assert message.startswith(f"Output folder '{tmp_path / 'file'}' cannot be created (there is a file in its place)")
    assert (tmp_path / "file").read_text() == "mine"


def test_evaluation_of_nothing(chain: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    assert "has no split 'test'" in refuse("evaluate", "--model-dir", chain / "model", "--split", "test")
    shutil.copy(chain / "records" / "dataset_info.json", tmp_path)
    (tmp_path / "val-00000-of-00001.tfrecord").touch()
    message = refuse("evaluate", "--model-dir", chain / "model", "--set", f"data.path={tmp_path}")
    assert message.startswith(f"Split 'val' in '{tmp_path}' holds no examples")


def test_damaged_records(chain: Path, tmp_path: Path, refuse: Callable[..., str]) -> None:
    records = Path(shutil.copytree(chain / "records", tmp_path / "records"))
    file = records / "val-00000-of-00001.tfrecord"
    content = bytearray(file.read_bytes())
    content[len(content) // 4] ^= 255
    file.write_bytes(content)
    message = refuse("evaluate", "--model-dir", chain / "model", "--set", f"data.path={records}")
    assert "is damaged" in message or "Bad record" in message


def test_prediction_with_a_model_folder_continues(
    chain: Path, tmp_path: Path, run: Run, refuse: Callable[..., str]
) -> None:
    arguments = ("predict", "--model", chain / "model", "--output-dir", tmp_path / "out", "--input")
    status, out, _ = run(*arguments, chain / "images" / "odd.jpg")
    assert status == 0
    assert "1 image predicted, 0 skipped.\n" in out
    # As by the export.
    expected = read_id_png(chain / "predicted" / "panoptic" / "odd.png")
    assert np.mean(read_id_png(tmp_path / "out" / "panoptic" / "odd.png") == expected) > 0.98
    status, out, _ = run(*arguments, chain / "images" / "[os]*", "--open")
    assert status == 0
    assert "1 image predicted, 0 skipped, 1 done by an earlier run.\n" in out
    assert out.splitlines()[-1] == f"There is no display; the first picture is {tmp_path / 'out/pictures/odd.png'}"
    message = refuse(*arguments, chain / "images" / "odd.jpg", "--min-score", "0.5")
    assert message.startswith(f"'{tmp_path / 'out'}' has predictions of other options (min-score: 0.0 before, 0.5 now)")
    assert "Unknown class 'bird'" in refuse(*arguments, chain / "images", "--classes", "bird")
    assert "has no checkpoint '77'" in refuse(*arguments, chain / "images", "--checkpoint", "77")
    assert "--overlap is for tiles" in refuse(*arguments, chain / "images", "--overlap", "32")


def test_prediction_formats_of_the_command_line() -> None:
    assert tuple(FORMATS) == FORMAT_NAMES


def test_images_that_cannot_be_predicted(chain: Path, tmp_path: Path, run: Run, refuse: Callable[..., str]) -> None:
    images = Path(shutil.copytree(chain / "images", tmp_path / "images"))
    (images / "long.png").unlink()
    (images / "broken.png").write_bytes((images / "small.png").read_bytes()[:40])
    arguments = ("predict", "--model", chain / "exported", "--output-dir", tmp_path / "out")
    assert "broken.png' is not a readable image" in refuse(*arguments, "--input", images)
    assert not (tmp_path / "out" / "panoptic.json").exists()
    arguments = (*arguments[:-1], tmp_path / "skipped")
    status, out, _ = run(*arguments, "--input", images, "--on-error", "skip")
    assert status == 0
    assert "2 images predicted, 1 skipped." in out
    assert "broken.png' is not a readable image" in out
    assert refuse(*arguments, "--input", tmp_path / "none").startswith(f"Input '{tmp_path / 'none'}' does not exist")
    (tmp_path / "empty").mkdir()
    assert "has no image in it" in refuse(*arguments, "--input", tmp_path / "empty")


def test_serving_without_its_package(
    tmp_path: Path, refuse: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "mlserver", None)  # As if it was not installed.
    assert refuse("serve", "--model", tmp_path) == (
        "`serve` needs the package mlserver, which is not installed; run: pip install 'deeplab2-like[mlserver]'\n"
    )


def test_demo_of_an_unknown_system(tmp_path: Path, refuse: Callable[..., str]) -> None:
    message = refuse("demo", "--system", "panoptic_deeplap", "--output-dir", tmp_path / "demo")
    assert message.startswith("Unknown system 'panoptic_deeplap'. Did you mean 'panoptic_deeplab'?")
    message = refuse("demo", "--output-dir", tmp_path / "demo", "--set", "trainer.stepz=1")
    assert message.startswith("Unknown config key 'trainer.stepz'")
    assert not (tmp_path / "demo").exists()


# --- Conversions. -----------------------------------------------------------------------------------------------------


@pytest.fixture
def coco(tmp_path: Path) -> Path:
    """Two images of 8 x 8 pixels, each one segment of class "road", in COCO panoptic format."""
    folder = tmp_path / "coco"
    (folder / "images").mkdir(parents=True)
    (folder / "panoptic").mkdir()
    content: dict[str, Any] = {"images": [], "annotations": [], "categories": [{"id": 1, "name": "road", "isthing": 0}]}
    for image_id in (1, 2):
        cv2.imwrite(str(folder / "images" / f"{image_id}.png"), np.full((8, 8, 3), 90, np.uint8))
        # Red is the last channel here: id 5.
        cv2.imwrite(str(folder / "panoptic" / f"{image_id}.png"), np.full((8, 8, 3), (0, 0, 5), np.uint8))
        content["images"].append({"id": image_id, "file_name": f"{image_id}.png", "height": 8, "width": 8})
        segments = [{"id": 5, "category_id": 1, "iscrowd": 0, "area": 64, "bbox": [0, 0, 8, 8]}]
        content["annotations"].append({"image_id": image_id, "file_name": f"{image_id}.png", "segments_info": segments})
    (folder / "val.json").write_text(json.dumps(content))
    return folder


def coco_arguments(coco: Path, **changes: Any) -> list[str]:
    options = {
        "images": coco / "images",
        "panoptic": coco / "panoptic",
        "json": coco / "val.json",
        "output-dir": coco / "records",
        "workers": 1,
        **changes,
    }
    return [
        "convert",
        "coco-panoptic",
        *(word for name, value in options.items() for word in (f"--{name}", str(value))),
    ]


def test_conversion(coco: Path, run: Run) -> None:
    status, out, err = run(*coco_arguments(coco))
    assert (status, err) == (0, "")
    assert out.splitlines()[:2] == ["Split 'val': 2 images, 0 skipped.", f"Records are in {coco / 'records'}"]
    assert out.splitlines()[2] == "The split is 'val' because of the name 'val.json'; --split names another."
    assert out.splitlines()[3:5] == ["", "val: 0.0% of the pixels are void"]
    words = [line.split() for line in out.splitlines()[5:]]
    assert [line for line in words if line and "─" not in line[0]] == [
        ["class", "kind", "objects", "pixels"],
        ["road", "stuff", "100.0%"],
    ]
    names = {path.name for path in (coco / "records").iterdir()}
    assert names == {"dataset_info.json", "val-00000-of-00001.tfrecord", ".val.conversion.json"}
    # Again: nothing is done.
    status, out, _ = run(*coco_arguments(coco))
    note = "It already exists with the same files and options: nothing was done."
    assert (status, out.splitlines()[0]) == (0, f"Split 'val': 2 images, 0 skipped. {note}")


def test_conversion_without_inputs(coco: Path, refuse: Callable[..., str]) -> None:
    for name in ("images", "panoptic", "json"):
        message = refuse(*coco_arguments(coco, **{name: coco / "none"}))
        assert f"{coco / 'none'}" in message
    content = json.loads((coco / "val.json").read_text())
    (coco / "val.json").write_text(json.dumps({**content, "images": [], "annotations": []}))
    assert "so there is nothing to convert" in refuse(*coco_arguments(coco))
    (coco / "val.json").write_text("{")
    assert "val.json" in refuse(*coco_arguments(coco))
    assert not [path for path in (coco / "records").glob("*") if path.is_file()]


def test_a_failing_conversion_leaves_nothing(coco: Path, run: Run, refuse: Callable[..., str]) -> None:
    (coco / "images" / "2.png").write_bytes(b"no image")
    assert "2.png" in refuse(*coco_arguments(coco))
    assert list((coco / "records").glob("*")) + hidden(coco) == []
    status, out, _ = run(*coco_arguments(coco, **{"on-error": "skip"}))
    assert status == 0
    assert "Split 'val': 1 image, 1 skipped." in out
    assert "  skipped: Image '2.png'" in out
    (line,) = (coco / "records" / "errors.jsonl").read_text().splitlines()
    fault = json.loads(line)
    assert (fault["split"], fault["file"]) == ("val", str(coco / "images" / "2.png"))
    assert fault["reason"].startswith("Image '2.png' of")


def test_a_failing_conversion_keeps_what_was_there(coco: Path, run: Run, refuse: Callable[..., str]) -> None:
    assert run(*coco_arguments(coco)).status == 0
    before = {path.name: path.read_bytes() for path in (coco / "records").iterdir()}
    (coco / "panoptic" / "2.png").unlink()
    assert "2.png" in refuse(*coco_arguments(coco))
    assert {path.name: path.read_bytes() for path in (coco / "records").iterdir()} == before


def test_wrong_scenes(tmp_path: Path, refuse: Callable[..., str]) -> None:
    def convert(*changes: Any) -> str:
        # Of a repeated option the last one counts.
        defaults = ("--train", 1, "--val", 1, "--size", "32x64", "--output-dir", tmp_path / "records")
        return refuse("convert", "scenes", *defaults, *changes)

    assert convert("--train", 0, "--val", 0).startswith("scenes needs train and val of 0 or more")
    assert convert("--train", -1).startswith("scenes needs train and val of 0 or more")
    assert "workers must be 1 or more" in convert("--workers", 0)
    assert "shards must be 1..99999" in convert("--shards", -1)
    (tmp_path / "file").touch()
    assert "cannot be created" in convert("--output-dir", tmp_path / "file")
    assert hidden(tmp_path) == []


# --- Failures that are not the user's. --------------------------------------------------------------------------------


def test_internal_failure(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(describe, "run", fail)
    status, out, err = run("describe", "--config", "x")
    assert (status, out) == (1, "")
    assert "RuntimeError: out of luck" in err
    assert "this is an error in the program" in err.splitlines()[-1]


def test_what_may_not_be_used_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Any) -> None:
        raise PermissionError(13, "Permission denied", "secret/x.json")

    monkeypatch.setattr(describe, "run", refuse)
    status, out, err = run("describe", "--config", "x")
    assert (status, out) == (2, "")
    assert err == "deeplab2-like: no permission for 'secret/x.json'; change its access rights.\n"


def test_stopped_by_the_user(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(describe, "run", stop)
    assert run("describe", "--config", "x") == (130, "", "deeplab2-like: stopped.\n")
