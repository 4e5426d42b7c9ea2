"""The verbs of :mod:`qmoe_codec`, on arrays of CuPy."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from qmoe_codec import LEVEL_FORMATS, Dictionary
from qmoe_codec.errors import ArgumentError
from qmoe_codec.layout import Buffer

from .device import Device, cuda_device, cupy
from .encoding import launch_encode
from .matrices import PackedMatrices
from .products import ARRAY_DTYPES, check_dtype, launch_decode, launch_matmul

WEIGHT_DTYPES = ("float32", "bfloat16", "float16")
LARGE_BATCH = 256
"""From so many tokens on, weights are unpacked to scratch and multiplied by cuBLAS."""


def _shared(array: Any) -> Any:
    """An array of another library as CuPy's, over the same memory."""
    return array if hasattr(array, "flags") else cupy().from_dlpack(array)


class Matrix:
    """A packed matrix on a GPU.

    Parameters
    ----------
    frame : buffer
        Exactly one matrix frame, on the host; it is checked there and copied as it is.
    dictionaries : mapping of int to Dictionary
        Dictionaries by id.
    verify : bool
        Whether checksum and codewords are checked too; header and row index always are.
    device : Device, optional
        By default the current CUDA device.

    Raises
    ------
    FormatError
        The frame is not legal.
    MissingPackageError
        There is no CuPy or no GPU.
    """

    def __init__(
        self,
        frame: Buffer,
        dictionaries: Mapping[int, Dictionary],
        *,
        verify: bool = True,
        device: Device | None = None,
    ) -> None:
        self.packed = PackedMatrices([frame], dictionaries, device or cuda_device(), verify=verify)
        self.rows, self.columns = self.packed.rows, self.packed.columns

    def decode(self) -> Any:
        """Trits int8 [rows, columns]."""
        return self._unpacked("int8")

    def dequantize(self, dtype: str = "float32") -> Any:
        """Weights [rows, columns] in float32, float16, or bfloat16 as uint16 bit patterns."""
        check_dtype(dtype, "dtype", WEIGHT_DTYPES)
        return self._unpacked(dtype)

    def _unpacked(self, dtype: str) -> Any:
        out = self.packed.device.empty((self.rows, self.columns), ARRAY_DTYPES[dtype])
        launch_decode(self.packed, out, dtype)
        return out

    def matmul(self, x: Any) -> Any:
        """x [..., columns] times the transposed weights: [..., rows], of the dtype of x.

        Parameters
        ----------
        x : array of CuPy, or of a library that speaks DLPack
            float32, float16, or bfloat16 as uint16 bit patterns; contiguous.

        Notes
        -----
        Computed in float32, with additions only: off by at most (columns + 8) * 2**-24 * sum |w| |x|, and the
        rounding to the dtype. From LARGE_BATCH tokens on, by cuBLAS.
        """
        x = _shared(x)
        dtype = {"float32": "float32", "float16": "float16", "uint16": "bfloat16"}.get(str(x.dtype))
        if dtype is None:
            raise ArgumentError("no such dtype", field="x", value=x.dtype, expected=WEIGHT_DTYPES)
        if x.ndim == 0 or x.shape[-1] != self.columns or not x.flags.c_contiguous:
            raise ArgumentError(
                "unfit", field="x", value=x.shape, expected=f"contiguous [..., {self.columns}]"
            )
        tokens = math.prod(x.shape[:-1])
        if tokens >= LARGE_BATCH and dtype != "bfloat16":
            return x @ self.dequantize(dtype).T
        y = self.packed.device.empty((*x.shape[:-1], self.rows), str(x.dtype))
        launch_matmul(self.packed, x, y, tokens, (dtype, dtype))
        return y


def decode(frame: Buffer, dictionaries: Mapping[int, Dictionary]) -> Any:
    """Trits int8 [rows, columns] of a matrix frame, on the GPU (see :class:`Matrix`)."""
    return Matrix(frame, dictionaries).decode()


def dequantize(frame: Buffer, dictionaries: Mapping[int, Dictionary], dtype: str = "float32") -> Any:
    """Weights [rows, columns] of a matrix frame, on the GPU (see :meth:`Matrix.dequantize`)."""
    return Matrix(frame, dictionaries).dequantize(dtype)


def matmul(x: Any, frame: Buffer, dictionaries: Mapping[int, Dictionary]) -> Any:
    """Multiply x [..., columns] by the transposed weights of a matrix frame (see :meth:`Matrix.matmul`)."""
    return Matrix(frame, dictionaries).matmul(x)


def encode(
    trits: Any,
    levels: Any,
    dictionary: Dictionary | Sequence[Dictionary] | None,
    *,
    level_format: str = "bfloat16",
    selectors: Any = None,
    device: Device | None = None,
) -> Any:
    """Encode a ternary matrix on the GPU: the frame, uint8, there.

    Parameters
    ----------
    trits : array of int8 [rows, columns]
    levels : array of float32 [rows, 2]
        Both on the GPU and contiguous, of CuPy or of a library that speaks DLPack.
    dictionary, level_format
        As for :func:`qmoe_codec.encode`, which gives the same bytes.
    selectors : array of uint8 [rows], optional
        Which of several dictionaries each row uses; on the GPU.

    Raises
    ------
    ArgumentError
        If an argument has the wrong shape or holds values that the frame cannot.
    """
    device = device or cuda_device()
    if level_format not in LEVEL_FORMATS:
        raise ArgumentError(
            "no such format", field="level_format", value=level_format, expected=LEVEL_FORMATS
        )
    trits, levels = _shared(trits), _shared(levels)
    selectors = None if selectors is None else _shared(selectors)
    rows = trits.shape[0] if trits.ndim == 2 else 0
    arrays = [("trits", trits, "int8", trits.shape), ("levels", levels, "float32", (rows, 2))]
    if selectors is not None:
        arrays.append(("selectors", selectors, "uint8", (rows,)))
    for name, array, dtype, shape in arrays:
        if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous or trits.ndim != 2:
            found = (array.shape, str(array.dtype))
            raise ArgumentError("unfit", field=name, value=found, expected=f"contiguous {dtype} {shape}")
    dictionaries = (
        () if dictionary is None else (dictionary,) if isinstance(dictionary, Dictionary) else dictionary
    )
    number = LEVEL_FORMATS.index(level_format)
    return launch_encode(device, trits, levels, trits.shape, tuple(dictionaries), number, selectors=selectors)
