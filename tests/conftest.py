"""What tests share: hypothesis profiles, builds of the C core with sanitizers, an installed C library."""

import os
import shutil
import subprocess
import sysconfig
from pathlib import Path

import pytest
import reference_program
import sanitizers
from hypothesis import settings

settings.register_profile("default", max_examples=50, deadline=None)
# The same examples on every run, so that a change fails for what it changes and not by chance.
settings.register_profile("ci", max_examples=50, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("short", max_examples=8, deadline=None, derandomize=True, print_blob=True)
settings.register_profile("long", max_examples=5000, deadline=None, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "default"))


@pytest.fixture(scope="session")
def address_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the C core and its fuzzer are, built with the address and undefined-behaviour sanitizers."""
    sanitizers.runtime("libasan.so")
    return sanitizers.build("address,undefined", tmp_path_factory.mktemp("address"))


@pytest.fixture(scope="session")
def thread_build(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with the thread sanitizer."""
    sanitizers.runtime("libtsan.so")
    return sanitizers.build("thread", tmp_path_factory.mktemp("thread"))


@pytest.fixture(scope="session")
def installed_library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where ``cmake --install`` put the C library, its header and its CMake package."""
    sanitizers.compiler()
    folder = tmp_path_factory.mktemp("library")
    scripts = sysconfig.get_path("scripts")
    environment = {**os.environ, "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}"}
    configure = ["cmake", "-S", sanitizers.ROOT / "codec", "-B", folder / "build", "-DQMOE_WERROR=ON"]
    if shutil.which("ninja", path=environment["PATH"]):
        configure += ["-G", "Ninja"]
    for command in (
        [*configure, "-DCMAKE_INSTALL_LIBDIR=lib"],
        ["cmake", "--build", folder / "build", "--parallel"],
        ["cmake", "--install", folder / "build", "--prefix", folder / "prefix"],
    ):
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "prefix"


@pytest.fixture(scope="session")
def reference(tmp_path_factory: pytest.TempPathFactory) -> reference_program.ReferenceProgram:
    """The decoder in ``spec/reference``, with sanitizers where the compiler has them."""
    folder = tmp_path_factory.mktemp("reference")
    flags = reference_program.SANITIZE if reference_program.sanitizers_work(folder) else ["-O2"]
    return reference_program.ReferenceProgram(reference_program.build(folder, flags), folder)
