"""Peak memory of packing, by number of experts: it must not grow with them.

    python benchmarks/pack_memory.py [--experts 32 256] [--rows 768] [--columns 3072]

For each number, a checkpoint with one layer of that many experts of two matrices (rows × columns, and columns
× rows) is made in a temporary folder and packed by ``qmoe-pack``, whose peak resident memory the system
reports. The difference must stay below the size of a few experts; otherwise the exit code is 1.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from qmoe_format.safetensors_io import SafetensorsWriter

EXPERTS_ALLOWED = 3
BLOCK_ROWS = 64


def make_source(directory: Path, experts: int, rows: int, columns: int) -> None:
    """A Switch model whose encoder has one layer of experts, and hardly anything else."""
    config = {
        "model_type": "switch_transformers",
        "dtype": "bfloat16",
        "vocab_size": 32,
        "d_model": rows,
        "d_ff": columns,
        "d_kv": 8,
        "num_heads": 1,
        "num_layers": 1,
        "num_decoder_layers": 0,
        "num_sparse_encoder_layers": 1,
        "encoder_sparse_step": 1,
        "num_experts": experts,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    generator = np.random.default_rng(0)
    writer = SafetensorsWriter(directory / "model.safetensors", 256 * (4 + 2 * experts))
    prefix = "encoder.block.0.layer.1.mlp"

    def add(name: str, *shape: int) -> None:
        # In small pieces: a process counts what its parent held when it was started.
        writer.begin(name, len(shape))
        for start in range(0, shape[0], BLOCK_ROWS):
            normal = generator.standard_normal(
                (min(BLOCK_ROWS, shape[0] - start), shape[1]), dtype=np.float32
            )
            weight = (np.float32(0.02) * normal * np.abs(normal)).view(np.uint32) >> 16
            writer.write(weight.astype("<u2").tobytes())
        writer.end("BF16", shape)

    add("shared.weight", 32, rows)
    add(f"{prefix}.router.classifier.weight", experts, rows)
    for expert in range(experts):
        add(f"{prefix}.experts.expert_{expert}.wi.weight", columns, rows)
        add(f"{prefix}.experts.expert_{expert}.wo.weight", rows, columns)
    writer.close()


def run(*arguments: str | Path) -> tuple[dict[str, float], int]:
    """Run ``qmoe-pack --json`` and give its result and its peak resident memory in bytes."""
    command = [sys.executable, "-m", "qmoe_format.cli", "pack", "--json", *map(str, arguments)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        text = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"qmoe-pack failed with exit code {process.returncode}")
    return json.loads(text), usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[32, 256])
    parser.add_argument("--rows", type=int, default=768)
    parser.add_argument("--columns", type=int, default=3072)
    parser.add_argument("--levels", default="minmax")
    parser.add_argument("--dense", default="copy")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    results = []
    for experts in options.experts:
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "source"
            make_source(source, experts, options.rows, options.columns)
            recipe = ("--levels", options.levels, "--dense", options.dense)
            plan, _ = run(source, "--dry-run", *recipe)
            packed, peak = run(source, Path(folder) / "out", *recipe)
            results.append(
                {
                    "experts": experts,
                    "peak_bytes": peak,
                    "predicted_peak_bytes": plan["peak_memory_bytes"],
                    "source_bytes": packed["source_bytes"],
                    "bits_per_weight": packed["bits_per_weight"],
                    "predicted_bits_per_weight": plan["bits_per_weight"],
                    "seconds": packed["seconds"],
                }
            )
    expert_bytes = 2 * 2 * options.rows * options.columns
    peaks = [result["peak_bytes"] for result in results]
    growth = max(peaks) - min(peaks)
    flat = growth < EXPERTS_ALLOWED * expert_bytes
    if options.json:
        print(
            json.dumps({"expert_bytes": expert_bytes, "growth_bytes": growth, "flat": flat, "runs": results})
        )
    else:
        print("experts     source       peak  predicted  bits/weight  predicted  seconds")
        for r in results:
            print(
                f"{r['experts']:7}  {r['source_bytes'] / 1e6:6.0f} MB  {r['peak_bytes'] / 1e6:6.0f} MB"
                f"  {r['predicted_peak_bytes'] / 1e6:6.0f} MB  {r['bits_per_weight']:11.4f}"
                f"  {r['predicted_bits_per_weight']:9.4f}  {r['seconds']:7.1f}"
            )
        print(
            f"growth {growth / 1e6:.1f} MB = {growth / expert_bytes:.1f} experts of "
            f"{expert_bytes / 1e6:.1f} MB: " + ("flat" if flat else f"more than {EXPERTS_ALLOWED} experts")
        )
    return 0 if flat else 1


if __name__ == "__main__":
    sys.exit(main())
