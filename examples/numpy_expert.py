"""Run one expert of a packed model with NumPy alone: a decoder written from ``spec/qmoe-format-v1.md``.

    python examples/numpy_expert.py MODEL LAYER EXPERT

MODEL is the directory of a packed model, LAYER a layer's prefix, such as model.layers.0.mlp.experts. Prints
y = down(silu(gate(x)) · up(x)), or down(silu(up(x))) without a gate, of
x[i] = ((37·i + 11) mod 101 − 50) / 64.
Nothing of this project is imported. Files are taken to be sound: checksums are left to ``qmoe-verify``.
"""

from __future__ import annotations

import json
import struct
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


class Dictionary(NamedTuple):
    """Phrases by table and codeword (spec 3)."""

    threshold: int
    lengths: npt.NDArray[np.int64]  # [tables, 2^bits]
    trits: npt.NDArray[np.int8]  # [tables, 2^bits, longest phrase]


def packed_array(data: bytes, count: int, bits: int) -> npt.NDArray[np.int64]:
    """`count` elements of `bits` bits (spec 1)."""
    if bits == 0:
        return np.zeros(count, np.int64)
    flat = np.unpackbits(np.frombuffer(data, np.uint8), count=count * bits, bitorder="little")
    return flat.reshape(count, bits).astype(np.int64) @ (1 << np.arange(bits))


def read_trees(codes: list[int], threshold: int, bits: int) -> list[dict[int, list[int]]]:
    """The phrase of each codeword of T0 and of T1 (spec 3.2)."""
    nodes = iter(codes)
    tables = []
    for roots in ([0, 1, -1], [1, -1]):
        phrases: dict[int, list[int]] = {}
        following = [0, threshold]  # the next leaf's codeword, and the next incomplete node's
        todo = [[trit] for trit in reversed(roots)]
        while todo:
            phrase, code = todo.pop(), next(nodes)
            if code < 2:
                phrases[following[code]] = phrase
                following[code] += 1
            if code > 0:
                todo += [[*phrase, trit] for trit in ((0,) if code == 1 else (-1, 1, 0))]
        tables.append(phrases)
    return tables


def read_table(words: npt.NDArray[np.uint32]) -> dict[int, list[int]]:
    """The phrase of each codeword of a table (spec 3.3)."""
    phrases = {}
    for codeword, word in enumerate(words.tolist()):
        if word:
            phrase = [0] * (word & 127)
            for k in range(3):
                position = word >> 7 + 7 * k & 127
                if position != 127:
                    phrase[position] = -1 if word >> 28 + k & 1 else 1
            phrases[codeword] = phrase
    return phrases


def read_dictionaries(data: bytes) -> dict[int, Dictionary]:
    """A layer's dictionaries by id: frames one after the other (spec 3.1)."""
    found = {}
    while data:
        magic, major, _, kind, bits, flags, threshold, entries, size, _, identity = struct.unpack_from(
            "<4s4B6I", data
        )
        if magic != b"QMXD" or major != 1 or flags:
            raise SystemExit("not a dictionary of version 1")
        payload, data = data[32 : 32 + size], data[32 + size :]
        if kind == 0:
            tables = [read_table(np.frombuffer(payload, "<u4"))]
        else:
            tables = read_trees(packed_array(payload, entries, 2).tolist(), threshold, bits)
        longest = max(len(phrase) for phrases in tables for phrase in phrases.values())
        lengths = np.zeros((len(tables), 1 << bits), np.int64)
        trits = np.zeros((len(tables), 1 << bits, longest), np.int8)
        for number, phrases in enumerate(tables):
            for codeword, phrase in phrases.items():
                lengths[number, codeword] = len(phrase)
                trits[number, codeword, : len(phrase)] = phrase
        found[identity] = Dictionary(threshold, lengths, trits)
    return found


def read_levels(data: bytes, kind: int, exponent: int) -> Floats:
    """Levels [rows, 2]: low, high (spec 4.1)."""
    if kind == 3:
        codes = np.frombuffer(data, np.uint8).reshape(-1, 2).astype(np.int64)
        sizes = np.where(codes > 0, (1 + codes % 16 / 16) * 2.0 ** (codes // 16 + exponent), 0)
        return (sizes * [-1, 1]).astype(np.float32)
    if kind == 1:  # the upper half of a float32
        return (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(-1, 2)
    return np.frombuffer(data, {0: "<f4", 2: "<f2"}[kind]).astype(np.float32).reshape(-1, 2)


def decode_rows(
    codewords: npt.NDArray[np.int64], counts: npt.NDArray[np.int64], columns: int, dictionary: Dictionary
) -> npt.NDArray[np.int8]:
    """Trits [rows, columns] of the codewords of rows (spec 4.3)."""
    ends = np.cumsum(counts)
    rows = np.repeat(np.arange(len(counts)), counts)
    tables = np.zeros(len(codewords), np.int64)
    tables[1:] = codewords[:-1] >= dictionary.threshold
    tables[(ends - counts)[counts > 0]] = 0  # a row starts in T0
    lengths = dictionary.lengths[tables, codewords]
    if not lengths.all():
        raise SystemExit("a codeword that its dictionary does not use")
    starts = np.cumsum(lengths) - lengths
    starts -= np.repeat(np.append(starts, 0)[ends - counts], counts)  # within the row
    phrases = dictionary.trits[tables, codewords]
    which, place = np.nonzero(phrases)
    trits = np.zeros((len(counts), columns), np.int8)
    trits[rows[which], starts[which] + place] = phrases[which, place]
    return trits


def read_matrix(frame: bytes, dictionaries: dict[int, Dictionary]) -> tuple[Floats, int]:
    """The weights [rows, columns] of a matrix frame, and the frame's size (spec 4)."""
    magic, major, _, codec, level_format, flags = struct.unpack_from("<4s4BI", frame)
    if magic != b"QMXM" or major != 1 or flags:
        raise SystemExit("not a matrix frame of version 1")
    rows, columns, exponent, bits, dictionary_count, count_bits = struct.unpack_from("<IIbBBB", frame, 12)
    minimum, codeword_count, body_size = struct.unpack_from("<IIQ", frame, 24)
    identities = struct.unpack_from("<4I", frame, 40)[:dictionary_count]

    end = 64 + rows * (8, 4, 4, 2)[level_format]
    levels = read_levels(frame[64:end], level_format, exponent)
    start = -(-end // 16) * 16
    if codec == 0:
        codes = np.frombuffer(frame, np.uint8, -(-rows * columns // 5), start)
        digits = codes[:, None] // np.array([1, 3, 9, 27, 81]) % 3
        trits = (digits.ravel()[: rows * columns] - 1).astype(np.int8).reshape(rows, columns)
    else:
        start += 4 * -(-rows // 32)  # the bases: all rows are wanted here
        counts = minimum + packed_array(frame[start:], rows, count_bits)
        start += 4 * -(-rows * count_bits // 32)
        selector_bits = (0, 0, 1, 2, 2)[dictionary_count]
        selectors = packed_array(frame[start:], rows, selector_bits)
        start += 4 * -(-rows * selector_bits // 32)
        codewords = packed_array(frame[-(-start // 16) * 16 :], codeword_count, bits)
        trits = np.zeros((rows, columns), np.int8)
        for selector, identity in enumerate(identities):
            mine = selectors == selector
            trits[mine] = decode_rows(
                codewords[np.repeat(mine, counts)], counts[mine], columns, dictionaries[identity]
            )
    weights = np.where(trits < 0, levels[:, :1], np.where(trits > 0, levels[:, 1:], np.float32(0)))
    return weights.astype(np.float32), 64 + body_size


def read_tensor(shard: Path, name: str, start: int = 0, size: int | None = None) -> bytes:
    """Bytes of a tensor of a safetensors file: `size` of them from `start` on, or all."""
    with shard.open("rb") as stream:
        (header_size,) = struct.unpack("<Q", stream.read(8))
        begin, end = json.loads(stream.read(header_size))[name]["data_offsets"]
        stream.seek(8 + header_size + begin + start)
        return stream.read(end - begin - start if size is None else size)


def read_expert(model: Path, prefix: str, expert: int) -> dict[str, Floats]:
    """An expert's weights by role (spec 6)."""
    config: dict[str, Any] = json.loads((model / "config.json").read_text())["quantization_config"]
    if config["quant_method"] != "qmoe" or not config["version"].startswith("1."):
        raise SystemExit(f"{model}: not a packed model of version 1")
    if prefix not in config["layers"]:
        raise SystemExit(f"{model}: no layer {prefix!r}; there are {', '.join(config['layers'])}")
    shards = json.loads((model / "model.safetensors.index.json").read_text())["weight_map"]
    shard = model / shards[f"{prefix}.qmoe_store"]
    index = np.frombuffer(read_tensor(shard, f"{prefix}.qmoe_index"), "<i8").reshape(-1, 3)
    if not 0 <= expert < len(index):
        raise SystemExit(f"{prefix}: no expert {expert}; there are {len(index)}")
    offset, size, _ = index[expert].tolist()
    record = read_tensor(shard, f"{prefix}.qmoe_store", offset, size)
    dictionaries = read_dictionaries(read_tensor(shard, f"{prefix}.qmoe_dictionaries"))
    weights = {}
    for projection in config["layers"][prefix]["projections"]:
        weights[projection["role"]], frame_size = read_matrix(record, dictionaries)
        record = record[frame_size:]
    return weights


def silu(x: Floats) -> Floats:
    return x / (1 + np.exp(-x))


def run(weights: dict[str, Floats]) -> Floats:
    """The expert's output for the input above."""
    up, down = weights["up"], weights["down"]
    x = (((37 * np.arange(up.shape[1]) + 11) % 101 - 50) / 64).astype(np.float32)
    inner = silu(weights["gate"] @ x) * (up @ x) if "gate" in weights else silu(up @ x)
    return down @ inner


def main() -> None:
    if len(sys.argv) != 4 or not sys.argv[3].isdecimal():
        raise SystemExit("usage: numpy_expert.py MODEL LAYER EXPERT")
    for value in run(read_expert(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))):
        print(f"{value:.9g}")


if __name__ == "__main__":
    main()
