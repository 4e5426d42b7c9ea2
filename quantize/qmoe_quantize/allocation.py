"""How many bytes layers take by lambda: from samples of a layer to its curve, from curves to a lambda.

Rows of a matrix are ternarized independently of each other, so a few rows of some experts, against their
full Hessians, tell how many bits the layer will take. The layers' curves are added up, and the sum is
inverted.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from qmoe_codec import DictionarySet
from qmoe_codec.errors import ArgumentError
from torch import Tensor

from qmoe_format.container import RECORD_ALIGNMENT, LayerSpec, Projection

from .fit import TernaryFit
from .gptq import Penalty, dequantized, feedback
from .problem import MatrixGroup
from .recipes import FIRST_NONZERO_BITS, Problem, RecipeSettings, ternarize_group
from .sizes import grown_frame_bytes
from .ternary import TernaryMatrix

LAM_STEPS = tuple(step / 2 for step in range(-7, 6))
"""Powers of ten, from the middle, that a curve is sampled at."""
ROUGH_START = 2.4
"""Levels that :func:`rough` starts from, in standard deviations of the row."""


@dataclass(frozen=True)
class RateCurve:
    """Bytes that one or more layers will take, by lambda.

    Attributes
    ----------
    weights : int
        Expert weights of the layers.
    lams : ndarray
        float64 [n], rising.
    bytes : ndarray
        float64 [n].
    """

    weights: int
    lams: npt.NDArray[np.float64]
    bytes: npt.NDArray[np.float64]

    def at(self, lam: float) -> float:
        """Bytes for a lambda: linear in its logarithm, constant beyond the ends."""
        return float(np.interp(math.log(lam), np.log(self.lams), self.bytes))


def sample_rows(group: MatrixGroup, rows: int, seed: int) -> MatrixGroup:
    """A group with at most `rows` rows of each matrix, drawn by `seed`, each expert its own."""
    count = group.weight.shape[1]
    if count <= rows:
        return group
    generator = torch.Generator().manual_seed(seed)
    picked = torch.stack(
        [torch.randperm(count, generator=generator)[:rows].sort().values for _ in group.names]
    ).to(group.weight.device)
    columns = group.weight.shape[2]
    return replace(
        group,
        weight=torch.gather(group.weight, 1, picked[..., None].expand(-1, -1, columns)),
        row_weight=torch.gather(group.row_weight, 1, picked),
    )


def rough(problem: Problem, settings: RecipeSettings) -> Tensor:
    """Ternarize in a sixth of the time of `rd`, at nearly its rate and error: one start, no descent.

    Parameters
    ----------
    problem : Problem
        With E experts.
    settings : RecipeSettings
        With ``lam``, which rules may change.

    Returns
    -------
    Tensor
        float32 [E, R, C]: weights of three values a row, which are not rounded.
    """
    group = problem.group
    limits = torch.finfo(torch.float32)
    lams = torch.tensor([settings.of_tensor(name).lam for name in group.names], device=group.weight.device)
    price = (lams[:, None] / group.row_weight.clamp_min(limits.tiny)).clamp_max(limits.max)
    weight = problem.target.weight
    deviation = weight.std(dim=-1, correction=0)
    levels = ROUGH_START * torch.stack((-deviation, deviation), dim=-1)
    penalty = Penalty(price, torch.full_like(price, FIRST_NONZERO_BITS))
    trits = feedback(weight, problem.factor, levels, penalty)
    return dequantized(trits, TernaryFit(problem.target, trits).levels(levels))


def ternarize_over(
    group: MatrixGroup, settings: RecipeSettings, lams: Sequence[float]
) -> Iterator[list[TernaryMatrix]]:
    """What :func:`.recipes.ternarize_group` gives for each of some lambdas, made at once.

    Every row is there once for each lambda, and what is worth a bit is divided out of what its errors weigh.
    It is as if each lambda had been by itself, but for the share that a matrix's density has in its rows'.
    """
    count, rows = len(lams), group.weight.shape[1]
    unit = replace(settings, lam=1.0)
    factors = torch.tensor(
        # A lambda that a rule gives stays
        [[1.0 if replace(unit, lam=lam).of_tensor(name).lam != lam else 1 / lam for lam in lams]
         for name in group.names],
        device=group.weight.device,
    )  # fmt: skip
    repeated = replace(
        group,
        weight=group.weight.repeat(1, count, 1),
        row_weight=group.row_weight.repeat(1, count) * factors.repeat_interleave(rows, dim=1),
    )
    matrices = ternarize_group(repeated, unit)
    for number in range(count):
        part = slice(number * rows, (number + 1) * rows)
        yield [replace(m, trits=m.trits[part], levels=m.levels[part]) for m in matrices]


def typical_cost(samples: Sequence[MatrixGroup]) -> float:
    """What it costs to drop a typical weight: a lambda in the middle of the range that is of use.

    Means would be those of the few inputs and outputs that are thousands of times stronger than the rest.
    """
    costs = []
    for group in samples:
        input_power = torch.diagonal(group.hessian, dim1=1, dim2=2).median(dim=-1).values
        variance = group.weight.var(dim=-1, correction=0)
        costs.append((group.row_weight * variance * input_power[:, None]).flatten())
    positive = torch.cat(costs).double()
    positive = positive[positive > 0]
    return float(positive.log().median().exp()) if len(positive) else 1.0


class LayerSizes:
    """What a layer will take on the disk, by samples of its matrices.

    Parameters
    ----------
    layer : LayerSpec
    level_format : str

    Attributes
    ----------
    weights : int
        Of the layer.
    """

    def __init__(self, layer: LayerSpec, level_format: str) -> None:
        self._layer = layer
        self._level_format = level_format
        self.weights = layer.experts * sum(p.rows * p.columns for p in layer.projections)
        self._dictionaries = DictionarySet(self.weights)
        self._frames: dict[str, list[int]] = {projection.name: [] for projection in layer.projections}

    def add(self, projection: Projection, matrices: Sequence[TernaryMatrix]) -> None:
        """Note the matrices of some experts, or some rows of each; the same experts for each projection."""
        for matrix in matrices:
            frame = self._dictionaries.encode(matrix.trits, matrix.levels, self._level_format)
            scale = projection.rows / max(1, len(matrix.trits))
            self._frames[projection.name].append(grown_frame_bytes(frame, scale))

    def nbytes(self) -> float:
        """Bytes as the codec writes them, with headers, dictionaries, index and alignment."""
        records = np.array(list(self._frames.values())).sum(axis=0)  # of each expert
        whole = np.ceil(records / RECORD_ALIGNMENT) * RECORD_ALIGNMENT
        return self._layer.experts * (float(whole.mean()) + 24) + len(self._dictionaries.to_bytes())


def solve_lam(curves: Sequence[RateCurve], target_bits: float) -> float:
    """The lambda at which all layers together take `target_bits` per expert weight.

    Raises
    ------
    ArgumentError
        No lambda gives so few or so many bits.
    """
    weights = sum(curve.weights for curve in curves)
    lows, highs = [curve.lams[0] for curve in curves], [curve.lams[-1] for curve in curves]
    low, high = float(min(lows)), float(max(highs))

    def bits(lam: float) -> float:
        return 8 * sum(curve.at(lam) for curve in curves) / weights

    most, least = bits(low), bits(high)
    if not least <= target_bits <= most:
        raise ArgumentError(
            "cannot be reached with this model",
            field="target_bpw",
            value=target_bits,
            expected=f"{least:.3f} to {most:.3f} bits per weight",
        )
    return nearest_lam(curves, target_bits)


def nearest_lam(curves: Sequence[RateCurve], target_bits: float) -> float:
    """As :func:`solve_lam`; where no lambda gives the wanted bits, the one that comes closest."""
    weights = sum(curve.weights for curve in curves)
    low = float(min(curve.lams[0] for curve in curves))
    high = float(max(curve.lams[-1] for curve in curves))
    for _ in range(60):
        middle = math.sqrt(low * high)
        if 8 * sum(curve.at(middle) for curve in curves) / weights > target_bits:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
