"""Labels as tools really write them: every converter takes the same liberties, says so, and counts what is lost."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from deeplab2_like.cli import main
from deeplab2_like.data import pipeline
from deeplab2_like.data.convert.class_lists import read_class_list
from deeplab2_like.data.convert.coco_instances import convert_coco_instances
from deeplab2_like.data.convert.coco_panoptic import convert_coco_panoptic
from deeplab2_like.data.convert.common import ConversionReport
from deeplab2_like.data.convert.cvat_masks import convert_cvat_masks
from deeplab2_like.data.convert.file_finder import FileFinder
from deeplab2_like.data.convert.labelme import convert_labelme
from deeplab2_like.data.convert.semantic_pngs import convert_semantic_pngs
from deeplab2_like.data.convert.splits import share_out
from deeplab2_like.data.convert.summary import print_summary
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.panoptic_label import ids_to_rgb
from deeplab2_like.data.shards import list_shards, list_splits
from deeplab2_like.errors import UserError

HEIGHT, WIDTH = 4, 6
VOID = 255_000


@pytest.fixture
def tmp_path(tmp_path: Path) -> Path:
    """A folder without the word test in its name or in that of the folder above."""
    folder = tmp_path / "a" / "b"
    folder.mkdir(parents=True)
    return folder


def save(path: Path, pixels: Any = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.zeros((HEIGHT, WIDTH, 3)) if pixels is None else pixels
    Image.fromarray(np.asarray(pixels, np.uint8)).save(path)


def square(left: int, top: int, size: int = 2) -> list[list[float]]:
    right, bottom = left + size, top + size
    return [[left, top, right, top, right, bottom, left, bottom]]


def coco(annotations: list[dict[str, Any]], **changes: Any) -> dict[str, Any]:
    """A COCO JSON of one image; every annotation is of category 3, a car, unless it says otherwise."""
    content = {
        "images": [{"id": 7, "file_name": "a.png", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": number, "image_id": 7, "category_id": 3, "segmentation": square(0, 0), **annotation}
            for number, annotation in enumerate(annotations)
        ],
        "categories": [{"id": 3, "name": "car"}],
    }
    return {**content, **changes}


def convert(folder: Path, content: dict[str, Any], name: str = "train.json", **options: Any) -> ConversionReport:
    if not (folder / "images").exists():
        save(folder / "images" / "a.png")
    (folder / name).write_text(json.dumps(content))
    options = {"images": folder / "images", "output_dir": folder / "records", **options}
    (report,) = convert_coco_instances(json_file=folder / name, **options)
    return report


def labels(folder: Path, split: str = "train") -> list[np.ndarray]:
    dataset = pipeline.make_eval_dataset(list_shards(folder, split), dataset_info=DatasetInfo.load(folder))
    return [example["panoptic"] for example in dataset.as_numpy_iterator()]


def names(folder: Path, split: str = "train") -> list[str]:
    dataset = pipeline.make_eval_dataset(list_shards(folder, split), dataset_info=DatasetInfo.load(folder))
    return [example["image_id"].decode() for example in dataset.as_numpy_iterator()]


def summary(*reports: ConversionReport, folder: Path) -> str:
    text = io.StringIO()
    options = ("background", "stuff", "crowds_are_objects")
    print_summary(reports, folder, options=options, console=Console(file=text, width=80))
    return text.getvalue()


# Numbers and encodings.


@pytest.mark.parametrize("number", [str, float, lambda value: f"{value}.0"])
def test_numbers_of_a_coco_json_may_be_text_or_floats(tmp_path: Path, number: Any) -> None:
    content = coco([{"id": number(1), "image_id": number(7), "category_id": number(3), "iscrowd": None}])
    content["images"][0] |= {"id": number(7), "height": number(HEIGHT), "width": number(WIDTH)}
    content["categories"][0]["id"] = number(3)
    content["annotations"][0]["segmentation"] = [[str(value) for value in square(0, 0)[0]]]
    convert(tmp_path, content)
    assert (labels(tmp_path / "records")[0] == 1).sum() == 4
    # Run lengths by columns: 20 pixels outside, 4 inside.
    runs = {"size": [number(HEIGHT), number(WIDTH)], "counts": [number(20), number(4)]}
    content["annotations"][0]["segmentation"] = runs
    convert(tmp_path, content)
    assert (labels(tmp_path / "records")[0][:, 5] == 1).all()


@pytest.mark.parametrize("number", [str, float])
def test_ids_of_a_panoptic_json_may_be_text_or_floats(tmp_path: Path, number: Any) -> None:
    save(tmp_path / "images" / "a.png")
    save(tmp_path / "panoptic" / "a.png", ids_to_rgb(np.full((HEIGHT, WIDTH), 5)))
    segments = [{"id": number(5), "category_id": number(3), "iscrowd": None}]
    content = {
        "images": [{"id": 7, "file_name": "a.png"}],
        "annotations": [{"image_id": number(7), "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": number(3), "name": "road", "isthing": number(0)}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content), encoding="utf-16")
    convert_coco_panoptic(
        images=tmp_path / "images",
        panoptic=tmp_path / "panoptic",
        json_file=tmp_path / "train.json",
        output_dir=tmp_path / "records",
    )
    assert (labels(tmp_path / "records")[0] == 0).all()


@pytest.mark.parametrize("number", ["1e400", str(2**64), '"x"', "null", "7.5"])
def test_an_impossible_category_id_is_named_with_its_file(tmp_path: Path, number: str) -> None:
    content = json.dumps(coco([{}])).replace('"id": 3,', f'"id": {number},')
    with pytest.raises(UserError, match=r"train\.json' has the category id .*; an id is a whole number of 64 bits"):
        convert(tmp_path, json.loads(content))


# Paths.


def test_files_are_found_by_the_end_of_a_path(tmp_path: Path) -> None:
    for name in ("a.png", "sub/b.png", "we\\ird.png"):
        save(tmp_path / "images" / name)
    save(tmp_path / "outside.png")
    finder = FileFinder(tmp_path / "images")
    for given, found in (
        ("a.png", "a.png"),
        ("sub\\b.png", "sub/b.png"),
        ("we\\ird.png", "we\\ird.png"),  # A file of this name exists.
        ("missing.png", "missing.png"),
    ):
        assert finder.find(given) == found
    assert finder.notes() == []
    finder = FileFinder(tmp_path / "images")
    assert finder.find("C:\\data\\images\\a.png") == "a.png"
    assert finder.find("/home/me/sub/b.png") == "sub/b.png"
    assert finder.notes()[0].startswith("2 files found in '")
    assert "by the end of the path in the JSON" in finder.notes()[0]
    with pytest.raises(UserError, match=r"images.a\.png' and '/other/a\.png' both lead to 'a\.png' in"):
        finder.find("/other/a.png")
    for given in ("../outside.png", str(tmp_path / "outside.png"), "..\\..\\..\\..\\..\\..\\etc\\passwd"):
        name = FileFinder(tmp_path / "images")
        if "etc" in given:
            assert name.find(given) == given  # On Linux a file name, which does not exist.
            continue
        with pytest.raises(UserError, match="leads outside of"):
            name.find(given)


# Classes.


def test_another_split_may_list_its_classes_in_its_own_way(tmp_path: Path) -> None:
    car, tree, road = ({"id": number, "name": name} for number, name in ((3, "car"), (5, "tree"), (9, "road")))
    convert(tmp_path, coco([{}], categories=[car, tree]), background="rest")
    # In another order, only those that occur, and with a new one; the background keeps its id.
    for split, categories in (("b", [tree, car]), ("c", [car]), ("d", [car, road])):
        convert(tmp_path, coco([{}], categories=categories), split=split, background="rest")
        assert labels(tmp_path / "records", split)[0].tolist()[0] == [1, 1, 2000, 2000, 2000, 2000]
    info = DatasetInfo.load(tmp_path / "records")
    assert [(c.id, c.name) for c in info.categories] == [(3, "car"), (5, "tree"), (6, "rest"), (9, "road")]
    assert (labels(tmp_path / "records", "train")[0] == labels(tmp_path / "records", "b")[0]).all()
    for other in ({"id": 3, "name": "bus"}, {"id": 4, "name": "car"}, {"id": 3, "name": "car", "isthing": 0}):
        with pytest.raises(UserError, match=r"with other categories \(.*'car'.*\) in its other splits"):
            convert(tmp_path, coco([], categories=[other]), split="e", background="rest")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Pixel Value, Class\n0, road\n2, sky\n", [(0, "road"), (2, "sky")]),
        ("7.0 road\n", [(7, "road")]),
        ('{"road": 7, "sky": 9}', [(7, "road"), (9, "sky")]),
        ('{"images": [], "categories": [{"id": "7", "name": "road"}]}', [(7, "road")]),
        ("3 road\n3 road\n", [(3, "road")]),
    ],
)
def test_class_lists_of_other_forms(tmp_path: Path, text: str, expected: list[tuple[int, str]]) -> None:
    for encoding in ("utf-8-sig", "utf-16"):
        (tmp_path / "classes").write_text(text, encoding=encoding)
        assert [(entry["id"], entry["name"]) for entry in read_class_list(tmp_path / "classes")] == expected


@pytest.mark.parametrize("text", ["3 road\n3 sky\n", "3 road\n4 road\n", '{"3": "road", "4": "road"}'])
def test_contradicting_class_lists_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "classes").write_text(text)
    with pytest.raises(UserError, match=r"The list of classes '.*classes' gives (id '3'|name 'road') the .*keep one"):
        read_class_list(tmp_path / "classes")


def test_a_group_without_annotations_is_no_class(tmp_path: Path) -> None:
    categories = [
        {"id": 0, "name": "vehicles", "supercategory": "none"},
        {"id": 3, "name": "car", "supercategory": "vehicles"},
        {"id": 4, "name": "person", "supercategory": "person"},
    ]
    report = convert(tmp_path, coco([{}], categories=categories))
    assert "The categories vehicles only group others and have no annotations" in summary(
        report, folder=tmp_path / "records"
    )
    kept = [["car", "person"], ["vehicles", "car", "person"]]
    assert [c.name for c in DatasetInfo.load(tmp_path / "records").categories] == kept[0]
    convert(tmp_path, coco([{}], categories=categories), keep_groups=True)
    assert [c.name for c in DatasetInfo.load(tmp_path / "records").categories] == kept[1]


def semantic(folder: Path, classes: str, **options: Any) -> tuple[ConversionReport, ...]:
    if not (folder / "images").exists():
        save(folder / "images" / "a.png")
        save(folder / "labels" / "a.png", np.where(np.eye(HEIGHT, WIDTH) > 0, 255, 0))
    (folder / "classes.txt").write_text(classes)
    return convert_semantic_pngs(
        images=folder / "images",
        labels=folder / "labels",
        classes=folder / "classes.txt",
        output_dir=folder / "records",
        **options,
    )


@pytest.mark.parametrize(
    ("name", "ignore", "is_class", "note"),
    [
        ("cell", None, True, "The value 255 is the class 'cell' of the list, so it is not void; --ignore 255"),
        ("void", None, False, "The value 255 is void because of its name 'void'; --ignore without a value keeps"),
        ("void", [], True, ""),
        ("cell", [255], False, "No classes because of --ignore: 255 'cell'."),
    ],
)
def test_255_is_void_unless_the_list_says_otherwise(
    tmp_path: Path, name: str, ignore: list[int] | None, is_class: bool, note: str
) -> None:
    (report,) = semantic(tmp_path, f"0 background\n255 {name}\n", ignore=ignore)
    assert set(np.unique(labels(tmp_path / "records")[0])) == ({0, 1000} if is_class else {0, VOID})
    text = summary(report, folder=tmp_path / "records")
    assert note in text
    assert (f"Lost (ignored, so void): value 255, {name}, 16.7% of the pixels" in text) is not is_class


# What is lost.


def test_crowds_alone_are_a_warning(tmp_path: Path) -> None:
    report = convert(tmp_path, coco([{"iscrowd": 1}, {"iscrowd": 1, "segmentation": square(3, 0)}]))
    text = summary(report, folder=tmp_path / "records")
    # 8 of 24 pixels.
    assert "Lost (crowd regions, which are not objects): car, 2 objects, 33.3% of the pixels" in text
    assert "Warning: all objects of car are crowd regions, from which a model learns no object; --crowds-are" in text
    assert "Warning: split 'train' has no object." in text
    assert "Warning: no class is stuff, so 66.7% of the pixels are void, and a model does not learn" in text
    report = convert(tmp_path, coco([{"iscrowd": 1}]), crowds_are_objects=True, background="rest")
    assert "Warning" not in summary(report, folder=tmp_path / "records")


def test_objects_that_disappear_are_counted(tmp_path: Path) -> None:
    categories = [{"id": 3, "name": "car"}, {"id": 4, "name": "bug"}]
    annotations = [
        {},
        {},  # Of equal areas the later is on top.
        {"category_id": 4, "segmentation": [[4, 0, 5, 1, 4, 0]]},  # Without an inside.
        {"segmentation": square(4, 2)},
    ]
    report = convert(tmp_path, coco(annotations, categories=categories))
    assert (report.objects, report.pixels) == ((2, 0), (8, 0, 16))
    assert report.lost["covered by other shapes, see --overlap"]["car"] == (1, 4)
    assert report.lost["outlines without a pixel"] == {"bug": (1, 0)}
    assert "Warning: nothing is left of bug, see above." in summary(report, folder=tmp_path / "records")
    # Nearest neighbors of 4 x 6 pixels at 1 x 2: of rows 2 or 1 and columns 1 and 4 at most one car is seen.
    report = convert(tmp_path, coco([{"segmentation": square(0, 0, 1)}]), max_side=2)
    assert report.lost["too small after --max-side"] == {"car": (1, 0)}


def test_one_faulty_annotation_does_not_cost_the_image(tmp_path: Path) -> None:
    bad = [
        {"segmentation": [*square(3, 0), [1, 1, 2, 2]]},  # The square is kept.
        {"segmentation": [[1, 1, 2, 2]]},
        {"segmentation": []},
        {"category_id": 8},
    ]
    content = coco([{}, *bad])
    with pytest.raises(UserError, match="its annotation of id 1 has a polygon that is not a list x, y"):
        convert(tmp_path, content)
    report = convert(tmp_path, content, on_error="skip-annotation")
    assert (report.examples, report.skipped, report.objects) == (1, (), (2,))
    assert [fault.partition("its annotation of id ")[2][0] for fault in report.skipped_annotations] == [
        "1",
        "2",
        "3",
        "4",
    ]
    assert report.lost["faulty, left out by --on-error"] == {"car": (2, 0), "category 8": (1, 0)}
    lines = [json.loads(line) for line in (tmp_path / "records" / "errors.jsonl").read_text().splitlines()]
    assert len(lines) == 4
    assert (lines[0]["split"], lines[0]["skipped"]) == ("train", "annotation")
    assert lines[0]["file"] == str(tmp_path / "images" / "a.png")
    text = summary(report, folder=tmp_path / "records")
    assert "1 image, 0 skipped. 4 faulty annotations left out, whole or in part." in text
    assert "Lost (faulty, left out by --on-error): car, 2 objects; category 8, 1 object" in text
    # Nothing is done again, but another way with faults is another result.
    assert convert(tmp_path, content, on_error="skip-annotation").is_unchanged
    with pytest.raises(UserError, match="all 1 are faulty"):
        convert(tmp_path, content, on_error="skip-image")
    # A fault of the whole image is not one of an annotation.
    content["images"].append({"id": 8, "file_name": "missing.png", "height": 1, "width": 1})
    with pytest.raises(UserError, match=r"missing\.png' cannot be read"):
        convert(tmp_path, content, on_error="skip-annotation")
    assert convert(tmp_path, content, on_error="skip").examples == 1


def test_values_without_a_class_are_left_out_alike(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has the value 255, which"):
        semantic(tmp_path, "0 background\n", ignore=[])
    (report,) = semantic(tmp_path, "0 background\n", ignore=[], on_error="skip")
    assert report.pixels == (20, 4)
    assert report.lost["faulty, left out by --on-error"] == {"value 255": (0, 4)}
    assert "has the value 255, which" in report.skipped_annotations[0]


def test_faulty_segments_of_a_panoptic_json_become_void(tmp_path: Path) -> None:
    save(tmp_path / "images" / "a.png")
    ids = np.repeat([[1, 2, 3, 3, 3, 3]], HEIGHT, axis=0)
    save(tmp_path / "panoptic" / "a.png", ids_to_rgb(ids))
    # Of id 1 the category is unknown, id 3 is not listed, id 4 has no pixels.
    segments = [{"id": 1, "category_id": 9}, {"id": 2, "category_id": 3}, {"id": 4, "category_id": 3}]
    content = {
        "images": [{"id": 7, "file_name": "a.png"}],
        "annotations": [{"image_id": 7, "file_name": "a.png", "segments_info": segments}],
        "categories": [{"id": 3, "name": "road", "isthing": 0}],
    }
    (tmp_path / "train.json").write_text(json.dumps(content))
    (report,) = convert_coco_panoptic(
        images=tmp_path / "images",
        panoptic=tmp_path / "panoptic",
        json_file=tmp_path / "train.json",
        output_dir=tmp_path / "records",
        on_error="skip-annotation",
    )
    assert labels(tmp_path / "records")[0][0].tolist() == [VOID, 0, VOID, VOID, VOID, VOID]
    assert len(report.skipped_annotations) == 2
    assert report.lost["faulty, left out by --on-error"] == {"ids that are not listed": (0, 20)}


# Splits.


class Item:
    def __init__(self, name: str) -> None:
        self.name = name


def test_a_share_is_stable_by_file_name() -> None:
    items = [Item(f"{number}.png") for number in range(1000)]
    shared = share_out({"train": items}, 0.1)
    assert list(shared) == ["train", "val"]
    assert 70 < len(shared["val"]) < 130
    assert sorted(map(id, [*shared["train"], *shared["val"]])) == sorted(map(id, items))
    # Half of the images, in another order: each stays where it was.
    half = share_out({"train": items[::-2]}, 0.1)
    assert {item.name for item in half["val"]} == {item.name for item in shared["val"]} & {i.name for i in items[::-2]}
    # At least one image remains in either.
    for share in (0.001, 0.999):
        assert sorted(map(len, share_out({"train": items[:2]}, share).values())) == [1, 1]
    for splits, share, message in (
        ({"train": items}, 1.5, "a share above 0 and below 1"),
        ({"val": items}, 0.1, "--val-share makes split 'val', but the images already are split 'val'; leave out"),
        ({"a": items, "b": items}, 0.1, "--val-share needs a single split, but the images already are in splits a, b"),
        ({"train": items[:1]}, 0.1, "needs two images or more, but the split has 1"),
    ):
        with pytest.raises(UserError, match=message):
            share_out(splits, share)


def test_a_share_of_any_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in "abcd":
        save(tmp_path / "images" / f"{name}.png")
        save(tmp_path / "labels" / f"{name}.png", np.zeros((HEIGHT, WIDTH)))
    (tmp_path / "classes.txt").write_text("road\n")
    folders = [f"--{name}={tmp_path / name}" for name in ("images", "labels")]
    command = ["convert", "semantic-pngs", *folders, f"--classes={tmp_path / 'classes.txt'}"]
    command += [f"--output-dir={tmp_path / 'records'}", "--val-share", "0.5"]
    for _ in range(2):  # The second time there is nothing to do.
        assert main(command) == 0
    assert "Split 'val'" in capsys.readouterr().out
    found = [names(tmp_path / "records", split) for split in ("train", "val")]
    assert sorted(found[0] + found[1]) == ["a.png", "b.png", "c.png", "d.png"]
    assert all(found)
    assert main([*command, "--split", "val"]) == 2


def test_a_split_with_the_same_images_is_a_warning(tmp_path: Path) -> None:
    for name in "ab":
        save(tmp_path / "images" / f"{name}.png")
        save(tmp_path / "labels" / f"{name}.png", np.zeros((HEIGHT, WIDTH)))
    for report in semantic(tmp_path, "road\n", val_share=0.5):
        assert not any("Warning" in note for note in report.notes)
    (report,) = semantic(tmp_path, "road\n", split="train")
    assert report.notes[0].startswith("Warning: the split val in '")
    assert report.notes[0].endswith("from the same files in another way, so it may hold images of train, too.")


def test_folders_of_splits_are_splits(tmp_path: Path) -> None:
    for name in ("train/a", "valid/b", "valid/c"):
        save(tmp_path / "images" / f"{name}.png")
        save(tmp_path / "labels" / f"{name}.png", np.zeros((HEIGHT, WIDTH)))
    reports = semantic(tmp_path, "road\n")
    assert [(report.split, report.examples) for report in reports] == [("train", 1), ("val", 2)]
    assert (
        "divides the images into subsets (train: 1, val: 2), of which train, val used; --ignore-" in reports[0].notes[0]
    )
    assert [report.split for report in semantic(tmp_path, "road\n", split="val")] == ["val"]
    with pytest.raises(UserError, match=r"has subsets \(train: 1, val: 2 images\) but no 'test'; name one of them, or"):
        semantic(tmp_path, "road\n", split="test")
    (report,) = semantic(tmp_path, "road\n", split="all", ignore_subsets=True)
    assert report.examples == 3


def test_the_lists_of_cvat_are_splits(tmp_path: Path) -> None:
    for name in "abc":
        save(tmp_path / "JPEGImages" / f"{name}.png")
        for folder in ("SegmentationClass", "SegmentationObject"):
            save(tmp_path / folder / f"{name}.png", np.full((HEIGHT, WIDTH, 3), 9))
    (tmp_path / "labelmap.txt").write_bytes("\u8f66:9,9,9::\r\n".encode("gbk"))
    lists = tmp_path / "ImageSets" / "Segmentation"
    lists.mkdir(parents=True)
    options: dict[str, Any] = {"root": tmp_path, "output_dir": tmp_path / "records", "encoding": "gbk"}
    (lists / "default.txt").write_text("a\nb\nc\n")
    assert [report.split for report in convert_cvat_masks(**options)] == ["train"]
    (lists / "Validation.txt").write_text("c\n")
    (lists / "Train.txt").write_text("a\n")
    reports = convert_cvat_masks(**options)
    assert [names(tmp_path / "records", report.split) for report in reports] == [["a.png"], ["c.png"]]
    assert "Warning: left out 1 image in no subset of" in reports[0].notes[1]
    assert [c.name for c in DatasetInfo.load(tmp_path / "records").categories] == ["\u8f66"]
    (lists / "Train.txt").write_text("a\nc\n")
    with pytest.raises(UserError, match=r"lists 'c' in two subsets, train and val"):
        convert_cvat_masks(**options)


def test_an_export_of_roboflow_is_one_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for split in ("train", "valid"):
        save(tmp_path / "export" / split / "a.png")
        (tmp_path / "export" / split / "_annotations.coco.json").write_text(json.dumps(coco([{}])))
    command = ["convert", "coco-instances", "--json", str(tmp_path / "export")]
    assert main([*command, "--output-dir", str(tmp_path / "records")]) == 0
    assert "export' has the splits train, val; --split converts one of them." in capsys.readouterr().out
    assert list_splits(tmp_path / "records") == ["train", "val"]
    assert main([*command, "--output-dir", str(tmp_path / "one"), "--split", "val"]) == 0
    assert list_splits(tmp_path / "one") == ["val"]
    assert main([*command, "--output-dir", str(tmp_path / "two"), "--split", "test"]) == 2
    assert (
        "has no folder of the split 'test' with _annotations.coco.json (found: train, val)" in capsys.readouterr().err
    )


@pytest.mark.parametrize("given", ["export", "export/annotations"])
def test_an_export_of_cvat_with_subsets_is_one_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str
) -> None:
    (tmp_path / "export" / "annotations").mkdir(parents=True)
    for subset in ("Train", "Validation"):
        save(tmp_path / "export" / "images" / subset / "a.png")
        (tmp_path / "export" / "annotations" / f"instances_{subset}.json").write_text(json.dumps(coco([{}])))
    command = ["convert", "coco-instances", "--json", str(tmp_path / given)]
    assert main([*command, "--output-dir", str(tmp_path / "records")]) == 0
    assert "' has the splits train, val; --split converts one of them." in capsys.readouterr().out
    assert list_splits(tmp_path / "records") == ["train", "val"]
    (tmp_path / "export" / "annotations" / "instances_valid.json").write_text("{}")
    assert main([*command, "--output-dir", str(tmp_path / "two")]) == 2
    assert "' are both of the split 'val'; give one of them with --json" in capsys.readouterr().err


def test_an_export_of_cvat_without_subsets(tmp_path: Path) -> None:
    save(tmp_path / "export" / "images" / "default" / "a.png")
    (tmp_path / "export" / "annotations").mkdir()
    (tmp_path / "export" / "annotations" / "instances_default.json").write_text(json.dumps(coco([{}])))
    command = ["convert", "coco-instances", "--json", str(tmp_path / "export"), "--split", "val"]
    assert main([*command, "--output-dir", str(tmp_path / "records")]) == 0
    assert list_splits(tmp_path / "records") == ["val"]


# labelme.


def labelme(folder: Path, name: str, *, encoding: str = "utf-8", **changes: Any) -> None:
    shape = {"label": "\u8f66", "points": [[0, 0], [2, 0], [2, 2], [0, 2]], "shape_type": "polygon"}
    content = {"shapes": [shape], "imagePath": f"{name}.png", "imageHeight": HEIGHT, "imageWidth": WIDTH, **changes}
    save(folder / f"{name}.png")
    (folder / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)


def test_labelme_needs_no_facts_that_the_image_holds(tmp_path: Path) -> None:
    root = tmp_path / "root"
    labelme(root, "a", imageHeight=None, imageWidth=None)
    labelme(root, "b", imageHeight="4", imageWidth=6.0, imagePath="D:\\photos\\b.png")
    labelme(root, "c", imagePath=None)
    (report,) = convert_labelme(root=root, output_dir=tmp_path / "records")
    assert names(tmp_path / "records") == ["a.png", "b.png", "c.png"]
    assert report.objects == (3,)
    assert "2 images found beside the JSON, because there is none at its 'imagePath'." in report.notes


def test_a_coco_json_needs_no_sizes(tmp_path: Path) -> None:
    content = coco([{}])
    del content["images"][0]["height"]
    convert(tmp_path, content)
    assert (labels(tmp_path / "records")[0] == 1).sum() == 4


def test_labelme_of_two_encodings(tmp_path: Path) -> None:
    root = tmp_path / "train"
    labelme(root, "a", encoding="gbk")
    with pytest.raises(UserError, match=r"^'.*a\.json' is not text in UTF-8 .*--encoding gbk"):
        convert_labelme(root=root, output_dir=tmp_path / "records")
    labelme(root, "b", encoding="utf-8")
    (report,) = convert_labelme(root=root, output_dir=tmp_path / "records", encoding="gbk")
    assert report.examples == 2
    assert [c.name for c in DatasetInfo.load(tmp_path / "records").categories] == ["\u8f66"]


def test_labelme_without_a_label_is_named(tmp_path: Path) -> None:
    labelme(tmp_path, "a", shapes=[{"label": 3, "points": []}])
    with pytest.raises(UserError, match=r"^'.*a\.json': shape 0 has label 3 and group_id None"):
        convert_labelme(root=tmp_path, output_dir=tmp_path / "records", split="train")
    labelme(tmp_path, "a", shapes=[])
    with pytest.raises(UserError, match=r"No shape in the JSONs of '.*' has a label; draw some in labelme, or give"):
        convert_labelme(root=tmp_path, output_dir=tmp_path / "records", split="train")
