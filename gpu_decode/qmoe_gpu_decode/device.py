"""What the launchers need of a device, and the CUDA device by way of CuPy.

Launchers deal in addresses, so that any library's arrays will do: CuPy's, torch's, and NumPy's where the
kernels run on the host (gpu_decode/shim).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from qmoe_codec.errors import MissingPackageError

from .overlapping import launch_overlapping
from .sources import kernel_source

INSTALL = "pip install cupy-cuda12x (or cupy-cuda13x, as the driver is)"

Argument = np.uint32 | np.uint64 | np.float32 | NDArray[np.void]
"""A scalar, the address of an array as uint64, or a structure as an array without dimensions."""


class Device(Protocol):
    """Where kernels run."""

    @property
    def multiprocessors(self) -> int:
        """How many blocks can run side by side, at least."""

    @property
    def shared_limit(self) -> int:
        """Bytes of shared memory that a block can have."""

    def __hash__(self) -> int: ...

    def launch(
        self,
        file: str,
        definitions: Mapping[str, int],
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        stream: int | None = None,
    ) -> None:
        """Run a kernel of a file of `kernels/`; `stream` is a cudaStream_t, by default the current one."""

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """An array that nothing was written to."""

    def upload(self, array: NDArray[Any]) -> Any:
        """A copy on the device, there for every stream when this returns."""

    def download(self, array: Any) -> NDArray[Any]:
        """A copy on the host; waits for the device."""


def address(array: Any) -> np.uint64:
    """Where a contiguous array of CuPy, torch or NumPy lies."""
    if hasattr(array, "data_ptr"):
        return np.uint64(array.data_ptr())
    if isinstance(array, np.ndarray):
        return np.uint64(array.ctypes.data)
    return np.uint64(array.data.ptr)


@functools.cache
def cupy() -> ModuleType:
    """CuPy.

    Raises
    ------
    MissingPackageError
        If it is not installed or finds no GPU.
    """
    try:
        import cupy as found
    except ImportError as error:
        raise MissingPackageError(f"cupy is not installed: {INSTALL}") from error
    try:
        count = found.cuda.runtime.getDeviceCount()
    except found.cuda.runtime.CUDARuntimeError as error:
        raise MissingPackageError(f"cupy finds no GPU: {error}") from error
    if count == 0:
        raise MissingPackageError("cupy finds no GPU")
    module: ModuleType = found
    return module


class StreamPointer(NamedTuple):
    """All that CuPy's launch wants of a stream; its own class for those of others is deprecated."""

    ptr: int


@dataclass(frozen=True)
class CudaDevice:
    """A CUDA device. Get it with :func:`cuda_device`."""

    number: int
    multiprocessors: int
    shared_limit: int

    def launch(
        self,
        file: str,
        definitions: Mapping[str, int],
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared_bytes: int,
        arguments: Sequence[Argument],
        stream: int | None = None,
    ) -> None:
        """See :class:`Device`."""
        function = _function(self.number, file, tuple(sorted(definitions.items())), kernel, self.shared_limit)
        with cupy().cuda.Device(self.number):
            where = cupy().cuda.get_current_stream() if stream is None else StreamPointer(stream)
            if definitions.get("OVERLAP"):
                launch_overlapping(function.kernel.ptr, grid, threads, shared_bytes, arguments, where.ptr)
            else:
                function(grid, (threads,), tuple(arguments), shared_mem=shared_bytes, stream=where)

    def empty(self, shape: tuple[int, ...], dtype: str) -> Any:
        """See :class:`Device`."""
        with cupy().cuda.Device(self.number):
            return cupy().empty(shape, dtype)

    def upload(self, array: NDArray[Any]) -> Any:
        """See :class:`Device`."""
        with cupy().cuda.Device(self.number):
            return cupy().asarray(array, blocking=True)  # streams of others do not wait for CuPy's

    def download(self, array: Any) -> NDArray[Any]:
        """See :class:`Device`."""
        host: NDArray[Any] = cupy().asnumpy(array)
        return host


@functools.cache
def _function(
    number: int, file: str, definitions: tuple[tuple[str, int], ...], kernel: str, shared_limit: int
) -> Any:
    with cupy().cuda.Device(number):
        # NVRTC: text to a binary for this GPU, which CuPy keeps on disk too.
        module = cupy().RawModule(
            code=kernel_source(file, dict(definitions)), options=("--std=c++17",), backend="nvrtc"
        )
        function = module.get_function(kernel)
        # What the kernel has of its own counts too.
        function.max_dynamic_shared_size_bytes = shared_limit - function.shared_size_bytes
    return function


@functools.cache
def cuda_device(number: int | None = None) -> CudaDevice:
    """The CUDA device of this number, by default the current one.

    Raises
    ------
    MissingPackageError
        If there is no CuPy or no GPU.
    """
    runtime = cupy().cuda.runtime
    if number is None:
        number = int(runtime.getDevice())
    properties = runtime.getDeviceProperties(number)
    return CudaDevice(
        number, int(properties["multiProcessorCount"]), int(properties["sharedMemPerBlockOptin"])
    )
