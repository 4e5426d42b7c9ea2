"""On a GPU: every kernel against NumPy, on torch's memory and streams, in CUDA graphs. One command:

python -m pytest tests/gpu

Nothing is needed here but NumPy, torch, CuPy, pytest and hypothesis, and the C core.
"""

import os
from collections.abc import Callable

import numpy as np
import pytest
import qmoe_codec
import qmoe_gpu_decode
import torch
from qmoe_codec import encode
from qmoe_gpu_decode import torch_ops
from qmoe_gpu_decode.device import cuda_device
from qmoe_gpu_decode.matrices import PackedMatrices
from qmoe_gpu_decode.products import ARRAY_DTYPES, launch_decode, launch_matmul, launch_tiles
from test_gpu_host import (
    ROUNDING,
    SHAPES,
    Packed,
    damage,
    dictionaries_of,
    from_bits,
    make_layer,
    pack,
    product_bound,
    silu,
    to_bits,
)

if not torch.cuda.is_available():
    pytest.skip("NOT TESTED ON A GPU: torch finds none", allow_module_level=True)
cupy = pytest.importorskip("cupy", reason="NOT TESTED ON A GPU: cupy is not installed")
if os.environ.get("QMOE_EXACT_BUFFERS"):
    cupy.cuda.set_allocator(None)  # for a memory checker: no array is a part of a larger one

LARGE_SHAPES = [*SHAPES, (768, 3072), (6144, 2080), (257, 40000)]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def poisoned(shape: tuple[int, ...], dtype: str) -> "cupy.ndarray":
    array = cupy.empty(shape, dtype)
    array.view("uint8").fill(0xA5)
    return array


@pytest.mark.parametrize("bits", [0, 8, 10, 12, 16])
def test_decode(bits: int) -> None:
    rng = np.random.default_rng()
    for number, (rows, columns) in enumerate(LARGE_SHAPES):
        level_format = qmoe_codec.LEVEL_FORMATS[number % 4]
        packed = pack(rng, rows, columns, bits, count=1 + number % 4, level_format=level_format)
        matrices = PackedMatrices([packed.frame], packed.dictionaries, cuda_device())
        weights = qmoe_codec.Matrix(packed.frame, packed.dictionaries)
        for dtype in ("int8", "float32", "bfloat16", "float16"):
            out = poisoned((1, rows, columns), ARRAY_DTYPES[dtype])
            launch_decode(matrices, out, dtype)
            expected = packed.trits if dtype == "int8" else weights.dequantize(dtype)
            np.testing.assert_array_equal(cupy.asnumpy(out[0]), expected)


def weights_of(packed: Packed) -> np.ndarray:
    return qmoe_codec.dequantize(packed.frame, packed.dictionaries).astype(np.float64)


@pytest.mark.parametrize("tokens", [1, 2, 3, 8, 17, 32])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matmul_against_float64(tokens: int, dtype: str) -> None:
    rng = np.random.default_rng()
    for number, (rows, columns) in enumerate(LARGE_SHAPES):
        packed = pack(rng, rows, columns, (0, 8, 10, 12, 16)[number % 5], count=1 + number % 4)
        matrices = PackedMatrices([packed.frame], packed.dictionaries, cuda_device())
        bits = to_bits(rng.normal(size=(tokens, columns)) / 8, dtype)
        x, weights = from_bits(bits, dtype), weights_of(packed)
        y = poisoned((tokens, rows), ARRAY_DTYPES[dtype])
        launch_matmul(matrices, cupy.asarray(bits), y, tokens, (dtype, dtype))
        expected = x @ weights.T
        bound = product_bound(x, weights, columns) + ROUNDING[dtype] * np.abs(expected) * 1.01 + 1e-7
        assert (np.abs(from_bits(cupy.asnumpy(y), dtype) - expected) <= bound).all()


@pytest.mark.parametrize(("tokens", "dtype"), [(32, "bfloat16"), (200, "bfloat16"), (45, "float16")])
def test_tiles_of_tensor_cores(tokens: int, dtype: str) -> None:
    rng = np.random.default_rng()
    for number, (rows, columns) in enumerate(LARGE_SHAPES):
        packed = pack(rng, rows, columns, (0, 8, 10, 12, 16)[number % 5], count=1 + number % 4)
        matrices = PackedMatrices([packed.frame], packed.dictionaries, cuda_device())
        bits = to_bits(rng.normal(size=(tokens, columns)) / 8, dtype)
        x, weights = from_bits(bits, dtype), from_bits(to_bits(weights_of(packed), dtype), dtype)
        y = poisoned((tokens, rows), ARRAY_DTYPES[dtype])
        if launch_tiles(matrices, cupy.asarray(bits), y, tokens, dtype):
            expected = x @ weights.T
            bound = product_bound(x, weights, columns) + ROUNDING[dtype] * np.abs(expected) * 1.01 + 1e-7
            assert (np.abs(from_bits(cupy.asnumpy(y), dtype) - expected) <= bound).all()
        else:
            assert columns > 10000


@pytest.mark.parametrize("bits", [0, 8, 10, 12, 16])
def test_encode_gives_the_bytes_of_the_cpu(bits: int) -> None:
    rng = np.random.default_rng()
    for number, (rows, columns) in enumerate(LARGE_SHAPES):
        packed = pack(rng, rows, columns, bits)
        dictionaries = dictionaries_of(bits, 1 + number % 4)
        selectors = rng.integers(0, max(1, len(dictionaries)), rows).astype(np.uint8)
        level_format = qmoe_codec.LEVEL_FORMATS[number % 4]
        arrays = [torch.from_numpy(a).cuda() for a in (packed.trits, packed.levels, selectors)]
        frame = qmoe_gpu_decode.encode(
            arrays[0], arrays[1], dictionaries or None, level_format=level_format, selectors=arrays[2]
        )
        expected = encode(
            packed.trits,
            packed.levels,
            dictionaries or None,
            level_format=level_format,
            selectors=selectors,
        )
        assert bytes(cupy.asnumpy(frame)) == expected


def captured(function: Callable[[], torch.Tensor]) -> tuple[torch.cuda.CUDAGraph, torch.Tensor]:
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()  # compiles the kernels
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph, result


@pytest.mark.parametrize(
    ("tokens", "choices", "experts"), [(1, 8, 16), (64, 1, 128), (64, 8, 16), (300, 2, 6)]
)
def test_experts_in_a_graph(tokens: int, choices: int, experts: int) -> None:
    rng = np.random.default_rng()
    layer = make_layer(cuda_device(), rng, experts, 512, 192, gated=True)
    number = torch_ops.register(layer.experts)
    x = torch.zeros(tokens, 512, dtype=torch.bfloat16, device="cuda")
    index = torch.zeros(tokens, choices, dtype=torch.int64, device="cuda")
    shares = torch.zeros(tokens, choices, device="cuda")
    graph, y = captured(lambda: torch.ops.qmoe.experts(number, x, index, shares, "silu"))
    for _ in range(2):  # other tokens and other routes through the same graph
        x.copy_(torch.randn(tokens, 512) / 10)
        index.copy_(torch.randint(-1, experts + 1, (tokens, choices)))
        shares.copy_(torch.rand(tokens, choices))
        y.fill_(float("nan"))
        graph.replay()
        inputs = x.double().cpu().numpy()
        expected, scale = np.zeros((tokens, 512)), np.zeros((tokens, 512))
        for token, choice in np.ndindex(tokens, choices):
            expert, share = int(index[token, choice]), float(shares[token, choice])
            if 0 <= expert < experts:
                w = layer.weights[expert]
                entered = silu(w["gate"] @ inputs[token]) * (w["up"] @ inputs[token])
                expected[token] += share * (w["down"] @ entered)
                scale[token] += share * (np.abs(w["down"]) @ np.abs(entered))
        bound = 5e-5 * scale + 2.0**-8 * np.abs(expected) * 1.01 + 1e-6
        assert (np.abs(y.double().cpu().numpy() - expected) <= bound).all()


def test_matmul_on_another_stream_and_compiled() -> None:
    packed = pack(np.random.default_rng(), 300, 1000, 10)
    matrices = PackedMatrices([packed.frame], packed.dictionaries, cuda_device())
    number, weights = torch_ops.register(matrices), torch.from_numpy(weights_of(packed)).cuda()
    function = torch.compile(lambda x: torch.ops.qmoe.matmul(number, x * 2, 0, 300), fullgraph=True)
    stream = torch.cuda.Stream()
    for tokens in (1, 8, torch_ops.LARGE_BATCH):
        with torch.cuda.stream(stream):
            x = torch.randn(tokens, 1000, device="cuda")
            y = function(x)
            expected = 2 * x.double() @ weights.T
        stream.synchronize()
        torch.testing.assert_close(y.double(), expected, rtol=2e-3, atol=2e-2)


def test_damaged_frames_neither_hang_nor_write_outside() -> None:
    rng = np.random.default_rng()
    for number in range(40):
        rows, columns = SHAPES[1 + number % 3]
        packed = pack(rng, rows, columns, (0, 8, 10, 12, 16)[number % 5], level_format="e4m4")
        matrices = PackedMatrices([packed.frame], packed.dictionaries, cuda_device())
        host = cupy.asnumpy(matrices.store)
        there, matrices.store = matrices.store, host
        damage(matrices, rng)
        there[...] = cupy.asarray(host)
        matrices.store = there
        memory = poisoned((rows * columns + 1024,), "int8")
        launch_decode(matrices, memory[512:-512], "int8")
        cupy.cuda.Device().synchronize()
        guard = cupy.asnumpy(cupy.concatenate([memory[:512], memory[-512:]]))
        assert (guard.view(np.uint8) == 0xA5).all()
        assert np.isin(cupy.asnumpy(memory[512:-512]), (-1, 0, 1)).all()
