"""Memory of a packed model whose experts are spread over ranks.

    python benchmarks/expert_parallel.py

A made-up OLMoE is packed; 1, 2 and 4 processes, started by torchrun, load it with its experts spread over all
of them, and each runs a text of its own. What is measured is the peak resident memory of each, before loading
and at the end, and the experts that it holds.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import write_record
from qmoe_quantize import PackOptions, pack
from ranks import make_source

RESULTS = Path(__file__).parent / "results/expert_parallel.json"
MODEL = {"hidden_size": 1024, "intermediate_size": 1024, "num_experts": 32, "num_hidden_layers": 4}
TOKENS = 128


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def worker(packed: Path) -> None:
    """What torchrun starts: one rank."""
    import torch
    import torch.distributed as dist

    import qmoe_format.transformers
    from qmoe_format.expert_parallel import parallel_layers

    dist.init_process_group("gloo")
    before = peak_bytes()
    model = qmoe_format.transformers.load(packed, expert_parallel=dist.group.WORLD)
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(rank)
    with torch.inference_mode():
        model(input_ids=torch.randint(1, 256, (1, TOKENS), generator=generator))
    held = sum(layer.local.qmoe_store.numel() for layer in parallel_layers(model) if layer.local)
    found = {"rank": rank, "peak_rss_bytes": peak_bytes(), "before_loading": before, "expert_bytes": held}
    print(json.dumps(found), flush=True)
    dist.barrier()
    dist.destroy_process_group()


def measure(packed: Path, ranks: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), __file__]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--worker", str(packed)], stdout=subprocess.PIPE, text=True, env=environment, check=True
    )
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    found.sort(key=lambda note: note["rank"])
    return {
        "ranks": ranks,
        **{name: [note[name] for note in found] for name in found[0] if name != "rank"},
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.worker:
        worker(options.worker)
        return
    rows = []
    with tempfile.TemporaryDirectory() as name:
        source, packed = Path(name) / "source", Path(name) / "packed"
        make_source(source, MODEL)
        pack(source, packed, PackOptions(levels="lsq"))
        for ranks in options.ranks:
            row = measure(packed, ranks)
            rows.append(row)
            peak, held, before = (
                max(row[name]) / 1e6 for name in ("peak_rss_bytes", "expert_bytes", "before_loading")
            )
            print(f"{ranks} ranks: peak {peak:.0f} MB, {before:.0f} before loading; experts {held:.1f} MB")
    write_record(options.out, "expert_parallel", threads=1, model=MODEL, tokens=TOKENS, runs=rows)


if __name__ == "__main__":
    main()
