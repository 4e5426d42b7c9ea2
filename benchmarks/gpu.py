"""Speed of the kernels on a GPU, beside dense bf16 in the same run.

    python benchmarks/gpu.py --json benchmarks/results/gpu-h200.json --plot benchmarks/results/gpu-h200.png
    python benchmarks/gpu.py --qmoe PATH     also the QMoE authors' kernel, from a checkout of theirs
    python benchmarks/gpu.py --chart FILE --plot OUT.png     a chart of results that are there already

Each measurement is a CUDA graph of calls that go round enough matrices to leave the L2, timed by events;
reported are the median over replays and the quartiles, in microseconds a call. Bytes and lane instructions
are counted, not measured: see gpu_decode/NOTES.md. Needs a GPU, cupy and torch.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import statistics
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

P_ZERO = 0.885
# Six of QMoE's (switch-base and -large, c2048), an expert of Qwen3-30B-A3B, one of DeepSeek-V3.
SHAPES = [
    (3072, 768),
    (768, 3072),
    (4096, 1024),
    (1024, 4096),
    (6144, 2080),
    (2080, 6144),
    (768, 2048),
    (2048, 7168),
]
GROUPED = [(64, 1), (64, 8)]  # tokens and choices, of 128 experts
GROUPED_EXPERTS = 128
# Lane instructions, counted in the kernels' text; NOTES.md has the count.
PER_CODEWORD, PER_NONZERO = 13.0, 9.0
PER_NONZERO_TOKEN = 1.6


def counted(
    weights: int, codewords: int, nonzeros: int, frame_bytes: int, tokens: int, shape: tuple[int, int]
) -> dict:
    """Bytes that a product has to move and lane instructions that it takes, beside dense bf16's bytes."""
    rows, columns = shape
    vectors = 2 * tokens * (rows + columns)
    per_nonzero = PER_NONZERO if tokens == 1 else 6 + PER_NONZERO_TOKEN * tokens
    return {
        "bytes": frame_bytes + vectors,
        "dense_bytes": 2 * weights + vectors,
        "lane_instructions": round(PER_CODEWORD * codewords + per_nonzero * nonzeros),
        "instructions_per_weight": (PER_CODEWORD * codewords + per_nonzero * nonzeros) / weights,
    }


def copies(frame_bytes: int, l2_bytes: int) -> int:
    """How many matrices to go round: more than twice the L2, at most a thousand."""
    return max(2, min(1000, -(-2 * l2_bytes // max(1, frame_bytes)) + 1))


def summary(microseconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(microseconds, n=4)
    return {"median_us": median, "low_us": low, "high_us": high, "replays": len(microseconds)}


def measure(calls: list[Callable[[], object]], replays: int) -> dict[str, float]:
    """Time of one call, from a graph of all of them."""
    import torch

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]  # so that no two share their output
    times = []
    for _ in range(replays + 3):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end) / len(calls))
    del kept
    return summary(times[3:])


def ternary(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    share = (1 - P_ZERO) / 2
    trits = rng.choice(np.array([-1, 0, 1], np.int8), (rows, columns), p=[share, P_ZERO, share])
    levels = (rng.uniform(0.01, 0.03, (rows, 2)) * (-1, 1)).astype(np.float32)
    return trits, levels


def measure_shape(shape: tuple[int, int], l2_bytes: int, replays: int, bits: int) -> dict[str, Any]:
    """All operations on one shape."""
    import torch
    from qmoe_codec import build_dictionary, encode, read_frame_header
    from qmoe_gpu_decode import encode as encode_there
    from qmoe_gpu_decode import torch_ops
    from qmoe_gpu_decode.device import cuda_device
    from qmoe_gpu_decode.matrices import PackedMatrices

    rows, columns = shape
    rng = np.random.default_rng()
    trits, levels = ternary(rng, rows, columns)
    dictionary = build_dictionary(P_ZERO, bits)
    frame = encode(trits, levels, dictionary)
    header = read_frame_header(frame)
    number_of = copies(len(frame), l2_bytes)
    packed = PackedMatrices([frame] * number_of, {dictionary.dictionary_id: dictionary}, cuda_device())
    handle = torch_ops.register(packed)
    like = torch.zeros(1, dtype=torch.bfloat16, device="cuda")
    weights = torch.ops.qmoe.dequantize(handle, like, 0, rows, columns)
    low, high = (torch.from_numpy(levels[:, k : k + 1]).cuda().bfloat16() for k in (0, 1))
    there = torch.from_numpy(trits).cuda()
    assert torch.equal(weights, torch.where(there < 0, low, torch.where(there > 0, high, 0 * low)))
    dense = [weights.clone() for _ in range(copies(2 * weights.numel(), l2_bytes))]
    results: dict[str, Any] = {"frame_bytes": len(frame), "codewords": header.codeword_count}
    for tokens in (1, 8, 32, 4096):
        x = torch.randn(tokens, columns, device="cuda").bfloat16()
        y = torch.ops.qmoe.matmul(handle, x, 0, rows)
        exact = x.double() @ weights.double().T
        assert (y.double() - exact).norm() / exact.norm() < 1e-2
        some = min(number_of, 8) if tokens > 32 else number_of
        results[f"{tokens} tokens"] = {
            "ours": measure(
                [lambda i=i, x=x: torch.ops.qmoe.matmul(handle, x, i, rows) for i in range(some)], replays
            ),
            "dense bf16": measure([lambda w=w, x=x: torch.matmul(x, w.T) for w in dense[:some]], replays),
            "counted": counted(
                rows * columns, header.codeword_count, int(np.count_nonzero(trits)), len(frame), tokens, shape
            ),
        }
    some = min(number_of, len(dense))
    results["decode to bf16"] = {
        "ours": measure(
            [lambda i=i: torch.ops.qmoe.dequantize(handle, like, i, rows, columns) for i in range(some)],
            replays,
        ),
        "written_bytes": 2 * rows * columns,
    }
    there_levels = torch.from_numpy(levels).cuda()
    times = []
    for _ in range(replays + 3):  # not in a graph: encoding waits for the size of the frame
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record(torch.cuda.default_stream())
        made = encode_there(there, there_levels, dictionary)
        end.record(torch.cuda.default_stream())
        end.synchronize()
        times.append(1000 * begin.elapsed_time(end))
    assert bytes(made.get()) == frame
    results["encode"] = {"ours": summary(times[3:]), "weights": rows * columns}
    return results


def measure_grouped(
    tokens: int, choices: int, hidden: int, intermediate: int, replays: int, bits: int
) -> dict[str, Any]:
    """A layer of experts beside the same in bf16: a dense product per expert that is hit, in one graph."""
    import torch
    from qmoe_codec import build_dictionary, encode
    from qmoe_gpu_decode import ExpertProjection, PackedExperts, torch_ops
    from qmoe_gpu_decode.device import cuda_device

    rng = np.random.default_rng()
    dictionary = build_dictionary(P_ZERO, bits)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    frames = {role: encode(*ternary(rng, *shape), dictionary) for role, shape in shapes.items()}
    record = b"".join(frames.values())
    record_room = -(-len(record) // 256) * 256
    store = record.ljust(record_room, b"\0") * GROUPED_EXPERTS
    index = np.array([(e * record_room, len(record), -1) for e in range(GROUPED_EXPERTS)])
    projections = [ExpertProjection(role, *shape) for role, shape in shapes.items()]
    dictionaries = {dictionary.dictionary_id: dictionary}
    l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size
    layers = [
        PackedExperts(store, index, dictionaries, projections, cuda_device(), verify=False)
        for _ in range(copies(len(store), l2_bytes))
    ]
    handles = [torch_ops.register(layer) for layer in layers]
    x = torch.randn(tokens, hidden, device="cuda").bfloat16()
    chosen = torch.stack([torch.randperm(GROUPED_EXPERTS)[:choices] for _ in range(tokens)]).cuda()
    shares = torch.rand(tokens, choices, device="cuda")
    dense = {
        role: torch.randn(GROUPED_EXPERTS, *shape, device="cuda", dtype=torch.bfloat16)
        for role, shape in shapes.items()
    }
    groups = [(chosen == e).nonzero(as_tuple=True) for e in range(GROUPED_EXPERTS)]

    def peer() -> torch.Tensor:  # routing known beforehand: kinder to the peer than to ours
        y = torch.zeros_like(x)
        for expert, (token, choice) in enumerate(groups):
            if len(token):
                inputs = x[token]
                entered = torch.nn.functional.silu(inputs @ dense["gate"][expert].T) * (
                    inputs @ dense["up"][expert].T
                )
                y.index_add_(
                    0, token, (entered @ dense["down"][expert].T) * shares[token, choice, None].bfloat16()
                )
        return y

    def grouped() -> torch.Tensor:
        order = torch.cat([token for token, _ in groups])
        inputs = x[order]
        entered = torch.nn.functional.silu(
            torch._grouped_mm(inputs, dense["gate"].transpose(1, 2), offs=ends)
        )
        entered = entered * torch._grouped_mm(inputs, dense["up"].transpose(1, 2), offs=ends)
        return torch._grouped_mm(entered, dense["down"].transpose(1, 2), offs=ends)

    ends = torch.tensor([len(token) for token, _ in groups]).cumsum(0).int().cuda()
    results = {
        "ours": measure(
            [lambda h=h: torch.ops.qmoe.experts(h, x, chosen, shares, "silu") for h in handles], replays
        ),
        "bf16, an expert at a time": measure([peer] * 2, replays),
        "store_bytes": len(store),
    }
    if hasattr(torch, "_grouped_mm"):
        results["bf16, grouped"] = measure([grouped] * 4, replays)
    return results


def measure_qmoe(path: Path, replays: int) -> dict[str, Any]:
    """The QMoE authors' kernel: PATH is a Python file with ``prepare(rows, columns, copies)``.

    It builds their extension from their checkout and returns a list of functions without arguments, one
    product of one token each, on different matrices; nothing of theirs is kept here.
    """
    spec = importlib.util.spec_from_file_location("qmoe_peer", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return {
        f"{rows}x{columns}": measure(
            module.prepare(rows, columns, copies(rows * columns // 10, 50 << 20)), replays
        )
        for rows, columns in SHAPES[:6]
    }


def chart(results: dict[str, Any], out: Path) -> None:
    """A roofline: what one and eight tokens took, beside the times that the counts give."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    device, shapes = results["device"], list(results["shapes"])
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axis, tokens in zip(axes, (1, 8), strict=True):
        cells = [results["shapes"][shape][f"{tokens} tokens"] for shape in shapes]
        bars = {
            "dense bf16": [c["dense bf16"]["median_us"] for c in cells],
            "ours": [c["ours"]["median_us"] for c in cells],
            "our bytes, at full bandwidth": [
                1e6 * c["counted"]["bytes"] / device["bytes_per_second"] for c in cells
            ],
            "our instructions, all issued": [
                1e6 * c["counted"]["lane_instructions"] / device["lane_instructions_per_second"]
                for c in cells
            ],
        }
        for number, (name, values) in enumerate(bars.items()):
            axis.bar(np.arange(len(shapes)) + 0.2 * number - 0.3, values, 0.2, label=name)
        axis.set_xticks(range(len(shapes)), shapes, rotation=30)
        axis.set_yscale("log")
        axis.set_title(f"{tokens} token{'s' * (tokens > 1)}")
    axes[0].set_ylabel("µs a product")
    axes[0].legend()
    figure.suptitle(f"{device['name']}, {results['date']}, p(0) = {P_ZERO}")
    figure.tight_layout()
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def describe_device() -> dict[str, Any]:
    """The GPU, and its two ceilings: bandwidth as measured by a copy, issue as its clock and size give it."""
    import cupy
    import torch

    properties = torch.cuda.get_device_properties(0)
    source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty_like(source)
    copied = measure([lambda: target.copy_(source)], 20)
    clock = cupy.cuda.runtime.getDeviceProperties(0)["clockRate"] * 1000
    return {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "bytes_per_second": 2e6 * source.numel() / copied["median_us"],
        "lane_instructions_per_second": 4 * 32 * properties.multi_processor_count * clock,
        "torch": torch.__version__,
        "cupy": cupy.__version__,
        "cuda": torch.version.cuda,
        "driver": cupy.cuda.runtime.driverGetVersion(),
    }


def parse_shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def table(results: dict[str, Any]) -> str:
    """What was measured, a line a cell, with how many times faster than the peer it is."""
    lines = []
    for shape, cells in results["shapes"].items():
        for name, cell in cells.items():
            if isinstance(cell, dict) and "ours" in cell:
                ours = cell["ours"]["median_us"]
                peer = cell.get("dense bf16", {}).get("median_us")
                ratio = f"{peer / ours:6.2f}x dense bf16" if peer else ""
                if "written_bytes" in cell:
                    share = cell["written_bytes"] / (ours * 1e-6) / (results["device"]["bytes_per_second"])
                    ratio = f"{100 * share:5.0f} % of the copy's bandwidth"
                if "weights" in cell:
                    ratio = f"{cell['weights'] / ours / 1e3:6.1f} Gw/s"
                lines.append(f"{shape:12} {name:15} {ours:9.2f} us {ratio}")
    for name, cell in results.get("grouped", {}).items():
        best = min(v["median_us"] for k, v in cell.items() if k.startswith("bf16"))
        lines.append(
            f"{name:28} {cell['ours']['median_us']:9.2f} us {best / cell['ours']['median_us']:6.2f}x bf16"
        )
    return "\n".join(lines)


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=Path, help="where the results go")
    parser.add_argument("--plot", type=Path, help="where the chart goes")
    parser.add_argument("--chart", type=Path, metavar="JSON", help="only draw the chart of these results")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, default=SHAPES, metavar="ROWSxCOLUMNS")
    parser.add_argument("--replays", type=int, default=50)
    parser.add_argument("--bits", type=int, choices=(8, 10, 12), default=10, help="of the dictionary")
    parser.add_argument("--qmoe", type=Path, help="a Python file that prepares the QMoE authors' kernel")
    parser.add_argument("--no-grouped", action="store_true")
    found = parser.parse_args(given)
    if found.chart and not found.plot:
        parser.error("--chart needs --plot")
    return found


def main() -> None:
    options = arguments()
    if options.chart:
        chart(json.loads(options.chart.read_text("utf-8")), options.plot)
        return
    import torch

    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch finds no GPU")
    device = describe_device()
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "p_zero": P_ZERO,
        "device": device,
        "shapes": {},
    }
    for rows, columns in options.shapes:
        results["shapes"][f"{rows}x{columns}"] = measure_shape(
            (rows, columns), device["l2_bytes"], options.replays, options.bits
        )
    if not options.no_grouped:
        results["grouped"] = {
            f"{tokens} tokens, top {choices} of {GROUPED_EXPERTS}": measure_grouped(
                tokens, choices, 2048, 768, options.replays, options.bits
            )
            for tokens, choices in GROUPED
        }
    if options.qmoe:
        results["qmoe"] = measure_qmoe(options.qmoe, options.replays)
    print(table(results))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
    if options.plot:
        chart(results, options.plot)


if __name__ == "__main__":
    main()
