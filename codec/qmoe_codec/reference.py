"""The reference codec: NumPy and plain Python, in the order of the spec, written to be read.

It shares the header checks of :mod:`.layout` with the rest of the package and nothing else. Use it to
understand the format and to check other decoders; the C core gives the same results much faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .errors import (
    ChecksumError,
    MissingDictionaryError,
    PayloadError,
    RowIndexError,
    SizeError,
    TruncatedError,
)
from .layout import (
    BLOCK_ROWS,
    CODEC_DICTIONARY,
    CODEC_RAW,
    DICTIONARY_HEADER,
    FRAME_HEADER,
    KIND_TREES,
    LEVEL_EXPONENTS,
    MAXIMUM_NONZEROS,
    MAXIMUM_PHRASE,
    Buffer,
    DictionaryHeader,
    FrameHeader,
    as_bytes,
    check,
)

# --- Section 1: conventions ---------------------------------------------------------------------------------


def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        value = byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        table.append(value)
    return table


_CRC32C_TABLE = _crc32c_table()


def crc32c(data: Buffer, value: int = 0, /) -> int:
    """CRC-32C of `data`, continuing from `value` (spec 1)."""
    value ^= 0xFFFFFFFF
    for byte in as_bytes(data):
        value = (value >> 8) ^ _CRC32C_TABLE[(value ^ byte) & 0xFF]
    return value ^ 0xFFFFFFFF


def unpack_array(data: Buffer, count: int, width: int) -> NDArray[np.uint32]:
    """Elements of a packed array of `count` elements of `width` bits (spec 1)."""
    if width == 0:
        return np.zeros(count, np.uint32)
    size = -(-count * width // 8)
    octets = np.frombuffer(as_bytes(data), np.uint8, size)
    bits = np.unpackbits(octets, bitorder="little", count=count * width).reshape(count, width)
    return np.asarray(
        (bits.astype(np.uint32) << np.arange(width, dtype=np.uint32)).sum(axis=1, dtype=np.uint32)
    )


def pack_array(elements: ArrayLike, width: int) -> bytes:
    """The packed array of `elements`, `width` bits each (spec 1)."""
    values = np.asarray(elements, np.uint32).reshape(-1, 1)
    bits = (values >> np.arange(width, dtype=np.uint32)) & 1
    return np.packbits(bits.astype(np.uint8).reshape(-1), bitorder="little").tobytes()


# --- Section 3: dictionaries --------------------------------------------------------------------------------

Phrase = tuple[int, ...]
_TRITS = (0, 1, -1)  # the order of a node's children


@dataclass
class DictionaryTables:
    """A dictionary, expanded: for each table the phrase of each codeword, None where it is unused."""

    header: DictionaryHeader
    phrases: list[list[Phrase | None]]
    codewords: list[dict[Phrase, int]] = field(init=False)

    def __post_init__(self) -> None:
        self.codewords = []
        for table in self.phrases:
            lookup: dict[Phrase, int] = {}
            for codeword, phrase in enumerate(table):
                if phrase is not None:
                    lookup.setdefault(phrase, codeword)
            self.codewords.append(lookup)

    def words(self) -> NDArray[np.uint32]:
        """The phrases as table words (spec 3.3), uint32 [tables, 2**bits], 0 where unused."""
        return np.array([[_phrase_to_word(phrase) for phrase in table] for table in self.phrases], np.uint32)


def read_dictionary(frame: Buffer) -> DictionaryTables:
    """Decode a dictionary frame (spec 3.1)."""
    view = as_bytes(frame)
    header = DictionaryHeader.parse(view)
    check(len(view) >= header.frame_size, TruncatedError, "payload", len(view), header.frame_size)
    check(len(view) == header.frame_size, SizeError, "frame", len(view), header.frame_size)
    payload = view[DICTIONARY_HEADER.size :]
    computed = crc32c(payload, crc32c(view[:28]))
    check(header.dictionary_id == computed, ChecksumError, "dictionary_id", header.dictionary_id, computed)
    if header.kind == KIND_TREES:
        return DictionaryTables(header, _read_trees(header, payload))
    words = np.frombuffer(payload, "<u4")
    return DictionaryTables(header, [[_word_to_phrase(int(word)) for word in words]])


def _read_trees(header: DictionaryHeader, payload: memoryview) -> list[list[Phrase | None]]:
    """Spec 3.2."""
    nodes = iter(unpack_array(payload, header.entry_count, 2).tolist())
    tables = []
    for roots in ((0, 1, -1), (1, -1)):
        leaves: list[Phrase] = []
        incomplete: list[Phrase] = []
        stack: list[Phrase] = [(trit,) for trit in reversed(roots)]
        while stack:
            phrase = stack.pop()
            check(len(phrase) <= MAXIMUM_PHRASE, PayloadError, "length", len(phrase), MAXIMUM_PHRASE)
            nonzeros = sum(trit != 0 for trit in phrase)
            check(nonzeros <= MAXIMUM_NONZEROS, PayloadError, "nonzeros", nonzeros, MAXIMUM_NONZEROS)
            node = next(nodes, None)
            check(node in (0, 1, 2), PayloadError, "node", node, "a node code 0, 1 or 2")
            if node == 0:
                leaves.append(phrase)
            else:
                if node == 1:
                    incomplete.append(phrase)
                children = _TRITS[:1] if node == 1 else _TRITS
                stack.extend((*phrase, trit) for trit in reversed(children))
        room = (1 << header.bits) - header.threshold
        check(len(leaves) <= header.threshold, PayloadError, "leaves", len(leaves), header.threshold)
        check(len(incomplete) <= room, PayloadError, "incomplete", len(incomplete), room)
        table: list[Phrase | None] = [None] * (1 << header.bits)
        table[: len(leaves)] = leaves
        table[header.threshold : header.threshold + len(incomplete)] = incomplete
        tables.append(table)
    check(next(nodes, None) is None, PayloadError, "node", "nodes left over", "none after the second tree")
    unused = payload[-1] >> (2 * (header.entry_count % 4)) if header.entry_count % 4 else 0
    check(unused == 0, PayloadError, "node", "a set bit after the last node", 0)
    return tables


def _word_to_phrase(word: int) -> Phrase | None:
    """Spec 3.3."""
    if word == 0:
        return None
    length = word & 127
    positions = [(word >> shift) & 127 for shift in (7, 14, 21)]
    signs = [(word >> shift) & 1 for shift in (28, 29, 30)]
    present = [position for position in positions if position != 127]
    legal = (
        1 <= length <= MAXIMUM_PHRASE
        and positions[: len(present)] == present
        and all(a < b for a, b in itertools.pairwise(present))
        and all(position < length for position in present)
        and not any(signs[len(present) :])
        and not word >> 31
    )
    check(legal, PayloadError, "word", f"{word:#010x}", "a legal table word")
    phrase = [0] * length
    for position, sign in zip(present, signs, strict=False):
        phrase[position] = -1 if sign else 1
    return tuple(phrase)


def _phrase_to_word(phrase: Phrase | None) -> int:
    """Spec 3.3."""
    if phrase is None:
        return 0
    word = len(phrase) | 127 << 7 | 127 << 14 | 127 << 21
    for k, position in enumerate(np.flatnonzero(phrase).tolist()):
        word ^= (127 ^ position) << (7 + 7 * k)
        word |= (phrase[position] < 0) << (28 + k)
    return word


# --- Section 4: matrix frames -------------------------------------------------------------------------------


def decode(
    frame: Buffer, dictionaries: Mapping[int, DictionaryTables], *, verify: bool = True
) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Decode a matrix frame (spec 4): trits int8 [rows, columns] and levels float32 [rows, 2]."""
    view = as_bytes(frame)
    header = FrameHeader.parse(view, crc32c)
    check(len(view) >= header.frame_size, TruncatedError, "frame", len(view), header.frame_size)
    check(len(view) == header.frame_size, SizeError, "frame", len(view), header.frame_size)
    if verify:
        computed = crc32c(view[FRAME_HEADER.size :])
        check(header.body_crc32c == computed, ChecksumError, "body_crc32c", header.body_crc32c, computed)
    for start, end in header.padding:
        check(not any(view[start:end]), PayloadError, "padding", bytes(view[start:end]).hex(), "zero bytes")
    levels = _read_levels(header, view[FRAME_HEADER.size :])
    if header.codec == CODEC_RAW:
        return _read_raw(header, view[header.codewords_start :]), levels

    tables = []
    for identity in header.dictionary_ids:
        found = dictionaries.get(identity)
        if found is None or found.header.bits != header.bits:
            raise MissingDictionaryError(
                "no such dictionary at hand", field="dictionary_ids", value=f"{identity:#010x}"
            )
        tables.append(found)
    counts, selectors = _read_row_index(header, view[header.row_index_start :])
    section = view[header.codewords_start :]
    _check_unused_bits(section, header.codeword_count * header.bits, header.codewords_size, "codewords")
    codewords = unpack_array(section, header.codeword_count, header.bits)
    trits = np.zeros((header.rows, header.columns), np.int8)
    first = 0
    for row, (count, selector) in enumerate(zip(counts.tolist(), selectors.tolist(), strict=True)):
        _read_row(trits[row], codewords[first : first + count].tolist(), tables[selector])
        first += count
    return trits, levels


def _read_levels(header: FrameHeader, body: memoryview) -> NDArray[np.float32]:
    """Spec 4.1."""
    count = 2 * header.rows
    shape = (header.rows, 2)
    if header.level_format == 3:
        octets = np.frombuffer(body, np.uint8, count).astype(np.int32).reshape(shape)
        magnitude = np.ldexp(1 + (octets % 16) / 16, octets // 16 + header.level_exponent)
        return np.where(octets == 0, 0.0, magnitude * (-1.0, 1.0)).astype(np.float32)
    if header.level_format == 1:
        levels = (np.frombuffer(body, "<u2", count).astype(np.uint32) << 16).view(np.float32)
    else:
        levels = np.frombuffer(body, ("<f4", "", "<f2")[header.level_format], count).astype(np.float32)
    finite = bool(np.isfinite(levels).all())
    check(finite, PayloadError, "levels", "a level that is not finite", "finite levels")
    return levels.reshape(shape)


def _read_row_index(header: FrameHeader, section: memoryview) -> tuple[NDArray[np.int64], NDArray[np.uint32]]:
    """Counts and selectors of the rows (spec 4.3)."""
    bases_size, counts_size, _ = header.row_index_parts
    bases = np.frombuffer(section, "<u4", bases_size // 4)
    counts = unpack_array(section[bases_size:], header.rows, header.count_bits).astype(np.int64)
    counts += header.count_minimum
    _check_unused_bits(section[bases_size:], header.rows * header.count_bits, counts_size, "counts")
    before = np.concatenate([[0], np.cumsum(counts)])
    most, total = counts.max(initial=0), before[-1]
    check(bool(most <= header.columns), RowIndexError, "counts", most, header.columns)
    risen = bool((bases == before[:-1:BLOCK_ROWS]).all())
    check(risen, RowIndexError, "bases", "another base", "the sum of the counts before")
    check(bool(total == header.codeword_count), RowIndexError, "codeword_count", header.codeword_count, total)
    section = section[bases_size + counts_size :]
    selectors = unpack_array(section, header.rows, header.selector_bits)
    _check_unused_bits(section, header.rows * header.selector_bits, header.row_index_parts[2], "selectors")
    legal = bool((selectors < header.dictionary_count).all())
    check(legal, PayloadError, "selectors", selectors.max(initial=0), f"below {header.dictionary_count}")
    return counts, selectors


def _check_unused_bits(section: memoryview, used_bits: int, size: int, name: str) -> None:
    """Bits of a part of the row index after its last element are padding."""
    rest = int.from_bytes(section[used_bits // 8 : size], "little") >> (used_bits % 8)
    check(rest == 0, PayloadError, name, "a set bit after the last element", "zero bits")


def _read_row(row: NDArray[np.int8], codewords: Sequence[int], dictionary: DictionaryTables) -> None:
    """Spec 4.3, decoding a row."""
    column, table = 0, 0
    for codeword in codewords:
        check(column < len(row), PayloadError, "codewords", column, f"a column below {len(row)}")
        phrase = dictionary.phrases[table][codeword]
        if phrase is None:
            raise PayloadError("unused in this dictionary", field="codewords", value=codeword)
        inside = phrase[: len(row) - column]
        check(not any(phrase[len(inside) :]), PayloadError, "codewords", codeword, "no trit beyond the row")
        row[column : column + len(inside)] = inside
        column += len(phrase)
        table = int(codeword >= dictionary.header.threshold)


def _read_raw(header: FrameHeader, section: memoryview) -> NDArray[np.int8]:
    """Spec 4.4."""
    weights = header.rows * header.columns
    octets = np.frombuffer(section, np.uint8, header.codewords_size).astype(np.int16)
    check(bool((octets <= 242).all()), PayloadError, "trits", octets.max(initial=0), "a byte of at most 242")
    digits = (octets[:, None] // 3 ** np.arange(5, dtype=np.int16) % 3).reshape(-1)
    check(not digits[weights:].any(), PayloadError, "trits", "a digit after the last trit", 0)
    return (digits[:weights] - 1).astype(np.int8).reshape(header.rows, header.columns)


def dequantize(trits: NDArray[np.int8], levels: NDArray[np.float32]) -> NDArray[np.float32]:
    """Weights float32 [rows, columns]: low, 0 or high of the row for the trits -1, 0 and +1."""
    low, high = levels[:, :1], levels[:, 1:]
    return np.where(trits < 0, low, np.where(trits > 0, high, np.float32(0)))


def convert(weights: NDArray[np.float32], dtype: str) -> NDArray[np.generic]:
    """Weights rounded to nearest in `dtype`; bfloat16 as uint16 bit patterns."""
    if dtype == "bfloat16":
        return np.frombuffer(pack_levels(weights, 1)[0], "<u2").reshape(weights.shape)
    return weights.astype({"float32": "<f4", "float16": "<f2"}[dtype])


def matmul(
    x: NDArray[np.float32], trits: NDArray[np.int8], levels: NDArray[np.float32]
) -> NDArray[np.float64]:
    """x [..., columns] times the transposed weights, in float64."""
    return np.asarray(x, np.float64) @ dequantize(trits, levels).astype(np.float64).T


# --- Section 4.3, encoding (informative) --------------------------------------------------------------------


def pack_levels(levels: NDArray[np.float32], level_format: int) -> tuple[bytes, int]:
    """Section `levels` and `level_exponent` for levels float32 [rows, 2]; rounds to nearest."""
    if level_format == 0:
        return levels.astype("<f4").tobytes(), 0
    if level_format == 1:
        bits = levels.view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes(), 0
    if level_format == 2:
        return levels.astype("<f2").tobytes(), 0
    magnitude = np.abs(levels).astype(np.float64)
    fraction, exponent = np.frexp(magnitude)  # fraction in [0.5, 1)
    steps = np.rint(fraction * 32).astype(np.int64)  # 16 … 32, and 0 for 0
    exponent = exponent.astype(np.int64) - 1 + (steps == 32)
    steps = np.where(steps == 32, 16, steps)
    top = int(exponent[steps > 0].max(initial=LEVEL_EXPONENTS[0]))
    level_exponent = min(max(top - 15, LEVEL_EXPONENTS[0]), LEVEL_EXPONENTS[-1])
    octets = np.clip(exponent - level_exponent, -1, 15) * 16 + steps - 16
    return np.where((steps > 0) & (octets > 0), octets, 0).astype(np.uint8).tobytes(), level_exponent


def encode_row(row: Sequence[int], dictionary: DictionaryTables) -> list[int]:
    """Codewords of one row (spec 4.3, encoding a row)."""
    end = max((column + 1 for column, trit in enumerate(row) if trit), default=0)
    padded = (*row[:end], *[0] * MAXIMUM_PHRASE)
    codewords: list[int] = []
    column, table = 0, 0
    while column < end:
        lookup = dictionary.codewords[table]
        best = (0, 0)
        for length in range(1, MAXIMUM_PHRASE + 1):
            codeword = lookup.get(padded[column : column + length])
            if codeword is None:
                continue
            last = column + length >= end
            if codeword < dictionary.header.threshold or last or padded[column + length]:
                best = (length, codeword)
                if dictionary.header.kind == KIND_TREES:
                    break
        if best[0] == 0:
            raise PayloadError("no phrase of the dictionary matches", field="dictionary", value=column)
        codewords.append(best[1])
        column += best[0]
        table = int(best[1] >= dictionary.header.threshold)
    return codewords


def encode(
    trits: NDArray[np.int8],
    levels: NDArray[np.float32],
    dictionaries: Sequence[DictionaryTables],
    selectors: NDArray[np.uint8],
    level_format: int,
) -> bytes:
    """Encode a matrix frame; without dictionaries the codec is raw."""
    if dictionaries:
        rows = [encode_row(row.tolist(), dictionaries[s]) for row, s in zip(trits, selectors, strict=True)]
        return assemble(trits.shape[1], rows, levels, dictionaries, selectors, level_format)
    digits = np.zeros(-(-trits.size // 5) * 5, np.int16)
    digits[: trits.size] = trits.reshape(-1) + 1
    octets = (digits.reshape(-1, 5) * 3 ** np.arange(5)).sum(axis=1).astype(np.uint8)
    level_bytes, level_exponent = pack_levels(levels, level_format)
    header = FrameHeader.raw(trits.shape[0], trits.shape[1], level_format)
    header = replace(header, level_exponent=level_exponent)
    sections = {FRAME_HEADER.size: level_bytes, header.codewords_start: octets.tobytes()}
    return _seal(header, sections)


def assemble(
    columns: int,
    rows: Sequence[Sequence[int]],
    levels: NDArray[np.float32],
    dictionaries: Sequence[DictionaryTables],
    selectors: NDArray[np.uint8],
    level_format: int,
) -> bytes:
    """A frame of the codewords of each row, whatever they stand for (spec 4.2, 4.3)."""
    counts = np.array([len(row) for row in rows], np.int64)
    count_minimum = int(counts.min(initial=1 << 24)) if len(rows) else 0
    level_bytes, level_exponent = pack_levels(levels, level_format)
    header = FrameHeader(
        version_minor=0,
        codec=CODEC_DICTIONARY,
        level_format=level_format,
        rows=len(rows),
        columns=columns,
        level_exponent=level_exponent,
        bits=dictionaries[0].header.bits,
        count_bits=int(counts.max(initial=count_minimum) - count_minimum).bit_length(),
        count_minimum=count_minimum,
        codeword_count=int(counts.sum()),
        dictionary_ids=tuple(dictionary.header.dictionary_id for dictionary in dictionaries),
    )
    _, counts_size, selectors_size = header.row_index_parts
    bases = (np.cumsum(counts) - counts)[::BLOCK_ROWS].astype("<u4").tobytes()
    counts_part = pack_array(counts - count_minimum, header.count_bits).ljust(counts_size, b"\0")
    selectors_part = pack_array(selectors, header.selector_bits).ljust(selectors_size, b"\0")
    sections = {
        FRAME_HEADER.size: level_bytes,
        header.row_index_start: bases + counts_part + selectors_part,
        header.codewords_start: pack_array([codeword for row in rows for codeword in row], header.bits),
    }
    return _seal(header, sections)


def _seal(header: FrameHeader, sections: Mapping[int, bytes]) -> bytes:
    """The frame with its sections in place and its checksums computed."""
    frame = bytearray(header.frame_size)
    for start, section in sections.items():
        frame[start : start + len(section)] = section
    body = bytes(frame[FRAME_HEADER.size :])
    return replace(header, body_crc32c=crc32c(body)).pack(crc32c) + body
