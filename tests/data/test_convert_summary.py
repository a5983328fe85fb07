"""What `convert` prints at its end."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from deeplab2_like.cli import main
from deeplab2_like.data.convert.common import ConversionReport
from deeplab2_like.data.convert.losses import CROWD
from deeplab2_like.data.convert.summary import print_summary
from deeplab2_like.data.dataset_info import DatasetInfo

LONG = "a very long name of a class that takes more than the width of a terminal, " + "q" * 90
NAMES = ("road", "車\u200bn", "[red]car[/red] :car:", LONG, "nothing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    categories = [{"id": number, "name": name, "isthing": number % 2} for number, name in enumerate(NAMES)]
    DatasetInfo.from_coco_categories(categories, name="x").save(tmp_path)
    return tmp_path


def printed(
    folder: Path,
    *reports: ConversionReport,
    encoding: str = "utf-8",
    width: int = 80,
    options: tuple[str, ...] = (),
) -> list[str]:
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding=encoding, write_through=True) as file:
        print_summary(reports, folder, options=options, console=Console(file=file, width=width))
        return content.getvalue().decode(encoding).splitlines()


def test_the_table_counts_objects_and_pixels(folder: Path) -> None:
    train = ConversionReport("train", 3, ("a is bad", "b is bad"), (0, 12, 0, 123_456_789, 0), (1, 4994, 0, 5, 0, 5000))
    val = ConversionReport("val", 1, (), (0, 0, 0, 0, 0), (1, 1, 0, 0, 0, 0), is_unchanged=True)
    lines = printed(folder, train, val)
    assert lines[:6] == [
        "Split 'train': 3 images, 2 skipped.",
        "  skipped: a is bad",
        "  skipped: b is bad",
        "Split 'val': 1 image, 0 skipped. It already exists with the same files and options: nothing was done.",
        f"Records are in {folder}",
        "",
    ]
    # Of 10000 pixels half are void; one is not nothing.
    assert lines[6] == "train: 50.0% of the pixels are void"
    rows = [line.split() for line in lines]
    assert ["road", "stuff", "<0.1%"] in rows
    assert ["車\\u200bn", "thing", "12", "49.9%"] in rows
    assert "Without pixels: [red]car[/red] :car: (stuff); nothing (stuff)" in lines
    assert "val: 0.0% of the pixels are void" in lines
    assert ["road", "stuff", "50.0%"] in rows


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_the_table_stays_whole(folder: Path, encoding: str) -> None:
    number = 123_456_789_012
    report = ConversionReport("train", 1, (), (0, number, 0, number, 0), (5, 1, 1, 1, 1, 1))
    lines = printed(folder, report, encoding=encoding)
    start = lines.index("train: 10.0% of the pixels are void")
    table = lines[start:]
    assert max(map(len, table)) <= 80
    assert not any("…" in line or "..." in line for line in table)
    assert sum(str(number) in line and "10.0%" in line for line in table) == 2
    # All letters of the long name are there, in several lines.
    assert sum(line.count("q") for line in table) == LONG.count("q")
    assert any(("車" if encoding == "utf-8" else "\\u8eca") in line for line in table)


def test_a_missing_background_is_one_warning_for_all_splits(tmp_path: Path) -> None:
    DatasetInfo.from_coco_categories([{"id": 1, "name": "car", "isthing": 1}], name="x").save(tmp_path)
    # Void are 3 of 4 and 1 of 4 pixels: half of them.
    reports = [ConversionReport(split, 1, (), (1,), pixels) for split, pixels in (("train", (1, 3)), ("val", (3, 1)))]
    text = "no class is stuff, so 50.0% of the pixels are void, and a model does not learn where nothing is"
    assert [line for line in printed(tmp_path, *reports) if "Warning" in line] == [f"Warning: {text}."]
    lines = printed(tmp_path, *reports, options=("background", "stuff"))
    advice = "name a class for them with --background, or classes that are stuff with --stuff"
    assert [line for line in lines if "Warning" in line] == [f"Warning: {text}; {advice}."]


def test_crowds_alone_are_advised_only_with_an_option_of_the_source(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": "car", "isthing": 1}, {"id": 2, "name": "road", "isthing": 0}]
    DatasetInfo.from_coco_categories(categories, name="x").save(tmp_path)
    report = ConversionReport("train", 1, (), (0, 0), (2, 2, 0), {CROWD: {"car": (1, 2)}})
    text = "Warning: all objects of car are crowd regions, from which a model learns no object"
    assert f"{text}." in printed(tmp_path, report)
    lines = printed(tmp_path, report, options=("crowds_are_objects",))
    assert f"{text}; --crowds-are-objects makes them objects." in lines


def test_a_terminal_without_the_letters_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(content, encoding="ascii", write_through=True))
    size = ["--train", "1", "--val", "0", "--size", "32x64", "--check"]
    assert main(["convert", "scenes", *size, "--output-dir", str(tmp_path / "車")]) == 0
    assert b"Records are in " + str(tmp_path / "車").encode("ascii", "backslashreplace") in content.getvalue()
