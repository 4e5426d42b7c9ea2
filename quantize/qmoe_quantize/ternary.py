"""What every recipe returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class TernaryMatrix:
    """A ternarized matrix, and what it cost.

    Attributes
    ----------
    trits : ndarray
        int8 [rows, columns].
    levels : ndarray
        float32 [rows, 2], exact in the level format.
    squared_error, squared_norm : float
        Sums over the matrix: of (weight - ternary weight)^2 and of weight^2.
    report : Mapping
        What else the recipe has to say of it, for the report: JSON values.
    """

    trits: npt.NDArray[np.int8]
    levels: npt.NDArray[np.float32]
    squared_error: float
    squared_norm: float
    report: Mapping[str, object] = field(default_factory=dict)


@dataclass(frozen=True)
class TernaryExpert:
    """The matrices of an expert in the order of the layer's projections.

    Attributes
    ----------
    matrices : tuple of TernaryMatrix
    tokens : int
        How many tokens it was calibrated on; -1 without calibration.
    """

    matrices: tuple[TernaryMatrix, ...]
    tokens: int = -1
