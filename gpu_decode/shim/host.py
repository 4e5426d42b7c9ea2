"""The kernels on the host: their text compiled under shim.h, launched like on a GPU, with NumPy's arrays."""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from qmoe_gpu_decode.sources import kernel_names, kernel_source

FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas")
SANITIZERS = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")

Key = tuple[str, tuple[tuple[str, int], ...]]


class HostDevice:
    """A :class:`qmoe_gpu_decode.device.Device` that is none: for tests.

    Parameters
    ----------
    folder : Path
        Where libraries are built; one that is there already is used again.
    """

    def __init__(self, folder: Path, *, sanitize: bool = False, shared_limit: int = 227 << 10) -> None:
        self.folder = folder
        self.sanitize = sanitize
        self.flags = (*FLAGS, *(SANITIZERS if sanitize else ()))
        self.multiprocessors = 2
        self.shared_limit = shared_limit
        self.loaded: dict[Key, ctypes.CDLL] = {}
        self.launches: list[str] = []
        self.units: list[Path] = []  # the texts that were compiled, or would have been

    def compile(self, file: str, definitions: Mapping[str, int]) -> Path:
        """Compile one specialisation."""
        source = kernel_source(file, definitions)
        return self.build(source, kernel_names(source), self.flags)

    def build(self, source: str, kernels: Sequence[str], flags: Sequence[str]) -> Path:
        """Compile any text; `kernels` are those that can be launched, with their template arguments."""
        calls = "\n".join(
            f'    if (!std::strcmp(name, "{name}"))\n'
            f"        return shim::call({name}, grid, block, shared_bytes, arguments, sizes, count);"
            for name in kernels
        )
        text = (
            f'#include "shim.h"\n{source}\n'
            'extern "C" int shim_launch(const char *name, const u32 *shape, u64 shared_bytes,\n'
            "                           void **arguments, const u32 *sizes, u32 count) {\n"
            "    const dim3 grid = {shape[0], shape[1], 1}, block = {shape[2], 1, 1};\n"
            f"{calls}\n    return 3;\n}}\n"
        )
        shim = Path(__file__).with_name("shim.h")
        digest = hashlib.sha256("\0".join([text, shim.read_text("utf-8"), *flags]).encode()).hexdigest()
        library = self.folder / f"{digest[:24]}.so"
        self.units.append(library.with_suffix(".cpp"))
        if not library.exists():
            compiler = shutil.which(os.environ.get("CXX", "g++"))
            assert compiler, "there is no C++ compiler"
            unit, made = library.with_suffix(".cpp"), library.with_suffix(f".{os.getpid()}")
            unit.write_text(text, "utf-8")
            command = [compiler, *flags, f"-I{shim.parent}", str(unit), "-o", str(made)]
            done = subprocess.run(command, capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[:6000]
            made.rename(library)
        return library

    def launch(
        self,
        file: str,
        definitions: Mapping[str, int],
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[np.generic],
        stream: int | None = None,
    ) -> None:
        """Run a kernel to its end."""
        assert stream is None
        definitions = {
            **definitions,
            "CODECS": 31,
        }  # fewer specialisations to compile; on a GPU, those that occur
        assert shared_bytes <= self.shared_limit, (kernel, shared_bytes)
        key: Key = (file, tuple(sorted(definitions.items())))
        if key not in self.loaded:
            self.loaded[key] = ctypes.CDLL(str(self.compile(file, definitions)))
        self.run(self.loaded[key], kernel, grid, threads, shared_bytes, arguments)

    def run(
        self,
        library: ctypes.CDLL,
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[np.generic],
    ) -> None:
        """Run a kernel of a library that :meth:`build` made."""
        boxes = [self.upload(np.asarray(argument)) for argument in arguments]  # aligned
        pointers = (ctypes.c_void_p * len(boxes))(*[box.ctypes.data for box in boxes])
        sizes = (ctypes.c_uint32 * len(boxes))(*[box.itemsize for box in boxes])
        shape = (ctypes.c_uint32 * 3)(*grid, threads)
        status = library.shim_launch(
            kernel.encode(), shape, ctypes.c_uint64(shared_bytes), pointers, sizes, len(boxes)
        )
        assert status == 0, (kernel, "wrong number of arguments, size of one, or name", status)
        self.launches.append(kernel)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """An array full of a pattern that no kernel means; it is aligned like an allocation on a GPU."""
        wanted = np.dtype(dtype)
        if self.sanitize:  # a buffer of exactly this size, which the sanitizer guards
            return (
                np.full(int(np.prod(shape, dtype=np.int64)) * wanted.itemsize, 0xA5, np.uint8)
                .view(wanted)
                .reshape(shape)
            )
        size = int(np.prod(shape, dtype=np.int64)) * wanted.itemsize
        room = np.full(size + 256, 0xA5, np.uint8)
        start = -room.ctypes.data % 256
        return room[start : start + size].view(wanted).reshape(shape)

    def upload(self, array: NDArray[Any]) -> Any:
        """A copy."""
        copy = self.empty(array.shape, array.dtype)
        copy[...] = array
        return copy

    def download(self, array: Any) -> NDArray[Any]:
        """A copy."""
        return np.array(array)
