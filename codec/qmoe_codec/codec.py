"""The verbs of the package: encode, decode, dequantize, matmul, and a matrix that is parsed once.

Each takes ``backend="c"`` (the C core, the default) or ``backend="reference"`` (:mod:`.reference`).
"""

from __future__ import annotations

import math
import os
import weakref
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from . import core, reference
from .dictionary import Dictionary
from .errors import ArgumentError, MemoryLimitError
from .layout import (
    LEVEL_FORMATS,
    MAXIMUM_DICTIONARIES,
    Buffer,
    FrameHeader,
    as_bytes,
)

Backend = Literal["c", "reference"]
BACKENDS: tuple[Backend, ...] = ("c", "reference")
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "float32": np.dtype("<f4"),
    "float16": np.dtype("<f2"),
    "bfloat16": np.dtype("<u2"),
}
MAXIMUM_THREADS = 256
#: Most bytes of one decoded tensor where nothing else is asked for. A frame of a few kB can hold 2^36 zeros.
MEMORY_LIMIT = 1 << 34


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


def _check_dtype(dtype: str) -> None:
    if dtype not in core.DTYPES:
        raise ArgumentError("no such dtype", field="dtype", value=dtype, expected=tuple(core.DTYPES))


def _threads(threads: int | None) -> int:
    """How many threads to use: all processors by default, as far as the C core goes."""
    if threads is None:
        return min(MAXIMUM_THREADS, len(os.sched_getaffinity(0)))
    if not 1 <= threads <= MAXIMUM_THREADS:
        raise ArgumentError(
            "out of range", field="threads", value=threads, expected=f"1 to {MAXIMUM_THREADS}"
        )
    return threads


def check_memory(size: int, limit: int, field: str) -> None:
    """Refuse a result of more than `limit` bytes, before any of it is allocated.

    Raises
    ------
    MemoryLimitError
        It is larger.
    """
    if size > limit:
        raise MemoryLimitError(
            "larger than the memory limit",
            field=field,
            value=f"{size} bytes",
            expected=f"at most {limit} bytes",
        )


def _check_output(out: NDArray[np.generic], shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
    if out.shape != shape or out.dtype != dtype or not out.flags.c_contiguous or not out.flags.writeable:
        raise ArgumentError("unfit", field="out", value=(out.shape, out.dtype), expected=(shape, dtype))


def _as_inputs(x: ArrayLike, dtype: str, columns: int) -> NDArray[np.generic]:
    """The tokens [..., columns] as the C core takes them."""
    _check_dtype(dtype)
    array = np.asarray(x)
    if dtype == "bfloat16" and array.dtype != np.uint16:
        raise ArgumentError("not bit patterns", field="x", value=array.dtype, expected="uint16")
    array = np.ascontiguousarray(array, NUMPY_DTYPES[dtype])
    if array.ndim == 0 or array.shape[-1] != columns:
        raise ArgumentError("unfit", field="x", value=array.shape, expected=f"[..., {columns}]")
    return array


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


def kernels_name() -> str:
    """Which inner loops the C core chose for this processor: portable, avx2, avx512 or avx512vbmi."""
    name: bytes = core.library().qmoe_kernels_name()
    return name.decode()


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
    memory_limit : int
        Most bytes of an array that :meth:`decode` and :meth:`dequantize` may make; with `out` they make none.

    Raises
    ------
    FormatError
        If the frame is not legal, or names a dictionary that is not at hand.
    """

    def __init__(
        self,
        frame: Buffer,
        dictionaries: Mapping[int, Dictionary],
        *,
        verify: bool = True,
        memory_limit: int = MEMORY_LIMIT,
    ) -> None:
        self._memory_limit = memory_limit
        self._buffer = np.frombuffer(as_bytes(frame), np.uint8)
        self._dictionaries = tuple(dictionaries.values())
        handles = (core.c_void_p * max(1, len(self._dictionaries)))(*[d.handle for d in self._dictionaries])
        library, error = core.library(), core.Error()
        self.handle = core.c_void_p()
        error.raise_for(
            library.qmoe_matrix_open(
                self._buffer.ctypes.data,
                self._buffer.size,
                handles,
                len(self._dictionaries),
                0 if verify else core.SKIP_BODY,
                core.byref(self.handle),
                core.byref(error),
            )
        )
        weakref.finalize(self, library.qmoe_matrix_close, self.handle)
        self.rows: int = library.qmoe_matrix_rows(self.handle)
        self.columns: int = library.qmoe_matrix_columns(self.handle)

    @property
    def nbytes(self) -> int:
        """Bytes of the frame."""
        return self._buffer.size

    @property
    def levels(self) -> NDArray[np.float32]:
        """Levels float32 [rows, 2]: low, high."""
        levels = np.empty((self.rows, 2), np.float32)
        core.library().qmoe_matrix_levels(self.handle, levels.ctypes.data)
        return levels

    def _row_range(self, rows: slice | None) -> tuple[int, int]:
        first, last, step = (rows or slice(None)).indices(self.rows)
        if step != 1:
            raise ArgumentError("rows must follow each other", field="rows", value=rows)
        return first, max(0, last - first)

    def decode(
        self,
        rows: slice | None = None,
        *,
        out: NDArray[np.int8] | None = None,
        threads: int | None = None,
    ) -> NDArray[np.int8]:
        """Trits int8 [rows, columns] of all rows, or of a slice of them; `out`, `threads` as below."""
        first, count = self._row_range(rows)
        if out is None:
            check_memory(count * self.columns, self._memory_limit, "rows × columns")
        trits = np.empty((count, self.columns), np.int8) if out is None else out
        _check_output(trits, (count, self.columns), np.dtype(np.int8))
        error = core.Error()
        error.raise_for(
            core.library().qmoe_matrix_decode(
                self.handle, first, count, trits.ctypes.data, _threads(threads), core.byref(error)
            )
        )
        return trits

    def dequantize(
        self,
        dtype: str = "float32",
        rows: slice | None = None,
        *,
        out: NDArray[np.generic] | None = None,
        threads: int | None = None,
    ) -> NDArray[np.generic]:
        """Weights [rows, columns] of all rows, or of a slice of them.

        Parameters
        ----------
        dtype : str
            float32, float16, or bfloat16 (returned as uint16 bit patterns, since NumPy has no bfloat16).
        out : ndarray, optional
            Where to write; of the right shape and dtype, C-contiguous.
        threads : int, optional
            How many threads to use; all processors by default.
        """
        _check_dtype(dtype)
        first, count = self._row_range(rows)
        shape, numpy_dtype = (count, self.columns), NUMPY_DTYPES[dtype]
        if out is None:
            size = count * self.columns * numpy_dtype.itemsize
            check_memory(size, self._memory_limit, "rows × columns")
        weights: NDArray[np.generic] = np.empty(shape, numpy_dtype) if out is None else out
        _check_output(weights, shape, numpy_dtype)
        error = core.Error()
        error.raise_for(
            core.library().qmoe_matrix_dequantize(
                self.handle,
                first,
                count,
                core.DTYPES[dtype],
                weights.ctypes.data,
                _threads(threads),
                core.byref(error),
            )
        )
        return weights

    def matmul(
        self, x: ArrayLike, threads: int | None = None, *, dtype: str = "float32"
    ) -> NDArray[np.float32]:
        """Multiply x [..., columns] by the transposed weights: float32 [..., rows].

        Computed in float32, with additions only: off by at most (columns + 3) * 2**-24 * sum |w| |x|, to
        first order.

        Parameters
        ----------
        x : array_like
            Of `dtype`; bfloat16 as uint16 bit patterns.
        threads : int, optional
            How many threads to use; all processors by default. The result does not depend on it.
        """
        array = _as_inputs(x, dtype, self.columns)
        tokens = math.prod(array.shape[:-1])
        y = np.empty((*array.shape[:-1], self.rows), np.float32)
        error = core.Error()
        error.raise_for(
            core.library().qmoe_matrix_matmul(
                self.handle,
                core.address(array),
                core.DTYPES[dtype],
                tokens,
                core.address(y),
                _threads(threads),
                core.byref(error),
            )
        )
        return y


def experts_matmul(
    matrices: Sequence[Matrix],
    x: ArrayLike,
    group_ends: ArrayLike,
    *,
    threads: int | None = None,
    dtype: str = "float32",
) -> NDArray[np.float32]:
    """Multiply the tokens of several experts by their matrices, in one call.

    Parameters
    ----------
    matrices : sequence of Matrix
        One for each group, all of one shape; one may come more than once.
    x : array_like [tokens, columns]
        The tokens of the first group, then those of the second, and so on; of `dtype`, bfloat16 as uint16 bit
        patterns.
    group_ends : array_like of int
        Where each group ends; groups may be empty.

    Returns
    -------
    ndarray of float32 [tokens, rows]
        Each token times the transposed weights of its group's matrix (see :meth:`Matrix.matmul`).
    """
    if not matrices:
        raise ArgumentError("none given", field="matrices")
    rows, columns = matrices[0].rows, matrices[0].columns
    array = _as_inputs(x, dtype, columns)
    ends = np.ascontiguousarray(group_ends, np.uint64)
    if array.ndim != 2 or ends.shape != (len(matrices),) or int(ends[-1]) != len(array):
        raise ArgumentError(
            "unfit", field="group_ends", value=ends.tolist(), expected="a rising end per matrix"
        )
    handles = (core.c_void_p * len(matrices))(*[matrix.handle for matrix in matrices])
    y = np.empty((len(array), rows), np.float32)
    error = core.Error()
    error.raise_for(
        core.library().qmoe_grouped_matmul(
            handles,
            core.address(ends),
            len(matrices),
            core.address(array),
            core.DTYPES[dtype],
            core.address(y),
            _threads(threads),
            core.byref(error),
        )
    )
    return y


def decode(
    frame: Buffer,
    dictionaries: Mapping[int, Dictionary],
    *,
    backend: Backend = "c",
    verify: bool = True,
    memory_limit: int = MEMORY_LIMIT,
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
    memory_limit : int
        Most bytes of `trits`.

    Returns
    -------
    trits : ndarray of int8 [rows, columns]
    levels : ndarray of float32 [rows, 2]

    Raises
    ------
    FormatError
        If the frame is not legal; each kind of fault has its class.
    MemoryLimitError
        If `trits` would be larger than the limit; told by the header, before anything is allocated.
    """
    _check_backend(backend)
    header = read_frame_header(frame)
    check_memory(header.rows * header.columns, memory_limit, "rows × columns")
    if backend == "reference":
        tables = {identity: dictionary.reference for identity, dictionary in dictionaries.items()}
        return reference.decode(frame, tables, verify=verify)
    matrix = Matrix(frame, dictionaries, verify=verify, memory_limit=memory_limit)
    return matrix.decode(), matrix.levels


def dequantize(
    frame: Buffer,
    dictionaries: Mapping[int, Dictionary],
    dtype: str = "float32",
    *,
    backend: Backend = "c",
    memory_limit: int = MEMORY_LIMIT,
) -> NDArray[np.generic]:
    """Weights [rows, columns] of a matrix frame in `dtype` (see :class:`Matrix`)."""
    _check_backend(backend)
    _check_dtype(dtype)
    header = read_frame_header(frame)
    check_memory(header.rows * header.columns * NUMPY_DTYPES[dtype].itemsize, memory_limit, "rows × columns")
    if backend == "c":
        return Matrix(frame, dictionaries, memory_limit=memory_limit).dequantize(dtype)
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
