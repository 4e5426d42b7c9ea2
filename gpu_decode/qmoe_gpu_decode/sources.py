"""The kernels' text: the files in `kernels/`, joined into one and specialised by definitions in front."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from importlib import resources

_INCLUDE = re.compile(r'#include "(\w+\.cuh)"')
_KERNEL = re.compile(r'extern "C" __global__ void (?:__launch_bounds__\(.*\))?\s*(\w+)\(')


def _lines(name: str, seen: set[str]) -> list[str]:
    seen.add(name)
    text = resources.files(__package__).joinpath("kernels", name).read_text("utf-8")
    lines = [f'#line 1 "{name}"']
    for number, line in enumerate(text.splitlines(), start=1):
        included = _INCLUDE.fullmatch(line)
        if included is None:
            lines.append("" if line == "#pragma once" else line)
        elif included.group(1) not in seen:
            lines += [*_lines(included.group(1), seen), f'#line {number + 1} "{name}"']
    return lines


@functools.cache
def _joined(name: str) -> str:
    return "\n".join(_lines(name, set())) + "\n"


def kernel_source(name: str, definitions: Mapping[str, int]) -> str:
    """One translation unit without includes.

    Parameters
    ----------
    name : str
        A file of `kernels/`, such as ``matmul.cu``.
    definitions : mapping of str to int
        What specialises it; the head of the file says what it needs.
    """
    lines = [f"#define {key} {value}" for key, value in sorted(definitions.items())]
    return "\n".join([*lines, _joined(name)])


def kernel_names(source: str) -> list[str]:
    """Names of the kernels in a source."""
    return _KERNEL.findall(source)
