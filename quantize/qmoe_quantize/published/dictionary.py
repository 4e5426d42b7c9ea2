"""The dictionary of the QMoE paper, codeword by codeword (arXiv 2310.16795, section 4.2).

A phrase is a string of 1 to 14 pairs of weights. Under p(0) = .885 and signs that are equally likely, the
65,536 likeliest are the dictionary, and a codeword is a phrase's place in the order of falling probability.
Each phrase has at most 28 weights and at most three that are not zero.

A probability here is a product of doubles, taken from left to right, so phrases that are equally likely on
paper may differ in the last bit, and thousands of them lie at the cut-off. Where the products are equal, the
phrase whose pairs come first in the order of their numbers, 3 · second symbol + first symbol, goes first. So
nothing but these very operations gives the very codewords; the result is pinned by :data:`SHA256`.
"""

from __future__ import annotations

import functools
import hashlib
import heapq

import numpy as np
from qmoe_codec import Dictionary
from qmoe_codec.errors import QMoEError

P_ZERO = 0.885
BITS = 16
MAXIMUM_PAIRS = 14
#: SHA-256 of the dictionary frame (spec 3.1) that holds it.
SHA256 = "3c7a1644459ddb4ec815823aa4858c2a1eb93d562d9e2fb370bcf442fbcddb4f"

# What a symbol stands for: zero, the row's least value, the row's greatest value.
SYMBOL_TRITS = (0, -1, 1)


@functools.lru_cache(maxsize=1)
def published_dictionary() -> Dictionary:
    """The dictionary as a table of the format, built once in about a second.

    Raises
    ------
    QMoEError
        The machine's arithmetic gave another one.
    """
    dictionary = Dictionary.from_words(np.array([_word(p) for p in published_phrases()], np.uint32), BITS)
    digest = hashlib.sha256(dictionary.frame).hexdigest()
    if digest != SHA256:
        raise QMoEError(
            "this machine's floating point built another dictionary than the published one",
            field="SHA-256",
            value=digest,
            expected=SHA256,
        )
    return dictionary


@functools.lru_cache(maxsize=1)
def published_phrases() -> tuple[bytes, ...]:
    """Phrases in the order of their codewords, each as the numbers of its pairs."""
    symbol = (P_ZERO, (1 - P_ZERO) / 2, (1 - P_ZERO) / 2)
    pairs = [symbol[second] * symbol[first] for second in range(3) for first in range(3)]
    names = [bytes([number]) for number in range(9)]
    # Each continuation is less likely than the phrase, so the likeliest that is left is always on the heap.
    # Bytes compare as lists of pairs do.
    heap = [(-1.0 * p, name) for p, name in zip(pairs, names, strict=True)]
    heapq.heapify(heap)
    phrases: list[bytes] = []
    while len(phrases) < 1 << BITS:
        negative, phrase = heapq.heappop(heap)
        phrases.append(phrase)
        if len(phrase) < MAXIMUM_PAIRS:
            for p, name in zip(pairs, names, strict=True):
                heapq.heappush(heap, (negative * p, phrase + name))
    return tuple(phrases)


def _word(phrase: bytes) -> int:
    """The table word of a phrase (spec 3.3)."""
    trits = [SYMBOL_TRITS[symbol] for pair in phrase for symbol in (pair % 3, pair // 3)]
    positions = [position for position, trit in enumerate(trits) if trit]
    word = len(trits)
    for place, position in enumerate((*positions, 127, 127, 127)[:3]):
        word |= position << (7 + 7 * place)
        word |= (position != 127 and trits[position] < 0) << (28 + place)
    return word if len(positions) <= 3 else 0
