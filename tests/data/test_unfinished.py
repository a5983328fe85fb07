"""Conversions that are killed, run twice, run out of space, or meet what another one has left."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from kills import killed_at_the_end

from deeplab2_like.data.convert import common, unfinished
from deeplab2_like.data.convert.scenes import convert_scenes
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.scenes import scenes_info
from deeplab2_like.data.shards import ShardWriter, count_examples, list_shards, read_index, shard_names
from deeplab2_like.errors import UserError
from deeplab2_like.temporary import TemporaryFile

INFO = DatasetInfo.from_coco_categories([{"id": 1, "name": "thing", "isthing": 1}], name="made up")
COUNT, SHARDS = 7, 3


class Conversion:
    """A conversion of text files to records; counts what it makes."""

    def __init__(self, folder: Path, count: int = COUNT) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.inputs = [folder / f"{number}.txt" for number in range(count)]
        for number, path in enumerate(self.inputs):
            path.write_text(f"contents {number}")
        self.made: list[str] = []

    def make_record(self, path: Path) -> common.Record:
        self.made.append(path.stem)
        content = path.read_bytes()
        if b"bad" in content:
            raise UserError(f"'{path.name}' is bad.")
        return common.Record(content)

    def run(self, output_dir: Path, **changes: Any) -> common.ConversionReport:
        self.made.clear()
        arguments: dict[str, Any] = {"info": INFO, "split": "train", "shards": SHARDS, "inputs_of": lambda path: [path]}
        return common.write_split(self.inputs, self.make_record, output_dir=output_dir, **(arguments | changes))


@pytest.fixture
def conversion(tmp_path: Path) -> Conversion:
    return Conversion(tmp_path / "inputs")


def contents(folder: Path) -> dict[str, bytes]:
    """All files below a folder, by name."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@contextlib.contextmanager
def before_each_change(action: Callable[[str], None]) -> Iterator[None]:
    """Calls `action` with the operation's name before anything changes in the file system."""
    with pytest.MonkeyPatch.context() as patch:

        def watch(owner: Any, name: str) -> None:
            original = getattr(owner, name)

            def watched(*arguments: Any, **options: Any) -> Any:
                action(name)
                return original(*arguments, **options)

            patch.setattr(owner, name, watched)

        for name in ("replace", "unlink", "rmdir"):
            watch(os, name)
        watch(TemporaryFile, "publish")
        watch(tf.io.TFRecordWriter, "write")
        yield


def test_killed_at_any_moment_it_ends_the_same(conversion: Conversion, tmp_path: Path) -> None:
    conversion.run(tmp_path / "straight")
    straight = contents(tmp_path / "straight")
    # An earlier conversion of more files is there, which must not mix with the new one.
    old = Conversion(tmp_path / "old", count=9)
    old.run(tmp_path / "killed", shards=4)

    moments: list[Path] = []

    def copy(_: str) -> None:
        moments.append(tmp_path / f"moment_{len(moments)}")
        shutil.copytree(tmp_path / "killed", moments[-1])

    with before_each_change(copy):
        conversion.run(tmp_path / "killed")
    # Seven records, three files and their JSONs, a plan, three moves, the facts, ...
    assert len(moments) > 25
    for moment in moments:
        with contextlib.suppress(UserError):
            # What is there meanwhile is of one conversion, or is refused.
            assert count_examples(list_shards(moment, "train")) in (9, COUNT)
        hidden = moment / ".train.conversion"
        record = moment / ".train.conversion.json"
        is_finished = record.exists() and json.loads(record.read_bytes())["plan"]["examples"] == COUNT
        # Files hold the inputs 0 and 1, 2 and 3, 4 to 6.
        expected = []
        for name, inputs in zip(shard_names("train", SHARDS), ("01", "23", "456"), strict=True):
            if not is_finished and not ((hidden / f"{name}.json").exists() and (hidden / "plan.json").exists()):
                expected += list(inputs)
        report = conversion.run(moment)
        assert (conversion.made, report.is_unchanged) == (expected, is_finished)
        assert contents(moment) == straight
        assert not hidden.exists()


def kill_before_each_change(inputs: Path, folder: Path, moments: Path) -> None:
    """Converts `inputs` into copies of `folder`, each time in a process that is killed a change later."""
    conversion = Conversion(inputs)
    for moment in itertools.count():
        copy = moments / f"{moment:03d}"
        shutil.copytree(folder, copy)
        if process := os.fork():
            if os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) != -signal.SIGKILL:
                break
            continue
        num_changes = itertools.count()

        def count_changes(event: str, arguments: tuple[Any, ...]) -> None:
            is_writing = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            is_change = is_writing or event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir")
            if is_change and next(num_changes) == moment:  # noqa: B023 (this process has one moment)
                os.kill(os.getpid(), signal.SIGKILL)

        sys.addaudithook(count_changes)
        conversion.run(copy, source=[inputs], replace=True)
        os._exit(0)


def test_killed_while_it_replaces_another_source(conversion: Conversion, tmp_path: Path) -> None:
    inputs = conversion.inputs[0].parent
    old = Conversion(tmp_path / "old", count=9)
    old_options = {"source": [tmp_path / "old"], "shards": 4}
    old.run(tmp_path / "records", **old_options)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    arguments = [inputs, tmp_path / "records", tmp_path / "moments"]
    subprocess.run([sys.executable, __file__, *map(str, arguments)], env=environment, check=True)
    conversion.run(tmp_path / "straight", source=[inputs])
    straight = contents(tmp_path / "straight")

    *moments, last = sorted((tmp_path / "moments").iterdir())
    assert contents(last) == straight
    # A plan, three files and their notes, four moves out of the folder, three into it, the facts, ...
    assert len(moments) > 30
    found = set()
    for moment in moments:
        is_published = (moment / ".train.conversion" / "publish.json").exists()
        try:
            counts = count_examples(list_shards(moment, "train"))
        except UserError:
            counts = None
            assert is_published  # All new files are there, and wait for the next run.
        found.add(counts)
        again = shutil.copytree(moment, tmp_path / "again" / moment.name)
        conversion.run(moment, source=[inputs], replace=True)
        assert contents(moment) == straight
        # The run of the old source neither replaces the new one, nor removes what is unfinished of it.
        with contextlib.suppress(UserError):
            assert old.run(again, **old_options).is_unchanged
        is_new = is_published or counts == COUNT
        assert count_examples(list_shards(again, "train")) == (COUNT if is_new else 9)
        assert not (again / ".train.conversion" / "publish.json").exists()
    assert found == {9, None, COUNT}


def test_another_source_does_not_replace_a_split(conversion: Conversion, tmp_path: Path) -> None:
    folder, first, second = tmp_path / "records", tmp_path / "inputs", tmp_path / "other.json"
    conversion.run(folder, source=[first])
    before = contents(folder)
    other = Conversion(tmp_path / "other", count=2)
    message = (
        rf"^Split 'train' in '{folder}' was made from '{first}', not from '{second}'; name another split with --split "
        r"or another folder with --output-dir, or replace it with --replace\.$"
    )
    with pytest.raises(UserError, match=message):
        other.run(folder, source=[second])
    assert contents(folder) == before
    # The same source, by another name and with other contents and options, replaces it.
    (tmp_path / "link").symlink_to(first)
    conversion.inputs[0].write_text("other")
    assert conversion.run(folder, source=[tmp_path / "link"], shards=2).examples == COUNT
    # Neither does a faulty one that may.
    before = contents(folder)
    other.inputs[1].write_text("bad")
    with pytest.raises(UserError, match="is bad"):
        other.run(folder, source=[second], shards=1, replace=True)
    assert contents(folder) == before
    other.inputs[1].write_text("good")
    assert other.run(folder, source=[second], replace=True).examples == 2
    assert count_examples(list_shards(folder, "train")) == 2
    with pytest.raises(UserError, match=rf"was made from '{second}', not by `convert scenes`; name"):
        conversion.run(folder)


def test_records_of_unknown_origin_are_not_replaced(conversion: Conversion, tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "train-00000-of-00001.tfrecord") as writer:
        writer.write(b"precious")
    before = contents(tmp_path)
    with pytest.raises(
        UserError, match=r"was made from an unknown source \(by another program, or by an older version\)"
    ):
        conversion.run(tmp_path, source=[tmp_path / "inputs"])
    assert contents(tmp_path) == before
    assert conversion.run(tmp_path, source=[tmp_path / "inputs"], replace=True).examples == COUNT
    assert not (tmp_path / "train-00000-of-00001.tfrecord").exists()


def test_another_source_does_not_remove_an_interrupted_conversion(conversion: Conversion, tmp_path: Path) -> None:
    folder = tmp_path / "records"
    conversion.inputs[6].write_text("bad")
    with pytest.raises(UserError, match="is bad"):
        conversion.run(folder, source=[tmp_path / "inputs"])
    before = contents(folder)
    other = Conversion(tmp_path / "other")
    message = rf"^An interrupted conversion of split 'train' in '{folder}' is from '.*inputs', not from '.*other'; name"
    with pytest.raises(UserError, match=message):
        other.run(folder, source=[tmp_path / "other"])
    assert contents(folder) == before
    assert other.run(folder, source=[tmp_path / "other"], replace=True).kept_files == 0
    assert not (folder / ".train.conversion").exists()


def test_a_split_is_not_put_beside_others_of_other_classes(
    conversion: Conversion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(unfinished.UnfinishedSplit, "_move_into_place", stop)
        with pytest.raises(KeyboardInterrupt):
            conversion.run(tmp_path)
    other = INFO.from_coco_categories(INFO.to_coco_categories(), name="x", label_divisor=5000)
    conversion.run(tmp_path, split="val", info=other)
    with pytest.raises(UserError, match=r"does not match the splits made since \(val\): .*label_divisor 1000 differ"):
        conversion.run(tmp_path)
    assert DatasetInfo.load(tmp_path) == other


def test_an_interrupted_conversion_of_other_classes_is_not_shut_out(conversion: Conversion, tmp_path: Path) -> None:
    conversion.inputs[6].write_text("bad")
    with pytest.raises(UserError, match="is bad"):
        conversion.run(tmp_path)
    other = INFO.from_coco_categories([{"id": 1, "name": "other", "isthing": 1}], name="x")
    message = r"interrupted conversion of split 'train' with other categories \(id 1 'thing' there, id 1 'other' here\)"
    with pytest.raises(UserError, match=message):
        common.agree_on_dataset_info(other, output_dir=tmp_path, split="val", max_instances=0)
    with pytest.raises(UserError, match=r"'train' with label_divisor 1000, but split 'val' needs 5000"):
        common.agree_on_dataset_info(INFO, output_dir=tmp_path, split="val", max_instances=0, label_divisor=5000)
    assert common.agree_on_dataset_info(INFO, output_dir=tmp_path, split="val", max_instances=0) == INFO


def test_all_splits_are_checked_before_the_first_is_written(conversion: Conversion, tmp_path: Path) -> None:
    conversion.run(tmp_path / "records", split="val", source=[tmp_path / "inputs"], info=scenes_info())
    before = contents(tmp_path / "records")
    with pytest.raises(UserError, match=r"Split 'val' in '.*' was made from '.*inputs', not by `convert scenes`"):
        convert_scenes(train=2, val=1, size=(32, 32), output_dir=tmp_path / "records")
    assert contents(tmp_path / "records") == before


def test_two_conversions_at_once_do_not_meet(conversion: Conversion, tmp_path: Path) -> None:
    second = Conversion(tmp_path / "second")
    message = rf"^Split 'train' in '{tmp_path / 'records'}' is being converted by another process; wait until it has"
    refused = []

    def convert_again(done: int, total: int) -> None:
        for options in ({}, {"replace": True}):
            with pytest.raises(UserError, match=message):
                second.run(tmp_path / "records", **options)
            refused.append(done)
        second.run(tmp_path / "records", split="val")  # Another split is none of its business.

    report = conversion.run(tmp_path / "records", progress=convert_again)
    assert (report.examples, len(refused)) == (COUNT, 2 * COUNT)
    assert not list((tmp_path / "records").glob("*.lock"))
    assert not list((tmp_path / "records").glob(".*.lock"))
    # A killed process leaves an unlocked file.
    (tmp_path / "records" / ".train.conversion.lock").touch()
    assert conversion.run(tmp_path / "records").is_unchanged
    assert not (tmp_path / "records" / ".train.conversion.lock").exists()


def test_what_is_finished_is_not_made_again(conversion: Conversion, tmp_path: Path) -> None:
    conversion.run(tmp_path / "straight")
    conversion.inputs[4].write_text("bad")
    with pytest.raises(UserError, match=r"'4\.txt' is bad"):
        conversion.run(tmp_path / "records")
    # The folder shows nothing of it.
    assert [path for path in (tmp_path / "records").iterdir() if not path.name.startswith(".")] == []
    calls = []
    conversion.inputs[4].write_text("contents 4")
    report = conversion.run(tmp_path / "records", progress=lambda done, total: calls.append((done, total)))
    assert conversion.made == ["4", "5", "6"]
    assert (report.kept_files, report.files, report.is_unchanged) == (2, 3, False)
    assert calls == [(5, 7), (6, 7), (7, 7)]
    for name in shard_names("train", SHARDS):
        assert (tmp_path / "records" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_changed_inputs_are_made_again(conversion: Conversion, tmp_path: Path) -> None:
    conversion.inputs[4].write_text("bad")
    with pytest.raises(UserError):
        conversion.run(tmp_path)
    conversion.inputs[4].write_text("good")
    conversion.inputs[0].write_text("other")
    assert conversion.run(tmp_path).kept_files == 1
    assert conversion.made == ["0", "1", "4", "5", "6"]


def test_a_second_run_does_nothing(conversion: Conversion, tmp_path: Path) -> None:
    first = conversion.run(tmp_path)
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    second = conversion.run(tmp_path, workers=2)
    assert (first.is_unchanged, second.is_unchanged, second.examples, conversion.made) == (False, True, COUNT, [])
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == times


@pytest.mark.parametrize(
    "change",
    [
        lambda conversion, folder: conversion.inputs[6].write_text("other"),
        lambda conversion, folder: (folder / "train-00001-of-00003.tfrecord").unlink(),
        lambda conversion, folder: (folder / "train-00001-of-00003.tfrecord").write_bytes(b""),
    ],
)
def test_a_second_run_converts_what_has_changed(
    conversion: Conversion, tmp_path: Path, change: Callable[[Conversion, Path], None]
) -> None:
    conversion.run(tmp_path / "records")
    change(conversion, tmp_path / "records")
    assert not conversion.run(tmp_path / "records").is_unchanged
    conversion.run(tmp_path / "straight")
    assert contents(tmp_path / "records") == contents(tmp_path / "straight")


def test_a_file_cut_between_records_is_noticed(conversion: Conversion, tmp_path: Path) -> None:
    conversion.run(tmp_path)
    (first, *_) = paths = list_shards(tmp_path, "train")
    index = read_index([first])
    assert len(index) == 2
    with open(first, "r+b") as file:
        file.truncate(int(index.offsets[1]))
    with pytest.raises(UserError, match=r"train-00000-of-00003\.tfrecord' holds 1 of the 2 records that the"):
        count_examples(paths)
    conversion.run(tmp_path)
    assert count_examples(paths) == COUNT


@pytest.mark.parametrize("content", [b"{}", b"[1, 2]", b'{"plan": {}, "files": 3}', b"\xff"])
def test_a_damaged_note_of_an_earlier_run_is_ignored(conversion: Conversion, tmp_path: Path, content: bytes) -> None:
    conversion.run(tmp_path)
    (tmp_path / ".train.conversion.json").write_bytes(content)
    assert count_examples(list_shards(tmp_path, "train")) == COUNT
    # What the split was made from is not known any more.
    with pytest.raises(UserError, match=r"was made from an unknown source"):
        conversion.run(tmp_path)
    assert not conversion.run(tmp_path, replace=True).is_unchanged
    assert conversion.run(tmp_path).is_unchanged


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": 2}, r"shards 3 \(now 2\)"),
        ({"options": {"size": [4, 5]}}, r"size None \(now \[4, 5\]\)"),
        ({"info": INFO.from_coco_categories(INFO.to_coco_categories(), name="x", label_divisor=5000)}, "label_divisor"),
        (
            {"info": INFO.from_coco_categories([{"id": 2, "name": "stuff", "isthing": 0}], name="x")},
            "other categories",
        ),
    ],
)
def test_another_interrupted_conversion_is_refused(
    conversion: Conversion, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    conversion.inputs[6].write_text("bad")
    with pytest.raises(UserError, match="is bad"):
        conversion.run(tmp_path)
    before = contents(tmp_path)
    expected = (
        rf"'{tmp_path / '.train.conversion'}' holds an interrupted conversion with {message}.*start over with --replace"
    )
    with pytest.raises(UserError, match=expected):
        conversion.run(tmp_path, **changes)
    assert contents(tmp_path) == before
    conversion.inputs[6].write_text("good")
    assert conversion.run(tmp_path, **changes, replace=True).kept_files == 0
    assert not (tmp_path / ".train.conversion").exists()


def test_what_another_version_has_begun_is_begun_anew(conversion: Conversion, tmp_path: Path) -> None:
    conversion.inputs[6].write_text("bad")
    with pytest.raises(UserError, match="is bad"):
        conversion.run(tmp_path)
    plan = tmp_path / ".train.conversion" / "plan.json"
    plan.write_text(json.dumps({**json.loads(plan.read_bytes()), "format": 1}))
    conversion.inputs[6].write_text("good")
    report = conversion.run(tmp_path)
    assert (len(conversion.made), report.kept_files) == (COUNT, 0)


def test_skipped_examples_are_reported_by_split(conversion: Conversion, tmp_path: Path) -> None:
    for number in (0, 5):
        conversion.inputs[number].write_text("bad")
    for split in ("train", "val"):
        report = conversion.run(tmp_path, split=split, on_error="skip")
        assert report == common.ConversionReport(split, 5, ("'0.txt' is bad.", "'5.txt' is bad."))
    lines = [json.loads(line) for line in (tmp_path / "errors.jsonl").read_text().splitlines()]
    assert lines == [
        {"split": split, "file": str(conversion.inputs[number]), "reason": f"'{number}.txt' is bad."}
        for split in ("train", "val")
        for number in (0, 5)
    ]
    # A run that stops at faults does not take what was made by leaving them out.
    with pytest.raises(UserError, match=r"'0\.txt' is bad"):
        conversion.run(tmp_path)
    for number in (0, 5):
        conversion.inputs[number].write_text("good")
    conversion.run(tmp_path)
    assert [json.loads(line)["split"] for line in (tmp_path / "errors.jsonl").read_text().splitlines()] == ["val"] * 2
    conversion.run(tmp_path, split="val")
    assert not (tmp_path / "errors.jsonl").exists()


def test_faults_of_finished_files_are_reported_after_a_kill(conversion: Conversion, tmp_path: Path) -> None:
    conversion.inputs[0].write_text("bad")
    original = conversion.make_record

    def stopped(path: Path) -> common.Record:
        if path.stem == "5":
            raise KeyboardInterrupt
        return original(path)

    conversion.make_record = stopped  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        conversion.run(tmp_path, on_error="skip")
    conversion.make_record = original  # type: ignore[method-assign]
    report = conversion.run(tmp_path, on_error="skip")
    assert (report.kept_files, report.skipped, conversion.made) == (2, ("'0.txt' is bad.",), ["4", "5", "6"])
    assert json.loads((tmp_path / "errors.jsonl").read_text())["file"] == str(conversion.inputs[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shards": -1}, r"^The number of shards must be 1\.\.99999, got -1\.$"),
        ({"split": "a" * 300}, r"up to 100 characters, but 'a{20}\.\.\.' has 300"),
    ],
)
def test_wrong_arguments_are_refused_first(
    conversion: Conversion, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        conversion.run(tmp_path / "records", **changes)
    assert not (tmp_path / "records").exists()


def test_without_inputs_every_run_begins_anew(conversion: Conversion, tmp_path: Path) -> None:
    for _ in range(2):
        assert not conversion.run(tmp_path, inputs_of=None).is_unchanged
        assert len(conversion.made) == COUNT
    assert count_examples(list_shards(tmp_path, "train")) == COUNT
    # What the split was made from.
    assert list(tmp_path.glob(".*")) == [tmp_path / ".train.conversion.json"]


def test_full_disk_leaves_no_broken_file(conversion: Conversion, tmp_path: Path) -> None:
    conversion.run(tmp_path / "straight")
    straight = contents(tmp_path / "straight")
    changes: list[str] = []
    with before_each_change(changes.append):
        conversion.run(tmp_path / "counted")
    fails = [number for number, name in enumerate(changes) if name in ("replace", "write", "publish")]
    assert len(fails) > 20
    for failing in fails:
        folder = tmp_path / f"full_{failing}"
        count = iter(range(len(changes) + 100))

        def full(_: str, count: Iterator[int] = count, failing: int = failing) -> None:
            if next(count) == failing:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        with before_each_change(full), pytest.raises(UserError, match=r"^Cannot write .*No space left on device"):
            conversion.run(folder)
        for name, content in contents(folder).items() if folder.exists() else ():
            # Whatever has its name is what it should be.
            if name in straight:
                assert content == straight[name]
        conversion.run(folder)
        assert contents(folder) == straight


def test_a_killed_process(tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        size = ["--train", "24", "--val", "0", "--size", "64x128", "--shards", "12", "--workers", "1"]
        return [sys.executable, "-m", "deeplab2_like", "convert", "scenes", *size, "--output-dir", str(folder)]

    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    process = subprocess.Popen(command(tmp_path / "killed"), stdout=subprocess.PIPE, env=environment)
    hidden = tmp_path / "killed" / ".train.conversion"
    deadline = time.monotonic() + 120
    while len(list(hidden.glob("*.tfrecord.json"))) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    delay = random.Random(time.time_ns()).uniform(0, 0.1)
    print(f"killed {delay:.3f} s after the third file")
    time.sleep(delay)
    process.kill()
    process.communicate()
    was_finished = {path: path.stat().st_mtime_ns for path in hidden.glob("*.tfrecord")}

    from deeplab2_like.cli import main

    for name in ("killed", "straight"):
        assert main(command(tmp_path / name)[3:]) == 0
    assert contents(tmp_path / "killed") == contents(tmp_path / "straight")
    if process.returncode == -signal.SIGKILL and was_finished:
        kept = [
            path for path in was_finished if (tmp_path / "killed" / path.name).stat().st_mtime_ns == was_finished[path]
        ]
        assert len(kept) >= 3


def test_what_killed_processes_have_left_is_removed(conversion: Conversion, tmp_path: Path) -> None:
    conversion.run(tmp_path / "straight")
    folder = tmp_path / "records"
    folder.mkdir()

    def write() -> None:
        for name in ("dataset_info.json", ".train.conversion.json", "errors.jsonl"):
            TemporaryFile(folder / name)

    killed_at_the_end(write)
    assert len(list(folder.iterdir())) == 3
    with TemporaryFile(folder / "dataset_info.json") as in_use:
        conversion.run(folder)
        assert in_use.path.exists()
    assert contents(folder) == contents(tmp_path / "straight")


def test_fingerprint_sees_names_that_are_no_names(tmp_path: Path) -> None:
    conversion = Conversion(tmp_path / "inputs")
    names = [np.str_("a\0b"), "\udcff"]
    report = conversion.run(tmp_path / "records", inputs_of=lambda path: [Path(name) for name in names])
    assert report.examples == COUNT


if __name__ == "__main__":
    kill_before_each_change(*map(Path, sys.argv[1:]))
