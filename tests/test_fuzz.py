"""The C core's fuzzer, for a few seconds; ``make fuzz SECONDS=600`` runs it for longer."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from sanitizers import KERNELS, ROOT, kernels_here

pytestmark = pytest.mark.slow

SECONDS = 5
VECTORS = sorted(path for path in (ROOT / "spec/vectors").glob("*/*") if path.suffix in (".qmxd", ".qmxm"))


@pytest.mark.parametrize("kernels", KERNELS)
def test_mutated_frames_do_no_harm(address_build: Path, kernels: str, tmp_path: Path) -> None:
    kernels_here(kernels)
    done = subprocess.run(
        [address_build / "fuzz_core", str(SECONDS), "1", *VECTORS],
        cwd=tmp_path,
        env={**os.environ, "QMOE_KERNELS": kernels},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    counts = json.loads(done.stdout)
    assert counts["kernels"] == kernels
    # Most inputs must come past the checks of headers and checksums, or nothing was tested.
    assert counts["executions"] > 100
    assert counts["unchecked"] >= counts["checked"] > counts["executions"] / 10
    assert min(counts["dictionaries"], counts["products"], counts["encoded"]) > counts["executions"] / 4
    assert not list(tmp_path.iterdir())
