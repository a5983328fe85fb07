"""The demo: all commands in order, on built-in scenes and with a small network, in some minutes on a CPU."""

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import cv2
from rich.console import Console

from deeplab2_like.configs import load_config
from deeplab2_like.configs.systems import check_system
from deeplab2_like.data import pipeline
from deeplab2_like.data.convert.scenes import convert_scenes
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import write_png
from deeplab2_like.data.shards import list_shards
from deeplab2_like.evaluation.model_folder import evaluate_model_folder
from deeplab2_like.export.predictor import Predictor
from deeplab2_like.export.saved_model import export_model_folder
from deeplab2_like.files import make_folder
from deeplab2_like.printing import print_line
from deeplab2_like.progress import progress_bar
from deeplab2_like.trainer.train import train
from deeplab2_like.visualize import contact_sheet, side_by_side

SCENE_SIZE = (128, 256)
TRAINING_SCENES = 800
VALIDATION_SCENES = 60
PICTURES = 8


def run_demo(*, system: str, output_dir: Path, overrides: Sequence[str] = ()) -> dict:
    """Renders scenes, trains, evaluates, exports, and predicts held-out scenes from the SavedModel.

    Args:
        system: Name of the system; its config `SYSTEM/scenes_tiny` is trained.
        output_dir: Folder for records, model folder, export, pictures and `metrics.json`.
        overrides: Changes to the config, `key.path=value`.

    Returns:
        The content of `metrics.json`.
    """
    started = time.perf_counter()
    console = Console(highlight=False)
    check_system(system)
    records, model_dir, exported = (output_dir / name for name in ("records", "model", "export"))
    config = load_config(f"{system}/scenes_tiny", [f"data.path={json.dumps(str(records))}", *overrides])

    console.rule("1/5 Rendering scenes")
    with progress_bar("render") as progress:
        convert_scenes(
            train=TRAINING_SCENES,
            val=VALIDATION_SCENES,
            size=SCENE_SIZE,
            output_dir=records,
            workers=os.cpu_count() or 1,
            progress=progress,
        )
    console.rule("2/5 Training")
    train(config, model_dir)
    console.rule("3/5 Evaluating")
    metrics = evaluate_model_folder(model_dir, output_dir=output_dir)
    console.rule("4/5 Exporting")
    exported = export_model_folder(model_dir, exported)
    console.rule("5/5 Predicting")
    _write_pictures(records, exported, output_dir / "pictures")

    minutes = (time.perf_counter() - started) / 60
    quality = metrics["panoptic"]["all"]["pq"]
    print_line(f"\nDone in {minutes:.1f} minutes: PQ {quality:.1f}. Everything is in {output_dir}", console)
    for content, path in (
        ("image | ground truth | prediction", output_dir / "pictures"),
        ("metrics", output_dir / "metrics.json"),
        ("SavedModel, to serve", exported),
        ("model folder, to train on", model_dir),
        ("TFRecords", records),
    ):
        print_line(f"  {content + ':':36}{path}", console)
    return metrics


def _write_pictures(records: Path, exported: Path, folder: Path) -> None:
    """Draws validation scenes: image, ground truth, and prediction of the SavedModel."""
    info = DatasetInfo.load(records)
    predictor = Predictor(exported)
    sheet = []
    make_folder(folder)
    examples = pipeline.make_eval_dataset(list_shards(records, "val"), dataset_info=info)
    for example in examples.take(PICTURES):
        image = example["image"].numpy()
        picture = side_by_side(image, example["panoptic"].numpy(), predictor(image).panoptic, info)
        write_png(folder / f"{Path(example['image_id'].numpy().decode()).stem}.png", picture)
        sheet.append(cv2.resize(picture, None, fx=0.75, fy=0.75, interpolation=cv2.INTER_AREA))
    write_png(folder / "overview.png", contact_sheet(sheet, columns=2))
