"""Checkpoints in the layout in which the authors of QMoE published theirs.

The layout is described in :mod:`.layout`, the dictionary in :mod:`.dictionary`; :mod:`.importer` and
:mod:`.exporter` need torch, which reads and writes the files.
"""

import os
from pathlib import Path

DENSE, SIZES = "noexp.pt", "sizes.pt"


def is_published(source: str | os.PathLike[str]) -> bool:
    """Whether a path is a directory in the authors' layout, by the names of its files."""
    path = Path(source)
    return path.is_dir() and any((path / name).exists() for name in (DENSE, SIZES))


__all__ = ["DENSE", "SIZES", "is_published"]
