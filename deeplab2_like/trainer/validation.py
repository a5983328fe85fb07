"""Pictures and metrics of the validation split during training. The graph is traced once per training."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from deeplab2_like.checkpoint_files import save_if_best
from deeplab2_like.data import pipeline
from deeplab2_like.evaluation.evaluate import evaluate
from deeplab2_like.evaluation.inference import make_example_function, make_inference_function
from deeplab2_like.evaluation.report import write_results
from deeplab2_like.files import write_atomically
from deeplab2_like.model import PanopticSystem
from deeplab2_like.temporary import remove_leftovers
from deeplab2_like.trainer.average import WeightAverage
from deeplab2_like.trainer.summaries import draw_predictions

# Number of images shown in TensorBoard.
_PICTURES = 4
# File in the split's folder with the last evaluated step, by which a resumed training notices a missing evaluation.
_EVALUATED_FILE = "evaluated_step"


class _StoppedError(Exception):
    """The training is to end before the evaluation is complete."""


def read_evaluated_step(model_dir: str | os.PathLike[str], split: str) -> int | None:
    """Returns the last step that the training in a model folder has evaluated, or None if there is none."""
    try:
        return int((Path(model_dir) / split / _EVALUATED_FILE).read_text())
    except (OSError, ValueError):
        return None


class Validation:
    """Pictures and metrics of a split that is not trained on, with the averaged weights if there are any.

    Args:
        system: The system that is trained.
        files: TFRecord files of the split.
        average: The average of its weights, or None.
        model_dir: The model folder; it keeps the best checkpoint, and the metrics in the split's folder.
        split: Name of the split.
        is_stopped: Whether the training is to end; asked after every image, as an evaluation may be long.
    """

    def __init__(
        self,
        system: PanopticSystem,
        files: Sequence[str],
        *,
        average: WeightAverage | None,
        model_dir: str | os.PathLike[str],
        split: str,
        is_stopped: Callable[[], bool],
    ) -> None:
        self._system = system
        self._average = average
        self._model_dir = Path(model_dir)
        self._split = split
        self._is_stopped = is_stopped
        self._examples = pipeline.make_eval_dataset(files, dataset_info=system.dataset_info)
        self._images = 0
        self._shown: list[Mapping[str, tf.Tensor]] = []
        self.infer = make_inference_function(system, with_instances=True)

    def draw(self) -> list[np.ndarray]:
        """Draws the first few images, always the same, with ground truth and prediction, uint8 [H, W, 3] each."""
        self._shown = self._shown or list(self._examples.take(_PICTURES))
        with self.evaluated_weights():
            return draw_predictions(self._shown, self.infer, self._system.dataset_info)

    def evaluate(self) -> dict[str, Any] | None:
        """Returns the metrics of the whole split, or None if the training is to end."""

        def until_stopped() -> Iterator[Mapping[str, tf.Tensor]]:
            self._images = 0
            for example in self._examples:
                if self._is_stopped():
                    raise _StoppedError
                self._images += 1
                yield example

        with self.evaluated_weights():
            try:
                return evaluate(self._system, until_stopped(), infer=make_example_function(self.infer))
            except _StoppedError:
                return None

    def evaluate_and_keep(self, step: int) -> str | None:
        """Evaluates the whole split, writes the metrics, and keeps the weights if they are the best so far.

        Args:
            step: The training step of the weights.

        Returns:
            The PQ as text for the log, or None if the training is to end; then nothing was written.
        """
        metrics = self.evaluate()
        if metrics is None:
            return None
        folder = self._model_dir / self._split
        remove_leftovers(folder)
        write_results(folder, metrics, model_dir=self._model_dir, step=step, split=self._split, images=self._images)
        quality = metrics["panoptic"]["all"]["pq"]
        with self.evaluated_weights():
            is_best = save_if_best(self._model_dir, self._system, step=step, pq=quality)
        # Written last, because it marks the evaluation as complete.
        write_atomically(folder / _EVALUATED_FILE, f"{step}\n".encode())
        return f"PQ {quality:.2f} on split '{self._split}'{', the best so far' if is_best else ''}"

    def evaluated_weights(self) -> contextlib.AbstractContextManager[None]:
        """Returns a context in which the system has the averaged weights, if there are any."""
        return contextlib.nullcontext() if self._average is None else self._average.in_system()
