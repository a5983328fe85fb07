"""Runs of label maps: a worked row, and random maps against a walk over the pixels."""

import itertools

import numpy as np
import pytest

from deeplab2_like.data import label_runs
from deeplab2_like.data.label_runs import find_run_values, find_runs


def plain_runs(*maps):
    """Groups of equal neighbors, by the standard library."""
    groups = [
        (key, len(list(group))) for key, group in itertools.groupby(zip(*(m.tolist() for m in maps), strict=True))
    ]
    return [key for key, _ in groups], [length for _, length in groups]


def test_worked_row():
    first = np.array([7, 7, 7, 8, 8, 7])
    second = np.array([1, 2, 2, 2, 2, 2])
    ends, lengths = find_runs(first)
    assert (ends.tolist(), lengths.tolist()) == ([2, 4, 5], [3, 2, 1])
    ends, lengths = find_runs(first, second)
    assert (ends.tolist(), lengths.tolist()) == ([0, 2, 4, 5], [1, 2, 2, 1])
    lengths, values = find_run_values(first, second)
    assert [v.tolist() for v in values] == [[7, 7, 8, 7], [1, 2, 2, 2]]


@pytest.mark.parametrize("block", [4, 8, 64, 2**17])
def test_random_maps(monkeypatch, block):
    # The result does not depend on the blocks: sizes that fill them, that leave one pixel, and everything between.
    monkeypatch.setattr(label_runs, "_BLOCK", block)
    random = np.random.default_rng(block)
    for size in (*range(1, 35), 63, 64, 65, 127, 128, 129, 1000):
        for changes in (0, 0.1, 0.5, 1):
            first, second = (np.cumsum(random.random(size) < changes).astype(np.int32) % 50 for _ in range(2))
            for maps in ((first,), (first, second.astype(np.uint8))):
                keys, expected = plain_runs(*maps)
                lengths, values = find_run_values(*maps)
                assert lengths.tolist() == expected
                assert list(zip(*(v.tolist() for v in values), strict=True)) == keys
                assert [v.dtype for v in values] == [m.dtype for m in maps]
                ends, lengths = find_runs(*maps)
                assert ends.tolist() == (np.cumsum(expected) - 1).tolist()
                assert lengths.tolist() == expected


def test_strided_map():
    labels = np.arange(12).reshape(3, 4) // 5
    ends, _ = find_runs(labels.T.reshape(-1))
    # Read down the columns: 0 0 1, 0 1 1, 0 1 2, 0 1 2
    assert ends.tolist() == [1, 2, 3, 5, 6, 7, 8, 9, 10, 11]
