"""Ternary weights by rounding to the nearest level, row by row and without calibration."""

from __future__ import annotations

import torch
from qmoe_codec import round_levels
from qmoe_codec.errors import ArgumentError
from torch import Tensor

LEVEL_RULES = ("minmax", "lsq")

# Rows are taken in blocks of about this many weights: what is made of one stays in the cache.
BLOCK_WEIGHTS = 1 << 17


def ternarize(
    weight: Tensor, levels: str = "minmax", level_format: str = "bfloat16"
) -> tuple[Tensor, Tensor]:
    """Map every weight to the nearest of its row's levels {low, 0, high}.

    Parameters
    ----------
    weight : Tensor
        float32 [rows, columns], finite.
    levels : {"minmax", "lsq"}
        ``minmax`` is the rule of QMoE (arXiv 2310.16795, section 3): low and high are the row's least and
        greatest weight, so that everything within half of them becomes 0. Weights with tails thus become very
        sparse, and the error is large. ``lsq`` takes the levels with the least squared error of the row: with
        low and high apart, the best high for the k greatest weights is their mean, and it is best for the k
        that maximises (sum of those k)^2 / k (Ternary Weight Networks, arXiv 1605.04711, equation 6, there
        solved approximately; here exactly, by sorting). The error is small, but fewer weights become 0. A
        row's squared error is never above that of ``minmax``.
    level_format : {"float32", "bfloat16", "float16", "e4m4"}
        How the levels will be stored (spec 4.1). Weights are compared with the levels as stored.

    Returns
    -------
    trits : Tensor
        int8 [rows, columns] of -1, 0, +1. A weight exactly half-way becomes 0.
    levels : Tensor
        float32 [rows, 2], (low <= 0, high >= 0), exact in `level_format`.

    Raises
    ------
    ArgumentError
        `weight` is not a float32 matrix, or `levels` or `level_format` is unknown.
    """
    if weight.ndim != 2 or weight.dtype != torch.float32:
        raise ArgumentError(
            "cannot be ternarized",
            field="weight",
            value=f"{weight.dtype} {list(weight.shape)}",
            expected="a float32 matrix",
        )
    if levels not in LEVEL_RULES:
        raise ArgumentError("unknown rule", field="levels", value=levels, expected=" or ".join(LEVEL_RULES))
    chosen = _round(_minmax_levels(weight), level_format)
    if levels == "lsq":
        fitted = _round(_least_squares_levels(weight), level_format)
        # Rounding can spoil a fit that was barely better.
        better = squared_error(weight, fitted) < squared_error(weight, chosen)
        # The e4m4 levels of a matrix share an exponent, so what was chosen is rounded together once more.
        chosen = _round(torch.where(better[:, None], fitted, chosen), level_format)
    return assign(weight, chosen), chosen


def assign(weight: Tensor, levels: Tensor) -> Tensor:
    """Trits of `weight` [rows, columns] nearest to `levels` [rows, 2]: int8; a level of 0 is never used."""
    infinity = torch.tensor(torch.inf)
    low = torch.where(levels[:, :1] < 0, levels[:, :1] / 2, -infinity)
    high = torch.where(levels[:, 1:] > 0, levels[:, 1:] / 2, infinity)
    trits = torch.empty(weight.shape, dtype=torch.int8)
    for rows in _row_blocks(weight):
        positive, negative = weight[rows] > high[rows], weight[rows] < low[rows]
        torch.sub(positive.view(torch.int8), negative.view(torch.int8), out=trits[rows])
    return trits


def squared_error(weight: Tensor, levels: Tensor) -> Tensor:
    """Sum of squared differences per row, float64 [rows], with every weight at the nearest level."""
    errors = torch.zeros(weight.shape[0], dtype=torch.float64)
    for rows in _row_blocks(weight):
        nearest = weight[rows].square()
        for side in (levels[rows, :1], levels[rows, 1:]):
            torch.minimum(nearest, (weight[rows] - side).square_(), out=nearest)
        errors[rows] = nearest.sum(dim=1, dtype=torch.float64)
    return errors


def _minmax_levels(weight: Tensor) -> Tensor:
    """The row's least and greatest weight, 0 where there is none of that sign: float32 [rows, 2]."""
    if not weight.shape[1]:
        return torch.zeros(weight.shape[0], 2)
    low, high = weight.aminmax(dim=1)
    return torch.stack((low.clamp(max=0), high.clamp(min=0)), dim=1)


def _least_squares_levels(weight: Tensor) -> Tensor:
    """The levels with the least squared error of each row: float32 [rows, 2]."""
    levels = torch.zeros(weight.shape[0], 2)
    if not weight.shape[1]:
        return levels
    for rows in _row_blocks(weight):
        rising = weight[rows].sort(dim=1).values
        levels[rows, 0] = _best_mean(rising.clamp(max=0))
        levels[rows, 1] = _best_mean(rising.flip(1).clamp(min=0))
    return levels


def _best_mean(ordered: Tensor) -> Tensor:
    """Mean of the first k of each row of `ordered`, for the k that maximises (their sum)^2 / k."""
    sums = ordered.cumsum(dim=1, dtype=torch.float64)
    counts = torch.arange(1, ordered.shape[1] + 1, dtype=torch.float64)
    best = (sums.square() / counts).argmax(dim=1, keepdim=True)
    return (sums.gather(1, best) / (best + 1))[:, 0].to(torch.float32)


def _row_blocks(weight: Tensor) -> list[slice]:
    """Slices that cover the rows of `weight`, each of about `BLOCK_WEIGHTS` weights."""
    step = max(1, BLOCK_WEIGHTS // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]


def _round(levels: Tensor, level_format: str) -> Tensor:
    """`levels` as a reader will get them back."""
    return torch.from_numpy(round_levels(levels.numpy(), level_format))
