"""Run one expert of a packed model in JAX, on the CPU, inside a compiled function: no torch, no unpacking.

    python examples/jax/run_expert.py LIBRARY MODEL LAYER EXPERT

LIBRARY is what ``CMakeLists.txt`` beside this file builds, MODEL the directory of a packed model, LAYER a
layer's prefix, such as model.layers.0.mlp.experts. Prints y = down(silu(gate(x)) · up(x)), or
down(silu(up(x))) without a gate, of x[i] = ((37·i + 11) mod 101 − 50) / 64.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

TARGET = "qmoe_product"
MESSAGE_BYTES = 512


class PackedExpert:
    """An expert of a packed model, callable from within ``jax.jit``.

    Keep it as long as functions that were compiled with it: afterwards they fail with an error.

    Parameters
    ----------
    library : str
        The built ``libqmoe_jax.so``.
    model, prefix : str
        Directory of the packed model, and the layer's prefix.
    expert : int
    threads : int, optional
        How many threads a product may use.

    Raises
    ------
    ValueError
        The model cannot be read; the message is the library's.
    """

    def __init__(self, library: str, model: str, prefix: str, expert: int, threads: int = 1) -> None:
        self._library = ctypes.CDLL(os.path.abspath(library))
        self._library.qmoe_jax_open.restype = ctypes.c_int64
        self._library.qmoe_jax_projection.restype = ctypes.c_bool
        jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(self._library.qmoe_jax_product), platform="cpu")
        message = ctypes.create_string_buffer(MESSAGE_BYTES)
        name = prefix.encode()
        self._number = self._library.qmoe_jax_open(os.fsencode(model), name, ctypes.c_uint32(expert), message)
        if not self._number:
            raise ValueError(message.value.decode(errors="replace"))
        self._threads = threads
        #: role → number of the projection, rows, columns
        self.projections: dict[str, tuple[int, int, int]] = {}
        role = ctypes.create_string_buffer(8)
        rows, columns = ctypes.c_uint32(), ctypes.c_uint32()
        for number in range(3):
            if self._library.qmoe_jax_projection(
                name, ctypes.c_int64(self._number), number, role, ctypes.byref(rows), ctypes.byref(columns)
            ):
                self.projections[role.value.decode()] = (number, rows.value, columns.value)

    def product(self, role: str, x: jax.Array) -> jax.Array:
        """y float32 [tokens, rows] of x [tokens, columns] in float32, bfloat16 or float16."""
        number, rows, columns = self.projections[role]
        if x.ndim != 2 or x.shape[1] != columns:
            raise ValueError(f"{role}: x has the shape {x.shape}, expected [tokens, {columns}]")
        result = jax.ShapeDtypeStruct((x.shape[0], rows), jnp.float32)
        attributes = {"expert": self._number, "projection": number, "threads": self._threads}
        function: Callable[..., jax.Array] = jax.ffi.ffi_call(TARGET, result, vmap_method="sequential")
        return function(x, **{name: np.int64(value) for name, value in attributes.items()})

    def __call__(self, x: jax.Array) -> jax.Array:
        """The expert's output float32 [tokens, rows of down]."""
        up = self.product("up", x)
        inner = jax.nn.silu(self.product("gate", x)) * up if "gate" in self.projections else jax.nn.silu(up)
        return self.product("down", inner)

    def close(self) -> None:
        """Let go of the model."""
        self._library.qmoe_jax_close(ctypes.c_int64(self._number))


def main() -> None:
    if len(sys.argv) != 5 or not sys.argv[4].isdecimal():
        raise SystemExit("usage: run_expert.py LIBRARY MODEL LAYER EXPERT")
    try:
        expert = PackedExpert(*sys.argv[1:4], int(sys.argv[4]), threads=2)
    except ValueError as error:
        raise SystemExit(str(error)) from None
    _, _, columns = expert.projections["up"]
    x = (((37 * jnp.arange(columns) + 11) % 101 - 50) / 64).astype(jnp.float32)
    for value in jax.jit(expert)(x[None])[0]:
        print(f"{value:.9g}")


if __name__ == "__main__":
    main()
