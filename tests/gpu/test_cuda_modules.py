"""On a GPU: modules of packed experts.

python -m pytest tests/gpu
"""

import pytest
import torch

pytest.importorskip("safetensors", reason="NOT TESTED ON A GPU: safetensors is not installed")
pytest.importorskip("zstandard", reason="NOT TESTED ON A GPU: zstandard is not installed")

import test_torch as packed_layers
from test_gpu_torch import gpt_oss_layer, gpt_oss_module

if not torch.cuda.is_available():
    pytest.skip("NOT TESTED ON A GPU: torch finds none", allow_module_level=True)
pytest.importorskip("cupy", reason="NOT TESTED ON A GPU: cupy is not installed")


def test_the_experts_module_with_biases_and_a_gating() -> None:
    module = gpt_oss_module(gpt_oss_layer(8, 256, 96))
    hidden = 20 * torch.randn(20, 256)
    index, shares = torch.randint(0, 9, (20, 2)), torch.rand(20, 2)
    with torch.no_grad():
        expected = module(hidden, index, shares)
        found = module.cuda()(hidden.cuda(), index.cuda(), shares.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-2)


def test_the_experts_module_gives_on_a_gpu_what_it_gives_on_the_cpu() -> None:
    layer = packed_layers.spec(experts=8, hidden=256, width=96)
    module = packed_layers.module_of(layer, packed_layers.pack(layer))
    hidden = torch.randn(20, 256)
    index, shares = torch.randint(0, 9, (20, 2)), torch.rand(20, 2)
    with torch.no_grad():
        expected = module(hidden, index, shares)
        found = module.cuda()(hidden.cuda(), index.cuda(), shares.cuda())
    torch.testing.assert_close(found.cpu(), expected, rtol=1e-4, atol=1e-4)
