"""Checkpoints as the authors of QMoE published them, made by an encoder of its own.

Written from the paper (arXiv 2310.16795, section 4) and the description of the layout, sharing no code with
the importer: the dictionary is found by listing all phrases above a probability and sorting them, and rows
are cut by looking up ever longer phrases.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from source_models import random_tensors
from torch import Tensor

CONFIG: dict[str, Any] = {
    "architectures": ["SwitchTransformersForConditionalGeneration"],
    "model_type": "switch_transformers",
    "vocab_size": 40,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 64,
    "num_heads": 4,
    "num_layers": 4,
    "num_decoder_layers": 2,
    "num_sparse_encoder_layers": 2,
    "num_sparse_decoder_layers": 1,
    "encoder_sparse_step": 2,
    "decoder_sparse_step": 2,
    "num_experts": 3,
    "pad_token_id": 0,
    "decoder_start_token_id": 0,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
P = (0.885, (1 - 0.885) / 2, (1 - 0.885) / 2)


@functools.cache
def phrases() -> list[tuple[int, ...]]:
    """The 65,536 likeliest phrases of at most 14 pairs: symbols 0, 1 (least), 2 (greatest)."""
    found: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = []
    cutoff = 1.5e-6  # more than 65,536 are likelier

    def extend(p: float, order: tuple[int, ...], symbols: tuple[int, ...]) -> None:
        for second in range(3):
            for first in range(3):
                q = p * (P[second] * P[first])
                if q >= cutoff:
                    longer = (*order, 3 * second + first)
                    found.append((-q, longer, (*symbols, first, second)))
                    if len(longer) < 14:
                        extend(q, longer, (*symbols, first, second))

    extend(1.0, (), ())
    assert len(found) >= 65536
    found.sort()
    return [symbols for _, _, symbols in found[:65536]]


@functools.cache
def _numbers() -> dict[tuple[int, ...], int]:
    return {phrase: number for number, phrase in enumerate(phrases())}


def encode_row(symbols: list[int]) -> list[int]:
    """Codewords of one row; an odd row is sent with a zero more."""
    numbers, row = _numbers(), tuple(symbols) + (0,) * (len(symbols) % 2)
    codewords, start = [], 0
    while start < len(row):
        end = start + 2
        while end + 2 <= len(row) and row[start : end + 2] in numbers:
            end += 2
        codewords.append(numbers[row[start:end]])
        start = end
    return codewords


def encode_matrix(weight: Tensor) -> dict[str, Tensor]:
    """The four tensors of a ternary matrix bfloat16 [rows, columns]."""
    low, high = weight.min(1).values, weight.max(1).values
    symbols = torch.zeros(weight.shape, dtype=torch.int32)
    symbols[weight == low[:, None]] = 1
    symbols[weight == high[:, None]] = 2
    rows = [encode_row(row) for row in symbols.tolist()]
    offsets = np.cumsum([0, *map(len, rows)]).astype(np.int32)
    flat = np.array([codeword for row in rows for codeword in row], np.uint16)
    return {
        "w_comp": torch.from_numpy(flat.view(np.int16)),
        "row_off": torch.from_numpy(offsets),
        "ter_minmax": torch.stack([low, high], 1).flatten(),
        "weight": torch.zeros(0, dtype=torch.bfloat16),
    }


def ternary_matrix(rows: int, columns: int, seed: int, odd_rows: bool = True) -> Tensor:
    """Ternary weights whose rows differ in density; the first rows may be of every odd kind."""
    random = np.random.default_rng(seed)
    p_zero = np.clip(random.normal(0.9, 0.04, (rows, 1)), 0.7, 0.995)
    signs = random.choice([-1, 1], (rows, columns))
    trits = np.where(random.random((rows, columns)) < p_zero, 0, signs)
    if odd_rows:
        kinds = (np.abs, lambda t: -np.abs(t), np.zeros_like, np.ones_like, lambda t: t | 1)
        for row, kind in enumerate(kinds):
            trits[row] = kind(trits[row])
    levels = random.uniform(0.01, 0.1, (2, rows, 1))
    weight = np.where(trits < 0, -levels[0], np.where(trits > 0, levels[1], 0.0))
    return torch.from_numpy(weight).bfloat16()


def sparse_prefixes(config: dict[str, Any]) -> list[str]:
    """Names of the layers with experts, in the order of their files."""
    names = []
    for stack, place, layers in (
        ("encoder", 1, config["num_layers"]),
        ("decoder", 2, config["num_decoder_layers"]),
    ):
        step = 1 if config.get("is_full_sparse") else config[f"{stack}_sparse_step"]
        names += [
            f"{stack}.block.{n}.layer.{place}.mlp.experts" for n in range(layers) if n % step == 1 % step
        ]
    return names


def write_checkpoint(directory: Path, *, odd_rows: bool = True, **changes: Any) -> dict[str, Tensor]:
    """Write a checkpoint; gives the experts' weights by tensor name."""
    config = {**CONFIG, **changes}
    weights: dict[str, Tensor] = {}
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "README.md").write_text("A model.")
    sizes: dict[str, int] = {}
    for number, prefix in enumerate(sparse_prefixes(config)):
        tensors: dict[str, Tensor] = {}
        for expert in range(config["num_experts"]):
            sides = (config["d_ff"], config["d_model"])
            for projection, (rows, columns) in (("wi", sides), ("wo", sides[::-1])):
                name = f"{prefix}.expert_{expert}.{projection}"
                weight = ternary_matrix(rows, columns, len(weights), odd_rows)
                weights[f"{name}.weight"] = weight
                parts = encode_matrix(weight)
                tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
                sizes[name] = parts["w_comp"].numel()
        torch.save(tensors, directory / f"exp{number:02d}.pt")
    torch.save(sizes, directory / "sizes.pt")
    step = {"encoder_sparse_step": 1, "decoder_sparse_step": 1} if config.get("is_full_sparse") else {}
    dense = {n: t for n, t in random_tensors({**config, **step}).items() if n not in weights}
    if config["tie_word_embeddings"]:
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight"):
            dense[name] = dense["shared.weight"]
        dense["lm_head.weight"] = dense["shared.weight"].clone()
    dense["encoder.final_layer_norm.weight"] = dense["encoder.final_layer_norm.weight"].float()
    torch.save(dense, directory / "noexp.pt")
    return weights


def read_checkpoint(directory: Path) -> dict[str, dict[str, Any]]:
    """All ``.pt`` files of a directory."""
    return {path.name: torch.load(path, weights_only=True) for path in sorted(directory.glob("*.pt"))}
