"""Every specialisation of the kernels that the launchers can ask for, to compile them ahead of use."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from . import experts
from .products import ONE_TOKEN, TILES, TUNING

CODECS = (1, 2, 4, 8, 16, 15, 31)  # each alone, those of trees with raw, and all


def every_specialisation() -> Iterator[tuple[str, dict[str, int]]]:
    """File and definitions, one after the other."""
    yield "encode.cu", {}
    for index, weight, out in itertools.product((4, 8), (0, 1, 2), (0, 1, 2)):
        yield "route.cu", {"TOKENS": 8, "INDEX_SIZE": index, "WEIGHT_KIND": weight, "OUT_KIND": out}
    for codecs, tables in itertools.product(CODECS, (0, 1)):
        common = {"CODECS": codecs, "TABLES_SHARED": tables}
        for out in range(4):
            yield "decode.cu", {**common, **TUNING.definitions(codecs, 1), "OUT_KIND": out}
        for x in (1, 2):
            sizes = {"SHARE": TUNING.share, "TOGETHER": TUNING.together, "PREFETCH": int(TUNING.prefetch)}
            yield "tiles.cu", {**common, **sizes, "X_KIND": x}
        for x, staged, tokens in itertools.product((0, 1, 2), (0, 1), TILES):
            product = {**common, "X_KIND": x, "X_SHARED": staged, "TOKENS": tokens}
            tuning = ONE_TOKEN if tokens == 1 else TUNING
            yield "matmul.cu", {**product, **tuning.definitions(codecs, tokens), "OUT_KIND": x}
            if tokens > experts.MOST_TOKENS:
                continue
            product |= experts.TUNING.definitions(codecs, tokens)
            for gated, activation in ((1, 1), (1, 2), (1, 3), (1, 5), (0, 4)):
                yield "enter.cu", {**product, "GATED": gated, "ACTIVATION": activation}
            if x == 0:
                yield "leave.cu", product


def some_specialisations() -> list[tuple[str, dict[str, int]]]:
    """A few of them that between them reach every kernel, the largest among them."""
    common = {"CODECS": 31, "TABLES_SHARED": 1}
    product = {**common, "X_KIND": 1, "X_SHARED": 1, "TOKENS": 8}
    one = {**product, "CODECS": 4, "TOKENS": 1, "OUT_KIND": 1, **ONE_TOKEN.definitions(4, 1)}
    layer = {**product, **experts.TUNING.definitions(31, 8)}
    return [
        ("encode.cu", {}),
        ("route.cu", {"TOKENS": 8, "INDEX_SIZE": 8, "WEIGHT_KIND": 1, "OUT_KIND": 1}),
        ("decode.cu", {**common, **TUNING.definitions(31, 1), "OUT_KIND": 1}),
        ("matmul.cu", one),
        ("matmul.cu", {**product, **TUNING.definitions(31, 8), "OUT_KIND": 1}),
        (
            "tiles.cu",
            {**common, "SHARE": TUNING.share, "TOGETHER": TUNING.together, "PREFETCH": 1, "X_KIND": 1},
        ),
        ("enter.cu", {**layer, "GATED": 1, "ACTIVATION": 1}),
        ("leave.cu", {**layer, "X_KIND": 0}),
    ]
