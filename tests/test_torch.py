"""Packed experts as a torch module, against the same experts as dense float32 matrices."""

from __future__ import annotations

import copy
import runpy
import shutil
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
import qmoe_codec
import torch
from hypothesis import given
from hypothesis import strategies as st
from qmoe_codec.errors import (
    ArgumentError,
    ChecksumError,
    FormatError,
    RowIndexError,
    UnsupportedModelError,
)

import qmoe_format
from qmoe_format import LayerSpec, PackedModelWriter, Projection
from qmoe_format.torch import QMoEExperts

SILU = torch.nn.SiLU()
DICTIONARY = qmoe_codec.build_dictionary(0.85, 8)


def spec(experts: int = 4, hidden: int = 12, width: int = 20, *, gated: bool = True) -> LayerSpec:
    layer = packed_models.layer_spec(0, experts, hidden, width)
    return layer if gated else LayerSpec(layer.prefix, experts, layer.projections[1:], layer.dtype)


def pack(layer: LayerSpec) -> dict[str, torch.Tensor]:
    """The three tensors of a layer with random content (spec 6.1): every other expert is stored raw."""
    store, index = bytearray(), []
    for expert in range(layer.experts):
        dictionary = DICTIONARY if expert % 2 == 0 else None
        record = b"".join(
            qmoe_codec.encode(trits(layer, expert, number), packed_models.levels(p.rows), dictionary)
            for number, p in enumerate(layer.projections)
        )
        index.append((len(store), len(record), -1))
        store += record + bytes(-len(record) % 256)
    return {
        "qmoe_store": torch.frombuffer(store, dtype=torch.uint8),
        "qmoe_index": torch.tensor(index),
        "qmoe_dictionaries": torch.frombuffer(bytearray(DICTIONARY.frame), dtype=torch.uint8),
    }


def trits(layer: LayerSpec, expert: int, number: int) -> np.ndarray[Any, np.dtype[np.int8]]:
    projection = layer.projections[number]
    return packed_models.trits(projection.rows, projection.columns, len(layer.prefix), expert, number)


def module_of(layer: LayerSpec, tensors: dict[str, torch.Tensor], *, verify: bool = True) -> QMoEExperts:
    module = QMoEExperts(
        layer,
        SILU,
        store_bytes=len(tensors["qmoe_store"]),
        dictionaries_bytes=len(tensors["qmoe_dictionaries"]),
        verify=verify,
    )
    module.load_state_dict(tensors)
    return module.eval()


def dense_of(layer: LayerSpec) -> list[dict[str, torch.Tensor]]:
    """What `pack` packs: role -> matrix, for each expert."""
    experts = []
    for expert in range(layer.experts):
        matrices = {}
        for number, p in enumerate(layer.projections):
            signs = trits(layer, expert, number)
            low, high = packed_models.levels(p.rows).T[:, :, None]
            matrices[p.role] = torch.from_numpy(np.where(signs > 0, high, np.where(signs < 0, low, 0)))
        experts.append(matrices)
    return experts


def expected(
    layer: LayerSpec, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    experts = dense_of(layer)
    output = torch.zeros_like(hidden, dtype=torch.float64)
    for token, (choices, shares) in enumerate(zip(index.tolist(), weights.double(), strict=True)):
        for expert, share in zip(choices, shares, strict=True):
            if expert == layer.experts:
                continue
            matrices = {role: matrix.double() for role, matrix in experts[expert].items()}
            x = hidden[token].double()
            inner = matrices["up"] @ x
            inner = SILU(matrices["gate"] @ x) * inner if "gate" in matrices else SILU(inner)
            output[token] += share * (matrices["down"] @ inner)
    return output


def inputs(
    layer: LayerSpec, tokens: int, choices: int = 2, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, layer.projections[-1].rows, generator=generator)
    index = torch.randint(layer.experts + 1, (tokens, choices), generator=generator)
    return hidden, index, torch.rand(tokens, choices, generator=generator)


@given(
    experts=st.integers(1, 5),
    hidden=st.integers(1, 40),
    width=st.integers(1, 40),
    tokens=st.integers(0, 9),
    choices=st.integers(1, 3),
    gated=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_dense_experts(
    experts: int, hidden: int, width: int, tokens: int, choices: int, gated: bool, seed: int
) -> None:
    layer = spec(experts, hidden, width, gated=gated)
    module = module_of(layer, pack(layer))
    given_inputs = inputs(layer, tokens, choices, seed)
    with torch.no_grad():
        output = module(*given_inputs)
    assert output.shape == (tokens, hidden)
    assert output.dtype == torch.float32
    torch.testing.assert_close(output.double(), expected(layer, *given_inputs), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_computes_in_float32_and_answers_in_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    layer = spec()
    module = module_of(layer, pack(layer))
    hidden, index, weights = inputs(layer, 7)
    hidden, weights = hidden.to(dtype), weights.to(dtype)
    with torch.inference_mode():
        output = module(hidden, index, weights)
    assert output.dtype == dtype
    exact = expected(layer, hidden, index, weights)
    # One rounding, at the end
    torch.testing.assert_close(output, exact.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-4)


def test_from_a_packed_model_on_disk(tmp_path: Path) -> None:
    layer = spec()
    dictionaries = qmoe_codec.DictionarySet()
    with PackedModelWriter(tmp_path / "packed") as writer:
        writer.add_layer(layer, packed_models.records(layer, dictionaries), dictionaries)
        writer.finish(packed_models.CONFIG, packed_models.RECIPE)
    with qmoe_format.open(tmp_path / "packed") as packed:
        module = QMoEExperts.from_packed(packed.layer(layer.prefix), SILU)
    assert set(module.state_dict()) == {"qmoe_store", "qmoe_index", "qmoe_dictionaries"}
    given_inputs = inputs(layer, 5)
    with torch.no_grad():
        output = module(*given_inputs)
    torch.testing.assert_close(output.double(), expected(layer, *given_inputs), rtol=1e-4, atol=1e-4)


def test_no_expert_is_unpacked() -> None:
    layer = spec(experts=1, hidden=512, width=512)
    module = module_of(layer, pack(layer))
    hidden, index, weights = inputs(layer, 1, 1)
    index[:] = 0
    with torch.no_grad():
        module(hidden, index, weights)  # parses the frames
        tracemalloc.start()
        try:
            module(hidden, index, weights)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
    assert peak < 512 * 512  # bytes; even trits in int8 would take that


@pytest.mark.parametrize("assign", [False, True])
def test_loading_again_replaces_what_was_parsed(assign: bool) -> None:
    layer = spec(experts=2)
    old = pack(layer)
    given_inputs = inputs(layer, 5)
    module = module_of(layer, old)
    with torch.no_grad():
        module(*given_inputs)
    spoiled = {name: tensor.clone() for name, tensor in old.items()}
    spoiled["qmoe_store"][70] ^= 1
    module.load_state_dict(spoiled, assign=assign)
    with torch.no_grad(), pytest.raises(ChecksumError):
        module(*given_inputs)


@pytest.mark.parametrize("change", ["deepcopy", "half", "share_memory"])
def test_survives_copies_and_moves(change: str) -> None:
    layer = spec()
    module = module_of(layer, pack(layer))
    given_inputs = inputs(layer, 5)
    with torch.no_grad():
        before = module(*given_inputs)
        if change == "deepcopy":
            module = copy.deepcopy(module)
        elif change == "half":
            module = module.half()
        else:
            module.share_memory()
        assert module.qmoe_store.dtype == torch.uint8
        assert torch.equal(module(*given_inputs), before)


def test_wrong_shapes_are_refused() -> None:
    layer = spec()
    module = module_of(layer, pack(layer))
    hidden, index, weights = inputs(layer, 5)
    with torch.no_grad():
        for arguments in (
            (hidden[:, :-1], index, weights),
            (hidden[None], index, weights),
            (hidden, index[:-1], weights[:-1]),
            (hidden, index, weights[:, :1]),
            (hidden, index.flatten(), weights.flatten()),
        ):
            with pytest.raises(ArgumentError, match="wrong shape"):
                module(*arguments)


@pytest.mark.parametrize("index", [-1, 5])
def test_an_expert_that_does_not_exist_is_refused(index: int) -> None:
    layer = spec(experts=4)
    module = module_of(layer, pack(layer))
    hidden, indices, weights = inputs(layer, 5)
    indices[3, 1] = index
    with torch.no_grad(), pytest.raises(ArgumentError, match="no such expert"):
        module(hidden, indices, weights)


def test_a_gradient_is_refused() -> None:
    layer = spec()
    module = module_of(layer, pack(layer))
    hidden, index, weights = inputs(layer, 5)
    module(hidden, index, weights)  # no gradient is asked for
    with pytest.raises(UnsupportedModelError, match=r"torch\.no_grad"):
        module(hidden.requires_grad_(), index, weights)
    with torch.no_grad():
        module(hidden, index, weights)


def test_another_device_is_refused() -> None:
    layer = spec()
    module = module_of(layer, pack(layer))
    hidden, index, weights = inputs(layer, 5)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="CPU"):
        module(hidden.to("meta"), index, weights)
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match="CPU"):
        module.to("meta")(hidden, index, weights)


def test_altered_bytes_are_refused() -> None:
    layer = spec(experts=2)
    tensors = pack(layer)
    tensors["qmoe_store"][70] ^= 1  # in the levels of the first expert's first matrix
    hidden, index, weights = inputs(layer, 5)
    index[:] = 0
    with torch.no_grad():
        with pytest.raises(ChecksumError, match="expert 0: gate_proj"):
            module_of(layer, tensors)(hidden, index, weights)
        module_of(layer, tensors)(hidden, index + 1, weights)  # the other expert is sound
        module_of(layer, tensors, verify=False)(hidden, index, weights)
        tensors["qmoe_store"][12] ^= 1  # the number of rows; headers are always checked
        with pytest.raises(ChecksumError, match="expert 0: gate_proj"):
            module_of(layer, tensors, verify=False)(hidden, index, weights)


@given(position=st.integers(0, 2**20), value=st.integers(1, 255))
def test_any_altered_byte_is_refused_or_bounded(position: int, value: int) -> None:
    layer = spec(experts=1)
    tensors = pack(layer)
    tensors["qmoe_store"][position % len(tensors["qmoe_store"])] ^= value
    hidden, index, weights = inputs(layer, 5)
    with torch.no_grad():
        try:
            output = module_of(layer, tensors, verify=False)(hidden, index.clamp(max=0), weights)
        except FormatError:
            return
    assert output.shape == hidden.shape


@pytest.mark.parametrize("value", [-256, 1, 2**62])
def test_an_illegal_index_is_refused(value: int) -> None:
    layer = spec(experts=2)
    tensors = pack(layer)
    tensors["qmoe_index"][1, 0] = value
    with torch.no_grad(), pytest.raises(RowIndexError):
        module_of(layer, tensors)(*inputs(layer, 5))


def test_projections_that_do_not_fit_are_refused() -> None:
    gate, up, down = spec().projections
    wide = Projection("up_proj", "up", up.tensor, up.rows + 1, up.columns)
    for projections in ((gate, up), (gate, down), (gate, wide, down)):
        layer = LayerSpec("model.layers.0.mlp.experts", 2, projections, "BF16")
        with pytest.raises(UnsupportedModelError):
            QMoEExperts(layer, SILU, store_bytes=256, dictionaries_bytes=0)


EXAMPLE = Path(__file__).resolve().parent.parent / "examples" / "torch_layer.py"


def test_the_example_of_a_layer_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a router of its own, without transformers; the same from memory and from disk."""
    layer = spec()
    dictionaries = qmoe_codec.DictionarySet()
    with PackedModelWriter(tmp_path / "packed") as writer:
        writer.add_layer(layer, packed_models.records(layer, dictionaries), dictionaries)
        writer.finish(packed_models.CONFIG, packed_models.RECIPE)
    torch.manual_seed(0)
    router = torch.nn.Linear(12, 4, bias=False)  # as the example makes it
    x = torch.randn(16, 12)
    with torch.no_grad():
        weights, index = router(x).softmax(-1).topk(2, dim=-1)
    y = expected(layer, x, index, weights / weights.sum(-1, keepdim=True))
    for arguments in ([], ["--cache", "3kB"]):
        monkeypatch.setattr(sys, "argv", [str(EXAMPLE), str(tmp_path / "packed"), *arguments])
        with pytest.raises(SystemExit, match="0"):
            runpy.run_path(str(EXAMPLE), run_name="__main__")
    in_memory, *cached = capsys.readouterr().out.splitlines()
    mean_square = float(in_memory.rpartition(" ")[2])
    assert in_memory.startswith("model.layers.0.mlp.experts: (1, 16, 12)")
    assert mean_square == pytest.approx(float(y.square().mean()), rel=1e-4)
    assert float(cached[0].rpartition(" ")[2]) == pytest.approx(mean_square, rel=1e-4)
    assert "slots" in cached[1]


class Layer(torch.nn.Module):
    """A router and packed experts, as a graph around their operator."""

    def __init__(self, experts: QMoEExperts) -> None:
        super().__init__()
        self.router = torch.nn.Linear(experts.hidden_dim, experts.num_experts, bias=False)
        self.experts = experts

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weights, index = self.router(x).softmax(-1).topk(2, dim=-1)
        output: torch.Tensor = x + self.experts(torch.nn.functional.rms_norm(x, x.shape[-1:]), index, weights)
        return output


@pytest.mark.slow
def test_compiles_with_inductor() -> None:
    """What torch.compile does unasked: C++ around the operator, which it takes as it is."""
    if not shutil.which("g++"):
        pytest.skip("NOT COMPILED: inductor needs a C++ compiler")
    spec_ = spec()
    layer = Layer(module_of(spec_, pack(spec_)))
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for tokens in (3, 1, 7):
            x = torch.randn(tokens, 12)
            torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-5)
