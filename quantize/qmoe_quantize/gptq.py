"""Error feedback and coordinate descent over the columns of ternary matrices, many experts at once.

All tensors here carry a leading dimension E of experts: a weight is [E, R, C], a Hessian [E, C, C], levels
are [E, R, 2] (low <= 0, high >= 0), trits int8 [E, R, C]. Rows do not influence each other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128
"""Columns between two updates of all columns that follow; within a block only the block is kept current."""


@dataclass(frozen=True)
class Penalty:
    """What it costs in bits to be non-zero, against the squared error.

    Attributes
    ----------
    weight : Tensor
        [E, R]: squared error, in the measure of the Hessian, that one bit is worth.
    bits : Tensor
        [E, R]: bits that a non-zero takes beyond those of a zero.
    """

    weight: Tensor
    bits: Tensor

    @property
    def nonzero(self) -> Tensor:
        """[E, R]: squared error that a non-zero must save."""
        return self.weight * self.bits


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Factor with one thread: how LAPACK cuts a matrix, and so the last digits, depends on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def inverse_factor(hessian: Tensor, damp: float) -> tuple[Tensor, list[int]]:
    """The upper Cholesky factor of the inverse of each damped Hessian (GPTQ, arXiv 2210.17323, section 3.3).

    Parameters
    ----------
    hessian : Tensor
        [E, C, C], symmetric.
    damp : float
        Share of the mean of the diagonal that is added to it, never less than 1e-6 (as QMoE does).

    Returns
    -------
    factor : Tensor
        [E, C, C].
    singular : list of int
        Experts whose Hessian cannot be factored. Theirs is the identity, so that feedback rounds to nearest.
    """
    columns = hessian.shape[-1]
    diagonal = torch.arange(columns, device=hessian.device)
    damped = hessian.clone()
    extra = damp * damped[:, diagonal, diagonal].mean(dim=-1, keepdim=True)
    damped[:, diagonal, diagonal] += extra.clamp_min(1e-6)
    identity = torch.eye(columns, dtype=hessian.dtype, device=hessian.device)
    singular: set[int] = set()
    for expert in (~torch.isfinite(damped).flatten(1).all(dim=1)).nonzero().flatten().tolist():
        singular.add(expert)
        damped[expert] = identity
    while True:
        with one_thread():
            lower, first = torch.linalg.cholesky_ex(damped)
            factor = first
            if not first.any():
                upper, factor = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
                if not factor.any():
                    return upper, sorted(singular)
        for expert in factor.nonzero().flatten().tolist():
            singular.add(expert)
            damped[expert] = identity


def _thresholds(levels: Tensor, penalty: Penalty | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From where on a value becomes low and high, and how much further per 1 / curvature: [E, R] each.

    Non-zero wins where (w - level)^2 + penalty / curvature < w^2.
    """
    low, high = levels.unbind(-1)
    infinity = torch.tensor(torch.inf, dtype=levels.dtype, device=levels.device)
    below = torch.where(low < 0, low / 2, -infinity)
    above = torch.where(high > 0, high / 2, infinity)
    if penalty is None:
        zero = torch.zeros_like(low)
        return below, above, zero, zero
    price = penalty.nonzero
    return (
        below,
        above,
        torch.where(low < 0, price / (2 * low), 0.0),
        torch.where(high > 0, price / (2 * high), 0.0),
    )


def feedback(weight: Tensor, factor: Tensor, levels: Tensor, penalty: Penalty | None = None) -> Tensor:
    """Ternarize column by column, with the error of each spread over those that follow (GPTQ).

    With a penalty, a column's decision is argmin over q of (w - q)^2 + c^2 (squared error that its bits are
    worth), where c is the column's diagonal element of `factor`: 1 / c^2 is what a squared error costs there.

    Parameters
    ----------
    weight : Tensor
        float32 [E, R, C].
    factor : Tensor
        float32 [E, C, C], of :func:`inverse_factor`.
    levels : Tensor
        float32 [E, R, 2]. A level of 0 is never used.
    penalty : Penalty, optional

    Returns
    -------
    Tensor
        int8 [E, R, C].
    """
    experts, rows, columns = weight.shape
    trits = torch.empty((experts, columns, rows), dtype=torch.int8, device=weight.device)
    # Columns are contiguous, since all work is on columns.
    current = weight.transpose(1, 2).contiguous()
    low, high = levels.unbind(-1)
    below, above, extra_below, extra_above = _thresholds(levels, penalty)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = current[:, start:stop]
        errors = torch.empty_like(block)
        inside = factor[:, start:stop, start:stop]
        for column in range(stop - start):
            value = block[:, column]
            diagonal = inside[:, column, column, None]
            square = diagonal * diagonal
            positive = value > above + square * extra_above
            negative = value < below + square * extra_below
            trits[:, start + column] = positive.to(torch.int8) - negative.to(torch.int8)
            rounded = torch.where(positive, high, torch.where(negative, low, 0.0))
            error = (value - rounded) / diagonal
            errors[:, column] = error
            if column + 1 < stop - start:
                block[:, column + 1 :] -= inside[:, column, column + 1 :, None] * error[:, None, :]
        if stop < columns:
            current[:, stop:] -= factor[:, start:stop, stop:].transpose(1, 2) @ errors
    return trits.transpose(1, 2).contiguous()


def dequantized(trits: Tensor, levels: Tensor) -> Tensor:
    """float32 [E, R, C] from trits and levels."""
    low, high = levels[..., :1], levels[..., 1:]
    return torch.where(trits > 0, high, torch.where(trits < 0, low, 0.0))


def descend(
    gradient: Tensor, hessian: Tensor, trits: Tensor, levels: Tensor, penalty: Penalty | None = None
) -> Tensor:
    """One sweep of coordinate descent: each column takes its best value, all others being as they are.

    The squared error (W - Q) H (W - Q)^T of a row and what its bits are worth together never grow, apart from
    rounding.

    Parameters
    ----------
    gradient : Tensor
        float32 [E, R, C]: (W - Q) H.
    hessian : Tensor
        float32 [E, C, C], with a positive diagonal.
    trits : Tensor
        int8 [E, R, C].
    levels : Tensor
        float32 [E, R, 2].
    penalty : Penalty, optional

    Returns
    -------
    Tensor
        New trits.
    """
    columns = trits.shape[-1]
    trits = trits.transpose(1, 2).contiguous()
    gradient = gradient.transpose(1, 2).contiguous()
    low, high = levels.unbind(-1)
    below, above, extra_below, extra_above = _thresholds(levels, penalty)
    for start in range(0, columns, BLOCK):
        stop = min(start + BLOCK, columns)
        block = gradient[:, start:stop]
        inside = hessian[:, start:stop, start:stop]
        changes = torch.empty_like(block)
        for column in range(stop - start):
            diagonal = inside[:, column, column, None]
            old = trits[:, start + column]
            before = torch.where(old > 0, high, torch.where(old < 0, low, 0.0))
            value = before + block[:, column] / diagonal
            positive = value > above + extra_above / diagonal
            negative = value < below + extra_below / diagonal
            trits[:, start + column] = positive.to(torch.int8) - negative.to(torch.int8)
            change = torch.where(positive, high, torch.where(negative, low, 0.0)) - before
            changes[:, column] = change
            if column + 1 < stop - start:
                block[:, column + 1 :] -= inside[:, column, column + 1 :, None] * change[:, None, :]
        if stop < columns:
            gradient[:, stop:] -= hessian[:, start:stop, stop:].transpose(1, 2) @ changes
    return trits.transpose(1, 2).contiguous()
