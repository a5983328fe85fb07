"""Settings of all tests: quiet, on the CPU, the same random numbers in every run, memory freed after each test."""

import ctypes
import gc
import os
import random
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

# TensorFlow reads these when it is first imported, which no test file does before this one. Whoever wants the tests on
# a GPU sets CUDA_VISIBLE_DEVICES.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")
# XLA compiles small programs that run once or twice, so the time that LLVM takes to optimize them is not earned back.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=1")


@pytest.fixture(autouse=True)
def _same_start_for_every_test() -> Iterator[None]:
    """Seeds all generators, and takes back a precision that a test has set.

    Keras takes seconds to import, so tests that do without it are left without it.
    """
    random.seed(0)
    np.random.seed(0)
    if "keras" in sys.modules:
        sys.modules["keras"].utils.set_random_seed(0)
    yield
    if "keras" in sys.modules:
        sys.modules["keras"].config.set_dtype_policy("float32")


# --- Memory. ----------------------------------------------------------------------------------------------------------

_PEAK = pytest.StashKey[float]()
_START = pytest.StashKey[float]()


def pytest_collection_finish() -> None:
    if "tensorflow" in sys.modules:
        from tensorflow.python.framework import ops

        # A program that XLA has compiled stays in memory until the process ends, and with it the Python stack of each
        # of its operations as text, which below pytest and Keras is deep: half of what a program takes.
        ops.pywrap_tf_session.TF_SetOpStackTrace = lambda operation, stack: None
    # The imported modules stay, so the collections after each test need not look at them.
    gc.collect()
    gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Frees the graphs, models and compiled functions of a test after its last fixture is gone."""
    result = yield
    if "tensorflow" in sys.modules:
        from tensorflow.python.framework import ops

        # For each function with a custom gradient that is traced, TensorFlow registers a gradient under a new name. It
        # never removes it, and the gradient holds the whole graph.
        gradients = ops.gradient_registry._registry
        for name in [name for name in gradients if name.startswith("CustomGradient-")]:
            del gradients[name]
        if "keras" in sys.modules:
            sys.modules["keras"].utils.clear_session(free_memory=False)
        gc.collect()
        _return_freed_memory()
    return result


def _return_freed_memory() -> None:
    """Gives free memory back to the system, where the C library is one that keeps it and can be asked to (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def _peak_memory() -> float:
    """The most memory that this process has held, in GB."""
    # Kilobytes on Linux, bytes on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_START] = time.monotonic()
    config.stash[_PEAK] = 0.0


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):  # In a worker of pytest-xdist.
        session.config.workeroutput["peak_memory"] = _peak_memory()


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: object) -> None:
    """Called by pytest-xdist when a worker ends; one that crashed has no output."""
    peak = getattr(node, "workeroutput", {}).get("peak_memory", 0.0)
    node.config.stash[_PEAK] = max(node.config.stash[_PEAK], peak)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    minutes, seconds = divmod(round(time.monotonic() - config.stash[_START]), 60)
    peak = config.stash[_PEAK] or _peak_memory()
    terminalreporter.write_line(f"Peak memory of a test process: {peak:.1f} GB. Wall time: {minutes}:{seconds:02} min.")
