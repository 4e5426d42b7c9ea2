"""Slots in a GPU's memory, without a GPU: the order of copies and uses, and the kernels on the host.

A stand-in for a GPU's streams runs what was asked of it late and in any order that its events allow.
"""

from __future__ import annotations

import ctypes
import gc
import random
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import packed_models
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from qmoe_codec.layout import FRAME_HEADER
from qmoe_gpu_decode.matrices import DESCRIPTOR
from test_expert_cache import EXPERTS, LAYERS, PREFIXES, packed_family, path, text_of  # noqa: F401
from test_gpu_host import HostDevice, device, pytestmark  # noqa: F401

import qmoe_format
import qmoe_format.transformers
from qmoe_format import ArgumentError, FileChangedError, UnsupportedModelError
from qmoe_format.device_slots import READERS, gpu_cache
from qmoe_format.expert_cache import ExpertCache
from qmoe_format.torch import QMoEExperts
from qmoe_format.transformers import CacheOptions, load


class NoKernels(HostDevice):
    """Takes tables and gives memory; launches nothing."""

    def __init__(self) -> None:
        super().__init__(Path())


class Event:
    def __init__(self, streams: LateStreams) -> None:
        self.streams = streams
        self.happened = False

    def synchronize(self) -> None:
        time.sleep(self.streams.delay)
        self.streams.run(lambda: self.happened)


@dataclass
class Stream:
    work: deque[Callable[[], bool]] = field(default_factory=deque)
    """Each says whether it could be done now."""


class LateStreams:
    """Streams whose work is done when somebody waits, in an order that a seed decides."""

    COPYING = -1

    def __init__(self, seed: int = 0, forgets: str = "") -> None:
        self.delay = 0.01 if forgets else 0.0  # so that nothing is in order by chance
        self.kernels = NoKernels()
        self.place = torch.device("cpu")
        self.streams: dict[int, Stream] = {}
        self.computing = 0
        self.forgets = forgets
        self.pinned: list[int] = []
        self.copies = 0
        self._random = random.Random(seed)
        self._lock = threading.RLock()

    def ask(self, stream: int, work: Callable[[], bool]) -> None:
        with self._lock:
            self.streams.setdefault(stream, Stream()).work.append(work)

    def step(self) -> bool:
        """Do one thing that can be done; False if there is none."""
        names = [name for name, stream in self.streams.items() if stream.work]
        self._random.shuffle(names)
        for name in names:
            if self.streams[name].work[0]():
                self.streams[name].work.popleft()
                return True
        return False

    def run(self, until: Callable[[], bool]) -> None:
        with self._lock:
            while not until():
                assert self.step(), "the streams wait for each other"

    def finish(self) -> None:
        self.run(lambda: not any(stream.work for stream in self.streams.values()))

    # ---- as the cache knows them ----

    def allocate(self, size: int) -> torch.Tensor:
        return torch.from_numpy(self.kernels.empty((size,), "uint8"))

    def pin(self, memory: memoryview) -> None:
        self.pinned.append(len(memory))

    def unpin(self, memory: memoryview) -> None:
        self.pinned.remove(len(memory))

    def _event(self, stream: int) -> Event:
        event = Event(self)

        def happen() -> bool:
            event.happened = True
            return True

        self.ask(stream, happen)
        return event

    def copy(self, target: torch.Tensor, source: torch.Tensor, after: Sequence[Event]) -> Event:
        with self._lock:
            self.copies += 1
            for event in after:
                if self.forgets != "uses":
                    self.ask(self.COPYING, lambda event=event: event.happened)  # type: ignore[misc]

            def move() -> bool:
                target.copy_(source)
                return True

            self.ask(self.COPYING, move)
            return self._event(self.COPYING)

    def upload(self, array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(self.kernels.upload(array))

    def current(self) -> int:
        return self.computing

    def wait(self, event: Event) -> None:
        if self.forgets != "copies":
            self.ask(self.computing, lambda: event.happened)

    def record(self) -> Event:
        return self._event(self.computing)

    def refuse_capture(self, place: str) -> None:
        pass


def read(descriptors: np.ndarray) -> list[bytes]:
    """The frames where the descriptors say that they are."""
    frames = []
    for found in descriptors.view(DESCRIPTOR):
        start = int(found["levels"]) - FRAME_HEADER.size
        end = int(found["codewords"]) + 4 * int(found["codewords_words"])
        frames.append(ctypes.string_at(start, end - start))
    return frames


def run_late(path: Path, requests: list[tuple[int, int, list[int], int]], **how: Any) -> list[bool]:  # noqa: F811
    """Ask for experts on several streams; whether each that was computed with was the one asked for."""
    streams = LateStreams(how.pop("seed", 0), how.pop("forgets", ""))
    found: list[bool] = []
    with qmoe_format.open(path) as model:
        cache = gpu_cache(model, how.pop("slots", 3), streams, **how)
        records = [
            [[bytes(f) for f in layer.frames(e)] for e in range(EXPERTS)]
            for layer in map(model.layer, PREFIXES)
        ]
        for stream, number, experts, steps in requests:
            streams.computing = stream
            with closing(cache.layer(PREFIXES[number]).lend_slots(experts)) as portions:
                for positions, lent in portions:
                    for position, expert in zip(positions, lent, strict=True):
                        wanted = records[number][experts[position]]

                        def use(expert: Any = expert, wanted: list[bytes] = wanted) -> bool:
                            found.append(read(expert.descriptors) == wanted)
                            return True

                        streams.ask(stream, use)
            with streams._lock:
                for _ in range(steps):
                    streams.step()
        streams.finish()
        assert len(found) == sum(len(experts) for _, _, experts, _ in requests)
        assert cache.host is not None
        if not how.get("prefetch"):  # else some may still be on their way
            assert cache.host.stats.reads <= cache.stats.reads == streams.copies
        cache.close()
    return found


requests = st.lists(
    st.tuples(
        st.integers(0, 1),
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), min_size=1, unique=True),
        st.integers(0, 6),
    ),
    max_size=12,
)


@given(
    sequence=requests,
    seed=st.integers(0, 2**32),
    slots=st.integers(1, 8),
    host_cache=st.sampled_from([None, 1, 9]),
    prefetch=st.booleans(),
)
def test_no_expert_is_used_before_it_is_there_nor_after_it_has_left(
    path: Path,  # noqa: F811
    sequence: list[tuple[int, int, list[int], int]],
    seed: int,
    slots: int,
    host_cache: int | None,
    prefetch: bool,
) -> None:
    options = {"slots": slots, "host_cache": host_cache, "prefetch": prefetch, "policy": "lfu"}
    assert all(run_late(path, sequence, seed=seed, **options))


@pytest.mark.parametrize("forgets", ["copies", "uses"])
def test_the_stand_in_finds_a_missing_wait(path: Path, forgets: str) -> None:  # noqa: F811
    sequence = [(0, number % LAYERS, [number % EXPERTS, (number + 2) % EXPERTS], 0) for number in range(12)]
    assert not all(
        found for seed in range(20) for found in run_late(path, sequence, seed=seed, forgets=forgets)
    )


def test_the_tier_in_host_memory(path: Path) -> None:  # noqa: F811
    """What has left the GPU comes back from there, not from the disk; it is pinned as long as it is there."""
    streams = LateStreams()
    with qmoe_format.open(path) as model:
        cache = gpu_cache(model, 2, streams, host_cache=EXPERTS)
    assert cache.host is not None
    assert streams.pinned == [EXPERTS * cache.slot_bytes]
    for _ in range(3):
        for expert in range(EXPERTS):
            with closing(cache.lend(0, [expert])) as portions:
                assert [positions for positions, _ in portions] == [[0]]
    streams.finish()
    assert (cache.stats.reads, cache.stats.hits) == (3 * EXPERTS, 0)
    assert (cache.host.stats.reads, cache.host.stats.hits) == (EXPERTS, 2 * EXPERTS)
    cache.close()
    del cache, portions
    deadline = time.monotonic() + 10
    while streams.pinned and time.monotonic() < deadline:  # a reader may still hold it
        gc.collect()
        time.sleep(0.01)
    assert streams.pinned == []


def test_more_than_the_memory_of_the_gpu_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    def allocate(size: int) -> torch.Tensor:
        raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")

    streams = LateStreams()
    monkeypatch.setattr(streams, "allocate", allocate)
    with (
        qmoe_format.open(path) as model,
        pytest.raises(ArgumentError, match=r"expert_cache: more than the GPU's memory.*5 slots of \d+ bytes"),
    ):
        gpu_cache(model, 5, streams)


# ---- with kernels, on the host -----------------------------------------------------------------------------


class HostStreams(LateStreams):
    """Everything at once, as the kernels on the host do."""

    def __init__(self, kernels: HostDevice) -> None:
        super().__init__()
        self.kernels = kernels  # type: ignore[assignment]

    def ask(self, stream: int, work: Callable[[], bool]) -> None:
        assert work()


@pytest.mark.parametrize("slots", [2, 3, 12])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_computes_what_experts_in_memory_compute(
    path: Path,  # noqa: F811
    device: HostDevice,  # noqa: F811
    slots: int,
    dtype: torch.dtype,
) -> None:
    silu = torch.nn.SiLU()
    generator = torch.Generator().manual_seed(slots)
    with qmoe_format.open(path) as model:
        whole = [QMoEExperts.from_packed(model.layer(prefix), silu) for prefix in PREFIXES]
        cache = gpu_cache(model, slots, HostStreams(device))
    cached = [QMoEExperts(module.layer, silu, cached=cache.layer(module.layer.prefix)) for module in whole]
    for number in (0, 1, 2, 0, 0):
        for tokens in (1, 9, 0):
            x = torch.randn(tokens, 24, generator=generator).to(dtype)
            index = torch.randint(EXPERTS + 1, (tokens, 2), generator=generator)
            weights = torch.rand(tokens, 2, generator=generator)
            with torch.no_grad():
                found, expected = (m[number](x, index, weights) for m in (cached, whole))
            assert found.dtype == dtype
            torch.testing.assert_close(
                found, expected, rtol=1e-4 if dtype == torch.float32 else 1e-2, atol=1e-4
            )
    nobody = torch.full((3, 2), EXPERTS)
    with torch.no_grad():
        assert not cached[0](torch.ones(3, 24), nobody, torch.ones(3, 2)).any()
        with pytest.raises(ArgumentError, match="no such expert"):
            cached[0](torch.ones(3, 24), nobody + 1, torch.ones(3, 2))
    cache.close()


@pytest.fixture
def on_kernels(device: HostDevice, monkeypatch: pytest.MonkeyPatch) -> HostDevice:  # noqa: F811
    """Has the loader put expert caches into a GPU's memory that is the host's."""

    def make(
        packed: Any, options: CacheOptions, place: object, config: object, *, verify: bool
    ) -> ExpertCache:
        assert options.expert_cache is not None
        return gpu_cache(
            packed, options.expert_cache, HostStreams(device), host_cache=options.host_cache, verify=verify
        )

    monkeypatch.setattr(qmoe_format.transformers, "make_cache", make)
    return device


@pytest.mark.parametrize("family", ["olmoe", "switch_transformers", "gpt_oss"])
def test_a_whole_model(tmp_path: Path, on_kernels: HostDevice, family: str) -> None:
    model_path = packed_family(tmp_path, family)
    expected = text_of(load(model_path))
    model: Any = load(model_path, expert_cache=3, host_cache=99)
    before = len(on_kernels.launches)
    assert text_of(model) == text_of(model) == expected
    assert "leave" in on_kernels.launches[before:]
    stats, host = model.expert_cache.stats, model.expert_cache.host.stats
    assert stats.reads > 3 and 0 < host.reads < stats.reads


def test_a_file_that_changes_is_refused(path: Path, tmp_path: Path, device: HostDevice) -> None:  # noqa: F811
    spoiled = tmp_path / "spoiled"
    packed_models.restore(spoiled, packed_models.contents(path))
    with qmoe_format.open(spoiled) as model:
        cache = gpu_cache(model, 1, HostStreams(device), host_cache=1)
        layer = model.layers[PREFIXES[0]]
        shard = spoiled / model.layer(PREFIXES[0]).shard
    module = QMoEExperts(layer, torch.nn.SiLU(), cached=cache.layer(layer.prefix))
    x, weights = torch.ones(1, 24), torch.ones(1, 1)
    with torch.no_grad():
        module(x, torch.tensor([[0]]), weights)
        with shard.open("ab") as stream:
            stream.write(b"more")
        module(x, torch.tensor([[0]]), weights)  # it is in its slot
        for _ in range(READERS + 2):  # more often than there are threads and slots
            with pytest.raises(FileChangedError, match="expert 1"):
                module(x, torch.tensor([[1]]), weights)


def test_another_device_than_that_of_the_cache_is_refused(path: Path, device: HostDevice) -> None:  # noqa: F811
    streams = HostStreams(device)
    streams.place = torch.device("cuda:1")
    with qmoe_format.open(path) as model:
        cache = gpu_cache(model, 2, streams)
    module = QMoEExperts(model.layers[PREFIXES[0]], torch.nn.SiLU(), cached=cache.layer(PREFIXES[0]))
    with torch.no_grad(), pytest.raises(UnsupportedModelError, match=r"elsewhere.*cpu.*expected cuda:1"):
        module(torch.ones(1, 24), torch.tensor([[0]]), torch.ones(1, 1))
