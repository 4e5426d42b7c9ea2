"""The chart of ``qmoe sweep --plot``; needs matplotlib."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from .plot import INK, save_figure

if TYPE_CHECKING:
    from qmoe_quantize.sweep import Sweep

# Colours that differ for the colour-blind, and another mark for each besides
_LOOKS = {"nearest": ("#a5672b", "s"), "qmoe": ("#b3261e", "D"), "rd": ("#1f5fa8", "o")}
_OTHER = ("#5b6770", "^")


class Mark(NamedTuple):
    """A packed model in the chart."""

    recipe: str
    label: str
    bits: float  # per expert weight
    loss: float  # bits per byte


def draw_sweep(result: Sweep, file: str) -> None:
    """Draw a sweep's curve, replacing `file`.

    Raises
    ------
    QMoEError
        It cannot be written.
    """
    original: Any = result.original["bits_per_byte"]
    marks = [Mark(p.recipe, p.label, p.bits_per_weight, p.bits_per_byte) for p in result.points]
    draw(marks, float(original), f"{result.inputs['model']}: what fewer bits cost", file)


def draw(marks: Sequence[Mark], original: float, title: str, file: str) -> None:
    """Draw bits per expert weight against bits per byte, and the original's loss as a line.

    Raises
    ------
    QMoEError
        It cannot be written.
    """
    with save_figure(file, (7.5, 4.8)) as figure:
        axes = figure.add_subplot()
        for recipe in dict.fromkeys(mark.recipe for mark in marks):
            colour, shape = _LOOKS.get(recipe, _OTHER)
            chosen = sorted((mark for mark in marks if mark.recipe == recipe), key=lambda mark: mark.bits)
            # Two points of `nearest` are no curve: there is nothing between them
            line = "-" if recipe == "rd" else ""
            axes.plot(
                [mark.bits for mark in chosen],
                [mark.loss for mark in chosen],
                marker=shape,
                linestyle=line,
                color=colour,
                linewidth=1.4,
                label=recipe,
            )
            for mark in chosen:
                name = "" if recipe == "rd" else f"{mark.label}\n"
                axes.annotate(
                    f"{name}{mark.bits:.2f} bits, {mark.loss:.3f}",
                    (mark.bits, mark.loss),
                    (6, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=colour,
                )
        axes.axhline(original, color=INK, linestyle="--", linewidth=1)
        axes.annotate(
            f"original, {original:.3f}",
            (0, original),
            (5, -3),
            xycoords=("axes fraction", "data"),
            textcoords="offset points",
            va="top",
            fontsize=8,
        )
        losses = [original, *(mark.loss for mark in marks)]
        room = max(max(losses) - min(losses), 0.02)
        axes.set_ylim(min(losses) - 0.12 * room, max(losses) + 0.15 * room)
        bits = [mark.bits for mark in marks] or [1.0]
        spread = max(max(bits) - min(bits), 0.2)
        axes.set_xlim(min(bits) - 0.1 * spread, max(bits) + 0.2 * spread)
        axes.set_xlabel("bits per expert weight on the disk, everything counted")
        axes.set_ylabel("bits per held-out byte")
        axes.set_title(title)
        axes.grid()
        if marks:
            axes.legend(loc="upper right")
