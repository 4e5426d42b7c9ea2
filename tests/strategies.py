"""Hypothesis strategies for the codec: dictionaries, ternary matrices, levels."""

import functools
import struct
from dataclasses import dataclass

import numpy as np
from hypothesis import strategies as st
from qmoe_codec import LEVEL_FORMATS, Dictionary, build_dictionary, crc32c, round_levels


@functools.cache
def some_dictionaries() -> tuple[Dictionary, ...]:
    """Dictionaries of every width and kind, for sparse and for dense rows."""
    built = [build_dictionary(p, bits) for bits in (8, 10, 12) for p in (0.45, 0.8, 0.9, 0.97)]
    return (*built, table_dictionary(8), table_dictionary(16))


def table_dictionary(bits: int) -> Dictionary:
    """A dictionary of one table: all phrases of up to four trits with three non-zeros, and runs of zeros."""
    phrases = [()]
    phrases = [(*phrase, trit) for phrase in phrases for trit in (0, 1, -1)]
    every = list(phrases)
    for _ in range(3):
        phrases = [(*phrase, trit) for phrase in phrases for trit in (0, 1, -1)]
        every += [phrase for phrase in phrases if np.count_nonzero(phrase) <= 3]
    every += [(0,) * length for length in (5, 8, 16, 32, 64, 126)]
    words = np.zeros(1 << bits, np.uint32)
    for codeword, phrase in enumerate(every, start=2):
        positions = np.flatnonzero(phrase).tolist()
        word = len(phrase)
        for k in range(3):
            word |= (positions[k] if k < len(positions) else 127) << (7 + 7 * k)
            word |= (k < len(positions) and phrase[positions[k]] < 0) << (28 + k)
        words[codeword] = word
    return Dictionary.from_words(words, bits)


@dataclass(frozen=True)
class TernaryMatrix:
    """Trits and levels, with the format that holds these levels exactly."""

    trits: np.ndarray
    levels: np.ndarray
    level_format: str


@st.composite
def ternary_matrices(draw: st.DrawFn, max_rows: int = 70, max_columns: int = 300) -> TernaryMatrix:
    """Matrices of any small shape, their rows of any density and mix of signs, extreme ones among them."""
    rows = draw(st.integers(0, max_rows))
    columns = draw(st.integers(0, max_columns))
    generator = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    densities = draw(st.sampled_from([(0.1,), (0.02,), (0.5,), (0.9,), (0.01, 0.3), (0.0, 0.1, 1.0)]))
    p_high = draw(st.sampled_from([0.5, 0.5, 0.9, 0.0, 1.0]))
    density = generator.choice(densities, (rows, 1))
    signs = np.where(generator.random((rows, columns)) < p_high, 1, -1)
    trits = np.where(generator.random((rows, columns)) < density, signs, 0).astype(np.int8)
    level_format = draw(st.sampled_from(LEVEL_FORMATS))
    magnitude = np.exp(generator.normal(draw(st.sampled_from([-4.0, 0.0])), 1.0, (rows, 2)))
    magnitude[generator.random((rows, 2)) < 0.1] = 0.0
    levels = (magnitude * (-1, 1)).astype(np.float32)
    return TernaryMatrix(trits, round_levels(levels, level_format), level_format)


def reseal(frame: bytes | bytearray) -> bytes:
    """The frame with both checksums made to fit its bytes."""
    copy = bytearray(frame)
    struct.pack_into("<I", copy, 56, crc32c(bytes(copy[64:])))
    struct.pack_into("<I", copy, 60, crc32c(bytes(copy[:60])))
    return bytes(copy)
