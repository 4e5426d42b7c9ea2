"""Every specialisation of the kernels that the launchers can ask for, to compile them ahead of use."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

WARPS = 8
CODECS = (1, 2, 4, 8, 16, 15, 31)  # each alone, those of trees with raw, and all


def every_specialisation() -> Iterator[tuple[str, dict[str, int]]]:
    """File and definitions, one after the other."""
    yield "encode.cu", {}
    for index, weight, out in itertools.product((4, 8), (0, 1, 2), (0, 1, 2)):
        yield "route.cu", {"TOKENS": 8, "INDEX_SIZE": index, "WEIGHT_KIND": weight, "OUT_KIND": out}
    for codecs, tables in itertools.product(CODECS, (0, 1)):
        common = {"CODECS": codecs, "TABLES_SHARED": tables, "WARPS": WARPS}
        for out in range(4):
            yield "decode.cu", {**common, "OUT_KIND": out}
        for x, staged, tokens in itertools.product((0, 1, 2), (0, 1), (1, 2, 4, 8, 16, 32)):
            product = {**common, "X_KIND": x, "X_SHARED": staged, "TOKENS": tokens}
            yield "matmul.cu", {**product, "OUT_KIND": x}
            if tokens > 8:
                continue
            for gated, activation in ((1, 1), (1, 2), (1, 3), (1, 5), (0, 4)):
                yield "enter.cu", {**product, "GATED": gated, "ACTIVATION": activation}
            if x == 0:
                yield "leave.cu", product


def some_specialisations() -> list[tuple[str, dict[str, int]]]:
    """A few of them that between them reach every kernel, the largest among them."""
    common = {"CODECS": 31, "TABLES_SHARED": 1, "WARPS": WARPS}
    product = {**common, "X_KIND": 1, "X_SHARED": 1}
    return [
        ("encode.cu", {}),
        ("route.cu", {"TOKENS": 8, "INDEX_SIZE": 8, "WEIGHT_KIND": 1, "OUT_KIND": 1}),
        ("decode.cu", {**common, "OUT_KIND": 1}),
        ("matmul.cu", {**product, "OUT_KIND": 1, "TOKENS": 1, "CODECS": 4}),
        ("matmul.cu", {**product, "OUT_KIND": 1, "TOKENS": 8}),
        ("enter.cu", {**product, "TOKENS": 8, "GATED": 1, "ACTIVATION": 1}),
        ("leave.cu", {**product, "TOKENS": 8, "X_KIND": 0}),
    ]
