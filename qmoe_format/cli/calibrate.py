"""``qmoe-calibrate``."""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np
from qmoe_codec.errors import ArgumentError

from . import plot
from .calibration import add_calibration_arguments, calibration_options
from .common import Command, ProgressBar, add_output_arguments, print_json
from .text import size, table

if TYPE_CHECKING:
    from qmoe_quantize.store import Store

FEW_TOKENS = 64
"""An expert that saw fewer is said to have seen too few; its Hessian leans on the whole layer's."""


def _add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "paths",
        metavar="PATH",
        nargs="+",
        help="MODEL OUT.h5: write a model's calibration; STORE.h5 with --inspect: look at one; "
        "STORE.h5 … OUT.h5 with --merge",
    )
    parser.add_argument(
        "--method",
        choices=("rd", "qmoe"),
        default="rd",
        help="recipe that it is for: in qmoe, as in the paper, every token counts alike (default: rd)",
    )
    parser.add_argument("--merge", action="store_true", help="merge stores of one model and different texts")
    parser.add_argument("--inspect", action="store_true", help="print how many tokens the experts saw")
    parser.add_argument(
        "--plot", metavar="FILE", help="with --inspect: also draw a histogram; .png, .svg or .pdf"
    )
    parser.add_argument("--force", action="store_true", help="replace OUT.h5")
    add_calibration_arguments(parser, stores=False)
    add_output_arguments(parser)


def _run(options: argparse.Namespace) -> None:
    if options.merge and options.inspect:
        raise ArgumentError("one at a time", field="--merge", expected="without --inspect")
    if options.plot:
        if not options.inspect:
            raise ArgumentError("goes with --inspect", field="--plot")
        plot.check(options.plot)
    if options.inspect:
        _inspect(options)
    elif options.merge:
        _merge(options)
    else:
        _calibrate(options)


def _calibrate(options: argparse.Namespace) -> None:
    if len(options.paths) != 2 or options.calib is None:
        raise ArgumentError("missing", field="MODEL OUT.h5 --calib", expected="all of them")
    source, out = options.paths
    if not out.endswith((".h5", ".hdf5")):
        raise ArgumentError(
            "not the name of a store", field="OUT", value=out, expected="a name ending in .h5"
        )
    from qmoe_quantize import SourceCheckpoint, expert_layers
    from qmoe_quantize.calibrated import calibrate

    chosen = calibration_options(options)
    assert chosen is not None
    if chosen.text is None:
        raise ArgumentError("a store is made from text", field="--calib", value=options.calib)
    checkpoint = SourceCheckpoint(source)
    layers = expert_layers(checkpoint.config, checkpoint.tensors)
    start = time.monotonic()
    with ProgressBar("calibrating", quiet=options.quiet, unit="expert") as progress:
        summary = calibrate(
            checkpoint,
            layers,
            chosen.weighted(options.method == "rd"),
            out,
            force=options.force,
            progress=progress,
        )
    seconds = time.monotonic() - start
    if options.json:
        print_json({**asdict(summary), "seconds": seconds})
    else:
        print(
            f"{out}: {summary.layers} layers, {summary.experts} experts, {summary.tokens:,} tokens in "
            f"{summary.windows} of {summary.available} windows, {seconds:.1f} s; "
            f"{summary.unseen} experts saw no token"
        )


def _merge(options: argparse.Namespace) -> None:
    from qmoe_quantize.store import merge

    *sources, out = options.paths
    merge(sources, out, force=options.force)
    if options.json:
        print_json({"out": out, "merged": len(sources)})
    else:
        print(f"{out}: {len(sources)} stores merged")


def _inspect(options: argparse.Namespace) -> None:
    from qmoe_quantize.store import Store

    if len(options.paths) != 1:
        raise ArgumentError("too many", field="PATH", value=len(options.paths), expected="one store")
    with Store(options.paths[0]) as store:
        counts = {prefix: store.tokens(prefix) for prefix in store.layers}
        if options.plot:
            _draw(counts, options.plot)
        if options.json:
            print_json(_json(store, counts))
        else:
            print(_text(store, counts))


def _json(store: Store, counts: dict[str, Any]) -> dict[str, object]:
    return {
        "model": store.provenance.model,
        "data": list(store.provenance.data),
        "settings": dict(store.provenance.settings),
        "layers": {
            prefix: {
                "calibration_tokens": store.calibration_tokens(prefix),
                "tokens": tokens.tolist(),
                "gate_weights": store.gate_weights(prefix).tolist(),
            }
            for prefix, tokens in counts.items()
        },
    }


def _text(store: Store, counts: dict[str, Any]) -> str:
    nbytes = store.path.stat().st_size
    rows, few = [], []
    for prefix, tokens in counts.items():
        rows.append(
            (
                plot.short(prefix),
                f"{store.calibration_tokens(prefix):,}",
                str(len(tokens)),
                f"{tokens.min():,}",
                f"{np.median(tokens):,.0f}",
                f"{tokens.max():,}",
                str(int((tokens == 0).sum())),
                str(int((tokens < FEW_TOKENS).sum())),
                f"{float(store.gate_weights(prefix).mean()):.3f}",
            )
        )
        few += [f"{prefix}.{e}: {tokens[e]}" for e in np.flatnonzero(tokens < FEW_TOKENS)]
    names = ("layer", "tokens", "experts", "least", "median", "most", "none", f"under {FEW_TOKENS}")
    settings = store.provenance.settings
    parts = [
        f"{store.path}: calibration of a model {store.provenance.model[:16]}, {size(nbytes)}; "
        f"{len(store.provenance.data)} text(s), gate weighting {settings.get('gate_weighting')}",
        "",
        table((*names, "mean gate"), rows),
    ]
    if few:
        shown = few[:20]
        more = [f"… and {len(few) - len(shown)} more"] if len(few) > len(shown) else []
        parts += ["", f"experts that saw fewer than {FEW_TOKENS} tokens:", *shown, *more]
    return "\n".join(parts)


def _draw(counts: dict[str, Any], file: str) -> None:
    """Histograms of the tokens that the experts of each layer saw."""
    columns = min(4, len(counts))
    rows = -(-len(counts) // columns)
    most = max(int(tokens.max()) for tokens in counts.values())
    top = np.log2(max(2, most)) + 1e-9
    edges = np.concatenate(([-0.5], np.linspace(0, top, 17)))  # those without a token stand by themselves
    with plot.save_figure(file, (3.1 * columns, 0.8 + 1.9 * rows)) as figure:
        figure.suptitle("Tokens that the experts saw", fontweight="bold", x=0.01, ha="left")
        grid = figure.subplots(rows, columns, squeeze=False, sharex=True)
        for place, (prefix, tokens) in enumerate(counts.items()):
            axes = grid[place // columns][place % columns]
            values = np.where(tokens > 0, np.log2(np.maximum(tokens, 1)), -0.25)
            axes.hist(values, edges, color="#5b9bd5", linewidth=0)
            axes.axvspan(-0.5, np.log2(FEW_TOKENS), color="#b3261e", alpha=0.08, linewidth=0)
            few = int((tokens < FEW_TOKENS).sum())
            axes.set_title(f"layer {plot.short(prefix)}" + (f": {few} under {FEW_TOKENS}" if few else ""))
            axes.yaxis.get_major_locator().set_params(integer=True)
        for place in range(len(counts), rows * columns):
            grid[place // columns][place % columns].set_axis_off()
        powers = range(0, int(top) + 1, max(1, int(top) // 4))
        for axes in grid[-1]:
            axes.set_xticks([-0.25, *(float(power) for power in powers if power)])
            axes.set_xticklabels(["0", *(f"{2**power:,}" for power in powers if power)])
            axes.set_xlabel("tokens")
        for line in grid:
            line[0].set_ylabel("experts")


COMMAND = Command(
    "calibrate", "Run text through a model and keep its experts' Hessians.", _add_arguments, _run, alone=True
)
