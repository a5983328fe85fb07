"""Names and tables on terminals and in pipes."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from rich.table import Table

from deeplab2_like.cli.main import main
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.evaluation.report import print_table
from deeplab2_like.lenient_output import PrintableOutput, unescaped
from deeplab2_like.printing import counted, name_text, print_line, print_whole_table, printable

# A code that clears a terminal, and one that makes text red.
EVIL = "road\x1b[2J\x1b[31m\x07\x9b1m"


@pytest.mark.parametrize(
    ("text", "encoding", "expected"),
    [
        ("Straße\nAuto", "utf-8", "Straße\nAuto"),
        ("Straße 車", "latin-1", r"Straße \u8eca"),
        ("Straße", "ascii", r"Stra\xdfe"),
        (EVIL, "utf-8", r"road\x1b[2J\x1b[31m\x07\x9b1m"),
        ("\u202ecar", "utf-8", r"\u202ecar"),  # Would turn the letters around.
    ],
)
def test_letters_that_are_escaped(text: str, encoding: str, expected: str) -> None:
    assert printable(text, encoding) == expected


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_no_code_of_a_name_reaches_the_terminal(encoding: str) -> None:
    content = io.BytesIO()
    with io.TextIOWrapper(content, encoding=encoding, write_through=True) as file:
        console = Console(file=file, width=80)
        quality = {"pq": 1.0, "sq": 1.0, "rq": 1.0, "tp": 1, "fp": 1, "fn": 1}
        groups = dict.fromkeys(("all", "things", "stuff"), quality)
        metrics = {
            "panoptic": {**groups, "per_class": {EVIL: quality, "車": quality}},
            "semantic": {"miou": 1.0, "fwiou": 1.0, "per_class": {}, "not_predicted": [EVIL]},
            "instance": {"mask_ap": 1.0, "ground_truth": EVIL},
        }
        print_table(metrics, title=EVIL, console=console)
        print_line(EVIL, console)
        print(EVIL, file=PrintableOutput(file))
        assert b"\x1b" not in content.getvalue()
        assert content.getvalue().count(rb"road\x1b[2J\x1b[31m\x07\x9b1m") == 6


@pytest.mark.parametrize("width", [20, 80])
def test_a_table_is_wider_than_the_terminal_rather_than_broken(width: int) -> None:
    output = io.StringIO()
    console = Console(file=output, width=width)
    table = Table("class", "pixels")
    name = "a name of many words " * 6
    table.add_row(name_text(name + "\nand another line", console), "123,456,789,012")
    print_whole_table(table, console)
    assert sum(name.strip() in line and "123,456,789,012" in line for line in output.getvalue().splitlines()) == 1


def test_colors_of_rich_reach_the_terminal_but_not_those_of_names(monkeypatch: pytest.MonkeyPatch) -> None:
    output = io.StringIO()
    monkeypatch.setattr(sys, "stdout", PrintableOutput(output))
    Console(force_terminal=True, color_system="standard").print("[red]red[/red]")
    print("name\x1b[31m", "line\nline")
    print("\x1b[0m", file=unescaped(sys.stdout))
    assert output.getvalue() == "\x1b[31mred\x1b[0m\nname\\x1b[31m line\nline\n\x1b[0m\n"


def test_no_code_in_an_argument_or_a_config_reaches_the_terminal(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    config = tmp_path / "mine.yaml"
    config.write_text('base: panoptic_deeplab/scenes_tiny\n"\\e[31m\\u202e": 1\n', encoding="utf-8")
    for arguments in (
        ["configs", str(config)],
        ["configs", f"name{EVIL}"],
        ["configs", f"name{EVIL}.yaml"],
        ["configs", "panoptic_deeplab/scenes_tiny", "--set", f"data.{EVIL}=1"],
        ["describe", "--config", "x", "--size", EVIL],
        ["describe", "--config", "x", EVIL],
        ["configs", "panoptic_deeplab/scenes_tiny", "--set", "trainer.steps=1", '"data.path=\\e[31m"', "data.x=1"],
    ):
        assert main(arguments) == 2
        output = "".join(capfd.readouterr())
        assert output.replace("\n", "").isprintable()
        assert "Traceback" not in output


def test_names_that_are_too_long_for_a_file(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["configs", "x" * 5000 + ".yaml"]) == 2
    assert capfd.readouterr().err == (
        f"deeplab2-like: the name '{'x' * 97} ... {'x' * 93}.yaml' is too long for a file; give a shorter one.\n"
    )


def test_commands_print_in_any_encoding(tmp_path: Path) -> None:
    categories = [{"id": 1, "name": f"Straße 車 {EVIL}", "isthing": 0}]
    DatasetInfo.from_coco_categories(categories, name="x").save(tmp_path)
    command = [sys.executable, "-m", "deeplab2_like", "inspect", str(tmp_path / EVIL), "--output-dir", "out"]
    environment = {"PYTHONIOENCODING": "ascii:strict", "PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(command, capture_output=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert b"Traceback" not in done.stderr
    assert b"\x1b" not in done.stderr


def test_a_command_goes_on_when_nobody_reads_its_output(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "deeplab2_like", "convert", "scenes", "--size=32x32", "--train=1", "--val=0"]
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as stream:
        environment = {**os.environ, "PYTHONPATH": ":".join(sys.path)}
        done = subprocess.run(
            [*command, "--output-dir", str(tmp_path / "records")],
            stdout=stream,
            stderr=subprocess.PIPE,
            env=environment,
            check=False,
        )
    assert (done.returncode, done.stderr) == (0, b"")
    assert (tmp_path / "records" / "dataset_info.json").is_file()


def test_a_noun_has_the_number_of_its_count() -> None:
    assert [counted(number, "image") for number in (0, 1, 2)] == ["0 images", "1 image", "2 images"]
