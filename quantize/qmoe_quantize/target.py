"""From the bits that a model shall take to the one lambda that gives them.

Two looks at the model. The first, with a share of the text, applies the recipe to some rows of a few experts
of every layer, over a wide range of lambdas: that gives a lambda that is nearly right. In the second all
experts are ternarized roughly with it, so that what comes behind them sees inputs like those of the run
itself, and the recipe is applied to some rows of many of them, with three lambdas close to it. Nothing is
kept of a group of experts once it has been seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from qmoe_format.container import LayerSpec, Projection

from .allocation import (
    LAM_STEPS,
    LayerSizes,
    RateCurve,
    nearest_lam,
    rough,
    sample_rows,
    solve_lam,
    ternarize_over,
    typical_cost,
)
from .calibrated import StoreTernarizer, StreamedExperts
from .problem import MatrixGroup
from .recipes import Problem, RecipeSettings
from .text import TokenWindows

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
between two of them."""
MOST_LOOKS = 3


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


class _Rates:
    """What rows of some experts of a layer take, for each of some lambdas."""

    def __init__(self, layer: LayerSpec, settings: RecipeSettings, rows: int, seed: int) -> None:
        self._layer = layer
        self._settings = settings
        self._rows = rows
        self._seed = seed
        self.lams: list[float] = []
        self._sizes: list[LayerSizes] = []

    def sample(self, projection: Projection, group: MatrixGroup) -> None:
        """Note some rows of each expert of a group."""
        if not self.lams:
            self.lams = [typical_cost([group]) * 10.0**step for step in LAM_STEPS]
        if not self._sizes:
            self._sizes = [LayerSizes(self._layer, self._settings.level_format) for _ in self.lams]
        rows = sample_rows(group, self._rows, self._seed)
        for sizes, made in zip(self._sizes, ternarize_over(rows, self._settings, self.lams), strict=True):
            sizes.add(projection, made)

    def curve(self) -> RateCurve:
        """Bytes of the layer."""
        sizes = np.array([sizes.nbytes() for sizes in self._sizes])
        # More lambda never takes more bits, up to noise.
        return RateCurve(self._sizes[0].weights, np.array(self.lams), np.minimum.accumulate(sizes))


class _FirstLook(_Rates):
    """Leaves the experts that it sees as they are; its lambdas are all that may be of use."""

    corrects = False

    def __init__(self, layer: LayerSpec, settings: RecipeSettings, seed: int) -> None:
        super().__init__(layer, settings, FEWEST_ROWS, seed)
        self.experts = spread(layer.experts, FIRST_EXPERTS)

    def wants(self, layer: LayerSpec, experts: Sequence[int]) -> list[int]:
        return [expert for expert in self.experts if expert in experts]

    def visit(
        self, layer: LayerSpec, projection: Projection, experts: list[int], group: MatrixGroup
    ) -> Tensor:
        self.sample(projection, group)
        return group.weight


class _SecondLook(_Rates):
    """Ternarizes all that it sees, roughly; its lambdas lie around one."""

    corrects = True

    def __init__(self, layer: LayerSpec, settings: RecipeSettings, lam: float, seed: int) -> None:
        super().__init__(layer, settings, max(FEWEST_ROWS, SAMPLED_ROWS // layer.experts), seed)
        self._rough = replace(settings, lam=lam)
        self.lams = [lam / NEAR, lam, lam * NEAR]
        self._step = -(-layer.experts // SAMPLED_EXPERTS)
        self._seen: dict[str, int] = {}

    def wants(self, layer: LayerSpec, experts: Sequence[int]) -> list[int]:
        return list(experts)

    def visit(
        self, layer: LayerSpec, projection: Projection, experts: list[int], group: MatrixGroup
    ) -> Tensor:
        # By tokens, for experts that saw few of them take far fewer bits.
        seen = self._seen.get(projection.name, 0)
        self._seen[projection.name] = seen + len(experts)
        by_tokens = torch.argsort(group.tokens, stable=True).tolist()
        chosen = [e for n, e in enumerate(by_tokens, seen) if n % self._step == self._step // 2]
        if chosen:
            self.sample(projection, group if len(chosen) == len(experts) else group.select(sorted(chosen)))
        return rough(Problem.of(group, self._rough), self._rough)


class LambdaSearch:
    """Looks at a model to find the lambda for a wanted rate. One search serves several rates.

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
    """

    def __init__(
        self,
        layers: Sequence[LayerSpec],
        source: Source,
        settings: RecipeSettings,
        seed: int,
        progress: Progress | None = None,
    ) -> None:
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
            No lambda gives so few or so many bits.
        """
        lam = solve_lam(curves, target_bits)
        seen: dict[float, float] = {}
        for _ in range(MOST_LOOKS):
            near = self._look(False, partial(self._second_look, lam))
            sizes = sum(curve.bytes for curve in near)
            rates = 8 * np.asarray(sizes) / sum(curve.weights for curve in near)
            seen |= zip(near[0].lams.tolist(), rates.tolist(), strict=True)
            low = max((known for known, rate in seen.items() if rate >= target_bits), default=None)
            high = min((known for known, rate in seen.items() if rate < target_bits), default=None)
            if low is None or high is None:  # go on from the nearest, as far as the first look says
                nearest = low or high
                assert nearest is not None
                lam = nearest * solve_lam(curves, target_bits) / nearest_lam(curves, seen[nearest])
                continue
            share = (seen[low] - target_bits) / (seen[low] - seen[high])
            lam = low * (high / low) ** share
            if high < 1.01 * NEAR * low:
                break
        return lam

    def _second_look(self, lam: float, layer: LayerSpec) -> _SecondLook:
        return _SecondLook(layer, self._settings, lam, self._seed)

    def _look(self, few: bool, begin: Callable[[LayerSpec], _FirstLook | _SecondLook]) -> list[RateCurve]:
        self._total += sum(layer.experts for layer in self._layers)
        stream = self._source if isinstance(self._source, StoreTernarizer) else self._source(few)
        curves = []
        for layer in self._layers:
            look = begin(layer)
            if isinstance(stream, StoreTernarizer):
                self._see_stored(stream, layer, look)
            else:
                for experts, _ in stream.run(layer, look):
                    self._advance(len(experts))
            curves.append(look.curve())
        return curves

    def _see_stored(self, store: StoreTernarizer, layer: LayerSpec, look: _FirstLook | _SecondLook) -> None:
        """One expert at a time; nothing comes behind them."""
        if isinstance(look, _FirstLook):
            chosen = look.experts
        else:
            by_tokens = np.argsort(store.tokens(layer), kind="stable")
            chosen = by_tokens[spread(layer.experts, SAMPLED_EXPERTS)].tolist()
        for expert in chosen:
            for projection in layer.projections:
                look.sample(projection, store.group(layer, projection, range(expert, expert + 1)))
        self._advance(layer.experts)

    def _advance(self, experts: int) -> None:
        self._done += experts
        if self._progress:
            self._progress(self._done, self._total)
