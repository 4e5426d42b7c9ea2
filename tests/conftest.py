"""What tests share: the hypothesis profiles, and builds of the C core with sanitizers."""

import os
from pathlib import Path

import pytest
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
