"""TensorBoard events of a training: numbers, pictures of a few validation images, profiles."""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import tensorflow as tf

from deeplab2_like.data.dataset_info import DatasetInfo
from deeplab2_like.visualize import side_by_side

# Largest width of pictures, in pixels; a training writes hundreds of them.
_MAX_WIDTH = 1536
# Steps before a profile: the first ones compile and fill buffers.
_STEPS_BEFORE_PROFILE = 3


class Summaries:
    """Writes TensorBoard events, until its context ends.

    Args:
        folder: Folder of the events; None, for workers other than the chief, writes nothing.
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._writer = tf.summary.create_noop_writer() if folder is None else tf.summary.create_file_writer(str(folder))

    def numbers(self, values: Mapping[str, float], *, step: int) -> None:
        """Writes scalars, such as losses, learning rate and speed."""
        with self._writer.as_default(step=step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
        self._writer.flush()

    def pictures(self, pictures: Sequence[np.ndarray], *, step: int) -> None:
        """Writes pictures, uint8 [H, W, 3] each."""
        with self._writer.as_default(step=step):
            for number, picture in enumerate(pictures):
                tf.summary.image(f"pictures/{number}", picture[np.newaxis])
        self._writer.flush()

    def __enter__(self) -> "Summaries":
        return self

    def __exit__(self, *details: Any) -> None:
        self._writer.close()


def draw_predictions(
    examples: Sequence[Mapping[str, tf.Tensor]],
    infer: Callable[[tf.Tensor], Mapping[str, tf.Tensor]],
    dataset_info: DatasetInfo,
) -> list[np.ndarray]:
    """Draws image, ground truth and prediction side by side.

    Args:
        examples: Examples of `pipeline.make_eval_dataset`.
        infer: Function from images, uint8 [1, H, W, 3], to the dictionary of `PanopticSystem.postprocess`.
        dataset_info: The meaning of the labels.

    Returns:
        uint8 [H', W', 3] each.
    """
    pictures = []
    for example in examples:
        prediction = infer(example["image"][tf.newaxis])["panoptic"].numpy()[0]
        picture = side_by_side(example["image"].numpy(), example["panoptic"].numpy(), prediction, dataset_info)
        scale = min(1.0, _MAX_WIDTH / picture.shape[1])
        if scale < 1:
            picture = cv2.resize(picture, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        pictures.append(picture)
    return pictures


class StepProfiler:
    """Records a few steps with TensorFlow's profiler, after the first few steps.

    Args:
        folder: Folder of the profile; TensorBoard shows it with the plugin `tensorboard-plugin-profile`. None records
            nothing.
        steps: Number of steps to record; 0 for none.
        steps_left: Number of steps left to train; if they are too few, a warning is printed.
    """

    def __init__(self, folder: str | os.PathLike[str] | None, steps: int, *, steps_left: int) -> None:
        if steps and folder is not None and steps_left < _STEPS_BEFORE_PROFILE + steps:
            recorded = max(steps_left - _STEPS_BEFORE_PROFILE, 0)
            print(
                f"Warning: {recorded or 'none'} of the {steps} steps to profile will be recorded, as {steps_left} are "
                f"left to train and the first {_STEPS_BEFORE_PROFILE} are not recorded; raise trainer.steps.",
                file=sys.stderr,
            )
        self._folder = str(folder)
        self._first = _STEPS_BEFORE_PROFILE if steps and folder is not None else -1
        self._last = self._first + steps
        self._done = 0
        self._is_running = False

    def __enter__(self) -> "StepProfiler":
        return self

    def __exit__(self, *details: Any) -> None:
        self._stop()

    def advance(self) -> None:
        """Counts a step; starts and stops the profiler when it is time."""
        self._done += 1
        if self._done == self._first:
            tf.profiler.experimental.start(self._folder)
            self._is_running = True
        elif self._done == self._last:
            self._stop()

    def _stop(self) -> None:
        if self._is_running:
            self._is_running = False
            tf.profiler.experimental.stop()
