"""Decode and multiply: which specialisation, which grid. The hot path only looks these up."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import numpy as np
from qmoe_codec.errors import ArgumentError

from .device import Device, address
from .matrices import CODEC_BITS, Needs, PackedMatrices

KINDS = {"float32": 0, "bfloat16": 1, "float16": 2, "int8": 3}
SIZES = {"float32": 4, "bfloat16": 2, "float16": 2, "int8": 1}
ARRAY_DTYPES = {"float32": "float32", "bfloat16": "uint16", "float16": "float16", "int8": "int8"}

ROOM_COLUMNS = 128  # of zeros behind x in shared memory: multiply.cuh, X_ROOM
WINDOW_BYTES = 1024  # of a warp: decode.cu, WINDOW
OWN_BYTES = 256  # at most, that a kernel declares itself
TILES = (1, 2, 4, 8, 16, 32)
MOST_GRID = 65535
TILE_TOKENS = 32  # of a block of tiles.cu


@dataclass(frozen=True)
class Tuning:
    """What changes the speed of a kernel and nothing else; benchmarks/gpu.py tries others."""

    warps: int = 8
    """Of a block."""
    share: int = 8
    """Codewords that a lane takes in a step, at most."""
    together: int = 1
    """How many of them pass between two looks whether there are more."""
    resident: int = 24
    """Warps that a multiprocessor shall hold at once, which decides how many registers a thread may have."""
    prefetch: bool = True
    """Have the L2 fetch a block's codewords while it is not known yet where exactly they are."""
    overlap: bool = False
    """Let a product begin while the launch before it ends (compute capability 9.0)."""

    def definitions(self, codecs: int, tile: int) -> dict[str, int]:
        """For kernels that have these codecs and so many tokens in a tile."""
        return {
            "WARPS": self.warps,
            "SHARE": self.share,
            "TOGETHER": self.together,
            "RESIDENT": self.warps_at_once(codecs, tile),
            "PREFETCH": int(self.prefetch),
            "OVERLAP": int(self.overlap),
        }

    def warps_at_once(self, codecs: int, tile: int) -> int:
        """Warps that a multiprocessor holds at once by registers, of which some kernels need more."""
        return min(self.resident, 16) if tile > 1 and codecs & CODEC_BITS[16] else self.resident

    @property
    def list_bytes(self) -> int:
        """Of a warp's list of non-zeros: walk.cuh, STEP_NONZEROS."""
        return 4 * 32 * 3 * self.share


TUNING = Tuning()
ONE_TOKEN = Tuning(resident=32)


@dataclass(frozen=True)
class Plan:
    """A specialisation and the shared memory that goes with it."""

    definitions: dict[str, int]
    warps: int
    tokens: int
    table_bytes: int
    x_bytes: int
    shared_bytes: int
    blocks: int  # that a multiprocessor holds at once, by shared memory and registers

    def grid_rows(self, rows: int, multiprocessors: int) -> int:
        """Blocks for the rows: as many as run at once, with equal work each."""
        units = max(1, -(-rows // self.warps))
        rounds = -(-units // (self.blocks * multiprocessors))
        return -(-units // rounds)


def make_plan(
    needs: Needs,
    columns: int,
    tokens: int,
    x_kind: int,
    limit: int,
    *,
    tuning: Tuning = TUNING,
    sets: int = 1,
) -> Plan:
    """How to multiply with `tokens` tokens at once.

    What does not fit into `limit` bytes of shared memory stays where it is: first the tile of tokens shrinks,
    then the tables stay outside, then x does. `sets` is how many matrices a block has in hand at once.
    """
    limit -= OWN_BYTES
    x_size = 4 if x_kind == 0 else 2
    wanted = max(t for t in TILES if t < 2 * max(1, tokens))
    fitting = []
    for tile in (t for t in reversed(TILES) if t <= wanted):
        x_bytes = -(-(columns + ROOM_COLUMNS) * tile * x_size // 16) * 16
        lists = tuning.warps * tuning.list_bytes if tile > 1 else 0
        for table_bytes in (needs.table_bytes, 0):
            for staged in (x_bytes, 0):
                shared = sets * table_bytes + staged + lists
                if shared <= limit:
                    fitting.append(
                        ((staged > 0, table_bytes == needs.table_bytes, tile), staged, table_bytes, shared)
                    )
    (_, _, tile), x_bytes, table_bytes, shared = max(fitting)
    definitions = {
        "CODECS": needs.codecs,
        "TABLES_SHARED": int(table_bytes == needs.table_bytes),
        "X_SHARED": int(x_bytes > 0),
        "X_KIND": x_kind,
        "TOKENS": tile,
        **tuning.definitions(needs.codecs, tile),
    }
    resident = tuning.warps_at_once(needs.codecs, tile)
    blocks = max(1, min(limit // max(shared, 1), resident // tuning.warps))
    return Plan(definitions, tuning.warps, tile, table_bytes, x_bytes, shared, blocks)


@functools.lru_cache(maxsize=256)
def _matmul_plan(
    needs: Needs, columns: int, tokens: int, kinds: tuple[int, int], limit: int, tuning: Tuning
) -> Plan:
    plan = make_plan(needs, columns, tokens, kinds[0], limit, tuning=tuning)
    plan.definitions["OUT_KIND"] = kinds[1]
    return plan


def launch_matmul(
    matrices: PackedMatrices,
    x: Any,
    y: Any,
    tokens: int,
    dtypes: tuple[str, str],
    *,
    number: int = 0,
    stream: int | None = None,
    tuning: Tuning | None = None,
) -> None:
    """y [tokens, rows] = x [tokens, columns] times matrix `number`, transposed; `dtypes` of x and y."""
    if not tokens or not matrices.rows:
        return
    device = matrices.device
    kinds = (KINDS[dtypes[0]], KINDS[dtypes[1]])
    tuning = tuning or (ONE_TOKEN if tokens == 1 else TUNING)
    plan = _matmul_plan(matrices.needs, matrices.columns, tokens, kinds, device.shared_limit, tuning)
    where_x, where_y = address(x), address(y)
    for first in range(0, tokens, MOST_GRID * plan.tokens):  # one round but for millions of tokens
        some = min(tokens - first, MOST_GRID * plan.tokens)
        device.launch(
            "matmul.cu",
            plan.definitions,
            "matmul",
            (plan.grid_rows(matrices.rows, device.multiprocessors), -(-some // plan.tokens)),
            32 * plan.warps,
            plan.shared_bytes,
            (
                matrices.records[number : number + 1].reshape(()),
                address(matrices.tables),
                np.uint64(int(where_x) + first * matrices.columns * SIZES[dtypes[0]]),
                np.uint64(int(where_y) + first * matrices.rows * SIZES[dtypes[1]]),
                np.uint32(some),
                np.uint32(plan.table_bytes),
                np.uint32(plan.x_bytes),
            ),
            stream,
        )


def launch_tiles(
    matrices: PackedMatrices,
    x: Any,
    y: Any,
    tokens: int,
    dtype: str,
    *,
    number: int = 0,
    stream: int | None = None,
    tuning: Tuning = TUNING,
) -> bool:
    """The same by tensor cores, for some dozens of tokens in bfloat16 or float16; weights are rounded to it.

    Returns
    -------
    bool
        Whether the rows fit into shared memory; if not, nothing was done.
    """
    device = matrices.device
    pitch = -(-matrices.columns // 16) * 16 + 16  # rows a few banks apart
    room = 16 * pitch + 4 * 16 * 16 * TILE_TOKENS
    table_bytes = matrices.needs.table_bytes
    if room + table_bytes > device.shared_limit - OWN_BYTES:
        table_bytes = 0
    if room > device.shared_limit - OWN_BYTES:
        return False
    if not tokens or not matrices.rows:
        return True
    blocks = -(-matrices.rows // 16)
    definitions = {
        "CODECS": matrices.needs.codecs,
        "TABLES_SHARED": int(table_bytes == matrices.needs.table_bytes),
        "X_KIND": KINDS[dtype],
        "SHARE": tuning.share,
        "TOGETHER": tuning.together,
        "PREFETCH": int(tuning.prefetch),
    }
    device.launch(
        "tiles.cu",
        definitions,
        "tiles",
        (blocks, max(1, min(-(-tokens // TILE_TOKENS), device.multiprocessors // blocks))),
        512,
        room + table_bytes,
        (
            matrices.records[number : number + 1].reshape(()),
            address(matrices.tables),
            address(x),
            address(y),
            np.uint32(tokens),
            np.uint32(table_bytes),
            np.uint32(pitch),
        ),
        stream,
    )
    return True


def launch_decode(
    matrices: PackedMatrices,
    out: Any,
    dtype: str,
    *,
    first: int = 0,
    count: int | None = None,
    stream: int | None = None,
    tuning: Tuning = TUNING,
) -> None:
    """out [count, rows, columns] = matrices first … first + count - 1, as trits (int8) or weights."""
    count = matrices.count - first if count is None else count
    if not count or not matrices.rows or not matrices.columns:
        return
    device: Device = matrices.device
    warps = tuning.warps
    windows = warps * WINDOW_BYTES
    table_bytes = matrices.needs.table_bytes
    if windows + table_bytes > device.shared_limit - OWN_BYTES:
        table_bytes = 0
    shared = table_bytes + windows
    blocks = max(1, min((device.shared_limit - OWN_BYTES) // shared, tuning.resident // warps))
    units = -(-matrices.rows // warps)
    rounds = max(1, units * count // (blocks * device.multiprocessors))
    matrix_size = matrices.rows * matrices.columns * SIZES[dtype]
    definitions = {
        "CODECS": matrices.needs.codecs,
        "TABLES_SHARED": int(table_bytes == matrices.needs.table_bytes),
        "OUT_KIND": KINDS[dtype],
        **tuning.definitions(matrices.needs.codecs, 1),
    }
    for start in range(0, count, MOST_GRID):
        device.launch(
            "decode.cu",
            definitions,
            "decode",
            (-(-units // rounds), min(count - start, MOST_GRID)),
            32 * warps,
            shared,
            (
                np.uint64(int(address(matrices.descriptors)) + 128 * (first + start)),
                address(matrices.tables),
                np.uint64(int(address(out)) + start * matrix_size),
                np.uint32(table_bytes),
            ),
            stream,
        )


def check_dtype(dtype: str, field: str, allowed: tuple[str, ...]) -> None:
    """Refuse a dtype that is not among those allowed."""
    if dtype not in allowed:
        raise ArgumentError("no such dtype", field=field, value=dtype, expected=allowed)
