"""Names, types and errors that writing and reading HDF5 files share (spec/hdf5.md)."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
from qmoe_codec.errors import MissingPackageError, QMoEError

FORMAT, VERSION = "qmoe-hdf5", "1.0"
SUFFIXES = (".h5", ".hdf5")

# Groups of the file.
FILES, SHARDS, LAYERS, TENSORS = "files", "shards", "layers", "tensors"
# Groups and datasets of a layer.
EXPERTS, TOKENS, TABLES = "experts", "tokens", "dictionaries"

_NUMPY_DTYPES = {
    **dict.fromkeys(("BOOL", "U8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), "|u1"),
    "I8": "|i1",
    **dict.fromkeys(("U16", "BF16"), "<u2"),
    "I16": "<i2",
    "F16": "<f2",
    "U32": "<u4",
    "I32": "<i4",
    "F32": "<f4",
    **dict.fromkeys(("U64", "C64"), "<u8"),
    "I64": "<i8",
    "F64": "<f8",
}
_MAXIMUM_RANK = 32  # of HDF5

Progress = Callable[[int, int], None]
"""Told how many bytes are done, and how many there are."""


def load_h5py() -> ModuleType:
    """The package h5py, or an error that says how to get it."""
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "HDF5 files need h5py, which is not installed: pip install 'qmoe-format[hdf5]'"
        ) from error
    module: ModuleType = h5py
    return module


@contextlib.contextmanager
def hdf5_errors(path: Path, kind: type[QMoEError] = QMoEError) -> Iterator[None]:
    """Turn what h5py raises into one line about `path`."""
    try:
        yield
    except QMoEError:
        raise
    except (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError, MemoryError) as error:
        lines = str(error).strip().splitlines()
        raise kind(f"HDF5: {lines[0] if lines else type(error).__name__}", file=path) from error


class Meter:
    """Counts bytes for a progress bar."""

    def __init__(self, progress: Progress | None, total: int) -> None:
        self._progress, self._total, self._done = progress, total, 0

    def add(self, nbytes: int) -> None:
        """Count bytes that are done."""
        self._done += nbytes
        if self._progress is not None:
            self._progress(self._done, self._total)


def link_name(name: str) -> str:
    """A name as HDF5 takes it: without slashes, and not of dots alone."""
    quoted = re.sub(r"[%/\0]", lambda match: f"%{ord(match[0]):02X}", name)
    return quoted if quoted.strip(".") else quoted.replace(".", "%2E") or "%"


def stored_as(dtype: str, shape: tuple[int, ...], nbytes: int) -> tuple[np.dtype[Any], tuple[int, ...]]:
    """Type and shape of the dataset of a tensor; flat bytes where HDF5 has no such tensors."""
    if dtype in _NUMPY_DTYPES and len(shape) <= _MAXIMUM_RANK:
        return np.dtype(_NUMPY_DTYPES[dtype]), shape
    return np.dtype("|u1"), (nbytes,)
