"""Packed OLMoE models of any size with random weights, for measurements that do not depend on the values.

A few experts are encoded and written again and again: only bytes and shapes matter to speed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import transformers
from format_rate import exact_matrix
from qmoe_codec import DictionarySet
from tqdm import tqdm

import qmoe_format
from qmoe_format import LayerSpec, PackedModelWriter, Projection
from qmoe_format.safetensors_io import DTYPE_BITS

P_ZERO = 0.885
DISTINCT = 4
NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}


def config_of(
    hidden: int, width: int, layers: int, experts: int, per_token: int, vocabulary: int = 1024
) -> transformers.OlmoeConfig:
    """Configuration of an OLMoE whose experts are [width, hidden] and [hidden, width]."""
    return transformers.OlmoeConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=width,
        num_hidden_layers=layers,
        num_attention_heads=16,
        num_key_value_heads=16,
        num_experts=experts,
        num_experts_per_tok=per_token,
        max_position_embeddings=4096,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        architectures=["OlmoeForCausalLM"],
    )


def layer_spec(config: transformers.OlmoeConfig, number: int) -> LayerSpec:
    """The experts of a layer."""
    prefix = f"model.layers.{number}.mlp.experts"
    width, hidden = config.intermediate_size, config.hidden_size
    sides = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    projections = tuple(
        Projection(f"{role}_proj", role, f"{prefix}.{{expert}}.{role}_proj.weight", *shape)
        for role, shape in sides.items()
    )
    return LayerSpec(prefix, config.num_experts, projections, "BF16")


def packed_in(path: Path, config: transformers.OlmoeConfig) -> Path:
    """The packed model at `path`, written there if it is not yet."""
    return path if path.exists() else write_packed(path, config)


def write_packed(
    out: Path,
    config: transformers.OlmoeConfig,
    *,
    p_zero: float = P_ZERO,
    dtype: torch.dtype = torch.bfloat16,
) -> Path:
    """Write a packed model with random ternary experts and random dense tensors of `dtype`."""
    torch.manual_seed(0)
    with PackedModelWriter(out) as writer:
        frames: list[list[bytes]] = []
        dictionaries = DictionarySet()
        first = layer_spec(config, 0)
        for expert in range(DISTINCT):
            frames.append([])
            for number, p in enumerate(first.projections):
                trits = exact_matrix(p.rows, p.columns, p_zero, seed=10 * expert + number)
                # So that activations stay of the order of one: levels spread like those of real rows
                scale = (p.columns * (1 - p_zero)) ** -0.5
                levels = scale * np.stack(
                    [np.linspace(-1.2, -0.8, p.rows), np.linspace(0.8, 1.2, p.rows)], axis=1
                ).astype(np.float32)
                frames[-1].append(dictionaries.encode(trits, levels))
        for layer in tqdm(range(config.num_hidden_layers), desc="writing", unit="layer"):
            spec = layer_spec(config, layer)
            shuffled = np.random.default_rng(layer).integers(DISTINCT, size=spec.experts).tolist()
            writer.add_layer(spec, _records(frames, shuffled), dictionaries)
        for name, tensor in dense_tensors(config, dtype):
            data = tensor.contiguous().view(torch.uint8).numpy().tobytes()
            assert NAMES[dtype] in DTYPE_BITS
            writer.add_dense(name, NAMES[dtype], tuple(tensor.shape), data)
        described = json.loads(config.to_json_string(use_diff=False))
        described["dtype"] = str(dtype).removeprefix("torch.")
        writer.finish(described, {"method": "random"})
    return out


def _records(frames: list[list[bytes]], order: list[int]) -> Iterator[tuple[list[bytes], int]]:
    for number in order:
        yield frames[number], -1


def dense_tensors(config: transformers.OlmoeConfig, dtype: torch.dtype) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything but the experts, random."""
    with torch.device("meta"):
        model = transformers.OlmoeForCausalLM(config)
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            continue
        shape = parameter.shape
        if len(shape) == 1:
            yield name, torch.ones(shape, dtype=dtype)
        else:
            # Embeddings that outweigh what the layers add: else all tokens would go to the same few experts
            scale = 4.0 if name == "model.embed_tokens.weight" else shape[1] ** -0.5
            # A router with clear opinions, so that rounding does not decide who is chosen
            scale *= 2.0 if name.endswith("mlp.gate.weight") else 1.0
            yield name, (torch.randn(shape) * scale).to(dtype)


def sizes_of(path: Path) -> dict[str, int]:
    """Bytes of the packed experts and of the dense tensors of a model."""
    with qmoe_format.open(path) as model:
        experts = sum(len(model.layer(prefix).store) for prefix in model.layers)
        dense = sum(model.dense_info(name).nbytes for name in model.dense_names())
    return {"experts": experts, "dense": dense}
