"""``qmoe-pack``."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from .common import Command, ProgressBar, add_output_arguments, count, print_json, require
from .hdf5 import directory_output, run_conversion
from .published import run_import
from .text import size, table

if TYPE_CHECKING:
    from qmoe_quantize import PackSummary, Plan


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        metavar="SRC",
        help="checkpoint directory, .safetensors file with config.json beside it, name of a hub model, "
        "or a directory as the authors of QMoE published theirs (noexp.pt, expNN.pt); "
        "or a packed model, to be converted between a directory and an HDF5 file",
    )
    parser.add_argument(
        "out",
        metavar="OUT",
        nargs="?",
        help="directory, or HDF5 file (.h5), to make; optional with --dry-run",
    )
    parser.add_argument(
        "--method",
        choices=("nearest",),
        default="nearest",
        help="how weights become ternary (default: %(default)s)",
    )
    parser.add_argument(
        "--levels",
        choices=("minmax", "lsq"),
        default="minmax",
        help="a row's levels: its least and greatest weight, as in the QMoE paper, so that most are 0; "
        "or those with the least squared error, in larger files (default: %(default)s)",
    )
    parser.add_argument(
        "--level-format",
        choices=("bfloat16", "float16", "float32", "e4m4"),
        default="bfloat16",
        help="how levels are stored (default: %(default)s)",
    )
    parser.add_argument(
        "--dense",
        choices=("copy", "zstd"),
        default="copy",
        help="other tensors: as they are, or compressed without loss (default: %(default)s)",
    )
    parser.add_argument("--force", action="store_true", help="replace OUT if it is a packed model")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="predict size and memory from config.json or the weights; write nothing",
    )
    parser.add_argument(
        "--threads",
        type=count,
        metavar="N",
        help="experts to ternarize at once (default: one per core, at most 4)",
    )
    parser.add_argument(
        "--keep-codes",
        action="store_true",
        help="of a checkpoint published by the authors of QMoE, keep the 16-bit codewords as they are",
    )
    add_output_arguments(parser)
    parser.set_defaults(default_of=parser.get_default)


def _run(options: argparse.Namespace) -> None:
    if run_conversion(options):
        return
    with directory_output(options) as out:
        _pack(options, out)


def _pack(options: argparse.Namespace, out: str) -> None:
    from qmoe_quantize.published import is_published

    if is_published(options.source):
        run_import(options, out)
        return
    require(
        not options.keep_codes, "not a published QMoE checkpoint", field="--keep-codes", expected="noexp.pt"
    )
    require(
        options.dry_run or options.out is not None,
        "missing",
        field="OUT",
        expected="a directory, or --dry-run",
    )
    from qmoe_quantize import PackOptions, pack, predict

    settings = PackOptions(
        method=options.method,
        levels=options.levels,
        level_format=options.level_format,
        dense=options.dense,
        force=options.force,
        threads=options.threads,
    )
    if options.dry_run:
        plan = predict(options.source, settings)
        print_json(plan.to_json()) if options.json else print(_plan_text(plan))
        return
    start = time.monotonic()
    with ProgressBar("packing", quiet=options.quiet) as progress:
        summary = pack(options.source, out, settings, progress=progress)
    seconds = time.monotonic() - start
    if options.json:
        print_json({**summary.to_json(), "seconds": seconds})
    else:
        print(_summary_text(options.out, summary, seconds))


def _sizes(numbers: Plan | PackSummary) -> str:
    rows = [
        (
            "experts",
            size(numbers.expert_source_bytes),
            size(numbers.expert_packed_bytes),
            f"{numbers.bits_per_weight:.3f}",
        ),
        ("dense", size(numbers.dense_source_bytes), size(numbers.dense_packed_bytes), ""),
        ("all tensors", size(numbers.source_bytes), size(numbers.packed_bytes), ""),
    ]
    return table(("", "source", "packed", "bits/weight"), rows)


def _plan_text(plan: Plan) -> str:
    return "\n".join(
        [
            f"Prediction, nothing written: {plan.layers} layers, {plan.experts} experts, "
            f"{plan.weights:,} weights",
            "",
            _sizes(plan),
            "",
            f"{plan.source_bytes / plan.packed_bytes:.1f} times smaller; "
            f"{plan.sparsity:.1%} of the weights zero; "
            f"peak memory at most about {size(plan.peak_memory_bytes)}",
            *(f"assumed: {assumption}" for assumption in plan.assumptions),
        ]
    )


def _summary_text(out: str, summary: PackSummary, seconds: float) -> str:
    numbers = summary.to_json()
    return "\n".join(
        [
            f"{out}: {summary.layers} layers, {summary.experts} experts, "
            f"{summary.weights:,} weights in {seconds:.1f} s",
            "",
            _sizes(summary),
            "",
            f"{numbers['ratio']:.1f} times smaller; {numbers['sparsity']:.1%} of the weights zero; "
            f"squared error {numbers['relative_error']:.3f} of the squared weights",
        ]
    )


COMMAND = Command("pack", "Pack a checkpoint: ternarize its experts and compress them.", _add_arguments, _run)
