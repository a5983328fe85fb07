"""Evaluates the checkpoints of a model folder: metrics, pictures and submissions, once or while a training runs."""

import contextlib
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import tensorflow as tf

from deeplab2_like.checkpoint import restore_system
from deeplab2_like.checkpoint_files import checkpoint_step, find_checkpoint, list_checkpoints, save_if_best
from deeplab2_like.configs import Config, load_config
from deeplab2_like.data import pipeline
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.images import (
    IMAGE_SUFFIXES,
    describe_bit_depth,
    find_bit_depth,
    list_images,
    read_image,
    write_png,
)
from deeplab2_like.data.record_errors import report_bad_records
from deeplab2_like.data.shards import count_examples, list_shards
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation import report
from deeplab2_like.evaluation.evaluate import evaluate
from deeplab2_like.evaluation.inference import (
    Example,
    ExampleFunction,
    Outputs,
    make_example_function,
    make_inference_function,
    make_oracle_function,
)
from deeplab2_like.evaluation.instance_json import InstanceAnnotations
from deeplab2_like.evaluation.submission import Instances, make_submission
from deeplab2_like.files import make_folder, reserve_outputs
from deeplab2_like.model import PanopticSystem, build_system
from deeplab2_like.model_folder import CONFIG_FILE, read_model_folder
from deeplab2_like.printing import printable
from deeplab2_like.progress import progress_bar
from deeplab2_like.temporary import remove_leftovers
from deeplab2_like.visualize import side_by_side


class ModelFolderEvaluation:
    """Evaluates checkpoints of a model folder, all with the same network and inference function.

    The network is built after all inputs are read or checked, so that a wrong path is reported at once.

    Args:
        model_dir: A folder that training wrote.
        split: Split of the records; by default the config's `data.val_split`.
        output_dir: Folder of `metrics.json`, pictures, submissions and TensorBoard events; by default a folder in
            `model_dir` with the split's name.
        compiled: Whether to compile the post-processing with XLA.
        flip: See `make_inference_function`, as for the next two.
        scales: Factors of the image size.
        ensemble: Other model folders, of which the newest checkpoints are used.
        oracle: Parts of the outputs to replace by the ground truth, see `make_oracle_function`.
        save_predictions: Whether to write a picture per image to `predictions/`.
        submission: A key of `submission.SUBMISSIONS`, to write files for a benchmark's server to `submission/`.
        image_ids: File name -> image id for the submission, see `make_submission`.
        instances_json: COCO instance JSON with the ground truth of AP; by default that of the panoptic labels.
        overrides: Changes to the config.

    Raises:
        UserError: If folders or options do not match, or the instance JSON is wrong.
    """

    system: PanopticSystem
    _infer: ExampleFunction

    def __init__(  # noqa: PLR0913 - its arguments are the options of the command
        self,
        model_dir: str | os.PathLike[str],
        *,
        split: str | None = None,
        output_dir: str | os.PathLike[str] | None = None,
        compiled: bool = False,
        flip: bool = False,
        scales: Sequence[float] = (1.0,),
        ensemble: Sequence[str | os.PathLike[str]] = (),
        oracle: Sequence[str] = (),
        save_predictions: bool = False,
        submission: str | None = None,
        image_ids: Mapping[str, int | str] | None = None,
        instances_json: str | os.PathLike[str] | None = None,
        overrides: Sequence[str] = (),
    ) -> None:
        self.model_dir = Path(model_dir)
        self.config: Config
        self.config, self._dataset_info = read_model_folder(model_dir, overrides)
        self.split = split or self.config.data.val_split
        given = {"flip": flip, "scales": tuple(scales) != (1.0,), "ensemble": bool(ensemble), "compile": compiled}
        conflicting = [f"--{name}" for name, is_given in given.items() if is_given]
        if oracle and conflicting:
            raise UserError(
                f"An oracle looks at one view of one model, uncompiled; leave out {' and '.join(conflicting)}, or the "
                "oracle."
            )
        # Options that change the numbers. Only without any of them do the numbers decide which checkpoint is best.
        options: dict[str, Any] = {
            "flip": flip,
            "scales": list(scales) if given["scales"] else [],
            "ensemble": [str(folder) for folder in ensemble],
            "oracle": list(oracle),
            "instances": [] if instances_json is None else [str(instances_json)],
            "set": [change for change in overrides if not change.startswith("data.path=")],
        }
        self._options = {name: value for name, value in options.items() if value}
        self.output_dir = Path(output_dir) if output_dir else self.model_dir / self._folder_name()
        self._save_predictions = save_predictions
        self._submission = submission
        self._image_ids = image_ids
        if image_ids is not None and submission is None:
            raise UserError("Image ids are for a submission; ask for one with --submission coco, or leave them out.")
        self._annotations: InstanceAnnotations | None = None
        if instances_json is not None:
            self._annotations = InstanceAnnotations(instances_json, self._dataset_info)
            print("".join(f"{printable(note)}\n" for note in self._annotations.notes), end="")
        self._oracle = list(oracle)
        # Config, dataset info and checkpoint of each model.
        self._ensemble = [(*read_model_folder(folder), find_checkpoint(folder)) for folder in ensemble]
        self._inference_options: dict[str, Any] = {"compiled": compiled, "scales": scales, "flip": flip}
        self._is_built = False

    def build(self) -> None:
        """Builds the network and the inference function, once; `run`, `predict` and `follow` do so.

        Raises:
            UserError: If the system does not have a part that an oracle should replace, or lacks a way to merge views.
        """
        if self._is_built:
            return
        self.system = build_system(self.config, self._dataset_info)
        if self._oracle:
            self._infer = make_oracle_function(self.system, self._oracle)
        else:
            ensemble = [_build_and_restore(*model) for model in self._ensemble]
            self._infer = make_example_function(
                make_inference_function(self.system, with_instances=True, ensemble=ensemble, **self._inference_options)
            )
        self._is_built = True

    def run(self, checkpoint: str = "last") -> dict[str, Any]:
        """Evaluates a checkpoint, prints the table, and writes `metrics.json` and TensorBoard events.

        Args:
            checkpoint: See `find_checkpoint`.

        Returns:
            The content of `metrics.json`.

        Raises:
            UserError: If there is no such checkpoint, or the records or the output folder cannot be used.
        """
        files, total = self._list_records()
        return self._evaluate(self._restore(checkpoint), files, total)

    def _evaluate(self, step: int, files: Sequence[str], total: int) -> dict[str, Any]:
        """Evaluates the current variables of the system, which are those of `step`, on `total` records in `files`."""
        examples = pipeline.make_eval_dataset(files, dataset_info=self._dataset_info)
        with self._writers() as write, _with_progress(examples, total, files) as examples:
            make_folder(self.output_dir)  # Checked before the evaluation, which may take hours.
            metrics = evaluate(
                self.system, examples, infer=self._infer, after_image=write, annotations=self._annotations
            )
        options = "".join(f", {name} {_format_option(value)}" for name, value in self._options.items())
        report.print_table(metrics, title=f"{self.model_dir}, step {step}, split {self.split}, {total} images{options}")
        metrics = report.write_results(
            self.output_dir,
            metrics,
            model_dir=self.model_dir,
            step=step,
            split=self.split,
            images=total,
            options=self._options,
        )
        print(f"Metrics are in {self.output_dir / 'metrics.json'}")
        return metrics

    def follow(self, *, poll_seconds: float = 10.0, timeout_seconds: float | None = None) -> dict[str, Any] | None:
        """Evaluates every checkpoint that a training saves, until that of the last step.

        It keeps the best checkpoint, unless the options or the split differ from those of the training's own
        validation. It skips checkpoints that are damaged, or that the training deletes before they are evaluated.

        Args:
            poll_seconds: Seconds between two checks of the folder.
            timeout_seconds: Ends if there is no new checkpoint for this time; None waits forever.

        Returns:
            The content of the last `metrics.json`, None if there was no checkpoint.
        """
        keeps_best = not self._options and self.split == self.config.data.val_split
        if not keeps_best:
            print("The best checkpoint is not kept, as the numbers are not those of the plain validation split.")
        files, total = self._list_records()
        self.build()
        metrics = None
        done = 0
        waiting_since: float | None = None
        while done < self._last_step():
            new = [path for path in list_checkpoints(self.model_dir) if checkpoint_step(path) > done]
            if not new:
                if waiting_since is None:
                    waiting_since = time.monotonic()
                    print(f"Waiting for a checkpoint after step {done} in '{self.model_dir}'.", flush=True)
                if timeout_seconds is not None and time.monotonic() - waiting_since > timeout_seconds:
                    print(f"No new checkpoint for {timeout_seconds / 60:g} minutes: is the training still running?")
                    break
                time.sleep(poll_seconds)
                continue
            waiting_since = None
            done = checkpoint_step(new[0])
            try:
                restore_system(self.system, new[0])
            except UserError as error:
                if Path(f"{new[0]}.index").exists():
                    print(f"Step {done} is left out: {printable(str(error))}", file=sys.stderr)
                continue
            metrics = self._evaluate(done, files, total)
            if keeps_best and save_if_best(self.model_dir, self.system, step=done, pq=metrics["panoptic"]["all"]["pq"]):
                print(f"Step {done} is the best so far.", flush=True)
        return metrics

    def _last_step(self) -> int:
        """Returns the last step of the training, read again because a restart may have changed it."""
        return load_config(self.model_dir / CONFIG_FILE).trainer.steps

    def _folder_name(self) -> str:
        """Returns the name of the default output folder in the model folder."""
        # The model folder uses these names for other folders.
        is_taken = self.split in ("train", "checkpoints", "best", "images")
        parts = [f"{self.split}_split" if is_taken else self.split]
        for name, value in self._options.items():
            values = [] if value is True else [Path(str(part)).name for part in value]
            parts.append("-".join([name, *values]))
        return re.sub(r"[^\w.=-]+", "_", "_".join(parts))

    def predict(self, images: str | os.PathLike[str], checkpoint: str = "last", *, bit_depth: int | None = None) -> int:
        """Writes pictures or a submission for images without labels.

        Args:
            images: An image file, or a folder, whose subfolders are searched, too. With image ids, only the images that
                have one are used: COCO's test-dev is a part of its folder of test images.
            checkpoint: See `find_checkpoint`.
            bit_depth: Number of bits that images of more than 8 bits per channel use; None: that of the training
                images, or else found from the largest value.

        Returns:
            The number of images.

        Raises:
            UserError: If neither pictures nor a submission are requested, an image cannot be read, or an image of the
                ids is missing.
        """
        if "oracle" in self._options:
            raise UserError("Images without labels have no truth for an oracle; leave out one of the two.")
        if not (self._save_predictions or self._submission):
            raise UserError(
                "Images without labels give no metrics; ask for pictures with --save-predictions or for files to "
                "submit with --submission."
            )
        files = self._list_images(Path(images))
        self._restore(checkpoint)
        bit_depth = bit_depth or self._dataset_info.bit_depth or find_bit_depth(files.values())
        if bit_depth is not None:
            print(describe_bit_depth(bit_depth))

        def read_examples() -> Iterator[Example]:
            for name, file in files.items():
                yield {"image": tf.constant(read_image(file, bit_depth=bit_depth)), "image_id": tf.constant(name)}

        with self._writers(files) as write, _with_progress(read_examples(), len(files)) as examples:
            for example in examples:
                write(example, {name: value.numpy()[0] for name, value in self._infer(example).items()})
        return len(files)

    def _list_images(self, path: Path) -> dict[str, Path]:
        """Returns the images of `predict` by name, relative to the folder."""
        folder = path if path.is_dir() else path.parent
        files = {file.relative_to(folder).as_posix(): file for file in list_images(path, recursive=True)}
        if self._image_ids is None:
            return files
        missing = [name for name in self._image_ids if name not in files]
        if missing:
            raise UserError(
                f"'{path}' lacks image '{missing[0]}' ({len(missing)} of {len(self._image_ids)} that the JSON of image "
                "ids names); give the folder of these images."
            )
        return {name: files[name] for name in self._image_ids}

    def _restore(self, checkpoint: str) -> int:
        """Builds the system, restores a checkpoint into it and returns the step of the checkpoint."""
        path = find_checkpoint(self.model_dir, checkpoint)
        self.build()
        restore_system(self.system, path)
        return checkpoint_step(path)

    def _list_records(self) -> tuple[list[str], int]:
        """Returns the files of the split and their number of examples; raises `UserError` if their classes differ."""
        folder = self.config.data.record_folder
        if DatasetInfo.load(folder) != self._dataset_info:
            raise UserError(
                f"The records in '{folder}' have other classes, in another order, or another label divisor than "
                f"model folder '{self.model_dir}'; evaluate on records of the data set it was trained on."
            )
        files = list_shards(folder, self.split)
        total = count_examples(files)
        if not total:
            raise UserError(f"Split '{self.split}' in '{folder}' holds no examples; convert the data set again.")
        return files, total

    @contextlib.contextmanager
    def _writers(self, image_names: Iterable[str] = ()) -> Iterator[Callable[[Example, Outputs], None]]:
        """Opens the requested outputs; yields a function that writes an example's picture and submission.

        Args:
            image_names: The names of all images, if they are known beforehand.
        """
        info = self._dataset_info
        pictures = self.output_dir / "predictions"
        picture_names: set[str] = set()
        if self._save_predictions:
            reserve_outputs(self.output_dir, [pictures.name])
            remove_leftovers(pictures, recursive=True)
        with contextlib.ExitStack() as stack:
            submission = None
            if self._submission is not None:
                folder = self.output_dir / "submission"
                submission = stack.enter_context(
                    make_submission(self._submission, folder, info, image_ids=self._image_ids)
                )
                submission.check_names(image_names)

            def write(example: Example, outputs: Outputs) -> None:
                name = example["image_id"].numpy().decode()
                if submission is not None:
                    submission.add(
                        name,
                        outputs["panoptic"],
                        _get_scores(outputs),
                        _get_instances(outputs),
                        outputs["semantic"],
                    )
                if self._save_predictions:
                    truth = example["panoptic"].numpy() if "panoptic" in example else None
                    picture = side_by_side(example["image"].numpy(), truth, outputs["panoptic"], info)
                    write_png(pictures / _picture_name(name, picture_names), picture)

            yield write


def wait_for_model_folder(
    model_dir: str | os.PathLike[str], *, poll_seconds: float = 2.0, timeout_seconds: float | None = None
) -> None:
    """Waits until a training has started in a model folder.

    Args:
        model_dir: The folder; may be missing.
        poll_seconds: Seconds between two checks of the folder.
        timeout_seconds: Longest time to wait; None waits forever.

    Raises:
        UserError: If no training has started after this time.
    """
    file = Path(model_dir) / CONFIG_FILE
    started = time.monotonic()
    if not file.is_file():
        print(f"Waiting for a training to start in '{model_dir}'.", flush=True)
    while not file.is_file():
        if timeout_seconds is not None and time.monotonic() - started > timeout_seconds:
            raise UserError(
                f"No training has started in '{model_dir}' for {timeout_seconds / 60:g} minutes; check --model-dir, or "
                "raise --timeout."
            )
        time.sleep(poll_seconds)


def evaluate_model_folder(
    model_dir: str | os.PathLike[str], *, checkpoint: str = "last", **options: Any
) -> dict[str, Any]:
    """Evaluates a checkpoint of a model folder: `ModelFolderEvaluation(model_dir, **options).run(checkpoint)`."""
    return ModelFolderEvaluation(model_dir, **options).run(checkpoint)


def _build_and_restore(config: Config, dataset_info: DatasetInfo, checkpoint: str) -> PanopticSystem:
    """Builds a system and restores a checkpoint, given by its path, into it."""
    system = build_system(config, dataset_info)
    restore_system(system, checkpoint)
    return system


def _picture_name(image_name: str, taken: set[str]) -> str:
    """Returns a file name for the picture of an image, without `..` and not in `taken`, and adds it to `taken`."""
    path = PurePosixPath(*(part for part in PurePosixPath(image_name).parts if part not in ("/", "//", "..")))
    is_file_name = path.suffix.lower() in IMAGE_SUFFIXES
    plain = str(path.with_suffix("")) if is_file_name else str(path)
    candidates = itertools.chain([plain, str(path)], (f"{path}-{number}" for number in itertools.count(2)))
    name = next(candidate for candidate in candidates if candidate not in taken and candidate != ".")
    taken.add(name)
    return f"{name}.png"


def _format_option(value: Any) -> str:
    """Formats an option for the title of the table."""
    return "on" if value is True else " ".join(str(part) for part in value)


def _get_scores(outputs: Outputs) -> dict[int, float]:
    """Returns panoptic value -> score of the segments of one image."""
    rows = zip(outputs["segment_id"].tolist(), outputs["segment_score"].tolist(), strict=True)
    return {segment: score for segment, score in rows if score > 0}


def _get_instances(outputs: Outputs) -> Instances | None:
    """Returns the overlapping instances of one image, None if the system has none."""
    if "instance_masks" not in outputs:
        return None
    return Instances(outputs["instance_masks"], outputs["instance_classes"], outputs["instance_scores"])


@contextlib.contextmanager
def _with_progress(
    examples: Iterable[Example], total: int, record_files: Sequence[str] = ()
) -> Iterator[Iterable[Example]]:
    """Yields the examples with a progress bar, and turns damaged records and lack of memory into `UserError`."""
    with progress_bar("evaluate") as progress, report_bad_records(record_files), _memory_errors():

        def count() -> Iterator[Example]:
            for done, example in enumerate(examples, start=1):
                yield example
                progress(done, total)

        yield count()


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    """Turns lack of memory into a `UserError` that names the options to leave out."""
    try:
        yield
    except (MemoryError, tf.errors.ResourceExhaustedError) as error:
        raise UserError(
            "Out of memory; lower the largest of --scales, leave out --flip, --ensemble or --compile, or evaluate on "
            "the CPU with CUDA_VISIBLE_DEVICES= set to nothing."
        ) from error
