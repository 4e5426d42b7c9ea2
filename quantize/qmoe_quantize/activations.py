"""Activations on the disk, in an HDF5 file, so that memory does not grow with the calibration text."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import torch
from qmoe_codec.errors import HeaderError, MissingPackageError, QMoEError

from qmoe_format.files import os_errors

# HDF5 has no bfloat16; its bits are kept as an unsigned integer.
_STORED: dict[torch.dtype, tuple[str, torch.dtype]] = {
    torch.float32: ("<f4", torch.float32),
    torch.float16: ("<f2", torch.float16),
    torch.bfloat16: ("<u2", torch.uint16),
    torch.int32: ("<i4", torch.int32),
}


def h5py() -> Any:
    """The h5py package.

    Raises
    ------
    MissingPackageError
        It is not installed.
    """
    try:
        import h5py as module
    except ModuleNotFoundError:
        raise MissingPackageError("h5py is not installed: pip install 'qmoe-format[calibration]'") from None
    return module


@contextlib.contextmanager
def h5_errors(path: Path) -> Iterator[None]:
    """Turn what h5py raises about `path` into a one-line :class:`QMoEError`."""
    try:
        yield
    except OSError as error:
        reason = os.strerror(error.errno) if error.errno else str(error)
        raise QMoEError(reason, file=path) from error
    except (KeyError, RuntimeError, TypeError, ValueError) as error:
        raise HeaderError(f"not what it should be: {error}", file=path) from error


_MARGIN = 1 << 16  # bytes: what HDF5 writes beside the values


def reserve(path: Path, nbytes: int) -> None:
    """Have room on the disk for so many bytes of a file, and a margin, before HDF5 is asked to write them.

    A write that fails within HDF5 is reported late, more than once, and may end the process when it exits.

    Raises
    ------
    QMoEError
        The disk is full, or the file would be too large.
    """
    if not hasattr(os, "posix_fallocate"):
        return
    with os_errors(path):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            os.posix_fallocate(descriptor, 0, nbytes + _MARGIN)
        finally:
            os.close(descriptor)


class Activations:
    """Named arrays of rows in one file; a context manager.

    Parameters
    ----------
    path : Path
    create : bool
        Make a new file, in place of one that is there; otherwise open one.
    change : bool
        Whether one that is opened may be written to. A file is not opened so unless it must be: what a
        process leaves open for writing when it is killed may not be opened again.
    """

    def __init__(self, path: Path, *, create: bool, change: bool = False) -> None:
        self.path = path
        self._written = create or change
        self._nbytes = 0
        if create:
            reserve(path, 0)
        with h5_errors(path):
            self._file = h5py().File(path, "w" if create else "r+" if change else "r")

    def make(self, name: str, shape: tuple[int, ...], dtype: torch.dtype, *, zero: bool = False) -> None:
        """Make an array; its values are undefined until written, unless `zero`."""
        self._nbytes += math.prod(shape) * np.dtype(_STORED[dtype][0]).itemsize
        reserve(self.path, self._nbytes)
        with h5_errors(self.path):
            if name in self._file:
                del self._file[name]
            made = self._file.create_dataset(name, shape, _STORED[dtype][0])
            made.attrs["dtype"] = str(dtype).removeprefix("torch.")
            if zero:
                empty = np.zeros((min(1024, shape[0]), *shape[1:]), _STORED[dtype][0])
                for start in range(0, shape[0], len(empty) or 1):
                    made[start : start + len(empty)] = empty[: shape[0] - start]

    def write(self, name: str, start: int, rows: torch.Tensor) -> None:
        """Write rows from `start` on."""
        data = rows.detach().cpu().contiguous()
        array = data.view(_STORED[data.dtype][1]).numpy()
        with h5_errors(self.path):
            self._file[name][start : start + len(array)] = array

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Rows [start, stop), on the CPU."""
        with h5_errors(self.path):
            stored = self._file[name]
            dtype = getattr(torch, str(stored.attrs["dtype"]))
            array = stored[start:stop]
        return torch.from_numpy(array).view(dtype)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of an array."""
        with h5_errors(self.path):
            return tuple(self._file[name].shape)

    def __contains__(self, name: str) -> bool:
        return name in self._file

    def close(self) -> None:
        """Flush the file to the disk and close it."""
        with h5_errors(self.path):
            if self._file:
                self._file.close()
                if not self._written:
                    return
                descriptor = os.open(self.path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
        else:
            with contextlib.suppress(QMoEError, OSError):
                self.close()
