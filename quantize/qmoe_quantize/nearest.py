"""Ternary weights by rounding to the nearest level, row by row and without calibration."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
from qmoe_codec import round_levels
from qmoe_codec.errors import ArgumentError

Floats = npt.NDArray[np.float32]
Trits = npt.NDArray[np.int8]

LEVEL_RULES = ("minmax", "lsq")

# Rows are taken in blocks of about this many weights: what is made of one stays in the cache.
BLOCK_WEIGHTS = 1 << 17


def ternarize(weight: Floats, levels: str = "minmax", level_format: str = "bfloat16") -> tuple[Trits, Floats]:
    """Map every weight to the nearest of its row's levels {low, 0, high}.

    Parameters
    ----------
    weight : ndarray
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
    trits : ndarray
        int8 [rows, columns] of -1, 0, +1. A weight exactly half-way becomes 0.
    levels : ndarray
        float32 [rows, 2], (low <= 0, high >= 0), exact in `level_format`.

    Raises
    ------
    ArgumentError
        `weight` is not a float32 matrix, or `levels` or `level_format` is unknown.
    """
    if weight.ndim != 2 or weight.dtype != np.float32:
        raise ArgumentError(
            "cannot be ternarized",
            field="weight",
            value=f"{weight.dtype} {list(weight.shape)}",
            expected="a float32 matrix",
        )
    if levels not in LEVEL_RULES:
        raise ArgumentError("unknown rule", field="levels", value=levels, expected=" or ".join(LEVEL_RULES))
    chosen = round_levels(_minmax_levels(weight), level_format)
    if levels == "lsq":
        fitted = round_levels(_least_squares_levels(weight), level_format)
        # Rounding can spoil a fit that was barely better.
        better = squared_error(weight, fitted) < squared_error(weight, chosen)
        # The e4m4 levels of a matrix share an exponent, so what was chosen is rounded together once more.
        chosen = round_levels(np.where(better[:, None], fitted, chosen), level_format)
    return assign(weight, chosen), chosen


def assign(weight: Floats, levels: Floats) -> Trits:
    """Trits of `weight` [rows, columns] nearest to `levels` [rows, 2]: int8; a level of 0 is never used."""
    low = np.where(levels[:, :1] < 0, levels[:, :1] / 2, np.float32(-np.inf))
    high = np.where(levels[:, 1:] > 0, levels[:, 1:] / 2, np.float32(np.inf))
    trits = np.empty(weight.shape, np.int8)
    for rows in _row_blocks(weight):
        positive, negative = weight[rows] > high[rows], weight[rows] < low[rows]
        np.subtract(positive.view(np.int8), negative.view(np.int8), out=trits[rows])
    return trits


def squared_error(weight: Floats, levels: Floats) -> npt.NDArray[np.float64]:
    """Sum of squared differences per row, float64 [rows], with every weight at the nearest level."""
    errors = np.zeros(weight.shape[0])
    for rows in _row_blocks(weight):
        nearest = np.square(weight[rows])
        for side in (levels[rows, :1], levels[rows, 1:]):
            difference = weight[rows] - side
            np.minimum(nearest, np.square(difference, out=difference), out=nearest)
        errors[rows] = nearest.sum(axis=1, dtype=np.float64)
    return errors


def _minmax_levels(weight: Floats) -> Floats:
    """The row's least and greatest weight, 0 where there is none of that sign: float32 [rows, 2]."""
    return np.stack((weight.min(axis=1, initial=0), weight.max(axis=1, initial=0)), axis=1)


def _least_squares_levels(weight: Floats) -> Floats:
    """The levels with the least squared error of each row: float32 [rows, 2]."""
    levels = np.zeros((weight.shape[0], 2), np.float32)
    if weight.shape[1]:
        for rows in _row_blocks(weight):
            rising = np.sort(weight[rows], axis=1)
            levels[rows, 0] = _best_mean(np.minimum(rising, 0))
            levels[rows, 1] = _best_mean(np.maximum(rising[:, ::-1], 0))
    return levels


def _best_mean(ordered: Floats) -> npt.NDArray[np.float64]:
    """Mean of the first k of each row of `ordered`, for the k that maximises (their sum)^2 / k."""
    sums = np.cumsum(ordered, axis=1, dtype=np.float64)
    best = (sums * sums / np.arange(1, ordered.shape[1] + 1)).argmax(axis=1)
    means: npt.NDArray[np.float64] = sums[np.arange(len(sums)), best] / (best + 1)
    return means


def _row_blocks(weight: Floats) -> list[slice]:
    """Slices that cover the rows of `weight`, each of about `BLOCK_WEIGHTS` weights."""
    step = max(1, BLOCK_WEIGHTS // max(1, weight.shape[1]))
    return [slice(start, start + step) for start in range(0, weight.shape[0], step)]
