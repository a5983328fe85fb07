"""Names in a JSON that lead out of their folder, for every command that reads one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from deeplab2_like import files
from deeplab2_like.data.convert.coco_instances import convert_coco_instances
from deeplab2_like.data.convert.coco_panoptic import check_segments, convert_coco_panoptic
from deeplab2_like.data.convert.labelme import convert_labelme
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.evaluate_files import evaluate_files
from deeplab2_like.evaluation.model_folder import _picture_name
from deeplab2_like.paths import path_inside

SIZE = (4, 6)


def test_a_name_stays_in_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "images"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "link").symlink_to(folder)
    (folder / "inner").symlink_to(folder / "sub")
    (folder / "out.png").symlink_to(tmp_path / "outside.png")
    for root in (folder, tmp_path / "link"):
        for name in (
            "a.png",
            "sub/../a.png",
            "../images/a.png",
            str(folder / "a.png"),
            "inner/a.png",
            "a\0b",
            "x" * 5000,
        ):
            assert path_inside(root, name) == root / name
        for name in ("../a.png", "sub/../../a.png", "/etc/passwd", "/dev/zero", "out.png", str(tmp_path / "images2")):
            with pytest.raises(
                UserError, match=rf"^The file name '{name}' leads outside of '{root}'; give the folder "
            ):
                path_inside(root, name)


def test_a_pipe_or_device_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("/dev/zero")
    for path in (tmp_path / "pipe.png", tmp_path / "link.png", Path("/dev/zero")):
        with pytest.raises(UserError, match=rf"^the image '{path}' is a pipe or a device; give a regular file"):
            files.read_file(path, "the image")


class Source:
    """One image with one label in every format, and the same files outside of the folders."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = {"image": "a.png", "label": "a.png"}
        for name in ("images/a.png", "outside.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            cv2.imwrite(str(folder / name), np.zeros((*SIZE, 3), np.uint8))
        for name in ("panoptic/a.png", "outside_label.png"):
            (folder / name).parent.mkdir(exist_ok=True)
            cv2.imwrite(str(folder / name), ids_to_rgb(np.full(SIZE, 1))[..., ::-1])
        (folder / "stuff").mkdir()
        cv2.imwrite(str(folder / "stuff" / "a.png"), np.zeros(SIZE, np.uint8))
        cv2.imwrite(str(folder / "outside_stuff.png"), np.zeros(SIZE, np.uint8))
        (folder / "classes.txt").write_text("road\n")

    def json_file(self, **annotation: Any) -> Path:
        """Writes a JSON with the names."""
        height, width = SIZE
        content = {
            "images": [{"id": 1, "file_name": self.names["image"], "height": height, "width": width}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, **annotation}],
            "categories": [{"id": 1, "name": "car", "isthing": 1}],
        }
        path = self.folder / "train.json"
        path.write_text(json.dumps(content))
        return path

    def panoptic_json(self) -> Path:
        return self.json_file(file_name=self.names["label"], segments_info=[{"id": 1, "category_id": 1, "area": 3}])

    def coco_panoptic(self) -> None:
        convert_coco_panoptic(
            images=self.folder / "images",
            panoptic=self.folder / "panoptic",
            json_file=self.panoptic_json(),
            output_dir=self.folder / "records",
        )

    def coco_instances(self, **more: Any) -> None:
        convert_coco_instances(
            images=self.folder / "images",
            json_file=self.json_file(segmentation=[[0, 0, 2, 0, 2, 2]]),
            output_dir=self.folder / "records",
            **more,
        )

    def coco_instances_with_stuff(self) -> None:
        self.coco_instances(stuff_pngs=self.folder / "stuff", stuff_classes=self.folder / "classes.txt")

    def evaluate_files(self) -> None:
        self.names["image"] = "a.png"
        truth = self.panoptic_json()
        folder = self.folder / "panoptic"
        evaluate_files(ground_truth=truth, ground_truth_dir=folder, prediction=truth, prediction_dir=folder)

    def labelme(self) -> None:
        root = self.folder / "labels" / "train"
        root.mkdir(parents=True, exist_ok=True)
        (self.folder / "labels" / "images").mkdir(exist_ok=True)
        cv2.imwrite(str(self.folder / "labels" / "images" / "a.png"), np.zeros((*SIZE, 3), np.uint8))
        name = self.names["image"].replace("../", "../../")
        name = "../images/a.png" if name == "a.png" else name
        shape = {"label": "car", "points": [[0, 0], [2, 0], [2, 2]], "shape_type": "polygon"}
        content = {"shapes": [shape], "imagePath": name, "imageHeight": SIZE[0], "imageWidth": SIZE[1]}
        (root / "a.json").write_text(json.dumps(content))
        convert_labelme(root=root, output_dir=self.folder / "records")


@pytest.mark.parametrize("how", ["parent", "absolute", "link"])
@pytest.mark.parametrize(
    ("run", "field", "folder", "outside"),
    [
        (Source.coco_panoptic, "image", "images", "outside.png"),
        (Source.coco_panoptic, "label", "panoptic", "outside_label.png"),
        (Source.coco_instances, "image", "images", "outside.png"),
        (Source.labelme, "image", "labels/train", "outside.png"),
        (Source.evaluate_files, "label", "panoptic", "outside_label.png"),
    ],
)
def test_a_json_does_not_lead_out_of_its_folder(
    tmp_path: Path, run: Callable[[Source], None], field: str, folder: str, outside: str, how: str
) -> None:
    source = Source(tmp_path)
    run(source)  # Nothing is wrong with it.
    name = {"parent": f"../{outside}", "absolute": str(tmp_path / outside), "link": "link.png"}[how]
    (tmp_path / folder / "link.png").symlink_to(tmp_path / outside)
    source.names[field] = name
    with pytest.raises(UserError, match=rf"The file name '(\.\./)?{name}' leads outside of '"):
        run(source)


def test_stuff_pngs_stay_in_their_folder(tmp_path: Path) -> None:
    source = Source(tmp_path)
    source.coco_instances_with_stuff()
    (tmp_path / "stuff" / "a.png").unlink()
    (tmp_path / "stuff" / "a.png").symlink_to(tmp_path / "outside_stuff.png")
    with pytest.raises(UserError, match=r"The file name 'a\.png' leads outside of '.*stuff'"):
        source.coco_instances_with_stuff()


def test_the_check_of_pngs_stays_in_their_folder(tmp_path: Path) -> None:
    source = Source(tmp_path)
    folder = tmp_path / "panoptic"
    # The area is 24, not 3.
    assert len(check_segments(panoptic=folder, json_file=source.panoptic_json())) == 1
    source.names["label"] = "../outside_label.png"
    assert check_segments(panoptic=folder, json_file=source.panoptic_json()) == []


@pytest.mark.parametrize("name", ["../../a.png", "/etc/a.png", "//etc/a.png", "///a.png", "b/../../a.png", "..", "//"])
def test_pictures_stay_in_their_folder(tmp_path: Path, name: str) -> None:
    path = Path(os.path.normpath(tmp_path / _picture_name(name, set())))
    assert path.is_relative_to(tmp_path)
    assert path != tmp_path
