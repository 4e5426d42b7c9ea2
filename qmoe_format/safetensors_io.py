"""Safetensors files: a strict reader over a read-only map, and a writer that streams.

A file is a u64 header size, a JSON header, and the tensors' bytes one after the other. The reader accepts
only files whose tensors cover the data exactly once; the writer reserves room for the header and writes it
last, filled up with spaces, so that nothing need be known of a tensor before it has gone to the disk.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from qmoe_codec import crc32c
from qmoe_codec.errors import ArgumentError, ChecksumError, HeaderError, SizeError, TruncatedError

from .files import CHUNK_BYTES, create_file, flat_bytes, open_regular, os_errors, parse_json, write_all

#: Bits of an element.
DTYPE_BITS: Mapping[str, int] = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}

#: Longest header that is read, as in the safetensors library.
HEADER_LIMIT = 100_000_000
#: Most bytes of a tensor, so that no product or sum below leaves 64 bits in any language.
TENSOR_LIMIT = (1 << 63) - 1
DIMENSION_LIMIT = 64

# Readers in transformers ask for it, and refuse a file without it.
_METADATA = {"format": "pt"}


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor.

    Raises
    ------
    ArgumentError
        Unknown dtype, illegal dimension, too large, or not a whole number of bytes.
    """
    if dtype not in DTYPE_BITS:
        raise ArgumentError("unknown", field="dtype", value=repr(dtype), expected="a dtype of safetensors")
    if len(shape) > DIMENSION_LIMIT:
        raise ArgumentError(
            "too many dimensions", field="shape", value=len(shape), expected=f"at most {DIMENSION_LIMIT}"
        )
    for side in shape:
        if type(side) is not int or not 0 <= side <= TENSOR_LIMIT:
            raise ArgumentError(
                "illegal", field="shape", value=repr(side), expected="integers of 0 to 2^63 - 1"
            )
    bits = 0 if 0 in shape else DTYPE_BITS[dtype]
    for side in shape:
        bits *= side
        if bits > 8 * TENSOR_LIMIT:
            raise ArgumentError("too large", field="shape", expected="less than 2^63 bytes")
    if bits % 8:
        raise ArgumentError("not a whole number of bytes", field="shape", value=f"{bits} bits")
    return bits // 8


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: bytes [start, end) of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return self.end - self.start


def _parse_tensor(name: str, entry: object, data_start: int, file: Path) -> TensorInfo:
    """One entry of the header, its extent not yet compared with the others'."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        value = sorted(entry) if isinstance(entry, dict) else type(entry).__name__
        raise HeaderError(
            "illegal tensor entry",
            file=file,
            field=name,
            value=value,
            expected="dtype, shape and data_offsets",
        )
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or not isinstance(shape, list):
        raise HeaderError(
            "wrong types",
            file=file,
            field=name,
            value=f"dtype {dtype!r:.40}, shape {shape!r:.40}",
            expected="a string and a list",
        )
    try:
        size = tensor_bytes(dtype, tuple(shape))
    except ArgumentError as error:
        raise HeaderError(
            error.message,
            file=file,
            field=f"{name}: {error.field}",
            value=error.value,
            expected=error.expected,
        ) from error
    if (
        not isinstance(offsets, list)
        or len(offsets) != 2
        or any(type(offset) is not int for offset in offsets)
        or not 0 <= offsets[0] <= offsets[1] <= TENSOR_LIMIT
    ):
        raise HeaderError(
            "illegal data_offsets",
            file=file,
            field=name,
            value=f"{offsets!r:.60}",
            expected="two integers [begin, end], 0 <= begin <= end",
        )
    begin, end = offsets
    if end - begin != size:
        raise SizeError(
            "data_offsets contradict dtype and shape", file=file, field=name, value=end - begin, expected=size
        )
    return TensorInfo(dtype, tuple(shape), data_start + begin, data_start + end)


def _parse_header(
    text: bytes, data_start: int, file_size: int, file: Path
) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors in the order of their bytes, and metadata."""
    if not text.startswith(b"{"):
        raise HeaderError("does not start with '{'", file=file, field="header")
    header = parse_json(text, file, "header")
    assert isinstance(header, dict)  # it starts with a brace
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise HeaderError("illegal", file=file, field="__metadata__", expected="an object of strings")
    tensors = {name: _parse_tensor(name, entry, data_start, file) for name, entry in header.items()}
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].end)))
    position = data_start
    for name, tensor in tensors.items():
        if tensor.start != position:
            fault = "overlaps the tensor before it" if tensor.start < position else "leaves a hole before it"
            raise SizeError(
                fault, file=file, field=name, value=tensor.start - data_start, expected=position - data_start
            )
        position = tensor.end
    if position > file_size:
        name = next(name for name, tensor in tensors.items() if tensor.end > file_size)
        raise TruncatedError(
            "the file ends within it",
            file=file,
            field=name,
            value=f"{file_size} bytes",
            expected=f"{position} bytes",
        )
    if position < file_size:
        raise SizeError(
            "bytes after the last tensor", file=file, value=f"{file_size} bytes", expected=f"{position} bytes"
        )
    return tensors, metadata


def parse_header(header: bytes, file_size: int, file: Path) -> dict[str, TensorInfo]:
    """Tensors, in the order of their bytes, by the beginning of a file of `file_size` bytes.

    Parameters
    ----------
    header : bytes
        All bytes before the first tensor's.
    file_size : int
        Bytes of the file.
    file : path
        What to call it in messages.

    Raises
    ------
    TruncatedError, HeaderError, SizeError
        It is not what the format says.
    """
    size = struct.unpack_from("<Q", header)[0] if len(header) >= 8 else 0
    if len(header) != 8 + size or size > HEADER_LIMIT:
        raise HeaderError(
            "not the size that it says", file=file, field="header size", value=size, expected=len(header) - 8
        )
    return _parse_header(header[8:], len(header), file_size, file)[0]


def file_identity(status: os.stat_result) -> tuple[int, int, int, int]:
    """What changes when a file is replaced or written to: device, inode, size, time of change in ns."""
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


class SafetensorsFile:
    """A safetensors file, mapped read-only, its header checked in full.

    Parameters
    ----------
    path : path
        The file.

    Attributes
    ----------
    tensors : dict of str to TensorInfo
        In the order of their bytes.
    metadata : dict of str to str
        The entry ``__metadata__``.
    data_start : int
        Offset of the first tensor's first byte.
    identity : tuple of int
        Of the file that was opened: see :func:`file_identity`.

    Raises
    ------
    TruncatedError, HeaderError, SizeError
        The file is missing, cut short, or its header is not what the format says.
    QMoEError
        It cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        descriptor = open_regular(self.path)
        try:
            with os_errors(self.path):
                status = os.fstat(descriptor)
                self.nbytes, self.identity = status.st_size, file_identity(status)
                if self.nbytes < 8:
                    raise TruncatedError(
                        "too short for a safetensors file",
                        file=self.path,
                        value=f"{self.nbytes} bytes",
                        expected="at least 8 bytes",
                    )
                mapped = mmap.mmap(descriptor, self.nbytes, access=mmap.ACCESS_READ)
        finally:
            os.close(descriptor)
        self._view: memoryview | None = memoryview(mapped)
        (header_size,) = struct.unpack_from("<Q", mapped)
        if header_size > HEADER_LIMIT:
            raise HeaderError(
                "too large",
                file=self.path,
                field="header size",
                value=header_size,
                expected=f"at most {HEADER_LIMIT}",
            )
        self.data_start = 8 + header_size
        if self.data_start > self.nbytes:
            raise TruncatedError(
                "the file ends within its header",
                file=self.path,
                value=f"{self.nbytes} bytes",
                expected=f"at least {self.data_start} bytes",
            )
        self.tensors, self.metadata = _parse_header(
            mapped[8 : self.data_start], self.data_start, self.nbytes, self.path
        )

    def data(self, name: str) -> memoryview:
        """The bytes of a tensor: a read-only view of the map, no copy.

        Raises
        ------
        ArgumentError
            The file is closed, or has no such tensor.
        """
        if self._view is None:
            raise ArgumentError("the file is closed", file=self.path)
        if name not in self.tensors:
            raise ArgumentError("no such tensor", file=self.path, value=name)
        tensor = self.tensors[name]
        return self._view[tensor.start : tensor.end]

    def sha256(self, on_bytes: Callable[[int], None] | None = None) -> str:
        """SHA-256 of the file as it is mapped; `on_bytes` is told the size of each piece.

        Raises
        ------
        ArgumentError
            The file is closed.
        """
        view = self._view
        if view is None:
            raise ArgumentError("the file is closed", file=self.path)
        digest = hashlib.sha256()
        for start in range(0, self.nbytes, CHUNK_BYTES):
            piece = view[start : start + CHUNK_BYTES]
            digest.update(piece)
            if on_bytes is not None:
                on_bytes(len(piece))
        return digest.hexdigest()

    def close(self) -> None:
        """Let go of the map. Views given out stay valid: the last one that dies unmaps the file."""
        self._view = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@dataclass(frozen=True)
class FileRecord:
    """What the manifest says of a file."""

    nbytes: int
    sha256: str


def header_entry_bytes(name: str, dimensions: int) -> int:
    """Most bytes that a tensor of this name takes in a header."""
    largest = [TENSOR_LIMIT] * dimensions
    entry = {"dtype": max(DTYPE_BITS, key=len), "shape": largest, "data_offsets": [TENSOR_LIMIT] * 2}
    return len(json.dumps({name: entry}))


class SafetensorsWriter:
    """Write a safetensors file tensor by tensor, without knowing their sizes before.

    Parameters
    ----------
    path : path
        A new file.
    header_bytes : int
        Room for the header, a multiple of 256; the tensors start there.
    """

    def __init__(self, path: Path, header_bytes: int) -> None:
        if header_bytes < 256 or header_bytes % 256:
            raise ArgumentError(
                "illegal", field="header_bytes", value=header_bytes, expected="a multiple of 256"
            )
        self.path = path
        self.data_start = header_bytes
        self.position = header_bytes
        self._room = header_bytes - 8 - header_entry_bytes("__metadata__", 0)
        self._entries: dict[str, object] = {"__metadata__": _METADATA}
        self._crc = 0
        self._descriptor = create_file(path)
        # Spaces, but a header size of zero: until close() this is no safetensors file.
        write_all(self._descriptor, bytes(8) + b" " * (header_bytes - 8), path)

    def has_room(self, name: str, dimensions: int) -> bool:
        """Whether the header has room for another tensor."""
        return header_entry_bytes(name, dimensions) <= self._room

    def begin(self, name: str, dimensions: int) -> None:
        """Start a tensor; :meth:`write` its bytes and then :meth:`end` it."""
        if name in self._entries:
            raise ArgumentError("tensor written twice", file=self.path, value=name)
        if not self.has_room(name, dimensions):
            raise ArgumentError("no room in the header", file=self.path, value=name)
        self._name, self._dimensions, self._start = name, dimensions, self.position

    def write(self, data: bytes | bytearray | memoryview) -> None:
        """Append bytes to the tensor."""
        view = flat_bytes(data)
        write_all(self._descriptor, view, self.path)
        for start in range(0, view.nbytes, CHUNK_BYTES):
            self._crc = crc32c(view[start : start + CHUNK_BYTES], self._crc)
        self.position += view.nbytes

    def end(self, dtype: str, shape: tuple[int, ...]) -> None:
        """Finish the tensor: its dtype and shape, which must fit the bytes written."""
        size = tensor_bytes(dtype, shape)
        if size != self.position - self._start or len(shape) != self._dimensions:
            raise ArgumentError(
                "data contradict dtype and shape",
                file=self.path,
                field=self._name,
                value=f"{self.position - self._start} bytes",
                expected=f"{size} bytes",
            )
        self._entries[self._name] = {
            "dtype": dtype,
            "shape": list(shape),
            "data_offsets": [self._start - self.data_start, self.position - self.data_start],
        }
        self._room -= len(json.dumps({self._name: self._entries[self._name]}))

    def add(
        self, name: str, dtype: str, shape: tuple[int, ...], data: bytes | bytearray | memoryview
    ) -> None:
        """Write a whole tensor."""
        self.begin(name, len(shape))
        self.write(data)
        self.end(dtype, shape)

    def close(self) -> FileRecord:
        """Write the header, flush to the disk, and read everything back.

        The SHA-256 covers the header, which is written last, so it takes a pass over the file anyway. That
        pass also compares what the disk gives back with a running CRC-32C of what :meth:`write` was given.

        Raises
        ------
        ChecksumError
            The file does not hold what was written.
        QMoEError
            The disk is full, or fails.
        """
        header = json.dumps(self._entries, separators=(",", ":")).encode()
        header += b" " * (self.data_start - 8 - len(header))
        try:
            with os_errors(self.path):
                os.lseek(self._descriptor, 0, os.SEEK_SET)
                write_all(self._descriptor, struct.pack("<Q", len(header)) + header, self.path)
                os.fsync(self._descriptor)
                if hasattr(os, "posix_fadvise"):  # from the disk, not from the memory of what was written
                    os.posix_fadvise(self._descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            return self._read_back()
        finally:
            self.abort()

    def _read_back(self) -> FileRecord:
        digest, crc, position = hashlib.sha256(), 0, 0
        with os_errors(self.path):
            os.lseek(self._descriptor, 0, os.SEEK_SET)
            while piece := os.read(self._descriptor, self.data_start if position == 0 else CHUNK_BYTES):
                digest.update(piece)
                # A short first read would only leave header bytes to be counted as data, which fails loudly.
                crc = crc32c(piece, crc) if position else 0
                position += len(piece)
        if (position, crc) != (self.position, self._crc):
            raise ChecksumError(
                "the disk gives back something else than was written",
                file=self.path,
                value=f"{position} bytes, CRC-32C {crc:#010x}",
                expected=f"{self.position} bytes, CRC-32C {self._crc:#010x}",
            )
        return FileRecord(position, digest.hexdigest())

    def abort(self) -> None:
        """Close the file as it is; after :meth:`close` this does nothing."""
        if self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
