"""Peak memory and time of calibrated packing, and what `--dry-run` says of them beforehand.

    python benchmarks/quantizer_memory.py [--method qmoe] [--hidden 384] [--width 768]

For each number of experts and of layers, an OLMoE with random weights is written to a temporary folder and
packed by ``qmoe-pack --calib``, always with the same number of experts at once. The system reports the peak
of the process's resident memory. It must not grow by a tenth from 8 experts to 64, nor with layers; otherwise
the exit code is 1. Results go to benchmarks/results/quantizer_memory.json.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
from pack_memory import BLOCK_ROWS, run
from qmoe_quantize.config import ModelConfig
from qmoe_quantize.shapes import tensors_of
from qmoe_quantize.sweep import environment

from qmoe_format.safetensors_io import SafetensorsWriter

SIZES = ((8, 1), (64, 1), (8, 6))
"""Experts and layers."""
GROWTH_ALLOWED = 0.1


def make_model(directory: Path, experts: int, layers: int, hidden: int, width: int) -> None:
    """An OLMoE on bytes with random weights, written in small pieces."""
    config = {
        "model_type": "olmoe",
        "dtype": "bfloat16",
        "vocab_size": 256,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "num_experts": experts,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    tensors = tensors_of(ModelConfig(directory / "config.json", config))
    generator = np.random.default_rng(0)
    writer = SafetensorsWriter(directory / "model.safetensors", 256 * len(tensors))
    for name, tensor in tensors.items():
        writer.begin(name, len(tensor.shape))
        rows, columns = tensor.shape[0], math.prod(tensor.shape[1:])
        for start in range(0, rows, BLOCK_ROWS):
            block = generator.standard_normal((min(BLOCK_ROWS, rows - start), columns), dtype=np.float32)
            writer.write(((block * np.float32(columns**-0.5)).view(np.uint32) >> 16).astype("<u2").tobytes())
        writer.end("BF16", tensor.shape)
    writer.close()


def measure(options: argparse.Namespace, experts: int, layers: int) -> dict[str, float]:
    """One model, packed once after it was predicted."""
    with tempfile.TemporaryDirectory() as folder:
        source, text = Path(folder) / "source", Path(folder) / "text.txt"
        make_model(source, experts, layers, options.hidden, options.width)
        text.write_bytes(np.random.default_rng(1).integers(97, 123, 200_000, np.uint8).tobytes())
        settings = ["--calib", text, "--method", options.method, "--seqlen", "128", "--nsamples", "64"]
        settings += ["--experts-per-batch", str(options.group), "--quiet"]
        if options.method == "rd":
            settings += ["--target-bpw", "0.9"]
        plan, _ = run(source, "--dry-run", *settings)
        packed, peak = run(source, Path(folder) / "out", *settings)
    return {
        "experts": experts,
        "layers": layers,
        "peak_bytes": peak,
        "predicted_peak_bytes": plan["peak_memory_bytes"],
        "seconds": packed["seconds"],
        "predicted_seconds": plan["seconds"],
        "bits_per_weight": packed["bits_per_weight"],
        "predicted_bits_per_weight": plan["bits_per_weight"],
        "source_bytes": packed["source_bytes"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--method", choices=("qmoe", "rd"), default="qmoe")
    parser.add_argument("--hidden", type=int, default=384)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--group", type=int, default=8, help="experts at once (%(default)s)")
    parser.add_argument("--sizes", nargs="+", default=[f"{e}x{n}" for e, n in SIZES], help="EXPERTSxLAYERS")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results/quantizer_memory.json")
    options = parser.parse_args()
    runs = []
    print("experts  layers     source        peak   predicted  seconds  predicted")
    for size in options.sizes:
        result = measure(options, *map(int, size.split("x")))
        runs.append(result)
        print(
            f"{result['experts']:7}  {result['layers']:6}  {result['source_bytes'] / 1e6:6.0f} MB  "
            f"{result['peak_bytes'] / 1e6:7.0f} MB  {result['predicted_peak_bytes'] / 1e6:7.0f} MB  "
            f"{result['seconds']:7.1f}  {result['predicted_seconds']:9.1f}",
            flush=True,
        )
    peaks = [result["peak_bytes"] for result in runs]
    growth = max(peaks) / min(peaks) - 1
    print(f"peaks differ by {growth:.1%}")
    keys = ("method", "hidden", "width", "group")
    values = {
        "date": datetime.now(UTC).date().isoformat(),
        **{key: getattr(options, key) for key in keys},
        "environment": environment(),
        "growth": growth,
        "runs": runs,
    }
    options.out.write_text(json.dumps(values, indent=1) + "\n")
    return 0 if growth <= GROWTH_ALLOWED else 1


if __name__ == "__main__":
    sys.exit(main())
