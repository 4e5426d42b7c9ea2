"""Speed of the C core on one CPU core, beside its peers in the same run.

    python benchmarks/cpu.py [--json FILE] [--plot FILE] [--shapes 768x3072 ...]

Weights are cold: each measurement goes round enough copies to leave the caches, of different matrices, so
that the processor cannot learn where loops over one of them end. Reported are medians over all calls and
their quartiles, in 10^9 weights per second (Gw/s). Peers: zstd over five trits a byte, and torch's dense
products in float32 and bfloat16, all on one thread. What two threads give torch says what the machine has
to give.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import qmoe_codec
import torch
import zstandard
from format_rate import SHAPES, exact_matrix, five_per_byte
from machine import processor
from qmoe_codec import DictionarySet, Matrix, encode
from tqdm import tqdm

P_ZERO = 0.885
COLD_BYTES = 96 << 20
UNPACK = np.array([[byte // 3**k % 3 - 1 for k in range(5)] for byte in range(243)], np.int8)


BURST = 4
DIFFERENT = 12


def measure(peers: dict[str, list[Callable[[], object]]], seconds: float) -> dict[str, dict[str, float]]:
    """Median and quartiles of the time of a call of each peer, in seconds.

    Each goes round its own list of calls. The peers take turns, a few calls each, so that whatever else the
    machine does hits all of them alike.
    """
    times: dict[str, list[float]] = {name: [] for name in peers}
    for calls in peers.values():
        calls[0]()
    begun = time.perf_counter()
    while time.perf_counter() - begun < seconds * len(peers) or len(times[next(iter(peers))]) < 2 * BURST:
        for name, calls in peers.items():
            for _ in range(BURST):
                call = calls[len(times[name]) % len(calls)]
                start = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - start)
    results = {}
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        results[name] = {"median": median, "low": low, "high": high, "calls": len(values)}
    return results


def copies(nbytes: int) -> int:
    return max(2, -(-COLD_BYTES // nbytes))


def product(weights: torch.Tensor, x: torch.Tensor) -> Callable[[], object]:
    return lambda: torch.nn.functional.linear(x, weights)


def measure_two_threads(dense: list[torch.Tensor], x: torch.Tensor, seconds: float) -> dict[str, Any]:
    """A dense product of torch with one thread and with two; alone, since its threads watch for more work."""
    measured = {}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        name = f"torch {str(x.dtype).removeprefix('torch.')}, {threads} thread{'s' * (threads > 1)}"
        measured |= measure({name: [product(weights, x) for weights in dense]}, seconds)
    torch.set_num_threads(1)
    return measured


def measure_shape(rows: int, columns: int, seconds: float) -> dict[str, Any]:
    """All operations on one shape: {operation: {who: {median, low, high, calls}}}."""
    different = [exact_matrix(rows, columns, P_ZERO, seed) for seed in range(DIFFERENT)]
    trits = different[0]
    levels = np.stack([np.linspace(-0.03, -0.02, rows), np.linspace(0.02, 0.04, rows)], 1).astype(np.float32)
    encoder = DictionarySet()
    frames = [encoder.encode(one, levels) for one in different]
    frame = frames[0]
    (dictionary,) = encoder.dictionaries.values()
    cold = itertools.islice(itertools.cycle(frames), max(DIFFERENT, copies(len(frame))))
    matrices = [Matrix(bytearray(one), encoder.dictionaries) for one in cold]
    dense = torch.from_numpy(matrices[0].dequantize("float32"))
    dense32 = [dense.clone() for _ in range(copies(4 * dense.numel()))]
    dense16 = [dense.bfloat16() for _ in range(copies(2 * dense.numel()))]
    results: dict[str, Any] = {
        "dictionary": {
            "bits": dictionary.bits,
            "bits per weight": 8 * len(frame) / trits.size,
        }
    }

    packed = five_per_byte(trits)
    best = zstandard.ZstdCompressor(level=19).compress(packed)
    compressed = [bytes(bytearray(best)) for _ in range(copies(len(best)))]
    decompress = zstandard.ZstdDecompressor().decompress
    unpacked = np.empty((len(packed), 5), np.int8)
    out = np.empty_like(trits)

    def unpack(data: bytes) -> None:
        np.take(UNPACK, np.frombuffer(decompress(data), np.uint8), axis=0, out=unpacked, mode="clip")

    results["decode to int8"] = measure(
        {
            "ours": [lambda m=m: m.decode(out=out, threads=1) for m in matrices],
            "zstd -19": [lambda data=data: unpack(data) for data in compressed],
            "zstd -19, not unpacked": [lambda data=data: decompress(data) for data in compressed],
        },
        seconds,
    )
    assert np.array_equal(matrices[0].decode(), trits)
    assert np.array_equal(unpacked.reshape(-1)[: trits.size], trits.reshape(-1))

    wide, half = np.empty((rows, columns), np.float32), np.empty((rows, columns), np.uint16)
    results["dequantize"] = measure(
        {
            "to float32": [lambda m=m: m.dequantize(out=wide, threads=1) for m in matrices],
            "to bfloat16": [lambda m=m: m.dequantize("bfloat16", out=half, threads=1) for m in matrices],
        },
        seconds,
    )
    generator = np.random.default_rng(0)
    # Two threads begin elsewhere in the round, or they would find what one has just left in its caches.
    others = matrices[len(matrices) // 2 :] + matrices[: len(matrices) // 2]
    for tokens in (1, 8, 512):
        x = generator.normal(size=(tokens, columns)).astype(np.float32)
        x32, x16 = torch.from_numpy(x), torch.from_numpy(x).bfloat16()
        results[f"matmul, {tokens} token{'s' * (tokens > 1)}"] = measure(
            {
                "ours": [lambda m=m, x=x: m.matmul(x, threads=1) for m in matrices],
                "ours, 2 threads": [lambda m=m, x=x: m.matmul(x, threads=2) for m in others],
                "torch float32": [product(w, x32) for w in dense32],
                "torch bfloat16": [product(w, x16) for w in dense16],
            },
            seconds,
        )
        if tokens != 8:
            results[f"torch with 2 threads, {tokens} token{'s' * (tokens > 1)}"] = measure_two_threads(
                dense16, x16, seconds
            )
    many = [one.copy() for one in itertools.islice(itertools.cycle(different), copies(trits.size))]
    fast = zstandard.ZstdCompressor(level=1).compress
    results["encode"] = measure(
        {
            "ours": [lambda t=t: encode(t, levels, dictionary) for t in many],
            "zstd -1": [lambda t=t: fast(five_per_byte(t)) for t in many],
            "zstd -1, packed before": [lambda: fast(packed)],
        },
        seconds,
    )
    return results


TARGETS = [
    # operation, peers (the fastest counts), reach as a ratio, aim as Gw/s or ratio
    ("decode to int8", ["zstd -19"], 2.0, "12 Gw/s"),
    ("matmul, 1 token", ["torch float32", "torch bfloat16"], 3.0, "20 Gw/s"),
    ("matmul, 8 tokens", ["torch float32"], 1.5, "3 x"),
    ("matmul, 512 tokens", ["torch float32"], 0.9, "1 x"),
    ("encode", ["zstd -1"], 1.0, "2 x"),
]


def summarise(results: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """A line per shape and target: our speed, the best peer's, the ratio, whether it reaches."""
    lines = []
    for operation, peers, reach, aim in TARGETS:
        for shape, measured in results.items():
            rows, columns = map(int, shape.split("x"))
            ours = measured[operation]["ours"]
            peer = min(peers, key=lambda name: measured[operation][name]["median"])
            ratio = measured[operation][peer]["median"] / ours["median"]
            lines.append(
                {
                    "operation": operation,
                    "shape": shape,
                    "gigaweights": rows * columns / ours["median"] / 1e9,
                    "spread": [rows * columns / ours[key] / 1e9 for key in ("high", "low")],
                    "peer": peer,
                    "ratio": ratio,
                    "reach": reach,
                    "aim": aim,
                    "reached": ratio >= reach,
                }
            )
    for tokens in ("1 token", "512 tokens"):
        for shape, measured in results.items():
            one, two = (measured[f"matmul, {tokens}"][who] for who in ("ours", "ours, 2 threads"))
            ratio = one["median"] / two["median"]
            torch_one, torch_two = measured[f"torch with 2 threads, {tokens}"].values()
            rows, columns = map(int, shape.split("x"))
            lines.append(
                {
                    "operation": f"2 threads over 1, {tokens}",
                    "shape": shape,
                    "gigaweights": rows * columns / two["median"] / 1e9,
                    "spread": [rows * columns / two[key] / 1e9 for key in ("high", "low")],
                    "peer": "1 thread",
                    "ratio": ratio,
                    "torch": torch_one["median"] / torch_two["median"],
                    "reach": 1.8,
                    "aim": "",
                    "reached": ratio >= 1.8,
                }
            )
    return lines


def draw(lines: list[dict[str, Any]], path: Path, title: str) -> None:
    """A bar of the ratio to the peer for each operation and shape, with the mark to reach."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    operations = list(dict.fromkeys(line["operation"] for line in lines))
    figure, axes = pyplot.subplots(1, len(operations), figsize=(2.1 * len(operations), 3.8), sharey=False)
    for axis, operation in zip(axes, operations, strict=True):
        chosen = [line for line in lines if line["operation"] == operation]
        colours = ["#3b7dd8" if line["reached"] else "#d8743b" for line in chosen]
        axis.bar(range(len(chosen)), [line["ratio"] for line in chosen], color=colours)
        axis.axhline(chosen[0]["reach"], color="black", linewidth=1, linestyle="--")
        axis.set_xticks(range(len(chosen)), [line["shape"] for line in chosen], rotation=90, fontsize=7)
        axis.set_title(operation.replace(", ", ",\n"), fontsize=9)
        axis.tick_params(axis="y", labelsize=7)
        axis.set_ylim(0)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    axes[0].set_ylabel("times the speed of the fastest peer", fontsize=8)
    figure.suptitle(title, fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    parser.add_argument("--plot", type=Path, help="also draw them here")
    parser.add_argument("--seconds", type=float, default=1.5, help="time for each measurement")
    parser.add_argument("--shapes", nargs="*", default=[f"{rows}x{columns}" for rows, columns in SHAPES])
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = {}
    for shape in tqdm(arguments.shapes, desc="measuring", unit="shape", file=sys.stderr):
        rows, columns = map(int, shape.split("x"))
        results[shape] = measure_shape(rows, columns, arguments.seconds)
    lines = summarise(results)
    machine = f"{processor()}, {qmoe_codec.kernels_name()} kernels, p(0) = {P_ZERO}"
    bits = ", ".join(f"{shape} {measured['dictionary']['bits']}" for shape, measured in results.items())
    print(f"{machine}\nbits of the dictionary: {bits}\n")
    print(f"{'operation':<30}{'shape':>10}  {'Gw/s':>6}  quartiles     ratio  to reach  peer")
    for line in lines:
        spread = "{:5.2f}-{:5.2f}".format(*line["spread"])
        reached = "  " if line["reached"] else "NO"
        print(
            f"{line['operation']:<30}{line['shape']:>10}  {line['gigaweights']:6.2f}  {spread}  "
            f"{line['ratio']:6.2f} x  {line['reach']:.1f} x {reached}   {line['peer']}"
            + (f" (torch bfloat16: {line['torch']:.2f} x)" if "torch" in line else "")
        )
    if arguments.plot:
        draw(lines, arguments.plot, f"{machine}; dashed: to reach")
    if arguments.json:
        record = {
            "benchmark": "cpu",
            "date": date.today().isoformat(),
            "processor": processor(),
            "cores": os.cpu_count(),
            "kernels": qmoe_codec.kernels_name(),
            "versions": {
                "python": platform.python_version(),
                "numpy": np.__version__,
                "torch": torch.__version__,
                "zstandard": zstandard.__version__,
            },
            "p_zero": P_ZERO,
            "summary": lines,
            "seconds_per_call": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
