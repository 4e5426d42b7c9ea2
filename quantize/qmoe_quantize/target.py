"""From the bits that a model shall take to the one lambda that gives them.

Two looks at the model. The first, with a share of the text, applies the recipe to some rows of a few experts
of every layer, over a wide range of lambdas: that gives a lambda that is nearly right. In the second all
experts are ternarized roughly with it, so that what comes behind them sees inputs like those of the run
itself, and the recipe is applied to some rows of many of them, with three lambdas close to it. Nothing is
kept of a group of experts once it has been seen. Several ranks look at the experts that each of them has, and
put together what they saw in the order of the experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
from qmoe_codec.errors import ArgumentError
from torch import Tensor

from qmoe_format.container import LayerSpec, Projection

from .allocation import (
    LAM_STEPS,
    ExpertSizes,
    RateCurve,
    SizeSamples,
    layer_curve,
    nearest_lam,
    rough,
    sample_rows,
    solve_lam,
    ternarize_over,
    typical_cost,
)
from .calibrated import StoreTernarizer, StreamedExperts
from .problem import MatrixGroup
from .ranks import Ranks
from .recipes import Problem, RecipeSettings
from .text import TokenWindows

Array = npt.NDArray[np.float64]
Progress = Callable[[int, int], None]
"""Told how many experts are done, and how many there are; once more for each look."""

FIRST_EXPERTS = 8
"""Experts of each layer, spread evenly, that the first look sees."""
FIRST_SHARE = 8
"""It sees one in so many of the windows of text."""
SAMPLED_EXPERTS = 64
"""About how many experts of each layer the recipe is applied to, spread evenly by the tokens they saw."""
SAMPLED_ROWS = 256
"""Rows of each projection of a layer that it is applied to at least, where there are as many."""
FEWEST_ROWS = 12
"""Of each expert; a frame of fewer says little of a whole one."""
NEAR = 1.6
"""How far the lambdas of the second look lie apart; it is taken again if the one that is wanted does not lie
between them."""
MOST_LOOKS = 8
FLAT = 1e-3
"""Share of the bits by which they differ at least where lambda matters."""


def few_windows(windows: TokenWindows) -> TokenWindows:
    """The windows that the first look sees."""
    few = slice(None, None, max(1, min(FIRST_SHARE, len(windows.tokens) // FIRST_SHARE)))
    if not windows.counted[few].any():
        return windows
    return replace(windows, tokens=windows.tokens[few], counted=windows.counted[few])


def spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the numbers below `count`, or all of them, spread evenly."""
    wanted = min(wanted, count)
    return [(2 * number + 1) * count // (2 * wanted) for number in range(wanted)]


Source = Callable[[bool], StreamedExperts] | StoreTernarizer
"""What begins to stream the model, over few of the windows of text or over all of them; or a store."""


class _Look:
    """What rows of some experts of a layer take, for each of some lambdas."""

    def __init__(self, layer: LayerSpec, settings: RecipeSettings, rows: int, seed: int) -> None:
        self._settings = settings
        self._rows = rows
        self._seed = seed
        self._samples = SizeSamples(layer, settings.level_format)

    def chosen(self, layer: LayerSpec, tokens: Sequence[int]) -> list[int]:
        """The experts that are sampled, given how many tokens reach each."""
        raise NotImplementedError

    def sample(self, projection: Projection, experts: Sequence[int], group: MatrixGroup) -> None:
        """Note some rows of each expert of a group."""
        known = self._samples.experts
        for place, expert in enumerate(experts):
            if expert not in known:
                known[expert] = ExpertSizes(expert, self._lams(group.select([place])))
        rows = sample_rows(group, self._rows, self._seed)
        lams = [known[expert].lams for expert in experts]
        for number, made in enumerate(ternarize_over(rows, self._settings, lams)):
            for expert, matrix in zip(experts, made, strict=True):
                self._samples.add(projection, expert, number, matrix)

    def _lams(self, group: MatrixGroup) -> list[float]:
        """What the expert of a group is tried with, by its first matrix."""
        raise NotImplementedError

    def found(self) -> list[dict[str, Any]]:
        """What was seen here, as JSON values."""
        return [asdict(sizes) for sizes in self._samples.experts.values()]


class _FirstLook(_Look):
    """Leaves the experts that it sees as they are; its lambdas are all that may be of use."""

    corrects = False

    def __init__(self, layer: LayerSpec, settings: RecipeSettings, seed: int) -> None:
        super().__init__(layer, settings, FEWEST_ROWS, seed)

    def chosen(self, layer: LayerSpec, tokens: Sequence[int]) -> list[int]:
        return spread(layer.experts, FIRST_EXPERTS)

    def wants(self, layer: LayerSpec, tokens: Sequence[int]) -> Collection[int]:
        return self.chosen(layer, tokens)

    def visit(
        self, layer: LayerSpec, projection: Projection, experts: list[int], group: MatrixGroup
    ) -> Tensor:
        self.sample(projection, experts, group)
        return group.weight

    def _lams(self, group: MatrixGroup) -> list[float]:
        return [typical_cost([group]) * 10.0**step for step in LAM_STEPS]


class _SecondLook(_Look):
    """Ternarizes all that it sees, roughly; its lambdas lie around one."""

    corrects = True

    def __init__(self, layer: LayerSpec, settings: RecipeSettings, lam: float, seed: int) -> None:
        super().__init__(layer, settings, max(FEWEST_ROWS, SAMPLED_ROWS // layer.experts), seed)
        self._rough = replace(settings, lam=lam)
        self._chosen: list[int] = []

    def chosen(self, layer: LayerSpec, tokens: Sequence[int]) -> list[int]:
        # By tokens, for experts that saw few of them take far fewer bits.
        by_tokens = np.argsort(tokens, kind="stable")
        return sorted(by_tokens[spread(layer.experts, SAMPLED_EXPERTS)].tolist())

    def wants(self, layer: LayerSpec, tokens: Sequence[int]) -> Collection[int]:
        self._chosen = self.chosen(layer, tokens)
        return range(layer.experts)

    def visit(
        self, layer: LayerSpec, projection: Projection, experts: list[int], group: MatrixGroup
    ) -> Tensor:
        places = [place for place, expert in enumerate(experts) if expert in self._chosen]
        if places:
            sampled = group if len(places) == len(experts) else group.select(places)
            self.sample(projection, [experts[place] for place in places], sampled)
        return rough(Problem.of(group, self._rough), self._rough)

    def _lams(self, group: MatrixGroup) -> list[float]:
        lam = self._rough.lam
        return [lam / NEAR, lam, lam * NEAR]


_Looks = _FirstLook | _SecondLook


class LambdaSearch:
    """Looks at a model to find the lambda for a wanted rate. One search serves several rates.

    All ranks do it together, and get the same.

    Parameters
    ----------
    layers : sequence of LayerSpec
    source : callable or StoreTernarizer
        Begins to stream the model, over few of the windows of text (if it is given True) or all; or a store.
    settings : RecipeSettings
        All but ``lam``.
    seed : int
        Decides which rows are looked at.
    progress : callable, optional
    ranks : Ranks, optional
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        source: Source,
        settings: RecipeSettings,
        seed: int,
        progress: Progress | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._ranks = ranks or Ranks()
        self._layers = layers
        self._source = source
        self._settings = settings
        self._seed = seed
        self._progress = progress
        self._done, self._total = 0, 0

    def first_look(self) -> list[RateCurve]:
        """Every layer's curve, about."""
        settings = self._settings
        if not isinstance(self._source, StoreTernarizer):
            # Else the prior would weigh more beside the fewer tokens that an expert sees
            settings = replace(settings, shrinkage=settings.shrinkage / FIRST_SHARE)
        return self._look(True, lambda layer: _FirstLook(layer, settings, self._seed))

    def find(self, target_bits: float, curves: Sequence[RateCurve]) -> float:
        """The lambda at which the whole model takes `target_bits` per expert weight.

        Parameters
        ----------
        target_bits : float
            Everything counted.
        curves : sequence of RateCurve
            Of :meth:`first_look`.

        Raises
        ------
        ArgumentError
            No lambda gives so few or so many bits, or none was found in :data:`MOST_LOOKS`.
        """
        # Rank 0 decides: on another host the last digit may be another.
        return float(self._ranks.gather(self._find(target_bits, curves))[0])

    def _find(self, target_bits: float, curves: Sequence[RateCurve]) -> float:
        lam = wanted = solve_lam(curves, target_bits)
        low: tuple[float, float] | None = None  # a lambda of too many bits, and those: the last one known
        high: tuple[float, float] | None = None  # and one of too few
        for number in range(MOST_LOOKS):
            lams, rates = self._rates_around(lam)
            # Each look is consistent in itself; between two of them, what comes behind the experts changes
            if rates[0] >= target_bits >= rates[-1]:
                return float(np.exp(np.interp(-target_bits, -rates, np.log(lams))))
            if rates[-1] > target_bits:
                low = edge = (lams[-1], rates[-1])
            else:
                high = edge = (lams[0], rates[0])
                if rates[0] - rates[-1] < FLAT * rates[0]:  # less lambda gives no more bits
                    break
            if low and high:
                if high[0] <= 1.01 * NEAR * low[0]:  # neighbours
                    share = (low[1] - target_bits) / (low[1] - high[1])
                    return float(low[0] * (high[0] / low[0]) ** share)
                lam = math.sqrt(low[0] * high[0])
            else:  # as far on as the first look says, but past what has been seen, and further each time
                step, least = wanted / nearest_lam(curves, edge[1]), NEAR ** (2**number)
                lam = edge[0] * (max(step, least) if low else min(step, 1 / least))
        rates_seen = [f"{rate:.3f} at lambda {at:.3g}" for at, rate in filter(None, (low, high))]
        raise ArgumentError(
            "no lambda for it was found",
            field="target_bpw",
            value=target_bits,
            expected=f"{' or '.join(rates_seen)}, or --lam",
        )

    def _rates_around(self, lam: float) -> tuple[Array, Array]:
        """Three lambdas around one, rising, and the bits per weight that a look gives for them."""
        near = self._look(False, partial(self._second_look, self._ranks.gather(lam)[0]))
        sizes = sum(curve.bytes for curve in near)
        rates = 8 * np.asarray(sizes) / sum(curve.weights for curve in near)
        lams, rates = self._ranks.gather([near[0].lams.tolist(), rates.tolist()])[0]
        return np.array(lams), np.array(rates)

    def _second_look(self, lam: float, layer: LayerSpec) -> _SecondLook:
        return _SecondLook(layer, self._settings, lam, self._seed)

    def _look(self, few: bool, begin: Callable[[LayerSpec], _Looks]) -> list[RateCurve]:
        self._total += sum(layer.experts for layer in self._layers)
        stream = self._source if isinstance(self._source, StoreTernarizer) else self._source(few)
        curves = []
        for layer in self._layers:
            look = begin(layer)
            if isinstance(stream, StoreTernarizer):
                self._see_stored(stream, layer, look)
            else:
                before = self._done
                for experts, _ in stream.run(layer, look):
                    # The others are about as far
                    self._advance(min(len(experts) * self._ranks.size, before + layer.experts - self._done))
                self._advance(before + layer.experts - self._done)
            found = [ExpertSizes(**sizes) for part in self._ranks.gather(look.found()) for sizes in part]
            curves.append(layer_curve(layer, sorted(found, key=lambda sizes: sizes.expert)))
        return curves

    def _see_stored(self, store: StoreTernarizer, layer: LayerSpec, look: _Looks) -> None:
        """One expert at a time; nothing comes behind them."""
        chosen = look.chosen(layer, store.tokens(layer))
        for place in self._ranks.share(len(chosen)):
            expert = chosen[place]
            for projection in layer.projections:
                look.sample(projection, [expert], store.group(layer, projection, range(expert, expert + 1)))
        self._advance(layer.experts)

    def _advance(self, experts: int) -> None:
        self._done += experts
        if self._progress:
            self._progress(self._done, self._total)
