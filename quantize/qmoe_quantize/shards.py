"""A layer's shard, written by one rank from the frames of all of them, and what the others need to be there.

Frames travel to the layer's owner in the order of the experts, and one process writes the file from start to
end: no file system has to put together what several hosts write to one file.
"""

from __future__ import annotations

import fcntl
import importlib.metadata
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from qmoe_codec import DictionarySet, join_dictionaries, parse_dictionaries
from qmoe_codec.errors import OutputExistsError, QMoEError

from qmoe_format.container import LayerSpec
from qmoe_format.files import MARKER
from qmoe_format.writer import WrittenLayer, write_experts

from .ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

EXCHANGE_BYTES = 1 << 24


@dataclass(frozen=True)
class EncodedExpert:
    """An expert's record, and what is said of its matrices.

    Attributes
    ----------
    number : int
    frames : list of bytes
        Of its matrices, in the order of the projections. Empty where they are on another rank.
    tokens : int
        That it was calibrated on, or -1.
    matrices : list of dict
        JSON values about each matrix.
    """

    number: int
    frames: list[bytes]
    tokens: int
    matrices: list[dict[str, Any]] = field(default_factory=list)


def versions(*, calibrated: bool) -> dict[str, str]:
    """What has to be the same on all ranks for the same bytes."""
    found = {"qmoe-format": importlib.metadata.version("qmoe-format")}
    if calibrated:
        import torch

        found |= {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
    return found


class Follower:
    """A rank's view of the directory that rank 0 makes; a context manager.

    While it is open, no other run takes the directory over, even if rank 0 has died.

    Parameters
    ----------
    ranks : Ranks
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._lock = -1

    def enter(self, folder: Path, mark: str) -> None:
        """Have access to the directory.

        Raises
        ------
        OutputExistsError
            It is not the one that rank 0 has made.
        """
        marker = folder / MARKER
        try:
            self._lock = os.open(marker, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
            fcntl.flock(self._lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            same = os.read(self._lock, 100).decode("ascii", "replace") == mark
        except OSError as error:
            raise QMoEError(
                error.strerror or str(error),
                file=folder,
                expected="the directory that rank 0 writes, on a file system that all ranks share",
            ) from error
        if not same or not os.access(folder, os.W_OK | os.X_OK):
            raise OutputExistsError(
                "cannot be written to" if same else "not the directory that rank 0 writes",
                file=folder,
                expected="a file system that all ranks share",
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock >= 0:
            os.close(self._lock)


class _Joined:
    """The dictionaries of all ranks."""

    def __init__(self, parts: Iterable[bytes]) -> None:
        self._frames = {identity: d for part in parts for identity, d in parse_dictionaries(part).items()}

    def to_bytes(self) -> bytes:
        return join_dictionaries(self._frames.values())


def write_together(
    ranks: Ranks,
    owner: int,
    path: Path,
    layer: LayerSpec,
    mine: Sequence[EncodedExpert],
    dictionaries: DictionarySet,
) -> tuple[WrittenLayer, list[EncodedExpert]]:
    """Write a layer whose experts are spread over the ranks; all of them call this.

    Parameters
    ----------
    ranks : Ranks
    owner : int
        The rank that writes.
    path : Path
    layer : LayerSpec
    mine : sequence of EncodedExpert
        Those of this rank, in order.
    dictionaries : DictionarySet
        Those of this rank's frames.

    Returns
    -------
    WrittenLayer
    list of EncodedExpert
        On rank 0 all experts of the layer, in order, without their frames.
    """
    listed = ranks.gather([[e.number, e.tokens, [len(frame) for frame in e.frames]] for e in mine])
    table = {
        number: (rank, tokens, sizes) for rank, part in enumerate(listed) for number, tokens, sizes in part
    }
    joined = _Joined(_send(ranks, owner, dictionaries.to_bytes()))
    incoming = _incoming(ranks, owner, {e.number: e.frames for e in mine}, table)
    written = None
    if ranks.rank == owner:
        written = asdict(write_experts(path, layer, incoming, joined))
    else:
        for _ in incoming:
            pass
    found = ranks.gather(written)[owner]
    reports = ranks.gather([[e.number, e.matrices] for e in mine])
    experts = []
    if ranks.rank == 0:
        by_number = {number: matrices for part in reports for number, matrices in part}
        experts = [EncodedExpert(n, [], table[n][1], by_number[n]) for n in sorted(table)]
    return WrittenLayer(**found), experts


def _send(ranks: Ranks, owner: int, data: bytes) -> list[bytes]:
    """Bytes from each rank to one of them; nothing on the others."""
    sizes = ranks.gather(len(data))
    received = _exchange(ranks, owner, data, sizes)
    return [part.numpy().tobytes() for part in received] if ranks.rank == owner else []


def _exchange(ranks: Ranks, owner: int, data: bytes, sizes: Sequence[int]) -> list[Tensor]:
    import torch

    own = torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
    nothing = torch.empty(0, 1, dtype=torch.uint8)
    parts = [own.reshape(-1, 1) if rank == owner else nothing for rank in range(ranks.size)]
    mine = ranks.rank == owner
    return ranks.exchange(parts, [size if mine else 0 for size in sizes])


def _incoming(
    ranks: Ranks,
    owner: int,
    mine: Mapping[int, Sequence[bytes]],
    table: Mapping[int, tuple[int, int, Sequence[int]]],
) -> Iterator[tuple[list[bytes], int]]:
    """Records of all experts in order, on the owner; frames and tokens of each."""
    for numbers in _rounds(table):
        sizes = [0] * ranks.size
        for number in numbers:
            rank, _, lengths = table[number]
            sizes[rank] += sum(lengths)
        data = b"".join(frame for number in numbers if number in mine for frame in mine[number])
        received = _exchange(ranks, owner, data, sizes)
        if ranks.rank != owner:
            continue
        places = [0] * ranks.size
        for number in numbers:
            rank, tokens, lengths = table[number]
            frames = []
            for length in lengths:
                start = places[rank]
                frames.append(received[rank][start : start + length].numpy().tobytes())
                places[rank] += length
            yield frames, tokens


def _rounds(table: Mapping[int, tuple[int, int, Sequence[int]]]) -> Iterator[list[int]]:
    """Neighbouring experts whose records are sent at once."""
    numbers: list[int] = []
    nbytes = 0
    for number in sorted(table):
        size = sum(table[number][2])
        if numbers and nbytes + size > EXCHANGE_BYTES:
            yield numbers
            numbers, nbytes = [], 0
        numbers.append(number)
        nbytes += size
    if numbers:
        yield numbers
