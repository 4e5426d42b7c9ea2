"""The decoder in ``spec/reference``, built and run."""

from __future__ import annotations

import json
import shutil
import subprocess
import warnings
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "spec" / "reference" / "qmoe_reference.c"
STRICT = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Wshadow", "-Wconversion", "-Werror"]
SANITIZE = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
EXIT_CODES = {"version": 4}  # every other kind: 3


def build(folder: Path, flags: list[str]) -> Path:
    """Compile the decoder; the calling test is skipped where there is no compiler."""
    program = folder / "qmoe_reference"
    compiler = shutil.which("cc")
    if compiler is None:
        warnings.warn("no C compiler (cc): the decoder in spec/reference is NOT tested", stacklevel=1)
        pytest.skip("no C compiler (cc)")
    made = subprocess.run(
        [compiler, *STRICT, *flags, "-o", program, SOURCE], capture_output=True, text=True, check=False
    )
    assert made.returncode == 0, made.stderr
    return program


def sanitizers_work(folder: Path) -> bool:
    """Whether a program with sanitizers can be built and run here."""
    source = folder / "empty.c"
    source.write_text("int main(void) { return 0; }\n")
    compiler = shutil.which("cc")
    if compiler is None:
        return False
    steps = [[compiler, *SANITIZE, "-o", folder / "empty", source], [folder / "empty"]]
    return all(subprocess.run(step, capture_output=True, check=False).returncode == 0 for step in steps)


class ReferenceProgram:
    """Runs the decoder on files or bytes: its output, or the kind and field of its refusal."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program = program
        self._folder = folder

    def __call__(self, command: str, *arguments: str | Path | bytes) -> bytes | tuple[str, str]:
        words: list[str | Path] = []
        for argument in arguments:
            if isinstance(argument, bytes):
                path = self._folder / f"{len(words)}.bin"
                path.write_bytes(argument)
                argument = path
            words.append(argument)
        # No leak check: a refusal ends the program where it stands, and the check fails under a debugger.
        ran = subprocess.run(
            [self.program, command, *words],
            capture_output=True,
            check=False,
            env={"ASAN_OPTIONS": "detect_leaks=0"},
        )
        if ran.returncode == 0:
            return ran.stdout
        assert ran.returncode in (3, 4), (ran.returncode, ran.stderr.decode())
        refusal = json.loads(ran.stdout)
        assert ran.returncode == EXIT_CODES.get(refusal["error"], 3)
        return refusal["error"], refusal["field"]
