"""Legal frames that no encoder would make: codewords drawn at random among those that may come next.

Decoders that were only ever fed by one encoder have blind spots; these streams reach them.
"""

from __future__ import annotations

import numpy as np
from qmoe_codec.reference import DictionaryTables, assemble


def random_row(generator: np.random.Generator, dictionary: DictionaryTables, columns: int) -> list[int]:
    """Codewords of one legal row; it may stop anywhere, and its last phrase may reach past its end."""
    row: list[int] = []
    column = table = 0
    while column < columns and generator.random() > 0.02:
        phrases = dictionary.phrases[table]
        legal = [
            codeword
            for codeword in generator.integers(0, len(phrases), 32).tolist()
            if (phrase := phrases[codeword]) is not None and not any(phrase[columns - column :])
        ]
        if not legal:
            break
        codeword = legal[0]
        row.append(codeword)
        column += len(phrases[codeword] or ())
        table = int(codeword >= dictionary.header.threshold)
    return row


def random_frame(
    generator: np.random.Generator,
    dictionary: DictionaryTables,
    *,
    rows: int,
    columns: int,
    level_format: int = 1,
) -> bytes:
    """A legal matrix frame of random rows and levels."""
    codewords = [random_row(generator, dictionary, columns) for _ in range(rows)]
    magnitudes = np.exp(generator.normal(-3, 1, (rows, 2))).astype(np.float32)
    levels = magnitudes * np.float32([-1, 1])
    return assemble(columns, codewords, levels, [dictionary], np.zeros(rows, np.uint8), level_format)
