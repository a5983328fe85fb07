"""The labelme converter, on small folders made here."""

import base64
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from deeplab2_like.cli import main
from deeplab2_like.data import pipeline
from deeplab2_like.data.convert.labelme import convert_labelme
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import encode_png
from deeplab2_like.data.shards import list_shards
from deeplab2_like.errors import UserError

HEIGHT, WIDTH = 5, 8


def polygon(label: str, left: int, top: int, right: int, bottom: int, **more: Any) -> dict[str, Any]:
    """A shape that covers the columns left..right-1 of the rows top..bottom-1."""
    points = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return {"label": label, "points": points, "group_id": None, "shape_type": "polygon", **more}


def shape(label: str, kind: str, points: list[list[float]], **more: Any) -> dict[str, Any]:
    return {"label": label, "points": points, "group_id": None, "shape_type": kind, **more}


# The road fills the lower rows; two cars lie on it, one of two parts with something between.
SHAPES = [
    polygon("road", 0, 2, 8, 5),
    polygon("car", 0, 1, 2, 3, group_id=4),
    polygon("car", 6, 1, 8, 3),
    polygon("car", 3, 1, 4, 3, group_id=4),
    polygon("__ignore__", 7, 4, 8, 5),
]
# By the alphabet car is class 0 and road 1; the cars count in the order of their first shapes.
PANOPTIC = [
    [255000] * 8,
    [1, 1, 255000, 1, 255000, 255000, 2, 2],
    [1, 1, 1000, 1, 1000, 1000, 2, 2],
    [1000] * 8,
    [1000] * 7 + [255000],
]


class Source:
    """A folder of labelme; tests damage it before `convert`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.root = folder / "labels"
        self.root.mkdir()
        for name in "ab":
            self.write(name, SHAPES)

    def write(self, name: str, shapes: list[dict[str, Any]], **changes: Any) -> None:
        image = np.full((HEIGHT, WIDTH, 3), ord(name[-1]), np.uint8)
        (self.root / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(self.root / f"{name}.png"), image)
        content = {
            "version": "5.5.0",
            "flags": {},
            "shapes": shapes,
            "imagePath": f"{Path(name).name}.png",
            "imageData": None,
            "imageHeight": HEIGHT,
            "imageWidth": WIDTH,
        }
        (self.root / f"{name}.json").write_text(json.dumps({**content, **changes}))

    def convert(self, **changes: Any) -> Any:
        arguments = {"root": self.root, "output_dir": self.folder / "records", "stuff": ["road"], "split": "train"}
        (report,) = convert_labelme(**(arguments | changes))
        return report

    def examples(self, split: str = "train") -> list[dict[str, Any]]:
        folder = self.folder / "records"
        dataset = pipeline.make_eval_dataset(list_shards(folder, split), dataset_info=DatasetInfo.load(folder))
        return list(dataset.as_numpy_iterator())

    def label_of(self, shapes: list[dict[str, Any]], **changes: Any) -> np.ndarray:
        """Converts the shapes as image a, the others being as they were, and returns its panoptic map."""
        self.write("a", shapes)
        self.convert(**changes)
        return self.examples()[0]["panoptic"]


@pytest.fixture
def source(tmp_path: Path) -> Source:
    return Source(tmp_path)


def test_shapes_become_a_panoptic_map(source: Source) -> None:
    source.write("more/c", SHAPES)
    report = source.convert()
    assert (report.split, report.examples, report.skipped) == ("train", 3, ())
    examples = source.examples()
    assert [example["image_id"] for example in examples] == [b"a.png", b"b.png", b"more/c.png"]
    for name, example in zip("abc", examples, strict=True):
        np.testing.assert_array_equal(example["panoptic"], PANOPTIC)
        np.testing.assert_array_equal(example["image"], np.full((HEIGHT, WIDTH, 3), ord(name)))
    info = DatasetInfo.load(source.folder / "records")
    assert [(c.id, c.name, c.is_thing) for c in info.categories] == [(1, "car", True), (2, "road", False)]


def test_background_takes_what_is_left(source: Source) -> None:
    source.convert(background="rest")
    expected = np.where(np.array(PANOPTIC) == 255000, 2000, PANOPTIC)
    expected[4, 7] = 255000  # What is to be ignored stays void.
    np.testing.assert_array_equal(source.examples()[0]["panoptic"], expected)


def test_the_overlap_rule_decides(source: Source) -> None:
    drawn = [polygon("car", 1, 1, 2, 2), polygon("car", 0, 0, 4, 2), polygon("road", 0, 4, 1, 5)]
    assert source.label_of(drawn)[:2, :4].tolist() == [[2, 2, 2, 2], [2, 1, 2, 2]]
    assert source.label_of(drawn, overlap="later-on-top")[:2, :4].tolist() == [[2, 2, 2, 2], [2, 2, 2, 2]]


def test_every_kind_of_shape(source: Source) -> None:
    # A picture of the three columns 1 to 3 of row 4, without its middle.
    picture = base64.b64encode(encode_png(np.array([[1, 0, 255]], np.uint8))).decode()
    label = source.label_of(
        [
            shape("car", "rectangle", [[2, 2], [0, 0]]),  # From any corner to the opposite one.
            # Of pixel centers less than 1 from (5.5, 1.5): the middle and its four neighbors.
            shape("car", "circle", [[5.5, 1.5], [6.5, 1.5]]),
            shape("car", "mask", [[1, 4], [3, 4]], mask=picture),
            {"label": "car", "points": [[7, 3], [8, 3], [8, 5], [7, 5]]},  # As old files have it.
        ]
    )
    void = 255000
    expected = [
        [1, 1, void, void, void, 2, void, void],
        [1, 1, void, void, 2, 2, 2, void],
        [void, void, void, void, void, 2, void, void],
        [void, void, void, void, void, void, void, 4],
        [void, 3, void, 3, void, void, void, 4],
    ]
    np.testing.assert_array_equal(label, expected)


def test_second_split_takes_the_classes_of_the_first(source: Source) -> None:
    source.convert()
    # No car in it.
    source.write("a", SHAPES[:1])
    source.write("b", SHAPES[:1])
    source.convert(split="val")
    assert source.examples("val")[0]["panoptic"][4, 0] == 1000
    source.write("a", [polygon("tree", 0, 0, 1, 1)])
    with pytest.raises(UserError, match="holds records of 'labels' with other categories"):
        source.convert(split="val")


def test_classes_can_be_given(source: Source) -> None:
    source.convert(classes=["road", "tree", "car"])
    info = DatasetInfo.load(source.folder / "records")
    assert [category.name for category in info.categories] == ["road", "tree", "car"]
    assert source.examples()[0]["panoptic"][4, 0] == 0
    with pytest.raises(
        UserError, match=r"'a\.png' .*shape 1 has the label 'car', which is not a class; classes are road: correct"
    ):
        source.convert(classes=["road"], output_dir=source.folder / "other")


def test_images_come_from_elsewhere(source: Source) -> None:
    # In another folder, named as on Windows; and inside of the JSON.
    (source.folder / "images").mkdir()
    (source.root / "a.png").rename(source.folder / "images" / "a.png")
    source.write("b", SHAPES, imageData=base64.b64encode((source.root / "b.png").read_bytes()).decode())
    (source.root / "b.png").unlink()
    content = json.loads((source.root / "a.json").read_text())
    (source.root / "a.json").write_text(json.dumps({**content, "imagePath": "..\\images\\a.png"}))
    source.convert()
    examples = source.examples()
    assert [example["image_id"] for example in examples] == [b"a.png", b"b.png"]
    assert [example["image"][0, 0, 0] for example in examples] == [ord("a"), ord("b")]


def test_images_may_have_a_folder_of_their_own(source: Source) -> None:
    # Neither the image nor the hidden file, as some systems leave them, counts as unlabeled.
    (source.root / "images").mkdir()
    (source.root / "a.png").rename(source.root / "images" / "photo.png")
    (source.root / ".hidden.png").write_bytes(b"")
    content = json.loads((source.root / "a.json").read_text())
    (source.root / "a.json").write_text(json.dumps({**content, "imagePath": "images/photo.png"}))
    assert source.convert().examples == 2
    assert source.examples()[0]["image_id"] == b"photo.png"


def test_a_turned_photograph_is_set_upright(source: Source) -> None:
    # Stored lying, with the flag to turn it by 90 degrees clockwise: the left column becomes the upper row.
    stored = np.zeros((WIDTH, HEIGHT, 3), np.uint8)
    stored[:, 0] = 200
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored).save(source.root / "a.png", exif=exif)
    source.convert()
    image = source.examples()[0]["image"]
    assert image.shape == (HEIGHT, WIDTH, 3)
    assert (image[0] == 200).all()
    assert (image[1:] == 0).all()


def test_a_label_of_the_stored_size_leaves_the_image_lying(source: Source) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(source.root / "a.png", exif=exif)
    source.convert()
    example = source.examples()[0]
    assert example["image"].shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(example["panoptic"], source.examples()[1]["panoptic"])


# Faults.


def damaged(**changes: Any) -> Any:
    return lambda source: source.write("a", SHAPES, **changes)


def with_shape(added: dict[str, Any]) -> Any:
    return lambda source: source.write("a", [*SHAPES, added])


def no_json(source: Source) -> None:
    (source.root / "a.json").unlink()


def no_image(source: Source) -> None:
    (source.root / "a.png").unlink()


PICTURE = base64.b64encode(encode_png(np.ones((2, 2), np.uint8))).decode()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damaged(imageHeight="high"), "has imageHeight 'high' and imageWidth 8, which are no whole numbers; save it"),
        (damaged(imageHeight=6), "is 5x8 but its label is 6x8"),
        (damaged(imageHeight=0), "its height and width are given as 0 and 8, which is impossible; correct them"),
        (damaged(imageHeight=10**9), r"its label has 1000000000 x 8 pixels \(height x width\), more than the limit of"),
        (no_json, "it has no JSON of the same name beside it; label it in labelme, or move it"),
        (no_image, r"the image '.*a\.png' cannot be read \(No such file"),
        (
            with_shape(shape("car", "line", [[0, 0], [1, 1]])),
            "shape 5, 'car', is a line, which has no inside; use polygon",
        ),
        (
            with_shape(shape("car", "polygon", [[0, 0], [1, 1]])),
            "shape 5, 'car', has a polygon that is not a list x, y",
        ),
        (with_shape(shape("car", "circle", [[0, 0]])), "shape 5, 'car', is a circle of 1 points, not of 2"),
        (
            with_shape(shape("car", "circle", [[0, 0], [float("nan"), 1]])),
            "has a point with a coordinate that is not a num",
        ),
        (
            with_shape(polygon("car", 0, 0, 1, 1, group_id=[1])),
            r"shape 5 has label 'car' and group_id \[1\]; a label",
        ),
        (with_shape(polygon(["car"], 0, 0, 1, 1)), r"shape 5 has label \['car'\] and group_id None; a label is text"),
        (with_shape(shape("car", "circle", [[0, "x"]])), "shape 5, 'car', has no list 'points' of pairs x, y"),
        (with_shape(shape("car", "mask", [[0, 0], [1, 1]], mask="AAAA")), "has a 'mask' that is not a readable PNG"),
        (with_shape(shape("car", "mask", [[0, 0], [1, 1]])), "has 'mask' that cannot be decoded"),
        (
            with_shape(shape("car", "mask", [[0, 0], [2, 1]], mask=PICTURE)),
            "has a 'mask' that does not fit its points",
        ),
        (with_shape(shape("car", "mask", [[7, 0], [8, 1]], mask=PICTURE)), "or that extends beyond the image"),
    ],
)
def test_faulty_image_stops_or_is_skipped(source: Source, damage: Any, message: str) -> None:
    damage(source)
    with pytest.raises(UserError, match=r"^Image 'a\.png' of '.*labels': .*" + message):
        source.convert()
    report = source.convert(on_error="skip-image")
    assert (report.examples, len(report.skipped)) == (1, 1)
    assert [example["image_id"] for example in source.examples()] == [b"b.png"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not a JSON file"),
        ("[]", "has no list 'shapes', so it is not a JSON of labelme; move it to another folder"),
    ],
)
def test_foreign_json_is_named(source: Source, text: str, message: str) -> None:
    (source.root / "z.json").write_text(text)
    with pytest.raises(UserError, match=r"Image 'z' of '.*labels': .*z\.json' " + message):
        source.convert()


def test_a_folder_without_json_is_named(source: Source) -> None:
    for path in source.root.glob("*.json"):
        path.unlink()
    with pytest.raises(UserError, match=r"labels' has no JSON of labelme; give the folder in which labelme saves"):
        source.convert()


def test_no_image_path_is_named(source: Source) -> None:
    source.write("a", SHAPES, imagePath=None)
    (source.root / "a.png").unlink()
    with pytest.raises(UserError, match=r"a\.json' has no 'imagePath', and no image of its name is beside it; save it"):
        source.convert()


def test_command(source: Source, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--root", source.root, "--output-dir", source.folder / "records", "--stuff", "road", "--split", "val"]
    assert main([str(word) for word in ("convert", "labelme", *arguments, "--overlap", "later-on-top")]) == 0
    assert "Split 'val': 2 images, 0 skipped." in capsys.readouterr().out
    assert main([str(word) for word in ("convert", "labelme", *arguments, "--stuff", "roads")]) == 2
    assert "Unknown class in the list of stuff 'roads'. Did you mean 'road'?" in capsys.readouterr().err
