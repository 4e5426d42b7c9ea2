"""How fast verify is, and what checking costs at load.

    python benchmarks/verify.py [--megabytes 512] [--json FILE]

For each kind of content a packed model of that size is made: experts of one dictionary width, which repeat,
or dense tensors. Processor seconds of the whole process are counted, all threads together, the files in the
page cache: so the rate is that of one core. Opening a model, and taking every matrix with and without its
body checked, are timed beside it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import qmoe_codec
from machine import processor

import qmoe_format
from qmoe_format import LayerSpec, PackedModelWriter, Projection

HIDDEN, WIDTH = 4096, 2048
SHAPES = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
# Share of zeros and bits of the dictionary; bits 0 is the raw codec.
EXPERTS = {"8 bits": (0.80, 8), "10 bits": (0.885, 10), "12 bits": (0.92, 12), "raw": (0.40, 0)}


def write_experts(out: Path, megabytes: int, p_zero: float, bits: int) -> None:
    generator = np.random.default_rng(1)
    dictionary = qmoe_codec.build_dictionary(p_zero, bits) if bits else None
    share = (1 - p_zero) / 2

    def frame(rows: int, columns: int) -> bytes:
        trits = generator.choice(np.array([-1, 0, 1], np.int8), (rows, columns), p=(share, p_zero, share))
        levels = np.abs(generator.normal(0, 0.02, (rows, 2))).astype(np.float32) * (-1, 1)
        return qmoe_codec.encode(trits, levels, dictionary)

    class Dictionaries:
        def to_bytes(self) -> bytes:
            return dictionary.frame if dictionary else b""

    record = [frame(*shape) for shape in SHAPES.values()]
    experts = max(1, megabytes * 1_000_000 // sum(map(len, record)))
    prefix = "model.layers.0.mlp.experts"
    projections = tuple(
        Projection(f"{role}_proj", role, f"{prefix}.{{expert}}.{role}_proj.weight", *shape)
        for role, shape in SHAPES.items()
    )

    def records() -> Iterator[tuple[list[bytes], int]]:
        for _ in range(experts):
            yield record, 0

    with PackedModelWriter(out) as writer:
        writer.add_layer(LayerSpec(prefix, experts, projections, "BF16"), records(), Dictionaries())
        writer.finish({"model_type": "olmoe"}, {})


def write_dense(out: Path, megabytes: int, zstd: bool) -> None:
    rows = 1 << 13
    weights = np.random.default_rng(1).normal(0, 0.02, (rows, HIDDEN)).astype("<f4")
    data = (weights.view("<u4") >> 16).astype("<u2").tobytes()
    with PackedModelWriter(out) as writer:
        for number in range(max(1, megabytes * 1_000_000 // len(data))):
            add = writer.add_dense_zstd if zstd else writer.add_dense
            add(f"model.{number}.weight", "BF16", (rows, HIDDEN), data)
        writer.finish({"model_type": "olmoe"}, {})


def best_of(times: int, work: Callable[[], object]) -> tuple[float, float]:
    """Least processor seconds, and least elapsed seconds."""
    processor_seconds, elapsed = [], []
    for _ in range(times):
        begin, begin_wall = time.process_time(), time.perf_counter()
        work()
        processor_seconds.append(time.process_time() - begin)
        elapsed.append(time.perf_counter() - begin_wall)
    return min(processor_seconds), min(elapsed)


def take_all(out: Path, verify: bool) -> None:
    with qmoe_format.open(out) as model:
        for prefix in model.layers:
            layer = model.layer(prefix)
            for expert in range(layer.experts):
                for projection in layer.spec.projections:
                    layer.matrix(expert, projection.name, verify=verify)


def measure(out: Path) -> dict[str, Any]:
    report = qmoe_format.verify(out)  # and the files are in the page cache
    size = report.bytes
    verify_processor, verify_elapsed = best_of(3, lambda: qmoe_format.verify(out))
    open_processor, _ = best_of(3, lambda: qmoe_format.open(out).close())
    result: dict[str, Any] = {
        "bytes": size,
        "weights": report.weights,
        "verify_gb_per_s_of_one_core": round(size / verify_processor / 1e9, 3),
        "verify_gb_per_s_elapsed": round(size / verify_elapsed / 1e9, 3),
        "open_ms": round(1e3 * open_processor, 3),
    }
    if report.matrices:
        headers, _ = best_of(3, lambda: take_all(out, False))
        bodies, _ = best_of(3, lambda: take_all(out, True))
        result |= {
            "matrices": report.matrices,
            "open_and_check_headers_and_row_indices_ms": round(1e3 * headers, 2),
            "open_and_check_bodies_too_ms": round(1e3 * bodies, 2),
            "headers_gb_per_s": round(size / headers / 1e9, 2),
            "bodies_gb_per_s": round(size / bodies / 1e9, 3),
        }
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    content: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (p_zero, bits) in EXPERTS.items():
            out = Path(folder) / f"experts-{bits}"
            write_experts(out, options.megabytes, p_zero, bits)
            content[f"experts, {name}"] = measure(out)
        for name, zstd in (("plain", False), ("zstd", True)):
            out = Path(folder) / f"dense-{name}"
            write_dense(out, options.megabytes, zstd)
            content[f"dense, {name}"] = measure(out)
    result = {
        "experts_shapes": f"[{WIDTH}, {HIDDEN}] and [{HIDDEN}, {WIDTH}]",
        "content": content,
        "processor": processor(),
        "processors": os.cpu_count(),
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "kernels": qmoe_codec.kernels_name(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "qmoe_format": qmoe_codec.core.library().qmoe_version().decode(),
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
