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


def read_deeplab2_state(path: Path) -> dict[str, np.ndarray]:
    """Makes the weights of DeepLab2 by their rule, from the text file with their names and shapes."""
    state = {}
    for line in path.read_text().splitlines():
        name, sizes = line.split()
        shape = tuple(int(size) for size in sizes.split("x"))
        random = np.random.RandomState(zlib.crc32(f"{name}/.ATTRIBUTES/VARIABLE_VALUE".encode()))
        value = random.standard_normal(shape)
        variable = name.rpartition("/")[2]
        if variable == "gamma":
            value = 1 + 0.1 * value
        elif variable in ("beta", "moving_mean", "bias"):
            value = 0.1 * value
        elif variable == "moving_variance":
            value = np.exp(0.2 * value)
        else:
            value = value * np.sqrt(2 / np.prod(shape[:2] if variable == "depthwise_kernel" else shape[:-1]))
        state[name] = value.astype(np.float32)
    return state
