"""Flips random bits of a packed model, one at a time, and asks verify what it finds.

    python benchmarks/bit_flips.py [--flips 10000] [--seed 1] [--json FILE]

The model is a small one with several shards, coded and raw matrices, compressed and plain tensors. Every
byte of its directory can be hit, manifest.json included. Counted is whether verify refused, and whether it
named the shard, the layer, the expert, the projection and the section where the bit lies.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import qmoe_codec
from qmoe_codec.errors import FormatError

import qmoe_format
from qmoe_format import LayerSpec, PackedModelWriter, Projection
from qmoe_format.safetensors_io import SafetensorsFile

INDEX = "model.safetensors.index.json"
LAYERS, EXPERTS, HIDDEN, WIDTH = 2, 4, 96, 160


def write_model(out: Path) -> None:
    """A packed model whose experts are coded with dictionaries of every width, and raw."""
    dictionaries = [qmoe_codec.build_dictionary(0.85, bits) for bits in (8, 10, 12)]

    class Dictionaries:
        def to_bytes(self) -> bytes:
            return qmoe_codec.join_dictionaries(dictionaries)

    sides = {"gate": (WIDTH, HIDDEN), "up": (WIDTH, HIDDEN), "down": (HIDDEN, WIDTH)}
    generator = np.random.default_rng(1)

    def record(layer: int, expert: int) -> list[bytes]:
        frames = []
        for number, (rows, columns) in enumerate(sides.values()):
            p = (0.075, 0.85, 0.075)
            trits = generator.choice(np.array([-1, 0, 1], np.int8), (rows, columns), p=p)
            levels = np.abs(generator.normal(0, 0.02, (rows, 2))).astype(np.float32) * (-1, 1)
            choice = [*dictionaries, None][(layer + expert + number) % 4]
            form = qmoe_codec.LEVEL_FORMATS[expert % 4]
            frames.append(qmoe_codec.encode(trits, levels, choice, level_format=form))
        return frames

    with PackedModelWriter(out) as writer:
        for layer in range(LAYERS):
            prefix = f"model.layers.{layer}.mlp.experts"
            projections = tuple(
                Projection(f"{role}_proj", role, f"{prefix}.{{expert}}.{role}_proj.weight", *shape)
                for role, shape in sides.items()
            )
            spec = LayerSpec(prefix, EXPERTS, projections, "BF16")
            writer.add_layer(spec, [(record(layer, e), e) for e in range(EXPERTS)], Dictionaries())
        weights = (generator.normal(0, 0.02, (64, HIDDEN)).astype("<f4").view("<u4") >> 16).astype("<u2")
        writer.add_dense_zstd("model.embed_tokens.weight", "BF16", weights.shape, weights.tobytes())
        writer.add_dense("model.norm.weight", "BF16", (HIDDEN,), weights[0].tobytes())
        writer.finish({"model_type": "olmoe"}, {})


def places(out: Path) -> dict[str, list[tuple[int, int, tuple[str, ...]]]]:
    """For each file, ranges of bytes and the words with which verify should name a fault in them."""
    found: dict[str, list[tuple[int, int, tuple[str, ...]]]] = {}
    with qmoe_format.open(out) as model:
        for name, shard in model.shards.items():
            ranges = found.setdefault(name, [])
            for tensor, info in shard.tensors.items():
                if tensor.endswith(".qmoe_dictionaries"):
                    layer = tensor.removesuffix(".qmoe_dictionaries")
                    ranges.append((info.start, info.end, (name, layer, "qmoe_dictionaries")))
                elif tensor.endswith(".qmoe_zstd"):
                    ranges.append((info.start, info.end, (name, tensor)))
        for prefix in model.layers:
            layer = model.layer(prefix)
            shard = SafetensorsFile(out / layer.shard)
            start = shard.tensors[prefix + ".qmoe_store"].start
            for expert in range(layer.experts):
                position = start + int(layer.index[expert, 0])
                named = (layer.shard, prefix, f"expert {expert}")
                for projection, frame in zip(layer.spec.projections, layer.frames(expert), strict=True):
                    header = qmoe_codec.read_frame_header(frame)
                    starts = {
                        "levels": (64, header.levels_size),
                        "row_index": (header.row_index_start, sum(header.row_index_parts)),
                        "codewords" if header.bits else "trits": (
                            header.codewords_start,
                            header.codewords_size,
                        ),
                    }
                    where = (*named, projection.name)
                    found[layer.shard].append((position, position + 64, where))  # named by its field
                    for section, (offset, size) in starts.items():
                        begin = position + offset
                        found[layer.shard].append((begin, begin + size, (*where, f"in {section} ")))
                    for begin, end in header.padding:
                        found[layer.shard].append((position + begin, position + end, (*where, "in padding ")))
                    position += len(frame)
                found[layer.shard].append((position, position + len(layer.padding(expert)), named))
    return found


def measure(out: Path, flips: int, seed: int) -> dict[str, Any]:
    """Flip so many bits, one at a time; the bits are put back."""
    generator = random.Random(seed)
    files = {path.name: path.read_bytes() for path in sorted(out.iterdir())}
    known = places(out)
    sizes = [len(data) for data in files.values()]
    kinds: Counter[str] = Counter()
    missed: list[str] = []
    unnamed: list[str] = []
    in_frames = 0
    for _ in range(flips):
        name = generator.choices(list(files), sizes)[0]
        position, bit = generator.randrange(len(files[name])), generator.randrange(8)
        damaged = bytearray(files[name])
        damaged[position] ^= 1 << bit
        (out / name).write_bytes(damaged)
        # A manifest or index that contradicts a file is told by that file.
        words: tuple[str, ...] = () if name in ("manifest.json", INDEX) else (name,)
        for begin, end, more in known.get(name, []):
            if begin <= position < end:
                words = more
                in_frames += 1
        try:
            qmoe_format.verify(out)
        except FormatError as error:
            kinds[error.kind] += 1
            if not all(word in str(error) for word in words):
                unnamed.append(f"{name} byte {position} bit {bit}: {error}")
        else:
            missed.append(f"{name} byte {position} bit {bit}")
        (out / name).write_bytes(files[name])
    return {
        "bytes": sum(sizes),
        "flips": flips,
        "seed": seed,
        "detected": flips - len(missed),
        "missed": missed,
        "named_with_all_that_is_known_of_the_place": flips - len(missed) - len(unnamed),
        "not_so_named": unnamed[:20],
        "of_these_in_stores_dictionaries_or_dense_frames": in_frames,
        "by_kind": dict(sorted(kinds.items())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--flips", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="also write the result to this file")
    options = parser.parse_args()
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        write_model(Path(folder) / "model")
        result = measure(Path(folder) / "model", options.flips, options.seed)
    result |= {
        "seconds": round(time.perf_counter() - started, 1),
        "python": platform.python_version(),
        "numpy": np.__version__,
    }
    text = json.dumps(result, indent=2, ensure_ascii=False)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")
    sys.exit(1 if result["missed"] else 0)


if __name__ == "__main__":
    main()
