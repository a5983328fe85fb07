"""Evaluates a system on records: the same function of images that is exported, then the metrics."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from deeplab2_like.data import pipeline, tfrecord
from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.errors import UserError
from deeplab2_like.evaluation import report
from deeplab2_like.evaluation.instance_ap import InstanceAP
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.evaluation.semantic_iou import SemanticIoU
from deeplab2_like.files import make_folder
from deeplab2_like.model import PanopticSystem
from deeplab2_like.model.layers import compiled_stages
from deeplab2_like.progress import progress_bar
from deeplab2_like.trainer.checkpoint import load_model_folder

InferenceFunction = Callable[[tf.Tensor], dict[str, tf.Tensor]]

# One object, so that stages compiled for one system are found again for the next.
compile_with_xla = functools.partial(tf.function, jit_compile=True)


def make_inference_function(
    system: PanopticSystem, *, compiled: bool = False, with_instances: bool = False
) -> InferenceFunction:
    """Makes a graph of a system's inference, for images of any size.

    Args:
        system: The system.
        compiled: Whether the stages of the post-processing are compiled with XLA: faster after the first image of each
            size, for which it takes some seconds.
        with_instances: See `PanopticSystem.infer`.

    Returns:
        A function from uint8 [B, H, W, 3] to the dictionary of `PanopticSystem.postprocess`.
    """
    if not compiled:
        free_size = [tf.TensorSpec([None, None, None, 3], tf.uint8)]
        return tf.function(functools.partial(system.infer, with_instances=with_instances), input_signature=free_size)

    @tf.function
    def infer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        with compiled_stages(compile_with_xla):
            return system.infer(images, with_instances=with_instances)

    return infer


def evaluate(
    system: PanopticSystem,
    examples: Iterable[Mapping[str, tf.Tensor]],
    *,
    compiled: bool = False,
    after_image: Callable[[Mapping[str, tf.Tensor], np.ndarray], None] | None = None,
) -> dict[str, Any]:
    """Computes PQ, mIoU and AP over a data set.

    Args:
        system: The trained system.
        examples: What `pipeline.make_eval_dataset` yields; images are evaluated one by one, at their own size.
        compiled: See `make_inference_function`.
        after_image: Called with each example and its predicted panoptic map, int32 [H, W].

    Returns:
        The content of `metrics.json`, in percent.
    """
    infer = make_inference_function(system, compiled=compiled, with_instances=True)
    info = system.dataset_info
    quality, iou, precision = PanopticQuality(info), SemanticIoU(info), InstanceAP(info)
    for number, example in enumerate(examples):
        image_id = example["image_id"].numpy().decode()
        label = example["panoptic"].numpy()
        found = {name: value.numpy()[0] for name, value in infer(example["image"][tf.newaxis]).items()}
        prediction = found.pop("panoptic")
        quality.update_state(label, prediction)
        iou.update_state(label, prediction)
        # Numbered, as records from other sources may repeat a name.
        name = f"{number}/{image_id}"
        if "instance_masks" in found:
            parts = {key: found[f"instance_{key}"] for key in ("masks", "scores", "classes", "boxes")}
            precision.update_from_instances(name, label, **parts)
        else:
            precision.update_from_panoptic(name, label, prediction, **found)
        if after_image is not None:
            after_image(example, prediction)
    return report.metrics_dict(panoptic=quality.result(), semantic=iou.result(), instance=precision.result())


def evaluate_model_folder(
    model_dir: Path,
    *,
    split: str | None = None,
    output_dir: Path | None = None,
    compiled: bool = False,
    overrides: Sequence[str] = (),
) -> dict[str, Any]:
    """Evaluates the newest checkpoint of a model folder, prints the table and writes `metrics.json`.

    Args:
        model_dir: A folder that training wrote.
        split: Split of the records; by default the config's `data.val_split`.
        output_dir: Folder of `metrics.json`; by default a folder in `model_dir` with the split's name.
        compiled: Whether to compile the post-processing with XLA.
        overrides: Changes to the config.

    Returns:
        The content of `metrics.json`.
    """
    config, system, step = load_model_folder(model_dir, overrides)
    split = split or config.data.val_split
    records = config.data.record_folder
    if DatasetInfo.load(records) != system.dataset_info:
        raise UserError(
            f"The records in '{records}' have other classes, in another order, or another label divisor than "
            f"model folder '{model_dir}'; evaluate on records of the data set it was trained on."
        )
    files = tfrecord.list_shards(records, split)
    output_dir = output_dir or Path(model_dir) / split
    make_folder(output_dir)  # Now, as the evaluation may take hours.
    path = output_dir / "metrics.json"
    examples = pipeline.make_eval_dataset(files, dataset_info=system.dataset_info)
    total = tfrecord.count_examples(files)
    if not total:
        raise UserError(f"Split '{split}' in '{records}' holds no examples; convert the data set again.")
    with progress_bar("evaluate") as progress, tfrecord.user_errors():

        def counted() -> Iterator[Mapping[str, tf.Tensor]]:
            for done, example in enumerate(examples, start=1):
                yield example
                progress(done, total)

        metrics = evaluate(system, counted(), compiled=compiled)
    report.print_table(metrics, title=f"{model_dir}, step {step}, split {split}, {total} images")
    report.write_metrics(path, metrics)
    print(f"Metrics are in {path}")
    return metrics
