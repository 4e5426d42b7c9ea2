"""The verbs of the package: encode, decode, dequantize, matmul, and a matrix that is parsed once.

Each takes ``backend="c"`` (the C core, the default) or ``backend="reference"`` (:mod:`.reference`).
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import core, reference
from .dictionary import Dictionary
from .errors import ArgumentError
from .layout import (
    LEVEL_FORMATS,
    MAXIMUM_DICTIONARIES,
    Buffer,
    FrameHeader,
    as_bytes,
)

Backend = Literal["c", "reference"]
BACKENDS: tuple[Backend, ...] = ("c", "reference")
DTYPE_NAMES = tuple(core.DTYPES)


def crc32c(data: Buffer, value: int = 0, /) -> int:
    """CRC-32C of `data`, continuing from `value` (spec 1)."""
    octets = np.frombuffer(as_bytes(data), np.uint8)
    return int(core.library().qmoe_crc32c(value, octets.ctypes.data, octets.size))


def read_frame_header(buffer: Buffer, offset: int = 0) -> FrameHeader:
    """Header of the matrix frame at `offset`; nothing but the header is looked at (spec 4).

    Raises
    ------
    FormatError
        If the header is not legal.
    """
    return FrameHeader.parse(as_bytes(buffer)[offset:], crc32c)


def _check_backend(backend: str) -> None:
    if backend not in BACKENDS:
        raise ArgumentError("no such backend", field="backend", value=backend, expected=BACKENDS)


def _as_dictionaries(dictionary: Dictionary | Sequence[Dictionary] | None) -> tuple[Dictionary, ...]:
    if dictionary is None:
        return ()
    return (dictionary,) if isinstance(dictionary, Dictionary) else tuple(dictionary)


def _as_levels(levels: ArrayLike, rows: int) -> NDArray[np.float32]:
    array = np.ascontiguousarray(levels, np.float32)
    if array.shape != (rows, 2):
        raise ArgumentError("not a pair per row", field="levels", value=array.shape, expected=(rows, 2))
    return array


def _level_format(name: str) -> int:
    if name not in LEVEL_FORMATS:
        raise ArgumentError("no such format", field="level_format", value=name, expected=LEVEL_FORMATS)
    return LEVEL_FORMATS.index(name)


def encode(
    trits: ArrayLike,
    levels: ArrayLike,
    dictionary: Dictionary | Sequence[Dictionary] | None,
    *,
    level_format: str = "bfloat16",
    selectors: ArrayLike | None = None,
    backend: Backend = "c",
) -> bytes:
    """Encode a ternary matrix to a matrix frame (spec 4).

    Parameters
    ----------
    trits : array_like of int8 [rows, columns]
        -1, 0 and +1.
    levels : array_like of float32 [rows, 2]
        What -1 and +1 stand for in each row: low, high.
    dictionary : Dictionary, sequence of Dictionary, or None
        One dictionary; up to four of equal `bits`, among which `selectors` chooses; None for the raw codec.
    level_format : str
        float32, bfloat16, float16 or e4m4; levels are rounded to it.
    selectors : array_like of uint8 [rows], optional
        Which of several dictionaries each row uses.

    Returns
    -------
    bytes
        The same for the same arguments, from either backend.

    Raises
    ------
    ArgumentError
        If an argument has the wrong shape or holds values that the frame cannot.
    """
    _check_backend(backend)
    array = np.asarray(trits)
    if array.ndim != 2 or not (array.dtype == np.int8 or np.issubdtype(array.dtype, np.integer)):
        raise ArgumentError("not a matrix of integers", field="trits", value=(array.shape, array.dtype.name))
    if array.dtype != np.int8 and array.size and (array.min() < -1 or array.max() > 1):
        raise ArgumentError("not ternary", field="trits", value=int(abs(array).max()), expected="-1, 0 or 1")
    array = np.ascontiguousarray(array, np.int8)
    rows, columns = array.shape
    pairs = _as_levels(levels, rows)
    dictionaries = _as_dictionaries(dictionary)
    if len(dictionaries) > MAXIMUM_DICTIONARIES:
        raise ArgumentError("too many", field="dictionary", value=len(dictionaries), expected="at most 4")
    chosen = np.zeros(rows, np.uint8) if selectors is None else np.ascontiguousarray(selectors, np.uint8)
    if chosen.shape != (rows,):
        raise ArgumentError("not one per row", field="selectors", value=chosen.shape, expected=(rows,))
    if backend == "reference":
        tables = [dictionary.reference for dictionary in dictionaries]
        return reference.encode(array, pairs, tables, chosen, _level_format(level_format))

    library, error = core.library(), core.Error()
    frame, size = core.c_void_p(), core.c_uint64()
    handles = (core.c_void_p * MAXIMUM_DICTIONARIES)(*[dictionary.handle for dictionary in dictionaries])
    error.raise_for(
        library.qmoe_encode(
            array.ctypes.data,
            pairs.ctypes.data,
            rows,
            columns,
            handles,
            len(dictionaries),
            chosen.ctypes.data,
            _level_format(level_format),
            core.byref(frame),
            core.byref(size),
            core.byref(error),
        )
    )
    try:
        return core.string_at(frame, size.value)
    finally:
        library.qmoe_free(frame)


def round_levels(levels: ArrayLike, level_format: str) -> NDArray[np.float32]:
    """Levels float32 [rows, 2] as decoding will give them back after they were stored in `level_format`."""
    array = np.asarray(levels, np.float32)
    rows = array.shape[0] if array.ndim == 2 else 0
    pairs = _as_levels(array, rows)
    empty = np.zeros((rows, 0), np.int8)
    return Matrix(encode(empty, pairs, None, level_format=level_format), {}).levels


class Matrix:
    """A matrix frame, checked and parsed once; the weights stay packed.

    Parameters
    ----------
    frame : buffer
        Exactly one matrix frame; it is kept, not copied.
    dictionaries : mapping of int to Dictionary
        Dictionaries by id; those that the frame names are kept.
    verify : bool
        Also check the body: its checksum and every codeword. The header and the row index are always checked.

    Raises
    ------
    FormatError
        If the frame is not legal, or names a dictionary that is not at hand.
    """

    def __init__(self, frame: Buffer, dictionaries: Mapping[int, Dictionary], *, verify: bool = True) -> None:
        self._buffer = np.frombuffer(as_bytes(frame), np.uint8)
        self._dictionaries = tuple(dictionaries.values())
        handles = (core.c_void_p * max(1, len(self._dictionaries)))(*[d.handle for d in self._dictionaries])
        library, error = core.library(), core.Error()
        self._handle = core.c_void_p()
        error.raise_for(
            library.qmoe_matrix_open(
                self._buffer.ctypes.data,
                self._buffer.size,
                handles,
                len(self._dictionaries),
                0 if verify else core.SKIP_BODY,
                core.byref(self._handle),
                core.byref(error),
            )
        )
        weakref.finalize(self, library.qmoe_matrix_close, self._handle)
        self.rows: int = library.qmoe_matrix_rows(self._handle)
        self.columns: int = library.qmoe_matrix_columns(self._handle)

    @property
    def nbytes(self) -> int:
        """Bytes of the frame."""
        return self._buffer.size

    @property
    def levels(self) -> NDArray[np.float32]:
        """Levels float32 [rows, 2]: low, high."""
        levels = np.empty((self.rows, 2), np.float32)
        core.library().qmoe_matrix_levels(self._handle, levels.ctypes.data)
        return levels

    def _row_range(self, rows: slice | None) -> tuple[int, int]:
        first, last, step = (rows or slice(None)).indices(self.rows)
        if step != 1:
            raise ArgumentError("rows must follow each other", field="rows", value=rows)
        return first, max(0, last - first)

    def decode(self, rows: slice | None = None) -> NDArray[np.int8]:
        """Trits int8 [rows, columns] of all rows, or of a slice of them."""
        first, count = self._row_range(rows)
        trits = np.empty((count, self.columns), np.int8)
        error = core.Error()
        error.raise_for(
            core.library().qmoe_matrix_decode(
                self._handle, first, count, trits.ctypes.data, core.byref(error)
            )
        )
        return trits

    def dequantize(
        self, dtype: str = "float32", rows: slice | None = None, *, out: NDArray[np.generic] | None = None
    ) -> NDArray[np.generic]:
        """Weights [rows, columns] of all rows, or of a slice of them.

        Parameters
        ----------
        dtype : str
            float32, float16, or bfloat16 (returned as uint16 bit patterns, since NumPy has no bfloat16).
        out : ndarray, optional
            Where to write; of the right shape and dtype, C-contiguous.
        """
        if dtype not in DTYPE_NAMES:
            raise ArgumentError("no such dtype", field="dtype", value=dtype, expected=DTYPE_NAMES)
        first, count = self._row_range(rows)
        shape = (count, self.columns)
        numpy_dtype = np.dtype({"float32": "<f4", "float16": "<f2", "bfloat16": "<u2"}[dtype])
        weights = np.empty(shape, numpy_dtype) if out is None else out
        if weights.shape != shape or weights.dtype != numpy_dtype or not weights.flags.c_contiguous:
            raise ArgumentError("unfit", field="out", value=(weights.shape, dtype), expected=shape)
        error = core.Error()
        error.raise_for(
            core.library().qmoe_matrix_dequantize(
                self._handle, first, count, core.DTYPES[dtype], weights.ctypes.data, core.byref(error)
            )
        )
        return weights

    def matmul(self, x: ArrayLike, threads: int | None = None) -> NDArray[np.float32]:
        """Multiply x float32 [..., columns] by the transposed weights: float32 [..., rows].

        Parameters
        ----------
        threads : int, optional
            How many threads to use; all processors by default.
        """
        array = np.ascontiguousarray(x, np.float32)
        if array.ndim == 0 or array.shape[-1] != self.columns:
            raise ArgumentError("unfit", field="x", value=array.shape, expected=f"[..., {self.columns}]")
        count = threads if threads is not None else os.cpu_count() or 1
        if count < 1:
            raise ArgumentError("too few", field="threads", value=count, expected="at least 1")
        y = np.empty((*array.shape[:-1], self.rows), np.float32)
        error = core.Error()
        tokens = int(np.prod(array.shape[:-1]))
        error.raise_for(
            core.library().qmoe_matrix_matmul(
                self._handle, array.ctypes.data, tokens, y.ctypes.data, count, core.byref(error)
            )
        )
        return y


def decode(
    frame: Buffer, dictionaries: Mapping[int, Dictionary], *, backend: Backend = "c", verify: bool = True
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Decode a matrix frame (spec 4).

    Parameters
    ----------
    frame : buffer
        Exactly one matrix frame.
    dictionaries : mapping of int to Dictionary
        Dictionaries by id.
    verify : bool
        Check the body's checksum first.

    Returns
    -------
    trits : ndarray of int8 [rows, columns]
    levels : ndarray of float32 [rows, 2]

    Raises
    ------
    FormatError
        If the frame is not legal; each kind of fault has its class.
    """
    _check_backend(backend)
    if backend == "reference":
        tables = {identity: dictionary.reference for identity, dictionary in dictionaries.items()}
        return reference.decode(frame, tables, verify=verify)
    matrix = Matrix(frame, dictionaries, verify=verify)
    return matrix.decode(), matrix.levels


def dequantize(
    frame: Buffer,
    dictionaries: Mapping[int, Dictionary],
    dtype: str = "float32",
    *,
    backend: Backend = "c",
) -> NDArray[np.generic]:
    """Weights [rows, columns] of a matrix frame in `dtype` (see :meth:`Matrix.dequantize`)."""
    _check_backend(backend)
    if backend == "c":
        return Matrix(frame, dictionaries).dequantize(dtype)
    weights = reference.dequantize(*decode(frame, dictionaries, backend="reference"))
    return reference.convert(weights, dtype)


def matmul(
    x: ArrayLike,
    frame: Buffer,
    dictionaries: Mapping[int, Dictionary],
    *,
    threads: int | None = None,
    backend: Backend = "c",
) -> NDArray[np.float32]:
    """Multiply x float32 [..., columns] by the transposed weights of a matrix frame: float32 [..., rows]."""
    _check_backend(backend)
    if backend == "c":
        return Matrix(frame, dictionaries).matmul(x, threads)
    product = reference.matmul(np.asarray(x, np.float32), *decode(frame, dictionaries, backend="reference"))
    return product.astype(np.float32)
