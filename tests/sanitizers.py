"""Builds of the C core with sanitizers, and how to run Python with one."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNELS = ("portable", "avx2", "avx512", "avx512vbmi")


def compiler() -> str:
    """The C compiler that CMake takes too."""
    found = shutil.which(os.environ.get("CC", "cc"))
    if not found:
        pytest.skip("NOT TESTED WITH SANITIZERS: there is no C compiler")
    return found


def runtime(name: str) -> Path:
    """The compiler's library of that name; the calling test is skipped where it has none."""
    answer = subprocess.run(
        [compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True
    )
    path = Path(answer.stdout.strip())
    if not path.is_absolute():
        pytest.skip(f"NOT TESTED WITH SANITIZERS: {compiler()} has no {name}")
    return path


def build(sanitizers: str, into: Path) -> Path:
    """Build the core and its fuzz programs; returns where they are."""
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", ROOT / "codec", "-B", into, f"-DQMOE_SANITIZE={sanitizers}"]
    if shutil.which("ninja", path=environment["PATH"]):
        configure += ["-G", "Ninja"]
    for command in (configure, ["cmake", "--build", into, "--parallel"]):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return into


def kernels_here() -> list[str]:
    """The kernels that this processor knows."""

    def name(kernels: str) -> str:
        code = "import qmoe_codec; print(qmoe_codec.kernels_name())"
        environment = {**os.environ, "QMOE_KERNELS": kernels}
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    return [kernels for kernels in KERNELS if name(kernels) == kernels]


@contextmanager
def each_kernels(
    command: list[str | Path], folder: Path, environment: dict[str, str]
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    """The command run in a folder for all kernels at once, by their name."""
    running = {
        kernels: subprocess.Popen(
            command,
            cwd=folder,
            env={**os.environ, **environment, "QMOE_KERNELS": kernels},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for kernels in kernels_here()
    }
    try:
        yield running
    finally:
        for process in running.values():
            process.kill()
            process.communicate()


def output_of(running: dict[str, subprocess.Popen[str]], kernels: str) -> str:
    """What the command said, if all went well."""
    if kernels not in running:
        pytest.skip(f"this processor has no {kernels}")
    text, _ = running[kernels].communicate(timeout=300)
    assert running[kernels].returncode == 0, text[-6000:]
    return text
