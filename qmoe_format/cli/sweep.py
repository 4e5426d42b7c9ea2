"""``qmoe sweep``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from . import plot, sweep_plot
from .common import Command, add_output_arguments, count, print_json
from .eval import add_evaluation_arguments
from .text import table

if TYPE_CHECKING:
    from qmoe_quantize.sweep import Sweep


def _names(text: str) -> tuple[str, ...]:
    """Names with commas between, for argparse."""
    return tuple(dict.fromkeys(name.strip() for name in text.split(",")))


def _numbers(text: str) -> tuple[float, ...]:
    """Positive numbers with commas between, for argparse."""
    try:
        numbers = tuple(dict.fromkeys(float(number) for number in text.split(",")))
    except ValueError:
        numbers = ()
    if not numbers or not all(0 < number < math.inf for number in numbers):
        raise argparse.ArgumentTypeError(f"invalid value {text!r}, expected positive numbers, like 0.8,1")
    return numbers


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("model", metavar="MODEL", help="checkpoint, as qmoe-pack takes it")
    add("--calib", required=True, metavar="TEXT", help="calibration text: .txt, .jsonl, a folder, hf:NAME")
    add("--text", required=True, metavar="FILE", help="text to score, which is none of the calibration text")
    add(
        "--methods",
        type=_names,
        default=("nearest", "qmoe", "rd"),
        metavar="NAME,…",
        help="recipes (default: nearest,qmoe,rd)",
    )
    add(
        "--bits",
        type=_numbers,
        default=(0.7, 0.85, 1.0, 1.2),
        metavar="NUMBER,…",
        help="bits per expert weight on the disk, for rd (default: 0.7,0.85,1,1.2)",
    )
    add("--nsamples", type=count, default=128, metavar="N", help="calibration windows (default: %(default)s)")
    add("--seqlen", type=count, metavar="N", help="their tokens (default: 2048, or the model's positions)")
    add("--seed", type=int, default=0, metavar="N", help="which windows are chosen (default: %(default)s)")
    add(
        "--calib-range",
        default="0:0.95",
        metavar="START:STOP",
        help="part of the calibration text that may be used, as shares of it (default: %(default)s)",
    )
    add("--experts-per-batch", type=count, default=16, metavar="N", help="experts in memory at once (16)")
    add_evaluation_arguments(parser)
    add(
        "--out",
        metavar="FILE.json",
        help="keep the points there, each as it is done; those that it has already are not made again",
    )
    add("--plot", metavar="FILE", help="draw the curve: .png, .svg or .pdf")
    add("--force", action="store_true", help="replace FILE.json if it is another sweep's")
    add_output_arguments(parser)


def _run(options: argparse.Namespace) -> None:
    from qmoe_quantize.evaluation import EvaluationOptions
    from qmoe_quantize.options import CalibrationOptions, HessianOptions, StreamOptions
    from qmoe_quantize.sweep import SweepOptions, sweep
    from qmoe_quantize.text import TextOptions

    if options.plot:
        plot.check(options.plot)
    text = TextOptions(
        options.calib,
        samples=options.nsamples,
        length=options.seqlen,
        part=options.calib_range,
        seed=options.seed,
    )
    settings = SweepOptions(
        calibration=CalibrationOptions(
            text=text,
            stream=StreamOptions(device=options.device),
            hessian=HessianOptions(experts_per_batch=options.experts_per_batch, seed=options.seed),
        ),
        evaluation=EvaluationOptions(
            options.text,
            part=options.text_range,
            window=options.window,
            windows=options.windows,
            device=options.device,
            dtype=options.dtype,
        ),
        methods=options.methods,
        bits=options.bits,
    )
    labels: list[str] = []
    with tqdm(
        total=1 + len(settings.points()), unit="model", leave=False, disable=True if options.quiet else None
    ) as bar:

        def told(label: str) -> None:
            bar.update(len(labels) and 1)
            bar.set_description(label)
            labels.append(label)

        result = sweep(options.model, settings, options.out, force=options.force, told=told)
    if options.plot:
        sweep_plot.draw_sweep(result, options.plot)
    print_json(report(result)) if options.json else print(_text(result))


def report(result: Sweep) -> dict[str, object]:
    """A sweep with what follows from it."""
    from qmoe_quantize.sweep import compare

    return {**result.to_json(), "rd_over_qmoe": compare(result)}


def _text(result: Sweep) -> str:
    from qmoe_quantize.sweep import compare

    original: Any = result.original
    rows: list[Sequence[str]] = [("original", "16", f"{original['bits_per_byte']:.4f}", "", "", "")]
    for point in sorted(result.points, key=lambda point: point.bits_per_weight):
        increase = point.bits_per_byte - original["bits_per_byte"]
        rows.append(
            (
                point.label,
                f"{point.bits_per_weight:.3f}",
                f"{point.bits_per_byte:.4f}",
                f"{increase:+.4f}",
                f"{point.sparsity:.1%}",
                f"{point.pack_seconds:.1f}",
            )
        )
    lines = [table(("", "bits/weight", "bits/byte", "increase", "zeros", "pack s"), rows)]
    ratios = compare(result)
    if ratios["bits_ratio"] is not None:
        lines.append(f"at the loss of qmoe, rd takes {ratios['bits_ratio']:.2f} times its bits")
    if ratios["increase_ratio"] is not None:
        lines.append(
            f"at the bits of qmoe, the loss rises {ratios['increase_ratio']:.2f} times as much with rd"
        )
    return "\n".join(lines)


COMMAND = Command(
    "sweep", "Draw the rate-loss curve of the recipes for one model.", _add_arguments, _run, alone=True
)
