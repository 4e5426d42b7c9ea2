"""``qmoe-verify``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..verify import verify
from .common import Command, ProgressBar, add_output_arguments, print_json
from .hdf5 import is_hdf5
from .text import size


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("path", metavar="PATH", help="directory of a packed model, or HDF5 file")
    add_output_arguments(parser)


def _run(options: argparse.Namespace) -> None:
    with ProgressBar("verifying", quiet=options.quiet) as progress:
        if is_hdf5(options.path):
            from ..hdf5 import verify_hdf5

            report = verify_hdf5(options.path, progress=progress)
        else:
            report = verify(options.path, progress=progress)
    if options.json:
        print_json({"ok": True, **asdict(report)})
    else:
        print(
            f"{options.path}: sound: {report.files} files, {size(report.bytes)}; {report.layers} layers, "
            f"{report.experts} experts, {report.matrices} matrices, {report.weights:,} weights; "
            f"{report.dense_tensors} other tensors, {report.dense_frames} of them compressed"
        )


COMMAND = Command(
    "verify", "Check every byte of a packed model: structure, frames, checksums.", _add_arguments, _run
)
