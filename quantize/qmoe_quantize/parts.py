"""Activations that lie in several files, one for each rank that made them, whoever reads them."""

from __future__ import annotations

import contextlib
import re
from bisect import bisect_right
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from qmoe_codec.errors import CheckpointError
from torch import Tensor

from .activations import Activations
from .ranks import Ranks


def part_path(folder: Path, name: str, part: int, count: int) -> Path:
    """The file of one of `count` parts."""
    return folder / f"{name}-{part:05d}-of-{count:05d}.h5"


def parts_of(folder: Path, name: str) -> list[Path]:
    """The files of all parts that are there, in order."""
    return sorted(folder.glob(f"{name}-*-of-*.h5"))


class PartReader:
    """Reads rows of ``hidden`` wherever they lie; a context manager.

    Parameters
    ----------
    folder : Path
    name : str
        What the files are called.
    bounds : callable
        For a number of parts, the first row of each, and the number of rows.
    ranks : Ranks
        If their files are not there, those that another number of ranks has left are read.
    """

    def __init__(self, folder: Path, name: str, bounds: Callable[[int], Sequence[int]], ranks: Ranks) -> None:
        count = ranks.size
        if not part_path(folder, name, ranks.rank, count).exists():
            files = parts_of(folder, name)
            match = re.search(r"-of-(\d+)\.h5$", files[0].name) if files else None
            if match is None:
                raise CheckpointError("activations are missing", file=folder, field=name)
            count = int(match[1])
        self._files = [part_path(folder, name, part, count) for part in range(count)]
        self._bounds = list(bounds(count))
        self._open: dict[int, Activations] = {}
        self._stack = contextlib.ExitStack()

    def read(self, start: int, stop: int) -> Tensor:
        """Rows [start, stop), all of which are in one part."""
        part = bisect_right(self._bounds, start) - 1
        if part not in self._open:
            self._open[part] = self._stack.enter_context(Activations(self._files[part], create=False))
        first = self._bounds[part]
        return self._open[part].read("hidden", start - first, stop - first)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.__exit__(kind, error, trace)
