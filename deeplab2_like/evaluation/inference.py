"""Inference functions of a system, for evaluation, also during training."""

import functools
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import tensorflow as tf

from deeplab2_like.errors import UserError
from deeplab2_like.evaluation.augmented_inference import check_views, infer_views
from deeplab2_like.model import PanopticSystem
from deeplab2_like.model.stages import compiled_stages

Example = Mapping[str, tf.Tensor]
# The outputs of inference for one image, without the batch axis.
Outputs = Mapping[str, np.ndarray]
InferenceFunction = Callable[[tf.Tensor], dict[str, tf.Tensor]]
# Function from an example to the outputs for a batch of one.
ExampleFunction = Callable[[Example], dict[str, tf.Tensor]]

_FREE_SIZE = tf.TensorSpec([None, None, None, 3], tf.uint8)

# One object for all callers, because compiled stages are cached by it.
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
    """Makes the inference function of a system, a TensorFlow graph for images of any size.

    Args:
        system: The system.
        compiled: Whether to compile the stages of the post-processing with XLA: faster, but compilation takes some
            seconds for the first image of each size.
        with_instances: See `PanopticSystem.infer`.
        ensemble: Other systems of the same type and classes; their raw outputs are averaged with the system's.
        scales: Factors of the image size; the network sees the image at each of them, and its outputs are averaged.
        flip: Whether the network sees the mirror images, too.

    Returns:
        A function from uint8 [B, H, W, 3] to the dictionary of `PanopticSystem.postprocess`.

    Raises:
        UserError: If the outputs of these systems at these scales cannot be averaged.
    """
    systems = [system, *ensemble]
    check_views(systems, scales)

    def infer(images: tf.Tensor) -> dict[str, tf.Tensor]:
        if len(systems) == 1 and tuple(scales) == (1.0,) and not flip:
            return system.infer(images, with_instances=with_instances)
        return infer_views(systems, images, scales=scales, flip=flip, with_instances=with_instances)

    if not compiled:
        return tf.function(infer, input_signature=[_FREE_SIZE], autograph=False)

    # Without AutoGraph, which would wrap the system's errors.
    @tf.function(autograph=False)
    def infer_in_compiled_stages(images: tf.Tensor) -> dict[str, tf.Tensor]:
        with compiled_stages(compile_with_xla):
            return infer(images)

    return infer_in_compiled_stages


def make_example_function(infer: InferenceFunction) -> ExampleFunction:
    """Makes a function of an example of `pipeline.make_eval_dataset` from an inference function."""
    return lambda example: infer(example["image"][tf.newaxis])


def make_oracle_function(system: PanopticSystem, parts: Sequence[str]) -> ExampleFunction:
    """Makes an inference function in which the ground truth replaces parts of the network's outputs.

    Args:
        system: The system.
        parts: The parts to replace, some of the system's `oracle_parts`.

    Returns:
        A function from an example of `pipeline.make_eval_dataset` to the dictionary of `PanopticSystem.postprocess`,
        and the result of `semantic_map_with_truth` as `semantic`.

    Raises:
        UserError: If the system has no such part.
    """
    for part in parts:
        if part not in system.oracle_parts:
            raise UserError(
                f"System '{system.name}' has no part '{part}' that an oracle could replace; give some of "
                f"{', '.join(system.oracle_parts) or 'none'}."
            )
    network = tf.function(lambda images: system(images, training=False), input_signature=[_FREE_SIZE], autograph=False)

    def infer(example: Example) -> dict[str, tf.Tensor]:
        # Outside the graph, because targets have static shapes: every image size would need a graph of its own.
        targets = {name: value[tf.newaxis] for name, value in system.make_targets(example["panoptic"]).items()}
        size = tuple(example["panoptic"].shape)
        outputs = network(example["image"][tf.newaxis])
        found = system.postprocess_with_truth(outputs, targets, size, parts)
        return found | {"semantic": system.semantic_map_with_truth(outputs, targets, size, parts)}

    return infer
