"""Launches that may begin before the one in front of them in the stream has ended.

CuPy has no word for it, so this is the driver's cuLaunchKernelEx with the attribute for programmatic stream
serialization (CUDA driver API, section Execution Control; compute capability 9.0). The kernel has to wait by
itself: kernels/common.cuh.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from qmoe_codec.errors import QMoEError

_PROGRAMMATIC_STREAM_SERIALIZATION = 6


class _Attribute(ctypes.Structure):
    _fields_ = (("id", ctypes.c_int), ("unused", ctypes.c_int), ("value", ctypes.c_uint64 * 8))


class _Config(ctypes.Structure):
    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared_bytes", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_Attribute)),
        ("attribute_count", ctypes.c_uint),
    )


@functools.cache
def _driver() -> ctypes.CDLL:
    return ctypes.CDLL("libcuda.so.1")


def launch_overlapping(
    function: int,
    grid: tuple[int, int],
    threads: int,
    shared_bytes: int,
    arguments: Sequence[np.generic | NDArray[np.void]],
    stream: int,
) -> None:
    """Launch a kernel, `function` being its CUfunction and `stream` a cudaStream_t.

    Raises
    ------
    QMoEError
        The driver refuses.
    """
    boxes = [np.array(argument) for argument in arguments]
    pointers = (ctypes.c_void_p * len(boxes))(*[box.ctypes.data for box in boxes])
    attribute = _Attribute(_PROGRAMMATIC_STREAM_SERIALIZATION, 0, (ctypes.c_uint64 * 8)(1))
    config = _Config(
        (ctypes.c_uint * 3)(*grid, 1),
        (ctypes.c_uint * 3)(threads, 1, 1),
        shared_bytes,
        stream,
        ctypes.pointer(attribute),
        1,
    )
    status = _driver().cuLaunchKernelEx(ctypes.byref(config), ctypes.c_void_p(function), pointers, None)
    if status:
        raise QMoEError("the driver refuses a launch", field="cuLaunchKernelEx", value=status, expected="0")
