"""Speed of the kernels on a GPU, beside dense bf16 in the same run.

    python benchmarks/gpu.py --json benchmarks/results/gpu-h200.json --plot benchmarks/results/gpu-h200.png
    python benchmarks/gpu.py --qmoe CHECKOUT     also the QMoE authors' kernel, from a checkout of theirs
    python benchmarks/gpu.py --chart FILE --plot OUT.png     a chart of results that are there already
    python benchmarks/gpu.py --host --shapes 64x96     the same code without a GPU: its times mean nothing

Each measurement is a CUDA graph of calls that go round enough matrices to leave the L2, timed by events;
reported are the median over replays and the quartiles, in microseconds a call. Bytes and lane instructions
are counted, not measured: see gpu_decode/NOTES.md. Needs a GPU, cupy and torch.

Operation by operation, all shapes of one before the next; FILE of --json is written after each cell, and no
cell is begun after --seconds, so that whoever cuts a run off keeps what it measured.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import qmoe_kernel

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
PEER, UNSUPPORTED = "QMoE's kernel", "not supported by the peer"
SIDES = (2048, 768)  # hidden and intermediate of such a layer
# Instructions of a warp, counted in the machine code for sm_90; NOTES.md has the count.
PER_ROW, PER_STEP, PER_CODEWORD = 130, 65, 52  # the last: of each lane
PER_NONZERO = 21  # of more than one token: in a lane, for up to eight
STEP_CODEWORDS = 256


def counted(
    weights: int, codewords: int, nonzeros: int, frame_bytes: int, tokens: int, shape: tuple[int, int]
) -> dict:
    """Bytes that a product has to move and lane instructions that it takes, beside dense bf16's bytes."""
    rows, columns = shape
    vectors = 2 * tokens * (rows + columns)
    in_row = codewords / max(1, rows)
    warp = PER_ROW + PER_STEP * -(-in_row // STEP_CODEWORDS) + PER_CODEWORD * -(-in_row // 32)
    instructions = 32 * rows * warp
    if tokens > 1:
        instructions += PER_NONZERO * nonzeros * -(-tokens // 8)
    return {
        "bytes": frame_bytes + vectors,
        "dense_bytes": 2 * weights + vectors,
        "lane_instructions": round(instructions),
        "instructions_per_weight": instructions / weights,
    }


def copies(frame_bytes: int, l2_bytes: int) -> int:
    """How many matrices to go round: more than twice the L2, at most a thousand."""
    return max(2, min(1000, -(-2 * l2_bytes // max(1, frame_bytes)) + 1))


def summary(microseconds: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, median, high = statistics.quantiles(microseconds, n=4)
    return {"median_us": median, "low_us": low, "high_us": high, "replays": len(microseconds)}


class OnGpu:
    """Where the measurements are taken."""

    name = "cuda"

    def __init__(self) -> None:
        import torch
        from qmoe_gpu_decode.device import cuda_device

        self.device = cuda_device()
        self.l2_bytes = torch.cuda.get_device_properties(0).L2_cache_size

    def stream(self) -> int | None:
        """The current one, for launchers."""
        import torch

        return int(torch.cuda.current_stream().cuda_stream)

    def peer(self, source: qmoe_kernel.Source) -> qmoe_kernel.Launcher:
        """The QMoE authors' kernel, compiled."""
        return qmoe_kernel.gpu_launcher(source)

    def measure(self, calls: list[Callable[[], object]], replays: int) -> dict[str, float]:
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

    def measure_waiting(self, call: Callable[[], object], replays: int) -> dict[str, float]:
        """Time of one call that waits for the device, and so cannot be in a graph."""
        import torch

        times = []
        for _ in range(replays + 3):
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.default_stream())
            call()
            end.record(torch.cuda.default_stream())
            end.synchronize()
            times.append(1000 * begin.elapsed_time(end))
        return summary(times[3:])

    def describe(self) -> dict[str, Any]:
        """The GPU and its two ceilings: bandwidth as a copy has it, issue as its clock and size give it."""
        import cupy
        import torch

        properties = torch.cuda.get_device_properties(0)
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        copied = self.measure([lambda: target.copy_(source)], 20)
        clock = 1000 * cupy.cuda.runtime.getDeviceProperties(0)["clockRate"]
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


class OnHost:
    """The kernels run on the host, to try this file where there is no GPU."""

    name = "cpu"
    l2_bytes = 1

    def __init__(self) -> None:
        sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "gpu_decode" / "shim"))
        from host import HostDevice

        folder = Path(tempfile.gettempdir()) / f"qmoe-kernels-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        self.device = HostDevice(folder)

    def stream(self) -> int | None:
        return None

    def peer(self, source: qmoe_kernel.Source) -> qmoe_kernel.Launcher:
        return qmoe_kernel.host_launcher(source, self.device)

    def measure(self, calls: list[Callable[[], object]], replays: int) -> dict[str, float]:
        times = []
        for call in calls[:2]:
            begin = time.perf_counter()
            call()
            times.append(1e6 * (time.perf_counter() - begin))
        return summary(times * 2)

    def measure_waiting(self, call: Callable[[], object], replays: int) -> dict[str, float]:
        return self.measure([call], replays)

    def describe(self) -> dict[str, Any]:
        return {
            "name": "no GPU: times mean nothing",
            "multiprocessors": self.device.multiprocessors,
            "l2_bytes": self.l2_bytes,
            "bytes_per_second": 1.0,
            "lane_instructions_per_second": 1.0,
        }


def ternary(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    share = (1 - P_ZERO) / 2
    trits = rng.choice(np.array([-1, 0, 1], np.int8), (rows, columns), p=[share, P_ZERO, share])
    levels = (rng.uniform(0.01, 0.03, (rows, 2)) * (-1, 1)).astype(np.float32)
    return trits, levels


@dataclass
class Problem:
    """One shape, packed and dense, as often as it takes to leave the L2."""

    shape: tuple[int, int]
    trits: np.ndarray
    levels: np.ndarray
    dictionary: Any
    frame: bytes
    packed: Any  # PackedMatrices
    dense: list[Any]
    handle: int

    @classmethod
    def make(cls, place: OnGpu | OnHost, shape: tuple[int, int], bits: int) -> Problem:
        import torch
        from qmoe_codec import build_dictionary, encode
        from qmoe_gpu_decode import torch_ops
        from qmoe_gpu_decode.matrices import PackedMatrices

        trits, levels = ternary(np.random.default_rng(), *shape)
        dictionary = build_dictionary(P_ZERO, bits)
        frame = encode(trits, levels, dictionary)
        packed = PackedMatrices(
            [frame] * copies(len(frame), place.l2_bytes),
            {dictionary.dictionary_id: dictionary},
            place.device,
            verify=False,
        )
        there = torch.from_numpy(trits).to(place.name)
        low, high = (torch.from_numpy(levels[:, k : k + 1]).to(place.name).bfloat16() for k in (0, 1))
        weights = torch.where(there < 0, low, torch.where(there > 0, high, 0 * low))
        dense = [weights.clone() for _ in range(copies(2 * weights.numel(), place.l2_bytes))]
        return cls(shape, trits, levels, dictionary, frame, packed, dense, torch_ops.register(packed))


def measure_product(place: OnGpu | OnHost, problem: Problem, tokens: int, replays: int) -> dict[str, Any]:
    """x times the transposed weights, fused and dense."""
    import torch
    from qmoe_codec import read_frame_header

    (rows, columns), weights = problem.shape, problem.dense[0]
    x = torch.randn(tokens, columns, device=place.name).bfloat16()
    y = torch.ops.qmoe.matmul(problem.handle, x, 0, rows)
    exact = x.double() @ weights.double().T
    error = float((y.double() - exact).norm() / exact.norm())
    if not error < 1e-2:
        raise ValueError(f"wrong by {error}: {problem.shape}, {tokens} tokens")
    some = 8 if tokens > 32 else 1 << 30
    matrices, dense = problem.packed.count, problem.dense
    header = read_frame_header(problem.frame)
    return {
        "ours": place.measure(
            [
                lambda i=i: torch.ops.qmoe.matmul(problem.handle, x, i, rows)
                for i in range(min(matrices, some))
            ],
            replays,
        ),
        "dense bf16": place.measure([lambda w=w: torch.matmul(x, w.T) for w in dense[:some]], replays),
        "relative_error": error,
        "counted": counted(
            rows * columns,
            header.codeword_count,
            int(np.count_nonzero(problem.trits)),
            len(problem.frame),
            tokens,
            problem.shape,
        ),
    }


def measure_tiles(place: OnGpu | OnHost, problem: Problem, tokens: int, replays: int) -> dict[str, Any]:
    """The same by tensor cores on rows unpacked in shared memory; beside unpacking all for cuBLAS."""
    import torch
    from qmoe_gpu_decode.products import launch_tiles

    (rows, columns), weights = problem.shape, problem.dense[0]
    x = torch.randn(tokens, columns, device=place.name).bfloat16()
    y = torch.empty(tokens, rows, device=place.name, dtype=torch.bfloat16)

    def call(number: int) -> None:
        if not launch_tiles(problem.packed, x, y, tokens, "bfloat16", number=number, stream=place.stream()):
            raise ValueError("rows too long for shared memory")

    def unpacked(number: int) -> Any:
        return x @ torch.ops.qmoe.dequantize(problem.handle, x, number, rows, columns).T

    call(0)
    exact = x.double() @ weights.double().T
    error = float((y.double() - exact).norm() / exact.norm())
    if not error < 1e-2:
        raise ValueError(f"wrong by {error}: {problem.shape}, {tokens} tokens by tensor cores")
    numbers = range(min(problem.packed.count, 64))
    return {
        "ours": place.measure([lambda i=i: call(i) for i in numbers], replays),
        "unpacked, cuBLAS": place.measure([lambda i=i: unpacked(i) for i in numbers], replays),
        "dense bf16": place.measure([lambda w=w: torch.matmul(x, w.T) for w in problem.dense], replays),
        "relative_error": error,
    }


def measure_qmoe(
    place: OnGpu | OnHost,
    problem: Problem,
    source: qmoe_kernel.Source,
    launcher: Callable[[], qmoe_kernel.Launcher],
    replays: int,
) -> dict[str, Any]:
    """One token by the QMoE authors' kernel, on the same weights in their layout; and by ours once more."""
    import torch
    from qmoe_gpu_decode.device import address

    if problem.shape not in source.launches:
        shapes = ", ".join("{}x{}".format(*shape) for shape in source.launches)
        return {UNSUPPORTED: f"its shapes are {shapes}"}
    launch, run = source.launches[problem.shape], launcher()
    levels = torch.from_numpy(problem.levels).bfloat16().view(torch.int16).numpy().view(np.uint16)
    packed = qmoe_kernel.pack(problem.trits, levels)
    table = place.device.upload(qmoe_kernel.decoding_table())
    matrices = [
        [place.device.upload(part) for part in (packed.codewords, packed.offsets, packed.levels)]
        for _ in range(copies(packed.nbytes, place.l2_bytes))
    ]
    rows, columns = problem.shape
    x = torch.randn(columns, device=place.name).bfloat16()
    y = torch.zeros(rows, device=place.name, dtype=torch.bfloat16)

    def call(number: int) -> None:  # adds to y, which nobody clears while it is timed: kinder to the peer
        run(launch, [address(array) for array in (table, *matrices[number], x, y)], place.stream())

    call(0)
    exact = problem.dense[0].double() @ x.double()
    error = float((y.double() - exact).norm() / exact.norm())
    if not error < 1e-2:
        raise ValueError(f"the peer is wrong by {error}: {problem.shape}")
    ours = [
        lambda i=i: torch.ops.qmoe.matmul(problem.handle, x[None], i, rows)
        for i in range(problem.packed.count)
    ]
    return {
        "ours": place.measure(ours, replays),
        PEER: place.measure([lambda i=i: call(i) for i in range(len(matrices))], replays),
        "relative_error": error,
        "peer_bytes": packed.nbytes,
    }


def measure_decode(place: OnGpu | OnHost, problem: Problem, replays: int) -> dict[str, Any]:
    """To bf16."""
    import torch

    rows, columns = problem.shape
    like = problem.dense[0]
    found = torch.ops.qmoe.dequantize(problem.handle, like, 0, rows, columns)
    if not torch.equal(found, like):
        raise ValueError(f"decoded wrong: {problem.shape}")
    some = min(problem.packed.count, len(problem.dense))
    calls = [
        lambda i=i: torch.ops.qmoe.dequantize(problem.handle, like, i, rows, columns) for i in range(some)
    ]
    return {"ours": place.measure(calls, replays), "written_bytes": 2 * rows * columns}


def measure_encode(place: OnGpu | OnHost, problem: Problem, replays: int) -> dict[str, Any]:
    """Trits and levels to a frame, the wait for its size included."""
    from qmoe_gpu_decode import encode

    trits, levels = place.device.upload(problem.trits), place.device.upload(problem.levels)

    def call() -> Any:
        return encode(trits, levels, problem.dictionary, device=place.device)

    if bytes(place.device.download(call())) != problem.frame:
        raise ValueError(f"encoded wrong: {problem.shape}")
    return {"ours": place.measure_waiting(call, replays), "weights": problem.trits.size}


def packed_layers(place: OnGpu | OnHost, sides: tuple[int, int], count: int, bits: int) -> list[Any]:
    """Layers of `count` equal experts, as often as it takes to leave the L2."""
    from qmoe_codec import build_dictionary, encode
    from qmoe_gpu_decode import ExpertProjection, PackedExperts

    hidden, intermediate = sides
    rng = np.random.default_rng()
    dictionary = build_dictionary(P_ZERO, bits)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    record = b"".join(encode(*ternary(rng, *shape), dictionary) for shape in shapes.values())
    room = -(-len(record) // 256) * 256
    store = record.ljust(room, b"\0") * count
    index = np.array([(e * room, len(record), -1) for e in range(count)])
    projections = [ExpertProjection(role, *shape) for role, shape in shapes.items()]
    return [
        PackedExperts(
            store, index, {dictionary.dictionary_id: dictionary}, projections, place.device, verify=False
        )
        for _ in range(copies(len(store), place.l2_bytes))
    ]


def measure_grouped(
    place: OnGpu | OnHost, layers: list[Any], tokens: int, choices: int, replays: int
) -> dict[str, Any]:
    """A layer of experts beside the same in bf16: a dense product per expert that is hit, in one graph."""
    import torch
    from qmoe_gpu_decode import torch_ops

    experts, hidden, intermediate = (getattr(layers[0], n) for n in ("experts", "hidden", "intermediate"))
    handles = [torch_ops.register(layer) for layer in layers]
    x = torch.randn(tokens, hidden, device=place.name).bfloat16()
    chosen = torch.stack([torch.randperm(experts)[:choices] for _ in range(tokens)]).to(place.name)
    shares = torch.rand(tokens, choices, device=place.name)
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    dense = {
        role: torch.randn(experts, *shape, device=place.name, dtype=torch.bfloat16)
        for role, shape in shapes.items()
    }
    groups = [(chosen == e).nonzero(as_tuple=True) for e in range(experts)]

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
        inputs = x[order]
        entered = torch.nn.functional.silu(
            torch._grouped_mm(inputs, dense["gate"].transpose(1, 2), offs=ends)
        )
        entered = entered * torch._grouped_mm(inputs, dense["up"].transpose(1, 2), offs=ends)
        return torch._grouped_mm(entered, dense["down"].transpose(1, 2), offs=ends)

    order = torch.cat([token for token, _ in groups])
    ends = torch.tensor([len(token) for token, _ in groups]).cumsum(0).int().to(place.name)
    results: dict[str, Any] = {
        "ours": place.measure(
            [lambda h=h: torch.ops.qmoe.experts(h, x, chosen, shares, "silu") for h in handles], replays
        ),
        "bf16, an expert at a time": place.measure([peer] * 2, replays),
        "store_bytes": layers[0].store.nbytes,
        "experts_hit": sum(len(token) > 0 for token, _ in groups),
    }
    try:
        results["bf16, grouped"] = place.measure([grouped] * 4, replays)
    except (AttributeError, RuntimeError) as error:  # a private function of torch's
        results["no grouped bf16"] = str(error)[:300]
    return results


# ---- compiling ahead ---------------------------------------------------------------------------------------

Kernel = tuple[str, tuple[tuple[str, int], ...], str]  # file, definitions, name


class Listing:
    """A device that runs nothing, and says which kernels it was asked for."""

    def __init__(self, multiprocessors: int, shared_limit: int) -> None:
        self.multiprocessors, self.shared_limit = multiprocessors, shared_limit
        self.kernels: set[Kernel] = set()

    def launch(self, file: str, definitions: Mapping[str, int], kernel: str, *_: Any) -> None:
        self.kernels.add((file, tuple(sorted(definitions.items())), kernel))

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        return np.empty(shape, dtype)

    def upload(self, array: np.ndarray) -> Any:
        return array


def _compile(kernel: Kernel, shared_limit: int) -> str | None:
    from qmoe_gpu_decode import device

    try:
        device._function(0, *kernel, shared_limit)
    except Exception as error:  # noqa: BLE001
        return f"{kernel}: {error}"[:2000]
    return None


def compile_ahead(kernels: Sequence[Kernel], shared_limit: int, jobs: int) -> list[str]:
    """Compile with some processes at once, into CuPy's cache on disk; what went wrong."""
    found = []
    with ProcessPoolExecutor(min(jobs, max(1, len(kernels))), multiprocessing.get_context("spawn")) as pool:
        for future in [pool.submit(_compile, kernel, shared_limit) for kernel in sorted(kernels)]:
            try:
                found.append(future.result())
            except BrokenProcessPool as error:  # one was killed; what is missing compiles when it is used
                found.append(str(error))
    return [fault for fault in found if fault]


def kernels_of(place: OnGpu | OnHost, options: argparse.Namespace) -> set[Kernel]:
    """Those that the benchmark will ask for."""
    from qmoe_codec import build_dictionary, encode
    from qmoe_gpu_decode.experts import launch_experts
    from qmoe_gpu_decode.matrices import PackedMatrices
    from qmoe_gpu_decode.products import launch_decode, launch_matmul, launch_tiles

    listing = Listing(place.device.multiprocessors, place.device.shared_limit)
    dictionary = build_dictionary(P_ZERO, options.bits)
    dictionaries = {dictionary.dictionary_id: dictionary}
    nothing = np.zeros(1, np.uint16)
    for _, columns in options.shapes:
        trits, levels = np.zeros((64, columns), np.int8), np.tile(np.float32([-1, 1]), (64, 1))
        trits[:, :: max(1, columns // 8)] = 1
        packed = PackedMatrices([encode(trits, levels, dictionary)], dictionaries, listing)
        for tokens in (1, 8, 32):
            launch_matmul(packed, nothing, nothing, tokens, ("bfloat16", "bfloat16"))
        launch_decode(packed, nothing, "bfloat16")
        launch_tiles(packed, nothing, nothing, 32, "bfloat16")
    here = argparse.Namespace(device=listing, l2_bytes=1, name="cpu")
    if not options.no_grouped:
        (layer, *_) = packed_layers(here, SIDES, 2, options.bits)  # type: ignore[arg-type]
        for tokens, choices in GROUPED:
            layer.experts = GROUPED_EXPERTS
            launch_experts(
                layer,
                *[nothing] * 4,
                tokens,
                choices,
                "silu",
                ("bfloat16", "int64", "float32"),
                allocate=listing.empty,
            )
    return listing.kernels  # encode.cu asks the device for a size, so it compiles when it is used


def chart(results: dict[str, Any], out: Path) -> None:
    """A roofline: what one and eight tokens took, beside the times that the counts give.

    A shape without a measurement has no bar.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    device, shapes = results["device"], list(results["shapes"])
    figure, axes = pyplot.subplots(1, 2, figsize=(13, 5), sharey=True)
    for axis, tokens in zip(axes, (1, 8), strict=True):
        name = f"{tokens} tokens"
        bytes_time = _times(results, name, ("counted", "bytes"), 1e6 / device["bytes_per_second"])
        issue_time = _times(
            results, name, ("counted", "lane_instructions"), 1e6 / device["lane_instructions_per_second"]
        )
        bars = {
            "dense bf16": _times(results, name, ("dense bf16", "median_us")),
            PEER: _times(results, f"{name}, {PEER}", (PEER, "median_us")),
            "ours": _times(results, name, ("ours", "median_us")),
            "our bytes, at full bandwidth": bytes_time,
            "our instructions, all issued": issue_time,
        }
        colours = dict(zip(bars, ("C0", "C4", "C1", "C2", "C3"), strict=True))
        bars = {label: values for label, values in bars.items() if np.isfinite(values).any()}
        width = 0.8 / max(1, len(bars))
        for number, (label, values) in enumerate(bars.items()):
            places = np.arange(len(shapes)) + width * (number + 0.5) - 0.4
            axis.bar(places, values, width, label=label, color=colours[label])
        axis.set_xticks(range(len(shapes)), shapes, rotation=30)
        axis.set_yscale("log")
        axis.set_title(f"{tokens} token{'s' * (tokens > 1)}")
    axes[0].set_ylabel("µs a product")
    figure.suptitle(f"{device['name']}, {results['date']}, p(0) = {P_ZERO}")
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="lower center", ncols=5)
    figure.savefig(out, dpi=120)
    pyplot.close(figure)


def _times(results: dict[str, Any], cell: str, keys: tuple[str, str], unit: float = 1.0) -> list[float]:
    """A number of a cell, shape by shape; not a number where there is none."""
    outer, inner = keys
    found = [cells.get(cell, {}).get(outer, {}).get(inner) for cells in results["shapes"].values()]
    return [float("nan") if number is None else unit * number for number in found]


def parse_shape(text: str) -> tuple[int, int]:
    rows, _, columns = text.partition("x")
    return int(rows), int(columns)


def table(results: dict[str, Any]) -> str:
    """What was measured, a line a cell, with how many times faster than the peer it is."""
    lines = []
    for shape, cells in results["shapes"].items():
        for name, cell in cells.items():
            if "ours" in cell:
                ours = cell["ours"]["median_us"]
                ratio = ""
                for peer in ("dense bf16", PEER):
                    if peer in cell:
                        ratio = f"{cell[peer]['median_us'] / ours:6.2f}x {peer}"
                if "written_bytes" in cell:
                    share = cell["written_bytes"] / (ours * 1e-6) / (results["device"]["bytes_per_second"])
                    ratio = f"{100 * share:5.0f} % of the copy's bandwidth"
                if "weights" in cell:
                    ratio = f"{cell['weights'] / ours / 1e3:6.1f} Gw/s"
                lines.append(f"{shape:12} {name:23} {ours:9.2f} us {ratio}")
            elif UNSUPPORTED in cell:
                lines.append(f"{shape:12} {name:23} {UNSUPPORTED}: {cell[UNSUPPORTED]}")
    for name, cell in results.get("grouped", {}).items():
        best = min(v["median_us"] for k, v in cell.items() if k.startswith("bf16"))
        lines.append(
            f"{name:28} {cell['ours']['median_us']:9.2f} us {best / cell['ours']['median_us']:6.2f}x bf16"
        )
    lines += [f"WRONG     {fault}" for fault in results.get("errors", [])]
    lines += [f"LEFT OUT  {cell}" for cell in results.get("left_out", [])]
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
    parser.add_argument(
        "--qmoe",
        type=qmoe_kernel.read_source,
        metavar="CHECKOUT",
        help="also the kernel of the QMoE authors' code, as cloned from github.com/IST-DASLab/qmoe",
    )
    parser.add_argument("--no-grouped", action="store_true")
    parser.add_argument("--experts", type=int, default=GROUPED_EXPERTS, help="of the grouped layer")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after so long")
    parser.add_argument("--jobs", type=int, default=min(12, os.cpu_count() or 1), help="compile with so many")
    parser.add_argument("--large", type=int, default=4096, help="tokens of the large batch")
    parser.add_argument("--host", action="store_true", help="try this file without a GPU")
    found = parser.parse_args(given)
    if found.chart and not found.plot:
        parser.error("--chart needs --plot")
    return found


Cell = tuple[str, str, Callable[[], dict[str, Any]]]  # of which part of the results, under which name


def cells(place: OnGpu | OnHost, options: argparse.Namespace) -> Iterator[Cell]:
    """What is measured, in the order of what matters most."""
    problems: dict[tuple[int, int], Problem] = {}
    layers: list[Any] = []
    replays = options.replays

    def problem(shape: tuple[int, int]) -> Problem:
        if shape not in problems:
            problems[shape] = Problem.make(place, shape, options.bits)
        return problems[shape]

    def grouped(tokens: int, choices: int) -> dict[str, Any]:
        if not layers:
            layers.extend(
                packed_layers(place, SIDES if not options.host else (96, 64), options.experts, options.bits)
            )
        return measure_grouped(place, layers, tokens, choices, replays)

    peer = functools.cache(lambda: place.peer(options.qmoe))
    for tokens in (1, 8):
        for shape in options.shapes:
            yield (
                "{}x{}".format(*shape),
                f"{tokens} tokens",
                lambda shape=shape, tokens=tokens: measure_product(place, problem(shape), tokens, replays),
            )
        for shape in options.shapes if tokens == 1 and options.qmoe else []:
            yield (
                "{}x{}".format(*shape),
                f"1 tokens, {PEER}",
                lambda shape=shape: measure_qmoe(place, problem(shape), options.qmoe, peer, replays),
            )
    if not options.no_grouped:
        for tokens, choices in GROUPED:
            yield (
                "grouped",
                f"{tokens} tokens, top {choices} of {options.experts}",
                lambda tokens=tokens, choices=choices: grouped(tokens, choices),
            )
    for tokens in (options.large, 32):
        for shape in options.shapes:
            yield (
                "{}x{}".format(*shape),
                f"{tokens} tokens",
                lambda shape=shape, tokens=tokens: measure_product(
                    place, problem(shape), tokens, min(replays, 20)
                ),
            )
        if tokens != 32:
            for name, function in (("decode to bf16", measure_decode), ("encode", measure_encode)):
                for shape in options.shapes:
                    yield (
                        "{}x{}".format(*shape),
                        name,
                        lambda shape=shape, function=function: function(place, problem(shape), replays),
                    )
    for tokens in (32, 128):
        for shape in options.shapes:
            yield (
                "{}x{}".format(*shape),
                f"{tokens} by tiles",
                lambda shape=shape, tokens=tokens: measure_tiles(
                    place, problem(shape), tokens, min(replays, 20)
                ),
            )


def run_cells(todo: Iterator[Cell], results: dict[str, Any], seconds: float, save: Callable[[], None]) -> int:
    """Measure one cell after the other and save after each; how many went wrong."""
    begin, wrong = time.monotonic(), 0
    for part, name, function in todo:
        if time.monotonic() - begin > seconds:
            results.setdefault("left_out", []).append(f"{part}: {name}")
            continue
        try:
            cell = function()
        except Exception as error:  # noqa: BLE001 - the other cells may still be had
            traceback.print_exc()
            results.setdefault("errors", []).append(f"{part}: {name}: {error!r}"[:2000])
            wrong += 1
        else:
            cell["at_seconds"] = round(time.monotonic() - begin, 1)
            where = results if part == "grouped" else results["shapes"]
            where.setdefault(part, {})[name] = cell
            print(f"{cell['at_seconds']:6.1f} s  {part} {name}", file=sys.stderr, flush=True)
        save()
    return wrong


def write_json(path: Path | None, results: dict[str, Any]) -> None:
    """Whole or not at all."""
    if path:
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1) + "\n", "utf-8")
        partial.replace(path)


def main(given: list[str] | None = None) -> int:
    started = time.monotonic()
    options = arguments(given)
    if options.chart:
        chart(json.loads(options.chart.read_text("utf-8")), options.plot)
        return 0
    import torch

    if not options.host and not torch.cuda.is_available():
        sys.exit("benchmarks/gpu.py: torch finds no GPU")
    place = OnHost() if options.host else OnGpu()
    results: dict[str, Any] = {
        "date": date.today().isoformat(),
        "p_zero": P_ZERO,
        "bits": options.bits,
        "device": place.describe(),
        "shapes": {},
    }
    if options.qmoe:
        results["peer"] = {"file": options.qmoe.path.name, "sha256": options.qmoe.sha256}
    if not options.host:
        begin = time.monotonic()
        faults = compile_ahead(list(kernels_of(place, options)), place.device.shared_limit, options.jobs)
        results["compile_seconds"] = round(time.monotonic() - begin, 1)
        if faults:
            results["compile_faults"] = faults
            print("\n".join(faults), file=sys.stderr)
    left = options.seconds - (time.monotonic() - started)
    wrong = run_cells(cells(place, options), results, left, lambda: write_json(options.json, results))
    write_json(options.json, results)
    print(table(results))
    if options.plot:
        chart(results, options.plot)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
