"""On a GPU: an expert cache in its memory, filled by copies beside the computation.

python -m pytest tests/gpu
"""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="NOT TESTED ON A GPU: transformers is not installed")
pytest.importorskip("zstandard", reason="NOT TESTED ON A GPU: zstandard is not installed")

import packed_models
import transformers
from test_expert_cache import EXPERTS, LAYERS, PREFIXES, packed_family, text_of

import qmoe_format
from qmoe_format import UnsupportedModelError
from qmoe_format.torch import QMoEExperts
from qmoe_format.transformers import QMoEConfig, load

if not torch.cuda.is_available():
    pytest.skip("NOT TESTED ON A GPU: torch finds none", allow_module_level=True)
pytest.importorskip("cupy", reason="NOT TESTED ON A GPU: cupy is not installed")

from qmoe_format.device_slots import CudaStreams, gpu_cache

HIDDEN, WIDTH = 512, 1024


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Records of 100 kB, so that a copy takes longer than a launch."""
    folder = tmp_path_factory.mktemp("gpu") / "packed"
    with qmoe_format.PackedModelWriter(folder) as writer:
        for number in range(LAYERS):
            spec = packed_models.layer_spec(number, EXPERTS, HIDDEN, WIDTH)
            dictionaries = qmoe_format.writer.DictionarySet()
            writer.add_layer(spec, packed_models.records(spec, dictionaries), dictionaries)
        writer.finish(packed_models.CONFIG, packed_models.RECIPE)
    return folder


@pytest.mark.parametrize("host_cache", [None, LAYERS * EXPERTS])
@pytest.mark.parametrize("prefetch", [False, True])
def test_against_experts_in_memory(path: Path, host_cache: int | None, prefetch: bool) -> None:
    """On two streams, held up so that the host and the copies run far ahead of what is computed."""
    silu = torch.nn.SiLU()
    with qmoe_format.open(path) as model:
        whole = [QMoEExperts.from_packed(model.layer(prefix), silu).cuda() for prefix in PREFIXES]
        cache = gpu_cache(model, 4, CudaStreams(0), host_cache=host_cache, prefetch=prefetch)
    cached = [QMoEExperts(module.layer, silu, cached=cache.layer(module.layer.prefix)) for module in whole]
    streams: list[Any] = [torch.cuda.Stream() for _ in range(2)]
    calls = []
    with torch.no_grad():
        for number in range(60):
            x = torch.randn(1 + number % 3, HIDDEN, device="cuda", dtype=torch.bfloat16) / 10
            index = torch.randint(EXPERTS + 1, (len(x), 2), device="cuda")
            weights = torch.rand(len(x), 2, device="cuda")
            expected = whole[number % LAYERS](x, index, weights)
            stream = streams[number % 2]
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                found = cached[number % LAYERS](x, index, weights)
                torch.cuda._sleep(1_000_000)  # what comes next on this stream is late
            calls.append((found, expected, x, index, weights))
    torch.cuda.synchronize()
    for found, expected, *_ in calls:
        torch.testing.assert_close(found, expected, rtol=2e-2, atol=1e-3)
    assert cache.host is not None
    assert cache.stats.misses > 4 and cache.host.stats.reads <= cache.stats.reads
    if host_cache:
        assert cache.host.stats.reads <= LAYERS * EXPERTS
    cache.close()


def test_memory_is_given_back(path: Path) -> None:
    gc.collect()
    before = torch.cuda.memory_allocated()
    for _ in range(3):
        with qmoe_format.open(path) as model:
            cache = gpu_cache(model, LAYERS * EXPERTS, CudaStreams(0), host_cache=LAYERS * EXPERTS)
        assert torch.cuda.memory_allocated() >= before + LAYERS * EXPERTS * cache.slot_bytes
        cache.close()
        del cache
        gc.collect()  # registered pages that were not unregistered would be refused the next time
        assert torch.cuda.memory_allocated() == before


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers", "gpt_oss"])
def test_a_whole_model(tmp_path: Path, family: str) -> None:
    model_path = packed_family(tmp_path, family)

    def text(model: Any) -> list[int]:
        model.config.pad_token_id = 0
        start = {"decoder_start_token_id": 0} if model.config.is_encoder_decoder else {}
        tokens = (torch.arange(12).reshape(1, 12) % 40).cuda()
        found = model.generate(
            tokens, max_new_tokens=12, do_sample=False, attention_mask=torch.ones_like(tokens), **start
        )
        result: list[int] = found[0].tolist()
        return result

    expected = text(load(model_path, "cuda"))
    model: Any = load(model_path, "cuda", expert_cache=3)
    assert text(model) == expected
    assert model.expert_cache.stats.reads > 3
    assert text_of(load(model_path)) == expected
    if family != "switch_transformers":
        other: Any = transformers.AutoModelForCausalLM.from_pretrained(
            model_path, device_map="cuda", quantization_config=QMoEConfig(expert_cache=3, host_cache=9)
        )
        assert text(other) == expected
        assert other.expert_cache.host.slots == 9


def test_a_graph_is_refused(path: Path) -> None:
    with qmoe_format.open(path) as model:
        cache = gpu_cache(model, 4, CudaStreams(0))
        module = QMoEExperts(model.layers[PREFIXES[0]], torch.nn.SiLU(), cached=cache.layer(PREFIXES[0]))
    x, index = torch.zeros(1, HIDDEN, device="cuda"), torch.zeros(1, 1, dtype=torch.int64, device="cuda")
    weights = torch.ones(1, 1, device="cuda")
    with torch.no_grad():
        module(x, index, weights)
        with (
            pytest.raises(UnsupportedModelError, match="cannot be captured"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
        ):
            module(x, index, weights)
    cache.close()
