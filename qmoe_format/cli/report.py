"""What ``qmoe-pack`` tells of single matrices: lines of JSON, a table by layer, a chart."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from qmoe_codec.errors import OutputExistsError

from ..files import os_errors, write_file
from . import plot
from .text import table

Matrices = Sequence[Mapping[str, Any]]


def check_report(file: str, *, force: bool) -> None:
    """Refuse to replace a file, before any work is done.

    Raises
    ------
    OutputExistsError
        It exists, and `force` is not set.
    """
    if os.path.lexists(file) and not force:
        raise OutputExistsError("exists already", file=file, expected="a new name, or --force")


def write_report(matrices: Matrices, file: str) -> None:
    """Write a line of JSON for each matrix.

    Raises
    ------
    QMoEError
        The file cannot be written.
    """
    partial = Path(f"{file}.partial")
    with os_errors(partial):
        partial.unlink(missing_ok=True)
    write_file(partial, "".join(json.dumps(line) + "\n" for line in matrices).encode())
    with os_errors(file):
        os.replace(partial, file)


def _layers(matrices: Matrices) -> dict[str, list[Mapping[str, Any]]]:
    layers: dict[str, list[Mapping[str, Any]]] = {}
    for line in matrices:
        layers.setdefault(line["layer"], []).append(line)
    return layers


def _mean(lines: Matrices, name: str) -> float:
    """Mean by weights; not a number where it is not known."""
    sizes = [line["rows"] * line["columns"] for line in lines]
    values = [float(line.get(name, np.nan)) for line in lines]
    return float(np.average(values, weights=sizes))


def layer_table(matrices: Matrices) -> str:
    """A table of the layers: tokens, bits, sparsity, errors, fallbacks."""
    rows = []
    for prefix, lines in _layers(matrices).items():
        tokens = [line["tokens"] for line in lines]
        rows.append(
            (
                plot.short(prefix),
                f"{min(tokens):,}",
                f"{float(np.median(tokens)):,.0f}",
                f"{_mean(lines, 'bits'):.3f}",
                f"{_mean(lines, 'sparsity'):.1%}",
                f"{_mean(lines, 'relative_error'):.3f}",
                f"{_mean(lines, 'relative_output_error'):.4f}",
                str(sum("fallback" in line for line in lines)),
            )
        )
    names = ("layer", "least tokens", "median", "bits/weight", "zero", "weight error", "output error")
    return table((*names, "fallbacks"), rows)


def draw_report(matrices: Matrices, file: str) -> None:
    """Draw bits and error by layer and expert to a file, replacing it.

    Raises
    ------
    QMoEError
        It cannot be written.
    """
    with plot.save_figure(file, (11, 7.5)) as figure:
        figure.suptitle(
            "Bits and error by layer and expert", fontsize=12.5, fontweight="bold", x=0.01, ha="left"
        )
        layers = _layers(matrices)
        has_output = any("relative_output_error" in line for line in matrices)
        error = "relative_output_error" if has_output else "relative_error"
        what = "error of the output" if has_output else "error of the weights"
        top = figure.subplots(2, 2)
        for column, (name, title) in enumerate(
            (("bits", "bits per weight, frames alone"), (error, f"{what}, relative"))
        ):
            grid = _grid(layers, name)
            shown = top[0][column].imshow(grid, aspect="auto", cmap="viridis", interpolation="nearest")
            figure.colorbar(shown, ax=top[0][column])
            top[0][column].set_title(title[0].upper() + title[1:])
            top[0][column].set_xlabel("expert")
            step = max(1, -(-len(layers) // 16))
            top[0][column].set_yticks(
                range(0, len(layers), step), [plot.short(prefix) for prefix in layers][::step]
            )
            top[0][column].set_ylabel("layer")
        _draw_projections(top[1][0], layers, "bits")
        top[1][0].set_ylabel("bits per weight")
        top[1][0].set_title("Bits of each projection")
        _draw_tokens(top[1][1], matrices, error)
        top[1][1].set_ylabel(what)
        top[1][1].set_title("Error against the tokens that an expert saw")


def _grid(layers: Mapping[str, Matrices], name: str) -> Any:
    """Means of a value by layer and expert; not a number where there is no expert."""
    experts = max(line["expert"] for lines in layers.values() for line in lines) + 1
    grid = np.full((len(layers), experts), np.nan)
    for row, lines in enumerate(layers.values()):
        for expert in range(experts):
            if own := [line for line in lines if line["expert"] == expert]:
                grid[row, expert] = _mean(own, name)
    return grid


def _draw_projections(axes: Any, layers: Mapping[str, Matrices], name: str) -> None:
    projections = list(dict.fromkeys(line["projection"] for lines in layers.values() for line in lines))
    for projection in projections:
        means = [
            _mean([line for line in lines if line["projection"] == projection], name)
            for lines in layers.values()
        ]
        axes.plot(range(len(means)), means, "o-", markersize=4, linewidth=1.2, label=projection)
    step = max(1, -(-len(layers) // 16))
    axes.set_xticks(range(0, len(layers), step), [plot.short(prefix) for prefix in layers][::step])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("layer")
    axes.legend(fontsize=8.5)
    axes.grid(axis="y")


def _draw_tokens(axes: Any, matrices: Matrices, error: str) -> None:
    projections = list(dict.fromkeys(line["projection"] for line in matrices))
    for projection in projections:
        lines = [line for line in matrices if line["projection"] == projection]
        tokens = [max(0, line["tokens"]) for line in lines]
        axes.plot(tokens, [line.get(error, np.nan) for line in lines], ".", markersize=4, label=projection)
    axes.set_xscale("symlog", linthresh=1)
    axes.set_xlim(left=-0.3)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("tokens")
    axes.legend(fontsize=8.5)
    axes.grid(axis="y")
