"""A packed model as one HDF5 file, and back, without loss (spec/hdf5.md).

Every frame is a dataset of its own, contiguous and without filters, so that another program finds its bytes
by name and offset. What the directory has beside frames and tensors (JSON files, headers of shards, the
tokenizer) is kept as bytes: the directory comes back the same to the byte, and its SHA-256 sums prove it.

A file is not trusted: links that lead elsewhere, filters, other types or sizes than expected are refused, and
no more bytes are taken than the file has, whatever it claims. (The HDF5 library itself reads the structure.)
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from qmoe_codec import MEMORY_LIMIT
from qmoe_codec.errors import ArgumentError

from ..files import PartialDirectory, PartialFile, os_errors
from ..paths import refuse_overlap
from ..reader import open_model
from ..verify import VerifyReport
from ..writer import check_replaceable
from .layout import SUFFIXES, Meter, Progress, hdf5_errors, load_h5py
from .reading import Hdf5Model
from .writing import Hdf5Writer


def is_hdf5_name(path: str | os.PathLike[str]) -> bool:
    """Whether a path is meant as an HDF5 file, by its ending."""
    return Path(path).suffix.lower() in SUFFIXES


def to_hdf5(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write a packed model as one HDF5 file.

    It is read back before it gets its name, and compared with the SHA-256 sums of the model's manifest.

    Parameters
    ----------
    source : path
        Directory of a packed model.
    out : path
        A new file.
    force : bool
        Replace `out` if it is such a file.
    progress : callable, optional
        Called with the bytes done, and the bytes in all; each counts twice, as written and as read.

    Raises
    ------
    ArgumentError, OutputExistsError
        `out` lies in the source, or exists already.
    FormatError
        The packed model is damaged.
    MissingPackageError
        h5py is not installed.
    """
    h5py = load_h5py()
    refuse_overlap(source, out)
    with (
        open_model(source) as model,
        PartialFile(out, force=force, check_replaceable=_check_replaceable) as part,
    ):
        meter = Meter(progress, 2 * sum(record.nbytes for record in model.files.values()))
        with (
            hdf5_errors(part.path),
            h5py.File(
                part.path,
                "w",
                libver=("v110", "v110"),
                alignment_threshold=512,
                alignment_interval=256,
                locking=False,  # nobody else knows the name; and not every cluster has locks
            ) as file,
        ):
            Hdf5Writer(file, model, meter).run()
        with Hdf5Model(part.path) as written:
            written.hash_files(meter)
        part.commit()


def from_hdf5(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write the packed model in an HDF5 file as a directory, every file the same to the byte.

    Parameters
    ----------
    source : path
        A file that :func:`to_hdf5` wrote.
    out : path
        A new directory. It appears when it is complete.
    force : bool
        Replace `out` if it is a packed model.
    progress : callable, optional
        Called with the bytes written, and the bytes in all.

    Raises
    ------
    ArgumentError, OutputExistsError
        The file lies in `out`, or `out` exists already.
    FormatError
        The file is damaged, or something else.
    MissingPackageError
        h5py is not installed.
    """
    target, file = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if target == file or target in file.parents:
        raise ArgumentError(
            "the output is, or contains, the source", field="OUT", value=out, expected="another directory"
        )
    with Hdf5Model(source) as model:
        meter = Meter(progress, sum(record.nbytes for record in model.files.values()))
        directory = PartialDirectory(out, force=force, check_replaceable=check_replaceable)
        try:
            model.write_files(directory.path, meter)
            open_model(directory.path).close()
            directory.commit()
        finally:
            directory.discard()


def verify_hdf5(
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
    memory_limit: int = MEMORY_LIMIT,
) -> VerifyReport:
    """Check all of a packed model in an HDF5 file: structure, every frame, every checksum.

    Parameters
    ----------
    path : path
        A file that :func:`to_hdf5` wrote.
    progress : callable, optional
        Called with the bytes done, and the bytes in all.
    memory_limit : int
        Most bytes of one decompressed tensor.

    Returns
    -------
    VerifyReport
        In terms of the directory that the file stands for.

    Raises
    ------
    FormatError
        The first fault found.
    MemoryLimitError
        A tensor is larger than the limit.
    MissingPackageError
        h5py is not installed.
    """
    with Hdf5Model(path) as model:
        meter = Meter(progress, sum(record.nbytes for record in model.files.values()))
        frames = model.check_files(meter, memory_limit)
        layers = model.config.layers.values()
        return VerifyReport(
            files=len(model.files),
            bytes=sum(record.nbytes for record in model.files.values()),
            layers=len(layers),
            experts=sum(layer.experts for layer in layers),
            matrices=sum(layer.experts * len(layer.projections) for layer in layers),
            weights=sum(layer.experts * p.rows * p.columns for layer in layers for p in layer.projections),
            dense_tensors=sum(len(shard.dense) for shard in model.shards.values()),
            dense_frames=frames,
        )


@contextlib.contextmanager
def as_directory(
    source: str | os.PathLike[str], parent: str | os.PathLike[str], *, progress: Progress | None = None
) -> Iterator[Path]:
    """The packed model in an HDF5 file as a directory for a while, somewhere in the directory `parent`."""
    with os_errors(parent):
        folder = tempfile.TemporaryDirectory(prefix=".qmoe-", dir=parent)
    with folder as name:
        out = Path(name) / "model"
        from_hdf5(source, out, progress=progress)
        yield out


def check_output(out: str | os.PathLike[str], *, force: bool) -> None:
    """Refuse early what :func:`to_hdf5` would refuse at the end of long work: see its errors."""
    load_h5py()
    with PartialFile(out, force=force, check_replaceable=_check_replaceable):
        pass


def _check_replaceable(path: Path) -> None:
    """Refuse to replace a file that is none of ours."""
    Hdf5Model(path).close()


__all__ = [
    "as_directory",
    "check_output",
    "from_hdf5",
    "is_hdf5_name",
    "to_hdf5",
    "verify_hdf5",
]
