"""Arrays in npz files, read without pickle and with every checksum checked."""

import math
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from util.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

_CHUNK = 1 << 20  # bytes
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


@contextmanager
def _in_one_sentence(path: Path, kind: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # a damaged archive raises almost anything
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a {kind} ({reason}): {remedy}") from error


def read_arrays(
    path: Path, names: Sequence[str], kind: str, remedy: str, optional: Sequence[str] = ()
) -> dict[str, Array]:
    """The arrays `names` of an npz, and those of `optional` that are there.

    UserError "PATH is no KIND (reason): REMEDY" for a file that is damaged or lacks a name.
    """
    with _in_one_sentence(path, kind, remedy):
        if not zipfile.is_zipfile(path):
            raise ValueError("it is empty, truncated or no npz file")
        with np.load(path, allow_pickle=False) as file:
            if missing := [name for name in names if name not in file]:
                raise ValueError(f"it lacks {' and '.join(missing)}")
            found = {name: file[name] for name in (*names, *optional) if name in file}
        for name, array in found.items():
            if not isinstance(array, np.ndarray):
                raise ValueError(f"{name} is no array")
        return found


def check_array(
    path: Path, name: str, kind: str, remedy: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and dtype of a large array after its checksum was compared, in 1 MB of memory.

    UserError as read_arrays.
    """
    with _in_one_sentence(path, kind, remedy), zipfile.ZipFile(path) as archive:
        with archive.open(f"{name}.npy") as member:
            read_header = _HEADERS[np.lib.format.read_magic(member)]
            shape, _, dtype = read_header(member)
            size = 0
            while part := member.read(_CHUNK):  # zipfile compares the checksum at the end
                size += len(part)
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {size} bytes, but the shape {shape}")
    return shape, dtype
