"""The codec's tests against a C core built with sanitizers, for all kernels; its measures and threads."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from qmoe_codec.core import library
from sanitizers import KERNELS, ROOT, compiler, each_kernels, output_of, runtime

pytestmark = pytest.mark.slow

# What takes long under the sanitizers and asks nothing more of the C core: the search for dictionaries above
# all. Products are checked by the fuzzer; `make sanitize` leaves nothing out.
LEFT_OUT = (
    "not (never_change or the_script or dense or rates_of or matmul_is_within or test_dequantize"
    " or experts_are or set_of_dictionaries or different_density or are_complete or body_that_changes)"
)
DICTIONARY = ROOT / "spec/vectors/valid/dictionary-trees-10.qmxd"


def sanitized_python(address_build: Path) -> dict[str, str]:
    """The environment in which Python runs with the sanitized core."""
    return {
        "LD_PRELOAD": str(runtime("libasan.so")),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself leaks
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "PYTHONMALLOC": "malloc",
        "QMOE_LIBRARY": str(address_build / "libqmoe.so"),
        "HYPOTHESIS_PROFILE": "short",
    }


@pytest.fixture(scope="module")
def codec_tests(address_build: Path) -> Iterator[dict[str, subprocess.Popen[str]]]:
    options = ["-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-k", LEFT_OUT]
    command = [sys.executable, "-m", "pytest", *options, "tests/test_codec.py", "tests/test_vectors.py"]
    with each_kernels(command, ROOT, sanitized_python(address_build)) as running:
        yield running


@pytest.mark.parametrize("kernels", KERNELS)
def test_the_codecs_tests_are_clean(codec_tests: dict[str, subprocess.Popen[str]], kernels: str) -> None:
    output = output_of(codec_tests, kernels)
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
        env={**os.environ, **sanitized_python(address_build)},
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0 and "heap-buffer-overflow" in done.stderr


@pytest.fixture(scope="module")
def threads(
    thread_build: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, subprocess.Popen[str]]]:
    command = [thread_build / "threads", DICTIONARY, "0"]
    with each_kernels(command, tmp_path_factory.mktemp("threads"), {}) as running:
        yield running


@pytest.mark.parametrize("kernels", KERNELS)
def test_threads_do_not_race(threads: dict[str, subprocess.Popen[str]], kernels: str) -> None:
    assert output_of(threads, kernels) == f"threads: no fault ({kernels} kernels)\n"


@pytest.mark.parametrize("kernels", KERNELS)
def test_rows_are_measured_as_they_are_walked(address_build: Path, tmp_path: Path, kernels: str) -> None:
    with each_kernels([address_build / "measure"], tmp_path, {}) as running:
        assert output_of(running, kernels) == f"{kernels}: measured as walked\n"


def test_children_forked_from_busy_threads_can_multiply(tmp_path: Path) -> None:
    core = Path(library()._name)
    built = [compiler(), "-std=c11", f"-I{ROOT / 'codec/include'}", "-o", tmp_path / "threads"]
    linked = [ROOT / "codec/fuzz/threads.c", core, f"-Wl,-rpath,{core.parent}", "-pthread"]
    for command in ([*built, *linked], [tmp_path / "threads", DICTIONARY, "50"]):
        done = subprocess.run(command, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stdout + done.stderr
    assert "no fault" in done.stdout
