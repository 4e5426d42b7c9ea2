"""The codec's tests against a C core built with sanitizers, for all kernels; and its pool of threads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from qmoe_codec.core import library
from sanitizers import KERNELS, ROOT, compiler, kernels_here, runtime

pytestmark = pytest.mark.slow

# What takes long under the sanitizers and asks nothing more of the C core: the search for dictionaries above
# all. Products are checked by the fuzzer; `make sanitize` leaves nothing out.
LEFT_OUT = (
    "not (never_change or the_script or dense or rates_of or matmul_is_within or test_dequantize"
    " or experts_are or set_of_dictionaries or different_density or are_complete or body_that_changes)"
)
DICTIONARY = ROOT / "spec/vectors/valid/dictionary-trees-10.qmxd"


def run(command: list[str | Path], **environment: str) -> str:
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def sanitized_python(address_build: Path, kernels: str) -> dict[str, str]:
    """The environment in which Python runs with the sanitized core."""
    return {
        "LD_PRELOAD": str(runtime("libasan.so")),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "QMOE_LIBRARY": str(address_build / "libqmoe.so"),
        "QMOE_KERNELS": kernels,
        "HYPOTHESIS_PROFILE": "short",
    }


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_codecs_tests_are_clean(address_build: Path, kernels: str) -> None:
    kernels_here(kernels)
    tests = ["tests/test_codec.py", "tests/test_vectors.py"]
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    environment = sanitized_python(address_build, kernels)
    output = run([sys.executable, "-m", "pytest", *options, *tests], **environment)
    assert " passed" in output and "skipped" not in output


def test_the_sanitizer_sees_what_it_should(address_build: Path) -> None:
    """A read beyond a buffer ends Python: so the tests above would not pass in silence."""
    read_beyond = (
        "import numpy, qmoe_codec\n"
        "data = numpy.zeros(100, numpy.uint8)\n"
        "qmoe_codec.core.library().qmoe_crc32c(0, data.ctypes.data, 101)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", read_beyond],
        env={**os.environ, **sanitized_python(address_build, "portable")},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.mark.parametrize("kernels", KERNELS)
def test_threads_do_not_race(thread_build: Path, kernels: str) -> None:
    kernels_here(kernels)
    output = run([thread_build / "threads", DICTIONARY, "0"], QMOE_KERNELS=kernels)
    assert output == f"threads: no fault ({kernels} kernels)\n"


def test_children_forked_from_busy_threads_can_multiply(tmp_path: Path) -> None:
    core = Path(library()._name)
    command = [compiler(), "-std=c11", f"-I{ROOT / 'codec/include'}", "-o", tmp_path / "threads"]
    run([*command, ROOT / "codec/fuzz/threads.c", core, f"-Wl,-rpath,{core.parent}", "-pthread"])
    assert "no fault" in run([tmp_path / "threads", DICTIONARY, "50"])
