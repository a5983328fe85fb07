"""Looking at validation images while a training runs. The graph is traced once for all of a training."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from deeplab2_like.data import pipeline
from deeplab2_like.evaluation.evaluate import evaluate, make_inference_function
from deeplab2_like.model import PanopticSystem
from deeplab2_like.trainer.average import WeightAverage
from deeplab2_like.trainer.summaries import draw_predictions

# How many images are shown in TensorBoard.
_PICTURES = 4


class _StoppedError(Exception):
    """Somebody wants the training to end."""


class Validation:
    """Pictures and metrics of a split that is not trained on, with the averaged weights if there are any.

    Args:
        system: The system that is trained.
        files: TFRecord files of the split.
        average: The average of its weights, or None.
        is_stopped: Whether the training is to end; asked after every image, as an evaluation may be long.
    """

    def __init__(
        self,
        system: PanopticSystem,
        files: Sequence[str],
        *,
        average: WeightAverage | None,
        is_stopped: Callable[[], bool],
    ) -> None:
        self._system = system
        self._average = average
        self._is_stopped = is_stopped
        self._examples = pipeline.make_eval_dataset(files, dataset_info=system.dataset_info)
        self._shown: list[Mapping[str, tf.Tensor]] = []
        self.infer = make_inference_function(system, with_instances=True)

    def draw(self) -> list[np.ndarray]:
        """Draws the first few images, always the same, with ground truth and prediction, uint8 [H, W, 3] each."""
        self._shown = self._shown or list(self._examples.take(_PICTURES))
        with self.evaluated_weights():
            return draw_predictions(self._shown, self.infer, self._system.dataset_info)

    def evaluate(self) -> dict[str, Any] | None:
        """Returns the content of `metrics.json` for the whole split, or None if the training is to end."""

        def until_stopped() -> Iterator[Mapping[str, tf.Tensor]]:
            for example in self._examples:
                if self._is_stopped():
                    raise _StoppedError
                yield example

        with self.evaluated_weights():
            try:
                return evaluate(self._system, until_stopped(), infer=self.infer)
            except _StoppedError:
                return None

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """A context in which the system has the weights that are evaluated."""
        return contextlib.nullcontext() if self._average is None else self._average.in_system()
