"""Try other tunings of the kernels on a GPU: the same kernels with other numbers, nothing else.

    python benchmarks/gpu_sweep.py --json benchmarks/results/gpu-sweep-h200.json
    python benchmarks/gpu_sweep.py --host --shapes 64x96     without a GPU: its times mean nothing

For each operation, axis after axis: the values of one axis are measured with the best of the axes before, and
the best is kept (geometric mean over the shapes, of times over those of the default). Every tuning's first
result is compared with the default's. JSON is written after each; nothing is begun after --seconds.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path
from typing import Any

import gpu
import numpy as np
from qmoe_gpu_decode import experts, products
from qmoe_gpu_decode.products import Tuning

SHAPES = [(3072, 768), (6144, 2080), (2048, 7168)]

# Field by field of Tuning, several at once where they go together. Launches that overlap come last: they are
# by the driver's own function, and only products have them.
PRODUCT = [
    [
        {"warps": 4},
        {"warps": 16, "resident": 16},
        {"warps": 16, "resident": 32},
        {"warps": 32, "resident": 32},
    ],
    [{"resident": 16}, {"resident": 24}, {"resident": 32}, {"resident": 40}],
    [{"together": 2}, {"together": 4}, {"together": 8}],
    [{"share": 4, "together": 1}],
    [{"prefetch": False}],
]
AXES = {
    "1 tokens": PRODUCT,
    "8 tokens": PRODUCT,
    "grouped": PRODUCT,
    "decode to bf16": PRODUCT[:4],
    "1 tokens, overlapping": [[{"overlap": True}]],
    "8 tokens, overlapping": [[{"overlap": True}]],
}
DEFAULTS = {
    "1 tokens": products.ONE_TOKEN,
    "8 tokens": products.TUNING,
    "grouped": experts.TUNING,
    "decode to bf16": products.TUNING,
    "1 tokens, overlapping": products.ONE_TOKEN,
    "8 tokens, overlapping": products.TUNING,
}


def legal(tuning: Tuning) -> bool:
    """Whether the kernels can be built so."""
    whole = tuning.resident % tuning.warps == 0 and tuning.share % tuning.together == 0
    return whole and tuning.resident >= tuning.warps


Measured = tuple[dict[str, float], np.ndarray]  # times, and the first result


def product(place: Any, problem: gpu.Problem, tokens: int, replays: int) -> Callable[[Tuning], Measured]:
    """Multiply with so many tokens."""
    import torch

    torch.manual_seed(1)
    rows, columns = problem.shape
    x = torch.randn(tokens, columns, device=place.name).bfloat16()
    y = torch.empty(tokens, rows, device=place.name, dtype=torch.bfloat16)
    names = ("bfloat16", "bfloat16")

    def measured(tuning: Tuning) -> Measured:
        def call(number: int) -> None:
            products.launch_matmul(
                problem.packed, x, y, tokens, names, number=number, stream=place.stream(), tuning=tuning
            )

        y.fill_(float("nan"))
        call(0)
        first = y.cpu().float().numpy()
        return place.measure([lambda i=i: call(i) for i in range(problem.packed.count)], replays), first

    return measured


def decode(place: Any, problem: gpu.Problem, replays: int) -> Callable[[Tuning], Measured]:
    """Unpack to bf16."""
    import torch

    out = torch.empty(problem.shape, device=place.name, dtype=torch.bfloat16)

    def measured(tuning: Tuning) -> Measured:
        def call(number: int) -> None:
            products.launch_decode(
                problem.packed, out, "bfloat16", first=number, count=1, stream=place.stream(), tuning=tuning
            )

        out.fill_(float("nan"))
        call(0)
        first = out.cpu().float().numpy()
        return place.measure([lambda i=i: call(i) for i in range(problem.packed.count)], replays), first

    return measured


def grouped(
    place: Any, layers: list[Any], tokens: int, choices: int, replays: int
) -> Callable[[Tuning], Measured]:
    """A layer of experts."""
    import torch

    torch.manual_seed(1)
    count, hidden = layers[0].experts, layers[0].hidden
    x = torch.randn(tokens, hidden, device=place.name).bfloat16()
    y = torch.empty_like(x)
    index = torch.stack([torch.randperm(count)[:choices] for _ in range(tokens)]).to(place.name)
    shares = torch.rand(tokens, choices, device=place.name)

    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        return torch.empty(shape, dtype=getattr(torch, dtype), device=place.name)

    def measured(tuning: Tuning) -> Measured:
        def call(layer: Any) -> None:
            experts.launch_experts(
                layer, x, index, shares, y, tokens, choices, "silu", ("bfloat16", "int64", "float32"),
                allocate=allocate, stream=place.stream(), tuning=tuning,
            )  # fmt: skip

        y.fill_(float("nan"))
        call(layers[0])
        first = y.cpu().float().numpy()
        return place.measure([lambda layer=layer: call(layer) for layer in layers], replays), first

    return measured


class Sweep:
    """Measurements of one operation, on several shapes."""

    def __init__(self, name: str, measures: dict[str, Callable[[Tuning], Measured]]) -> None:
        self.name, self.measures = name, measures
        self.first: dict[str, np.ndarray] = {}
        self.base: dict[str, float] = {}
        self.tried: list[dict[str, Any]] = []

    def score(self, tuning: Tuning) -> float:
        """Times over the default's; recorded. The default has to come first."""
        record: dict[str, Any] = {"tuning": asdict(tuning), "median_us": {}}
        self.tried.append(record)
        ratios = []
        for shape, measure in self.measures.items():
            times, first = measure(tuning)
            found = times["median_us"]
            expected = self.first.setdefault(shape, first)
            # Sums in another order differ, by a rounding to bfloat16 here and there
            if not np.linalg.norm(first - expected) <= 5e-3 * np.linalg.norm(expected):
                raise ValueError(f"{self.name} {shape}: {tuning} gives another result")
            ratios.append(found / self.base.setdefault(shape, found))
            record["median_us"][shape] = found
        record["ratio"] = math.exp(sum(map(math.log, ratios)) / len(ratios))
        return float(record["ratio"])

    def search(
        self, default: Tuning, axes: Sequence[Sequence[dict[str, Any]]], go_on: Callable[[str], bool]
    ) -> Tuning:
        """The best tuning found."""
        best, least = default, self.score(default)
        go_on(f"{self.name}: default")
        for axis in axes:
            start = best
            for change in axis:
                tuning = replace(start, **change)
                if not legal(tuning) or any(t["tuning"] == asdict(tuning) for t in self.tried):
                    continue
                try:
                    ratio = self.score(tuning)
                except Exception as error:  # noqa: BLE001 - the others may still be had
                    traceback.print_exc()
                    self.tried[-1]["error"] = repr(error)[:500]
                    ratio = math.inf
                if ratio < least:
                    best, least = tuning, ratio
                if not go_on(f"{self.name}: {change}: {ratio:.3f}"):
                    return best
        return best


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--shapes", nargs="+", type=gpu.parse_shape, default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--operations", nargs="+", choices=list(AXES), default=list(AXES))
    parser.add_argument("--replays", type=int, default=20)
    parser.add_argument("--bits", type=int, choices=(8, 10, 12), default=10, help="of the dictionary")
    parser.add_argument("--experts", type=int, default=gpu.GROUPED_EXPERTS, help="of the grouped layer")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin nothing after so long")
    parser.add_argument("--host", action="store_true", help="try this file without a GPU")
    return parser.parse_args(given)


def main(given: list[str] | None = None) -> int:
    options = arguments(given)
    place = gpu.OnHost() if options.host else gpu.OnGpu()
    begin = time.monotonic()
    results: dict[str, Any] = {"date": date.today().isoformat(), "device": place.describe(), "sweeps": {}}
    problems: dict[tuple[int, int], gpu.Problem] = {}

    def problem(shape: tuple[int, int]) -> gpu.Problem:
        if shape not in problems:
            problems[shape] = gpu.Problem.make(place, shape, options.bits)
        return problems[shape]

    def measures(name: str) -> dict[str, Callable[[Tuning], Measured]]:
        if name == "grouped":
            sides = (96, 64) if options.host else gpu.SIDES
            layers = gpu.packed_layers(place, sides, options.experts, options.bits)
            return {
                f"{tokens} tokens, top {choices}": grouped(place, layers, tokens, choices, options.replays)
                for tokens, choices in gpu.GROUPED
                if choices <= options.experts
            }
        if name == "decode to bf16":
            return {
                "{}x{}".format(*shape): decode(place, problem(shape), options.replays)
                for shape in options.shapes
            }
        tokens = int(name.split()[0])
        return {
            "{}x{}".format(*shape): product(place, problem(shape), tokens, options.replays)
            for shape in options.shapes
        }

    for name in options.operations:
        if time.monotonic() - begin > options.seconds:
            results.setdefault("left_out", []).append(name)
            continue
        sweep = Sweep(name, measures(name))
        results["sweeps"][name] = {"tried": sweep.tried}

        def go_on(line: str) -> bool:
            print(f"{time.monotonic() - begin:6.1f} s  {line}", file=sys.stderr, flush=True)
            gpu.write_json(options.json, results)
            return time.monotonic() - begin <= options.seconds

        try:
            best = sweep.search(DEFAULTS[name], AXES[name], go_on)
        except Exception as error:  # noqa: BLE001 - the default failed; other operations may be had
            traceback.print_exc()
            results["sweeps"][name]["error"] = repr(error)[:500]
            continue
        ratio = min(t["ratio"] for t in sweep.tried if t["tuning"] == asdict(best))
        results["sweeps"][name] |= {"best": asdict(best), "best_ratio": ratio}
        print(f"{name:15} best {ratio:.3f} of the default's time: {best}")
        gpu.write_json(options.json, results)
    gpu.write_json(options.json, results)
    return 0


if __name__ == "__main__":
    sys.exit(main())
