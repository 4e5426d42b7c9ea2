"""Packed matrices on a device: checked on the host, described for the kernels, read where they lie."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from qmoe_codec import Dictionary, FrameHeader, Matrix, read_frame_header
from qmoe_codec.errors import ArgumentError
from qmoe_codec.layout import CODEC_RAW, FRAME_HEADER, Buffer, as_bytes

from .device import Device, address

EMPTY_WORD = 127 << 7 | 127 << 14 | 127 << 21
CODEC_BITS = {0: 1, 8: 2, 10: 4, 12: 8, 16: 16}  # of -DCODECS, by width of a codeword

# The struct Matrix of kernels/frame.cuh.
DESCRIPTOR = np.dtype(
    [
        ("levels", "<u8"),
        ("bases", "<u8"),
        ("counts", "<u8"),
        ("selectors", "<u8"),
        ("codewords", "<u8"),
        ("codewords_words", "<u4"),
        ("rows", "<u4"),
        ("columns", "<u4"),
        ("codec", "<u4"),
        ("bits", "<u4"),
        ("level_format", "<u4"),
        ("level_exponent", "<i4"),
        ("count_bits", "<u4"),
        ("count_minimum", "<u4"),
        ("codeword_count", "<u4"),
        ("selector_bits", "<u4"),
        ("dictionary_count", "<u4"),
        ("thresholds", "<u4", 4),
        ("tables", "<u4", 4),
        ("unused", "<u4", 2),
    ]
)


def table_words(bits: int) -> int:
    """Words of a dictionary in the array of all tables."""
    return 1 << 16 if bits == 16 else 2 << bits


@functools.lru_cache(maxsize=64)
def device_words(dictionary: Dictionary) -> NDArray[np.uint32]:
    """A dictionary as the kernels read it: T0, then T1; a codeword without a phrase has an empty one."""
    words = np.full(table_words(dictionary.bits), EMPTY_WORD, np.uint32)
    flat = dictionary.words.reshape(-1)
    words[: flat.size] = np.where(flat == 0, np.uint32(EMPTY_WORD), flat)
    return words


class Tables:
    """The dictionaries of some matrices, in one array."""

    def __init__(self, dictionaries: Mapping[int, Dictionary]) -> None:
        self.dictionaries = dict(dictionaries)
        self.starts: dict[int, int] = {}
        parts = [np.full(4, EMPTY_WORD, np.uint32)]  # never an empty array
        length = parts[0].size
        for identity, dictionary in self.dictionaries.items():
            self.starts[identity] = length
            parts.append(device_words(dictionary))
            length += parts[-1].size
        self.words = np.concatenate(parts)


def describe(header: FrameHeader, frame_address: int, tables: Tables) -> NDArray[np.void]:
    """The descriptor of one frame, whose header was checked."""
    if frame_address % 16:
        raise ArgumentError(
            "not aligned", field="frame", value=hex(frame_address), expected="a multiple of 16"
        )
    bases, counts, _ = header.row_index_parts
    record = np.zeros((), DESCRIPTOR)
    record["levels"] = frame_address + FRAME_HEADER.size
    record["bases"] = index = frame_address + header.row_index_start
    record["counts"] = index + bases
    record["selectors"] = index + bases + counts
    record["codewords"] = frame_address + header.codewords_start
    record["codewords_words"] = (header.frame_size - header.codewords_start) // 4
    for name in ("rows", "columns", "codec", "bits", "level_format"):
        record[name] = getattr(header, name)
    for name in ("level_exponent", "count_bits", "count_minimum", "codeword_count", "selector_bits"):
        record[name] = getattr(header, name)
    record["dictionary_count"] = header.dictionary_count
    for k, identity in enumerate(header.dictionary_ids):
        record["thresholds"][k] = tables.dictionaries[identity].threshold
        record["tables"][k] = tables.starts[identity]
    return record


@dataclass(frozen=True)
class Needs:
    """What kernels have to be specialised for, to take some matrices."""

    codecs: int
    table_bytes: int  # of the dictionaries of one matrix, at most

    @classmethod
    def of(cls, headers: Sequence[FrameHeader]) -> Needs:
        """Of matrices with these headers."""
        codecs = 0
        for header in headers:
            codecs |= CODEC_BITS[header.bits]
        sizes = [4 * table_words(h.bits) * h.dictionary_count for h in headers if h.codec != CODEC_RAW]
        return cls(codecs or 1, max(sizes, default=0))

    @classmethod
    def together(cls, several: Iterable[Needs]) -> Needs:
        """Of all that these are of."""
        codecs, table_bytes = 0, 0
        for needs in several:
            codecs |= needs.codecs
            table_bytes = max(table_bytes, needs.table_bytes)
        return cls(codecs, table_bytes)


def check_frame(frame: Buffer, dictionaries: Mapping[int, Dictionary], *, verify: bool = True) -> FrameHeader:
    """Check a frame on the host, whole or all but checksum and codewords, and return its header."""
    view = as_bytes(frame)
    Matrix(view, dictionaries, verify=verify)
    return read_frame_header(view)


class PackedMatrices:
    """Matrices of one shape on a device, each a frame as it lies in the file.

    Parameters
    ----------
    frames : sequence of buffers
        Matrix frames, on the host.
    dictionaries : mapping of int to Dictionary
        Dictionaries by id.
    device : Device
        Where they go.
    verify : bool
        Whether checksum and codewords are checked too; headers and row indexes always are.

    Raises
    ------
    FormatError
        A frame is not legal.
    ArgumentError
        The shapes differ.
    """

    def __init__(
        self,
        frames: Sequence[Buffer],
        dictionaries: Mapping[int, Dictionary],
        device: Device,
        *,
        verify: bool = True,
    ) -> None:
        self.headers = [check_frame(frame, dictionaries, verify=verify) for frame in frames]
        shapes = {(header.rows, header.columns) for header in self.headers}
        if len(shapes) != 1:
            raise ArgumentError("not of one shape", field="frames", value=sorted(shapes))
        ((self.rows, self.columns),) = shapes
        self.count = len(frames)
        self.device = device
        self.needs = Needs.of(self.headers)
        used = {identity for header in self.headers for identity in header.dictionary_ids}
        tables = Tables({identity: dictionaries[identity] for identity in sorted(used)})
        self.tables = device.upload(tables.words)
        self.store = device.upload(
            np.concatenate([np.frombuffer(as_bytes(frame), np.uint8) for frame in frames])
        )
        self.nbytes = sum(header.frame_size for header in self.headers)
        base = int(address(self.store))
        records = []
        for header in self.headers:  # frame sizes are multiples of 16
            records.append(describe(header, base, tables))
            base += header.frame_size
        self.records = np.stack(records)
        self.descriptors = device.upload(self.records.view(np.uint8))
