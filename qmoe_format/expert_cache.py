"""Experts that stay on disk: a cache with a fixed number of slots, shared by all layers of a packed model.

A slot holds one expert's record (spec 6.1) as it lies in the file, read by one contiguous read. Which expert
leaves when another one comes is the policy's to say: least recently used, or least used of late.
"""

from __future__ import annotations

import heapq
import math
import mmap
import os
import re
import struct
import threading
import time
import weakref
from collections import OrderedDict
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol, Self

import numpy as np
from qmoe_codec import Matrix, crc32c
from qmoe_codec.errors import ArgumentError, ChecksumError, FileChangedError

from .container import RECORD_ALIGNMENT, STORE, LayerSpec, round_up
from .files import open_regular, os_errors
from .reader import PackedLayer, PackedModel
from .safetensors_io import SafetensorsFile, file_identity

Key = tuple[int, int]
"""An expert: number of its layer, and its own."""
Matrices = Mapping[str, Matrix]
Portion = tuple[list[int], list[Matrices]]
"""Positions among the experts that were asked for, and the matrices of each."""

_FRAME_HEADER_BYTES = 64
_BODY_CRC32C, _BODY_CRC32C_OFFSET = struct.Struct("<I"), 56
_UNITS = {"B": 1} | {
    prefix + ending: base ** (power + 1)
    for ending, base in (("B", 1000), ("iB", 1024))
    for power, prefix in enumerate("KMGT")
}


def parse_size(text: str) -> int:
    """Bytes that a text such as ``4GiB``, ``512 MB`` or ``1.5 GiB`` stands for (kB = 1000, KiB = 1024 bytes).

    Raises
    ------
    ArgumentError
        It is no such text.
    """
    match = re.fullmatch(r"\s*([0-9]{1,15}(?:\.[0-9]{1,15})?)\s*([kKMGT]?i?B)\s*", text, re.ASCII)
    unit = match and _UNITS.get(match[2].replace("k", "K"))
    if match is None or unit is None:
        raise ArgumentError("not a size", value=repr(text)[:40], expected="a number and a unit, such as 4GiB")
    return int(float(match[1]) * unit)


class Policy(Protocol):
    """The order in which experts leave; the cache calls it under its lock."""

    def used(self, key: Key) -> None:
        """An expert was asked for, whether it was there or not."""
        ...

    def entered(self, key: Key) -> None:
        """An expert came into a slot."""
        ...

    def left(self, key: Key) -> None:
        """An expert left its slot."""
        ...

    def victim(self, may_leave: Callable[[Key], bool]) -> Key | None:
        """The expert that leaves next among those that may, or None; :meth:`left` follows."""
        ...


class LeastRecentlyUsed:
    """The expert that was not used for the longest time leaves."""

    def __init__(self) -> None:
        self._order: OrderedDict[Key, None] = OrderedDict()

    def used(self, key: Key) -> None:
        """Put it last in the order, if it has a slot."""
        if key in self._order:
            self._order.move_to_end(key)

    def entered(self, key: Key) -> None:
        """Put it last in the order."""
        self._order[key] = None

    def left(self, key: Key) -> None:
        """Take it out of the order."""
        del self._order[key]

    def victim(self, may_leave: Callable[[Key], bool]) -> Key | None:
        """The first in the order that may leave."""
        return next((key for key in self._order if may_leave(key)), None)


class LeastFrequentlyUsed:
    """The expert that was used least leaves, where old uses count less and less.

    A use counts half as much after `half_life` later ones, of any expert; experts without a slot keep their
    count. This is LRFU of Lee et al., IEEE Transactions on Computers 50 (2001), with memory.

    Parameters
    ----------
    half_life : float
        In uses.
    """

    def __init__(self, half_life: float) -> None:
        self._half_life = half_life
        self._time = 0
        # log2 of the sum over the uses of 2^(time of use / half_life): so nothing has to be aged
        self._count: dict[Key, float] = {}
        # Counts only rise, so an entry of the heap may be too low: it is then put back where it belongs
        self._heap: list[tuple[float, int, Key]] = []
        self._entered: dict[Key, int] = {}  # the entry of the heap that counts
        self._serial = 0

    def used(self, key: Key) -> None:
        """Count a use."""
        self._time += 1
        now = self._time / self._half_life
        self._count[key] = now + math.log2(1 + 2 ** (self._count.get(key, -math.inf) - now))

    def entered(self, key: Key) -> None:
        """Let it compete."""
        # One that was fetched ahead and never used would else leave at once
        count = self._count.setdefault(key, self._time / self._half_life)
        self._serial += 1
        self._entered[key] = self._serial
        heapq.heappush(self._heap, (count, self._serial, key))

    def left(self, key: Key) -> None:
        """Forget its slot, not its count."""
        del self._entered[key]

    def victim(self, may_leave: Callable[[Key], bool]) -> Key | None:
        """The one with the least count that may leave."""
        passed: list[tuple[float, int, Key]] = []
        found: Key | None = None
        while self._heap and found is None:
            count, serial, key = heapq.heappop(self._heap)
            if self._entered.get(key) != serial:
                continue
            if count < self._count[key]:
                heapq.heappush(self._heap, (self._count[key], serial, key))
            elif may_leave(key):
                found = key
            else:
                passed.append((count, serial, key))
        for item in passed:
            heapq.heappush(self._heap, item)
        return found


POLICIES: dict[str, Callable[[int], Policy]] = {
    "lru": lambda slots: LeastRecentlyUsed(),
    # Half lives from half to 256 times the slots were tried on the routing of a trained model
    "lfu": lambda slots: LeastFrequentlyUsed(8.0 * slots),
}
"""By name; each is told the number of slots."""


class NextExperts:
    """Guesses a layer's experts by those of the layer before, from how often they followed each other.

    Parameters
    ----------
    experts : sequence of int
        Number of experts of each layer, in the order in which they are computed; the first follows the last.
    """

    def __init__(self, experts: Sequence[int]) -> None:
        # From each layer to the next: uses of an expert after an expert; never seen is not impossible
        self._follow = [
            np.full((count, following), 0.1, np.float32)
            for count, following in zip(experts, [*experts[1:], *experts[:1]], strict=True)
        ]
        self._before = threading.local()  # each thread has tokens of its own

    def saw(self, layer: int, experts: Sequence[int]) -> None:
        """Learn that these experts were used after those of this thread's call before."""
        before, past = getattr(self._before, "call", (-1, ()))
        if len(self._follow) > 1 and layer == (before + 1) % len(self._follow):
            self._follow[before][np.ix_(past, experts)] += 1
        self._before.call = (layer, experts)

    def guess(self, layer: int, experts: Sequence[int]) -> list[int]:
        """As many experts of the layer after `layer`, the likeliest first."""
        rows = self._follow[layer][experts]
        likelihood = np.log(rows / rows.sum(axis=1, keepdims=True)).sum(axis=0)
        guessed: list[int] = np.argsort(-likelihood, kind="stable")[: len(experts)].tolist()
        return guessed


@dataclass
class CacheStats:
    """What a cache did since it was made or :meth:`ExpertCache.reset_stats` was called.

    Attributes
    ----------
    slots, slot_bytes : int
        Number of slots, and the size of each.
    hits, misses : int
        Experts asked for that were in a slot, or on the way to one, and that were not.
    reads, read_bytes : int
        Records read, and their bytes.
    read_seconds : float
        Time of all reads and checks, whatever thread they ran on.
    stalls : int
    stall_seconds : float
        How often, and how long in all, a computation waited for experts.
    prefetched, prefetch_hits : int
        Records read because they were expected, and those of them that were then asked for.
    """

    slots: int
    slot_bytes: int
    hits: int = 0
    misses: int = 0
    reads: int = 0
    read_bytes: int = 0
    read_seconds: float = 0.0
    stalls: int = 0
    stall_seconds: float = 0.0
    prefetched: int = 0
    prefetch_hits: int = 0

    @property
    def hit_rate(self) -> float:
        """Share of the experts asked for that were there; NaN before the first."""
        asked = self.hits + self.misses
        return self.hits / asked if asked else math.nan

    def as_dict(self) -> dict[str, int | float]:
        """All of it, and `hit_rate`, for JSON."""
        return {**asdict(self), "hit_rate": self.hit_rate}

    def __repr__(self) -> str:
        text = (
            f"{self.slots} slots of {self.slot_bytes / 1e6:.3f} MB; {self.hits + self.misses} experts "
            f"asked for, {self.hit_rate:.1%} hits; {self.reads} reads, {self.read_bytes / 1e6:.1f} MB in "
            f"{self.read_seconds:.3f} s; {self.stalls} stalls, {self.stall_seconds:.3f} s"
        )
        if self.prefetched:
            text += f"; {self.prefetch_hits} of {self.prefetched} prefetched were used"
        return f"<CacheStats: {text}>"


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


class _Entry:
    """An expert in a slot, or on its way there; all but `ready` changes under the lock."""

    __slots__ = ("error", "key", "matrices", "pins", "prefetched", "ready", "slot", "taken")

    def __init__(self, key: Key, slot: int, prefetched: bool) -> None:
        self.key = key
        self.slot = slot
        self.prefetched = prefetched
        self.pins = 0
        self.taken = False  # by the thread that reads it
        self.matrices: Matrices | None = None
        self.error: BaseException | None = None
        self.ready = threading.Event()


class CachedLayer:
    """The experts of one layer in an :class:`ExpertCache`; :meth:`ExpertCache.layer` gives it.

    Attributes
    ----------
    spec : LayerSpec
    store_bytes : int
        Bytes of the layer's records in the file.
    cache : ExpertCache
    """

    def __init__(self, cache: ExpertCache, number: int, spec: LayerSpec, store_bytes: int) -> None:
        self.cache = cache
        self.spec = spec
        self.store_bytes = store_bytes
        self._number = number

    def lend(self, experts: Sequence[int]) -> Generator[Portion]:
        """Lend the matrices of several experts, in portions: first those that are there.

        Parameters
        ----------
        experts : sequence of int
            Distinct.

        Yields
        ------
        positions : list of int
            Which of `experts` the portion consists of, rising.
        matrices : list of dict of str to Matrix
            Theirs. They may be used until the next portion is asked for, or the generator closed.

        Raises
        ------
        FileChangedError
            The file is no longer the one that was opened.
        FormatError
            A record is not what the spec says; the message names shard, layer, expert and projection.
        """
        return self.cache._lend(self._number, experts)


class ExpertCache:
    """Slots for the experts of a packed model, filled as they are asked for. Threads may share it.

    Parameters
    ----------
    model : PackedModel
        May be closed afterwards.
    size : str or int
        Bytes for all slots together, such as ``"4GiB"``; or the number of slots, of one expert each.
    policy : str
        ``"lru"``: who was not used for longest leaves; ``"lfu"``: who was used least of late.
    verify : bool
        Whether the checksum of a body is checked each time that it is read, and its content the first time.
        Headers always are.
    page_cache : bool
        If False, the system is told not to keep what was read: memory then really stays what was allowed, but
        an expert that comes again is read from the disk again.
    prefetch : bool
        Also read the experts that are likely in the next layer, where a layer asks for half of its experts or
        fewer. It takes more reads in all: worth it where the disk would else be idle.
    readers : int
        Threads that read.

    Attributes
    ----------
    slots, slot_bytes : int
        A slot is as large as the largest record of the model. Parsed matrices, 1 kB each, come on top.

    Raises
    ------
    ArgumentError
        `size` or `policy` is nonsense, or there is not room for a single expert.
    FileChangedError
        A shard was changed since `model` was opened.
    """

    def __init__(
        self,
        model: PackedModel,
        size: str | int,
        *,
        policy: str = "lru",
        verify: bool = True,
        page_cache: bool = True,
        prefetch: bool = False,
        readers: int = 4,
    ) -> None:
        if policy not in POLICIES:
            raise ArgumentError(
                "no such policy", field="policy", value=repr(policy)[:40], expected=list(POLICIES)
            )
        self._verify = verify
        self._prefixes = {prefix: number for number, prefix in enumerate(model.layers)}
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
        largest = max((int(layer.index[:, 1].max()) for layer in self._layers), default=0)
        self.slot_bytes = round_up(max(largest, 1), RECORD_ALIGNMENT)
        self.slots = min(
            _slots(size, self.slot_bytes, model.path), sum(layer.experts for layer in self._layers)
        )
        # Pages of it take memory from their first use on
        private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        with os_errors("expert_cache"):
            self._memory = memoryview(mmap.mmap(-1, self.slots * self.slot_bytes, private))
        self._policy = POLICIES[policy](self.slots)
        self._next = NextExperts([layer.experts for layer in self._layers]) if prefetch else None
        self._free = list(range(self.slots - 1, -1, -1))
        self._entries: dict[Key, _Entry] = {}
        self._checked: dict[Key, list[tuple[int, bytes]]] = {}  # size and header of frames checked in full
        self._closed = False
        self._lock = threading.Lock()
        self._released = threading.Condition(self._lock)
        self._stats = CacheStats(self.slots, self.slot_bytes)
        self._readers = ThreadPoolExecutor(readers, "qmoe-reader")
        self._shutdown = weakref.finalize(self, self._readers.shutdown, wait=False, cancel_futures=True)

    def layer(self, prefix: str) -> CachedLayer:
        """The experts of a layer.

        Raises
        ------
        ArgumentError
            There is no such layer.
        """
        if prefix not in self._prefixes:
            raise ArgumentError("no such layer", value=repr(prefix), expected=list(self._prefixes))
        number = self._prefixes[prefix]
        layer = self._layers[number]
        return CachedLayer(self, number, layer.spec, len(layer.store))

    @property
    def stats(self) -> CacheStats:
        """A copy of the counts so far."""
        with self._lock:
            return replace(self._stats)

    def reset_stats(self) -> None:
        """Count from zero again; what is in the slots stays."""
        with self._lock:
            self._stats = CacheStats(self.slots, self.slot_bytes)

    def resident(self, prefix: str) -> list[int]:
        """The experts of a layer that are in slots, in rising order."""
        number = self._prefixes[prefix]
        with self._lock:
            return sorted(expert for layer, expert in self._entries if layer == number)

    def require(self, experts: int, place: object) -> None:
        """Refuse to work with fewer slots than the experts of one token.

        Raises
        ------
        ArgumentError
            There are fewer.
        """
        if experts > self.slots:
            raise ArgumentError(
                "too small for the experts of one token",
                file=place,
                field="expert_cache",
                value=f"{self.slots} slots of {self.slot_bytes} bytes",
                expected=f"at least {experts} slots, {experts * self.slot_bytes} bytes",
            )

    def close(self) -> None:
        """Stop the threads and close the files; no expert can be asked for any more."""
        self._closed = True
        self._shutdown()
        for file, _ in self._files:
            file.close()

    def __deepcopy__(self, memo: object) -> Self:
        """The cache itself: copies of a model share it."""
        return self

    def __reduce__(self) -> str:
        raise ArgumentError(
            "a model with an expert cache cannot be pickled", field="expert_cache", expected="load it again"
        )

    # ---- lending ------------------------------------------------------------------------------------------

    def _lend(self, layer: int, experts: Sequence[int]) -> Generator[Portion]:
        if self._closed:
            raise ArgumentError("closed", field="expert_cache", expected="a model that is loaded again")
        portion_limit = max(1, self.slots // 2)  # so that a portion can be read while another one is computed
        held: list[_Entry] = []
        waiting: list[tuple[int, _Entry]] = []
        try:
            with self._lock:
                there, missing = self._split(layer, experts, held, waiting)
                missing = self._reserve(layer, experts, missing, portion_limit, held, waiting)
            # With nothing to compute meanwhile, the first is read by this thread
            self._start(waiting if there else waiting[1:])
            if self._next is not None:
                self._prefetch(self._next, layer, experts)
            if there:
                yield [position for position, _ in there], [_matrices(entry) for _, entry in there]
                self._release(held, [entry for _, entry in there])
            while waiting or missing:
                if not waiting:  # all slots are lent to others; nothing is held here, so they can go on
                    with self._lock:
                        missing = self._reserve(layer, experts, missing, portion_limit, held, waiting)
                        if not waiting:
                            self._released.wait()
                            continue
                    self._start(waiting)
                portion, waiting = sorted(waiting, key=lambda item: item[0]), []
                self._wait([entry for _, entry in portion])
                if missing:
                    with self._lock:
                        missing = self._reserve(layer, experts, missing, portion_limit, held, waiting)
                    self._start(waiting)
                yield [position for position, _ in portion], [_matrices(entry) for _, entry in portion]
                self._release(held, [entry for _, entry in portion])
        finally:
            self._release(held, list(held))

    def _split(
        self, layer: int, experts: Sequence[int], held: list[_Entry], waiting: list[tuple[int, _Entry]]
    ) -> tuple[list[tuple[int, _Entry]], list[int]]:
        """Hold what is there; positions of the rest."""
        there: list[tuple[int, _Entry]] = []
        missing: list[int] = []
        for position, expert in enumerate(experts):
            key = (layer, expert)
            entry = self._entries.get(key)
            self._policy.used(key)
            if entry is None:
                missing.append(position)
                self._stats.misses += 1
                continue
            self._stats.hits += 1
            if entry.prefetched:
                entry.prefetched = False
                self._stats.prefetch_hits += 1
            self._hold(entry, held)
            (waiting if entry.matrices is None else there).append((position, entry))
        return there, missing

    def _reserve(
        self,
        layer: int,
        experts: Sequence[int],
        missing: list[int],
        limit: int,
        held: list[_Entry],
        waiting: list[tuple[int, _Entry]],
    ) -> list[int]:
        """Give slots to missing experts as far as there are some that nobody holds; the positions left."""
        for number, position in enumerate(missing):
            key = (layer, experts[position])
            entry = self._entries.get(key)  # it may have come since
            if entry is None:
                entry = self._enter(key, prefetched=False) if len(waiting) < limit else None
            if entry is None:
                return missing[number:]
            self._hold(entry, held)
            waiting.append((position, entry))
        return []

    def _enter(self, key: Key, *, prefetched: bool) -> _Entry | None:
        """A new entry for an expert, in a free slot or that of one that leaves; None if none can leave."""
        if not self._free:
            victim = self._policy.victim(self._may_leave)
            if victim is None:
                return None
            self._remove(self._entries[victim])
        entry = _Entry(key, self._free.pop(), prefetched)
        self._entries[key] = entry
        self._policy.entered(key)
        return entry

    def _may_leave(self, key: Key) -> bool:
        entry = self._entries[key]
        return entry.pins == 0 and entry.matrices is not None

    def _remove(self, entry: _Entry) -> None:
        del self._entries[entry.key]
        self._policy.left(entry.key)
        self._free.append(entry.slot)

    def _hold(self, entry: _Entry, held: list[_Entry]) -> None:
        entry.pins += 1
        held.append(entry)

    def _release(self, held: list[_Entry], entries: list[_Entry]) -> None:
        with self._lock:
            for entry in entries:
                entry.pins -= 1
                held.remove(entry)
            self._released.notify_all()

    def _prefetch(self, following: NextExperts, layer: int, experts: Sequence[int]) -> None:
        """Have the likely experts of the next layer read, as far as nothing that is held must leave."""
        if 2 * len(experts) > self._layers[layer].experts:
            return
        begun: list[tuple[int, _Entry]] = []
        with self._lock:
            following.saw(layer, experts)
            coming = (layer + 1) % len(self._layers)
            for expert in following.guess(layer, experts):
                if (coming, expert) not in self._entries:
                    entry = self._enter((coming, expert), prefetched=True)
                    if entry is None:
                        break
                    begun.append((expert, entry))
            self._stats.prefetched += len(begun)
        self._start(begun)

    # ---- reading ------------------------------------------------------------------------------------------

    def _start(self, entries: Sequence[tuple[int, _Entry]]) -> None:
        """Have the threads read what nobody reads yet."""
        for _, entry in entries:
            if not entry.taken:
                self._readers.submit(_read_if_alive, weakref.ref(self), entry)

    def _wait(self, entries: list[_Entry]) -> None:
        """Wait until all are there; what no thread has begun with is read here."""
        if all(entry.ready.is_set() for entry in entries):
            stalled = 0.0
        else:
            begun = time.perf_counter()
            for entry in entries:
                self._read(entry)
            for entry in entries:
                entry.ready.wait()
            stalled = time.perf_counter() - begun
        with self._lock:
            self._stats.stalls += stalled > 0
            self._stats.stall_seconds += stalled
        for entry in entries:
            if entry.error is not None:
                raise entry.error

    def _read(self, entry: _Entry) -> None:
        """Fill an entry's slot, unless another thread does."""
        with self._lock:
            if entry.taken:
                return
            entry.taken = True
        begun = time.perf_counter()
        matrices: Matrices | None = None
        size = 0
        try:
            matrices, size = self._fetch(entry)
        except BaseException as error:  # noqa: BLE001 - whatever it is, those who wait must be told
            entry.error = error
        with self._lock:
            entry.matrices = matrices
            if matrices is None:
                self._remove(entry)
            self._stats.reads += 1
            self._stats.read_bytes += size
            self._stats.read_seconds += time.perf_counter() - begun
            self._released.notify_all()
        entry.ready.set()

    def _fetch(self, entry: _Entry) -> tuple[Matrices, int]:
        """Read an expert into its slot and parse it there."""
        number, expert = entry.key
        layer, (file, start) = self._layers[number], self._files[number]
        offset, size, _ = layer.index[expert].tolist()
        place = entry.slot * self.slot_bytes
        record = self._memory[place : place + size]
        file.read_into(record, start + offset, layer.place(expert))
        known = self._checked.get(entry.key)
        matrices = known and self._parse_again(layer, expert, record, known)
        if not matrices:
            frames = layer.split_record(expert, record)
            matrices = layer.parse_frames(expert, frames, verify=self._verify)
            self._checked[entry.key] = [(len(frame), bytes(frame[:_FRAME_HEADER_BYTES])) for frame in frames]
        return matrices, size

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


def _matrices(entry: _Entry) -> Matrices:
    assert entry.matrices is not None  # it is ready, and held
    return entry.matrices


def _read_if_alive(cache: weakref.ref[ExpertCache], entry: _Entry) -> None:
    """What a reader does; it must not keep a cache alive that nobody has any more."""
    alive = cache()
    if alive is not None:
        alive._read(entry)


def _slots(size: str | int, slot_bytes: int, place: object) -> int:
    """Number of slots for a size, which is a number of experts or a text with a unit of bytes."""
    if isinstance(size, bool) or not isinstance(size, int | str):
        raise ArgumentError(
            "not a size", field="expert_cache", value=repr(size)[:40], expected="such as '4GiB', or experts"
        )
    try:
        slots = size if isinstance(size, int) else parse_size(size) // slot_bytes
    except ArgumentError as error:
        error.field = "expert_cache"
        raise
    if slots < 1:
        raise ArgumentError(
            "too small for a single expert",
            file=place,
            field="expert_cache",
            value=size,
            expected=f"at least 1, or {slot_bytes} bytes",
        )
    return slots
