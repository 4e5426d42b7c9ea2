"""What the commands do with HDF5 files: those whose name ends in ``.h5`` or ``.hdf5``."""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qmoe_codec.errors import ArgumentError, QMoEError

from ..container import MANIFEST
from ..files import os_errors
from .common import ProgressBar, print_json, refuse_options
from .text import size


def is_hdf5(path: str | None) -> bool:
    """Whether a path on the command line is an HDF5 file."""
    from ..hdf5 import is_hdf5_name

    return path is not None and is_hdf5_name(path) and not Path(path).is_dir()


def run_conversion(options: argparse.Namespace) -> bool:
    """``qmoe-pack`` between the two forms of a packed model; False where nothing is to be converted."""
    source, out = Path(options.source), options.out
    from_file = is_hdf5(options.source)
    if not from_file and not (is_hdf5(out) and (source / MANIFEST).exists()):
        return False
    if out is None or from_file == is_hdf5(out):
        raise ArgumentError(
            "a packed model is converted between a directory and an HDF5 file",
            field="OUT",
            value=out,
            expected="a directory" if from_file else "a file .h5",
        )
    refuse_options(
        options,
        {"source", "out", "force", "json", "quiet"},
        "a packed model, whose experts are ternary already",
    )
    from ..hdf5 import from_hdf5, to_hdf5

    with ProgressBar("converting", quiet=options.quiet) as progress:
        (from_hdf5 if from_file else to_hdf5)(source, out, force=options.force, progress=progress)
    path = Path(out)
    nbytes = sum(file.stat().st_size for file in (path.iterdir() if from_file else (path,)))
    if options.json:
        print_json({"out": str(out), "bytes": nbytes})
    else:
        form = "a directory" if from_file else "one HDF5 file"
        print(f"{out}: the same packed model as {form}, {size(nbytes)}")
    return True


@contextlib.contextmanager
def directory_output(options: argparse.Namespace) -> Iterator[str]:
    """Where to pack to: OUT, or, where that is an HDF5 file, a directory beside it that becomes the file.

    The directory is always called the same, so that ``--resume`` finds the finished layers of an interrupted
    run.
    """
    if options.out is None or options.dry_run or not is_hdf5(options.out):
        yield options.out
        return
    from ..hdf5 import check_output, to_hdf5

    check_output(options.out, force=options.force)
    directory = Path(f"{os.path.realpath(options.out)}.directory")
    yield str(directory)
    try:
        with ProgressBar("converting", quiet=options.quiet) as progress:
            to_hdf5(directory, options.out, force=options.force, progress=progress)
    except QMoEError as error:
        error.message += f"; the packed model is in {directory}"
        raise
    with os_errors(directory):
        shutil.rmtree(directory)


@contextlib.contextmanager
def directory_input(path: str, parent: str | os.PathLike[str], *, quiet: bool) -> Iterator[Path]:
    """A packed model as a directory: itself, or made of an HDF5 file for a while, somewhere in `parent`."""
    if not is_hdf5(path):
        yield Path(path)
        return
    from ..hdf5 import as_directory

    with (
        ProgressBar("converting", quiet=quiet) as progress,
        as_directory(path, parent, progress=progress) as directory,
    ):
        yield directory
