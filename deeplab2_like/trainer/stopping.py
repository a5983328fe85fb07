"""Stopping on SIGTERM, as schedulers send it before they take a machine away."""

import signal
import threading
from types import FrameType, TracebackType

import tensorflow as tf

from deeplab2_like.trainer.strategy import worker_of

# What a shell reports of a process that SIGTERM has ended, so that `train && evaluate` does not go on.
STOPPED_STATUS = 128 + signal.SIGTERM


class StopTraining(Exception):
    """Raised between two steps, after somebody has asked for the end."""


class StopSignal:
    """Notes SIGTERM while the context is open; a second one ends the process at once, as usual.

    Python delivers signals to the main thread alone; elsewhere nothing is noted.

    Args:
        strategy: The strategy, all workers of which stop if one of them is asked to.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self._several_workers = worker_of(strategy)[1] > 1
        self._noted = False
        self._sum = tf.function(self._sum_over_replicas)

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGTERM, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if threading.current_thread() is threading.main_thread() and not self._noted:
            signal.signal(signal.SIGTERM, self._before)

    @property
    def noted(self) -> bool:
        """Whether this process has been asked to stop."""
        return self._noted

    def raise_if_any(self, is_asked: bool) -> None:
        """To be called by all workers after the same step.

        Args:
            is_asked: Whether this one wants the end, for instance as `noted` says.

        Raises:
            StopTraining: If one of them does.
        """
        if self._several_workers:
            is_asked = float(self._sum(tf.constant(float(is_asked)))) > 0
        if is_asked:
            raise StopTraining

    def _sum_over_replicas(self, flag: tf.Tensor) -> tf.Tensor:
        return self._strategy.reduce("SUM", self._strategy.run(lambda value: value, args=(flag,)), axis=None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = True
        signal.signal(signal.SIGTERM, self._before)
