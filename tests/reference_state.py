"""Reads the made-up weights of a reference model, see the README in its folder under tests/data."""

import zlib
from pathlib import Path

import numpy as np


def read_reference_state(folder: Path) -> dict[str, np.ndarray]:
    """Makes what follows the rule, and takes the rest from `state_stored.npz`."""
    with np.load(folder / "state_stored.npz") as file:
        values = file["values"]
    state: dict[str, np.ndarray] = {}
    position = 0
    for line in (folder / "state_keys.tsv").read_text().splitlines():
        name, sizes, dtype, source = line.split("\t")
        shape = tuple(int(size) for size in sizes.split(",") if size)
        if dtype == "int64":
            state[name] = np.zeros(shape, np.int64)
        elif source == "rule":
            random = np.random.RandomState(zlib.crc32(name.encode()))
            scale = np.sqrt(2 / np.prod(shape[1:]))
            state[name] = (random.standard_normal(shape) * scale).astype(np.float32)
        else:
            size = int(np.prod(shape))
            state[name] = values[position : position + size].reshape(shape)
            position += size
    assert position == len(values)
    return state
