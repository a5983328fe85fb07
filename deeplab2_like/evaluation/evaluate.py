"""Evaluates a system on records: the same function of images that is exported, then the metrics."""

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import tensorflow as tf

from deeplab2_like.evaluation.instance_ap import InstanceAP
from deeplab2_like.evaluation.panoptic_quality import PanopticQuality
from deeplab2_like.evaluation.report import metrics_dict
from deeplab2_like.evaluation.semantic_iou import SemanticIoU
from deeplab2_like.model import PanopticSystem
from deeplab2_like.model.layers import compiled_stages

InferenceFunction = Callable[[tf.Tensor], dict[str, tf.Tensor]]

# One object, so that stages compiled for one system are found again for the next.
compile_with_xla = functools.partial(tf.function, jit_compile=True)


def make_inference_function(system: PanopticSystem, *, compiled: bool = False) -> InferenceFunction:
    """Makes a graph of a system's inference, for images of any size.

    Args:
        system: The system.
        compiled: Whether the stages of the post-processing are compiled with XLA: faster after the first image of each
            size, for which it takes some seconds.

    Returns:
        A function from uint8 [B, H, W, 3] to the dictionary of `PanopticSystem.postprocess`.
    """
    if not compiled:
        return tf.function(system.infer, input_signature=[tf.TensorSpec([None, None, None, 3], tf.uint8)])

    @tf.function
    def infer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        with compiled_stages(compile_with_xla):
            return system.infer(images)

    return infer


def evaluate(
    system: PanopticSystem,
    examples: Iterable[Mapping[str, tf.Tensor]],
    *,
    compiled: bool = False,
    after_image: Callable[[str, Any, Any, Any], None] | None = None,
) -> dict[str, Any]:
    """Computes PQ, mIoU and AP over a data set.

    Args:
        system: The trained system.
        examples: What `pipeline.make_eval_dataset` yields; images are evaluated one by one, at their own size.
        compiled: See `make_inference_function`.
        after_image: Called with the image id, the image, its label and its predicted panoptic map, as arrays.

    Returns:
        The content of `metrics.json`, in percent.
    """
    infer = make_inference_function(system, compiled=compiled)
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
        precision.update_from_panoptic(f"{number}/{image_id}", label, prediction, **found)
        if after_image is not None:
            after_image(image_id, example["image"].numpy(), label, prediction)
    return metrics_dict(panoptic=quality.result(), semantic=iou.result(), instance=precision.result())
