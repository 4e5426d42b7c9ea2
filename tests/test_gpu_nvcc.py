"""The kernels compile for real GPUs, where there is nvcc: no spills. All: gpu_decode/tools."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "gpu_decode" / "tools"))

from compile_kernels import ARCHITECTURES, compile_all, nvcc
from qmoe_gpu_decode.specialisations import every_specialisation, some_specialisations


@pytest.mark.slow
@pytest.mark.skipif(nvcc() is None, reason="GPU KERNELS NOT COMPILED: there is no nvcc")
def test_no_kernel_spills() -> None:
    some = some_specialisations()
    found = compile_all(some, ["sm_90"], jobs=2)
    found += compile_all(some[4:5], [name for name in ARCHITECTURES if name != "sm_90"], jobs=2)
    kernels = {usage.kernel for usage in found}
    assert kernels >= {
        "decode",
        "matmul",
        "tiles",
        "enter",
        "leave",
        "route",
        "combine",
        "count_rows",
        "checksum",
    }
    assert len({usage.architecture for usage in found}) == 3
    assert not [usage for usage in found if usage.spills]


def test_the_list_of_specialisations_has_no_repeats() -> None:
    every = [(file, *sorted(definitions.items())) for file, definitions in every_specialisation()]
    assert len(set(every)) == len(every)
