"""Ternary rows as the authors of QMoE send them (see :mod:`.layout`)."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
from qmoe_codec import encode
from qmoe_codec.codewords import split_codewords

from .dictionary import MAXIMUM_PAIRS, published_dictionary, published_phrases

LONGEST = 2 * MAXIMUM_PAIRS


@functools.lru_cache(maxsize=1)
def phrase_lengths() -> npt.NDArray[np.int64]:
    """Weights in the phrase of each codeword, int64 [65536]."""
    lengths: npt.NDArray[np.int64] = (published_dictionary().words[0] & 127).astype(np.int64)
    lengths.flags.writeable = False
    return lengths


@functools.lru_cache(maxsize=1)
def _codewords() -> dict[bytes, int]:
    return {phrase: codeword for codeword, phrase in enumerate(published_phrases())}


def covered_columns(
    counts: npt.NDArray[np.int64], codewords: npt.NDArray[np.integer]
) -> npt.NDArray[np.int64]:
    """Weights that the codewords of each row stand for, int64 [rows]."""
    ends = np.concatenate([[0], np.cumsum(phrase_lengths()[codewords])])
    last = np.cumsum(counts)
    return np.asarray(ends[last] - ends[last - counts])


def published_codewords(
    trits: npt.NDArray[np.int8],
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.uint16]]:
    """Cut rows into phrases as the authors' packer does.

    Parameters
    ----------
    trits : ndarray of int8 [rows, columns]

    Returns
    -------
    counts : ndarray of int64 [rows]
        Codewords in each row.
    codewords : ndarray of uint16 [sum of counts]
    """
    # The codec takes the longest phrases too, but stops with the last non-zero, and its last phrase may reach
    # past the row. Every beginning of a phrase is a phrase, so that one can be cut off.
    rows, columns = trits.shape
    frame = encode(trits, np.zeros((rows, 2), np.float32), published_dictionary())
    counts, words = split_codewords(frame)
    target = columns + columns % 2
    covered = covered_columns(counts, words)
    phrases, numbers = published_phrases(), _codewords()
    last = np.cumsum(counts) - 1
    for row in np.flatnonzero(covered > target).tolist():
        phrase = phrases[int(words[last[row]])]
        words[last[row]] = numbers[phrase[: len(phrase) - (int(covered[row]) - target) // 2]]
    # Zeros at the end: as many of the longest phrase as fit, then one for what is left.
    rest = target - np.minimum(covered, target)
    added = -(-rest // LONGEST)
    new_counts = counts + added
    ends = np.cumsum(new_counts)
    out = np.full(int(new_counts.sum()), numbers[bytes(MAXIMUM_PAIRS)], np.uint16)
    out[np.arange(len(words)) + np.repeat(np.cumsum(added) - added, counts)] = words
    for row in np.flatnonzero(rest % LONGEST).tolist():
        out[ends[row] - 1] = numbers[bytes(int(rest[row] % LONGEST) // 2)]
    return new_counts, out
