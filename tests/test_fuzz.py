"""The C core's fuzzer, for a few seconds; ``make fuzz SECONDS=600`` runs it for longer."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from sanitizers import KERNELS, ROOT, each_kernels, output_of

pytestmark = pytest.mark.slow

SECONDS = 8
VECTORS = sorted(path for path in (ROOT / "spec/vectors").glob("*/*") if path.suffix in (".qmxd", ".qmxm"))


@pytest.fixture(scope="module")
def fuzzers(
    address_build: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Path, dict[str, subprocess.Popen[str]]]]:
    folder = tmp_path_factory.mktemp("findings")
    with each_kernels([address_build / "fuzz_core", str(SECONDS), "1", *VECTORS], folder, {}) as running:
        yield folder, running


@pytest.mark.parametrize("kernels", KERNELS)
def test_mutated_frames_do_no_harm(
    fuzzers: tuple[Path, dict[str, subprocess.Popen[str]]], kernels: str
) -> None:
    folder, running = fuzzers
    counts = json.loads(output_of(running, kernels))
    assert counts["kernels"] == kernels
    # Most inputs must come past the checks of headers and checksums, or nothing was tested.
    assert counts["executions"] > 100
    assert counts["unchecked"] >= counts["checked"] > counts["executions"] / 10
    assert min(counts["dictionaries"], counts["products"], counts["encoded"]) > counts["executions"] / 4
    assert not list(folder.iterdir())
