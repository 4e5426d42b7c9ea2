"""One lambda for a whole model: from samples of its layers to the lambda that gives a wanted rate.

Rows of a matrix are ternarized independently of each other, so a few rows of a few experts, against their
full Hessians, tell how many bits the layer will take. Each layer gives a curve; the curves are added up and
the sum is inverted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from qmoe_codec import DictionarySet
from qmoe_codec.errors import ArgumentError

from qmoe_format.container import LayerSpec

from .problem import MatrixGroup
from .recipes import RecipeSettings, ternarize_group
from .sizes import grown_frame_bytes

STEPS_PER_DECADE = 2
MOST_STEPS = 20
"""Steps from the middle at most, to either side."""

SAMPLE_ROWS = 48


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


def rate_curve(
    layer: LayerSpec,
    samples: Sequence[MatrixGroup],
    settings: RecipeSettings,
    level_format: str | None = None,
) -> RateCurve:
    """Ternarize the samples of a layer over a range of lambdas, and predict the layer's bytes for each.

    Parameters
    ----------
    layer : LayerSpec
    samples : sequence of MatrixGroup
        One for each projection, in order: some of the layer's experts, of each some or all rows.
    settings : RecipeSettings
        All but ``lam``.

    Returns
    -------
    RateCurve
        Bytes as the codec writes them, with headers, dictionaries, index and alignment.
    """
    weights = layer.experts * sum(p.rows * p.columns for p in layer.projections)
    start = typical_cost(samples)
    sizes: dict[int, float] = {}  # by half decades from there

    def size(step: int) -> float:
        if step not in sizes:
            lam = start * 10.0 ** (step / STEPS_PER_DECADE)
            sizes[step] = _layer_bytes(layer, samples, replace(settings, lam=lam))
        return sizes[step]

    low = high = 0
    while low > -MOST_STEPS and (low > -2 or size(low) > 1.01 * size(low + 1)):
        low -= 1
    while high < MOST_STEPS and (high < 2 or size(high) < 0.99 * size(high - 1)):
        high += 1
    steps = range(low, high + 1)
    # More lambda never takes more bits, up to noise.
    falling = np.minimum.accumulate(np.array([size(step) for step in steps]))
    return RateCurve(weights, start * 10.0 ** (np.array(steps) / STEPS_PER_DECADE), falling)


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


def _layer_bytes(layer: LayerSpec, samples: Sequence[MatrixGroup], settings: RecipeSettings) -> float:
    weights = layer.experts * sum(p.rows * p.columns for p in layer.projections)
    dictionaries = DictionarySet(weights)
    record = 0.0
    for projection, group in zip(layer.projections, samples, strict=True):
        for matrix in ternarize_group(group, settings):
            frame = dictionaries.encode(matrix.trits, matrix.levels, settings.level_format)
            scale = projection.rows / max(1, len(matrix.trits))
            record += grown_frame_bytes(frame, scale) / len(group.names)
    # Records begin at multiples of 256 bytes: half of that on average, once per expert.
    return layer.experts * (record + 128 + 24) + len(dictionaries.to_bytes())


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
    for _ in range(60):
        middle = math.sqrt(low * high)
        if bits(middle) > target_bits:
            low = middle
        else:
            high = middle
    return math.sqrt(low * high)
