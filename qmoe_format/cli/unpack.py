"""``qmoe-unpack``."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from ..unpack import unpack
from .common import Command, ProgressBar, add_output_arguments, print_json
from .hdf5 import directory_input
from .published import run_export
from .text import size

_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="directory of a packed model, or HDF5 file")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), help="of the experts (default: their original one)"
    )
    parser.add_argument(
        "--format",
        choices=("safetensors", "qmoe"),
        default="safetensors",
        help="an ordinary checkpoint, or the layout of the authors of QMoE, which stays packed "
        "(default: %(default)s)",
    )
    parser.add_argument(
        "--force", action="store_true", help="replace OUT if it is such a checkpoint of this model"
    )
    add_output_arguments(parser)


def _run(options: argparse.Namespace) -> None:
    if options.format == "qmoe":
        run_export(options)
        return
    with (
        directory_input(options.source, Path(options.out).parent, quiet=options.quiet) as source,
        ProgressBar("unpacking", quiet=options.quiet) as progress,
    ):
        summary = unpack(
            source,
            options.out,
            dtype=_DTYPES.get(options.dtype),
            force=options.force,
            progress=progress,
        )
    if options.json:
        print_json(asdict(summary))
    else:
        files = "1 file" if summary.shards == 1 else f"{summary.shards} files"
        print(f"{options.out}: {summary.tensors} tensors of {summary.experts} experts and others, "
              f"{size(summary.bytes)} in {files}")  # fmt: skip


COMMAND = Command(
    "unpack",
    "Turn a packed model back into an ordinary safetensors checkpoint.",
    _add_arguments,
    _run,
    alone=True,
)
