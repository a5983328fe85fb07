"""Which signals ask a training to stop, and what a second one does."""

import os
import signal
from collections.abc import Iterator

import pytest

from deeplab2_like.trainer.stopping import StopSignal, StopTraining, exit_status
from deeplab2_like.trainer.strategy import make_strategy

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    """Those of before come back, whatever happens."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_second_signal_does_what_it_did_before(number: signal.Signals) -> None:
    received: list[int] = []
    for each in SIGNALS:
        signal.signal(each, lambda number, frame: received.append(number))
    with StopSignal(make_strategy("one_device")) as stop:
        assert stop.noted is None
        stop.raise_if_any(stop.noted)
        os.kill(os.getpid(), number)
        assert (stop.noted, received) == (number, [])
        with pytest.raises(StopTraining) as request:
            stop.raise_if_any(stop.noted)
        assert request.value.signal is number
        # Another one counts as the second, too.
        for each in SIGNALS:
            os.kill(os.getpid(), each)
        assert received == list(SIGNALS)
    os.kill(os.getpid(), number)
    assert received == [*SIGNALS, number]


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with StopSignal(make_strategy("one_device")) as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.noted is None
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.noted is signal.SIGTERM
    assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN


def test_the_exit_status_is_that_of_a_shell() -> None:
    # SIGHUP is 1, SIGINT 2, SIGTERM 15 everywhere.
    assert [exit_status(number) for number in SIGNALS] == [130, 143, 129]
