"""The 16-bit dictionary of QMoE (Frantar & Alistarh, arXiv 2310.16795, section 4): a peer to measure.

Phrases are strings of 1 to 14 pairs of weights. The 65,536 most probable ones under p(0) = .885 are the
dictionary; since every prefix of a phrase is at least as probable as the phrase, greedy growth from the most
probable finds them.
"""

from __future__ import annotations

import heapq

import numpy as np
from qmoe_codec import Dictionary

P_ZERO = 0.885
BITS = 16
MAXIMUM_PAIRS = 14
ROW_OVERHEAD_BITS = 64  # an offset of 32 bits and two bfloat16 levels


def build() -> Dictionary:
    """The dictionary as one table of the format."""
    probability = {0: P_ZERO, 1: (1 - P_ZERO) / 2, -1: (1 - P_ZERO) / 2}
    pairs = [((a, b), probability[a] * probability[b]) for a in probability for b in probability]
    heap = [(-p, pair) for pair, p in pairs]
    heapq.heapify(heap)
    words = []
    while len(words) < 1 << BITS:
        negative, phrase = heapq.heappop(heap)
        words.append(_word(phrase))
        if len(phrase) < 2 * MAXIMUM_PAIRS:
            for pair, p in pairs:
                heapq.heappush(heap, (negative * p, phrase + pair))
    return Dictionary.from_words(np.array(words, np.uint32), BITS)


def _word(phrase: tuple[int, ...]) -> int:
    positions = [position for position, trit in enumerate(phrase) if trit]
    word = len(phrase)
    for k in range(3):
        word |= (positions[k] if k < len(positions) else 127) << (7 + 7 * k)
        word |= (k < len(positions) and phrase[positions[k]] < 0) << (28 + k)
    if len(positions) > 3:
        raise AssertionError(
            f"a phrase with {len(positions)} non-zeros, which the paper's dictionary has not"
        )
    return word
