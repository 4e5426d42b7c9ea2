"""Checkpoints in the layout of QMoE's authors before and after packing: size, speed, memory.

    python benchmarks/import_qmoe.py [--experts 4 16] [--json FILE]

The experts have the shapes of switch-base-128, 768 x 3072; p(0) is .885 everywhere, or differs from row to
row around .9. The checkpoint is made by the encoder of the tests, which knows nothing of the importer. Each
import runs in a process of its own; its peak memory is counted above what torch and the dictionary take
(Linux), pages of the mapped source included.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch
from machine import processor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
import published_models

SHAPE = {"d_model": 768, "d_ff": 3072, "num_layers": 2, "num_decoder_layers": 2, "vocab_size": 1000}


def uniform(rows: int, columns: int, seed: int, odd_rows: bool = False) -> torch.Tensor:
    """Ternary weights with p(0) = .885."""
    random = np.random.default_rng(seed)
    trits = random.choice([-1, 0, 1], (rows, columns), p=[0.0575, 0.885, 0.0575])
    levels = random.uniform(0.01, 0.1, (2, rows, 1))
    return torch.from_numpy(np.where(trits < 0, -levels[0], np.where(trits > 0, levels[1], 0.0))).bfloat16()


def run(source: Path, out: Path, keep_codes: bool) -> dict[str, object]:
    """Import in this process."""
    from qmoe_quantize.published.dictionary import published_dictionary
    from qmoe_quantize.published.importer import import_published

    published_dictionary()
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # forget the peak so far
    before = status("VmRSS")
    start = time.perf_counter()
    summary = import_published(source, out, keep_codes=keep_codes)
    seconds = time.perf_counter() - start
    return {**summary.to_json(), "seconds": seconds, "peak_megabytes": (status("VmHWM") - before) / 1024}


def status(name: str) -> int:
    """A number of kilobytes that Linux gives of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--experts", type=int, nargs="+", default=[4, 16], help="in each of two layers")
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--run", nargs=3, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        source, out, keep = arguments.run
        print(json.dumps(run(Path(source), Path(out), keep == "keep")))
        return
    results = []
    differing = published_models.ternary_matrix
    for rows in ("uniform", "differing"):
        published_models.ternary_matrix = uniform if rows == "uniform" else differing
        for experts in arguments.experts:
            with tempfile.TemporaryDirectory() as folder:
                source = Path(folder) / "source"
                published_models.write_checkpoint(source, odd_rows=False, num_experts=experts, **SHAPE)
                for codes in ("keep", "anew"):
                    command = [sys.executable, __file__, "--run", str(source), f"{folder}/{codes}", codes]
                    done = subprocess.run(command, capture_output=True, text=True, check=True)
                    result = {"rows": rows, "experts": experts, **json.loads(done.stdout)}
                    results.append(result)
                    print(
                        f"{rows:>9} rows, {result['weights'] / 1e6:.0f} M weights, "
                        f"{result['sparsity']:.1%} zero, codewords {result['codewords']:>10}: "
                        f"{result['expert_source_bytes']:,} bytes "
                        f"({result['source_bits_per_weight']:.4f} bits/weight) -> "
                        f"{result['expert_packed_bytes']:,} ({result['bits_per_weight']:.4f}), "
                        f"{result['gain']:+.1%} saved, {result['seconds']:.1f} s, "
                        f"peak {result['peak_megabytes']:.0f} MB",
                        flush=True,
                    )
    if arguments.json:
        record = {
            "benchmark": "import_qmoe",
            "date": date.today().isoformat(),
            "machine": platform.machine(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "versions": {"numpy": np.__version__, "torch": torch.__version__},
            "results": results,
        }
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
