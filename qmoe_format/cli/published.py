"""What ``qmoe-pack`` and ``qmoe-unpack`` do with checkpoints in the layout of QMoE's authors."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path

from qmoe_codec.errors import ArgumentError

from .common import ProgressBar, print_json, refuse_options
from .hdf5 import directory_input
from .text import size, table

# What means something for an import; the rest is about making weights ternary, which they are already.
_OPTIONS = {"source", "out", "keep_codes", "dense", "force", "json", "quiet"}


def run_import(options: argparse.Namespace, out: str | None) -> None:
    """``qmoe-pack DIR_OF_QMOE_PT OUT``, which is written to the directory `out`."""
    refuse_options(options, _OPTIONS, "a published QMoE checkpoint, whose experts are ternary already")
    if out is None:
        raise ArgumentError("missing", field="OUT", expected="a directory")
    from qmoe_quantize.published.importer import import_published

    start = time.monotonic()
    with ProgressBar("importing", quiet=options.quiet) as progress:
        summary = import_published(
            options.source,
            out,
            keep_codes=options.keep_codes,
            dense=options.dense,
            force=options.force,
            progress=progress,
        )
    seconds = time.monotonic() - start
    numbers = summary.to_json()
    if options.json:
        print_json({**numbers, "seconds": seconds})
        return
    rows = [
        (
            "experts",
            size(summary.expert_source_bytes),
            size(summary.expert_packed_bytes),
            f"{summary.source_bits_per_weight:.3f}",
            f"{summary.bits_per_weight:.3f}",
        ),
        ("dense", size(summary.dense_source_bytes), size(summary.dense_packed_bytes), "", ""),
        ("all tensors", size(summary.source_bytes), size(summary.packed_bytes), "", ""),
    ]
    print(
        f"{options.out}: published QMoE checkpoint, {summary.layers} layers, {summary.experts} experts, "
        f"{summary.weights:,} weights, codewords {summary.codewords}, in {seconds:.1f} s\n"
    )
    print(table(("", "published", "packed", "bits/weight", "now"), rows))
    less = "less" if summary.expert_packed_bytes <= summary.expert_source_bytes else "more"
    share = abs(1 - summary.expert_packed_bytes / max(summary.expert_source_bytes, 1))
    print(f"\n{share:.1%} {less} for the experts; every ternary weight is the same, to the bit")


def run_export(options: argparse.Namespace) -> None:
    """``qmoe-unpack PACKED OUT --format qmoe``."""
    if options.dtype is not None:
        raise ArgumentError("does not apply to the layout of QMoE's authors", field="--dtype")
    from qmoe_quantize.published.exporter import export_published

    with (
        directory_input(options.source, Path(options.out).parent, quiet=options.quiet) as source,
        ProgressBar("exporting", quiet=options.quiet) as progress,
    ):
        summary = export_published(source, options.out, force=options.force, progress=progress)
    if options.json:
        print_json(asdict(summary))
        return
    kept = f", {summary.kept} with the codewords that they had" if summary.kept else ""
    print(
        f"{options.out}: as the authors of QMoE save it: {summary.layers} layers, {summary.experts} experts, "
        f"{summary.matrices} matrices{kept}, {size(summary.bytes)}"
    )
