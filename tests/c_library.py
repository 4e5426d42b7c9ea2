"""The container reader of libqmoe (``include/qmoe.h``), bound by ctypes for tests alone."""

from __future__ import annotations

import ctypes
import os
from ctypes import POINTER, byref, c_char_p, c_int, c_int64, c_size_t, c_uint, c_uint32, c_uint64, c_void_p
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
import numpy.typing as npt
from qmoe_codec.core import Error, library

STATUS = (
    "ok",
    "truncated",
    "magic",
    "version",
    "checksum",
    "header",
    "size",
    "dictionary",
    "index",
    "payload",
    "argument",
    "memory",
    "system",
)
SKIP_BODY, READ = 1, 2
DTYPES = {"float32": 0, "bfloat16": 1, "float16": 2}


class LayerInfo(ctypes.Structure):
    _fields_ = (
        ("prefix", c_char_p),
        ("dtype", c_char_p),
        ("experts", c_uint32),
        ("projections", c_uint32),
        ("store_size", c_uint64),
        ("largest_record", c_uint64),
    )


class ProjectionInfo(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("role", c_char_p),
        ("tensor", c_char_p),
        ("rows", c_uint32),
        ("columns", c_uint32),
    )


class RecordInfo(ctypes.Structure):
    _fields_ = (("offset", c_uint64), ("size", c_uint64), ("tokens", c_int64))


class TensorInfo(ctypes.Structure):
    _fields_ = (
        ("name", c_char_p),
        ("dtype", c_char_p),
        ("shard", c_char_p),
        ("shape", POINTER(c_uint64)),
        ("dimensions", c_uint32),
        ("offset", c_uint64),
        ("size", c_uint64),
    )


_ERROR = POINTER(Error)
_SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "qmoe_status_name": (c_char_p, [c_int]),
    "qmoe_error_message": (c_void_p, [_ERROR, c_char_p, c_size_t]),
    "qmoe_model_open": (c_int, [c_char_p, c_uint, c_uint64, POINTER(c_void_p), _ERROR]),
    "qmoe_model_close": (None, [c_void_p]),
    "qmoe_model_layer_count": (c_size_t, [c_void_p]),
    "qmoe_model_layer_json": (c_char_p, [c_void_p, c_size_t]),
    "qmoe_model_layer": (c_int, [c_void_p, c_size_t, POINTER(LayerInfo), _ERROR]),
    "qmoe_model_find_layer": (c_int, [c_void_p, c_char_p, POINTER(c_size_t), _ERROR]),
    "qmoe_model_projection": (c_int, [c_void_p, c_size_t, c_uint32, POINTER(ProjectionInfo), _ERROR]),
    "qmoe_model_record": (c_int, [c_void_p, c_size_t, c_uint32, POINTER(RecordInfo), _ERROR]),
    "qmoe_model_tensor_count": (c_size_t, [c_void_p]),
    "qmoe_model_tensor": (c_int, [c_void_p, c_size_t, POINTER(TensorInfo), _ERROR]),
    "qmoe_model_find_tensor": (c_int, [c_void_p, c_char_p, POINTER(c_size_t), _ERROR]),
    "qmoe_model_read_tensor": (c_int, [c_void_p, c_size_t, c_uint64, c_void_p, c_size_t, _ERROR]),
    "qmoe_expert_open": (c_int, [c_void_p, c_size_t, c_uint32, c_uint, POINTER(c_void_p), _ERROR]),
    "qmoe_expert_close": (None, [c_void_p]),
    "qmoe_expert_matrix": (c_void_p, [c_void_p, c_uint32]),
    "qmoe_expert_record": (c_void_p, [c_void_p, POINTER(c_uint64)]),
    "qmoe_matrix_rows": (c_uint32, [c_void_p]),
    "qmoe_matrix_columns": (c_uint32, [c_void_p]),
    "qmoe_matrix_levels": (None, [c_void_p, c_void_p]),
    "qmoe_matrix_decode": (c_int, [c_void_p, c_uint32, c_uint32, c_void_p, c_uint, _ERROR]),
    "qmoe_matrix_dequantize": (c_int, [c_void_p, c_uint32, c_uint32, c_int, c_void_p, c_uint, _ERROR]),
    "qmoe_matrix_matmul": (c_int, [c_void_p, c_void_p, c_int, c_uint64, c_void_p, c_uint, _ERROR]),
}


def function(name: str) -> Any:
    """A function of the library."""
    found = getattr(library(), name)
    found.restype, found.argtypes = _SIGNATURES[name]
    return found


class RefusalError(Exception):
    """A status that is not QMOE_OK, by its name, and what the library says of it."""

    def __init__(self, status: int, error: Error) -> None:
        buffer = ctypes.create_string_buffer(512)
        function("qmoe_error_message")(byref(error), buffer, len(buffer))
        self.kind = STATUS[status]
        self.message = buffer.value.decode("utf-8", "surrogatepass")
        self.field = error.field.decode()
        self.value = error.value
        self.place = error.place.decode("utf-8", "surrogatepass")
        super().__init__(self.message)
        assert status == error.status and "\n" not in self.message


def call(name: str, *arguments: Any) -> None:
    """Call a function that gives a status and takes an error last."""
    error = Error()
    status = function(name)(*arguments, byref(error))
    if status:
        raise RefusalError(status, error)


class Matrix:
    """A matrix of an expert, which must stay open."""

    def __init__(self, handle: int) -> None:
        self.handle = handle
        self.rows = function("qmoe_matrix_rows")(handle)
        self.columns = function("qmoe_matrix_columns")(handle)

    def levels(self) -> npt.NDArray[np.float32]:
        levels = np.empty((self.rows, 2), np.float32)
        function("qmoe_matrix_levels")(self.handle, levels.ctypes.data)
        return levels

    def decode(self) -> npt.NDArray[np.int8]:
        trits = np.empty((self.rows, self.columns), np.int8)
        call("qmoe_matrix_decode", self.handle, 0, self.rows, trits.ctypes.data, 1)
        return trits

    def dequantize(self, dtype: str) -> npt.NDArray[Any]:
        """The weights; those of 16 bits as integers."""
        weights = np.empty((self.rows, self.columns), np.float32 if dtype == "float32" else np.uint16)
        call("qmoe_matrix_dequantize", self.handle, 0, self.rows, DTYPES[dtype], weights.ctypes.data, 1)
        return weights

    def matmul(self, x: npt.NDArray[np.float32], threads: int = 1) -> npt.NDArray[np.float32]:
        x = np.ascontiguousarray(x, np.float32)
        y = np.empty((len(x), self.rows), np.float32)
        call("qmoe_matrix_matmul", self.handle, x.ctypes.data, 0, len(x), y.ctypes.data, threads)
        return y


class Expert:
    """An open expert."""

    def __init__(self, model: Model, layer: int, expert: int, options: int = 0) -> None:
        handle = c_void_p()
        call("qmoe_expert_open", model.handle, layer, expert, options, byref(handle))
        self.handle = handle
        count = model.layer(layer).projections
        self.matrices = [Matrix(function("qmoe_expert_matrix")(handle, i)) for i in range(count)]
        assert function("qmoe_expert_matrix")(handle, count) is None

    def record(self) -> bytes:
        size = c_uint64()
        start = function("qmoe_expert_record")(self.handle, byref(size))
        return ctypes.string_at(start, size.value)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        function("qmoe_expert_close")(self.handle)


class Model:
    """An open model, or a shard."""

    def __init__(self, path: str | os.PathLike[str], options: int = 0, memory_limit: int = 0) -> None:
        handle = c_void_p()
        call("qmoe_model_open", os.fsencode(Path(path)), options, memory_limit, byref(handle))
        self.handle = handle

    def layer_count(self) -> int:
        return int(function("qmoe_model_layer_count")(self.handle))

    def layer(self, number: int) -> LayerInfo:
        info = LayerInfo()
        call("qmoe_model_layer", self.handle, number, byref(info))
        return info

    def layer_json(self, number: int) -> str:
        return str(function("qmoe_model_layer_json")(self.handle, number).decode())

    def find_layer(self, prefix: str) -> int:
        number = c_size_t()
        call("qmoe_model_find_layer", self.handle, prefix.encode(), byref(number))
        return number.value

    def projection(self, layer: int, number: int) -> ProjectionInfo:
        info = ProjectionInfo()
        call("qmoe_model_projection", self.handle, layer, number, byref(info))
        return info

    def record(self, layer: int, expert: int) -> RecordInfo:
        info = RecordInfo()
        call("qmoe_model_record", self.handle, layer, expert, byref(info))
        return info

    def expert(self, layer: int, expert: int, options: int = 0) -> Expert:
        return Expert(self, layer, expert, options)

    def tensor_count(self) -> int:
        return int(function("qmoe_model_tensor_count")(self.handle))

    def tensor(self, number: int) -> TensorInfo:
        info = TensorInfo()
        call("qmoe_model_tensor", self.handle, number, byref(info))
        return info

    def find_tensor(self, name: str) -> int:
        number = c_size_t()
        call("qmoe_model_find_tensor", self.handle, name.encode(), byref(number))
        return number.value

    def read_tensor(self, number: int, offset: int, size: int) -> bytes:
        buffer = ctypes.create_string_buffer(max(size, 1))
        call("qmoe_model_read_tensor", self.handle, number, offset, buffer, size)
        return buffer.raw[:size]

    def close(self) -> None:
        function("qmoe_model_close")(self.handle)
        self.handle = c_void_p()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def open_everything(path: Path, options: int = 0) -> None:
    """Open a model and every expert of it, with all checks."""
    with Model(path, options) as model:
        for layer in range(model.layer_count()):
            for expert in range(model.layer(layer).experts):
                with model.expert(layer, expert):
                    pass
