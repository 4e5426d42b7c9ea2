"""The launchers as torch operators, on torch's memory and its current stream.

``torch.ops.qmoe.matmul``, ``.dequantize`` and ``.experts`` have fake implementations, so that
``torch.compile`` passes over them; they wait for nothing and take scratch from torch's allocator, so that
CUDA graphs capture them (after one call to compile the kernels). What is packed stays outside of the graph,
known by a number.
"""

from __future__ import annotations

import itertools
import math
import weakref
from typing import Any

from qmoe_codec.errors import ArgumentError, MissingPackageError

from .device import CudaDevice
from .experts import ACTIVATIONS, CLAMPED_SWIGLU, DeviceExperts, Gating, launch_experts
from .matrices import PackedMatrices
from .products import launch_decode, launch_matmul

try:
    import torch
except ModuleNotFoundError as error:
    raise MissingPackageError("torch is not installed: pip install 'qmoe-format[torch]'") from error

LARGE_BATCH = 256
"""From so many tokens on, weights are unpacked to scratch and multiplied by cuBLAS."""

_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}
_INDEX_NAMES = {torch.int32: "int32", torch.int64: "int64"}
_numbers = itertools.count(1)
_packed: weakref.WeakValueDictionary[int, PackedMatrices | DeviceExperts] = weakref.WeakValueDictionary()


def register(packed: PackedMatrices | DeviceExperts) -> int:
    """The number by which the operators know it, as long as the caller keeps it."""
    number = next(_numbers)
    _packed[number] = packed
    return number


def _find(number: int, kind: type[Any]) -> Any:
    found = _packed.get(number)
    if not isinstance(found, kind):
        raise ArgumentError(
            "nothing packed has this number", field="packed", value=number, expected=kind.__name__
        )
    return found


def _name(tensor: torch.Tensor, names: dict[torch.dtype, str], field: str) -> str:
    if tensor.dtype not in names:
        raise ArgumentError("no such dtype", field=field, value=tensor.dtype, expected=list(names))
    return names[tensor.dtype]


def _stream(packed: PackedMatrices | DeviceExperts, *tensors: torch.Tensor) -> int | None:
    """torch's current stream; all tensors have to be on the device of what is packed."""
    device = packed.device
    if not isinstance(device, CudaDevice):
        return None  # the host, in tests
    for tensor in tensors:
        if tensor.device != torch.device("cuda", device.number):
            raise ArgumentError(
                "elsewhere", field="device", value=tensor.device, expected=f"cuda:{device.number}"
            )
    stream: int = torch.cuda.current_stream(device.number).cuda_stream
    return stream


@torch.library.custom_op("qmoe::dequantize", mutates_args=())
def dequantize(packed: int, like: torch.Tensor, number: int, rows: int, columns: int) -> torch.Tensor:
    """Weights [rows, columns] of matrix `number`, of the dtype of `like` and where that is."""
    matrices: PackedMatrices = _find(packed, PackedMatrices)
    _check_shape(matrices, rows, columns)
    out = like.new_empty((rows, columns))
    dtype = _name(like, _NAMES, "like")
    launch_decode(matrices, out, dtype, first=number, count=1, stream=_stream(matrices, like))
    return out


@dequantize.register_fake
def _(packed: int, like: torch.Tensor, number: int, rows: int, columns: int) -> torch.Tensor:
    return like.new_empty((rows, columns))


@torch.library.custom_op("qmoe::matmul", mutates_args=())
def matmul(packed: int, x: torch.Tensor, number: int, rows: int) -> torch.Tensor:
    """x [..., columns] times matrix `number` of the :class:`PackedMatrices`, transposed: [..., rows]."""
    matrices: PackedMatrices = _find(packed, PackedMatrices)
    if x.ndim == 0:
        raise ArgumentError("wrong shape", field="x", value=tuple(x.shape), expected="[..., columns]")
    _check_shape(matrices, rows, x.shape[-1])
    dtype, stream = _name(x, _NAMES, "x"), _stream(matrices, x)
    tokens = math.prod(x.shape[:-1])
    if tokens >= LARGE_BATCH:
        weights = x.new_empty((rows, x.shape[-1]))
        launch_decode(matrices, weights, dtype, first=number, count=1, stream=stream)
        return torch.nn.functional.linear(x, weights)
    y = x.new_empty((*x.shape[:-1], rows))
    launch_matmul(matrices, x.contiguous(), y, tokens, (dtype, dtype), number=number, stream=stream)
    return y


@matmul.register_fake
def _(packed: int, x: torch.Tensor, number: int, rows: int) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], rows))


@torch.library.custom_op("qmoe::experts", mutates_args=())
def experts(
    packed: int,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> torch.Tensor:
    """Route x [tokens, hidden] through the :class:`DeviceExperts` that index [tokens, choices] names.

    An index that is not an expert's is skipped. `activation` is one of ACTIVATIONS; `alpha` and `limit` are
    the clamped SwiGLU's.
    """
    layer: DeviceExperts = _find(packed, DeviceExperts)
    if activation not in ACTIVATIONS:
        raise ArgumentError("no such one", field="activation", value=activation, expected=list(ACTIVATIONS))
    if activation == CLAMPED_SWIGLU and not (alpha > 0 and limit > 0):
        raise ArgumentError("missing", field="alpha, limit", value=(alpha, limit), expected="above 0")
    fits = x.ndim == index.ndim == 2 and index.shape == weights.shape and len(x) == len(index)
    if not fits or x.shape[1] != layer.hidden:
        shapes = [tuple(tensor.shape) for tensor in (x, index, weights)]
        expected = f"[tokens, {layer.hidden}] and twice [tokens, choices]"
        raise ArgumentError("wrong shapes", field="x, index, weights", value=shapes, expected=expected)
    dtypes = (_name(x, _NAMES, "x"), _name(index, _INDEX_NAMES, "index"), _name(weights, _NAMES, "weights"))
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)

    def allocate(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=x.device)

    launch_experts(
        layer,
        x.contiguous(),
        index.contiguous(),
        weights.contiguous(),
        y,
        len(x),
        index.shape[1],
        activation,
        dtypes,
        allocate=allocate,
        gating=Gating(alpha, limit),
        stream=_stream(layer, x, index, weights),
    )
    return y


@experts.register_fake
def _(
    packed: int,
    x: torch.Tensor,
    index: torch.Tensor,
    weights: torch.Tensor,
    activation: str,
    alpha: float = 0.0,
    limit: float = 0.0,
) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _check_shape(matrices: PackedMatrices, rows: int, columns: int) -> None:
    if (rows, columns) != (matrices.rows, matrices.columns):
        expected = (matrices.rows, matrices.columns)
        raise ArgumentError("wrong shape", field="rows, columns", value=(rows, columns), expected=expected)
