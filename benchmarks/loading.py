"""Time to load a packed model beside plain reading of its files, and the memory that it takes.

    python benchmarks/loading.py [--json FILE]

Time: transformers maps the shards, so loading alone touches few bytes; what is compared is loading and then
touching every page of every tensor, against reading the same files into memory with 16 MB reads. Warm: the
files are in the page cache; cold: they were dropped from it before (posix_fadvise).

Memory: growth of the peak of resident memory (VmHWM) over a process that has imported everything and
generated with a small model. Mapped pages of the files count in it.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import moe_models
import torch
import transformers
from machine import write_record
from offload import drop_page_cache

from qmoe_format.transformers import load

HIDDEN, WIDTH, LAYERS, EXPERTS, PER_TOKEN, VOCABULARY = 2048, 1024, 8, 64, 8, 50304
REPEATS = 7
PROMPT, TOKENS = 64, 8
MARGIN = 64 << 20


def read_files(path: Path) -> None:
    """All shards, into memory as fresh as a loader's."""
    for file in sorted(path.glob("*.safetensors")):
        memory = memoryview(torch.empty(file.stat().st_size, dtype=torch.uint8).numpy())
        with file.open("rb", buffering=0) as stream:
            done = 0
            while count := stream.readinto(memory[done : done + (1 << 24)]):
                done += count


def load_and_touch(path: Path) -> None:
    model: Any = load(path)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.numel():
            tensor.detach().reshape(-1).view(torch.uint8)[::4096].sum()


def seconds(call: Callable[[], object], before: Callable[[], object]) -> float:
    before()
    begun = time.perf_counter()
    call()
    return time.perf_counter() - begun


def measure_time(path: Path) -> dict[str, Any]:
    calls: dict[str, Callable[[], object]] = {
        "read": lambda: read_files(path),
        "load": lambda: load(path),
        "load and touch": lambda: load_and_touch(path),
    }
    result: dict[str, Any] = {}
    for state, before in (("warm", lambda: None), ("cold", lambda: drop_page_cache(path))):
        for call in calls.values():  # imports, and the page cache
            call()
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(REPEATS):
            for name, call in calls.items():
                times[name].append(seconds(call, before))
                gc.collect()
        medians = {name: statistics.median(values) for name, values in times.items()}
        result[state] = {
            "medians": medians,
            "all": times,
            "load and touch over read": medians["load and touch"] / medians["read"],
        }
        print(
            f"{state}: read {medians['read']:.3f} s, load {medians['load']:.3f} s, "
            f"load and touch {medians['load and touch']:.3f} s: "
            f"{result[state]['load and touch over read']:.2f} x the time to read",
            flush=True,
        )
    return result


# What runs in a process of its own, once for each way to load
PEAK = """
import json, re, sys
from pathlib import Path
import torch, transformers
from qmoe_format.transformers import load

small, path, cache = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
prompt, tokens = map(int, sys.argv[4:])
transformers.utils.logging.disable_progress_bar()

def resident(field):
    return int(re.search(rf"{field}:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

@torch.inference_mode()
def generate(model):
    ids = torch.arange(1, 1 + prompt)[None]
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)

generate(load(small, **cache))
before = resident("VmRSS")
Path("/proc/self/clear_refs").write_text("5")
model = load(path, **cache)
loaded = resident("VmHWM") - before
generate(model)
generated = resident("VmHWM") - before
print(json.dumps({"load": loaded, "generate": generated,
                  "slots": model.expert_cache.stats.as_dict() if cache else None}))
"""


def measure_memory(folder: Path, path: Path, sizes: dict[str, int]) -> list[dict[str, Any]]:
    config = moe_models.config_of(64, 128, 2, EXPERTS, PER_TOKEN)
    small = moe_models.packed_in(folder / "small", config)
    lines = []
    for name, cache in (
        ("in memory", {}),
        ("cache of a quarter", {"expert_cache": f"{sizes['experts'] // 4}B", "page_cache": False}),
    ):
        done = subprocess.run(
            [
                *(sys.executable, "-c", PEAK, str(small), str(path), json.dumps(cache)),
                *(str(PROMPT), str(TOKENS)),
            ],
            capture_output=True,
            text=True,
            check=True,
        )
        peak = json.loads(done.stdout)
        experts = sizes["experts"] if not cache else sizes["experts"] // 4
        allowed = experts + sizes["dense"] + MARGIN
        lines.append({"experts": name, "peak": peak, "allowed": allowed, "margin": MARGIN, **sizes})
        print(
            f"{name}: peak of loading {peak['load'] / 1e6:.0f} MB, of generating "
            f"{peak['generate'] / 1e6:.0f} MB; experts allowed {experts / 1e6:.0f} MB + dense tensors "
            f"{sizes['dense'] / 1e6:.0f} MB + {MARGIN / 1e6:.0f} MB = {allowed / 1e6:.0f} MB",
            flush=True,
        )
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--folder", type=Path, help="where to keep the models for another run")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        config = moe_models.config_of(HIDDEN, WIDTH, LAYERS, EXPERTS, PER_TOKEN, VOCABULARY)
        path = moe_models.packed_in(folder / "packed", config)
        sizes = moe_models.sizes_of(path)
        print({name: f"{size / 1e6:.0f} MB" for name, size in sizes.items()})
        times = measure_time(path)
        memory = measure_memory(folder, path, sizes)
    if arguments.json:
        write_record(
            arguments.json,
            "loading",
            threads=torch.get_num_threads(),
            model=f"{LAYERS} layers x {EXPERTS} experts of 3 x {WIDTH} x {HIDDEN}, bfloat16 dense tensors",
            bytes=sizes,
            repeats=REPEATS,
            seconds=times,
            memory=memory,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
