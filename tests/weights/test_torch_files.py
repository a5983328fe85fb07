"""PyTorch's `.pth` files, read without PyTorch."""

import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch_files import WRITERS, Parameter, Storage, Tensor, tensor_of_array, write_zip

from deeplab2_like.errors import UserError
from deeplab2_like.weights.files import read_checkpoint

Writer = Callable[[Path, Any], None]


@pytest.fixture(params=list(WRITERS))
def write(request: pytest.FixtureRequest) -> Writer:
    return WRITERS[request.param]


def test_types(tmp_path: Path, write: Writer) -> None:
    arrays = {
        name: np.array([[0, 1, 2], [3, 4, 1]]).astype(name)
        for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
    }
    write(tmp_path / "model.pth", {name: tensor_of_array(array, name) for name, array in arrays.items()})
    state = read_checkpoint(tmp_path / "model.pth")
    assert list(state) == list(arrays)
    for name, array in arrays.items():
        assert state[name].dtype == name
        np.testing.assert_array_equal(state[name], array)


def test_bfloat16_becomes_float32(tmp_path: Path, write: Writer) -> None:
    # Upper halves of the float32 1.0 (0x3F800000) and -2.5 (0xC0200000).
    storage = Storage("BFloat16Storage", "0", 2, bytes.fromhex("803f 20c0"))
    write(tmp_path / "model.pth", {"a": Tensor(storage, 0, (2,), (1,))})
    state = read_checkpoint(tmp_path / "model.pth")
    assert state["a"].dtype == np.float32
    assert state["a"].tolist() == [1.0, -2.5]


def test_tensors_that_share_a_storage(tmp_path: Path, write: Writer) -> None:
    storage = Storage("IntStorage", "0", 6, np.arange(6, dtype=np.int32).tobytes())
    tensors = {
        "whole": Tensor(storage, 0, (2, 3), (3, 1)),
        "transposed": Tensor(storage, 0, (3, 2), (1, 3)),
        "second_row": Tensor(storage, 3, (3,), (1,)),
        "last_column": Tensor(storage, 2, (2,), (3,)),
        "scalar": Tensor(storage, 5, (), ()),
        "repeated": Tensor(storage, 4, (2,), (0,)),
        "empty": Tensor(storage, 0, (0, 3), (3, 1)),
    }
    write(tmp_path / "model.pth", OrderedDict(tensors))
    state = {name: array.tolist() for name, array in read_checkpoint(tmp_path / "model.pth").items()}
    assert state == {
        "whole": [[0, 1, 2], [3, 4, 5]],
        "transposed": [[0, 3], [1, 4], [2, 5]],
        "second_row": [3, 4, 5],
        "last_column": [2, 5],
        "scalar": 5,
        "repeated": [4, 4],
        "empty": [],
    }


def test_training_checkpoint(tmp_path: Path, write: Writer) -> None:
    """The weights are found between the other things of a training, without the prefix of several devices."""

    class StateDict(OrderedDict[str, Any]):
        """PyTorch writes the attribute `_metadata`; so does pickle for a dictionary with attributes."""

        def __reduce__(self) -> Any:
            return OrderedDict, (), {"_metadata": OrderedDict()}, None, iter(self.items())

    weight = Parameter(tensor_of_array(np.ones((2, 2), np.float32), "0"))
    steps = tensor_of_array(np.array(7), "1")
    content = {
        "epoch": 90,
        "arch": "resnet50",
        "best": np.float64(76.1),
        "state_dict": StateDict({"module.conv.weight": weight, "module.bn.num_batches_tracked": steps}),
        "optimizer": {"state": {0: {"momentum_buffer": weight}}, "param_groups": [{"lr": 0.1, "params": (0, 1)}]},
    }
    write(tmp_path / "model.pt", content)
    state = read_checkpoint(tmp_path / "model.pt")
    assert {name: array.tolist() for name, array in state.items()} == {
        "conv.weight": [[1.0, 1.0], [1.0, 1.0]],
        "bn.num_batches_tracked": 7,
    }


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (Tensor(Storage("IntStorage", "0", 3, bytes(8)), 0, (3,), (1,)), "storage is cut off"),
        (Tensor(Storage("IntStorage", "0", 2, bytes(8)), 0, (3,), (1,)), "larger than its storage"),
        (Tensor(Storage("IntStorage", "0", 2, bytes(8)), 1, (2,), (1,)), "larger than its storage"),
        (Tensor(Storage("IntStorage", "0", 2, bytes(8)), 0, (2**40,), (0,)), "larger than its storage"),
        (Tensor(Storage("IntStorage", "0", 2, bytes(8)), 0, (-1,), (1,)), "axis of an impossible size"),
        (Tensor(Storage("IntStorage", "0", 2, bytes(8)), 1, (2,), (-1,)), "axis of an impossible size"),
        (Tensor(Storage("IntStorage", "0", 2, bytes(8)), -1, (2,), (1,)), "described wrongly"),
        (Tensor(Storage("IntStorage", "0", 2, bytes(8)), 0, (2,), ()), "described wrongly"),
        (Tensor(Storage("IntStorage", "0", 2**70, bytes(8)), 0, (1,), (1,)), "axis of an impossible size"),
    ],
)
def test_wrong_tensors(tmp_path: Path, tensor: Tensor, message: str) -> None:
    write_zip(tmp_path / "model.pth", {"a": tensor})
    with pytest.raises(UserError, match=rf"model\.pth' is not a readable PyTorch file \(.*{message}"):
        read_checkpoint(tmp_path / "model.pth")


def test_storages_of_one_key_must_agree(tmp_path: Path) -> None:
    tensors = {kind: Tensor(Storage(kind, "0", 2, bytes(8)), 0, (2,), (1,)) for kind in ("IntStorage", "FloatStorage")}
    write_zip(tmp_path / "model.pth", tensors)
    with pytest.raises(UserError, match="two storages have the same key"):
        read_checkpoint(tmp_path / "model.pth")


def test_missing_storage(tmp_path: Path) -> None:
    write_zip(tmp_path / "model.pth", {"a": tensor_of_array(np.ones(2), "0")})
    content = (tmp_path / "model.pth").read_bytes().replace(b"archive/data/0", b"archive/data/1")
    (tmp_path / "model.pth").write_bytes(content)
    with pytest.raises(UserError, match="the member 'archive/data/0' is missing"):
        read_checkpoint(tmp_path / "model.pth")


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"a.npy": b""}, r"is not a readable PyTorch file \(it is a zip file without PyTorch's data\.pkl\)"),
        ({"m/data.pkl": b"}.", "m/byteorder": b"big"}, "was written on a big-endian machine; convert it to .npz there"),
        ({"m/data.pkl": b"c__torch__\nNet\n)R."}, r"asks for '__torch__\.Net', but only arrays are allowed"),
        ({"m/data.pkl": b"ctorch\nFloatStorage\n)R."}, "it calls an object that is no function"),
        ({"m/data.pkl": b"}."}, "holds no arrays"),
    ],
)
def test_other_zip_files(tmp_path: Path, members: dict[str, bytes], message: str) -> None:
    with zipfile.ZipFile(tmp_path / "model.pth", "w") as file:
        for name, content in members.items():
            file.writestr(name, content)
    with pytest.raises(UserError, match=message):
        read_checkpoint(tmp_path / "model.pth")
