"""Files of Detectron2's weights."""

import collections
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from deeplab2_like.errors import UserError
from deeplab2_like.weights.detectron2 import read_checkpoint


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
        ("model.h5", b"", r"ends in '\.h5'; allowed are \.pkl, \.npz and \.pth"),
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


def test_pth_without_pytorch_says_how_to_convert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    (tmp_path / "model.pth").write_bytes(b"PK")
    with pytest.raises(UserError, match=re.escape("needs PyTorch, which is not installed; convert it to .npz")):
        read_checkpoint(tmp_path / "model.pth")
