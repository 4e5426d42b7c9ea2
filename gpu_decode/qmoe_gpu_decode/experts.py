"""All experts of a layer in four launches (kernels/experts.cu), with no word from the device in between."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from qmoe_codec import Dictionary, FrameHeader, read_frame_header
from qmoe_codec.errors import ArgumentError, HeaderError, RowIndexError, SizeError
from qmoe_codec.layout import Buffer, as_bytes, check

from .device import Argument, Device, address
from .matrices import DESCRIPTOR, Needs, Tables, check_frame, describe
from .products import KINDS, MOST_GRID, SIZES, Plan, Tuning, make_plan

CLAMPED_SWIGLU = "clamped_swiglu"
ACTIVATIONS = {"none": 0, "silu": 1, "gelu": 2, "gelu_tanh": 3, "relu": 4, CLAMPED_SWIGLU: 5}
"""The last one takes gate and up together (spec 6.3)."""
MOST_TOKENS = 8  # of a tile
TUNING = Tuning(resident=16)
RECORD_ALIGNMENT = 16

INDEX_SIZES = {"int32": 4, "int64": 8}

Allocate = Callable[[tuple[int, ...], str], Any]


class ExpertProjection(NamedTuple):
    """One matrix of every expert, in the order of the frames in a record (spec 6.3)."""

    role: str
    """gate, up or down"""
    rows: int
    columns: int


class Gating(NamedTuple):
    """The numbers of the clamped SwiGLU (spec 6.3)."""

    alpha: float
    limit: float


NO_GATING = Gating(0.0, 0.0)


class LentExpert(NamedTuple):
    """One expert of :class:`LentExperts`."""

    descriptors: NDArray[np.uint8]
    """Of its matrices: their bytes."""
    needs_in: Needs
    needs_out: Needs


class Plans(NamedTuple):
    """Tokens of a tile, and the specialisations of the kernels."""

    tile: int
    route: dict[str, int]
    enter: Plan
    leave: Plan


class DeviceExperts:
    """Experts of one layer as the kernels know them, wherever on the device their frames lie.

    Parameters
    ----------
    projections : sequence of ExpertProjection
        In the order of the frames in a record.
    device : Device

    Raises
    ------
    ArgumentError
        Projections that cannot be computed with.
    """

    experts: int
    descriptors: Any
    """Of the matrices, [experts, projections]: on the device."""
    tables: Any
    """The dictionaries that the descriptors mean: on the device."""
    needs_in: Needs
    needs_out: Needs
    biases: dict[str, Any]
    """By role, float32 [experts, rows], on the device."""

    def __init__(self, projections: Sequence[ExpertProjection], device: Device) -> None:
        self.device = device
        self.projections = tuple(projections)
        roles = [projection.role for projection in projections]
        if sorted(roles) not in (["down", "up"], ["down", "gate", "up"]):
            raise ArgumentError(
                "cannot compute with these", field="role", value=roles, expected="[gate,] up, down"
            )
        self.numbers = {role: number for number, role in enumerate(roles)}
        self.gated = "gate" in roles
        up, down = (projections[self.numbers[role]] for role in ("up", "down"))
        self.hidden, self.intermediate = up.columns, up.rows
        for projection in projections:
            shape = (up.columns, up.rows) if projection is down else (up.rows, up.columns)
            if (projection.rows, projection.columns) != shape:
                raise ArgumentError(
                    "shapes do not fit each other", field="projections", value=tuple(projections)
                )
        self._plans: dict[tuple[Any, ...], Plans] = {}

    def _take_biases(self, biases: Mapping[str, Any] | None, experts: int) -> None:
        self.biases = dict(biases or {})
        for role, bias in self.biases.items():
            known = role in self.numbers
            expected = (experts, self.projections[self.numbers[role]].rows) if known else None
            if tuple(bias.shape) != expected or str(bias.dtype).removeprefix("torch.") != "float32":
                raise ArgumentError(
                    "unfit",
                    field=f"biases: {role}",
                    value=(tuple(bias.shape), str(bias.dtype)),
                    expected=f"float32 {expected}" if expected else list(self.numbers),
                )

    def _needs(self, headers: Sequence[FrameHeader]) -> tuple[Needs, Needs]:
        """What gate and up need of the kernels, and what down does: headers of whole experts."""
        down, count = self.numbers["down"], len(self.projections)
        inner = [header for place, header in enumerate(headers) if place % count != down]
        return Needs.of(inner), Needs.of(headers[down::count])

    def plans(
        self, pairs: int, tokens: int, activation: str, dtypes: tuple[str, str, str], tuning: Tuning
    ) -> Plans:
        """The plans for a call of this kind; made once."""
        average = pairs / max(1, self.experts)
        tile = (
            1 if tokens == 1 else min(MOST_TOKENS, max(2, 1 << int(np.ceil(np.log2(max(1.0, 2 * average))))))
        )
        if activation == CLAMPED_SWIGLU and not self.gated:
            raise ArgumentError("needs a gate", field="activation", value=activation)
        key = (self.needs_in, self.needs_out, tile, activation, dtypes, tuning)
        found = self._plans.get(key)
        if found is None:
            x_kind, limit = KINDS[dtypes[0]], self.device.shared_limit
            sets = 2 if self.gated else 1
            enter = make_plan(self.needs_in, self.hidden, tile, x_kind, limit, tuning=tuning, sets=sets)
            leave = make_plan(self.needs_out, self.intermediate, tile, KINDS["float32"], limit, tuning=tuning)
            tile = min(enter.tokens, leave.tokens)  # both take the same tiles
            enter = make_plan(self.needs_in, self.hidden, tile, x_kind, limit, tuning=tuning, sets=sets)
            leave = make_plan(self.needs_out, self.intermediate, tile, KINDS["float32"], limit, tuning=tuning)
            enter.definitions.update(ACTIVATION=ACTIVATIONS[activation], GATED=int(self.gated))
            route = {
                "TOKENS": tile,
                "INDEX_SIZE": INDEX_SIZES[dtypes[1]],
                "WEIGHT_KIND": KINDS[dtypes[2]],
                "OUT_KIND": x_kind,
            }
            found = self._plans[key] = Plans(tile, route, enter, leave)
        return found


class PackedExperts(DeviceExperts):
    """The packed experts of one layer on a device, all of them.

    Parameters
    ----------
    store : buffer
        The layer's `qmoe_store`, on the host: it is checked there.
    index : ndarray of int64 [experts, 3]
        The layer's `qmoe_index`.
    dictionaries : mapping of int to Dictionary
        Dictionaries by id.
    projections : sequence of ExpertProjection
        In the order of the frames in a record.
    device : Device
        Where the experts go.
    device_store : array of uint8, optional
        The same bytes as `store`, on the device already; kept, and read where they lie.
    biases : mapping of str to array of float32 [experts, rows], optional
        By role, on the device, contiguous; kept. A projection without has none added.
    verify : bool
        Whether checksum and codewords are checked too; headers and row indexes always are.

    Raises
    ------
    FormatError
        The bytes are not what the spec says.
    ArgumentError
        Projections that cannot be computed with.
    """

    def __init__(
        self,
        store: Buffer,
        index: NDArray[np.int64],
        dictionaries: Mapping[int, Dictionary],
        projections: Sequence[ExpertProjection],
        device: Device,
        *,
        device_store: Any = None,
        biases: Mapping[str, Any] | None = None,
        verify: bool = True,
    ) -> None:
        super().__init__(projections, device)
        self._take_biases(biases, len(index))
        view = as_bytes(store)
        headers: list[FrameHeader] = []
        offsets: list[int] = []
        for expert, (offset, size) in enumerate(index[:, :2].tolist()):
            fits = (
                0 <= offset <= len(view)
                and 0 <= size <= len(view) - offset
                and offset % RECORD_ALIGNMENT == 0
            )
            check(
                fits,
                RowIndexError,
                "qmoe_index",
                (expert, offset, size),
                f"within {len(view)} bytes, aligned",
            )
            record = view[offset : offset + size]
            for projection in projections:
                header = read_frame_header(record)
                check(len(record) >= header.frame_size, SizeError, "record", len(record), header.frame_size)
                check_frame(record[: header.frame_size], dictionaries, verify=verify)
                shape = (header.rows, header.columns)
                expected = (projection.rows, projection.columns)
                check(shape == expected, HeaderError, "rows, columns", shape, expected)
                headers.append(header)
                offsets.append(offset)
                offset += header.frame_size
                record = record[header.frame_size :]
            check(len(record) == 0, SizeError, "record", len(record), "one frame per projection")
        self.experts = len(index)
        self.store = device.upload(np.frombuffer(view, np.uint8)) if device_store is None else device_store
        used = {identity for header in headers for identity in header.dictionary_ids}
        tables = Tables({identity: dictionaries[identity] for identity in sorted(used)})
        self.tables = device.upload(tables.words)
        base = int(address(self.store))
        records = [describe(h, base + o, tables) for h, o in zip(headers, offsets, strict=True)]
        packed = np.stack(records) if records else np.zeros(0, DESCRIPTOR)
        self.descriptors = device.upload(packed.view(np.uint8))
        self.needs_in, self.needs_out = self._needs(headers)


class LentExperts(DeviceExperts):
    """Some experts of a layer, each in a slot of device memory: what a cache lends.

    Made for a layer without any; :meth:`some` gives what can be computed with.

    Parameters
    ----------
    projections, device
        As for :class:`DeviceExperts`.
    dictionaries : mapping of int to Dictionary
        All that the layer's frames may name, by id.
    """

    def __init__(
        self,
        projections: Sequence[ExpertProjection],
        dictionaries: Mapping[int, Dictionary],
        device: Device,
    ) -> None:
        super().__init__(projections, device)
        self._tables = Tables(dictionaries)
        self.tables = device.upload(self._tables.words)
        self.experts = 0
        self.needs_in = self.needs_out = Needs(0, 0)

    def describe(self, record: Buffer, place: int) -> LentExpert:
        """An expert whose record, checked before, lies at this address of the device.

        Parameters
        ----------
        record : buffer
            The same bytes on the host.
        place : int
            A multiple of 16.
        """
        view = as_bytes(record)
        headers: list[FrameHeader] = []
        descriptors = np.zeros(len(self.projections), DESCRIPTOR)
        offset = 0
        for number in range(len(self.projections)):
            header = read_frame_header(view, offset)
            headers.append(header)
            descriptors[number] = describe(header, place + offset, self._tables)
            offset += header.frame_size
        return LentExpert(descriptors.view(np.uint8), *self._needs(headers))

    def some(
        self,
        experts: Sequence[LentExpert],
        upload: Callable[[NDArray[np.uint8]], Any],
        biases: Mapping[str, Any] | None = None,
    ) -> LentExperts:
        """These, numbered from 0 on, as the operators take them.

        Parameters
        ----------
        experts : sequence of LentExpert
            At least one.
        upload : callable
            Copies bytes to the device, before what is launched next on the stream that computes.
        biases : mapping of str to array, optional
            Theirs, as for :class:`PackedExperts`.
        """
        chosen = copy.copy(self)
        chosen._take_biases(biases, len(experts))
        # What was needed before is kept, so that it comes to few specialisations of the kernels
        self.needs_in = chosen.needs_in = Needs.together([self.needs_in, *(e.needs_in for e in experts)])
        self.needs_out = chosen.needs_out = Needs.together([self.needs_out, *(e.needs_out for e in experts)])
        chosen.experts = len(experts)
        chosen.descriptors = upload(np.concatenate([e.descriptors for e in experts]))
        return chosen


def launch_experts(
    experts: DeviceExperts,
    x: Any,
    index: Any,
    weights: Any,
    y: Any,
    tokens: int,
    choices: int,
    activation: str,
    dtypes: tuple[str, str, str],
    *,
    allocate: Allocate,
    gating: Gating = NO_GATING,
    stream: int | None = None,
    tuning: Tuning = TUNING,
) -> None:
    """y [tokens, hidden] from x [tokens, hidden], index and weights [tokens, choices].

    `dtypes` are those of x and y, of index and of weights. Scratch comes from `allocate`, so that a library
    that captures graphs can keep it; nothing is waited for.
    """
    if not tokens or not experts.hidden:
        return
    plans = experts.plans(tokens * choices, tokens, activation, dtypes, tuning)
    # So many tokens at once that neither a grid nor a number of 32 bits runs over.
    step = max(
        1,
        min(
            tokens,
            (MOST_GRID - experts.experts) * plans.tile // max(1, choices),
            (1 << 31) // max(1, choices),
        ),
    )
    if experts.experts >= MOST_GRID:
        raise ArgumentError("too many", field="experts", value=experts.experts, expected=f"below {MOST_GRID}")
    x_size, index_size, weight_size = (SIZES[dtypes[0]], INDEX_SIZES[dtypes[1]], SIZES[dtypes[2]])
    some = min(step, tokens)
    pairs = max(1, some * choices)
    limit = max(1, min(pairs, experts.experts + pairs // plans.tile))
    order, tiles = allocate((pairs,), "int32"), allocate((limit, 4), "int32")
    hidden = allocate((pairs, max(1, experts.intermediate)), "float32")
    result = allocate((pairs, experts.hidden), "float32")
    for first in range(0, tokens, step):
        some = min(step, tokens - first)
        _launch_some(
            experts,
            (
                np.uint64(int(address(x)) + first * experts.hidden * x_size),
                np.uint64(int(address(index)) + first * choices * index_size),
                np.uint64(int(address(weights)) + first * choices * weight_size),
                np.uint64(int(address(y)) + first * experts.hidden * x_size),
            ),
            (address(order), address(tiles), address(hidden), address(result)),
            (some, choices, limit),
            plans,
            gating,
            stream,
        )


def _launch_some(
    experts: DeviceExperts,
    arrays: tuple[np.uint64, np.uint64, np.uint64, np.uint64],
    scratch: tuple[np.uint64, np.uint64, np.uint64, np.uint64],
    counts: tuple[int, int, int],
    plans: Plans,
    gating: Gating,
    stream: int | None,
) -> None:
    x, index, weights, y = arrays
    order, tiles, hidden, result = scratch
    some, choices, limit = counts
    enter, leave = plans.enter, plans.leave
    device, u32 = experts.device, np.uint32
    descriptors, projections = address(experts.descriptors), u32(len(experts.projections))
    tables = address(experts.tables)

    def bias(role: str) -> np.uint64:
        found = experts.biases.get(role)
        return np.uint64(0) if found is None else address(found)

    def launch(
        definitions: dict[str, int],
        kernel: str,
        grid: tuple[int, int],
        threads: int,
        shared: int,
        *arguments: Argument,
    ) -> None:
        file = f"{kernel}.cu" if kernel != "combine" else "route.cu"
        device.launch(file, definitions, kernel, grid, threads, shared, arguments, stream)

    def rows(plan: Plan, count: int) -> int:
        # Tiles fill the device too: blocks of rows alone need not.
        busy = max(1, min(limit, some * choices, experts.experts))
        return plan.grid_rows(count, max(1, -(-device.multiprocessors // busy)))

    if choices and experts.experts:
        pairs = u32(some * choices)
        room = 4 * (experts.experts + 1)
        launch(
            plans.route,
            "route",
            (1, 1),
            1024,
            room,
            index,
            pairs,
            u32(experts.experts),
            order,
            tiles,
            u32(limit),
        )
        if experts.intermediate:
            launch(
                enter.definitions,
                "enter",
                (rows(enter, experts.intermediate), limit),
                32 * enter.warps,
                enter.shared_bytes,
                descriptors,
                projections,
                u32(experts.numbers.get("gate", 0)),
                u32(experts.numbers["up"]),
                tables,
                x,
                order,
                u32(choices),
                tiles,
                bias("up"),
                bias("gate"),
                np.float32(gating.alpha),
                np.float32(gating.limit),
                hidden,
                u32(enter.table_bytes),
                u32(enter.x_bytes),
            )
        launch(
            leave.definitions,
            "leave",
            (rows(leave, experts.hidden), limit),
            32 * leave.warps,
            leave.shared_bytes,
            descriptors,
            projections,
            u32(experts.numbers["down"]),
            tables,
            hidden,
            order,
            tiles,
            bias("down"),
            result,
            u32(leave.table_bytes),
            u32(leave.x_bytes),
        )
    outputs = some * experts.hidden
    launch(
        plans.route,
        "combine",
        (min(-(-outputs // 256), 1 << 20), 1),
        256,
        0,
        result,
        index,
        weights,
        y,
        np.uint64(outputs),
        u32(experts.hidden),
        u32(choices),
        u32(experts.experts),
    )
