"""Settings of all tests: quiet, on the CPU, the same random numbers in every run."""

import os
import random
import sys
from collections.abc import Iterator

import numpy as np
import pytest

# TensorFlow reads these when it is first imported, which no test file does before this one. Whoever wants the tests on
# a GPU sets CUDA_VISIBLE_DEVICES.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")


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
