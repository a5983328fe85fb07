"""Evaluates a system on records: the same function of images that is exported, then the metrics.

`evaluate` is the core: a system, examples, numbers. `ModelFolderEvaluation` is what the command line does with a model
folder around it.
"""

import contextlib
import functools
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from deeplab2_like.checkpoint import (
    CONFIG_FILE,
    build_from_model_folder,
    checkpoint_step,
    find_checkpoint,
    keep_best,
    list_checkpoints,
    load_model_folder,
    restore_system,
)
from deeplab2_like.configs import Config, load_config
from deeplab2_like.data import pipeline, tfrecord
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.data.image_files import IMAGE_SUFFIXES, list_images, read_image
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation import report
from deeplab2_like.evaluation.instance_ap import InstanceAP
from deeplab2_like.evaluation.panoptic_quality import (
    ClassifiedOverlaps,
    Matches,
    PanopticQuality,
    check_maps,
    overlap_panoptic,
)
from deeplab2_like.evaluation.semantic_iou import SemanticIoU
from deeplab2_like.evaluation.submission import Instances, make_submission
from deeplab2_like.evaluation.test_time import check_views, infer_views
from deeplab2_like.files import make_folder, write_png
from deeplab2_like.model import PanopticSystem
from deeplab2_like.model.stages import compiled_stages
from deeplab2_like.parallel import map_in_order
from deeplab2_like.progress import progress_bar
from deeplab2_like.visualize import side_by_side

Example = Mapping[str, tf.Tensor]
# What inference gives for one image, without the batch axis.
Found = Mapping[str, np.ndarray]
InferenceFunction = Callable[[tf.Tensor], dict[str, tf.Tensor]]
# The same for a batch of one, made of an example.
ExampleFunction = Callable[[Example], dict[str, tf.Tensor]]

_FREE_SIZE = tf.TensorSpec([None, None, None, 3], tf.uint8)

# One object, so that stages compiled for one system are found again for the next.
compile_with_xla = functools.partial(tf.function, jit_compile=True)


def make_inference_function(
    system: PanopticSystem,
    *,
    compiled: bool = False,
    with_instances: bool = False,
    ensemble: Sequence[PanopticSystem] = (),
    scales: Sequence[float] = (1.0,),
    flip: bool = False,
) -> InferenceFunction:
    """Makes a graph of a system's inference, for images of any size.

    Args:
        system: The system.
        compiled: Whether the stages of the post-processing are compiled with XLA: faster after the first image of each
            size, for which it takes some seconds.
        with_instances: See `PanopticSystem.infer`.
        ensemble: Other systems, of the same kind and classes, whose raw outputs are averaged with the system's.
        scales: Factors of the image size at which the network looks; outputs are averaged.
        flip: Whether it looks at the mirror images, too.

    Returns:
        A function from uint8 [B, H, W, 3] to the dictionary of `PanopticSystem.postprocess`.

    Raises:
        UserError: If systems or scales do not fit together.
    """
    systems = [system, *ensemble]
    check_views(systems, scales)

    def infer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        if len(systems) == 1 and tuple(scales) == (1.0,) and not flip:
            return system.infer(images, with_instances=with_instances)
        return infer_views(systems, images, scales=scales, flip=flip, with_instances=with_instances)

    if not compiled:
        return tf.function(infer, input_signature=[_FREE_SIZE], autograph=False)

    # Without AutoGraph, as it would wrap the system's own errors.
    @tf.function(autograph=False)
    def infer_in_compiled_stages(images: tf.Tensor) -> dict[str, tf.Tensor]:
        with compiled_stages(compile_with_xla):
            return infer(images)

    return infer_in_compiled_stages


def of_example(infer: InferenceFunction) -> ExampleFunction:
    """Turns a function of a batch of images into one of an example of `pipeline.make_eval_dataset`."""
    return lambda example: infer(example["image"][tf.newaxis])


def make_oracle_function(system: PanopticSystem, parts: Sequence[str]) -> ExampleFunction:
    """Makes a function like inference that is told a part of the truth.

    Args:
        system: The system.
        parts: What to replace by the ground truth, some of the system's `oracle_parts`.

    Returns:
        A function from an example of `pipeline.make_eval_dataset` to the dictionary of `PanopticSystem.postprocess`.

    Raises:
        UserError: If the system does not have such a part.
    """
    for part in parts:
        if part not in system.oracle_parts:
            raise UserError(
                f"System '{system.name}' has no part '{part}' that an oracle could replace; give some of "
                f"{', '.join(system.oracle_parts) or 'none'}."
            )
    network = tf.function(lambda images: system(images, training=False), input_signature=[_FREE_SIZE], autograph=False)

    def infer(example: Example) -> dict[str, tf.Tensor]:
        # Not in the graph: targets have static shapes, so every image size would be a graph of its own.
        targets = {name: value[tf.newaxis] for name, value in system.make_targets(example["panoptic"]).items()}
        size = tuple(example["panoptic"].shape)
        return system.postprocess_with_truth(network(example["image"][tf.newaxis]), targets, size, parts)

    return infer


def evaluate(
    system: PanopticSystem,
    examples: Iterable[Example],
    *,
    infer: ExampleFunction | None = None,
    after_image: Callable[[Example, Found], None] | None = None,
    workers: int | None = None,
) -> dict[str, Any]:
    """Computes PQ, mIoU and AP over a data set.

    Images go through the network one by one, at their own size, while other threads measure those before them.

    Args:
        system: The trained system.
        examples: What `pipeline.make_eval_dataset` yields.
        infer: From an example to the dictionary of `PanopticSystem.postprocess` with a batch of one, as `of_example`
            and `make_oracle_function` return; by default what `make_inference_function` makes of the image.
        after_image: Called in order with each example and what was found in it.
        workers: Number of threads that measure; by default that of the cores.

    Returns:
        The content of `metrics.json`, in percent.
    """
    info = system.dataset_info
    infer_example = infer or of_example(make_inference_function(system, with_instances=True))
    quality, iou, precision = PanopticQuality(info), SemanticIoU(info), InstanceAP(info)

    def inferred() -> Iterator[tuple[int, Example, Found]]:
        for number, example in enumerate(examples):
            yield number, example, {name: value.numpy()[0] for name, value in infer_example(example).items()}

    def measure(item: tuple[int, Example, Found]) -> _Measured:
        number, example, found = item
        (label,), (prediction,) = check_maps(example["panoptic"].numpy(), found["panoptic"])
        # Counted once for PQ and mIoU, unless the system tells classes apart before.
        overlaps = overlap_panoptic(label, prediction, info)
        of_classes = overlaps
        if "semantic" in found:
            of_classes = overlap_panoptic(label // info.label_divisor, found["semantic"], info, divisor=1)
        instances = InstanceAP(info)
        # Numbered, as records from other sources may repeat a name.
        name = f"{number}/{example['image_id'].numpy().decode()}"
        if "instance_masks" in found:
            own = {key: found[f"instance_{key}"] for key in ("masks", "scores", "classes", "boxes")}
            instances.update_from_instances(name, label, **own)
        else:
            table = {key: found[key] for key in ("segment_id", "segment_class", "segment_score")}
            instances.update_from_panoptic(name, label, prediction, **table)
        return _Measured(example, found, of_classes, quality.match_panoptic(overlaps), instances)

    for measured in map_in_order(measure, inferred(), workers=workers or os.cpu_count() or 1):
        quality.add(measured.matches)
        iou.add(measured.of_classes)
        precision.merge(measured.instances)
        if after_image is not None:
            after_image(measured.example, measured.found)
    return report.metrics_dict(panoptic=quality.result(), semantic=iou.result(), instance=precision.result())


class _Measured(NamedTuple):
    """One image, and what the metrics count in it."""

    example: Example
    found: Found
    of_classes: ClassifiedOverlaps
    matches: Matches
    instances: InstanceAP


class ModelFolderEvaluation:
    """Evaluates checkpoints of a model folder. What they share is made once: records, network, graph.

    Args:
        model_dir: A folder that training wrote.
        split: Split of the records; by default the config's `data.val_split`.
        output_dir: Folder of `metrics.json`, pictures, submissions and TensorBoard events; by default a folder in
            `model_dir` with the split's name.
        compiled: Whether to compile the post-processing with XLA.
        flip: See `make_inference_function`, as for the next two.
        scales: Factors of the image size.
        ensemble: Other model folders, of which the newest checkpoints are used.
        oracle: What to replace by the ground truth, see `make_oracle_function`.
        save_predictions: Whether to write a picture per image to `predictions/`.
        submission: A key of `submission.SUBMISSIONS`, to write files for a benchmark's server to `submission/`.
        image_ids: File name -> image id for the submission, see `make_submission`.
        overrides: Changes to the config.

    Raises:
        UserError: If folders, records and options do not fit together.
    """

    def __init__(
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
        overrides: Sequence[str] = (),
    ) -> None:
        self.model_dir = Path(model_dir)
        self.config: Config
        self.config, self.system = build_from_model_folder(model_dir, overrides)
        self.split = split or self.config.data.val_split
        given = {"flip": flip, "scales": tuple(scales) != (1.0,), "ensemble": bool(ensemble), "compile": compiled}
        conflicting = [f"--{name}" for name, is_given in given.items() if is_given]
        if oracle and conflicting:
            raise UserError(
                f"An oracle looks at one view of one model, uncompiled; leave out {' and '.join(conflicting)}, or the "
                "oracle."
            )
        # What else the numbers depend on; without any, they are those of the model, and may say which one is best.
        options: dict[str, Any] = {
            "flip": flip,
            "scales": list(scales) if given["scales"] else [],
            "ensemble": [str(folder) for folder in ensemble],
            "oracle": list(oracle),
            "set": [change for change in overrides if not change.startswith("data.path=")],
        }
        self._options = {name: value for name, value in options.items() if value}
        self.output_dir = Path(output_dir) if output_dir else self.model_dir / self._folder_name()
        self._save_predictions = save_predictions
        self._submission = submission
        self._image_ids = image_ids
        if image_ids is not None and submission is None:
            raise UserError("Image ids are for a submission; ask for one with --submission coco, or leave them out.")
        self._infer: ExampleFunction
        if oracle:
            self._infer = make_oracle_function(self.system, oracle)
            return
        self._infer = of_example(
            make_inference_function(
                self.system,
                compiled=compiled,
                with_instances=True,
                ensemble=[load_model_folder(folder)[1] for folder in ensemble],
                scales=scales,
                flip=flip,
            )
        )

    def run(self, checkpoint: str = "last") -> dict[str, Any]:
        """Evaluates a checkpoint, prints the table, and writes `metrics.json` and TensorBoard's numbers.

        Args:
            checkpoint: See `find_checkpoint`.

        Returns:
            The content of `metrics.json`.

        Raises:
            UserError: If there is no such checkpoint, or records or output folder cannot be used.
        """
        return self._evaluate(self._restore(checkpoint))

    def _evaluate(self, step: int) -> dict[str, Any]:
        """The rest of `run`, for the variables that the system has; `step` is what they are of."""
        files, total = self._records()
        examples = pipeline.make_eval_dataset(files, dataset_info=self.system.dataset_info)
        with self._writers() as write, _shown(examples, total, files) as shown:
            make_folder(self.output_dir)  # Now, as the evaluation may take hours.
            metrics = evaluate(self.system, shown, infer=self._infer, after_image=write)
        options = "".join(f", {name} {_in_words(value)}" for name, value in self._options.items())
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
        """Evaluates every checkpoint while a training saves them, until that of the last step.

        It keeps the best one, unless options or the split make the numbers other than those of the training's own
        validation. Checkpoints that are damaged, or that training deletes before their turn comes, are left out.

        Args:
            poll_seconds: Time between two looks at the folder.
            timeout_seconds: Ends if there is no new checkpoint for so long; None waits for ever.

        Returns:
            The content of the last `metrics.json`, None if there was no checkpoint.
        """
        keeps_best = not self._options and self.split == self.config.data.val_split
        if not keeps_best:
            print("The best checkpoint is not kept, as the numbers are not those of the plain validation split.")
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
                    print(f"Step {done} is left out: {error}", file=sys.stderr)
                continue
            metrics = self._evaluate(done)
            if keeps_best and keep_best(self.model_dir, self.system, step=done, pq=metrics["panoptic"]["all"]["pq"]):
                print(f"Step {done} is the best so far.", flush=True)
        return metrics

    def _last_step(self) -> int:
        """The step at which the training ends; it may have been started anew with another one."""
        return load_config(self.model_dir / CONFIG_FILE).trainer.steps

    def _folder_name(self) -> str:
        """The folder in the model folder that results go to by default."""
        # These hold other things.
        is_taken = self.split in ("train", "checkpoints", "best", "images")
        parts = [f"{self.split}_split" if is_taken else self.split]
        for name, value in self._options.items():
            values = [] if value is True else [Path(str(part)).name for part in value]
            parts.append("-".join([name, *values]))
        return re.sub(r"[^\w.=-]+", "_", "_".join(parts))

    def predict(self, images: str | os.PathLike[str], checkpoint: str = "last") -> int:
        """Writes pictures and submission for images without labels.

        Args:
            images: An image file, or a folder, whose folders are searched, too. Given image ids, only the images that
                they name count: COCO's test-dev is a part of its folder of test images.
            checkpoint: See `find_checkpoint`.

        Returns:
            The number of images.

        Raises:
            UserError: If nothing was asked for, an image cannot be read, or one that has an image id is missing.
        """
        if "oracle" in self._options:
            raise UserError("Images without labels have no truth for an oracle; leave out one of the two.")
        if not (self._save_predictions or self._submission):
            raise UserError(
                "Images without labels give no metrics; ask for pictures with --save-predictions or for files to "
                "submit with --submission."
            )
        self._restore(checkpoint)
        files = self._named_images(Path(images))

        def examples() -> Iterator[Example]:
            for name, file in files.items():
                yield {"image": tf.constant(read_image(file)), "image_id": tf.constant(name)}

        with self._writers(files) as write, _shown(examples(), len(files)) as shown:
            for example in shown:
                found = self._infer(example)
                write(example, {name: value.numpy()[0] for name, value in found.items()})
        return len(files)

    def _named_images(self, path: Path) -> dict[str, Path]:
        """Lists images by their names, with folders, see `predict`."""
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
        """Loads a checkpoint into the system; returns its step."""
        path = find_checkpoint(self.model_dir, checkpoint)
        restore_system(self.system, path)
        return checkpoint_step(path)

    def _records(self) -> tuple[list[str], int]:
        """Returns the files of the split and the number of their examples; raises `UserError` if they do not fit."""
        folder = self.config.data.record_folder
        if DatasetInfo.load(folder) != self.system.dataset_info:
            raise UserError(
                f"The records in '{folder}' have other classes, in another order, or another label divisor than "
                f"model folder '{self.model_dir}'; evaluate on records of the data set it was trained on."
            )
        files = tfrecord.list_shards(folder, self.split)
        total = tfrecord.count_examples(files)
        if not total:
            raise UserError(f"Split '{self.split}' in '{folder}' holds no examples; convert the data set again.")
        return files, total

    @contextlib.contextmanager
    def _writers(self, image_names: Iterable[str] = ()) -> Iterator[Callable[[Example, Found], None]]:
        """What to do with each example and what was found in it: pictures, submission.

        Args:
            image_names: The names of all images, as far as they are known beforehand.
        """
        info = self.system.dataset_info
        pictures = self.output_dir / "predictions"
        picture_names: set[str] = set()
        with contextlib.ExitStack() as stack:
            submission = None
            if self._submission is not None:
                folder = self.output_dir / "submission"
                submission = stack.enter_context(
                    make_submission(self._submission, folder, info, image_ids=self._image_ids)
                )
                submission.check_names(image_names)

            def write(example: Example, found: Found) -> None:
                name = example["image_id"].numpy().decode()
                if submission is not None:
                    submission.add(name, found["panoptic"], _scores(found), _instances(found))
                if self._save_predictions:
                    truth = example["panoptic"].numpy() if "panoptic" in example else None
                    picture = side_by_side(example["image"].numpy(), truth, found["panoptic"], info)
                    write_png(pictures / _picture_name(name, picture_names), picture)

            yield write


def wait_for_model_folder(model_dir: str | os.PathLike[str], *, poll_seconds: float = 2.0) -> None:
    """Waits until a training that is just starting has claimed its folder."""
    file = Path(model_dir) / CONFIG_FILE
    if not file.is_file():
        print(f"Waiting for a training to start in '{model_dir}'.", flush=True)
    while not file.is_file():
        time.sleep(poll_seconds)


def evaluate_model_folder(
    model_dir: str | os.PathLike[str], *, checkpoint: str = "last", **options: Any
) -> dict[str, Any]:
    """Evaluates a checkpoint of a model folder: `ModelFolderEvaluation(model_dir, **options).run(checkpoint)`."""
    return ModelFolderEvaluation(model_dir, **options).run(checkpoint)


def _picture_name(image_name: str, taken: set[str]) -> str:
    """Names a picture after its image, within the folder of pictures, and unlike all before, which are in `taken`."""
    path = PurePosixPath(*(part for part in PurePosixPath(image_name).parts if part not in ("/", "..")))
    is_file_name = path.suffix.lower() in IMAGE_SUFFIXES
    plain = str(path.with_suffix("")) if is_file_name else str(path)
    candidates = itertools.chain([plain, str(path)], (f"{path}-{number}" for number in itertools.count(2)))
    name = next(candidate for candidate in candidates if candidate not in taken and candidate != ".")
    taken.add(name)
    return f"{name}.png"


def _in_words(value: Any) -> str:
    return "on" if value is True else " ".join(str(part) for part in value)


def _scores(found: Found) -> dict[int, float]:
    """Panoptic value -> score of the segments of one image."""
    rows = zip(found["segment_id"].tolist(), found["segment_score"].tolist(), strict=True)
    return {segment: score for segment, score in rows if score > 0}


def _instances(found: Found) -> Instances | None:
    """The overlapping instances of one image, if the system has any."""
    if "instance_masks" not in found:
        return None
    return Instances(found["instance_masks"], found["instance_classes"], found["instance_scores"])


@contextlib.contextmanager
def _shown(examples: Iterable[Example], total: int, record_files: Sequence[str] = ()) -> Iterator[Iterable[Example]]:
    """Shows a progress bar that moves while the examples are taken, and turns faults of records into `UserError`."""
    with progress_bar("evaluate") as progress, tfrecord.user_errors(record_files), _memory_errors():

        def counted() -> Iterator[Example]:
            for done, example in enumerate(examples, start=1):
                yield example
                progress(done, total)

        yield counted()


@contextlib.contextmanager
def _memory_errors() -> Iterator[None]:
    try:
        yield
    except tf.errors.ResourceExhaustedError as error:
        raise UserError(
            "Out of memory; lower the largest of --scales, leave out --flip, --ensemble or --compile, or evaluate on "
            "the CPU with CUDA_VISIBLE_DEVICES= set to nothing."
        ) from error
