"""Which experts leave a cache when others come, and which are likely to be asked for next."""

from __future__ import annotations

import heapq
import math
import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np

Key = tuple[int, int]
"""An expert: number of its layer, and its own."""


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
