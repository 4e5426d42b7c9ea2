"""Binding of the C core (``include/qmoe.h``) by ctypes. ctypes releases the GIL during every call."""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from ctypes import (
    POINTER,
    byref,
    c_char,
    c_char_p,
    c_int,
    c_int64,
    c_size_t,
    c_uint,
    c_uint32,
    c_uint64,
    c_void_p,
    string_at,
)
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import FORMAT_ERRORS, ArgumentError, FormatError, MissingPackageError, QMoEError

SKIP_BODY = 1
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}

_STATUS_KINDS = (
    "truncated",
    "magic",
    "version",
    "checksum",
    "header",
    "size",
    "dictionary",
    "index",
    "payload",
)
_STATUS_ARGUMENT = 10
_STATUS_MEMORY = 11


class Error(ctypes.Structure):
    """``qmoe_error``."""

    _fields_ = (
        ("status", c_int),
        ("value", c_int64),
        ("field", c_char * 24),
        ("expected", c_char * 72),
        ("place", c_char * 256),
    )

    def raise_for(self, status: int) -> None:
        """Raise the error class that belongs to `status`, unless it is 0."""
        if status == 0:
            return
        if status == _STATUS_MEMORY:
            raise MemoryError(f"libqmoe: {self.field.decode()}")
        kind: type[QMoEError] = ArgumentError
        if status != _STATUS_ARGUMENT:
            kind = FORMAT_ERRORS[_STATUS_KINDS[status - 1]]
        message = "illegal" if issubclass(kind, FormatError) else "not usable"
        raise kind(message, field=self.field.decode(), value=self.value, expected=self.expected.decode())


def address(array: NDArray[np.generic]) -> int:
    """Where a contiguous array begins, in a quarter of the time that ``array.ctypes`` takes."""
    buffer: Any = array
    try:
        return ctypes.addressof(c_char.from_buffer(buffer))
    except (TypeError, ValueError):  # not writable, or empty
        return array.ctypes.data


class DictionaryInfo(ctypes.Structure):
    """``qmoe_dictionary_info``."""

    _fields_ = (
        ("dictionary_id", c_uint32),
        ("bits", c_uint32),
        ("tables", c_uint32),
        ("threshold", c_uint32),
    )


_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "qmoe_version": (c_char_p, []),
    "qmoe_kernels_name": (c_char_p, []),
    "qmoe_crc32c": (c_uint32, [c_uint32, c_void_p, c_size_t]),
    "qmoe_free": (None, [c_void_p]),
    "qmoe_dictionary_open": (c_int, [c_void_p, c_size_t, POINTER(c_void_p), POINTER(Error)]),
    "qmoe_dictionary_close": (None, [c_void_p]),
    "qmoe_dictionary_get_info": (None, [c_void_p, POINTER(DictionaryInfo)]),
    "qmoe_dictionary_words": (POINTER(c_uint32), [c_void_p]),
    "qmoe_matrix_open": (
        c_int,
        [c_void_p, c_size_t, POINTER(c_void_p), c_size_t, c_uint, POINTER(c_void_p), POINTER(Error)],
    ),
    "qmoe_matrix_close": (None, [c_void_p]),
    "qmoe_matrix_rows": (c_uint32, [c_void_p]),
    "qmoe_matrix_columns": (c_uint32, [c_void_p]),
    "qmoe_matrix_levels": (None, [c_void_p, c_void_p]),
    "qmoe_matrix_decode": (c_int, [c_void_p, c_uint32, c_uint32, c_void_p, c_uint, POINTER(Error)]),
    "qmoe_matrix_dequantize": (
        c_int,
        [c_void_p, c_uint32, c_uint32, c_int, c_void_p, c_uint, POINTER(Error)],
    ),
    "qmoe_matrix_matmul": (
        c_int,
        [c_void_p, c_void_p, c_int, c_uint64, c_void_p, c_uint, POINTER(Error)],
    ),
    "qmoe_grouped_matmul": (
        c_int,
        [POINTER(c_void_p), c_void_p, c_size_t, c_void_p, c_int, c_void_p, c_uint, POINTER(Error)],
    ),
    "qmoe_encode": (
        c_int,
        [
            *(c_void_p, c_void_p, c_uint32, c_uint32, POINTER(c_void_p), c_size_t, c_void_p, c_uint),
            *(POINTER(c_void_p), POINTER(c_uint64), POINTER(Error)),
        ],
    ),
}


def _library_path() -> Path:
    """The shared library beside this package, or the one that ``QMOE_LIBRARY`` names."""
    override = os.environ.get("QMOE_LIBRARY")
    if override:
        return Path(override)
    name = {"darwin": "libqmoe.dylib", "win32": "qmoe.dll"}.get(sys.platform, "libqmoe.so")
    with resources.as_file(resources.files("qmoe_codec").joinpath(name)) as path:
        return path


@functools.cache
def library() -> ctypes.CDLL:
    """The loaded C core.

    Raises
    ------
    MissingPackageError
        If the shared library is not installed.
    """
    path = _library_path()
    try:
        loaded = ctypes.CDLL(str(path))
    except OSError as error:
        raise MissingPackageError(
            f"the C core cannot be loaded ({error}); reinstall qmoe-format", file=path, expected="libqmoe"
        ) from error
    for name, (result, arguments) in _SIGNATURES.items():
        function = getattr(loaded, name)
        function.restype = result
        function.argtypes = arguments
    return loaded


__all__ = [
    "DTYPES",
    "SKIP_BODY",
    "DictionaryInfo",
    "Error",
    "byref",
    "c_uint64",
    "c_void_p",
    "library",
    "string_at",
]
