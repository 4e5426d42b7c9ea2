"""How many bytes layers take by lambda: from samples of a layer to its curve, from curves to a lambda.

Rows of a matrix are ternarized independently of each other, so a few rows of some experts, against their
full Hessians, tell how many bits the layer will take. The layers' curves are added up, and the sum is
inverted. What is noted of an expert depends on that expert alone, whichever process looks at it.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from qmoe_codec import DictionarySet, read_frame_header
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
    """A group with at most `rows` rows of each matrix, drawn by `seed` and the matrix's name."""
    count = group.weight.shape[1]
    if count <= rows:
        return group
    picked = torch.stack([_drawn(count, rows, f"{seed} {name}") for name in group.names])
    picked = picked.to(group.weight.device)
    columns = group.weight.shape[2]
    return replace(
        group,
        weight=torch.gather(group.weight, 1, picked[..., None].expand(-1, -1, columns)),
        row_weight=torch.gather(group.row_weight, 1, picked),
    )


def _drawn(count: int, wanted: int, key: str) -> Tensor:
    seed = int.from_bytes(hashlib.sha256(key.encode()).digest()[:4])
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


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
    group: MatrixGroup, settings: RecipeSettings, lams: Sequence[Sequence[float]]
) -> Iterator[list[TernaryMatrix]]:
    """What :func:`.recipes.ternarize_group` gives for each of an expert's lambdas, made at once.

    Every row is there once for each lambda, and what is worth a bit is divided out of what its errors weigh.
    It is as if each lambda had been by itself, but for the share that a matrix's density has in its rows'.
    Yields the experts' matrices for the first lambda of each, for the second, and so on.
    """
    count, rows = len(lams[0]), group.weight.shape[1]
    unit = replace(settings, lam=1.0)
    factors = torch.tensor(
        # A lambda that a rule gives stays
        [[1.0 if replace(unit, lam=lam).of_tensor(name).lam != lam else 1 / lam for lam in own]
         for name, own in zip(group.names, lams, strict=True)],
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
    The prior counts for one token, so that an expert which saw none has a cost too.
    """
    costs = []
    for group in samples:
        power = torch.diagonal(group.hessian, dim1=1, dim2=2)
        power = power + torch.diagonal(group.prior, dim1=1, dim2=2) / max(1, group.calibration_tokens)
        input_power = power.median(dim=-1).values
        variance = group.weight.var(dim=-1, correction=0)
        costs.append((group.row_weight * variance * input_power[:, None]).flatten())
    positive = torch.cat(costs).double()
    positive = positive[positive > 0]
    return float(positive.log().median().exp()) if len(positive) else 1.0


@dataclass
class ExpertSizes:
    """What an expert will take on the disk for each of some lambdas, by samples of its matrices.

    Attributes
    ----------
    expert : int
    lams : list of float
        Rising.
    bytes : list of float
        Of its record, for each of them.
    dictionaries : list of dict of str to int
        For each of them those that its matrices use: the bytes of each, by its id.
    """

    expert: int
    lams: list[float]
    bytes: list[float] = field(default_factory=list)
    dictionaries: list[dict[str, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.bytes = self.bytes or [0.0] * len(self.lams)
        self.dictionaries = self.dictionaries or [{} for _ in self.lams]


class SizeSamples:
    """What is known of the sizes of a layer's experts.

    Parameters
    ----------
    layer : LayerSpec
    level_format : str

    Attributes
    ----------
    experts : dict of int to ExpertSizes
    """

    def __init__(self, layer: LayerSpec, level_format: str) -> None:
        self._level_format = level_format
        self._dictionaries = DictionarySet(layer_weights(layer))
        self.experts: dict[int, ExpertSizes] = {}

    def add(self, projection: Projection, expert: int, number: int, matrix: TernaryMatrix) -> None:
        """Note an expert's matrix, or some rows of it, made with its lambda of that number."""
        frame = self._dictionaries.encode(matrix.trits, matrix.levels, self._level_format)
        sizes = self.experts[expert]
        sizes.bytes[number] += grown_frame_bytes(frame, projection.rows / max(1, len(matrix.trits)))
        for identity in read_frame_header(frame).dictionary_ids:
            dictionary = self._dictionaries.dictionaries[identity]
            sizes.dictionaries[number][str(identity)] = len(dictionary.frame)


def layer_weights(layer: LayerSpec) -> int:
    """Expert weights of a layer."""
    return layer.experts * sum(p.rows * p.columns for p in layer.projections)


def layer_curve(layer: LayerSpec, samples: Sequence[ExpertSizes]) -> RateCurve:
    """What a layer takes as the codec writes it, with headers, dictionaries, index and alignment.

    Parameters
    ----------
    layer : LayerSpec
    samples : sequence of ExpertSizes
        Of some of its experts, with as many lambdas each, in the order of the experts: sums are rounded.
    """
    shared = [0] * len(samples[0].lams)
    for number in range(len(shared)):
        used = {name: size for sample in samples for name, size in sample.dictionaries[number].items()}
        shared[number] = sum(used.values())
    lams = np.unique([sample.lams for sample in samples])
    total = np.zeros(len(lams))
    for sample in samples:
        whole = np.ceil(np.array(sample.bytes) / RECORD_ALIGNMENT) * RECORD_ALIGNMENT + 24
        own = (layer.experts * whole + np.array(shared)) / len(samples)
        total += np.interp(np.log(lams), np.log(sample.lams), own)
    # More lambda never takes more bits, up to noise.
    return RateCurve(layer_weights(layer), lams, np.minimum.accumulate(total))


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
