"""``qmoe-pack``."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING

from . import plot
from .calibration import (
    add_calibration_arguments,
    calibration_options,
    number,
    recipe_settings,
)
from .common import Command, ProgressBar, add_output_arguments, count, print_json, require
from .hdf5 import directory_output, run_conversion
from .published import run_import
from .report import check_report, draw_report, layer_table, write_report
from .text import duration, size, table

if TYPE_CHECKING:
    from qmoe_quantize import PackOptions, PackSummary, Plan
    from qmoe_quantize.ranks import Ranks


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
        choices=("nearest", "qmoe", "rd"),
        help="how weights become ternary: rounded to nearest; by the QMoE paper's recipe; or trading error "
        "against bits (default: rd with --calib, nearest without)",
    )
    parser.add_argument(
        "--levels",
        choices=("minmax", "lsq"),
        default="minmax",
        help="of nearest, a row's levels: its least and greatest weight, as in the QMoE paper, most being "
        "0; or those with the least squared error, in larger files (default: %(default)s)",
    )
    parser.add_argument(
        "--level-format",
        choices=("bfloat16", "float16", "float32", "e4m4"),
        help="how levels are stored (default: e4m4 with --calib, bfloat16 without)",
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
        help="predict size, memory and, with --calib, time, from config.json or the weights; write nothing",
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
    _add_recipe_arguments(parser)
    add_calibration_arguments(parser, stores=True)
    add_output_arguments(parser)
    many = parser.add_argument_group("many machines, with --dry-run and --calib").add_argument
    many("--nodes", type=count, metavar="M", help="predict for so many machines")
    many("--gpus", type=count, metavar="N", help="with so many processes each (default: 1)")
    many(
        "--link-gbits",
        type=number,
        default=100.0,
        metavar="X",
        help="what a machine can send to the others, in Gbit/s (default: %(default)s)",
    )
    parser.add_argument(
        "--join-timeout",
        type=count,
        default=300,
        metavar="S",
        help="under torchrun: seconds to wait for all processes (default: %(default)s)",
    )
    parser.set_defaults(default_of=parser.get_default)


def _add_recipe_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("recipe, with --calib").add_argument
    add(
        "--lam", type=number, metavar="X", help="of rd: squared error of a layer's output that a bit is worth"
    )
    add(
        "--target-bpw",
        type=number,
        metavar="B",
        help="of rd, instead of --lam: bits per expert weight that the model shall take, everything counted",
    )
    add("--damp", type=number, metavar="X", help="share of the Hessian's mean diagonal added to it (0.1)")
    add(
        "--rules",
        action="append",
        metavar="RULE",
        help="REGEX:NAME=VALUE,… changes lam, damp, shrinkage or sweeps for tensors whose name it finds; the "
        "first that does decides; may be repeated; or a file .json of [[REGEX, {NAME: VALUE}], …]",
    )
    add(
        "--resume",
        action="store_true",
        help="go on with what an interrupted run with --calib has left, to the same bytes",
    )
    add("--report", metavar="FILE", help="write a line of JSON for each matrix")
    add("--plot", metavar="FILE", help="draw bits and error by layer and expert; .png, .svg or .pdf")


def _run(options: argparse.Namespace) -> None:
    from qmoe_quantize.ranks import Ranks

    with Ranks.join(options.device, options.join_timeout) as ranks:
        _run_as(options, ranks)


def _run_as(options: argparse.Namespace, ranks: Ranks) -> None:
    if ranks.size > 1:
        _refuse_ranks(options)
    if run_conversion(options):
        return
    with directory_output(options) as out:
        _pack(options, out, ranks)


def _refuse_ranks(options: argparse.Namespace) -> None:
    """What one process does by itself is not done by several."""
    from qmoe_quantize.published import is_published

    require(options.out is not None or options.dry_run, "missing", field="OUT", expected="a directory")
    alone = options.dry_run or is_published(options.source) or str(options.source).endswith((".h5", ".hdf5"))
    require(
        not alone and not str(options.out).endswith((".h5", ".hdf5")),
        "done by one process",
        field="WORLD_SIZE",
        expected="a checkpoint to be packed into a directory",
    )


def _pack(options: argparse.Namespace, out: str, ranks: Ranks) -> None:
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

    if options.plot:
        plot.check(options.plot)
    if options.report:
        check_report(options.report, force=options.force or options.resume)
    calibration = calibration_options(options)
    if calibration is None:
        for name in ("lam", "target_bpw", "damp", "rules"):
            require(getattr(options, name) is None, "goes with --calib", field=_flag(name), expected="both")
        require(not options.resume, "goes with --calib", field="--resume", expected="both")
    elif options.method == "qmoe":
        for name in ("lam", "target_bpw"):
            require(getattr(options, name) is None, "is of rd", field=_flag(name), expected="method rd")
    else:
        require(
            (options.lam is None) != (options.target_bpw is None),
            "one of both says how many bits to spend",
            field="--lam, --target-bpw",
            expected="one of them, with method rd",
        )
    settings = PackOptions(
        method=options.method or "",
        levels=options.levels,
        level_format=options.level_format or "",
        dense=options.dense,
        force=options.force,
        threads=options.threads,
        calibration=calibration,
        recipe=None if calibration is None else recipe_settings(options),
        target_bits=options.target_bpw,
        resume=options.resume,
    )
    machines = options.nodes is not None or options.gpus is not None
    require(options.dry_run or not machines, "only predicts", field="--nodes, --gpus", expected="--dry-run")
    if machines:
        _predict_many(options, settings)
        return
    if options.dry_run:
        plan = predict(options.source, settings)
        print_json(plan.to_json()) if options.json else print(_plan_text(plan))
        return
    start = time.monotonic()
    quiet = options.quiet or ranks.rank > 0
    with (
        ProgressBar("finding lambda", quiet=quiet, unit="expert") as searching,
        ProgressBar("packing", quiet=quiet) as progress,
    ):

        def packing(done: int, total: int) -> None:
            searching.close()
            progress(done, total)

        summary = pack(options.source, out, settings, progress=packing, searching=searching, ranks=ranks)
    if ranks.rank:
        return
    seconds = time.monotonic() - start
    if options.report:
        write_report(summary.matrices, options.report)
    if options.plot:
        draw_report(summary.matrices, options.plot)
    if options.json:
        print_json({**summary.to_json(), "seconds": seconds})
    else:
        print(_summary_text(options.out, summary, seconds))
        if calibration is not None:
            print(f"\n{layer_table(summary.matrices)}")


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


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


def _predict_many(options: argparse.Namespace, settings: PackOptions) -> None:
    from qmoe_quantize.spread import Machines, predict_spread

    require(options.link_gbits > 0, "illegal", field="--link-gbits", expected="more than 0")
    machines = Machines(options.nodes or 1, options.gpus or 1, options.link_gbits * 1e9 / 8)
    plan, spread = predict_spread(options.source, settings, machines)
    if options.json:
        print_json({**plan.to_json(), "many": spread.to_json()})
        return
    each = (
        f"{spread.ranks} ranks on {spread.nodes} machines: time about {duration(spread.seconds)}, of which "
        f"{duration(spread.search_seconds)} for finding lambda and {duration(spread.network_seconds)} for "
        f"sending {size(spread.sent_bytes)} between ranks; peak memory of each at most about "
        f"{size(spread.peak_memory_bytes)}; {size(spread.disk_bytes)} on the disk while it runs"
    )
    print(f"{_plan_text(plan)}\n\n{each}")


def _plan_text(plan: Plan) -> str:
    return "\n".join(
        [
            f"Prediction, nothing written: {plan.layers} layers, {plan.experts} experts, "
            f"{plan.weights:,} weights",
            "",
            _sizes(plan),
            "",
            f"{plan.source_bytes / plan.packed_bytes:.1f} times smaller; "
            + ("" if plan.sparsity is None else f"{plan.sparsity:.1%} of the weights zero; ")
            + f"peak memory at most about {size(plan.peak_memory_bytes)}"
            + ("" if plan.seconds is None else f"; time about {duration(plan.seconds)}"),
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
