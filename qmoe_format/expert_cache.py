"""Experts that stay on disk: a cache with a fixed number of slots, shared by all layers of a packed model.

A slot holds one expert's record (spec 6.1) as it lies in the file. What slots are, and how a record comes to
one, is that of :class:`Slots`: host memory and a read, or a GPU's memory and a copy. Which expert leaves when
another one comes is the policy's to say: least recently used, or least used of late.
"""

from __future__ import annotations

import math
import re
import threading
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

from qmoe_codec.errors import ArgumentError

from .container import RECORD_ALIGNMENT, LayerSpec, round_up
from .eviction import POLICIES, Key, NextExperts
from .host_slots import Filled, HostSlots, Matrices, Slots
from .reader import PackedModel

Portion = tuple[list[int], list[Matrices]]
"""Positions among the experts that were asked for, and the matrices of each."""

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
        Records that came to a slot, and their bytes: those of a GPU from the host, others from the file.
    read_seconds : float
        Time of all reads and checks, whatever thread they ran on; on a GPU, up to the start of the copy.
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


class _Entry:
    """An expert in a slot, or on its way there; all but `ready` changes under the lock."""

    __slots__ = ("error", "key", "lent", "pins", "prefetched", "ready", "slot", "taken")

    def __init__(self, key: Key, slot: int, prefetched: bool) -> None:
        self.key = key
        self.slot = slot
        self.prefetched = prefetched
        self.pins = 0
        self.taken = False  # by the thread that reads it
        self.lent: Any = None  # what the slot's users get
        self.error: BaseException | None = None
        self.ready = threading.Event()


class CachedLayer:
    """The experts of one layer in an :class:`ExpertCache`; :meth:`ExpertCache.layer` gives it.

    Attributes
    ----------
    spec : LayerSpec
    store_bytes : int
        Bytes of the layer's records in the file.
    number : int
        Of the layer.
    cache : ExpertCache
    """

    def __init__(self, cache: ExpertCache, number: int, spec: LayerSpec, store_bytes: int) -> None:
        self.cache = cache
        self.spec = spec
        self.store_bytes = store_bytes
        self.number = number

    def lend(self, experts: Sequence[int]) -> Generator[Portion]:
        """Lend the matrices of several experts in host memory, in portions: first those that are there.

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
        with closing(self.lend_slots(experts)) as portions:
            for positions, lent in portions:
                yield positions, [expert.matrices for expert in lent]

    def lend_slots(self, experts: Sequence[int]) -> Generator[tuple[list[int], list[Any]]]:
        """The same, of what the cache's :class:`Slots` lend."""
        return self.cache.lend(self.number, experts)


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
    slots : callable, optional
        Makes the :class:`Slots` of this number and size; default: host memory. `verify` and `page_cache` are
        then its own matter.

    Attributes
    ----------
    slots, slot_bytes : int
        A slot is as large as the largest record of the model. Parsed matrices, 1 kB each, come on top.
    backing : Slots
        The memory itself.
    host : ExpertCache or None
        Where a GPU's slots are filled from: a cache in host memory, whose counts are those of reads from the
        files.

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
        slots: Callable[[int, int], Slots] | None = None,
    ) -> None:
        if policy not in POLICIES:
            raise ArgumentError(
                "no such policy", field="policy", value=repr(policy)[:40], expected=list(POLICIES)
            )
        layers = [model.layer(prefix) for prefix in model.layers]
        self._prefixes = {layer.spec.prefix: number for number, layer in enumerate(layers)}
        self._layers = [(layer.spec, len(layer.store)) for layer in layers]
        largest = max((int(layer.index[:, 1].max()) for layer in layers), default=0)
        self.slot_bytes = round_up(max(largest, 1), RECORD_ALIGNMENT)
        self.slots = min(_slots(size, self.slot_bytes, model.path), sum(layer.experts for layer in layers))
        if slots is None:
            self.backing: Slots = HostSlots(
                model, self.slots, self.slot_bytes, verify=verify, page_cache=page_cache
            )
        else:
            self.backing = slots(self.slots, self.slot_bytes)
        self.host: ExpertCache | None = None
        self._policy = POLICIES[policy](self.slots)
        self._next = NextExperts([layer.experts for layer in layers]) if prefetch else None
        self._free = list(range(self.slots - 1, -1, -1))
        self._entries: dict[Key, _Entry] = {}
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
        return CachedLayer(self, number, *self._layers[number])

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
        with self._lock:
            self._closed = True
            self._shutdown()
            for entry in list(self._entries.values()):
                if not entry.taken:  # its reader is not coming any more
                    entry.taken, entry.error = True, _closed()
                    entry.ready.set()
            self._released.notify_all()
        self.backing.close()

    def __deepcopy__(self, memo: object) -> Self:
        """The cache itself: copies of a model share it."""
        return self

    def __reduce__(self) -> str:
        raise ArgumentError(
            "a model with an expert cache cannot be pickled", field="expert_cache", expected="load it again"
        )

    # ---- lending ------------------------------------------------------------------------------------------

    def lend(self, layer: int, experts: Sequence[int]) -> Generator[tuple[list[int], list[Any]]]:
        """See :meth:`CachedLayer.lend_slots`; `layer` is the number of one."""
        if self._closed:
            raise _closed()
        portion_limit = max(1, self.slots // 2)  # so that a portion can be read while another one is computed
        held: list[_Entry] = []
        waiting: list[tuple[int, _Entry]] = []
        try:
            with self._lock:
                there, missing = self._split(layer, experts, held, waiting)
                missing = self._reserve(layer, experts, missing, portion_limit, held, waiting)
            # With nothing to compute meanwhile, the first is read by this thread
            self._start(waiting if there or not self.backing.in_host_memory else waiting[1:])
            if self._next is not None:
                self._prefetch(self._next, layer, experts)
            if there:
                yield from self._portion(held, there)
            while waiting or missing:
                if not waiting:  # all slots are lent to others; nothing is held here, so they can go on
                    with self._lock:
                        if self._closed:
                            raise _closed()
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
                yield from self._portion(held, portion)
        finally:
            self._release(held, list(held))

    def _portion(
        self, held: list[_Entry], portion: list[tuple[int, _Entry]]
    ) -> Generator[tuple[list[int], list[Any]]]:
        """Lend what is there, until the next is asked for."""
        slots = [entry.slot for _, entry in portion]
        self.backing.lend(slots)
        try:
            yield [position for position, _ in portion], [entry.lent for _, entry in portion]
        finally:
            self.backing.take_back(slots)
            self._release(held, [entry for _, entry in portion])

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
            (waiting if entry.lent is None else there).append((position, entry))
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
        return entry.pins == 0 and entry.lent is not None

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
        if 2 * len(experts) > self._layers[layer][0].experts:
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
        try:
            for _, entry in entries:
                if not entry.taken:
                    self._readers.submit(_read_if_alive, weakref.ref(self), entry)
        except RuntimeError:  # no threads any more: the cache was closed, or the interpreter ends
            if not self.backing.in_host_memory:  # else who waits reads them
                raise _closed() from None

    def _wait(self, entries: list[_Entry]) -> None:
        """Wait until all are there; what no thread has begun with is read here."""
        if all(entry.ready.is_set() for entry in entries):
            stalled = 0.0
        else:
            begun = time.perf_counter()
            if self.backing.in_host_memory:
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
        filled: Filled | None = None
        try:
            filled = self.backing.fill(entry.slot, entry.key)
        except BaseException as error:  # noqa: BLE001 - whatever it is, those who wait must be told
            entry.error = error
        with self._lock:
            if filled is None:
                self._remove(entry)
            else:
                entry.lent = filled.lent
                self._stats.read_bytes += filled.size
            self._stats.reads += 1
            self._stats.read_seconds += time.perf_counter() - begun
            self._released.notify_all()
        entry.ready.set()
        if filled is not None and filled.finish is not None:
            filled.finish()


def _read_if_alive(cache: weakref.ref[ExpertCache], entry: _Entry) -> None:
    """What a reader does; it must not keep a cache alive that nobody has any more."""
    alive = cache()
    if alive is not None:
        alive._read(entry)


def _closed() -> ArgumentError:
    return ArgumentError("closed", field="expert_cache", expected="a model that is loaded again")


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
