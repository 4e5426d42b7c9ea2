"""The chart of ``qmoe-inspect --plot``; needs matplotlib."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from qmoe_codec.errors import ArgumentError, MissingPackageError

from ..files import os_errors
from ..inspection import SPARSITY_BINS, Inspection
from .text import size

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SUFFIXES = (".png", ".svg", ".pdf")
INK, _FAINT = "#24292f", "#d0d7de"
# Sections of the stacked bars, from the bottom up: label, sections, colour.
_STACK = (
    ("codewords", ("codewords",), "#1f5fa8"),
    ("row index", ("row_index",), "#5b9bd5"),
    ("levels", ("levels",), "#e39b3b"),
    ("headers, padding, tables", ("headers", "padding", "dictionaries", "index"), "#a5acb5"),
)
_EXPERTS, _DENSE, _REST = "#1f5fa8", "#7ba05b", "#a5acb5"
_STYLE: dict[Any, Any] = {
    "font.size": 9.5,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.axisbelow": True,
    "grid.color": _FAINT,
    "grid.linewidth": 0.6,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "svg.hashsalt": "qmoe",
}


def check(file: str) -> None:
    """Refuse what cannot be drawn, before any work is done.

    Raises
    ------
    ArgumentError
        The file's name has another ending than .png, .svg or .pdf.
    MissingPackageError
        matplotlib is not installed.
    """
    if Path(file).suffix.lower() not in _SUFFIXES:
        raise ArgumentError(
            "unknown kind of picture", field="--plot", value=file, expected=" or ".join(_SUFFIXES)
        )
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError:
        raise MissingPackageError("matplotlib is not installed: pip install 'qmoe-format[plot]'") from None


def draw(found: Inspection, file: str) -> None:
    """Draw an inspection to a file, replacing it.

    Raises
    ------
    QMoEError
        It cannot be written.
    """
    with save_figure(file, (11, 6.6)) as figure:
        grid = figure.add_gridspec(2, 2, height_ratios=(1.35, 1), width_ratios=(1.25, 1))
        _draw_layers(figure.add_subplot(grid[0, :]), found)
        _draw_sparsity(figure.add_subplot(grid[1, 0]), found)
        _draw_bytes(figure.add_subplot(grid[1, 1]), found)
        figure.suptitle(
            f"{Path(os.path.abspath(found.path)).name}: {found.total.bits():.3f} bits per expert weight, "
            f"{found.total.sparsity:.1%} zero, "
            f"{found.bf16_bytes / found.file_bytes:.1f} times smaller than bf16",
            fontsize=12.5,
            fontweight="bold",
            x=0.01,
            ha="left",
        )


@contextlib.contextmanager
def save_figure(file: str, inches: tuple[float, float]) -> Iterator[Figure]:
    """A figure to draw on, in the style of all charts, that is then written to a file, replacing it.

    Raises
    ------
    QMoEError
        It cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout="constrained")
        FigureCanvasAgg(figure)
        yield figure
        partial = Path(f"{file}.partial")
        with os_errors(file):
            try:
                figure.savefig(
                    partial, dpi=150, format=Path(file).suffix[1:].lower(), metadata=_metadata(file)
                )
                os.replace(partial, file)
            finally:
                partial.unlink(missing_ok=True)


def _metadata(file: str) -> dict[str, None]:
    """No date in the file: the same model gives the same picture."""
    return {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(Path(file).suffix.lower(), {})


def _draw_layers(axes: Axes, found: Inspection) -> None:
    """Bits per weight of each layer, stacked by purpose, with the entropy marked."""
    reports = list(found.layers.values())
    places = np.arange(len(reports))
    bottom = np.zeros(len(reports))
    for label, sections, colour in _STACK:
        heights = np.array([report.bits(*sections) for report in reports])
        axes.bar(places, heights, 0.72, bottom=bottom, color=colour, label=label, linewidth=0)
        bottom += heights
    entropies = [report.entropy for report in reports]
    axes.hlines(
        entropies, places - 0.36, places + 0.36, color="#b3261e", linewidth=2, label="entropy of the trits"
    )
    if len(reports) <= 24:
        for place, height in zip(places, bottom, strict=True):
            axes.annotate(
                f"{height:.3f}", (place, height), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    step = max(1, -(-len(reports) // 32))
    axes.set_xticks(places[::step], [short(prefix) for prefix in found.layers][::step], fontsize=8.5)
    axes.set_xlim(-0.6, len(reports) - 0.4)
    axes.set_ylim(0, 1.12 * max(bottom, default=1))
    axes.set_ylabel("bits per weight")
    axes.set_title("Where the bits of each layer go")
    axes.grid(axis="y")
    handles, labels = axes.get_legend_handles_labels()
    axes.legend(
        handles,
        labels,
        loc="lower right",
        bbox_to_anchor=(1, 0.99),
        ncols=len(labels),
        columnspacing=1.2,
        handlelength=1.2,
        fontsize=8.5,
    )
    axes.set_xlabel("layer")


def short(prefix: str) -> str:
    """What tells a layer from the others: its numbers, and the stack of an encoder-decoder."""
    numbers = [part for part in prefix.split(".") if part.isdigit()]
    stack = {"encoder": "enc ", "decoder": "dec "}.get(prefix.partition(".")[0], "")
    return stack + (numbers[0] if numbers else prefix)


def _draw_sparsity(axes: Axes, found: Inspection) -> None:
    """How the rows differ in sparsity."""
    histogram = found.total.sparsity_histogram
    shares = 100 * histogram / max(1, histogram.sum())
    edges = np.linspace(0, 1, SPARSITY_BINS + 1)
    axes.bar(edges[:-1], shares, 1 / SPARSITY_BINS, align="edge", color=_STACK[1][2], linewidth=0)
    axes.axvline(found.total.sparsity, color="#b3261e", linewidth=1.5)
    occupied = np.flatnonzero(histogram)
    first = edges[occupied[0]] if len(occupied) else 0.0
    axes.set_xlim(max(0.0, first - 0.04), 1)
    axes.annotate(
        f"mean {found.total.sparsity:.1%}",
        (found.total.sparsity, 1),
        (-5, -3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        va="top",
        color="#b3261e",
        fontsize=8.5,
    )
    axes.set_xlabel("share of zeros in a row")
    axes.set_ylabel("% of expert weights")
    axes.set_title("Sparsity of the rows")
    axes.grid(axis="y")


def _draw_bytes(axes: Axes, found: Inspection) -> None:
    """Bytes in bfloat16 and packed."""
    from matplotlib.patches import Patch

    total, dense = found.total, found.dense
    rest = max(0, found.file_bytes - total.bytes - dense.stored_bytes)
    bars = (
        ("bf16", ((2 * total.weights, _EXPERTS), (2 * dense.elements, _DENSE))),
        ("packed", ((total.bytes, _EXPERTS), (dense.stored_bytes, _DENSE), (rest, _REST))),
    )
    widest = max(found.bf16_bytes, found.file_bytes, 1)
    for place, (_, parts) in enumerate(reversed(bars)):
        left = 0
        for nbytes, colour in parts:
            axes.barh(place, nbytes, 0.55, left=left, color=colour, linewidth=0)
            left += nbytes
        axes.annotate(
            size(left),
            (left, place),
            (4, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
            fontweight="bold",
        )
    axes.set_yticks((1, 0), [name for name, _ in bars])
    axes.set_xlim(0, 1.16 * widest)
    axes.set_ylim(-0.45, 1.45)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    labels = (
        (f"experts {size(total.bytes)}", _EXPERTS),
        (f"other tensors {size(dense.stored_bytes)}", _DENSE),
        (f"headers, JSON {size(rest)}", _REST),
    )
    axes.legend(
        [Patch(color=colour, label=label) for label, colour in labels],
        [label for label, _ in labels],
        title="packed",
        loc="upper left",
        bbox_to_anchor=(-0.02, 0.02),
        ncols=3,
        columnspacing=1.2,
        handlelength=1,
        alignment="left",
        fontsize=8.5,
        title_fontsize=8.5,
    )
    axes.set_title("Bytes")
