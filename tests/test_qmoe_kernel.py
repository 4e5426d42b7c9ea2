"""The benchmark's peer, the QMoE authors' kernel, as far as it goes without a GPU.

A kernel of our own with the same interface stands for theirs. With QMOE_CHECKOUT=PATH, a checkout of
github.com/IST-DASLab/qmoe, theirs runs too: on the host, against NumPy and their dictionary and packer.
"""

import ast
import heapq
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parent.parent
for folder in ("benchmarks", "gpu_decode/shim", "gpu_decode/tools"):
    sys.path.insert(0, str(ROOT / folder))

import gpu  # noqa: E402
import gpu_session  # noqa: E402
import qmoe_kernel  # noqa: E402
from compile_kernels import nvcc  # noqa: E402
from host import HostDevice  # noqa: E402
from qmoe_gpu_decode import device as gpu_device  # noqa: E402
from qmoe_kernel import Launch, Source, SourceError  # noqa: E402

CHECKOUT = os.environ.get("QMOE_CHECKOUT")
needs_checkout = pytest.mark.skipif(
    not CHECKOUT,
    reason="THE QMOE AUTHORS' KERNEL IS NOT TESTED: QMOE_CHECKOUT=PATH names no checkout of theirs",
)
needs_compiler = pytest.mark.skipif(not shutil.which("g++"), reason="NOT TESTED: there is no g++")

# Five rows of two warps: one of them leaves while the other still comes to barriers, as in theirs.
MADE_UP = """
#include <torch/all.h>

#define CALL_IF(BLOCKHEIGHT, WARPS, HEIGHT, WIDTH) \\
  else if (height == HEIGHT && width == WIDTH) { \\
    dim3 blocks((height + BLOCKHEIGHT - 1) / BLOCKHEIGHT, 1); \\
    dim3 threads(WARPS * 32); \\
    Sub1MatVec<BLOCKHEIGHT, WARPS, HEIGHT, WIDTH><<<blocks, threads>>>(); \\
  }

template <const int blockheight, const int warps, const int height, const int width>
__global__ void Sub1MatVec(const int *dec, const ushort *w_comp, const int *row_off,
                           const __nv_bfloat162 *ter_minmax, const __nv_bfloat16 *x, __nv_bfloat16 *y);

void launch(torch::Tensor y) {
    if (false) {}
    CALL_IF(5, 2, 43, 96)
  CALL_IF(3, 3, 8, 61)
}

template <const int blockheight, const int warps, const int height, const int width>
__global__ void Sub1MatVec(const int *dec, const ushort *__restrict__ w_comp, const int *row_off,
                           const __nv_bfloat162 *ter_minmax, const __nv_bfloat16 *x, __nv_bfloat16 *y) {
    __shared__ int w_comp_block[warps];
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int start = blockheight * blockIdx.x;
    for (int row = start + warp; row < height && row < start + blockheight; row += warps) {
        __syncthreads();
        const float level[] = {0, __bfloat162float(ter_minmax[row].x), __bfloat162float(ter_minmax[row].y)};
        float sum = 0;
        int column = lane;
        for (int i = row_off[row]; i < row_off[row + 1]; i++) {
            if (lane == 0)
                w_comp_block[warp] = w_comp[i];
            const int word = dec[2 * w_comp_block[warp] + lane / 14 % 2];
            if (lane < 28 && lane < 2 * (word & 15) && column < width) {
                sum += level[word >> (4 + lane % 14 * 2) & 3] * __bfloat162float(x[column]);
            }
            column += 2 * (word & 15);
        }
        for (int distance = 16; distance; distance /= 2) {
            sum += __shfl_down_sync(0xffffffff, sum, distance);
        }
        if (lane == 0) {
            y[row] += __float2bfloat16(sum);
        }
    }
}

__global__ void Sub1Pack(const int *w_prep) {}
"""


def checkout(folder: Path, text: str = MADE_UP) -> Path:
    (folder / qmoe_kernel.FILE).write_text(text, "utf-8")
    return folder


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Bits of the nearest."""
    bits: np.ndarray = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    return bits


def exact(bits: np.ndarray) -> np.ndarray:
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def ternary(rng: np.random.Generator, rows: int, columns: int) -> tuple[np.ndarray, np.ndarray]:
    """Trits, some rows empty, full or of one sign; levels as bits of bfloat16."""
    density = rng.choice([0.03, 0.115, 0.115, 0.3], (rows, 1))
    trits = np.where(rng.random((rows, columns)) < density, rng.choice([-1, 1], (rows, columns)), 0)
    for row, of in enumerate((np.zeros_like, np.ones_like, np.abs)[: rows - 1]):
        trits[row] = of(trits[row])
    return trits.astype(np.int8), bfloat16(rng.uniform(0.5, 2, (rows, 2)).astype(np.float32) * (-1, 1))


def check_launch(run: qmoe_kernel.Launcher, device: HostDevice, launch: Launch) -> None:
    """Run one product on the host; against NumPy in float64."""
    rng = np.random.default_rng()
    trits, levels = ternary(rng, launch.rows, launch.columns)
    packed = qmoe_kernel.pack(trits, levels)
    x = bfloat16(rng.normal(size=launch.columns).astype(np.float32))
    y = device.upload(np.zeros(launch.rows, np.uint16))
    table = qmoe_kernel.decoding_table()
    inputs = [device.upload(a) for a in (table, packed.codewords, packed.offsets, packed.levels, x)]
    run(launch, [gpu_device.address(array) for array in (*inputs, y)], None)
    low, high = exact(levels)[:, :1], exact(levels)[:, 1:]
    weights = np.where(trits < 0, low, np.where(trits > 0, high, 0.0))
    expected, scale = weights @ exact(x), np.abs(weights) @ np.abs(exact(x))
    np.testing.assert_array_less(
        np.abs(exact(y) - expected), 2.0**-8 * np.abs(expected) + 1e-5 * scale + 1e-9
    )


@pytest.fixture
def device(tmp_path: Path) -> HostDevice:
    return HostDevice(tmp_path)


@pytest.fixture
def made_up(tmp_path: Path) -> Source:
    return qmoe_kernel.read_source(checkout(tmp_path))


# ---- the text ----


def test_the_kernel_is_cut_out_and_its_launches_read(made_up: Source) -> None:
    assert list(made_up.launches.values()) == [Launch(5, 2, 43, 96), Launch(3, 3, 8, 61)]
    launch = made_up.launches[43, 96]
    assert (launch.kernel, launch.blocks, launch.threads) == ("Sub1MatVec<5, 2, 43, 96>", 9, 64)
    assert made_up.kernel.startswith("template <") and made_up.kernel.endswith("    }\n}\n")
    assert made_up.kernel.count("template") == 1 and made_up.kernel in MADE_UP
    assert not re.search("torch|CALL_IF|Sub1Pack", made_up.kernel)
    assert len(made_up.sha256) == 64


FAULTS = {
    "0 definitions of the template": ("__global__ void Sub1MatVec", "__global__ void Sub2MatVec"),
    "2 definitions of the template": ("__nv_bfloat16 *y);", "__nv_bfloat16 *y) {}"),
    "takes dec, w_comp, row_off, ter_minmax, y, x; expected": (
        "const __nv_bfloat16 *x, __nv_bfloat16 *y) {",
        "const __nv_bfloat16 *y, __nv_bfloat16 *x) {",
    ),
    r"nowhere 'dim3threads\(WARPS": ("threads(WARPS * 32)", "threads(WARPS * 64)"),
    r"nowhere 'dim3blocks": ("(height + BLOCKHEIGHT - 1)", "height"),
    "nowhere 'Sub1MatVec<BLOCKHEIGHT": ("<<<blocks, threads>>>", "<<<threads, blocks>>>"),
    r"CALL_IF\(5, 33, 43, 96\) is no launch": ("CALL_IF(5, 2,", "CALL_IF(5, 33,"),
    r"CALL_IF\(0, 2, 43, 96\) is no launch": ("CALL_IF(5, 2,", "CALL_IF(0, 2,"),
    "no line CALL_IF": ("  CALL_IF(", "  LAUNCH_IF("),
    "the body of Sub1MatVec does not end": ("{}\n", "{\n"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_another_file_than_expected_is_refused(message: str, tmp_path: Path) -> None:
    old, new = FAULTS[message]
    assert old in MADE_UP
    text = MADE_UP.replace(old, new)
    if "does not end" in message:
        text = text[: text.index("__global__ void Sub1Pack")].rstrip().removesuffix("}")
    with pytest.raises(SourceError, match=message) as raised:
        qmoe_kernel.read_source(checkout(tmp_path, text))
    assert str(raised.value).startswith(str(tmp_path / qmoe_kernel.FILE)) and "\n" not in str(raised.value)


def test_no_checkout_is_an_error_of_usage(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (gpu.arguments, gpu_session.arguments):
        with pytest.raises(SystemExit) as raised:
            arguments(["--qmoe", str(tmp_path)])
        last = capsys.readouterr().err.splitlines()[-1]
        assert raised.value.code == 2
        assert "argument --qmoe" in last and "expected a checkout of github.com/IST-DASLab/qmoe" in last
    (tmp_path / qmoe_kernel.FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(SourceError, match="not a text"):
        qmoe_kernel.read_source(tmp_path)


def test_a_session_passes_the_checkout_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout(tmp_path))
    options = gpu_session.arguments(["--out", "x", "--qmoe", "."])
    (stage,) = [s for s in gpu_session.stages(tmp_path, options) if s.name == "benchmark"]
    assert stage.command[-2:] == ["--qmoe", str(tmp_path)]  # stages run in another folder
    assert gpu.arguments(["--qmoe", str(tmp_path)]).qmoe.launches


# ---- their layout ----


def unpacked(packed: qmoe_kernel.PackedMatrix, columns: int) -> np.ndarray:
    """Trits int8 [rows, columns], a codeword at a time, from the table that the kernel looks up."""
    words = qmoe_kernel.decoding_table().view(np.uint32)
    rows = []
    for begin, end in zip(packed.offsets[:-1], packed.offsets[1:], strict=True):
        row: list[int] = []
        for codeword in packed.codewords[begin:end]:
            first, second = (int(word) for word in words[codeword])
            assert first & 15 == second & 15
            symbols = [word >> shift & 3 for word in (first, second) for shift in range(4, 32, 2)]
            assert not any(symbols[2 * (first & 15) :])
            row += symbols[: 2 * (first & 15)]
        assert row[columns:] == [0] * (columns % 2)
        rows.append(row[:columns])
    return np.array([0, -1, 1], np.int8)[rows]


@given(st.integers(1, 7), st.integers(1, 130), st.integers(0, 2**32 - 1))
def test_what_is_packed_is_there(rows: int, columns: int, seed: int) -> None:
    trits, levels = ternary(np.random.default_rng(seed), rows, columns)
    packed = qmoe_kernel.pack(trits, levels)
    assert (packed.codewords.dtype, packed.offsets.dtype, packed.levels.dtype) == ("u2", "i4", "u2")
    assert packed.nbytes == 2 * len(packed.codewords) + 4 * (rows + 1) + 4 * rows
    np.testing.assert_array_equal(unpacked(packed, columns), trits)
    np.testing.assert_array_equal(packed.levels, levels)


def test_packing_needs_nothing_but_numpy_and_the_codec() -> None:
    program = """
import sys
import qmoe_kernel
qmoe_kernel.decoding_table()
print(*{"qmoe_quantize", "qmoe_format", "torch", "safetensors", "zstandard"} & set(sys.modules))
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "benchmarks", capture_output=True, text=True, check=True
    )
    assert done.stdout == "\n"


# ---- launches ----


@needs_compiler
def test_on_the_host(made_up: Source, device: HostDevice) -> None:
    run = qmoe_kernel.host_launcher(made_up, device)
    for launch in made_up.launches.values():
        check_launch(run, device, launch)
    other = made_up.kernel.replace("w_comp_block", "block")
    with pytest.raises(SourceError, match="0 statements write w_comp_block"):
        qmoe_kernel.host_text(replace(made_up, kernel=other))


def test_on_a_gpu_by_way_of_cupy(made_up: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []

    class RawModule:
        def __init__(
            self, *, code: str, options: tuple[str, ...], backend: str, name_expressions: Sequence[str]
        ) -> None:
            assert code == qmoe_kernel.GPU_HEAD + made_up.kernel and backend == "nvrtc"
            self.names = name_expressions

        def get_function(self, name: str) -> Any:
            assert name in self.names
            return lambda grid, block, args, *, stream: calls.append((name, grid, block, args, stream.ptr))

    monkeypatch.setattr(gpu_device, "cupy", lambda: SimpleNamespace(RawModule=RawModule))
    addresses = [np.uint64(number) for number in range(6)]
    qmoe_kernel.gpu_launcher(made_up)(made_up.launches[43, 96], addresses, 7)
    assert calls == [("Sub1MatVec<5, 2, 43, 96>", (9,), (64,), tuple(addresses), 7)]


@needs_compiler
def test_the_benchmark_compares_with_it(made_up: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    place = gpu.OnHost()
    options = gpu.arguments(
        ["--host", "--qmoe", str(made_up.path.parent), "--shapes", "43x96", "7x96", "--no-grouped"]
    )
    todo = [cell for cell in gpu.cells(place, options) if cell[1].startswith("1 tokens")]
    assert [cell[:2] for cell in todo[2:]] == [
        (shape, "1 tokens, QMoE's kernel") for shape in ("43x96", "7x96")
    ]
    results: dict[str, Any] = {"shapes": {}}
    assert gpu.run_cells(iter(todo), results, 60, lambda: None) == 0
    cell, other = (results["shapes"][shape]["1 tokens, QMoE's kernel"] for shape in ("43x96", "7x96"))
    assert cell["ours"]["replays"] and cell[gpu.PEER]["replays"] and cell["relative_error"] < 1e-2
    assert other["not supported by the peer"] == "its shapes are 43x96, 8x61"
    lines = gpu.table(results).splitlines()
    assert re.search(r"43x96 +1 tokens, QMoE's kernel .*x QMoE's kernel", lines[1])
    assert "7x96         1 tokens, QMoE's kernel not supported by the peer: its shapes" in lines[3]
    # A peer that is wrong is not timed
    wrong = replace(made_up, kernel=made_up.kernel.replace("& 15);", "& 7);"))
    problem = gpu.Problem.make(place, (43, 96), 10)
    with pytest.raises(ValueError, match="the peer is wrong by"):
        gpu.measure_qmoe(place, problem, wrong, lambda: place.peer(wrong), 1)


def compile_with_nvcc(source: Source, folder: Path) -> None:
    compiler = nvcc()
    assert compiler
    bfloat16s = "const __nv_bfloat162 *, const __nv_bfloat16 *, __nv_bfloat16 *"
    instances = "".join(
        f"template __global__ void {launch.kernel}(const int *, const ushort *, const int *, {bfloat16s});\n"
        for launch in source.launches.values()
    )
    unit = folder / "unit.cu"
    unit.write_text(qmoe_kernel.GPU_HEAD + source.kernel + instances, "utf-8")
    for architecture in ("sm_80", "sm_90"):
        command = [compiler, "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v"]
        done = subprocess.run(
            [*command, "-o", str(folder / "unit.cubin"), str(unit)], capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[:3000]
        assert done.stderr.count("Compiling entry function") == len(source.launches)


@pytest.mark.skipif(nvcc() is None, reason="NOT COMPILED FOR A GPU: there is no nvcc")
def test_it_compiles_for_gpus(made_up: Source, tmp_path: Path) -> None:
    compile_with_nvcc(made_up, tmp_path)


# ---- the authors' own ----


@pytest.fixture
def authors() -> Source:
    return qmoe_kernel.read_source(Path(str(CHECKOUT)))


@needs_checkout
@needs_compiler
def test_the_authors_kernel_on_the_host(authors: Source, device: HostDevice) -> None:
    small = [Launch(3, 2, 7, 64), Launch(10, 10, 64, 130), Launch(75, 32, 160, 2080)]
    launches = authors.launches | {(launch.rows, launch.columns): launch for launch in small}
    run = qmoe_kernel.host_launcher(replace(authors, launches=launches), device)
    assert set(authors.launches) == set(gpu.SHAPES[:6])
    for launch in launches.values():
        check_launch(run, device, launch)


@needs_checkout
@pytest.mark.skipif(nvcc() is None, reason="NOT COMPILED FOR A GPU: there is no nvcc")
def test_the_authors_kernel_compiles_for_gpus(authors: Source, tmp_path: Path) -> None:
    compile_with_nvcc(authors, tmp_path)


def authors_tables() -> tuple[np.ndarray, np.ndarray]:
    """What `setup` of their sub1.py gives: the decoding table and the trie of their packer."""
    tree = ast.parse((Path(str(CHECKOUT)) / "sub1.py").read_text("utf-8"))
    (setup,) = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "setup"]
    names: dict[str, Any] = {"np": np, "heapq": heapq, "torch": torch}
    exec(compile(ast.Module([setup], []), "sub1.py", "exec"), names)
    decoding, trie = names["setup"]()
    return decoding.numpy(), trie.numpy()


@needs_checkout
@needs_compiler
def test_the_authors_dictionary_and_packer(authors: Source, device: HostDevice) -> None:
    decoding, trie = authors_tables()
    np.testing.assert_array_equal(qmoe_kernel.decoding_table().ravel(), decoding)
    # Their packing kernels, a thread a row, on the host
    text = authors.path.read_text("utf-8")
    start = text.index("__global__ void Sub1PreparePack", text.index(authors.kernel))
    library = qmoe_kernel.host_library(
        device,
        f"#define PACK_BLOCKHEIGHT 32\n#define TRIE_ROOT 65536\n{text[start:]}",
        ["Sub1PreparePack", "Sub1Pack"],
    )
    rows, columns = 64, 333
    trits, levels = ternary(np.random.default_rng(), rows, columns)
    packed = qmoe_kernel.pack(trits, levels)
    symbols = device.upload(np.where(trits < 0, 1, 2 * trits).astype(np.int32))
    offsets, out = device.upload(np.zeros(rows + 1, np.int32)), device.upload(np.zeros_like(packed.codewords))
    there = device.upload(trie)

    def run(kernel: str, *arrays: np.ndarray) -> None:
        addresses = [gpu_device.address(array) for array in arrays]
        device.run(library, kernel, (rows // 32, 1), 32, 0, [*addresses, np.int32(columns)])

    run("Sub1PreparePack", there, symbols, offsets)
    offsets[:] = np.cumsum(offsets)
    np.testing.assert_array_equal(offsets, packed.offsets)
    run("Sub1Pack", symbols, offsets, out)
    np.testing.assert_array_equal(out, packed.codewords)
