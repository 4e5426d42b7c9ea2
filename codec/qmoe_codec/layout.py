"""Headers and geometry of the frames: spec sections 1 to 4.2, in their order.

Everything here looks at headers only; nothing is decoded.
"""

from __future__ import annotations

import functools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from .errors import (
    ArgumentError,
    ChecksumError,
    FormatError,
    HeaderError,
    MagicError,
    SizeError,
    TruncatedError,
    VersionError,
)

VERSION_MAJOR = 1
VERSION_MINOR = 0

# Section 2.
MAXIMUM_SIDE = 1 << 24
MAXIMUM_WEIGHTS = 1 << 36
MAXIMUM_PHRASE = 126
MAXIMUM_NONZEROS = 3
MAXIMUM_DICTIONARIES = 4
MAXIMUM_CODEWORDS = (1 << 32) - 1

WIDTHS = (8, 10, 12, 16)
BLOCK_ROWS = 32

DICTIONARY_MAGIC = b"QMXD"
DICTIONARY_HEADER = struct.Struct("<4sBBBBIIIIII")
KIND_TABLE, KIND_TREES = 0, 1

FRAME_MAGIC = b"QMXM"
FRAME_HEADER = struct.Struct("<4sBBBBIIIbBBBIIQ4III")
CODEC_RAW, CODEC_DICTIONARY = 0, 1

LEVEL_FORMATS = ("float32", "bfloat16", "float16", "e4m4")
LEVEL_BYTES = (8, 4, 4, 2)  # bytes per row
LEVEL_EXPONENTS = range(-126, 113)


class Buffer(Protocol):
    """Anything that exports its bytes, such as bytes, a memoryview or a uint8 array."""

    def __buffer__(self, flags: int, /) -> memoryview: ...


class Crc32c(Protocol):
    """A function that computes CRC-32C, continuing from `value`."""

    def __call__(self, data: Buffer, value: int = 0, /) -> int:
        """CRC-32C of `data`."""
        ...


def round_up(number: int, multiple: int) -> int:
    """Least multiple of `multiple` that is at least `number` (spec 1)."""
    return -(-number // multiple) * multiple


def as_bytes(buffer: Buffer) -> memoryview:
    """View a buffer as a flat run of bytes, without a copy."""
    view = memoryview(buffer)
    if not view.c_contiguous:
        raise ArgumentError("a frame must lie in one contiguous buffer", field="frame")
    return view.cast("B") if view.ndim != 1 or view.format != "B" else view


def check(condition: bool, error: type[FormatError], field: str, value: object, expected: object) -> None:
    """Raise `error` unless `condition` holds."""
    if not condition:
        raise error("illegal", field=field, value=value, expected=expected)


@dataclass(frozen=True)
class DictionaryHeader:
    """Header of a dictionary frame (spec 3.1)."""

    version_minor: int
    kind: int
    bits: int
    threshold: int
    entry_count: int
    payload_size: int
    dictionary_id: int

    @functools.cached_property
    def frame_size(self) -> int:
        """Bytes of the whole frame."""
        return DICTIONARY_HEADER.size + self.payload_size

    @property
    def tables(self) -> int:
        """Number of tables from codeword to phrase: 1 or 2."""
        return 2 if self.kind == KIND_TREES else 1

    def pack(self) -> bytes:
        """The 32 bytes of the header."""
        return DICTIONARY_HEADER.pack(
            DICTIONARY_MAGIC,
            VERSION_MAJOR,
            self.version_minor,
            self.kind,
            self.bits,
            0,
            self.threshold,
            self.entry_count,
            self.payload_size,
            0,
            self.dictionary_id,
        )

    @classmethod
    def parse(cls, view: memoryview) -> DictionaryHeader:
        """Read and check the header at the start of `view`, up to the checksum (spec 3.1)."""
        check(len(view) >= 32, TruncatedError, "frame", f"{len(view)} bytes", "at least 32 bytes")
        (magic, major, minor, kind, bits, flags, threshold, entries, size, reserved, identity) = (
            DICTIONARY_HEADER.unpack_from(view)
        )
        check(magic == DICTIONARY_MAGIC, MagicError, "magic", magic, DICTIONARY_MAGIC)
        check(major == VERSION_MAJOR, VersionError, "version_major", major, VERSION_MAJOR)
        check(flags == 0, VersionError, "flags", f"{flags:#x}", "no flag known to version 1.0")
        check(kind in (KIND_TABLE, KIND_TREES), HeaderError, "kind", kind, "0 or 1")
        widths = WIDTHS if kind == KIND_TABLE else WIDTHS[:3]
        check(bits in widths, HeaderError, "bits", bits, widths)
        values = 1 << bits
        if kind == KIND_TREES:
            check(1 <= threshold <= values, HeaderError, "threshold", threshold, f"1 to {values}")
            check(5 <= entries <= 4 * values, HeaderError, "entry_count", entries, f"5 to {4 * values}")
            expected_size = -(-entries // 4)
        else:
            check(threshold == values, HeaderError, "threshold", threshold, values)
            check(entries == values, HeaderError, "entry_count", entries, values)
            expected_size = 4 * entries
        check(size == expected_size, HeaderError, "payload_size", size, expected_size)
        check(reserved == 0, HeaderError, "reserved", reserved, 0)
        return cls(minor, kind, bits, threshold, entries, size, identity)


@dataclass(frozen=True)
class FrameHeader:
    """Header of a matrix frame, with the geometry that follows from it (spec 4, 4.2).

    Attributes are the fields of the spec; `header_crc32c` is left to :meth:`pack` and :meth:`parse`.
    """

    version_minor: int
    codec: int
    level_format: int
    rows: int
    columns: int
    level_exponent: int
    bits: int
    count_bits: int
    count_minimum: int
    codeword_count: int
    dictionary_ids: tuple[int, ...]
    body_crc32c: int = 0

    @property
    def dictionary_count(self) -> int:
        """Number of dictionaries that the frame names."""
        return len(self.dictionary_ids)

    @property
    def selector_bits(self) -> int:
        """Width of a row's choice among the dictionaries."""
        return (0, 0, 1, 2, 2)[self.dictionary_count]

    @property
    def levels_size(self) -> int:
        """Bytes of the levels."""
        return self.rows * LEVEL_BYTES[self.level_format]

    @property
    def row_index_start(self) -> int:
        """Offset of the row index from the start of the frame."""
        return round_up(FRAME_HEADER.size + self.levels_size, 16)

    @property
    def row_index_parts(self) -> tuple[int, int, int]:
        """Bytes of `bases`, `counts` and `selectors` (spec 4.3)."""
        if self.codec == CODEC_RAW:
            return 0, 0, 0
        return (
            4 * -(-self.rows // BLOCK_ROWS),
            round_up(-(-self.rows * self.count_bits // 8), 4),
            round_up(-(-self.rows * self.selector_bits // 8), 4),
        )

    @functools.cached_property
    def codewords_start(self) -> int:
        """Offset of the section `codewords` or `trits`."""
        return round_up(self.row_index_start + sum(self.row_index_parts), 16)

    @property
    def codewords_size(self) -> int:
        """Bytes of that section without padding."""
        if self.codec == CODEC_RAW:
            return -(-self.rows * self.columns // 5)
        return -(-self.codeword_count * self.bits // 8)

    @functools.cached_property
    def frame_size(self) -> int:
        """Bytes of the whole frame."""
        room = 0 if self.codec == CODEC_RAW else 8
        return round_up(self.codewords_start + self.codewords_size + room, 16)

    @property
    def body_size(self) -> int:
        """Bytes after the header."""
        return self.frame_size - FRAME_HEADER.size

    @property
    def section_bytes(self) -> dict[str, int]:
        """Where the bytes of the frame go: header, levels, row_index, codewords, padding."""
        sections = {
            "header": FRAME_HEADER.size,
            "levels": self.levels_size,
            "row_index": sum(self.row_index_parts),
            "codewords": self.codewords_size,
        }
        return {**sections, "padding": self.frame_size - sum(sections.values())}

    @property
    def padding(self) -> list[tuple[int, int]]:
        """Ranges of bytes [start, end) between the sections, all of which must be zero."""
        ends = (
            FRAME_HEADER.size + self.levels_size,
            self.row_index_start + sum(self.row_index_parts),
            self.codewords_start + self.codewords_size,
        )
        return list(zip(ends, (self.row_index_start, self.codewords_start, self.frame_size), strict=True))

    @classmethod
    def raw(cls, rows: int, columns: int, level_format: int) -> FrameHeader:
        """Header of a matrix in the raw codec."""
        return cls(0, CODEC_RAW, level_format, rows, columns, 0, 0, 0, 0, 0, ())

    def pack(self, crc32c: Crc32c) -> bytes:
        """The 64 bytes of the header."""
        ids: Sequence[int] = (*self.dictionary_ids, *[0] * (MAXIMUM_DICTIONARIES - self.dictionary_count))
        fields = FRAME_HEADER.pack(
            FRAME_MAGIC,
            VERSION_MAJOR,
            self.version_minor,
            self.codec,
            self.level_format,
            0,
            self.rows,
            self.columns,
            self.level_exponent,
            self.bits,
            self.dictionary_count,
            self.count_bits,
            self.count_minimum,
            self.codeword_count,
            self.body_size,
            *ids,
            self.body_crc32c,
            0,
        )[:-4]
        return fields + struct.pack("<I", crc32c(fields))

    @classmethod
    def parse(cls, view: memoryview, crc32c: Crc32c) -> FrameHeader:
        """Read and check the header at the start of `view`, up to `body_size` (spec 4)."""
        check(len(view) >= 64, TruncatedError, "frame", f"{len(view)} bytes", "at least 64 bytes")
        # fmt: off
        (magic, major, minor, codec, level_format, flags, rows, columns, exponent, bits, dictionary_count,
         count_bits, count_minimum, codeword_count, body_size, id0, id1, id2, id3,
         body_crc32c, header_crc32c) = FRAME_HEADER.unpack_from(view)
        # fmt: on
        check(magic == FRAME_MAGIC, MagicError, "magic", magic, FRAME_MAGIC)
        check(major == VERSION_MAJOR, VersionError, "version_major", major, VERSION_MAJOR)
        computed = crc32c(view[:60])
        check(header_crc32c == computed, ChecksumError, "header_crc32c", header_crc32c, computed)
        check(flags == 0, VersionError, "flags", f"{flags:#x}", "no flag known to version 1.0")
        dictionary = codec == CODEC_DICTIONARY
        check(codec in (CODEC_RAW, CODEC_DICTIONARY), HeaderError, "codec", codec, "0 or 1")
        check(level_format < 4, HeaderError, "level_format", level_format, "0 to 3")
        check(rows <= MAXIMUM_SIDE, HeaderError, "rows", rows, f"at most {MAXIMUM_SIDE}")
        check(columns <= MAXIMUM_SIDE, HeaderError, "columns", columns, f"at most {MAXIMUM_SIDE}")
        weights = rows * columns
        check(weights <= MAXIMUM_WEIGHTS, HeaderError, "columns", weights, "at most 2^36 weights")
        exponents = LEVEL_EXPONENTS if level_format == 3 else range(1)
        check(exponent in exponents, HeaderError, "level_exponent", exponent, exponents)
        widths = WIDTHS if dictionary else (0,)
        check(bits in widths, HeaderError, "bits", bits, widths)
        counts = range(1, MAXIMUM_DICTIONARIES + 1) if dictionary else range(1)
        check(dictionary_count in counts, HeaderError, "dictionary_count", dictionary_count, counts)
        maximum = 24 if dictionary else 0
        check(count_bits <= maximum, HeaderError, "count_bits", count_bits, f"at most {maximum}")
        maximum = columns if dictionary else 0
        check(count_minimum <= maximum, HeaderError, "count_minimum", count_minimum, f"at most {maximum}")
        check(dictionary or codeword_count == 0, HeaderError, "codeword_count", codeword_count, 0)
        ids = (id0, id1, id2, id3)
        header = cls(
            version_minor=minor,
            codec=codec,
            level_format=level_format,
            rows=rows,
            columns=columns,
            level_exponent=exponent,
            bits=bits,
            count_bits=count_bits,
            count_minimum=count_minimum,
            codeword_count=codeword_count,
            dictionary_ids=ids[:dictionary_count],
            body_crc32c=body_crc32c,
        )
        check(body_size == header.body_size, SizeError, "body_size", body_size, header.body_size)
        distinct = len(set(ids[:dictionary_count])) == dictionary_count and not any(ids[dictionary_count:])
        check(distinct, HeaderError, "dictionary_ids", ids, "distinct ids, then 0")
        return header
