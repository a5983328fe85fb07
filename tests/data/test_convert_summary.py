"""What `convert` prints at its end."""

import io
from pathlib import Path

import pytest
from rich.console import Console

from deeplab2_like.cli import main
from deeplab2_like.data.convert.common import ConversionReport
from deeplab2_like.data.convert.summary import print_summary
from deeplab2_like.data.dataset_info import DatasetInfo

LONG = "a very long name of a class that takes more than the width of a terminal, " + "q" * 90
NAMES = ("road", "車\u200bn", "[red]car[/red] :car:", LONG, "nothing")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    categories = [{"id": number, "name": name, "isthing": number % 2} for number, name in enumerate(NAMES)]
    DatasetInfo.from_coco_categories(categories, name="x").save(tmp_path)
    return tmp_path


def printed(folder: Path, *reports: ConversionReport, encoding: str = "utf-8", width: int = 80) -> list[str]:
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding=encoding, write_through=True) as file:
        print_summary(reports, folder, console=Console(file=file, width=width))
        return content.getvalue().decode(encoding).splitlines()


def test_the_table_counts_objects_and_pixels(folder: Path) -> None:
    train = ConversionReport("train", 3, ("a is bad", "b is bad"), (0, 12, 0, 123_456_789, 0), (1, 4994, 0, 5, 0, 5000))
    val = ConversionReport("val", 1, (), (0, 0, 0, 0, 0), (1, 1, 0, 0, 0, 0), is_unchanged=True)
    lines = printed(folder, train, val)
    assert lines[:6] == [
        "Split 'train': 3 examples, 2 skipped.",
        "  skipped: a is bad",
        "  skipped: b is bad",
        "Split 'val': 1 examples, 0 skipped. It already exists with the same files and options: nothing was done.",
        f"Records are in {folder}",
        "",
    ]
    # Of 10000 pixels half are void; one is not nothing.
    assert lines[6] == "train: 3 images, 2 skipped, 50.0% of the pixels void"
    rows = [line.split() for line in lines]
    assert ["road", "stuff", "<0.1%"] in rows
    assert ["車\\u200bn", "thing", "12", "49.9%"] in rows
    assert "Without pixels: [red]car[/red] :car: (stuff); nothing (stuff)" in lines
    assert "val: 1 images, 0.0% of the pixels void" in lines
    assert ["road", "stuff", "50.0%"] in rows


@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_the_table_stays_whole(folder: Path, encoding: str) -> None:
    number = 123_456_789_012
    report = ConversionReport("train", 1, (), (0, number, 0, number, 0), (5, 1, 1, 1, 1, 1))
    lines = printed(folder, report, encoding=encoding)
    start = lines.index("train: 1 images, 10.0% of the pixels void")
    table = lines[start:]
    assert max(map(len, table)) <= 80
    assert not any("…" in line or "..." in line for line in table)
    assert sum(str(number) in line and "10.0%" in line for line in table) == 2
    # All letters of the long name are there, in several lines.
    assert sum(line.count("q") for line in table) == LONG.count("q")
    assert any(("車" if encoding == "utf-8" else "\\u8eca") in line for line in table)


def test_a_terminal_without_the_letters_of_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(content, encoding="ascii", write_through=True))
    size = ["--train", "1", "--val", "0", "--size", "32x64", "--check"]
    assert main(["convert", "scenes", *size, "--output-dir", str(tmp_path / "車")]) == 0
    assert b"Records are in " + str(tmp_path / "車").encode("ascii", "backslashreplace") in content.getvalue()
