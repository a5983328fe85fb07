"""Damaged and hostile files of weights give one sentence, quickly and in little memory."""

import io
import json
import pickle
import random
import tracemalloc
import zipfile
from pathlib import Path

import numpy as np
import pytest
from torch_files import tensor_of_array, write_legacy, write_zip

from deeplab2_like.errors import UserError
from deeplab2_like.weights.files import read_checkpoint

ARRAYS = {"conv.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "steps": np.array(3)}


def npz(*, compressed: bool = False, **arrays: np.ndarray) -> bytes:
    stream = io.BytesIO()
    (np.savez_compressed if compressed else np.savez)(stream, **arrays)
    return stream.getvalue()


def npy(header: str) -> bytes:
    """A `.npz` of one array with a header as given and 8 bytes of data."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as file:
        file.writestr("a.npy", b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header.encode() + bytes(8))
    return stream.getvalue()


def safetensors(header: dict[str, object], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def write_example(path: Path, kind: str) -> None:
    """Writes `ARRAYS`."""
    tensors = {name: tensor_of_array(array, str(index)) for index, (name, array) in enumerate(ARRAYS.items())}
    if kind == "torch_zip":
        write_zip(path, {"model": tensors})
    elif kind == "torch_legacy":
        write_legacy(path, {"model": tensors})
    elif kind.startswith("pickle"):
        path.write_bytes(pickle.dumps(ARRAYS, protocol=int(kind[-1])))
    elif kind == "safetensors":
        header: dict[str, object] = {
            "conv.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
            "steps": {"dtype": "I64", "shape": [], "data_offsets": [24, 32]},
        }
        path.write_bytes(safetensors(header, b"".join(array.tobytes() for array in ARRAYS.values())))
    else:
        path.write_bytes(npz(compressed=kind == "npz_compressed", **ARRAYS))


SUFFIXES = {
    "pickle0": ".pkl",
    "pickle2": ".pkl",
    "pickle5": ".pkl",
    "npz": ".npz",
    "npz_compressed": ".npz",
    "torch_zip": ".pth",
    "torch_legacy": ".pth",
    "safetensors": ".safetensors",
}


@pytest.fixture(params=[kind for kind in SUFFIXES if kind != "pickle0"])
def example(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    path = tmp_path / f"model{SUFFIXES[request.param]}"
    write_example(path, request.param)
    return path


def test_examples(example: Path) -> None:
    state = read_checkpoint(example)
    assert list(state) == list(ARRAYS)
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(state[name], array)


def test_truncated_at_any_byte(example: Path) -> None:
    content = example.read_bytes()
    for length in range(len(content)):
        example.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"download it again\.$"):
            read_checkpoint(example)


def test_random_damage(example: Path) -> None:
    """Damage is found, or leaves arrays of numbers; formats without checksums cannot notice changed values."""
    content = example.read_bytes()
    rng = random.Random(20)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 2, 10))):
            start = rng.randrange(len(damaged))
            match rng.randrange(4):
                case 0:
                    damaged[start] ^= 1 << rng.randrange(8)
                case 1:
                    damaged[start] = rng.choice((0, 0x7F, 0x80, 0xFF))
                case 2:
                    del damaged[start : start + rng.choice((1, 8, 40))]
                case 3:
                    damaged[start:start] = rng.randbytes(rng.choice((1, 8)))
            damaged = damaged or bytearray(content)
        example.write_bytes(damaged)
        message, state = "", {}
        try:
            state = read_checkpoint(example)
        except UserError as error:
            message = str(error)
        assert state or message.startswith(f"Checkpoint '{example}' "), damaged
        assert message.isprintable(), damaged
        assert all(array.dtype.kind in "fiub" for array in state.values()), damaged


def claim(opcode: bytes, size: int, num_bytes: int) -> bytes:
    """A pickle whose only object claims to be long."""
    return b"\x80\x05" + opcode + size.to_bytes(num_bytes, "little") + b"abc."


def array_pickle(state: tuple[object, ...]) -> bytes:
    """A pickle of an array that gets a state as given."""
    reconstruct = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\x00\x85U\x01bt"
    # Without the protocol before it and the stop behind it.
    return b"\x80\x02}U\x01a" + reconstruct + b"R" + pickle.dumps(state, protocol=2)[2:-1] + b"bs."


def changed_member(content: bytes, offset: int, new: bytes) -> bytes:
    """Changes bytes in the entry of the last member in the directory at the end of a zip file.

    At 8 are the flags, at 10 the compression, and at 24 the size when unpacked.
    """
    start = content.rindex(b"PK\x01\x02") + offset
    return content[:start] + new + content[start + len(new) :]


F4 = np.dtype("<f4")
HOSTILE = {
    "long_binput.pkl": (b"\x80\x02Nr\xff\xff\xff\x25.", "holds a NoneType, not arrays by name"),
    "frame.pkl": (claim(b"\x95", 2**62, 8), "is not a readable pickle"),
    "binbytes.pkl": (claim(b"B", 2**32 - 1, 4), "is not a readable pickle"),
    "binbytes8.pkl": (claim(b"\x8e", 2**42, 8), "is not a readable pickle"),
    "bytearray8.pkl": (claim(b"\x96", 2**42, 8), "is not a readable pickle"),
    "binunicode8.pkl": (claim(b"\x8d", 2**42, 8), "is not a readable pickle"),
    "long4.pkl": (claim(b"\x8b", 2**31 - 1, 4), "is not a readable pickle"),
    "nested.pkl": (b"(" * 30_000 + b"t" * 30_000 + b".", "holds a tuple, not arrays by name"),
    "nested_key.pkl": (b"}" + b"(" * 30_000 + b"t" * 30_000 + b"Ns.", "neither text nor a whole number"),
    "huge_key.pkl": (b"}I1" + b"0" * 4000 + b"\nNs.", "neither text nor a whole number"),
    "long_bytes.pkl": (b"c__builtin__\nbytes\n(I1000000000000\ntR.", "is not a readable pickle"),
    "no_content.pkl": (array_pickle(())[:-4] + b"s.", "an array has no content"),
    "negative.pkl": (array_pickle((1, (-1,), F4, False, b"abcd")), "axis of an impossible size"),
    "overflow.pkl": (array_pickle((1, (2**61, 2**61), F4, False, b"abcd")), "do not fit its shape"),
    "zero_bytes.pkl": (array_pickle((1, (2**61, 0, 2**61), F4, False, b"")), "is not a readable pickle"),
    "many_axes.pkl": (array_pickle((1, (1,) * 65, F4, False, b"abcd")), "impossible number of axes"),
    "short_data.pkl": (array_pickle((1, (2,), F4, False, b"abcd")), "4 bytes, which do not fit its shape"),
    "objects.pkl": (pickle.dumps({"a": np.array([None])}), "holds arrays of Python objects or text"),
    "text.pkl": (pickle.dumps({"a": np.array(["b"])}), "holds arrays of Python objects or text"),
    "complex.pkl": (pickle.dumps({"a": np.array([1j])}), "only numbers are allowed"),
    "set.pkl": (pickle.dumps({1, 2}), "uses the pickle instruction EMPTY_SET"),
    "twice.pkl": (b"}(U\x01aK\x01U\x01aK\x02u.", "the name 'a' twice"),
    "twice_later.pkl": (b"}U\x01aK\x01sU\x01aK\x02s.", "it has a name twice"),
    "instructions.pkl": (b"N" * 500_001, "has more than 500000 instructions"),
    # 600 dictionaries of the same 1,000 pairs.
    "many_dictionaries.pkl": (
        b"(" + b"".join(b"M" + index.to_bytes(2, "little") + b"N\x86" for index in range(1000)) + b"lq\x00\x85q\x01"
        b"ccollections\nOrderedDict\nq\x02" + b"h\x02h\x01R" * 600 + b".",
        "has more than 500000 instructions",
    ),
    # 1,000 arrays of the same 1,000 bytes.
    "many_arrays.pkl": (
        b"X\xe8\x03\x00\x00"
        + b"a" * 1000
        + b"q\x00c_codecs\nencode\nq\x01h\x00U\x06latin1\x86q\x02"
        + b"h\x01h\x02R" * 1000
        + b".",
        "it has more arrays than bytes",
    ),
    "control.pkl": (b"c\x1b[31m\nb\n.", r"asks for '\?\[31m\.b'"),
    "escape_codes.pkl": (pickle.dumps({"\x1b[31m": 1}), "name that is too long or has control characters"),
    "long_name.pkl": (pickle.dumps({"a" * 501: 1}), "name that is too long or has control characters"),
    "underflow.pkl": (b"\x80\x02R.", r"is not a readable pickle \(it is damaged\); download it again\.$"),
    "address.pkl": (b"}Q.", "refers to data outside the pickle"),
    "objects.npz": (npy("{'descr': '|O', 'fortran_order': False, 'shape': (1,)}"), "array of type object"),
    "text.npz": (npz(a=np.array("b")), "array of type <U1"),
    "4TB.npz": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,)}"), "do not fit its shape"),
    "negative.npz": (npy("{'descr': '<f4', 'fortran_order': False, 'shape': (-2,)}"), "an impossible size"),
    "nested.npz": (npy("(" * 5000), "is not a readable .npz"),
    "twice.npz": (npz(a=F4.type(1), b=F4.type(2)).replace(b"b.npy", b"a.npy"), "two members of the same name"),
    "other.npz": (npz(a=F4.type(1)).replace(b"a.npy", b"a.txt"), r"member 'a\.txt' is no \.npy file"),
    "half.npz": (npz(a=F4.type(1))[:-30], "it is no zip file, or its end is missing"),
    "encrypted.npz": (changed_member(npz(a=F4.type(1)), 8, b"\x01"), "is encrypted"),
    "compressed.npz": (changed_member(npz(a=F4.type(1)), 10, b"\x5d"), "is compressed in a way that is not supported"),
    "4GB.npz": (changed_member(npz(a=F4.type(1)), 24, b"\xfe\xff\xff\xff"), "far more data than its size allows"),
    "nothing.npz": (npz(), "holds no arrays"),
    "page.pth": (b"\n<!DOCTYPE html><html>Sign in</html>", "is a web page, not weights"),
    "lfs.pth": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", "is a pointer of Git LFS"),
    "empty.pth": (b"", "is empty"),
    "noise.pth": (random.Random(0).randbytes(1000), "is not a readable PyTorch file"),
    "pickle.pth": (pickle.dumps(ARRAYS), "is not a readable PyTorch file"),
    "4TB.safetensors": (
        safetensors({"a": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}, b"abcd"),
        "is not a readable .safetensors file",
    ),
    "header.safetensors": ((2**62).to_bytes(8, "little") + b"{}", "is not a readable .safetensors file"),
    "type.safetensors": (
        safetensors({"a": {"dtype": "F8_E5M2", "shape": [1], "data_offsets": [0, 1]}}, b"a"),
        "holds 'a' of type F8_E5M2; convert it to float32",
    ),
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_hostile_files(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    (tmp_path / name).write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(UserError, match=message) as caught:
            read_checkpoint(tmp_path / name)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert str(caught.value).isprintable()
    assert peak < 30_000_000 + 20 * len(content)  # The instructions allowed take up to 18 MB.
