"""Stopping on a signal: Ctrl-C, a terminal that is closed, a scheduler that takes the machine away."""

import contextlib
import os
import signal
import threading
from types import FrameType, TracebackType

import tensorflow as tf

from deeplab2_like.trainer.strategy import worker_of

# Windows has no SIGHUP.
_SIGNALS = tuple(signal.Signals[name] for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))


class StopTraining(Exception):
    """Raised between two steps, after a stop signal.

    Attributes:
        signal: The signal.
    """

    def __init__(self, number: signal.Signals) -> None:
        super().__init__(number.name)
        self.signal = number


def exit_status(number: signal.Signals) -> int:
    """Returns the exit status that shells use after a signal; with it, `train && evaluate` does not go on."""
    return 128 + number


class StopSignal:
    """Notes SIGINT, SIGTERM and SIGHUP while the context is open; a second one has its previous effect.

    A signal that is ignored when the context opens stays ignored, as `nohup` has it. Python delivers signals to the
    main thread alone; elsewhere nothing is noted.

    Args:
        strategy: The strategy; all of its workers stop if one of them gets a signal.
    """

    def __init__(self, strategy: tf.distribute.Strategy) -> None:
        self._strategy = strategy
        self._several_workers = worker_of(strategy)[1] > 1
        self._noted: signal.Signals | None = None
        self._before: dict[signal.Signals, signal._HANDLER] = {}
        self._sum = tf.function(self._sum_over_replicas)

    def __enter__(self) -> "StopSignal":
        if threading.current_thread() is threading.main_thread():
            handlers = {number: signal.getsignal(number) for number in _SIGNALS}
            # None stands for a handler that was not set from Python, which cannot be restored.
            self._before = {
                number: handler for number, handler in handlers.items() if handler not in (signal.SIG_IGN, None)
            }
            for number in self._before:
                signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._restore_handlers()

    @property
    def noted(self) -> signal.Signals | None:
        """The signal that has asked this process to stop, if any has."""
        return self._noted

    def raise_if_any(self, asked_by: signal.Signals | None) -> None:
        """Raises `StopTraining` if any worker has a signal; all workers must call it after the same step.

        Args:
            asked_by: The signal that asks this worker to stop, for instance `noted`; None for none.

        Raises:
            StopTraining: If any worker is asked to stop.
        """
        if self._several_workers:
            flags = tf.constant([float(number is asked_by) for number in _SIGNALS])
            counts = self._sum(flags).numpy().tolist()
            asked_by = next((number for number, count in zip(_SIGNALS, counts, strict=True) if count), None)
        if asked_by is not None:
            raise StopTraining(asked_by)

    def _sum_over_replicas(self, flags: tf.Tensor) -> tf.Tensor:
        return self._strategy.reduce("SUM", self._strategy.run(lambda value: value, args=(flags,)), axis=None)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._noted = signal.Signals(number)
        self._restore_handlers()
        # Not with `print`, which the signal may have interrupted. Writing to a closed terminal fails.
        with contextlib.suppress(OSError):
            notice = f"{self._noted.name}: saving and stopping after this step; a second signal ends the process now.\n"
            os.write(2, (b"\n" if os.isatty(2) else b"") + notice.encode())

    def _restore_handlers(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, handler in self._before.items():
                signal.signal(number, handler)
            self._before = {}
