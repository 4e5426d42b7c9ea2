"""Records of experts in host memory: one contiguous read each from a shard, parsed where they lie."""

from __future__ import annotations

import mmap
import os
import struct
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from qmoe_codec import Matrix, crc32c
from qmoe_codec.errors import ChecksumError, FileChangedError

from .container import STORE
from .eviction import Key
from .files import open_regular, os_errors
from .reader import PackedLayer, PackedModel
from .safetensors_io import SafetensorsFile, file_identity

Matrices = Mapping[str, Matrix]

_FRAME_HEADER_BYTES = 64
_BODY_CRC32C, _BODY_CRC32C_OFFSET = struct.Struct("<I"), 56


class Filled(NamedTuple):
    """What comes of filling a slot."""

    lent: Any
    """What those who use the expert are lent."""
    size: int
    """Bytes that were moved."""
    finish: Callable[[], None] | None = None
    """To be called by who filled the slot, once the others know that it is filled."""


class Slots(Protocol):
    """Memory of a cache: some slots of one size, and the way that an expert's record comes to one.

    The cache sees to it that a slot is filled by one thread at a time, and by none while it is lent.
    """

    in_host_memory: bool
    """If so, :class:`HostExpert` are lent, and who computes with them may fill slots itself meanwhile."""
    place: str
    """The device that computes with what is lent."""

    def fill(self, slot: int, key: Key) -> Filled:
        """Bring an expert's record into a slot.

        Raises
        ------
        FileChangedError
            The file is no longer the one that was opened.
        FormatError
            The record is not what the spec says.
        """
        ...

    def lend(self, slots: Sequence[int]) -> None:
        """Say that this thread is about to compute with these."""
        ...

    def take_back(self, slots: Sequence[int]) -> None:
        """Say that this thread has started all that it computes with these."""
        ...

    def close(self) -> None:
        """Let go of files and memory."""
        ...


class RecordFile:
    """A shard, read record by record into memory that is given; the map of the reader is not used.

    Parameters
    ----------
    shard : SafetensorsFile
        As it was opened and checked: what is read later must come from the same file, unchanged.
    page_cache : bool
        If False, the system is told after each read that it need not keep what was read.

    Raises
    ------
    FileChangedError
        The file is another than the one that was checked.
    """

    def __init__(self, shard: SafetensorsFile, *, page_cache: bool = True) -> None:
        self.path = shard.path
        self._forget = not page_cache and hasattr(os, "posix_fadvise")
        self._identity = shard.identity
        self._descriptor = open_regular(self.path)
        self._close = weakref.finalize(self, os.close, self._descriptor)
        self._check(os.fstat(self._descriptor), self.path)

    def _check(self, status: os.stat_result, place: str | Path) -> None:
        identity = file_identity(status)
        if identity != self._identity:
            raise FileChangedError(
                "changed since it was opened",
                file=place,
                field="device, inode, bytes, time of change in ns",
                value=identity,
                expected=self._identity,
            )

    def read_into(self, memory: memoryview, offset: int, place: str) -> None:
        """Fill `memory` with the bytes of the file from `offset` on.

        Raises
        ------
        FileChangedError
            The file was changed, or cut short.
        """
        with os_errors(place):
            done = 0
            while done < len(memory):
                count = os.preadv(self._descriptor, [memory[done:]], offset + done)
                if not count:
                    break
                done += count
            # After the read, so that what was changed before and during it is seen alike
            self._check(os.fstat(self._descriptor), place)
            if self._forget:
                os.posix_fadvise(self._descriptor, offset, len(memory), os.POSIX_FADV_DONTNEED)
        if done < len(memory):  # cut short after it was looked at; the next look would show it
            raise FileChangedError("ends within the record", file=place, value=done, expected=len(memory))

    def close(self) -> None:
        """Close the file."""
        self._descriptor = -1  # a number that another file may get
        self._close()


class HostExpert(NamedTuple):
    """An expert in a slot of host memory."""

    record: memoryview
    matrices: Matrices


class HostSlots:
    """:class:`Slots` in host memory.

    Parameters
    ----------
    model : PackedModel
        May be closed afterwards.
    count, slot_bytes : int
        Slots, and the size of each: no record is larger.
    verify : bool
        Whether the checksum of a body is checked each time that it is read, and its content the first time.
    page_cache : bool
        See :class:`RecordFile`.
    """

    in_host_memory = True
    place = "cpu"

    def __init__(
        self, model: PackedModel, count: int, slot_bytes: int, *, verify: bool, page_cache: bool
    ) -> None:
        self._verify = verify
        self._slot_bytes = slot_bytes
        self._layers: list[PackedLayer] = []
        self._files: list[tuple[RecordFile, int]] = []  # of each layer, with the offset of its store
        files: dict[str, RecordFile] = {}
        for prefix in model.layers:
            layer = model.layer(prefix).detached()
            shard = model.shards[layer.shard]
            if layer.shard not in files:
                files[layer.shard] = RecordFile(shard, page_cache=page_cache)
            self._layers.append(layer)
            self._files.append((files[layer.shard], shard.tensors[prefix + STORE].start))
        with os_errors("expert_cache"):
            # Private; pages of it take memory from their first use on
            self.memory = memoryview(mmap.mmap(-1, count * slot_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
        self._checked: dict[Key, list[tuple[int, bytes]]] = {}  # size and header of frames checked in full

    def fill(self, slot: int, key: Key) -> Filled:
        """Read an expert into its slot and parse it there: see :class:`Slots`."""
        number, expert = key
        layer, (file, start) = self._layers[number], self._files[number]
        offset, size, _ = layer.index[expert].tolist()
        place = slot * self._slot_bytes
        record = self.memory[place : place + size]
        file.read_into(record, start + offset, layer.place(expert))
        known = self._checked.get(key)
        matrices = known and self._parse_again(layer, expert, record, known)
        if not matrices:
            frames = layer.split_record(expert, record)
            matrices = layer.parse_frames(expert, frames, verify=self._verify)
            self._checked[key] = [(len(frame), bytes(frame[:_FRAME_HEADER_BYTES])) for frame in frames]
        return Filled(HostExpert(record, matrices), size)

    def _parse_again(
        self, layer: PackedLayer, expert: int, record: memoryview, known: list[tuple[int, bytes]]
    ) -> Matrices | None:
        """Matrices of an expert that was here before, of which only the bodies' checksums are left to check.

        None if a header is not what it was: then everything is.
        """
        frames, position = [], 0
        for number, (size, header) in enumerate(known):
            frame = record[position : position + size]
            position += size
            if frame[:_FRAME_HEADER_BYTES] != header:
                return None
            (stored,) = _BODY_CRC32C.unpack_from(header, _BODY_CRC32C_OFFSET)
            if self._verify and crc32c(frame[_FRAME_HEADER_BYTES:]) != stored:
                raise ChecksumError(
                    "illegal",
                    file=layer.place(expert, number),
                    field="body_crc32c",
                    value=stored,
                    expected="CRC-32C of the body",
                )
            frames.append(frame)
        return layer.parse_frames(expert, frames, verify=False)

    def lend(self, slots: Sequence[int]) -> None:
        """Nothing: who computes on the host is done when it says so."""

    def take_back(self, slots: Sequence[int]) -> None:
        """Nothing, too."""

    def close(self) -> None:
        """Close the files."""
        for file, _ in self._files:
            file.close()
