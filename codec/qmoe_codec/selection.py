"""Which dictionaries a matrix should use: predicted from its rows' densities, then encoded.

For a memoryless source the mean number of trits per codeword follows from the dictionary alone, so the size
of a row is predicted from its share of zeros without encoding it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from .codec import encode
from .dictionary import Dictionary, build_dictionary, join_dictionaries
from .layout import LEVEL_FORMATS, MAXIMUM_DICTIONARIES, FrameHeader

# Shares of non-zeros to build for, four to the octave: a source half a step away costs 0.1 % more.
NONZERO_SHARES = tuple(2.0 ** (-step / 4) for step in range(3, 25))
# The densest source that a width is of use for: wide codewords need long phrases, which have few non-zeros.
DENSEST = {8: 1.0, 10: 0.6, 12: 0.3}

# How many times its share of a dictionary's bytes a matrix is charged, as if so few matrices of a layer came
# to use the same one: measured, fewer bytes than when the first to use one pays and the others do not.
SHARING = 8.0

_GRID = np.linspace(-6.0, 9.0, 121)  # log-odds of a zero, where rates are tabulated


def trits_per_codeword(dictionary: Dictionary, p_zero: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean trits per codeword on memoryless sources with `p_zero` zeros and evenly mixed signs.

    The chain of tables T0, T1 is taken in its stationary state. Of a dictionary with one table whose phrases
    overlap (spec 3.3), which has no such closed form, this is not defined.
    """
    words = dictionary.words.astype(np.int64)
    length = words & 127
    nonzeros = sum((((words >> shift) & 127) != 127).astype(np.int64) for shift in (7, 14, 21))
    used = words != 0
    onward = np.arange(words.shape[1]) >= dictionary.threshold
    means, moves = [], []
    for table in range(dictionary.tables):
        key = np.stack([length[table], nonzeros[table], onward])[:, used[table]]
        kinds, counts = np.unique(key, axis=1, return_counts=True)
        log_zero, log_nonzero = np.log(p_zero)[:, None], np.log((1 - p_zero) / 2)[:, None]
        probability = np.exp((kinds[0] - kinds[1]) * log_zero + kinds[1] * log_nonzero) * counts
        probability *= np.where(kinds[2] == 1, (1 - p_zero)[:, None], 1.0)
        if table:
            probability /= (1 - p_zero)[:, None]
        means.append(probability @ kinds[0])
        moves.append(probability @ kinds[2])
    if dictionary.tables == 1:
        return np.asarray(means[0])
    second = moves[0] / np.maximum(1 + moves[0] - moves[1], 1e-12)
    return np.asarray((1 - second) * means[0] + second * means[1])


@functools.lru_cache(maxsize=256)
def _bits_per_trit(share: float, bits: int) -> NDArray[np.float64]:
    """Bits per trit of the built dictionary, tabulated over `_GRID`."""
    p_zero = 1 / (1 + np.exp(-_GRID))
    return bits / trits_per_codeword(build_dictionary(1 - share, bits), p_zero)


def predict_bits(share: float, bits: int, nonzeros: NDArray[np.int64], columns: int) -> NDArray[np.float64]:
    """Predicted bits of the codewords of each row, given the number of non-zeros in it.

    Half a codeword is added per row for the last phrase, which reaches past the last non-zero.
    """
    p_zero = np.clip(1 - nonzeros / max(columns, 1), 1e-9, 1 - 1e-9)
    rate = np.interp(np.log(p_zero / (1 - p_zero)), _GRID, _bits_per_trit(share, bits))
    return np.where(nonzeros == 0, 0.0, columns * rate + bits / 2)


@dataclass(frozen=True)
class _Choice:
    """Dictionaries of one width, by the shares that they were built for, and which of them each row uses."""

    bits: int
    shares: tuple[float, ...]
    selectors: NDArray[np.uint8]
    size: float  # predicted, in bits


def _entropy(p_zero: NDArray[np.float64]) -> NDArray[np.float64]:
    p = np.clip(p_zero, 1e-12, 1 - 1e-12)
    return np.asarray(-p * np.log2(p) - (1 - p) * np.log2((1 - p) / 2))


def _shares_near(share: float, count: int) -> list[float]:
    return sorted(NONZERO_SHARES, key=lambda candidate: abs(np.log(candidate / max(share, 1e-9))))[:count]


def _rows_differ(nonzeros: NDArray[np.int64], columns: int) -> bool:
    """Whether rows differ in density by so much more than chance that several dictionaries can pay."""
    p_zero = 1 - nonzeros / max(columns, 1)
    whole = columns * len(nonzeros) * float(_entropy(np.asarray(p_zero.mean())))
    gain = whole - columns * float(_entropy(p_zero).sum())
    return gain > 0.01 * whole + 3 * len(nonzeros)


class DictionarySet:
    """The dictionaries that one layer uses; it grows as matrices are encoded.

    Parameters
    ----------
    weights : int, optional
        Ternary weights that will share the set. A matrix is charged for each dictionary that it uses, in
        proportion to its share of them; by default nothing is charged.

    Notes
    -----
    What a matrix chooses depends on the matrix and `weights` alone, not on what was encoded before: so the
    matrices of a layer can be encoded in any order, and in several places.
    """

    def __init__(self, weights: int | None = None) -> None:
        self.dictionaries: dict[int, Dictionary] = {}
        self._weights = weights

    def to_bytes(self) -> bytes:
        """The frames of the dictionaries used so far, in rising order of id (spec 6.1)."""
        return join_dictionaries(self.dictionaries.values())

    def _charge(self, share: float, bits: int, weights: int) -> float:
        dictionary = build_dictionary(1 - share, bits)
        if self._weights is None:
            return 0.0
        return 8.0 * len(dictionary.frame) * min(1.0, SHARING * weights / max(self._weights, 1))

    def _choose(self, nonzeros: NDArray[np.int64], columns: int) -> _Choice:
        """The cheapest dictionaries by prediction."""
        rows = len(nonzeros)
        share = float(nonzeros.sum()) / max(rows * columns, 1)
        differ = _rows_differ(nonzeros, columns)
        shares: Iterable[float] = _shares_near(share, 2)
        if differ:
            occurring = np.quantile(nonzeros / columns, (0.02, 0.98))
            shares = [s for s in NONZERO_SHARES if occurring[0] / 1.2 <= s <= occurring[1] * 1.2] or shares
        usable = {bits: [s for s in shares if s <= densest] for bits, densest in DENSEST.items()}
        choices = [
            self._choose_shares(bits, candidates, nonzeros, columns, differ)
            for bits, candidates in usable.items()
            if candidates
        ]
        return min(choices, key=lambda choice: choice.size)

    def _choose_shares(
        self, bits: int, shares: Sequence[float], nonzeros: NDArray[np.int64], columns: int, several: bool
    ) -> _Choice:
        """Greedily: the best dictionary, then each time the one that saves most, as long as one saves."""
        rows = len(nonzeros)
        cost = np.stack([predict_bits(share, bits, nonzeros, columns) for share in shares])
        charge = np.array([self._charge(share, bits, rows * columns) for share in shares])
        chosen = [int(np.argmin(cost.sum(axis=1) + charge))]
        size = float(cost[chosen[0]].sum() + charge[chosen[0]])
        while several and len(chosen) < min(MAXIMUM_DICTIONARIES, len(shares)):
            best = cost[chosen].min(axis=0)
            selector_bits = rows * (1 if len(chosen) == 1 else 2)
            totals = np.minimum(cost, best).sum(axis=1) + charge + charge[chosen].sum() + selector_bits
            totals[chosen] = np.inf
            candidate = int(np.argmin(totals))
            if totals[candidate] > 0.998 * size:
                break
            chosen.append(candidate)
            size = float(totals[candidate])
        selectors = np.argmin(cost[chosen], axis=0).astype(np.uint8)
        return _Choice(bits, tuple(shares[index] for index in chosen), selectors, size)

    def encode(self, trits: ArrayLike, levels: ArrayLike, level_format: str = "bfloat16") -> bytes:
        """Encode a matrix with whatever makes it smallest, the raw codec included.

        Dictionaries that it uses are added to the set. Arguments as for :func:`~.codec.encode`.
        """
        array = np.ascontiguousarray(trits, np.int8)
        if array.ndim != 2 or not array.size:
            return encode(array, levels, None, level_format=level_format)
        raw = FrameHeader.raw(array.shape[0], array.shape[1], LEVEL_FORMATS.index(level_format))
        choice = self._choose(np.count_nonzero(array, axis=1).astype(np.int64), array.shape[1])
        if choice.size < 1.1 * 8 * raw.frame_size:  # else hopeless, even if the prediction is somewhat off
            used, selectors = np.unique(choice.selectors, return_inverse=True)
            dictionaries = [build_dictionary(1 - choice.shares[index], choice.bits) for index in used]
            frame = encode(array, levels, dictionaries, level_format=level_format, selectors=selectors)
            if len(frame) <= raw.frame_size:
                self.dictionaries.update((d.dictionary_id, d) for d in dictionaries)
                return frame
        return encode(array, levels, None, level_format=level_format)
