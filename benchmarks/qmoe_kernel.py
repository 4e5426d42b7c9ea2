"""The QMoE authors' kernel beside ours: read from a checkout of theirs when it is asked for, never kept here.

    git clone https://github.com/IST-DASLab/qmoe CHECKOUT
    python benchmarks/gpu.py --qmoe CHECKOUT

Written after reading their commit 9110baa (Apache-2.0). Of `sub1_cuda_kernel.cu` two things are taken:

* the definition of the template ``Sub1MatVec``, from ``template`` to its body's last brace, unchanged;
  it uses no other function of the file. What stands around it stays out: torch's headers and their binding,
  the forward declarations, the packing kernels.
* the numbers of the lines ``CALL_IF(rows a block, warps, rows, columns)``: the only shapes that it takes, and
  how it is launched for each. That their macro makes blocks of so many rows and warps is looked for.

A file that is otherwise than this is refused. One matrix of theirs is, for one token in bfloat16:

* ``dec`` int32 [65536, 2]: the dictionary, the same for all matrices (:func:`decoding_table`)
* ``w_comp`` uint16 [codewords], ``row_off`` int32 [rows + 1], ``ter_minmax`` bfloat16 [rows, 2]: as their
  checkpoints have them (quantize/qmoe_quantize/published/layout.py), so that code packs
* ``x`` bfloat16 [columns]; ``y`` bfloat16 [rows], to which the product is *added*: whoever calls clears it
"""

from __future__ import annotations

import argparse
import ctypes
import functools
import hashlib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FILE = "sub1_cuda_kernel.cu"
KERNEL = "Sub1MatVec"
PARAMETERS = ["dec", "w_comp", "row_off", "ter_minmax", "x", "y"]

_DEFINITION = re.compile(
    rf"template\s*<[^<>]*>\s*__global__\s+void\s+{KERNEL}\s*\((?P<parameters>[^()]*)\)\s*(?P<body>{{)"
)
_LAUNCH = re.compile(r"^\s*CALL_IF\s*\(\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*,\s*(\d+)\s*\)", re.MULTILINE)
# Without white space and the backslashes at the ends of lines
_GEOMETRY = (
    "dim3blocks((height+BLOCKHEIGHT-1)/BLOCKHEIGHT,1);",
    "dim3threads(WARPS*32);",
    f"{KERNEL}<BLOCKHEIGHT,WARPS,HEIGHT,WIDTH><<<blocks,threads>>>(",
)

# What the text needs in front of it. The C library has `ushort`, NVRTC has not.
GPU_HEAD = "#include <cuda_bf16.h>\ntypedef unsigned short ushort;\n"
HOST_HEAD = """
struct __nv_bfloat16 {
    u16 bits;
    __nv_bfloat16 &operator+=(__nv_bfloat16 other) {
        bits = u16(float_to_bfloat16(bfloat16_to_float(bits) + bfloat16_to_float(other.bits)));
        return *this;
    }
};
struct __nv_bfloat162 {
    __nv_bfloat16 x, y;
};
typedef unsigned short ushort;
inline float __bfloat162float(__nv_bfloat16 value) { return bfloat16_to_float(value.bits); }
inline __nv_bfloat16 __float2bfloat16(float value) { return {u16(float_to_bfloat16(value))}; }
"""


class SourceError(argparse.ArgumentTypeError):
    """A checkout that is not as expected, in one line; where it is an option's value, argparse says it."""


@dataclass(frozen=True)
class Launch:
    """How the kernel is launched for one shape."""

    block_rows: int
    warps: int
    rows: int
    columns: int

    @property
    def kernel(self) -> str:
        """The instance of the template."""
        return f"{KERNEL}<{self.block_rows}, {self.warps}, {self.rows}, {self.columns}>"

    @property
    def blocks(self) -> int:
        return -(-self.rows // self.block_rows)

    @property
    def threads(self) -> int:
        return 32 * self.warps


@dataclass(frozen=True)
class Source:
    """What is taken of a checkout."""

    path: Path
    sha256: str  # of the whole file
    kernel: str  # the template's text
    launches: Mapping[tuple[int, int], Launch]  # by shape


def read_source(checkout: str | Path) -> Source:
    """Cut what is needed out of a checkout's file.

    Raises
    ------
    SourceError
        If the file is missing, or is not as this module expects it.
    """
    path = Path(checkout) / FILE
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text"
        raise SourceError(f"{path}: {reason}; expected a checkout of github.com/IST-DASLab/qmoe") from error
    found = list(_DEFINITION.finditer(text))
    if len(found) != 1:
        raise SourceError(f"{path}: {len(found)} definitions of the template {KERNEL}, expected one")
    (definition,) = found
    names = re.findall(r"(\w+)\s*(?:,|$)", definition["parameters"])
    if names != PARAMETERS:
        raise SourceError(f"{path}: {KERNEL} takes {', '.join(names)}; expected {', '.join(PARAMETERS)}")
    dense = re.sub(r"[\s\\]+", "", text)
    for part in _GEOMETRY:
        if part not in dense:
            raise SourceError(
                f"{path}: nowhere {part!r} (spaces left out), which says how {KERNEL} is launched"
            )
    launches = {}
    for numbers in _LAUNCH.findall(text):
        launch = Launch(*map(int, numbers))
        if not (launch.block_rows and 1 <= launch.warps <= 32 and launch.rows and launch.columns):
            raise SourceError(f"{path}: CALL_IF({', '.join(numbers)}) is no launch")
        launches[launch.rows, launch.columns] = launch
    if not launches:
        raise SourceError(f"{path}: no line CALL_IF(rows a block, warps, rows, columns)")
    kernel = text[definition.start() : _closing_brace(text, definition.start("body"), path)]
    return Source(path, hashlib.sha256(path.read_bytes()).hexdigest(), kernel + "\n", launches)


def _closing_brace(text: str, start: int, path: Path) -> int:
    """Where the block that begins at `start` ends."""
    depth = 0
    for brace in re.finditer("[{}]", text[start:]):
        depth += 1 if brace.group() == "{" else -1
        if depth == 0:
            return start + brace.end()
    raise SourceError(f"{path}: the body of {KERNEL} does not end")


# ---- matrices in their layout ------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedMatrix:
    """A ternary matrix as their kernel reads it."""

    codewords: NDArray[np.uint16]  # [codewords]
    offsets: NDArray[np.int32]  # [rows + 1]
    levels: NDArray[np.uint16]  # [rows, 2], bits of bfloat16

    @property
    def nbytes(self) -> int:
        return self.codewords.nbytes + self.offsets.nbytes + self.levels.nbytes


def _published(name: str) -> Any:
    """A module of qmoe_quantize.published without the package around it, which wants more than NumPy."""
    if "published" not in sys.modules:
        folder = Path(__file__).resolve().parent.parent / "quantize" / "qmoe_quantize" / "published"
        spec = importlib.util.spec_from_file_location(
            "published", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["published"] = package = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(package)
    return importlib.import_module(f"published.{name}")


def pack(trits: NDArray[np.int8], levels: NDArray[np.uint16]) -> PackedMatrix:
    """Pack trits int8 [rows, columns] with levels [rows, 2] (bits of bfloat16, not zero), as theirs do."""
    counts, codewords = _published("codewords").published_codewords(trits)
    offsets = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    return PackedMatrix(codewords, offsets, np.ascontiguousarray(levels))


@functools.cache
def decoding_table() -> NDArray[np.int32]:
    """Their dictionary as their kernel looks it up, int32 [65536, 2].

    A phrase of up to 14 pairs of weights takes two words, for seven pairs each. Bits 0 to 3 are the number of
    pairs in the whole phrase; then come four bits a pair, two for each weight: 0 for zero, 1 for the row's
    least value, 2 for its greatest.
    """
    phrases = _published("dictionary").published_phrases()
    pairs = np.array([list(phrase.ljust(14, b"\0")) for phrase in phrases], np.uint32).reshape(-1, 2, 7)
    fields = (pairs % 3 | pairs // 3 << 2) << np.arange(4, 32, 4, dtype=np.uint32)
    lengths = np.array([len(phrase) for phrase in phrases], np.uint32)
    return (np.bitwise_or.reduce(fields, axis=2) | lengths[:, None]).view(np.int32)


# ---- launches ----------------------------------------------------------------------------------------------

Launcher = Callable[[Launch, Sequence[np.uint64], int | None], None]
"""Runs a launch with the addresses of PARAMETERS on a stream, a cudaStream_t."""


def gpu_launcher(source: Source) -> Launcher:
    """Compile the kernel for all of its shapes, and launch it, by way of CuPy."""
    from qmoe_gpu_decode.device import StreamPointer, cupy

    names = [launch.kernel for launch in source.launches.values()]
    module = cupy().RawModule(
        code=GPU_HEAD + source.kernel, options=("--std=c++17",), backend="nvrtc", name_expressions=names
    )
    functions = {name: module.get_function(name) for name in names}

    def run(launch: Launch, addresses: Sequence[np.uint64], stream: int | None) -> None:
        assert stream is not None
        functions[launch.kernel](
            (launch.blocks,), (launch.threads,), tuple(addresses), stream=StreamPointer(stream)
        )

    return run


def host_text(source: Source) -> str:
    """The kernel for the host, where a warp's threads do not go in step.

    They hand each other codewords in shared memory with no barrier between; here one stands before and behind
    the statement that writes them.
    """
    from qmoe_gpu_decode.sources import kernel_source

    text, count = re.subn(
        r"[^;{}]*\bw_comp_block\s*\[[^;=]*=[^;=]*;", r"__syncwarp();\g<0>__syncwarp();", source.kernel
    )
    if count != 1:
        raise SourceError(f"{source.path}: {count} statements write w_comp_block, expected one")
    return kernel_source("common.cuh", {}) + HOST_HEAD + f'#line 1 "{FILE}"\n' + text


def host_library(device: Any, text: str, kernels: Sequence[str]) -> ctypes.CDLL:
    """Build a text of theirs under the shim: its warnings are not ours; threads may leave before others."""
    flags = [*(flag for flag in device.flags if not flag.startswith("-W")), "-w", "-DSHIM_EXIT_IS_ARRIVAL=1"]
    return ctypes.CDLL(str(device.build(text, kernels, flags)))


def host_launcher(source: Source, device: Any) -> Launcher:
    """The same on the host, for a HostDevice of gpu_decode/shim: to try it where there is no GPU."""
    library = host_library(device, host_text(source), [launch.kernel for launch in source.launches.values()])

    def run(launch: Launch, addresses: Sequence[np.uint64], stream: int | None) -> None:
        assert stream is None
        device.run(library, launch.kernel, (launch.blocks, 1), launch.threads, 0, addresses)

    return run
