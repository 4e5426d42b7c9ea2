"""Squared output error of ternary rows as a quadratic form of their two levels."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

RIDGE = 1e-3
"""How strongly fitted levels are pulled towards what they were, which decides where the data does not."""


@dataclass(frozen=True)
class Target:
    """Weights to be approximated, in the measure of a Hessian.

    Attributes
    ----------
    weight : Tensor
        float32 [E, R, C].
    hessian : Tensor
        float32 [E, C, C].
    product : Tensor
        float32 [E, R, C]: weight @ hessian.
    power : Tensor
        float32 [E, R]: w H w^T of each row.
    """

    weight: Tensor
    hessian: Tensor
    product: Tensor
    power: Tensor

    @classmethod
    def of(cls, weight: Tensor, hessian: Tensor) -> Target:
        """From weights [E, R, C] and Hessians [E, C, C]."""
        product = weight @ hessian
        return cls(weight, hessian, product, (product * weight).sum(-1))


class TernaryFit:
    """Given trits against their target; everything about their levels follows from five numbers per row.

    With l and h the indicators of a row's low and high weights, and levels a and b:
    error = w H w - 2 (a lHw + b hHw) + a^2 lHl + 2ab lHh + b^2 hHh.

    Parameters
    ----------
    target : Target
    trits : Tensor
        int8 [E, R, C].
    """

    def __init__(self, target: Target, trits: Tensor) -> None:
        low, high = (trits < 0).to(target.weight.dtype), (trits > 0).to(target.weight.dtype)
        self._target = target
        self._low_product, self._high_product = low @ target.hessian, high @ target.hessian
        self._low_low = (self._low_product * low).sum(-1)
        self._low_high = (self._low_product * high).sum(-1)
        self._high_high = (self._high_product * high).sum(-1)
        self._low_weight = (target.product * low).sum(-1)
        self._high_weight = (target.product * high).sum(-1)

    def error(self, levels: Tensor) -> Tensor:
        """Squared error of every row, [E, R], with levels [E, R, 2]."""
        a, b = levels.unbind(-1)
        linear = a * self._low_weight + b * self._high_weight
        square = a * a * self._low_low + 2 * a * b * self._low_high + b * b * self._high_high
        return (self._target.power - 2 * linear + square).clamp_min(0.0)

    def gradient(self, levels: Tensor) -> Tensor:
        """(W - Q) H, [E, R, C], with levels [E, R, 2]."""
        low, high = levels[..., :1], levels[..., 1:]
        return self._target.product - low * self._low_product - high * self._high_product

    def levels(self, before: Tensor) -> Tensor:
        """The levels with the least squared error, [E, R, 2], low <= 0 <= high.

        A level that no weight has stays as in `before`. Where the equations are singular, or their solution
        has a wrong sign, so do both.
        """
        a, b, c = self._low_low, self._low_high, self._high_high
        ridge = RIDGE * torch.maximum(a, c)
        u = self._low_weight + ridge * before[..., 0]
        v = self._high_weight + ridge * before[..., 1]
        a, c = a + ridge, c + ridge
        determinant = a * c - b * b
        solvable = determinant > 1e-6 * a * c
        safe = torch.where(solvable, determinant, 1.0)
        low, high = (c * u - b * v) / safe, (a * v - b * u) / safe
        sane = solvable & (low <= 0) & (high >= 0)
        return torch.stack(
            (
                torch.where(sane & (self._low_low > 0), low, before[..., 0]),
                torch.where(sane & (self._high_high > 0), high, before[..., 1]),
            ),
            dim=-1,
        )
