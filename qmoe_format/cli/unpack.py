"""``qmoe-unpack``."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from ..unpack import unpack
from .common import ByteProgress, Command, add_output_arguments, print_json
from .text import size

_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="directory of a packed model")
    parser.add_argument("out", metavar="OUT", help="directory to make")
    parser.add_argument(
        "--dtype", choices=tuple(_DTYPES), help="of the experts (default: their original one)"
    )
    parser.add_argument(
        "--force", action="store_true", help="replace OUT if it is such a checkpoint of this model"
    )
    add_output_arguments(parser)


def _run(options: argparse.Namespace) -> None:
    with ByteProgress("unpacking", quiet=options.quiet) as progress:
        summary = unpack(
            options.source,
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
    "unpack", "Turn a packed model back into an ordinary safetensors checkpoint.", _add_arguments, _run
)
