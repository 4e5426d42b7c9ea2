"""Experts beyond memory: packed experts behind a cache, beside bfloat16 ones offloaded with the same bytes.

    python benchmarks/offload.py [--json FILE] [--plot FILE]

The model is made on the spot: an OLMoE with random ternary experts. The cache may take a quarter of its
packed experts. The peer is the same transformers model with its experts as bfloat16 tensors in a file,
contiguous per expert, read by the same number of threads into a least-recently-used cache of as many bytes,
and multiplied by torch in bfloat16. Reads are measured in two ways:

* ``disk``: what was read is dropped from the page cache at once (posix_fadvise), so that every read goes to
  the device;
* ``N MB/s``: a throttle: no read returns before a device of this bandwidth would have delivered it and all
  reads before it. The bytes then come from the page cache.

A random model routes tokens at random, which is the worst for a cache; what policies and prefetch do for the
routing of a trained model is measured by ``expert_routing.py``.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import moe_models
import numpy as np
import qmoe_codec
import torch
import transformers
from machine import processor, write_record
from tqdm import tqdm

import qmoe_format
from qmoe_format.host_slots import RecordFile
from qmoe_format.transformers import load

HIDDEN, WIDTH, LAYERS, EXPERTS, PER_TOKEN = 1024, 1024, 8, 32, 2
READERS = 4
PROMPT, TOKENS, REPEATS = 4, 12, 3


class Throttle:
    """Delays reads to what a device of `rate` bytes per second would do; None: no delay."""

    def __init__(self, rate: float | None) -> None:
        self.rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0

    @contextmanager
    def read(self, nbytes: int) -> Iterator[None]:
        if self.rate is None:
            yield
            return
        with self._lock:
            self._free_at = max(self._free_at, time.perf_counter()) + nbytes / self.rate
            until = self._free_at
        yield
        time.sleep(max(0.0, until - time.perf_counter()))


class ThrottledFile(RecordFile):
    """What the cache reads from, slowed down."""

    throttle = Throttle(None)

    def read_into(self, memory: memoryview, offset: int, place: str) -> None:
        with self.throttle.read(len(memory)):
            super().read_into(memory, offset, place)


class DenseFile:
    """Experts in bfloat16: one contiguous piece of gate, up and down for each; read into slots."""

    def __init__(self, path: Path, budget: int, expert_bytes: int, throttle: Throttle) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)
        self.expert_bytes = expert_bytes
        self.slots = budget // expert_bytes
        assert self.slots >= PER_TOKEN, "the budget does not hold the experts of one token in bfloat16"
        self.memory = torch.empty(self.slots, expert_bytes, dtype=torch.uint8)
        self.free = list(range(self.slots))
        self.there: OrderedDict[tuple[int, int], int] = OrderedDict()
        self.throttle = throttle
        self.pool = ThreadPoolExecutor(READERS)
        self.read_bytes = self.hits = self.misses = 0

    def slots_of(self, layer: int, experts: list[int]) -> list[int]:
        keys = [(layer, expert) for expert in experts]
        for key in keys:
            if key in self.there:
                self.there.move_to_end(key)
        reads = []
        for key in keys:
            if key in self.there:
                self.hits += 1
                continue
            self.misses += 1
            if not self.free:
                self.free.append(self.there.popitem(last=False)[1])
            self.there[key] = self.free.pop()
            reads.append(self.pool.submit(self._read, key, self.there[key]))
        for done in reads:
            done.result()
        return [self.there[key] for key in keys]

    def _read(self, key: tuple[int, int], slot: int) -> None:
        view = memoryview(self.memory[slot].numpy())
        offset = (key[0] * EXPERTS + key[1]) * self.expert_bytes
        with self.throttle.read(len(view)):
            done = 0
            while done < len(view):
                done += os.preadv(self.descriptor, [view[done:]], offset + done)
        if self.throttle.rate is None:
            os.posix_fadvise(self.descriptor, offset, len(view), os.POSIX_FADV_DONTNEED)
        self.read_bytes += len(view)


class DenseOffload(torch.nn.Module):
    """Experts of one layer that come from a :class:`DenseFile`."""

    def __init__(self, file: DenseFile, layer: int, config: transformers.OlmoeConfig) -> None:
        super().__init__()
        self.file, self.layer = file, layer
        self.shape = (3, config.intermediate_size, config.hidden_size)
        self.act = transformers.activations.ACT2FN[config.hidden_act]

    def forward(self, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        output = torch.zeros_like(hidden)
        needed = torch.unique(index).tolist()
        for start in range(0, len(needed), self.file.slots):
            experts = needed[start : start + self.file.slots]
            for expert, slot in zip(experts, self.file.slots_of(self.layer, experts), strict=True):
                gate, up, down = self.file.memory[slot].view(torch.bfloat16).view(self.shape)
                token, choice = torch.where(index == expert)
                x = hidden[token]
                inner = self.act(x @ gate.T) * (x @ up.T)
                y = inner @ down.view(self.shape[2], self.shape[1]).T
                output.index_add_(0, token, y * weights[token, choice, None].to(y.dtype))
        return output


def write_dense_experts(packed: Path, out: Path) -> None:
    """All experts in bfloat16, in the order of layers and experts."""
    with qmoe_format.open(packed) as model, out.open("wb") as stream:
        for prefix in tqdm(model.layers, desc="writing bfloat16 experts", unit="layer", file=sys.stderr):
            layer = model.layer(prefix)
            for expert in range(layer.experts):
                for p in layer.spec.projections:
                    stream.write(layer.matrix(expert, p.name, verify=False).dequantize("bfloat16").tobytes())
        stream.flush()
        os.fsync(stream.fileno())


def drop_page_cache(path: Path) -> None:
    """Forget what the system keeps of a file, or of all files of a directory."""
    for file in path.iterdir() if path.is_dir() else [path]:
        with file.open("rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def generate(model: Any, after_prompt: Callable[[], None]) -> tuple[list[int], float]:
    """Sampled tokens, the same for the same logits, and seconds per token after the prompt's."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.arange(1, 1 + PROMPT)[None]
    with torch.inference_mode():
        output = model(tokens, use_cache=True)
        after_prompt()
        begun = time.perf_counter()
        for _ in range(TOKENS):
            chances = output.logits[:, -1].float().softmax(-1)
            token = torch.multinomial(chances, 1, generator=generator)
            tokens = torch.cat([tokens, token], 1)
            output = model(token, past_key_values=output.past_key_values, use_cache=True)
        seconds = (time.perf_counter() - begun) / TOKENS
    return tokens[0].tolist(), seconds


def run_packed(path: Path, budget: int, rate: float | None) -> dict[str, Any]:
    ThrottledFile.throttle = Throttle(rate)
    model: Any = load(path, expert_cache=f"{budget}B", page_cache=rate is not None)
    if rate is None:
        drop_page_cache(path)
    text, seconds = generate(model, model.expert_cache.reset_stats)
    stats = model.expert_cache.stats
    model.expert_cache.close()
    return {
        "text": text,
        "seconds_per_token": seconds,
        "read_bytes_per_token": stats.read_bytes / TOKENS,
        "stats": stats.as_dict(),
    }


def run_dense(packed: Path, experts: Path, budget: int, rate: float | None) -> dict[str, Any]:
    with qmoe_format.open(packed) as opened:
        expert_bytes = 2 * sum(p.rows * p.columns for p in next(iter(opened.layers.values())).projections)
    file = DenseFile(experts, budget, expert_bytes, Throttle(rate))
    model: Any = load(packed, expert_cache=PER_TOKEN)
    for number, layer in enumerate(model.model.layers):
        layer.mlp.experts = DenseOffload(file, number, model.config)
    if rate is None:
        drop_page_cache(experts)

    def reset() -> None:
        file.read_bytes = file.hits = file.misses = 0

    _, seconds = generate(model, reset)
    file.pool.shutdown()
    os.close(file.descriptor)
    return {
        "seconds_per_token": seconds,
        "read_bytes_per_token": file.read_bytes / TOKENS,
        "slots": file.slots,
        "hit_rate": file.hits / (file.hits + file.misses),
    }


def median_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The last run with the median time of all."""
    times = [run["seconds_per_token"] for run in runs]
    return {**runs[-1], "seconds_per_token": statistics.median(times), "all": times}


def compare(folder: Path, rates: list[float | None]) -> dict[str, Any]:
    """Packed and bfloat16 experts behind caches of the same bytes."""
    config = moe_models.config_of(HIDDEN, WIDTH, LAYERS, EXPERTS, PER_TOKEN)
    packed = moe_models.packed_in(folder / "packed", config)
    if not (folder / "experts.bf16").exists():
        write_dense_experts(packed, folder / "experts.bf16")
    with qmoe_format.open(packed) as opened:
        packed_bytes = sum(len(opened.layer(prefix).store) for prefix in opened.layers)
    budget = packed_bytes // 4
    whole: Any = load(packed)
    text, _ = generate(whole, lambda: None)
    in_memory = statistics.median(generate(whole, lambda: None)[1] for _ in range(REPEATS))
    del whole
    result: dict[str, Any] = {
        "experts": f"{LAYERS} layers x {EXPERTS} experts of 3 x {WIDTH} x {HIDDEN}, {PER_TOKEN} per token",
        "packed_bytes": packed_bytes,
        "bfloat16_bytes": (folder / "experts.bf16").stat().st_size,
        "cache_bytes": budget,
        "in_memory_seconds_per_token": in_memory,
        "rates": {},
    }
    for rate in rates:
        name = "disk" if rate is None else f"{rate / 1e6:.0f} MB/s"
        pairs = [  # in turns, so that whatever else the machine does hits both
            (run_packed(packed, budget, rate), run_dense(packed, folder / "experts.bf16", budget, rate))
            for _ in range(REPEATS)
        ]
        runs = {
            "packed": median_of([pair[0] for pair in pairs]),
            "bfloat16": median_of([pair[1] for pair in pairs]),
        }
        runs["packed"]["same_text_as_in_memory"] = runs["packed"].pop("text") == text
        ratio = runs["bfloat16"]["seconds_per_token"] / runs["packed"]["seconds_per_token"]
        result["rates"][name] = {**runs, "times_faster": ratio}
        print(
            f"{name:>10}: packed {1e3 * runs['packed']['seconds_per_token']:.1f} ms per token "
            f"({runs['packed']['read_bytes_per_token'] / 1e6:.2f} MB read, hit rate "
            f"{runs['packed']['stats']['hit_rate']:.2f}, same text: "
            f"{runs['packed']['same_text_as_in_memory']}), bfloat16 "
            f"{1e3 * runs['bfloat16']['seconds_per_token']:.1f} ms "
            f"({runs['bfloat16']['read_bytes_per_token'] / 1e6:.1f} MB): {ratio:.1f} x",
            flush=True,
        )
    return result


def draw(result: dict[str, Any], path: Path, title: str) -> None:
    """Seconds per token of packed and bfloat16 experts for each way to read."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(result["rates"])
    figure, axis = pyplot.subplots(figsize=(6, 3.2))
    for shift, kind, colour in ((-0.2, "packed", "#3b7dd8"), (0.2, "bfloat16", "#d8743b")):
        values = [1e3 * result["rates"][name][kind]["seconds_per_token"] for name in names]
        bars = axis.bar(np.arange(len(names)) + shift, values, 0.38, label=kind, color=colour)
        axis.bar_label(bars, [f"{value:.0f}" for value in values], fontsize=8)
    axis.axhline(1e3 * result["in_memory_seconds_per_token"], color="black", linewidth=1, linestyle="--")
    axis.set_xticks(range(len(names)), [f"{n}\n{result['rates'][n]['times_faster']:.1f} ×" for n in names])
    axis.set_yscale("log")
    axis.set_ylim(1, 2 * max(run["bfloat16"]["seconds_per_token"] for run in result["rates"].values()) * 1e3)
    axis.set_ylabel("ms per token")
    axis.legend(frameon=False, fontsize=8, loc="upper left")
    for side in ("top", "right"):
        axis.spines[side].set_visible(False)
    axis.set_title(title, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--plot", type=Path, help="also draw them here")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rates", type=float, nargs="*", default=[500, 200], help="MB/s")
    parser.add_argument("--folder", type=Path, help="where to keep the models for another run")
    arguments = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(arguments.threads)
    # The cache opens its files by this name
    qmoe_format.host_slots.RecordFile = ThrottledFile
    rates = [None, *(1e6 * rate for rate in arguments.rates)]
    with tempfile.TemporaryDirectory() as temporary:
        result = compare(arguments.folder or Path(temporary), rates)
    threads = f"{torch.get_num_threads()} thread{'s' * (torch.get_num_threads() > 1)}"
    machine = f"{processor()}, {threads}, {qmoe_codec.kernels_name()} kernels"
    if arguments.plot:
        title = f"{machine}\ncache of {result['cache_bytes'] / 1e6:.1f} MB, a quarter of the packed experts; "
        draw(result, arguments.plot, title + "dashed: packed, all in memory")
    if arguments.json:
        write_record(
            arguments.json,
            "offload",
            threads=torch.get_num_threads(),
            tokens=TOKENS,
            repeats=REPEATS,
            **result,
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
