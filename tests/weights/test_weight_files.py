"""Files of released weights: `.npz`, `.pkl`, `.safetensors`, and what all formats share."""

import collections
import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from deeplab2_like.errors import UserError
from deeplab2_like.weights.files import read_checkpoint


@pytest.mark.parametrize("protocol", [2, 5])
def test_model_zoo_pickle(tmp_path: Path, protocol: int) -> None:
    arrays = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "a.steps": np.array(3)}
    content = {"model": collections.OrderedDict(arrays), "__author__": "someone", "matching_heuristics": True}
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(content, protocol=protocol))
    state = read_checkpoint(path)
    assert list(state) == ["a.weight", "a.steps"]
    np.testing.assert_array_equal(state["a.weight"], arrays["a.weight"])
    assert state["a.steps"] == 3


def test_pickle_of_numpy_1(tmp_path: Path) -> None:
    path = tmp_path / "model.pkl"
    new = pickle.dumps({"a": np.array([1.0, 2.0])}, protocol=2)
    old = new.replace(b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n")
    assert b"cnumpy.core.multiarray\n" in old
    path.write_bytes(old)
    np.testing.assert_array_equal(read_checkpoint(path)["a"], [1.0, 2.0])


def test_pickle_of_python_2(tmp_path: Path) -> None:
    """Text and the values of arrays are byte strings, and an ordered dictionary is made of a list of pairs."""
    dtype = b"cnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    values = np.array([1.0, -2.0], "<f4").tobytes()
    state = b"(K\x01(K\x02t" + dtype + b"\x89U\x08" + values + b"tb"
    path = tmp_path / "model.pkl"
    path.write_bytes(b"\x80\x02ccollections\nOrderedDict\n((l(lU\x01aa" + array + state + b"aatR.")
    assert read_checkpoint(path)["a"].tolist() == [1.0, -2.0]


def test_pickle_cannot_run_code(tmp_path: Path) -> None:
    victim = tmp_path / "made_by_the_pickle"
    path = tmp_path / "model.pkl"
    # Calls os.mkdir on being read.
    path.write_bytes(b"cos\nmkdir\n(V" + str(victim).encode() + b"\ntR.")
    with pytest.raises(UserError, match=r"model\.pkl' asks for 'os\.mkdir', but only arrays are allowed"):
        read_checkpoint(path)
    assert not victim.exists()


def test_npz(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", **{"a.weight": np.ones((2, 1), np.float32)})
    state = read_checkpoint(tmp_path / "model.npz")
    np.testing.assert_array_equal(state["a.weight"], np.ones((2, 1)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing.pkl", None, r"missing\.pkl' does not exist"),
        ("model.h5", b"", r"ends in '\.h5'; give a file that ends in \.npz, \.pkl, \.pt, \.pth or \.safetensors"),
        ("model.tar.gz", b"", r"model\.tar\.gz' is an archive; unpack it"),
        ("cut.pkl", pickle.dumps({"a": np.ones(9)})[:-20], r"cut\.pkl' is not a readable pickle"),
        ("list.pkl", pickle.dumps([1, 2]), r"list\.pkl' holds a list, not arrays by name"),
        ("text.pkl", pickle.dumps({"model": {"a": "weights"}}), r"text\.pkl' holds 'a' of type <U7"),
        ("cut.npz", b"PK\x03\x04", r"cut\.npz' is not a readable \.npz"),
    ],
)
def test_wrong_files(tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / name)


def test_safetensors(tmp_path: Path) -> None:
    header = {
        "__metadata__": {"format": "pt"},
        "a.weight": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]},
        "b": {"dtype": "BF16", "shape": [2], "data_offsets": [8, 12]},
        "c": {"dtype": "I64", "shape": [], "data_offsets": [12, 20]},
    }
    text = json.dumps(header).encode()
    # The bfloat16 are the upper halves of the float32 1.0 (0x3F800000) and -2.5 (0xC0200000).
    data = np.array([1.5, 2.5], np.float32).tobytes() + bytes.fromhex("803f 20c0") + np.array(3).tobytes()
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    state = read_checkpoint(tmp_path / "model.safetensors")
    assert {name: array.tolist() for name, array in state.items()} == {
        "a.weight": [[1.5, 2.5]],
        "b": [1.0, -2.5],
        "c": 3,
    }
    assert state["a.weight"].dtype == state["b"].dtype == np.float32


def test_safetensors_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    (tmp_path / "model.safetensors").write_bytes(b"abc")
    with pytest.raises(UserError, match=re.escape("not installed; run: pip install 'deeplab2-like[pretrained]'.")):
        read_checkpoint(tmp_path / "model.safetensors")


@pytest.mark.parametrize("container", ["model", "state_dict", "model_state", "blobs"])
def test_containers(tmp_path: Path, container: str) -> None:
    content = {container: {"module.a": np.ones(1), "module.b": 2.0}, "optimizer": {"a": [1, 2]}, "note": "text"}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content))
    assert {name: array.tolist() for name, array in read_checkpoint(tmp_path / "model.pkl").items()} == {
        "a": [1.0],
        "b": 2.0,
    }


def test_a_prefix_of_some_names_stays(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", **{"module.a": np.ones(1), "b": np.ones(1)})
    assert list(read_checkpoint(tmp_path / "model.npz")) == ["module.a", "b"]


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4, 5])
def test_arrays_of_any_protocol(tmp_path: Path, protocol: int) -> None:
    whole = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    arrays = {
        "whole": whole,
        "fortran": np.asfortranarray(whole[0]),
        "transposed": whole.transpose(1, 0, 2),
        "slices": whole[:, ::2],
        "big_endian": whole.astype(">f8"),
        "bool": whole > 3,
        "empty": whole[:0],
        "scalar": np.float16(2),
        "shared": whole,
    }
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(arrays, protocol=protocol))
    state = read_checkpoint(tmp_path / "model.pkl")
    assert list(state) == list(arrays)
    for name, array in arrays.items():
        assert state[name].dtype == array.dtype
        np.testing.assert_array_equal(state[name], array)
