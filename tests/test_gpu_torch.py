"""The torch operators: their results by way of the host, their fakes, and what is said without a GPU."""

import subprocess
import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import packed_models
import pytest
import test_torch as packed_layers
import torch
from qmoe_codec import ArgumentError, MissingPackageError, UnsupportedModelError
from qmoe_gpu_decode import CLAMPED_SWIGLU, PackedExperts, torch_ops
from qmoe_gpu_decode.device import CudaDevice, _function
from qmoe_gpu_decode.matrices import PackedMatrices
from test_gpu_host import HostDevice, device, make_layer, pack, pytestmark  # noqa: F401

from qmoe_format.container import Gating, LayerSpec
from qmoe_format.torch import QMoEExperts, _activation_name


def matrices_on(device: HostDevice, rng: np.random.Generator) -> tuple[PackedMatrices, list[np.ndarray]]:  # noqa: F811
    several = [pack(rng, 9, 61, 10) for _ in range(2)]
    packed = PackedMatrices([p.frame for p in several], several[0].dictionaries, device)
    return packed, [p.weights for p in several]


def test_matmul_and_dequantize(device: HostDevice) -> None:  # noqa: F811
    packed, weights = matrices_on(device, np.random.default_rng())
    number = torch_ops.register(packed)
    for tokens in ((), (2, 4), (torch_ops.LARGE_BATCH,)):
        x = torch.randn(*tokens, 61)
        y = torch.ops.qmoe.matmul(number, x, 1, 9)
        torch.testing.assert_close(y, x @ torch.from_numpy(weights[1]).float().T, rtol=1e-4, atol=1e-4)
    found = torch.ops.qmoe.dequantize(number, torch.zeros(1), 1, 9, 61)
    torch.testing.assert_close(found, torch.from_numpy(weights[1]).float(), rtol=0, atol=0)
    with pytest.raises(ArgumentError, match="wrong shape"):
        torch.ops.qmoe.matmul(number, torch.zeros(1, 60), 0, 9)
    with pytest.raises(ArgumentError, match="dtype"):
        torch.ops.qmoe.matmul(number, torch.zeros(1, 61, dtype=torch.int32), 0, 9)
    del packed
    with pytest.raises(ArgumentError, match="number"):
        torch.ops.qmoe.matmul(number, torch.zeros(1, 61), 0, 9)


def test_fakes_agree_with_the_operators(device: HostDevice) -> None:  # noqa: F811
    rng = np.random.default_rng()
    packed, _ = matrices_on(device, rng)
    number = torch_ops.register(packed)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch_ops.matmul, (number, torch.randn(3, 61), 0, 9), test_utils=checks)
    torch.library.opcheck(torch_ops.dequantize, (number, torch.randn(1), 1, 9, 61), test_utils=checks)
    layer = make_layer(device, rng, 6, 100, 75, gated=True)
    x, index = torch.randn(9, 100).bfloat16(), torch.randint(0, 6, (9, 2))
    arguments = (torch_ops.register(layer.experts), x, index, torch.rand(9, 2), "silu")
    torch.library.opcheck(torch_ops.experts, arguments, test_utils=checks)


def test_compile_passes_over_the_operators(device: HostDevice) -> None:  # noqa: F811
    packed, weights = matrices_on(device, np.random.default_rng())
    number = torch_ops.register(packed)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.qmoe.matmul(number, x * 2, 0, 9) + 1

    x = torch.randn(1, 61)
    y = torch.compile(function, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(y, 2 * x @ torch.from_numpy(weights[0]).float().T + 1, rtol=1e-4, atol=1e-4)


def gpt_oss_layer(experts: int = 5, hidden: int = 70, width: int = 44) -> LayerSpec:
    """Fused, interleaved, biased, with a gating of its own."""
    layer = packed_models.layer_spec(0, experts, hidden, width)
    fused = [
        replace(p, tensor=f"{layer.prefix}.gate_up_proj", interleaved=True, bias="gate_up_proj_bias")
        for p in layer.projections[:2]
    ]
    down = replace(layer.projections[2], tensor=f"{layer.prefix}.down_proj", bias="down_proj_bias")
    return replace(layer, projections=(*fused, down), gating=Gating("clamped_swiglu", 1.702, 7.0))


def gpt_oss_module(layer: LayerSpec) -> QMoEExperts:
    """Packed experts of it, with random biases in bfloat16."""
    tensors = packed_layers.pack(layer)
    module = QMoEExperts(
        layer,
        None,
        store_bytes=len(tensors["qmoe_store"]),
        dictionaries_bytes=len(tensors["qmoe_dictionaries"]),
        bias_dtype=torch.bfloat16,
    )
    biases = {name: torch.randn_like(bias) for name, bias in module.named_parameters()}
    module.load_state_dict({**tensors, **biases})
    return module.eval()


def test_the_module_with_biases_and_a_gating(
    device: HostDevice,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """By way of the GPU's kernels, on the host, what the C core gives; also after the biases have changed."""
    monkeypatch.setattr("qmoe_gpu_decode.device.cuda_device", lambda number: device)
    module = gpt_oss_module(gpt_oss_layer())
    index, shares = torch.randint(0, 6, (9, 2)), torch.rand(9, 2)
    x = 20 * torch.randn(9, 70)  # so that both limits are met
    for _ in range(2):
        expected = module(x, index, shares)
        torch.testing.assert_close(module._on_gpu(x, index, shares), expected, rtol=1e-4, atol=1e-3)
        biases = {name: torch.randn_like(bias) for name, bias in module.named_parameters()}
        module.load_state_dict({**module.state_dict(), **biases})


def test_what_does_not_fit_the_experts(device: HostDevice) -> None:  # noqa: F811
    rng = np.random.default_rng()
    layer = make_layer(device, rng, 2, 20, 12, gated=False)
    number = torch_ops.register(layer.experts)
    arguments = (torch.randn(1, 20), torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, 1))
    with pytest.raises(ArgumentError, match="needs a gate"):
        torch.ops.qmoe.experts(number, *arguments, CLAMPED_SWIGLU, 1.0, 1.0)
    with pytest.raises(ArgumentError, match="alpha, limit"):
        torch.ops.qmoe.experts(number, *arguments, CLAMPED_SWIGLU)
    for biases in ({"up": np.zeros((2, 13), np.float32)}, {"up": np.zeros((2, 12))}, {"gate": np.zeros(1)}):
        with pytest.raises(ArgumentError, match="biases"):
            PackedExperts(b"", np.zeros((2, 3)), {}, layer.experts.projections, device, biases=biases)


def test_without_cupy_an_error_says_how_to_install_it() -> None:
    code = (
        "import sys; sys.modules['cupy'] = None\n"
        "import qmoe_codec, qmoe_gpu_decode\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    qmoe_gpu_decode.decode(b'', {})\n"
        "except qmoe_codec.MissingPackageError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install cupy" in done.stdout and done.stdout.count("\n") == 1
    assert issubclass(MissingPackageError, Exception)


class Recorded:
    """A kernel of CuPy's that is only asked."""

    shared_size_bytes = 16
    max_dynamic_shared_size_bytes = 0

    def __init__(self) -> None:
        self.kernel = SimpleNamespace(ptr=7)
        self.calls: list[tuple[tuple, dict]] = []

    def __call__(self, *args: object, **kwargs: object) -> None:
        self.calls.append((args, kwargs))


def test_what_cupy_and_the_driver_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As CuPy 14 has it: RawKernel(grid, block, arguments, shared_mem=, stream=), the stream by its `ptr`."""
    kernel, sources, asked = Recorded(), [], []
    module = SimpleNamespace(get_function=lambda name: kernel)
    fake = SimpleNamespace(
        cuda=SimpleNamespace(
            Device=lambda number: nullcontext(), get_current_stream=lambda: SimpleNamespace(ptr=5)
        ),
        RawModule=lambda **given: sources.append(given) or module,
    )
    monkeypatch.setattr("qmoe_gpu_decode.device.cupy", lambda: fake)
    monkeypatch.setattr("qmoe_gpu_decode.device.launch_overlapping", lambda *given: asked.append(given))
    place = CudaDevice(0, 132, 232448)
    try:
        place.launch("encode.cu", {}, "seal", (3, 1), 32, 0, (np.uint64(9), np.uint32(1)), stream=11)
        place.launch("encode.cu", {}, "seal", (3, 1), 32, 0, (np.uint64(9), np.uint32(1)))
        place.launch("matmul.cu", {"OVERLAP": 1}, "matmul", (2, 1), 64, 100, (np.uint32(1),), stream=11)
    finally:
        _function.cache_clear()
    assert [kwargs["stream"].ptr for _, kwargs in kernel.calls] == [11, 5]
    assert kernel.calls[0][0] == ((3, 1), (32,), (9, 1)) and kernel.calls[0][1]["shared_mem"] == 0
    assert asked == [(7, (2, 1), 64, 100, (1,), 11)]
    assert len(sources) == 2 and "#define OVERLAP 1" in sources[1]["code"]
    assert kernel.max_dynamic_shared_size_bytes == 232448 - 16


def test_activations_that_the_kernels_have() -> None:
    assert _activation_name(torch.nn.SiLU(), "layer") == "silu"
    assert _activation_name(torch.nn.GELU("tanh"), "layer") == "gelu_tanh"
    with pytest.raises(UnsupportedModelError, match=r"layer: activation: .*Mish"):
        _activation_name(torch.nn.Mish(), "layer")
