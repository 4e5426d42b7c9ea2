"""Speed of a whole model with packed experts beside the same model with dense ones, on the same CPU threads.

    python benchmarks/generation.py [--json FILE] [--threads N]

An OLMoE made on the spot, with random ternary experts: speed does not depend on the values, and the text is
random too, so that many experts are used. The peers hold the same weights in bfloat16 and in float32, and run
by whichever of transformers' implementations of experts is fastest for the case; `batched_mm` copies the
weights of each token's experts and is tried for single tokens only. Prefill is one prompt; decoding is one
token after the other for a batch of sequences. Medians; the contestants take turns.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import moe_models
import torch
import transformers
from machine import write_record
from tqdm import tqdm

import qmoe_format
from qmoe_format.transformers import load

HIDDEN, WIDTH, LAYERS, EXPERTS, VOCABULARY = 1024, 2048, 2, 32, 1024
PER_TOKEN = (2, 8)
BATCHES = (1, 8)
PROMPTS = (128,)
STEPS = {1: 10, 8: 3}  # per batch
IMPLEMENTATIONS = ("eager", "grouped_mm")


def dense_model(packed: Path, dtype: torch.dtype) -> Any:
    """The same model with its experts unpacked to `dtype`."""
    whole: Any = load(packed, dtype=dtype)
    with torch.device("meta"):
        model: Any = transformers.OlmoeForCausalLM(whole.config).to(dtype)
    with qmoe_format.open(packed) as opened:
        for prefix, layer in tqdm(
            zip(opened.layers, model.model.layers, strict=True), "unpacking", LAYERS, file=sys.stderr
        ):
            experts = layer.mlp.experts
            experts.to_empty(device="cpu")
            for number in range(EXPERTS):
                gate, up, down = (
                    torch.from_numpy(opened.layer(prefix).matrix(number, name).dequantize("float32"))
                    for name in ("gate_proj", "up_proj", "down_proj")
                )
                experts.gate_up_proj.data[number] = torch.cat([gate, up]).to(dtype)
                experts.down_proj.data[number] = down.to(dtype)
    for number, layer in enumerate(model.model.layers):
        whole.model.layers[number].mlp.experts = layer.mlp.experts
    return whole.requires_grad_(False)


def use(model: Any, per_token: int, implementation: str | None) -> Any:
    model.config.num_experts_per_tok = per_token
    for layer in model.model.layers:
        layer.mlp.gate.top_k = per_token
        if implementation is not None:
            layer.mlp.experts.config._experts_implementation = implementation
    return model


def prefill(model: Any, tokens: int) -> float:
    """Seconds for a prompt of so many random tokens."""
    ids = torch.randint(VOCABULARY, (1, tokens))
    begun = time.perf_counter()
    model(ids, use_cache=True, logits_to_keep=1)
    return time.perf_counter() - begun


def decode(model: Any, batch: int) -> float:
    """Seconds per step for a batch of sequences, after a short prompt."""
    output = model(torch.randint(VOCABULARY, (batch, 4)), use_cache=True)
    steps = torch.randint(VOCABULARY, (STEPS[batch], batch, 1))
    begun = time.perf_counter()
    for step in steps:
        output = model(step, past_key_values=output.past_key_values, use_cache=True)
    return (time.perf_counter() - begun) / len(steps)


def contest(models: dict[str, Any], rounds: int) -> list[dict[str, Any]]:
    """Tokens per second of each contestant in each case."""
    cases = [
        *(("decode", batch, per_token) for batch in BATCHES for per_token in PER_TOKEN),
        *(("prefill", tokens, per_token) for tokens in PROMPTS for per_token in PER_TOKEN),
    ]
    lines = []
    for kind, size, per_token in tqdm(cases, desc="measuring", unit="case", file=sys.stderr):
        times: dict[str, list[float]] = {}
        for turn in range(rounds + 1):
            for name, model in models.items():
                choices: tuple[str | None, ...] = (None,) if name == "packed" else IMPLEMENTATIONS
                if name != "packed" and size == 1:
                    choices = (*choices, "batched_mm")
                for choice in choices:
                    torch.manual_seed(turn)
                    call = decode if kind == "decode" else prefill
                    seconds = call(use(model, per_token, choice), size)
                    if turn:  # the first is to warm up
                        times.setdefault(f"{name}, {choice}" if choice else name, []).append(seconds)
        medians = {name: statistics.median(values) for name, values in times.items()}
        speeds = {name: size / seconds for name, seconds in medians.items()}
        best = {
            dtype: max((name for name in speeds if name.startswith(dtype)), key=speeds.__getitem__)
            for dtype in ("bfloat16", "float32")
        }
        lines.append(
            {
                "kind": kind,
                "batch" if kind == "decode" else "prompt": size,
                "experts_per_token": per_token,
                "tokens_per_second": speeds,
                "best": best,
                "over_bfloat16": speeds["packed"] / speeds[best["bfloat16"]],
                "over_float32": speeds["packed"] / speeds[best["float32"]],
                "seconds": times,
            }
        )
        tqdm.write(
            f"{kind:>8} {size:4} x top-{per_token}: packed {speeds['packed']:8.1f} tokens/s, "
            f"{best['bfloat16']} {speeds[best['bfloat16']]:8.1f}, {best['float32']} "
            f"{speeds[best['float32']]:8.1f}: {lines[-1]['over_bfloat16']:.2f} x bfloat16, "
            f"{lines[-1]['over_float32']:.2f} x float32",
            file=sys.stdout,
        )
        sys.stdout.flush()
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to keep the model for another run")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        config = moe_models.config_of(HIDDEN, WIDTH, LAYERS, EXPERTS, PER_TOKEN[-1], VOCABULARY)
        path = moe_models.packed_in((arguments.folder or Path(temporary)) / "packed", config)
        models = {
            "packed": load(path),
            "bfloat16": dense_model(path, torch.bfloat16),
            "float32": dense_model(path, torch.float32),
        }
        lines = contest(models, arguments.rounds)
        sizes = moe_models.sizes_of(path)
    if arguments.json:
        write_record(
            arguments.json,
            "generation",
            threads=arguments.threads,
            model=f"OLMoE, {LAYERS} layers x {EXPERTS} experts of 3 x {WIDTH} x {HIDDEN}, "
            f"p(0) = {moe_models.P_ZERO}; packed experts with bfloat16 dense tensors",
            bytes=sizes,
            rounds=arguments.rounds,
            results=lines,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
