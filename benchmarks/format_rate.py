"""Bits per weight of this format beside other codes, on random ternary matrices of QMoE's shapes.

    make bench        (or: python benchmarks/format_rate.py [--json FILE])

Columns, in bits per weight: the entropy of the source; codewords, row index and headers of this format; its
levels; QMoE's 16-bit dictionary with its 64 bits per row; zstd -19 over five trits a byte; the bound of
1.045 x entropy + 18 bits per row + 128 bytes. Each matrix holds exactly its share of zeros and evenly mixed
signs, so that its entropy is the source's.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import sys
from datetime import date
from pathlib import Path

import numpy as np
import qmoe_codec
import zstandard
from qmoe_codec import DictionarySet, encode, read_frame_header
from qmoe_quantize.published.codewords import published_codewords
from tqdm import tqdm

QMOE_BITS = 16
QMOE_ROW_BITS = 64  # an offset of 32 bits and two bfloat16 levels
SHAPES = [(768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (2080, 6144), (6144, 2080)]
DENSITIES = [0.80, 0.885, 0.92, 0.95]


def entropy(p_zero: float) -> float:
    """Bits per weight of a memoryless source with `p_zero` zeros."""
    return -p_zero * math.log2(p_zero) - (1 - p_zero) * math.log2((1 - p_zero) / 2)


def exact_matrix(rows: int, columns: int, p_zero: float, seed: int) -> np.ndarray:
    """A random matrix with exactly round((1 - p_zero) * weights) non-zeros, half of them negative."""
    weights = rows * columns
    nonzeros = round((1 - p_zero) * weights)
    trits = np.zeros(weights, np.int8)
    trits[:nonzeros] = 1
    trits[: nonzeros // 2] = -1
    np.random.default_rng(seed).shuffle(trits)
    return trits.reshape(rows, columns)


def five_per_byte(trits: np.ndarray) -> bytes:
    """Five trits a byte, as the raw codec stores them."""
    frame = encode(trits, np.zeros((len(trits), 2)), None)
    header = read_frame_header(frame)
    return frame[header.codewords_start : header.codewords_start + header.codewords_size]


def measure(rows: int, columns: int, p_zero: float) -> dict[str, object]:
    trits = exact_matrix(rows, columns, p_zero, seed=rows)
    weights, levels = trits.size, np.zeros((rows, 2))
    encoder = DictionarySet()
    frame = encoder.encode(trits, levels)
    decoded, _ = qmoe_codec.decode(frame, encoder.dictionaries)
    assert np.array_equal(decoded, trits)
    sections = read_frame_header(frame).section_bytes
    level_bits = 8 * sections["levels"]
    bits = 8 * len(frame) - level_bits
    theirs = QMOE_BITS * len(published_codewords(trits)[1])
    bound = 1.045 * entropy(p_zero) * weights + 18 * rows + 8 * 128
    aim = 1.03 * entropy(p_zero) * weights + 12 * rows
    return {
        "rows": rows,
        "columns": columns,
        "p_zero": p_zero,
        "entropy": entropy(p_zero),
        "ours": bits / weights,
        "levels": level_bits / weights,
        "qmoe16": (theirs + QMOE_ROW_BITS * rows) / weights,
        "zstd19": 8 * len(zstandard.ZstdCompressor(level=19).compress(five_per_byte(trits))) / weights,
        "bound": bound / weights,
        "aim": aim / weights,
        "dictionaries": [f"{d.bits} bits, {len(d.frame)} bytes" for d in encoder.dictionaries.values()],
        "holds": bits <= bound and bits / weights <= (theirs + QMOE_ROW_BITS * rows) / weights,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the results here")
    arguments = parser.parse_args()
    cases = [(*shape, p_zero) for shape in SHAPES for p_zero in DENSITIES]
    results = [measure(*case) for case in tqdm(cases, desc="measuring", unit="matrix", file=sys.stderr)]
    print("bits per weight; bound: 1.045 x entropy + 18 bits per row + 128 bytes\n")
    print("   shape       p(0)   entropy    ours  (/entropy)  +levels   QMoE-16   zstd -19    bound")
    for r in results:
        shape = f"{r['rows']}x{r['columns']}"
        ratio = r["ours"] / r["entropy"]
        print(
            f"{shape:>10}   {r['p_zero']:.3f}   {r['entropy']:.4f}   {r['ours']:.4f}   ({ratio:.3f})"
            f"     {r['levels']:.4f}    {r['qmoe16']:.4f}    {r['zstd19']:.4f}    {r['bound']:.4f}"
            f"  {'holds' if r['holds'] else 'EXCEEDED'}"
        )
    below = sum(r["ours"] < r["zstd19"] for r in results)
    aimed = sum(r["ours"] <= r["aim"] for r in results)
    print(
        f"\nbelow zstd -19 on {below} of {len(results)}; within 1.03 x entropy + 12 bits per row on {aimed}"
    )
    if arguments.json:
        record = {
            "benchmark": "format_rate",
            "date": date.today().isoformat(),
            "machine": platform.machine(),
            "versions": {"numpy": np.__version__, "zstandard": zstandard.__version__},
            "results": results,
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n")
    return 0 if all(r["holds"] for r in results) else 1


if __name__ == "__main__":
    raise SystemExit(main())
