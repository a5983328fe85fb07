"""The converter of instance maps, on small folders made here."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small_data_sets import read_labels, write_image

from deeplab2_like.cli import main
from deeplab2_like.data.convert.instance_maps import convert_instance_maps
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError

INSTANCES = [[0, 7, 7, 0], [40000, 40000, 0, 0]]
# The only class is 0 and the background 1; objects count in the order of their numbers.
PANOPTIC = [[1000, 1, 1, 1000], [2, 2, 1000, 1000]]


@pytest.fixture
def cells(tmp_path: Path) -> dict[str, Any]:
    """Arguments for two images with instance maps of 16 and 32 bits in a folder of their own."""
    for name, dtype in (("a", np.uint16), ("b", np.int32)):
        write_image(tmp_path / "images" / f"{name}.tif", np.zeros((2, 4)))
        write_image(tmp_path / "masks" / f"{name}.tif", INSTANCES, dtype)
    return {
        "images": tmp_path / "images",
        "labels": tmp_path / "masks",
        "output_dir": tmp_path / "records",
        "split": "train",
    }


def test_one_class(cells: dict[str, Any]) -> None:
    (report,) = convert_instance_maps(**cells, class_name="cell")
    assert read_labels(cells["output_dir"]) == {"a.tif": PANOPTIC, "b.tif": PANOPTIC}
    info = DatasetInfo.load(cells["output_dir"])
    assert [(c.name, c.is_thing) for c in info.categories] == [("cell", True), ("background", False)]
    assert report.objects == (4, 0)
    assert "ends in .tif; --label-ending and --image-ending say otherwise." in report.notes[0]


def test_background_can_be_void(cells: dict[str, Any]) -> None:
    convert_instance_maps(**cells, void_background=True)
    assert read_labels(cells["output_dir"])["a.tif"][0] == [255000, 1, 1, 255000]


@pytest.mark.parametrize(
    ("image", "label"), [("x", "x_masks.tif"), ("x", "x_cp_masks.png"), ("000_img", "000_masks.png")]
)
def test_labels_beside_the_images(tmp_path: Path, image: str, label: str) -> None:
    write_image(tmp_path / "train" / f"{image}.tif", np.zeros((2, 4)))
    write_image(tmp_path / "train" / label, INSTANCES, np.uint16)
    write_image(tmp_path / "train" / "x_flows.tif", np.zeros((2, 4)))  # Cellpose leaves it there, too.
    convert_instance_maps(images=tmp_path / "train", output_dir=tmp_path / "records")
    assert read_labels(tmp_path / "records") == {f"{image}.tif": PANOPTIC}


def test_folders_are_splits(tmp_path: Path) -> None:
    for split in ("train", "test"):
        write_image(tmp_path / "images" / split / "a.tif", np.zeros((2, 4)))
        write_image(tmp_path / "masks" / split / "a.tif", INSTANCES, np.uint16)
    reports = convert_instance_maps(images=tmp_path / "images", labels=tmp_path / "masks", output_dir=tmp_path / "r")
    assert [report.split for report in reports] == ["test", "train"]


@pytest.mark.parametrize(
    "text",
    [
        "image,instance,class\na.tif,7,tumor\na.tif,40000,immune\nb.tif,7,tumor\nb.tif,40000,immune\n",
        "a\t7\ttumor\na\t40000\timmune\nmasks/b.tif\t7\ttumor\nb\t7\ttumor\nb\t40000\timmune\n",
        "Label;Class\n7;tumor\n40000;immune\n",
        "cell_id,label\r7,tumor\r40000,immune\r",
        "/data/a.tif,7,tumor\nC:\\data\\a.tif,40000,immune\nb,7,tumor\nb.tif,40000,immune\n",
        json.dumps(
            [{"image": f"x\\{n}.tif", "id": i, "class": c} for n in "ab" for i, c in ((7, "tumor"), (4e4, "immune"))]
        ),
        json.dumps({"a": {"7": "tumor", "40000": "immune"}, "b.tif": {"7": "tumor", "40000": "immune"}}),
        json.dumps({"7": "tumor", "40000": "immune"}),
        json.dumps([{"id": 7, "type": "tumor"}, {"id": 40000, "type": "immune"}]),
    ],
)
def test_class_maps(cells: dict[str, Any], text: str) -> None:
    path = cells["images"].parent / "classes.txt"
    path.write_text(text)
    convert_instance_maps(**cells, class_map=path)
    # By the alphabet immune is class 0, tumor 1; the background is 2.
    expected = [[2000, 1001, 1001, 2000], [1, 1, 2000, 2000]]
    assert read_labels(cells["output_dir"]) == {"a.tif": expected, "b.tif": expected}


def test_names_of_the_same_image_agree(cells: dict[str, Any]) -> None:
    path = cells["images"].parent / "map.csv"
    path.write_text("a.tif,7,tumor\na,7,immune\n")
    with pytest.raises(UserError, match=r"object 7 the class 'tumor' as of 'a\.tif' and 'immune' as of 'a', which are"):
        convert_instance_maps(**cells, class_map=path)


def test_folders_in_a_class_map_tell_images_apart(cells: dict[str, Any]) -> None:
    path = cells["images"].parent / "map.csv"
    # Of the names whose folders are not those of the images, the nearest counts. The other two fit no image.
    names = ["/x/images/a.tif", "b", "/x/other/a.tif", "c.tif"]
    path.write_text("".join(f"{name},7,{kind}\n{name},40000,t\n" for name, kind in zip(names, "ttit", strict=True)))
    (report,) = convert_instance_maps(**cells, class_map=path)
    # By the alphabet i is class 0 and t 1.
    expected = [[2000, 1001, 1001, 2000], [1002, 1002, 2000, 2000]]
    assert read_labels(cells["output_dir"]) == {"a.tif": expected, "b.tif": expected}
    warning = "Warning: 2 names in the class map '.*' fit no image, such as '/x/other/a.tif'."
    assert any(re.fullmatch(warning, note) for note in report.notes)


def test_objects_that_become_background_are_warned_of(cells: dict[str, Any]) -> None:
    path = cells["images"].parent / "map.csv"
    path.write_text("7,cell\n40000,debris\n")
    (report,) = convert_instance_maps(**cells, class_map=path, background="debris")
    assert any(note.startswith("Warning: 1 object of the class 'debris' became background") for note in report.notes)
    with pytest.raises(UserError, match="objects and the background are both of the class 'cell'"):
        convert_instance_maps(**cells, class_name="cell", background="cell")


def test_labels_of_a_lossy_format_are_named(cells: dict[str, Any]) -> None:
    for name in "ab":
        (cells["labels"] / f"{name}.tif").unlink()
        write_image(cells["labels"] / f"{name}_masks.jpg", np.zeros((2, 4)))
    with pytest.raises(UserError, match=r"The label '.*a_masks\.jpg' is of a lossy format, which changes the values"):
        convert_instance_maps(**cells)


def test_numbers_of_classes_need_a_list(cells: dict[str, Any]) -> None:
    path = cells["images"].parent / "map.csv"
    path.write_text("7,2\n40000,1\n")
    with pytest.raises(UserError, match=r"map\.csv' has the class '2', which has no name; give the class of each num"):
        convert_instance_maps(**cells, class_map=path)
    names = cells["images"].parent / "names.txt"
    names.write_text("1 tumor\n2 immune\n")
    convert_instance_maps(**cells, class_map=path, classes=names)
    assert read_labels(cells["output_dir"])["a.tif"] == [[2000, 1001, 1001, 2000], [1, 1, 2000, 2000]]


def test_an_object_without_a_class_is_named_or_skipped(cells: dict[str, Any]) -> None:
    path = cells["images"].parent / "map.csv"
    path.write_text("7,tumor\n")
    with pytest.raises(UserError, match=r"object 40000 of '.*a\.tif' has no class in '.*map\.csv'; add it there"):
        convert_instance_maps(**cells, class_map=path)
    (report,) = convert_instance_maps(**cells, class_map=path, on_error="skip-annotation")
    assert read_labels(cells["output_dir"])["a.tif"] == [[1000, 1, 1, 1000], [255000, 255000, 1000, 1000]]
    assert report.lost == {"faulty, left out by --on-error": {"objects without a class": (2, 0)}}


def test_class_labels(cells: dict[str, Any]) -> None:
    folder = cells["images"].parent / "classes"
    for name in ("a", "b"):
        # Object 7 is tumor, object 40000 mostly: of equally many pixels the later name by the alphabet wins. Without an
        # object there are the background, stroma, a tumor's pixel, and void.
        write_image(folder / f"{name}.png", [[0, 1, 1, 1], [1, 2, 2, 255]])
    (folder.parent / "names.txt").write_text("0 background\n1 tumor\n2 stroma\n")
    arguments = {"class_labels": folder, "classes": folder.parent / "names.txt", "stuff": ["stroma"]}
    (report,) = convert_instance_maps(**cells, **arguments)
    # Tumor is class 0, stroma 1, the background 2.
    assert read_labels(cells["output_dir"])["a.tif"] == [[2000, 1, 1, 255000], [2, 2, 1000, 255000]]
    assert report.lost == {
        "pixels of an object that are of another class than most of it": {"tumor": (0, 2)},
        "pixels of a thing class without an object, so void": {"tumor": (0, 2)},
    }


def test_many_objects_get_a_larger_divisor(tmp_path: Path) -> None:
    write_image(tmp_path / "images" / "a.png", np.zeros((40, 40)))
    write_image(tmp_path / "masks" / "a.png", np.arange(1600).reshape(40, 40), np.uint16)
    (report,) = convert_instance_maps(
        images=tmp_path / "images", labels=tmp_path / "masks", output_dir=tmp_path / "records"
    )
    assert report.objects[0] == 1599
    assert DatasetInfo.load(tmp_path / "records").label_divisor == 10_000


def test_masks_without_numbers_are_warned_of(cells: dict[str, Any]) -> None:
    for name in "ab":
        write_image(cells["labels"] / f"{name}.tif", [[0, 255, 255, 0], [255, 0, 0, 255]])
    (report,) = convert_instance_maps(**cells)
    assert any(
        note.startswith("Warning: no image has more than one object; a mask of 0 and 255") for note in report.notes
    )


def test_faults_are_named(cells: dict[str, Any]) -> None:
    write_image(cells["labels"] / "a.tif", INSTANCES, np.float32)
    with pytest.raises(UserError, match=r"a\.tif' has floating-point values; save it as integers"):
        convert_instance_maps(**cells)
    write_image(cells["labels"] / "a.tif", [[0, -1, 2, 3]] * 2, np.int32)
    with pytest.raises(UserError, match=r"a\.tif' has the value -1; objects count from 1: correct the file"):
        convert_instance_maps(**cells)
    with pytest.raises(
        UserError, match="Of class, class_map and class_labels only one is possible; leave out the others"
    ):
        convert_instance_maps(**cells, class_name="cell", class_map=cells["images"] / "map.csv")
    with pytest.raises(UserError, match="class labels need the class of each value; give a list with --classes"):
        convert_instance_maps(**cells, class_labels=cells["labels"])
    with pytest.raises(UserError, match=r"No file in '.*images' has the name of an image in '.*images' with an ending"):
        convert_instance_maps(**(cells | {"labels": None}))
    path = cells["images"].parent / "map.csv"
    for text, message in (
        ("", r"map\.csv' is empty; it may be a table with the columns image, instance and class"),
        ("a,b,c,d\n", r"map\.csv' is not understood \(its first line is a, b, c, d\)"),
        (
            "image,instance,foo\na,7,x\n",
            r"has 'instance' as the number of an object in row 1, which is no whole number",
        ),
        ("a,7,x\na,8\n", r"not understood \(row 2 has 2 cells, but row 1 has 3\)"),
        ('["a", "b"]', r"not understood \(entry 0 is 'a', which is no object with 'instance' and 'class'\)"),
        ("7,x\n8,\n", r"map\.csv' has no class for object 8 in row 2; add it"),
        ("7,x\n7,y\n", r"map\.csv' gives object 7 the classes 'x' and 'y'; keep one of them"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=message):
            convert_instance_maps(**cells, class_map=path)


def test_command(cells: dict[str, Any], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = [f"--{name.replace('_', '-')}={value}" for name, value in cells.items()]
    assert main(["convert", "instance-maps", *arguments, "--class", "nucleus", "--val-share", "0.5"]) == 0
    output = capsys.readouterr().out
    assert "Split 'train': 1 image, 0 skipped." in output
    assert "nucleus" in output
