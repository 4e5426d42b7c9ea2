"""Slots of an expert cache in a GPU's memory, filled by copies beside the computation.

A record comes from the shard into pinned host memory (a cache of its own, large, or just to pass through), is
checked there, and is copied to its slot on a stream of its own. Events order the streams: what computes waits
for the copies of the experts that it is lent, and a copy waits for what was started with its slot before. The
host waits for neither.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from qmoe_codec.errors import ArgumentError, UnsupportedModelError
from qmoe_gpu_decode import ExpertProjection, LentExperts, torch_ops
from qmoe_gpu_decode.device import Device, cuda_device

from .eviction import Key
from .expert_cache import CachedLayer, ExpertCache
from .host_slots import Filled, HostSlots
from .reader import PackedModel
from .torch import check_index

READERS = 4
"""Threads that read and start copies; so many experts pass through pinned memory at once."""


class Event(Protocol):
    """A point in the work of a stream."""

    def synchronize(self) -> None:
        """Have the host wait for it."""


class Streams(Protocol):
    """The stream that copies, and those that compute: of a GPU, or a stand-in for tests.

    Attributes
    ----------
    kernels : Device
        Launches on the same device.
    place : torch.device
        Where its tensors are.
    """

    kernels: Device
    place: torch.device

    def allocate(self, size: int) -> torch.Tensor:
        """Bytes on the device, aligned to 256."""

    def pin(self, memory: memoryview) -> None:
        """Lock pages of the host in memory, so that copies from them need no help of the processor."""

    def unpin(self, memory: memoryview) -> None:
        """Undo it."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Any:
        """On the stream that copies: wait for these events, copy from the host; the event of its end."""

    def upload(self, array: NDArray[Any]) -> torch.Tensor:
        """Copy a few bytes on the stream that computes, in its order."""

    def current(self) -> int:
        """Which stream this thread computes on."""

    def wait(self, event: Any) -> None:
        """Have that stream wait for an event."""

    def record(self) -> Any:
        """The event of all that was started on that stream so far."""

    def refuse_capture(self, place: str) -> None:
        """Refuse to be captured in a graph, whose experts could not change."""


class CudaStreams:
    """:class:`Streams` of a CUDA device; `number` is the device's."""

    def __init__(self, number: int) -> None:
        self.kernels: Device = cuda_device(number)
        self.place = torch.device("cuda", number)
        self._copying = torch.cuda.Stream(self.place)  # type: ignore[no-untyped-call]

    def allocate(self, size: int) -> torch.Tensor:
        """See :class:`Streams`; the allocator aligns to 512."""
        memory = torch.empty(size, dtype=torch.uint8, device=self.place)
        # It may have belonged to something that is still computed with, and may again when this is given back
        self._copying.wait_stream(torch.cuda.current_stream(self.place))
        memory.record_stream(self._copying)
        return memory

    def pin(self, memory: memoryview) -> None:
        """See :class:`Streams`; torch's own pinned memory comes in powers of two."""
        with torch.cuda.device(self.place):
            address, portable = torch.frombuffer(memory, dtype=torch.uint8).data_ptr(), 1
            try:
                torch.cuda.check_error(_runtime().cudaHostRegister(address, len(memory), portable))
            except RuntimeError as error:
                raise UnsupportedModelError(
                    f"the host's memory cannot be pinned: {error}",
                    field="host_cache",
                    value=f"{len(memory)} bytes",
                    expected="as much as the system lets a process lock",
                ) from error

    def unpin(self, memory: memoryview) -> None:
        """See :class:`Streams`."""
        address = torch.frombuffer(memory, dtype=torch.uint8).data_ptr()
        torch.cuda.check_error(_runtime().cudaHostUnregister(address))

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Any]) -> Any:
        """See :class:`Streams`."""
        for event in after:
            self._copying.wait_event(event)
        with torch.cuda.stream(self._copying):
            target.copy_(source, non_blocking=True)
            return self._copying.record_event()

    def upload(self, array: NDArray[Any]) -> torch.Tensor:
        """See :class:`Streams`; torch keeps the pinned copy until it is over."""
        return torch.from_numpy(array).pin_memory().to(self.place, non_blocking=True)

    def current(self) -> int:
        """See :class:`Streams`."""
        return int(torch.cuda.current_stream(self.place).cuda_stream)

    def wait(self, event: Any) -> None:
        """See :class:`Streams`."""
        torch.cuda.current_stream(self.place).wait_event(event)

    def record(self) -> Any:
        """See :class:`Streams`."""
        return torch.cuda.current_stream(self.place).record_event()

    def refuse_capture(self, place: str) -> None:
        """See :class:`Streams`."""
        if torch.cuda.is_current_stream_capturing():
            raise UnsupportedModelError(
                "experts in an expert cache cannot be captured in a CUDA graph: which are there changes",
                file=place,
                expected="a model loaded without expert_cache",
            )


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


class _Slot:
    """What orders the uses of one slot."""

    __slots__ = ("copied", "uses", "waited")

    def __init__(self) -> None:
        self.copied: Any = None  # event of the last copy to it
        self.waited: set[int] = set()  # streams that have waited for that
        self.uses: dict[int, Any] = {}  # since that copy: event of the last use on each stream


class DeviceSlots:
    """:class:`qmoe_format.host_slots.Slots` in a GPU's memory.

    Parameters
    ----------
    host : ExpertCache
        In host memory, of the same model: where records come from. It is this object's from now on.
    layers : sequence of LentExperts
        In the model's order.
    streams : Streams
    count, slot_bytes : int
        Slots, and the size of each.

    Raises
    ------
    ArgumentError
        They do not fit the GPU's memory.
    UnsupportedModelError
        The memory of `host` cannot be pinned.
    """

    in_host_memory = False

    def __init__(
        self,
        host: ExpertCache,
        layers: Sequence[LentExperts],
        streams: Streams,
        count: int,
        slot_bytes: int,
    ) -> None:
        self._host = host
        self.place = str(streams.place)
        self.streams = streams
        self.layers = layers
        self._slot_bytes = slot_bytes
        assert isinstance(host.backing, HostSlots)
        streams.pin(host.backing.memory)
        # At the end of the process the system does that
        weakref.finalize(self, streams.unpin, host.backing.memory).atexit = False
        try:
            self._memory = streams.allocate(count * slot_bytes)
        except torch.OutOfMemoryError as error:
            raise ArgumentError(
                "more than the GPU's memory has left",
                field="expert_cache",
                value=f"{count} slots of {slot_bytes} bytes",
                expected="fewer",
            ) from error
        self._slots = [_Slot() for _ in range(count)]

    def fill(self, slot: int, key: Key) -> Filled:
        """Start the copy of an expert to its slot: see :class:`qmoe_format.host_slots.Slots`."""
        number, expert = key
        loan = self._host.lend(number, [expert])
        try:
            ((_, (found,)),) = [next(loan)]
            record: memoryview = found.record
            first = slot * self._slot_bytes
            target = self._memory[first : first + len(record)]
            state = self._slots[slot]
            lent = self.layers[number].describe(record, target.data_ptr())
            source = torch.frombuffer(record, dtype=torch.uint8)
            state.copied = copied = self.streams.copy(target, source, list(state.uses.values()))
            state.uses.clear()
            state.waited.clear()
        except BaseException:
            loan.close()
            raise

        def finish() -> None:
            with closing(loan):
                copied.synchronize()

        return Filled(lent, len(record), finish)

    def lend(self, slots: Sequence[int]) -> None:
        """Have the stream that computes wait for the copies to these, if it has not yet."""
        stream = self.streams.current()
        for state in [self._slots[slot] for slot in slots]:
            if stream not in state.waited:
                self.streams.wait(state.copied)
                state.waited.add(stream)

    def take_back(self, slots: Sequence[int]) -> None:
        """Note what is still to be computed with these."""
        stream, event = self.streams.current(), self.streams.record()
        for slot in slots:
            self._slots[slot].uses[stream] = event

    def close(self) -> None:
        """Close the cache in host memory."""
        self._host.close()


def gpu_cache(
    model: PackedModel,
    size: str | int,
    streams: Streams,
    *,
    host_cache: str | int | None = None,
    policy: str = "lru",
    verify: bool = True,
    page_cache: bool = True,
    prefetch: bool = False,
) -> ExpertCache:
    """A cache whose slots are in a GPU's memory.

    Parameters
    ----------
    model, size, policy, verify, page_cache, prefetch
        As for :class:`ExpertCache`.
    streams : Streams
        Such as ``CudaStreams(0)``.
    host_cache : str or int, optional
        Bytes of pinned host memory, or a number of experts, that stay there when they leave the GPU; default:
        what passes through at once.

    Returns
    -------
    ExpertCache
        Its attribute `host` is the cache in host memory, whose counts are those of the reads from the files.
    """
    host = ExpertCache(
        model,
        READERS if host_cache is None else host_cache,
        policy=policy,
        verify=verify,
        page_cache=page_cache,
        readers=READERS,
    )

    def slots(count: int, slot_bytes: int) -> DeviceSlots:
        layers = [
            LentExperts(
                [ExpertProjection(p.role, p.rows, p.columns) for p in layer.spec.projections],
                layer.dictionaries,
                streams.kernels,
            )
            for layer in (model.layer(prefix) for prefix in model.layers)
        ]
        return DeviceSlots(host, layers, streams, count, slot_bytes)

    cache = ExpertCache(model, size, policy=policy, prefetch=prefetch, readers=READERS, slots=slots)
    cache.host = host
    return cache


def compute(
    cached: CachedLayer,
    inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    activation: tuple[str, float, float],
    biases: Mapping[str, torch.Tensor],
) -> torch.Tensor:
    """Route tokens through the experts of a layer, in the portions in which they come to slots.

    The host has to know which experts are wanted, so it waits for the index, once.

    Parameters
    ----------
    cached : CachedLayer
        In a cache of :func:`gpu_cache`.
    inputs
        x [tokens, hidden], index and weights [tokens, choices], where the slots are.
    activation
        Its name and numbers, as ``torch.ops.qmoe.experts`` takes them.
    biases : mapping of str to Tensor
        By role: [experts, rows].

    Returns
    -------
    Tensor [tokens, hidden] of the dtype of x

    Raises
    ------
    ArgumentError
        The index names no expert.
    UnsupportedModelError
        A CUDA graph is being captured.
    """
    slots = cached.cache.backing
    assert isinstance(slots, DeviceSlots)
    x, index, weights = inputs
    streams, prefix, experts = slots.streams, cached.spec.prefix, cached.spec.experts
    streams.refuse_capture(prefix)
    chosen = index.cpu().numpy()
    check_index(chosen, experts, prefix)
    hit = np.unique(chosen)
    hit = hit[hit < experts]
    output: torch.Tensor | None = None
    with closing(cached.lend_slots(hit.tolist())) as portions:
        for positions, lent in portions:
            some_of = {}
            if biases:
                numbers = streams.upload(hit[positions])
                some_of = {role: bias[numbers].to(torch.float32) for role, bias in biases.items()}
            some = slots.layers[cached.number].some(lent, streams.upload, some_of)
            # Numbered anew; the kernels skip those of other portions, and of nobody
            renumbered = np.full(experts + 1, len(positions), np.int32)
            renumbered[hit[positions]] = np.arange(len(positions))
            new_index, number = streams.upload(renumbered[chosen]), torch_ops.register(some)
            if len(positions) == len(hit):
                whole: torch.Tensor = torch_ops.experts(number, x, new_index, weights, *activation)
                return whole
            part = torch_ops.experts(number, x.to(torch.float32), new_index, weights, *activation)
            output = part if output is None else output.add_(part)
    return torch.zeros_like(x) if output is None else output.to(x.dtype)
