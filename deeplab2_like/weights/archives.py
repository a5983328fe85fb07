"""Reads zip files of arrays: the members of an archive within limits, and `.npz`."""

import io
import warnings
import zipfile

import numpy as np

from deeplab2_like.errors import UserError
from deeplab2_like.weights.pickles import array_of_bytes

# Weights hardly get smaller by compression, so what grows more than this is no file of weights.
_MAX_GROWTH = 20
_FREE_GROWTH = 2**28


class Archive:
    """A zip file in memory. What its members claim about themselves is checked before any of them is unpacked.

    Args:
        content: The file.

    Attributes:
        names: Names of the members.

    Raises:
        UserError: If a member is encrypted or compressed in an unusual way, or all of them are too large when unpacked.
            The message lacks the subject.
        ValueError, zipfile.BadZipFile: If the archive is damaged.
    """

    def __init__(self, content: bytes) -> None:
        if not zipfile.is_zipfile(io.BytesIO(content)):
            raise ValueError("it is no zip file, or its end is missing")
        self._zip = zipfile.ZipFile(io.BytesIO(content))
        members = self._zip.infolist()
        self._members = {member.filename: member for member in members}
        self.names = list(self._members)
        if len(self.names) < len(members):
            raise ValueError("it has two members of the same name")
        for member in members:
            if member.flag_bits & 1:
                raise UserError("is encrypted; decrypt it, or write it again without a password")
            if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError("is compressed in a way that is not supported; write it again with numpy.savez")
        if sum(member.file_size for member in members) > _MAX_GROWTH * len(content) + _FREE_GROWTH:
            raise UserError("claims to hold far more data than its size allows; download it again from a trusted place")

    def read(self, name: str) -> bytes:
        """Reads a member.

        Args:
            name: Its name.

        Raises:
            ValueError, zipfile.BadZipFile, zlib.error: If it is missing or damaged.
        """
        if name not in self._members:
            raise ValueError(f"the member '{name}' is missing")
        size = self._members[name].file_size
        with self._zip.open(self._members[name]) as member:
            content = member.read(size)  # With a size, as the data may be longer than claimed.
        if len(content) != size:
            raise ValueError(f"the member '{name}' is cut off")
        return content


def read_npz(content: bytes) -> dict[str, np.ndarray]:
    """Reads a `.npz` file of numbers.

    Args:
        content: The file.

    Returns:
        The arrays by name; they are read-only.

    Raises:
        UserError: If it holds something else, or `Archive` refuses it. The message lacks the subject.
        ValueError, zipfile.BadZipFile: If it is damaged, among others.
    """
    archive = Archive(content)
    state = {}
    for name in archive.names:
        if not name.endswith(".npy"):
            raise ValueError(f"the member '{name}' is no .npy file")
        state[name.removesuffix(".npy")] = _read_npy(archive.read(name))
    return state


def _read_npy(content: bytes) -> np.ndarray:
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    if version not in readers:
        raise ValueError("an array has an unknown version of the format")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # The header is parsed as Python, which warns about odd literals.
        shape, is_fortran, dtype = readers[version](stream)
    if dtype.kind not in "fiub":
        raise UserError(f"holds an array of type {dtype}, but only numbers are allowed; write it again without that")
    return array_of_bytes(memoryview(content)[stream.tell() :], dtype, shape, order="F" if is_fortran else "C")
