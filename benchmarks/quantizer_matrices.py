"""Every expert matrix: held-out error of the recipe `rd` over that of `qmoe`, at the bits that `qmoe` takes.

    python benchmarks/quantizer_matrices.py MODEL

MODEL reads bytes, as those of benchmarks/train_models.py do. Both recipes get the same level format and the
same Hessians, of windows from the first 95 % of Python's standard library. Bits are the entropy of each
row's trits; the error is the mean squared error in the layer's output over windows of the rest: over the
tokens that the router sends to the expert, or, where they are fewer than 32, over a sample of all the
layer's, run through the expert. `rd` runs at lambdas a third of a decade apart until the bits of `qmoe` lie
between two of them for every matrix; its error there is interpolated. A matrix in which it never takes so
many bits counts with the most that it takes.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import tempfile
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

import numpy as np
import torch
from demo_model import standard_library_text
from qmoe_quantize import CalibrationOptions, HessianOptions, SourceCheckpoint, TextOptions
from qmoe_quantize.allocation import typical_cost
from qmoe_quantize.calibrated import StoreTernarizer, calibrate, ternary_weight
from qmoe_quantize.pipeline import expert_layers
from qmoe_quantize.problem import MatrixGroup
from qmoe_quantize.recipes import RecipeSettings, ternarize_group
from qmoe_quantize.store import Store
from qmoe_quantize.sweep import environment
from qmoe_quantize.ternary import TernaryMatrix
from tqdm import tqdm

RESULTS = Path(__file__).resolve().parent / "results"
STEPS_PER_DECADE = 3
MOST_STEPS = 30
FEWEST_TOKENS = 32


def entropy_bits(matrix: TernaryMatrix) -> float:
    share = np.count_nonzero(matrix.trits, axis=1) / matrix.trits.shape[1]
    share = np.clip(share, 1e-9, 1 - 1e-9)
    row = -(1 - share) * np.log2(1 - share) - share * np.log2(share / 2)
    return float(row.mean())


def error(matrix: TernaryMatrix, group: MatrixGroup, expert: int) -> float:
    """Mean squared error in the layer's output over the tokens of `group`."""
    error = group.weight[expert] - ternary_weight(matrix)
    rows = ((error @ group.hessian[expert]) * error).sum(dim=-1)
    return float((group.row_weight[expert] * rows).double().sum())


def ratio(paper: TernaryMatrix, ours: list[TernaryMatrix], group: MatrixGroup, expert: int) -> float:
    """Error of `ours` at the bits of `paper`, over its."""
    points = sorted((entropy_bits(matrix), error(matrix, group, expert)) for matrix in ours)
    bits, errors = np.array(points).T
    ours_there = np.exp(np.interp(entropy_bits(paper), bits, np.log(errors.clip(1e-30))))
    return float(ours_there / error(paper, group, expert))


def around(
    group: MatrixGroup, paper: list[TernaryMatrix], settings: RecipeSettings
) -> list[list[TernaryMatrix]]:
    """For each matrix, runs of `rd` with more bits than the paper's recipe takes, and with fewer."""
    start = typical_cost([group])
    made: list[list[TernaryMatrix]] = [[] for _ in paper]
    wanted = [entropy_bits(matrix) for matrix in paper]
    for sign in (1, -1):
        open_experts = [e for e, runs in enumerate(made) if not runs or entropy_bits(runs[0]) < wanted[e]]
        for step in range(0 if sign > 0 else 1, MOST_STEPS):
            if not open_experts:
                break
            lam = start * 10.0 ** (sign * step / STEPS_PER_DECADE)
            part = ternarize_group(group.select(open_experts), replace(settings, lam=lam))
            for expert, matrix in zip(open_experts, part, strict=True):
                made[expert].append(matrix)
            open_experts = [e for e in open_experts if sign * (entropy_bits(made[e][-1]) - wanted[e]) > 0]
    return made


def compare(model: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    checkpoint = SourceCheckpoint(model)
    layers = expert_layers(checkpoint.config, checkpoint.tensors)
    settings = RecipeSettings("rd", options.level_format)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        text = Path(folder) / "standard-library.txt"
        text.write_bytes(standard_library_text())
        sources = []
        for part in ("0:0.95", "0.95:1"):
            calibration = CalibrationOptions(
                text=TextOptions(str(text), samples=options.samples, length=options.length, part=part),
                hessian=HessianOptions(gate_weighting=True),
            )
            path = Path(folder) / f"{len(sources)}.h5"
            calibrate(checkpoint, layers, calibration, path)
            store = stack.enter_context(Store(path))
            sources.append(StoreTernarizer(store, checkpoint, calibration, settings))
        steps = [(layer, projection) for layer in layers for projection in layer.projections]
        for layer, projection in tqdm(steps, desc="matrices", unit="projection"):
            group, held_out = (source.group(layer, projection, range(layer.experts)) for source in sources)
            paper = ternarize_group(group, RecipeSettings("qmoe", options.level_format))
            runs = around(group, paper, settings)
            reached = held_out.tokens >= FEWEST_TOKENS
            judge = torch.where(reached[:, None, None], held_out.hessian, held_out.prior)
            held_out = replace(held_out, hessian=judge)
            for expert in range(layer.experts):
                rows.append(
                    {
                        "tensor": projection.tensor_name(expert),
                        "tokens": int(group.tokens[expert]),
                        "held_out_tokens": int(held_out.tokens[expert]),
                        "bits": entropy_bits(paper[expert]),
                        "ratio": ratio(paper[expert], runs[expert], held_out, expert),
                    }
                )
    return rows


def draw(rows: list[dict[str, Any]], title: str, path: Path) -> None:
    """Each matrix's ratio over the tokens that its expert saw."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    few = [row for row in rows if row["held_out_tokens"] < FEWEST_TOKENS]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for kind, marker in (("gate", "o"), ("up", "s"), ("down", "^"), ("wi", "s"), ("wo", "^")):
        points = [(max(1, row["tokens"]), row["ratio"]) for row in rows if f".{kind}" in row["tensor"]]
        if points:
            axes.scatter(*zip(*points, strict=True), s=14, marker=marker, label=kind, alpha=0.7)
    if few:
        points = [(max(1, row["tokens"]), row["ratio"]) for row in few]
        label = "over all the layer's tokens"
        axes.scatter(
            *zip(*points, strict=True), s=60, marker="o", facecolors="none", edgecolors="black", label=label
        )
    axes.axhline(1.0, color="black", linewidth=0.8)
    highest = max([1.0, *(row["ratio"] for row in rows)])
    axes.set(xscale="log", ylim=(0, 1.05 * highest), xlabel="tokens that the expert saw")
    axes.set(ylabel="held-out error of rd / qmoe at equal bits", title=title)
    axes.legend()
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--samples", type=int, default=1024)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--level-format", default="e4m4")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = compare(options.model, options)
    ratios = np.array([row["ratio"] for row in rows])
    print(
        f"{options.model.name}: {len(rows)} matrices; error of rd over that of qmoe at equal bits: median "
        f"{np.median(ratios):.3f}, worst {ratios.max():.3f} ({rows[int(ratios.argmax())]['tensor']}), best "
        f"{ratios.min():.3f}"
    )
    out = options.out or RESULTS / f"quantizer_matrices_{options.model.name}.json"
    result = {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "device": environment()["processor"],
        "torch": torch.__version__,
        "model": options.model.name,
        "windows": options.samples,
        "length": options.length,
        "level_format": options.level_format,
        "fewest_held_out_tokens": FEWEST_TOKENS,
        "median": float(np.median(ratios)),
        "worst": float(ratios.max()),
        "matrices": [
            {name: round(value, 5) if isinstance(value, float) else value for name, value in row.items()}
            for row in rows
        ],
    }
    out.write_text(json.dumps(result, indent=1) + "\n")
    draw(rows, options.model.name, out.with_suffix(".png"))


if __name__ == "__main__":
    main()
