"""The processes of one run: which there are, what they tell each other, and what is said when one is lost.

The transport is torch.distributed: gloo between hosts' memories, NCCL between GPUs. Processes are started by
``torchrun`` or whatever else sets ``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``. A run of one
process needs none of it, nor torch.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qmoe_codec.errors import ArgumentError, MissingPackageError, QMoEError

if TYPE_CHECKING:
    from torch import Tensor

JOIN_SECONDS = 300
PULSE_SECONDS = 1.0
LOST_SECONDS = 60.0
"""A rank that gave no sign of life for so long is taken to be lost while others wait for it."""
SETTLE_SECONDS = 8.0
"""How long a rank that fails waits to learn whether others did before it."""


class RankError(QMoEError):
    """The run has ended because of another rank.

    Attributes
    ----------
    quiet : bool
        Whether another rank reports it.
    """

    def __init__(self, message: str, *, exit_code: int = 1, quiet: bool = False) -> None:
        super().__init__(message)
        self.exit_code = exit_code  # type: ignore[misc]  # that of the rank that failed
        self.quiet = quiet


class RankInterrupt(KeyboardInterrupt):
    """The run was interrupted, and another rank reports it."""

    quiet = True


class Ranks:
    """One process by itself; :meth:`join` gives several, as their environment says. A context manager.

    Leaving the context by an error tells the other ranks, and waits for what they have to say: so that one of
    them, the first that lives, reports the cause.

    Attributes
    ----------
    rank, size : int
        This process's number, and how many there are.
    settled : bool
        Whether, after an error, all other ranks are known to have ended.
    """

    def __init__(self) -> None:
        self.rank, self.size, self.settled = 0, 1, True

    @staticmethod
    def join(device: str = "cpu", timeout: float = JOIN_SECONDS) -> Ranks:
        """The ranks that the environment says there are.

        Raises
        ------
        RankError
            Not all of them are there in time; it names them.
        MissingPackageError
            There are several, and torch is not installed.
        """
        size, rank = (_number(name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
        if size <= 1:
            return Ranks()
        if rank >= size:
            raise ArgumentError("illegal", field="RANK", value=rank, expected=f"less than WORLD_SIZE, {size}")
        return _DistributedRanks(rank, size, device, timeout)

    def gather(self, value: Any) -> list[Any]:
        """What each rank has given, a JSON value, by rank; on all of them."""
        return [value]

    def exchange(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        """Rows for each rank, and those from each: all of one dtype and width.

        Parameters
        ----------
        parts : sequence of Tensor [n, columns]
            By rank.
        rows : sequence of int
            How many rows come from each.
        """
        return list(parts)

    def check_alike(self, values: Mapping[str, object]) -> None:
        """Refuse to go on unless all ranks have given the same.

        Raises
        ------
        ArgumentError
            On all ranks alike: the first rank that differs from rank 0, and what differs.
        """
        own = json.loads(json.dumps(dict(values), default=str))
        first, *others = map(_flat, self.gather(own))
        for rank, other in enumerate(others, 1):
            for name in sorted(first.keys() | other.keys()):
                if first.get(name) != other.get(name):
                    raise ArgumentError(
                        f"rank {rank} differs from rank 0",
                        field=name,
                        value=_short(other.get(name)),
                        expected=_short(first.get(name)),
                    )

    def share(self, count: int, rank: int | None = None) -> range:
        """A rank's part of `count` things in order; by default this one's."""
        rank = self.rank if rank is None else rank
        return range(count * rank // self.size, count * (rank + 1) // self.size)

    def assign(self, costs: Sequence[float]) -> list[list[int]]:
        """Spread things over the ranks, the most costly first, each to the rank with the least so far.

        Returns
        -------
        list of list of int
            By rank, indices in rising order; the same on all ranks.
        """
        loads = [0.0] * self.size
        parts: list[list[int]] = [[] for _ in range(self.size)]
        for index in sorted(range(len(costs)), key=lambda index: (-costs[index], index)):
            rank = min(range(self.size), key=lambda rank: (loads[rank], rank))
            loads[rank] += costs[index]
            parts[rank].append(index)
        return [sorted(part) for part in parts]

    def end(self, error: BaseException) -> BaseException:
        """Tell the other ranks of an error; gives what to raise."""
        return error

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Like the context itself, for use within it: errors are settled here already."""
        try:
            yield
        except BaseException as error:
            ended = self.end(error)
            if ended is error:
                raise
            raise ended from None

    def close(self) -> None:
        """Let go of the others, when all is done."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.close()
            return
        ended = self.end(error)
        if ended is not error:
            raise ended from None


class _LostError(RuntimeError):
    """A rank does not answer."""


class _DistributedRanks(Ranks):
    def __init__(self, rank: int, size: int, device: str, timeout: float) -> None:
        super().__init__()
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "FATAL")  # its warnings when others end
        try:
            import torch.distributed as dist
        except ModuleNotFoundError:
            raise MissingPackageError("torch is not installed: pip install 'qmoe-format[torch]'") from None
        self.rank, self.size = rank, size
        self._dist: Any = dist
        self._ended = False
        self._device = "cpu"
        if device == "cuda":
            import torch

            self._device = f"cuda:{_number('LOCAL_RANK', 0)}"
            torch.cuda.set_device(self._device)
        self._store = self._connect(timeout)
        self._hosts = self._sign_in(timeout)
        from datetime import timedelta

        self._dist.init_process_group(
            "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo",
            store=self._dist.PrefixStore("group", self._store),
            rank=rank,
            world_size=size,
            timeout=timedelta(days=365),  # who waits for long is told of lost ranks by their pulse
        )
        self._stop = threading.Event()
        self._pulse = threading.Thread(target=self._beat, name="pulse", daemon=True)
        self._pulse.start()

    # ---- joining --------------------------------------------------------------------------------------

    def _connect(self, timeout: float) -> Any:
        from datetime import timedelta

        address = os.environ.get("MASTER_ADDR", "")
        if not address:
            raise ArgumentError(
                "missing", field="MASTER_ADDR", expected="the host of rank 0, as torchrun sets it"
            )
        port = _number("MASTER_PORT", 0)
        agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        try:
            store = self._dist.TCPStore(
                address,
                port,
                self.size,
                is_master=self.rank == 0 and not agent,
                timeout=timedelta(seconds=timeout),
                wait_for_workers=False,
            )
        except RuntimeError as error:
            raise RankError(
                f"rank 0 cannot be reached at {address}:{port} within {timeout:g} s",
                quiet=False,
            ) from error
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return self._dist.PrefixStore(f"qmoe/{attempt}", store)

    def _sign_in(self, timeout: float) -> list[str]:
        try:
            return self._await_all(timeout)
        except RuntimeError as error:
            raise RankError("rank 0 has ended", quiet=True) from error

    def _await_all(self, timeout: float) -> list[str]:
        self._store.set(f"joined/{self.rank}", socket.gethostname())
        deadline = time.monotonic() + timeout
        missing = list(range(self.size))
        while True:
            missing = [rank for rank in missing if not self._store.check([f"joined/{rank}"])]
            if not missing:
                return [self._store.get(f"joined/{rank}").decode() for rank in range(self.size)]
            names = f"{'ranks' if len(missing) > 1 else 'rank'} {', '.join(map(str, missing))} of {self.size}"
            quiet = self.rank != min(set(range(self.size)) - set(missing))
            if time.monotonic() > deadline:
                raise RankError(f"{names} did not join within {timeout:g} s", quiet=quiet)
            try:
                time.sleep(0.1)
            except KeyboardInterrupt:  # perhaps by the launcher, since one has ended
                said = f"{names} had not joined"
                raise (RankInterrupt(said) if quiet else KeyboardInterrupt(said)) from None

    def _beat(self) -> None:
        count = 0
        with contextlib.suppress(RuntimeError):  # the store has ended, and with it the run
            while not self._stop.is_set():
                count += 1
                self._store.set(f"pulse/{self.rank}", str(count))
                self._stop.wait(PULSE_SECONDS)

    # ---- talking --------------------------------------------------------------------------------------

    def gather(self, value: Any) -> list[Any]:
        import torch

        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        counts = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        self._wait(self._dist.all_gather(counts, torch.tensor([len(data)]), async_op=True))
        longest = max(int(count) for count in counts)
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        found = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        self._wait(self._dist.all_gather(found, padded, async_op=True))
        return [
            json.loads(part[: int(count)].numpy().tobytes())
            for part, count in zip(found, counts, strict=True)
        ]

    def exchange(self, parts: Sequence[Tensor], rows: Sequence[int]) -> list[Tensor]:
        import torch

        columns, dtype = parts[0].shape[1], parts[0].dtype
        # As bytes: not every backend knows every dtype.
        sent = torch.cat(list(parts)).contiguous().view(torch.uint8).to(self._device)
        width = columns * dtype.itemsize
        found = torch.empty((sum(rows), width), dtype=torch.uint8, device=self._device)
        self._wait(
            self._dist.all_to_all_single(
                found.view(-1),
                sent.view(-1),
                [count * width for count in rows],
                [len(part) * width for part in parts],
                async_op=True,
            )
        )
        received = found.cpu().view(dtype).reshape(sum(rows), columns)
        return list(torch.split(received, list(rows)))

    def _wait(self, work: Any) -> None:
        """Wait in Python, so that signals are heard, and a rank whose host is gone is noticed."""
        pause, started, asked, looked = 1e-4, time.monotonic(), time.monotonic(), 0.0
        pulses: dict[int, tuple[bytes, float]] = {}
        while not work.is_completed():
            time.sleep(pause)
            pause = min(1.5 * pause, 0.005)
            now = time.monotonic()
            if now - asked > 0.3:
                asked = now
                if self._store.check(["ended"]):
                    raise _LostError("a rank has ended")
            if now - started > 5 and now - looked > 5:
                looked = now
                self._check_pulses(pulses, now)
        work.wait()

    def _check_pulses(self, pulses: dict[int, tuple[bytes, float]], now: float) -> None:
        for rank in range(self.size):
            pulse = self._pulse_of(rank)
            if rank not in pulses or pulses[rank][0] != pulse:
                pulses[rank] = (pulse, now)
            elif now - pulses[rank][1] > LOST_SECONDS:
                raise _LostError(f"no sign of life from rank {rank}")

    def _pulse_of(self, rank: int) -> bytes:
        key = f"pulse/{rank}"
        return bytes(self._store.get(key)) if self._store.check([key]) else b""

    # ---- ending ---------------------------------------------------------------------------------------

    def end(self, error: BaseException) -> BaseException:
        if self._ended:
            return error
        self._ended = True
        # The launcher ends those that are left when one has ended: that must not cut the report short.
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
        own = self._state_of(error)
        try:
            self._store.set(f"end/{self.rank}", json.dumps(own))
            self._store.set("ended", "")
            states, dead = self._roll_call(own["kind"])
            self._leave(states)
        except RuntimeError:
            # The store has gone, and with it who kept it: rank 0, or the launcher, who then ends all.
            states, dead = {}, [0] if self.rank else []
        self._stop.set()
        self.settled = len(states) + len(dead) + 1 >= self.size
        speaker = min({self.rank, *(rank for rank in range(self.size) if rank not in dead)})
        quiet = speaker != self.rank
        cause = self._cause(own, states, dead)
        if cause is None:
            if isinstance(error, KeyboardInterrupt):
                return RankInterrupt(*error.args) if quiet else error
            if not quiet or not isinstance(error, QMoEError):
                return error
            return RankError(error.message, exit_code=error.exit_code, quiet=True)
        return RankError(cause[0], exit_code=cause[1], quiet=quiet)

    @staticmethod
    def _state_of(error: BaseException) -> dict[str, Any]:
        if isinstance(error, QMoEError):
            return {"kind": "error", "text": str(error), "code": error.exit_code}
        if isinstance(error, OSError):
            return {"kind": "error", "text": str(error), "code": 1}
        if isinstance(error, KeyboardInterrupt):
            return {"kind": "interrupted", "text": str(error), "code": 130}
        kind = "lost" if isinstance(error, RuntimeError) and _is_of_transport(error) else "fault"
        return {"kind": kind, "text": f"{type(error).__name__}: {error}".splitlines()[0], "code": 1}

    def _roll_call(self, own: str) -> tuple[dict[int, dict[str, Any]], list[int]]:
        """What other ranks have ended with, and which are dead; those still at work are in neither."""
        states: dict[int, dict[str, Any]] = {}
        first = {rank: self._pulse_of(rank) for rank in range(self.size)}
        alive: set[int] = set()
        start = time.monotonic()
        while time.monotonic() - start < SETTLE_SECONDS:
            for rank in set(range(self.size)) - states.keys() - {self.rank}:
                if self._store.check([f"end/{rank}"]):
                    states[rank] = json.loads(self._store.get(f"end/{rank}"))
                elif self._pulse_of(rank) != first[rank]:
                    alive.add(rank)
            missing = set(range(self.size)) - states.keys() - {self.rank}
            if not missing or (own == "error" and time.monotonic() - start > 3 * PULSE_SECONDS):
                break
            # Those at work are told by the launcher, or find out when they want something of this rank.
            if missing <= alive and time.monotonic() - start > 3 * PULSE_SECONDS:
                break
            time.sleep(0.05)
        waited = time.monotonic() - start > 2.5 * PULSE_SECONDS
        missing = set(range(self.size)) - states.keys() - {self.rank}
        return states, sorted(missing - alive) if waited else []

    def _leave(self, others: Iterable[int]) -> None:
        """Rank 0, who may keep the store, goes last of those that have ended."""
        self._store.set(f"left/{self.rank}", "")
        start = time.monotonic()
        while self.rank == 0 and time.monotonic() - start < SETTLE_SECONDS:
            if all(self._store.check([f"left/{rank}"]) for rank in others):
                break
            time.sleep(0.02)

    def _cause(
        self, own: Mapping[str, Any], states: Mapping[int, Mapping[str, Any]], dead: Sequence[int]
    ) -> tuple[str, int] | None:
        """What to report, and the exit code; None where it is this rank's own error."""
        if own["kind"] in ("error", "fault"):
            return None
        for kind in ("error", "fault"):
            for rank in sorted(states):
                if states[rank]["kind"] == kind:
                    return f"rank {rank}: {states[rank]['text']}", int(states[rank]["code"])
        if dead:
            names = ", ".join(f"{rank} on {self._hosts[rank]}" for rank in dead)
            return f"{'ranks' if len(dead) > 1 else 'rank'} {names} died", 1
        if own["kind"] == "interrupted":
            return None
        if any(state["kind"] == "interrupted" for state in states.values()):
            return "interrupted", 130
        return f"a rank was lost: {own['text']}", 1

    def close(self) -> None:
        self.gather(None)
        self._stop.set()
        self._pulse.join()
        self._dist.destroy_process_group()


def _is_of_transport(error: BaseException) -> bool:
    """Whether an error says that another rank cannot be heard."""
    if isinstance(error, _LostError) or type(error).__name__.startswith("Dist"):
        return True
    return any(word in str(error) for word in ("gloo", "Gloo", "NCCL", "Connection", "connection", "Socket"))


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isascii() or not text.isdigit():
        raise ArgumentError("illegal", field=name, value=text, expected="a number, as torchrun sets it")
    return int(text)


def _flat(values: Mapping[str, Any]) -> dict[str, object]:
    """Values within values under names of their own."""
    found: dict[str, object] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= {f"{name}: {inner}": one for inner, one in _flat(value).items()}
        else:
            found[name] = value
    return found


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
