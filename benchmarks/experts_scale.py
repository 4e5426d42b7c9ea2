"""Time of packing against the number of experts, and what is spent on bookkeeping for very many of them.

    python benchmarks/experts_scale.py

Layers of 8 to 2,048 small experts are packed: time for each expert must not grow with their number. Then
24 layers of 2,048 experts, so small that hardly anything but bookkeeping is left (names, headers, index,
manifest), and the routing of a long text among as many experts; both as a share of what the weights of
switch-c-2048 take at the measured rate.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from qmoe_quantize import PackOptions, pack
from qmoe_quantize.dispatch import Dispatch
from qmoe_quantize.ranks import Ranks
from qmoe_quantize.sweep import environment

from qmoe_format.safetensors_io import SafetensorsWriter

RESULTS = Path(__file__).parent / "results/experts_scale.json"
COUNTS = (8, 32, 128, 512, 2048)
SMALL = (64, 256)
REAL = (2080, 6144)  # of google/switch-c-2048
TOKENS = 128 * 2048


def make_source(directory: Path, layers: int, experts: int, rows: int, columns: int) -> None:
    """A Switch encoder whose layers all have experts, all with the same few random weights."""
    config = {
        "model_type": "switch_transformers",
        "dtype": "bfloat16",
        "vocab_size": 32,
        "d_model": rows,
        "d_ff": columns,
        "d_kv": 8,
        "num_heads": 1,
        "num_layers": layers,
        "num_decoder_layers": 0,
        "num_sparse_encoder_layers": layers,
        "encoder_sparse_step": 1,
        "num_experts": experts,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    normal = np.random.default_rng(0).standard_normal(rows * columns, np.float32)
    weight = ((normal * np.abs(normal)).view(np.uint32) >> 16).astype("<u2").tobytes()
    writer = SafetensorsWriter(directory / "model.safetensors", 256 * (4 + 2 * experts * layers))
    writer.add("shared.weight", "BF16", (32, rows), weight[: 64 * rows].ljust(64 * rows, b"\1"))
    for layer in range(layers):
        for expert in range(experts):
            name = f"encoder.block.{layer}.layer.1.mlp.experts.expert_{expert}"
            writer.add(f"{name}.wi.weight", "BF16", (columns, rows), weight)
            writer.add(f"{name}.wo.weight", "BF16", (rows, columns), weight)
    writer.close()


def seconds(layers: int, experts: int, shape: tuple[int, int]) -> float:
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        make_source(work / "source", layers, experts, *shape)
        start = time.perf_counter()
        pack(work / "source", work / "out", PackOptions(threads=1))
        return time.perf_counter() - start


def routing_seconds(experts: int) -> float:
    """Spreading experts over two ranks, and planning what travels, for one layer."""
    ranks = Ranks()
    ranks.size = 2
    index = torch.randint(experts, (TOKENS, 1), generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    parts = ranks.assign(torch.bincount(index.flatten(), minlength=experts).double().tolist())
    owner = torch.zeros(experts, dtype=torch.int64)
    owner[parts[1]] = 1
    with tempfile.TemporaryDirectory() as folder:
        Dispatch(ranks, index, owner, [0, TOKENS // 2, TOKENS], REAL[0], torch.arange(512), Path(folder))
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    seconds(1, 2, SMALL)  # builds the dictionaries that all use
    rows = []
    for experts in COUNTS:
        taken = seconds(1, experts, SMALL)
        rows.append({"experts": experts, "seconds": taken, "milliseconds_per_expert": 1e3 * taken / experts})
        print(f"{experts:5} experts: {taken:7.3f} s, {1e3 * taken / experts:.2f} ms each", flush=True)
    bookkeeping = seconds(24, 2048, (8, 8))
    real = seconds(1, 4, REAL)
    rate = 4 * 2 * REAL[0] * REAL[1] / real
    whole = 24 * 2048 * 2 * REAL[0] * REAL[1] / rate
    routing = 24 * routing_seconds(2048)
    print(
        f"24 layers of 2048 experts of 8 x 8: {bookkeeping:.1f} s; of switch-c-2048's size "
        f"{whole:.0f} s at {rate / 1e6:.0f} M weights/s by nearest: {bookkeeping / whole:.2%}\n"
        f"routing of {TOKENS} tokens in 24 layers of 2048 experts, of one each: {routing:.1f} s, "
        f"{routing / whole:.2%}"
    )
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **environment(),
        "threads": 1,
        "small_experts": {"rows": SMALL[0], "columns": SMALL[1], "layers": rows},
        "bookkeeping": {
            "layers": 24,
            "experts": 2048,
            "seconds": bookkeeping,
            "routing_seconds": routing,
            "weights_per_second_nearest": rate,
            "seconds_at_full_size": whole,
            "share": (bookkeeping + routing) / whole,
        },
    }
    options.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
