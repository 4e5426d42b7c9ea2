"""Every family of models, packed: does it load, compute what the unpacked model computes, generate, and save?

    python benchmarks/families.py [--json benchmarks/results/families.json] [FAMILY …]

Each is a small model with random weights, written by transformers itself, packed with `--levels lsq` and
unpacked again. Prints a table for the README.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from qmoe_codec.errors import UnsupportedModelError
from qmoe_quantize.pipeline import PackOptions, pack
from safetensors.torch import load_file

import qmoe_format
from qmoe_format.torch import QMoEExperts
from qmoe_format.transformers import DTYPES, load
from qmoe_format.unpack import unpack

_DECODER = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_NARROW = {**_DECODER, "moe_intermediate_size": 32}
_LATENT = {
    "kv_lora_rank": 12,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DEEPSEEK = {
    **_NARROW,
    **_LATENT,
    "n_routed_experts": 6,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "q_lora_rank": 16,
}
_GROUPED = {
    **_NARROW,
    "head_dim": 8,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 1,
    "topk_group": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
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
        "num_experts": 3,
        "expert_capacity": 4,
        "pad_token_id": 0,
        "decoder_start_token_id": 0,
    },
    "mixtral": {**_DECODER, "num_local_experts": 3},
    "qwen2_moe": {
        **_NARROW,
        "num_experts": 4,
        "shared_expert_intermediate_size": 32,
        "decoder_sparse_step": 1,
    },
    "qwen3_moe": {**_NARROW, "num_experts": 4, "head_dim": 8, "mlp_only_layers": [0]},
    "olmoe": {**_DECODER, "num_experts": 5},
    "deepseek_v2": {**_DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": _DEEPSEEK,
    "gpt_oss": {**_DECODER, "head_dim": 8, "num_local_experts": 4},
    "nllb-moe": {
        "vocab_size": 40,
        "d_model": 24,
        "encoder_layers": 2,
        "decoder_layers": 2,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "encoder_ffn_dim": 40,
        "decoder_ffn_dim": 40,
        "encoder_sparse_step": 2,
        "decoder_sparse_step": 2,
        "num_experts": 4,
        "pad_token_id": 0,
        "eos_token_id": None,
        "decoder_start_token_id": 0,
    },
    "afmoe": {**_NARROW, "num_experts": 4, "head_dim": 8, "num_dense_layers": 1, "num_shared_experts": 1},
    "cohere2_moe": {**_DECODER, "num_experts": 4, "head_dim": 8},
    "dots1": _GROUPED,
    "ernie4_5_moe": {**_NARROW, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1},
    "exaone_moe": {**_GROUPED, "num_experts": 4, "num_shared_experts": 1},
    "flex_olmo": {**_DECODER, "num_experts": 4},
    "glm4_moe": _GROUPED,
    "glm4_moe_lite": {**_GROUPED, **_LATENT, "q_lora_rank": 16},
    "granitemoe": {**_DECODER, "num_local_experts": 4},
    "granitemoeshared": {**_DECODER, "num_local_experts": 4, "shared_intermediate_size": 24},
    "hunyuan_v1_moe": {**_DECODER, "head_dim": 8, "num_experts": 4, "moe_topk": 2},
    "hy_v3": {**_NARROW, "head_dim": 8, "num_experts": 4, "first_k_dense_replace": 1},
    "jamba": {
        **_DECODER,
        "num_experts": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
        "attn_layer_period": 2,
        "attn_layer_offset": 0,
        "use_mamba_kernels": False,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
    },
    "lfm2_moe": {
        **_NARROW,
        "num_experts": 4,
        "num_dense_layers": 1,
        "layer_types": ["full_attention", "conv"],
    },
    "minimax": {
        **_DECODER,
        "head_dim": 8,
        "num_local_experts": 4,
        "layer_types": ["full_attention", "linear_attention"],
    },
    "minimax_m2": {**_DECODER, "head_dim": 8, "num_local_experts": 4},
    "phimoe": {**_DECODER, "num_local_experts": 4},
    "qwen3_next": {
        **_NARROW,
        "head_dim": 8,
        "num_experts": 4,
        "shared_expert_intermediate_size": 24,
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
    },
    "solar_open": _GROUPED,
}
"""Small configurations; all families of the table in :mod:`qmoe_quantize.families`."""
ENCODER_DECODERS = ("switch_transformers", "nllb-moe")
NOT_COMPUTED = {"nllb-moe": "transformers runs only experts 0 and 1 of it"}
"""Families that are packed and unpacked, but that transformers does not compute as they were trained."""
COLUMNS = ("packs", "loads", "logits match", "generates", "save/reload", "expert cache")
ON_A_GPU = "GPU"
"""The column that there is where torch finds one: the logits there, and from an expert cache there."""
TOKENS = torch.arange(22).reshape(2, 11) % 40


def write_source(folder: Path, family: str, **changes: Any) -> Path:
    """A checkpoint with random weights, written by transformers itself."""
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, **{**CONFIGS[family], **changes})
    auto: Any = transformers.AutoModelForCausalLM
    if family in ENCODER_DECODERS:
        auto = transformers.AutoModelForSeq2SeqLM
    model = auto.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    model.to(torch.bfloat16).save_pretrained(folder)
    return folder


def logits(model: Any, tokens: torch.Tensor = TOKENS) -> torch.Tensor:
    """What a model says to some tokens."""
    named = {"decoder_input_ids": tokens} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        output: torch.Tensor = model(input_ids=tokens, **named).logits
    return output


def greedy(model: Any) -> torch.Tensor:
    """Some tokens that a model goes on with."""
    generated: torch.Tensor = model.generate(
        TOKENS, max_new_tokens=6, do_sample=False, attention_mask=torch.ones_like(TOKENS)
    )
    return generated


def content(model: Path) -> dict[str, Any]:
    """Everything that a packed model holds, whatever its files are called.

    Tensors of 16-bit floats are compared as float32, in which transformers keeps, and saves, some of them.
    """
    found: dict[str, Any] = {}
    with qmoe_format.open(model) as opened:
        for prefix, spec in opened.layers.items():
            layer = opened.layer(prefix)
            found[prefix] = (
                spec,
                bytes(layer.store),
                layer.index.tolist(),
                bytes(layer.dictionary_bytes),
            )
        for name in opened.dense_names():
            dtype, shape, data = opened.dense(name)
            tensor = torch.frombuffer(bytearray(data), dtype=DTYPES[dtype])
            wide = dtype in ("BF16", "F16")
            found[name] = (shape, (tensor.float() if wide else tensor).numpy().tobytes())
    return found


def check(family: str, folder: Path, dense: str = "copy") -> dict[str, bool | float]:
    """One row of the table; `folder` is empty."""
    source = write_source(folder / "source", family)
    packed = folder / "packed"
    pack(source, packed, PackOptions(levels="lsq", dense=dense))
    unpack(packed, folder / "plain")
    row: dict[str, bool | float] = {"packs": _is_close(source, folder / "plain", packed)}
    if family in NOT_COMPUTED:
        try:
            load(packed)
        except UnsupportedModelError as error:
            row["refused"] = "experts 0 and 1" in str(error)
        return row
    model: Any = load(packed, dtype=torch.float32)
    with qmoe_format.open(packed) as opened:
        experts = sum(isinstance(module, QMoEExperts) for module in model.modules())
        row["loads"] = experts == len(opened.layers)
    plain = type(model).from_pretrained(folder / "plain", dtype=torch.float32)
    whole = type(model).from_pretrained(source, dtype=torch.float32)
    mine, theirs = logits(model), logits(plain)
    row["difference"] = float((mine - theirs).abs().max())
    # Those of the original differ, so that the experts do matter
    matter = not torch.allclose(mine, logits(whole), rtol=1e-2, atol=1e-2)
    row["logits match"] = torch.allclose(mine, theirs, rtol=1e-4, atol=1e-4) and matter
    row["generates"] = torch.equal(greedy(model), greedy(plain))
    load(packed).save_pretrained(folder / "again")
    qmoe_format.verify(folder / "again")
    row["save/reload"] = content(folder / "again") == content(packed) and torch.equal(
        logits(load(folder / "again", dtype=torch.float32)), mine
    )
    row["expert cache"] = _is_same_cached(packed, model, "cpu")
    if torch.cuda.is_available():
        there = load(packed, "cuda", torch.float32)
        row[ON_A_GPU] = torch.allclose(logits(there, TOKENS.cuda()).cpu(), mine, rtol=1e-3, atol=1e-3)
        row[ON_A_GPU] &= _is_same_cached(packed, model, "cuda")
    return row


def _is_same_cached(packed: Path, model: Any, device: str) -> bool:
    """Whether a model says the same with room for a quarter of its experts, or those of a token."""
    experts = [module.num_experts for module in model.modules() if isinstance(module, QMoEExperts)]
    cached: Any = load(packed, device, torch.float32, expert_cache=max(2, sum(experts) // 4))
    found = logits(cached, TOKENS.to(device)).cpu()
    close = 1e-4 if device == "cpu" else 1e-3
    return (
        torch.allclose(found, logits(model), rtol=close, atol=close) and cached.expert_cache.stats.reads > 0
    )


def _is_close(source: Path, plain: Path, packed: Path) -> bool:
    """Whether the ternary weights are where the original ones were, and all else is what it was."""
    before, after = (load_file(path / "model.safetensors") for path in (source, plain))
    with qmoe_format.open(packed) as opened:
        experts = {name for layer in opened.layers.values() for name in layer.tensor_names()}
    if before.keys() != after.keys() or not experts:
        return False
    for name, tensor in before.items():
        other = after[name]
        if name not in experts:
            if not torch.equal(other, tensor):
                return False
        elif torch.cosine_similarity(other.float().flatten(), tensor.float().flatten(), dim=0) < 0.8:
            return False
    return True


def table(rows: dict[str, dict[str, bool | float]]) -> str:
    """The rows as Markdown, those that say the same in one."""

    def mark(row: dict[str, bool | float], column: str) -> str:
        if column not in row:
            return "refused" if row.get("refused") else "–"
        return "yes" if row[column] else "**no**"

    columns = [*COLUMNS, *([ON_A_GPU] if any(ON_A_GPU in row for row in rows.values()) else [])]
    same: dict[tuple[str, ...], list[str]] = {}
    for family, row in rows.items():
        same.setdefault(tuple(mark(row, column) for column in columns), []).append(f"`{family}`")
    lines = [f"| family | {' | '.join(columns)} |", "|---|" + "---|" * len(columns)]
    lines += [f"| {', '.join(families)} | {' | '.join(marks)} |" for marks, families in same.items()]
    return "\n".join(lines)


def run(families: list[str], progress: Callable[[str], None]) -> dict[str, dict[str, bool | float]]:
    """The rows of some families."""
    rows = {}
    for family in families:
        progress(family)
        with tempfile.TemporaryDirectory() as folder:
            rows[family] = check(family, Path(folder))
    return rows


def main() -> int:
    """Print the table; fail if something in it does."""
    parser = argparse.ArgumentParser(description="every family of models, packed")
    parser.add_argument("families", nargs="*", default=list(CONFIGS), help="default: all")
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows = run(arguments.families, lambda family: print(family, file=sys.stderr))
    print(table(rows))
    if arguments.json:
        result = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": platform.machine(),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "families": rows,
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    return 0 if all(value is not False for row in rows.values() for value in row.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
