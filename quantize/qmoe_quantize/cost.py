"""How long a calibrated recipe takes: operations counted, and two rates measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from qmoe_format.container import LayerSpec

from .recipes import STARTS, RecipeSettings


@dataclass(frozen=True)
class Work:
    """What there is to do.

    Attributes
    ----------
    multiplications : float
        Of matrix products and factorisations, each with its addition.
    column_steps : float
        Weights times how often their column is decided on: elementwise work.
    """

    multiplications: float
    column_steps: float

    def __add__(self, other: Work) -> Work:
        return Work(self.multiplications + other.multiplications, self.column_steps + other.column_steps)


@dataclass(frozen=True)
class Rates:
    """What a machine does in a second.

    Attributes
    ----------
    multiplications, column_steps : float
        As in :class:`Work`.
    where : str
        The machine.
    """

    multiplications: float
    column_steps: float
    where: str

    def seconds(self, work: Work) -> float:
        """Seconds for some work."""
        return work.multiplications / self.multiplications + work.column_steps / self.column_steps


def matrix_work(rows: int, columns: int, settings: RecipeSettings, tokens: float) -> Work:
    """Work of one matrix of an expert, its Hessian of `tokens` tokens included.

    Counted: the Hessian, C^2 a token; its factor, 2/3 C^3 twice and C^3/3 for the inverse between; feedback
    and a sweep of descent, C/2 a weight each; the fit of the levels, 2 C a weight; errors, C a weight.
    """
    weights = rows * columns
    factor = columns**3
    hessian = tokens * columns**2
    if settings.method == "qmoe":
        passes, fits = 1, 0
    else:
        passes = 1 + len(STARTS) + settings.sweeps
        fits = passes
    products = weights * columns * (passes / 2 + 2 * fits + 3)
    return Work(factor + hessian + products, float(weights * passes))


def layer_work(layer: LayerSpec, settings: RecipeSettings, tokens: float) -> Work:
    """Work of a layer whose experts see `tokens` tokens in all, every choice of the router counted."""
    total = Work(0.0, 0.0)
    for projection in layer.projections:
        one = matrix_work(projection.rows, projection.columns, settings, 0.0)
        total += Work(one.multiplications * layer.experts, one.column_steps * layer.experts)
        # Hessian, and running the projection itself
        total += Work(tokens * projection.columns * (projection.columns + projection.rows), 0.0)
    return total


def model_work(layers: Sequence[LayerSpec], settings: RecipeSettings, tokens: float) -> Work:
    """Work of all layers; dense layers, reading and writing are not in it."""
    total = Work(0.0, 0.0)
    for layer in layers:
        total += layer_work(layer, settings, tokens)
    return total
