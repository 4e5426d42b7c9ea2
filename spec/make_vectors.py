"""Makes the golden vectors of the format: files to decode, and files to refuse.

    python spec/make_vectors.py           write what is missing, and check that the rest has not changed
    python spec/make_vectors.py --force   also replace files that differ (never for a released version)

``vectors/manifest.json`` names every file with what a reader must find in it, or the kind of error that it
must give. Vectors are kept for good: a later version adds to them. Each invalid file has exactly one fault;
checksums are made to fit, so that the fault and nothing else is what a reader stumbles on.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import struct
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from qmoe_codec import (
    LEVEL_FORMATS,
    Dictionary,
    build_dictionary,
    encode,
    join_dictionaries,
    read_frame_header,
)
from qmoe_codec.reference import assemble, convert, crc32c, decode, pack_array
from valid_streams import random_frame

from qmoe_format import LayerSpec, PackedModel, PackedModelWriter, Projection
from qmoe_format import open as open_model
from qmoe_format.container import Gating

VECTORS = Path(__file__).parent / "vectors"
Vector = tuple[str, bytes, dict[str, Any]]


def seed(name: str) -> np.random.Generator:
    """A generator of its own for each vector, so that adding one changes no other."""
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))


def random_matrix(name: str, rows: int, columns: int, p_zero: float, p_high: float = 0.5) -> np.ndarray:
    p = [(1 - p_zero) * (1 - p_high), p_zero, (1 - p_zero) * p_high]
    return seed(name).choice(np.array([-1, 0, 1], np.int8), (rows, columns), p=p)


def random_levels(name: str, rows: int) -> np.ndarray:
    return np.exp(seed(name + " levels").normal(-3, 0.5, (rows, 2))).astype(np.float32) * np.float32([-1, 1])


# --- dictionaries -------------------------------------------------------------------------------------------


def word(length: int, *nonzeros: tuple[int, int]) -> int:
    """A table word (spec 3.3) from a length and (position, trit) pairs."""
    value = length | 127 << 7 | 127 << 14 | 127 << 21
    for k, (position, trit) in enumerate(nonzeros):
        value ^= (127 ^ position) << (7 + 7 * k)
        value |= (trit < 0) << (28 + k)
    return value


def table_dictionary(bits: int) -> Dictionary:
    """A table whose phrases overlap, with unused codewords: zero runs, single trits, pairs and triples."""
    words = [word(length) for length in (126, 64, 32, 16, 8, 4, 2, 1)]
    for gap in range(8):
        for a in (1, -1):
            words.append(word(gap + 1, (gap, a)))
            words.append(word(gap + 3, (gap, a), (gap + 1, -a)))
            words.append(word(gap + 3, (gap, a), (gap + 1, a), (gap + 2, a)))
    table = np.zeros(1 << bits, np.uint32)
    table[3 : 3 + len(words)] = words
    return Dictionary.from_words(table, bits)


DICTIONARIES: dict[str, Dictionary] = {
    "trees-8": build_dictionary(0.885, 8),
    "trees-10": build_dictionary(0.80, 10),
    "trees-10-sparse": build_dictionary(0.97, 10),
    "trees-12": build_dictionary(0.92, 12),
    "table-8": table_dictionary(8),
    "table-16": table_dictionary(16),
}


def valid_dictionaries() -> Iterator[Vector]:
    for name, dictionary in DICTIONARIES.items():
        if name == "table-16":  # 256 KB; made again by the tests instead of being stored
            continue
        words = hashlib.sha256(dictionary.words.astype("<u4").tobytes()).hexdigest()
        expected = {
            "dictionary_id": dictionary.dictionary_id,
            "bits": dictionary.bits,
            "tables": dictionary.tables,
            "threshold": dictionary.threshold,
            "words_sha256": words,
        }
        yield f"valid/dictionary-{name}.qmxd", dictionary.frame, {"kind": "dictionary", "expect": expected}


# --- matrices -----------------------------------------------------------------------------------------------


def describe(name: str, frame: bytes, dictionaries: list[str]) -> Vector:
    """A valid matrix vector; what it holds is stated by the reference and checked by every other decoder."""
    tables = {DICTIONARIES[d].dictionary_id: DICTIONARIES[d].reference for d in dictionaries}
    trits, levels = decode(frame, tables)
    expected = {
        "rows": trits.shape[0],
        "columns": trits.shape[1],
        "nonzeros": int(np.count_nonzero(trits)),
        "trits_sha256": hashlib.sha256(trits.tobytes()).hexdigest(),
        "levels_sha256": hashlib.sha256(levels.astype("<f4").tobytes()).hexdigest(),
    }
    files = [f"valid/dictionary-{d}.qmxd" for d in dictionaries]
    return f"valid/matrix-{name}.qmxm", frame, {"kind": "matrix", "dictionaries": files, "expect": expected}


def valid_matrices() -> Iterator[Vector]:
    def coded(name: str, trits: np.ndarray, dictionaries: list[str], **options: Any) -> Vector:
        chosen = [DICTIONARIES[d] for d in dictionaries]
        frame = encode(trits, random_levels(name, len(trits)), chosen or None, backend="reference", **options)
        if chosen:
            decoded, _ = decode(frame, {d.dictionary_id: d.reference for d in chosen})
            assert (decoded == trits).all()
        return describe(name, frame, dictionaries)

    yield coded("1x1-zero", np.zeros((1, 1), np.int8), ["trees-8"])
    yield coded("1x1-low", -np.ones((1, 1), np.int8), ["trees-8"])
    yield coded("no-rows", np.zeros((0, 17), np.int8), ["trees-10"])
    yield coded("no-columns", np.zeros((5, 0), np.int8), ["trees-10"])
    yield coded("all-zero", np.zeros((40, 300), np.int8), ["trees-12"])
    yield coded("all-high", np.ones((3, 100), np.int8), ["trees-8"])
    for name in ("trees-8", "trees-10", "trees-10-sparse", "trees-12", "table-8"):
        yield coded(f"{name}-odd", random_matrix(name, 67, 211, 0.9), [name])
    yield coded("one-sign", random_matrix("one-sign", 9, 400, 0.85, p_high=1.0), ["trees-10"])
    several = random_matrix("several", 50, 256, 0.8)
    several[::2] = random_matrix("several sparse", 25, 256, 0.97)
    selectors = np.arange(50) % 2
    yield coded("two-dictionaries", several, ["trees-10", "trees-10-sparse"], selectors=selectors)
    for level_format in LEVEL_FORMATS:
        yield coded(
            level_format, random_matrix(level_format, 33, 65, 0.88), ["trees-8"], level_format=level_format
        )
    yield coded("raw-odd", random_matrix("raw", 7, 11, 0.3), [])
    yield coded("raw-1x1", np.ones((1, 1), np.int8), [])
    for name in ("trees-8", "trees-10", "trees-12", "table-8"):
        frame = random_frame(seed("stream " + name), DICTIONARIES[name].reference, rows=35, columns=150)
        yield describe(f"stream-{name}", frame, [name])


# --- invalid matrices ---------------------------------------------------------------------------------------


def reseal(frame: bytearray) -> bytes:
    """Make both checksums of a matrix frame fit its bytes."""
    struct.pack_into("<I", frame, 56, crc32c(bytes(frame[64:])))
    struct.pack_into("<I", frame, 60, crc32c(bytes(frame[:60])))
    return bytes(frame)


def invalid_matrices() -> Iterator[Vector]:
    trees, sparse = DICTIONARIES["trees-10"], DICTIONARIES["trees-10-sparse"]
    files = [
        f"valid/dictionary-{name}.qmxd" for name in ("trees-10", "trees-10-sparse", "trees-8", "table-8")
    ]
    trits = random_matrix("invalid", 37, 101, 0.8)
    levels = random_levels("invalid", 37)
    selectors = np.arange(37) % 2
    good = encode(trits, levels, [trees, sparse], selectors=selectors)
    short = encode(trits[:3], levels[:3], trees)  # one block of rows, level padding
    e4m4 = encode(trits, levels, trees, level_format="e4m4")
    raw = encode(trits[:3], levels[:3], None)
    half = encode(trits, levels, trees, level_format="float16")

    def vector(name: str, kind: str, field: str, frame: bytes) -> Vector:
        entry = {"kind": "matrix", "dictionaries": files, "error": kind, "field": field}
        return f"invalid/matrix-{name}.qmxm", frame, entry

    def patched(frame: bytes, layout: str, offset: int, value: Any) -> bytes:
        copy = bytearray(frame)
        struct.pack_into("<" + layout, copy, offset, value)
        return reseal(copy)

    def changed(frame: bytes, change: Callable[[bytearray], None]) -> bytes:
        copy = bytearray(frame)
        change(copy)
        return reseal(copy)

    fields = dict(zip(("bits", "dictionary_count", "count_bits"), (21, 22, 23), strict=True))
    yield vector("truncated-header", "truncated", "frame", good[:63])
    yield vector("truncated-body", "truncated", "frame", good[:-16])
    yield vector("magic", "magic", "magic", patched(good, "B", 3, ord("X")))
    yield vector("version-major", "version", "version_major", patched(good, "B", 4, 2))
    yield vector(
        "header-checksum", "checksum", "header_crc32c", good[:60] + bytes([good[60] ^ 1]) + good[61:]
    )
    yield vector("body-checksum", "checksum", "body_crc32c", good[:100] + bytes([good[100] ^ 1]) + good[101:])
    yield vector("flags", "version", "flags", patched(good, "I", 8, 1))
    yield vector("codec", "header", "codec", patched(good, "B", 6, 2))
    yield vector("level-format", "header", "level_format", patched(good, "B", 7, 4))
    yield vector("rows", "header", "rows", patched(good, "I", 12, (1 << 24) + 1))
    yield vector("columns", "header", "columns", patched(good, "I", 16, (1 << 24) + 1))
    wide = bytearray(good)
    struct.pack_into("<II", wide, 12, 1 << 24, 1 << 13)
    yield vector("weights", "header", "columns", reseal(wide))
    yield vector("level-exponent-unused", "header", "level_exponent", patched(good, "b", 20, 1))
    yield vector("level-exponent", "header", "level_exponent", patched(e4m4, "b", 20, 113))
    yield vector("bits", "header", "bits", patched(good, "B", fields["bits"], 9))
    yield vector("raw-bits", "header", "bits", patched(raw, "B", fields["bits"], 8))
    yield vector(
        "no-dictionary", "header", "dictionary_count", patched(good, "B", fields["dictionary_count"], 0)
    )
    yield vector(
        "five-dictionaries", "header", "dictionary_count", patched(good, "B", fields["dictionary_count"], 5)
    )
    yield vector("count-bits", "header", "count_bits", patched(good, "B", fields["count_bits"], 25))
    yield vector("count-minimum", "header", "count_minimum", patched(good, "I", 24, 102))
    yield vector("raw-codeword-count", "header", "codeword_count", patched(raw, "I", 28, 1))
    body_size = struct.unpack_from("<Q", good, 32)[0]
    yield vector("body-size", "size", "body_size", patched(good, "Q", 32, body_size + 16))
    yield vector("body-size-wraps", "size", "body_size", patched(good, "Q", 32, (1 << 64) - 64))
    yield vector("trailing-bytes", "size", "frame", good + bytes(16))
    yield vector(
        "equal-dictionaries", "header", "dictionary_ids", patched(good, "I", 44, trees.dictionary_id)
    )
    yield vector("id-beyond-count", "header", "dictionary_ids", patched(good, "I", 48, 1))
    yield vector("missing-dictionary", "dictionary", "dictionary_ids", patched(good, "I", 40, 0x12345678))
    other_width = patched(good, "I", 40, DICTIONARIES["trees-8"].dictionary_id)
    yield vector("dictionary-of-another-width", "dictionary", "dictionary_ids", other_width)

    layout, short_layout, raw_layout = (read_frame_header(frame) for frame in (good, short, raw))
    for name, start in zip(("levels", "row-index", "codewords"), short_layout.padding, strict=True):
        assert start[0] < start[1], "these vectors need padding everywhere"
        yield vector(f"padding-{name}", "payload", "padding", patched(short, "B", start[1] - 1, 1))
    yield vector("level-not-finite", "payload", "levels", patched(good, "H", 64, 0x7FC0))
    yield vector("level-float16-infinite", "payload", "levels", patched(half, "H", 64, 0x7C00))
    bases, counts = layout.row_index_start, layout.row_index_start + layout.row_index_parts[0]
    base = struct.unpack_from("<I", good, bases + 4)[0]
    yield vector("base", "index", "bases", patched(good, "I", bases + 4, base + 1))
    yield vector("first-base", "index", "bases", patched(good, "I", bases, 1))
    last = counts * 8 + 36 * layout.count_bits  # row 36 is in the last block: its count enters no base

    def flip_last_count(frame: bytearray) -> None:
        frame[last // 8] ^= 1 << (last % 8)

    yield vector("count-sum", "index", "codeword_count", changed(good, flip_last_count))
    yield vector("count-beyond-columns", "index", "counts", too_many_codewords(short))
    unused = counts + layout.row_index_parts[1] - 1
    yield vector("counts-unused-bits", "payload", "counts", patched(good, "B", unused, good[unused] | 0x80))
    selectors_end = counts + sum(layout.row_index_parts[1:]) - 1
    yield vector("selectors-unused-bits", "payload", "selectors", patched(good, "B", selectors_end, 0x80))
    yield from selector_vectors(vector, trits, levels)

    codewords = raw_layout.codewords_start
    yield vector("raw-byte", "payload", "trits", patched(raw, "B", codewords, 243))
    tail = codewords + raw_layout.codewords_size - 1
    assert 303 % 5 == 3
    yield vector("raw-unused-digit", "payload", "trits", patched(raw, "B", tail, raw[tail] % 27 + 27))

    yield from codeword_vectors(vector)


def too_many_codewords(frame: bytes) -> bytes:
    """A frame whose first row claims more codewords than columns, and all of whose sizes agree with that."""
    header = read_frame_header(frame)
    counts = [header.columns + 1, 0, 0]
    header = replace(header, count_minimum=0, count_bits=7, codeword_count=sum(counts))
    claimed = bytearray(header.frame_size)
    claimed[:64] = header.pack(crc32c)
    claimed[64 : 64 + header.levels_size] = frame[64 : 64 + header.levels_size]
    packed = pack_array(counts, 7)
    claimed[header.row_index_start + 4 : header.row_index_start + 4 + len(packed)] = packed
    return reseal(claimed)


def selector_vectors(
    vector: Callable[..., Vector], trits: np.ndarray, levels: np.ndarray
) -> Iterator[Vector]:
    """Three dictionaries leave one value of the selector without a meaning."""
    names = ["trees-8", "table-8"]
    third = build_dictionary(0.95, 8)
    chosen = [*[DICTIONARIES[name] for name in names], third]
    frame = bytearray(encode(trits, levels, chosen, selectors=np.zeros(len(trits))))
    header = read_frame_header(frame)
    start = header.row_index_start + sum(header.row_index_parts[:2])
    frame[start] |= 3
    name, data, entry = vector("selector", "payload", "selectors", reseal(frame))
    yield "invalid/dictionary-for-selector.qmxd", third.frame, {"kind": "support"}
    files = [f"valid/dictionary-{n}.qmxd" for n in names]
    yield name, data, {**entry, "dictionaries": [*files, "invalid/dictionary-for-selector.qmxd"]}


def codeword_vectors(vector: Callable[..., Vector]) -> Iterator[Vector]:
    """Codewords that must not be there; made with the overlapping table, of which every phrase is known."""
    tables = [DICTIONARIES["table-8"].reference]
    codewords = tables[0].codewords[0]
    zeros4, high1 = codewords[(0,) * 4], codewords[(1,)]
    late = codewords[(0, 0, 1)]
    levels, selector = random_levels("codewords", 1), np.zeros(1, np.uint8)

    def frame(*row: int, columns: int = 6) -> bytes:
        return assemble(columns, [row], levels, tables, selector, 1)

    yield vector("unused-codeword", "payload", "codewords", frame(high1, 0))
    yield vector("phrase-after-the-row", "payload", "codewords", frame(zeros4, zeros4, zeros4))
    yield vector("nonzero-beyond-the-row", "payload", "codewords", frame(zeros4, late))
    trees = DICTIONARIES["trees-10"].reference
    unused = next(c for c, phrase in enumerate(trees.phrases[0] + trees.phrases[1]) if phrase is None) % 1024
    table = 0 if trees.phrases[0][unused] is None else 1
    first = trees.header.threshold if table else None
    row = [unused] if first is None else [first, unused]
    yield vector(
        "unused-codeword-trees", "payload", "codewords", assemble(90, [row], levels, [trees], selector, 1)
    )
    odd = bytearray(assemble(90, [[5]], levels, [trees], selector, 1))
    odd[read_frame_header(odd).codewords_start + 1] |= 0x80
    yield vector("bits-after-the-last-codeword", "payload", "codewords", reseal(odd))


# --- invalid dictionaries -----------------------------------------------------------------------------------


def invalid_dictionaries() -> Iterator[Vector]:
    trees = DICTIONARIES["trees-8"].frame
    table = DICTIONARIES["table-8"].frame

    def vector(name: str, kind: str, field: str, frame: bytes) -> Vector:
        return f"invalid/dictionary-{name}.qmxd", frame, {"kind": "dictionary", "error": kind, "field": field}

    def seal(frame: bytes) -> bytes:
        copy = bytearray(frame)
        struct.pack_into("<I", copy, 28, crc32c(bytes(copy[32:]), crc32c(bytes(copy[:28]))))
        return bytes(copy)

    def patched(frame: bytes, layout: str, offset: int, value: int) -> bytes:
        copy = bytearray(frame)
        struct.pack_into("<" + layout, copy, offset, value)
        return seal(bytes(copy))

    def from_nodes(codes: list[int], threshold: int = 200, extra_bits: int = 0) -> bytes:
        payload = bytearray(-(-len(codes) // 4))
        for k, code in enumerate(codes):
            payload[k // 4] |= code << (2 * (k % 4))
        payload[-1] |= extra_bits
        header = struct.pack(
            "<4sBBBBIIIIII", b"QMXD", 1, 0, 1, 8, 0, threshold, len(codes), len(payload), 0, 0
        )
        return seal(header + payload)

    def from_word(value: int) -> bytes:
        return patched(table, "I", 32, value)

    yield vector("truncated-header", "truncated", "frame", trees[:31])
    yield vector("truncated-payload", "truncated", "payload", trees[:-1])
    yield vector("magic", "magic", "magic", patched(trees, "B", 0, ord("q")))
    yield vector("version-major", "version", "version_major", patched(trees, "B", 4, 2))
    yield vector("flags", "version", "flags", patched(trees, "I", 8, 0x80000000))
    yield vector("kind", "header", "kind", patched(trees, "B", 6, 2))
    yield vector("bits", "header", "bits", patched(trees, "B", 7, 11))
    yield vector("threshold-zero", "header", "threshold", patched(trees, "I", 12, 0))
    yield vector("threshold-large", "header", "threshold", patched(trees, "I", 12, 257))
    yield vector("table-threshold", "header", "threshold", patched(table, "I", 12, 255))
    yield vector("entry-count-small", "header", "entry_count", patched(trees, "I", 16, 4))
    yield vector("entry-count-large", "header", "entry_count", patched(trees, "I", 16, 1025))
    yield vector("table-entry-count", "header", "entry_count", patched(table, "I", 16, 255))
    size = struct.unpack_from("<I", trees, 20)[0]
    yield vector("payload-size", "header", "payload_size", patched(trees, "I", 20, size + 1))
    yield vector("reserved", "header", "reserved", patched(trees, "I", 24, 1))
    yield vector("trailing-bytes", "size", "frame", trees + b"\0")
    yield vector("checksum", "checksum", "dictionary_id", trees[:40] + bytes([trees[40] ^ 1]) + trees[41:])
    yield vector("node-code", "payload", "node", from_nodes([3, 0, 0, 0, 0]))
    yield vector("nodes-run-out", "payload", "node", from_nodes([0, 0, 0, 0, 1]))
    yield vector("nodes-left-over", "payload", "node", from_nodes([0, 0, 0, 0, 0, 0]))
    yield vector("bit-after-the-last-node", "payload", "node", from_nodes([0, 0, 0, 0, 0], extra_bits=0x04))
    too_long = [1] * 126 + [0, 0, 0, 0, 0]
    yield vector("phrase-too-long", "payload", "length", from_nodes(too_long, threshold=100))
    # 0, then +1, +1, +1 by complete nodes, whose children +1 would be the fourth non-zero.
    yield vector(
        "four-nonzeros", "payload", "nonzeros", from_nodes([0, *[2, 0] * 3, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0])
    )
    yield vector("too-many-leaves", "payload", "leaves", from_nodes([0, 0, 0, 0, 0], threshold=2))
    yield vector(
        "too-many-incomplete", "payload", "incomplete", from_nodes([1, 1, 0, 0, 0, 0, 0], threshold=255)
    )
    yield vector("word-no-length", "payload", "word", from_word(word(0)))
    yield vector("word-length", "payload", "word", from_word(word(127)))
    yield vector("word-position", "payload", "word", from_word(word(4, (4, 1))))
    yield vector("word-not-rising", "payload", "word", from_word(word(9, (5, 1), (5, 1))))
    gap = word(9) ^ (127 ^ 3) << 14
    yield vector("word-gap", "payload", "word", from_word(gap))
    yield vector("word-sign-of-nothing", "payload", "word", from_word(word(9) | 1 << 28))
    yield vector("word-reserved", "payload", "word", from_word(word(9) | 1 << 31))


# --- dense frames -------------------------------------------------------------------------------------------


DENSE_HEADER = struct.Struct("<4sBBBBI8sI8Q8QI")  # without header_crc32c


def zstd_stored(data: bytes) -> bytes:
    """A Zstandard frame of one stored block (RFC 8878), the same whatever compressor is installed."""
    descriptor = bytes([0xA0]) + struct.pack("<I", len(data))  # single segment, content size in 4 bytes
    return b"\x28\xb5\x2f\xfd" + descriptor + (len(data) << 3 | 1).to_bytes(3, "little") + data


def dense_frame(
    dtype: str, shape: tuple[int, ...], content: bytes, planes: list[bytes], /, **changes: Any
) -> bytes:
    """A dense frame with any header field changed and its checksum made to fit."""
    fields = {
        "magic": b"QMXZ",
        "version_major": 1,
        "version_minor": 0,
        "element_size": len(planes),
        "dimension_count": len(shape),
        "flags": 0,
        "dtype": dtype.encode(),
        "content_crc32c": crc32c(content),
        "shape": (*shape, *[0] * (8 - len(shape))),
        "plane_sizes": (*map(len, planes), *[0] * (8 - len(planes))),
        "reserved": 0,
    } | changes
    sides, sizes = fields.pop("shape"), fields.pop("plane_sizes")
    *first, reserved = fields.values()
    header = DENSE_HEADER.pack(*first, *sides, *sizes, reserved)
    return header + struct.pack("<I", crc32c(header)) + b"".join(planes)


def valid_dense() -> Iterator[Vector]:
    for dtype, size, shape in (
        ("BF16", 2, (6, 50)),
        ("F32", 4, (3, 1, 7)),
        ("U8", 1, ()),
        ("I64", 8, (0, 4)),
    ):
        count = int(np.prod(shape))
        content = seed("dense " + dtype).integers(0, 256, count * size, np.uint8).tobytes()
        planes = [zstd_stored(content[k::size]) for k in range(size)]
        expected = {
            "dtype": dtype,
            "shape": list(shape),
            "content_sha256": hashlib.sha256(content).hexdigest(),
        }
        frame = dense_frame(dtype, shape, content, planes)
        yield f"valid/dense-{dtype}.qmxz", frame, {"kind": "dense", "expect": expected}


def invalid_dense() -> Iterator[Vector]:
    def vector(name: str, kind: str, field: str, frame: bytes) -> Vector:
        return f"invalid/dense-{name}.qmxz", frame, {"kind": "dense", "error": kind, "field": field}

    content = bytes(range(40))
    planes = [zstd_stored(content[k::2]) for k in range(2)]

    def changed(planes: list[bytes] = planes, **changes: Any) -> bytes:
        return dense_frame("BF16", (4, 5), content, planes, **changes)

    good = changed()
    sizes = (*map(len, planes), 0, 0, 0, 0, 0, 0)
    yield vector("truncated-header", "truncated", "frame", good[:159])
    yield vector("truncated-planes", "truncated", "planes", good[:-1])
    yield vector("magic", "magic", "magic", changed(magic=b"QMXM"))
    yield vector("version-major", "version", "version_major", changed(version_major=0))
    yield vector("header-checksum", "checksum", "header_crc32c", good[:24] + b"\x05" + good[25:])
    yield vector("flags", "version", "flags", changed(flags=2))
    yield vector("element-size", "header", "element_size", changed(element_size=3))
    yield vector("dimension-count", "header", "dimension_count", changed(dimension_count=9))
    yield vector("dtype", "header", "dtype", changed(dtype=b"F32"))
    yield vector("shape-beyond", "header", "shape", changed(shape=(4, 5, 1, 0, 0, 0, 0, 0)))
    yield vector("shape-wraps", "header", "shape", changed(shape=(1 << 63, 1 << 63, 0, 0, 0, 0, 0, 0)))
    yield vector(
        "plane-sizes-beyond", "header", "plane_sizes", changed(plane_sizes=(*sizes[:2], 1, *sizes[3:]))
    )
    yield vector("reserved", "header", "reserved", changed(reserved=1))
    yield vector("trailing-bytes", "size", "planes", good + b"\0")
    yield vector("not-zstd", "payload", "plane 1", changed([planes[0], bytes(len(planes[1]))]))
    yield vector("plane-too-short", "payload", "plane 1", changed([planes[0], zstd_stored(content[1:-2:2])]))
    yield vector("plane-too-long", "payload", "plane 0", changed([zstd_stored(bytes(21)), planes[1]]))
    yield vector("content-checksum", "checksum", "content_crc32c", changed(content_crc32c=1))


def vectors() -> Iterator[Vector]:
    """All vectors: path below ``vectors/``, content, entry of the manifest."""
    yield from valid_dictionaries()
    yield from valid_matrices()
    yield from valid_dense()
    yield from invalid_dictionaries()
    yield from invalid_matrices()
    yield from invalid_dense()


# --- whole models -------------------------------------------------------------------------------------------


def write_model(out: Path) -> None:
    """A packed model of a few kB: raw and coded matrices, plain and compressed tensors."""
    prefix = "model.layers.0.mlp.experts"
    sides = {"gate": (9, 40), "up": (9, 40), "down": (40, 9)}
    projections = tuple(
        Projection(f"{role}_proj", role, f"{prefix}.{{expert}}.{role}_proj.weight", *shape)
        for role, shape in sides.items()
    )
    used = [DICTIONARIES["trees-8"], DICTIONARIES["trees-10"]]

    class Dictionaries:
        def to_bytes(self) -> bytes:
            return join_dictionaries(used)

    def record(expert: int) -> list[bytes]:
        frames = []
        for number, (rows, columns) in enumerate(sides.values()):
            name = f"model {expert} {number}"
            choice = [*used, None][(expert + number) % 3]
            trits, levels = random_matrix(name, rows, columns, 0.85), random_levels(name, rows)
            frames.append(encode(trits, levels, choice, level_format=LEVEL_FORMATS[expert]))
        return frames

    tokenizer = out.parent / "tokenizer.json"
    tokenizer.write_text('{"version": "1.0"}\n')
    with PackedModelWriter(out) as writer:
        writer.add_file(tokenizer)
        layer = LayerSpec(prefix, 4, projections, "BF16")
        writer.add_layer(layer, [(record(expert), 10 * expert - 1) for expert in range(4)], Dictionaries())
        writer.add_dense_zstd("model.embed_tokens.weight", "BF16", (64, 9), bytes(range(9)) * 128)
        writer.add_dense("model.norm.weight", "F32", (9,), random_levels("norm", 9)[:, 1].tobytes())
        writer.finish({"model_type": "olmoe", "hidden_size": 40}, {"method": "nearest"})
    tokenizer.unlink()


FIRST, SECOND = "model.layers.0.mlp.experts", "model.layers.1.mlp.experts"


def layers_of_1_1() -> list[LayerSpec]:
    """One layer with all that version 1.1 adds, and one with biases of each expert apart, without a gate."""
    fused, down = f"{FIRST}.gate_up_proj", f"{FIRST}.down_proj"
    layout: dict[str, Any] = {"transposed": True, "interleaved": True, "bias": f"{fused}_bias"}
    first = (
        Projection("gate_proj", "gate", fused, 9, 40, **layout),
        Projection("up_proj", "up", fused, 9, 40, **layout),
        Projection("down_proj", "down", down, 40, 9, transposed=True, bias=f"{down}_bias"),
    )
    apart = SECOND + ".{expert}.fc"
    second = (
        Projection("fc1", "up", f"{apart}1.weight", 12, 40, bias=f"{apart}1.bias"),
        Projection("fc2", "down", f"{apart}2.weight", 40, 12, bias=f"{apart}2.bias"),
    )
    return [
        LayerSpec(FIRST, 3, first, "BF16", Gating("clamped_swiglu", 1.702, 0.5)),
        LayerSpec(SECOND, 2, second, "F32"),
    ]


def write_model_1_1(out: Path) -> None:
    """A packed model of a few kB: fused, transposed, interleaved, with biases and a gating."""
    used = [DICTIONARIES["trees-8"], DICTIONARIES["trees-10"]]

    class Dictionaries:
        def to_bytes(self) -> bytes:
            return join_dictionaries(used)

    def record(layer: LayerSpec, expert: int) -> list[bytes]:
        frames = []
        for number, p in enumerate(layer.projections):
            name = f"model 1.1 {layer.prefix} {expert} {number}"
            choice = [*used, None][(expert + number) % 3]
            trits = random_matrix(name, p.rows, p.columns, 0.7)
            levels = 4 * random_levels(name, p.rows)
            frames.append(encode(trits, levels, choice, level_format=LEVEL_FORMATS[expert]))
        return frames

    def bias(name: str, shape: tuple[int, ...]) -> np.ndarray:
        return seed(f"model 1.1 {name}").normal(0, 0.3, shape).astype("<f4")

    with PackedModelWriter(out) as writer:
        for layer in layers_of_1_1():
            records = [(record(layer, expert), -1) for expert in range(layer.experts)]
            writer.add_layer(layer, records, Dictionaries())
        fused, down = bias("gate_up_proj", (3, 18)), bias("down_proj", (3, 40))
        writer.add_dense_zstd(f"{FIRST}.gate_up_proj_bias", "F32", (3, 18), fused.tobytes())
        writer.add_dense(f"{FIRST}.down_proj_bias", "BF16", (3, 40), convert(down, "bfloat16").tobytes())
        for expert, (name, rows) in itertools.product(range(2), (("fc1", 12), ("fc2", 40))):
            place = f"{SECOND}.{expert}.{name}.bias"
            writer.add_dense(place, "F32", (rows,), bias(place, (rows,)).tobytes())
        config = {"model_type": "gpt_oss", "hidden_size": 40, "hidden_act": "silu"}
        writer.finish(config, {"method": "nearest"})


def describe_model(path: Path) -> dict[str, Any]:
    """What a reader must find in a packed model, by the reference codec."""
    with open_model(path) as model:
        experts: dict[str, Any] = {}
        outputs: dict[str, Any] = {}
        for prefix in model.layers:
            layer = model.layer(prefix)
            known = {identity: d.reference for identity, d in layer.dictionaries.items()}
            for expert in range(layer.experts):
                weights = {}
                for projection, frame in zip(layer.spec.projections, layer.frames(expert), strict=True):
                    trits, levels = decode(frame, known)
                    experts[projection.matrix_name(expert)] = {
                        "shape": list(trits.shape),
                        "trits_sha256": hashlib.sha256(trits.tobytes()).hexdigest(),
                        "levels_sha256": hashlib.sha256(levels.astype("<f4").tobytes()).hexdigest(),
                    }
                    weights[projection.name] = np.where(trits < 0, levels[:, :1], levels[:, 1:]) * (
                        trits != 0
                    )
                if layer.spec.features:
                    y = expert_output(model, layer.spec, expert, weights)
                    outputs.setdefault(prefix, []).append([float(f"{value:.9g}") for value in y])
        dense = {name: model.dense(name) for name in model.dense_names()}
        return {
            "experts": experts,
            "dense": {
                name: {"dtype": dtype, "shape": list(shape), "sha256": hashlib.sha256(data).hexdigest()}
                for name, (dtype, shape, data) in dense.items()
            },
            **({"outputs": outputs} if outputs else {}),
        }


def expert_output(
    model: PackedModel, layer: LayerSpec, expert: int, weights: dict[str, np.ndarray]
) -> np.ndarray:
    """What an expert makes of x[c] = (c mod 7 - 3) / 4, in float64, as spec 6.3 says; act is SiLU."""

    def product(projection: Projection, x: np.ndarray) -> np.ndarray:
        assert projection.bias is not None
        dtype, shape, data = model.dense(projection.bias.replace("{expert}", str(expert)))
        if dtype == "BF16":
            bias = (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").reshape(shape)
        else:
            bias = np.frombuffer(data, "<f4").reshape(shape)
        if projection.fused:
            sharing = [p for p in layer.projections if p.tensor == projection.tensor]
            bias = bias[expert, sharing.index(projection) :: len(sharing)]
        return weights[projection.name].astype(np.float64) @ x + bias

    by_role = {projection.role: projection for projection in layer.projections}
    x = (np.arange(by_role["up"].columns) % 7 - 3) / 4
    up = product(by_role["up"], x)
    if layer.gating is None:
        return product(by_role["down"], up / (1 + np.exp(-up)))
    gate = np.minimum(product(by_role["gate"], x), layer.gating.limit)
    up = np.clip(up, -layer.gating.limit, layer.gating.limit)
    return product(by_role["down"], (up + 1) * gate / (1 + np.exp(-layer.gating.alpha * gate)))


def make_model(version: str, write: Callable[[Path], None]) -> None:
    """Have the model of this version written once: its bytes come from a writer, so they are kept."""
    folder = VECTORS / "models"
    if not (folder / version).exists():
        folder.mkdir(parents=True, exist_ok=True)
        write(folder / version)
        files = {
            path.name: hashlib.sha256(path.read_bytes()).hexdigest()
            for path in sorted((folder / version).iterdir())
        }
        text = json.dumps({"files": files, "expect": describe_model(folder / version)}, indent=1)
        (folder / f"{version}.json").write_text(text + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--force", action="store_true", help="replace files that differ")
    arguments = parser.parse_args()
    manifest, differing = {}, []
    for name, content, entry in vectors():
        manifest[name] = {**entry, "sha256": hashlib.sha256(content).hexdigest()}
        path = VECTORS / name
        if path.exists() and path.read_bytes() != content and not arguments.force:
            differing.append(name)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    if differing:
        raise SystemExit(f"not replaced, since vectors are kept for good: {', '.join(differing)}")
    make_model("1.0", write_model)
    make_model("1.1", write_model_1_1)
    text = json.dumps({"format": "qmoe", "version": "1.0", "vectors": manifest}, indent=1, sort_keys=True)
    (VECTORS / "manifest.json").write_text(text + "\n")
    print(f"{len(manifest)} vectors in {VECTORS}")


if __name__ == "__main__":
    main()
