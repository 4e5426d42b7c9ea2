"""Small source checkpoints of every family, with random weights, for tests.

They are written with the safetensors package, so that what is read here is what other software writes.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

_DECODER = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 36,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "olmoe": {**_DECODER, "num_experts": 5},
    "qwen2_moe": {
        **_DECODER,
        "num_experts": 4,
        "moe_intermediate_size": 20,
        "shared_expert_intermediate_size": 28,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {
        **_DECODER,
        "num_experts": 4,
        "moe_intermediate_size": 20,
        "head_dim": 8,
        "mlp_only_layers": [0],
    },
    "mixtral": {**_DECODER, "num_local_experts": 3, "dtype": "float16"},
    "deepseek_v2": {
        **_DECODER,
        "n_routed_experts": 4,
        "n_shared_experts": 2,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "q_lora_rank": None,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "deepseek_v3": {
        **_DECODER,
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "moe_intermediate_size": 20,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "q_lora_rank": 16,
        "kv_lora_rank": 12,
        "qk_rope_head_dim": 4,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {**_DECODER, "num_local_experts": 3, "head_dim": 8},
    "switch_transformers": {
        "vocab_size": 40,
        "d_model": 24,
        "d_kv": 6,
        "d_ff": 36,
        "num_heads": 4,
        "num_layers": 4,
        "num_decoder_layers": 2,
        "num_sparse_encoder_layers": 2,
        "num_sparse_decoder_layers": 1,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": 3,
        "dtype": "float32",
    },
}
FUSED = ("gpt_oss",)
"""Those with all experts of a layer in one tensor."""
TORCH_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    """A small configuration of a family, with some values changed."""
    return {"model_type": model_type, **CONFIGS[model_type], **changes}


def random_tensors(config: Mapping[str, Any], seed: int = 0) -> dict[str, Tensor]:
    """Tensors of a model; weights have the long tails of trained ones, so that most become 0."""
    from qmoe_quantize.config import ModelConfig
    from qmoe_quantize.shapes import tensors_of

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, tensor in tensors_of(ModelConfig(Path("config.json"), config)).items():
        normal = torch.randn(tensor.shape, generator=generator)
        tensors[name] = (0.02 * normal * normal.abs()).to(TORCH_DTYPES[tensor.dtype])
    return tensors


def write_model(
    directory: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor], shards: int = 1
) -> Path:
    """Write a checkpoint the way transformers does: one file, or several with an index."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer_config.json").write_text('{"model_max_length": 512}')
    if shards == 1:
        save_file(dict(tensors), directory / "model.safetensors", {"format": "pt"})
        return directory
    weight_map = {}
    for number, names in enumerate(_deal(sorted(tensors), shards), 1):
        file = f"model-{number:05}-of-{shards:05}.safetensors"
        save_file({name: tensors[name] for name in names}, directory / file, {"format": "pt"})
        weight_map.update(dict.fromkeys(names, file))
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def random_model(
    directory: Path, model_type: str = "olmoe", *, shards: int = 1, seed: int = 0, **changes: Any
) -> Path:
    """A checkpoint of a family with random weights."""
    config = config_of(model_type, **changes)
    return write_model(directory, config, random_tensors(config, seed), shards)


def _deal(names: list[str], hands: int) -> Iterator[list[str]]:
    for hand in range(hands):
        yield names[hand::hands]
