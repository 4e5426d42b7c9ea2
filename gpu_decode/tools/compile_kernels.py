"""Compile the kernels with nvcc and print what each takes: registers, shared memory, stack, spills.

    python gpu_decode/tools/compile_kernels.py [--all | --sample N] [--arch sm_90] [--jobs N] [--json FILE]

Needs no GPU. Ends with status 1 if a kernel spills registers or does not compile.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from qmoe_gpu_decode.sources import kernel_source
from qmoe_gpu_decode.specialisations import every_specialisation, some_specialisations

ARCHITECTURES = ("sm_80", "sm_90", "sm_100")
_REPORT = re.compile(
    r"Function properties for (\w+)\s+(\d+) bytes stack frame, "
    r"(\d+) bytes spill stores, (\d+) bytes spill loads.*?Used (\d+) registers([^\n]*)",
    re.DOTALL,
)


class Usage(NamedTuple):
    """What a kernel takes on one architecture."""

    architecture: str
    file: str
    definitions: str
    kernel: str
    registers: int
    shared: int
    stack: int
    spills: int


def nvcc() -> str | None:
    """The compiler, if there is one."""
    return shutil.which(os.environ.get("NVCC", "nvcc")) or shutil.which("/usr/local/cuda/bin/nvcc")


def compile_one(
    compiler: str, file: str, definitions: dict[str, int], architectures: Sequence[str]
) -> list[Usage]:
    """Compile one specialisation for each architecture."""
    text = " ".join(f"{key}={value}" for key, value in definitions.items())
    found = []
    with tempfile.TemporaryDirectory() as folder:
        unit = Path(folder) / "unit.cu"
        unit.write_text(kernel_source(file, definitions), "utf-8")
        for architecture in architectures:
            command = [compiler, "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", "-Werror"]
            command += ["all-warnings", "-o", str(Path(folder) / "unit.cubin"), str(unit)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{file} {text} {architecture}: {done.stderr[:3000]}")
            for kernel, stack, stores, loads, registers, rest in _REPORT.findall(done.stderr):
                shared = re.search(r"(\d+) bytes smem", rest)
                found.append(
                    Usage(
                        architecture,
                        file,
                        text,
                        kernel,
                        int(registers),
                        int(shared.group(1)) if shared else 0,
                        int(stack),
                        int(stores) + int(loads),
                    )
                )
    return found


def compile_all(
    chosen: Sequence[tuple[str, dict[str, int]]], architectures: Sequence[str], jobs: int
) -> list[Usage]:
    """Compile several at once."""
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("there is no nvcc")
    with ThreadPoolExecutor(jobs) as pool:
        parts = pool.map(lambda one: compile_one(compiler, one[0], one[1], architectures), chosen)
        return [usage for part in parts for usage in part]


def main() -> int:
    """Compile and print; the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--all", action="store_true", help="every specialisation (some 6000 runs of nvcc)")
    parser.add_argument("--sample", type=int, help="so many of them, drawn by chance")
    parser.add_argument("--arch", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="write the table there too")
    arguments = parser.parse_args()
    chosen = list(every_specialisation()) if arguments.all else some_specialisations()
    if arguments.sample:
        chosen = random.sample(list(every_specialisation()), arguments.sample)
    found = compile_all(chosen, arguments.arch, arguments.jobs)
    for usage in found:
        print(
            f"{usage.architecture:7} {usage.kernel:10} {usage.registers:4} registers "
            f"{usage.shared:5} B shared {usage.stack:4} B stack {usage.spills:4} B spills  "
            f"{usage.definitions}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps([usage._asdict() for usage in found], indent=1) + "\n", "utf-8")
    bad = [usage for usage in found if usage.spills]
    print(f"{len(found)} kernels, {len(bad)} with spills")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
