"""Tokens to the ranks that have their experts, and what the experts give back: dispatch and combine.

Every rank holds the activations of its own part of the text; every expert is on one rank. All ranks know all
of the routing, so each knows what it will get, and nothing is negotiated. What an expert gives for a token
travels by itself and is added where the token is, in the order of the experts: so a sum does not depend on
how many ranks there are.
"""

from __future__ import annotations

import itertools
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from qmoe_format.files import os_errors

from .activations import Activations
from .ranks import Ranks

EXCHANGE_BYTES = 1 << 24
"""What a rank sends at once, about."""


class Dispatch:
    """The tokens of one layer on their ways.

    Parameters
    ----------
    ranks : Ranks
    index : Tensor
        int32 [tokens, choices]: the experts of all tokens; the number of experts stands for nobody.
    owner : Tensor
        int64 [experts]: the rank of each.
    bounds : sequence of int
        First token of each rank's part of the text, and the number of tokens.
    columns : int
        Width of the experts' inputs and outputs.
    extra : Tensor
        int64: tokens whose inputs every rank gets.
    folder : Path
        Where results may lie until they are sent.

    Attributes
    ----------
    tokens : Tensor
        int64, rising: the tokens whose inputs this rank has.
    """

    def __init__(
        self,
        ranks: Ranks,
        index: Tensor,
        owner: Tensor,
        bounds: Sequence[int],
        columns: int,
        extra: Tensor,
        folder: Path,
    ) -> None:
        self._ranks, self._bounds, self._columns = ranks, list(bounds), columns
        self._index = index.long()
        self._experts = len(owner)
        self._owner = torch.cat((owner, owner.new_tensor([-1])))
        self._owners = self._owner[self._index]
        self._extra = torch.zeros(len(index), dtype=torch.bool)
        self._extra[extra] = True
        self.tokens = self._wanted(ranks.rank, 0, len(index)).nonzero().flatten()
        self._step = max(1, EXCHANGE_BYTES // (4 * columns * max(1, index.shape[1])))
        self._folder = folder
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (closed by combine)
        self._places = self._result_places()

    @property
    def own(self) -> tuple[int, int]:
        """The part of the text that this rank has: tokens [start, stop)."""
        return self._bounds[self._ranks.rank], self._bounds[self._ranks.rank + 1]

    def _wanted(self, rank: int, start: int, stop: int) -> Tensor:
        """Which of tokens [start, stop) a rank gets: bool."""
        return (self._owners[start:stop] == rank).any(dim=1) | self._extra[start:stop]

    def _pieces(self) -> Iterator[list[tuple[int, int]]]:
        """Steps of an exchange: for each rank a piece of its part, [start, stop), perhaps empty."""
        longest = max(stop - start for start, stop in itertools.pairwise(self._bounds))
        for offset in range(0, longest, self._step):
            yield [
                (min(start + offset, stop), min(start + offset + self._step, stop))
                for start, stop in itertools.pairwise(self._bounds)
            ]

    # ---- inputs ---------------------------------------------------------------------------------------

    def send_inputs(self, source: Activations, own: str, target: Activations, name: str) -> None:
        """Send rows of `own`, one for each token of this rank's part; `name` gets those of :attr:`tokens`."""
        rank, first = self._ranks.rank, self._bounds[self._ranks.rank]
        for pieces in self._pieces():
            start, stop = pieces[rank]
            rows = source.read(own, start - first, stop - first)
            parts = [rows[self._wanted(other, start, stop)] for other in range(self._ranks.size)]
            counts = [int(self._wanted(rank, *piece).sum()) for piece in pieces]
            for (begin, _), received in zip(pieces, self._ranks.exchange(parts, counts), strict=True):
                if len(received):
                    target.write(name, int(torch.searchsorted(self.tokens, begin)), received)

    # ---- outputs --------------------------------------------------------------------------------------

    def _pairs(self, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
        """Pairs of token and expert in tokens [start, stop), by expert, then token: both, and the owner."""
        experts = self._index[start:stop].flatten()
        order = torch.argsort(experts, stable=True)
        order = order[: int((experts < self._experts).sum())]
        experts = experts[order]
        return start + order // self._index.shape[1], experts, self._owner[experts]

    def _result_places(self) -> dict[int, tuple[Tensor, Tensor]]:
        """For each of this rank's experts its tokens, and the row of each in the file of results.

        The file is in the order in which it will be sent: by step, rank, expert, token.
        """
        found: dict[int, list[tuple[Tensor, int]]] = {}
        position = 0
        for pieces in self._pieces():
            for piece in pieces:
                tokens, experts, owners = self._pairs(*piece)
                mine = owners == self._ranks.rank
                hit, counts = torch.unique_consecutive(experts[mine], return_counts=True)
                for expert, part in zip(
                    hit.tolist(), torch.split(tokens[mine], counts.tolist()), strict=True
                ):
                    found.setdefault(expert, []).append((part, position))
                    position += len(part)
        places = {}
        for expert, parts in found.items():
            tokens = torch.cat([part for part, _ in parts])
            rows = torch.cat([torch.arange(at, at + len(part)) for part, at in parts])
            order = torch.argsort(tokens)
            places[expert] = tokens[order], rows[order]
        return places

    def put(self, expert: int, tokens: slice, values: Tensor) -> None:
        """Keep what an expert gives for some of its tokens, by their places among them: float32."""
        rows = self._places[expert][1][tokens]
        data: NDArray[np.float32] = values.detach().cpu().contiguous().numpy()
        # Neighbours go to the disk together
        cuts = ((rows[1:] != rows[:-1] + 1).nonzero().flatten() + 1).tolist()
        for start, stop in zip([0, *cuts], [*cuts, len(rows)], strict=True):
            with os_errors(self._folder):
                view = data[start:stop].data.cast("B")
                position = int(rows[start]) * 4 * self._columns
                while view.nbytes:
                    written = os.pwrite(self._file.fileno(), view, position)
                    view, position = view[written:], position + written

    def combine(self, target: Activations, name: str) -> None:
        """Bring all results to their tokens, and write the sums for this rank's part of the text."""
        rank, position = self._ranks.rank, 0
        first = self._bounds[rank]
        for pieces in self._pieces():
            counts = [int((self._pairs(*piece)[2] == rank).sum()) for piece in pieces]
            block = self._read(position, sum(counts))
            position += sum(counts)
            start, stop = pieces[rank]
            tokens, experts, owners = self._pairs(start, stop)
            expected = [int((owners == other).sum()) for other in range(self._ranks.size)]
            received = self._ranks.exchange(list(torch.split(block, counts)), expected)
            rows = torch.empty(len(tokens), self._columns)
            for other, part in enumerate(received):
                rows[owners == other] = part
            y = torch.zeros(stop - start, self._columns)
            _, ends = torch.unique_consecutive(experts, return_counts=True)
            for where, part in zip(
                torch.split(tokens, ends.tolist()), torch.split(rows, ends.tolist()), strict=True
            ):
                y.index_add_(0, where - start, part)
            target.write(name, start - first, y)
        self._file.close()

    def _read(self, row: int, count: int) -> Tensor:
        block = torch.empty(count, self._columns)
        view = block.numpy().data.cast("B") if count else memoryview(b"")
        position = row * 4 * self._columns
        with os_errors(self._folder):
            while view.nbytes:
                got = os.preadv(self._file.fileno(), [view], position)
                if not got:
                    raise OSError("a result is missing from the file that holds them")
                view, position = view[got:], position + got
        return block
